"""What the grader writes and prints, and how it shows values; test_bank.py tests what it finds."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import training
from course import __main__, explain, grade, guard, plugin
from course.grade import Grade, Verdict, end_of, grade_and_write
from course.lesson import Lesson
from course.lessons import LESSONS
from training import end_tokens


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("course.lesson.WORK", tmp_path)
    return tmp_path


def half_right() -> Grade:
    lesson = LESSONS[2]
    verdicts = [Verdict(law) for law in lesson.laws[:3]]
    verdicts[0] = Verdict(lesson.laws[0], passed=True, text="")
    verdicts[1] = Verdict(lesson.laws[1], text="wanted this\ngot that")
    return Grade(lesson, Path("nf4.py"), verdicts, fault="a crash")


def test_a_grade_names_each_law_its_points_and_why_it_is_broken() -> None:
    lines = str(half_right()).splitlines()
    laws = LESSONS[2].laws
    assert f"ok      2/2  {laws[0].name}" in lines
    assert f"BROKEN  0/3  {laws[1].name}" in lines
    assert "    got that" in lines
    assert f"--      0/4  {laws[2].name}" in lines
    assert lines[2] == "stopped: a crash" and lines[-1] == "2 of 9 points"


def test_the_results_are_in_the_format_of_gradescope() -> None:
    results = half_right().results()
    assert {*results} == {"score", "max_score", "output", "tests"}
    assert (results["score"], results["max_score"], results["output"]) == (2, 9, "a crash")
    for test in results["tests"]:
        assert {*test} == {"name", "score", "max_score", "output", "visibility"}
        assert test["visibility"] == "visible"
    outputs = [test["output"] for test in results["tests"]]
    assert outputs == ["", "wanted this\ngot that", "not tested"]


def test_without_a_file_there_is_nothing_to_grade(work: Path) -> None:
    result = grade_and_write(LESSONS[2])
    assert result.fault.endswith("make lesson LESSON=2 writes it") and result.points == 0
    assert json.loads((work / "2" / "results.json").read_text())["score"] == 0


def test_the_commands_write_the_stub_and_grade_it(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    __main__.main(["lesson", "2"])
    (work / "2" / "nf4.py").write_text("def normal_float(:")
    with pytest.raises(SystemExit) as stop:
        __main__.main(["grade", "2"])
    assert stop.value.code == 1
    printed = capsys.readouterr().out
    assert "this is not Python" in printed and "0 of 20 points" in printed


@pytest.mark.parametrize("argv", [[], ["lesson"], ["grade", "x"], ["other"]])
def test_another_command_prints_what_there_is(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        __main__.main(argv)
    assert str(stop.value.code).startswith("use: make lesson LESSON=N")


def test_a_lesson_that_does_not_exist_is_told() -> None:
    with pytest.raises(SystemExit, match="^there is no lesson 9; use: make lesson"):
        __main__.main(["grade", "9"])


def test_what_fails_in_the_grader_is_not_blamed_on_the_student(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: object) -> None:
        raise KeyError("lost")

    monkeypatch.setattr(grade, "set_limits", lambda folder: None)
    monkeypatch.setattr(grade.signal, "setitimer", lambda *_: None)
    monkeypatch.setattr(plugin, "run", fails)
    pipe, out = os.pipe()
    grade.run_tests(half_right(), Path(), 1, out)
    os.close(out)
    with open(pipe) as messages:
        assert "the grader failed: KeyError: 'lost'" in messages.read()
    sent = []
    exam = SimpleNamespace(send=sent.append, watch=SimpleNamespace(check=lambda: None))
    plugin.Exam.pytest_internalerror(exam, SimpleNamespace(exconly=lambda: "KeyError: 1"))
    assert sent == [{"fault": "the grader failed: KeyError: 1"}]


def test_the_end_of_the_process_is_told() -> None:
    assert end_of(0) == "your code ended the process that tests it."
    assert "crashed" in end_of(-6) and "SIGABRT" in end_of(-6)


@pytest.mark.parametrize("lesson", LESSONS.values(), ids=lambda lesson: lesson.slug)
def test_the_real_file_has_no_fault(lesson: Lesson) -> None:
    assert guard.fault_of(lesson.source.read_text(), lesson) is None


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("from . import nf4", "line 1: a relative import is not for this exercise"),
        ("x = '\0'", "this is not Python"),
        ("from torch import hub", "line 1: hub is not for this exercise"),
        ("import torch\ntorch.ops.load()", "line 2: ops is not for this exercise"),
    ],
)
def test_what_a_file_must_not_do_is_told_with_its_line(code: str, fault: str) -> None:
    assert fault in guard.fault_of(code, LESSONS[2])


def test_a_missing_given_function_is_told() -> None:
    source = LESSONS[2].source.read_text().replace("def check_finite", "def check")
    assert guard.fault_of(source, LESSONS[2]).startswith("check_finite is not part of this")


def test_a_file_nested_too_deeply_is_told() -> None:
    assert "this is not Python" in guard.fault_of("x = " + "-" * 10**5 + "1", LESSONS[2])


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> guard.Watch:
    """A watch that this process does not keep."""
    monkeypatch.setattr(sys, "addaudithook", lambda hook: None)
    return guard.Watch(str(tmp_path / "nf4.py"))


def run_as_student(watch: guard.Watch, event: str, *args: str) -> None:
    code = compile("audit(event, args)", watch.path, "exec")
    exec(code, {"audit": watch.audit, "event": event, "args": args})


def test_the_students_code_may_open_its_own_file_and_those_of_libraries(
    watch: guard.Watch,
) -> None:
    run_as_student(watch, "open", watch.path)
    run_as_student(watch, "open", torch.__file__)
    run_as_student(watch, "compile", "x")
    watch.audit("open", (str(LESSONS[2].source),))  # not the student's code
    assert watch.check() is None


@pytest.mark.parametrize("event", ["open", "os.system", "ctypes.dlopen"])
def test_the_students_code_may_not_open_the_real_file_nor_leave_python(
    watch: guard.Watch, event: str
) -> None:
    with pytest.raises(PermissionError, match=f"must not do this: {event}"):
        run_as_student(watch, event, str(LESSONS[2].source))
    assert watch.check() == watch.fault
    watch.active = False
    run_as_student(watch, event, str(LESSONS[2].source))


def test_a_file_of_a_package_takes_the_place_of_the_real_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lesson = replace(LESSONS[1], file="training/end_tokens.py")
    path = tmp_path / "end_tokens.py"
    path.write_text("mine = True\n")
    monkeypatch.setitem(sys.modules, lesson.module, end_tokens)
    monkeypatch.setattr(training, "end_tokens", end_tokens)
    module = guard.load(lesson, str(path))
    assert module.mine and sys.modules[lesson.module] is training.end_tokens is module


def test_a_peer_is_there_only_in_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [guard.AbsentPeers(), *sys.meta_path])
    for name in [name for name in sys.modules if name.partition(".")[0] == "trl"]:
        monkeypatch.delitem(sys.modules, name)
    import trl.trainer

    assert isinstance(trl.trainer.Trainer, type) and not hasattr(trl, "__version__")
    for name in ("trl", "trl.trainer"):
        del sys.modules[name]


# wanted and got


def table(wanted: object, got: object) -> list[str]:
    return explain.side_by_side("f(x)", wanted, got).splitlines()


def test_short_tensors_are_shown_whole_with_a_mark() -> None:
    assert table(torch.tensor([1.0, 0.1]), torch.tensor([1.0, 0.25])) == [
        "f(x)",
        "    wanted            got",
        "    [1, 0.100000001]  [1, 0.25]  <-",
    ]


def test_of_long_tensors_the_first_that_differ_are_shown() -> None:
    lines = table(torch.arange(100), torch.arange(100) + (torch.arange(100) > 90))
    assert [line.split() for line in lines[2:4]] == [
        ["[91]", "91", "92", "<-"],
        ["[92]", "92", "93", "<-"],
    ]
    assert lines[-1].endswith("and 5 more that differ")


def test_other_dtypes_shapes_and_lengths_are_shown() -> None:
    assert (
        "float32 (2,)  float64 (1, 2)  <-"
        in table(torch.ones(2), torch.ones(1, 2, dtype=torch.float64))[2]
    )
    assert table((torch.ones(1), 2), torch.ones(1))[-1].split() == ["(nothing)", "[1]", "<-"]


def test_an_exception_is_shown_with_its_line() -> None:
    error = explain.Raised(KeyError("x\ny"), line=7)
    assert table(1, error) == [
        "f(x)",
        "  wanted  1",
        "  got     raises KeyError, in line 7 of your file: 'x\\ny'",
    ]
    assert explain.outcome_text(explain.Raised(SystemExit())) == "raises SystemExit"


def test_arguments_are_short() -> None:
    assert explain.short(torch.eye(2).half()) == "tensor([1, 0, 0, 1], float16, shape (2, 2))"
    assert explain.short(torch.ones(2, 3).T).endswith("shape (3, 2), strides (1, 3))")
    assert explain.short(test_arguments_are_short) == "test_arguments_are_short"
    assert explain.short(object()) == "<object object>"
    assert explain.short({"lr": 0.1, "params": [torch.ones(2)]}) == "{lr=0.1, params=[1 tensors]}"
    assert explain.short(torch.tensor([2], dtype=torch.uint8)) == "tensor([0x02], uint8)"


def sample(code: str) -> ModuleType:
    module = ModuleType("sample")
    module.__file__ = "<sample>"
    exec(compile(code, "<sample>", "exec"), module.__dict__)
    return module


def test_a_call_within_a_call_is_not_recorded_and_a_result_that_differs_is_explained() -> None:
    real = "def f(x): return g(x) + 1\ndef g(x): return 2 * x\n"
    student = sample(real.replace("+ 1", "+ 2"))
    trace = explain.Trace(student)
    assert student.f(3) == 8 and student.g(x=3) == 6
    assert [call.function for call in trace.calls] == ["f", "g"]
    lines = explain.explain(trace.calls, student, sample(real)).splitlines()
    assert lines[0] == "sample.f(x=3)" and lines[2].split() == ["7", "8", "<-"]


def test_only_the_first_calls_of_a_test_are_recorded() -> None:
    student = sample("def f(x): return x\n")
    trace = explain.Trace(student)
    assert [student.f(x) for x in range(120)] == [*range(120)]
    assert len(trace.calls) == explain.MOST_CALLS


def test_where_all_calls_agree_the_tensors_of_the_module_are_compared() -> None:
    student = sample("import torch\nCODE = torch.ones(2)\ndef f(): return CODE.sum()\n")
    assert explain.explain([], student, student) == ""
    other = sample("import torch\nCODE = torch.zeros(2)\n")
    assert explain.explain([], student, other).startswith("sample.CODE")


def test_a_tensor_with_a_gradient_is_copied() -> None:
    x = torch.ones(2, requires_grad=True) * 2
    copy = explain.copied(x)
    assert copy is not x and copy.requires_grad and copy.tolist() == [2, 2]
    holds_one = [x]  # cannot be copied, so it is shown as it is after the call
    assert explain.copied(holds_one) is holds_one


def test_a_law_may_name_a_test_of_another_file() -> None:
    law = replace(LESSONS[2].laws[0], tests=("test_a", "tests/test_lora.py::test_b"))
    assert LESSONS[2].test_ids(law) == ["tests/test_nf4.py::test_a", "tests/test_lora.py::test_b"]
