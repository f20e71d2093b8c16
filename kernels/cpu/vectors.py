"""Vector operations for the CPU kernels: Numba has none, so each emits its LLVM instructions here.

A kernel is written once, as plain Python over vectors of a fixed size:

    row = load(panel, k)                      # WIDTH numbers
    sums = fma(broadcast(x, t), row, sums)    # sums + x[t] * row

LLVM splits a vector into as many registers as the processor needs. WIDTH is 2 registers of AVX-512
(16 lanes), 2 of AVX2 (8 lanes) or 4 of NEON (4 lanes), so that four vectors of sums and their
operands fit in the register file.

Only `look_up`, table[code] for a table of 16, depends on the processor:

    avx512    vpermd, vpermw   the table fits in a register; one instruction looks up all lanes
    avx2      2 vpermps        half the table each; bit 3 of the code chooses between them
    ssse3     pshufb           each byte of the results has a table of 16 bytes: 2 or 4 look-ups,
    neon      tbl              whose results are interleaved; avx2 does so for 16-bit results

Other processors have no `look_up` (LOOK_UP is empty) and the kernels use an ordinary array.

Each operation is also a Python function on NumPy arrays, which runs when Numba's compiler is off:
the tests then check every index.
"""

import hashlib
import os
from pathlib import Path

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils, codegen, config
from numba.extending import lower_builtin, models, register_model, type_callable

FOLDER = Path(__file__).parent
CONTENTS = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(FOLDER.glob("*.py"))))


def kernel(**options):
    """numba.njit, with compiled code that is kept until a file of this package changes.

    Numba itself notices a change of the file of a function, but not of a file that it imports. So
    the code is kept in a folder that is named after the contents of all files and the look_up.
    """

    def compiled(function):
        before = config.CACHE_DIR
        parent = before or os.path.join(FOLDER, "__pycache__")
        config.CACHE_DIR = os.path.join(parent, f"{CONTENTS.hexdigest()[:16]}-{LOOK_UP}")
        try:
            return njit(cache=True, **options)(function)
        finally:
            config.CACHE_DIR = before

    return compiled


def features() -> set[str]:
    """The features of the processor that Numba compiles for, with the names of LLVM."""
    text = config.CPU_FEATURES
    if text is None:
        text = codegen.get_host_cpu_features()
    return {name[1:] for name in text.split(",") if name.startswith("+")}


def best_look_up(triple: str, features: set[str]) -> str:
    """The kind of look_up for a processor; empty if there is none."""
    if triple.startswith(("aarch64", "arm64")):
        return "neon"
    if {"avx512f", "avx512bw"} <= features:
        return "avx512"
    return next((name for name in ("avx2", "ssse3") if name in features), "")


FEATURES = features()
LOOK_UP = best_look_up(llvmlite.binding.get_default_triple(), FEATURES)
WIDTH = 32 if LOOK_UP == "avx512" else 16  # elements in a vector
# Whether the processor can round to float16; an x86 from before 2012 cannot.
FLOAT16 = "f16c" in FEATURES or not llvmlite.binding.get_default_triple().startswith("x86")

FLOAT = ir.FloatType()
BYTE = ir.IntType(8)
SHORT = ir.IntType(16)
INT = ir.IntType(32)
LONG = ir.IntType(64)
ELEMENTS = {
    types.float32: FLOAT,
    types.uint8: BYTE,
    types.int16: SHORT,
    types.uint16: SHORT,
    types.int32: INT,
}


