"""Stores the optimizer's pages that are not resident. The kind of store depends on the device:

    File       any device but a GPU      a mapped file without a name; pages are copied
    Managed    a GPU that shares pages   unified memory: pages stay, the driver moves bytes
    Pinned     any other GPU             host memory that the GPU reads directly; pages are copied

The pager (paged_optim.py) decides when a page moves, and calls the store's load, evict or prefetch.

In unified memory a page is always the same tensor. To load it, the store sends its range to the
device before the next kernel. To evict it, the store sends its range to the host after the last
kernel. Both only advise the driver, which may move pages at any time and does so when the device is
full. So a resident page may be on the host. This is the purpose of the paper's optimizer: it makes
room for activations that the budget did not allow for. The pager's counters count the requests.

Overlapping the moves with arithmetic would gain little. The link to the host carries some tens of
GB/s and device memory thousands, so an update takes only a few percent of the time of its transfer.
"""

import math
import mmap
import os
import tempfile
from collections.abc import Container
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

from cuda_kernels import unified_memory


@dataclass(eq=False, slots=True)  # compared by identity, so that it can be a key of the cache
class Page:
    """The layout and the place of a page. A page neither resident nor saved has no value yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    store: "File | Pinned | Managed | None" = None
    offset: int = 0  # bytes from the start of the store
    saved: bool = False  # the store has its latest value

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def in_store(self) -> Tensor:
        """The page's place in the store, as a view of the store's memory."""
        place = self.store.bytes[self.offset : self.offset + self.nbytes]
        return place.view(self.dtype).view(self.shape)

    def empty(self) -> Tensor:
        """A new uninitialized tensor on the page's device."""
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


def new_store(
    device: torch.device, nbytes: int, fits: bool, bounded: bool
) -> "File | Pinned | Managed | None":
    """Make a store of nbytes; None if all pages can stay in ordinary tensors.

    fits: all pages can be resident at once.
    bounded: the user has set a budget, so the pages may exceed the memory of the device.
    Raises: ValueError if unified memory would exceed the free memory of the device, unless bounded;
    OSError if the disk is full.
    """
    driver = unified_memory.driver_of(device)
    if driver is not None:
        free = driver.free_bytes()
        if nbytes > free and not bounded:
            raise ValueError(
                f"the state must fit what {device} has free, {free} bytes, got {nbytes}; "
                "give resident_bytes to keep the rest on the host"
            )
        return Managed(unified_memory.Memory(driver, nbytes))
    if fits:
        return None
    return Pinned(nbytes, device) if device.type == "cuda" else File(nbytes)


def assign_places(pages: list[Page], store: "File | Pinned | Managed | None") -> None:
    """Place pages one after the other in an empty store."""
    offset = 0
    # Pages of wide elements come first, so that all pages are aligned.
    for page in sorted(pages, key=lambda page: page.dtype.itemsize, reverse=True):
        page.store = store
        page.offset = offset
        offset += page.nbytes


class Copying:
    """A store that copies pages to and from `bytes`, a flat uint8 tensor on the host."""

    bytes: Tensor
    non_blocking = False  # whether the host may continue before a copy is done

    def load(self, page: Page) -> Tensor:
        """A tensor on the page's device, with the page's value if it has one."""
        tensor = page.empty()
        if page.saved:
            tensor.copy_(page.in_store(), non_blocking=self.non_blocking)
        return tensor

    def evict(self, page: Page, tensor: Tensor) -> None:
        """Save the page's value, which is in `tensor`."""
        if not page.saved:
            page.in_store().copy_(tensor, non_blocking=self.non_blocking)


class File(Copying):
    def __init__(self, nbytes: int) -> None:
        self.file = map_unnamed_file(nbytes)
        self.bytes = torch.frombuffer(self.file, dtype=torch.uint8)

    def prefetch(self, pages: list[Page], resident: Container[Page]) -> int:
        """Advise the operating system which pages to read ahead. Returns the number of pages."""
        # Loading them early would evict other pages and, without a second thread, save no time.
        can_advise = hasattr(mmap, "MADV_WILLNEED")
        absent = [page for page in pages if page.saved and page not in resident]
        waiting = absent if can_advise else []
        for page in waiting:
            lead = page.offset % mmap.PAGESIZE  # madvise starts at a page boundary
            self.file.madvise(mmap.MADV_WILLNEED, page.offset - lead, lead + page.nbytes)
        return len(waiting)


class Pinned(Copying):
    """Copies run on the stream of the kernels, each after the work it depends on."""

    non_blocking = True

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.bytes = torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")

    def prefetch(self, pages: list[Page], resident: Container[Page]) -> int:
        """Do nothing: pinned memory needs no prefetch. Returns 0."""
        return 0


class Managed:
    """A store in unified memory: `bytes` is a flat uint8 tensor on the device."""

    def __init__(self, memory: unified_memory.Memory) -> None:
        self.memory = memory
        self.bytes = memory.tensor()

    def load(self, page: Page) -> Tensor:
        """The page itself, sent to the device before the next kernel."""
        self.memory.to_device(page.offset, page.nbytes)
        return page.in_store()

    def evict(self, page: Page, tensor: Tensor) -> None:
        """Send the page to the host after the last kernel."""
        self.memory.to_host(page.offset, page.nbytes)

    def prefetch(self, pages: list[Page], resident: Container[Page]) -> int:
        """Send a parameter's pages to the device again, because the driver may have moved them.

        If not all are resident, nothing is sent: within the budget, other pages have to be evicted
        first. Returns the number of pages.
        """
        if not all(page in resident for page in pages):
            return 0
        nbytes = sum(page.nbytes for page in pages)  # they are adjacent
        self.memory.to_device(pages[0].offset, nbytes, ahead=True)
        return len(pages)


def map_unnamed_file(nbytes: int) -> mmap.mmap:
    """Map a new file without a name into memory; it disappears however the process ends.

    It is in TMPDIR, which should be on a disk: a tmpfs is in memory.
    Raises: OSError if the disk is full.
    """
    try:
        with tempfile.TemporaryFile() as file:
            _reserve(file, nbytes)
            return mmap.mmap(file.fileno(), nbytes)
    except OSError as error:
        raise OSError(
            error.errno,
            f"the store must hold {nbytes} bytes, got {error.strerror!r}; "
            "set TMPDIR or raise resident_bytes",
        ) from error


def _reserve(file: BinaryIO, nbytes: int) -> None:
    """Reserve the disk space: on a full disk, a write to the mapping kills the process (SIGBUS)."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, nbytes)
    else:  # macOS: writing zeros reserves the space
        for start in range(0, nbytes, 2**20):
            file.write(bytes(min(2**20, nbytes - start)))
        file.flush()
