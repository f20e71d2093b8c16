"""NF4: a 4-bit code whose 16 levels are quantiles of a normal distribution.

The weights of a trained layer are close to normally distributed around zero. So a 4-bit code should
place its levels where a normal distribution has its mass. Equation 4 of the paper (QLoRA, section
3, arXiv 2305.14314) takes the quantiles

    q_i = 1/2 (Q(i / 17) + Q((i + 1) / 17)),   i = 0 ... 15,   Q the inverse CDF of N(0, 1).

But this is -inf at i = 0 and has no exact zero. The code that the authors published, and that
everyone uses, takes 8 levels from the positive half, 7 from the negative half and one exact zero,
and divides all by the largest (`normal_float`).

Blockwise quantization (equations 1 and 2). The flattened weight is split into blocks of 64. Each
block is divided by its largest magnitude, `absmax`, so it fills [-1, 1]. Each number is then stored
as the index of the nearest level:

    code_j = argmin_i | w_j / absmax - level_i |          w'_j = level[code_j] * absmax

Layout, with the same bytes as in bitsandbytes:

    weight (out, in)    row-major; blocks continue across rows; the last block may be shorter
    packed (n/2, 1)     uint8: element 2j in the high nibble, element 2j + 1 in the low nibble
    absmax (n/64,)      float32, one per block

Error. |w - w'| <= h * absmax plus rounding. h is half the widest gap between levels, if these reach
from -1 to 1: 0.1519 for NF4, from the gap between -1 and -0.6962. The rounding is that of float32
(the products with 1/absmax and with absmax, the midpoints) and of the output dtype.

Differs from the paper: the levels, as above. "Each level is used equally often" does not hold after
the division by absmax: the outermost levels are used for little but the largest number of a block.
Differs from bitsandbytes: NaN and infinity are refused, where they would spoil their block. A block
whose 1/absmax is outside the normal range of float32 is scaled by a power of two first, where it
would be lost. Any shape works, also () and (0,). Codebooks have 2 to 256 levels. For a shorter last
block bitsandbytes divides by absmax, where we multiply by the reciprocal as in the others, so a
number at the midpoint of two levels may take the other one. Its FP4 has a code for -0.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.special import ndtri
from torch import Tensor


def normal_float(bits: int) -> Tensor:
    """The NormalFloat code: ascending float32 levels (2**bits,), from -1 to 1 with an exact 0.

    The outermost quantile cannot be 0 or 1, where Q is infinite. It is the mean of the centers of
    the last of 2**bits and of the last of 2**bits - 1 bins, rounded to seven decimals as published:
    0.9677083 at 4 bits.

    >>> [round(level, 4) for level in normal_float(2).tolist()]
    [-1.0, 0.0, 0.4358, 1.0]

    Raises: ValueError unless 2 <= bits <= 8.   Source: paper, section 3, and the authors' code.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"a NormalFloat code has 2 to 8 bits, got {bits}")
    size = 2**bits
    half = 2 ** (bits - 1)
    outermost = round(1 - (1 / (2 * size) + 1 / (2 * (size - 1))) / 2, 7)
    # Zero takes the place of one negative level.
    positive = ndtri(torch.linspace(outermost, 0.5, half + 1)[:-1].numpy())  # (half,)
    negative = -ndtri(torch.linspace(outermost, 0.5, half)[:-1].numpy())  # (half - 1,)
    levels = torch.tensor(sorted([*negative.tolist(), 0.0, *positive.tolist()]))
    return levels / levels.max()


NF4 = normal_float(4)

# The 4-bit float that the paper compares with: 1 sign, 2 exponent and 1 mantissa bit, in the order
# of these bits, with the levels of bitsandbytes. Code 8 would be -0: it is read, but never written.
_MAGNITUDES = torch.tensor([0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4])
FP4 = torch.cat([_MAGNITUDES, 0 - _MAGNITUDES])


@dataclass(frozen=True, eq=False)
class Quantized:
    """A blockwise quantized tensor: exactly what `dequantize` needs.

    packed      uint8 (ceil(n/2), 1), two codes per byte; (n, 1), one code per byte, for more than
                16 levels
    absmax      float32 (ceil(n/block_size),)
    codebook    float32, the level of each code
    shape, dtype, block_size of the original tensor; n = prod(shape)
    """

    packed: Tensor
    absmax: Tensor
    codebook: Tensor
    shape: torch.Size
    dtype: torch.dtype
    block_size: int


def quantize(weight: Tensor, block_size: int = 64, codebook: Tensor = NF4) -> Quantized:
    """Quantize a floating-point tensor of any shape and strides, block by block.

    A number exactly between two levels takes the lower one. Zero stays zero if the codebook has
    zero. The levels may be in any order; of two codes for one level, the first is used.
    Error: |weight - dequantize(...)| <= half the widest gap * absmax, plus rounding.
    Raises: ValueError for a dtype that is not floating-point; for NaN, infinity or a number beyond
    float32, with the count and the first index; for a block size that is not a power of two >= 2;
    for a codebook of fewer than two different levels.
    """
    check_arguments(weight, block_size, codebook)
    flat = weight.detach().to(torch.float32).reshape(-1)  # (n,) row-major
    check_finite(flat, weight.shape)
    codebook = codebook.to(flat.device)
    blocks = _into_blocks(flat, block_size)  # (n_blocks, block_size)
    absmax = blocks.abs().amax(1)  # (n_blocks,)
    codes = _nearest(_normalize(blocks, absmax), codebook).flatten()  # (n_blocks * block_size,)
    packed = _pack(codes, flat.numel(), codebook)
    return Quantized(packed, absmax, codebook, weight.shape, weight.dtype, block_size)


