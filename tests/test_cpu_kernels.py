"""The laws of the CPU kernels: the bits of the reference, whatever is cut out of a weight and by whichever way it is looked up.

Each kernel runs twice: compiled, and in Python, where NumPy checks every index. What is written goes into the middle of a
larger array, whose rest must stay as it was.
"""

import importlib.util
from collections.abc import Callable, Iterator
from types import ModuleType

import llvmlite.binding as llvm
import numba
import numpy as np
import pytest
import torch
from bounds import Bounded, in_float64
from hypothesis import example, given
from hypothesis import strategies as st
from llvmlite import ir
from numba.core import registry, types
from strategies import DTYPES, Cut, Recipe, codes_of_2_to_16_levels, cuts, recipes, same_bits
from torch import Tensor

import double_quant
import nf4
from cpu_kernels import decode, quantize

KINDS = {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.float16: np.int16}  # as the kernels see them
EDGE = 3  # elements before and after each result that no kernel may touch
LARGEST = torch.finfo(torch.float32).max
# Their constants decode to more than float16's largest number, and to less than 0:
ABOVE = Recipe((7, 99), torch.float16, block_size=2, pattern="blocks of all sizes", exponent=60, seed=1)
BELOW = Recipe((7, 99), torch.float16, block_size=2, pattern="zero blocks", exponent=14)


def in_python(module: ModuleType) -> ModuleType:
    """A second copy of a file of kernels, with Numba's compiler off."""
    spec = importlib.util.spec_from_file_location(f"{module.__name__} in Python", module.__file__)
    copy = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numba.config, "DISABLE_JIT", 1)
        spec.loader.exec_module(copy)
    return copy


def look_up_in_python(packed: np.ndarray, byte: int, levels: np.ndarray, scale: np.float32, out: np.ndarray, at: int,
                      groups: int) -> None:  # fmt: skip
    """What look_up_avx512 promises to be: it is made of instructions, and Python has none to run."""
    DECODE["in Python"].look_up(packed, byte, levels, scale, out, at, groups, np.empty(16, out.dtype))


QUANTIZE = {"compiled": quantize, "in Python": in_python(quantize)}
DECODE = {"compiled": decode, "in Python": in_python(decode)}
DECODE["in Python"].look_up_avx512 = look_up_in_python
WITH_AVX512 = pytest.mark.skipif(not decode.AVX512, reason="no AVX-512 here: only what its code looks like is tested")
WITH_FLOAT16 = pytest.mark.skipif(not decode.FLOAT16, reason="this processor cannot round to float16")
HOW = [pytest.param("in Python", False, id="in Python"), pytest.param("in Python", True, id="in Python, AVX-512"),
       pytest.param("compiled", False, id="compiled"),
       pytest.param("compiled", True, id="compiled, AVX-512", marks=WITH_AVX512)]  # fmt: skip
TARGETS = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=WITH_FLOAT16)]
pytestmark = pytest.mark.filterwarnings(r"ignore:(overflow|invalid value) encountered:RuntimeWarning")  # in Python, by NumPy


class Framed:
    """Room for `count` results, in the middle of numbers that must stay."""

    def __init__(self, count: int, kind: type[np.generic]) -> None:
        self.whole = np.frombuffer(b"\xa5" * (count + 2 * EDGE) * np.dtype(kind).itemsize, kind).copy()
        self.inside = self.whole[EDGE : EDGE + count]

    def is_intact(self) -> bool:
        edges = np.concatenate([self.whole[:EDGE], self.whole[EDGE + self.inside.size :]])
        return edges.tobytes() == b"\xa5" * edges.nbytes


def weight_of(q: nf4.Quantized, constants: double_quant.DoubleQuantized | None, avx512: bool) -> tuple:
    """A weight as decode.py documents it."""
    levels = np.zeros(16, np.float32)
    levels[: q.codebook.numel()] = q.codebook.numpy()
    packed, shift = q.packed.numpy().reshape(-1), int(q.block_size).bit_length() - 1
    largest = np.float32(min(torch.finfo(q.dtype).max, LARGEST))
    if constants is None:
        return packed, levels, q.absmax.numpy(), np.empty(0, np.uint8), levels, np.float32(0), largest, shift, 0, avx512
    return (packed, levels, constants.absmax.numpy(), constants.codes.numpy(), constants.codebook.numpy(),
            np.float32(constants.offset.item()), largest, shift, int(constants.block_size).bit_length() - 1, avx512)


