"""What a student reads about gradients, about comparisons within a test, and about assertions."""

import ast
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from course import explain, guard, plugin
from course.lesson import ROOT
from course.lessons import LESSONS
from helpers import bounds, strategies
from helpers.bounds import Bounded
from memory.live import Live

DOUBLE = """
import torch

class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x * factor

    @staticmethod
    def backward(ctx, g):
        return g * ctx.factor, None
"""


def sample(code: str) -> ModuleType:
    module = ModuleType("sample")
    module.__file__ = "<sample>"
    exec(compile(code, "<sample>", "exec"), module.__dict__)
    return module


def explained(code: str, x: torch.Tensor) -> str:
    """What is said about an answer that is used in a forward and a backward pass."""
    student = sample(code)
    trace = explain.Trace(student)
    with suppress(ZeroDivisionError):
        student.Double.apply(x, 2.0).sum().backward()
    return explain.explain(trace.calls, student, sample(DOUBLE))


def test_a_gradient_that_differs_is_shown_with_the_gradient_of_the_output() -> None:
    text = explained(DOUBLE.replace("g * ctx.factor", "g"), torch.ones(2, requires_grad=True))
    call, g, _, gradient, _ = text.splitlines()
    assert call == "sample.Double(x=tensor([1, 1]), factor=2.0)"
    assert g == "  gradient of the output: tensor([1, 1], strides (0,))"
    assert gradient == "  gradient of x  [2, 2]  [1, 1]  <-"
    assert "the same: output" in text


def test_rounding_is_no_difference() -> None:
    x = torch.tensor([0.1, 0.7], requires_grad=True)
    assert explained(DOUBLE.replace("x * factor", "x / 3 * factor * 3"), x) == ""


def test_a_pass_that_raises_is_shown_with_its_line() -> None:
    text = explained(DOUBLE.replace("g * ctx.factor", "1 / 0"), torch.ones(2, requires_grad=True))
    assert "wanted  output, gradient of x" in text and "ZeroDivisionError, in line 12" in text


def test_what_the_reference_cannot_compute_is_not_explained() -> None:
    student = sample(DOUBLE.replace("x * factor", "x + 1"))
    trace = explain.Trace(student)
    student.Double.apply(torch.ones(1), "2")
    assert explain.explain(trace.calls, student, sample(DOUBLE)) == ""


def test_nothing_is_copied_while_a_test_counts_bytes() -> None:
    student = sample(DOUBLE)
    trace = explain.Trace(student)
    x = torch.ones(8, requires_grad=True)
    with Live(x) as live:
        student.Double.apply(x, 2.0).sum().backward()
        assert live.now() == x.nbytes + x.grad.nbytes
    assert trace.calls == []


def test_a_call_with_a_model_is_not_made_again() -> None:
    student = sample("def f(model): return 1\n")
    trace = explain.Trace(student)
    student.f(nn.Linear(1, 1))
    assert explain.explain(trace.calls, student, sample("def f(model): return 2\n")) == ""


def test_a_generator_is_its_own_copy() -> None:
    numbers = (number for number in [1])
    assert explain.copied(numbers) is numbers


@pytest.fixture
def comparisons(monkeypatch: pytest.MonkeyPatch) -> plugin.Comparisons:
    monkeypatch.setattr(strategies, "same_bits", strategies.same_bits)
    monkeypatch.setattr(bounds.Bounded, "allows", bounds.Bounded.allows)
    return plugin.Comparisons()


def test_the_last_comparison_that_failed_is_remembered(comparisons: plugin.Comparisons) -> None:
    one, two = torch.ones(2), torch.tensor([1.0, 2.0])
    assert strategies.same_bits(one, one) and Bounded.exact(one).allows(one)
    assert comparisons.last is None
    assert not strategies.same_bits(two, one)
    wanted, got = comparisons.last
    assert wanted.tolist() == [1, 1] and got.tolist() == [1, 2]
    almost = Bounded(one.double(), torch.tensor([0.5, 0.5]))
    assert not almost.allows(torch.tensor([1.25, 2.0]))
    wanted, got = comparisons.last
    assert wanted.tolist() == [1, 1] and got.tolist() == [1, 2]
    assert not almost.allows(torch.ones(1), reference=two)
    assert comparisons.last[0].tolist() == [1, 2] and len(comparisons.last[1]) == 1


def failed(path: Path, line: int, message: str) -> SimpleNamespace:
    crash = SimpleNamespace(path=str(path), lineno=line, message=message)
    return SimpleNamespace(longrepr=SimpleNamespace(reprcrash=crash))


def line_of(text: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    return 1 + next(number for number, line in enumerate(lines) if line.startswith(text))


def test_an_assertion_is_shown_as_it_stands_in_the_test() -> None:
    line = line_of("    assert gradient == ")
    text = plugin.why(failed(Path(__file__), line, "assert 1 == 2\n + where"), None, "lora.py")
    wanted, *got = text.splitlines()
    assert wanted == '  wanted  gradient == "  gradient of x  [2, 2]  [1, 1]  <-"'
    assert got == ["  got     assert 1 == 2", "           + where"]


def test_what_a_test_says_itself_is_shown_alone() -> None:
    said = "AssertionError: v2:\n  element 1: wanted 2, got 3"
    for noise in ("", "\nassert 2 == 3", "\nFailing test case: f(\n)"):
        text = plugin.why(failed(Path(__file__), 1, said + noise), None, "lora.py")
        assert text == "  v2:\n    element 1: wanted 2, got 3"


def test_a_with_statement_is_shown_without_its_body() -> None:
    line = line_of("    with Live(x) as live:")
    assert plugin.statement_at(__file__, line) == "Live(x)"


def test_compared_tensors_are_shown_under_the_assertion() -> None:
    line = line_of("    assert comparisons.last is None")
    pair = torch.ones(1), torch.zeros(1)
    text = plugin.why(failed(Path(__file__), line, "assert False"), pair, "lora.py")
    assert text.splitlines()[0] == "comparisons.last is None" and "[1]     [0]  <-" in text


def test_an_error_in_the_answer_is_shown_with_its_line() -> None:
    path = ROOT / "work" / "4" / "lora.py"
    text = plugin.why(failed(path, 7, "KeyError: 1"), None, str(path))
    assert text == "  wanted  no error\n  got     KeyError: 1, in line 7 of your file"
    text = plugin.why(failed(ROOT / "other.py", 7, "KeyError: 1"), None, str(path))
    assert text == "  wanted  no error\n  got     KeyError: 1"


def test_a_failure_without_a_place_is_told_as_it_is() -> None:
    assert plugin.why(SimpleNamespace(longrepr="broken\n"), None, "lora.py") == "broken"


def test_of_a_class_only_the_methods_of_the_exercise_and_private_ones_may_change() -> None:
    lesson = LESSONS[4]
    source = lesson.source.read_text()
    helper = source.replace(
        "    def update(self)", "    def _own(self): pass\n\n    def update(self)"
    )
    assert guard.fault_of(helper, lesson) is None
    own = source.replace(
        "        self.r = r\n", "        self.r = r\n        self._mine: int = 1\n"
    )
    assert own != source and guard.fault_of(own, lesson) is None
    other = own.replace("self._mine: int = 1", "self._mine = self.lora_alpha = 1")
    assert guard.fault_of(other, lesson)
    changed = source.replace("A = torch.empty(r, self.in", "A = torch.zeros(r, self.in")
    assert changed != source and ast.parse(changed)
    fault = guard.fault_of(changed, lesson)
    assert fault.startswith("what you do not write of the class QLoRALinear is not part of this")
