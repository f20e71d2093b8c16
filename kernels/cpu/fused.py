"""Both products with a weight in 4 bits, fused: it is decoded in registers and multiplied there, and never stored.

For one row of x a dense product is all waiting for W, 2 or 4 bytes an element. In 4 bits it is half a byte, and the processor
has time to decode it. Sixteen packed bytes, widened to 16 lanes, look up 16 even elements by their high nibbles and the 16 odd
elements between them by their low ones. Nothing is put back in order: the other factor, or the result, comes in that order too,

    tokens (n, width)    <->    (n / T, width / 32, T, 2, 16)         T tokens at a time, 16 even and 16 odd elements of each

    y = x W^T     x in this order. Two rows of W are multiplied by T tokens: 4 T sums, which stay in registers
    y = x W       y in this order. 64 columns of a team of rows are multiplied by T tokens: 4 T sums, which stay there meanwhile

T is 4, or 1 for a single token. An element of W is decoded once for T tokens, so that with 4 most instructions multiply.
Elements are level * scale rounded to float32, as in the reference; only their sum has another order.

Bytes read an element of W: 1/2 + 1/64, double-quantized, once for all tokens; x and y come again and again, from the cache.
The weight comes as the tuple that decode.py describes.
"""

import functools

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils, config
from numba.extending import intrinsic

FEATURES = (
    {} if config.CPU_NAME or config.CPU_FEATURES else llvmlite.binding.get_host_cpu_features()
)
AVX512 = bool(FEATURES.get("avx512f", False))
TEAM = 32  # rows of W that a thread takes at once
LANES, STRIP = 16, 64  # elements in a register, and columns that are dealt with at once
AHEAD = 2  # rows: what will be needed is asked for so early, or memory would be waited for


def takes(weight, height, width):
    """Can a weight be multiplied here: rows in pairs, of whole blocks of at least 64, by a processor that has AVX-512."""
    shift, avx512 = weight[-3], weight[-1]
    return avx512 and height % 2 == 0 and shift >= 6 and width % (1 << shift) == 0


