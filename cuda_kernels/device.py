"""GPU instructions that Python lacks, for one thread or for the 32 threads of a warp together.

Each is defined twice under one name. The Python function defines what it does and runs in the
simulator of the tests (tests/helpers/warpsim.py). The code generator below it emits the instruction
and is what Numba compiles. So the same source of a kernel is tested on a machine without a GPU and
compiled for one.

Arithmetic. The assembler may fuse a product and the following sum, and round only once. Where the
result depends on that, kernels call `mul` and `add`, which round separately, or `fma`, which rounds
once. Plain * and + are for indices.

Memory. A warp is served in sectors of 32 bytes. It is fastest if its 32 threads ask for 16
neighbouring bytes each, in one instruction: `load4`, `store4`. `load4` uses the read-only path,
which may return an old copy, so it is for buffers that nothing writes while the kernel runs;
`load4_written` is for a buffer that the kernel itself changes.
"""

import ctypes
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from numba import cuda, types
from numba.cuda import cgutils
from numba.cuda.cudaimpl import lower
from numba.cuda.extending import type_callable
from numba.cuda.typing.templates import Signature

# Types of numbers and of pointers to them, for Numba
U8, U16, U32, F32 = types.uint8, types.uint16, types.uint32, types.float32
BYTES, SHORTS, WORDS, FLOATS = (types.CPointer(kind) for kind in (U8, U16, U32, F32))
FOUR_WORDS = types.UniTuple(U32, 4)
FOUR_FLOATS = types.UniTuple(F32, 4)
MEMORY = None  # a pointer or a shared array, whichever the kernel passes
# The same for LLVM
BYTE, SHORT, INT, FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
FOUR = ir.VectorType(INT, 4)

