"""Finds the turns or the text of a row; its format follows from its keys.

    {"messages": [{"role": "user", "content": "2 + 2?"},
                  {"role": "assistant", "content": "4"}]}             OpenAI's chat format
    {"conversations": [{"from": "human", "value": "2 + 2?"},
                       {"from": "gpt", "value": "4"}]}                ShareGPT's format
    {"prompt": "2 + 2?", "completion": "4"}                           a question and its answer
    {"question": "2 + 2?", "answer": "4"}                             the same
    {"instruction": "Add.", "input": "2, 2", "output": "4"}           Alpaca's; input is optional
    {"prompt": [{"role": "user", ...}], "completion": [...]}          TRL's: only the completion is
                                                                      in the loss
    {"text": "Two and two are four."}                                 a document

A row with the keys of several formats is read as the first of them. These keys are optional:

    system                a system message, in any format but a document; "" is one, too; other
                          names: system_prompt, system_message
    documents             what the answer is based on, for templates that know documents
    history               earlier questions and answers, [[question, answer], ...]
    tools, functions      what the model may call; the chat template writes it
    in a turn             weight, train, training or loss (0: not in the loss), tool_calls,
                          function_call, reasoning_content, reasoning, thinking, name, tool_call_id

Where a key with a meaning (MEANINGFUL) cannot be used, the row is at fault. The row keeps the names
of the other keys that are not read, for a report. A key whose value is null counts as absent. A
number is not a text: 5 could stand for "5" or, in a table with missing values, for "5.0".

A data set with one bad row often has many. So a bad row raises no error by itself: all of them are
collected with their lines, and reported together.
"""

import json
import re
from dataclasses import dataclass, field

from checkpoints import io
from data.files import Record

