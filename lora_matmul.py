"""The product of a frozen weight with a low-rank update beside it, and its gradients by hand.

    y = x W'^T + b + s (d(x) A^T) B^T        W' = the dequantized weight,  s = lora_alpha / r,  d = dropout

(paper, section 3, equations 3 and 5). With g = dL/dy and h = d(x) A^T (tokens, r), the chain rule by hand:

    dL/dB = s g^T h        dL/dh = s g B        dL/dA = (dL/dh)^T d(x)        dL/dx = g W' + d'((dL/dh) A)

No gradient for W is wanted, so x is kept for A alone, and W' is needed only while it multiplies: piece by piece, once in
forward and once more in backward. What lives on between the two, besides the parameters, is x (tokens, in),
h (tokens, r), and with dropout its mask, one bool for each element of x.

Differs from PEFT: base and adapter are one autograd function, and what it keeps is chosen, not left to autograd.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from frozen import FrozenWeight


class LoRAMatmul(torch.autograd.Function):
    """y = x W^T + b + s (keep x A^T) B^T, where base.matmul(x, bias=b) is x W^T + b and base.matmul(g, False) is g W."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        keep: Tensor | None,
        scaling: float,
        base: FrozenWeight,
    ) -> Tensor:
        """x (tokens, in), lora_A (r, in), lora_B (out, r), bias (out,), keep bool (tokens, in) -> (tokens, out)."""
        with torch.autocast(x.device.type, enabled=False):
            y = base.matmul(x, bias=bias)  # (tokens, out)
            h = F.linear(x if keep is None else x * keep, lora_A.to(x.dtype))  # (tokens, r)
            y.addmm_(h, lora_B.to(x.dtype).T, alpha=scaling)
        needs_A, needs_B = ctx.needs_input_grad[1:3]
        ctx.save_for_backward(x if needs_A else None, h if needs_B else None, keep, lora_A, lora_B)
        ctx.scaling, ctx.base = scaling, base
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, g: Tensor) -> tuple[Tensor | None, ...]:
        """g (tokens, out) -> the gradients of x, lora_A, lora_B and bias. A second derivative is refused."""
        x, h, keep, lora_A, lora_B = ctx.saved_tensors
        needs_x, needs_A, needs_B, needs_bias = ctx.needs_input_grad[:4]
        dx = None
        with torch.autocast(g.device.type, enabled=False):
            dh = (g @ lora_B.to(g.dtype)).mul_(ctx.scaling)  # (tokens, r)
            dB = (g.T @ h).mul_(ctx.scaling).to(lora_B.dtype) if needs_B else None  # (out, r)
            dA = (
                (dh.T @ (x if keep is None else x * keep)).to(lora_A.dtype) if needs_A else None
            )  # (r, in)
            if needs_x:
                dx = ctx.base.matmul(g, transposed=False)  # (tokens, in)
                A = lora_A.to(g.dtype)
                dx = dx.addmm_(dh, A) if keep is None else dx.add_((dh @ A).mul_(keep))
        return dx, dA, dB, g.sum(0) if needs_bias else None, None, None, None
