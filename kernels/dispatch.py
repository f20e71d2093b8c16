"""Chooses the reference, CPU or CUDA kernel; no other module does.

`quantize` and `dequantize` compute what nf4's functions compute, with the fastest kernel for the
device. `matmul` multiplies by a weight that stays in 4 bits. kernels/cpu/launch.py and
kernels/launch_cuda.py have the same functions for tensors. If no kernel fits (because of the
dtype, the shape, the device, or levels that do not ascend), the reference runs. Results are the
same bit for bit, except where a kernel sums in another order. QLORA_KERNELS=reference in the
environment selects the reference for everything.

Numba and the kernels are imported when the first tensor on their device is used, so importing this
module is cheap.

`matmul` and `dequantize_` are operators of torch.library, so torch.compile calls them and does not
trace into Numba. With g = dL/dy, the gradient dL/dx of y = x W^T is g W, and that of y = x W is
g W^T.
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
from kernels.packed_weight import (
    SCHEMA,
    PackedWeight,
    dense_matmul,
    flatten,
    is_valid_on,
    unflatten,
)
from nf4 import NF4, Quantized

LIBRARY = torch.library.Library("qlora", "DEF")


def quantize(weight: Tensor, block_size: int = 64, codebook: Tensor = NF4) -> Quantized:
    """Quantize as nf4.quantize does: the same result, or the same ValueError."""
    nf4.check_arguments(weight, block_size, codebook)
    kernels = _kernels(weight)
    if kernels and weight.numel() and (codebook[1:] > codebook[:-1]).all():
        codebook = codebook.to(weight.device)
        flat = weight.detach().contiguous().view(-1)
        result = kernels.quantize(flat, block_size, codebook)
        if result is not None:
            packed, absmax = result
            if absmax.isfinite().all():
                return Quantized(packed, absmax, codebook, weight.shape, weight.dtype, block_size)
    # If a number is not finite, the reference raises an error with the count and the first index.
    return nf4.quantize(weight, block_size, codebook)


def dequantize(
    q: Quantized,
    dtype: torch.dtype | None = None,
    constants: DoubleQuantized | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Dequantize as nf4.dequantize does.

    constants: if given, they are decoded and replace q.absmax. out: if given, the result is written
    to it.
    """
    if out is None:
        out = torch.empty(q.shape, dtype=dtype or q.dtype, device=q.packed.device)
    torch.ops.qlora.dequantize_(out, *flatten(q, constants))
    return out


def matmul(
    x: Tensor,
    q: Quantized,
    constants: DoubleQuantized | None = None,
    transposed: bool = True,
    bias: Tensor | None = None,
) -> Tensor:
    """x W^T + bias (tokens, out) for x (tokens, in), or x W (tokens, in) for x (tokens, out).

    W is (out, in); `transposed` selects x W^T. The bias has the dtype of x and is added before the
    sum is rounded to that dtype.
    """
    return torch.ops.qlora.matmul(x, bias, *flatten(q, constants), transposed)


