"""The file that a student starts from: what is cut, what stays, and what is never overwritten."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest

from course import stubs
from course.lesson import ROOT, Lesson
from course.lessons import LESSONS

each_lesson = pytest.mark.parametrize("lesson", LESSONS.values(), ids=lambda lesson: lesson.slug)


def lesson_on(source: str, folder: Path, **fields: tuple[str, ...]) -> Lesson:
    """Lesson 1 on a file with this source."""
    path = folder / "sample.py"
    path.write_text(source)
    return replace(LESSONS[1], file=str(path), **fields)


@each_lesson
def test_signature_and_docstring_stay_and_the_body_goes(lesson: Lesson) -> None:
    real = stubs.definitions(ast.parse(lesson.source.read_text()))
    cut = stubs.definitions(ast.parse(stubs.stub(lesson)))
    for name in lesson.cut:
        assert ast.dump(cut[name].args) == ast.dump(real[name].args)
        assert ast.get_docstring(cut[name]) == ast.get_docstring(real[name])
        assert isinstance(cut[name].body[-1], ast.Raise)
        assert len(cut[name].body) == bool(ast.get_docstring(real[name])) + 1


@each_lesson
def test_every_other_line_is_one_of_the_real_file_in_its_order(lesson: Lesson) -> None:
    real = iter(lesson.source.read_text().splitlines())
    others = [line for line in stubs.stub(lesson).splitlines() if "NotImplementedError" not in line]
    assert all(line in real for line in others)  # `in` reads the iterator on to the line


@each_lesson
def test_what_is_removed_is_not_used_by_what_stays(lesson: Lesson) -> None:
    cut = ast.parse(stubs.stub(lesson))
    removed = {*stubs.definitions(ast.parse(lesson.source.read_text()))} - {*stubs.definitions(cut)}
    used = stubs.names_used(cut, without=set())
    assert not {name.rpartition(".")[2] for name in removed} & {*used}


def test_a_private_helper_of_the_cut_functions_alone_goes_too(tmp_path: Path) -> None:
    source = '''
def asked():
    """Say it."""
    return _helper()


@decorated
def _helper():
    return _deeper() + _shared()


def _deeper():
    return _deeper


def _shared():
    def inner():
        return 1

    return inner()


class Kept:
    def method(self):
        return _shared() + self.other()

    def other(self):
        return 2
'''
    lesson = lesson_on(source, tmp_path, cut=("asked", "Kept.other"), given=())
    assert (
        stubs.stub(lesson)
        == '''
def asked():
    """Say it."""
    raise NotImplementedError("write asked")


def _shared():
    def inner():
        return 1

    return inner()


class Kept:
    def method(self):
        return _shared() + self.other()

    def other(self):
        raise NotImplementedError("write other")
'''
    )
    with_helper = replace(lesson, given=("_helper",))
    assert "def _helper" in stubs.stub(with_helper) and "def _deeper" in stubs.stub(with_helper)


def test_a_function_that_the_real_file_does_not_have_is_an_error(tmp_path: Path) -> None:
    lesson = lesson_on("x = 1\n", tmp_path, cut=("absent",))
    with pytest.raises(ValueError, match="has no function absent"):
        stubs.stub(lesson)


def test_the_students_file_is_written_once_and_never_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("course.lesson.WORK", tmp_path)
    lesson = LESSONS[2]
    assert stubs.write_stub(lesson).endswith("make grade LESSON=2")
    assert lesson.answer.read_text() == stubs.stub(lesson)
    lesson.answer.write_text("mine")
    assert "is there already and was not changed" in stubs.write_stub(lesson)
    assert lesson.answer.read_text() == "mine"


@each_lesson
def test_the_tests_of_every_law_exist(lesson: Lesson) -> None:
    for law in lesson.laws:
        for name in lesson.test_ids(law):
            path, _, function = name.partition("::")
            assert function in stubs.definitions(ast.parse((ROOT / path).read_text()))


@each_lesson
def test_the_points_of_a_lesson_are_twenty(lesson: Lesson) -> None:
    assert sum(law.points for law in lesson.laws) == 20
