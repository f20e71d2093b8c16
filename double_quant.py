"""Double quantization: the quantization constants are numbers too, so quantize them as well.

NF4 with blocks of 64 keeps one float32 `absmax` for every 64 weights: 32/64 = 0.5 bit a weight, an eighth of all storage.
These constants are themselves cut into blocks, of 256, and stored as 8-bit codes (paper, section 3, "Double
Quantization"; equation 6 writes the two dequantizations one inside the other, the outer constant c1, the inner c2):

    w' = level[code] * absmax'            absmax' = level8[code8] * nested_absmax + offset

Storage, in bits a weight:

    codes of the weights      4                                     4
    constants                 32/64                  = 0.5    ->    8/64 + 32/(64 * 256) = 0.127
                                                       4.5          4.127, and one float32 mean a tensor

absmax is positive; a code with a sign would waste half its levels on it. So the mean (`offset`) is taken off first.

The 8-bit code is dynamic: its decimal exponent takes up more or fewer of the bits, so that it is fine near 0 (5.5e-7...) and
reaches 1: 7 decades with 2, 4 ... 128 levels, both signs counted, and 0 and 1. 127 of the 256 are negative; there is no -1.

Error. |absmax - absmax'| <= h8 * nested_absmax plus float32 rounding, h8 = 0.0070 (half the widest gap, or the missing -1).
A weight of exactly 0 stays 0 whatever becomes of its absmax, because NF4 has an exact zero: so does a block of zeros.

Differs from bitsandbytes: its CPU code rounds some constants to the second-nearest level, ours none (but for float32
rounding at a midpoint); absmax' is clamped to [0, largest float32], where it could come out slightly negative and turn the
sign of a whole block.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import nf4


def dynamic_code() -> Tensor:
    """The signed dynamic-exponent 8-bit code: 256 ascending float32 levels.

    Decade i of 7 holds the midpoints of 2**i equal steps from 0.1 to 1, times 10**(i - 6), with both signs.

    >>> code = dynamic_code()
    >>> code[127].item(), code[255].item(), round(code[0].item(), 6), round(code[128].item(), 9)
    (0.0, 1.0, -0.992969, 5.5e-07)
    """
    levels = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        decade = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        levels += [*decade.tolist(), *(-decade).tolist()]
    return torch.tensor(sorted(levels))


DYNAMIC = dynamic_code()


@dataclass(frozen=True, eq=False)
class DoubleQuantized:
    """The constants of one tensor in 8 bits.

    codes       uint8, the shape of the constants
    absmax      float32 (ceil(n/block_size),), the largest |constant - offset| of each block (`nested_absmax`)
    offset      float32 (1,), the mean that was taken off
    codebook    float32 (256,); a checkpoint brings its own, which should be DYNAMIC to the last bit or nearly
    """

    codes: Tensor
    absmax: Tensor
    offset: Tensor
    block_size: int = 256
    codebook: Tensor = DYNAMIC


def quantize(
    absmax: Tensor, block_size: int = 256, blockwise: Callable[..., nf4.Quantized] = nf4.quantize
) -> DoubleQuantized:
    """Quantize constants (float32, any shape, >= 0) to 8 bits: nf4's blockwise quantizer, or a faster one, with another code.

    Error: |absmax - dequantize(...)| <= h8 * nested_absmax of its block, plus rounding.
    Raises: ValueError for a negative constant, and all that `nf4.quantize` refuses.
    """
    absmax = absmax.to(torch.float32)
    nf4.check_finite(
        absmax.reshape(-1), absmax.shape
    )  # now: the mean would spread it over all constants
    if (absmax < 0).any():
        raise ValueError(f"quantization constants are magnitudes >= 0, got {absmax.min().item()}")
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    if offset.isinf():  # float32's sum overflowed
        offset = absmax.double().mean().float()
    q = blockwise(absmax - offset, block_size, DYNAMIC)
    return DoubleQuantized(
        q.packed.reshape(absmax.shape), q.absmax, offset.reshape(1), block_size, q.codebook
    )


def dequantize(dq: DoubleQuantized) -> Tensor:
    """The constants, float32, in the shape that they came in."""
    centred = nf4.Quantized(
        dq.codes, dq.absmax, dq.codebook, dq.codes.shape, torch.float32, dq.block_size
    )
    return (
        (nf4.dequantize(centred) + dq.offset)
        .clamp_(0, torch.finfo(torch.float32).max)
        .reshape(dq.codes.shape)
    )
