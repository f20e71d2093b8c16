"""Finds where each answer of a conversation begins and ends in its rendering.

Most chat templates do not mark answers. So the template renders growing prefixes of the
conversation. For the answer in turn k,

    prompt   = turns before k, and the header of an answer    <|user|>2 + 2?<|end|><|assistant|>
    answered = turns up to and including k      <|user|>2 + 2?<|end|><|assistant|>4<|end|>

`answered` must start with `prompt`; the answer is the rest, up to its last control token, which
ends it. The line break that many templates write after that token does not belong to it, nor does
the header of another answer, which some templates always write at the end.

The rendering of the conversation must start with each `answered`. Otherwise the template rewrites
earlier turns (Qwen 3's removes the thoughts from them).

Two renderings for each answer would take quadratic time in long conversations. A rendering with a
mark around each content shows what the template writes between contents. Between most it writes the
same, so the first answer with the same text before and after it shows where the others begin and
end.

Templates of DeepSeek R1 cut an answer up to </think>, and end a prompt with <think>. They are made
to write prompts, in which earlier thoughts are not repeated. An answer in the loss is then written
as the model generates it: the prompt, all of the content, and what the template writes after it.
"""

from typing import NamedTuple

from data import marks
from data.rendering import Renderer
from data.rows import THOUGHT_END, BadRow, Extras, Turn

THOUGHT_START = "<think>"
LONGEST_HEADER = 100  # in characters
MARK = "\U0010fffd"  # a character for private use


class Span(NamedTuple):
    """Where an answer begins and ends in a text."""

    start: int
    end: int


class Content(NamedTuple):
    """Where a content begins and ends in a rendering, and what the template writes around it."""

    start: int
    end: int
    before: str
    after: str


class Conversation:
    """Turns and their rendering, `text`. Raises: BadRow if the template refuses them."""

    def __init__(self, renderer: Renderer, turns: list[Turn], extras: Extras | None) -> None:
        self.renderer = renderer
        self.turns = turns
        self.extras = extras
        self.text = renderer.render(turns, extras)

    def find_answers(self, indices: list[int]) -> list[Span] | None:
        """The answers in the turns with these indices; None if the template rewrites some of them.

        Raises: as render_answer.
        """
        contents = self._find_contents() if len(indices) > 1 else {}
        examples: dict[tuple[str, str], tuple[int, int]] = {}
        spans = []
        for index in indices:
            content = contents.get(index)
            if content and (content.before, content.after) in examples:
                n_before, n_after = examples[content.before, content.after]
                spans.append(Span(content.start - n_before, content.end + n_after))
                continue
            answered, start = self.render_answer(index)
            if not self.text.startswith(answered):
                return None
            spans.append(Span(start, len(answered)))
            if content:
                distances = (content.start - start, len(answered) - content.end)
                examples[content.before, content.after] = distances
        return spans

    def render_answer(self, index: int) -> tuple[str, int]:
        """The turns up to the end of the answer in turn `index` as text, and where it begins.

        Raises: ValueError if the template does not show where an answer begins or ends; BadRow if
        it does for other answers.
        """
        name = self.renderer.name
        prompt = self.renderer.render(self.turns[:index], self.extras, add_generation_prompt=True)
        is_last = index + 1 == len(self.turns)
        answered = (
            self.text if is_last else self.renderer.render(self.turns[: index + 1], self.extras)
        )
        if self._is_cut(index, answered):
            answered = self._as_generated(index, prompt) or answered
        if not answered.startswith(prompt):
            raise self._other_start(index, prompt)
        found = self.renderer.control_tokens.finditer(answered, len(prompt))
        ends = [match.end() for match in found]
        if not ends:
            raise ValueError(
                f"{name} writes no special token after an answer, so the model would not be "
                "trained to end its answers: give it a template that writes eos_token there"
            )
        for end in ends[:-1]:
            if prompt.endswith(answered[end:]):  # the header of another answer
                return answered[:end], len(prompt)
        return answered[: ends[-1]], len(prompt)

    def require_own_thought(self, index: int, text: str, span: Span) -> None:
        """Raises: BadRow if the template writes another thought before that of an answer.

        The header of an answer, after the last control token before it, may contain a thought, too.
        """
        content = self.turns[index]["content"]
        if THOUGHT_END not in content:
            return
        before = text[max(0, span.start - LONGEST_HEADER) : span.start]
        header = self.renderer.control_tokens.split(before)[-1]
        written = header + text[span.start : span.end]
        if written.count(THOUGHT_END) > content.count(THOUGHT_END):
            raise BadRow(
                f"turn {index + 1} (assistant): {self.renderer.name} writes a thought of its own "
                "before the one in the content: give it as reasoning_content, or remove it"
            )

    def _other_start(self, index: int, prompt: str) -> ValueError:
        """The error of an answer that does not begin after the prompt."""
        name = self.renderer.name
        other = {"role": "assistant", "content": MARK}
        written = self.renderer.render([*self.turns[:index], other], self.extras)
        if written.startswith(prompt):
            return BadRow(
                f"turn {index + 1} (assistant): {name} ends a prompt with {prompt[-40:]!r}, but "
                "writes this answer otherwise: remove its thoughts"
            )
        if prompt.rstrip().endswith(THOUGHT_START):
            return BadRow(
                f"turn {index + 1} (assistant): {name} begins each answer with a thought, which "
                "this answer lacks: begin the content with <think>, the thought or nothing, and "
                "</think>"
            )
        return ValueError(
            f"{name} ends a prompt with {prompt[-40:]!r}, but does not write a given answer after "
            "these characters, so the tokens of the answer cannot be found: give the tokenizer a "
            "template that does"
        )

    def _is_cut(self, index: int, answered: str) -> bool:
        """Whether the template drops the thought in the content of an answer."""
        content = self.turns[index]["content"]
        if THOUGHT_END not in content:
            return False
        text = marks.without_spaces(answered)
        return not any(variant in text for variant in marks.variants(content))

    def _as_generated(self, index: int, prompt: str) -> str | None:
        """The prompt, the whole content of an answer, and what the template writes after it.

        The prompt may already hold the start of the thought. None if it ends otherwise.
        """
        marked = self.turns[index] | {"content": MARK}
        written = self.renderer.render([*self.turns[:index], marked], self.extras)
        header, _, end = written.partition(MARK)
        start = prompt.removeprefix(header)
        if start == "":
            return prompt + self.turns[index]["content"] + end
        if start.strip() != THOUGHT_START:
            return None
        generated = self.turns[index]["content"].strip().removeprefix(THOUGHT_START).lstrip()
        return prompt + generated + end

    def _find_contents(self) -> dict[int, Content]:
        """The contents by turn; none if the template changes more than the spaces around them."""
        indices = [index for index, turn in enumerate(self.turns) if turn.get("content")]
        marked = list(self.turns)
        for index in indices:
            content = MARK + self.turns[index]["content"] + MARK
            marked[index] = self.turns[index] | {"content": content}
        try:
            pieces = self.renderer.render(marked, self.extras).split(MARK)
        except BadRow:
            return {}
        written, contents = pieces[0::2], pieces[1::2]
        if contents != [self.turns[index]["content"] for index in indices]:
            return {}

        found = {}
        end = 0
        for index, before, content, after in zip(indices, written, contents, written[1:]):
            start = end + len(before)
            if not self.text.startswith(content + after, start):
                content = content.strip()
            end = start + len(content)
            if self.text[start - len(before) : end] != before + content:
                return {}
            found[index] = Content(start, end, before, after)
        return found if self.text[end:] == written[-1] else {}
