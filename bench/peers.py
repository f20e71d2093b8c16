"""The same work on a CPU, done by us and by the peers.

Each function prepares the work and returns one callable per peer that does it once: the same
numbers in, and results that the tests compare. The peers:

    ours            this project, with its kernels
    reference       this project in plain torch (QLORA_KERNELS=reference)
    bitsandbytes    its functions, and its Linear4bit as transformers and PEFT use it
    torchao         its NF4Tensor, on which QLoRA in torchtune is built
    dense           torch with an unquantized weight: no compression to pay for

step_process.py has the training step.
"""

import ctypes
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.turns import Work
from kernels import dispatch
from lora import FrozenWeight, QLoRALinear
from memory.measured import rss_bytes
from paged_optim import PagedAdamW

Product = Callable[[Tensor], Tensor]

# How bitsandbytes is called to store what we store.
BNB_NF4 = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": True}


def reference(work: Work) -> Work:
    """The same call without kernels."""

    def without_kernels() -> object:
        os.environ["QLORA_KERNELS"] = "reference"
        try:
            return work()
        finally:
            del os.environ["QLORA_KERNELS"]

    return without_kernels


def quantizing(weight: Tensor) -> dict[str, Work]:
    """float32 -> NF4 with double-quantized constants."""
    from bitsandbytes.functional import quantize_4bit
    from torchao.quantization import to_nf4

    ours = partial(FrozenWeight, weight)
    return {
        "ours": ours,
        "reference": reference(ours),
        "bitsandbytes": partial(quantize_4bit, weight, **BNB_NF4),
        "torchao": partial(to_nf4, weight),
    }


def dequantizing(weight: Tensor, dtype: torch.dtype) -> dict[str, Work]:
    """NF4 -> dense: ours into an existing buffer; the peers, which cannot on a CPU, allocate."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from torchao.quantization import to_nf4

    weight = weight.to(dtype)
    q, constants = FrozenWeight(weight).packed_state()
    allocating = partial(dispatch.dequantize, q, constants=constants)
    ours = partial(allocating, out=torch.empty_like(weight))
    packed, state = quantize_4bit(weight, **BNB_NF4)
    return {
        "ours": ours,
        "reference": reference(ours),
        "ours, allocating": allocating,
        "bitsandbytes": partial(dequantize_4bit, packed, state),
        "torchao": to_nf4(weight).get_original_weight,
    }


def linear4bit(weight: Tensor) -> nn.Module:
    """The layer of bitsandbytes with this weight, which computes in its dtype."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    n_out, n_in = weight.shape
    layer = Linear4bit(n_in, n_out, bias=False, quant_type="nf4", compute_dtype=weight.dtype)
    layer.weight = Params4bit(
        weight.clone(), False, quant_type="nf4", compress_statistics=True, module=layer
    )
    return layer.to("cpu")


def linear_layers(weight: Tensor, dtype: torch.dtype) -> dict[str, Product]:
    """x -> x W^T, without adapter or bias."""
    from torchao.quantization import to_nf4
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import linear_nf4

    weight = weight.to(dtype)
    return {
        "ours": QLoRALinear(FrozenWeight(weight), None),
        "bitsandbytes": linear4bit(weight),
        "torchao": partial(linear_nf4, weight=to_nf4(weight)),
        "dense": partial(F.linear, weight=weight),
    }


def multiplying(weight: Tensor, x: Tensor, g: Tensor | None = None) -> dict[str, Work]:
    """x W^T without gradients; with g, the gradient of the product, also the gradient of x."""
    layers = linear_layers(weight, x.dtype)
    if g is None:
        return {name: torch.no_grad()(partial(layer, x)) for name, layer in layers.items()}
    return {name: partial(product_and_gradient, layer, x, g) for name, layer in layers.items()}


def product_and_gradient(product: Product, x: Tensor, g: Tensor) -> Tensor:
    """Computes product(x) and returns the gradient of x, given the gradient g of the product."""
    leaf = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(product(leaf), leaf, g)
    return gradient


class DenseWithLoRA(nn.Module):
    """A linear layer with LoRA in plain torch: the weight is dense, and alpha is 2 r."""

    def __init__(self, weight: Tensor, r: int) -> None:
        super().__init__()
        n_out, n_in = weight.shape
        self.weight = weight
        self.lora_A = nn.Parameter(torch.empty(r, n_in))
        self.lora_B = nn.Parameter(torch.empty(n_out, r))

    def forward(self, x: Tensor) -> Tensor:
        update = F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        return F.linear(x, self.weight) + 2 * update


def peft_layer(weight: Tensor, r: int) -> nn.Module:
    """PEFT's layer on that of bitsandbytes."""
    from peft import LoraConfig, inject_adapter_in_model

    model = nn.Sequential(linear4bit(weight))
    model.is_loaded_in_4bit = True
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=["0"])
    return inject_adapter_in_model(config, model)[0]


def training(weight: Tensor, x: Tensor, g: Tensor, r: int) -> dict[str, Work]:
    """A layer with LoRA: the product, then the gradients of x, A and B, given g, its gradient."""
    weight = weight.to(x.dtype)
    layers = {
        "ours": QLoRALinear(FrozenWeight(weight), None, r, lora_alpha=2 * r),
        "bitsandbytes": peft_layer(weight, r),
        "dense": DenseWithLoRA(weight, r),
    }
    n_out, n_in = weight.shape
    lora_A = torch.randn(r, n_in)
    lora_B = torch.randn(n_out, r)
    with torch.no_grad():
        for layer in layers.values():
            own_A, own_B = trainable(layer)
            own_A.copy_(lora_A)
            own_B.copy_(lora_B)
    return {name: partial(gradients, layer, x, g) for name, layer in layers.items()}


def gradients(layer: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """Computes layer(x) and returns the gradients of x and of the adapter, given g."""
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(layer(leaf), [leaf, *trainable(layer)], g)


def updating(count: int) -> dict[str, Work]:
    """An AdamW step on `count` float32 parameters in tensors of 4096 x 4096; all pages resident."""

    def stepping(kind: type[torch.optim.Optimizer], **settings: object) -> Work:
        parameters = [nn.Parameter(torch.randn(2**24)) for _ in range(count // 2**24)]
        for parameter in parameters:
            parameter.grad = torch.randn(2**24)
        return kind(parameters, **settings).step

    return {
        "ours": stepping(PagedAdamW),
        "torch fused": stepping(torch.optim.AdamW, fused=True),
        "torch": stepping(torch.optim.AdamW, foreach=False),
    }


def reset_peak() -> None:
    """Starts a new peak of this process, without what the allocator keeps after frees."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The largest resident memory since `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def extra_bytes(work: Work) -> int:
    """The memory of a call at its peak, beyond what exists before and what it returns."""
    work()
    reset_peak()
    before = rss_bytes()
    result = work()
    return peak_bytes() - before - result.nbytes


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
