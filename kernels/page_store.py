"""Where the pages of an optimizer wait while they are not resident: in one of three stores, by what their device can do.

    File       any device but a GPU     a file without a name, mapped into memory; pages are copied
    Managed    a GPU that shares pages  unified memory: pages keep their address, and the driver moves what they hold
    Pinned     any other GPU            host memory that the GPU can read by itself; pages are copied

A store answers three calls: bring a page in, take it out, and listen to which pages come soon. paged_optim.py decides when.

On unified memory a page is one tensor all its life. To bring it in is to send its range to the device before the next
kernel, to take it out is to send it to the host after the last one. Both only advise the driver, which is free to move pages
at any time, and on a full device does. So a page that counts as resident may be on the host, and that is the point: the
paper's optimizer makes room for activations that no budget foresaw. The counters of the pager say what was asked for.

To hide a move behind arithmetic would gain little: the link to the host carries some tens of GB/s, device memory thousands,
so that an update takes a few hundredths of the time that its page takes to arrive.
"""

import math
import mmap
import os
import tempfile
from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import Tensor

from cuda_kernels import unified_memory as managed


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
    store: "File | Pinned | Managed | None" = None
    offset: int = 0  # of its place in the store, in bytes
    stored: bool = False  # the store holds its latest value

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def in_store(self) -> Tensor:
        """The page's place in the store, as a tensor that shares the store's memory."""
        return (
            self.store.bytes[self.offset : self.offset + self.nbytes]
            .view(self.dtype)
            .view(self.shape)
        )

    def empty(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


def store_for(
    device: torch.device, nbytes: int, fits: bool, bounded: bool
) -> "File | Pinned | Managed | None":
    """A new store; None where none is needed, because all pages can stay in ordinary tensors.

    `fits`: all pages can be resident at once. `bounded`: the user has said how many may be, so that more may exist.
    Raises: ValueError for more unified memory than the device has free, unless bounded; OSError for a full disk.
    """
    driver = managed.driver_of(device)
    if driver is not None:
        free = driver.free_bytes()
        require(
            f"the state must fit what {device} has free, {free} bytes",
            bounded or nbytes <= free,
            nbytes,
            "give resident_bytes, and the rest waits on the host",
        )
        return Managed(managed.Memory(driver, nbytes))
    if fits:
        return None
    return Pinned(nbytes, device) if device.type == "cuda" else File(nbytes)


class Copying:
    """What File and Pinned have in common: pages are copied to and from `bytes`, a flat uint8 tensor on the host."""

    bytes: Tensor
    non_blocking = False  # whether the host may go on before a copy is done

    def bring_in(self, page: Page) -> Tensor:
        """A tensor on the page's device, with the page's value if it has one."""
        tensor = page.empty()
        return (
            tensor.copy_(page.in_store(), non_blocking=self.non_blocking) if page.stored else tensor
        )

    def take_out(self, page: Page, tensor: Tensor) -> None:
        """Keep the value that the page has in this tensor."""
        if not page.stored:
            page.in_store().copy_(tensor, non_blocking=self.non_blocking)


class File(Copying):
    def __init__(self, nbytes: int) -> None:
        self.file = map_nameless_file(nbytes)
        self.bytes = torch.frombuffer(self.file, dtype=torch.uint8)

    def announce(self, pages: list[Page], resident: Container[Page]) -> int:
        """Tell the operating system, if it listens, what to read while we compute. -> of how many pages it was told"""
        # To copy them in ahead of time would evict others and, without a second thread, hide nothing.
        waiting = [
            page
            for page in pages
            if page.stored and page not in resident and hasattr(mmap, "MADV_WILLNEED")
        ]
        for page in waiting:
            lead = (
                page.offset % mmap.PAGESIZE
            )  # the range must start where a page of the system starts
            self.file.madvise(mmap.MADV_WILLNEED, page.offset - lead, lead + page.nbytes)
        return len(waiting)


class Pinned(Copying):
    """Copies take their turn on the stream of the kernels, so each comes after what it depends on, and the host goes on."""

    non_blocking = True

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.bytes = torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")

    def announce(self, pages: list[Page], resident: Container[Page]) -> int:
        return 0  # nobody listens


class Managed:
    def __init__(self, memory: managed.Memory) -> None:
        self.memory, self.bytes = memory, memory.tensor()

    def bring_in(self, page: Page) -> Tensor:
        self.memory.to_device(page.offset, page.nbytes)
        return page.in_store()

    def take_out(self, page: Page, tensor: Tensor) -> None:
        self.memory.to_host(page.offset, page.nbytes)

    def announce(self, pages: list[Page], resident: Container[Page]) -> int:
        """Ask back a parameter's pages, if all of them are resident as we count: the driver may have moved them."""
        if not all(page in resident for page in pages):
            return 0  # within a budget, others have to leave first
        self.memory.to_device(
            pages[0].offset, sum(page.nbytes for page in pages), ahead=True
        )  # they lie side by side
        return len(pages)


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
