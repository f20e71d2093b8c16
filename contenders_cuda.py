"""The same work on a GPU, done by us and by others: what bench_cuda.py puts side by side.

    ours            this project, with its kernels
    bitsandbytes    its functions, and its Linear4bit under PEFT as their documentation trains it
    dense           torch with the weight in bfloat16: no compression to pay for

Everything here runs on a CPU too, slowly, so that it can be rehearsed without a GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import dispatch
from cuda_kernels import managed
from frozen import FrozenWeight
from paged_optim import PagedAdamW
from paper import memory_65b
from predict import Shape

Work = Callable[[], object]


class Layer:
    """One weight (out, in), as each contender keeps it, and what is done with it."""

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        import bitsandbytes

        self.bnb = bitsandbytes
        self.weight = torch.randn(shape, device=device).mul_(0.02).bfloat16()
        self.base, self.out = FrozenWeight(self.weight), torch.empty_like(self.weight)
        self.packed, self.state = self.bnb.functional.quantize_4bit(self.weight, quant_type="nf4", compress_statistics=True)

    def quantizing(self) -> dict[str, Work]:
        """bfloat16 -> NF4, constants in float32."""
        return {"ours": partial(dispatch.quantize, self.weight),
                "bitsandbytes": partial(self.bnb.functional.quantize_4bit, self.weight, quant_type="nf4")}

    def dequantizing(self) -> dict[str, Work]:
        """Double-quantized NF4 -> bfloat16, into a buffer that is there already."""
        q, constants = self.base.stored()
        return {"ours": partial(dispatch.dequantize, q, constants=constants, out=self.out),
                "bitsandbytes": partial(self.bnb.functional.dequantize_4bit, self.packed, self.state, out=self.out)}

    def products(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """x W^T."""
        return {"ours": lambda x: torch.ops.qlora.matmul(x, *dispatch._stored(*self.base.stored()), True),
                "bitsandbytes": lambda x: self.bnb.matmul_4bit(x, self.packed, quant_state=self.state),
                "dense": lambda x: F.linear(x, self.weight)}
