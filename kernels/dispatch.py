"""Which kernel runs where: the only file that knows.

`quantize` and `dequantize` are nf4's, by the fastest kernel there is for the device, from kernels/cpu or cuda_kernels; `matmul`
multiplies by a weight that stays in 4 bits. Both packages have a file that takes tensors, cpu/launch.py and
launch_cuda.py, and these have the same functions. Whatever has no kernel there (a dtype, a shape, levels in no order)
goes to the reference, as any other device does, and gives the same result: bit for bit where no sum is reordered.
QLORA_KERNELS=reference in the environment sends everything there.

Two are operators of torch.library, so torch.compile takes them as they are instead of tracing through Numba. The derivative of
y = x W^T is g W, and that of g W is x W^T.
"""

import importlib
import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

import nf4
from double_quant import DoubleQuantized
from kernels.cpu import launch as host
from kernels.packed_weight import SCHEMA, Stored, fits, product, restored, stored
from nf4 import NF4, Quantized

LIBRARY = torch.library.Library("qlora", "DEF")


def quantize(weight: Tensor, block_size: int = 64, codebook: Tensor = NF4) -> Quantized:
    """What nf4.quantize gives, or raises."""
    nf4.check_arguments(weight, block_size, codebook)
    kernels, made = _kernels(weight), None
    if kernels and weight.numel() and (codebook[1:] > codebook[:-1]).all():
        codebook = codebook.to(weight.device)
        made = kernels.quantize(weight.detach().contiguous().view(-1), block_size, codebook)
    if made is None or not made[1].isfinite().all():
        return nf4.quantize(
            weight, block_size, codebook
        )  # which says what is not finite, and where
    return Quantized(*made, codebook, weight.shape, weight.dtype, block_size)


def dequantize(
    q: Quantized,
    dtype: torch.dtype | None = None,
    constants: DoubleQuantized | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """What nf4.dequantize gives. `constants`, where given, stand for q.absmax; the result goes into `out`, where given."""
    out = (
        torch.empty(q.shape, dtype=dtype or q.dtype, device=q.packed.device) if out is None else out
    )
    torch.ops.qlora.dequantize_(out, *stored(q, constants))
    return out


def matmul(
    x: Tensor,
    q: Quantized,
    constants: DoubleQuantized | None = None,
    transposed: bool = True,
    bias: Tensor | None = None,
) -> Tensor:
    """x W^T + bias (tokens, out) for x (tokens, in); not transposed, x W (tokens, in) for x (tokens, out). W is (out, in).

    The bias, of x's dtype, is added before the sum is rounded to that.
    """
    return torch.ops.qlora.matmul(x, bias, *stored(q, constants), transposed)


def adamw(
    param: Tensor, grad: Tensor, step: int, group: dict
) -> Callable[[int, Tensor], None] | None:
    """What updates a flat parameter from element `start` on, as far as `moments` go, as paged_optim.adamw_ does.

    None if there is no kernel for it.
    """
    kernels = _kernels(param)
    beta1, beta2, lr, weight_decay, eps = map(
        float, (*group["betas"], group["lr"], group["weight_decay"], group["eps"])
    )
    step_size = lr / (1 - beta1**step)
    suits = (
        param.dtype == grad.dtype == torch.float32 and step_size <= torch.finfo(torch.float32).max
    )  # else refused
    if not suits or kernels is None:
        return None
    scalars = (
        step == 1,
        1 - lr * weight_decay,
        1 - beta1,
        beta2,
        1 - beta2,
        (1 - beta2**step) ** 0.5,
        eps,
        -step_size,
    )
    return kernels.adamw(param, grad, scalars)


def _kernels(tensor: Tensor) -> ModuleType | None:
    """What has the kernels of a tensor's device, if they may run."""
    if os.environ.get("QLORA_KERNELS") == "reference":
        return None
    if tensor.device.type == "cpu":
        host.follow_torch()
        return host
    return _launch() if tensor.is_cuda else None


@cache
def _launch() -> ModuleType | None:
    """The GPU's, imported when its first tensor comes; None without their compiler."""
    return importlib.import_module("kernels.launch_cuda") if find_spec("numba_cuda") else None


def _dequantize_(out: Tensor, *pieces: object) -> None:
    s, kernels = Stored(*pieces), _kernels(out)
    suits = out.is_contiguous() and out.shape == tuple(s.shape) and fits(s, out.device)
    if not (kernels and suits and kernels.dequantize(s, out)):
        out.copy_(nf4.dequantize(restored(s), out.dtype))


def _matmul(x: Tensor, bias: Tensor | None, *pieces_and_transposed: object) -> Tensor:
    *pieces, transposed = pieces_and_transposed
    height, width = (s := Stored(*pieces)).shape
    suits = x.shape[1:] == (width if transposed else height,) and fits(s, x.device)
    kernels, y = _kernels(x), None
    if kernels and suits:
        y = kernels.matmul(x, s, transposed, bias)
    return product(x, nf4.dequantize(restored(s), x.dtype), transposed, bias) if y is None else y


LIBRARY.define(f"dequantize_(Tensor(a!) out, {SCHEMA}) -> ()")
LIBRARY.define(f"matmul(Tensor x, Tensor? bias, {SCHEMA}, bool transposed) -> Tensor")
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
    return (
        torch.ops.qlora.matmul(g, None, *pieces, not transposed),
        of_bias,
        *[None] * (len(pieces) + 1),
    )


torch.library.register_autograd(
    "qlora::matmul", _gradient_of_matmul, setup_context=_keep_weight, lib=LIBRARY
)
