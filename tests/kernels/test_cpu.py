"""The laws of the CPU kernels: the bits of the reference, for any window and every kind of look-up.

Each kernel runs compiled, and in Python, where NumPy checks every index. Results go into the middle
of a larger array, and the rest of that array must not change. The look-ups of other processors run
on this one if it has their instructions; all are compiled.
"""

import dataclasses
import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

import llvmlite.binding as llvm
import numba
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from llvmlite import ir
from numba.core import cgutils, types
from torch import Tensor

import double_quant
import nf4
from helpers.bounds import Bounded, in_float64
from helpers.strategies import (
    Cut,
    Recipe,
    codes_of_2_to_16_levels,
    codes_of_17_to_256_levels,
    cuts,
    recipes,
    same_bits,
    uniform_code,
)
from kernels import cpu as kernels_cpu
from kernels.cpu import decode, launch, matmul, quantize, vectors

# The types as the kernels see them.
KINDS = {
    torch.float32: np.float32,
    torch.bfloat16: np.uint16,
    torch.float16: np.int16,
}
EDGE = 3  # elements before and after each result that no kernel may touch
LARGEST = torch.finfo(torch.float32).max
# Their constants decode to more than float16's largest number, and to less than 0:
ABOVE = Recipe(
    (7, 99), torch.float16, block_size=2, pattern="blocks of all sizes", exponent=60, seed=1
)
BELOW = Recipe((7, 99), torch.float16, block_size=2, pattern="zero blocks", exponent=14)


FEATURES = {  # of a processor that has this look_up
    "avx512": "+avx512f,+avx512bw,+avx2,+ssse3,+f16c",
    "avx2": "+avx2,+ssse3,+f16c",
    "ssse3": "+ssse3,+f16c",
    "neon": "+neon",
    "": "+f16c",
}
TRIPLES = dict.fromkeys(FEATURES, "x86_64-linux-gnu") | {"neon": "aarch64-linux-gnu"}


def loaded(original: ModuleType, patch: pytest.MonkeyPatch) -> ModuleType:
    """A second copy of a file of kernels, which the files that are loaded next import."""
    name = original.__name__
    spec = importlib.util.spec_from_file_location(name, original.__file__)
    copy = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, name, copy)
    patch.setattr(kernels_cpu, name.rpartition(".")[2], copy)
    spec.loader.exec_module(copy)
    return copy


