"""Grades a student's file: law by law, each with its points.

The tests run in a fork of this process, which has limits and may end in any way. Only this process
adds up the points and writes the result.
"""

import faulthandler
import json
import multiprocessing
import os
import re
import resource
import signal
import tempfile
from dataclasses import dataclass
from multiprocessing.context import ForkProcess
from pathlib import Path

from course import guard, plugin
from course.lesson import ROOT, Law, Lesson

EXAMPLES = 60  # of each property test
SECONDS_OF_A_LAW = 10  # of processor time
MORE_MEMORY = 4 * 2**30  # bytes, above what the process has when it starts


@dataclass
class Verdict:
    """Whether a law holds, and what to tell the student if it does not."""

    law: Law
    passed: bool = False
    text: str = "not tested"

    @property
    def points(self) -> int:
        return self.law.points if self.passed else 0


@dataclass
class Grade:
    """The verdicts on a file. `fault` says why the grading stopped early, if it did."""

    lesson: Lesson
    path: Path
    verdicts: list[Verdict]
    fault: str = ""

    @property
    def points(self) -> int:
        return sum(verdict.points for verdict in self.verdicts)

    @property
    def most(self) -> int:
        return sum(verdict.law.points for verdict in self.verdicts)

    def __str__(self) -> str:
        lines = [f"lesson {self.lesson.number}: {self.lesson.title}", ""]
        if self.fault:
            lines += [f"stopped: {self.fault}", ""]
        for verdict in self.verdicts:
            state = "ok      " if verdict.passed else "BROKEN  "
            if verdict.text == "not tested":
                state = "--      "
            lines.append(f"{state}{verdict.points}/{verdict.law.points}  {verdict.law.name}")
            if state.startswith("BROKEN"):
                lines += ["", *(f"    {line}" for line in verdict.text.splitlines()), ""]
        return "\n".join([*lines, "", f"{self.points} of {self.most} points"])

    def results(self) -> dict[str, object]:
        """The content of results.json, as Gradescope reads it."""
        tests = [
            {
                "name": verdict.law.name,
                "score": verdict.points,
                "max_score": verdict.law.points,
                "output": "" if verdict.passed else verdict.text,
                "visibility": "visible",
            }
            for verdict in self.verdicts
        ]
        return {
            "score": self.points,
            "max_score": self.most,
            "output": self.fault,
            "tests": tests,
        }


def grade(
    lesson: Lesson, path: Path, laws: tuple[Law, ...] | None = None, examples: int = EXAMPLES
) -> Grade:
    """Grade the file at `path` by all laws of the lesson, or by some."""
    result = Grade(lesson, path, [Verdict(law) for law in laws or lesson.laws])
    name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    if not path.is_file():
        result.fault = f"there is no {name}; make lesson LESSON={lesson.number} writes it"
        return result
    fault = guard.fault_of(path.read_text(errors="replace"), lesson)
    if fault:
        result.fault = f"{name}, {fault}"
        return result
    with tempfile.TemporaryDirectory() as folder:
        stack = Path(folder) / "stack"
        pipe, out = os.pipe()
        arguments = (result, Path(folder), examples, out)
        child = multiprocessing.get_context("fork").Process(target=run_tests, args=arguments)
        child.start()
        os.close(out)
        collect(result, child, pipe)
        if child.exitcode == -signal.SIGPROF:
            result.fault += last_line(stack.read_text(), result.path)
    return result


def run_tests(result: Grade, folder: Path, examples: int, out: int) -> None:
    """Run the tests in this process, a fork, and write a line of JSON for each message."""
    set_limits(folder)

    def send(message: dict[str, object]) -> None:
        """Each message gives the code that runs after it a new limit of time."""
        signal.setitimer(signal.ITIMER_PROF, SECONDS_OF_A_LAW)
        os.write(out, json.dumps(message).encode() + b"\n")

    send({})
    laws = [verdict.law for verdict in result.verdicts]
    try:
        plugin.run(result.lesson, laws, str(result.path.resolve()), examples, send)
    except Exception as error:
        send({"fault": f"the grader failed: {type(error).__name__}: {error}"})
    send({"done": True})


def set_limits(folder: Path) -> None:
    """Limit the memory of this process, and send what it prints to a file.

    A file "stack" tells where it was when its time ended.
    """
    stack = os.open(folder / "stack", os.O_WRONLY | os.O_CREAT)
    faulthandler.register(signal.SIGPROF, stack, all_threads=False, chain=True)
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    tempfile.tempdir = str(folder)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    memory = Path("/proc/self/statm")
    if memory.exists():  # on Linux
        pages = int(memory.read_text().split()[0])
        most = pages * resource.getpagesize() + MORE_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def collect(result: Grade, child: ForkProcess, pipe: int) -> None:
    """Read the messages of the tests until their process ends, and say how it ended."""
    current = None
    done = False
    with open(pipe) as messages:
        for message in map(json.loads, messages):
            current = message.get("begin", current)
            result.fault = message.get("fault", result.fault)
            done = done or "done" in message
            if "end" in message:
                verdict = result.verdicts[message["end"]]
                verdict.passed = message["passed"]
                verdict.text = message["text"]
    child.join()
    if not done and not result.fault:
        result.fault = end_of(child.exitcode)
        if current is not None:
            result.fault += f" It happened at the law: {result.verdicts[current].law.name}"


def last_line(stack: str, path: Path) -> str:
    """Where in the student's file a process was, by what faulthandler wrote."""
    found = re.search(rf'"{re.escape(str(path.resolve()))}", line (\d+)', stack)
    return f" It was in line {found[1]} of your file." if found else ""


def end_of(status: int) -> str:
    """Why the process of the tests ended before their end."""
    if status == -signal.SIGPROF:
        return f"your code ran for more than {SECONDS_OF_A_LAW} s: an endless loop?"
    if status < 0:
        return f"your code crashed Python ({signal.Signals(-status).name})."
    return "your code ended the process that tests it."


def grade_and_write(lesson: Lesson) -> Grade:
    """Grade the student's file and write results.json beside it."""
    result = grade(lesson, lesson.answer)
    lesson.answer.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result.results(), indent=2) + "\n"
    lesson.answer.with_name("results.json").write_text(text)
    return result
