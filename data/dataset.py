"""Data sets, as token ids and a mask of which of them are learnt.

    orders, roman   generated, see tasks.py; text: the reference pages of Python's own help(), as plain text
    a file          .txt as plain text; .jsonl and .json as rows of the formats of formats.py
    a hub id        owner/name of a data set on the Hugging Face hub, of such rows

Only answers and their end tokens are learnt (template.py), and documents whole. Padding is told from text by its position,
never by its id: pad and end are the same token in many models, and an end that is masked away is never learnt.
"""

import random
import re
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from checkpoints import io as files
from data import packing
from data import rows as formats
from data import toy_tasks as tasks
from data.chat_template import IGNORE, Example, Template, marked, shown


@dataclass(frozen=True)
class Task:
    """What is trained on and what is measured. `metric` is "exact match" of generated answers, or "perplexity"."""

    metric: str
    train: list[Example]
    test: list[Example]
    unseen: list[Example] = field(default_factory=list)  # phrasings kept out of training


def load(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_len: int,
    seed: int,
    train_on_prompt: bool = False,
    packed: bool = False,
) -> Task:
    """The data set of that name, or in that file. Prints how many rows were too long, and what became of them.

    train_on_prompt: learn every token, not the answers alone. packed: several examples a sequence, as packing.py has it.
    Raises: ValueError for an unknown name, rows that cannot be used (all of them, with their lines), or too few of them.
    """
    template = Template(tokenizer)
    if name in ("orders", "roman"):
        parts = getattr(tasks, name)(random.Random(seed))
        task = Task(
            "exact match",
            *([template.conversation(formats.pair(*pair))[0] for pair in part] for part in parts),
        )
        longest = max(len(example.ids) for example in task.train + task.test + task.unseen)
        if longest > max_seq_len:
            raise ValueError(
                f"the longest of {name} has {longest} tokens, more than --max-seq-len {max_seq_len}: raise it"
            )
    elif name == "text":
        from pydoc_data.topics import topics  # the pages behind help("for"), help("yield"), ...

        task = _split(
            _text(template, "\n\n".join(topics[key] for key in sorted(topics)), max_seq_len)
        )
    elif Path(name).suffix == ".txt" and Path(name).is_file():
        task = _split(_text(template, files.read_text(Path(name)), max_seq_len))
    else:
        rows = _fit(_encode(name, template), max_seq_len, name)
        random.Random(seed).shuffle(rows)
        task = _split(rows)
    if train_on_prompt:
        task = replace(task, train=[replace(example, labels=example.ids) for example in task.train])
    return replace(task, train=packing.pack(task.train, max_seq_len)) if packed else task


@dataclass(frozen=True)
class Batch:
    """Examples side by side, padded on the right: input_ids, attention_mask and labels, each int64 (B, T).

    position_ids, where examples are packed: the place of each token in its document. They say where a document ends, too.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    position_ids: Tensor | None = None

    @property
    def n_labels(self) -> int:
        """How many tokens are predicted: the first of a sequence never is."""
        return int((self.labels[:, 1:] != IGNORE).sum())

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the model is called with. Transformers looks for packed documents where there is no attention_mask."""
        seen = (
            {"attention_mask": self.attention_mask}
            if self.position_ids is None
            else {"position_ids": self.position_ids}
        )
        return {"input_ids": self.input_ids} | seen

    def to(self, device: str) -> "Batch":
        return Batch(
            **{
                name: tensor if tensor is None else tensor.to(device)
                for name, tensor in vars(self).items()
            }
        )


def collate(examples: list[Example], pad_id: int) -> Batch:
    """Pad examples to the longest of them."""
    shape = len(examples), max(len(example.ids) for example in examples)
    ids, mask, labels = (
        torch.full(shape, pad_id),
        torch.zeros(shape, dtype=torch.int64),
        torch.full(shape, IGNORE),
    )
    for row, example in enumerate(examples):
        n = len(example.ids)
        ids[row, :n] = torch.tensor(example.ids)
        mask[row, :n] = 1
        labels[row, :n] = torch.tensor(example.labels)
    packed = any(len(example.starts) > 1 for example in examples)
    return Batch(ids, mask, labels, packing.positions(examples, shape) if packed else None)


