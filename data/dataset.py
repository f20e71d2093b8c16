"""Data sets as token ids and labels, and the batches of each training step.

    orders, roman   generated, see toy_tasks.py
    text            the reference pages of Python's own help(), as plain text
    a file          .txt as plain text; the other formats of files.py as rows, see rows.py
    a hub id        owner/name of a data set on the Hugging Face hub with such rows

The answers with their end tokens (chat_template.py) and all tokens of a document are in the loss.
Padding is masked by its position, never by its id: many models use one token for padding and for
EOS, and masking EOS by id would drop it from the loss.
"""

from __future__ import annotations  # type hints must not load the classes of transformers

import datetime
import hashlib
import random
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import chain, islice, pairwise
from pathlib import Path

import torch
import transformers
from torch import Tensor

from checkpoints import io
from data import files, packing, rows, toy_tasks
from data.chat_template import (
    IGNORE_INDEX,
    Example,
    Rendered,
    Template,
    mark_in_loss,
    show_example,
)
from data.completeness import require_complete

# Control tokens of many models; </s> is not one of them here, because HTML has it, too.
CONTROL_TOKEN = re.compile(r"<\|[a-z_]+\|>|\[/?INST\]|<(?:start|end)_of_turn>")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
EncodedRow = tuple[rows.Row, list[Example]]
BATCHES_PER_WINDOW = 50  # by_length sorts the sequences of so many batches at a time


@dataclass(frozen=True)
class Task:
    """The examples to train on and to evaluate on.

    metric: "exact match" of generated answers, or "perplexity".
    unseen: examples in phrasings that do not occur in training.
    ends: the ids of the tokens that end the answers and the documents.
    date: the date that the chat template prints; None if it prints none.
    """

    metric: str
    train: list[Example]
    test: list[Example]
    unseen: list[Example] = field(default_factory=list)
    ends: frozenset[int] = frozenset()
    date: datetime.date | None = None


def load_task(
    name: str,
    tokenizer: transformers.PreTrainedTokenizerBase,
    max_seq_len: int,
    train_on_prompt: bool = False,
    packed: bool = False,
    date: datetime.date | None = None,
) -> Task:
    """Loads a data set by name, file or hub id; prints unread keys, and rows that are too long.

    Neither the rows nor which of them are held out depend on a seed.
    train_on_prompt: all tokens of the training examples are in the loss, not only the answers.
    packed: packs the training examples (packing.py).
    date: of a chat template that prints one; None stands for today.
    Raises: ValueError for an unknown name, for bad rows (a list of all, with their lines), and for
    fewer than two rows.
    """
    template = Template(tokenizer, date)
    path = Path(name)
    if name in toy_tasks.TASKS:
        task = _toy_task(name, template, max_seq_len)
    elif name == "text":
        task = _split(_encode_text(_help_pages(), template, max_seq_len))
    elif files.format_of(path) == files.TEXT_FORMAT and path.is_file():
        task = _split(_encode_text(_read_document(path), template, max_seq_len))
    else:
        found = _read_rows(name)
        if train_on_prompt:
            found = [rows.refuse_weights(row) for row in found]
        _print_foreign_tokens(found, tokenizer, name)
        encoded = _encode_rows(found, template, name)
        fitting = _fit(encoded, max_seq_len, name)
        fitting.sort(key=_hash_of_row)
        task = _split([examples for _, examples in fitting])
        _print_repeated(task, name)

    train = task.train
    if train_on_prompt:
        train = [replace(example, labels=example.ids) for example in train]
    if packed:
        train = packing.pack(train, max_seq_len)
    ends = frozenset(template.ends)
    return replace(task, train=train, ends=ends, date=template.renderer.date)


