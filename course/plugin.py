"""Runs the tests of a lesson on a student's file, as a plugin of pytest in a process of its own.

Each law is reported as soon as its tests have run, so a process that ends early does not undo it.
The reference is loaded only after the last law, to compute the values wanted.
"""

import ast
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from pathlib import Path
from types import ModuleType

import pytest
import torch
from _pytest.runner import runtestprotocol
from hypothesis import Phase, settings
from hypothesis.internal.conjecture import engine
from torch import Tensor

from course import explain, guard
from course.lesson import ROOT, Law, Lesson

Send = Callable[[dict[str, object]], None]
OPTIONS = f"""-q --tb=native --noconftest -W ignore
    -o addopts= --rootdir={ROOT} -c {ROOT}/pyproject.toml
    -p _hypothesis_pytestplugin -p no:cacheprovider -p no:unraisableexception
    -p no:threadexception --hypothesis-profile=grade""".split()
# What a test says itself, without what pytest and Hypothesis add
OWN_MESSAGE = r"(?:AssertionError|Failed): ((?s:.*?wanted.*?))(?=\n(?:assert|Failing) |\Z)"
MOST_LINES = 6  # of the message of a failed assertion
ORACLES = ("helpers.bounds", "helpers.naive", "helpers.strategies")
PATCHING = ("torch._dynamo",)  # replaces functions of torch when it is imported
SHRINKING_SECONDS = 1  # Hypothesis makes a failing input smaller for at most so long


def profile(phases: list[Phase], examples: int) -> settings:
    """The same examples at each call; a failing one is not saved."""
    return settings(
        max_examples=examples,
        phases=phases,
        derandomize=True,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
    )


def run(lesson: Lesson, laws: list[Law], path: str, examples: int, send: Send) -> None:
    """Load a student's file and grade it.

    Sends {"begin": index of a law}, then {"end": index, "passed": bool, "text": why not}; at last
    {"end": ...} again with the values wanted and got. {"fault": text} says why grading stops.
    """
    os.chdir(ROOT)
    torch.set_num_threads(1)  # the limit of time counts all threads
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    sys.meta_path.insert(0, guard.AbsentPeers())
    os.environ["QLORA_KERNELS"] = "reference"  # compiling takes longer than the tests
    modules = guard.imports_of_ours(lesson)
    # dispatch imports it when it is first called
    modules += ["kernels.cpu.launch"] if "kernels" in modules else []
    for name in [*ORACLES, *PATCHING, *modules]:
        importlib.import_module(name)
    send({})  # imports take no time from the student's code
    engine.MAX_SHRINKING_SECONDS = SHRINKING_SECONDS
    settings.register_profile("grade", profile([Phase.generate, Phase.shrink], examples))
    comparisons = Comparisons()
    watch = guard.Watch(path)
    try:
        module = guard.load(lesson, path)
    except BaseException as error:
        line = explain.line_in(path, error)
        what = f"{type(error).__name__}: {error}".partition("\n")[0]
        fault = watch.fault or f"your file cannot be imported: line {line}: {what}"
        return send({"fault": fault})
    if watch.check():
        return send({"fault": watch.fault})
    exam = Exam(lesson, laws, module, watch, comparisons, send)
    ids = [name for law in laws for name in lesson.test_ids(law)]
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.environ["QLORA_KERNELS"] = "reference"  # a kernel would run in place of the student's code
    pytest.main([*OPTIONS, *dict.fromkeys(ids)], plugins=[exam])
    if not exam.has_run:
        send({"fault": f"the tests cannot use your file: {exam.not_collected}"})
    if exam.broken:
        watch.active = False
        exam.show_values(load_reference(lesson))


def load_reference(lesson: Lesson) -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", lesson.source)
    module = importlib.util.module_from_spec(spec)
    sys.modules["reference"] = module  # where dataclasses look up their module
    spec.loader.exec_module(module)
    return module


@dataclass
class Failure:
    """A test that failed, its message, and the calls of the student's functions in it."""

    test: str
    message: str
    calls: list[explain.Call]
    values: str = ""  # wanted and got

    def __str__(self) -> str:
        return f"{self.values or self.message}\ntest: {self.test}"