def batches_of_step(
    examples: list[Example],
    step: int,
    batch_size: int,
    count: int,
    seed: int,
    pad_id: int,
    by_length: bool = False,
) -> list[Batch]:
    """The `count` batches of a step: they follow from step and seed alone, so a resumed run sees what it would have seen.

    by_length: 50 batches at a time of an epoch's order are filled anew, each with sequences of similar length.
    """
    n, places, size = (
        len(examples),
        range(step * batch_size * count, (step + 1) * batch_size * count),
        50 * batch_size,
    )
    epochs = {place // n for place in places}
    order = {
        epoch: torch.randperm(n, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        for epoch in epochs
    }
    for epoch, start in {(place // n, place % n // size * size) for place in places if by_length}:
        window = sorted(
            order[epoch][start : start + size],
            key=lambda number: len(examples[number].ids),
            reverse=True,
        )
        batches = [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
        random.Random(f"{seed} {epoch} {start}").shuffle(batches)
        order[epoch][start : start + size] = [number for batch in batches for number in batch]
    chosen = [examples[order[place // n][place % n]] for place in places]
    return [collate(chosen[i : i + batch_size], pad_id) for i in range(0, len(chosen), batch_size)]


def chat(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The ids of a question in the model's chat template, up to where its answer begins."""
    return Template(tokenizer).ask(prompt)


def preview(task: Task, tokenizer: PreTrainedTokenizerBase, colour: bool, count: int = 3) -> str:
    """The first sequences to train on as text, what is learnt in it marked."""
    lines = [
        f"{len(task.train)} sequences to train on, {len(task.test)} held out; learnt is {marked('this', colour)}"
    ]
    for number, example in enumerate(task.train[:count], 1):
        lines.append(
            f"--- {number}: {len(example.ids)} tokens, {sum(label != IGNORE for label in example.labels[1:])} learnt"
        )
        documents = [example.cut(*place) for place in pairwise([*example.starts, len(example.ids)])]
        lines.append("\n- - -\n".join(shown(document, tokenizer, colour) for document in documents))
    return "\n".join(lines)


def _text(template: Template, text: str, length: int) -> list[list[Example]]:
    """Plain text as sequences of `length` tokens, all learnt."""
    ids = template.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return _pieces(Example(ids, ids), length)


def _pieces(example: Example, length: int) -> list[list[Example]]:
    """Rows of at most `length` tokens; a single token left over would teach nothing."""
    return [[example.cut(i, i + length)] for i in range(0, len(example.ids) - 1, length)]


def _encode(name: str, template: Template) -> list[tuple[formats.Row, list[Example]]]:
    """The rows of a file or a hub data set, each with its examples. Raises: ValueError with every row that makes none."""
    path = Path(name)
    if path.is_file() and path.suffix not in (".json", ".jsonl"):
        raise ValueError(
            f"--data {name} ends neither in .txt nor in .jsonl or .json: rename it to what it is"
        )
    if not path.is_file() and not re.fullmatch(
        r"[\w-][\w.-]*/[\w.-]+(?<!\.jsonl)(?<!\.json)(?<!\.txt)", name
    ):
        raise ValueError(f"--data {name} is not a file, nor one of orders, roman, text")
    rows, encoded, faults = formats.read(path) if path.is_file() else formats.read_hub(name), [], []
    for row in rows:
        try:
            if row.fault:
                raise formats.BadRow(row.fault)
            encoded.append(
                (
                    row,
                    template.conversation(row.turns)
                    if row.turns
                    else [template.document(row.text)],
                )
            )
        except formats.BadRow as error:
            faults.append(f"{row.where}: {error}")
    formats.refuse(faults, len(rows), name)
    return encoded


def _fit(
    rows: list[tuple[formats.Row, list[Example]]], length: int, name: str
) -> list[list[Example]]:
    """The examples of each row in at most `length` tokens; says how many are cut or dropped.

    A document goes on in another sequence. A conversation loses its end, and is dropped if no answer begins before that.
    """
    fitting, long, dropped = [], [], 0
    for row, examples in rows:
        longest = max(len(example.ids) for example in examples)
        if longest > length:
            long.append(f"{row.where} has {longest}")
        if row.text:
            [document] = examples
            fitting.append([piece for [piece] in _pieces(document, length)])
            continue
        kept = [example.cut(0, length) for example in examples]
        kept = [example for example in kept if set(example.labels[1:]) - {IGNORE}]
        dropped += len(examples) - len(kept)
        fitting.append(kept)
    if long:
        shown = ", ".join(long[: formats.SHOWN]) + ", ..." * (len(long) > formats.SHOWN)
        print(
            f"{len(long)} of {len(rows)} rows of {name} exceed --max-seq-len {length}: documents go on in another\n"
            f"sequence, conversations are cut, and {dropped} of their sequences dropped, with no answer left: {shown}"
        )
    return [examples for examples in fitting if examples]


def _split(rows: list[list[Example]]) -> Task:
    """Hold out the last tenth of the rows, to be measured in perplexity."""
    held_out = max(1, len(rows) // 10)
    if len(rows) < 2:
        raise ValueError(
            f"the data make {len(rows)} sequences; at least 2 are needed, one to train on and one to hold out"
        )
    return Task(
        "perplexity",
        *(
            [example for row in part for example in row]
            for part in (rows[:-held_out], rows[-held_out:])
        ),
    )
