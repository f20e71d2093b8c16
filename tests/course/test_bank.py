"""Every wrong answer of the bank breaks its law, every right one none, no attack wins a point."""

import importlib
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from coverage import Coverage

from bank import answers
from bank.hostile import HOSTILE, Hostile
from course.lesson import ROOT
from course.lessons import LESSONS

BANKS = {number: importlib.import_module(f"bank.lesson_{number}") for number in LESSONS}
WRONG = [(number, answer) for number, bank in BANKS.items() for answer in bank.WRONG]
RIGHT = [(number, answer) for number, bank in BANKS.items() for answer in bank.RIGHT]
SCRIPT = Path(__file__).with_name("grade_bank.py")


def name_of(parameter: object) -> str:
    return getattr(parameter, "name", str(parameter))


@cache
def graded() -> dict[tuple[int | str, str], tuple[int, int, str]]:
    """For each answer: points, most points, and what the student reads."""
    measure = ["-m", "coverage", "run", "--parallel-mode"] if Coverage.current() else []
    measured = ["3", "hostile"]  # enough to reach every line: measuring takes time
    others = [str(number) for number in LESSONS if str(number) not in measured]
    runs = [[*measure, SCRIPT, "--json", *measured], [SCRIPT, "--json", *others]]
    lines = [json.loads(line) for run in runs for line in output_of(run).splitlines()]
    return {(group, name): (points, most, text) for group, name, points, most, text in lines}


def output_of(command: list[str | Path]) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *command]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_every_lesson_has_wrong_and_right_answers_of_different_names() -> None:
    assert {*BANKS} == {*LESSONS}
    for bank in BANKS.values():
        names = [answer.name for answer in [*bank.WRONG, *bank.RIGHT]]
        assert bank.WRONG and bank.RIGHT and len(names) == len({*names})


@pytest.mark.parametrize("number", LESSONS)
def test_every_law_is_broken_by_an_answer(number: int) -> None:
    broken = {answers.law_of(answer, LESSONS[number]) for answer in BANKS[number].WRONG}
    assert broken == {*LESSONS[number].laws}


@pytest.mark.parametrize(("number", "answer"), WRONG, ids=name_of)
def test_a_wrong_answer_is_told_which_law_it_breaks_and_what_was_wanted(
    number: int, answer: answers.Answer
) -> None:
    points, _, text = graded()[number, answer.name]
    law = answers.law_of(answer, LESSONS[number])
    assert points == 0
    assert f"BROKEN  0/{law.points}  {law.name}" in text
    assert "wanted" in text and answer.shows in text


@pytest.mark.parametrize(("number", "answer"), RIGHT, ids=name_of)
def test_a_right_answer_has_all_points(number: int, answer: answers.Answer) -> None:
    points, most, text = graded()[number, answer.name]
    assert points == most == sum(law.points for law in LESSONS[number].laws), text


@pytest.mark.parametrize("number", LESSONS)
def test_a_stub_passes_no_law_and_the_real_file_all(number: int) -> None:
    points, most, _ = graded()[number, "stub"]
    assert points == 0 and most == 20
    points, most, text = graded()[number, "real"]
    assert points == most == 20, text


@pytest.mark.parametrize("hostile", HOSTILE, ids=name_of)
def test_an_attack_is_told_in_one_line_and_has_only_the_points_shown_before(
    hostile: Hostile,
) -> None:
    points, _, text = graded()["hostile", hostile.name]
    assert points == hostile.points
    assert [line for line in text.splitlines() if hostile.says in line], text
