"""DoRA: the length of each row of a weight is trained separately from its direction.

LoRA changes both by one low-rank matrix. DoRA (arXiv 2402.09353, equation 5) gives each output o a
trained magnitude m[o]; W' + s B A only sets the direction:

    y = c (x W'^T + s (d(x) A^T) B^T) + b       c = m / n,  n[o] = ||(W' + s B A)[o, :]||

m starts as n, computed by the same formula. So c is exactly 1 at the start, and the output is that
of LoRA. The gradient treats n as a constant (section 4.3 of that paper). So the gradients of A, B
and x are those of LoRA with c g in place of g.

The norm needs no dense matrix. With w[o] = ||W'[o, :]||, which never changes and is computed once,

    n^2 = w^2 + 2 s sum_r B (W' A^T) + s^2 sum_r B (B (A A^T))      sums over the r columns

W' A^T is a product of the frozen weight with the r rows of A. It costs as much as r more tokens in
the forward pass, and nothing in the backward pass. In addition to what LoRAMatmul saves, autograd
saves c, n and the product (tokens, out) before the factor c, which the gradient of m needs.

Layout. m is lora_magnitude_vector.weight (out,), in the dtype of the adapter. w is
lora_magnitude_vector.base_norm (out,). It is not in checkpoints, because the base determines it.

Error. All sums are in float64 except the product with W'. Its error is gamma_in |A| |W'|^T, where
gamma_in bounds the rounding of a sum of `in` products. So the error of n^2 is 2 |s B| times that,
plus the rounding of w. This is small compared with w^2 as long as the update is small. Where the
update cancels a row, the sum may be negative by this error, and is then set to zero. The square of
a float32 number has an exact root in float64. So while B is zero, n equals w bit for bit.

A row of zeros has m = n = 0. c is 1 there, as for any row at the start. Once B gives the row a
direction, c is m / n.

Differs from PEFT: PEFT computes the dense W' + s B A in every forward pass, and gives NaN for a row
of zeros. With dropout, it computes x W'^T + (c - 1) d(x) W'^T in place of c x W'^T, with a second
product; the mean over all masks is the same.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from kernels.dispatch import on_float64_device
from lora import QLoRALinear

ROWS = 1024  # rows of the weight that are converted to float64 at a time
TOKENS = 64  # tokens of y that are converted to the dtype of c at a time


class DoRALinear(QLoRALinear):
    """A QLoRALinear whose rows have a trained magnitude. It always has an adapter: r >= 1."""

    def __init__(self, *args: object, **settings: object) -> None:
        super().__init__(*args, **settings)
        self.reset_magnitude()
        # A state_dict may bring another base, and has no base_norm.
        self.register_load_state_dict_post_hook(DoRALinear._measure_base)

    def reset_magnitude(self) -> None:
        """Set m to the row norms of W' + s B A as they are now, so that c is 1."""
        self.lora_magnitude_vector = Magnitude(self._norm_of_base())
        self.lora_magnitude_vector.weight = nn.Parameter(self.row_norm())

    def _norm_of_base(self) -> Tensor:
        """w (out,), the norm of each row of W'."""
        rows = self.base(self.lora_A.dtype).split(ROWS)
        squares = torch.cat([float64(piece).square().sum(1) for piece in rows])  # (out,)
        return squares.sqrt().to(self.lora_A)

    def _measure_base(self, *_: object) -> None:
        self.lora_magnitude_vector.base_norm.copy_(self._norm_of_base())

    @torch.no_grad()
    def row_norm(self) -> Tensor:
        """n (out,), the norm of each row of W' + s B A."""
        base_norm = self.lora_magnitude_vector.base_norm
        with torch.autocast(base_norm.device.type, enabled=False):
            A = float64(self.lora_A)  # (r, in)
            B = float64(self.lora_B) * self.scaling  # (out, r)
            cross = float64(self.base.matmul(self.lora_A)).T  # (out, r)
            squares = float64(base_norm).square()
            squares += (B * (2 * cross + B @ (A @ A.T))).sum(1)
        return squares.clamp(min=0).sqrt().to(base_norm)

    def scale(self) -> Tensor:
        """c = m / n (out,); 1 where n is 0."""
        norm = self.row_norm()
        nonzero = norm > 0
        ratio = self.lora_magnitude_vector.weight / norm.where(nonzero, 1)
        return ratio.where(nonzero, 1)

    def matmul(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (tokens, in) -> c (x W'^T + s (d(x) A^T) B^T) + bias: (tokens, out)."""
        y = super().matmul(x, bias)
        return ScaleRows.apply(y, self.scale(), bias)

    def update(self) -> Tensor:
        """What the adapter adds to the weight: c (W' + s B A) - W' (out, in)."""
        update = super().update()
        c = self.scale().detach()[:, None]  # (out, 1)
        return (c - 1) * self.base(update.dtype) + c * update


def float64(tensor: Tensor) -> Tensor:
    return on_float64_device(tensor).double()


class Magnitude(nn.Module):
    """Holds m, under PEFT's name lora_magnitude_vector.weight, and w, which never changes."""

    def __init__(self, base_norm: Tensor) -> None:
        super().__init__()
        self.register_buffer("base_norm", base_norm, persistent=False)


class ScaleRows(torch.autograd.Function):
    """c (y - b) + b in the dtype of y; y itself, bit for bit, where c is 1.

    It is computed in the dtype of c: in bfloat16, 1.003 would round to 1. Only a few tokens are
    converted at a time, so all of y never exists in the wider dtype.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, y: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
        """y (tokens, out), c (out,), bias (out,) -> c y + (1 - c) b (tokens, out)."""
        ctx.save_for_backward(y, c, bias)
        result = torch.empty_like(y)
        for tokens, out in zip(y.split(TOKENS), result.split(TOKENS)):
            out.copy_(tokens * c if bias is None else tokens * c + (1 - c) * bias)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, g: Tensor) -> tuple[Tensor | None, ...]:
        """g (tokens, out) -> the gradients of y, c and b: c g, sum g (y - b), (1 - c) sum g."""
        y, c, bias = ctx.saved_tensors
        dy = torch.empty_like(y)
        dc = torch.zeros_like(c)
        g_sum = torch.zeros_like(c)
        for g_tokens, y_tokens, dy_tokens in zip(
            g.split(TOKENS), y.split(TOKENS), dy.split(TOKENS)
        ):
            dy_tokens.copy_(g_tokens * c)
            dc += (g_tokens.to(c.dtype) * y_tokens).sum(0)
            g_sum += g_tokens.sum(0, dtype=c.dtype)
        if bias is None:
            return dy, dc, None
        return dy, dc - g_sum * bias, (1 - c) * g_sum
