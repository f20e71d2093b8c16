"""Blockwise quantization in one pass: a block is still in the cache when its absmax is known.

The code of a number is the count of midpoints between levels that are below it. In 15 sorted
midpoints, 4 comparisons find it: with the middle one, then with one of two, of four, of eight. Each
comparison depends on the ones before it. The midpoints fit in one register with AVX-512 and in two
with AVX2, and the right one is looked up for many numbers at once. A step is to look up, compare
and add. On other processors, 15 independent comparisons are faster than 4 dependent ones.

Bytes per element: 4 read, 1/2 + 4/64 written.
"""

import numpy as np
from numba import prange

from kernels.cpu.vectors import LOOK_UP, WIDTH, kernel, load, no_codes, pack, raised, scaled, times

SEARCHES = LOOK_UP in ("avx512", "avx2")


@kernel(parallel=True)
def quantize(flat, bits, midpoints, shift, packed, absmax, absmax_bits):
    """Quantize float32 (n,) in blocks of 2**shift to packed uint8 and absmax float32.

    midpoints: float32 (16,), between ascending levels, then infinite. packed: (ceil(n/2),), absmax:
    (ceil(n/2**shift),). `bits` and `absmax_bits` are uint32 views.
    Equal to nf4.quantize bit for bit: the same products, rounded separately.
    """
    for block in prange(absmax.size):
        start = np.int64(block << shift)
        stop = min(np.int64((block + 1) << shift), flat.size)
        power, reciprocal = _scale(bits[start:stop], block, absmax, absmax_bits)
        if SEARCHES:
            vectors = (stop - start) // WIDTH
            search(flat, start, power, reciprocal, midpoints, packed, start >> 1, vectors)
            start += vectors * WIDTH
        numbers = flat[start:stop]
        pairs = packed[start >> 1 : (stop + 1) >> 1]
        for i in range(numbers.size >> 1):
            high = _code(numbers[2 * i] * power * reciprocal, midpoints)
            low = _code(numbers[2 * i + 1] * power * reciprocal, midpoints)
            pairs[i] = np.uint8(high << 4 | low)
        if numbers.size & 1:  # the last number is paired with a zero that pads the block
            high = _code(numbers[-1] * power * reciprocal, midpoints)
            low = _code(np.float32(0), midpoints)
            pairs[-1] = np.uint8(high << 4 | low)


@kernel(parallel=True)
def quantize_wide(flat, bits, midpoints, shift, codes, absmax, absmax_bits):
    """The same with 17 to 256 levels, one byte per code; midpoints are float32 (256,)."""
    for block in prange(absmax.size):
        start = block << shift
        stop = min((block + 1) << shift, flat.size)
        power, reciprocal = _scale(bits[start:stop], block, absmax, absmax_bits)
        for i in range(start, stop):
            number = flat[i] * power * reciprocal
            code = np.int32(0)
            for half in (128, 64, 32, 16, 8, 4, 2, 1):
                code += np.int32(half if number > midpoints[code + half - 1] else 0)
            codes[i] = code


@kernel()
def _scale(bits, block, absmax, absmax_bits):
    """Store the absmax of a block. Returns the power of two and the reciprocal to multiply by.

    Magnitudes are compared as integers. The order is the same, the maximum can be vectorized, and a
    NaN is larger than infinity, so it is never dropped. The block is finite if its absmax is.
    """
    top = np.uint32(0)
    for i in range(bits.size):
        top = max(top, bits[i] & np.uint32(0x7FFFFFFF))
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
def _code(number, midpoints):
    """How many midpoints are below a number; a tie takes the lower code."""
    below = np.int32(0)
    for k in range(15):
        below += np.int32(number > midpoints[k])
    return below


@kernel(forceinline=True)
def search(flat, start, power, reciprocal, midpoints, packed, byte, vectors):
    """packed[byte], ... = the codes of some vectors of numbers from flat[start] on.

    Each number is multiplied by power and reciprocal first.
    """
    table = scaled(midpoints, np.float32(1), flat)
    for k in range(vectors):
        numbers = times(times(load(flat, start + k * WIDTH), power), reciprocal)
        codes = no_codes()
        for half in (8, 4, 2, 1):
            codes = raised(codes, half, numbers, table)
        pack(packed, byte + k * (WIDTH // 2), codes)
