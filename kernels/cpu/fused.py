"""Multiplies x by a 4-bit weight while decoding it in registers; the dense weight is never stored.

With one row of x, a dense product takes as long as reading W, 2 or 4 bytes per element. In 4 bits
this is half a byte, and the processor has time to decode it. Sixteen packed bytes are widened to 16
lanes. Their high nibbles look up 16 even elements, and their low nibbles the 16 odd elements
between them. The elements are not put back in order; instead, the other factor or the result has
that order too:

    rows (n, width)    <->    (n / T, width / 32, T, 2, 16)    T rows, 16 even and 16 odd elements

    y = x W^T     x has this order. Two rows of W times T rows of x: 4 T sums, in registers
    y = x W       y has this order. Rows of W, 64 columns, times T rows of x: 4 T sums, in registers

T is 4, or 1 for a single row of x. An element of W is decoded once for T rows of x, so with T = 4
most instructions are multiplications. Elements are level * scale rounded to float32, as in the
reference; only the order of summation differs.

Bytes read per element of W: 1/2 + 1/64 with double quantization, once for all rows of x. x and y
are read and written many times, in the cache. The weight is passed as the tuple that decode.py
describes.
"""

import functools
import itertools

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils, config
from numba.extending import intrinsic

# Numba compiles for this processor, unless its settings name another one with unknown features.
IS_HOST = not (config.CPU_NAME or config.CPU_FEATURES)
FEATURES = llvmlite.binding.get_host_cpu_features() if IS_HOST else {}
AVX512 = bool(FEATURES.get("avx512f", False))
TEAM = 32  # rows of W that a thread takes at once
LANES = 16  # elements in a register
STRIP = 64  # columns that are processed together
AHEAD = 2  # rows to prefetch ahead, to avoid waiting for memory


def takes(weight, height, width):
    """Whether these kernels can multiply by a weight.

    They need an even height, rows of whole blocks of at least 64, and AVX-512.
    """
    shift = weight[-3]
    avx512 = weight[-1]
    return avx512 and height % 2 == 0 and shift >= 6 and width % (1 << shift) == 0


