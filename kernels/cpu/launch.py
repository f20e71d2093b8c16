"""Calls the CPU kernels on tensors, whose memory they see as NumPy arrays.

Threads of Python take turns: Numba's own thread pool ("workqueue") ends the process if two use it
at once. A forked process uses the reference (dispatch.py), as GNU OpenMP would end it.

The product with a 4-bit weight is computed in one of two ways; neither stores a dense W. fused.py
multiplies while it decodes, in float32. This is faster for few rows of x, and for any number of
float32 rows. For many 16-bit rows torch is faster, with instructions that these kernels do not use.
So W is then multiplied window by window. A window is as much of W as fits in the cache. It is
decoded into a scratch buffer, multiplied by torch, and overwritten by the next window:

    y = x W^T     window: some rows of W, all columns       gives these columns of y, complete sums
    y = g W       window: all rows of W, some columns       gives these columns of y, complete sums

Windows of rows would work for both products, but y = g W would then be summed, and rounded, once
per window.

Traffic: the packed bytes are read once from memory. The window is written to and read from the
cache. x is read once per window, also from the cache if TOKENS rows of it fit there.
Scratch: WINDOW elements.
"""

import ctypes
import math
import threading
from collections.abc import Callable
from functools import wraps

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu import adamw as optimizer
from kernels.cpu import decode, fused
from kernels.cpu import quantize as blockwise
from kernels.packed_weight import PackedWeight, largest_absmax

WINDOW = 2**20  # elements: 2 MB in 16 bits, which fits the L2 caches of two cores
TOKENS = 512  # rows of x that a window multiplies at once: more would push it out of the cache
FEW = 16  # rows of 16-bit x up to which the fused kernel is faster; in float32 it always is
AT_ONCE = 32  # rows of x that a call of a fused kernel takes: more would not stay in the cache
PIECE = 2**20  # elements that are converted to float32 at once
# The dtype with which NumPy and the kernels see the memory of a tensor
KINDS = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.uint16,
    torch.float16: torch.int16,
}
# Whether torch computes a product and a sum with one rounding, as adamw.py does
FUSES = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
LOCK = threading.Lock()
DECODED = [dtype for dtype in KINDS if dtype != torch.float16 or decode.FLOAT16]


def one_at_a_time(function: Callable) -> Callable:
    """Makes the threads of Python wait for each other in the functions that start kernels."""

    @wraps(function)
    def locked(*arguments: object) -> object:
        with LOCK:
            return function(*arguments)

    return locked


def follow_torch() -> None:
    """Give the kernels as many threads as torch has."""
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    if torch.get_num_threads() != threads:  # Numba changes torch's number when its threads start
        torch.set_num_threads(threads)


