"""Rows of people's files, told apart by their keys -> conversations and plain texts.

    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}     OpenAI's chat
    {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}         ShareGPT's
    {"prompt": "2 + 2?", "completion": "4"}                                                          a question, its answer
    {"question": "2 + 2?", "answer": "4"}                                                            the same
    {"instruction": "Add.", "input": "2, 2", "output": "4"}                                          Alpaca's; input may lack
    {"text": "Two and two are four."}                                                                a document

The rows stand one a line (JSONL), or in a list (JSON), or in the train split of a data set on the Hugging Face hub. A row with
the keys of several formats is read as the first of them. Other keys are nobody's business, with one exception: a message of
weight 0 is not learnt, as OpenAI has it.

A data set has more than one bad row if it has any, so that none is raised: each is reported by its place, for all to be mended
at once.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from checkpoints import io as files

Turn = dict[
    str, str | int
]  # role: system, user or assistant; content; weight, where a row gives one
BRIEFLY: Turn = {"role": "system", "content": "Answer briefly."}
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
PAIRS = [("prompt", "completion"), ("question", "answer"), ("instruction", "output")]
KEYS = "messages; conversations; prompt, completion; question, answer; instruction, output; text"
BLANK = re.compile(r"[ \t\r\n]*")
SHOWN = 20  # bad rows, of all there are


@dataclass(frozen=True)
class Row:
    """One example, as turns or as text; or what is wrong with it. `where` is its file and line."""

    where: str
    turns: list[Turn] = field(default_factory=list)
    text: str = ""
    fault: str = ""


class BadRow(ValueError):
    """What is wrong with one row, and not with all of them."""


def question(prompt: str) -> list[Turn]:
    """A bare question as turns: with an instruction, without which a small model tends to ramble."""
    return [BRIEFLY, {"role": "user", "content": prompt}]


def pair(prompt: str, answer: str) -> list[Turn]:
    return [*question(prompt), {"role": "assistant", "content": answer}]


def read(path: Path) -> list[Row]:
    """The rows of a .jsonl or .json file, good and bad ones in their order."""
    rows = []
    for line, text in _values(files.read_text(path)):
        try:
            rows.append(_row_or_fault(files.parse_json(text.encode()), f"{path}:{line}"))
        except json.JSONDecodeError as error:
            fault = f"not JSON ({error.msg} at column {error.colno})"
            rows.append(Row(f"{path}:{line + error.lineno - 1}", fault=fault))
        except ValueError as error:
            rows.append(Row(f"{path}:{line}", fault=str(error)))
    return rows


def read_hub(name: str) -> list[Row]:
    """The rows of the train split of a data set on the hub. Raises: ValueError where it, or the library, is not to be had."""
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"--data {name} is no file, and as a hub data set needs a library: pip install datasets"
        ) from None
    try:
        table = datasets.load_dataset(name, split="train")
    except Exception as error:  # of whichever network or file library it uses
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"--data {name} is no file, nor a hub data set within reach ({reason})"
        ) from None
    return [_row_or_fault(row, f"{name}, row {number}") for number, row in enumerate(table, 1)]


def refuse(faults: list[str], rows: int, name: str) -> None:
    """Raise a ValueError that shows the first bad rows and counts them all, if there are any."""
    if faults:
        shown = faults[:SHOWN] + ["..."] * (len(faults) > SHOWN)
        raise ValueError(
            "\n  ".join(
                [
                    f"{len(faults)} of {rows} rows of {name} cannot be used: mend or remove them",
                    *shown,
                ]
            )
        )


def _values(text: str) -> Iterator[tuple[int, str]]:
    """Each JSON value of a file with the line it starts in: the elements of a list, or one a line."""
    start = BLANK.match(text).end()
    if not text.startswith("[", start):
        # Not splitlines(): it also cuts at U+2028 and five other characters that may stand in a JSON string.
        yield from (
            (number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()
        )
        return
    decoder, line, seen, place = json.JSONDecoder(), 1, 0, BLANK.match(text, start + 1).end()
    while not text.startswith("]", place):
        line, seen = line + text.count("\n", seen, place), place
        try:
            end = decoder.raw_decode(text, place)[1]
        except (ValueError, RecursionError):  # where the next element would begin is not known
            end = len(text)
        after = BLANK.match(text, end).end()
        if not text.startswith((",", "]"), after):
            yield line, "[" + text[place:]  # which is no list: the parser will say why
            return
        yield line, text[place:end]
        place = BLANK.match(text, after + 1).end() if text[after] == "," else after
    if rest := text[place + 1 :].strip():
        yield line, rest


def _row_or_fault(row: dict, where: str) -> Row:
    try:
        return _row(row, where)
    except ValueError as error:
        return Row(where, fault=str(error))


def _row(row: dict, where: str) -> Row:
    """Raises: ValueError if it is in no format, or not what its format says."""
    for key in ("messages", "conversations"):
        if key in row:
            return Row(where, _turns(row[key], key, row.get("system")))
    for asked, answered in PAIRS:
        if asked in row and answered in row:
            prompt, more = _string(row[asked], asked), _string(row.get("input") or "", "input")
            if asked == "instruction" and more:
                prompt += "\n\n" + more
            return Row(where, pair(prompt, _not_empty(row[answered], answered)))
    if "text" in row:
        return Row(where, text=_not_empty(row["text"], "text"))
    raise ValueError(
        f"its keys are {', '.join(map(repr, row)) or 'none'}; a row has those of one format: {KEYS}"
    )


def _turns(turns: object, key: str, system: object) -> list[Turn]:
    """The turns of a chat, OpenAI's or ShareGPT's; a system message may stand beside them."""
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{key} is a list of turns that is not empty, not {_kind(turns)}")
    found = [{"role": "system", "content": _string(system, "system")}] if system else []
    for number, turn in enumerate(turns, 1):
        try:
            found.append(_turn(turn))
        except ValueError as error:
            raise ValueError(f"turn {number} of {key}: {error}") from None
    roles = [turn["role"] for turn in found]
    if "assistant" not in roles or "user" not in roles[: roles.index("assistant")]:
        raise ValueError(
            f"{key} has no answer to learn, or one before any question: its roles are {', '.join(roles)}"
        )
    if "system" in roles[1:]:
        raise ValueError(f"{key}: a system message comes first or not at all")
    if not any(map(is_learnt, found)):
        raise ValueError(f"{key} has no answer to learn: each has weight 0")
    return found


def _turn(turn: object) -> Turn:
    if not isinstance(turn, dict):
        raise ValueError(f"it is an object, not {_kind(turn)}")
    who, what = ("from", "value") if "from" in turn else ("role", "content")
    if who not in turn or what not in turn:
        raise ValueError(
            f"its keys are {', '.join(map(repr, turn)) or 'none'}; needed are role, content or from, value"
        )
    speaker = turn[who]
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise ValueError(f"{who} is one of {', '.join(SPEAKERS)}, not {speaker!r:.50}")
    role = SPEAKERS[speaker]
    weight = turn.get("weight")
    if weight not in (None, 0, 1):
        raise ValueError(f"weight is 0 or 1, not {weight!r:.50}")
    content = (
        _not_empty(turn[what], f"the answer ({what})")
        if role == "assistant"
        else _string(turn[what], what)
    )
    return {"role": role, "content": content} | ({"weight": weight} if weight == 0 else {})


def is_learnt(turn: Turn) -> bool:
    """Whether a turn is an answer that training should see."""
    return turn["role"] == "assistant" and turn.get("weight") != 0


def _not_empty(value: object, key: str) -> str:
    if not _string(value, key).strip():
        raise ValueError(f"{key} is empty")
    return value


def _string(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key} is a string, not {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{key} has half of a surrogate pair at character {error.start}, which is no text"
        ) from None
    return value


def _kind(value: object) -> str:
    return {
        "NoneType": "null",
        "dict": "an object",
        "list": "a list" if value else "an empty list",
    }.get(type(value).__name__, f"{value!r:.50}")
