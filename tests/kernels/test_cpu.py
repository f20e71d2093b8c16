"""The laws of the CPU kernels: the bits of the reference, for any window and either look-up.

Each kernel runs twice: compiled, and in Python, where NumPy checks every index. Results go into the
middle of a larger array, and the rest of that array must not change.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from types import ModuleType

import llvmlite.binding as llvm
import numba
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from llvmlite import ir
from numba.core import registry, types
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
from kernels.cpu import decode, fused, quantize

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


def in_python(module: ModuleType) -> ModuleType:
    """A second copy of a file of kernels, with Numba's compiler off."""
    spec = importlib.util.spec_from_file_location(f"{module.__name__} in Python", module.__file__)
    copy = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numba.config, "DISABLE_JIT", 1)
        spec.loader.exec_module(copy)
    return copy


def look_up_in_python(
    packed: np.ndarray,
    byte: int,
    levels: np.ndarray,
    scale: np.float32,
    out: np.ndarray,
    at: int,
    groups: int,
) -> None:
    """What look_up_avx512 must compute."""
    DECODE["in Python"].look_up(
        packed, byte, levels, scale, out, at, groups, np.empty(16, out.dtype)
    )


def code_in_python(
    flat: np.ndarray,
    start: int,
    power: np.float32,
    reciprocal: np.float32,
    midpoints: np.ndarray,
    packed: np.ndarray,
    byte: int,
    groups: int,
) -> None:
    """What code_avx512 must compute."""
    for i in range(8 * groups):
        high, low = (
            QUANTIZE["in Python"]._code(flat[start + k] * power * reciprocal, midpoints)
            for k in (2 * i, 2 * i + 1)
        )
        packed[byte + i] = high << 4 | low


def elements_in_python(
    packed: np.ndarray, byte: int, levels: np.ndarray, scale: np.float32
) -> list[np.float32]:
    """The 32 elements in 16 bytes: the even ones, then the odd ones."""
    pairs = [int(pair) for pair in packed[byte : byte + 16]]
    assert len(pairs) == 16
    return [levels[pair >> 4] * scale for pair in pairs] + [
        levels[pair & 15] * scale for pair in pairs
    ]


def dots_in_python(tokens: int) -> Callable[..., None]:
    """What dots_1 and dots_4 must compute."""

    def dots(
        packed: np.ndarray,
        start: int,
        stride: int,
        levels: np.ndarray,
        scales: np.ndarray,
        blocks: int,
        x: np.ndarray,
        at: int,
        sums: np.ndarray,
    ) -> None:
        sums[:] = 0
        for row in (0, 1):
            for group in range(stride // 16):
                scale = scales[row * blocks + group * blocks // (stride // 16)]
                elements = elements_in_python(
                    packed, start + row * stride + 16 * group, levels, scale
                )
                for t in range(tokens):
                    place = at + (group * tokens + t) * 32
                    for i in range(32):
                        sums[row * tokens + t] += elements[i] * x[place + i]

    return dots


def add_in_python(tokens: int) -> Callable[..., None]:
    """What add_1 and add_4 must compute."""

    def add(
        packed: np.ndarray,
        start: int,
        stride: int,
        levels: np.ndarray,
        scales: np.ndarray,
        apart: int,
        x: np.ndarray,
        at: int,
        rows: int,
        y: np.ndarray,
        to: int,
    ) -> None:
        for row in range(rows):
            for half in (0, 1):
                elements = elements_in_python(
                    packed, start + row * stride + 16 * half, levels, scales[row * apart]
                )
                for t in range(tokens):
                    for i in range(32):
                        y[to + (half * tokens + t) * 32 + i] += (
                            elements[i] * x[at + row * tokens + t]
                        )

    return add


QUANTIZE = {"compiled": quantize, "in Python": in_python(quantize)}
DECODE = {"compiled": decode, "in Python": in_python(decode)}
FUSED = {"compiled": fused, "in Python": in_python(fused)}
# They are machine instructions, which Python cannot run
DECODE["in Python"].look_up_avx512 = look_up_in_python
QUANTIZE["in Python"].code_avx512 = code_in_python
for tokens_ in (1, 4):
    setattr(FUSED["in Python"], f"dots_{tokens_}", dots_in_python(tokens_))
    setattr(FUSED["in Python"], f"add_{tokens_}", add_in_python(tokens_))
WITH_AVX512 = pytest.mark.skipif(
    not decode.AVX512, reason="no AVX-512 here: only what its code looks like is tested"
)
WITH_FLOAT16 = pytest.mark.skipif(
    not decode.FLOAT16, reason="this processor cannot round to float16"
)
HOW = [
    pytest.param("in Python", False, id="in Python"),
    pytest.param("in Python", True, id="in Python, AVX-512"),
    pytest.param("compiled", False, id="compiled"),
    pytest.param("compiled", True, id="compiled, AVX-512", marks=WITH_AVX512),
]
TARGETS = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=WITH_FLOAT16)]
# NumPy raises these where a kernel runs in Python.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:(overflow|invalid value) encountered:RuntimeWarning"
)


