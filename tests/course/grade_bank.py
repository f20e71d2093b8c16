"""Grades the answers of the bank in one process, which imports torch and pytest once.

    python tests/course/grade_bank.py              all lessons, and the attacks
    python tests/course/grade_bank.py 2 hostile    some of them

A wrong answer is graded by the law that it breaks; a right one, the stub and the real file by all
laws. Prints for each its name and what the student reads. With --json it prints a line of JSON for
each: lesson, name, points, most points, and what the student reads.
"""

import importlib
import json
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[level]) for level in (0, 1, 2)]

from bank import answers  # noqa: E402 (after the path is set)
from bank.hostile import HOSTILE, Hostile  # noqa: E402
from course import grade, guard, plugin  # noqa: E402
from course.lesson import Law, Lesson  # noqa: E402
from course.lessons import LESSONS  # noqa: E402
from course.stubs import stub  # noqa: E402

SLOW = ("numba.cuda", "transformers.models.llama.modeling_llama")  # imported once for all answers


def bank_of(lesson: Lesson) -> list[answers.Answer]:
    module = importlib.import_module(f"bank.lesson_{lesson.number}")
    return [*module.WRONG, *module.RIGHT]


def graded(
    source: str, lesson: Lesson, folder: Path, laws: tuple[Law, ...] | None = None
) -> grade.Grade:
    path = folder / lesson.source.name
    path.write_text(source)
    return grade.grade(lesson, path, laws)


def graded_answer(answer: answers.Answer, lesson: Lesson, folder: Path) -> grade.Grade:
    laws = (answers.law_of(answer, lesson),) if answer.law else None
    return graded(answers.source_of(answer, lesson), lesson, folder, laws)


def graded_attack(hostile: Hostile, folder: Path) -> grade.Grade:
    """By two laws: one about the levels alone, one that calls the code of the attack."""
    lesson = LESSONS[2]
    source = answers.source_of(hostile.answer, lesson) + hostile.at_import
    return graded(source, lesson, folder, (lesson.laws[0], lesson.laws[2]))


def show(group: int | str, name: str, result: grade.Grade, as_json: bool) -> None:
    line = json.dumps([group, name, result.points, result.most, str(result)])
    print(line if as_json else f"# {name}\n\n{result}\n", flush=True)


def main(numbers: list[int], hostile: bool, as_json: bool) -> None:
    sys.meta_path.insert(0, guard.AbsentPeers())
    for name in [*plugin.ORACLES, *plugin.PATCHING, *SLOW]:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            lesson = LESSONS[number]
            show(number, "stub", graded(stub(lesson), lesson, Path(folder)), as_json)
            show(number, "real", graded(lesson.source.read_text(), lesson, Path(folder)), as_json)
            for answer in bank_of(lesson):
                show(number, answer.name, graded_answer(answer, lesson, Path(folder)), as_json)
        grade.SECONDS_OF_A_LAW = 4
        for attack in HOSTILE if hostile else []:
            show("hostile", attack.name, graded_attack(attack, Path(folder)), as_json)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--json"] or [*LESSONS, "hostile"]
    numbers = [int(word) for word in words if word != "hostile"]
    main(numbers, "hostile" in words, as_json="--json" in sys.argv)
