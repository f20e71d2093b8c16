"""Blockwise quantization in one pass: a block is read once, and what depends on its absmax is done while it is in the cache."""

import numpy as np
from numba import njit, prange


@njit(parallel=True, cache=True)
def quantize(flat, bits, midpoints, shift, packed, absmax, absmax_bits):
    """Quantize float32 (n,) in blocks of 2**shift to packed uint8 (ceil(n/2),) and absmax float32 (ceil(n/2**shift),).

    midpoints: float32 (15,), between ascending levels; infinite where there are fewer than 16. `bits` and `absmax_bits` are
    uint32 views: magnitudes are compared as integers, because those order alike, the maximum of integers can be vectorised,
    and a NaN comes out above infinity instead of vanishing. A block was finite if its absmax is.
    Equal to nf4.quantize bit for bit: the same products, rounded one by one.
    """
    for block in prange(absmax.size):
        start, stop = block << shift, min((block + 1) << shift, flat.size)
        top = np.uint32(0)
        for i in range(start, stop):
            top = max(top, bits[i] & np.uint32(0x7FFFFFFF))
        absmax_bits[block] = top
        scale, power = absmax[block], np.float32(1)
        if scale < np.float32(2.0**-64):
            power = np.float32(2.0**64)
        elif scale > np.float32(2.0**64):
            power = np.float32(2.0**-64)
        reciprocal = np.float32(1) / (scale * power) if scale > 0 else np.float32(0)
        numbers, pairs = flat[start:stop], packed[start >> 1 : (stop + 1) >> 1]
        for i in range(numbers.size >> 1):
            high = code(numbers[2 * i] * power * reciprocal, midpoints)
            low = code(numbers[2 * i + 1] * power * reciprocal, midpoints)
            pairs[i] = np.uint8(high << 4 | low)
        if numbers.size & 1:  # the odd one's partner is one of the zeros that fill the last block
            pairs[-1] = np.uint8(code(numbers[-1] * power * reciprocal, midpoints) << 4 | code(np.float32(0), midpoints))


@njit(cache=True)
def code(number, midpoints):
    """How many midpoints lie below: a tie takes the lower code. 15 comparisons side by side beat 4 that wait for each other."""
    below = np.int32(0)
    for k in range(15):
        below += np.int32(number > midpoints[k])
    return below
