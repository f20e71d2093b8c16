"""From turns to token ids, by the model's own chat template, and which of these tokens are learnt: the answers, nothing else.

A template is a program that writes turns as text. Hardly any says where an answer begins and ends, so that is found out by
letting it write growing prefixes of the conversation. For the answer in turn k,

    asked    = turns before k, and the header of an answer to come    <|user|>2 + 2?<|end|><|assistant|>
    answered = turns up to k                                          <|user|>2 + 2?<|end|><|assistant|>4<|end|>

`asked` must be how `answered` begins; what `answered` has more is the answer. `answered` must be how the whole begins; else the
template rewrites earlier turns (Qwen 3's forgets what was thought in them), and each answer becomes a sequence of its own,
in which it comes last. Learnt is up to the last special token of an answer, its end; the line break after it is nobody's.

The ids of `asked` alone are how the ids of the whole must begin, for they are what the model sees when it is asked. Where a
tokenizer would draw the last letter of a question and the first of an answer into one token, the rest is encoded by itself.

Without a template, a turn is a line, and an end token follows each answer.
"""

import hashlib
from array import array
from dataclasses import dataclass
from itertools import groupby, pairwise

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from data.rows import BRIEFLY, BadRow, Turn, is_learnt, question

IGNORE = -100  # the label that cross entropy leaves out


@dataclass(frozen=True)
class Example:
    """One sequence: its token ids, and as many labels: the id where it is learnt, else IGNORE; the texts it came from.

    starts: where documents begin in it, more than one if it is packed.
    """

    ids: list[int]
    labels: list[int]
    prompt: str = ""
    answer: str = ""
    starts: tuple[int, ...] = (0,)

    @property
    def n_prompt(self) -> int:
        """How many tokens come before the first that is learnt."""
        return next(
            (place for place, label in enumerate(self.labels) if label != IGNORE), len(self.labels)
        )

    def cut(self, start: int, end: int) -> "Example":
        return Example(self.ids[start:end], self.labels[start:end], self.prompt, self.answer)


def fingerprint(examples: list[Example]) -> str:
    """A hash of the examples' token ids, of which of them are learnt, and of their order: what training sees of the data."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(
            array("q", [len(example.ids), *example.ids, *example.labels, *example.starts])
        )
    return digest.hexdigest()[:16]


class Template:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.name = tokenizer, f"the chat template of {tokenizer.name_or_path}"
        self.ends = {
            number for number, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self.ends.add(tokenizer.eos_token_id)
        first = tokenizer("").input_ids[:1]
        self.begin = (
            first if first == [tokenizer.bos_token_id] else []
        )  # what this tokenizer puts before every text

    def ask(self, prompt: str) -> list[int]:
        """The ids of a question, up to where its answer begins."""
        return self._ids(self._write(question(prompt), asks=True))

    def document(self, text: str) -> Example:
        """A text that is learnt whole, with the end of it."""
        ids = self.begin + self._ids(text, bare=True) + [self.tokenizer.eos_token_id]
        return Example(ids, ids)

    def conversation(self, turns: list[Turn]) -> list[Example]:
        """One example, or one an answer where the template rewrites earlier turns.

        Raises: BadRow if the template refuses these turns; ValueError if it never shows where an answer begins or ends.
        """
        answers = [place for place, turn in enumerate(turns) if is_learnt(turn)]
        try:
            whole, spans = self._write(turns), [self._span(turns, place) for place in answers]
        except TemplateError as error:
            raise BadRow(f"{self.name} refuses it ({error})") from None
        texts = [(turns[place - 1]["content"], turns[place]["content"]) for place in answers]
        if all(whole.startswith(answered) for _, answered in spans):
            return [
                self._example(
                    whole, [(len(asked), len(answered)) for asked, answered in spans], *texts[0]
                )
            ]
        return [
            self._example(answered, [(len(asked), len(answered))], *text)
            for (asked, answered), text in zip(spans, texts)
        ]

    def _span(self, turns: list[Turn], place: int) -> tuple[str, str]:
        """What is written up to the answer in turn `place`, and with it."""
        asked, answered = self._write(turns[:place], asks=True), self._write(turns[: place + 1])
        if not answered.startswith(asked):
            raise ValueError(
                f"{self.name} asks for an answer with {asked[-40:]!r}, but does not write a given one after that: "
                "its tokens cannot be told; give the tokenizer a template that does"
            )
        return asked, answered

    def _example(
        self, text: str, spans: list[tuple[int, int]], prompt: str, answer: str
    ) -> Example:
        """Encode a text of which spans are answers, up to the end of the last: what follows teaches nothing."""
        ids, labels = [], []
        cuts = [0, *(cut for span in spans for cut in span)]  # given, answer, given, ..., answer
        for number, (start, end) in enumerate(pairwise(cuts)):
            whole = self._ids(text[:end])
            new = (
                whole[len(ids) :]
                if whole[: len(ids)] == ids
                else self._ids(text[start:end], bare=True)
            )
            ids = ids + new
            learnt = self._up_to_its_end(new) if number % 2 else 0
            labels += new[:learnt] + [IGNORE] * (len(new) - learnt)
        end = len(new) - learnt
        return Example(ids, labels, prompt, answer).cut(0, len(ids) - end)

    def _up_to_its_end(self, ids: list[int]) -> int:
        ends = [place for place, token in enumerate(ids) if token in self.ends]
        if not ends:
            raise ValueError(
                f"{self.name} puts no special token after an answer, so no end would be learnt: give it a "
                "template that writes eos_token there"
            )
        return ends[-1] + 1

    def _write(self, turns: list[Turn], asks: bool = False) -> str:
        """The turns as text, and with `asks` the header under which an answer is to be written."""
        if self.tokenizer.chat_template is None:
            end = {"assistant": self.tokenizer.eos_token}
            return "".join(
                turn["content"] + end.get(turn["role"], "\n")
                for turn in turns
                if turn is not BRIEFLY
            )
        try:
            return self.tokenizer.apply_chat_template(
                turns, add_generation_prompt=asks, tokenize=False
            )
        except TemplateError:
            if turns[0] is not BRIEFLY:
                raise
            return self._write(turns[1:], asks)  # a template without system messages, as Gemma's

    def _ids(self, text: str, bare: bool = False) -> list[int]:
        """The ids of a text that the template wrote, or bare: of one to which nothing is added."""
        begin = [] if bare or self.tokenizer.chat_template is not None else self.begin
        return begin + self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def shown(example: Example, tokenizer: PreTrainedTokenizerBase, colour: bool) -> str:
    """A sequence as text, what is learnt in it marked."""
    parts = []
    for learnt, run in groupby(
        zip(example.ids, example.labels), key=lambda pair: pair[1] != IGNORE
    ):
        text = tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False)
        # A control character in the data is shown, not obeyed by the terminal.
        text = "".join(
            letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1]
            for letter in text
        )
        parts.append(
            marked(text, colour) if learnt else f"\033[2m{text}\033[0m" if colour else text
        )
    return "".join(parts)


def marked(text: str, colour: bool) -> str:
    """Learnt text, green or in brackets."""
    return f"\033[32m{text}\033[0m" if colour else f"⟦{text}⟧"
