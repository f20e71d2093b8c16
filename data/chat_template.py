"""Encodes conversations and documents as token ids; only the answers are in the loss.

rendering.py writes a conversation as text with the model's chat template; answers.py finds the
answers in it. If the template rewrites earlier turns, each answer gets a sequence of its own, in
which it is the last turn.

The tokens of an answer up to and including its last special token, which ends it, are in the loss.
Generation must stop at the same tokens: Template.ends collects them.

The ids of the first prompt must be the first ids of the sequence, because generation starts from
exactly these ids. Where a tokenizer would merge the last character of a question and the first
character of an answer into one token, the answer is tokenized separately. Elsewhere the ids are
those of the whole text.
"""

from __future__ import annotations  # type hints must not load the classes of transformers

import datetime
import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise
from typing import NamedTuple

import transformers

from data.answers import Conversation, Span
from data.rendering import Renderer
from data.rows import Extras, Turn, is_in_loss, question_turns

IGNORE_INDEX = -100  # the label that cross entropy skips
TEXTS_PER_BATCH = 256  # to tokenize at once; the offsets of more would take much memory


@dataclass(frozen=True)
class Example:
    """One sequence: token ids, one label per id, and the first question and answer in it as text.

    labels: the id itself where the token is in the loss, else IGNORE_INDEX.
    starts: the indices at which documents begin; a packed sequence has more than one.
    """

    ids: list[int]
    labels: list[int]
    prompt: str = ""
    answer: str = ""
    starts: tuple[int, ...] = (0,)

    @property
    def n_prompt(self) -> int:
        """The number of tokens before the first token in the loss."""
        for index, label in enumerate(self.labels):
            if label != IGNORE_INDEX:
                return index
        return len(self.labels)

    def cut(self, start: int, end: int) -> Example:
        """The tokens from index `start` up to, but not including, `end`."""
        return Example(self.ids[start:end], self.labels[start:end], self.prompt, self.answer)


def fingerprint(examples: list[Example]) -> str:
    """A hash of all that training sees of the data: ids, labels, document starts and order."""
    digest = hashlib.sha256()
    for example in examples:
        numbers = [len(example.ids), *example.ids, *example.labels, *example.starts]
        digest.update(array("q", numbers))
    return digest.hexdigest()[:16]


class Rendered(NamedTuple):
    """A conversation as text up to the end of its last answer, with the places of its answers.

    question, answer: the contents of the first answer in the loss and of the turn before it.
    """

    text: str
    spans: list[Span]
    question: str
    answer: str