@dataclass(frozen=True)
class Batch:
    """Examples padded on the right to one length: each tensor is int64 (B, T).

    position_ids: for packed examples, the index of each token in its document; else None. The model
    also finds the boundaries of documents in it.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    position_ids: Tensor | None = None

    @property
    def n_labels(self) -> int:
        """The number of predicted tokens; the first token of a sequence is never predicted."""
        return int((self.labels[:, 1:] != IGNORE_INDEX).sum())

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The arguments of the model.

        No attention_mask: the padding is on the right, so in a causal model no token sees it, and
        the padding has no labels. Without a mask, attention is faster, and transformers detects
        packed documents in the position_ids.
        """
        if self.position_ids is None:
            return {"input_ids": self.input_ids}
        return {"input_ids": self.input_ids, "position_ids": self.position_ids}

    def to(self, device: str | torch.device) -> Batch:
        tensors = vars(self).items()
        return Batch(**{name: tensor.to(device) for name, tensor in tensors if tensor is not None})


def collate(examples: list[Example], pad_id: int) -> Batch:
    """Pads examples to the length of the longest and stacks them."""
    shape = (len(examples), max(len(example.ids) for example in examples))  # (B, T)
    input_ids = torch.full(shape, pad_id)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX)
    for row, example in enumerate(examples):
        n = len(example.ids)
        input_ids[row, :n] = torch.tensor(example.ids)
        attention_mask[row, :n] = 1
        labels[row, :n] = torch.tensor(example.labels)
    position_ids = None
    if any(len(example.starts) > 1 for example in examples):
        position_ids = packing.position_ids(examples, shape)
    return Batch(input_ids, attention_mask, labels, position_ids)


