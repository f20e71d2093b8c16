"""Dequantizes a 4-bit weight, or a window of it.

All elements of a block have the same scale, so they have only 16 different values. The 16 levels
are scaled and rounded once; then each element is a look-up, of many elements at once where the
processor can (vectors.py), one by one elsewhere. Both give the same bits.

Numba has no bfloat16 or float16. Arrays of them are passed as uint16 and int16 with the same bits.

The kernels take a weight of n elements as a tuple, made by launch.kernel_weight. It is not a named
tuple, because Numba is slow to recognize those:

    packed      uint8 (ceil(n/2),)
    levels      float32 (16,)
    absmax      float32: a scale per block or, with double quantization, per block of constants
    codes       uint8, the 8-bit constants; empty without double quantization
    levels8     float32 (256,)
    offset      float32
    largest     float32: constants are clamped to [0, largest]
    shift       log2 of the block size
    shift8      log2 of the constants' block size; 0 without double quantization

Bytes per element: 1/2 + 1/64 read with double quantization, 2 or 4 written.
"""

import numpy as np
from numba import prange

from kernels.cpu.vectors import (
    LOOK_UP,
    WIDTH,
    cast,
    kernel,
    look_up,
    prefetch,
    scaled,
    store,
)

LOOKS_UP = bool(LOOK_UP)
TEAM = 16  # rows of W that a thread takes at once
# Rows to prefetch ahead in a narrow window, whose rows are too far apart for the hardware to do it
AHEAD = 8


@kernel(parallel=True)
def decode(weight, start, stride, rows, cols, out):
    """out[r * cols + c] = element start + r * stride + c of the weight, in the dtype of `out`."""
    ahead = AHEAD * stride if stride > cols else 0
    for team in prange((rows + TEAM - 1) // TEAM):
        packed, levels, _, codes, _, _, _, shift, _ = weight
        scales = np.empty((cols >> shift) + 2, np.float32)
        for row in range(team * TEAM, min(team * TEAM + TEAM, rows)):
            first = start + row * stride
            if ahead:
                prefetch_run(packed, codes, first + ahead, cols, shift)
            decode_scales(weight, first, cols, scales, 0)
            decode_run(packed, levels, scales, 0, shift, first, cols, out, row * cols)


@kernel(forceinline=True)
def prefetch_run(packed, codes, start, count, shift):
    """Request `count` elements from memory before they are decoded."""
    prefetch(codes, start >> shift)
    for byte in range(start >> 1, (start + count) >> 1, 64):
        prefetch(packed, byte)


@kernel(forceinline=True)
def decode_scales(weight, start, count, scales, at):
    """scales[at], ... = the scales of the blocks that hold elements start ... start + count - 1."""
    _, _, absmax, codes, levels8, offset, largest, shift, shift8 = weight
    first = start >> shift
    for block in range(first, (start + count + (1 << shift) - 1) >> shift):
        scale = absmax[block >> shift8]
        if codes.size:  # equation 6; product and sum are rounded separately, as torch does
            scale = levels8[codes[block]] * scale + offset
            scale = min(max(scale, np.float32(0)), largest)
        scales[at + block - first] = scale


@kernel(forceinline=True)
def decode_run(packed, levels, scales, own, shift, start, count, out, at):
    """out[at : at + count] = elements start, start + 1, ..., by blocks, and in them by vectors.

    scales[own]: the scale of the block of the first element; those of the next blocks follow.
    """
    own -= start >> shift  # scales[own + block] is that of a block
    i = start
    end = start + count
    at -= start  # out[at + i] is element i
    while i < end:
        block = i >> shift
        stop = min((block + 1) << shift, end)
        scale = scales[own + block]
        if i & 1:
            out[at + i] = cast(levels[packed[i >> 1] & 15] * scale, out)
            i += 1
        vectors = (stop - i) // WIDTH
        if vectors > 0:
            decode_vectors(packed, i >> 1, levels, scale, out, at + i, vectors)
            i += vectors * WIDTH
        while i < stop:
            nibble = (packed[i >> 1] >> (0 if i & 1 else 4)) & 15
            out[at + i] = cast(levels[nibble] * scale, out)
            i += 1


@kernel(forceinline=True)
def decode_vectors(packed, byte, levels, scale, out, at, vectors):
    """Decode WIDTH * vectors elements of one block, starting at packed[byte], to out[at], ..."""
    if LOOKS_UP:
        table = scaled(levels, scale, out)
        for k in range(vectors):
            numbers = look_up(table, packed, byte + k * (WIDTH // 2))
            store(out, at + k * WIDTH, numbers)
    else:
        numbers = np.empty(16, out.dtype)
        for k in range(16):
            numbers[k] = cast(levels[k] * scale, out)
        for k in range(vectors * (WIDTH // 2)):
            pair = packed[byte + k]
            out[at + 2 * k] = numbers[pair >> np.uint8(4)]
            out[at + 2 * k + 1] = numbers[pair & np.uint8(15)]