class Vector(types.Type):
    """Numba's type of a vector of `count` elements."""

    def __init__(self, element, count):
        self.element = element
        self.count = count
        super().__init__(f"vector({count} x {element})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, _llvm(kind))


FLOATS = Vector(types.float32, WIDTH)
CODES = Vector(types.int32, WIDTH)


def emits(function, result):
    """Makes a decorated generator of LLVM instructions the compiled form of `function`.

    result: from Numba's types of the arguments to that of the result. The generator takes the
    builder, the type of the result, and the values; for an array, the pointer to its data.
    """

    def register(emit):
        @type_callable(function)
        def typer(context):
            return result

        @lower_builtin(function, types.VarArg(types.Any))
        def lower(context, builder, signature, args):
            values = [
                context.make_array(kind)(context, builder, value).data
                if isinstance(kind, types.Array)
                else value
                for kind, value in zip(signature.args, args)
            ]
            value = emit(builder, signature.return_type, *values)
            return context.get_dummy_value() if signature.return_type == types.none else value

        return emit

    return register


def _part(array, index, count):
    """array[index : index + count], which must be inside the array."""
    assert 0 <= index <= array.size - count
    return array[index : index + count]


def load(array, index):
    """WIDTH numbers of a float32 array."""
    return _part(array, index, WIDTH).copy()


@emits(load, lambda array, index: FLOATS)
def _load(builder, kind, array, index):
    return builder.load(_place(builder, array, index, _llvm(kind)), align=1)


def store(array, index, vector):
    """array[index], ... = the elements of a vector of the array's dtype."""
    _part(array, index, len(vector))[:] = vector


@emits(store, lambda array, index, vector: types.none)
def _store(builder, kind, array, index, vector):
    builder.store(vector, _place(builder, array, index, vector.type), align=1)


def zeros():
    """WIDTH zeros."""
    return np.zeros(WIDTH, np.float32)


@emits(zeros, lambda: FLOATS)
def _zeros(builder, kind):
    return _constant(_llvm(kind), 0.0)


def broadcast(array, index):
    """WIDTH times array[index]."""
    return np.repeat(_part(array, index, 1), WIDTH)


@emits(broadcast, lambda array, index: FLOATS)
def _broadcast(builder, kind, array, index):
    return _repeat(builder, builder.load(builder.gep(array, [index]), align=4), WIDTH)


def fma(a, b, c):
    """a * b + c of vectors of floats, rounded once where the processor can."""
    return a * b + c


@emits(fma, lambda a, b, c: a)
def _fma(builder, kind, *vectors):
    return _call(builder, f"llvm.fmuladd.v{kind.count}f32", _llvm(kind), *vectors)


def total(vector):
    """The sum of a vector of floats, in any order."""
    return vector.sum()


@emits(total, lambda vector: types.float32)
def _total(builder, kind, vector):
    function = f"llvm.vector.reduce.fadd.v{vector.type.count}f32"
    return _call(builder, function, FLOAT, FLOAT(-0.0), vector, fastmath=["reassoc"])


def cast(number, out):
    """A float32 rounded to the dtype of `out`: to nearest, ties to even, as torch does.

    Numba has no bfloat16 or float16; arrays of them have the dtypes uint16 and int16.
    """
    if out.dtype == np.float32:
        return number
    if out.dtype == np.int16:
        return np.float16(number).view(np.int16)
    bits = int(np.float32(number).view(np.uint32))
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.uint16(0x7FC0 if np.isnan(number) else rounded)


@emits(cast, lambda number, out: out.dtype)
def _cast(builder, kind, number, out):
    one = builder.insert_element(ir.Constant(ir.VectorType(FLOAT, 1), ir.Undefined), number, INT(0))
    return builder.extract_element(_rounded(builder, one, kind), INT(0))


def scaled(levels, scale, out):
    """The first 16 levels times the scale, rounded to the dtype of `out`: a table for look_up."""
    return np.array([cast(level * scale, out) for level in _part(levels, 0, 16)], out.dtype)


@emits(scaled, lambda levels, scale, out: Vector(out.dtype, 16))
def _scaled(builder, kind, levels, scale, out):
    sixteen = ir.VectorType(FLOAT, 16)
    levels = builder.load(_place(builder, levels, LONG(0), sixteen), align=4)
    product = builder.fmul(levels, _repeat(builder, scale, 16))
    return _rounded(builder, product, kind.element)


def look_up(table, packed, byte):
    """table[code] for the WIDTH codes in WIDTH / 2 bytes: the high nibble of a byte first."""
    pairs = _part(packed, byte, WIDTH // 2)
    return table[np.stack([pairs >> 4, pairs & 15], 1).reshape(-1)]


@emits(look_up, lambda table, packed, byte: Vector(table.element, WIDTH))
def _look_up(builder, kind, table, packed, byte):
    half = ir.VectorType(BYTE, WIDTH // 2)
    pairs = builder.load(_place(builder, packed, byte, half), align=1)
    if LOOK_UP == "avx512":
        return _permute_avx512(builder, table, _spread(builder, pairs, kind.element.bitwidth))
    high = builder.lshr(pairs, _constant(half, 4))
    low = builder.and_(pairs, _constant(half, 15))
    return _permute(builder, table, _zip(builder, high, low))


def _spread(builder, pairs, bits):
    """The codes of bytes as integers of `bits` bits, whose upper bits vpermd and vpermw ignore.

    A byte becomes an integer of 2 * bits bits: its high nibble in the lower half, and the byte
    itself in the upper half.
    """
    ints = ir.VectorType(ir.IntType(2 * bits), pairs.type.count)
    wide = builder.zext(pairs, ints)
    high = builder.lshr(wide, _constant(ints, 4))
    both = builder.or_(high, builder.shl(wide, _constant(ints, bits)))
    return builder.bitcast(both, ir.VectorType(ir.IntType(bits), 2 * pairs.type.count))


def _permute(builder, table, codes):
    """table[code] for integers of 0 to 15."""
    bits = 16 if table.type.element == SHORT else 32
    if LOOK_UP == "avx512":
        return _permute_avx512(builder, table, codes)
    if LOOK_UP == "avx2" and bits == 32:
        return _permute_avx2(builder, table, codes)
    return _permute_bytes(builder, table, codes, bits)


def _like(table, codes):
    return ir.VectorType(table.type.element, codes.type.count)


def _permute_avx512(builder, table, codes):
    """As _permute, for codes as wide as the table's elements; their upper bits are ignored."""
    bits = codes.type.element.width
    lanes = 512 // bits
    name = "llvm.x86.avx512.permvar." + ("si.512" if bits == 32 else "hi.512")
    ints = ir.VectorType(codes.type.element, lanes)
    tables = builder.bitcast(_join(builder, [table] * (lanes // 16)), ints)
    parts = [_call(builder, name, ints, tables, part) for part in _parts(builder, codes, lanes)]
    return builder.bitcast(_join(builder, parts), _like(table, codes))


def _permute_avx2(builder, table, codes):
    eight = ir.VectorType(INT, 8)
    floats = ir.VectorType(FLOAT, 8)
    parts = []
    for part in _parts(builder, codes, 8):
        code = _widened(builder, part, eight)
        low, high = (
            _call(builder, "llvm.x86.avx2.permps", floats, half, code)
            for half in _parts(builder, table, 8)
        )
        bit_3_as_sign = builder.shl(code, _constant(eight, 28))
        is_high = builder.icmp_signed("<", bit_3_as_sign, _constant(eight, 0))
        parts.append(builder.select(is_high, high, low))
    return _join(builder, parts)


def _permute_8(builder, table, codes):
    """table[code] for a table of 8 floats and integers of 0 to 7."""
    if LOOK_UP != "avx2":
        return _permute(builder, _join(builder, [table] * 2), codes)
    name = "llvm.x86.avx2.permps"
    parts = [_call(builder, name, table.type, table, part) for part in _parts(builder, codes, 8)]
    return _join(builder, parts)


def _permute_bytes(builder, table, codes, bits):
    name = "llvm.aarch64.neon.tbl1.v16i8" if LOOK_UP == "neon" else "llvm.x86.ssse3.pshuf.b.128"
    size = bits // 8  # bytes in an element
    sixteen = ir.VectorType(BYTE, 16)
    table_bytes = builder.bitcast(table, ir.VectorType(BYTE, 16 * size))
    tables = [_shuffle(builder, table_bytes, range(byte, 16 * size, size)) for byte in range(size)]
    parts = []
    for part in _parts(builder, codes, 16):
        part = builder.trunc(part, sixteen) if part.type != sixteen else part
        planes = [_call(builder, name, sixteen, table_of_byte, part) for table_of_byte in tables]
        while len(planes) > 1:  # of bytes, then of pairs of bytes
            pairs = [_zip(builder, a, b) for a, b in zip(planes[::2], planes[1::2])]
            wide = ir.VectorType(ir.IntType(2 * planes[0].type.element.width), 16)
            planes = [builder.bitcast(pair, wide) for pair in pairs]
        parts += planes
    return builder.bitcast(_join(builder, parts), _like(table, codes))


def times(vector, number):
    """A vector of floats times a float32."""
    return vector * number


@emits(times, lambda vector, number: vector)
def _times(builder, kind, vector, number):
    return builder.fmul(vector, _repeat(builder, number, kind.count))


def plus(a, b):
    """The sum of two vectors of floats."""
    return a + b


@emits(plus, lambda a, b: a)
def _plus(builder, kind, a, b):
    return builder.fadd(a, b)


def no_codes():
    """WIDTH codes, all 0."""
    return np.zeros(WIDTH, np.int32)


@emits(no_codes, lambda: CODES)
def _no_codes(builder, kind):
    return _constant(_llvm(kind), 0)


def eight(array, index):
    """Eight numbers of a float32 array: a small table for `descend`."""
    return _part(array, index, 8).copy()


@emits(eight, lambda array, index: Vector(types.float32, 8))
def _eight(builder, kind, array, index):
    return builder.load(_place(builder, array, index, _llvm(kind)), align=4)


def descend(codes, numbers, table):
    """2 * codes + 1 where a number is above table[codes], else 2 * codes; for codes below 8."""
    return 2 * codes + (numbers > table[codes])


@emits(descend, lambda codes, numbers, table: codes)
def _descend(builder, kind, codes, numbers, table):
    is_above = builder.fcmp_ordered(">", numbers, _permute_8(builder, table, codes))
    doubled = builder.add(codes, codes)
    return builder.sub(doubled, builder.sext(is_above, codes.type))  # true is -1


def pack(packed, byte, codes):
    """packed[byte], ... = two codes in a byte, the first one in the high nibble."""
    _part(packed, byte, WIDTH // 2)[:] = codes[::2] << 4 | codes[1::2]


@emits(pack, lambda packed, byte, codes: types.none)
def _pack(builder, kind, packed, byte, codes):
    count = codes.type.count // 2
    longs = ir.VectorType(LONG, count)
    pairs = builder.bitcast(codes, longs)  # the first code of a pair in the low half
    high = builder.shl(pairs, _constant(longs, 4))
    low = builder.lshr(pairs, _constant(longs, 32))
    bytes_ = builder.trunc(builder.or_(high, low), ir.VectorType(BYTE, count))
    builder.store(bytes_, _place(builder, packed, byte, bytes_.type), align=1)


def prefetch(array, index):
    """Request the cache line of array[index]. The index may be out of range: no result uses it."""


@emits(prefetch, lambda array, index: types.none)
def _prefetch(builder, kind, array, index):
    options = [INT(0), INT(3), INT(1)]  # read; locality 3; data
    place = builder.gep(array, [index])
    _call(builder, "llvm.prefetch.p0", ir.VoidType(), place, *options)


# What the generators share


def _call(builder, name, result, *values, fastmath=()):
    kind = ir.FunctionType(result, [value.type for value in values])
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, values, fastmath=fastmath)


def _place(builder, array, index, vector):
    return builder.bitcast(builder.gep(array, [index]), vector.as_pointer())


def _constant(vector, value):
    return ir.Constant(vector, [value] * vector.count)


def _llvm(kind):
    return ir.VectorType(ELEMENTS[kind.element], kind.count)


def _repeat(builder, number, count):
    one = ir.Constant(ir.VectorType(number.type, count), ir.Undefined)
    return _shuffle(builder, builder.insert_element(one, number, INT(0)), [0] * count)


def _shuffle(builder, vector, indices, other=None):
    """The elements of a vector, or of two in a row, at constant indices."""
    mask = ir.Constant(ir.VectorType(INT, len(indices)), list(indices))
    return builder.shuffle_vector(vector, vector if other is None else other, mask)


def _zip(builder, a, b):
    """a[0], b[0], a[1], b[1], ..."""
    count = a.type.count
    return _shuffle(builder, a, [k // 2 + count * (k % 2) for k in range(2 * count)], b)


def _parts(builder, vector, count):
    starts = range(0, vector.type.count, count)
    return [_shuffle(builder, vector, range(start, start + count)) for start in starts]


def _join(builder, vectors):
    while len(vectors) > 1:
        count = 2 * vectors[0].type.count
        pairs = zip(vectors[::2], vectors[1::2])
        vectors = [_shuffle(builder, a, range(count), b) for a, b in pairs]
    return vectors[0]


def _widened(builder, codes, ints):
    return codes if codes.type == ints else builder.zext(codes, ints)


def _rounded(builder, floats, dtype):
    """The code of `cast` for a vector of float32."""
    if dtype == types.float32:
        return floats
    count = floats.type.count
    ints = ir.VectorType(INT, count)
    shorts = ir.VectorType(SHORT, count)
    if dtype == types.int16:
        return builder.bitcast(builder.fptrunc(floats, ir.VectorType(ir.HalfType(), count)), shorts)
    bits = builder.bitcast(floats, ints)
    odd = builder.and_(builder.lshr(bits, _constant(ints, 16)), _constant(ints, 1))
    nearest = builder.add(builder.add(bits, _constant(ints, 0x7FFF)), odd)
    nearest = builder.lshr(nearest, _constant(ints, 16))
    is_nan = builder.fcmp_unordered("uno", floats, floats)
    return builder.select(is_nan, _constant(shorts, 0x7FC0), builder.trunc(nearest, shorts))
