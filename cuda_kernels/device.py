"""The building blocks of the kernels: what one thread, or the 32 of a warp together, can do and Python has no word for.

Each stands here twice under one name. The Python function says what it does, and is what runs in the simulator of the tests
(tests/warpsim.py); the code generator below it says which instruction that is, and is what Numba compiles. So one source of a
kernel is both tested on a machine without a GPU and compiled for one.

Arithmetic. The assembler may fuse a product with the sum it enters into one rounding. Where a bit depends on it, kernels say
`mul` and `add`, which round one by one, or `fma`, which rounds once. Plain * and + are for indices.

Memory. A warp is served in sectors of 32 bytes, and best if its 32 threads ask for 16 neighbouring bytes each, in one
instruction: `load4`, `store4`. `load4` takes the path for what nobody writes while the kernel runs, where an old copy may lie;
`load4_written` is for a buffer that the kernel changes itself.
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

U8, U16, U32, F32 = types.uint8, types.uint16, types.uint32, types.float32
BYTES, SHORTS, WORDS, FLOATS = (types.CPointer(kind) for kind in (U8, U16, U32, F32))
FOUR_WORDS, FOUR_FLOATS, MEMORY = types.UniTuple(U32, 4), types.UniTuple(F32, 4), None
INT, FLOAT, SHORT, BYTE = ir.IntType(32), ir.FloatType(), ir.IntType(16), ir.IntType(8)
FOUR = ir.VectorType(INT, 4)
EVERY_LANE, SHARED = (
    0xFFFFFFFF,
    3,
)  # the mask of a whole warp; the address space of what a block shares
FMAF = ctypes.CFUNCTYPE(ctypes.c_float, *[ctypes.c_float] * 3)(
    ("fmaf", ctypes.CDLL(None))
)  # of the C library
inlined = cuda.jit(
    device=True, inline="always"
)  # a function of several lines, pasted where it is called


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel, the one signature it has (pointers are those above), and how many threads a block of it has."""

    function: Callable
    signature: tuple[types.Type, ...]
    threads: int


def compiled(twin: Callable, result: types.Type, *arguments: types.Type | None) -> Callable:
    """Registers a code generator for `twin`. Arguments of type MEMORY are a pointer, or an array that a block shares."""

    def register(codegen: Callable) -> Callable:
        def typed(*given: types.Type) -> types.Type:
            return Signature(
                result,
                tuple(actual if kind is MEMORY else kind for kind, actual in zip(arguments, given)),
                None,
            )

        typed.pysig = inspect.signature(twin)
        type_callable(twin)(lambda context: typed)
        lower(twin, types.VarArg(types.Any))(codegen)
        return codegen

    return register


def call(builder: ir.IRBuilder, name: str, result: ir.Type, *values: ir.Value) -> ir.Value:
    """An instruction that LLVM has a function for."""
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
    """Two float32 rounded to bfloat16, to nearest, ties to even, in one word: the first in memory is the low half."""
    halves = np.array([low, high], np.float32).view(np.uint32)
    nearest = (halves.astype(np.uint64) + 0x7FFF + (halves >> 16 & 1)) >> 16
    nearest = np.where(np.isnan(halves.view(np.float32)), 0x7FFF, nearest)
    return np.uint32(nearest[0] | nearest[1] << 16)


@compiled(pack_bfloat16, U32, F32, F32)
def _pack_bfloat16(context, builder, kinds, args):  # sm_80 and newer
    return builder.asm(
        ir.FunctionType(INT, [FLOAT, FLOAT]), "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", args, False
    )


def pack_float16(low, high):
    """Two float32 rounded to float16, in one word; what is too large becomes infinite."""
    return np.array([low, high], np.float32).astype(np.float16).view(np.uint32)[0]


@compiled(pack_float16, U32, F32, F32)
def _pack_float16(context, builder, kinds, args):
    low, high = (
        builder.zext(builder.bitcast(builder.fptrunc(x, ir.HalfType()), SHORT), INT) for x in args
    )
    return builder.or_(low, builder.shl(high, INT(16)))


def from_bfloat16(half):
    """The float32 of the 16 bits of a bfloat16: its upper half."""
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
    """Words 4 unit ... 4 unit + 3 of a buffer that is only read, in one instruction. The buffer starts at 16 bytes."""
    return load4_written(memory, unit)


@compiled(load4, FOUR_WORDS, MEMORY, U32)
def _load4(context, builder, kinds, args, written=False):
    four = builder.load(place(context, builder, kinds.args[0], args[0], args[1]), align=16)
    if not written:
        four.set_metadata("invariant.load", builder.module.add_metadata([]))
    return context.make_tuple(
        builder, kinds.return_type, [builder.extract_element(four, INT(i)) for i in range(4)]
    )


def load4_written(memory, unit):
    """The same from a buffer that the kernel also writes."""
    return tuple(np.uint32(word) for word in memory[4 * int(unit) : 4 * int(unit) + 4])


@compiled(load4_written, FOUR_WORDS, MEMORY, U32)
def _load4_written(context, builder, kinds, args):
    return _load4(context, builder, kinds, args, written=True)


def store4(memory, unit, a, b, c, d):
    """Write words 4 unit ... 4 unit + 3, in one instruction."""
    for i, word in enumerate((a, b, c, d)):
        memory[4 * int(unit) + i] = word


@compiled(store4, types.void, MEMORY, U32, U32, U32, U32, U32)
def _store4(context, builder, kinds, args):
    four = ir.Constant(FOUR, ir.Undefined)
    for i, word in enumerate(args[2:]):
        four = builder.insert_element(four, word, INT(i))
    builder.store(four, place(context, builder, kinds.args[0], args[0], args[1]), align=16)
    return context.get_dummy_value()