def frozen(recipe: Recipe, double: bool, codebook: Tensor = nf4.NF4,
           block_size8: int = 256) -> tuple[nf4.Quantized, double_quant.DoubleQuantized | None, Tensor]:
    """A quantized tensor, its constants if they are quantized too, and what they decode to."""
    q = nf4.quantize(recipe.tensor(), recipe.block_size, codebook)
    if not double:
        return q, None, q.absmax
    constants = double_quant.quantize(q.absmax, block_size8)
    return q, constants, double_quant.dequantize(constants).clamp(max=min(torch.finfo(q.dtype).max, LARGEST))


def dense(q: nf4.Quantized, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """What the reference decodes, flattened."""
    whole = nf4.Quantized(q.packed, absmax, q.codebook, q.shape, q.dtype, q.block_size)
    return nf4.dequantize(whole, dtype).flatten()


@pytest.fixture
def threads() -> Iterator[None]:
    """Whatever a test does to the number of threads is undone."""
    before = numba.get_num_threads()
    yield
    numba.set_num_threads(before)


# quantize


def blockwise(how: str, flat: Tensor, block_size: int, codebook: Tensor = nf4.NF4) -> tuple[Tensor, Tensor]:
    """packed and absmax of float32 (n,), by the kernel."""
    midpoints = np.full(15, np.inf, np.float32)
    midpoints[: codebook.numel() - 1] = ((codebook[1:] + codebook[:-1]) / 2).numpy()
    packed, absmax = Framed(-(-flat.numel() // 2), np.uint8), Framed(-(-flat.numel() // block_size), np.float32)
    numbers, constants = flat.numpy(), absmax.inside
    QUANTIZE[how].quantize(numbers, numbers.view(np.uint32), midpoints, block_size.bit_length() - 1, packed.inside, constants,
                           constants.view(np.uint32))
    assert packed.is_intact() and absmax.is_intact()
    return torch.from_numpy(packed.inside).reshape(-1, 1), torch.from_numpy(absmax.inside)


@pytest.mark.parametrize("how", QUANTIZE)
@given(recipe=recipes, codebook=st.one_of(st.just(nf4.NF4), codes_of_2_to_16_levels))
@example(recipe=Recipe((1, 127), exponent=-140), codebook=nf4.NF4)
@example(recipe=Recipe((129,), block_size=2, exponent=126), codebook=nf4.normal_float(2))
def test_codes_and_constants_are_those_of_the_reference_bit_for_bit(how: str, recipe: Recipe, codebook: Tensor) -> None:
    flat = recipe.tensor().to(torch.float32).reshape(-1).contiguous()
    q = nf4.quantize(flat, recipe.block_size, codebook)
    packed, absmax = blockwise(how, flat, recipe.block_size, codebook)
    assert same_bits(packed, q.packed) and same_bits(absmax, q.absmax)


@pytest.mark.parametrize("how", QUANTIZE)
@pytest.mark.parametrize("bad", [0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001, 0x7FFFFFFF])
def test_the_constant_of_a_block_is_finite_if_its_numbers_are(how: str, bad: int) -> None:
    """Infinity and every kind of NaN, anywhere in a block, the largest finite numbers beside them."""
    for place in range(0, 128, 3):
        flat = torch.tensor([1.0, -LARGEST, 0.0, LARGEST]).repeat(32)
        flat.view(torch.int32)[place] = np.uint32(bad).astype(np.int32).item()
        _, absmax = blockwise(how, flat, 64)
        assert absmax.isfinite().tolist() == [place >= 64, place < 64]


# decode


@pytest.mark.parametrize("dtype", TARGETS)
@pytest.mark.parametrize(("how", "avx512"), HOW)
@given(cut=cuts(), codebook=st.one_of(st.just(nf4.NF4), codes_of_2_to_16_levels), block_size8=st.sampled_from([2, 256]))
@example(cut=Cut(), codebook=nf4.NF4, block_size8=256)
@example(cut=Cut(double_quant=False, start=1, rows=69, cols=32), codebook=nf4.NF4, block_size8=256)  # narrow, and odd
@example(cut=Cut(ABOVE, True, 0, 99, 7, 99), codebook=nf4.NF4, block_size8=256)
@example(cut=Cut(BELOW, True, 1, 99, 6, 98), codebook=nf4.NF4, block_size8=256)
def test_any_window_of_a_weight_has_the_bits_of_the_reference(
    how: str, avx512: bool, dtype: torch.dtype, cut: Cut, codebook: Tensor, block_size8: int
) -> None:
    q, constants, absmax = frozen(cut.recipe, cut.double_quant, codebook, block_size8)
    out = Framed(cut.rows * cut.cols, KINDS[dtype])
    DECODE[how].decode(weight_of(q, constants, avx512), cut.start, cut.stride, cut.rows, cut.cols, out.inside)
    assert out.is_intact()
    assert same_bits(torch.from_numpy(out.inside).view(dtype), dense(q, absmax, dtype)[cut.index()])


def near_the_edges_of_rounding(dtype: torch.dtype) -> np.ndarray:
    """Of all 2**16 patterns of a 16-bit float: the number, the middle between it and the next, and what lies beside that."""
    pattern = torch.arange(2**16, dtype=torch.int32)
    if dtype == torch.bfloat16:
        numbers = [(pattern << 16) + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
        return torch.cat(numbers).view(torch.float32).numpy()
    numbers = pattern.to(torch.int16).view(dtype).float()
    with np.errstate(invalid="ignore"):
        middles = ((numbers + numbers.roll(-1)) / 2).numpy()
        both = [np.nextafter(middles, np.float32(np.inf)), np.nextafter(middles, np.float32(-np.inf))]
        beyond = np.float32([65519.996, 65520, 65536, 1e30, -65519.996, -65520, 2**-25, -(2**-25), 2**-150])
        return np.concatenate([numbers.numpy(), middles, *both, beyond])


def is_rounded(numbers: np.ndarray, results: np.ndarray, dtype: torch.dtype) -> bool:
    """Bit for bit as torch rounds, but for the bits of a NaN, of which there are many."""
    expected, given = torch.from_numpy(numbers).to(dtype), torch.from_numpy(results).view(dtype)
    nan = torch.from_numpy(numbers).isnan()
    return bool(given[nan].isnan().all()) and same_bits(given[~nan], expected[~nan])


@pytest.mark.parametrize("dtype", TARGETS[1:])
@pytest.mark.parametrize("block_size", [2, 32])  # one by one, and a block at once
@pytest.mark.parametrize("avx512", [False, pytest.param(True, marks=WITH_AVX512)])
def test_the_compiled_kernels_round_as_torch_does(dtype: torch.dtype, block_size: int, avx512: bool) -> None:
    """One block for each number: 1 times it."""
    numbers = near_the_edges_of_rounding(dtype)
    packed, levels = np.zeros(numbers.size * block_size // 2, np.uint8), np.ones(16, np.float32)
    shift, none = block_size.bit_length() - 1, np.empty(0, np.uint8)
    weight = packed, levels, numbers, none, levels, np.float32(0), np.float32(0), shift, 0, avx512
    out = np.empty((numbers.size, block_size), KINDS[dtype])
    decode.decode(weight, 0, block_size, numbers.size, block_size, out.reshape(-1))
    for column in (0, -1):
        assert is_rounded(numbers, out[:, column].copy(), dtype)


@pytest.mark.parametrize("dtype", TARGETS[1:])
def test_in_python_numbers_are_rounded_as_torch_does(dtype: torch.dtype) -> None:
    numbers, out = near_the_edges_of_rounding(dtype), np.empty(0, KINDS[dtype])
    results = np.array([decode.cast(number, out) for number in numbers], KINDS[dtype])
    assert is_rounded(numbers, results, dtype)


@pytest.mark.parametrize("dtype", KINDS)
def test_the_code_for_avx512_is_well_formed(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it cannot run, too."""
    monkeypatch.setattr(decode, "AVX512", True)
    context, bytes_, floats = registry.cpu_target.target_context, types.uint8[::1], types.float32[::1]
    out = numba.from_dtype(np.dtype(KINDS[dtype]))[::1]
    arguments = bytes_, types.intp, floats, types.float32, out, types.intp, types.intp
    signature, codegen = decode.look_up_avx512._defn(registry.cpu_target.typing_context, *arguments)
    module = ir.Module()
    kind = ir.FunctionType(ir.VoidType(), [context.get_value_type(argument) for argument in signature.args])
    function = ir.Function(module, kind, "look_up")
    builder = ir.IRBuilder(function.append_basic_block())
    codegen(context, builder, signature, function.args)
    builder.ret_void()
    llvm.parse_assembly(str(module)).verify()
    assert str(module).count("call") == 1 and "permvar" in str(module)


def test_where_there_is_no_avx512_its_code_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "AVX512", False)

    @numba.njit
    def look_up(packed, levels, out):  # noqa: ANN001, ANN202
        decode.look_up_avx512(packed, 0, levels, np.float32(1), out, 0, 1)

    out = np.full(32, 7, np.float32)
    look_up(np.zeros(16, np.uint8), np.ones(16, np.float32), out)
    assert (out == 7).all() and "permvar" not in "".join(look_up.inspect_llvm().values())


# few_rows


def product(how: str, avx512: bool, recipe: Recipe, double: bool, m: int) -> tuple[Framed, Bounded]:
    """x W^T by the kernel, and what it may be."""
    q, constants, absmax = frozen(recipe, double)
    height, width = recipe.shape
    x = Recipe((m, width), seed=recipe.seed + 1).tensor()
    y = Framed(m * height, np.float32)
    y.inside[:] = 0
    DECODE[how].few_rows(weight_of(q, constants, avx512), x.numpy(), y.inside.reshape(m, height))
    bound = Bounded.exact(x).matmul(Bounded.exact(dense(q, absmax, torch.float32).reshape(height, width)).T, torch.float32)
    return y, in_float64(bound, 2 * width)


widths = st.one_of(st.integers(1, 200), st.sampled_from([2047, 2048, 4097]))
moderate = st.builds(Recipe, st.tuples(st.integers(1, 40), widths), st.sampled_from(DTYPES), st.just("contiguous"),
                     st.sampled_from([2, 64, 4096]), st.sampled_from(["normal", "outliers", "zero blocks"]),
                     st.integers(-20, 10), st.integers(0, 99))  # fmt: skip


@pytest.mark.parametrize("avx512", [False, pytest.param(True, marks=WITH_AVX512)])
@given(recipe=moderate, double=st.booleans(), m=st.integers(0, 17))
def test_the_product_with_few_rows_is_within_the_bound_of_a_float32_product(
    avx512: bool, recipe: Recipe, double: bool, m: int
) -> None:
    y, bound = product("compiled", avx512, recipe, double, m)
    assert y.is_intact() and bound.allows(torch.from_numpy(y.inside).reshape(bound.value.shape))


@pytest.mark.parametrize("shape", [(1, 1), (17, 3), (33, 65), (2, 2049)])
@pytest.mark.parametrize("double", [True, False])
def test_the_product_with_few_rows_keeps_within_its_arrays(shape: tuple[int, int], double: bool) -> None:
    y, bound = product("in Python", False, Recipe(shape), double, 2)
    assert y.is_intact() and bound.allows(torch.from_numpy(y.inside).reshape(bound.value.shape))


# threads


def shared_by_threads(run: str, avx512: bool) -> Callable[[], bytes]:
    """A kernel with work for many threads: each call does it, and gives the result."""
    recipe = Recipe((640, 1000), block_size=1024)
    flat, (q, constants, _) = recipe.tensor().flatten(), frozen(recipe, True)
    weight, x = weight_of(q, constants, avx512), Recipe((3, 1000)).tensor().numpy()
    y, out = np.empty((3, 640), np.float32), np.empty(640000, np.uint16)

    def call() -> bytes:
        if run == "quantize":
            return b"".join(tensor.numpy().tobytes() for tensor in blockwise("compiled", flat, 64))
        if run == "decode":
            decode.decode(weight, 0, 1000, 640, 1000, out)
            return out.tobytes()
        y[:] = 0
        decode.few_rows(weight, x, y)
        return y.tobytes()

    return call


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="Numba has one thread here")
@pytest.mark.parametrize("avx512", [False, pytest.param(True, marks=WITH_AVX512)])
@pytest.mark.parametrize("run", ["quantize", "decode", "few_rows"])
def test_two_threads_give_the_bits_of_one(run: str, avx512: bool, threads: None) -> None:
    """Again and again, so that they meet in every way."""
    call = shared_by_threads(run, avx512)
    numba.set_num_threads(1)
    alone = call()
    numba.set_num_threads(2)
    assert all(call() == alone for _ in range(200))