@one_at_a_time
def quantize(flat: Tensor, block_size: int, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """packed and absmax, as in nf4.Quantized, of (n,) numbers of any float dtype.

    The codebook ascends. If a number is not finite, the absmax of its block is not finite either.
    """
    n = flat.numel()
    is_wide = codebook.numel() > 16  # one code per byte, not two
    shift = block_size.bit_length() - 1
    midpoints = (codebook[1:] + codebook[:-1]) / 2
    padding = (256 if is_wide else 16) - midpoints.numel()
    midpoints = F.pad(midpoints, (0, padding), value=math.inf).numpy()
    packed = torch.empty(n if is_wide else (n + 1) // 2, 1, dtype=torch.uint8)
    absmax = torch.empty(-(-n // block_size))
    step = n if flat.dtype == torch.float32 else max(PIECE, block_size)
    for start in range(0, n, step):
        stop = min(start + step, n)
        numbers = flat[start:stop].to(torch.float32).numpy()
        scales = absmax[start >> shift : -(-stop >> shift)].numpy()
        pieces = (numbers, numbers.view(np.uint32), midpoints, shift)
        bits = scales.view(np.uint32)
        if is_wide:
            codes = packed[start:stop].numpy().reshape(-1)
            blockwise.quantize_wide(*pieces, codes, scales, bits)
        else:
            pairs = packed[start // 2 : (stop + 1) // 2].numpy().reshape(-1)
            blockwise.quantize(*pieces, pairs, scales, bits, blockwise.AVX512)
    return packed, absmax


@one_at_a_time
def dequantize(w: PackedWeight, out: Tensor) -> bool:
    """Decode a valid weight into contiguous `out`, of its shape; False if there is no kernel."""
    if out.dtype not in DECODED:
        return False
    weight = kernel_weight(w)
    numbers = memory_of_floats(out)
    run = 4096  # elements; the weight is decoded as rows of this length
    rows, rest = divmod(numbers.size, run)
    decode.decode(weight, 0, run, rows, run, numbers)
    decode.decode(weight, rows * run, 0, 1, rest, numbers[rows * run :])
    return True


def adamw(param: Tensor, grad: Tensor, scalars: tuple) -> Callable[[int, Tensor], None] | None:
    """Returns update(start, moments) like dispatch.adamw; scalars in the order of adamw.update.

    None if torch itself rounds differently on this processor.
    """
    if not FUSES:
        return None
    flat_param = param.numpy()  # slices of arrays cost less than slices of tensors
    flat_grad = grad.numpy()

    @one_at_a_time
    def update(start: int, moments: Tensor) -> None:
        run = slice(start, start + moments.shape[1])
        optimizer.update(flat_param[run], flat_grad[run], moments.numpy(), *scalars)

    return update


def kernel_weight(w: PackedWeight) -> tuple:
    """A valid weight as the tuple that decode.py describes."""
    levels = F.pad(w.codebook, (0, 16 - w.codebook.numel())).numpy()
    if w.nested_absmax is None:
        absmax = memory_of(w.absmax)
        codes = np.empty(0, np.uint8)
        levels8 = levels
        offset = np.float32(0)
    else:
        absmax = memory_of(w.nested_absmax)
        codes = memory_of(w.absmax)
        levels8 = memory_of(w.nested_codebook)
        offset = memory_of(w.nested_offset)[0]
    largest = np.float32(largest_absmax(w.dtype))
    shift = w.block_size.bit_length() - 1
    shift8 = w.nested_block_size.bit_length() - 1
    constants = (absmax, codes, levels8, offset, largest)
    return (memory_of(w.packed), levels, *constants, shift, shift8, decode.AVX512)


def memory_of(tensor: Tensor) -> np.ndarray:
    """The bytes or float32 numbers of a contiguous tensor, flat; the tensor must outlive the array.

    tensor.numpy() is not used, because torch can never resize the storage after it, and FSDP2
    resizes the storage between uses of a weight.
    """
    memory = (ctypes.c_uint8 * tensor.nbytes).from_address(tensor.data_ptr())
    return np.frombuffer(memory, np.uint8 if tensor.dtype == torch.uint8 else np.float32)


def memory_of_floats(tensor: Tensor) -> np.ndarray:
    """The memory of a contiguous tensor, flat, with the dtype of KINDS."""
    return tensor.detach().view(KINDS[tensor.dtype]).numpy().reshape(-1)


@one_at_a_time
def matmul(x: Tensor, w: PackedWeight, transposed: bool, bias: Tensor | None) -> Tensor | None:
    """x W^T + bias or, not transposed, x W, in x's dtype, for x (tokens, ...) and a valid weight.

    None if there is no kernel.
    """
    if x.dtype not in DECODED:
        return None
    weight = kernel_weight(w)
    is_fast_fused = len(x) <= FEW or x.dtype == torch.float32
    fits = is_fast_fused and fused.takes(weight, *w.shape)
    multiply = fused_matmul if fits else windowed_matmul
    return multiply(x, weight, w.shape, transposed, bias)


def windowed_matmul(
    x: Tensor, weight: tuple, shape: list[int], transposed: bool, bias: Tensor | None
) -> Tensor:
    """The product by windows of W (height, width): torch multiplies each while it is in cache."""
    height, width = shape
    tokens = len(x)
    inner, outer = (width, height) if transposed else (height, width)
    step = max(WINDOW // inner // 64, 1) * 64  # a multiple of the usual block size
    step = min(step, outer)
    y = x.new_empty(tokens, outer)
    scratch = x.new_empty(step * inner)
    for start in range(0, outer, step):
        size = min(step, outer - start)
        columns = slice(start, start + size)
        rows, cols = (size, width) if transposed else (height, size)
        window = scratch[: rows * cols]
        first = start * width if transposed else start
        decode.decode(weight, first, width, rows, cols, memory_of_floats(window))
        window = window.view(rows, cols)
        window = window.T if transposed else window  # (inner, size)
        for token in range(0, tokens, TOKENS):
            few = x[token : token + TOKENS]
            out = y[token : token + TOKENS, columns]
            if bias is None:
                torch.mm(few, window, out=out)
            else:
                torch.addmm(bias[columns], few, window, out=out)
    return y


def fused_matmul(  # only with AVX-512
    x: Tensor, weight: tuple, shape: list[int], transposed: bool, bias: Tensor | None
) -> Tensor:
    """The product by fused.py: summed in float32, with elements of W not rounded to 16 bits."""
    height, width = shape
    at_once = 1 if len(x) == 1 else 4  # T in fused.py
    y = torch.empty(len(x), height if transposed else width)
    groups = -(-min(len(x), AT_ONCE) // at_once)
    # A part of x or, if not transposed, of y, in the order of fused.py; the same memory as rows.
    ordered = torch.empty(groups, width // 32, at_once, 2, 16)
    as_rows = ordered.permute(0, 2, 1, 4, 3)  # (groups, at_once, width / 32, 16, 2)
    columns = None if transposed else torch.empty(groups, height, at_once)  # the same part of x
    for token in range(0, len(x), AT_ONCE):
        few = x[token : token + AT_ONCE].detach().split(at_once)
        part = y[token : token + AT_ONCE]
        if transposed:
            for rows, group in zip(as_rows, few):
                rows[: len(group)].copy_(group.reshape(-1, *rows.shape[1:]))
            fused.multiply(weight, width, memory_of_floats(ordered), at_once, part.numpy())
        else:
            for rows, group in zip(columns.transpose(1, 2), few):
                rows[: len(group)].copy_(group)
            sums = memory_of_floats(ordered.zero_())
            threads = torch.get_num_threads()
            fused.multiply_back(weight, width, memory_of_floats(columns), at_once, sums, threads)
            for rows, group in zip(as_rows, part.split(at_once)):
                group.view(-1, *rows.shape[1:]).copy_(rows[: len(group)])
    if bias is not None:
        y.add_(bias)
    return y.to(x.dtype)
