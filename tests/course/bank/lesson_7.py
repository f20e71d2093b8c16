"""Answers to lesson 7: the four kernels that decode a weight."""

from bank.answers import Answer

V1 = "v1:"
V2 = "v2:"
V3 = "v3:"
V4 = "v4:"
ONCE = "Each element that was asked for"
ORDER = "Whichever warps"
BYTES = "Codes, levels, constants"
SECTORS = "Each write of a warp"

STORE_OF_EIGHT = "store4(out, unit, pairs[0], pairs[1], pairs[2], pairs[3])"

WRONG = [
    Answer(
        "the first code of a byte is in its low half",
        V1,
        {"(U32(0) if i & U32(1) else U32(4))": "(U32(4) if i & U32(1) else U32(0))"},
        shows="v1 to",
    ),
    Answer(
        "a block always has 64 elements",
        V1,
        {"scale = constant(i >> shift, weight)": "scale = constant(i >> U32(6), weight)"},
    ),
    Answer(
        "the constants are never in 8 bits",
        V1,
        {"scale = constant(i >> shift, weight)": "scale = weight[2][i >> shift]"},
        shows="double-quantized constants",
    ),
    Answer(
        "bfloat16 by cutting off the lower half",
        V1,
        {"U16(pack(x, x) & U32(0xFFFF))": "U16(bits(x) >> U32(16))"},
    ),
    Answer(
        "the first number of a pair is in the high half of the word",
        V2,
        {
            "pack(mul(levels[pair >> U32(4)], scale), mul(levels[pair & U32(15)], scale))": "pack("
            "mul(levels[pair & U32(15)], scale), mul(levels[pair >> U32(4)], scale))"
        },
    ),
    Answer(
        "the constant of the byte's number is taken for that of the element's",
        V2,
        {"constant(i >> U32(shift - U32(1)), weight)": "constant(i >> shift, weight)"},
    ),
    Answer(
        "the first byte of a word is in its highest bits",
        V3,
        {
            "high = word >> U32(8 * i + 4) & U32(15)": "high = word >> U32(28 - 8 * i) & U32(15)",
            "low = word >> U32(8 * i) & U32(15)": "low = word >> U32(24 - 8 * i) & U32(15)",
        },
    ),
    Answer(
        "only the first block of the grid fills its table",
        V3,
        functions={
            "v3.by_word": """
    def by_word(weight, out, n):
        packed, levels, shift = weight[0], weight[1], weight[7]
        table = cuda.shared.array(16, F32)
        i = U32(U32(cuda.blockIdx.x) * U32(THREADS) + U32(cuda.threadIdx.x))
        if i < U32(16):
            table[i] = levels[i]
        cuda.syncthreads()
        if U32(8) * i < n:
            scale = constant(i >> U32(shift - U32(3)), weight)
            eight(packed[i], scale, table, pack, out, i)
"""
        },
        shows="got nan",
    ),
    Answer(
        "one constant for all elements of a run",
        V4,
        {
            "scale = constant(at >> U32(shift - U32(3)), weight)": "scale = constant("
            "(run * U32(1024)) >> shift, weight)"
        },
    ),
    Answer(
        "all warps of a block read the words of the first",
        V4,
        {"eight(words[warp * U32(128) + unit], scale,": "eight(words[unit], scale,"},
    ),
    Answer(
        "the halves of a word are swapped",
        V4,
        {
            "word = word >> U32((unit & U32(1)) << U32(4))": "word = word >> U32("
            "(U32(1) - (unit & U32(1))) << U32(4))"
        },
        shows="v4 to float32",
    ),
    Answer(
        "the guard lets one element too many pass",
        ONCE,
        {"        if i < n:\n": "        if i <= n:\n"},
        shows="wanted 0 writes of element",
    ),
    Answer(
        "the start is forgotten",
        ONCE,
        {"i = U32(start + U32(cuda.blockIdx.x)": "i = U32(U32(cuda.blockIdx.x)"},
    ),
    Answer(
        "no guard: all threads of the last block decode",
        ONCE,
        {"        if U32(2) * i < n:\n": "        if True:\n"},
    ),
    Answer(
        "no barrier between filling the table and reading it",
        ORDER,
        {"        cuda.syncthreads()\n        i = U32(": "        i = U32("},
        shows="nan",
    ),
    Answer(
        "threads without work return before the barrier",
        ORDER,
        functions={
            "v3.by_word": """
    def by_word(weight, out, n):
        packed, levels, shift = weight[0], weight[1], weight[7]
        table = cuda.shared.array(16, F32)
        thread = U32(cuda.threadIdx.x)
        i = U32(U32(cuda.blockIdx.x) * U32(THREADS) + thread)
        if U32(8) * i >= n:
            return
        if thread < U32(16):
            table[thread] = levels[thread]
        cuda.syncthreads()
        scale = constant(i >> U32(shift - U32(3)), weight)
        eight(packed[i], scale, table, pack, out, i)
"""
        },
        shows="barrier",
    ),
    Answer(
        "the barrier is only for warps with work",
        ORDER,
        {
            "            store4(words, thread, a, b, c, d)\n        cuda.syncthreads()\n": "     "
            "       store4(words, thread, a, b, c, d)\n            cuda.syncthreads()\n"
        },
        shows="barrier",
    ),
    Answer(
        "the words are exchanged without a barrier",
        ORDER,
        {
            "            store4(words, thread, a, b, c, d)\n        cuda.syncthreads()\n": "     "
            "       store4(words, thread, a, b, c, d)\n"
        },
    ),
    Answer(
        "both numbers of a pair find their constant",
        BYTES,
        {
            "pack(mul(levels[pair >> U32(4)], scale), mul(levels[pair & U32(15)], scale))": "pack("
            "mul(levels[pair >> U32(4)], scale), mul(levels[pair & U32(15)],"
            " constant(i >> U32(shift - U32(1)), weight)))"
        },
        shows="reads of constants",
    ),
    Answer(
        "each code looks its level up in global memory",
        BYTES,
        {
            "eight(packed[i], scale, table, pack, out, i)": "eight("
            "packed[i], scale, levels, pack, out, i)"
        },
        shows="levels",
    ),
    Answer(
        "eight numbers are written as four words",
        BYTES,
        {STORE_OF_EIGHT: "for i in range(4):\n        out[U32(4) * unit + U32(i)] = pairs[i]"},
        shows="out",
    ),
    Answer(
        "each thread writes the 64 bytes that it has decoded",
        SECTORS,
        functions={
            "v4.swapped": """
    def swapped(weight, out, runs):
        packed, levels, shift = weight[0], weight[1], weight[7]
        table = cuda.shared.array(16, F32)
        thread = U32(cuda.threadIdx.x)
        if thread < U32(16):
            table[thread] = levels[thread]
        cuda.syncthreads()
        unit = U32(U32(cuda.blockIdx.x) * U32(THREADS) + thread)
        if unit < runs * U32(32):
            words = load4(packed, unit)
            for i in range(4):
                at = U32(U32(4) * unit + U32(i))
                scale = constant(at >> U32(shift - U32(3)), weight)
                eight(words[i], scale, table, pack, out, at)
"""
        },
        shows="sectors",
    ),
    Answer(
        "neighbouring threads decode elements of different blocks",
        SECTORS,
        functions={
            "v1.naive": """
    def naive(weight, packed_bytes, out, start, n):
        levels, shift = weight[1], weight[7]
        threads = U32(cuda.blockIdx.x) * U32(THREADS) + U32(cuda.threadIdx.x)
        rows = (n - start + U32(63)) // U32(64)
        i = U32(start + threads % rows * U32(64) + threads // rows)
        if i < n and threads // rows < U32(64):
            scale = constant(i >> shift, weight)
            nibble = U32(packed_bytes[i >> U32(1)]) >> (U32(0) if i & U32(1) else U32(4)) & U32(15)
            x = mul(levels[nibble], scale)
            out[i] = U16(pack(x, x) & U32(0xFFFF)) if half else x
"""
        },
    ),
]

