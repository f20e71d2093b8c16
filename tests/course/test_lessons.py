"""The lessons: headings, examples, predictions, figures, links, and the mistakes that they name."""

import doctest
import importlib
import json
import re
from pathlib import Path

import pytest

from course import __main__, figures
from course.lesson import ROOT, Lesson
from course.lessons import LESSONS
from course.page import build

HEADINGS = [
    "What you will know",
    "The idea",
    "Predict",
    "A worked example",
    "Exercise",
    "Hints",
    "In real systems",
    "Further reading",
]
MOST_LINES = 300
each_lesson = pytest.mark.parametrize("lesson", LESSONS.values(), ids=lambda lesson: lesson.slug)


def text_of(lesson: Lesson) -> str:
    return (lesson.folder / "lesson.md").read_text()


def section(lesson: Lesson, heading: str) -> str:
    return text_of(lesson).partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def folded(text: str) -> list[str]:
    """The contents of the <details> of a text."""
    return re.findall(r"<details>(.*?)</details>", text, re.DOTALL)


def test_every_folder_with_a_lesson_is_in_the_table() -> None:
    folders = {path.parent for path in (ROOT / "course").glob("*/lesson.md")}
    assert folders == {lesson.folder for lesson in LESSONS.values()}


@each_lesson
def test_a_lesson_has_its_title_and_the_headings_in_their_order(lesson: Lesson) -> None:
    text = text_of(lesson)
    assert text.startswith(f"# Lesson {lesson.number}: ")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == HEADINGS
    assert len(text.splitlines()) <= MOST_LINES


@each_lesson
def test_the_examples_print_what_the_lesson_shows(lesson: Lesson) -> None:
    """All blocks of a lesson are one session."""
    code = re.findall(r"^```python\n(.*?)^```$", text_of(lesson), re.DOTALL | re.MULTILINE)
    assert code
    test = doctest.DocTestParser().get_doctest("\n".join(code), {}, lesson.slug, None, 0)
    report = []
    doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert not report, "".join(report)


@each_lesson
def test_there_are_three_predictions_with_a_verified_answer_and_three_hints(
    lesson: Lesson,
) -> None:
    answers = folded(section(lesson, "Predict"))
    assert len(answers) == 3 and all(">>> " in answer for answer in answers)
    hints = folded(section(lesson, "Hints"))
    assert len(hints) == 3
    assert all(f"Hint {number}" in hint for number, hint in enumerate(hints, start=1))


@each_lesson
def test_the_exercise_names_each_function_and_both_commands(lesson: Lesson) -> None:
    exercise = section(lesson, "Exercise")
    assert not [name for name in lesson.cut if name not in exercise]
    assert f"make lesson LESSON={lesson.number}" in exercise
    assert f"make grade LESSON={lesson.number}" in exercise


@each_lesson
def test_each_mistake_of_a_real_system_is_a_wrong_answer_of_the_bank(lesson: Lesson) -> None:
    bank = importlib.import_module(f"bank.lesson_{lesson.number}")
    items = re.split(r"^- ", section(lesson, "In real systems"), flags=re.MULTILINE)[1:]
    named = [re.findall(r"Wrong\s+answer:\s+`(.*?)`", item, re.DOTALL) for item in items]
    assert items and all(named)
    names = {" ".join(name.split()) for found in named for name in found}
    assert names <= {answer.name for answer in bank.WRONG}


@each_lesson
def test_links_and_the_figure_lead_somewhere(lesson: Lesson) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", text_of(lesson))
    assert "figure.svg" in links
    local = [link for link in links if not link.startswith("http")]
    assert not [link for link in local if not (lesson.folder / link).exists()]


@each_lesson
def test_the_figure_is_what_the_code_draws_byte_for_byte(lesson: Lesson) -> None:
    assert figures.drawn(lesson) == (lesson.folder / "figure.svg").read_bytes()


def test_build_draws_every_figure_and_writes_the_pages_and_the_notebooks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(figures, "drawn", lambda lesson: b"drawing")
    monkeypatch.setattr(build, "main", lambda: print("wrote the pages"))
    folder = tmp_path / "2_nf4"
    folder.mkdir()
    (folder / "lesson.md").write_text(text_of(LESSONS[2]))
    monkeypatch.setattr(Lesson, "folder", property(lambda lesson: folder))
    monkeypatch.setattr(__main__, "LESSONS", {2: LESSONS[2]})
    monkeypatch.setattr(__main__, "ROOT", tmp_path)
    monkeypatch.setattr(__main__, "NOTEBOOKS", tmp_path / "notebooks")
    __main__.main(["build"])
    assert (folder / "figure.svg").read_bytes() == b"drawing"
    assert json.loads((tmp_path / "notebooks" / "2_nf4.ipynb").read_text())["cells"]
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "drew 2_nf4/figure.svg",
        "wrote the pages",
        "wrote notebooks/2_nf4.ipynb",
    ]


def test_the_slides_of_a_lesson_are_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(build, "SITE", tmp_path)
    monkeypatch.setattr(__main__, "ROOT", tmp_path)
    __main__.main(["slides", "2"])
    assert capsys.readouterr().out == "wrote 2_nf4.slides.html; arrow keys turn the slides\n"
    assert (tmp_path / "2_nf4.slides.html").read_text().count('class="slide"') == 1 + len(HEADINGS)
