"""Dequantizes a 4-bit weight, or a window of it.

All elements of a block have the same scale, so they have only 16 different values. The 16 levels
are scaled and rounded once; then each element is a look-up. With AVX-512 the 16 values fit in a
register, and one instruction (vpermw, or vpermd for float32) looks up 32 or 16 nibbles at once.
`look_up` and `look_up_avx512` give the same bits.

Numba has no bfloat16 or float16. Arrays of them are passed as uint16 and int16 with the same bits.

The kernels take a weight of n elements as a tuple, made by launch.kernel_weight. It is not a named
tuple, because Numba is slow to recognize those:

    packed      uint8 (ceil(n/2),)
    levels      float32 (16,)
    absmax      float32: a scale per block or, with double quantization, per block of constants
    codes       uint8, the 8-bit constants; empty without double quantization
    levels8     float32 (256,)
    offset      float32
    largest     float32: constants are clamped to [0, largest]
    shift       log2 of the block size
    shift8      log2 of the constants' block size; 0 without double quantization
    avx512      bool: whether AVX-512 instructions may be used

Bytes per element: 1/2 + 1/64 read with double quantization, 2 or 4 written.
"""

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils, config
from numba.extending import intrinsic, overload

# Numba compiles for this processor, unless its settings name another one with unknown features.
IS_HOST = not (config.CPU_NAME or config.CPU_FEATURES)
FEATURES = llvmlite.binding.get_host_cpu_features() if IS_HOST else {}
# Whether the processor can round to float16; an x86 from before 2012 cannot.
FLOAT16 = bool(FEATURES.get("f16c", "avx" not in FEATURES))
AVX512 = all(FEATURES.get(name, False) for name in ("avx512f", "avx512bw"))
GROUP = 32  # elements that are looked up together: 16 packed bytes
TEAM = 16  # rows of W that a thread takes at once
# Rows to prefetch ahead in a narrow window, whose rows are too far apart for the hardware to do it
AHEAD = 8


