"""NF4: a 4-bit code whose 16 levels are quantiles of a normal distribution.

The weights of a trained layer are approximately normally distributed with mean zero. So a 4-bit
code should place more levels where a normal distribution has more probability. Equation 4 of the
paper (QLoRA, section 3, arXiv 2305.14314) takes the quantiles

    q_i = 1/2 (Q(i / 17) + Q((i + 1) / 17)),   i = 0 ... 15,   Q the inverse CDF of N(0, 1).

This formula gives -inf at i = 0, and no level is exactly zero. The code that the authors published,
and that everyone uses, has 8 positive quantiles, 7 negative quantiles and an exact zero, all
divided by the largest one (see `normal_float`).

Blockwise quantization (equations 1 and 2). The flattened weight is split into blocks of 64. Each
block is divided by its largest magnitude, `absmax`, so its numbers lie in [-1, 1]. Each number is
then stored as the index of the nearest level:

    code_j = argmin_i | w_j / absmax - level_i |          w'_j = level[code_j] * absmax

Layout, with the same bytes as in bitsandbytes:

    weight (out, in)    row-major; blocks continue across rows; the last block may be shorter
    packed (n/2, 1)     uint8: element 2j in the high nibble, element 2j + 1 in the low nibble
    absmax (n/64,)      float32, one per block

Error. |w - w'| <= h * absmax plus rounding, where h is half the widest gap between levels. This
holds for levels that reach from -1 to 1. For NF4, h = 0.1519, from the gap between -1 and -0.6962.
The rounding is that of float32 (the products with 1/absmax and with absmax, and the midpoints) and
of the output dtype.

Differs from the paper: the levels, as described above. The paper says that each level is used
equally often. This does not hold after the division by absmax: the outermost levels are used for
the largest number of a block and for few others.
Differs from bitsandbytes: NaN and infinity are refused; in bitsandbytes they corrupt their block. A
block whose 1/absmax is outside the normal range of float32 is first scaled by a power of two; in
bitsandbytes its numbers are lost. Any shape works, including () and (0,). A codebook has 2 to 256
levels. In a shorter last block bitsandbytes divides by absmax; here every block is multiplied by
the reciprocal. So a number at the midpoint of two levels may get a different level than in
bitsandbytes. The FP4 of bitsandbytes has a code for -0; here it is decoded, but never written.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.special import ndtri
from torch import Tensor


def normal_float(bits: int) -> Tensor:
    """The NormalFloat code: ascending float32 levels (2**bits,), from -1 to 1 with an exact 0.

    The outermost levels cannot be at the probabilities 0 and 1, where Q is infinite. Divide [0, 1]
    into 2**bits equal bins, and again into 2**bits - 1. The largest probability is the mean of the
    centers of the two last bins, rounded to seven decimals as published: 0.9677083 at 4 bits.

    >>> [round(level, 4) for level in normal_float(2).tolist()]
    [-1.0, 0.0, 0.4358, 1.0]

    Raises: ValueError unless 2 <= bits <= 8.   Source: paper, section 3, and the authors' code.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"a NormalFloat code has 2 to 8 bits, got {bits}")
    size = 2**bits
    half = 2 ** (bits - 1)
    outermost = round(1 - (1 / (2 * size) + 1 / (2 * (size - 1))) / 2, 7)
    # Zero replaces one of the negative levels.
    positive = ndtri(torch.linspace(outermost, 0.5, half + 1)[:-1].numpy())  # (half,)
    negative = -ndtri(torch.linspace(outermost, 0.5, half)[:-1].numpy())  # (half - 1,)
    levels = torch.tensor(sorted([*negative.tolist(), 0.0, *positive.tolist()]))
    return levels / levels.max()


NF4 = normal_float(4)

# FP4, the 4-bit float that the paper compares with: 1 sign bit, 2 exponent bits, 1 mantissa bit.
# The levels are those of bitsandbytes, in the order of the codes. Code 8 would be -0: it is decoded
# as 0, but never written.
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
    a zero. The levels may be in any order; if two codes have the same level, the first is used.
    No gradient is recorded.
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
    """Compute level * absmax in float32 and cast it to `dtype` (default q.dtype)."""
    n = math.prod(q.shape)
    levels = _unpack(q.packed, q.codebook.to(q.packed.device))[:n]  # (n,)
    blocks = _into_blocks(levels, q.block_size)  # (n_blocks, block_size)
    blocks.mul_(q.absmax[:, None])
    return blocks.flatten()[:n].reshape(q.shape).to(dtype or q.dtype)


def _normalize(blocks: Tensor, absmax: Tensor) -> Tensor:
    """Divide blocks (n_blocks, block_size) by absmax (n_blocks,), to [-1, 1] up to rounding."""
    # 1/absmax overflows for a tiny absmax and loses bits for a huge one. Scaling the block and its
    # absmax by the same power of two avoids this and changes no code. A block of zeros gets the
    # reciprocal 0, so each of its numbers gets the code of level 0.
    shift = torch.where(absmax < 2.0**-64, 2.0**64, torch.where(absmax > 2.0**64, 2.0**-64, 1.0))
    reciprocal = torch.where(absmax > 0, 1 / (absmax * shift), 0.0)
    return (blocks * shift[:, None]).mul_(reciprocal[:, None])


def _nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """The code of the nearest level, uint8 in the shape of x; at a midpoint, the lower one."""
    levels, order = codebook.sort(stable=True)
    first = torch.searchsorted(levels, levels)  # the first of equal levels
    codes = order[first].to(torch.uint8)
    midpoints = (levels[1:] + levels[:-1]) / 2
    # midpoints[i - 1] < x <= midpoints[i] means that levels[i] is the nearest.
    places = torch.bucketize(x, midpoints, out_int32=True)
    return codes.index_select(0, places.flatten()).reshape(x.shape)


def _pack(codes: Tensor, n: int, codebook: Tensor) -> Tensor:
    """uint8 codes (at least n,) -> uint8 (ceil(n/2), 1), or (n, 1) for more than 16 levels."""
    if codebook.numel() > 16:
        return codes[:n].reshape(-1, 1)
    # If n is odd, the last code is paired with that of a zero that pads the last block.
    pairs = codes[: n + n % 2].reshape(-1, 2)  # (ceil(n/2), 2)
    return (pairs[:, :1] << 4) | pairs[:, 1:]


def _unpack(packed: Tensor, codebook: Tensor) -> Tensor:
    """The level of each code that `_pack` packed: float32 (2 * ceil(n/2),), or (n,)."""
    codes = packed.flatten().int()
    if codebook.numel() > 16:
        return codebook.index_select(0, codes)
    # One lookup decodes both nibbles of a byte: row 16 * high + low of the table has both levels.
    # Each row is read as one 8-byte number: index_select is several times slower on rows of two.
    sixteen = F.pad(codebook, (0, 16 - codebook.numel()))
    table = torch.cartesian_prod(sixteen, sixteen).view(torch.int64).flatten()  # (256,)
    return table.index_select(0, codes).view(torch.float32)


def _into_blocks(flat: Tensor, block_size: int) -> Tensor:
    """(n,) -> (ceil(n/block_size), block_size): a view, or a copy with zeros at the end."""
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

    The index is the position in a tensor of `shape`.
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
