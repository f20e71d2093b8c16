"""The lessons: what a student writes in each, and the laws that grade it.

A law is a sentence, its points, and the tests of the project that check it. It holds if all of them
pass. Each test must fail while the functions of the exercise are not written, and must take no
expected value and no tolerance from the student's code.
"""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
WORK = ROOT / "work"  # the students' files


@dataclass(frozen=True)
class Law:
    """A property that an answer must have.

    tests: names of test functions in the lesson's suite, or ids such as "tests/test_x.py::test_y".
    """

    name: str
    points: int
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Lesson:
    """One lesson, in the folder course/{number}_{slug}.

    file: the file that the student writes a part of.
    cut: the functions that the student writes, as "name", "Class.name" or "outer.inner"; private
        ones may be replaced by others.
    given: private helpers that stay, although only the functions of `cut` use them.
    suite: the file of tests where the tests of the laws are.
    """

    number: int
    slug: str
    title: str
    file: str
    cut: tuple[str, ...]
    given: tuple[str, ...]
    suite: str
    laws: tuple[Law, ...]

    @property
    def folder(self) -> Path:
        return ROOT / "course" / f"{self.number}_{self.slug}"

    @property
    def source(self) -> Path:
        return ROOT / self.file

    @property
    def module(self) -> str:
        """The name that others import the file by."""
        return self.file.removesuffix(".py").replace("/", ".")

    @property
    def answer(self) -> Path:
        """Where the student writes."""
        return WORK / str(self.number) / self.source.name

    def test_ids(self, law: Law) -> list[str]:
        return [name if "::" in name else f"{self.suite}::{name}" for name in law.tests]
