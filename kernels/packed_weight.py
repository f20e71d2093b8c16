"""Flattens a quantized weight into the arguments of an operator, and validates them.

An operator of torch.library takes tensors and numbers, no dataclasses. So `flatten` puts the
fields of nf4.Quantized, and those of double_quant.DoubleQuantized if there is one, into one tuple.
`unflatten` rebuilds the weight for the reference. Nothing is copied except levels that are on
another device.
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


class PackedWeight(NamedTuple):
    """A weight in 4 bits, in the order of SCHEMA.

    With double quantization `absmax` holds 8-bit codes, and the `nested_...` tensors decode them.
    """

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


def flatten(q: Quantized, constants: DoubleQuantized | None) -> PackedWeight:
    """The weight as a tuple, with the levels on the device of the codes."""
    absmax = q.absmax
    nested = (None, None, None)
    nested_block_size = 1
    if constants is not None:
        absmax = constants.codes
        nested = (constants.absmax, constants.offset, constants.codebook.to(q.packed.device))
        nested_block_size = constants.block_size
    codebook = q.codebook.to(q.packed.device)
    layout = (q.shape, q.dtype, q.block_size, nested_block_size)
    return PackedWeight(q.packed, absmax, codebook, *nested, *layout)


def unflatten(w: PackedWeight) -> Quantized:
    """The weight as nf4.dequantize takes it, with its constants decoded to float32."""
    shape = torch.Size(w.shape)
    q = Quantized(w.packed, w.absmax, w.codebook, shape, w.dtype, w.block_size)
    if w.nested_absmax is None:
        return q
    constants = DoubleQuantized(
        w.absmax, w.nested_absmax, w.nested_offset, w.nested_block_size, w.nested_codebook
    )
    return with_decoded_absmax(q, constants)


def with_decoded_absmax(q: Quantized, constants: DoubleQuantized | None) -> Quantized:
    """The same weight with its constants decoded to float32."""
    if constants is None:
        return q
    # A constant never exceeds the largest number of its weight's dtype. Decoding may increase it by
    # 0.7 %, which would make the largest weights infinite.
    absmax = double_quant.dequantize(constants).clamp_(max=largest_absmax(q.dtype))
    return Quantized(q.packed, absmax, q.codebook, q.shape, q.dtype, q.block_size)


def largest_absmax(dtype: torch.dtype) -> float:
    """The largest constant that a weight of this dtype can have."""
    return min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)


def is_valid_on(w: PackedWeight, device: torch.device) -> bool:
    """Whether kernels on this device can safely read the weight; they do not check indices."""
    n = math.prod(w.shape)
    is_double = w.nested_absmax is not None
    absmax_dtype = torch.uint8 if is_double else torch.float32
    expected = [  # (tensor, dtype, number of elements)
        (w.packed.flatten(), torch.uint8, (n + 1) // 2),
        (w.codebook, torch.float32, min(w.codebook.numel(), 16)),
        (w.absmax, absmax_dtype, -(-n // w.block_size)),
    ]
    if is_double:
        nested_blocks = -(-w.absmax.numel() // w.nested_block_size)
        expected += [
            (w.nested_absmax, torch.float32, nested_blocks),
            (w.nested_offset, torch.float32, 1),
            (w.nested_codebook, torch.float32, 256),
        ]
    for piece, dtype, count in expected:
        has_layout = piece.dtype == dtype and piece.shape == (count,) and piece.is_contiguous()
        if not has_layout or piece.device != device:
            return False
    block_sizes = (w.block_size, w.nested_block_size)
    are_powers_of_two = all(size > 0 and size & (size - 1) == 0 for size in block_sizes)
    return n > 0 and are_powers_of_two and w.packed.is_contiguous()


def dense_matmul(x: Tensor, dense: Tensor, transposed: bool, bias: Tensor | None) -> Tensor:
    """x W^T + bias or, not transposed, x W, for a dense W (out, in).

    The result is written to `out`: autocast does not cast the operands of such a product.
    """
    dense = dense.T if transposed else dense
    y = x.new_empty(len(x), dense.shape[1])
    return torch.mm(x, dense, out=y) if bias is None else torch.addmm(bias, x, dense, out=y)
