"""The same work on a GPU, done by us and by others: what bench_cuda.py puts side by side.

    ours            this project, with its kernels
    bitsandbytes    its functions, and its Linear4bit under PEFT, as their documentation trains it
    dense           torch with the weight in bfloat16: no compression to pay for

All of it runs on a CPU too, slowly, so that it can be rehearsed without a GPU.
"""

from collections.abc import Callable
from functools import partial
from unittest import mock

import bitsandbytes
import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn

from bench import random_llama
from kernels import dispatch
from kernels import page_store as stores
from lora import FrozenWeight
from memory.formula import Shape
from paged_optim import PagedAdamW
from training.dtypes import autocast

Work = Callable[[], object]
Product = Callable[[Tensor], Tensor]


class Layer:
    """One random weight (out, in) as each contender keeps it."""

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        self.weight = torch.randn(shape, device=device).mul_(0.02).bfloat16()
        self.base, self.out = FrozenWeight(self.weight), torch.empty_like(self.weight)
        self.packed, self.state = bitsandbytes.functional.quantize_4bit(
            self.weight, quant_type="nf4", blocksize=64, compress_statistics=True
        )

    def quantizing(self) -> dict[str, Work]:
        """bfloat16 -> NF4, the constants in float32."""
        theirs = partial(
            bitsandbytes.functional.quantize_4bit, self.weight, quant_type="nf4", blocksize=64
        )
        return {"ours": partial(dispatch.quantize, self.weight), "bitsandbytes": theirs}

    def dequantizing(self) -> dict[str, Work]:
        """Double-quantized NF4 -> bfloat16, into memory that is there already."""
        q, constants = self.base.packed_state()
        out = (
            self.out if self.out.is_cuda else None
        )  # elsewhere bitsandbytes always takes new memory
        theirs = partial(bitsandbytes.functional.dequantize_4bit, self.packed, self.state, out=out)
        return {
            "ours": partial(dispatch.dequantize, q, constants=constants, out=self.out),
            "bitsandbytes": theirs,
        }

    def products(self) -> dict[str, Product]:
        """x -> x W^T."""
        return {
            "ours": self.base.matmul,
            "dense": partial(F.linear, weight=self.weight),
            "bitsandbytes": partial(
                bitsandbytes.matmul_4bit, B=self.packed, quant_state=self.state
            ),
        }

    def multiplying(self, rows: int) -> dict[str, Work]:
        """x W^T, nothing kept for a gradient."""
        x = self._random(rows, self.weight.shape[1])
        return {
            name: torch.no_grad()(partial(product, x)) for name, product in self.products().items()
        }

    def both_ways(self, rows: int) -> dict[str, Work]:
        """x W^T and the gradient of x."""
        x, g = self._random(rows, self.weight.shape[1]), self._random(rows, self.weight.shape[0])

        def once(product: Product) -> Tensor:
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(product(leaf), leaf, g)[0]

        return {name: partial(once, product) for name, product in self.products().items()}

    def _random(self, rows: int, width: int) -> Tensor:
        return torch.randn(rows, width, device=self.weight.device).bfloat16()


def updating(count: int, device: torch.device) -> dict[str, Work]:
    """An AdamW step on `count` float32 parameters in one tensor, all of whose state is resident."""

    def stepping(make: Callable[..., torch.optim.Optimizer], **settings: object) -> Work:
        parameter = nn.Parameter(torch.randn(count, device=device))
        parameter.grad = torch.randn(count, device=device)
        return make([parameter], **settings).step

    def ordinary(*arguments: object, **settings: object) -> PagedAdamW:
        with mock.patch.object(stores.unified_memory, "driver_of", return_value=None):
            return PagedAdamW(*arguments, **settings)

    large = 2**26  # bytes of a page: its update is then much longer than its launch
    return {
        "ours": stepping(PagedAdamW, page_bytes=large),
        "ours, pages of 2 MiB": stepping(PagedAdamW),
        "ours, no unified memory": stepping(ordinary, page_bytes=large),
        "torch fused": stepping(torch.optim.AdamW, fused=True),
    }


def peft_model(shape: Shape, r: int, device: torch.device) -> nn.Module:
    """A random Llama as PEFT and bitsandbytes train it, with checkpointing; the weights are quantized layer by layer."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    def layer(out: int, width: int) -> Linear4bit:
        made = Linear4bit(
            width, out, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16, device="meta"
        )
        dense = torch.randn(out, width, device=device).mul_(0.02).bfloat16()
        made.weight = Params4bit(
            dense, False, quant_type="nf4", compress_statistics=True, module=made
        ).to(device)
        return made

    model = random_llama.fill(random_llama.described(shape), layer, device)
    model.is_loaded_in_4bit = True
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model.activation_checkpointing_enable()
    return get_peft_model(
        model, LoraConfig(r=r, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )


def peft_step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
    """A step on ids (batch, length), all labels, as transformers' Trainer does it in bfloat16."""
    with autocast(ids.device, torch.bfloat16):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.3)
    optimizer.step()
    optimizer.zero_grad()
