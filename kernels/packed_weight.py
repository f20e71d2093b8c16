"""A weight in 4 bits as operators take it: piece by piece, and looked over before a kernel reads it.

An operator of torch.library takes tensors and numbers, no dataclasses. So nf4's Quantized, and double_quant's DoubleQuantized
where there is one, are laid side by side on the way in (`stored`) and put together again where the reference is to run
(`restored`). Nothing is copied but levels that lie on another device.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

import double_quant
from double_quant import DoubleQuantized
from nf4 import Quantized

SCHEMA = (
    "Tensor packed, Tensor absmax, Tensor codebook, Tensor? nested_absmax, Tensor? nested_offset, "
    "Tensor? nested_codebook, int[] shape, ScalarType dtype, int block_size, int nested_block_size"
)


class Stored(NamedTuple):
    """A weight, in the order of SCHEMA. `absmax` is the codes of the constants, if there are `nested_...`."""

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


def stored(q: Quantized, constants: DoubleQuantized | None) -> Stored:
    """The pieces, with the levels on the device of the codes."""
    codebook = q.codebook.to(q.packed.device)
    if constants is None:
        return Stored(
            q.packed, q.absmax, codebook, None, None, None, q.shape, q.dtype, q.block_size, 1
        )
    return Stored(
        q.packed,
        constants.codes,
        codebook,
        constants.absmax,
        constants.offset,
        constants.codebook.to(q.packed.device),
        q.shape,
        q.dtype,
        q.block_size,
        constants.block_size,
    )


def restored(s: Stored) -> Quantized:
    """The way back, with the constants decoded."""
    constants = None
    if s.nested_absmax is not None:
        constants = DoubleQuantized(
            s.absmax, s.nested_absmax, s.nested_offset, s.nested_block_size, s.nested_codebook
        )
    return decoded(
        Quantized(s.packed, s.absmax, s.codebook, torch.Size(s.shape), s.dtype, s.block_size),
        constants,
    )


def decoded(q: Quantized, constants: DoubleQuantized | None) -> Quantized:
    """The same weight with its constants in float32."""
    if constants is None:
        return q
    # No constant was larger than its weight's dtype can hold, and 0.7 % more would make the largest ones infinite.
    absmax = double_quant.dequantize(constants).clamp_(max=largest(q.dtype))
    return Quantized(q.packed, absmax, q.codebook, q.shape, q.dtype, q.block_size)


def largest(dtype: torch.dtype) -> float:
    """The largest constant that a weight of this dtype has."""
    return min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)


def fits(s: Stored, device: torch.device) -> bool:
    """Whether the pieces are of one weight that kernels can read, on this device: kernels check no index."""
    n, double = math.prod(s.shape), s.nested_absmax is not None
    pieces = [
        (s.packed.flatten(), torch.uint8, (n + 1) // 2),
        (s.codebook, torch.float32, min(s.codebook.numel(), 16)),
        (s.absmax, torch.uint8 if double else torch.float32, -(-n // s.block_size)),
    ]
    if double:
        pieces += [
            (s.nested_absmax, torch.float32, -(-s.absmax.numel() // s.nested_block_size)),
            (s.nested_offset, torch.float32, 1),
            (s.nested_codebook, torch.float32, 256),
        ]
    powers = all(size > 0 and not size & (size - 1) for size in (s.block_size, s.nested_block_size))
    side_by_side = s.packed.is_contiguous() and all(piece.is_contiguous() for piece, _, _ in pieces)
    return (
        n > 0
        and powers
        and side_by_side
        and all(
            piece.dtype == dtype and piece.shape == (count,) and piece.device == device
            for piece, dtype, count in pieces
        )
    )


def product(x: Tensor, dense: Tensor, transposed: bool, bias: Tensor | None) -> Tensor:
    """x W^T + bias or, not transposed, x W, for a dense W: torch's, which with `out` autocast leaves alone."""
    dense = dense.T if transposed else dense
    y = x.new_empty(len(x), dense.shape[1])
    return torch.mm(x, dense, out=y) if bias is None else torch.addmm(bias, x, dense, out=y)
