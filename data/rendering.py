"""Renders turns as text with a model's chat template, and loses none of what they say.

A chat template is a Jinja program that comes with the model. It may refuse turns, drop or change
them, print today's date, or want each content as a list of parts. So that the model sees what a
row says:

    control tokens      a turn that contains one, such as <|im_end|>, is refused: the tokenizer
                        could not tell it from those that the template writes
    contents            each must occur in the rendering, except for its white space
    strftime_now        prints the date of the run: a resumed run has the tokens of its first part

Without a chat template, each turn is a line, and an EOS token follows each answer.
"""

from __future__ import annotations  # type hints must not load the classes of transformers

import datetime
import functools
import json
import re

import transformers
from jinja2 import TemplateError

from data.rows import BadRow, Turn, is_default_system_message, question_turns

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

    def accepted(self, turns: list[Turn]) -> list[Turn]:
        """The turns, without our default system message if the template does not write it.

        Raises: BadRow if a turn contains a control token.
        """
        for number, turn in enumerate(turns, 1):
            found = self.control_tokens.search(json.dumps(turn, ensure_ascii=False))
            if found:
                raise BadRow(
                    f"turn {number} ({turn['role']}) contains {found[0]}, a control token: remove "
                    "it, or give the whole chat as a text row, where control tokens are allowed"
                )
        if is_default_system_message(turns[0]) and not self.has_system:
            return turns[1:]
        return turns

    def render(
        self,
        turns: list[Turn],
        tools: list[dict] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The turns as text; add_generation_prompt: with the header of an answer after them.

        Raises: BadRow if the template refuses them.
        """
        if self.tokenizer.chat_template is None:
            return self._render_lines(turns)
        template = self._on_date(self.tokenizer.get_chat_template(tools=tools))
        if self.has_parts:
            turns = [_in_parts(turn) for turn in turns]
        try:
            return self.tokenizer.apply_chat_template(
                turns,
                tools=tools,
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except (TemplateError, TypeError) as error:
            raise BadRow(f"{self.name} refuses it ({error})") from None

    def require_contents(self, turns: list[Turn], text: str, earlier_answers: bool = True) -> None:
        """Compares turns with their rendering.

        A template may move the system message, change white space and write a content as JSON.
        earlier_answers: whether the answers before the last turn must be in the text, too.
        Raises: BadRow if the content of a turn is not in the text.
        """
        text = _without_spaces(text)
        position = 0
        for number, turn in enumerate(turns, 1):
            if turn["role"] == "assistant" and number < len(turns) and not earlier_answers:
                continue
            is_system = turn["role"] == "system"
            content = turn.get("content") or ""
            end = _find_end(text, content, 0 if is_system else position)
            if end is None:
                raise BadRow(
                    f"turn {number} ({turn['role']}): {self.name} drops or changes "
                    f"{content!r:.60}, so the model would not see it: give the tokenizer a "
                    "template that writes it, or remove it from the row"
                )
            if not is_system:
                position = end

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
    for variant in (content, json.dumps(content, ensure_ascii=False)[1:-1]):
        written = _without_spaces(variant)
        found = text.find(written, start)
        if found >= 0:
            return found + len(written)
    return None


def _without_spaces(text: str) -> str:
    return "".join(text.split())