# role, content, other keys of templates; weight 0 or in_loss False keeps an answer out of the loss
Turn = dict[str, object]
Extras = dict[str, list[dict]]  # what a template gets besides the turns: tools, documents
BRIEF_SYSTEM_MESSAGE: Turn = {"role": "system", "content": "Answer briefly."}
SPEAKERS = {
    "system": "system",
    "developer": "developer",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
PAIR_KEYS = [("prompt", "completion"), ("question", "answer"), ("instruction", "output")]
FORMAT_KEYS = (
    "messages; conversations; prompt, completion; question, answer; instruction, output; text"
)
SYSTEM_KEYS = ("system", "system_prompt", "system_message")
WEIGHT_KEYS = ("weight", "train", "training", "loss")
THOUGHT_END = "</think>"  # of a thought in a content
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")  # templates have several names
PREFERENCE_KEYS = ("chosen", "rejected", "label", "kto_tag")  # tell good from bad answers
MEANINGFUL = {
    *(*SYSTEM_KEYS, "history", "tools", "functions", "documents", *WEIGHT_KEYS, "mask"),
    *("tool_calls", "function_call", *THOUGHT_KEYS, "chat_template_kwargs", "enable_thinking"),
    *("refusal", "image", "images", "audio", "audios", "video", "videos"),
    *("input", "context"),  # "input" is Alpaca's alone
    *PREFERENCE_KEYS,
}
EMPTY = ("", [], {})  # a key with one of these values means nothing
TURNS_AS_TEXT = re.compile(
    rf"""\s*\[\s*\{{[^}}]*["'](role|from)["']\s*:\s*["']({"|".join(SPEAKERS)})["']"""
)
MAX_ROWS_SHOWN = 20


@dataclass(frozen=True)
class Row:
    """One row: its turns, its text, or its fault; `where` is its file and line.

    tools: what the model may call, in OpenAI's format.
    documents: what the answer is based on; each is an object of texts.
    unread: the keys that are not used; a key of a turn stands behind the key of the turns.
    """

    where: str
    turns: list[Turn] = field(default_factory=list)
    tools: list[dict] = field(default_factory=list)
    documents: list[dict] = field(default_factory=list)
    text: str = ""
    fault: str = ""
    unread: frozenset[str] = frozenset()

    @property
    def extras(self) -> Extras:
        """What the chat template gets besides the turns."""
        lists = {"tools": self.tools, "documents": self.documents}
        return {key: value for key, value in lists.items() if value}


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


def is_empty_system_message(turn: Turn) -> bool:
    return turn["role"] == "system" and not turn["content"].strip()


def is_in_loss(turn: Turn) -> bool:
    """Whether a turn is an answer to train on."""
    is_skipped = turn.get("weight") == 0 or turn.get("in_loss") is False
    return turn["role"] == "assistant" and not is_skipped


def refuse_weights(row: Row) -> Row:
    """The row; with a fault if a turn has the weight 0, which --train-on-prompt ignores."""
    for number, turn in enumerate(row.turns, 1):
        if turn.get("weight") == 0:
            fault = (
                f"turn {number} ({turn['role']}) has weight 0 or train false, but "
                "--train-on-prompt trains on every token: remove one of the two"
            )
            return Row(row.where, fault=fault)
    return row


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


def parse_row(record: Record) -> Row:
    """The turns or the text of a row, or what is wrong with it."""
    if record.fault:
        return Row(record.where, fault=record.fault)
    try:
        return _parse_valid_row(record.content, record.where)
    except ValueError as error:
        return Row(record.where, fault=str(error))


def _parse_valid_row(content: object, where: str) -> Row:
    """Raises: ValueError if the row is in no format, or breaks the rules of its format."""
    if isinstance(content, list):  # the turns of a chat, without a key
        content = {"messages": content}
    unread = _present_keys(content)  # the functions below take out what they read
    turns = _pop_turns(unread)
    tools: list[dict] = []
    documents: list[dict] = []
    text = ""
    if turns:
        tools = _pop_tools(unread)
        documents = _pop_documents(unread)
    elif "text" in unread:
        text = _prose(_nonempty_string(unread.pop("text"), "text"), "text")
    else:
        raise ValueError(
            f"its keys are {_list_keys(content)}; a row has those of one format: {FORMAT_KEYS}"
        )
    _refuse_meaningful(unread)
    return Row(where, turns, tools, documents, text, unread=frozenset(unread))


def _present_keys(content: object) -> dict:
    """An object without the keys whose value is null."""
    if not isinstance(content, dict):
        raise ValueError(f"it must be an object, not {_describe(content)}")
    return {key: value for key, value in content.items() if value is not None}


def _refuse_meaningful(unread: dict) -> None:
    for key, value in unread.items():
        if key in MEANINGFUL and value not in EMPTY:
            is_preference = key in PREFERENCE_KEYS
            remedy = "keep only good answers, and remove it" if is_preference else "remove it"
            raise ValueError(f"{key} cannot be used here, and must not be ignored: {remedy}")


def _pop_turns(unread: dict) -> list[Turn]:
    """The turns of a chat or of a pair; none if the row is neither."""
    for key in ("messages", "conversations"):
        if key in unread:
            turns = [*_pop_system(unread), *_pop_turn_list(unread, key)]
            return _checked(turns, key)
    for question_key, answer_key in PAIR_KEYS:
        if question_key in unread and answer_key in unread:
            return _pop_pair(unread, question_key, answer_key)
    return []


def _pop_pair(unread: dict, question_key: str, answer_key: str) -> list[Turn]:
    """The turns of a question and its answer, which are strings or, as in TRL, lists of turns."""
    system = _pop_system(unread)
    if isinstance(unread[question_key], list):
        asked = map(_outside_loss, _pop_turn_list(unread, question_key))
        return _checked([*system, *asked, *_pop_turn_list(unread, answer_key)], answer_key)

    question = _prose(unread.pop(question_key), question_key)
    if question_key == "instruction":
        more = _string(unread.pop("input", ""), "input")
        question = "\n\n".join(filter(None, [question, more]))
    answer = _prose(_nonempty_string(unread.pop(answer_key), answer_key), answer_key)
    *start, asked, answered = pair_turns(question, answer)
    return [*(system or start), *_pop_history(unread), asked, answered]


def _pop_system(unread: dict) -> list[Turn]:
    for key in SYSTEM_KEYS:
        if key in unread:
            return [{"role": "system", "content": _string(unread.pop(key), key)}]
    return []


def _pop_history(unread: dict) -> list[Turn]:
    """The turns of earlier questions and their answers, which are in the loss, too."""
    turns = []
    for pair in _list(unread.pop("history", []), "history"):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"history must be a list of [question, answer], not of {pair!r:.50}")
        question, answer = pair
        turns.append({"role": "user", "content": _string(question, "a question in history")})
        content = _nonempty_string(answer, "an answer in history")
        turns.append({"role": "assistant", "content": content})
    return turns