@njit(parallel=True, cache=True)
def multiply(weight, width, x, tokens, y):
    """y (n, height) = x W^T in float32, for a W (height, width) that `takes` allows.

    x: flat, in the order above. tokens: T, 1 or 4.
    """
    count, height = y.shape
    shift = weight[-3]
    for team in prange((height + TEAM - 1) // TEAM):
        packed, levels = weight[0], weight[1]
        stride = width >> 1  # bytes in a row of W
        scales = np.empty(2 * width >> shift, np.float32)
        sums = np.empty(2 * tokens, np.float32)
        for row in range(team * TEAM, min(team * TEAM + TEAM, height), 2):
            blocks = _decode_scales(weight, row * width, 2 * width, scales) // 2
            start = row * width >> 1
            for first in range(0, count, tokens):
                at = first * width
                if tokens == 1:
                    dots_1(packed, start, stride, levels, scales, blocks, x, at, sums)
                else:
                    dots_4(packed, start, stride, levels, scales, blocks, x, at, sums)
                for t in range(min(tokens, count - first)):
                    y[first + t, row] = sums[t]
                    y[first + t, row + 1] = sums[tokens + t]


@njit(parallel=True, cache=True)
def multiply_back(weight, width, x, tokens, y, parts):
    """y += x W in float32, for a W (height, width) that `takes` allows.

    x: (n / T, height, T), flat. tokens: T, 1 or 4. y: flat, in the order above. The columns are
    split into `parts`, one per thread. A thread takes all rows of x and TEAM rows of W at a time.
    """
    height = x.size // (y.size // width)
    strips = width // STRIP
    shift = weight[-3]
    each = (strips + parts - 1) // parts
    for part in prange(parts):
        packed, levels = weight[0], weight[1]
        stride = width >> 1  # bytes in a row of W
        first = min(np.int64(part) * each, strips) * STRIP
        last = min((np.int64(part) + 1) * each, strips) * STRIP
        scales = np.empty(TEAM * (((last - first) >> shift) + 2), np.float32)
        for top in range(0, height, TEAM):
            rows = min(TEAM, height - top)
            blocks = 0
            for row in range(rows if first < last else 0):
                begin = (top + row) * width
                start = ((begin + first) >> shift) << shift  # where a block begins
                count = begin + last - start
                blocks = _decode_scales(weight, start, count, scales[row * blocks :])
            for token in range(0, y.size // width, tokens):
                at = token * height + top * tokens
                for column in range(first, last, STRIP):
                    start = (top * width + column) >> 1
                    own = scales[(column >> shift) - (first >> shift) :]
                    to = token * width + column * tokens
                    if tokens == 1:
                        add_1(packed, start, stride, levels, own, blocks, x, at, rows, y, to)
                    else:
                        add_4(packed, start, stride, levels, own, blocks, x, at, rows, y, to)


@njit(cache=True, forceinline=True)
def _decode_scales(weight, start, count, scales):
    """Store the scales of the blocks that hold elements start ... start + count - 1.

    Returns the number of blocks.
    """
    _, _, absmax, codes, levels8, offset, largest, shift, shift8, _ = weight
    blocks = (count + (1 << shift) - 1) >> shift
    for i in range(blocks):
        block = (start >> shift) + i
        scale = absmax[block >> shift8]
        if codes.size:  # equation 6; product and sum are rounded separately, as torch does
            scale = levels8[codes[block]] * scale + offset
            scale = min(max(scale, np.float32(0)), largest)
        scales[i] = scale
    return blocks


# Numba has no vectors. The rest emits LLVM instructions directly.

FLOAT = ir.FloatType()
LONG = ir.IntType(64)
INT = ir.IntType(32)
BYTE = ir.IntType(8)
FLOATS = ir.VectorType(FLOAT, LANES)
INTS = ir.VectorType(INT, LANES)
BYTES = ir.VectorType(BYTE, LANES)
ZEROS = ir.Constant(FLOATS, [0.0] * LANES)


class _Writer:
    """Emits the instructions that both kernels are built from."""

    def __init__(self, context, builder, signature, args):
        self.builder = builder
        self.args = []  # an array as the pointer to its data
        for kind, arg in zip(signature.args, args):
            if isinstance(kind, types.Array):
                arg = context.make_array(kind)(context, builder, arg).data
            self.args.append(arg)
        look_up = ir.FunctionType(FLOATS, [FLOATS, INTS])
        fma = ir.FunctionType(FLOATS, [FLOATS] * 3)
        add_lanes = ir.FunctionType(FLOAT, [FLOAT, FLOATS])
        prefetch = ir.FunctionType(ir.VoidType(), [BYTE.as_pointer(), INT, INT, INT])
        self._look_up = self._declare("llvm.x86.avx512.permvar.sf.512", look_up)
        self._fma = self._declare("llvm.fma.v16f32", fma)
        self._add_lanes = self._declare("llvm.vector.reduce.fadd.v16f32", add_lanes)
        self._prefetch = self._declare("llvm.prefetch.p0", prefetch)

    def _declare(self, name, kind):
        return cgutils.get_or_insert_function(self.builder.module, kind, name)

    def index(self, *terms):
        """A sum of products; a factor is a Python integer, or a value at run time."""
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

    def broadcast(self, array, index):
        """A vector with one number of an array in all 16 lanes."""
        number = self.load(array, index, FLOAT)
        empty = ir.Constant(FLOATS, ir.Undefined)
        one = self.builder.insert_element(empty, number, INT(0))
        return self.builder.shuffle_vector(one, one, ir.Constant(INTS, [0] * LANES))

    def decode(self, packed, index, table):
        """16 bytes as 16 even and 16 odd elements.

        A permutation reads only the low 4 bits of its indices.
        """
        nibbles = self.builder.zext(self.load(packed, index, BYTES), INTS)
        high = self.builder.lshr(nibbles, ir.Constant(INTS, [4] * LANES))
        return [self.builder.call(self._look_up, [table, chosen]) for chosen in (high, nibbles)]

    def new_totals(self, keys):
        """A vector variable for each key; LLVM keeps them in registers."""
        return {key: cgutils.alloca_once(self.builder, FLOATS) for key in keys}

    def add_product(self, total, a, b):
        self.builder.store(self.builder.call(self._fma, [a, b, self.builder.load(total)]), total)

    def sum_lanes(self, vector):
        arguments = [ir.Constant(FLOAT, -0.0), vector]
        return self.builder.call(self._add_lanes, arguments, fastmath=("reassoc",))

    def prefetch(self, array, index):
        place = self.builder.gep(array, [index])
        self.builder.call(self._prefetch, [place, INT(0), INT(3), INT(1)])  # read; locality 3; data


def _dots_of(tokens):
    """sums (2, T) = the products of two rows of W with x[at:].

    The bytes of the rows begin at packed[start] and packed[start + stride]. T is fixed, so that the
    sums stay in registers: for each pair of a row of x and a row of W, one sum for even and one for
    odd elements.
    """

    @intrinsic
    def dots(_, packed, start, stride, levels, scales, blocks, x, at, sums):
        def codegen(context, builder, signature, args):
            if not AVX512:  # other processors compile this but never call it
                return context.get_dummy_value()
            write = _Writer(context, builder, signature, args)
            packed, start, stride, levels, scales, blocks, x, at, sums = write.args
            sixteen = write.load(levels, write.index())
            half_strips = builder.mul(blocks, blocks.type(STRIP // 2))
            strips = builder.udiv(stride, half_strips)  # in a block
            totals = write.new_totals(itertools.product(range(tokens), (0, 1), (0, 1)))
            for total in totals.values():
                builder.store(ZEROS, total)

            with cgutils.for_range(builder, blocks) as block:
                tables = []
                for row in (0, 1):
                    scale = write.broadcast(scales, write.index([block.index], [row, blocks]))
                    tables.append(builder.fmul(sixteen, scale))
                with cgutils.for_range(builder, strips) as strip:
                    group = write.index([block.index, strips, 2], [strip.index, 2])  # 32 elements
                    for half in (0, 1):
                        decoded = []
                        places = [
                            write.index([start], [row, stride], [group, LANES], [half * LANES])
                            for row in (0, 1)
                        ]
                        for place, table in zip(places, tables):
                            decoded.append(write.decode(packed, place, table))
                        for t in range(tokens):
                            offset = (half * tokens + t) * 2 * LANES
                            place = write.index([at], [group, 2 * LANES * tokens], [offset])
                            for odd in (0, 1):
                                numbers = write.load(x, write.index([place], [odd * LANES]))
                                for row in (0, 1):
                                    total = totals[t, row, odd]
                                    write.add_product(total, decoded[row][odd], numbers)
                    for row in (AHEAD, AHEAD + 1):
                        ahead = write.index([start], [row, stride], [group, LANES])
                        write.prefetch(packed, ahead)

            for t in range(tokens):
                for row in (0, 1):
                    even = builder.load(totals[t, row, 0])
                    odd = builder.load(totals[t, row, 1])
                    total = write.sum_lanes(builder.fadd(even, odd))
                    builder.store(total, builder.gep(sums, [write.index([row * tokens + t])]))
            return context.get_dummy_value()

        number = types.intp
        arguments = (packed, number, number, levels, scales, number, x, number, sums)
        return types.void(*arguments), codegen

    return dots


def _add_of(tokens):
    """y[to:] += x[at:] times 64 columns of some rows of W.

    The bytes of the rows begin at packed[start], `stride` apart; their scales are `apart` apart.
    """

    @intrinsic
    def add(_, packed, start, stride, levels, scales, apart, x, at, rows, y, to):
        def codegen(context, builder, signature, args):
            if not AVX512:
                return context.get_dummy_value()
            write = _Writer(context, builder, signature, args)
            packed, start, stride, levels, scales, apart, x, at, rows, y, to = write.args
            sixteen = write.load(levels, write.index())
            totals = write.new_totals(itertools.product((0, 1), range(tokens), (0, 1)))
            places = [write.place(y, write.index([to], [k * LANES])) for k in range(len(totals))]
            for total, place in zip(totals.values(), places):
                builder.store(builder.load(place, align=4), total)

            with cgutils.for_range(builder, rows) as row:
                scale = write.broadcast(scales, write.index([row.index, apart]))
                table = builder.fmul(sixteen, scale)
                numbers = []
                for t in range(tokens):
                    place = write.index([at], [row.index, tokens], [t])
                    numbers.append(write.broadcast(x, place))
                for half in (0, 1):
                    place = write.index([start], [row.index, stride], [half * LANES])
                    decoded = write.decode(packed, place, table)
                    for t in range(tokens):
                        for odd in (0, 1):
                            write.add_product(totals[half, t, odd], decoded[odd], numbers[t])

            for total, place in zip(totals.values(), places):
                builder.store(builder.load(total), place, align=4)
            return context.get_dummy_value()

        number = types.intp
        arguments = (packed, number, number, levels, scales, number, x, number, number, y, number)
        return types.void(*arguments), codegen

    return add


dots_1 = _dots_of(1)
dots_4 = _dots_of(4)
add_1 = _add_of(1)
add_4 = _add_of(4)
