"""Between torch and the kernels: tensors go in and come out, their memory is what the kernels see.

The product with a weight that stays in 4 bits has two ways, and on neither is there ever a dense weight. fused.py multiplies
while it decodes, in float32: the faster way for few rows, and for any number of float32 rows. Rows of 16 bits torch multiplies
faster, by instructions that it has and we have not, so many of those go over W window by window. A window is as much of W as
fits the cache. It is decoded into a scratch buffer, multiplied, and overwritten by the next one:

    y = x W^T     window: some rows of W, all columns       gives these columns of y, whole sums
    y = g W       window: all rows of W, some columns       gives these columns of y, whole sums

Windows of rows would do for both, but then y = g W would be added up, and rounded, window by window.

Traffic: the packed bytes are read once from memory; the window is written and read in the cache; x is read once for each
window, from the cache too where its TOKENS rows fit. Scratch: WINDOW elements.
"""

import ctypes
import math
from collections.abc import Callable

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu import adamw as optimizer
from kernels.cpu import decode, fused
from kernels.cpu import quantize as blockwise
from kernels.packed_weight import Stored, largest

WINDOW = 2**20  # elements: 2 MB in 16 bits, what the L2 caches of two cores hold
TOKENS = (
    512  # rows of x that are multiplied by a window at once: more would push it out of the cache
)
FEW = 16  # rows of x up to which the fused kernel is faster, if torch multiplies 16-bit numbers; in float32 it always is
AT_ONCE = 32  # rows of x that the fused kernels take: more would not stay in the cache
PIECE = 2**20  # elements of a weight that is not float32 are converted to it so many at a time
KINDS = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.uint16,
    torch.float16: torch.int16,
}  # as the kernels see them
FUSES = torch.backends.cpu.get_cpu_capability() in (
    "AVX2",
    "AVX512",
)  # torch multiplies and adds there as adamw.py does
DECODED = [
    dtype for dtype in KINDS if dtype != torch.float16 or decode.FLOAT16
]  # what the kernels can decode to


def follow_torch() -> None:
    """Let the kernels have as many threads as torch has."""
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)  # which Numba's threads, when they start, change


