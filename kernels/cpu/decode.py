"""From 4 bits to numbers: a weight, or a window of it, decoded.

In a block all scales are equal, so there are only 16 different results: scale and round the 16 levels once, then only look
up. Where the processor has AVX-512 the 16 results fit one register, and one instruction (vpermw, or vpermd for float32) looks
up 32 or 16 nibbles at once; `look_up` and `look_up_avx512` give the same bits.

bfloat16 and float16 are unknown to Numba. Arrays of them come as uint16 and int16, which is to say as their bits.

The kernels take a weight of n elements as a tuple (a plain one: Numba is slow to recognise others), built in dispatch.py:

    packed      uint8 (ceil(n/2),)
    levels      float32 (16,)
    absmax      float32, the scale of each block; with double quantization, of each block of constants
    codes       uint8, the constants in 8 bits; empty without double quantization
    levels8     float32 (256,)          offset      float32          largest     float32: constants are clamped to [0, largest]
    shift       log2 of the block size  shift8      log2 of the constants' block size; 0 without double quantization
    avx512      bool: may these instructions be used
"""

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils, config
from numba.extending import intrinsic, overload

FEATURES = (
    {} if config.CPU_NAME or config.CPU_FEATURES else llvmlite.binding.get_host_cpu_features()
)
FLOAT16 = bool(
    FEATURES.get("f16c", "avx" not in FEATURES)
)  # can it be rounded to; an x86 of before 2012 cannot
AVX512 = all(FEATURES.get(name, False) for name in ("avx512f", "avx512bw"))
GROUP = 32  # elements that are looked up together, 16 packed bytes
TEAM = 16  # rows of W that a thread takes at once
AHEAD = 8  # rows: how early to ask for the bytes of a narrow window, too far apart for the processor to foresee


