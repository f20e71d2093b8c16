"""Multiplies x by a 4-bit weight, a small piece of W at a time; the dense weight is never stored.

Many rows of x. A thread decodes a piece of W into a buffer that fits in its cache, multiplies it by
all rows of x, and overwrites it with the next piece. So W is read from memory in 4 bits, and each
element is decoded once for all rows. Most of the time goes into one loop, `tile`:

    c (4, WIDTH) += a (4, depth) b (depth, WIDTH)      4 vectors of sums, which stay in registers

    y = x W^T     a = 4 rows of W      b = WIDTH rows of x, side by side      c = a part of y^T
    y = x W       a = 4 rows of x      b = WIDTH columns of W                 c = a part of y

Few rows of x. Storing the piece and reading it back would cost as much as the product, so `dot`,
`four_dots` and `multiply_back_few` multiply what they have decoded while it is in registers.

All numbers are float32. Elements of W have the bits of the reference; only the order of summation
differs. Bytes read per element of W: 1/2 + 1/64 with double quantization, once for all rows of x.
Scratch of a thread: TEAM * DEPTH or BACK * STRIP elements of W, and TEAM sums per row of x. The
weight is passed as the tuple that decode.py describes.
"""

import numpy as np
from numba import prange

from kernels.cpu.decode import AHEAD, decode_run, decode_scales, prefetch_run
from kernels.cpu.vectors import (
    LOOK_UP,
    WIDTH,
    broadcast,
    fma,
    kernel,
    load,
    look_up,
    plus,
    scaled,
    store,
    total,
    zeros,
)

TEAM = 32  # rows of W that a thread takes at once for x W^T
DEPTH = 512  # columns of W that it decodes at once
STRIP = 64  # columns of W that a thread takes at once for x W
BACK = 128  # rows of W that it decodes at once
LINE = 16  # numbers in a cache line


@kernel(forceinline=True)
def tile(a, at, a_stride, b, to, b_stride, depth, c, out, c_stride):
    """c (4, WIDTH) += a (4, depth) b (depth, WIDTH).

    The matrices begin at a[at], b[to] and c[out]; the rows of each are its stride apart.
    """
    sums0 = load(c, out)
    sums1 = load(c, out + c_stride)
    sums2 = load(c, out + 2 * c_stride)
    sums3 = load(c, out + 3 * c_stride)
    for k in range(depth):
        row = load(b, to + k * b_stride)
        sums0 = fma(broadcast(a, at + k), row, sums0)
        sums1 = fma(broadcast(a, at + a_stride + k), row, sums1)
        sums2 = fma(broadcast(a, at + 2 * a_stride + k), row, sums2)
        sums3 = fma(broadcast(a, at + 3 * a_stride + k), row, sums3)
    store(c, out, sums0)
    store(c, out + c_stride, sums1)
    store(c, out + 2 * c_stride, sums2)
    store(c, out + 3 * c_stride, sums3)


