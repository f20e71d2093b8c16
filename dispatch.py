"""Which kernel runs where: the only file that knows.

`quantize` and `dequantize` are nf4's, by the fastest kernel there is for the device; `matmul` multiplies by a weight that stays
in 4 bits. Whatever has no kernel (a device, a dtype, a codebook of more than 16 levels) goes to the reference and gives the
same result: bit for bit where no sum is reordered. QLORA_KERNELS=reference in the environment sends everything there.

Two are operators of torch.library, so torch.compile takes them as they are instead of tracing through Numba. The derivative of
y = x W^T is g W, and that of g W is x W^T.
"""

import math
import os
from collections.abc import Callable
from typing import NamedTuple

import numba
import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

import double_quant
import nf4
from cpu_kernels import host
from double_quant import DoubleQuantized
from nf4 import NF4, Quantized

FUSES = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")  # torch multiplies and adds there as the kernel does
LIBRARY = torch.library.Library("qlora", "DEF")
STORED = ("Tensor packed, Tensor absmax, Tensor codebook, Tensor? nested_absmax, Tensor? nested_offset, "
          "Tensor? nested_codebook, int[] shape, ScalarType dtype, int block_size, int nested_block_size")


def quantize(weight: Tensor, block_size: int = 64, codebook: Tensor = NF4) -> Quantized:
    """What nf4.quantize gives, or raises."""
    nf4.check_arguments(weight, block_size, codebook)
    if not (weight.numel() and (codebook[1:] > codebook[:-1]).all() and _has_kernels(weight)):
        return nf4.quantize(weight, block_size, codebook)
    flat = weight.detach().contiguous().view(-1)
    packed, absmax = host.quantize(flat, block_size, codebook)
    if not absmax.isfinite().all():
        nf4.check_finite(flat.to(torch.float32), weight.shape)
    return Quantized(packed, absmax, codebook, weight.shape, weight.dtype, block_size)


def dequantize(q: Quantized, dtype: torch.dtype | None = None, constants: DoubleQuantized | None = None,
               out: Tensor | None = None) -> Tensor:
    """What nf4.dequantize gives. `constants`, where given, stand for q.absmax; the result goes into `out`, where given."""
    out = torch.empty(q.shape, dtype=dtype or q.dtype, device=q.packed.device) if out is None else out
    torch.ops.qlora.dequantize_(out, *_stored(q, constants))
    return out


def matmul(x: Tensor, q: Quantized, constants: DoubleQuantized | None = None, transposed: bool = True,
           bias: Tensor | None = None) -> Tensor:
    """x W^T + bias (tokens, out) for x (tokens, in); not transposed, x W (tokens, in) for x (tokens, out). W is (out, in).

    The bias, of x's dtype, is added before the sum is rounded to that.
    """
    return torch.ops.qlora.matmul(x, bias, *_stored(q, constants), transposed)


def decoded(q: Quantized, constants: DoubleQuantized | None) -> Quantized:
    """The same weight with its constants in float32."""
    if constants is None:
        return q
    # No constant was larger than its weight's dtype can hold, and 0.7 % more would make the largest ones infinite.
    absmax = double_quant.dequantize(constants).clamp_(max=_largest(q.dtype))
    return Quantized(q.packed, absmax, q.codebook, q.shape, q.dtype, q.block_size)


def adamw(param: Tensor, grad: Tensor, step: int, group: dict) -> Callable[[int, Tensor], None] | None:
    """What updates a flat parameter from element `start` on, as far as `moments` go, as paged_optim.adamw_ does.

    None if there is no kernel for it.
    """
    beta1, beta2, lr, weight_decay, eps = map(float, (*group["betas"], group["lr"], group["weight_decay"], group["eps"]))
    step_size = lr / (1 - beta1**step)
    fits = FUSES and param.dtype == grad.dtype == torch.float32 and step_size <= torch.finfo(torch.float32).max  # else refused
    if not fits or not _has_kernels(param):
        return None
    scalars = (step == 1, 1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, (1 - beta2**step) ** 0.5, eps, -step_size)
    return host.adamw_of(param, grad, scalars)


def _largest(dtype: torch.dtype) -> float:
    return min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)


class Stored(NamedTuple):
    """A weight as the operators take it, piece by piece. `absmax` is the codes of the constants, if there are `nested_...`."""

    packed: Tensor
    absmax: Tensor
    codebook: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    nested_codebook: Tensor | None
    shape: list[int]
    dtype: torch.dtype
    block_size: int
    nested_block_size: int