class Template:
    """Encodes with a tokenizer and its chat template, which prints one date.

    ends: the ids that end the answers and the documents encoded so far.
    """

    def __init__(
        self, tokenizer: transformers.PreTrainedTokenizerBase, date: datetime.date | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.renderer = Renderer(tokenizer, date)
        self.ends: set[int] = set()
        self.tokenize_header = lru_cache(self._tokenize)  # most answers have the same header
        first_ids = tokenizer("").input_ids[:1]
        adds_bos = first_ids == [tokenizer.bos_token_id]
        self.bos_ids = first_ids if adds_bos else []
        # A chat template writes BOS itself, if the model needs it.
        self.rendered_prefix = self.bos_ids if tokenizer.chat_template is None else []

    def encode_prompt(self, prompt: str, system: str | None = None) -> list[int]:
        """The ids of a question and of the header of its answer.

        Raises: BadRow if the template refuses or drops a message.
        """
        turns = self.renderer.accepted(question_turns(prompt, system))
        text = self.renderer.render(turns, add_generation_prompt=True)
        self.renderer.require_written(turns, text)
        return self.rendered_prefix + self._tokenize(text)

    def encode_document(self, text: str) -> Example:
        """A plain text, BOS if the model needs it, and EOS, each once, with all in the loss.

        A text that has them already keeps the white space before BOS and after EOS.
        """
        ids = self._tokenize(text)
        if self.bos_ids and not text.lstrip().startswith(self.tokenizer.bos_token):
            ids = self.bos_ids + ids
        eos = self.tokenizer.eos_token_id
        if not text.rstrip().endswith(self.tokenizer.eos_token):
            ids = [*ids, eos]
        self.ends.add(eos)
        return Example(ids, ids)

    def encode_conversation(self, turns: list[Turn], extras: Extras | None = None) -> list[Example]:
        """One example, or one per answer if the template rewrites earlier turns.

        Raises: as render_conversation.
        """
        return self.encode_rendered(self.render_conversation(turns, extras))

    def render_conversation(
        self, turns: list[Turn], extras: Extras | None = None
    ) -> list[Rendered]:
        """One text, or one per answer if the template rewrites earlier turns.

        Raises: BadRow if the template refuses these turns or drops a content; ValueError if it does
        not show where an answer begins or ends.
        """
        turns = self.renderer.accepted(turns, extras)
        conversation = Conversation(self.renderer, turns, extras)
        answers = [index for index, turn in enumerate(turns) if is_in_loss(turn)]
        spans = conversation.find_answers(answers)
        if spans is not None:
            self.renderer.require_written(turns, conversation.text, extras)
            for index, span in zip(answers, spans):
                conversation.require_own_thought(index, conversation.text, span)
            return [_render_answers(conversation.text, spans, turns, answers[0])]

        rendered = []
        for index in answers:
            text, start = conversation.render_answer(index)
            earlier = turns[: index + 1]
            self.renderer.require_written(earlier, text, extras, earlier_answers=False)
            span = Span(start, len(text))
            conversation.require_own_thought(index, text, span)
            rendered.append(_render_answers(text, [span], turns, index))
        return rendered

    def encode_rendered(self, rendered: list[Rendered]) -> list[Example]:
        """The examples of many conversations at once, which takes a tokenizer less time."""
        tokens = self._tokenize_with_ends([each.text for each in rendered])
        return [self._encode_answers(each, *pair) for each, pair in zip(rendered, tokens)]

    def _encode_answers(self, rendered: Rendered, ids: list[int], ends: list[int]) -> Example:
        """ids, ends: the tokens of the whole text, and the index in it at which each ends."""
        text, spans, question, answer = rendered
        starts = [span.start for span in spans]
        ids, ends, starts = self._split_before_answers(text, ids, ends, starts)
        labels = [IGNORE_INDEX] * len(ids)
        for start, span in zip(starts, spans):
            end = bisect_right(ends, span.end - 1) + 1
            labels[start:end] = ids[start:end]
            self.ends.add(ids[end - 1])
        prefix = self.rendered_prefix
        labels = [IGNORE_INDEX] * len(prefix) + labels
        return Example(prefix + ids, labels, question, answer)

    def _split_before_answers(
        self, text: str, ids: list[int], ends: list[int], starts: list[int]
    ) -> tuple[list[int], list[int], list[int]]:
        """The ids of a text, where each token ends in it, and the token that starts each answer.

        starts: where the answers start in the text. If the text before a start has other ids alone,
        it is tokenized separately.
        """
        # The tokens from a control token on do not depend on the text before it.
        controls = [0, *(token.start() for token in self.renderer.control_tokens.finditer(text))]
        windows = [(controls[bisect_right(controls, start) - 1], start) for start in starts]
        before = [
            (control, self.tokenize_header(text[control:start])) for control, start in windows
        ]

        indices = [_index_after(control, alone, ids, ends) for control, alone in before]
        splits = [start for start, index in zip(starts, indices) if index is None]
        if splits:
            ids, ends = self._tokenize_pieces(text, [0, *splits])
            indices = [_index_after(control, alone, ids, ends) for control, alone in before]
        assert None not in indices, "a piece has other ids than the text before its end"
        return ids, ends, indices

    def _tokenize_pieces(self, text: str, starts: list[int]) -> tuple[list[int], list[int]]:
        """The ids of a text whose pieces are tokenized alone, and where each token ends in it."""
        pieces = [text[start:end] for start, end in pairwise([*starts, len(text)])]
        ids: list[int] = []
        ends: list[int] = []
        for start, (piece_ids, piece_ends) in zip(starts, self._tokenize_with_ends(pieces)):
            ids += piece_ids
            ends += [start + end for end in piece_ends]
        return ids, ends

    def _tokenize_with_ends(self, texts: list[str]) -> Iterator[tuple[list[int], list[int]]]:
        """For each text, its ids and the index in it at which each token ends."""
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"the tokenizer {type(self.tokenizer).__name__} does not tell which characters a "
                "token has, so the tokens of an answer cannot be found: give the model a "
                "tokenizer.json"
            )
        for start in range(0, len(texts), TEXTS_PER_BATCH):
            encodings = self.tokenizer(
                texts[start : start + TEXTS_PER_BATCH],
                add_special_tokens=False,
                return_offsets_mapping=True,
                verbose=False,
            )
            for ids, offsets in zip(encodings.input_ids, encodings.offset_mapping):
                yield ids, [end for _, end in offsets]

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def _render_answers(text: str, spans: list[Span], turns: list[Turn], first: int) -> Rendered:
    """first: the index of the first answer in `turns`."""
    question = turns[first - 1].get("content") or ""
    return Rendered(text[: spans[-1].end], spans, question, turns[first].get("content") or "")


def _index_after(control: int, alone: list[int], ids: list[int], ends: list[int]) -> int | None:
    """The index in `ids` after the ids `alone`, whose text begins at `control`; None without them.

    ends: where each token of `ids` ends in the text.
    """
    first = bisect_right(ends, control) if control else 0
    last = first + len(alone)
    return last if ids[first:last] == alone else None


def show_example(
    example: Example, tokenizer: transformers.PreTrainedTokenizerBase, colour: bool
) -> str:
    """A sequence as text, with the tokens in the loss marked."""
    parts = []
    pairs = zip(example.ids, example.labels)
    for in_loss, run in groupby(pairs, key=_has_label):
        ids = [token for token, _ in run]
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        text = "".join(map(_escape_control_character, text))
        if in_loss:
            parts.append(mark_in_loss(text, colour))
        elif colour:
            parts.append(f"\033[2m{text}\033[0m")
        else:
            parts.append(text)
    return "".join(parts)


def mark_in_loss(text: str, colour: bool) -> str:
    """Marks text that is in the loss, in green or with brackets."""
    return f"\033[32m{text}\033[0m" if colour else f"⟦{text}⟧"


def _has_label(pair: tuple[int, int]) -> bool:
    _, label = pair
    return label != IGNORE_INDEX


def _escape_control_character(character: str) -> str:
    """Escapes a control character, so that the terminal shows it and does not execute it."""
    if character.isprintable() or character == "\n":
        return character
    return repr(character)[1:-1]