@kernel(parallel=True)
def interleave(x, y):
    """y (groups, width, WIDTH), flat, = x (tokens, width): WIDTH rows of x side by side.

    The last group is filled with zeros.
    """
    tokens, width = x.shape
    for group in prange((tokens + WIDTH - 1) // WIDTH):
        first = group * WIDTH
        count = min(WIDTH, tokens - first)
        for start in range(0, width, LINE):  # so that a cache line of x is read once
            columns = min(LINE, width - start)
            at = (group * width + start) * WIDTH
            for t in range(count):
                for k in range(columns):
                    y[at + k * WIDTH + t] = x[first + t, start + k]
            for t in range(count, WIDTH):
                for k in range(columns):
                    y[at + k * WIDTH + t] = 0


@kernel(parallel=True)
def multiply(weight, width, x, y):
    """y (tokens, height) = x W^T; x is flat, as `interleave` gives it."""
    tokens, height = y.shape
    padded = (tokens + WIDTH - 1) // WIDTH * WIDTH
    for team in prange((height + TEAM - 1) // TEAM):
        top = team * TEAM
        rows = min(TEAM, height - top)
        packed, levels, _, _, _, _, _, shift, _ = weight
        scales = np.empty((DEPTH >> shift) + 2, np.float32)
        piece = np.zeros(TEAM * DEPTH, np.float32)  # of W, (TEAM, DEPTH)
        sums = np.zeros(TEAM * padded, np.float32)  # y^T, (TEAM, padded)
        for first in range(0, width, DEPTH):
            depth = min(DEPTH, width - first)
            for r in range(rows):
                start = (top + r) * width + first
                decode_scales(weight, start, depth, scales, 0)
                decode_run(packed, levels, scales, 0, shift, start, depth, piece, r * DEPTH)
            for t in range(0, padded, WIDTH):
                b = t * width + first * WIDTH
                for r in range(0, rows, 4):
                    out = r * padded + t
                    tile(piece, r * DEPTH, DEPTH, x, b, WIDTH, depth, sums, out, padded)
        for t in range(tokens):
            for r in range(rows):
                y[t, top + r] = sums[r * padded + t]


@kernel(forceinline=True)
def decode_scales_of_rows(weight, width, top, rows, first, last, scales, blocks):
    """scales[r * blocks], ... = those of the columns first ... last - 1 of row top + r of W.

    The same columns AHEAD rows later are requested from memory.
    """
    packed, _, _, codes, _, _, _, shift, _ = weight
    for r in range(rows):
        start = (top + r) * width + first
        prefetch_run(packed, codes, start + AHEAD * width, last - first, shift)
        decode_scales(weight, start, last - first, scales, r * blocks)


@kernel(parallel=True)
def multiply_back(weight, width, x, y, parts):
    """y (tokens, columns), flat, += x W for x (tokens, height), flat. tokens: a multiple of 4.

    columns: `width`, rounded up to a multiple of STRIP; those beyond `width` get other numbers.
    They are split into `parts`, one per thread.
    """
    strips = (width + STRIP - 1) // STRIP
    columns = strips * STRIP
    tokens = y.size // columns
    height = x.size // tokens
    for part in prange(parts):
        packed, levels, _, _, _, _, _, shift, _ = weight
        first = part * strips // parts * STRIP
        last = min((part + 1) * strips // parts * STRIP, width)
        blocks = ((last - first) >> shift) + 2  # that a row of W may touch, at most
        scales = np.empty(BACK * blocks, np.float32)
        piece = np.zeros(BACK * STRIP, np.float32)  # of W, (BACK, STRIP)
        for top in range(0, height if first < last else 0, BACK):
            rows = min(BACK, height - top)
            decode_scales_of_rows(weight, width, top, rows, first, last, scales, blocks)
            for column in range(first, last, STRIP):
                count = min(STRIP, last - column)
                for r in range(rows):
                    row = (top + r) * width
                    start = row + column
                    own = r * blocks + (start >> shift) - ((row + first) >> shift)
                    decode_run(packed, levels, scales, own, shift, start, count, piece, r * STRIP)
                for t in range(0, tokens, 4):
                    at = t * height + top
                    for c in range(0, STRIP, WIDTH):
                        out = t * columns + column + c
                        tile(x, at, height, piece, c, STRIP, rows, y, out, columns)


def takes_few(weight, width):
    """Whether the kernels for few rows take W: its rows are whole blocks of at least 64."""
    _, _, _, _, _, _, _, shift, _ = weight
    return LOOK_UP != "" and shift >= 6 and width % (1 << shift) == 0


@kernel(forceinline=True)
def dot(packed, levels, scales, shift, start, count, x, at):
    """The dot product of x[at:] and elements start ... start + count - 1 of W: whole blocks.

    scales: those of their blocks.
    """
    even = zeros()
    odd = zeros()
    for block in range(count >> shift):
        table = scaled(levels, scales[block], x)
        for k in range(block << shift, (block + 1) << shift, 2 * WIDTH):
            numbers = look_up(table, packed, (start + k) >> 1)
            even = fma(numbers, load(x, at + k), even)
            numbers = look_up(table, packed, (start + k + WIDTH) >> 1)
            odd = fma(numbers, load(x, at + k + WIDTH), odd)
    return total(plus(even, odd))


@kernel(forceinline=True)
def four_dots(packed, levels, scales, shift, start, count, x, at, stride):
    """The same with 4 rows of x, which begin at x[at], `stride` apart."""
    sums0 = zeros()
    sums1 = zeros()
    sums2 = zeros()
    sums3 = zeros()
    for block in range(count >> shift):
        table = scaled(levels, scales[block], x)
        for k in range(block << shift, (block + 1) << shift, WIDTH):
            numbers = look_up(table, packed, (start + k) >> 1)
            sums0 = fma(numbers, load(x, at + k), sums0)
            sums1 = fma(numbers, load(x, at + stride + k), sums1)
            sums2 = fma(numbers, load(x, at + 2 * stride + k), sums2)
            sums3 = fma(numbers, load(x, at + 3 * stride + k), sums3)
    return total(sums0), total(sums1), total(sums2), total(sums3)


@kernel(parallel=True)
def multiply_few(weight, width, x, y):
    """y (tokens, height) = x W^T for few rows of x (tokens, width), flat."""
    tokens, height = y.shape
    fours = tokens // 4 * 4
    for team in prange((height + TEAM - 1) // TEAM):
        packed, levels, _, _, _, _, _, shift, _ = weight
        scales = np.empty(width >> shift, np.float32)
        for row in range(team * TEAM, min(team * TEAM + TEAM, height)):
            start = row * width
            decode_scales(weight, start, width, scales, 0)
            for t in range(0, fours, 4):
                sums = four_dots(packed, levels, scales, shift, start, width, x, t * width, width)
                for k in range(4):
                    y[t + k, row] = sums[k]
            for t in range(fours, tokens):
                y[t, row] = dot(packed, levels, scales, shift, start, width, x, t * width)


@kernel(parallel=True)
def multiply_back_few(weight, width, x, y, parts):
    """y (tokens, width), flat, += x W for few rows of x (tokens, height), flat.

    The columns are split into `parts`, one per thread.
    """
    strips = width // STRIP
    tokens = y.size // width
    height = x.size // tokens
    for part in prange(parts):
        packed, levels, _, _, _, _, _, shift, _ = weight
        first = part * strips // parts * STRIP
        last = (part + 1) * strips // parts * STRIP
        blocks = ((last - first) >> shift) + 2
        scales = np.empty(BACK * blocks, np.float32)
        for top in range(0, height if first < last else 0, BACK):
            rows = min(BACK, height - top)
            decode_scales_of_rows(weight, width, top, rows, first, last, scales, blocks)
            for column in range(first, last, 2 * WIDTH):
                own = (column >> shift) - (first >> shift)
                for t in range(tokens):
                    out = t * width + column
                    even = load(y, out)
                    odd = load(y, out + WIDTH)
                    for r in range(rows):
                        i = (top + r) * width + column
                        table = scaled(levels, scales[own + r * blocks], x)
                        factor = broadcast(x, t * height + top + r)
                        even = fma(factor, look_up(table, packed, i >> 1), even)
                        numbers = look_up(table, packed, (i + WIDTH) >> 1)
                        odd = fma(factor, numbers, odd)
                    store(y, out, even)
                    store(y, out + WIDTH, odd)
