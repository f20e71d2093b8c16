"""NF4: sixteen levels at the quantiles of a normal distribution, and weights stored as indices into them.

The weights of a trained layer are close to normal around zero, so a 4-bit code should spend its levels where a normal
has its mass. Equation 4 of the paper (QLoRA, section 3, arXiv 2305.14314) asks for the quantiles

    q_i = 1/2 (Q(i / 17) + Q((i + 1) / 17)),   i = 0 ... 15,   Q the inverse cumulative distribution of N(0, 1),

which is -inf at i = 0 and has no exact zero. The code that the authors published, and everyone uses, does this instead:
8 levels from the positive half, 7 from the negative half, one exact zero, all divided by the largest (`normal_float`).

Blockwise quantization (equations 1 and 2). The flattened weight is cut into blocks of 64. Each block is divided by its
largest magnitude, `absmax`, so that it fills [-1, 1]; every number becomes the index of the nearest level:

    code_j = argmin_i | w_j / absmax - level_i |          w'_j = level[code_j] * absmax

Layout, byte for byte that of bitsandbytes:

    weight (out, in)    row-major; blocks run across row ends; the last block may be ragged
    packed (n/2, 1)     uint8: element 2j in the high nibble, element 2j + 1 in the low nibble
    absmax (n/64,)      float32, one a block

Error. |w - w'| <= h * absmax, with h half the widest gap between levels (which must reach from -1 to 1): 0.1519 for NF4,
the gap from -1 to -0.6962. Add the rounding of float32 (the products with 1/absmax and with absmax, the midpoints) and of
the output dtype.

Differs from the paper: the levels, as said. "Every level is used equally often" is not true after division by absmax: the
outermost levels see little but each block's largest number.
Differs from bitsandbytes: NaN and infinity are refused instead of poisoning their block; a block whose absmax is so small
or so large that 1/absmax leaves float32's normal range is scaled by a power of two first instead of being lost; any shape
works, () and (0,) too; codebooks have 2 to 256 levels. In a ragged last block bitsandbytes divides by absmax, we multiply by
the reciprocal as elsewhere, so a number on the edge between two levels may go the other way. Its FP4 has a code for -0.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.special import ndtri
from torch import Tensor


def normal_float(bits: int) -> Tensor:
    """The `bits`-bit NormalFloat code: ascending float32 levels of shape (2**bits,), from -1 to 1 with an exact 0.

    The outermost quantile cannot be 0 or 1, where Q is infinite. It is the mean of 1 - 1/(2 * 2**bits), the centre of the
    last of 2**bits bins, and 1 - 1/(2 * (2**bits - 1)), rounded to seven decimals as published: 0.9677083 at 4 bits.

    >>> [round(level, 4) for level in normal_float(2).tolist()]
    [-1.0, 0.0, 0.4358, 1.0]

    Raises: ValueError unless 2 <= bits <= 8.   Source: paper, section 3 and the code of its authors.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"a NormalFloat code has 2 to 8 bits, got {bits}")
    size, half = 2**bits, 2 ** (bits - 1)
    outermost = round(1 - (1 / (2 * size) + 1 / (2 * (size - 1))) / 2, 7)
    positive = ndtri(torch.linspace(outermost, 0.5, half + 1)[:-1].numpy())  # 2**(bits-1) quantiles
    negative = -ndtri(
        torch.linspace(outermost, 0.5, half)[:-1].numpy()
    )  # one fewer: zero takes the place
    levels = torch.tensor(sorted([*negative.tolist(), 0.0, *positive.tolist()]))
    return levels / levels.max()


NF4 = normal_float(4)

# The 4-bit float that the paper compares with, in the order of its bits: a sign, two of exponent, one of mantissa (with levels
# that are bitsandbytes' own, and the default of its quantizer). Code 8 would be -0; it is read, and never written.
_MAGNITUDES = torch.tensor([0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4])
FP4 = torch.cat([_MAGNITUDES, 0 - _MAGNITUDES])


@dataclass(frozen=True, eq=False)
class Quantized:
    """A blockwise quantized tensor: everything that `dequantize` needs, and nothing else.

    packed      uint8 (ceil(n/2), 1), two codes a byte; (n, 1), one code a byte, for a codebook of more than 16 levels
    absmax      float32 (ceil(n/block_size),)
    codebook    float32, the level of each code
    shape, dtype, block_size of the tensor it came from; n = prod(shape)
    """

    packed: Tensor
    absmax: Tensor
    codebook: Tensor
    shape: torch.Size
    dtype: torch.dtype
    block_size: int