def _pop_tools(unread: dict) -> list[dict]:
    tools = _list(unread.pop("tools", []), "tools")
    tools += _list(unread.pop("functions", []), "functions")  # OpenAI's older name
    return [_function(tool, "each of tools") for tool in tools]


def _pop_documents(unread: dict) -> list[dict]:
    documents = []
    for document in _list(unread.pop("documents", []), "documents"):
        if not isinstance(document, dict):
            raise ValueError(f"each of documents must be an object, not {_describe(document)}")
        present = _present_keys(document)
        for key, value in present.items():
            _string(value, f"{key} in documents")
        documents.append(present)
    return documents


def _pop_turn_list(unread: dict, key: str) -> list[Turn]:
    """The turns in a list. The keys of turns that are not read are added to those of the row."""
    turns = _list(unread.pop(key), key)
    if not turns:
        raise ValueError(f"{key} must be a list of at least one turn, not an empty list")
    parsed = []
    for number, turn in enumerate(turns, 1):
        try:
            unread_in_turn = _present_keys(turn)
            _require_turn_keys(turn)
            parsed.append(_pop_turn(unread_in_turn))
            _refuse_meaningful(unread_in_turn)
        except ValueError as error:
            raise ValueError(f"turn {number} of {key}: {error}") from None
        unread |= {f"{key}.{name}": value for name, value in unread_in_turn.items()}
    return parsed


def _checked(turns: list[Turn], key: str) -> list[Turn]:
    """The turns of a chat. An answer before the first question is not in the loss.

    Raises: ValueError if no answer is in the loss, or a system message is not the first turn.
    """
    roles = [turn["role"] for turn in turns]
    if "system" in roles[1:]:
        raise ValueError(
            f"{key}: a system message must come first, and once: as a turn or as the key system"
        )
    start = roles.index("user") if "user" in roles else len(roles)
    turns = [*map(_outside_loss, turns[:start]), *turns[start:]]
    if not any(map(is_in_loss, turns)):
        raise ValueError(
            f"{key} has no answer to train on: none with a weight other than 0 follows a "
            "question; its roles are " + ", ".join(roles)
        )
    return turns


def _outside_loss(turn: Turn) -> Turn:
    """Raises: ValueError if the turn says that it is in the loss."""
    if turn.get("weight") == 1:
        raise ValueError(
            "an answer has weight 1 or train true, but an answer in a prompt or before the first "
            "question is not in the loss: remove the key"
        )
    return turn | {"in_loss": False} if turn["role"] == "assistant" else turn


def _pop_turn(unread: dict) -> Turn:
    """A turn with the keys that chat templates read."""
    role_key, content_key = _turn_keys(unread)
    role = _role(unread.pop(role_key), role_key)
    turn = {"role": role, "content": _pop_content(unread, content_key)}
    for key in ("name", "tool_call_id"):
        if key in unread:
            turn[key] = _string(unread.pop(key), key)
    turn |= _pop_weight(unread, role)
    if role == "assistant":
        turn |= _pop_thoughts_and_calls(unread)
        if not turn.get("tool_calls"):
            _nonempty_string(turn["content"], f"the answer ({content_key})")
    return turn


def _turn_keys(turn: dict) -> tuple[str, str]:
    """The keys of the role and of the content."""
    return ("from", "value") if turn.get("from") is not None else ("role", "content")


def _require_turn_keys(turn: dict) -> None:
    role_key, content_key = _turn_keys(turn)
    has_calls = any(turn.get(key) for key in ("tool_calls", "function_call"))
    if turn.get(role_key) is None or not (content_key in turn or has_calls):
        raise ValueError(
            f"its keys are {_list_keys(turn)}; required are role, content or from, value"
        )
    if turn.get(content_key) is None and not has_calls:
        raise ValueError(
            f"{content_key} is null, which only an answer with tool_calls may be: give the content"
        )


