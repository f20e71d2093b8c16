"""Blockwise quantization in one pass: a block is still in the cache when its absmax is known.

The code of a number is the count of midpoints between levels that are below it. In 15 sorted
midpoints, 4 comparisons find it: with the middle one, then with one of two, of four, of eight. They
are stored in the order of a binary tree, level by level:

    tree          -   7   3 11   1 5 9 13   0 2 4 6 8 10 12 14      (which midpoint)
    place         0   1   2  3   4 ...  7   8 ...           15

The bits of a code say where its number goes, left or right, so after d comparisons the d bits are
the place in level d, which starts at tree[2**d]. A level has at most eight numbers: with AVX-512
and AVX2 it is a register, in which one instruction looks up the next midpoint of many numbers at
once. On other processors, 15 independent comparisons are faster than 4 dependent ones.

Bytes per element: 4 read, 1/2 + 4/64 written.
"""

import numpy as np
from numba import prange

from kernels.cpu.vectors import LOOK_UP, WIDTH, descend, eight, kernel, load, no_codes, pack, times

SEARCHES = LOOK_UP in ("avx512", "avx2")


@kernel(parallel=True)
def quantize(flat, bits, tree, shift, packed, absmax, absmax_bits):
    """Quantize float32 (n,) in blocks of 2**shift to packed uint8 and absmax float32.

    tree: float32 (16,), the midpoints between ascending levels in the order above; infinite where
    there are fewer than 16 levels. packed: (ceil(n/2),), absmax: (ceil(n/2**shift),). `bits` and
    `absmax_bits` are uint32 views.
    Equal to nf4.quantize bit for bit: the same products, rounded separately.
    """
    for block in prange(absmax.size):
        start = np.int64(block << shift)
        stop = min(np.int64((block + 1) << shift), flat.size)
        power, reciprocal = _scale(bits[start:stop], block, absmax, absmax_bits)
        if SEARCHES:
            vectors = (stop - start) // WIDTH
            search(flat, start, power, reciprocal, tree, packed, start >> 1, vectors)
            start += vectors * WIDTH
        numbers = flat[start:stop]
        pairs = packed[start >> 1 : (stop + 1) >> 1]
        for i in range(numbers.size >> 1):
            high = _code(numbers[2 * i] * power * reciprocal, tree)
            low = _code(numbers[2 * i + 1] * power * reciprocal, tree)
            pairs[i] = np.uint8(high << 4 | low)
        if numbers.size & 1:  # the last number is paired with a zero that pads the block
            high = _code(numbers[-1] * power * reciprocal, tree)
            low = _code(np.float32(0), tree)
            pairs[-1] = np.uint8(high << 4 | low)


@kernel(parallel=True)
def quantize_wide(flat, bits, tree, shift, codes, absmax, absmax_bits):
    """The same with 17 to 256 levels, one byte per code; tree is float32 (256,)."""
    for block in prange(absmax.size):
        start = block << shift
        stop = min((block + 1) << shift, flat.size)
        power, reciprocal = _scale(bits[start:stop], block, absmax, absmax_bits)
        for i in range(start, stop):
            number = flat[i] * power * reciprocal
            place = np.int32(1)
            for _ in range(8):
                place = 2 * place + np.int32(number > tree[place])
            codes[i] = place - 256


@kernel()
def _scale(bits, block, absmax, absmax_bits):
    """Store the absmax of a block. Returns the power of two and the reciprocal to multiply by.

    Magnitudes are compared as integers. The order is the same, the maximum can be vectorized, and a
    NaN is larger than infinity, so it is never dropped. The block is finite if its absmax is.
    """
    top = np.uint32(0)
    for i in range(bits.size):
        magnitude = np.uint32(bits[i] & np.uint32(0x7FFFFFFF))  # & gives 64 bits
        top = max(top, magnitude)
    absmax_bits[block] = top
    scale = absmax[block]
    power = np.float32(1)
    if scale < np.float32(2.0**-64):
        power = np.float32(2.0**64)
    elif scale > np.float32(2.0**64):
        power = np.float32(2.0**-64)
    reciprocal = np.float32(1) / (scale * power) if scale > 0 else np.float32(0)
    return power, reciprocal


@kernel()
def _code(number, tree):
    """How many midpoints are below a number; a tie takes the lower code."""
    below = np.int32(0)
    for k in range(1, 16):
        below += np.int32(number > tree[k])
    return below


@kernel(forceinline=True)
def search(flat, start, power, reciprocal, tree, packed, byte, vectors):
    """packed[byte], ... = the codes of some vectors of numbers from flat[start] on.

    Each number is multiplied by power and reciprocal first.
    """
    for k in range(vectors):
        numbers = times(times(load(flat, start + k * WIDTH), power), reciprocal)
        codes = no_codes()
        for level in (1, 2, 4, 8):
            codes = descend(codes, numbers, eight(tree, level))
        pack(packed, byte + k * (WIDTH // 2), codes)
