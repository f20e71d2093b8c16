"""y = x W^T for 1 ... 64 rows of x: the codes of W are read once and decoded in registers.

For each weight that it reads, a product with few rows does two operations per row of x. In the same
time the arithmetic units could do a thousand times as many, so the product takes as long as reading
W. In 4 bits W has a quarter of its size in 16 bits. So the product should be four times as fast, if
decoded weights are never stored and decoding is faster than reading.

`tensor_core`, one tile of W (32 rows) and a step of 128 columns, for one warp:

    read        A quad, lanes 4g ... 4g + 3, reads 64 bytes of row g (and of g + 8, g + 16, g + 24):
                16 bytes per lane and instruction, four of them in flight. The next warp reads the
                next 64 bytes of the row.
    swap        Lanes 0, 1 of a quad hold the first block of 64 columns, 2, 3 the second. They swap
                halves, so that each of the four holds 8 bytes of each block. A sum over two blocks
                could not be scaled any more.
    decode      A byte is two codes. A table in shared memory has the two levels of each of the 256
                bytes, rounded and packed as tensor cores take them: a few instructions for two
                weights. It has 32 copies, one per bank, so that no two lanes wait for each other.
    multiply    An instruction multiplies 16 rows of W by 8 rows of x (n8) in 16 columns; four of
                them cover a block. The columns in a block are not in memory order. Their order is
                the same for W and x, so it does not change the sum.
    scale       The 4 sums of a lane belong to one block of columns and two rows of W. They are
                multiplied by the constants of these rows, in float32, and added to the totals. The
                levels are rounded to 16 bits; their products with the constants are not.

Bytes read: 1/2 + 1/64 per element of W, once. x is read once per tile, from the L2 cache. So with
many rows of x, the warps of several tiles (`groups`) work on the same columns and share x in the L1
cache. The other warps of a thread block take other columns, and the sums are added in a fixed
order, so every run gives the same bits.

`portable` does the same in ordinary arithmetic, with a warp per row of W and a lane per 16 bytes of
it. It is for GPUs whose tensor cores have no bfloat16 (older than sm_80), and for float32.
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

WARPS = 8  # in a block
TILE = 32  # rows of W that a warp multiplies at once


def tensor_core(kind: str, tiles: int, groups: int) -> Kernel:
    """y (m, height) = x (m, width) W^T + bias, for at most 8 * tiles rows of x.

    A thread block takes WARPS * TILE / splits rows of W. width is a multiple of 64, and a block of
    W has at least 64 elements. x and y have dtype `kind`. bias is float32 (height,), and is read
    only if `biased`.
    """
    pack, read, product = KINDS[kind]
    splits = WARPS // groups
    sums = 8 * tiles  # per lane
    slots = sums * 32

    def matmul(weight, x, bias, biased, y, m, height, width):
        packed, levels, shift = weight[0], weight[1], weight[7]
        pairs = cuda.shared.array(256 * 32, U32)
        thread = U32(cuda.threadIdx.x)
        lane = thread & U32(31)
        warp = thread >> U32(5)
        entry = pack(levels[thread >> U32(4)], levels[thread & U32(15)])
        for copy in range(32):
            pairs[thread << U32(5) | (U32(copy) ^ lane)] = entry  # each lane begins in its own bank
        cuda.syncthreads()

        g = lane >> U32(2)
        t = lane & U32(3)
        bank = lane << U32(2)
        odd = t & U32(1)
        upper = t >> U32(1)
        split = U32(warp // U32(groups))
        group = U32(warp % U32(groups))
        tile = U32(cuda.blockIdx.x) * U32(groups) + group
        first = U32(tile * U32(TILE) + g)  # the first of a lane's four rows
        last = U32(height - U32(1))
        lines = width >> U32(6)  # blocks of 64 columns
        totals = cuda.local.array(sums, F32)
        words = cuda.local.array((4, 4), U32)
        scales = cuda.local.array(2, U32)
        b = cuda.local.array(8, U32)
        for i in range(sums):
            totals[i] = F32(0)

        for step in range(U32(2) * split, lines, U32(2 * splits)):
            line = U32(step)
            for i in range(4):  # rows past the end read the last row; their sums are dropped
                row = min(U32(first + U32(8 * i)), last)
                for j in range(4):
                    words[i, j] = U32(0)
                if U32(line + upper) < lines:
                    unit = U32((row * lines + line) * U32(2) + t)
                    words[i, 0], words[i, 1], words[i, 2], words[i, 3] = load4(packed, unit)
            for h in range(2):  # 16 rows need four constants per quad; each lane decodes one
                row = min(U32(first + U32(16 * h) + U32(8) * upper), last)
                own = U32(line + odd)
                scales[h] = U32(0)
                if own < lines:
                    block = U32(row * lines + own) >> U32(shift - U32(6))
                    scales[h] = bits(constant(block, weight))
            for i in range(4):
                for j in range(2):
                    other = shuffle_xor(words[i, j] if upper else words[i, 2 + j], U32(2))
                    words[i, 2 + j] = words[i, 2 + j] if upper else other
                    words[i, j] = other if upper else words[i, j]

            for half in range(2):
                # The first of the 16 columns that a lane multiplies
                column = U32(U32(line + U32(half)) << U32(6) | odd << U32(5) | upper << U32(4))
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
                            top = words[2 * h, 2 * half + j // 2]
                            low = words[2 * h + 1, 2 * half + j // 2]
                            if j % 2:
                                top = top >> U32(16)
                                low = low >> U32(16)
                            a0 = shared_word(pairs, U32(top << U32(7)) & U32(0x7F80) | bank)
                            a1 = shared_word(pairs, U32(low << U32(7)) & U32(0x7F80) | bank)
                            a2 = shared_word(pairs, top >> U32(1) & U32(0x7F80) | bank)
                            a3 = shared_word(pairs, low >> U32(1) & U32(0x7F80) | bank)
                            b0 = b[2 * j]
                            b1 = b[2 * j + 1]
                            c0, c1, c2, c3 = product(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3)
                        s = number(shuffle(scales[h], lane & U32(28) | U32(half)))
                        s8 = number(shuffle(scales[h], lane & U32(28) | U32(2 + half)))
                        at = 8 * n + 4 * h
                        totals[at] = fma(c0, s, totals[at])
                        totals[at + 1] = fma(c1, s, totals[at + 1])
                        totals[at + 2] = fma(c2, s8, totals[at + 2])
                        totals[at + 3] = fma(c3, s8, totals[at + 3])

        # Of the warps that have sums of the same rows, the upper half passes its sums to the lower
        # half, until one warp is left.
        remaining = splits
        while remaining > 1:
            remaining //= 2
            slot = U32((split % U32(remaining) * U32(groups) + group) * U32(slots) + lane)
            cuda.syncthreads()  # all have read the table or the sums of the last round
            if U32(remaining) <= split and split < U32(2 * remaining):
                for i in range(sums):
                    pairs[slot + U32(32 * i)] = bits(totals[i])
            cuda.syncthreads()
            if split < U32(remaining):
                for i in range(sums):
                    totals[i] = add(totals[i], number(pairs[slot + U32(32 * i)]))

        # totals[8 n + 4 h + 2 r + c] belongs to row 16 h + 8 r + g of the tile and to row
        # 8 n + 2 t + c of x.
        if split == U32(0):
            for n in range(tiles):
                for i in range(8):
                    row = U32(first + U32(16 * (i // 4) + 8 * (i // 2 % 2)))
                    token = U32(U32(8 * n + i % 2) + U32(2) * t)
                    if row < height and token < m:
                        total = add(totals[8 * n + i], bias[row]) if biased else totals[8 * n + i]
                        y[U32(token * height + row)] = U16(pack(total, total) & U32(0xFFFF))

    return Kernel(matmul, (WEIGHT, WORDS, FLOATS, U32, SHORTS, U32, U32, U32), 32 * WARPS)


def portable(kind: str, rows: int) -> Kernel:
    """The same in ordinary float32 arithmetic, for at most `rows` rows of float32 or float16 x.

    A warp takes a row of W. width is a multiple of 32, and a block of W has at least 32 elements.
    So a lane's partial sum of 32 columns belongs to one block and is scaled once.
    """
    half = kind != "float32"
    pack, read, _ = KINDS[kind] if half else (None, None, None)

    def matmul(weight, x, bias, biased, y, m, height, width):
        packed, levels, shift = weight[0], weight[1], weight[7]
        table = cuda.shared.array(16, F32)
        thread = U32(cuda.threadIdx.x)
        if thread < U32(16):
            table[thread] = levels[thread]
        cuda.syncthreads()
        lane = thread & U32(31)
        row = U32(U32(cuda.blockIdx.x) * U32(WARPS) + (thread >> U32(5)))
        lines = width >> U32(5)  # blocks of 32 columns
        totals = cuda.local.array(rows, F32)
        partial = cuda.local.array(rows, F32)
        words = cuda.local.array(4, U32)
        numbers = cuda.local.array(8, F32)
        for token in range(rows):
            totals[token] = F32(0)
        for step in range(lane, lines if row < height else U32(0), U32(32)):
            line = U32(row * lines + U32(step))
            words[0], words[1], words[2], words[3] = load4(packed, line)
            for token in range(rows):
                partial[token] = F32(0)
            for i in range(4):
                for token in range(rows):
                    own = min(U32(token), U32(m - U32(1)))  # rows past the end read the last
                    unit = U32(own * width + U32(step) * U32(32) + U32(8 * i)) >> U32(2)
                    if half:
                        four = load4(x, unit >> U32(1))
                        for j in range(4):
                            numbers[2 * j] = read(four[j] & U32(0xFFFF))
                            numbers[2 * j + 1] = read(four[j] >> U32(16))
                    else:
                        four = load4(x, unit)
                        more = load4(x, unit + U32(1))
                        for j in range(4):
                            numbers[j] = number(four[j])
                            numbers[4 + j] = number(more[j])
                    for j in range(8):
                        level = table[words[i] >> U32(8 * (j // 2) + 4 * (1 - j % 2)) & U32(15)]
                        partial[token] = fma(level, numbers[j], partial[token])
            scale = constant(line >> U32(shift - U32(5)), weight)
            for token in range(rows):
                totals[token] = fma(partial[token], scale, totals[token])
        # Each lane adds what the lane 16, 8, 4, 2, 1 away has, until all have the sum.
        for i in range(5):
            for token in range(rows):
                away = U32(16 >> i)
                totals[token] = add(totals[token], number(shuffle_xor(bits(totals[token]), away)))
        if lane == U32(0) and row < height:
            for token in range(rows):
                if U32(token) < m:
                    total = add(totals[token], bias[row]) if biased else totals[token]
                    rounded = U16(pack(total, total) & U32(0xFFFF)) if half else total
                    y[U32(U32(token) * height + row)] = rounded

    numbers = SHORTS if half else FLOATS
    return Kernel(matmul, (WEIGHT, WORDS, FLOATS, U32, numbers, U32, U32, U32), 32 * WARPS)