def in_python(original: ModuleType) -> ModuleType:
    """A second copy of a file of kernels, with Numba's compiler off."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numba.config, "DISABLE_JIT", 1)
        return loaded(original, patch)


@cache
def copies(how: str, look_up: str) -> SimpleNamespace:
    """Copies of the files of kernels for a processor with this look_up, compiled or in Python."""
    files = SimpleNamespace()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llvm, "get_default_triple", lambda: TRIPLES[look_up])
        patch.setattr(numba.config, "CPU_FEATURES", FEATURES[look_up])
        patch.setattr(numba.config, "DISABLE_JIT", int(how == "in Python"))
        for original in (vectors, decode, matmul, quantize):  # in the order of their imports
            setattr(files, original.__name__.rpartition(".")[2], loaded(original, patch))
    assert look_up == files.vectors.LOOK_UP
    return files


HERE = vectors.LOOK_UP  # the look_up of this processor
LEVELS = {"avx512": ["avx512", "avx2", "ssse3", ""], "avx2": ["avx2", "ssse3", ""]}
COMPILED = LEVELS.get(HERE, [HERE, ""])  # the look_ups that run on it
HOW = [pytest.param("in Python", look_up, id=f"in Python, {look_up}") for look_up in ("avx512", "")]
HOW += [pytest.param("compiled", look_up, id=f"compiled, {look_up}") for look_up in COMPILED]
FLOAT16 = pytest.mark.skipif(not vectors.FLOAT16, reason="this processor cannot round to float16")
TARGETS = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=FLOAT16)]
# NumPy raises these where a kernel runs in Python.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:(overflow|invalid value) encountered:RuntimeWarning"
)


class Framed:
    """Room for `count` results, in the middle of numbers that must stay."""

    def __init__(self, count: int, kind: type[np.generic]) -> None:
        pattern = b"\xa5" * (count + 2 * EDGE) * np.dtype(kind).itemsize
        self.whole = np.frombuffer(pattern, kind).copy()
        self.inside = self.whole[EDGE : EDGE + count]

    def is_intact(self) -> bool:
        edges = np.concatenate([self.whole[:EDGE], self.whole[EDGE + self.inside.size :]])
        return edges.tobytes() == b"\xa5" * edges.nbytes


def weight_of(q: nf4.Quantized, constants: double_quant.DoubleQuantized | None) -> tuple:
    """A weight as decode.py documents it."""
    levels = np.zeros(16, np.float32)
    levels[: q.codebook.numel()] = q.codebook.numpy()
    packed = q.packed.numpy().reshape(-1)
    shift = int(q.block_size).bit_length() - 1
    largest = np.float32(min(torch.finfo(q.dtype).max, LARGEST))
    if constants is None:
        return (
            packed,
            levels,
            q.absmax.numpy(),
            np.empty(0, np.uint8),
            levels,
            np.float32(0),
            largest,
            shift,
            0,
        )
    return (
        packed,
        levels,
        constants.absmax.numpy(),
        constants.codes.numpy(),
        constants.codebook.numpy(),
        np.float32(constants.offset.item()),
        largest,
        shift,
        int(constants.block_size).bit_length() - 1,
    )


def frozen(
    recipe: Recipe, double: bool, codebook: Tensor = nf4.NF4, block_size8: int = 256
) -> tuple[nf4.Quantized, double_quant.DoubleQuantized | None, Tensor]:
    """A quantized tensor, its constants if they are quantized too, and what they decode to."""
    q = nf4.quantize(recipe.tensor(), recipe.block_size, codebook)
    if not double:
        return q, None, q.absmax
    constants = double_quant.quantize(q.absmax, block_size8)
    largest = min(torch.finfo(q.dtype).max, LARGEST)
    return q, constants, double_quant.dequantize(constants).clamp(max=largest)


def dense(q: nf4.Quantized, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """What the reference decodes, flattened."""
    whole = nf4.Quantized(q.packed, absmax, q.codebook, q.shape, q.dtype, q.block_size)
    return nf4.dequantize(whole, dtype).flatten()


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore the number of threads after a test."""
    before = numba.get_num_threads()
    yield
    numba.set_num_threads(before)


# quantize