RIGHT = [
    Answer(
        "more of numba.cuda: grid, blockDim, laneid, syncwarp, arguments by name",
        edits={
            "U32(start + U32(cuda.blockIdx.x) * U32(THREADS) + U32(cuda.threadIdx.x))": "U32(start)"
            " + U32(cuda.grid(1))",
            "        i = U32(U32(cuda.blockIdx.x) * U32(THREADS) + U32(cuda.threadIdx.x))\n"
            "        if U32(2)": "        i = U32(cuda.blockIdx.x * cuda.blockDim.x"
            " + cuda.threadIdx.x)\n        if U32(2)",
            "lane = thread & U32(31)": "lane = U32(cuda.laneid)",
            "words = cuda.shared.array(STASH, U32, alignment=16)": "words = cuda.shared.array("
            "shape=STASH, dtype=U32, alignment=16)",
            "numbers = cuda.local.array(4, U32)": "numbers = cuda.local.array(shape=4, dtype=U32)",
            "            store4(words, thread, a, b, c, d)\n": "            store4("
            "words, thread, a, b, c, d)\n        cuda.syncwarp()\n",
        },
    ),
    Answer(
        "the words are exchanged by shuffles",
        edits={"    mul,\n    store4,\n": "    mul,\n    shuffle,\n    store4,\n"},
        functions={
            "v4.swapped": """
    def swapped(weight, out, runs):
        packed, levels, shift = weight[0], weight[1], weight[7]
        table = cuda.shared.array(16, F32)
        thread = U32(cuda.threadIdx.x)
        if thread < U32(16):
            table[thread] = levels[thread]
        cuda.syncthreads()
        lane = thread & U32(31)
        run = U32(U32(cuda.blockIdx.x) * U32(8) + (thread >> U32(5)))
        if run < runs:  # the same for all lanes of a warp
            a, b, c, d = load4(packed, U32(run * U32(32) + lane))
            for i in range(4 if half else 8):
                unit = U32(U32(32 * i) + lane)
                place = unit if half else unit >> U32(1)
                owner = place >> U32(2)
                w0 = shuffle(a, owner)
                w1 = shuffle(b, owner)
                w2 = shuffle(c, owner)
                w3 = shuffle(d, owner)
                column = place & U32(3)
                low = w0 if column == U32(0) else w1
                high = w2 if column == U32(2) else w3
                word = low if column < U32(2) else high
                if half:
                    at = U32(run * U32(128) + unit)
                    scale = constant(at >> U32(shift - U32(3)), weight)
                    eight(word, scale, table, pack, out, at)
                else:
                    at = U32(run * U32(256) + unit)
                    scale = constant(at >> U32(shift - U32(2)), weight)
                    four(word >> U32((unit & U32(1)) * U32(16)), scale, table, out, at)
"""
        },
    ),
    Answer(
        "an early return without a barrier, a table filled by the last threads, a loop of shifts",
        functions={
            "v1.naive": """
    def naive(weight, packed_bytes, out, start, n):
        i = U32(U32(cuda.threadIdx.x) + U32(cuda.blockIdx.x) * U32(THREADS)) + start
        if i >= n:
            return
        byte = U32(packed_bytes[i // U32(2)])
        code = byte >> U32(4) if i % U32(2) == U32(0) else byte & U32(15)
        x = mul(constant(i >> weight[7], weight), weight[1][code])
        if half:
            out[i] = U16(pack(x, F32(0)) & U32(0xFFFF))
        else:
            out[i] = x
""",
            "eight": """
def eight(word, scale, levels, pack, out, unit):
    numbers = cuda.local.array(8, F32)
    for i in range(8):
        code = word >> U32(4 * (i ^ 1)) & U32(15)
        numbers[i] = mul(scale, levels[code])
    first = pack(numbers[0], numbers[1])
    second = pack(numbers[2], numbers[3])
    third = pack(numbers[4], numbers[5])
    store4(out, unit, first, second, third, pack(numbers[6], numbers[7]))
""",
            "v3.by_word": """
    def by_word(weight, out, n):
        table = cuda.shared.array(16, F32)
        thread = U32(cuda.threadIdx.x)
        if thread >= U32(THREADS - 16):
            place = U32(thread - U32(THREADS - 16))
            table[place] = weight[1][place]
        cuda.syncthreads()
        i = U32(U32(cuda.blockIdx.x) * U32(THREADS) + thread)
        if i >= n // U32(8):
            return
        block = i // U32(U32(1) << U32(weight[7] - U32(3)))
        eight(weight[0][i], constant(block, weight), table, pack, out, i)
""",
        },
    ),
]
