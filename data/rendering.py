"""Renders turns as text with a model's chat template, and loses none of what they say.

A chat template is a Jinja program that comes with the model. It may refuse turns, drop or change
them, print today's date, or want each content as a list of parts. So that the model sees what a
row says:

    control tokens      a turn that contains one, such as <|im_end|>, is refused: the tokenizer
                        could not tell it from those that the template writes
    contents, names     must occur in the rendering, except for their white space; so must tools,
                        documents, thoughts and calls (marks.py)
    strftime_now        prints the date of the run: a resumed run has the tokens of its first part

Without a chat template, each turn is a line, and an EOS token follows each answer.
"""

from __future__ import annotations  # type hints must not load the classes of transformers

import datetime
import functools
import json
import os
import re

import transformers
from jinja2 import TemplateError

from data import marks
from data.rows import (
    THOUGHT_END,
    BadRow,
    Extras,
    Turn,
    is_default_system_message,
    is_empty_system_message,
    is_in_loss,
    question_turns,
)

PROBE = "7f3a9c"  # a content that no template writes by itself
STRFTIME_CALL = re.compile(r"""strftime_now\(\s*("[^"]*"|'[^']*')\s*\)""")


@functools.cache
def today() -> datetime.date:
    """The date of the first call: a process that runs past midnight keeps it."""
    return datetime.date.today()