def batches_of_step(
    examples: list[Example],
    step: int,
    batch_size: int,
    count: int,
    seed: int,
    pad_id: int,
    by_length: bool = False,
) -> list[Batch]:
    """The `count` batches of a step.

    They depend on step and seed alone, so a resumed run gets the batches of an uninterrupted run.
    by_length: within each window of 50 batches, sequences of similar length share a batch.
    """
    n = len(examples)
    per_step = batch_size * count
    positions = range(step * per_step, (step + 1) * per_step)
    places = [divmod(position, n) for position in positions]  # (epoch, index in its order)
    epochs = {epoch for epoch, _ in places}
    orders = {epoch: _shuffled_indices(n, seed, epoch) for epoch in epochs}
    if by_length:
        size = BATCHES_PER_WINDOW * batch_size
        windows = {(epoch, index // size * size) for epoch, index in places}
        for epoch, start in windows:
            window = orders[epoch][start : start + size]
            batches = _batches_by_length(window, examples, batch_size)
            random.Random(f"{seed} {epoch} {start}").shuffle(batches)
            orders[epoch][start : start + size] = chain.from_iterable(batches)

    chosen = [examples[orders[epoch][index]] for epoch, index in places]
    return [collate(chosen[i : i + batch_size], pad_id) for i in range(0, per_step, batch_size)]


def _shuffled_indices(n: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch. No sum of seed and epoch: seeds would share the orders of epochs."""
    mixed = random.Random(f"{seed} {epoch}").getrandbits(63)
    generator = torch.Generator().manual_seed(mixed)
    return torch.randperm(n, generator=generator).tolist()


def _batches_by_length(
    indices: list[int], examples: list[Example], batch_size: int
) -> list[list[int]]:
    """The indices in batches of examples of similar length, the longest first."""
    ordered = sorted(indices, key=lambda index: len(examples[index].ids), reverse=True)
    return [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]


def encode_prompt(
    tokenizer: transformers.PreTrainedTokenizerBase, prompt: str, system: str | None = None
) -> list[int]:
    """The ids of a question in the model's chat template, with the header of its answer.

    system: the system message, if not that of single questions in training.
    """
    return Template(tokenizer).encode_prompt(prompt, system)


def preview(
    task: Task, tokenizer: transformers.PreTrainedTokenizerBase, colour: bool, count: int = 3
) -> str:
    """The first sequences to train on as text, with the tokens in the loss marked."""
    marked = mark_in_loss("this", colour)
    lines = [
        f"{len(task.train)} sequences to train on, {len(task.test)} held out; "
        f"{marked} is in the loss"
    ]
    for number, example in enumerate(task.train[:count], 1):
        n_in_loss = sum(label != IGNORE_INDEX for label in example.labels[1:])
        lines.append(f"--- {number}: {len(example.ids)} tokens, {n_in_loss} in the loss")
        bounds = pairwise([*example.starts, len(example.ids)])
        documents = [example.cut(start, end) for start, end in bounds]
        texts = [show_example(document, tokenizer, colour) for document in documents]
        lines.append("\n- - -\n".join(texts))
    return "\n".join(lines)


def _toy_task(name: str, template: Template, max_seq_len: int) -> Task:
    parts = []
    for pairs in toy_tasks.TASKS[name](random.Random(0)):
        found = [rows.Row(name, rows.pair_turns(prompt, answer)) for prompt, answer in pairs]
        parts.append([example for _, [example] in _encode_rows(found, template, name)])
    longest = max(len(example.ids) for part in parts for example in part)
    if longest > max_seq_len:
        raise ValueError(
            f"the longest example of {name} has {longest} tokens, more than --max-seq-len "
            f"{max_seq_len}: raise it"
        )
    return Task("exact match", *parts)


def _read_document(path: Path) -> str:
    """The text of a file. Raises: ValueError if its first line is a row of a format in rows.py."""
    text = files.read_text(path)
    first_line, *_ = text.lstrip().split("\n", 1)
    try:
        content = io.parse_json(first_line.encode(), (dict, list))
    except ValueError:
        return text
    if not rows.parse_row(files.Record("", content)).fault:
        raise ValueError(
            f"--data {path} is read as one text, but its first line is a row: name it .jsonl"
        )
    return text


def _help_pages() -> str:
    """The pages of help("for"), help("yield") and so on."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for key in sorted(topics))


def _encode_text(text: str, template: Template, length: int) -> list[list[Example]]:
    """Plain text as sequences of `length` tokens, all in the loss; each counts as one row."""
    ids = template.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return [[piece] for piece in _cut_document(Example(ids, ids), length)]


def _cut_document(example: Example, length: int) -> list[Example]:
    """Pieces of at most `length` tokens; each but the first starts with the last token before it.

    The first token of a piece is never predicted, so this predicts every other token once.
    """
    step = max(1, length - 1)
    return [example.cut(i, i + length) for i in range(0, len(example.ids) - 1, step)]


def _encode_rows(found: list[rows.Row], template: Template, name: str) -> list[EncodedRow]:
    """Each row with its examples. Raises: ValueError that lists every row that cannot be used."""
    rendered = [_render_row(row, template) for row in found]
    texts = chain.from_iterable(texts for _, texts in rendered)
    examples = iter(template.encode_rendered(list(texts)))
    encoded = []
    faults = []
    for row, texts in rendered:
        try:
            encoded.append((row, _examples_of(row, list(islice(examples, len(texts))), template)))
        except rows.BadRow as error:
            faults.append(f"{row.where}: {error}")
    rows.raise_if_any(faults, len(found), name)
    return encoded


def _render_row(row: rows.Row, template: Template) -> tuple[rows.Row, list[Rendered]]:
    """A row with its conversation as text, or with a fault if the template refuses it."""
    if not row.turns:
        return row, []
    try:
        return row, template.render_conversation(row.turns, row.extras)
    except rows.BadRow as error:
        return replace(row, fault=str(error)), []


def _examples_of(row: rows.Row, chat: list[Example], template: Template) -> list[Example]:
    """The examples of a row. chat: those of its conversation."""
    if row.fault:
        raise rows.BadRow(row.fault)
    if row.text:
        document = template.encode_document(row.text)
        if len(document.ids) < 2:
            raise rows.BadRow("text is a single token, so there is nothing to predict")
        return [document]
    require_complete(row, chat, template.tokenizer)
    return chat


def _read_rows(name: str) -> list[rows.Row]:
    """The rows of a file or of a hub data set; prints the keys that are not read."""
    found = [rows.parse_row(record) for record in _read_records(name)]
    unread = sorted(set().union(*(row.unread for row in found)))
    if unread:
        print(f"keys of {name} that are not read: {', '.join(rows.shorten(unread))}")
    return found


def _read_records(name: str) -> list[files.Record]:
    path = Path(name)
    if path.is_dir():
        raise ValueError(f"--data {name} is a folder: give a file in it")
    suffix = files.format_of(path)
    if path.is_file():
        if suffix in files.ROW_FORMATS:
            return files.read_records(path)
        raise ValueError(
            f"--data {name} must end in {', '.join(files.FORMATS)}, or one of these and .gz: "
            "rename it to the format it has, or convert it"
        )
    if HUB_ID.fullmatch(name) and suffix not in files.FORMATS:
        return files.read_hub(name)
    raise ValueError(f"--data {name} is not a file, nor one of orders, roman, text")


def _fit(encoded: list[EncodedRow], length: int, name: str) -> list[EncodedRow]:
    """Cuts the examples of each row to at most `length` tokens; prints which rows were longer.

    The rest of a long document becomes another sequence. The rest of a long conversation is lost;
    if no token in the loss is left, the example is dropped.
    """
    fitting = []
    long_rows = []
    n_dropped = 0
    for row, examples in encoded:
        longest = max(len(example.ids) for example in examples)
        if longest > length:
            long_rows.append(f"{row.where} has {longest}")
        if row.text:
            [document] = examples
            fitting.append((row, _cut_document(document, length)))
            continue
        cut = [example.cut(0, length) for example in examples]
        kept = [example for example in cut if _has_labels(example)]
        n_dropped += len(examples) - len(kept)
        fitting.append((row, kept))
    if long_rows:
        _print_long_rows(long_rows, len(encoded), n_dropped, length, name)
    return [(row, examples) for row, examples in fitting if examples]


def _hash_of_row(pair: EncodedRow) -> bytes:
    """Orders rows by their content alone, neither by their places in a file nor by a seed."""
    row, _ = pair
    # A row without documents keeps the hash, and so the place, that it had before there were any.
    content = (row.turns, row.tools, row.text, *row.documents)
    return hashlib.sha256(repr(content).encode()).digest()


def _has_labels(example: Example) -> bool:
    return any(label != IGNORE_INDEX for label in example.labels[1:])


def _print_long_rows(
    long_rows: list[str], n_rows: int, n_dropped: int, length: int, name: str
) -> None:
    print(
        f"{len(long_rows)} of {n_rows} rows of {name} exceed --max-seq-len {length}: documents "
        "continue in another sequence,\n"
        f"conversations are cut, and {n_dropped} sequences with no answer left are dropped: "
        + ", ".join(rows.shorten(long_rows))
    )


def _print_foreign_tokens(
    found: list[rows.Row], tokenizer: transformers.PreTrainedTokenizerBase, name: str
) -> None:
    """Prints the control tokens in rows that were written for another model."""
    own = {*tokenizer.get_vocab(), *CONTROL_TOKEN.findall(str(tokenizer.chat_template))}
    foreign = [set(CONTROL_TOKEN.findall(f"{row.turns} {row.text}")) - own for row in found]
    n_rows = sum(map(bool, foreign))
    if n_rows:
        print(
            f"{n_rows} of {len(found)} rows of {name} contain control tokens of another model, "
            "which are plain text for this one: " + ", ".join(sorted(set().union(*foreign)))
        )


def _print_repeated(task: Task, name: str) -> None:
    """Prints how many held-out sequences are trained on, too."""
    held_out = Counter(tuple(example.ids) for example in task.test)
    repeated = set(held_out).intersection(tuple(example.ids) for example in task.train)
    n_repeated = sum(held_out[ids] for ids in repeated)
    if n_repeated:
        print(
            f"{n_repeated} of {len(task.test)} held-out sequences of {name} are also trained on, "
            "so the perplexity is too low: remove repeated rows"
        )


def _split(encoded: list[list[Example]]) -> Task:
    """Holds out the last tenth, to measure perplexity."""
    if len(encoded) < 2:
        raise ValueError(
            f"the data make {len(encoded)} sequences; at least 2 are needed, one to train on and "
            "one to hold out"
        )
    n_test = max(1, len(encoded) // 10)
    train = list(chain.from_iterable(encoded[:-n_test]))
    test = list(chain.from_iterable(encoded[-n_test:]))
    return Task("perplexity", train, test)
