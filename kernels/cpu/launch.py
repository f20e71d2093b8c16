"""Calls the CPU kernels on tensors, whose memory they see as NumPy arrays.

Threads of Python take turns: Numba's own thread pool ("workqueue") ends the process if two use it
at once. A forked process uses the reference (dispatch.py), as GNU OpenMP would end it.

The product with a 4-bit weight is computed in one of two ways; neither stores a dense W. matmul.py
multiplies in float32. Where the processor has instructions for 16-bit numbers, which matmul.py does
not use, torch is faster for many 16-bit rows of x. W is then multiplied window by window. A window
is as much of W as fits in the cache. It is decoded into a scratch buffer, multiplied by torch, and
overwritten by the next window:

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
from kernels.cpu import decode, vectors
from kernels.cpu import matmul as products
from kernels.cpu import quantize as blockwise
from kernels.packed_weight import PackedWeight, largest_absmax

WINDOW = 2**21  # elements: 4 MB in 16 bits, which fit an L3 cache; smaller ones cost more calls
TOKENS = 512  # rows of x that a window multiplies at once: more would push it out of the cache
FEW = 8  # rows of 16-bit x up to which matmul.py is faster than torch's 16-bit products
AT_ONCE = 256  # rows of x that a call of matmul.py takes, which limits its scratch
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
DECODED = [dtype for dtype in KINDS if dtype != torch.float16 or vectors.FLOAT16]
# The 16-bit dtypes that the processor multiplies, and LLVM's names of these features
NATIVE = {
    dtype
    for dtype, names in [
        (torch.bfloat16, {"avx512bf16", "amx-bf16"}),
        (torch.float16, {"avx512fp16", "amx-fp16"}),
    ]
    if names & vectors.FEATURES
}


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
    tree = in_tree_order(midpoints, 8 if is_wide else 4).numpy()
    packed = torch.empty(n if is_wide else (n + 1) // 2, 1, dtype=torch.uint8)
    absmax = torch.empty(-(-n // block_size))
    step = n if flat.dtype == torch.float32 else max(PIECE, block_size)
    for start in range(0, n, step):
        stop = min(start + step, n)
        numbers = flat[start:stop].to(torch.float32).numpy()
        scales = absmax[start >> shift : -(-stop >> shift)].numpy()
        pieces = (numbers, numbers.view(np.uint32), tree, shift)
        bits = scales.view(np.uint32)
        if is_wide:
            codes = packed[start:stop].numpy().reshape(-1)
            blockwise.quantize_wide(*pieces, codes, scales, bits)
        else:
            pairs = packed[start // 2 : (stop + 1) // 2].numpy().reshape(-1)
            blockwise.quantize(*pieces, pairs, scales, bits)
    return packed, absmax


def in_tree_order(midpoints: Tensor, depth: int) -> Tensor:
    """At most 2**depth - 1 ascending numbers as a binary tree, level by level; (2**depth,).

    The root is at place 1, and the children of place k are at 2 k and 2 k + 1. Place 0 and the
    places of missing numbers are infinite.
    """
    numbers = F.pad(midpoints, (0, 2**depth - midpoints.numel()), value=math.inf)
    order = [-1]
    for level in range(depth):
        step = 2 ** (depth - level)  # between the neighbours of a level
        order += range(step // 2 - 1, 2**depth - 1, step)
    return numbers[order]


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
    return (memory_of(w.packed), levels, *constants, shift, shift8)


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
    if len(x) > FEW and x.dtype in NATIVE:
        return windowed_matmul(x, weight, w.shape, transposed, bias)
    return float32_matmul(x, weight, w.shape, transposed, bias)


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


def float32_matmul(
    x: Tensor, weight: tuple, shape: list[int], transposed: bool, bias: Tensor | None
) -> Tensor:
    """The product by matmul.py: with float32 elements of W and sums, rounded once."""
    height, width = shape
    y = torch.zeros(len(x), height if transposed else width)
    multiply = times_transpose if transposed else times_weight
    if x.numel() and y.numel():
        for rows, part in zip(x.detach().split(AT_ONCE), y.split(AT_ONCE)):
            multiply(rows.to(torch.float32).contiguous(), weight, width, part)
    if bias is not None:
        y.add_(bias)
    return y.to(x.dtype)


def times_transpose(x: Tensor, weight: tuple, width: int, y: Tensor) -> None:
    """y (tokens, height) = x W^T in float32."""
    numbers = memory_of(x)
    if products.takes_few(weight, width) and 2 * len(x) <= products.WIDTH:
        return products.multiply_few(weight, width, numbers, y.numpy())
    interleaved = x.new_empty(-(-len(x) // products.WIDTH), width, products.WIDTH).numpy()
    products.interleave(numbers.reshape(x.shape), interleaved.reshape(-1))
    products.multiply(weight, width, interleaved.reshape(-1), y.numpy())


def times_weight(x: Tensor, weight: tuple, width: int, y: Tensor) -> None:
    """y (tokens, width) = x W in float32; y holds zeros."""
    threads = torch.get_num_threads()
    if products.takes_few(weight, width) and len(x) < 4:
        return products.multiply_back_few(weight, width, memory_of(x), memory_of(y), threads)
    if len(x) % 4:
        x = F.pad(x, (0, 0, 0, -len(x) % 4))
    sums = x.new_zeros(len(x), width + -width % products.STRIP)
    products.multiply_back(weight, width, memory_of(x), memory_of(sums), threads)
    y.copy_(sums[: len(y), :width])