def shared_word(memory, offset):
    """The word at a byte offset into an array that the block shares: 32 bits of address suffice there."""
    assert offset % 4 == 0, "no word starts there"
    return memory[int(offset) // 4]


@compiled(shared_word, U32, MEMORY, U32)
def _shared_word(context, builder, kinds, args):
    start = context.make_array(kinds.args[0])(context, builder, args[0]).data
    start = builder.addrspacecast(
        builder.bitcast(start, BYTE.as_pointer()), ir.PointerType(BYTE, SHARED)
    )
    word = builder.gep(start, [builder.zext(args[1], ir.IntType(64))])
    return builder.load(builder.bitcast(word, ir.PointerType(INT, SHARED)), align=4)


# A warp: its 32 threads are called lanes, and these are done by all of them at once


def shuffle(value, lane):
    """The `value` of another lane."""
    return np.uint32(cuda.of_all_lanes(value)[int(lane)])


@compiled(shuffle, U32, U32, U32)
def _shuffle(context, builder, kinds, args):
    return call(builder, "llvm.nvvm.shfl.sync.idx.i32", INT, INT(EVERY_LANE), *args, INT(31))


def shuffle_xor(value, mask):
    """The `value` of the lane whose number differs in the bits of `mask`: each pair of lanes swaps."""
    return np.uint32(cuda.of_all_lanes(value)[(cuda.threadIdx.x & 31) ^ int(mask)])


@compiled(shuffle_xor, U32, U32, U32)
def _shuffle_xor(context, builder, kinds, args):
    return call(builder, "llvm.nvvm.shfl.sync.bfly.i32", INT, INT(EVERY_LANE), *args, INT(31))


def _product(read, a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    """c + A B for A (16, 16), B (16, 8), by the lanes of a warp together. Lane 4 g + t brings, and gets,

    a0, a1      A[g, 2t : 2t + 2], A[g + 8, the same]           two 16-bit numbers a word, the first in the low half
    a2, a3      the same, 8 columns further on
    b0, b1      B[2t : 2t + 2, g], B[2t + 8 : 2t + 10, g]
    c0, c1      C[g, 2t], C[g, 2t + 1]          c2, c3      C[g + 8, 2t], C[g + 8, 2t + 1]
    """
    words = np.array(cuda.of_all_lanes((a0, a1, a2, a3, b0, b1)), np.uint32)
    numbers = read(words.view(np.uint16)).reshape(
        8, 4, 3, 2, 2
    )  # g, t, (a0 a1 | a2 a3 | b0 b1), the two, low and high half
    a = numbers[:, :, :2].transpose(3, 0, 2, 1, 4).reshape(16, 16)
    b = numbers[:, :, 2].transpose(2, 1, 3, 0).reshape(16, 8)
    c, (g, t) = a @ b, divmod(cuda.threadIdx.x & 31, 4)
    return c0 + c[g, 2 * t], c1 + c[g, 2 * t + 1], c2 + c[g + 8, 2 * t], c3 + c[g + 8, 2 * t + 1]


def product_bfloat16(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    """`_product` of bfloat16 numbers, summed in float32, by a tensor core: HMMA."""
    return _product(from_bfloat16, a0, a1, a2, a3, b0, b1, c0, c1, c2, c3)


def product_float16(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    """`_product` of float16 numbers, summed in float32, by a tensor core: HMMA."""
    return _product(from_float16, a0, a1, a2, a3, b0, b1, c0, c1, c2, c3)


def _tensor_core(kind):
    def codegen(context, builder, kinds, args):
        words, results = [f"${i}" for i in range(14)], ir.LiteralStructType([FLOAT] * 4)
        c, a, b, old = (", ".join(words[at:to]) for at, to in ((0, 4), (4, 8), (8, 10), (10, 14)))
        code = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{{c}}}, {{{a}}}, {{{b}}}, {{{old}}};"
        kind_of_code, registers = (
            ir.FunctionType(results, [INT] * 6 + [FLOAT] * 4),
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        )
        made = builder.asm(kind_of_code, code, registers, args, True)
        return context.make_tuple(
            builder, kinds.return_type, [builder.extract_value(made, i) for i in range(4)]
        )

    return codegen


compiled(product_bfloat16, FOUR_FLOATS, *[U32] * 6, *[F32] * 4)(_tensor_core("bf16"))
compiled(product_float16, FOUR_FLOATS, *[U32] * 6, *[F32] * 4)(_tensor_core("f16"))


# What the numbers of a tensor are, by the name of its dtype: how two are packed, one is read, and tensor cores multiply
KINDS = {
    "bfloat16": (pack_bfloat16, from_bfloat16, product_bfloat16),
    "float16": (pack_float16, from_float16, product_float16),
}


# A weight in 4 bits. Kernels that read one all take it as these arguments, made in launch.py:

WEIGHT = (WORDS, FLOATS, FLOATS, BYTES, FLOATS, FLOATS, F32, U32, U32, U32)


@inlined
def constant(block, absmax, codes, levels8, offset, largest, shift8, double):
    """The scale of a block. Equation 6: product and sum are rounded one by one, as torch does; NaN stays NaN."""
    if double:
        scale = add(mul(levels8[codes[block]], absmax[block >> shift8]), offset[0])
        scale = F32(0) if scale < F32(0) else scale
        scale = largest if scale > largest else scale
    else:
        scale = absmax[block]
    return scale