def blockwise(
    how: str, look_up: str, flat: Tensor, block_size: int, codebook: Tensor = nf4.NF4
) -> tuple[Tensor, Tensor]:
    """packed and absmax of float32 (n,), by the kernel for codebooks of this size."""
    wide = codebook.numel() > 16
    tree = launch.in_tree_order((codebook[1:] + codebook[:-1]) / 2, 8 if wide else 4).numpy()
    packed = Framed(flat.numel() if wide else -(-flat.numel() // 2), np.uint8)
    absmax = Framed(-(-flat.numel() // block_size), np.float32)
    numbers = flat.numpy()
    constants = absmax.inside
    shift = block_size.bit_length() - 1
    results = packed.inside, constants, constants.view(np.uint32)
    file = copies(how, look_up).quantize
    if wide:
        file.quantize_wide(numbers, numbers.view(np.uint32), tree, shift, *results)
    else:
        file.quantize(numbers, numbers.view(np.uint32), tree, shift, *results)
    assert packed.is_intact() and absmax.is_intact()
    return torch.from_numpy(packed.inside).reshape(-1, 1), torch.from_numpy(absmax.inside)


@pytest.mark.parametrize(("how", "look_up"), HOW)
@given(
    recipe=recipes,
    codebook=st.one_of(st.just(nf4.NF4), codes_of_2_to_16_levels, codes_of_17_to_256_levels),
)
@example(recipe=Recipe((1, 127), exponent=-140), codebook=nf4.NF4)
@example(recipe=Recipe((129,), block_size=2, exponent=126), codebook=nf4.normal_float(2))
@example(recipe=Recipe((3, 256), pattern="ties"), codebook=uniform_code())
@example(recipe=Recipe((5, 131), pattern="zero blocks"), codebook=double_quant.DYNAMIC)
@example(recipe=Recipe((5, 131), pattern="zero blocks"), codebook=nf4.normal_float(5))
def test_codes_and_constants_are_those_of_the_reference_bit_for_bit(
    how: str, look_up: str, recipe: Recipe, codebook: Tensor
) -> None:
    flat = recipe.tensor().to(torch.float32).reshape(-1).contiguous()
    q = nf4.quantize(flat, recipe.block_size, codebook)
    packed, absmax = blockwise(how, look_up, flat, recipe.block_size, codebook)
    assert same_bits(packed, q.packed) and same_bits(absmax, q.absmax)


@pytest.mark.parametrize(("how", "look_up"), HOW)
@pytest.mark.parametrize(
    "bad", [0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001, 0x7FFFFFFF]
)
def test_the_constant_of_a_block_is_finite_if_its_numbers_are(
    how: str, look_up: str, bad: int
) -> None:
    """Infinity and every kind of NaN, anywhere in a block, next to the largest finite numbers."""
    for place in range(0, 128, 3):
        flat = torch.tensor([1.0, -LARGEST, 0.0, LARGEST]).repeat(32)
        flat.view(torch.int32)[place] = np.uint32(bad).astype(np.int32).item()
        for codebook in (nf4.NF4, nf4.normal_float(8)):
            _, absmax = blockwise(how, look_up, flat, 64, codebook)
            assert absmax.isfinite().tolist() == [place >= 64, place < 64]


# decode


@pytest.mark.parametrize("dtype", TARGETS)
@pytest.mark.parametrize(("how", "look_up"), HOW)
@given(
    cut=cuts(),
    codebook=st.one_of(st.just(nf4.NF4), codes_of_2_to_16_levels),
    block_size8=st.sampled_from([2, 256]),
)
@example(cut=Cut(), codebook=nf4.NF4, block_size8=256)
# A narrow, odd window.
@example(cut=Cut(double_quant=False, start=1, rows=69, cols=32), codebook=nf4.NF4, block_size8=256)
@example(cut=Cut(ABOVE, True, 0, 99, 7, 99), codebook=nf4.NF4, block_size8=256)
@example(cut=Cut(BELOW, True, 1, 99, 6, 98), codebook=nf4.NF4, block_size8=256)
def test_any_window_of_a_weight_has_the_bits_of_the_reference(
    how: str, look_up: str, dtype: torch.dtype, cut: Cut, codebook: Tensor, block_size8: int
) -> None:
    q, constants, absmax = frozen(cut.recipe, cut.double_quant, codebook, block_size8)
    out = Framed(cut.rows * cut.cols, KINDS[dtype])
    copies(how, look_up).decode.decode(
        weight_of(q, constants), cut.start, cut.stride, cut.rows, cut.cols, out.inside
    )
    assert out.is_intact()
    assert same_bits(torch.from_numpy(out.inside).view(dtype), dense(q, absmax, dtype)[cut.index()])


def near_the_edges_of_rounding(dtype: torch.dtype) -> np.ndarray:
    """For each of the 2**16 16-bit floats: it, the middle to the next, and its neighbours."""
    pattern = torch.arange(2**16, dtype=torch.int32)
    if dtype == torch.bfloat16:
        numbers = [(pattern << 16) + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
        return torch.cat(numbers).view(torch.float32).numpy()
    numbers = pattern.to(torch.int16).view(dtype).float()
    with np.errstate(invalid="ignore"):
        middles = ((numbers + numbers.roll(-1)) / 2).numpy()
        above = np.nextafter(middles, np.float32(np.inf))
        below = np.nextafter(middles, np.float32(-np.inf))
        beyond = [65519.996, 65520, 65536, 1e30, -65519.996, -65520, 2**-25, -(2**-25), 2**-150]
        return np.concatenate([numbers.numpy(), middles, above, below, np.float32(beyond)])


def is_rounded(numbers: np.ndarray, results: np.ndarray, dtype: torch.dtype) -> bool:
    """Bit for bit as torch rounds, but for the bits of a NaN, of which there are many."""
    expected = torch.from_numpy(numbers).to(dtype)
    given = torch.from_numpy(results).view(dtype)
    nan = torch.from_numpy(numbers).isnan()
    return bool(given[nan].isnan().all()) and same_bits(given[~nan], expected[~nan])


@pytest.mark.parametrize("dtype", TARGETS[1:])
@pytest.mark.parametrize("block_size", [2, 32])  # one by one, and a block at once
@pytest.mark.parametrize("look_up", COMPILED)
def test_the_compiled_kernels_round_as_torch_does(
    dtype: torch.dtype, block_size: int, look_up: str
) -> None:
    """One block for each number: 1 times it."""
    numbers = near_the_edges_of_rounding(dtype)
    packed = np.zeros(numbers.size * block_size // 2, np.uint8)
    levels = np.ones(16, np.float32)
    shift = block_size.bit_length() - 1
    none = np.empty(0, np.uint8)
    weight = packed, levels, numbers, none, levels, np.float32(0), np.float32(0), shift, 0
    out = np.empty((numbers.size, block_size), KINDS[dtype])
    file = copies("compiled", look_up).decode
    file.decode(weight, 0, block_size, numbers.size, block_size, out.reshape(-1))
    for column in (0, -1):
        assert is_rounded(numbers, out[:, column].copy(), dtype)


@pytest.mark.parametrize("dtype", TARGETS[1:])
def test_in_python_numbers_are_rounded_as_torch_does(dtype: torch.dtype) -> None:
    numbers = near_the_edges_of_rounding(dtype)
    out = np.empty(0, KINDS[dtype])
    results = np.array([vectors.cast(number, out) for number in numbers], KINDS[dtype])
    assert is_rounded(numbers, results, dtype)


# vectors


def every_operation(v: ModuleType) -> Callable[..., np.float32]:
    """A function that uses each operation of vectors.py, or of a copy of it."""

    def use(numbers, levels, packed, out, halves, codes):  # noqa: ANN001, ANN202
        v.prefetch(numbers, 0)
        table = v.scaled(levels, np.float32(2), out)
        row = v.look_up(table, packed, 0)
        sums = v.fma(v.broadcast(numbers, 3), row, v.plus(v.load(numbers, 1), v.zeros()))
        v.store(out, 1, v.times(sums, np.float32(3)))
        found = v.no_codes()
        for level in (1, 2, 4, 8):
            found = v.descend(found, v.load(numbers, 0), v.eight(levels, level))
        v.pack(codes, 1, found)
        small = v.look_up(v.scaled(levels, np.float32(0.3), halves), packed, 0)
        v.store(halves, 0, small)
        halves[-1] = v.cast(np.float32(0.3), halves)
        return v.total(sums) + v.cast(numbers[0], out)

    return use


@pytest.mark.parametrize("dtype", TARGETS[1:])
@pytest.mark.parametrize("look_up", [look_up for look_up in COMPILED if look_up])
def test_compiled_operations_give_what_they_give_in_python(
    look_up: str, dtype: torch.dtype
) -> None:
    """On small integers, whose sums are exact in any order."""
    random = np.random.default_rng(0)
    compiled, plain = (copies(how, look_up).vectors for how in ("compiled", "in Python"))
    size = plain.WIDTH + 2
    numbers = random.integers(-20, 20, size).astype(np.float32)
    levels = np.arange(-8, 8).astype(np.float32)
    packed = random.integers(0, 256, size, dtype=np.uint8)
    results = []
    for function in (numba.njit(every_operation(compiled)), every_operation(plain)):
        out, codes = np.zeros(size, np.float32), np.zeros(size, np.uint8)
        halves = np.zeros(size, KINDS[dtype])
        sums = function(numbers, levels, packed, out, halves, codes)
        results.append((sums, out.tobytes(), halves.tobytes(), codes.tobytes()))
    assert results[0] == results[1]


# look_up


SCALAR = ["pextr", "pinsr", "umov", "ins\t", "ldrb", "movzbl"]  # moves of single elements
CALLS = ["\tcall", "\tbl\t", "\tblr\t"]
PROCESSORS = {  # a processor with this look_up, and what looks up 32 or 16 bits and multiplies
    "avx512": ("skylake-avx512", "vpermd", "vpermw", "vfmadd"),
    "avx2": ("haswell", "vpermd", "vpshufb", "vfmadd"),  # vpermps differs from vpermd in name alone
    "ssse3": ("core2", "pshufb", "pshufb", "mulps"),
    "neon": ("generic", "tbl", "tbl", "fmla"),
}


def decoding_loop(file: ModuleType, dtype: type[np.generic]) -> ir.Module:
    """A loop that decodes to a dtype, by vectors.py."""
    element = numba.from_dtype(np.dtype(dtype))
    table_type = file.Vector(element, 16)
    module = ir.Module()
    arrays = [file._llvm(table_type).as_pointer(), file.BYTE.as_pointer()]
    arrays.append(file.ELEMENTS[element].as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [*arrays, file.LONG])
    function = ir.Function(module, kind, "decode")
    builder = ir.IRBuilder(function.append_basic_block())
    table, packed, out, count = function.args
    table = builder.load(table, align=1)
    with cgutils.for_range(builder, count) as loop:
        start = builder.mul(loop.index, file.LONG(file.WIDTH))
        byte = builder.ashr(start, file.LONG(1))
        numbers = file._look_up(builder, file.Vector(element, file.WIDTH), table, packed, byte)
        file._store(builder, types.none, out, start, numbers)
    builder.ret_void()
    return module


def summing_loop(file: ModuleType) -> ir.Module:
    """A loop that adds the multiples of vectors, as matmul.tile does, by vectors.py."""
    module = ir.Module()
    array = file.FLOAT.as_pointer()
    kind = ir.FunctionType(file._llvm(file.FLOATS), [array, array, file.LONG])
    function = ir.Function(module, kind, "sum")
    builder = ir.IRBuilder(function.append_basic_block())
    a, b, count = function.args
    sums = cgutils.alloca_once_value(builder, file._zeros(builder, file.FLOATS))
    with cgutils.for_range(builder, count) as loop:
        row = file._load(builder, file.FLOATS, b, builder.mul(loop.index, file.LONG(file.WIDTH)))
        factor = file._broadcast(builder, file.FLOATS, a, loop.index)
        builder.store(file._fma(builder, file.FLOATS, factor, row, builder.load(sums)), sums)
    builder.ret(builder.load(sums))
    return module


def assembly(look_up: str, module: ir.Module) -> str:
    """The assembly of a module for a processor with this look_up."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = llvm.Target.from_triple(TRIPLES[look_up])
    machine = target.create_target_machine(cpu=PROCESSORS[look_up][0], opt=3)
    compiled = llvm.parse_assembly(str(module))
    compiled.verify()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(compiled, passes)
    return machine.emit_assembly(compiled)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("look_up", PROCESSORS)
def test_every_processor_looks_up_by_its_instruction_and_moves_no_single_element(
    look_up: str, dtype: torch.dtype
) -> None:
    """Compiled for it; this processor need not have the instruction."""
    _, wide, narrow, _ = PROCESSORS[look_up]
    file = copies("in Python", look_up).vectors
    code = assembly(look_up, decoding_loop(file, KINDS[dtype]))
    assert f"\t{wide if dtype == torch.float32 else narrow}" in code
    assert not [name for name in SCALAR + CALLS if name in code]


@pytest.mark.parametrize("look_up", PROCESSORS)
def test_every_processor_multiplies_vectors_by_its_instruction_and_calls_no_function(
    look_up: str,
) -> None:
    code = assembly(look_up, summing_loop(copies("in Python", look_up).vectors))
    assert f"\t{PROCESSORS[look_up][3]}" in code
    assert not [name for name in SCALAR + CALLS if name in code]


@pytest.mark.parametrize("look_up", FEATURES)
def test_the_best_look_up_of_a_processor_is_chosen(look_up: str) -> None:
    names = {name.removeprefix("+") for name in FEATURES[look_up].split(",")}
    assert vectors.best_look_up(TRIPLES[look_up], names) == look_up


# matmul


@dataclasses.dataclass(frozen=True)
class Product:
    """A product by matmul.py: x W^T or x W, by the kernels for few or for many rows of x."""

    shape: tuple[int, int] = (4, 64)
    block_size: int = 64
    double_quant: bool = True
    tokens: int = 1
    transposed: bool = True
    few: bool = False
    parts: int = 2
    seed: int = 0

    def made(self, how: str, look_up: str) -> tuple[Tensor, Bounded]:
        """The product by the kernel, and what it may be."""
        height, width = self.shape
        recipe = Recipe(self.shape, block_size=self.block_size, exponent=-3, seed=self.seed)
        q, constants, absmax = frozen(recipe, self.double_quant)
        weight = weight_of(q, constants)
        x = Recipe((self.tokens, width if self.transposed else height), seed=self.seed + 1).tensor()
        file = copies(how, look_up).matmul
        if self.few:
            assert file.takes_few(weight, width)
        multiply = self._transposed if self.transposed else self._back
        made = multiply(file, weight, x)
        whole = Bounded.exact(dense(q, absmax, torch.float32).reshape(self.shape))
        bound = Bounded.exact(x).matmul(whole.T if self.transposed else whole, torch.float32)
        return made, in_float64(bound, 2 * x.shape[1])

    def _transposed(self, file: ModuleType, weight: tuple, x: Tensor) -> Tensor:
        height, width = self.shape
        y = Framed(self.tokens * height, np.float32)
        result = y.inside.reshape(self.tokens, height)
        if self.few:
            file.multiply_few(weight, width, x.numpy().reshape(-1), result)
        else:
            interleaved = Framed(-(-self.tokens // file.WIDTH) * width * file.WIDTH, np.float32)
            file.interleave(x.numpy(), interleaved.inside)
            assert interleaved.is_intact()
            file.multiply(weight, width, interleaved.inside, result)
        assert y.is_intact()
        return torch.from_numpy(result)

    def _back(self, file: ModuleType, weight: tuple, x: Tensor) -> Tensor:
        width = self.shape[1]
        columns = width if self.few else -(-width // file.STRIP) * file.STRIP
        if not self.few:
            x = torch.nn.functional.pad(x, (0, 0, 0, -self.tokens % 4))
        y = Framed(len(x) * columns, np.float32)
        y.inside[:] = 0
        multiply = file.multiply_back_few if self.few else file.multiply_back
        multiply(weight, width, x.numpy().reshape(-1), y.inside, self.parts)
        assert y.is_intact()
        return torch.from_numpy(y.inside).reshape(len(x), columns)[: self.tokens, :width]


def check_product(how: str, look_up: str, case: Product) -> None:
    made, bound = case.made(how, look_up)
    assert bound.allows(made)


@pytest.mark.parametrize("look_up", sorted({HERE, "avx2"} & {*COMPILED}))
@given(
    st.builds(
        Product,
        st.tuples(st.integers(1, 80), st.integers(1, 700)),
        st.sampled_from([2, 32, 64, 1024]),
        st.booleans(),
        st.integers(1, 70),
        st.booleans(),
        parts=st.integers(1, 4),
        seed=st.integers(0, 99),
    )
)
@example(Product((130, 70), tokens=5))
@example(Product((130, 70), tokens=5, transposed=False))
def test_a_product_of_any_shape_is_within_the_bound_of_a_float32_product(
    look_up: str, case: Product
) -> None:
    check_product("compiled", look_up, case)


@pytest.mark.skipif(not HERE, reason="this processor has no look_up")
@given(
    st.builds(
        lambda height, blocks, block_size, *rest: Product(
            (height, blocks * block_size), block_size, *rest
        ),
        st.integers(1, 80),
        st.integers(1, 5),
        st.sampled_from([64, 128, 1024]),
        st.booleans(),
        st.integers(1, 11),
        st.booleans(),
        st.just(True),
        st.integers(1, 4),
        st.integers(0, 99),
    )
)
@example(Product((130, 192), tokens=5, few=True))
@example(Product((130, 192), tokens=5, few=True, transposed=False))
def test_a_product_of_few_rows_is_within_the_bound_of_a_float32_product(case: Product) -> None:
    check_product("compiled", HERE, case)


PRODUCTS = [
    Product(),
    Product((34, 70), tokens=5),
    Product((4, 513), 2, tokens=33),
    Product((2, 64), double_quant=False, tokens=4),
    Product((34, 192), tokens=5, few=True),
    Product((2, 256), 256, tokens=1, few=True),
    Product((130, 70), tokens=3, transposed=False),
    Product((5, 200), 2, tokens=4, transposed=False, parts=3),
    Product((130, 192), tokens=2, transposed=False, few=True),
    Product((2, 256), 256, transposed=False, few=True, parts=3),
    Product((2, 64), 64, False, 4, False, True, 5),
]


@pytest.mark.parametrize("case", PRODUCTS)
def test_a_product_keeps_within_its_arrays(case: Product) -> None:
    check_product("in Python", "avx512" if case.few else "", case)


@pytest.mark.parametrize("case", PRODUCTS)
def test_a_compiled_product_keeps_within_its_arrays(case: Product) -> None:
    if case.few and not HERE:
        pytest.skip("this processor has no look_up")
    check_product("compiled", HERE, case)


def test_the_kernels_for_few_rows_take_rows_of_whole_blocks_of_at_least_64() -> None:
    takes_few = copies("in Python", "avx2").matmul.takes_few
    weight = weight_of(*frozen(Recipe((4, 128)), True)[:2])
    assert takes_few(weight, 128) and not takes_few(weight, 96)
    small_blocks = weight_of(*frozen(Recipe((4, 128), block_size=32), True)[:2])
    assert not takes_few(small_blocks, 128)
    assert not copies("in Python", "").matmul.takes_few(weight, 128)


# threads


KERNELS = ["quantize", "quantize_wide", "decode", "multiply", "multiply_back", "few", "back few"]


def shared_by_threads(run: str) -> Callable[[], bytes]:
    """A kernel with work for many threads: each call does it, and gives the result."""
    recipe = Recipe((640, 1024), block_size=1024)
    flat = recipe.tensor().flatten()
    q, constants, _ = frozen(recipe, True)
    weight = weight_of(q, constants)
    x = Recipe((32, 1024)).tensor().numpy().reshape(-1)
    out = np.empty(655360, np.uint16)
    y = np.empty((32, 640), np.float32)
    g = Recipe((4, 640)).tensor().numpy().reshape(-1)

    def call() -> bytes:
        if run.startswith("quantize"):
            codebook = double_quant.DYNAMIC if run == "quantize_wide" else nf4.NF4
            results = blockwise("compiled", HERE, flat, 64, codebook)
            return b"".join(tensor.numpy().tobytes() for tensor in results)
        if run == "decode":
            decode.decode(weight, 0, 1024, 640, 1024, out)
            return out.tobytes()
        if run in ("multiply", "few"):
            multiply = matmul.multiply if run == "multiply" else matmul.multiply_few
            multiply(weight, 1024, x, y)
            return y.tobytes()
        back = np.zeros(4 * 1024, np.float32)
        multiply = matmul.multiply_back if run == "multiply_back" else matmul.multiply_back_few
        multiply(weight, 1024, g, back, numba.get_num_threads())
        return back.tobytes()

    return call


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="Numba has one thread here")
@pytest.mark.parametrize("run", KERNELS)
def test_two_threads_give_the_bits_of_one(run: str, threads: None) -> None:
    """Many times, so that the threads run in many orders."""
    if "few" in run and not HERE:
        return  # these kernels are not called here
    call = shared_by_threads(run)
    numba.set_num_threads(1)
    alone = call()
    numba.set_num_threads(2)
    assert all(call() == alone for _ in range(100))


# the cache


def test_a_change_of_any_file_of_kernels_compiles_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numba's own cache would not notice a change of a file that another one imports."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(vectors, "CONTENTS", hashlib.sha256(b"old"))
    old = vectors.kernel()(add_one)
    monkeypatch.setattr(vectors, "CONTENTS", hashlib.sha256(b"new"))
    new = vectors.kernel()(add_one)
    assert str(tmp_path) == numba.config.CACHE_DIR
    assert old(1) == new(1) == 2
    assert old.stats.cache_path != new.stats.cache_path
    assert new.stats.cache_misses and not new.stats.cache_hits


def add_one(number: int) -> int:
    return number + 1
