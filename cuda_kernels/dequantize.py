"""Dequantization in four kernels with the same results; each improves on the one before.

A weight w' = level[code] * constant costs 1/2 + 1/64 bytes to read, with double quantization, and 2
to write in 16 bits. While memory moves these, at 3 TB/s, a GPU of 132 x 128 lanes can execute about
25 instructions per element. So arithmetic need not limit the speed; what matters is how the bytes
are requested.

          a thread       reads at once    writes at once    instructions per element
    v1    1 element      1 byte           2 bytes           about 60: each finds its constant
    v2    2, one byte    1 byte           4 bytes           about 35: both share a constant
    v3    8, 4 bytes     4 bytes          16 bytes          about 12: the widest store there is
    v4    32, 16 bytes   16 bytes         4 x 16 bytes      about 8; more bytes in flight at once

v1 does not read too much: the 32 threads of a warp ask for the same sectors, which are fetched
once. It is slow because it needs 16 times as many instructions for the same bytes, and because too
few bytes are in flight. Memory answers after 700 ns, so 3 TB/s need 2 MB in flight, which is 16 kB
per multiprocessor.

v4 is the kernel in use. A warp reads all it needs, 512 bytes, with one instruction. If each thread
then wrote the 64 bytes that it decodes, each store of the warp would touch 32 places, half a sector
each. So the words are exchanged through shared memory first: a lane gets words whose results are
next to those of its neighbour.

    read     lane 0: words 0 1 2 3      lane 1: words 4 5 6 7      ...   lane 31: 124 ... 127
    write    lane 0: words 0 32 64 96   lane 1: words 1 33 65 97   ...   32 x 16 bytes in one piece

The levels are in 16 different banks of shared memory, so lanes that look up different ones do not
wait for each other. Elements after the last full 1024, and weights whose blocks are too small for
v4, are decoded by v1, which takes any.
"""

from numba import cuda

from cuda_kernels.device import (
    BYTES,
    F32,
    FLOATS,
    KINDS,
    SHORTS,
    U16,
    U32,
    WEIGHT,
    WORDS,
    Kernel,
    bits,
    constant,
    inlined,
    load4,
    mul,
    store4,
)

THREADS = 256
RUN = 1024  # elements that a warp of v4 decodes
STASH = 4 * THREADS  # words that a block of v4 reads


def v1(kind: str) -> Kernel:
    """A thread per element: out[i] for `start` <= i < n. packed_bytes: the weight's `packed`."""
    half = kind != "float32"
    pack = KINDS[kind][0] if half else None

    def naive(weight, packed_bytes, out, start, n):
        levels, shift = weight[1], weight[7]
        i = U32(start + U32(cuda.blockIdx.x) * U32(THREADS) + U32(cuda.threadIdx.x))
        if i < n:
            scale = constant(i >> shift, weight)
            nibble = U32(packed_bytes[i >> U32(1)]) >> (U32(0) if i & U32(1) else U32(4)) & U32(15)
            x = mul(levels[nibble], scale)
            out[i] = U16(pack(x, x) & U32(0xFFFF)) if half else x

    return Kernel(naive, (WEIGHT, BYTES, SHORTS if half else FLOATS, U32, U32), THREADS)


def v2(kind: str) -> Kernel:
    """A thread per byte: two 16-bit numbers, one word of out. n is even."""
    pack = KINDS[kind][0]

    def by_byte(weight, packed_bytes, out, n):
        levels, shift = weight[1], weight[7]
        i = U32(U32(cuda.blockIdx.x) * U32(THREADS) + U32(cuda.threadIdx.x))
        if U32(2) * i < n:
            scale = constant(i >> U32(shift - U32(1)), weight)
            pair = U32(packed_bytes[i])
            out[i] = pack(mul(levels[pair >> U32(4)], scale), mul(levels[pair & U32(15)], scale))

    return Kernel(by_byte, (WEIGHT, BYTES, WORDS, U32), THREADS)


@inlined
def eight(word, scale, levels, pack, out, unit):
    """Decode the 8 codes of a word, all of one block, to 16-byte unit `unit` of 16-bit out."""
    pairs = cuda.local.array(4, U32)
    for i in range(4):
        high = word >> U32(8 * i + 4) & U32(15)
        low = word >> U32(8 * i) & U32(15)
        pairs[i] = pack(mul(levels[high], scale), mul(levels[low], scale))
    store4(out, unit, pairs[0], pairs[1], pairs[2], pairs[3])


def v3(kind: str) -> Kernel:
    """A thread per 4 bytes: eight 16-bit numbers, 16 bytes of out. n, blocks: multiples of 8."""
    pack = KINDS[kind][0]

    def by_word(weight, out, n):
        packed, levels, shift = weight[0], weight[1], weight[7]
        table = cuda.shared.array(16, F32)
        thread = U32(cuda.threadIdx.x)
        if thread < U32(16):
            table[thread] = levels[thread]
        cuda.syncthreads()
        i = U32(U32(cuda.blockIdx.x) * U32(THREADS) + thread)
        if U32(8) * i < n:
            scale = constant(i >> U32(shift - U32(3)), weight)
            eight(packed[i], scale, table, pack, out, i)

    return Kernel(by_word, (WEIGHT, WORDS, U32), THREADS)


@inlined
def four(word, scale, levels, out, unit):
    """Decode the 4 codes in the low half of a word to 16-byte unit `unit` of out, in float32."""
    numbers = cuda.local.array(4, U32)
    for i in range(4):
        code = word >> U32(8 * (i // 2) + 4 * (1 - i % 2)) & U32(15)
        numbers[i] = bits(mul(levels[code], scale))
    store4(out, unit, numbers[0], numbers[1], numbers[2], numbers[3])


def v4(kind: str) -> Kernel:
    """A warp per 1024 elements, a thread per 16 bytes read; each store has 16 bytes per thread.

    In float32, 16 bytes of out are the four numbers of half a word. Decodes `runs` times 1024
    elements. Blocks are multiples of 8 elements; `packed` and `out` start at multiples of 16 bytes.
    """
    half = kind != "float32"
    pack = KINDS[kind][0] if half else None

    def swapped(weight, out, runs):
        packed, levels, shift = weight[0], weight[1], weight[7]
        table = cuda.shared.array(16, F32)
        words = cuda.shared.array(STASH, U32, alignment=16)
        thread = U32(cuda.threadIdx.x)
        lane = thread & U32(31)
        warp = thread >> U32(5)
        if thread < U32(16):
            table[thread] = levels[thread]
        run = U32(U32(cuda.blockIdx.x) * U32(THREADS // 32) + warp)
        if run < runs:
            a, b, c, d = load4(packed, U32(run * U32(32) + lane))
            store4(words, thread, a, b, c, d)
        cuda.syncthreads()
        if run < runs:
            for i in range(4 if half else 8):
                unit = U32(32 * i) + lane  # of the 128 or 256 that the run writes
                if half:
                    at = U32(run * U32(128) + unit)
                    scale = constant(at >> U32(shift - U32(3)), weight)
                    eight(words[warp * U32(128) + unit], scale, table, pack, out, at)
                else:
                    at = U32(run * U32(256) + unit)
                    scale = constant(at >> U32(shift - U32(2)), weight)
                    word = words[warp * U32(128) + (unit >> U32(1))]
                    word = word >> U32((unit & U32(1)) << U32(4))
                    four(word, scale, table, out, at)

    return Kernel(swapped, (WEIGHT, WORDS, U32), THREADS)