def _stored(q: Quantized, constants: DoubleQuantized | None) -> Stored:
    if constants is None:
        return Stored(q.packed, q.absmax, q.codebook, None, None, None, q.shape, q.dtype, q.block_size, 1)
    return Stored(q.packed, constants.codes, q.codebook, constants.absmax, constants.offset, constants.codebook,
                  q.shape, q.dtype, q.block_size, constants.block_size)


def _restored(s: Stored) -> Quantized:
    """The way back, with the constants decoded."""
    constants = None
    if s.nested_absmax is not None:
        constants = DoubleQuantized(s.absmax, s.nested_absmax, s.nested_offset, s.nested_block_size, s.nested_codebook)
    return decoded(Quantized(s.packed, s.absmax, s.codebook, torch.Size(s.shape), s.dtype, s.block_size), constants)


def _has_kernels(tensor: Tensor) -> bool:
    if tensor.device.type != "cpu" or os.environ.get("QLORA_KERNELS") == "reference":
        return False
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)  # which Numba's threads, when they start, change
    return True


def _for_kernels(out: Tensor, s: Stored) -> tuple | None:
    """A weight as decode.py takes it; None if there is no kernel for it, or its pieces do not fit: kernels check no index."""
    n, double = math.prod(s.shape), s.nested_absmax is not None
    pieces = [(s.packed.flatten(), torch.uint8, (n + 1) // 2), (s.codebook, torch.float32, min(s.codebook.numel(), 16)),
              (s.absmax, torch.uint8 if double else torch.float32, -(-n // s.block_size))]
    if double:
        pieces += [(s.nested_absmax, torch.float32, -(-s.absmax.numel() // s.nested_block_size)),
                   (s.nested_offset, torch.float32, 1), (s.nested_codebook, torch.float32, 256)]
    fits = n > 0 and all(size > 0 and not size & (size - 1) for size in (s.block_size, s.nested_block_size))
    fits = fits and all(piece.dtype == dtype and piece.shape == (count,) and piece.is_cpu for piece, dtype, count in pieces)
    if not (fits and out.dtype in host.DECODED and _has_kernels(out)):
        return None
    constants = (s.nested_absmax, s.absmax, s.nested_codebook, s.nested_offset) if double else (s.absmax,)
    return host.weight_of(s.packed.flatten(), s.codebook, constants, _largest(s.dtype), s.block_size, s.nested_block_size)


def _dequantize_(out: Tensor, *pieces: object) -> None:
    stored = Stored(*pieces)
    weight = _for_kernels(out, stored) if out.is_contiguous() and out.shape == tuple(stored.shape) else None
    if weight is None:
        out.copy_(nf4.dequantize(_restored(stored), out.dtype))
        return
    host.dequantize(weight, out)


def _matmul(x: Tensor, bias: Tensor | None, *pieces_and_transposed: object) -> Tensor:
    *pieces, transposed = pieces_and_transposed
    height, width = (stored := Stored(*pieces)).shape
    weight = _for_kernels(x, stored) if x.shape[1:] == (width if transposed else height,) else None
    if weight is None:
        dense, y = nf4.dequantize(_restored(stored), x.dtype), x.new_empty(len(x), height if transposed else width)
        dense = dense.T if transposed else dense  # with `out`, autocast leaves the product alone
        return torch.mm(x, dense, out=y) if bias is None else torch.addmm(bias, x, dense, out=y)
    return host.matmul(x, weight, stored.shape, transposed, bias)


LIBRARY.define(f"dequantize_(Tensor(a!) out, {STORED}) -> ()")
LIBRARY.define(f"matmul(Tensor x, Tensor? bias, {STORED}, bool transposed) -> Tensor")
LIBRARY.impl("dequantize_", _dequantize_, "CompositeExplicitAutograd")
LIBRARY.impl("matmul", _matmul, "CompositeExplicitAutograd")


@torch.library.register_fake("qlora::matmul", lib=LIBRARY)
def _shape_of_matmul(x: Tensor, bias: Tensor | None, *pieces_and_transposed: object) -> Tensor:
    *pieces, transposed = pieces_and_transposed
    return x.new_empty(x.shape[0], Stored(*pieces).shape[0 if transposed else 1])


def _keep_weight(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.pieces_and_transposed = inputs[2:]


def _gradient_of_matmul(ctx: FunctionCtx, g: Tensor) -> tuple[Tensor | None, ...]:
    *pieces, transposed = ctx.pieces_and_transposed
    of_bias = g.sum(0) if ctx.needs_input_grad[1] else None
    return torch.ops.qlora.matmul(g, None, *pieces, not transposed), of_bias, *[None] * (len(pieces) + 1)


torch.library.register_autograd("qlora::matmul", _gradient_of_matmul, setup_context=_keep_weight, lib=LIBRARY)