class Framed:
    """Room for `count` results, in the middle of numbers that must stay."""

    def __init__(self, count: int, kind: type[np.generic]) -> None:
        self.whole = np.frombuffer(
            b"\xa5" * (count + 2 * EDGE) * np.dtype(kind).itemsize, kind
        ).copy()
        self.inside = self.whole[EDGE : EDGE + count]

    def is_intact(self) -> bool:
        edges = np.concatenate([self.whole[:EDGE], self.whole[EDGE + self.inside.size :]])
        return edges.tobytes() == b"\xa5" * edges.nbytes


def weight_of(
    q: nf4.Quantized, constants: double_quant.DoubleQuantized | None, avx512: bool
) -> tuple:
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
            avx512,
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
        avx512,
    )


def frozen(
    recipe: Recipe, double: bool, codebook: Tensor = nf4.NF4, block_size8: int = 256
) -> tuple[nf4.Quantized, double_quant.DoubleQuantized | None, Tensor]:
    """A quantized tensor, its constants if they are quantized too, and what they decode to."""
    q = nf4.quantize(recipe.tensor(), recipe.block_size, codebook)
    if not double:
        return q, None, q.absmax
    constants = double_quant.quantize(q.absmax, block_size8)
    return (
        q,
        constants,
        double_quant.dequantize(constants).clamp(max=min(torch.finfo(q.dtype).max, LARGEST)),
    )


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
    how: str, avx512: bool, flat: Tensor, block_size: int, codebook: Tensor = nf4.NF4
) -> tuple[Tensor, Tensor]:
    """packed and absmax of float32 (n,), by the kernel for codebooks of this size."""
    wide = codebook.numel() > 16
    midpoints = np.full(256 if wide else 16, np.inf, np.float32)
    midpoints[: codebook.numel() - 1] = ((codebook[1:] + codebook[:-1]) / 2).numpy()
    packed = Framed(flat.numel() if wide else -(-flat.numel() // 2), np.uint8)
    absmax = Framed(-(-flat.numel() // block_size), np.float32)
    numbers = flat.numpy()
    constants = absmax.inside
    shift = block_size.bit_length() - 1
    results = packed.inside, constants, constants.view(np.uint32)
    if wide:
        QUANTIZE[how].quantize_wide(numbers, numbers.view(np.uint32), midpoints, shift, *results)
    else:
        QUANTIZE[how].quantize(numbers, numbers.view(np.uint32), midpoints, shift, *results, avx512)
    assert packed.is_intact() and absmax.is_intact()
    return torch.from_numpy(packed.inside).reshape(-1, 1), torch.from_numpy(absmax.inside)


@pytest.mark.parametrize(("how", "avx512"), HOW)
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
    how: str, avx512: bool, recipe: Recipe, codebook: Tensor
) -> None:
    flat = recipe.tensor().to(torch.float32).reshape(-1).contiguous()
    q = nf4.quantize(flat, recipe.block_size, codebook)
    packed, absmax = blockwise(how, avx512, flat, recipe.block_size, codebook)
    assert same_bits(packed, q.packed) and same_bits(absmax, q.absmax)


@pytest.mark.parametrize(("how", "avx512"), HOW)
@pytest.mark.parametrize(
    "bad", [0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001, 0x7FFFFFFF]
)
def test_the_constant_of_a_block_is_finite_if_its_numbers_are(
    how: str, avx512: bool, bad: int
) -> None:
    """Infinity and every kind of NaN, anywhere in a block, next to the largest finite numbers."""
    for place in range(0, 128, 3):
        flat = torch.tensor([1.0, -LARGEST, 0.0, LARGEST]).repeat(32)
        flat.view(torch.int32)[place] = np.uint32(bad).astype(np.int32).item()
        for codebook in (nf4.NF4, nf4.normal_float(8)):
            _, absmax = blockwise(how, avx512, flat, 64, codebook)
            assert absmax.isfinite().tolist() == [place >= 64, place < 64]


# decode


@pytest.mark.parametrize("dtype", TARGETS)
@pytest.mark.parametrize(("how", "avx512"), HOW)
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
    how: str, avx512: bool, dtype: torch.dtype, cut: Cut, codebook: Tensor, block_size8: int
) -> None:
    q, constants, absmax = frozen(cut.recipe, cut.double_quant, codebook, block_size8)
    out = Framed(cut.rows * cut.cols, KINDS[dtype])
    DECODE[how].decode(
        weight_of(q, constants, avx512), cut.start, cut.stride, cut.rows, cut.cols, out.inside
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
        both = [
            np.nextafter(middles, np.float32(np.inf)),
            np.nextafter(middles, np.float32(-np.inf)),
        ]
        beyond = np.float32(
            [65519.996, 65520, 65536, 1e30, -65519.996, -65520, 2**-25, -(2**-25), 2**-150]
        )
        return np.concatenate([numbers.numpy(), middles, *both, beyond])


def is_rounded(numbers: np.ndarray, results: np.ndarray, dtype: torch.dtype) -> bool:
    """Bit for bit as torch rounds, but for the bits of a NaN, of which there are many."""
    expected = torch.from_numpy(numbers).to(dtype)
    given = torch.from_numpy(results).view(dtype)
    nan = torch.from_numpy(numbers).isnan()
    return bool(given[nan].isnan().all()) and same_bits(given[~nan], expected[~nan])


@pytest.mark.parametrize("dtype", TARGETS[1:])
@pytest.mark.parametrize("block_size", [2, 32])  # one by one, and a block at once
@pytest.mark.parametrize("avx512", [False, pytest.param(True, marks=WITH_AVX512)])
def test_the_compiled_kernels_round_as_torch_does(
    dtype: torch.dtype, block_size: int, avx512: bool
) -> None:
    """One block for each number: 1 times it."""
    numbers = near_the_edges_of_rounding(dtype)
    packed = np.zeros(numbers.size * block_size // 2, np.uint8)
    levels = np.ones(16, np.float32)
    shift = block_size.bit_length() - 1
    none = np.empty(0, np.uint8)
    weight = packed, levels, numbers, none, levels, np.float32(0), np.float32(0), shift, 0, avx512
    out = np.empty((numbers.size, block_size), KINDS[dtype])
    decode.decode(weight, 0, block_size, numbers.size, block_size, out.reshape(-1))
    for column in (0, -1):
        assert is_rounded(numbers, out[:, column].copy(), dtype)


@pytest.mark.parametrize("dtype", TARGETS[1:])
def test_in_python_numbers_are_rounded_as_torch_does(dtype: torch.dtype) -> None:
    numbers = near_the_edges_of_rounding(dtype)
    out = np.empty(0, KINDS[dtype])
    results = np.array([decode.cast(number, out) for number in numbers], KINDS[dtype])
    assert is_rounded(numbers, results, dtype)


def intrinsic_arguments(kind: type[np.generic]) -> list[tuple]:
    """The types that look_up_avx512, code_avx512, dots_... and add_... take, in this order."""
    bytes_ = types.uint8[::1]
    floats = types.float32[::1]
    out = numba.from_dtype(np.dtype(kind))[::1]
    index = types.intp
    scalar = types.float32
    return [
        (bytes_, index, floats, scalar, out, index, index),
        (floats, index, scalar, scalar, floats, bytes_, index, index),
        (bytes_, index, index, floats, floats, index, floats, index, floats),
        (bytes_, index, index, floats, floats, index, floats, index, index, floats, index),
    ]


@pytest.mark.parametrize("dtype", KINDS)
def test_the_code_for_avx512_is_well_formed(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it cannot run."""
    look_up, code_16, dots, add = intrinsic_arguments(KINDS[dtype])
    for file, intrinsic, arguments, look_ups in [
        (decode, "look_up_avx512", look_up, 1),
        (quantize, "code_avx512", code_16, 4),
        (fused, "dots_1", dots, 8),
        (fused, "dots_4", dots, 8),
        (fused, "add_1", add, 4),
        (fused, "add_4", add, 4),
    ]:
        monkeypatch.setattr(file, "AVX512", True)
        code = code_of(getattr(file, intrinsic), arguments)
        llvm.parse_assembly(code).verify()
        found = code.count("@llvm.x86.avx512.permvar") + code.count('@"llvm.x86.avx512.permvar')
        assert found == look_ups + 1  # declared once


def code_of(intrinsic: Callable, arguments: tuple) -> str:
    """The LLVM instructions that an intrinsic emits, as a function of its own."""
    context = registry.cpu_target.target_context
    signature, codegen = intrinsic._defn(registry.cpu_target.typing_context, *arguments)
    module = ir.Module()
    kind = ir.FunctionType(
        ir.VoidType(), [context.get_value_type(argument) for argument in signature.args]
    )
    function = ir.Function(module, kind, "intrinsic")
    builder = ir.IRBuilder(function.append_basic_block())
    codegen(context, builder, signature, function.args)
    builder.ret_void()
    return str(module)


def test_where_there_is_no_avx512_its_code_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for file in (decode, quantize, fused):
        monkeypatch.setattr(file, "AVX512", False)
    look_up, code_16, dots, add = intrinsic_arguments(np.float32)
    for intrinsic, arguments in [
        (decode.look_up_avx512, look_up),
        (quantize.code_avx512, code_16),
        (fused.dots_4, dots),
        (fused.add_4, add),
    ]:
        assert "permvar" not in code_of(intrinsic, arguments)


# fused


@dataclasses.dataclass(frozen=True)
class Fused:
    """A product by fused.py, x W^T or x W: pairs of rows, of whole blocks of at least 64."""

    rows: int = 2
    blocks: int = 1
    block_size: int = 64
    double_quant: bool = True
    tokens: int = 1
    transposed: bool = True
    parts: int = 2
    seed: int = 0

    def made(self, how: str) -> tuple[Tensor, Bounded]:
        """The product by the kernel, and what it may be."""
        height, width = shape = 2 * self.rows, self.blocks * self.block_size
        recipe = Recipe(shape, block_size=self.block_size, exponent=-3, seed=self.seed)
        q, constants, absmax = frozen(recipe, self.double_quant)
        at_once = 1 if self.tokens == 1 else 4
        weight = weight_of(q, constants, True)
        assert fused.takes(weight, height, width)
        x = Recipe((self.tokens, width if self.transposed else height), seed=self.seed + 1).tensor()
        padded = torch.nn.functional.pad(x, (0, 0, 0, -self.tokens % at_once)).reshape(
            -1, at_once, x.shape[1]
        )
        if self.transposed:
            given = torch.stack([padded[..., 0::2], padded[..., 1::2]], 2)
            given = given.unflatten(3, (-1, 16))  # (n, at_once, 2, width / 32, 16)
            given = given.permute(0, 3, 1, 2, 4).flatten()  # (n, width / 32, at_once, 2, 16)
            y = Framed(self.tokens * height, np.float32)
            FUSED[how].multiply(
                weight, width, given.numpy(), at_once, y.inside.reshape(self.tokens, height)
            )
            made = torch.from_numpy(y.inside).reshape(self.tokens, height)
        else:
            given = padded.transpose(1, 2).flatten()  # (n, height, at_once)
            y = Framed(padded.shape[0] * at_once * width, np.float32)
            y.inside[:] = 0
            FUSED[how].multiply_back(weight, width, given.numpy(), at_once, y.inside, self.parts)
            made = (
                torch.from_numpy(y.inside)
                .reshape(-1, width // 32, at_once, 2, 16)
                .permute(0, 2, 3, 1, 4)
            )
            made = made.flatten(3).transpose(2, 3).reshape(-1, width)[: self.tokens]
        assert y.is_intact()
        whole = Bounded.exact(dense(q, absmax, torch.float32).reshape(shape))
        bound = Bounded.exact(x).matmul(whole.T if self.transposed else whole, torch.float32)
        return made, in_float64(bound, 2 * x.shape[1])


def check_fused(how: str, case: Fused) -> None:
    made, bound = case.made(how)
    assert bound.allows(made)


@WITH_AVX512
@given(
    st.builds(
        Fused,
        st.integers(1, 40),
        st.integers(1, 5),
        st.sampled_from([64, 128, 1024]),
        st.booleans(),
        st.integers(1, 11),
        st.booleans(),
        st.integers(1, 4),
        st.integers(0, 99),
    )
)
@example(Fused(33, 3, tokens=5))
@example(Fused(33, 3, tokens=5, transposed=False))
def test_a_fused_product_is_within_the_bound_of_a_float32_product(case: Fused) -> None:
    check_fused("compiled", case)


FUSED_CASES = [
    Fused(),
    Fused(17, 3, tokens=5),
    Fused(2, 1, 256, tokens=4),
    Fused(2, 5, double_quant=False),
]
FUSED_CASES += [
    Fused(17, 3, tokens=5, transposed=False),
    Fused(2, 1, 256, transposed=False, parts=3),
    Fused(1, 3, transposed=False, parts=5),
    Fused(2, 3, 64, False, 4, False),
]


@pytest.mark.parametrize("case", FUSED_CASES)
@pytest.mark.parametrize("how", ["in Python", pytest.param("compiled", marks=WITH_AVX512)])
def test_a_fused_product_keeps_within_its_arrays(how: str, case: Fused) -> None:
    check_fused(how, case)


def test_other_shapes_and_processors_are_not_taken() -> None:
    weight = weight_of(*frozen(Recipe((4, 128)), True)[:2], True)
    assert fused.takes(weight, 4, 128)
    assert not fused.takes(weight, 3, 128) and not fused.takes(weight, 4, 96)
    assert not fused.takes((*weight[:-1], False), 4, 128)
    assert not fused.takes(
        weight_of(*frozen(Recipe((4, 128), block_size=32), True)[:2], True), 4, 128
    )


# threads


def shared_by_threads(run: str, avx512: bool) -> Callable[[], bytes]:
    """A kernel with work for many threads: each call does it, and gives the result."""
    recipe = Recipe((640, 1024), block_size=1024)
    flat = recipe.tensor().flatten()
    q, constants, _ = frozen(recipe, True)
    weight = weight_of(q, constants, avx512)
    x = Recipe((4, 1024)).tensor().flatten().numpy()
    y = np.empty((4, 640), np.float32)
    out = np.empty(655360, np.uint16)

    def call() -> bytes:
        if run.startswith("quantize"):
            results = blockwise(
                "compiled",
                avx512,
                flat,
                64,
                double_quant.DYNAMIC if run == "quantize_wide" else nf4.NF4,
            )
            return b"".join(tensor.numpy().tobytes() for tensor in results)
        if run == "decode":
            decode.decode(weight, 0, 1024, 640, 1024, out)
            return out.tobytes()
        if run == "multiply":
            fused.multiply(weight, 1024, x, 4, y)
            return y.tobytes()
        back = np.zeros(4 * 1024, np.float32)
        fused.multiply_back(weight, 1024, y.reshape(-1), 4, back, numba.get_num_threads())
        return back.tobytes()

    y[:] = Recipe((4, 640)).tensor().numpy()
    return call


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="Numba has one thread here")
@pytest.mark.parametrize("avx512", [False, pytest.param(True, marks=WITH_AVX512)])
@pytest.mark.parametrize(
    "run", ["quantize", "quantize_wide", "decode", "multiply", "multiply_back"]
)
def test_two_threads_give_the_bits_of_one(run: str, avx512: bool, threads: None) -> None:
    """Many times, so that the threads run in many orders."""
    if run.startswith("multiply") and not avx512:
        return  # there is no such kernel
    call = shared_by_threads(run, avx512)
    numba.set_num_threads(1)
    alone = call()
    numba.set_num_threads(2)
    assert all(call() == alone for _ in range(200))
