"""Blockwise quantization: a lane holds 8 numbers, neighbouring lanes hold a block.

    element     0 ... 7      8 ... 15     ...      56 ... 63      64 ...
    lane        0            1                     7              8       block size 64: 8 lanes
    absmax      [ - - - - - - - - the same in all 8 - - - - ]     [ ...   3 rounds of `shuffle_xor`
    packed      4 bytes      4 bytes                                      32 lanes write 128 bytes

The lanes of a block find its absmax by shuffles. In round k, lanes whose indices differ in bit k
exchange their magnitudes and keep the larger one. After log2(lanes) rounds each has the absmax,
without any access to memory. Magnitudes are compared as integers. The order is the same, and a NaN
is larger than infinity, so it is never dropped, and absmax shows whether all numbers were finite.

The code of a number is the count of midpoints below it, found by a binary search: 4 look-ups in
shared memory. The 15 midpoints are in 15 different banks, so lanes never wait for each other.
Division is rounded to nearest: an approximate one would change codes next to a midpoint.

Bytes per element: 2 or 4 read, once, and 1/2 + 4/64 written.
"""

from numba import cuda

from cuda_kernels.device import (
    BYTES,
    F32,
    FLOATS,
    KINDS,
    SHORTS,
    U8,
    U32,
    WORDS,
    Kernel,
    bits,
    inlined,
    load4,
    mul,
    number,
    shuffle_xor,
)

THREADS = 256


@inlined
def code(x, midpoints):
    """How many of 15 ascending midpoints are below x; a tie takes the lower code."""
    below = U32(8) if x > midpoints[7] else U32(0)
    below = below + U32(4) if x > midpoints[below + U32(3)] else below
    below = below + U32(2) if x > midpoints[below + U32(1)] else below
    return below + U32(1) if x > midpoints[below] else below


def blockwise(kind: str) -> Kernel:
    """packed uint8 (ceil(n/2),) and absmax float32 (blocks,) of n numbers of dtype `kind`.

    A thread takes 8 numbers. `words` and `numbers` are the same memory, as are `packed` and
    `packed_words`. midpoints: float32 (15,), infinite where there are fewer than 16 levels. A block
    has 1 ... 32 lanes. Equal to nf4.quantize bit for bit: the same products, rounded separately.
    """
    half = kind != "float32"
    read = KINDS[kind][1] if half else None

    def quantize(words, numbers, midpoints, packed, packed_words, absmax, n, lanes):
        edges = cuda.shared.array(16, F32)
        thread = U32(cuda.threadIdx.x)
        if thread < U32(15):
            edges[thread] = midpoints[thread]
        cuda.syncthreads()
        lane = U32(U32(cuda.blockIdx.x) * U32(THREADS) + thread)
        start = U32(lane * U32(8))
        x = cuda.local.array(8, F32)
        for i in range(8):
            x[i] = F32(0)  # the last block is padded with zeros
        if start < n and n - start >= U32(8):
            if half:
                four = load4(words, lane)
                for i in range(4):
                    x[2 * i] = read(four[i] & U32(0xFFFF))
                    x[2 * i + 1] = read(four[i] >> U32(16))
            else:
                for j in range(2):
                    four = load4(words, U32(2) * lane + U32(j))
                    for i in range(4):
                        x[4 * j + i] = number(four[i])
        else:
            for i in range(8):
                at = U32(start + U32(i))
                if at < n:
                    x[i] = read(U32(numbers[at])) if half else numbers[at]

        top = U32(0)
        for i in range(8):
            top = max(top, bits(x[i]) & U32(0x7FFFFFFF))
        step = U32(1)
        while step < lanes:
            top = max(top, shuffle_xor(top, step))
            step = U32(step << U32(1))
        scale = number(top)
        # A power of two, which changes no code, keeps 1/absmax in the normal range of float32.
        is_tiny = scale < F32(2.0**-64)
        is_huge = scale > F32(2.0**64)
        power = F32(2.0**64) if is_tiny else F32(2.0**-64) if is_huge else F32(1)
        reciprocal = F32(1) / mul(scale, power) if scale > F32(0) else F32(0)

        word = U32(0)
        for i in range(8):
            # The first number of a pair goes to the high nibble.
            place = U32(8 * (i // 2) + 4 * (1 - i % 2))
            word |= code(mul(mul(x[i], power), reciprocal), edges) << place
        if start < n:
            if n - start >= U32(8):
                packed_words[lane] = U32(word)
            else:
                for i in range(4):
                    if U32(start + U32(2 * i)) < n:
                        packed[U32(lane * U32(4) + U32(i))] = U8(word >> U32(8 * i) & U32(255))
            if lane % lanes == U32(0):
                absmax[lane // lanes] = scale

    numbers = SHORTS if half else FLOATS
    return Kernel(quantize, (WORDS, numbers, FLOATS, BYTES, WORDS, FLOATS, U32, U32), THREADS)
