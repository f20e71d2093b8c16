"""Double quantization: the quantization constants are quantized too.

NF4 with blocks of 64 stores one float32 constant, `absmax`, for every 64 weights. This costs
32/64 = 0.5 bits per weight, a ninth of the storage. So the constants are quantized as well, to
8 bits, in blocks of 256 (paper, section 3, "Double Quantization"). Equation 6 writes both
dequantizations as one formula, with c1 for the outer constants and c2 for the inner ones:

    w' = level[code] * absmax'            absmax' = level8[code8] * nested_absmax + offset

Storage in bits per weight:

    codes of the weights      4                                     4
    constants                 32/64                  = 0.5    ->    8/64 + 32/(64 * 256) = 0.127
    sum                                                4.5          4.127, and one float32 mean

absmax is positive, so half of the levels of a signed code would never be used. To use them, the
mean of the constants, `offset`, is subtracted first.

The 8-bit code is a dynamic float: with more bits for the exponent, fewer are left for the fraction.
Its steps are small near 0 (the smallest positive level is 5.5e-7), and its largest level is 1. Its
levels are 0, 1 and 7 decades of 2, 4, ... 128 levels, half of them negative. So 127 of the 256
levels are negative, and -1 is not a level.

Error. |absmax - absmax'| <= h8 * nested_absmax plus float32 rounding. h8 = 0.0070 is half the
widest gap, and also the distance from -1 to the lowest level.
A weight of exactly 0 stays 0 with any absmax', because NF4 has an exact zero. This also covers a
block of zeros.

Differs from bitsandbytes: its CPU code rounds some constants to the second-nearest level; here each
constant takes the nearest one, up to float32 rounding at a midpoint. absmax' is clamped to
[0, largest float32]: without this it can be slightly negative, which flips the signs of a block.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import nf4


def dynamic_code() -> Tensor:
    """The signed dynamic 8-bit code: 256 ascending float32 levels.

    Decade i = 0 ... 6 has the midpoints of 2**i equal steps from 0.1 to 1, times 10**(i - 6), with
    both signs.

    >>> code = dynamic_code()
    >>> code[127].item(), code[255].item(), round(code[0].item(), 6), round(code[128].item(), 9)
    (0.0, 1.0, -0.992969, 5.5e-07)
    """
    levels = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        decade = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        levels += decade.tolist()
        levels += (-decade).tolist()
    return torch.tensor(sorted(levels))


DYNAMIC = dynamic_code()


@dataclass(frozen=True, eq=False)
class DoubleQuantized:
    """The quantization constants of one tensor, quantized to 8 bits.

    codes       uint8, in the shape of the constants
    absmax      float32 (ceil(n/block_size),), the largest |constant - offset| of each block;
                `nested_absmax` in checkpoints
    offset      float32 (1,), the mean that was subtracted
    codebook    float32 (256,); a checkpoint stores its own, equal to DYNAMIC up to rounding
    """

    codes: Tensor
    absmax: Tensor
    offset: Tensor
    block_size: int = 256
    codebook: Tensor = DYNAMIC


def quantize(
    absmax: Tensor, block_size: int = 256, quantizer: Callable[..., nf4.Quantized] = nf4.quantize
) -> DoubleQuantized:
    """Quantize a tensor of constants >= 0, of any shape, to 8 bits.

    Their mean is right also where a float32 sum overflows; without constants it is 0.
    quantizer: nf4.quantize, or a faster function with the same result.
    Error: |absmax - dequantize(...)| <= h8 * nested_absmax of its block, plus rounding.
    Raises: ValueError for a negative constant, and wherever `nf4.quantize` does.
    """
    absmax = absmax.to(torch.float32)
    nf4.check_finite(absmax.reshape(-1), absmax.shape)  # before the mean: it would spread a NaN
    if (absmax < 0).any():
        raise ValueError(f"quantization constants must be >= 0, got {absmax.min().item()}")
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    if offset.isinf():  # the float32 sum overflowed
        offset = absmax.cpu().double().mean().to(absmax)  # some devices have no float64
    q = quantizer(absmax - offset, block_size, DYNAMIC)
    codes = q.packed.reshape(absmax.shape)
    return DoubleQuantized(codes, q.absmax, offset.reshape(1), block_size, q.codebook)


def dequantize(dq: DoubleQuantized) -> Tensor:
    """The constants, float32, in their original shape."""
    shape = dq.codes.shape
    q = nf4.Quantized(dq.codes, dq.absmax, dq.codebook, shape, torch.float32, dq.block_size)
    absmax = nf4.dequantize(q) + dq.offset
    return absmax.clamp_(0, torch.finfo(torch.float32).max).reshape(shape)
