"""From 4 bits to numbers, as a ladder: four kernels with the same bits, each a step from the one before, the last one in use.

A weight w' = level[code] * constant costs 1/2 + 1/64 bytes to read, double-quantized, and 2 to write in 16 bits. Memory that
moves 3 TB/s leaves a GPU of 132 x 128 lanes about 25 instructions an element: it is not arithmetic that takes the time, but how
the bytes are asked for.

          a thread       reads at once    writes at once    instructions an element
    v1    1 element      1 byte           2 bytes           about 60: each finds its block and decodes its constant alone
    v2    2, one byte    1 byte           4 bytes           about 35: both share address and constant
    v3    8, 4 bytes     4 bytes          16 bytes          about 12: the widest store there is
    v4    32, 16 bytes   16 bytes         4 x 16 bytes      about 8; what matters is that more bytes are under way at once

v1 is not slow because it reads too much: a warp's 32 threads fall into the same sectors, which are fetched once. It is slow
because it needs 16 times as many instructions for the same bytes, and because too few bytes are under way: memory answers after
700 ns, so 3 TB/s are reached only with 2 MB asked for ahead, 16 kB on each multiprocessor.

v4 reads what its warp needs with one instruction, 512 bytes. But if each thread then wrote the 64 bytes that come of them, each
store of the warp would touch 32 places, half a sector each. So the words are swapped in shared memory first: a lane takes
those whose results lie beside its neighbour's.

    read     lane 0: words 0 1 2 3      lane 1: words 4 5 6 7      ...      lane 31: words 124 ... 127
    write    lane 0: words 0 32 64 96   lane 1: words 1 33 65 97   ...      each store: 32 lanes x 16 bytes in one piece

The levels lie in shared memory, in 16 different banks, so lanes that look up different ones do not wait for each other.
Elements that fill no warp's 1024, and blocks too small for v4, are left to v1, which takes any.
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
STASH = 4 * THREADS  # words that its block reads


def v1(kind: str) -> Kernel:
    """A thread for an element: out[i] for `start` <= i < n. `packed` is what it is everywhere, read here byte by byte."""
    half, pack = kind != "float32", KINDS[kind][0] if kind != "float32" else None

    def naive(
        packed,
        levels,
        absmax,
        codes,
        levels8,
        offset,
        largest,
        shift,
        shift8,
        double,
        packed_bytes,
        out,
        start,
        n,
    ):
        i = U32(start + U32(cuda.blockIdx.x) * U32(THREADS) + U32(cuda.threadIdx.x))
        if i < n:
            scale = constant(i >> shift, absmax, codes, levels8, offset, largest, shift8, double)
            nibble = U32(packed_bytes[i >> U32(1)]) >> (U32(0) if i & U32(1) else U32(4)) & U32(15)
            x = mul(levels[nibble], scale)
            out[i] = U16(pack(x, x) & U32(0xFFFF)) if half else x

    return Kernel(naive, (*WEIGHT, BYTES, SHORTS if half else FLOATS, U32, U32), THREADS)


def v2(kind: str) -> Kernel:
    """A thread for a byte: two 16-bit numbers, one word of out. n is even."""
    pack = KINDS[kind][0]

    def by_byte(
        packed,
        levels,
        absmax,
        codes,
        levels8,
        offset,
        largest,
        shift,
        shift8,
        double,
        packed_bytes,
        out,
        n,
    ):
        i = U32(U32(cuda.blockIdx.x) * U32(THREADS) + U32(cuda.threadIdx.x))
        if U32(2) * i < n:
            scale = constant(
                i >> U32(shift - U32(1)), absmax, codes, levels8, offset, largest, shift8, double
            )
            pair = U32(packed_bytes[i])
            out[i] = pack(mul(levels[pair >> U32(4)], scale), mul(levels[pair & U32(15)], scale))

    return Kernel(by_byte, (*WEIGHT, BYTES, WORDS, U32), THREADS)


@inlined
def eight(word, scale, levels, pack, out, unit):
    """Decode the 8 codes of a word, of one block, and write them as 16-bit numbers to the 16-byte unit `unit` of out."""
    pairs = cuda.local.array(4, U32)
    for i in range(4):
        high, low = word >> U32(8 * i + 4) & U32(15), word >> U32(8 * i) & U32(15)
        pairs[i] = pack(mul(levels[high], scale), mul(levels[low], scale))
    store4(out, unit, pairs[0], pairs[1], pairs[2], pairs[3])


def v3(kind: str) -> Kernel:
    """A thread for 4 bytes: eight 16-bit numbers, 16 bytes of out. n and blocks are multiples of 8."""
    pack = KINDS[kind][0]

    def by_word(
        packed, levels, absmax, codes, levels8, offset, largest, shift, shift8, double, out, n
    ):
        table = cuda.shared.array(16, F32)
        thread = U32(cuda.threadIdx.x)
        if thread < U32(16):
            table[thread] = levels[thread]
        cuda.syncthreads()
        i = U32(U32(cuda.blockIdx.x) * U32(THREADS) + thread)
        if U32(8) * i < n:
            scale = constant(
                i >> U32(shift - U32(3)), absmax, codes, levels8, offset, largest, shift8, double
            )
            eight(packed[i], scale, table, pack, out, i)

    return Kernel(by_word, (*WEIGHT, WORDS, U32), THREADS)


def v4(kind: str) -> Kernel:
    """A warp for 1024 elements, a thread for 16 bytes; of float32, 16 bytes of out are the four numbers of half a word.

    Decodes `runs` times 1024 elements. Blocks are multiples of 8 elements; `packed` and `out` start at 16 bytes.
    """
    half, pack = kind != "float32", KINDS[kind][0] if kind != "float32" else None

    def swapped(
        packed, levels, absmax, codes, levels8, offset, largest, shift, shift8, double, out, runs
    ):
        table = cuda.shared.array(16, F32)
        words = cuda.shared.array(STASH, U32, alignment=16)
        thread = U32(cuda.threadIdx.x)
        lane, warp = thread & U32(31), thread >> U32(5)
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
                    scale = constant(
                        at >> U32(shift - U32(3)),
                        absmax,
                        codes,
                        levels8,
                        offset,
                        largest,
                        shift8,
                        double,
                    )
                    eight(words[warp * U32(128) + unit], scale, table, pack, out, at)
                else:
                    at = U32(run * U32(256) + unit)
                    scale = constant(
                        at >> U32(shift - U32(2)),
                        absmax,
                        codes,
                        levels8,
                        offset,
                        largest,
                        shift8,
                        double,
                    )
                    word = words[warp * U32(128) + (unit >> U32(1))] >> U32(
                        (unit & U32(1)) << U32(4)
                    )
                    four = cuda.local.array(4, U32)
                    for j in range(4):
                        four[j] = bits(
                            mul(table[word >> U32(8 * (j // 2) + 4 * (1 - j % 2)) & U32(15)], scale)
                        )
                    store4(out, at, four[0], four[1], four[2], four[3])

    return Kernel(swapped, (*WEIGHT, WORDS, U32), THREADS)