def _role(speaker: object, key: str) -> str:
    role = SPEAKERS.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise ValueError(f"{key} must be one of {', '.join(SPEAKERS)}, not {speaker!r:.50}")
    return role


def _pop_content(unread: dict, key: str) -> str:
    """The content of a turn: a string, or the joined text of OpenAI's parts."""
    content = unread.pop(key, "")
    if not isinstance(content, list):
        return _string(content, key)
    for number, part in enumerate(content, 1):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise ValueError(
                f"part {number} of {key} must have the type 'text', not {kind!r:.50}: only text "
                "can be trained on"
            )
    return "".join(_string(part.get("text"), f"text in {key}") for part in content)


def _pop_weight(unread: dict, role: str) -> Turn:
    """The weight, 0 or 1, that WEIGHT_KEYS give to a turn; nothing without these keys."""
    flags = {key: unread.pop(key) for key in WEIGHT_KEYS if key in unread}
    for key, flag in flags.items():
        if flag not in (0, 1):
            raise ValueError(f"{key} must be 0 or 1, not {flag!r:.50}")
        if flag and role != "assistant":
            raise ValueError(
                f"{key} is {json.dumps(flag)}, but only the answers of the assistant are in the "
                f"loss: remove {key}"
            )
    return {"weight": int(all(flags.values()))} if flags else {}


def _pop_thoughts_and_calls(unread: dict) -> Turn:
    """What an answer holds besides its content."""
    found: Turn = {}
    for key in THOUGHT_KEYS:
        thoughts = _string(unread.pop(key, ""), key)
        if thoughts:
            found[key] = thoughts
    listed = _list(unread.pop("tool_calls", []), "tool_calls")
    calls = [_tool_call(call, "each of tool_calls") for call in listed]
    call = unread.pop("function_call", None)  # OpenAI's older name, for a single call
    if call:
        calls.append(_tool_call(call, "function_call"))
    if calls:
        found["tool_calls"] = calls
    return found


def _tool_call(call: object, key: str) -> dict:
    """A call whose arguments are an object; a template would write JSON text in quotes."""
    call = _function(call, key)
    function = call["function"]
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = _parse_json(arguments, "arguments")
    if not isinstance(arguments, dict):
        raise ValueError(f"arguments must be an object, not {_describe(arguments)}")
    return call | {"function": function | {"arguments": arguments}}


def _function(entry: object, key: str) -> dict:
    """A tool or a call in OpenAI's format; older files hold its function alone."""
    if isinstance(entry, dict) and "function" not in entry:
        function = {name: value for name, value in entry.items() if name != "type"}
        entry = {"type": "function", "function": function}
    function = entry["function"] if isinstance(entry, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{key} must be a function with a name, not {_describe(entry)}")
    return entry


def _list(value: object, key: str) -> list:
    """A list, or one that a table holds as JSON text; an empty text is an empty list."""
    if isinstance(value, str):
        value = _parse_json(value, key) if value else []
    if not isinstance(value, list):
        raise ValueError(f"{key} must be a list, not {_describe(value)}")
    _require_text(json.dumps(value, ensure_ascii=False, default=str), key)
    return [*value]


def _parse_json(text: str, key: str) -> dict | list:
    try:
        return io.parse_json(text.encode(), (dict, list), unique_keys=True)
    except ValueError as error:
        raise ValueError(f"{key} must be JSON, not {text!r:.50} ({error})") from None


def _nonempty_string(value: object, key: str) -> str:
    if not _string(value, key).strip():
        raise ValueError(f"{key} is empty")
    return value


def _prose(value: object, key: str) -> str:
    """A string that is no list of turns."""
    if TURNS_AS_TEXT.match(_string(value, key)):
        raise ValueError(
            f"{key} is a list of turns that was turned into text: write the list itself, as JSON"
        )
    return value


def _string(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key} must be a string, not {_describe(value)}")
    _require_text(value, key)
    return value


def _require_text(value: str, key: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{key} has half of a surrogate pair at character {error.start}, which is not text"
        ) from None


def _list_keys(content: dict) -> str:
    names = [f"{key!r}{' (null)' if content[key] is None else ''}" for key in content]
    return ", ".join(names) or "none"


def _describe(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return f"{value!r:.50}"
