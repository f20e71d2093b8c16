"""A pager: tensors take turns in a small fast memory, and those whose turn it is not wait in a store.

AdamW remembers two numbers for every trainable element but touches only a few of them at a time. When a long batch
makes the activations peak, the rest should make room, or the run dies out of memory (paper, section 3).

    page        a tensor of fixed shape: the unit that moves
    budget      how many bytes of pages may be resident at once
    hit         a page is wanted and resident: hand it out
    fault       a page is wanted and is not: make room for it, then bring it in, with its value if it has one
    evict       the least recently used page leaves, and is written to the store if that holds an older value

    resident    page 2, page 1                  at most `budget` bytes, least recently used first
    store       [ page 0 | page 1 | page 2 ]    a place for each page: a mapped file, or memory that a GPU reaches (stores.py)

"Least recently used first" is CUDA's rule too. For an optimizer's step, which sweeps over all pages
in a fixed order, it is the worst: the page that leaves is the one that would come next. If the pages exceed the budget,
by however little, every page faults in every step, and all bytes move out and in. The counters show it.

Differs from the paper and bitsandbytes: there the CUDA driver moves memory unseen, whenever the device is full. Here
the budget is explicit, every move is counted, and no GPU is needed; on a GPU the driver does what it does there besides.
Error: none; a page is moved bit by bit.
"""

from collections import OrderedDict

from torch import Tensor

from kernels.page_store import Page, require, store_for


class Pager:
    """Keeps at most `budget` bytes of pages resident and the others in a store.

    Two pages of 8 bytes and room for one. The first fetch of each starts it, the last brings the first one back:

    >>> import torch
    >>> pager, one, two = Pager(8), *(Page((2,), torch.float32, torch.device("cpu")) for _ in range(2))
    >>> pager.reserve_store([one, two])
    >>> for page in (one, two, one):
    ...     moments = pager.fetch(page, write=True)
    >>> pager.counters
    {'hits': 0, 'faults': 3, 'evictions': 2, 'bytes_in': 8, 'bytes_out': 16, 'prefetches': 0}
    """

    def __init__(self, budget: float) -> None:
        self.budget, self.resident, self.peak = budget, 0, 0  # bytes: allowed, now, at most so far
        self.cache: OrderedDict[Page, Tensor] = (
            OrderedDict()
        )  # the resident pages, least recently used first
        self.counters = dict.fromkeys(
            ("hits", "faults", "evictions", "bytes_in", "bytes_out", "prefetches"), 0
        )

    def reserve_store(self, pages: list[Page]) -> None:
        """Give each page that needs a place in a store and has none one. Raises: ValueError, OSError; then none gets any."""
        largest = max((page.nbytes for page in pages), default=0)
        require(
            "the budget must hold each page",
            largest <= self.budget,
            self.budget,
            f"give {largest} or more",
        )
        fits, bounded = (
            sum(page.nbytes for page in pages) <= self.budget,
            self.budget < float("inf"),
        )
        homeless = [page for page in pages if page.store is None]
        groups = [
            [page for page in homeless if page.device == device]
            for device in {page.device: None for page in homeless}
        ]
        stores = [
            store_for(group[0].device, sum(page.nbytes for page in group), fits, bounded)
            for group in groups
        ]
        for store, group in zip(stores, groups):
            offset = 0
            for page in sorted(
                group, key=lambda page: -page.dtype.itemsize
            ):  # wide elements first: all are aligned
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
        self.cache[page] = page.store.bring_in(page) if page.store else page.empty()
        self.resident += page.nbytes
        self.peak = max(self.peak, self.resident)
        if page.stored:
            self.counters["bytes_in"] += page.nbytes

    def _evict_the_oldest(self) -> None:
        page, tensor = self.cache.popitem(last=False)
        page.store.take_out(page, tensor)
        if not page.stored:
            page.stored = True
            self.counters["bytes_out"] += page.nbytes
        self.resident -= page.nbytes
        self.counters["evictions"] += 1

    def prefetch(self, pages: list[Page]) -> None:
        """Tell the store which pages, all of one parameter, come soon."""
        if pages and pages[0].store:
            self.counters["prefetches"] += pages[0].store.announce(pages, self.cache)
