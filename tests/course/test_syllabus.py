"""The syllabus has every lesson, and every lesson has the points that it names."""

import ast
import re
import sys

import pytest

from course import guard
from course.lesson import ROOT, Lesson
from course.lessons import LESSONS
from course.page import export

SYLLABUS = (ROOT / "course" / "README.md").read_text()


@pytest.mark.parametrize("lesson", LESSONS.values(), ids=lambda lesson: lesson.slug)
def test_every_lesson_is_in_the_syllabus_with_20_points(lesson: Lesson) -> None:
    assert f"[{lesson.number} " in SYLLABUS
    assert f"({lesson.folder.name}/lesson.md)" in SYLLABUS
    assert sum(law.points for law in lesson.laws) == 20


def test_the_widgets_to_show_are_on_the_pages_of_that_lecture() -> None:
    rows = SYLLABUS.partition("**What to show.**")[2].partition("\n\n")[2].splitlines()[2:]
    shown = [set(re.findall(r"`(\w+)`", row)) & {*export.TABLES} for row in rows[:4]]
    for lecture, names in enumerate(shown, start=1):
        texts = [
            (LESSONS[n].folder / "lesson.md").read_text() for n in (2 * lecture - 1, 2 * lecture)
        ]
        on_pages = {*re.findall(r"<!-- widget: (\w+) -->", "".join(texts))}
        assert names == on_pages, f"lecture {lecture}"


def test_the_packages_that_the_course_imports_are_in_its_requirements() -> None:
    """make lesson and make grade install no others."""
    texts = [(ROOT / f"requirements{kind}.txt").read_text() for kind in ("", "-gpu", "-course")]
    installed = {*re.findall(r"^[\w-]+", "\n".join(texts), re.MULTILINE)}
    names = {"markdown_it": "markdown-it-py", "math_core": "math-core", "_pytest": "pytest"}
    names["mdit_py_plugins"] = "mdit-py-plugins"
    suites = {
        name.partition("::")[0]
        for lesson in LESSONS.values()
        for law in lesson.laws
        for name in lesson.test_ids(law)
    }
    paths = [*(ROOT / "course").rglob("*.py"), *(ROOT / suite for suite in suites)]
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            for name in guard.imported(node) - {*sys.stdlib_module_names, *guard.PEERS}:
                folders = [ROOT, ROOT / "tests", path.parent, ROOT / "tests" / "kernels"]
                is_ours = any(
                    [*folder.glob(f"{name}.py"), *folder.glob(name)] for folder in folders
                )
                assert is_ours or names.get(name, name) in installed, f"{path}: {name}"
