"""Reads rows of data files and detects the format of each row from its keys.

    {"messages": [{"role": "user", "content": "2 + 2?"},
                  {"role": "assistant", "content": "4"}]}             OpenAI's chat format
    {"conversations": [{"from": "human", "value": "2 + 2?"},
                       {"from": "gpt", "value": "4"}]}                ShareGPT's format
    {"prompt": "2 + 2?", "completion": "4"}                           a question and its answer
    {"question": "2 + 2?", "answer": "4"}                             the same
    {"instruction": "Add.", "input": "2, 2", "output": "4"}           Alpaca's; input is optional
    {"text": "Two and two are four."}                                 a document

The rows are the lines of a JSONL file, the list in a JSON file, or the train split of a data set on
the Hugging Face hub. A row with the keys of several formats is read as the first of them. Other
keys are ignored, with one exception: a message of weight 0 is not in the loss, as in OpenAI's
format.

A data set with one bad row often has many. So a bad row raises no error by itself: all of them are
collected with their lines, and reported together.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from checkpoints import io

Turn = dict[str, str | int]  # role: system, user or assistant; content; weight, if it is 0
BRIEF_SYSTEM_MESSAGE: Turn = {"role": "system", "content": "Answer briefly."}
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
PAIR_KEYS = [("prompt", "completion"), ("question", "answer"), ("instruction", "output")]
FORMAT_KEYS = (
    "messages; conversations; prompt, completion; question, answer; instruction, output; text"
)
JSON_WHITESPACE = re.compile(r"[ \t\r\n]*")
MAX_ROWS_SHOWN = 20


@dataclass(frozen=True)
class Row:
    """One row: its turns, its text, or its fault; `where` is its file and line."""

    where: str
    turns: list[Turn] = field(default_factory=list)
    text: str = ""
    fault: str = ""


class BadRow(ValueError):
    """An error in one row; the other rows may be valid."""


def question_turns(prompt: str, system: str | None = None) -> list[Turn]:
    """A single question as turns. The default message keeps the answers of small models short."""
    first = BRIEF_SYSTEM_MESSAGE if system is None else {"role": "system", "content": system}
    return [first, {"role": "user", "content": prompt}]


def pair_turns(prompt: str, answer: str) -> list[Turn]:
    """A single question and its answer as turns."""
    return [*question_turns(prompt), {"role": "assistant", "content": answer}]


def is_default_system_message(turn: Turn) -> bool:
    """Whether question_turns added this turn; an equal message in a row does not count."""
    return turn is BRIEF_SYSTEM_MESSAGE


def is_in_loss(turn: Turn) -> bool:
    """Whether a turn is an answer to train on."""
    return turn["role"] == "assistant" and turn.get("weight") != 0


def read_file(path: Path) -> list[Row]:
    """The rows of a .jsonl or .json file in order, including bad rows."""
    rows = []
    for line, text in _json_values(io.read_text(path)):
        where = f"{path}:{line}"
        try:
            row = parse_row(io.parse_json(text.encode()), where)
        except json.JSONDecodeError as error:
            where = f"{path}:{line + error.lineno - 1}"
            row = Row(where, fault=f"not JSON ({error.msg} at column {error.colno})")
        except ValueError as error:
            row = Row(where, fault=str(error))
        rows.append(row)
    return rows


def read_hub(name: str) -> list[Row]:
    """The rows of the train split of a data set on the hub.

    Raises: ValueError if the data set cannot be loaded or `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"--data {name} is not a file, and a hub data set needs a library: pip install datasets"
        ) from None
    try:
        table = datasets.load_dataset(name, split="train")
    except Exception as error:  # its network and file libraries raise errors of many types
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"--data {name} is not a file, and cannot be loaded as a hub data set ({reason})"
        ) from None
    return [parse_row(row, f"{name}, row {number}") for number, row in enumerate(table, 1)]


def raise_if_any(faults: list[str], n_rows: int, name: str) -> None:
    """Raises a ValueError that counts the bad rows and lists the first of them, if there are any.

    faults: one line for each bad row.
    """
    if not faults:
        return
    title = f"{len(faults)} of {n_rows} rows of {name} cannot be used: fix or remove them"
    raise ValueError("\n  ".join([title, *shorten(faults)]))


def shorten(lines: list[str]) -> list[str]:
    """The first lines of a message about bad or long rows, and "..." for the others."""
    if len(lines) <= MAX_ROWS_SHOWN:
        return lines
    return [*lines[:MAX_ROWS_SHOWN], "..."]


def _json_values(text: str) -> Iterator[tuple[int, str]]:
    """Each JSON value of a file with the number of its first line."""
    start = _skip_whitespace(text, 0)
    if text.startswith("[", start):
        return _list_elements(text, start + 1)
    return _nonempty_lines(text)


def _nonempty_lines(text: str) -> Iterator[tuple[int, str]]:
    # Not splitlines(): it also splits at U+2028 and five other characters, which a JSON string may
    # contain.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line


def _list_elements(text: str, start: int) -> Iterator[tuple[int, str]]:
    """Each element of a JSON list; start: the index after the opening bracket.

    After a syntax error, the rest of the file is one element; parsing it reports the error.
    """
    decoder = json.JSONDecoder()
    line = 1
    counted = 0  # line breaks before this index are counted in `line`
    position = _skip_whitespace(text, start)
    while not text.startswith("]", position):
        line += text.count("\n", counted, position)
        counted = position
        try:
            _, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            end = len(text)
        delimiter = _skip_whitespace(text, end)
        if not text.startswith((",", "]"), delimiter):
            yield line, "[" + text[position:]
            return
        yield line, text[position:end]
        if text[delimiter] == ",":
            position = _skip_whitespace(text, delimiter + 1)
        else:
            position = delimiter
    rest = text[position + 1 :].strip()
    if rest:
        yield line, rest


def _skip_whitespace(text: str, position: int) -> int:
    return JSON_WHITESPACE.match(text, position).end()


def parse_row(row: dict, where: str) -> Row:
    """The turns or the text of a row, or what is wrong with it."""
    try:
        return _parse_valid_row(row, where)
    except ValueError as error:
        return Row(where, fault=str(error))


def _parse_valid_row(row: dict, where: str) -> Row:
    """Raises: ValueError if the row is in no format, or breaks the rules of its format."""
    for key in ("messages", "conversations"):
        if key in row:
            return Row(where, _parse_turns(row[key], key, row.get("system")))
    for prompt_key, answer_key in PAIR_KEYS:
        if prompt_key in row and answer_key in row:
            prompt = _string(row[prompt_key], prompt_key)
            extra = _string(row.get("input") or "", "input")
            if prompt_key == "instruction" and extra:
                prompt += "\n\n" + extra
            answer = _nonempty_string(row[answer_key], answer_key)
            return Row(where, pair_turns(prompt, answer))
    if "text" in row:
        return Row(where, text=_nonempty_string(row["text"], "text"))
    raise ValueError(
        f"its keys are {_list_keys(row)}; a row has those of one format: {FORMAT_KEYS}"
    )


def _parse_turns(turns: object, key: str, system: object) -> list[Turn]:
    """The turns of a chat; system: the system message, if the row has a separate key for it."""
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{key} must be a list of at least one turn, not {_describe(turns)}")
    parsed = []
    if system:
        parsed.append({"role": "system", "content": _string(system, "system")})
    for number, turn in enumerate(turns, 1):
        try:
            parsed.append(_parse_turn(turn))
        except ValueError as error:
            raise ValueError(f"turn {number} of {key}: {error}") from None
    _check_order(parsed, key)
    return parsed


def _check_order(turns: list[Turn], key: str) -> None:
    roles = [turn["role"] for turn in turns]
    if "assistant" not in roles or "user" not in roles[: roles.index("assistant")]:
        raise ValueError(
            f"{key} has no answer to train on, or one before the first question: its roles are "
            + ", ".join(roles)
        )
    if "system" in roles[1:]:
        raise ValueError(f"{key}: a system message must come first")
    if not any(map(is_in_loss, turns)):
        raise ValueError(f"{key} has no answer to train on: each has weight 0")


def _parse_turn(turn: object) -> Turn:
    if not isinstance(turn, dict):
        raise ValueError(f"it must be an object, not {_describe(turn)}")
    role_key, content_key = ("from", "value") if "from" in turn else ("role", "content")
    if role_key not in turn or content_key not in turn:
        raise ValueError(
            f"its keys are {_list_keys(turn)}; required are role, content or from, value"
        )
    speaker = turn[role_key]
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise ValueError(f"{role_key} must be one of {', '.join(SPEAKERS)}, not {speaker!r:.50}")
    weight = turn.get("weight")
    if weight not in (None, 0, 1):
        raise ValueError(f"weight must be 0 or 1, not {weight!r:.50}")

    role = SPEAKERS[speaker]
    if role == "assistant":
        content = _nonempty_string(turn[content_key], f"the answer ({content_key})")
    else:
        content = _string(turn[content_key], content_key)
    parsed = {"role": role, "content": content}
    if weight == 0:
        parsed["weight"] = weight
    return parsed


def _nonempty_string(value: object, key: str) -> str:
    if not _string(value, key).strip():
        raise ValueError(f"{key} is empty")
    return value


def _string(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key} must be a string, not {_describe(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{key} has half of a surrogate pair at character {error.start}, which is not text"
        ) from None
    return value


def _list_keys(row: dict) -> str:
    return ", ".join(map(repr, row)) or "none"


def _describe(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return f"{value!r:.50}"