def quantize(flat: Tensor, block_size: int, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """packed and absmax, as nf4.Quantized has them, of (n,) numbers of any float dtype; the codebook ascends.

    A constant that is not finite says that its block is not.
    """
    n, wide, shift = flat.numel(), codebook.numel() > 16, block_size.bit_length() - 1
    midpoints = F.pad(
        (codebook[1:] + codebook[:-1]) / 2,
        (0, (257 if wide else 17) - codebook.numel()),
        value=math.inf,
    ).numpy()
    packed, absmax = (
        torch.empty(n if wide else (n + 1) // 2, 1, dtype=torch.uint8),
        torch.empty(-(-n // block_size)),
    )
    step = n if flat.dtype == torch.float32 else max(PIECE, block_size)
    for start in range(0, n, step):
        numbers = flat[start : start + step].to(torch.float32).numpy()
        scales = absmax[start >> shift : -(-(start + step) >> shift)].numpy()
        pieces, bits = (numbers, numbers.view(np.uint32), midpoints, shift), scales.view(np.uint32)
        if wide:
            blockwise.quantize_wide(
                *pieces, packed[start : start + step].numpy().reshape(-1), scales, bits
            )
        else:
            pairs = packed[start // 2 : (start + step + 1) // 2].numpy().reshape(-1)
            blockwise.quantize(*pieces, pairs, scales, bits, blockwise.AVX512)
    return packed, absmax


def dequantize(s: Stored, out: Tensor) -> bool:
    """Decode a weight whose pieces fit into contiguous `out`, of its shape; False if there is no kernel for it."""
    if out.dtype not in DECODED:
        return False
    weight, numbers, run = (
        weight_of(s),
        numbers_of(out),
        4096,
    )  # elements that count as a row of the window
    rows, rest = divmod(numbers.size, run)
    decode.decode(weight, 0, run, rows, run, numbers)
    decode.decode(weight, rows * run, 0, 1, rest, numbers[rows * run :])
    return True


def adamw(param: Tensor, grad: Tensor, scalars: tuple) -> Callable[[int, Tensor], None] | None:
    """What updates the flat parameter from element `start` on, as far as `moments` go; scalars as adamw.py takes them."""
    if not FUSES:
        return None
    flat, flat_grad = param.numpy(), grad.numpy()  # slices of these cost less than those of tensors

    def update(start: int, moments: Tensor) -> None:
        run = slice(start, start + moments.shape[1])
        optimizer.update(flat[run], flat_grad[run], moments.numpy(), *scalars)

    return update


def weight_of(s: Stored) -> tuple:
    """A weight as decode.py takes it."""
    levels, double = (
        F.pad(s.codebook, (0, 16 - s.codebook.numel())).numpy(),
        s.nested_absmax is not None,
    )
    second = (
        (s.nested_absmax, s.absmax, s.nested_codebook, s.nested_offset) if double else (s.absmax,)
    )
    absmax, *rest = map(memory_of, second)
    codes, levels8, offset = rest or (absmax[:0].view(np.uint8), levels, np.zeros(1, np.float32))
    return (
        memory_of(s.packed),
        levels,
        absmax,
        codes,
        levels8,
        offset[0],
        np.float32(largest(s.dtype)),
        s.block_size.bit_length() - 1,
        s.nested_block_size.bit_length() - 1,
        decode.AVX512,
    )


def memory_of(tensor: Tensor) -> np.ndarray:
    """The bytes, or float32 numbers, of a contiguous tensor, flat. It must outlive them.

    Unlike tensor.numpy(), this does not forbid torch for ever to resize the storage, as FSDP2 does between uses of a weight.
    """
    memory = (ctypes.c_uint8 * tensor.nbytes).from_address(tensor.data_ptr())
    return np.frombuffer(memory, np.uint8 if tensor.dtype == torch.uint8 else np.float32)


def numbers_of(tensor: Tensor) -> np.ndarray:
    """The memory of a contiguous tensor, flat, as the kernels take it."""
    return tensor.detach().view(KINDS[tensor.dtype]).numpy().reshape(-1)


def matmul(x: Tensor, s: Stored, transposed: bool, bias: Tensor | None) -> Tensor | None:
    """x W^T + bias or, not transposed, x W, in x's dtype, for x (tokens, ...) and a weight whose pieces fit; None if there
    is no kernel for it."""
    if x.dtype not in DECODED:
        return None
    (height, width), tokens, weight = s.shape, len(x), weight_of(s)
    if (tokens <= FEW or x.dtype == torch.float32) and fused.takes(weight, height, width):
        return few_by_few(x, weight, s.shape, transposed, bias)
    full, total = (width, height) if transposed else (height, width)
    step = min(max(WINDOW // full // 64, 1) * 64, total)  # a multiple of the usual block size
    y, scratch = x.new_empty(tokens, total), x.new_empty(step * full)
    for start in range(0, total, step):
        size = min(step, total - start)
        rows, cols = (size, width) if transposed else (height, size)
        window = scratch[: rows * cols]
        decode.decode(
            weight, start * width if transposed else start, width, rows, cols, numbers_of(window)
        )
        window = window.view(rows, cols).T if transposed else window.view(rows, cols)
        for token in range(0, tokens, TOKENS):
            few, part = x[token : token + TOKENS], y[token : token + TOKENS, start : start + size]
            if bias is None:
                torch.mm(few, window, out=part)
            else:
                torch.addmm(bias[start : start + size], few, window, out=part)
    return y


def few_by_few(
    x: Tensor, weight: tuple, shape: list[int], transposed: bool, bias: Tensor | None
) -> Tensor:
    """The same by fused.py: summed in float32, from elements of W that are not even rounded to 16 bits."""
    (height, width), at_once = shape, 1 if len(x) == 1 else 4
    y, groups = (
        torch.empty(len(x), height if transposed else width),
        -(-min(len(x), AT_ONCE) // at_once),
    )
    ordered = torch.empty(
        groups, width // 32, at_once, 2, 16
    )  # some rows of x or, not transposed, of y
    in_order = ordered.permute(0, 2, 1, 4, 3)  # (groups, at_once, width / 32, 16, 2): rows again
    columns = None if transposed else torch.empty(groups, height, at_once)  # of the same rows of x
    for token in range(0, len(x), AT_ONCE):
        few, part = x[token : token + AT_ONCE].detach().split(at_once), y[token : token + AT_ONCE]
        if transposed:
            for rows, each in zip(in_order, few):
                rows[: len(each)].copy_(each.reshape(-1, *rows.shape[1:]))
            fused.multiply(weight, width, numbers_of(ordered), at_once, part.numpy())
        else:
            for rows, each in zip(columns.transpose(1, 2), few):
                rows[: len(each)].copy_(each)
            sums, parts = numbers_of(ordered.zero_()), torch.get_num_threads()
            fused.multiply_back(weight, width, numbers_of(columns), at_once, sums, parts)
            for rows, each in zip(in_order, part.split(at_once)):
                each.view(-1, *rows.shape[1:]).copy_(rows[: len(each)])
    if bias is not None:
        y.add_(bias)
    return y.to(x.dtype)
