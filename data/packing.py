"""Short examples share a sequence, so that less of a batch is padding, and none of them sees another.

Each is put where it leaves the least room, the longest first (best fit decreasing). Two things keep the examples of a sequence
apart. Attention: the places of each example count from 0, and where these jump transformers lets no query look back; the mask
that comes of it is block-diagonal and, within a block, causal:

    place    0 1 2 0 1       the token at the second 0 sees itself alone

The loss: the last token of an example does not predict the first of the next, whose label is left out.

Not every architecture keeps to the places, so `check` tries the model at hand: no bit after a jump may depend on what is
before it.
"""

from bisect import bisect_left, insort
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel

from data.chat_template import IGNORE, Example


def pack(examples: list[Example], length: int) -> list[Example]:
    """The same examples in sequences of at most `length` tokens, in as few as best fit decreasing makes.

    Raises: ValueError for an example that is longer by itself.
    """
    packs: list[list[Example]] = []
    rooms: list[tuple[int, int]] = []  # (tokens that still go in, number of the pack), ascending
    for example in sorted(examples, key=lambda example: len(example.ids), reverse=True):
        n = len(example.ids)
        if n > length:
            raise ValueError(f"an example of {n} tokens goes into no sequence of {length}")
        place = bisect_left(rooms, (n, 0))
        if place == len(rooms):
            rooms.append((length, len(packs)))
            packs.append([])
        room, number = rooms.pop(place)
        packs[number].append(example)
        insort(rooms, (room - n, number))
    return [_join(pack) for pack in packs]


def _join(pack: list[Example]) -> Example:
    ids, labels, starts = [], [], []
    for example in pack:
        starts.append(len(ids))
        ids += example.ids
        labels += [IGNORE, *example.labels[1:]]
    return Example(ids, labels, starts=tuple(starts))


def positions(examples: list[Example], shape: tuple[int, int]) -> Tensor:
    """The place of each token in its document, int64 (B, T). Padding stands at 0: each of it a document that nobody reads."""
    places = torch.zeros(shape, dtype=torch.int64)
    for row, example in enumerate(examples):
        for start, end in pairwise([*example.starts, len(example.ids)]):
            places[row, start:end] = torch.arange(end - start)
    return places


@torch.no_grad()
def check(model: PreTrainedModel) -> None:
    """Raises: ValueError if what stands before a document in its sequence changes a single bit of its logits."""
    second = torch.tensor([[4, 5, 6, 7]], device=model.device)
    places = torch.arange(4, device=model.device).repeat(2)[None]  # (1, 8)
    logits = [
        model(input_ids=torch.cat([first, second], 1), position_ids=places, use_cache=False).logits[
            :, 4:
        ]
        for first in (second - 4, second.flip(1) - 4)
    ]
    if not torch.equal(*logits):
        name = type(model).__name__
        raise ValueError(
            f"--packing does not suit {name}: a document would see the one before it; leave --packing out"
        )
