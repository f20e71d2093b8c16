"""What an answer of the bank is, and the file it stands for."""

import ast
from dataclasses import dataclass, field

from course.lesson import Law, Lesson
from course.stubs import definitions


@dataclass(frozen=True)
class Answer:
    """A student's answer: the real file with changes.

    law: how the law begins that a wrong answer breaks; "" for a right one.
    edits: pieces of the real file, each of which occurs once, and what replaces them.
    functions: the whole code that replaces a function of the real file, by the function's name.
    shows: a text in the message to the student.
    """

    name: str
    law: str = ""
    edits: dict[str, str] = field(default_factory=dict)
    functions: dict[str, str] = field(default_factory=dict)
    shows: str = ""


def source_of(answer: Answer, lesson: Lesson) -> str:
    """The student's file."""
    source = lesson.source.read_text()
    for name, code in answer.functions.items():
        node = definitions(ast.parse(source))[name]
        lines = source.splitlines(keepends=True)
        lines[node.lineno - 1 : node.end_lineno] = [code.strip("\n") + "\n"]
        source = "".join(lines)
    for old, new in answer.edits.items():
        count = source.count(old)
        assert count == 1, f"{answer.name}: {lesson.file} has {old!r} {count} times"
        source = source.replace(old, new)
    return source


def law_of(answer: Answer, lesson: Lesson) -> Law:
    """The law that a wrong answer breaks."""
    (law,) = [law for law in lesson.laws if law.name.startswith(answer.law)]
    return law