class Exam:
    """The plugin: takes the tests that pytest collected, and runs them law by law."""

    def __init__(
        self,
        lesson: Lesson,
        laws: list[Law],
        module: ModuleType,
        watch: guard.Watch,
        comparisons: "Comparisons",
        send: Send,
    ) -> None:
        self.lesson = lesson
        self.laws = laws
        self.module = module
        self.watch = watch
        self.comparisons = comparisons
        self.send = send
        self.trace = explain.Trace(module)
        self.given: dict[str, object] = {}  # the arguments of the test that runs
        self.not_collected = ""
        self.has_run = False
        self.broken: dict[int, Failure] = {}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.not_collected = str(report.longrepr).splitlines()[-1].removeprefix("E").strip()

    def pytest_internalerror(self, excinfo: pytest.ExceptionInfo) -> None:
        """What fails here fails because the student's code replaced something, or by our fault."""
        self.send({"fault": self.watch.check() or f"the grader failed: {excinfo.exconly()}"})

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.has_run = True
        for number, law in enumerate(self.laws):
            self.send({"begin": number})
            failure = self.first_failure(law, session.items)
            if self.watch.check():
                self.send({"fault": self.watch.fault})
                break
            if failure:
                self.broken[number] = failure
            self.send({"end": number, "passed": not failure, "text": str(failure or "")})
        return True  # the tests have been run

    def first_failure(self, law: Law, items: list[pytest.Item]) -> Failure | None:
        self.trace.start()
        for name in self.lesson.test_ids(law):
            mine = [item for item in items if item.nodeid.partition("[")[0] == name]
            for item in mine:
                message = self.message_of(item)
                if message is not None:
                    return Failure(name, message, self.trace.calls)
        return None

    def message_of(self, item: pytest.Item) -> str | None:
        """Run a test: on random examples first, because Hypothesis makes those smaller."""
        test = item.obj
        if not hasattr(test, "hypothesis"):
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            self.start(parameters)
            return self.message_in(runtestprotocol(item, log=False))
        if not hasattr(test.hypothesis.inner_test, "is_traced"):
            test.hypothesis.inner_test = self.traced(test.hypothesis.inner_test)
        message = self.message_in(runtestprotocol(item, log=False))
        if message is None and hasattr(test, "hypothesis_explicit_examples"):
            usual = test._hypothesis_internal_use_settings
            test._hypothesis_internal_use_settings = profile([Phase.explicit], 1)
            message = self.message_in(runtestprotocol(item, log=False))
            test._hypothesis_internal_use_settings = usual
        return message

    def start(self, given: dict[str, object]) -> None:
        """Forget the calls of the test, or example, before; given: the arguments of this one."""
        self.trace.start()
        self.comparisons.last = None
        self.given = given

    def traced(self, inner_test: Callable[..., None]) -> Callable[..., None]:
        """A test of Hypothesis that starts anew for each example."""

        def traced(*args: object, **kwargs: object) -> None:
            self.start(signature(inner_test).bind(*args, **kwargs).arguments)
            inner_test(*args, **kwargs)

        traced.is_traced = True
        return traced

    def message_in(self, reports: list[pytest.TestReport]) -> str | None:
        """What failed in the first of the reports (setup, call, teardown) that failed, or None."""
        for report in reports:
            if report.failed:
                given = ", ".join(f"{name}={explain.short(x)}" for name, x in self.given.items())
                text = why(report, self.comparisons.last, self.module.__file__)
                is_told = text.startswith("  wanted")  # without the input
                return f"{text}\n  in      the test with {given}" if given and is_told else text
        return None

    def show_values(self, reference: ModuleType) -> None:
        """Send again why each law is broken, with the values wanted and got if they differ."""
        for number, failure in self.broken.items():
            failure.values = explain.explain(failure.calls, self.module, reference)
            self.send({"end": number, "passed": False, "text": str(failure)})


class Comparisons:
    """Lets the helpers of the tests remember their last comparison that failed.

    last: the tensors wanted and got. Numbers within their bounds are shown as those wanted.
    """

    def __init__(self) -> None:
        self.last: tuple[Tensor, Tensor] | None = None
        strategies = sys.modules["helpers.strategies"]
        strategies.same_bits = self._of_bits(strategies.same_bits)
        bounded = sys.modules["helpers.bounds"].Bounded
        bounded.allows = self._of_bounds(bounded.allows)

    def _of_bits(self, same_bits: Callable[..., bool]) -> Callable[..., bool]:
        @wraps(same_bits)
        def remembering(a: Tensor, b: Tensor) -> bool:
            passed = same_bits(a, b)
            if not passed:
                self.last = b.detach().clone(), a.detach().clone()
            return passed

        return remembering

    def _of_bounds(self, allows: Callable[..., bool]) -> Callable[..., bool]:
        @wraps(allows)
        def remembering(bounded: object, computed: Tensor, reference: Tensor | None = None) -> bool:
            passed = allows(bounded, computed, reference)
            if not passed:
                wanted = (bounded.value if reference is None else reference).detach()
                got = computed.detach().double()
                if got.shape == wanted.shape:
                    got = torch.where((got - wanted).abs() <= bounded.error, wanted, got)
                self.last = wanted.float(), got.float()
            return passed

        return remembering


def why(report: pytest.TestReport, compared: tuple[Tensor, Tensor] | None, student: str) -> str:
    """Why a test failed: what it wanted, and what it got; student: the path of the student's file.

    compared: the tensors wanted and got by the last comparison that failed.
    """
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = first_lines(report)
    if crash is None:
        return "\n".join(lines)
    if not Path(crash.path).is_relative_to(ROOT / "tests"):
        where = f", in line {crash.lineno} of your file" if crash.path == student else ""
        return f"  wanted  no error\n  got     {lines[0]}{where}"
    own = re.match(OWN_MESSAGE, crash.message)
    if own:  # the test says itself what it wanted
        return "\n".join(f"  {line}" for line in own[1].splitlines()[:MOST_LINES])
    statement = statement_at(crash.path, crash.lineno)
    if compared and "assert" in lines[0]:
        return explain.side_by_side(statement, *compared)
    return f"  wanted  {statement}\n  got     " + "\n          ".join(lines)


def statement_at(path: str, line: int) -> str:
    """The statement in a line of a file: what an assert asserts, the head of a with."""
    source = Path(path).read_text()
    statements = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]
    around = [node for node in statements if node.lineno <= line <= node.end_lineno]
    if not around:  # the line of a decorator: Hypothesis ran the test again, and it passed
        return "the same result each time that it is called with the same arguments"
    node = min(around, key=lambda node: node.end_lineno - node.lineno)
    if isinstance(node, ast.Assert):
        node = node.test
    elif isinstance(node, ast.With):
        node = node.items[0].context_expr
    return re.sub(r"\s*\n\s*", " ", ast.get_source_segment(source, node))


def first_lines(report: pytest.TestReport) -> list[str]:
    """The first lines of what pytest says about a failure."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr)
    lines = [line for line in text.splitlines() if line.strip()][:MOST_LINES]
    return [explain.cut_off(line, 3 * explain.WIDTH) for line in lines]
