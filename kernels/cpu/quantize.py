"""Blockwise quantization in one pass: a block is still in the cache when its absmax is known.

The code of a number is the count of midpoints between levels that are below it. In 15 sorted
midpoints, 4 comparisons find it: with the middle one, then with one of two, of four, of eight. Each
comparison depends on the ones before it. With AVX-512 the midpoints fit in a register, and a
permutation (vpermps) looks up the right one for 16 numbers at once. A step has three instructions:
look up, compare, add. Without AVX-512, 15 independent comparisons are faster than 4 dependent ones.

Bytes per element: 4 read, 1/2 + 4/64 written.
"""

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
GROUP = 16  # numbers that are coded together, into 8 bytes


@njit(parallel=True, cache=True)
def quantize(flat, bits, midpoints, shift, packed, absmax, absmax_bits, avx512):
    """Quantize float32 (n,) in blocks of 2**shift to packed uint8 and absmax float32.

    midpoints: float32 (16,), between ascending levels, then infinite. packed: (ceil(n/2),), absmax:
    (ceil(n/2**shift),). `bits` and `absmax_bits` are uint32 views. avx512: whether to use it.
    Equal to nf4.quantize bit for bit: the same products, rounded separately.
    """
    for block in prange(absmax.size):
        start = np.int64(block << shift)
        stop = min(np.int64((block + 1) << shift), flat.size)
        power, reciprocal = _scale(bits[start:stop], block, absmax, absmax_bits)
        groups = (stop - start) // GROUP if avx512 else 0
        if groups > 0:
            code_avx512(flat, start, power, reciprocal, midpoints, packed, start >> 1, groups)
            start += groups * GROUP
        numbers = flat[start:stop]
        pairs = packed[start >> 1 : (stop + 1) >> 1]
        for i in range(numbers.size >> 1):
            high = _code(numbers[2 * i] * power * reciprocal, midpoints)
            low = _code(numbers[2 * i + 1] * power * reciprocal, midpoints)
            pairs[i] = np.uint8(high << 4 | low)
        if numbers.size & 1:  # the last number is paired with a zero that pads the block
            high = _code(numbers[-1] * power * reciprocal, midpoints)
            low = _code(np.float32(0), midpoints)
            pairs[-1] = np.uint8(high << 4 | low)


@njit(parallel=True, cache=True)
def quantize_wide(flat, bits, midpoints, shift, codes, absmax, absmax_bits):
    """The same with 17 to 256 levels, one byte per code; midpoints are float32 (256,)."""
    for block in prange(absmax.size):
        start = block << shift
        stop = min((block + 1) << shift, flat.size)
        power, reciprocal = _scale(bits[start:stop], block, absmax, absmax_bits)
        for i in range(start, stop):
            number = flat[i] * power * reciprocal
            code = np.int32(0)
            for half in (128, 64, 32, 16, 8, 4, 2, 1):
                code += np.int32(half if number > midpoints[code + half - 1] else 0)
            codes[i] = code


@njit(cache=True)
def _scale(bits, block, absmax, absmax_bits):
    """Store the absmax of a block. Returns the power of two and the reciprocal to multiply by.

    Magnitudes are compared as integers. The order is the same, the maximum can be vectorized, and a
    NaN is larger than infinity, so it is never dropped. The block is finite if its absmax is.
    """
    top = np.uint32(0)
    for i in range(bits.size):
        top = max(top, bits[i] & np.uint32(0x7FFFFFFF))
    absmax_bits[block] = top
    scale = absmax[block]
    power = np.float32(1)
    if scale < np.float32(2.0**-64):
        power = np.float32(2.0**64)
    elif scale > np.float32(2.0**64):
        power = np.float32(2.0**-64)
    reciprocal = np.float32(1) / (scale * power) if scale > 0 else np.float32(0)
    return power, reciprocal


@njit(cache=True)
def _code(number, midpoints):
    """How many midpoints are below a number; a tie takes the lower code."""
    below = np.int32(0)
    for k in range(15):
        below += np.int32(number > midpoints[k])
    return below


# Numba has no vectors. The rest emits LLVM instructions directly.

INT = ir.IntType(32)
BYTES = ir.VectorType(ir.IntType(8), 8)
LONGS = ir.VectorType(ir.IntType(64), 8)
INTS = ir.VectorType(INT, 16)
FLOATS = ir.VectorType(ir.FloatType(), 16)


def _splat(vector, value):
    return ir.Constant(vector, [value] * vector.count)


def _broadcast(builder, number):
    """A vector with one number in all 16 lanes."""
    one = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), number, INT(0))
    return builder.shuffle_vector(one, one, _splat(INTS, 0))


@intrinsic
def code_avx512(_, flat, start, power, reciprocal, midpoints, packed, byte, groups):
    """packed[byte], ... = the codes of 16 * groups numbers from flat[start] on.

    Each number is multiplied by power and reciprocal first.
    """

    def codegen(context, builder, signature, args):
        if not AVX512:  # other processors compile this but never call it
            return context.get_dummy_value()

        def data(k):
            return context.make_array(signature.args[k])(context, builder, args[k]).data

        flat_data = data(0)
        midpoints_data = data(4)
        packed_data = data(5)
        name = "llvm.x86.avx512.permvar.sf.512"
        kind = ir.FunctionType(FLOATS, [FLOATS, INTS])
        permute = cgutils.get_or_insert_function(builder.module, kind, name)
        power = _broadcast(builder, args[2])
        reciprocal = _broadcast(builder, args[3])
        table = builder.load(builder.bitcast(midpoints_data, FLOATS.as_pointer()), align=4)
        tables = {}  # tables[half][code] = midpoint[code + half - 1], for the code found so far
        for half in (8, 4, 2, 1):
            shifted = ir.Constant(INTS, [(k + half - 1) % 16 for k in range(16)])
            tables[half] = builder.shuffle_vector(table, table, shifted)

        with cgutils.for_range(builder, args[7]) as loop:
            first = builder.add(args[1], builder.shl(loop.index, loop.index.type(4)))
            place = builder.gep(flat_data, [first])
            numbers = builder.load(builder.bitcast(place, FLOATS.as_pointer()), align=4)
            numbers = builder.fmul(builder.fmul(numbers, power), reciprocal)
            codes = _splat(INTS, 0)
            for half, table in tables.items():
                midpoint = builder.call(permute, [table, codes])
                is_above = builder.fcmp_ordered(">", numbers, midpoint)
                codes = builder.select(is_above, builder.add(codes, _splat(INTS, half)), codes)
            pairs = builder.bitcast(codes, LONGS)  # the first code of a pair in the low half
            high = builder.shl(pairs, _splat(LONGS, 4))
            low = builder.lshr(pairs, _splat(LONGS, 32))
            pairs = builder.or_(high, low)
            first = builder.add(args[6], builder.shl(loop.index, loop.index.type(3)))
            place = builder.gep(packed_data, [first])
            pairs = builder.trunc(pairs, BYTES)
            builder.store(pairs, builder.bitcast(place, BYTES.as_pointer()), align=1)
        return context.get_dummy_value()

    number, index = types.float32, types.intp
    arguments = (flat, index, number, number, midpoints, packed, index, index)
    return types.void(*arguments), codegen
