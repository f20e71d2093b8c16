"""Encodes conversations with the model's chat template; only the answers are in the loss.

A chat template is a program that writes turns as text. Most templates do not mark where an answer
begins and ends. So the template renders growing prefixes of the conversation. For the answer in
turn k,

    prompt   = turns before k, and the header of an answer    <|user|>2 + 2?<|end|><|assistant|>
    answered = turns up to and including k      <|user|>2 + 2?<|end|><|assistant|>4<|end|>

`answered` must start with `prompt`; the rest of `answered` is the answer. The rendered
conversation must start with `answered`. Otherwise the template rewrites earlier turns (Qwen 3's
removes the thoughts from them), and each answer gets a sequence of its own, in which it is the last
turn.

The tokens of an answer up to and including its last special token, which ends it, are in the loss.
The line break that many templates write after that token is not.

The ids of the first `prompt` must be the first ids of the sequence, because generation starts from
exactly these ids. Where a tokenizer would merge the last character of a question and the first
character of an answer into one token, the answer is tokenized separately.

Without a chat template, each turn is a line, and an EOS token follows each answer.
"""

from __future__ import annotations  # type hints must not load the classes of transformers

import hashlib
from array import array
from dataclasses import dataclass
from itertools import groupby

import transformers
from jinja2 import TemplateError

from data.rows import BadRow, Turn, is_default_system_message, is_in_loss, question_turns

IGNORE_INDEX = -100  # the label that cross entropy skips


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


class Template:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.name = f"the chat template of {tokenizer.name_or_path}"
        added = tokenizer.added_tokens_decoder
        special_ids = {token_id for token_id, token in added.items() if token.special}
        self.end_ids = special_ids | {tokenizer.eos_token_id}
        first_ids = tokenizer("").input_ids[:1]
        adds_bos = first_ids == [tokenizer.bos_token_id]
        self.bos_ids = first_ids if adds_bos else []
        # A chat template writes BOS itself, if the model needs it.
        self.rendered_prefix = self.bos_ids if tokenizer.chat_template is None else []

    def encode_prompt(self, prompt: str, system: str | None = None) -> list[int]:
        """The ids of a question and of the header of its answer.

        Raises: ValueError if the template refuses or drops the system message.
        """
        try:
            text = self._render(question_turns(prompt, system), add_generation_prompt=True)
        except TemplateError as error:
            raise ValueError(f"{self.name} refuses --system ({error}): leave it out") from None
        if system is not None and system.strip() not in text:
            raise ValueError(f"{self.name} drops --system: leave it out")
        return self._tokenize_rendered(text)

    def encode_document(self, text: str) -> Example:
        """A plain text and an EOS token, with all tokens in the loss."""
        ids = self.bos_ids + self._tokenize(text) + [self.tokenizer.eos_token_id]
        return Example(ids, ids)

    def encode_conversation(self, turns: list[Turn]) -> list[Example]:
        """One example, or one per answer if the template rewrites earlier turns.

        Raises: BadRow if the template refuses these turns; ValueError if the template never shows
        where an answer begins or ends.
        """
        answers = [index for index, turn in enumerate(turns) if is_in_loss(turn)]
        try:
            text = self._render(turns)
            prefixes = [self._render_prompt_and_answer(turns, index, text) for index in answers]
        except TemplateError as error:
            raise BadRow(f"{self.name} refuses it ({error})") from None

        if all(text.startswith(answered) for _, answered in prefixes):
            return [self._encode_answers(prefixes, turns, answers[0])]
        return [
            self._encode_answers([prefix], turns, index) for index, prefix in zip(answers, prefixes)
        ]

    def _render_prompt_and_answer(
        self, turns: list[Turn], index: int, text: str
    ) -> tuple[str, str]:
        """The text before the answer in turn `index`, and the same text with the answer.

        text: all turns, rendered.
        """
        prompt = self._render(turns[:index], add_generation_prompt=True)
        is_last = index + 1 == len(turns)
        answered = text if is_last else self._render(turns[: index + 1])
        if not answered.startswith(prompt):
            raise ValueError(
                f"{self.name} ends a prompt with {prompt[-40:]!r}, but does not write a given "
                "answer after these characters, so the tokens of the answer cannot be found: "
                "give the tokenizer a template that does"
            )
        return prompt, answered

    def _encode_answers(
        self, prefixes: list[tuple[str, str]], turns: list[Turn], first: int
    ) -> Example:
        """Encode a conversation up to the end of its last answer.

        prefixes: the text before each answer, and the same text with the answer.
        first: the index of the first answer in `turns`.
        """
        ids: list[int] = []
        labels: list[int] = []
        encoded = ""  # the text of `ids`
        for prompt, answered in prefixes:
            prompt_ids = self._next_ids(ids, encoded, prompt)
            ids += prompt_ids
            labels += [IGNORE_INDEX] * len(prompt_ids)

            answer_ids = self._next_ids(ids, prompt, answered)
            n_in_loss = self._length_with_end(answer_ids)
            end = len(ids) + n_in_loss
            ids += answer_ids
            labels += answer_ids[:n_in_loss]
            labels += [IGNORE_INDEX] * (len(answer_ids) - n_in_loss)
            encoded = answered
        question = turns[first - 1]["content"]
        return Example(ids[:end], labels[:end], question, turns[first]["content"])

    def _next_ids(self, ids: list[int], text: str, longer: str) -> list[int]:
        """The ids of what `longer` adds to `text`, where `ids` are those of `text`."""
        all_ids = self._tokenize_rendered(longer)
        if all_ids[: len(ids)] == ids:
            return all_ids[len(ids) :]
        return self._tokenize(longer[len(text) :])  # one token would span the end of `text`

    def _length_with_end(self, answer_ids: list[int]) -> int:
        """The number of tokens up to and including the last special token."""
        ends = [index for index, token in enumerate(answer_ids) if token in self.end_ids]
        if not ends:
            raise ValueError(
                f"{self.name} writes no special token after an answer, so the model would not be "
                "trained to end its answers: give it a template that writes eos_token there"
            )
        return ends[-1] + 1

    def _render(self, turns: list[Turn], add_generation_prompt: bool = False) -> str:
        """The turns as text; add_generation_prompt: with the header of an answer after them."""
        if self.tokenizer.chat_template is None:
            return self._render_lines(turns)
        try:
            return self.tokenizer.apply_chat_template(
                turns, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except TemplateError:
            # Some templates, such as Gemma's, refuse system messages.
            if is_default_system_message(turns[0]):
                return self._render(turns[1:], add_generation_prompt)
            raise

    def _render_lines(self, turns: list[Turn]) -> str:
        text = ""
        for turn in turns:
            if is_default_system_message(turn):
                continue
            end = self.tokenizer.eos_token if turn["role"] == "assistant" else "\n"
            text += turn["content"] + end
        return text

    def _tokenize_rendered(self, text: str) -> list[int]:
        """The ids of a text that starts with the first turn, with BOS where it is needed."""
        return self.rendered_prefix + self._tokenize(text)

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids


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