@njit(parallel=True, cache=True)
def multiply(weight, width, x, tokens, y):
    """y (n, height) = x W^T, float32, for W (height, width) that `takes` allows; x as above, with T = `tokens`, 1 or 4."""
    (count, height), shift = y.shape, weight[-3]
    for team in prange((height + TEAM - 1) // TEAM):
        scales, sums = np.empty(2 * width >> shift, np.float32), np.empty(2 * tokens, np.float32)
        for row in range(team * TEAM, min(team * TEAM + TEAM, height), 2):
            blocks = _decode_scales(weight, row * width, 2 * width, scales) // 2
            for first in range(0, count, tokens):
                if tokens == 1:
                    dots_1(
                        weight[0],
                        row * width >> 1,
                        width >> 1,
                        weight[1],
                        scales,
                        blocks,
                        x,
                        first * width,
                        sums,
                    )
                else:
                    dots_4(
                        weight[0],
                        row * width >> 1,
                        width >> 1,
                        weight[1],
                        scales,
                        blocks,
                        x,
                        first * width,
                        sums,
                    )
                for t in range(min(tokens, count - first)):
                    y[first + t, row], y[first + t, row + 1] = sums[t], sums[tokens + t]


@njit(parallel=True, cache=True)
def multiply_back(weight, width, x, tokens, y, parts):
    """y += x W, float32, for W (height, width) that `takes` allows; y as above, T = `tokens`, and x (n / T, height, T); flat.

    The columns are shared out in `parts`, one for each thread, which goes over TEAM rows of W with all tokens at a time.
    """
    height, strips, shift = x.size // (y.size // width), width // STRIP, weight[-3]
    each = (strips + parts - 1) // parts
    for part in prange(parts):
        first, last = (
            min(np.int64(part) * each, strips) * STRIP,
            min((np.int64(part) + 1) * each, strips) * STRIP,
        )
        scales = np.empty(TEAM * ((last - first >> shift) + 2), np.float32)
        for top in range(0, height, TEAM):
            rows, blocks = min(TEAM, height - top), 0
            for row in range(rows if first < last else 0):
                start = ((top + row) * width + first >> shift) << shift  # where a block begins
                blocks = _decode_scales(
                    weight, start, (top + row) * width + last - start, scales[row * blocks :]
                )
            for token in range(0, y.size // width, tokens):
                for column in range(first, last, STRIP):
                    start, block = top * width + column >> 1, (column >> shift) - (first >> shift)
                    to, at = token * width + column * tokens, token * height + top * tokens
                    if tokens == 1:
                        add_1(
                            weight[0],
                            start,
                            width >> 1,
                            weight[1],
                            scales[block:],
                            blocks,
                            x,
                            at,
                            rows,
                            y,
                            to,
                        )
                    else:
                        add_4(
                            weight[0],
                            start,
                            width >> 1,
                            weight[1],
                            scales[block:],
                            blocks,
                            x,
                            at,
                            rows,
                            y,
                            to,
                        )


@njit(cache=True, forceinline=True)
def _decode_scales(weight, start, count, scales):
    """The scales of elements start ... start + count, whole blocks; -> how many they are."""
    _, _, absmax, codes, levels8, offset, largest, shift, shift8, _ = weight
    blocks = (count + (1 << shift) - 1) >> shift
    for i in range(blocks):
        block = (start >> shift) + i
        scale = absmax[block >> shift8]
        if codes.size:  # equation 6; product and sum are rounded one by one, as torch does
            scale = levels8[codes[block]] * scale + offset
            scale = min(max(scale, np.float32(0)), largest)
        scales[i] = scale
    return blocks


# What follows writes LLVM's instructions one by one: Numba has no vectors.

FLOAT, LONG, INT, BYTE = ir.FloatType(), ir.IntType(64), ir.IntType(32), ir.IntType(8)
FLOATS, INTS, BYTES = (
    ir.VectorType(FLOAT, LANES),
    ir.VectorType(INT, LANES),
    ir.VectorType(BYTE, LANES),
)
ZEROS = ir.Constant(FLOATS, [0.0] * LANES)


class _Writer:
    """Writes what both kernels are made of."""

    def __init__(self, context, builder, signature, args):
        self.builder, declare, module = builder, cgutils.get_or_insert_function, builder.module
        self.args = [
            context.make_array(kind)(context, builder, arg).data
            if isinstance(kind, types.Array)
            else arg
            for kind, arg in zip(signature.args, args)
        ]
        self.look_up = declare(
            module, ir.FunctionType(FLOATS, [FLOATS, INTS]), "llvm.x86.avx512.permvar.sf.512"
        )
        self.fma = declare(module, ir.FunctionType(FLOATS, [FLOATS] * 3), "llvm.fma.v16f32")
        self.sum = declare(
            module, ir.FunctionType(FLOAT, [FLOAT, FLOATS]), "llvm.vector.reduce.fadd.v16f32"
        )
        self.prefetch = declare(
            module,
            ir.FunctionType(ir.VoidType(), [BYTE.as_pointer(), INT, INT, INT]),
            "llvm.prefetch.p0",
        )

    def index(self, *terms):
        """The sum of products of integers, known now or later."""
        total = LONG(0)
        for factors in terms:
            values = [
                factor if isinstance(factor, ir.Value) else LONG(factor) for factor in factors
            ]
            total = self.builder.add(total, functools.reduce(self.builder.mul, values))
        return total

    def place(self, array, index, vector=FLOATS):
        return self.builder.bitcast(self.builder.gep(array, [index]), vector.as_pointer())

    def load(self, array, index, vector=FLOATS):
        return self.builder.load(self.place(array, index, vector), align=1)

    def everywhere(self, array, index):
        """16 times one number of an array."""
        one = self.builder.insert_element(
            ir.Constant(FLOATS, ir.Undefined), self.load(array, index, FLOAT), INT(0)
        )
        return self.builder.shuffle_vector(one, one, ir.Constant(INTS, [0] * LANES))

    def decode(self, packed, index, table):
        """16 bytes -> 16 even and 16 odd elements. A permutation reads the low 4 bits of its indices, and no others."""
        nibbles = self.builder.zext(self.load(packed, index, BYTES), INTS)
        high = self.builder.lshr(nibbles, ir.Constant(INTS, [4] * LANES))
        return [self.builder.call(self.look_up, [table, chosen]) for chosen in (high, nibbles)]

    def add_product(self, total, a, b):
        self.builder.store(self.builder.call(self.fma, [a, b, self.builder.load(total)]), total)


def _dots_of(tokens):
    """sums (2, T) = the products of two rows of W, whose bytes begin at packed[start] and packed[start + stride], with x[at:].

    T is fixed, so that the sums are registers: one for the even and one for the odd elements, for each token and row.
    """

    @intrinsic
    def dots(_, packed, start, stride, levels, scales, blocks, x, at, sums):
        def codegen(context, builder, signature, args):
            if not AVX512:  # never called there, yet compiled
                return context.get_dummy_value()
            write = _Writer(context, builder, signature, args)
            packed, start, stride, levels, scales, blocks, x, at, sums = write.args
            sixteen = write.load(levels, write.index())
            strips = builder.udiv(
                stride, builder.mul(blocks, blocks.type(STRIP // 2))
            )  # in a block
            totals = {
                (t, row, odd): cgutils.alloca_once(builder, FLOATS)
                for t in range(tokens)
                for row in (0, 1)
                for odd in (0, 1)
            }
            for total in totals.values():
                builder.store(ZEROS, total)
            with cgutils.for_range(builder, blocks) as block:
                tables = [
                    builder.fmul(
                        sixteen, write.everywhere(scales, write.index([block.index], [row, blocks]))
                    )
                    for row in (0, 1)
                ]
                with cgutils.for_range(builder, strips) as strip:
                    group = write.index(
                        [block.index, strips, 2], [strip.index, 2]
                    )  # of 32 elements
                    for half in (0, 1):
                        bytes_ = [
                            write.index([start], [row, stride], [group, LANES], [half * LANES])
                            for row in (0, 1)
                        ]
                        decoded = [write.decode(packed, *each) for each in zip(bytes_, tables)]
                        for t in range(tokens):
                            place = write.index(
                                [at], [group, 2 * LANES * tokens], [(half * tokens + t) * 2 * LANES]
                            )
                            for odd in (0, 1):
                                numbers = write.load(x, write.index([place], [odd * LANES]))
                                for row in (0, 1):
                                    write.add_product(
                                        totals[t, row, odd], decoded[row][odd], numbers
                                    )
                    for row in (
                        AHEAD,
                        AHEAD + 1,
                    ):  # what will be needed then; else memory would be waited for
                        place = builder.gep(
                            packed, [write.index([start], [row, stride], [group, LANES])]
                        )
                        builder.call(write.prefetch, [place, INT(0), INT(3), INT(1)])
            for t in range(tokens):
                for row in (0, 1):
                    both = builder.fadd(
                        builder.load(totals[t, row, 0]), builder.load(totals[t, row, 1])
                    )
                    total = builder.call(
                        write.sum, [ir.Constant(FLOAT, -0.0), both], fastmath=("reassoc",)
                    )
                    builder.store(total, builder.gep(sums, [write.index([row * tokens + t])]))
            return context.get_dummy_value()

        number = types.intp
        return types.void(packed, number, number, levels, scales, number, x, number, sums), codegen

    return dots


def _add_of(tokens):
    """y[to:] += x[at:] times 64 columns of some rows of W. Their bytes begin at packed[start], `stride` apart."""

    @intrinsic
    def add(_, packed, start, stride, levels, scales, apart, x, at, rows, y, to):
        def codegen(context, builder, signature, args):
            if not AVX512:
                return context.get_dummy_value()
            write = _Writer(context, builder, signature, args)
            packed, start, stride, levels, scales, apart, x, at, rows, y, to = write.args
            sixteen = write.load(levels, write.index())
            totals = {
                (half, t, odd): cgutils.alloca_once(builder, FLOATS)
                for half in (0, 1)
                for t in range(tokens)
                for odd in (0, 1)
            }
            places = [write.place(y, write.index([to], [k * LANES])) for k in range(len(totals))]
            for total, place in zip(totals.values(), places):
                builder.store(builder.load(place, align=4), total)
            with cgutils.for_range(builder, rows) as row:
                table = builder.fmul(
                    sixteen, write.everywhere(scales, write.index([row.index, apart]))
                )
                numbers = [
                    write.everywhere(x, write.index([at], [row.index, tokens], [t]))
                    for t in range(tokens)
                ]
                for half in (0, 1):
                    decoded = write.decode(
                        packed, write.index([start], [row.index, stride], [half * LANES]), table
                    )
                    for t in range(tokens):
                        for odd in (0, 1):
                            write.add_product(totals[half, t, odd], decoded[odd], numbers[t])
            for total, place in zip(totals.values(), places):
                builder.store(builder.load(total), place, align=4)
            return context.get_dummy_value()

        number = types.intp
        return types.void(
            packed, number, number, levels, scales, number, x, number, number, y, number
        ), codegen

    return add


dots_1, dots_4, add_1, add_4 = _dots_of(1), _dots_of(4), _add_of(1), _add_of(4)