def add_product_(y: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
    """y += alpha a b for thin a and b; y itself is returned.

    On a processor without instructions for 16-bit products, torch is many times slower with them
    than with float32; a b is then computed in float32.
    """
    is_traced = torch.compiler.is_compiling()  # it cannot trace the import of the kernels
    if is_traced or multiplies_natively(y.device.type, y.dtype):
        return y.addmm_(a, b, alpha=alpha)
    return y.add_(a.float() @ b.float(), alpha=alpha)


def multiplies_natively(device: str, dtype: torch.dtype) -> bool:
    """Whether a device of this type has instructions for products of this dtype."""
    if device != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return True
    kernels, _ = _launch_cpu()
    return dtype in kernels.NATIVE


def adamw(
    param: Tensor, grad: Tensor, step: int, group: dict
) -> Callable[[int, Tensor], None] | None:
    """Returns update(start, moments), which does what paged_optim.adamw_ does, or None.

    It updates moments.shape[1] elements of the flat parameter, from element `start` on. None means
    that there is no kernel for this parameter.
    """
    kernels = _kernels(param)
    if kernels is None or not param.dtype == grad.dtype == torch.float32:
        return None
    beta1, beta2 = map(float, group["betas"])
    lr = float(group["lr"])
    step_size = lr / (1 - beta1**step)
    if not step_size <= torch.finfo(torch.float32).max:  # the reference raises an error for these
        return None
    scalars = (
        step == 1,
        1 - lr * float(group["weight_decay"]),
        1 - beta1,
        beta2,
        1 - beta2,
        (1 - beta2**step) ** 0.5,
        float(group["eps"]),
        -step_size,
    )
    return kernels.adamw(param, grad, scalars)


def on_float64_device(tensor: Tensor) -> Tensor:
    """The tensor, or a copy on the host if its device has no float64, as Apple's GPUs."""
    return tensor.cpu() if tensor.is_mps else tensor


def _kernels(tensor: Tensor) -> ModuleType | None:
    """The module that launches kernels on the tensor's device; None where the reference runs."""
    if os.environ.get("QLORA_KERNELS") == "reference":
        return None
    if tensor.device.type == "cpu":
        kernels, process = _launch_cpu()
        if process != os.getpid():  # a fork has none of the threads of its parent
            return None
        kernels.follow_torch()
        return kernels
    return _launch_cuda() if tensor.is_cuda else None


@cache
def _launch_cpu() -> tuple[ModuleType, int]:
    """kernels/cpu/launch.py, imported when the first CPU tensor is used, and by which process."""
    return importlib.import_module("kernels.cpu.launch"), os.getpid()


@cache
def _launch_cuda() -> ModuleType | None:
    """kernels/launch_cuda.py, imported when the first CUDA tensor is used.

    None if numba-cuda, which compiles its kernels, is not installed.
    """
    return importlib.import_module("kernels.launch_cuda") if find_spec("numba_cuda") else None


def _dequantize_(out: Tensor, *pieces: object) -> None:
    weight = PackedWeight(*pieces)
    kernels = _kernels(out)
    fits = out.is_contiguous() and out.shape == tuple(weight.shape)
    has_kernel = kernels and fits and is_valid_on(weight, out.device)
    if not (has_kernel and kernels.dequantize(weight, out)):
        out.copy_(nf4.dequantize(unflatten(weight), out.dtype))


def _matmul(x: Tensor, bias: Tensor | None, *pieces_and_transposed: object) -> Tensor:
    *pieces, transposed = pieces_and_transposed
    weight = PackedWeight(*pieces)
    height, width = weight.shape
    kernels = _kernels(x)
    fits = x.shape[1:] == (width if transposed else height,)
    if kernels and fits and is_valid_on(weight, x.device):
        y = kernels.matmul(x, weight, transposed, bias)
        if y is not None:
            return y
    return dense_matmul(x, nf4.dequantize(unflatten(weight), x.dtype), transposed, bias)


LIBRARY.define(f"dequantize_(Tensor(a!) out, {SCHEMA}) -> ()")
LIBRARY.define(f"matmul(Tensor x, Tensor? bias, {SCHEMA}, bool transposed) -> Tensor")
LIBRARY.impl("dequantize_", _dequantize_, "CompositeExplicitAutograd")
LIBRARY.impl("matmul", _matmul, "CompositeExplicitAutograd")


@torch.library.register_fake("qlora::matmul", lib=LIBRARY)
def _shape_of_matmul(x: Tensor, bias: Tensor | None, *pieces_and_transposed: object) -> Tensor:
    *pieces, transposed = pieces_and_transposed
    height, width = PackedWeight(*pieces).shape
    return x.new_empty(x.shape[0], height if transposed else width)


def _keep_weight(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.pieces_and_transposed = inputs[2:]


def _gradient_of_matmul(ctx: FunctionCtx, g: Tensor) -> tuple[Tensor | None, ...]:
    *pieces, transposed = ctx.pieces_and_transposed
    grad_x = torch.ops.qlora.matmul(g, None, *pieces, not transposed)
    grad_bias = g.sum(0) if ctx.needs_input_grad[1] else None
    no_grads = [None] * len(ctx.pieces_and_transposed)
    return grad_x, grad_bias, *no_grads


torch.library.register_autograd(
    "qlora::matmul", _gradient_of_matmul, setup_context=_keep_weight, lib=LIBRARY
)
