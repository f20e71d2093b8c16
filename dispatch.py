"""Which kernel runs where: the only file that knows.

`quantize` and `dequantize` are nf4's, by the fastest kernel there is for the device, cpu_kernels or cuda_kernels; `matmul`
multiplies by a weight that stays in 4 bits. Whatever has no kernel (a device, a dtype, a codebook of more than 16 levels) goes
to the reference and gives the same result: bit for bit where no sum is reordered. QLORA_KERNELS=reference in the environment
sends everything there.

Both are operators of torch.library, so torch.compile takes them as they are instead of tracing through Numba. The derivative of
y = x W^T is g W, and that of g W is x W^T.
"""

import importlib
import math
import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

import nf4
from cpu_kernels import adamw as fused
from cpu_kernels import decode
from cpu_kernels import matmul as windows
from cpu_kernels import quantize as blockwise
from double_quant import DoubleQuantized
from nf4 import NF4, Quantized
from stored import SCHEMA, Stored, decoded, fits, largest, restored, stored  # noqa: F401

PIECE = 2**20  # elements of a weight that is not float32 are converted to it so many at a time
FUSES = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")  # torch multiplies and adds there as the kernel does
LIBRARY = torch.library.Library("qlora", "DEF")


def quantize(weight: Tensor, block_size: int = 64, codebook: Tensor = NF4) -> Quantized:
    """What nf4.quantize gives, or raises."""
    nf4.check_arguments(weight, block_size, codebook)
    n, ascending = weight.numel(), bool((codebook[1:] > codebook[:-1]).all()) and codebook.numel() <= 16
    gpu = _cuda_kernels(weight)
    if not (n and ascending and (gpu or _has_kernels(weight))):
        return nf4.quantize(weight, block_size, codebook)
    midpoints = F.pad((codebook[1:] + codebook[:-1]) / 2, (0, 16 - codebook.numel()), value=math.inf)
    flat = weight.detach().reshape(-1)
    if gpu:
        codebook = codebook.to(weight.device)
        made = gpu.quantize(flat, midpoints.to(weight.device), block_size)
        if made is None or not made[1].isfinite().all():
            return nf4.quantize(weight, block_size, codebook)  # which says what is not finite, and where
        return Quantized(*made, codebook, weight.shape, weight.dtype, block_size)
    midpoints = midpoints.numpy()
    packed, absmax = torch.empty((n + 1) // 2, 1, dtype=torch.uint8), torch.empty(-(-n // block_size))
    step = n if flat.dtype == torch.float32 else max(PIECE, block_size)
    for start in range(0, n, step):
        numbers = flat[start : start + step].to(torch.float32).numpy()
        scales = absmax[start // block_size : -(-(start + step) // block_size)].numpy()
        blockwise.quantize(numbers, numbers.view(np.uint32), midpoints, block_size.bit_length() - 1,
                           packed[start // 2 : (start + step + 1) // 2].numpy().reshape(-1), scales, scales.view(np.uint32))
    if not absmax.isfinite().all():
        nf4.check_finite(flat.to(torch.float32), weight.shape)
    return Quantized(packed, absmax, codebook, weight.shape, weight.dtype, block_size)


def dequantize(q: Quantized, dtype: torch.dtype | None = None, constants: DoubleQuantized | None = None,
               out: Tensor | None = None) -> Tensor:
    """What nf4.dequantize gives. `constants`, where given, stand for q.absmax; the result goes into `out`, where given."""
    out = torch.empty(q.shape, dtype=dtype or q.dtype, device=q.packed.device) if out is None else out
    torch.ops.qlora.dequantize_(out, *stored(q, constants))
    return out


def matmul(x: Tensor, q: Quantized, constants: DoubleQuantized | None = None, transposed: bool = True) -> Tensor:
    """x W^T (tokens, out) for x (tokens, in); not transposed, x W (tokens, in) for x (tokens, out). W is (out, in)."""
    return torch.ops.qlora.matmul(x, *stored(q, constants), transposed)


def adamw(param: Tensor, grad: Tensor, step: int, group: dict) -> Callable[[Tensor, Tensor, Tensor], None] | None:
    """What updates runs of a parameter, its gradient and their moments as paged_optim.adamw_ does; None without a kernel."""
    beta1, beta2, lr, weight_decay, eps = map(float, (*group["betas"], group["lr"], group["weight_decay"], group["eps"]))
    step_size = lr / (1 - beta1**step)
    gpu = _cuda_kernels(param)
    suits = param.dtype == grad.dtype == torch.float32 and step_size <= torch.finfo(torch.float32).max  # else refused
    if not suits or not (gpu or FUSES and _has_kernels(param)):
        return None
    scalars = (step == 1, 1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, (1 - beta2**step) ** 0.5, eps, -step_size)
    if gpu:
        return lambda param, grad, moments: gpu.adamw(param, grad, moments, *scalars)
    return lambda param, grad, moments: fused.update(param.numpy(), grad.numpy(), moments.numpy(), *scalars)


def _has_kernels(tensor: Tensor) -> bool:
    """Whether the CPU's kernels may run; with the threads that torch has."""
    if tensor.device.type != "cpu" or os.environ.get("QLORA_KERNELS") == "reference":
        return False
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)  # which Numba's threads, when they start, change
    return True


def _cuda_kernels(tensor: Tensor) -> ModuleType | None:
    """What launches the GPU's kernels, imported when the first tensor on a GPU comes; None if they may not or cannot run."""
    return _launch() if tensor.is_cuda and os.environ.get("QLORA_KERNELS") != "reference" else None


@cache
def _launch() -> ModuleType | None:
    return importlib.import_module("cuda_kernels.launch") if find_spec("numba_cuda") else None


def _for_kernels(out: Tensor, s: Stored) -> tuple | None:
    """A weight as decode.py takes it; None if there is no kernel for it, or its pieces do not fit."""
    has_kind = out.dtype in windows.KINDS and (out.dtype != torch.float16 or decode.FLOAT16)
    if not (has_kind and fits(s, out.device) and _has_kernels(out)):
        return None
    levels = F.pad(s.codebook, (0, 16 - s.codebook.numel())).numpy()
    packed, absmax = s.packed.flatten().numpy(), s.absmax.numpy()
    shift, most = s.block_size.bit_length() - 1, np.float32(largest(s.dtype))
    if s.nested_absmax is None:
        return packed, levels, absmax, absmax[:0].view(np.uint8), levels, np.float32(0), most, shift, 0, decode.AVX512
    return (packed, levels, s.nested_absmax.numpy(), absmax, s.nested_codebook.numpy(), np.float32(s.nested_offset.item()),
            most, shift, s.nested_block_size.bit_length() - 1, decode.AVX512)


def _dequantize_(out: Tensor, *pieces: object) -> None:
    s = Stored(*pieces)
    plain = out.is_contiguous() and out.shape == tuple(s.shape)
    gpu = _cuda_kernels(out)
    if gpu and plain and fits(s, out.device) and gpu.dequantize(s, out):
        return
    weight = _for_kernels(out, s) if plain else None
    if weight is None:
        out.copy_(nf4.dequantize(restored(s), out.dtype))
        return
    numbers, run = windows.numbers_of(out), 4096  # elements that count as a row of the window
    rows, rest = divmod(numbers.size, run)
    decode.decode(weight, 0, run, rows, run, numbers)
    decode.decode(weight, rows * run, 0, 1, rest, numbers[rows * run :])


def _matmul(x: Tensor, *pieces_and_transposed: object) -> Tensor:
    *pieces, transposed = pieces_and_transposed
    height, width = (s := Stored(*pieces)).shape
    suits = x.shape[1:] == (width if transposed else height,)
    gpu = _cuda_kernels(x) if suits and fits(s, x.device) else None
    if gpu and transposed and (y := gpu.few_rows(x, s)) is not None:
        return y
    weight = _for_kernels(x, s) if suits else None
    if weight is not None:
        return windows.matmul(x, weight, s.shape, transposed)
    if gpu:  # torch's allocator gives each layer the same memory for it, in the order of the stream
        _dequantize_(dense := x.new_empty(height, width), *pieces)
    else:
        dense = nf4.dequantize(restored(s), x.dtype)
    y = x.new_empty(len(x), height if transposed else width)
    return torch.mm(x, dense.T if transposed else dense, out=y)  # with `out`, autocast leaves it alone


LIBRARY.define(f"dequantize_(Tensor(a!) out, {SCHEMA}) -> ()")
LIBRARY.define(f"matmul(Tensor x, {SCHEMA}, bool transposed) -> Tensor")
LIBRARY.impl("dequantize_", _dequantize_, "CompositeExplicitAutograd")
LIBRARY.impl("matmul", _matmul, "CompositeExplicitAutograd")


@torch.library.register_fake("qlora::matmul", lib=LIBRARY)
def _shape_of_matmul(x: Tensor, *pieces_and_transposed: object) -> Tensor:
    *pieces, transposed = pieces_and_transposed
    return x.new_empty(x.shape[0], Stored(*pieces).shape[0 if transposed else 1])


def _keep_weight(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.pieces_and_transposed = inputs[1:]


def _gradient_of_matmul(ctx: FunctionCtx, g: Tensor) -> tuple[Tensor | None, ...]:
    *pieces, transposed = ctx.pieces_and_transposed
    return torch.ops.qlora.matmul(g, *pieces, not transposed), *[None] * (len(pieces) + 1)


torch.library.register_autograd("qlora::matmul", _gradient_of_matmul, setup_context=_keep_weight, lib=LIBRARY)
