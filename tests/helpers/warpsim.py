"""Simulates a GPU in Python: runs the source of a CUDA kernel without a compiler and without a GPU.

Each thread is a greenlet. It runs until it must wait: for its block (`syncthreads`) or, in a
shuffle, for its warp. Which warp is the fastest of its block, and in which order its lanes run, is
random. A fast warp runs as far ahead as barriers allow: so a kernel with a missing barrier reads
what is not written yet, or overwrites what is still to be read. Shared and local memory start as
garbage (NaN, as floats).

A pointer is an array with the bounds of its tensor, and an index outside is an error. `run` can
record each access to global memory. While a kernel runs, it sees the class FakeCuda as `cuda`, and
its `inlined` functions as plain Python.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from types import SimpleNamespace
from typing import NamedTuple

import greenlet
import numpy as np
import torch
from numba import types
from torch import Tensor

from cuda_kernels.device import F32, U8, U16, U32, Kernel

GARBAGE = 0xFF  # of each byte
MAX_WAITS = 20000  # of a block; after more it counts as an endless loop
NUMBERS = {U8: np.uint8, U16: np.uint16, U32: np.uint32, F32: np.float32}
THE_WARP, THE_BLOCK = "its warp", "its block"


class Thread(greenlet.greenlet):
    """One thread: its index, what it waits for, and what it gets when the wait is over."""

    waits_for = None
    brings = None
    gets = None
    shared = 0

    def __init__(
        self, function: Callable, place: tuple[int, int, int], arrays: list[np.ndarray]
    ) -> None:
        super().__init__(function)
        self.block, self.index, self.threads = place
        self.arrays = arrays
        self.gr_context = copy_context()  # where NumPy keeps its warning state

    def wait(self, for_whom: str, value: object = None) -> list:
        """Wait until all of them have reached their next wait. Returns the values of all."""
        self.waits_for, self.brings = for_whom, value
        self.parent.switch()
        return self.gets


class FakeCuda:
    """What kernels of one dimension use of numba.cuda: ours, and those of students.

    `of_all_lanes` is not of numba.cuda: device.py simulates shuffles by it.
    """

    threadIdx = property(lambda _: SimpleNamespace(x=greenlet.getcurrent().index))
    blockIdx = property(lambda _: SimpleNamespace(x=greenlet.getcurrent().block))
    blockDim = property(lambda _: SimpleNamespace(x=greenlet.getcurrent().threads))
    laneid = property(lambda _: greenlet.getcurrent().index % 32)
    shared = property(lambda self: SimpleNamespace(array=self._shared))
    local = property(lambda self: SimpleNamespace(array=garbage))

    @staticmethod
    def syncthreads() -> None:
        greenlet.getcurrent().wait(THE_BLOCK)

    @staticmethod
    def syncwarp(mask: int = 0xFFFFFFFF) -> None:
        greenlet.getcurrent().wait(THE_WARP)

    @staticmethod
    def grid(ndim: int) -> int:
        thread = greenlet.getcurrent()
        return thread.block * thread.threads + thread.index

    @staticmethod
    def of_all_lanes(value: object) -> list:
        return greenlet.getcurrent().wait(THE_WARP, value)

    @staticmethod
    def _shared(shape: int, dtype: type[np.generic], alignment: int | None = None) -> np.ndarray:
        """A thread's first array is the first array of each thread of its block, and so on."""
        thread = greenlet.getcurrent()
        thread.shared += 1
        if len(thread.arrays) < thread.shared:
            thread.arrays.append(garbage(shape, dtype))
        return thread.arrays[thread.shared - 1]


