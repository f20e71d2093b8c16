"""Checks that the tokens of a conversation hold its tools, its thoughts and its calls.

A chat template is free to ignore keys that it does not know. Training would then teach the model to
answer without tools, or without thoughts. So the decoded tokens must contain, up to whitespace, as
they are or as a JSON string:

    before the first token in the loss      the name of each tool
    in the loss                             the thoughts of each answer, and the name and the
                                            arguments of each of its calls

Templates may drop the thoughts of answers that are not in the loss, as they do in generation.
"""

from __future__ import annotations  # type hints must not load the classes of transformers

import json
import unicodedata
from collections.abc import Iterator

import transformers

from data.chat_template import IGNORE_INDEX, Example
from data.rows import THOUGHT_KEYS, BadRow, Row, Turn, is_in_loss


def require_complete(
    row: Row, examples: list[Example], tokenizer: transformers.PreTrainedTokenizerBase
) -> None:
    """Raises: BadRow that names the first key of the row that its examples do not hold."""
    answers = [part for turn in row.turns if is_in_loss(turn) for part in _parts_of_answer(turn)]
    if not (row.tools or answers):
        return
    tools = [("tools", tool["function"]["name"]) for tool in row.tools]
    in_loss = ""
    for example in examples:
        prompt = _decode(example.ids[: example.n_prompt], tokenizer)
        _require_parts(tools, prompt, tokenizer.name_or_path)
        labels = [label for label in example.labels if label != IGNORE_INDEX]
        in_loss += _decode(labels, tokenizer)
    _require_parts(answers, in_loss, tokenizer.name_or_path)


def _parts_of_answer(turn: Turn) -> Iterator[tuple[str, str]]:
    """The strings that must be in the loss besides the content, each with the key of the turn."""
    for key in THOUGHT_KEYS:
        if key in turn:
            yield key, turn[key]
    for call in turn.get("tool_calls", []):
        yield "tool_calls", call["function"]["name"]
        for argument in _strings_in(call["function"]["arguments"]):
            yield "tool_calls", argument


def _strings_in(value: object) -> Iterator[str]:
    """The strings in a JSON value, at any depth, and the keys of its objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield key
            yield from _strings_in(each)
    elif isinstance(value, list):
        for each in value:
            yield from _strings_in(each)


def _require_parts(parts: list[tuple[str, str]], text: str, model: str) -> None:
    for key, part in parts:
        as_json = json.dumps(part, ensure_ascii=False)[1:-1]
        if _squeeze(part) not in text and _squeeze(as_json) not in text:
            raise BadRow(
                f"the chat template of {model} does not write {key} ({part!r:.50}): remove the "
                "key, or use a model whose template does"
            )


def _decode(ids: list[int], tokenizer: transformers.PreTrainedTokenizerBase) -> str:
    return _squeeze(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _squeeze(text: str) -> str:
    """The text without whitespace, in the Unicode form in which some tokenizers write it."""
    return "".join(unicodedata.normalize("NFC", text).split())