def dequantize(q: Quantized, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor level * absmax, computed in float32 and cast to `dtype` (default q.dtype)."""
    n = math.prod(q.shape)
    levels = _unpack(q.packed, q.codebook.to(q.packed.device))[:n]  # (n,)
    blocks = _into_blocks(levels, q.block_size)  # (n_blocks, block_size)
    blocks.mul_(q.absmax[:, None])
    return blocks.flatten()[:n].reshape(q.shape).to(dtype or q.dtype)


def _normalize(blocks: Tensor, absmax: Tensor) -> Tensor:
    """Divide blocks (n_blocks, block_size) by absmax (n_blocks,), to [-1, 1] up to rounding."""
    # 1/absmax overflows for a tiny absmax and loses bits for a huge one. Scaling both by a power of
    # two avoids this and changes no code. A block of zeros gets the reciprocal 0, and so code of 0.
    shift = torch.where(absmax < 2.0**-64, 2.0**64, torch.where(absmax > 2.0**64, 2.0**-64, 1.0))
    reciprocal = torch.where(absmax > 0, 1 / (absmax * shift), 0.0)
    return (blocks * shift[:, None]).mul_(reciprocal[:, None])


def _nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """The code of the nearest level, uint8 in the shape of x; the lower one of two as near."""
    levels, order = codebook.sort(stable=True)
    first = torch.searchsorted(levels, levels)  # of equal levels, the first
    codes = order[first].to(torch.uint8)
    midpoints = (levels[1:] + levels[:-1]) / 2
    # midpoints[i - 1] < x <= midpoints[i] means that levels[i] is the nearest.
    places = torch.bucketize(x, midpoints, out_int32=True)
    return codes.index_select(0, places.flatten()).reshape(x.shape)


def _pack(codes: Tensor, n: int, codebook: Tensor) -> Tensor:
    """uint8 codes (at least n,) -> uint8 (ceil(n/2), 1), or (n, 1) for more than 16 levels."""
    if codebook.numel() > 16:
        return codes[:n].reshape(-1, 1)
    # An odd n is paired with one code of the zeros that fill up the last block.
    pairs = codes[: n + n % 2].reshape(-1, 2)  # (ceil(n/2), 2)
    return (pairs[:, :1] << 4) | pairs[:, 1:]


def _unpack(packed: Tensor, codebook: Tensor) -> Tensor:
    """packed, as `_pack` returns it -> the level of each code, float32 (2 * ceil(n/2),) or (n,)."""
    codes = packed.flatten().int()
    if codebook.numel() > 16:
        return codebook.index_select(0, codes)
    # One lookup decodes both nibbles of a byte: row 16 * high + low has both levels. Each row is
    # read as one 8-byte number, because index_select is several times slower on rows of two.
    sixteen = F.pad(codebook, (0, 16 - codebook.numel()))
    table = torch.cartesian_prod(sixteen, sixteen).view(torch.int64).flatten()  # (256,)
    return table.index_select(0, codes).view(torch.float32)


def _into_blocks(flat: Tensor, block_size: int) -> Tensor:
    """(n,) -> (ceil(n/block_size), block_size): a view, or a copy if zeros fill the last block."""
    missing = -flat.numel() % block_size
    if missing:
        flat = F.pad(flat, (0, missing))
    return flat.reshape(-1, block_size)


def check_arguments(weight: Tensor, block_size: int, codebook: Tensor) -> None:
    """Raise a ValueError for a dtype, block size or codebook that `quantize` refuses."""
    if not weight.is_floating_point():
        raise ValueError(f"only floating-point tensors can be quantized, got {weight.dtype}")
    if not isinstance(block_size, int) or block_size < 2 or block_size & (block_size - 1):
        raise ValueError(
            f"the block size must be a power of two >= 2, got {block_size}; the paper uses 64"
        )
    is_list = codebook.dim() == 1 and codebook.dtype == torch.float32
    if (
        not is_list
        or not 2 <= codebook.numel() <= 256
        or not codebook.isfinite().all()
        or (codebook == codebook[0]).all()
    ):
        raise ValueError(
            "a codebook has 2 to 256 finite float32 levels, not all equal; nf4.NF4 is one"
        )


def check_finite(flat: Tensor, shape: torch.Size) -> None:
    """Raise a ValueError if flat (n,) has NaN or infinity, with the count and the first index.

    The index is that in a tensor of `shape`.
    """
    bad = ~torch.isfinite(flat)
    if bad.any():
        index = torch.unravel_index(bad.nonzero()[0, 0], shape)
        first = tuple(int(i) for i in index)
        raise ValueError(
            f"{int(bad.sum())} of {flat.numel()} weights are NaN, infinite or beyond float32, "
            f"the first at index {first}: repair the checkpoint; quantizing would spread them over "
            "their blocks"
        )
