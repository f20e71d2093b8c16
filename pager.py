"""A pager: tensors take turns in a small fast memory, and those whose turn it is not wait in a file.

AdamW remembers two numbers for every trainable element but touches only a few of them at a time. When a long batch
makes the activations peak, the rest should make room, or the run dies out of memory (paper, section 3).

    page        a tensor of fixed shape: the unit that moves
    budget      how many bytes of pages may be resident at once
    hit         a page is wanted and resident: hand it out
    fault       a page is wanted and is not: make room for it, then read it from the store, if it ever went there
    evict       the least recently used page leaves, and is written to the store if that holds an older value

    resident    page 2, page 1                  at most `budget` bytes, least recently used first
    store       [ page 0 | page 1 | page 2 ]    a file without a name, mapped into memory: a place for each page

"Least recently used first" is CUDA's rule too. For an optimizer's step, which sweeps over all pages
in a fixed order, it is the worst: the page that leaves is the one that would come next. If the pages exceed the budget,
by however little, every page faults in every step, and all bytes move out and in. The counters show it.

Differs from the paper and bitsandbytes: there the CUDA driver moves memory unseen, whenever the device is full. Here
the budget is explicit, every move is counted, and no GPU is needed. Error: none; a page is copied bit by bit.
"""

import math
import mmap
import os
import tempfile
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor


def require(rule: str, holds: bool, value: object, remedy: str) -> None:
    """Raise a ValueError that names the rule, the value that broke it and the remedy."""
    if not holds:
        raise ValueError(f"{rule}, got {value!r}; {remedy}")


@dataclass(eq=False, slots=True)  # two pages are never equal, so each can be a key of the cache
class Page:
    """What a page looks like and where it waits. One that is neither resident nor stored has no value yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    store: mmap.mmap | None = None
    offset: int = 0  # of its place in the store, in bytes
    stored: bool = False  # the store holds its latest value

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def in_store(self) -> Tensor:
        """The page's place in the store, as a tensor on the host that shares the file's memory."""
        count = math.prod(self.shape)
        return torch.frombuffer(self.store, dtype=self.dtype, count=count, offset=self.offset).view(self.shape)


class Pager:
    """Keeps at most `budget` bytes of pages resident and the others in a store.

    Two pages of 8 bytes and room for one. The first fetch of each starts it, the last brings the first one back:

    >>> pager, one, two = Pager(8), *(Page((2,), torch.float32, torch.device("cpu")) for _ in range(2))
    >>> pager.reserve_store([one, two])
    >>> for page in (one, two, one):
    ...     moments = pager.fetch(page, write=True)
    >>> pager.counters
    {'hits': 0, 'faults': 3, 'evictions': 2, 'bytes_in': 8, 'bytes_out': 16, 'prefetches': 0}
    """

    def __init__(self, budget: float) -> None:
        self.budget, self.resident, self.peak = budget, 0, 0  # bytes: allowed, now, at most so far
        self.cache: OrderedDict[Page, Tensor] = OrderedDict()  # the resident pages, least recently used first
        self.counters = dict.fromkeys(("hits", "faults", "evictions", "bytes_in", "bytes_out", "prefetches"), 0)

    def reserve_store(self, pages: list[Page]) -> None:
        """Unless all can be resident at once, give each page that has none a place. Raises: ValueError, OSError."""
        largest = max((page.nbytes for page in pages), default=0)
        require("the budget must hold each page", largest <= self.budget, self.budget, f"give {largest} or more")
        homeless = [page for page in pages if page.store is None]
        if not homeless or sum(page.nbytes for page in pages) <= self.budget:
            return
        offset, store = 0, map_nameless_file(sum(page.nbytes for page in homeless))
        for page in sorted(homeless, key=lambda page: -page.dtype.itemsize):  # wide elements first: all are aligned
            page.store, page.offset = store, offset
            offset += page.nbytes

    def fetch(self, page: Page, write: bool = False) -> Tensor:
        """The resident tensor of a page, good until the next fetch. Changes to it may be lost unless `write` is set."""
        if page in self.cache:
            self.counters["hits"] += 1
            self.cache.move_to_end(page)
        else:
            self.counters["faults"] += 1
            self._bring_in(page)
        if write:
            page.stored = False
        return self.cache[page]

    def _bring_in(self, page: Page) -> None:
        while self.resident + page.nbytes > self.budget:
            self._evict_the_oldest()
        self.cache[page] = torch.empty(page.shape, dtype=page.dtype, device=page.device)
        self.resident += page.nbytes
        self.peak = max(self.peak, self.resident)
        if page.stored:
            self.cache[page].copy_(page.in_store())
            self.counters["bytes_in"] += page.nbytes

    def _evict_the_oldest(self) -> None:
        page, tensor = self.cache.popitem(last=False)
        if not page.stored:
            page.in_store().copy_(tensor)
            page.stored = True
            self.counters["bytes_out"] += page.nbytes
        self.resident -= page.nbytes
        self.counters["evictions"] += 1

    def prefetch(self, pages: list[Page]) -> None:
        """Tell the operating system, if it listens, which pages come soon, so that the disk reads while we compute."""
        # To copy them in ahead of time would evict others and, without a second thread, hide nothing.
        for page in pages:
            if page.stored and page not in self.cache and hasattr(mmap, "MADV_WILLNEED"):
                lead = page.offset % mmap.PAGESIZE  # the range must start where a page of the system starts
                page.store.madvise(mmap.MADV_WILLNEED, page.offset - lead, lead + page.nbytes)
                self.counters["prefetches"] += 1


def map_nameless_file(nbytes: int) -> mmap.mmap:
    """A new file without a name, mapped into memory: nothing is left of it however the process ends.

    It lies in TMPDIR, which should be on a disk: a tmpfs is memory too. Raises: OSError, if the disk is full.
    """
    try:
        with tempfile.TemporaryFile() as file:
            # Reserve it now: a disk that turns out full at a later write to the mapping would kill us (SIGBUS).
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, nbytes)
            else:  # macOS: zeros that were written have their blocks
                for start in range(0, nbytes, 2**20):
                    file.write(bytes(min(2**20, nbytes - start)))
                file.flush()
            return mmap.mmap(file.fileno(), nbytes)
    except OSError as error:
        fault = f"the store must hold {nbytes} bytes, got {error.strerror!r}; set TMPDIR or raise resident_bytes"
        raise OSError(error.errno, fault) from error
