"""The same work on a GPU, done by us and by the peers.

    ours            this project, with its kernels
    bitsandbytes    its functions, and its Linear4bit under PEFT, as their documentation shows
    dense           torch with the weight in bfloat16: no compression to pay for

All of it also runs on a CPU, slowly, so that it can be tested without a GPU.
"""

from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from bitsandbytes import matmul_4bit
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn

from bench import random_llama
from bench.peers import BNB_NF4, Product, product_and_gradient
from bench.turns import Work
from kernels import dispatch
from lora import FrozenWeight
from memory.formula import Shape
from paged_optim import PagedAdamW
from training.dtypes import autocast


class Layer:
    """One random weight (out, in) as each peer stores it."""

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        self.weight = torch.randn(shape, device=device).mul_(0.02).bfloat16()
        self.base = FrozenWeight(self.weight)
        self.out = torch.empty_like(self.weight)
        self.packed, self.state = quantize_4bit(self.weight, **BNB_NF4)

    def quantizing(self) -> dict[str, Work]:
        """bfloat16 -> NF4, the constants in float32."""
        return {
            "ours": partial(dispatch.quantize, self.weight),
            "bitsandbytes": partial(quantize_4bit, self.weight, quant_type="nf4", blocksize=64),
        }

    def dequantizing(self) -> dict[str, Work]:
        """Double-quantized NF4 -> bfloat16, into an existing buffer."""
        q, constants = self.base.packed_state()
        out = self.out if self.out.is_cuda else None  # bitsandbytes takes none on a CPU
        return {
            "ours": partial(dispatch.dequantize, q, constants=constants, out=self.out),
            "bitsandbytes": partial(dequantize_4bit, self.packed, self.state, out=out),
        }

    def products(self) -> dict[str, Product]:
        """x -> x W^T."""
        return {
            "ours": self.base.matmul,
            "dense": partial(F.linear, weight=self.weight),
            "bitsandbytes": partial(matmul_4bit, B=self.packed, quant_state=self.state),
        }

    def multiplying(self, rows: int) -> dict[str, Work]:
        """x W^T without gradients."""
        x = self._random(rows, self.weight.shape[1])
        products = self.products()
        return {name: torch.no_grad()(partial(product, x)) for name, product in products.items()}

    def both_ways(self, rows: int) -> dict[str, Work]:
        """x W^T and the gradient of x."""
        n_out, n_in = self.weight.shape
        x = self._random(rows, n_in)
        g = self._random(rows, n_out)
        products = self.products()
        return {
            name: partial(product_and_gradient, product, x, g) for name, product in products.items()
        }

    def _random(self, rows: int, width: int) -> Tensor:
        return torch.randn(rows, width, device=self.weight.device).bfloat16()


def updating(count: int, device: torch.device) -> dict[str, Work]:
    """An AdamW step on one tensor of `count` float32 parameters, with all its state resident."""

    def stepping(make: Callable[..., torch.optim.Optimizer], **settings: object) -> Work:
        parameter = nn.Parameter(torch.randn(count, device=device))
        parameter.grad = torch.randn(count, device=device)
        return make([parameter], **settings).step

    def without_unified_memory(*arguments: object, **settings: object) -> PagedAdamW:
        with mock.patch("cuda_kernels.unified_memory.driver_of", return_value=None):
            return PagedAdamW(*arguments, **settings)

    large = 2**26  # bytes of a page: its update takes much longer than its launch
    return {
        "ours": stepping(PagedAdamW, page_bytes=large),
        "ours, pages of 2 MiB": stepping(PagedAdamW),
        "ours, no unified memory": stepping(without_unified_memory, page_bytes=large),
        "torch fused": stepping(torch.optim.AdamW, fused=True),
    }


def peft_model(shape: Shape, r: int, device: torch.device) -> nn.Module:
    """A random Llama as PEFT and bitsandbytes train it, with checkpointing.

    The weights are created and quantized layer by layer.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    def layer(n_out: int, n_in: int) -> Linear4bit:
        linear = Linear4bit(
            n_in, n_out, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16, device="meta"
        )
        dense = torch.randn(n_out, n_in, device=device).mul_(0.02).bfloat16()
        linear.weight = Params4bit(
            dense, False, quant_type="nf4", compress_statistics=True, module=linear
        ).to(device)
        return linear

    model = random_llama.fill(random_llama.skeleton(shape), layer, device)
    model.is_loaded_in_4bit = True
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model.activation_checkpointing_enable()
    config = LoraConfig(r=r, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def peft_step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
    """A bfloat16 step of transformers' Trainer on ids (batch, length), all of them labels."""
    with autocast(ids.device, torch.bfloat16):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.3)
    optimizer.step()
    optimizer.zero_grad()