@njit(parallel=True, cache=True)
def decode(weight, start, stride, rows, cols, out):
    """out[r * cols + c] = element start + r * stride + c of the weight, in the dtype of `out`."""
    ahead = AHEAD * stride if stride > cols else 0
    for team in prange((rows + TEAM - 1) // TEAM):
        table = np.empty(16, out.dtype)
        for row in range(team * TEAM, min(team * TEAM + TEAM, rows)):
            _decode_run(weight, start + row * stride, cols, out, row * cols, table, ahead)


@njit(cache=True, forceinline=True)
def _decode_run(weight, start, count, out, at, table, ahead):
    """out[at : at + count] = elements start, start + 1, ..., by blocks, and in them by groups."""
    packed, levels, absmax, codes, levels8, offset, largest, shift, shift8, avx512 = weight
    if ahead:
        prefetch(codes, (start + ahead) >> shift)
        for byte in range((start + ahead) >> 1, (start + ahead + count) >> 1, 64):
            prefetch(packed, byte)
    i = start
    end = start + count
    at -= start  # out[at + i] is element i
    while i < end:
        block = i >> shift
        stop = min((block + 1) << shift, end)
        scale = absmax[block >> shift8]
        if codes.size:  # equation 6; product and sum are rounded separately, as torch does
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
            nibble = (packed[i >> 1] >> (0 if i & 1 else 4)) & 15
            out[at + i] = cast(levels[nibble] * scale, out)
            i += 1


@njit(cache=True)
def look_up(packed, byte, levels, scale, out, at, groups, table):
    """Decode 32 * groups elements of one block, starting at packed[byte], to out[at], ...

    `table` is scratch of 16 elements, in the dtype of `out`.
    """
    for k in range(16):
        table[k] = cast(levels[k] * scale, out)
    pairs = packed[byte : byte + groups * GROUP // 2]
    numbers = out[at : at + groups * GROUP]
    for j in range(pairs.size):
        numbers[2 * j] = table[pairs[j] >> np.uint8(4)]
        numbers[2 * j + 1] = table[pairs[j] & np.uint8(15)]


def cast(number, out):
    """A float32 rounded to the dtype of `out`: to nearest, ties to even, as torch does."""
    if out.dtype == np.float32:
        return number
    if out.dtype == np.int16:
        return np.float16(number).view(np.int16)
    bits = int(np.float32(number).view(np.uint32))
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.uint16(0x7FC0 if np.isnan(number) else rounded)


# Numba has neither 16-bit floats nor vectors. The rest emits LLVM instructions directly.

FLOAT = ir.FloatType()
BYTE = ir.IntType(8)
INT = ir.IntType(32)


@overload(cast)
def _compiled_cast(number, out):
    if out.dtype == types.float32:
        return lambda number, out: number
    return lambda number, out: _cast(number, out)


@intrinsic
def _cast(_, number, out):
    def codegen(context, builder, signature, args):
        empty = ir.Constant(ir.VectorType(FLOAT, 1), ir.Undefined)
        one = builder.insert_element(empty, args[0], INT(0))
        return builder.extract_element(_rounded(builder, one, out.dtype), INT(0))

    return out.dtype(types.float32, out), codegen


def prefetch(array, index):
    """Request the cache line of array[index]. The index may be out of range: no result uses it."""


@overload(prefetch)
def _compiled_prefetch(array, index):
    return lambda array, index: _prefetch(array, index)


@intrinsic
def _prefetch(_, array, index):
    def codegen(context, builder, signature, args):
        place = builder.gep(context.make_array(array)(context, builder, args[0]).data, [args[1]])
        kind = ir.FunctionType(ir.VoidType(), [place.type, INT, INT, INT])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [place, INT(0), INT(3), INT(1)])  # read; locality 3; data
        return context.get_dummy_value()

    return types.void(array, types.intp), codegen


def _rounded(builder, floats, kind):
    """The code of `cast` for a vector of float32: integers of the width of the result."""
    count = floats.type.count
    ints = ir.VectorType(INT, count)
    if kind == types.float32:
        return builder.bitcast(floats, ints)
    shorts = ir.VectorType(ir.IntType(16), count)
    if kind == types.int16:
        return builder.bitcast(builder.fptrunc(floats, ir.VectorType(ir.HalfType(), count)), shorts)
    bits = builder.bitcast(floats, ints)
    odd = builder.and_(builder.lshr(bits, _splat(ints, 16)), _splat(ints, 1))
    nearest = builder.add(builder.add(bits, _splat(ints, 0x7FFF)), odd)
    nearest = builder.lshr(nearest, _splat(ints, 16))
    is_nan = builder.fcmp_unordered("uno", floats, floats)
    return builder.select(is_nan, _splat(shorts, 0x7FC0), builder.trunc(nearest, shorts))


def _splat(vector, value):
    return ir.Constant(vector, [value] * vector.count)


@intrinsic
def look_up_avx512(_, packed, byte, levels, scale, out, at, groups):
    """`look_up`, with the table in a register."""

    def codegen(context, builder, signature, args):
        if not AVX512:  # other processors compile this but never call it
            return context.get_dummy_value()

        def data(k):
            return context.make_array(signature.args[k])(context, builder, args[k]).data

        width = out.dtype.bitwidth  # bits of a result
        lanes = 512 // width  # results in a register
        results = ir.VectorType(ir.IntType(width), lanes)
        pairs = ir.VectorType(ir.IntType(2 * width), lanes // 2)
        half = ir.VectorType(BYTE, lanes // 2)
        floats = ir.VectorType(FLOAT, 16)
        packed_data = data(0)
        levels_data = data(2)
        out_data = data(4)
        source = builder.gep(packed_data, [args[1]])
        target = builder.gep(out_data, [args[5]])

        # The table: the 16 levels times the scale, rounded, repeated until a register is full
        sixteen = builder.load(builder.bitcast(levels_data, floats.as_pointer()), align=4)
        scales = builder.insert_element(ir.Constant(floats, ir.Undefined), args[3], INT(0))
        scales = builder.shuffle_vector(scales, scales, _splat(ir.VectorType(INT, 16), 0))
        table = _rounded(builder, builder.fmul(sixteen, scales), out.dtype)
        repeated = ir.Constant(ir.VectorType(INT, lanes), [k % 16 for k in range(lanes)])
        table = builder.shuffle_vector(table, table, repeated)

        name = "llvm.x86.avx512.permvar." + ("si.512" if width == 32 else "hi.512")
        kind = ir.FunctionType(results, [results, results])
        permute = cgutils.get_or_insert_function(builder.module, kind, name)
        count = builder.mul(args[6], args[6].type(GROUP // lanes))
        with cgutils.for_range(builder, count) as loop:
            # A byte with nibbles h and l becomes two lanes, 0h and hl. The permutation reads the
            # low 4 bits of each, or the low 5 if a register holds 32 results and the table twice.
            place = builder.gep(source, [builder.mul(loop.index, loop.index.type(lanes // 2))])
            bytes_ = builder.load(builder.bitcast(place, half.as_pointer()), align=1)
            wide = builder.zext(bytes_, pairs)
            high = builder.lshr(wide, _splat(pairs, 4))
            low = builder.shl(wide, _splat(pairs, width))
            nibbles = builder.or_(high, low)
            place = builder.gep(target, [builder.mul(loop.index, loop.index.type(lanes))])
            chosen = builder.call(permute, [table, builder.bitcast(nibbles, results)])
            builder.store(chosen, builder.bitcast(place, results.as_pointer()), align=1)
        return context.get_dummy_value()

    arguments = (packed, types.intp, levels, types.float32, out, types.intp, types.intp)
    return types.void(*arguments), codegen
