"""The product with few rows: y = x W^T for 1 ... 64 rows of x, the codes of W read once and decoded in registers.

With few rows a product does two operations for each weight it reads and row it has, a thousandth of what the arithmetic units
can do meanwhile: its time is the time to read W. In 4 bits W is a quarter of its 16-bit self, so this should be four times as
fast, if the codes are never stored decoded, and if decoding takes fewer instructions than the memory leaves time for.

`tensor_core`, one of W's tiles of 32 rows, and a step of 128 columns of it, for one warp:

    read        a quad, the lanes 4g ... 4g + 3, reads 64 bytes of row g (and of g + 8, g + 16, g + 24): 16 bytes a lane in one
                instruction, four of them in flight; the next warp reads the next 64 bytes of the row
    swap        lanes 0, 1 of a quad hold the first block of 64 columns, 2, 3 the second. They swap halves, so that each of the
                four holds 8 bytes of each: a product that mixes two blocks could not be scaled any more
    decode      a byte is two codes. A table in shared memory has the two levels of each of the 256 bytes, rounded and packed as
                the tensor core takes them: a few instructions for two weights. 32 copies of it, one a bank, so that no two
                lanes wait for each other
    multiply    16 rows of W times 8 rows of x (n8), 16 columns at once, four times: a block. The order of columns within it is
                not that of memory, for W and x alike, which no sum minds
    scale       the 4 sums of a lane are of one block: times its constant, in float32, they go to the total. The levels are
                rounded to 16 bits; their product with the constant is not

Bytes: 1/2 + 1/64 an element of W, once. x is read once for each tile, from the L2 cache: so wide tiles (`groups` of warps that
share their columns, hence the L1 cache) for many rows of x. The warps of a block that do not share columns split them, and add
up in a fixed order: the same bits each time.

`portable` does the same with ordinary arithmetic, a warp for a row of W and a lane for 16 bytes of it: for cards older than
tensor cores for bfloat16 (sm_80), and for float32.
"""

from numba import cuda

from cuda_kernels.device import (
    F32,
    FLOATS,
    KINDS,
    SHORTS,
    U16,
    U32,
    WEIGHT,
    WORDS,
    Kernel,
    add,
    bits,
    constant,
    fma,
    load4,
    number,
    shared_word,
    shuffle,
    shuffle_xor,
)

WARPS = 8  # of a block
TILE = 32  # rows of W that a warp has in hand


