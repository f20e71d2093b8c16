"""Finds the strings of a conversation that its chat template does not write.

A template is free to drop a turn, or to ignore keys that it does not know. Searching the rendering
for a string proves little: "1" or "weather" may be there by chance. So the conversation is rendered
once more with two marks around each string, which occur nowhere else. Then

    both marks are there     what stands between them must be the string, up to its white space
    one mark is there        the template cut the string or put it together again: no answer here
    no mark is there         the template does not write the string

These strings are marked: each content and name, the thoughts of answers in the loss, the names and
descriptions of tools, the names of calls and the strings in their arguments, and the texts of
documents.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from data.rows import THOUGHT_KEYS, BadRow, Extras, Turn, is_in_loss

OPENING = "\U0010fffb"  # characters for private use
CLOSING = "\U0010fffc"
MARK = re.compile(f"([{OPENING}{CLOSING}])([0-9]+)[.]")


class Part(NamedTuple):
    """A string of a conversation; turn: the number of its turn, 0 for tools and documents."""

    turn: int
    key: str
    value: str


class Marker:
    """Puts marks around strings, and collects the strings."""

    def __init__(self) -> None:
        self.parts: list[Part] = []

    def mark(self, turn: int, key: str, value: str) -> str:
        if not value.strip():
            return value
        number = len(self.parts)
        self.parts.append(Part(turn, key, value))
        return f"{OPENING}{number}.{value}{CLOSING}{number}."

    def first_unwritten_in(self, text: str) -> Part | None:
        """The first string that is not in the rendering with marks."""
        text = without_spaces(text)
        seen = set()  # the numbers of strings with at least one mark
        starts: dict[int, int] = {}
        between: dict[int, set[str]] = {}
        for match in MARK.finditer(text):
            number = int(match[2])
            seen.add(number)
            if match[1] == OPENING:
                starts[number] = match.end()
            elif number in starts:
                between.setdefault(number, set()).add(text[starts[number] : match.start()])

        for number, part in enumerate(self.parts):
            written = between.get(number)
            if number not in seen or (written and written.isdisjoint(variants(part.value))):
                return part
        return None


def find_unwritten(
    render: Callable[[list[Turn], Extras], str],
    turns: list[Turn],
    extras: Extras,
    skipped: set[int],
) -> Part | None:
    """The first string that `render` does not write; None also if it refuses the marks.

    skipped: the numbers of turns that need not be written.
    """
    marker = Marker()
    marked_extras = {
        key: [_marked_entry(each, key, marker) for each in extras[key]] for key in extras
    }
    call_names = {call["function"]["name"] for turn in turns for call in turn.get("tool_calls", [])}
    marked = [
        turn if number in skipped else _marked_turn(turn, number, call_names, marker)
        for number, turn in enumerate(turns, 1)
    ]
    try:
        text = render(marked, marked_extras)
    except BadRow:
        return None
    return marker.first_unwritten_in(text)


def variants(value: str) -> Iterator[str]:
    """How a template may write a string: as it is, or as JSON; without white space."""
    yield without_spaces(value)
    yield without_spaces(json.dumps(value, ensure_ascii=False)[1:-1])


def without_spaces(text: str) -> str:
    return "".join(text.split())


def _marked_turn(turn: Turn, number: int, call_names: set[str], marker: Marker) -> Turn:
    """The name of a tool need not be written where it only repeats the name of a call."""
    keys = ["content"]
    if turn["role"] != "tool" or turn.get("name") not in call_names:
        keys.append("name")
    if is_in_loss(turn):
        keys += THOUGHT_KEYS
    marked = {key: marker.mark(number, key, turn[key]) for key in keys if key in turn}
    if "tool_calls" in turn:
        calls = turn["tool_calls"]
        marked["tool_calls"] = [
            _marked_function(call, number, "tool_calls", marker) for call in calls
        ]
    return turn | marked


def _marked_entry(entry: dict, key: str, marker: Marker) -> dict:
    """A tool or a document."""
    if key == "tools":
        return _marked_function(entry, 0, key, marker)
    return {name: marker.mark(0, key, value) for name, value in entry.items()}


def _marked_function(entry: dict, number: int, key: str, marker: Marker) -> dict:
    function = entry["function"]
    marked = {
        name: _marked_value(function[name], number, key, marker)
        for name in ("name", "description", "arguments")
        if name in function
    }
    return entry | {"function": function | marked}


def _marked_value(value: object, number: int, key: str, marker: Marker) -> object:
    """A JSON value with marks around its strings; the keys of objects have none."""
    if isinstance(value, str):
        return marker.mark(number, key, value)
    if isinstance(value, dict):
        return {name: _marked_value(each, number, key, marker) for name, each in value.items()}
    if isinstance(value, list):
        return [_marked_value(each, number, key, marker) for each in value]
    return value