EVERY_LANE = 0xFFFFFFFF  # the mask of a full warp
SHARED = 3  # the address space of a block's shared memory
FMAF = ctypes.CFUNCTYPE(ctypes.c_float, *[ctypes.c_float] * 3)(("fmaf", ctypes.CDLL(None)))
inlined = cuda.jit(device=True, inline="always")  # a function that is inlined at each call


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel with its one signature, of the types above, and the threads of its blocks."""

    function: Callable
    signature: tuple[types.Type, ...]
    threads: int


def compiled(twin: Callable, result: types.Type, *arguments: types.Type | None) -> Callable:
    """Register a code generator for `twin`."""

    def register(codegen: Callable) -> Callable:
        def typed(*given: types.Type) -> types.Type:
            pairs = zip(arguments, given)
            kinds = tuple(actual if kind is MEMORY else kind for kind, actual in pairs)
            return Signature(result, kinds, None)

        typed.pysig = inspect.signature(twin)
        type_callable(twin)(lambda context: typed)
        lower(twin, types.VarArg(types.Any))(codegen)
        return codegen

    return register


def call(builder: ir.IRBuilder, name: str, result: ir.Type, *values: ir.Value) -> ir.Value:
    """Call the function that LLVM has for an instruction."""
    kind = ir.FunctionType(result, [value.type for value in values])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values)


# Numbers and their bits


def bits(number):
    """The 32 bits of a float32."""
    return np.float32(number).view(np.uint32)


@compiled(bits, U32, F32)
def _bits(context, builder, kinds, args):
    return builder.bitcast(args[0], INT)


def number(word):
    """The float32 of 32 bits."""
    return np.uint32(word).view(np.float32)


@compiled(number, F32, U32)
def _number(context, builder, kinds, args):
    return builder.bitcast(args[0], FLOAT)


def mul(a, b):
    """a b, rounded."""
    return np.float32(a) * np.float32(b)


@compiled(mul, F32, F32, F32)
def _mul(context, builder, kinds, args):
    return call(builder, "llvm.nvvm.mul.rn.f", FLOAT, *args)


def add(a, b):
    """a + b, rounded."""
    return np.float32(a) + np.float32(b)


@compiled(add, F32, F32, F32)
def _add(context, builder, kinds, args):
    return call(builder, "llvm.nvvm.add.rn.f", FLOAT, *args)


def fma(a, b, c):
    """a b + c, rounded once."""
    return np.float32(FMAF(a, b, c))


@compiled(fma, F32, F32, F32, F32)
def _fma(context, builder, kinds, args):
    return builder.fma(*args)


def pack_bfloat16(low, high):
    """Two float32 in one word, rounded to bfloat16: to nearest, ties to even."""
    halves = np.array([low, high], np.float32).view(np.uint32)
    nearest = (halves.astype(np.uint64) + 0x7FFF + (halves >> 16 & 1)) >> 16
    nearest = np.where(np.isnan(halves.view(np.float32)), 0x7FFF, nearest)
    return np.uint32(nearest[0] | nearest[1] << 16)


@compiled(pack_bfloat16, U32, F32, F32)
def _pack_bfloat16(context, builder, kinds, args):  # sm_80 and newer
    kind = ir.FunctionType(INT, [FLOAT, FLOAT])
    return builder.asm(kind, "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", args, False)


def pack_float16(low, high):
    """Two float32 in one word, rounded to float16; numbers that are too large become infinite."""
    return np.array([low, high], np.float32).astype(np.float16).view(np.uint32)[0]


@compiled(pack_float16, U32, F32, F32)
def _pack_float16(context, builder, kinds, args):
    def half(x):
        return builder.zext(builder.bitcast(builder.fptrunc(x, ir.HalfType()), SHORT), INT)

    low = half(args[0])
    high = half(args[1])
    return builder.or_(low, builder.shl(high, INT(16)))


def from_bfloat16(half):
    """The float32 of the 16 bits of a bfloat16, which are its upper half."""
    return number(np.uint32(half) << np.uint32(16))


@compiled(from_bfloat16, F32, U32)
def _from_bfloat16(context, builder, kinds, args):
    return builder.bitcast(builder.shl(args[0], INT(16)), FLOAT)


def from_float16(half):
    """The float32 of the 16 bits of a float16."""
    return np.float32(np.uint16(half).view(np.float16))


@compiled(from_float16, F32, U32)
def _from_float16(context, builder, kinds, args):
    return builder.fpext(builder.bitcast(builder.trunc(args[0], SHORT), ir.HalfType()), FLOAT)


# Memory


def place(context, builder, kind, memory, index, width=FOUR):
    """The address of 16-byte unit `index`."""
    if isinstance(kind, types.Array):
        memory = context.make_array(kind)(context, builder, memory).data
    return builder.gep(builder.bitcast(memory, width.as_pointer()), [index])


def load4(memory, unit):
    """Words 4 unit ... 4 unit + 3 of a buffer that is only read, in one instruction.

    The buffer starts at a multiple of 16 bytes.
    """
    return load4_written(memory, unit)


@compiled(load4, FOUR_WORDS, MEMORY, U32)
def _load4(context, builder, kinds, args, written=False):
    four = builder.load(place(context, builder, kinds.args[0], args[0], args[1]), align=16)
    if not written:
        four.set_metadata("invariant.load", builder.module.add_metadata([]))
    words = [builder.extract_element(four, INT(i)) for i in range(4)]
    return context.make_tuple(builder, kinds.return_type, words)


def load4_written(memory, unit):
    """The same from a buffer that the kernel also writes."""
    return tuple(np.uint32(word) for word in memory[4 * int(unit) : 4 * int(unit) + 4])


@compiled(load4_written, FOUR_WORDS, MEMORY, U32)
def _load4_written(context, builder, kinds, args):
    return _load4(context, builder, kinds, args, written=True)


def store4(memory, unit, a, b, c, d):
    """Write words 4 unit ... 4 unit + 3, in one instruction."""
    memory[4 * int(unit) : 4 * int(unit) + 4] = (a, b, c, d)


@compiled(store4, types.void, MEMORY, U32, U32, U32, U32, U32)
def _store4(context, builder, kinds, args):
    four = ir.Constant(FOUR, ir.Undefined)
    for i, word in enumerate(args[2:]):
        four = builder.insert_element(four, word, INT(i))
    builder.store(four, place(context, builder, kinds.args[0], args[0], args[1]), align=16)
    return context.get_dummy_value()


def shared_word(memory, offset):
    """The word at a byte offset into a shared array, where addresses have 32 bits."""
    assert offset % 4 == 0, "a word starts at a multiple of 4 bytes"
    return memory[int(offset) // 4]


@compiled(shared_word, U32, MEMORY, U32)
def _shared_word(context, builder, kinds, args):
    start = context.make_array(kinds.args[0])(context, builder, args[0]).data
    start = builder.bitcast(start, BYTE.as_pointer())
    start = builder.addrspacecast(start, ir.PointerType(BYTE, SHARED))
    word = builder.gep(start, [builder.zext(args[1], ir.IntType(64))])
    return builder.load(builder.bitcast(word, ir.PointerType(INT, SHARED)), align=4)


# A warp: its 32 threads are called lanes, and all of them execute these together


def shuffle(value, lane):
    """The `value` of another lane."""
    return np.uint32(cuda.of_all_lanes(value)[int(lane)])


@compiled(shuffle, U32, U32, U32)
def _shuffle(context, builder, kinds, args):
    return call(builder, "llvm.nvvm.shfl.sync.idx.i32", INT, INT(EVERY_LANE), *args, INT(31))


def shuffle_xor(value, mask):
    """The `value` of the lane whose number differs in the bits of `mask`: pairs of lanes swap."""
    return np.uint32(cuda.of_all_lanes(value)[(cuda.threadIdx.x & 31) ^ int(mask)])


@compiled(shuffle_xor, U32, U32, U32)
def _shuffle_xor(context, builder, kinds, args):
    return call(builder, "llvm.nvvm.shfl.sync.bfly.i32", INT, INT(EVERY_LANE), *args, INT(31))


def _product(read, a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    """C + A B for A (16, 16), B (16, 8), by the lanes of a warp together.

    Lane 4 g + t passes a0 ... c3, and gets c0 ... c3 of the result:

    a0, a1      A[g, 2t : 2t + 2], A[g + 8, the same columns]
    a2, a3      the same, 8 columns to the right
    b0, b1      B[2t : 2t + 2, g], B[2t + 8 : 2t + 10, g]
    c0, c1      C[g, 2t], C[g, 2t + 1]
    c2, c3      C[g + 8, 2t], C[g + 8, 2t + 1]

    A word of a or b holds two 16-bit numbers, the first in its low half.
    """
    words = np.array(cuda.of_all_lanes((a0, a1, a2, a3, b0, b1)), np.uint32)
    # (g, t, a0 a1 | a2 a3 | b0 b1, which of the two, low or high half)
    numbers = read(words.view(np.uint16)).reshape(8, 4, 3, 2, 2)
    a = numbers[:, :, :2].transpose(3, 0, 2, 1, 4).reshape(16, 16)
    b = numbers[:, :, 2].transpose(2, 1, 3, 0).reshape(16, 8)
    c = a @ b
    g, t = divmod(cuda.threadIdx.x & 31, 4)
    return c0 + c[g, 2 * t], c1 + c[g, 2 * t + 1], c2 + c[g + 8, 2 * t], c3 + c[g + 8, 2 * t + 1]


def product_bfloat16(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    """`_product` of bfloat16 numbers, summed in float32, by a tensor core: HMMA."""
    return _product(from_bfloat16, a0, a1, a2, a3, b0, b1, c0, c1, c2, c3)


def product_float16(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    """`_product` of float16 numbers, summed in float32, by a tensor core: HMMA."""
    return _product(from_float16, a0, a1, a2, a3, b0, b1, c0, c1, c2, c3)


def _tensor_core(kind):
    """The code generator of the product of `kind`, bf16 or f16."""
    name = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"
    result = "{$0, $1, $2, $3}"
    a = "{$4, $5, $6, $7}"
    b = "{$8, $9}"
    c = "{$10, $11, $12, $13}"
    code = f"{name} {result}, {a}, {b}, {c};"
    registers = "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f"

    def codegen(context, builder, kinds, args):
        sums = ir.LiteralStructType([FLOAT] * 4)
        function = ir.FunctionType(sums, [INT] * 6 + [FLOAT] * 4)
        sums = builder.asm(function, code, registers, args, True)
        numbers = [builder.extract_value(sums, i) for i in range(4)]
        return context.make_tuple(builder, kinds.return_type, numbers)

    return codegen


compiled(product_bfloat16, FOUR_FLOATS, *[U32] * 6, *[F32] * 4)(_tensor_core("bf16"))
compiled(product_float16, FOUR_FLOATS, *[U32] * 6, *[F32] * 4)(_tensor_core("f16"))


# By the name of a 16-bit dtype: how to pack two numbers, read one, and multiply on tensor cores
KINDS = {
    "bfloat16": (pack_bfloat16, from_bfloat16, product_bfloat16),
    "float16": (pack_float16, from_float16, product_float16),
}


# A 4-bit weight, as one argument of the kernels that read one. In the compiled kernel each pointer
# and each number is a separate parameter. launch_cuda.kernel_weight makes this tuple:
#
#     packed      WORDS, 8 codes each
#     levels      FLOATS (16,)
#     absmax      FLOATS: a scale per block or, with double quantization, per block of constants
#     codes       BYTES, the 8-bit constants
#     levels8     FLOATS (256,)
#     offset      FLOATS (1,)
#     largest     F32: constants are clamped to [0, largest]
#     shift       U32, log2 of the block size
#     shift8      U32, log2 of the constants' block size
#     double      U32, whether the weight is double-quantized; if not, codes ... shift8 are not read
WEIGHT = types.Tuple((WORDS, FLOATS, FLOATS, BYTES, FLOATS, FLOATS, F32, U32, U32, U32))


@inlined
def constant(block, weight):
    """The scale of a block of the weight.

    Equation 6: product and sum are rounded separately, as torch does; NaN stays NaN.
    """
    _, _, absmax, codes, levels8, offset, largest, _, shift8, double = weight
    if double:
        scale = add(mul(levels8[codes[block]], absmax[block >> shift8]), offset[0])
        scale = F32(0) if scale < F32(0) else scale
        scale = largest if scale > largest else scale
    else:
        scale = absmax[block]
    return scale
