"""Blockwise quantization in one pass: a block is read once, and what depends on its absmax is done while it is in the cache.

The code of a number is how many midpoints between levels lie below it. Of 15 sorted midpoints, 4 comparisons find that: with
the one in the middle, then with one of two, of four, of eight. Which one depends on the comparisons before, and a table in a
register, read by a permutation (vpermps), has it at once for 16 numbers: three instructions each time, look up, compare, add.
Without AVX-512, 15 comparisons side by side beat 4 that wait for each other.
"""

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
GROUP = 16  # numbers that are coded together, to 8 bytes


@njit(parallel=True, cache=True)
def quantize(flat, bits, midpoints, shift, packed, absmax, absmax_bits, avx512):
    """Quantize float32 (n,) in blocks of 2**shift to packed uint8 (ceil(n/2),) and absmax float32 (ceil(n/2**shift),).

    midpoints: float32 (16,), between ascending levels, then infinite. `bits` and `absmax_bits` are uint32 views.
    avx512: bool, may these instructions be used. Equal to nf4.quantize bit for bit: the same products, rounded one by one.
    """
    for block in prange(absmax.size):
        start, stop = np.int64(block << shift), min(np.int64((block + 1) << shift), flat.size)
        power, reciprocal = _scale(bits[start:stop], block, absmax, absmax_bits)
        groups = (stop - start) // GROUP if avx512 else 0
        if groups > 0:
            code_avx512(flat, start, power, reciprocal, midpoints, packed, start >> 1, groups)
            start += groups * GROUP
        numbers, pairs = flat[start:stop], packed[start >> 1 : (stop + 1) >> 1]
        for i in range(numbers.size >> 1):
            high = _code(numbers[2 * i] * power * reciprocal, midpoints)
            low = _code(numbers[2 * i + 1] * power * reciprocal, midpoints)
            pairs[i] = np.uint8(high << 4 | low)
        if numbers.size & 1:  # the odd one's partner is one of the zeros that fill the last block
            pairs[-1] = np.uint8(
                _code(numbers[-1] * power * reciprocal, midpoints) << 4
                | _code(np.float32(0), midpoints)
            )


@njit(parallel=True, cache=True)
def quantize_wide(flat, bits, midpoints, shift, codes, absmax, absmax_bits):
    """The same with 17 to 256 levels, a byte a code: midpoints float32 (256,), sorted, and at their end infinite."""
    for block in prange(absmax.size):
        start, stop = block << shift, min((block + 1) << shift, flat.size)
        power, reciprocal = _scale(bits[start:stop], block, absmax, absmax_bits)
        for i in range(start, stop):
            number, code = flat[i] * power * reciprocal, np.int32(0)
            for half in (128, 64, 32, 16, 8, 4, 2, 1):
                code += np.int32(half if number > midpoints[code + half - 1] else 0)
            codes[i] = code


@njit(cache=True)
def _scale(bits, block, absmax, absmax_bits):
    """Store the absmax of a block; -> the power of two and the reciprocal that its numbers are multiplied by.

    Magnitudes are compared as integers, because those order alike, the maximum of integers can be vectorised, and a NaN comes
    out above infinity instead of vanishing. A block was finite if its absmax is.
    """
    top = np.uint32(0)
    for i in range(bits.size):
        top = max(top, bits[i] & np.uint32(0x7FFFFFFF))
    absmax_bits[block] = top
    scale, power = absmax[block], np.float32(1)
    if scale < np.float32(2.0**-64):
        power = np.float32(2.0**64)
    elif scale > np.float32(2.0**64):
        power = np.float32(2.0**-64)
    return power, np.float32(1) / (scale * power) if scale > 0 else np.float32(0)


@njit(cache=True)
def _code(number, midpoints):
    """How many midpoints lie below: a tie takes the lower code."""
    below = np.int32(0)
    for k in range(15):
        below += np.int32(number > midpoints[k])
    return below


FLOATS, INTS, LONGS = (
    ir.VectorType(ir.FloatType(), 16),
    ir.VectorType(ir.IntType(32), 16),
    ir.VectorType(ir.IntType(64), 8),
)


def _splat(vector, value):
    return ir.Constant(vector, [value] * vector.count)


def _everywhere(builder, number):
    one = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), number, ir.IntType(32)(0))
    return builder.shuffle_vector(one, one, _splat(INTS, 0))


@intrinsic
def code_avx512(_, flat, start, power, reciprocal, midpoints, packed, byte, groups):
    """packed[byte], ... = the codes of 16 * groups numbers from flat[start] on, each multiplied by power and reciprocal."""

    def codegen(context, builder, signature, args):
        if not AVX512:  # never called there, yet compiled
            return context.get_dummy_value()
        flat_, midpoints_, packed_ = (
            context.make_array(signature.args[k])(context, builder, args[k]).data for k in (0, 4, 5)
        )
        name, kind = "llvm.x86.avx512.permvar.sf.512", ir.FunctionType(FLOATS, [FLOATS, INTS])
        permute = cgutils.get_or_insert_function(builder.module, kind, name)
        power, reciprocal = _everywhere(builder, args[2]), _everywhere(builder, args[3])
        table = builder.load(builder.bitcast(midpoints_, FLOATS.as_pointer()), align=4)
        # midpoint[code + half - 1] for halves of 8, 4, 2, 1, read with the code found so far
        tables = [
            (
                half,
                builder.shuffle_vector(
                    table, table, ir.Constant(INTS, [(k + half - 1) % 16 for k in range(16)])
                ),
            )
            for half in (8, 4, 2, 1)
        ]
        with cgutils.for_range(builder, args[7]) as loop:
            place = builder.gep(
                flat_, [builder.add(args[1], builder.shl(loop.index, loop.index.type(4)))]
            )
            numbers = builder.load(builder.bitcast(place, FLOATS.as_pointer()), align=4)
            numbers, codes = builder.fmul(builder.fmul(numbers, power), reciprocal), _splat(INTS, 0)
            for half, table in tables:
                above = builder.fcmp_ordered(">", numbers, builder.call(permute, [table, codes]))
                codes = builder.select(above, builder.add(codes, _splat(INTS, half)), codes)
            pairs = builder.bitcast(codes, LONGS)  # the first of a pair in the low half
            pairs = builder.or_(
                builder.shl(pairs, _splat(LONGS, 4)), builder.lshr(pairs, _splat(LONGS, 32))
            )
            place = builder.gep(
                packed_, [builder.add(args[6], builder.shl(loop.index, loop.index.type(3)))]
            )
            pairs = builder.trunc(pairs, ir.VectorType(ir.IntType(8), 8))
            builder.store(pairs, builder.bitcast(place, pairs.type.as_pointer()), align=1)
        return context.get_dummy_value()

    signature = (
        flat,
        types.intp,
        types.float32,
        types.float32,
        midpoints,
        packed,
        types.intp,
        types.intp,
    )
    return types.void(*signature), codegen
