"""Packs several short examples into one sequence, so that a batch has less padding.

Each example goes into the sequence in which it leaves the least room, the longest example first
(best fit decreasing). Examples in one sequence do not affect each other, for two reasons:

Attention: the position ids of each example count from 0. Where they jump back to 0, transformers
lets no query attend to earlier tokens. The resulting mask is block-diagonal, and causal within a
block:

    position ids    0 1 2 0 1       the token at the second 0 attends only to itself

The loss: the first label of each example is IGNORE_INDEX, so that the last token of an example does
not predict the first token of the next one.

Not every architecture derives the mask from position ids. So `check` tests the given model: no bit
of the logits after a jump may depend on the tokens before it.
"""

from __future__ import annotations  # type hints must not load the classes of transformers

from bisect import bisect_left, insort
from itertools import pairwise

import torch
import transformers
from torch import Tensor

from data.chat_template import IGNORE_INDEX, Example


def pack(examples: list[Example], length: int) -> list[Example]:
    """Packs examples into sequences of at most `length` tokens by best fit decreasing.

    Raises: ValueError for an example of more than `length` tokens.
    """
    packs: list[list[Example]] = []
    rooms: list[tuple[int, int]] = []  # (free tokens, index of the pack), ascending
    for example in sorted(examples, key=lambda example: len(example.ids), reverse=True):
        n = len(example.ids)
        if n > length:
            raise ValueError(f"an example of {n} tokens does not fit into a sequence of {length}")
        best = bisect_left(rooms, (n, 0))
        if best == len(rooms):
            rooms.append((length, len(packs)))
            packs.append([])
        room, index = rooms.pop(best)
        packs[index].append(example)
        insort(rooms, (room - n, index))
    return [_join(pack) for pack in packs]


def _join(pack: list[Example]) -> Example:
    ids: list[int] = []
    labels: list[int] = []
    starts: list[int] = []
    for example in pack:
        starts.append(len(ids))
        ids += example.ids
        labels += [IGNORE_INDEX, *example.labels[1:]]
    return Example(ids, labels, starts=tuple(starts))


def position_ids(examples: list[Example], shape: tuple[int, int]) -> Tensor:
    """The index of each token in its document, int64 (B, T); 0 for padding.

    Each padding token counts as a document of its own, which no other token attends to.
    """
    positions = torch.zeros(shape, dtype=torch.int64)
    for row, example in enumerate(examples):
        for start, end in pairwise([*example.starts, len(example.ids)]):
            positions[row, start:end] = torch.arange(end - start)
    return positions


@torch.no_grad()
def check(model: transformers.PreTrainedModel) -> None:
    """Tests whether the model keeps packed documents apart.

    Raises: ValueError if a document changes any bit of the logits of the next document.
    """
    document = torch.tensor([[4, 5, 6, 7]], device=model.device)
    positions = torch.arange(4, device=model.device).repeat(2)[None]  # (1, 8)
    logits = []
    for before in (document - 4, document.flip(1) - 4):
        ids = torch.cat([before, document], 1)  # (1, 8)
        output = model(input_ids=ids, position_ids=positions, use_cache=False)
        logits.append(output.logits[:, 4:])
    if not torch.equal(*logits):
        raise ValueError(
            f"--packing does not work with {type(model).__name__}: a document would see the one "
            "before it; omit --packing"
        )
