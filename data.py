"""Data sets, as token ids and a mask of which of them are learnt.

    orders, roman   generated, see tasks.py
    text            the reference pages of Python's own help(), as plain text
    a file          .txt as plain text; .jsonl with a "prompt" and a "completion" a line

A question is put into the model's chat template; only the answer and the end token are learnt. Padding is told from text by
its position, never by its id: pad and end are the same token in many models, and an end that is masked away is never learnt.
"""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import tasks

IGNORE = -100  # the label that cross entropy leaves out


@dataclass(frozen=True)
class Example:
    """One sequence: `ids` of which the first `n_prompt` are given and the rest are learnt; the texts they came from."""

    ids: list[int]
    n_prompt: int
    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    """What is trained on and what is measured. `metric` is "exact match" of generated answers, or "perplexity"."""

    metric: str
    train: list[Example]
    test: list[Example]
    unseen: list[Example] = field(default_factory=list)  # phrasings kept out of training


def load(name: str, tokenizer: PreTrainedTokenizerBase, max_seq_len: int, seed: int) -> Task:
    """The data set of that name, or in that file.

    Raises: ValueError for an unknown name, an empty or malformed file (with its line), or examples longer than max_seq_len.
    """
    if name in ("orders", "roman"):
        parts = getattr(tasks, name)(random.Random(seed))
        task = Task("exact match", *([_encode(tokenizer, *pair) for pair in part] for part in parts))
    elif name == "text":
        from pydoc_data.topics import topics  # the pages behind help("for"), help("yield"), ...

        task = _text(tokenizer, "\n\n".join(topics[key] for key in sorted(topics)), max_seq_len)
    else:
        task = _file(Path(name), tokenizer, max_seq_len, seed)
    longest = max(len(example.ids) for example in task.train + task.test + task.unseen)
    if longest > max_seq_len:
        raise ValueError(f"the longest example of {name} has {longest} tokens, more than --max-seq-len {max_seq_len}: raise it")
    return task


@dataclass(frozen=True)
class Batch:
    """Examples side by side, padded on the right: input_ids, attention_mask and labels, each int64 (B, T)."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    @property
    def n_labels(self) -> int:
        """How many tokens are predicted: the first of a sequence never is."""
        return int((self.labels[:, 1:] != IGNORE).sum())

    def to(self, device: str) -> "Batch":
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))


def collate(examples: list[Example], pad_id: int) -> Batch:
    """Pad examples to the longest of them."""
    shape = len(examples), max(len(example.ids) for example in examples)
    ids, mask, labels = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORE)
    for row, example in enumerate(examples):
        n = len(example.ids)
        ids[row, :n] = torch.tensor(example.ids)
        mask[row, :n] = 1
        labels[row, example.n_prompt : n] = ids[row, example.n_prompt : n]
    return Batch(ids, mask, labels)


def batches_of_step(examples: list[Example], step: int, batch_size: int, count: int, seed: int, pad_id: int) -> list[Batch]:
    """The `count` batches of a step: they follow from step and seed alone, so a resumed run sees what it would have seen."""
    n, places = len(examples), range(step * batch_size * count, (step + 1) * batch_size * count)
    epochs = {place // n for place in places}
    order = {epoch: torch.randperm(n, generator=torch.Generator().manual_seed(seed + epoch)) for epoch in epochs}
    chosen = [examples[order[place // n][place % n]] for place in places]
    return [collate(chosen[i : i + batch_size], pad_id) for i in range(0, len(chosen), batch_size)]


def chat(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The ids of a question in the model's chat template, up to where its answer begins."""
    if tokenizer.chat_template is None:
        return tokenizer(prompt + "\n").input_ids
    messages = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False).input_ids


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> Example:
    given, learnt = chat(tokenizer, prompt), tokenizer(answer + tokenizer.eos_token, add_special_tokens=False).input_ids
    return Example(given + learnt, len(given), prompt, answer)


def _text(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> Task:
    """Plain text as sequences of `length` tokens, all learnt; the last tenth is held out."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    rows = [Example(ids[i : i + length], 0, "", "") for i in range(0, len(ids) - 1, length)]
    return _split(rows)


def _file(path: Path, tokenizer: PreTrainedTokenizerBase, max_seq_len: int, seed: int) -> Task:
    if not path.is_file():
        raise ValueError(f"--data {path} is not a file, nor one of orders, roman, text")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it") from None
    if path.suffix != ".jsonl":
        return _text(tokenizer, text, max_seq_len)
    pairs = [_pair(line, f"{path}:{number}") for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    rows = [_encode(tokenizer, *pair) for pair in pairs]
    random.Random(seed).shuffle(rows)
    return _split(rows)


def _pair(line: str, where: str) -> tuple[str, str]:
    """One line of a .jsonl file -> prompt, completion."""
    try:
        row = json.loads(line)
        prompt, completion = row["prompt"], row["completion"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f'{where}: a line is an object with a "prompt" and a "completion" ({error!r})') from None
    if not isinstance(prompt, str) or not isinstance(completion, str) or not completion:
        raise ValueError(f"{where}: prompt and completion are strings, and the completion is not empty")
    return prompt, completion


def _split(rows: list[Example]) -> Task:
    """Hold out the last tenth, to be measured in perplexity."""
    held_out = max(1, len(rows) // 10)
    if len(rows) < 2:
        raise ValueError(f"the data make {len(rows)} sequences; at least 2 are needed, one to train on and one to hold out")
    return Task("perplexity", rows[:-held_out], rows[-held_out:])