def garbage(shape: int | tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
    array = np.empty(shape, dtype)
    array.view(np.uint8)[...] = GARBAGE
    return array


def run_block(
    function: Callable, block: int, threads: int, arguments: list, draw: np.random.Generator
) -> None:
    """Run one block to its end.

    Raises: RuntimeError if threads wait for others that have ended or wait elsewhere.
    """
    arrays: list[np.ndarray] = []
    everyone = [Thread(function, (block, index, threads), arrays) for index in range(threads)]
    warps = [everyone[start : start + 32] for start in range(0, threads, 32)]
    warps = [warps[warp] for warp in draw.permutation(len(warps))]  # the fastest first
    for _ in range(MAX_WAITS):
        if all(thread.dead for thread in everyone):
            return
        ready = [warp for warp in warps if all_wait_for(warp, None, THE_WARP)]
        if ready:
            resume(ready[0], draw, arguments)
        elif all_wait_for(everyone, THE_BLOCK):
            for thread in everyone:
                thread.waits_for = None
        else:
            raise RuntimeError("threads wait at a barrier that others never reach")
    raise RuntimeError("a loop never ends")


def all_wait_for(threads: list[Thread], *for_what: str | None) -> bool:
    return all(not thread.dead and thread.waits_for in for_what for thread in threads)


def resume(warp: list[Thread], draw: np.random.Generator, arguments: list) -> None:
    """Run the lanes of a warp, one after the other, to their next wait."""
    brought = [thread.brings for thread in warp]
    for lane in draw.permutation(len(warp)):
        thread = warp[lane]
        thread.gets = brought
        has_started = bool(thread)  # as greenlet defines it
        thread.switch(*([] if has_started else arguments))


class Access(NamedTuple):
    """A thread reads, or writes, `nbytes` of global memory at once, from an address on."""

    block: int
    thread: int
    is_write: bool
    address: int
    nbytes: int


class Recorded:
    """A pointer that records what threads read and write; an index below 0 is an error, too."""

    def __init__(self, memory: np.ndarray, accesses: list[Access]) -> None:
        self.memory = memory
        self.accesses = accesses
        self.address = memory.__array_interface__["data"][0]

    def __getitem__(self, index: int | slice) -> np.generic | np.ndarray:
        self._record(index, is_write=False)
        return self.memory[index]

    def __setitem__(self, index: int | slice, value: object) -> None:
        self._record(index, is_write=True)
        self.memory[index] = value

    def _record(self, index: int | slice, is_write: bool) -> None:
        if isinstance(index, slice):
            start, stop = index.start, index.stop
        else:
            start, stop = int(index), int(index) + 1
        size = self.memory.size
        if not 0 <= start < stop <= size:
            verb = "writes" if is_write else "reads"
            raise IndexError(f"a thread {verb} index {start} of {size}")
        width = self.memory.itemsize
        place = self.address + start * width
        thread = greenlet.getcurrent()
        access = Access(thread.block, thread.index, is_write, place, (stop - start) * width)
        self.accesses.append(access)


@contextmanager
def in_python() -> Iterator[None]:
    """Modules of kernels see the simulator as `cuda`, and their inlined functions as plain ones."""
    fake = FakeCuda()
    before = []
    for module in [sys.modules[name] for name in sys.modules if name.startswith("cuda_kernels.")]:
        for name, value in list(vars(module).items()):
            if name == "cuda":
                plain = fake
            elif isinstance(value, types.Type):
                plain = NUMBERS.get(value)
            else:
                plain = getattr(value, "py_func", None)
            if plain is not None:
                before.append((module, name, value))
                setattr(module, name, plain)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def pointer(tensor: Tensor, kind: type[np.generic]) -> np.ndarray:
    """The memory of a contiguous tensor as the kernel's pointer sees it."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))  # one number may have any stride
    memory = flat.view(torch.uint8).numpy()
    width = np.dtype(kind).itemsize
    return memory[: memory.size // width * width].view(kind)


def seen_by_kernel(
    argument: Tensor | float | tuple, kind: types.Type, accesses: list[Access] | None = None
) -> object:
    """An argument as the kernel's parameter of this type."""
    if isinstance(argument, tuple):
        pairs = zip(argument, kind, strict=True)
        return tuple(seen_by_kernel(*pair, accesses) for pair in pairs)
    if isinstance(argument, Tensor):
        memory = pointer(argument, NUMBERS[kind.dtype])
        return memory if accesses is None else Recorded(memory, accesses)
    return NUMBERS[kind](argument)


def run(
    kernel: Kernel,
    blocks: int,
    arguments: tuple,
    seed: int = 0,
    accesses: list[Access] | None = None,
) -> None:
    """Run a kernel as launch_cuda.launch would start it, on tensors of the CPU.

    accesses: if given, each access to the memory of an argument is appended to it.
    """
    draw = np.random.default_rng(seed)
    pairs = zip(arguments, kernel.signature, strict=True)
    seen = [seen_by_kernel(*pair, accesses) for pair in pairs]
    with in_python(), np.errstate(all="ignore"):
        for block in draw.permutation(blocks):
            run_block(kernel.function, int(block), kernel.threads, seen, draw)
