"""A GPU of Python: runs the source of a CUDA kernel without Numba's compiler and without a GPU, to find what is wrong in it.

Each thread is a greenlet. It runs until it must wait: for its block (`syncthreads`) or, in a shuffle, for its warp. Which warp
is the fastest of its block, and in which order its lanes run, is drawn. A fast warp runs as far ahead as barriers let it: so a
kernel that needs one it does not have reads what nobody has written yet, or overwrites what is still to be read. Shared and
local memory start out as garbage (NaN, as floats).

A pointer is an array with the bounds of its tensor, and an index outside is an error. What a kernel sees as `cuda` is the class
below, for as long as it runs, and its `inlined` functions are the Python that they were made of.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from types import SimpleNamespace

import greenlet
import numpy as np
import torch
from numba import types
from torch import Tensor

from cuda_kernels.device import F32, U8, U16, U32, Kernel

GARBAGE = 0xFF  # of each byte
PATIENCE = 20000  # waits of a block, after which it is taken to hang
NUMBERS = {U8: np.uint8, U16: np.uint16, U32: np.uint32, F32: np.float32}
THE_WARP, THE_BLOCK = "its warp", "its block"


class Thread(greenlet.greenlet):
    """One thread: its place, what it waits for, and what it gets when the wait is over."""

    waits_for, brings, gets, shared = None, None, None, 0

    def __init__(
        self, function: Callable, block: int, index: int, arrays: list[np.ndarray]
    ) -> None:
        super().__init__(function)
        self.block, self.index, self.arrays = block, index, arrays
        self.gr_context = copy_context()  # where NumPy keeps what it warns of

    def wait(self, for_whom: str, value: object = None) -> list:
        """Stop here until all of them have come to their next wait, too; what they all brought."""
        self.waits_for, self.brings = for_whom, value
        self.parent.switch()
        return self.gets


class FakeCuda:
    """What kernels use of numba.cuda, and `of_all_lanes`, of which device.py makes all that a warp does together."""

    threadIdx = property(lambda _: SimpleNamespace(x=greenlet.getcurrent().index))
    blockIdx = property(lambda _: SimpleNamespace(x=greenlet.getcurrent().block))
    shared = property(lambda self: SimpleNamespace(array=self._shared))
    local = property(lambda self: SimpleNamespace(array=garbage))

    @staticmethod
    def syncthreads() -> None:
        greenlet.getcurrent().wait(THE_BLOCK)

    @staticmethod
    def of_all_lanes(value: object) -> list:
        return greenlet.getcurrent().wait(THE_WARP, value)

    @staticmethod
    def _shared(shape: int, kind: type[np.generic], alignment: int | None = None) -> np.ndarray:
        """The first that a thread asks for is the first that each of its block has asked for, and so on."""
        thread = greenlet.getcurrent()
        thread.shared += 1
        if len(thread.arrays) < thread.shared:
            thread.arrays.append(garbage(shape, kind))
        return thread.arrays[thread.shared - 1]


def garbage(shape: int | tuple[int, ...], kind: type[np.generic]) -> np.ndarray:
    array = np.empty(shape, kind)
    array.view(np.uint8)[...] = GARBAGE
    return array


def run_block(
    function: Callable, block: int, threads: int, arguments: list, draw: np.random.Generator
) -> None:
    """Run one block to its end. Raises: RuntimeError if threads wait for others that are gone or wait elsewhere."""
    arrays: list[np.ndarray] = []
    everyone = [Thread(function, block, index, arrays) for index in range(threads)]
    warps = [everyone[start : start + 32] for start in range(0, threads, 32)]
    warps = [
        warps[warp] for warp in draw.permutation(len(warps))
    ]  # the fastest first: it runs as far ahead as it can
    for _ in range(PATIENCE):
        if all(thread.dead for thread in everyone):
            return
        ready = [
            warp
            for warp in warps
            if all(not thread.dead and thread.waits_for in (None, THE_WARP) for thread in warp)
        ]
        if ready:
            resume(ready[0], draw, arguments)
        elif all(not thread.dead and thread.waits_for == THE_BLOCK for thread in everyone):
            for thread in everyone:
                thread.waits_for = None
        else:
            raise RuntimeError("threads wait at a barrier that others never reach")
    raise RuntimeError("a loop never ends")


def resume(warp: list[Thread], draw: np.random.Generator, arguments: list) -> None:
    """Let the lanes of a warp start, or run on, to their next wait, one after the other."""
    brought = [thread.brings for thread in warp]
    for lane in draw.permutation(len(warp)):
        warp[lane].gets = brought
        warp[lane].switch(
            *([] if warp[lane] else arguments)
        )  # a thread is true once it has started


@contextmanager
def in_python() -> Iterator[None]:
    """The files of kernels see the simulator as `cuda`, and their inlined functions as plain ones."""
    fake, before = FakeCuda(), []
    kernels = [
        name
        for name in sys.modules
        if name.startswith("cuda_kernels.") and name != "kernels.launch_cuda"
    ]
    for module in [sys.modules[name] for name in kernels]:
        for name, value in list(vars(module).items()):
            plain = (
                NUMBERS.get(value)
                if isinstance(value, types.Type)
                else getattr(value, "py_func", None)
            )
            plain = fake if name == "cuda" else plain
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
    flat = tensor.detach().as_strided(
        (tensor.numel(),), (1,)
    )  # the stride of a single number may be anything
    memory, width = flat.view(torch.uint8).numpy(), np.dtype(kind).itemsize
    return memory[: memory.size // width * width].view(kind)


def run(kernel: Kernel, blocks: int, arguments: tuple, seed: int = 0) -> None:
    """Run a kernel as launch.launch would start it, on tensors of the CPU."""
    draw = np.random.default_rng(seed)
    seen = [
        pointer(argument, NUMBERS[kind.dtype])
        if isinstance(argument, Tensor)
        else NUMBERS[kind](argument)
        for argument, kind in zip(arguments, kernel.signature, strict=True)
    ]
    with in_python(), np.errstate(all="ignore"):
        for block in draw.permutation(blocks):
            run_block(kernel.function, int(block), kernel.threads, seen, draw)
