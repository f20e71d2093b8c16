"""DoRA: the length of each row of a weight is trained apart from its direction.

LoRA changes both by one small matrix. DoRA (arXiv 2402.09353, equation 5) gives each output o a trained magnitude m[o], and
leaves only the direction to W' + s B A:

    y = c (x W'^T + s (d(x) A^T) B^T) + b        c = m / n,  n[o] = ||(W' + s B A)[o, :]||

m starts as n, found by the same formula, so that c is exactly 1 and training starts at the output that LoRA starts at. The
gradient takes n for a constant (section 4.3 of that paper), so that those of A, B and x are LoRA's for the gradient c g.

The norm needs no dense matrix. With w[o] = ||W'[o, :]||, which never changes and is found once,

    n^2 = w^2 + 2 s sum_r B (W' A^T) + s^2 sum_r B (B (A A^T))        sums over the columns of (out, r)

where W' A^T is a product of the frozen weight with the r rows of A: like r more tokens in the forward pass, and none in the
backward pass. Besides what LoRAMatmul keeps, autograd keeps c, n and the product before c (tokens, out), which m needs.

Error: all is summed in float64, small as it is, but the product with W', which is off by gamma_in |A| |W'|^T. So n^2 is off by
2 |s B| times that, and by the rounding of w: little beside w^2 as long as the update is small. Where it cancels a row, the sum
may fall that much below zero, and is then taken for zero. The square of a float32 number has an exact root in float64: while
B is zero, n is w to the bit.

A row of zeros has m = n = 0. Then c is 1, as it is for any row at the start; once B gives the row a direction, c is m / n.

Differs from PEFT: it makes W' + s B A, dense, in every forward pass, and a row of zeros is NaN there. While it trains with
dropout, c x W'^T is x W'^T + (c - 1) d(x) W'^T there, with a second product; the mean over all masks is the same.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

if TYPE_CHECKING:
    from lora import FrozenWeight

ROWS, TOKENS = 1024, 64  # of a weight, and of y, that are in a wider dtype at once


class Magnitude(nn.Module):
    """The trained length of each row of a layer's weight, and c. Both come to be with the layer's A and B as they then are.

    weight (out,): m, in the dtype of the adapter. base_norm (out,): w, a buffer that is not saved, because the base has it.
    """

    def __init__(
        self, base: "FrozenWeight", lora_A: Tensor, lora_B: Tensor, scaling: float
    ) -> None:
        super().__init__()
        rows = base(lora_A.dtype).split(ROWS)
        squares = torch.cat([piece.double().square().sum(1) for piece in rows])
        self.register_buffer("base_norm", squares.sqrt().to(lora_A.dtype), persistent=False)
        self.weight = nn.Parameter(self.norm(base, lora_A, lora_B, scaling))

    @torch.no_grad()
    def norm(self, base: "FrozenWeight", lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        """n = ||W' + s B A||, row by row (out,)."""
        with torch.autocast(lora_A.device.type, enabled=False):
            A, B = lora_A.double(), lora_B.double() * scaling  # (r, in), (out, r)
            crossed = base.matmul(lora_A).double().T  # (out, r)
            squares = self.base_norm.double().square() + (B * (2 * crossed + B @ (A @ A.T))).sum(1)
        return squares.clamp(min=0).sqrt().to(self.base_norm.dtype)

    def forward(
        self, base: "FrozenWeight", lora_A: Tensor, lora_B: Tensor, scaling: float
    ) -> Tensor:
        """c = m / n (out,); 1 where n is 0."""
        norm = self.norm(base, lora_A, lora_B, scaling)
        return (self.weight / norm.where(norm > 0, 1)).where(norm > 0, 1)


class Scaled(torch.autograd.Function):
    """c times what is above the bias in y, in y's dtype; y itself, to the bit, where c is 1.

    Computed in c's dtype, in which 1.003 is not 1 as in bfloat16; a few tokens at a time, so that y is never whole in it.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, y: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
        """y (tokens, out), c (out,), bias (out,) -> c y + (1 - c) b (tokens, out)."""
        ctx.save_for_backward(y, c, bias)
        result = torch.empty_like(y)
        for here, there in zip(y.split(TOKENS), result.split(TOKENS)):
            there.copy_(here * c if bias is None else here * c + (1 - c) * bias)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, g: Tensor) -> tuple[Tensor | None, ...]:
        """g (tokens, out) -> the gradients of y, c g; of c, that of all tokens' g (y - b); and of b, (1 - c) g."""
        y, c, bias = ctx.saved_tensors
        dy, dc, total = torch.empty_like(y), torch.zeros_like(c), torch.zeros_like(c)
        for here, there, piece in zip(y.split(TOKENS), dy.split(TOKENS), g.split(TOKENS)):
            there.copy_(piece * c)
            dc += (piece.to(c.dtype) * here).sum(0)
            total += piece.sum(0, dtype=c.dtype)
        return (
            dy,
            dc if bias is None else dc - total * bias,
            None if bias is None else (1 - c) * total,
        )