def tensor_core(kind: str, tiles: int, groups: int) -> Kernel:
    """y (m, height) = x (m, width) W^T + bias, for at most 8 * tiles rows; WARPS * TILE / splits rows of W a block.

    width is a multiple of 64, a block of W at least 64. x and y in `kind`; bias float32 (height,), not read unless `biased`.
    """
    pack, read, product = KINDS[kind]
    splits, sums, slots = WARPS // groups, 8 * tiles, 8 * tiles * 32

    def matmul(
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
        x,
        bias,
        biased,
        y,
        m,
        height,
        width,
    ):
        pairs = cuda.shared.array(256 * 32, U32)
        thread = U32(cuda.threadIdx.x)
        lane, warp = thread & U32(31), thread >> U32(5)
        entry = pack(levels[thread >> U32(4)], levels[thread & U32(15)])
        for copy in range(32):
            pairs[thread << U32(5) | (U32(copy) ^ lane)] = entry  # each lane begins in its own bank
        cuda.syncthreads()

        g, t, bank = lane >> U32(2), lane & U32(3), lane << U32(2)
        odd, upper = t & U32(1), t >> U32(1)
        split, group = U32(warp // U32(groups)), U32(warp % U32(groups))
        first = U32(
            (U32(cuda.blockIdx.x) * U32(groups) + group) * U32(TILE) + g
        )  # the first of a lane's four rows
        last, lines = U32(height - U32(1)), width >> U32(6)  # blocks of 64 columns
        totals, words = cuda.local.array(sums, F32), cuda.local.array((4, 4), U32)
        scales, b = cuda.local.array(2, U32), cuda.local.array(8, U32)
        for i in range(sums):
            totals[i] = F32(0)

        for step in range(U32(2) * split, lines, U32(2 * splits)):
            line = U32(step)
            for i in range(4):  # rows beyond the last read the last, and their sums are dropped
                row = min(U32(first + U32(8 * i)), last)
                words[i, 0], words[i, 1], words[i, 2], words[i, 3] = U32(0), U32(0), U32(0), U32(0)
                if U32(line + upper) < lines:
                    unit = U32((row * lines + line) * U32(2) + t)
                    words[i, 0], words[i, 1], words[i, 2], words[i, 3] = load4(packed, unit)
            for h in range(
                2
            ):  # of the four constants that a quad needs for 16 rows, each lane decodes one
                row, mine = min(U32(first + U32(16 * h) + U32(8) * upper), last), U32(line + odd)
                scales[h] = U32(0)
                if mine < lines:
                    block = U32(row * lines + mine) >> U32(shift - U32(6))
                    scales[h] = bits(
                        constant(block, absmax, codes, levels8, offset, largest, shift8, double)
                    )
            for i in range(4):
                for j in range(2):
                    theirs = shuffle_xor(words[i, j] if upper else words[i, 2 + j], U32(2))
                    words[i, 2 + j] = words[i, 2 + j] if upper else theirs
                    words[i, j] = theirs if upper else words[i, j]

            for half in range(2):
                column = U32(
                    U32(line + U32(half)) << U32(6) | odd << U32(5) | upper << U32(4)
                )  # the first of a lane's 16
                for n in range(tiles):
                    token = U32(U32(8 * n) + g)
                    for i in range(8):
                        b[i] = U32(0)
                    if token < m and U32(line + U32(half)) < lines:
                        unit = U32(token * width + column) >> U32(3)
                        b[0], b[1], b[2], b[3] = load4(x, unit)
                        b[4], b[5], b[6], b[7] = load4(x, U32(unit + U32(1)))
                    for h in range(2):
                        c0, c1, c2, c3 = F32(0), F32(0), F32(0), F32(0)
                        for j in range(4):
                            top, low = (
                                words[2 * h, 2 * half + j // 2],
                                words[2 * h + 1, 2 * half + j // 2],
                            )
                            if j % 2:
                                top, low = top >> U32(16), low >> U32(16)
                            a0 = shared_word(pairs, U32(top << U32(7)) & U32(0x7F80) | bank)
                            a1 = shared_word(pairs, U32(low << U32(7)) & U32(0x7F80) | bank)
                            a2 = shared_word(pairs, top >> U32(1) & U32(0x7F80) | bank)
                            a3 = shared_word(pairs, low >> U32(1) & U32(0x7F80) | bank)
                            c0, c1, c2, c3 = product(
                                a0, a1, a2, a3, b[2 * j], b[2 * j + 1], c0, c1, c2, c3
                            )
                        s = number(shuffle(scales[h], lane & U32(28) | U32(half)))
                        s8 = number(shuffle(scales[h], lane & U32(28) | U32(2 + half)))
                        at = 8 * n + 4 * h
                        totals[at], totals[at + 1] = (
                            fma(c0, s, totals[at]),
                            fma(c1, s, totals[at + 1]),
                        )
                        totals[at + 2], totals[at + 3] = (
                            fma(c2, s8, totals[at + 2]),
                            fma(c3, s8, totals[at + 3]),
                        )

        remaining = splits  # warps that have a sum of the same rows: the upper half of them hands over, until one is left
        while remaining > 1:
            remaining //= 2
            slot = U32((split % U32(remaining) * U32(groups) + group) * U32(slots) + lane)
            cuda.syncthreads()  # the table, or what was handed over last, has been read
            if U32(remaining) <= split and split < U32(2 * remaining):
                for i in range(sums):
                    pairs[slot + U32(32 * i)] = bits(totals[i])
            cuda.syncthreads()
            if split < U32(remaining):
                for i in range(sums):
                    totals[i] = add(totals[i], number(pairs[slot + U32(32 * i)]))

        if split == U32(0):
            for n in range(tiles):
                for i in range(
                    8
                ):  # totals[8 n + 4 h + 2 r + c] is of row 16 h + 8 r + g of the tile, and token 8 n + 2 t + c
                    row = U32(first + U32(16 * (i // 4) + 8 * (i // 2 % 2)))
                    token = U32(U32(8 * n + i % 2) + U32(2) * t)
                    if row < height and token < m:
                        total = add(totals[8 * n + i], bias[row]) if biased else totals[8 * n + i]
                        y[U32(token * height + row)] = U16(pack(total, total) & U32(0xFFFF))

    return Kernel(matmul, (*WEIGHT, WORDS, FLOATS, U32, SHORTS, U32, U32, U32), 32 * WARPS)


def portable(kind: str, rows: int) -> Kernel:
    """The same in ordinary float32 arithmetic, for float32 or float16 x and y and at most `rows` rows: a warp for a row of W.

    width is a multiple of 32, a block of W at least 32. A lane's partial sum of 32 columns is of one block, and scaled once.
    """
    half = kind != "float32"
    pack, read, _ = KINDS[kind] if half else (None, None, None)

    def matmul(
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
        x,
        bias,
        biased,
        y,
        m,
        height,
        width,
    ):
        table = cuda.shared.array(16, F32)
        thread = U32(cuda.threadIdx.x)
        if thread < U32(16):
            table[thread] = levels[thread]
        cuda.syncthreads()
        lane, row = thread & U32(31), U32(U32(cuda.blockIdx.x) * U32(WARPS) + (thread >> U32(5)))
        lines = width >> U32(5)
        totals, partial = cuda.local.array(rows, F32), cuda.local.array(rows, F32)
        words, numbers = cuda.local.array(4, U32), cuda.local.array(8, F32)
        for token in range(rows):
            totals[token] = F32(0)
        for step in range(lane, lines if row < height else U32(0), U32(32)):
            line = U32(row * lines + U32(step))
            words[0], words[1], words[2], words[3] = load4(packed, line)
            for token in range(rows):
                partial[token] = F32(0)
            for i in range(4):
                for token in range(rows):
                    unit = U32(
                        min(U32(token), U32(m - U32(1))) * width + U32(step) * U32(32) + U32(8 * i)
                    ) >> U32(2)
                    if half:
                        four = load4(x, unit >> U32(1))
                        for j in range(4):
                            numbers[2 * j], numbers[2 * j + 1] = (
                                read(four[j] & U32(0xFFFF)),
                                read(four[j] >> U32(16)),
                            )
                    else:
                        four, more = load4(x, unit), load4(x, unit + U32(1))
                        for j in range(4):
                            numbers[j], numbers[4 + j] = number(four[j]), number(more[j])
                    for j in range(8):
                        level = table[words[i] >> U32(8 * (j // 2) + 4 * (1 - j % 2)) & U32(15)]
                        partial[token] = fma(level, numbers[j], partial[token])
            scale = constant(
                line >> U32(shift - U32(5)), absmax, codes, levels8, offset, largest, shift8, double
            )
            for token in range(rows):
                totals[token] = fma(partial[token], scale, totals[token])
        for i in range(
            5
        ):  # each lane adds what the one 16, 8, 4, 2, 1 away has, until all have the sum
            for token in range(rows):
                totals[token] = add(
                    totals[token], number(shuffle_xor(bits(totals[token]), U32(16 >> i)))
                )
        if lane == U32(0) and row < height:
            for token in range(rows):
                if U32(token) < m:
                    total = add(totals[token], bias[row]) if biased else totals[token]
                    y[U32(U32(token) * height + row)] = (
                        U16(pack(total, total) & U32(0xFFFF)) if half else total
                    )

    kinds = (WORDS, FLOATS, U32, SHORTS if half else FLOATS, U32, U32, U32)
    return Kernel(matmul, (*WEIGHT, *kinds), 32 * WARPS)