@njit(parallel=True, cache=True)
def decode(weight, start, stride, rows, cols, out):
    """out[r * cols + c] = element start + r * stride + c of the weight, in the kind of number that `out` holds."""
    for team in prange((rows + TEAM - 1) // TEAM):
        table = np.empty(16, out.dtype)
        for row in range(team * TEAM, min(team * TEAM + TEAM, rows)):
            _run(
                weight,
                start + row * stride,
                cols,
                out,
                row * cols,
                table,
                AHEAD * stride if stride > cols else 0,
            )


@njit(cache=True, forceinline=True)
def _run(weight, start, count, out, at, table, ahead):
    """out[at : at + count] = elements start, start + 1, ...: block by block, and the bulk of a block in groups."""
    packed, levels, absmax, codes, levels8, offset, largest, shift, shift8, avx512 = weight
    if ahead:
        prefetch(codes, (start + ahead) >> shift)
        for byte in range((start + ahead) >> 1, (start + ahead + count) >> 1, 64):
            prefetch(packed, byte)
    i, end, at = start, start + count, at - start
    while i < end:
        block = i >> shift
        stop = min((block + 1) << shift, end)
        scale = absmax[block >> shift8]
        if codes.size:  # equation 6; product and sum are rounded one by one, as torch does
            scale = levels8[codes[block]] * scale + offset
            scale = min(max(scale, np.float32(0)), largest)
        if i & 1:
            out[at + i] = cast(levels[packed[i >> 1] & 15] * scale, out)
            i += 1
        groups = (stop - i) // GROUP
        if groups > 0:
            if avx512:
                look_up_avx512(packed, i >> 1, levels, scale, out, at + i, groups)
            else:
                look_up(packed, i >> 1, levels, scale, out, at + i, groups, table)
            i += groups * GROUP
        while i < stop:
            nibble = packed[i >> 1] >> (0 if i & 1 else 4) & 15
            out[at + i] = cast(levels[nibble] * scale, out)
            i += 1


@njit(cache=True)
def look_up(packed, byte, levels, scale, out, at, groups, table):
    """Decode 32 * groups elements of one block, from packed[byte] on, to out[at], ...; `table` has room for 16 of them."""
    for k in range(16):
        table[k] = cast(levels[k] * scale, out)
    pairs, numbers = packed[byte : byte + groups * GROUP // 2], out[at : at + groups * GROUP]
    for j in range(pairs.size):
        numbers[2 * j] = table[pairs[j] >> np.uint8(4)]
        numbers[2 * j + 1] = table[pairs[j] & np.uint8(15)]


def cast(number, out):
    """A float32, rounded to the kind of number that `out` holds: to nearest, ties to even, as torch does."""
    if out.dtype == np.float32:
        return number
    if out.dtype == np.int16:
        return np.float16(number).view(np.int16)
    bits = int(np.float32(number).view(np.uint32))
    return np.uint16((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 if number == number else 0x7FC0)


# Numba has neither 16-bit floats nor vectors. What follows writes LLVM's instructions one by one.

FLOAT, BYTE, INT = ir.FloatType(), ir.IntType(8), ir.IntType(32)


@overload(cast)
def _compiled_cast(number, out):
    if out.dtype == types.float32:
        return lambda number, out: number
    return lambda number, out: _cast(number, out)


@intrinsic
def _cast(_, number, out):
    def codegen(context, builder, signature, args):
        one = builder.insert_element(
            ir.Constant(ir.VectorType(FLOAT, 1), ir.Undefined), args[0], INT(0)
        )
        return builder.extract_element(_rounded(builder, one, out.dtype), INT(0))

    return out.dtype(types.float32, out), codegen


def prefetch(array, index):
    """Ask for the cache line of array[index], which may lie outside. No result depends on it."""


@overload(prefetch)
def _compiled_prefetch(array, index):
    return lambda array, index: _prefetch(array, index)


@intrinsic
def _prefetch(_, array, index):
    def codegen(context, builder, signature, args):
        place = builder.gep(context.make_array(array)(context, builder, args[0]).data, [args[1]])
        kind = ir.FunctionType(ir.VoidType(), [place.type, INT, INT, INT])
        builder.call(
            cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0"),
            [place, INT(0), INT(3), INT(1)],
        )
        return context.get_dummy_value()

    return types.void(array, types.intp), codegen


def _rounded(builder, floats, kind):
    """The code of `cast` for a vector of float32, as integers of the width of the result."""
    count = floats.type.count
    if kind == types.float32:
        return builder.bitcast(floats, ir.VectorType(INT, count))
    short = ir.VectorType(ir.IntType(16), count)
    if kind == types.int16:
        return builder.bitcast(builder.fptrunc(floats, ir.VectorType(ir.HalfType(), count)), short)
    bits = builder.bitcast(floats, ir.VectorType(INT, count))
    odd = builder.and_(builder.lshr(bits, _splat(bits.type, 16)), _splat(bits.type, 1))
    nearest = builder.lshr(
        builder.add(builder.add(bits, _splat(bits.type, 0x7FFF)), odd), _splat(bits.type, 16)
    )
    return builder.select(
        builder.fcmp_unordered("uno", floats, floats),
        _splat(short, 0x7FC0),
        builder.trunc(nearest, short),
    )


def _splat(vector, value):
    return ir.Constant(vector, [value] * vector.count)


@intrinsic
def look_up_avx512(_, packed, byte, levels, scale, out, at, groups):
    """`look_up`, with the table in a register."""

    def codegen(context, builder, signature, args):
        if not AVX512:  # never called there, yet compiled
            return context.get_dummy_value()
        width = out.dtype.bitwidth  # bits of a result
        lanes = 512 // width  # results in a register
        results = ir.VectorType(ir.IntType(width), lanes)
        pairs, half = (
            ir.VectorType(ir.IntType(2 * width), lanes // 2),
            ir.VectorType(BYTE, lanes // 2),
        )
        packed_, levels_, out_ = (
            context.make_array(signature.args[k])(context, builder, args[k]).data for k in (0, 2, 4)
        )
        source, target = builder.gep(packed_, [args[1]]), builder.gep(out_, [args[5]])
        sixteen = builder.load(
            builder.bitcast(levels_, ir.VectorType(FLOAT, 16).as_pointer()), align=4
        )
        scales = builder.insert_element(ir.Constant(sixteen.type, ir.Undefined), args[3], INT(0))
        scales = builder.shuffle_vector(scales, scales, _splat(ir.VectorType(INT, 16), 0))
        table = _rounded(builder, builder.fmul(sixteen, scales), out.dtype)
        table = builder.shuffle_vector(
            table, table, ir.Constant(ir.VectorType(INT, lanes), [k % 16 for k in range(lanes)])
        )
        name = "llvm.x86.avx512.permvar." + ("si.512" if width == 32 else "hi.512")
        permute = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(results, [results, results]), name
        )
        with cgutils.for_range(builder, builder.mul(args[6], args[6].type(GROUP // lanes))) as loop:
            # A byte hl becomes two lanes, 0h and hl, and the permutation reads the low 4 bits of each (the low 5 where a
            # register holds 32 results; the table is in there twice).
            place = builder.gep(source, [builder.mul(loop.index, loop.index.type(lanes // 2))])
            wide = builder.zext(
                builder.load(builder.bitcast(place, half.as_pointer()), align=1), pairs
            )
            nibbles = builder.or_(
                builder.lshr(wide, _splat(pairs, 4)), builder.shl(wide, _splat(pairs, width))
            )
            place = builder.gep(target, [builder.mul(loop.index, loop.index.type(lanes))])
            chosen = builder.call(permute, [table, builder.bitcast(nibbles, results)])
            builder.store(chosen, builder.bitcast(place, results.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(
        packed, types.intp, levels, types.float32, out, types.intp, types.intp
    ), codegen