def quantize(weight: Tensor, block_size: int = 64, codebook: Tensor = NF4) -> Quantized:
    """Quantize a floating-point tensor of any shape, strides and dtype, block by block, to the nearest level.

    A number exactly between two levels takes the lower one. Zero stays zero if the codebook holds zero. The levels may stand in
    any order; of two codes for one level, the first is used.
    Error: |weight - dequantize(...)| <= half the widest gap * absmax, plus rounding (see the module).
    Raises: ValueError for a dtype that is not floating point, NaN, infinity or a number beyond float32 (with their count
    and the first index), a block size that is not a power of two >= 2, or a codebook of fewer than two different levels.
    """
    check_arguments(weight, block_size, codebook)
    flat = weight.detach().to(torch.float32).reshape(-1)  # (n,) row-major
    check_finite(flat, weight.shape)
    codebook = codebook.to(flat.device)
    blocks = _into_blocks(flat, block_size)  # (n_blocks, block_size)
    absmax = blocks.abs().amax(1)  # (n_blocks,)

    # 1/absmax overflows for a tiny absmax and loses bits for a huge one. A power of two moves both to safe ground and
    # changes no code. A block of zeros gets the reciprocal 0, and with it the code of zero.
    shift = torch.where(absmax < 2.0**-64, 2.0**64, torch.where(absmax > 2.0**64, 2.0**-64, 1.0))
    reciprocal = torch.where(absmax > 0, 1 / (absmax * shift), 0.0)
    normalised = (blocks * shift[:, None]).mul_(reciprocal[:, None])  # in [-1, 1], up to rounding

    levels, order = codebook.sort(stable=True)
    midpoints = (levels[1:] + levels[:-1]) / 2
    places = torch.bucketize(
        normalised, midpoints, out_int32=True
    )  # midpoint[i-1] < x <= midpoint[i]: levels[i] is nearest
    codes = (
        order[torch.searchsorted(levels, levels)].to(torch.uint8).index_select(0, places.flatten())
    )
    return Quantized(
        _pack(codes, flat.numel(), codebook),
        absmax,
        codebook,
        weight.shape,
        weight.dtype,
        block_size,
    )


def dequantize(q: Quantized, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor of shape q.shape that the codes stand for: level * absmax in float32, then cast to `dtype` (or q.dtype)."""
    n = math.prod(q.shape)
    codebook = q.codebook.to(q.packed.device)
    if (
        codebook.numel() <= 16
    ):  # one look-up decodes both nibbles of a byte, two float32 moved as one 8-byte word
        sixteen = F.pad(codebook, (0, 16 - codebook.numel()))
        pairs = torch.cartesian_prod(
            sixteen, sixteen
        )  # (256, 2): row 16 * high + low holds both levels
        codebook = pairs.view(torch.int64).flatten()  # (256,)
    blocks = codebook.index_select(0, q.packed.flatten().int()).view(torch.float32)[
        :n
    ]  # (n,) levels
    blocks = _into_blocks(
        blocks, q.block_size
    )  # (n_blocks, block_size), a padded copy only if the last block is ragged
    return (
        blocks.mul_(q.absmax[:, None])
        .reshape(-1)[:n]
        .reshape(q.shape)
        .to(q.dtype if dtype is None else dtype)
    )


def _pack(codes: Tensor, n: int, codebook: Tensor) -> Tensor:
    """uint8 codes (n_blocks * block_size,) -> uint8 (ceil(n/2), 1), the first of a pair in the high nibble."""
    if codebook.numel() > 16:
        return codes[:n].reshape(-1, 1)
    pairs = codes[: n + n % 2].reshape(
        -1, 2
    )  # an odd n takes one code of the zeros that fill the last block
    return (pairs[:, :1] << 4) | pairs[:, 1:]


def _into_blocks(flat: Tensor, block_size: int) -> Tensor:
    """(n,) -> (ceil(n/block_size), block_size), the last block filled up with zeros. A view if there is nothing to fill."""
    missing = -flat.numel() % block_size
    return (F.pad(flat, (0, missing)) if missing else flat).reshape(-1, block_size)


def check_arguments(weight: Tensor, block_size: int, codebook: Tensor) -> None:
    if not weight.is_floating_point():
        raise ValueError(f"only floating-point tensors can be quantized, got {weight.dtype}")
    if not isinstance(block_size, int) or block_size < 2 or block_size & (block_size - 1):
        raise ValueError(
            f"the block size must be a power of two >= 2, got {block_size}; the paper uses 64"
        )
    usable = (
        codebook.dim() == 1 and codebook.dtype == torch.float32 and 2 <= codebook.numel() <= 256
    )
    if not usable or not codebook.isfinite().all() or (codebook == codebook[0]).all():
        raise ValueError(
            "a codebook is 2 to 256 finite float32 levels, not all the same, such as nf4.normal_float(4)"
        )


def check_finite(flat: Tensor, shape: torch.Size) -> None:
    """Raise a ValueError with the count and the first index, in a tensor of `shape`, of NaN and infinity among flat (n,)."""
    bad = ~torch.isfinite(flat)
    if bad.any():
        first = torch.unravel_index(bad.nonzero()[0, 0], shape)
        where = tuple(int(i) for i in first)
        raise ValueError(
            f"{int(bad.sum())} of {flat.numel()} weights are NaN, infinite or beyond float32, the first at index {where}: "
            "repair the checkpoint; quantizing would spread them over their blocks"
        )