class Renderer:
    """The chat template of a tokenizer, on one date.

    date: the date that the template prints; None if it prints none.
    control_tokens: matches every special token of the tokenizer.
    """

    def __init__(
        self, tokenizer: transformers.PreTrainedTokenizerBase, date: datetime.date | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.name = f"the chat template of {tokenizer.name_or_path}"
        prints_date = "strftime_now" in str(tokenizer.chat_template)
        self.date = (date or today()) if prints_date else None
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special} | {tokenizer.eos_token}
        longest_first = sorted(special, key=len, reverse=True)
        self.control_tokens = re.compile("|".join(map(re.escape, longest_first)))
        self.has_parts = False
        probe = [{"role": "user", "content": PROBE}]
        if PROBE not in self._try(probe):
            self.has_parts = True
            self.has_parts = PROBE in self._try(probe)
        system, _ = question = question_turns(PROBE)
        self.has_system = tokenizer.chat_template is not None and (
            system["content"] in self._try(question)
        )

    def accepted(self, turns: list[Turn], extras: Extras | None = None) -> list[Turn]:
        """The turns. If the template writes no system message, an empty one or ours is left out.

        Raises: BadRow if a turn, a tool or a document contains a control token, or if the template
        writes a message of its own in place of an empty one.
        """
        parts = {f"turn {number} ({turn['role']})": turn for number, turn in enumerate(turns, 1)}
        for place, part in (parts | (extras or {})).items():
            found = self.control_tokens.search(json.dumps(part, ensure_ascii=False))
            if found:
                raise BadRow(
                    f"{place} contains {found[0]}, a control token: remove it, or give the whole "
                    "chat as a text row, where control tokens are allowed"
                )
        is_empty = is_empty_system_message(turns[0])
        if not self.has_system and (is_empty or is_default_system_message(turns[0])):
            return turns[1:]
        if is_empty and self.replaces_empty_system:
            raise BadRow(
                f"the system message is empty, and {self.name} writes one of its own in its place: "
                "give a system message"
            )
        return turns

    @functools.cached_property
    def replaces_empty_system(self) -> bool:
        """Whether the template writes something else in place of an empty system message.

        It may write nothing instead: a start and an end of what it writes for another message.
        """
        other = self._try(question_turns(PROBE, system=PROBE[::-1]))
        empty = self._try(question_turns(PROBE, system=""))
        start = os.path.commonprefix([other, empty])
        return not other.endswith(empty[len(start) :])

    def render(
        self,
        turns: list[Turn],
        extras: Extras | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The turns as text; add_generation_prompt: with the header of an answer after them.

        Raises: BadRow if the template refuses them.
        """
        if self.tokenizer.chat_template is None:
            return self._render_lines(turns)
        extras = extras or {}
        template = self._on_date(self.tokenizer.get_chat_template(tools=extras.get("tools")))
        if self.has_parts:
            turns = [_in_parts(turn) for turn in turns]
        try:
            return self.tokenizer.apply_chat_template(
                turns,
                **extras,
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except (TemplateError, TypeError) as error:
            raise BadRow(f"{self.name} refuses it ({error})") from None

    def require_written(
        self,
        turns: list[Turn],
        text: str,
        extras: Extras | None = None,
        earlier_answers: bool = True,
    ) -> None:
        """Compares turns with their rendering, and finds whether the template writes the extras.

        A template may move the system message, change white space and write a content as JSON.
        earlier_answers: whether the answers before the last turn must be in the text, too.
        Raises: BadRow if a string is not written.
        """
        earlier = {n for n, turn in enumerate(turns[:-1], 1) if turn["role"] == "assistant"}
        skipped = set() if earlier_answers else earlier
        part = marks.find_unwritten(self.render, turns, extras or {}, skipped)
        if part and part.key == "content":
            raise self._lost_content(part.turn, turns[part.turn - 1])
        if part:
            place = f"turn {part.turn} ({turns[part.turn - 1]['role']}): " if part.turn else ""
            raise BadRow(
                f"{place}{self.name} does not write {part.key} ({part.value!r:.50}): remove the "
                "key, or use a model whose template does"
            )

        text = marks.without_spaces(text)
        position = 0
        for number, turn in enumerate(turns, 1):
            if number in skipped:
                continue
            is_system = turn["role"] == "system"
            content = turn.get("content") or ""
            if number in earlier and not is_in_loss(turn):
                content = content.split(THOUGHT_END)[-1]  # a template may drop the thought
            end = _find_end(text, content, 0 if is_system else position)
            if end is None:
                raise self._lost_content(number, turn)
            if not is_system:
                position = end

    def _lost_content(self, number: int, turn: Turn) -> BadRow:
        is_developer = turn["role"] == "developer"
        remedy = "give it the role system" if is_developer else "remove it from the row"
        return BadRow(
            f"turn {number} ({turn['role']}): {self.name} drops or changes "
            f"{turn['content']!r:.60}, so the model would not see it: give the tokenizer a "
            f"template that writes it, or {remedy}"
        )

    def _try(self, turns: list[Turn]) -> str:
        """The turns as text, or nothing if the template refuses them."""
        try:
            return self.render(turns)
        except BadRow:
            return ""

    def _on_date(self, template: str) -> str:
        """The template with the date of the run in place of its calls of strftime_now."""

        def formatted(call: re.Match) -> str:
            return repr(self.date.strftime(call[1][1:-1]))

        template = STRFTIME_CALL.sub(formatted, template)
        if "strftime_now(" in template:
            raise ValueError(
                f"{self.name} calls strftime_now with a format that is not a plain string, so the "
                "date of a resumed run would change: write the format into the call"
            )
        return template

    def _render_lines(self, turns: list[Turn]) -> str:
        text = ""
        for turn in turns:
            end = self.tokenizer.eos_token if turn["role"] == "assistant" else "\n"
            text += (turn.get("content") or "") + end
        return text


def _in_parts(turn: Turn) -> Turn:
    """The turn with its content as a list of one part, as templates of models with images want."""
    if not turn.get("content"):
        return turn
    return turn | {"content": [{"type": "text", "text": turn["content"]}]}


def _find_end(text: str, content: str, start: int) -> int | None:
    """The index after the content in a text, from index `start` on; None if it is not there.

    text: without white space.
    """
    for written in marks.variants(content):
        found = text.find(written, start)
        if found >= 0:
            return found + len(written)
    return None
