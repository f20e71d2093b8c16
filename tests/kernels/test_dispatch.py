"""The laws of dispatch.py: the results of the reference, by a kernel where there is one.

The memory that a product needs is measured here, by calling the function inside the operator;
test_stack.py measures the rest.
"""

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numba
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from test_stack import Live
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import double_quant
import nf4
from helpers.bounds import Bounded, cast, gamma, in_float64, operand
from helpers.strategies import (
    DTYPES,
    HALF_AND_SINGLE,
    LAYOUTS,
    Recipe,
    codes_of_2_to_16_levels,
    codes_of_17_to_256_levels,
    laid_out,
    recipes,
    same_bits,
)
from kernels import dispatch
from kernels.cpu import launch
from kernels.packed_weight import flatten, with_decoded_absmax
from nf4 import Quantized

Constants = double_quant.DoubleQuantized
OPERATORS = getattr(torch.ops, dispatch.LIBRARY.ns)
ROWS = [0, 1, 2, 4, 5, 16, 17, 40]  # of x: few and many, for the kernels
KERNELS = [
    (launch.decode, "decode"),
    (launch.products, "multiply"),
    (launch.products, "multiply_few"),
    (launch.products, "multiply_back"),
    (launch.products, "multiply_back_few"),
    (launch.blockwise, "quantize"),
    (launch.blockwise, "quantize_wide"),
]
# NumPy raises these where a kernel runs in Python.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:(overflow|invalid value) encountered:RuntimeWarning"
)


def weight_of(
    recipe: Recipe, double: bool, codebook: Tensor = nf4.NF4
) -> tuple[Quantized, Constants | None]:
    q = nf4.quantize(recipe.tensor(), recipe.block_size, codebook)
    return q, double_quant.quantize(q.absmax) if double else None


def dense(q: Quantized, constants: Constants | None, dtype: torch.dtype | None = None) -> Tensor:
    """The reference, by nf4 and double_quant alone."""
    if constants is not None:
        most = min(torch.finfo(q.dtype).max, torch.finfo(torch.float32).max)
        q = dataclasses.replace(q, absmax=double_quant.dequantize(constants).clamp(max=most))
    return nf4.dequantize(q, dtype)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that have been called."""
    names: list[str] = []

    def recording(name: str, kernel: Callable[..., None]) -> Callable[..., None]:
        def record_and_run(*args: object) -> None:
            names.append(name)
            kernel(*args)

        return record_and_run

    for module, name in KERNELS:
        monkeypatch.setattr(module, name, recording(name, getattr(module, name)))
    return names


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is called fails instead: with wrong sizes it would read other memory."""
    for module, name in KERNELS:
        monkeypatch.setattr(
            module, name, lambda *_, name=name: pytest.fail(f"the kernel {name} was called")
        )


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 64 rows or columns, and 7 tokens at a time: small products have remainders.

    All 16-bit products of many rows are computed by windows, on any processor.
    """
    monkeypatch.setattr(launch, "NATIVE", {torch.bfloat16, torch.float16})
    monkeypatch.setattr(launch, "WINDOW", 64)
    monkeypatch.setattr(launch, "TOKENS", 7)
    monkeypatch.setattr(launch, "AT_ONCE", 8)


def said(run: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as error:
        run()
    return str(error.value)


# which kernel runs


@pytest.mark.parametrize("kernels", ["", "reference"])
def test_numba_is_imported_when_the_first_kernel_runs(kernels: str) -> None:
    """In a new process; with QLORA_KERNELS=reference it is never imported."""
    code = """if True:
        import sys, torch
        from kernels import dispatch
        assert not {"numba", "llvmlite"} & {*sys.modules}
        q = dispatch.quantize(torch.ones(2, 64))
        dispatch.matmul(dispatch.dequantize(q), q)
        print("numba" in sys.modules)
    """
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"QLORA_KERNELS": kernels},
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(nf4.__file__).parent,
    )
    assert result.stdout.strip() == str(kernels != "reference")


def test_what_has_a_kernel_gets_it(calls: list[str]) -> None:
    q, constants = weight_of(Recipe((64, 128)), True)
    dispatch.quantize(random(64, 128, dtype=torch.bfloat16))
    dispatch.dequantize(q, torch.bfloat16, constants)
    assert calls[0] == "quantize" and set(calls[1:]) == {"decode"}
    many = "decode" if torch.bfloat16 in launch.NATIVE else "multiply"
    for dtype, tokens, kernel in [
        (torch.float32, 200, "multiply"),
        (torch.float32, 1, "multiply_few"),
        (torch.bfloat16, 1, "multiply_few"),
        (torch.bfloat16, 200, many),
    ]:
        for transposed in (True, False):
            del calls[:]
            x = random(tokens, 128 if transposed else 64, dtype=dtype)
            dispatch.matmul(x, q, constants, transposed)
            expected = kernel if transposed else kernel.replace("multiply", "multiply_back")
            if not launch.vectors.LOOK_UP:
                expected = expected.removesuffix("_few")
            assert set(calls) == {expected}


@pytest.mark.parametrize("dtype", [dtype for dtype in launch.DECODED if dtype.itemsize == 2])
@pytest.mark.parametrize("transposed", [True, False])
def test_16_bit_numbers_that_the_processor_does_not_multiply_are_multiplied_in_float32(
    transposed: bool, dtype: torch.dtype, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rounding of the sum, and no product of torch, which takes many times as long there."""
    monkeypatch.setattr(launch, "NATIVE", set())
    q, constants = weight_of(Recipe((64, 128)), True)
    x = random(100, 128 if transposed else 64, dtype=dtype)
    y = dispatch.matmul(x, q, constants, transposed)
    assert set(calls) == {"multiply" if transposed else "multiply_back"}
    assert same_bits(y, dispatch.matmul(x.float(), q, constants, transposed).to(dtype))


def test_a_weight_of_odd_shape_is_multiplied_by_the_kernels_for_many_rows(
    calls: list[str],
) -> None:
    q, constants = weight_of(Recipe((33, 70)), True)
    for transposed, width in [(True, 70), (False, 33)]:
        dispatch.matmul(random(1, width), q, constants, transposed)
    assert calls == ["multiply", "multiply_back"]


def test_an_8_bit_code_is_quantized_by_its_kernel(calls: list[str]) -> None:
    absmax = random(1000).abs()
    constants = double_quant.quantize(absmax, quantizer=dispatch.quantize)
    expected = double_quant.quantize(absmax)
    assert calls == ["quantize_wide"]
    assert same_bits(constants.codes, expected.codes)
    assert same_bits(constants.absmax, expected.absmax)
    assert same_bits(constants.offset, expected.offset)


def test_the_environment_can_ask_for_the_reference(
    monkeypatch: pytest.MonkeyPatch, no_kernels: None
) -> None:
    monkeypatch.setenv("QLORA_KERNELS", "reference")
    weight = random(33, 70)
    x = random(5, 70, seed=1)
    g = random(5, 33, seed=2)
    q = dispatch.quantize(weight)
    assert same_bits(q.packed, nf4.quantize(weight).packed)
    assert same_bits(q.absmax, nf4.quantize(weight).absmax)
    constants = double_quant.quantize(q.absmax)
    whole = dense(q, constants)
    assert same_bits(dispatch.dequantize(q, None, constants), whole)
    assert same_bits(dispatch.matmul(x, q, constants), torch.nn.functional.linear(x, whole))
    assert same_bits(dispatch.matmul(g, q, constants, transposed=False), g @ whole)


WITHOUT_A_KERNEL = {
    "float64": lambda: (weight_of(Recipe((33, 70)), True), torch.float64),
    "an 8-bit code": lambda: (
        weight_of(Recipe((33, 70)), True, nf4.normal_float(8)),
        torch.bfloat16,
    ),
    "no element": lambda: (weight_of(Recipe((0, 70)), True), torch.float32),
}


@pytest.mark.parametrize("what", WITHOUT_A_KERNEL)
@pytest.mark.parametrize("transposed", [True, False])
def test_what_has_no_kernel_goes_to_the_reference(
    what: str, transposed: bool, no_kernels: None
) -> None:
    (q, constants), dtype = WITHOUT_A_KERNEL[what]()
    whole = dense(q, constants, dtype)
    x = random(20, q.shape[1] if transposed else q.shape[0], dtype=dtype)
    assert same_bits(dispatch.dequantize(q, dtype, constants), whole)
    assert same_bits(
        dispatch.matmul(x, q, constants, transposed), x @ (whole.T if transposed else whole)
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_decodes_to_the_same_bits() -> None:
    """Numba's threads do not exist in it, and GNU OpenMP would end it."""
    q = nf4.quantize(torch.randn(64, 64))
    expected = dispatch.dequantize(q)
    child = os.fork()
    if not child:
        signal.alarm(60)  # ends a child that waits for a thread
        torch.set_num_threads(1)  # as a worker of a DataLoader does
        os._exit(0 if same_bits(dispatch.dequantize(q), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


class OnMps(torch.Tensor):
    """Says that it is on one of Apple's GPUs, which have no float64."""

    is_mps = True

    def cpu(self) -> Tensor:
        return self.as_subclass(Tensor)


def test_what_needs_float64_is_computed_on_the_host_where_the_device_has_none() -> None:
    there = torch.ones(2).as_subclass(OnMps)
    assert type(dispatch.on_float64_device(there)) is Tensor
    here = torch.ones(2)
    assert dispatch.on_float64_device(here) is here


def test_a_process_that_did_not_import_the_kernels_gets_the_reference(
    monkeypatch: pytest.MonkeyPatch, no_kernels: None
) -> None:
    q = nf4.quantize(torch.randn(64, 64))
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert same_bits(dispatch.dequantize(q), nf4.dequantize(q))


def test_threads_of_python_take_turns_in_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba's workqueue ends the process where two are in a kernel at once."""
    q = nf4.quantize(torch.randn(64, 64))
    inside = []

    def decode(*arguments: object) -> None:
        inside.append("enters")
        time.sleep(0.01)
        inside.append("leaves")

    monkeypatch.setattr(launch.decode, "decode", decode)
    threads = [threading.Thread(target=dispatch.dequantize, args=(q,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside == ["enters", "leaves"] * 6


def test_levels_in_another_order_are_found_by_the_reference_and_decoded_by_the_kernels(
    calls: list[str],
) -> None:
    for codebook in (nf4.FP4, nf4.NF4.flip(0)):
        q = dispatch.quantize(random(5, 64), 64, codebook)
        expected = nf4.quantize(random(5, 64), 64, codebook)
        assert same_bits(q.packed, expected.packed) and calls == []
        assert same_bits(dispatch.dequantize(q), nf4.dequantize(q)) and calls
        del calls[:]


def test_on_a_device_without_kernels_the_reference_runs(no_kernels: None) -> None:
    """On the meta device; for a GPU there are test_cuda_kernels.py and test_gpu.py."""
    q, constants = weight_of(Recipe((33, 70)), True)
    there = dataclasses.replace(q, packed=q.packed.to("meta"), codebook=q.codebook.to("meta"))
    moved = {
        name: getattr(constants, name).to("meta")
        for name in ("codes", "absmax", "offset", "codebook")
    }
    constants_there = dataclasses.replace(constants, **moved)
    whole = dispatch.dequantize(there, torch.bfloat16, constants_there)
    assert (whole.device.type, whole.shape, whole.dtype) == ("meta", (33, 70), torch.bfloat16)
    for transposed, width, other in [(True, 70, 33), (False, 33, 70)]:
        y = dispatch.matmul(random(5, width).to("meta"), there, constants_there, transposed)
        assert (y.device.type, y.shape, y.dtype) == ("meta", (5, other), torch.float32)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_kernels_take_the_threads_that_torch_has(threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        dispatch.quantize(random(4, 64))
        assert numba.get_num_threads() == min(threads, numba.config.NUMBA_NUM_THREADS)
    finally:
        torch.set_num_threads(before)


def test_torch_keeps_its_number_of_threads_when_those_of_numba_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = torch.get_num_threads()
    # Numba's threads change torch's number.
    monkeypatch.setattr(numba, "set_num_threads", lambda count: torch.set_num_threads(count + 1))
    launch.follow_torch()
    assert torch.get_num_threads() == before


# quantize


@given(
    recipes,
    st.one_of(st.just(nf4.NF4), codes_of_2_to_16_levels, codes_of_17_to_256_levels),
    st.sampled_from([64, 1024, 2**20]),
)
@example(Recipe((60,), layout="every other"), nf4.NF4, 64)
@example(Recipe((5, 130), torch.bfloat16, "every other", 2), nf4.NF4, 64)
# Two codes for one level.
@example(Recipe((9, 130), torch.float16, block_size=64), torch.tensor([-1.0, 0.0, 0.0, 1.0]), 64)
@example(Recipe((9, 129), torch.float64, "transposed", 4096), nf4.NF4, 64)
def test_quantizing_gives_what_the_reference_gives(
    recipe: Recipe, codebook: Tensor, window: int
) -> None:
    weight = recipe.tensor()
    before = weight.clone()
    expected = nf4.quantize(weight, recipe.block_size, codebook)
    with pytest.MonkeyPatch.context() as patch:
        # 16-bit and float64 numbers are converted so many at a time.
        patch.setattr(launch, "PIECE", window)
        q = dispatch.quantize(weight, recipe.block_size, codebook)
    assert same_bits(q.packed, expected.packed) and same_bits(q.absmax, expected.absmax)
    assert same_bits(q.codebook, expected.codebook)
    assert (q.shape, q.dtype, q.block_size) == (expected.shape, expected.dtype, expected.block_size)
    assert same_bits(weight, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 63, 1000, 1286])
def test_what_is_not_finite_is_refused_as_the_reference_does(
    dtype: torch.dtype, bad: float, place: int, small_windows: None
) -> None:
    """With the count and the first index, in whichever piece it is found."""
    weight = random(33, 39, dtype=dtype)
    weight.view(-1)[place : place + 100 : 50] = bad
    count = 1 if place == 1286 else 2
    message = said(lambda: dispatch.quantize(weight))
    assert message == said(lambda: nf4.quantize(weight))
    assert message.startswith(f"{count} of 1287 ")
    assert f"the first at index {(place // 39, place % 39)}" in message


def test_a_float64_beyond_float32_is_refused() -> None:
    weight = torch.ones(3, 50, dtype=torch.float64)
    weight[2, 3] = 1e39
    assert said(lambda: dispatch.quantize(weight)) == said(lambda: nf4.quantize(weight))


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.ones(4, dtype=torch.int8),),
        (torch.ones(4), 63),
        (torch.ones(4), 1),
        (torch.ones(4), 64, torch.ones(3)),
        (torch.ones(4), 64, torch.ones(2, 2)),
        (torch.ones(4), 64, torch.tensor([0.0, torch.nan])),
    ],
    ids=["dtype", "63", "1", "one level", "matrix", "nan"],
)
def test_arguments_are_refused_as_the_reference_does(arguments: tuple, no_kernels: None) -> None:
    assert said(lambda: dispatch.quantize(*arguments)) == said(lambda: nf4.quantize(*arguments))


# dequantize


@given(recipes, st.booleans(), st.one_of(st.none(), st.sampled_from(DTYPES)))
@example(Recipe((3, 4096)), True, torch.bfloat16)  # whole runs and none left over
@example(Recipe((8193,), block_size=4096), False, torch.float16)
def test_dequantizing_gives_the_bits_of_the_reference(
    recipe: Recipe, double: bool, dtype: torch.dtype | None
) -> None:
    q, constants = weight_of(recipe, double)
    assert same_bits(dispatch.dequantize(q, dtype, constants), dense(q, constants, dtype))


@given(recipes, st.booleans(), st.sampled_from(DTYPES), st.sampled_from(LAYOUTS))
def test_dequantizing_into_a_given_tensor_fills_it_and_nothing_else(
    recipe: Recipe, double: bool, dtype: torch.dtype, layout: str
) -> None:
    q, constants = weight_of(recipe, double)
    out = laid_out(torch.full(q.shape, 7, dtype=dtype), layout)
    memory = torch.empty(0, dtype=dtype).set_(out.untyped_storage())
    before = memory.clone()
    assert dispatch.dequantize(q, None, constants, out) is out
    assert same_bits(out, dense(q, constants, dtype))
    out.fill_(7)
    assert same_bits(memory, before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_constants_that_are_not_finite_decode_as_the_reference_decodes_them(
    bad: float, dtype: torch.dtype
) -> None:
    """A damaged checkpoint gives the same results; any NaN counts as equal to any other."""
    q, constants = weight_of(Recipe((10, 640)), True)
    absmax, nested = q.absmax.clone(), constants.absmax.clone()
    absmax[3] = nested[0] = bad
    for q_, constants_ in [
        (dataclasses.replace(q, absmax=absmax), None),
        (q, dataclasses.replace(constants, absmax=nested)),
        (q, dataclasses.replace(constants, offset=torch.tensor([bad]))),
    ]:
        decoded = dispatch.dequantize(q_, dtype, constants_)
        expected = dense(q_, constants_, dtype)
        assert torch.equal(decoded.isnan(), expected.isnan())
        assert same_bits(decoded.nan_to_num(7), expected.nan_to_num(7))


# sizes that do not fit together

DAMAGE: dict[str, Callable[[Quantized, Constants], tuple[Quantized, Constants | None]]] = {
    "too few bytes": lambda q, c: (dataclasses.replace(q, packed=q.packed[:-1]), c),
    "too many bytes": lambda q, c: (
        dataclasses.replace(q, packed=torch.cat([q.packed, q.packed])),
        c,
    ),
    "too few constants": lambda q, c: (dataclasses.replace(q, absmax=q.absmax[:-1]), None),
    "too many constants": lambda q, c: (dataclasses.replace(q, absmax=q.absmax.repeat(2)), None),
    "too few codes": lambda q, c: (q, dataclasses.replace(c, codes=c.codes[:-1])),
    "too few nested constants": lambda q, c: (q, dataclasses.replace(c, absmax=c.absmax[:-1])),
    "nested blocks of 3": lambda q, c: (
        q,
        dataclasses.replace(c, block_size=3, absmax=torch.ones(-(-len(c.codes) // 3))),
    ),
    "too few levels for the constants": lambda q, c: (
        q,
        dataclasses.replace(c, codebook=c.codebook[:-1]),
    ),
    "blocks of 63": lambda q, c: (
        dataclasses.replace(q, block_size=63, absmax=torch.ones(-(-33 * 70 // 63))),
        None,
    ),
    "a larger shape": lambda q, c: (dataclasses.replace(q, shape=torch.Size((70, 70))), None),
    "a smaller shape": lambda q, c: (dataclasses.replace(q, shape=torch.Size((32, 70))), None),
    "constants in bfloat16": lambda q, c: (
        dataclasses.replace(q, absmax=q.absmax.bfloat16()),
        None,
    ),
    "constants in float64": lambda q, c: (
        dataclasses.replace(q, absmax=q.absmax.double() * (1 + 2**-30)),
        None,
    ),
    "constants in a column": lambda q, c: (dataclasses.replace(q, absmax=q.absmax[:, None]), None),
    "codes in a column": lambda q, c: (q, dataclasses.replace(c, codes=c.codes[:, None])),
    "codes of 64 bits": lambda q, c: (q, dataclasses.replace(c, codes=c.codes.long())),
    "bytes with a sign": lambda q, c: (
        dataclasses.replace(q, packed=q.packed.to(torch.int8) // 16),
        None,
    ),
    "nested constants in float64": lambda q, c: (
        q,
        dataclasses.replace(c, absmax=c.absmax.double() * (1 + 2**-30)),
    ),
    "a mean for each constant": lambda q, c: (
        q,
        dataclasses.replace(c, offset=torch.linspace(0, 1, len(c.codes))),
    ),
    "levels in float64": lambda q, c: (dataclasses.replace(q, codebook=q.codebook.double()), None),
}


def outcome(run: Callable[[], Tensor]) -> Tensor | str:
    """The result, or the name of the error."""
    try:
        return run()
    except Exception as error:  # any error that the reference raises
        return type(error).__name__


@pytest.mark.parametrize("what", DAMAGE)
def test_sizes_that_do_not_fit_together_get_what_the_reference_gives_or_raises(
    what: str, no_kernels: None
) -> None:
    q, constants = DAMAGE[what](*weight_of(Recipe((33, 70), block_size=2), True))
    expected = outcome(lambda: dense(q, constants))
    given = outcome(lambda: dispatch.dequantize(q, None, constants))
    assert given == expected if isinstance(expected, str) else same_bits(given, expected)
    for transposed, width in [(True, 70), (False, 33)]:
        x = random(5, width)
        expected = outcome(
            lambda x=x, t=transposed: x @ (dense(q, constants).T if t else dense(q, constants))
        )
        given = outcome(lambda x=x, t=transposed: dispatch.matmul(x, q, constants, t))
        assert given == expected if isinstance(expected, str) else same_bits(given, expected)


@pytest.mark.parametrize("shape", [(34, 70), (32, 70), (70, 33), (2310,), (2, 33, 70)])
def test_a_tensor_of_another_shape_gets_what_copying_into_it_gives(
    shape: tuple[int, ...], no_kernels: None
) -> None:
    q, constants = weight_of(Recipe((33, 70)), True)
    expected = outcome(lambda: torch.empty(shape).copy_(dense(q, constants)))
    given = outcome(lambda: dispatch.dequantize(q, None, constants, torch.empty(shape)))
    assert given == expected if isinstance(expected, str) else same_bits(given, expected)


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("off_by", [-1, 1])
def test_an_x_of_another_width_is_refused(
    tokens: int, transposed: bool, off_by: int, no_kernels: None
) -> None:
    q, constants = weight_of(Recipe((33, 70)), True)
    with pytest.raises((ValueError, RuntimeError)):
        dispatch.matmul(
            random(tokens, (70 if transposed else 33) + off_by), q, constants, transposed
        )


# matmul


@dataclasses.dataclass(frozen=True)
class Product:
    """x W^T or x W, for `tokens` rows of x."""

    shape: tuple[int, int] = (150, 40)
    tokens: int = 20
    transposed: bool = True
    dtype: torch.dtype = torch.float32
    double_quant: bool = True
    block_size: int = 64
    strided: bool = False
    biased: bool = False
    seed: int = 0

    def weight(self) -> tuple[Quantized, Constants | None]:
        return weight_of(
            Recipe(self.shape, block_size=self.block_size, seed=self.seed), self.double_quant
        )

    def x(self, seed: int = 1) -> Tensor:
        x = random(
            self.tokens,
            self.shape[1 if self.transposed else 0],
            dtype=self.dtype,
            seed=self.seed + seed,
        )
        return x.T.contiguous().T if self.strided else x

    def bias(self) -> Tensor | None:
        return (
            random(self.shape[0], dtype=self.dtype, seed=self.seed + 5)
            if self.biased and self.transposed
            else None
        )

    def bound(self, x: Tensor, q: Quantized, constants: Constants | None) -> Bounded:
        """The bound, whether or not W is rounded to the dtype of x; a bias is one more term."""
        weight = operand(dense(q, constants, torch.float32), self.dtype)
        weight = weight.T if self.transposed else weight
        terms = Bounded.exact(x)
        if (bias := self.bias()) is not None:
            value = torch.cat([weight.value, bias.double()[None]])
            weight = Bounded(value, torch.cat([weight.error, torch.zeros_like(value[:1])]))
            terms = Bounded.exact(torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1))
        return in_float64(terms.matmul(weight, self.dtype), 2 * (x.shape[1] + 1))


sides = st.one_of(st.integers(1, 200), st.sampled_from([63, 64, 65, 128, 129]))
products = st.builds(
    Product,
    st.tuples(sides, sides),
    st.sampled_from(ROWS),
    st.booleans(),
    st.sampled_from(HALF_AND_SINGLE),
    st.booleans(),
    st.sampled_from([2, 64, 1024]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)


def is_within_its_bound(case: Product) -> bool:
    q, constants = case.weight()
    x = case.x()
    y = dispatch.matmul(x, q, constants, case.transposed, case.bias())
    return y.dtype == case.dtype and y.is_contiguous() and case.bound(x, q, constants).allows(y)


@given(products)
def test_a_product_is_within_the_bound_of_its_dtype(case: Product) -> None:
    assert is_within_its_bound(case)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(
    "shape", [(150, 40), (40, 150), (64, 128), (65, 129), (128, 128), (66, 192), (7, 3)]
)
@pytest.mark.parametrize("tokens", [*ROWS, 21])
def test_every_row_and_column_is_computed_for_any_remainder_of_the_windows(
    dtype: torch.dtype, transposed: bool, shape: tuple[int, int], tokens: int, small_windows: None
) -> None:
    for double, biased in [(True, False), (False, True)]:
        assert is_within_its_bound(Product(shape, tokens, transposed, dtype, double, biased=biased))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_windows_change_nothing_but_the_order_of_no_sum(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A product with ones and zeros picks a row of W: exact, wherever the windows are cut."""
    monkeypatch.setattr(launch, "NATIVE", {torch.bfloat16, torch.float16})
    for shape, transposed in [((150, 40), False), ((40, 150), True)]:
        q, constants = weight_of(Recipe(shape), True)
        x = torch.eye(shape[1 if transposed else 0], dtype=dtype)
        whole = dense(q, constants, dtype)
        for window in (64, 2**20):
            monkeypatch.setattr(launch, "WINDOW", window)
            monkeypatch.setattr(launch, "AT_ONCE", window)  # the same for float32
            y = dispatch.matmul(x, q, constants, transposed)
            assert torch.equal(y, whole.T if transposed else whole)


def test_the_caller_owns_what_it_gets() -> None:
    """By matmul.py, and by windows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "NATIVE", {torch.bfloat16})
        for dtype, tokens, transposed in itertools.product(
            (torch.float32, torch.bfloat16), (2, 40), (True, False)
        ):
            case = Product((70, 70), tokens, transposed, dtype)
            q, constants = case.weight()
            first = dispatch.matmul(case.x(), q, constants, transposed)
            before = first.clone()
            second = dispatch.matmul(case.x(seed=2), q, constants, transposed)
            assert same_bits(first, before) and not torch.equal(first, second)
            assert first.untyped_storage().nbytes() == first.nbytes  # no view of a window


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("codebook", [nf4.NF4, nf4.normal_float(8)], ids=["kernels", "reference"])
def test_autocast_does_not_reach_into_a_product(enabled: bool, codebook: Tensor) -> None:
    q, constants = weight_of(Recipe((33, 70)), True, codebook)
    for tokens in (2, 40):
        for transposed, width in [(True, 70), (False, 33)]:
            x = random(tokens, width)
            expected = dispatch.matmul(x, q, constants, transposed)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                assert same_bits(dispatch.matmul(x, q, constants, transposed), expected)


# gradients


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("shape", [(6, 4), (5, 5)])
def test_a_product_passes_gradcheck_in_float64(transposed: bool, shape: tuple[int, int]) -> None:
    q, constants = weight_of(Recipe(shape), True)
    x = random(3, shape[1 if transposed else 0], dtype=torch.float64).requires_grad_()

    def product(x: Tensor) -> Tensor:
        return dispatch.matmul(x, q, constants, transposed)

    assert torch.autograd.gradcheck(product, x) and torch.autograd.gradgradcheck(product, x)


@given(products)
@example(Product((65, 65), 3))  # square: its transpose would fit
@example(Product((65, 65), 40, False))
def test_the_gradient_of_either_product_is_the_other(case: Product) -> None:
    q, constants = case.weight()
    x = case.x().requires_grad_()
    bias = case.bias()
    other = dataclasses.replace(case, transposed=not case.transposed, biased=False)
    g = other.x(seed=2)
    dispatch.matmul(
        x, q, constants, case.transposed, None if bias is None else bias.requires_grad_()
    ).backward(g)
    assert x.grad.dtype == case.dtype and other.bound(g, q, constants).allows(x.grad)
    if bias is not None:
        total = Bounded.exact(torch.ones(1, len(g))).matmul(Bounded.exact(g), case.dtype)
        assert in_float64(total, 2 * max(len(g), 1)).allows(bias.grad[None])


def test_a_product_keeps_nothing_for_its_gradient_but_the_weight() -> None:
    q, constants = weight_of(Recipe((33, 70)), True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        dispatch.matmul(random(40, 70).requires_grad_(), q, constants)
    stored = {q.packed.data_ptr(), q.codebook.data_ptr()}
    stored |= {
        tensor.data_ptr()
        for tensor in (constants.codes, constants.absmax, constants.offset, constants.codebook)
    }
    assert {tensor.data_ptr() for tensor in kept} <= stored


# the operators


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_operators_are_what_torch_asks_of_operators(double: bool, dtype: torch.dtype) -> None:
    q, constants = weight_of(Recipe((33, 70)), double)
    stored = flatten(q, constants)
    torch.library.opcheck(
        OPERATORS.dequantize_.default, (torch.empty(33, 70, dtype=dtype), *stored)
    )
    for tokens in (2, 20):
        for transposed, width in [(True, 70), (False, 33)]:
            x = random(tokens, width, dtype=dtype).requires_grad_()
            bias = random(33, dtype=dtype).requires_grad_() if transposed else None
            torch.library.opcheck(OPERATORS.matmul.default, (x, bias, *stored, transposed))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double", [True, False])
def test_torch_compile_takes_them_as_they_are(
    dtype: torch.dtype, double: bool, fresh_compiler: None
) -> None:
    q, constants = weight_of(Recipe((33, 70)), double)
    bias = random(33, dtype=dtype)

    def layer(x: Tensor) -> tuple[Tensor, Tensor]:
        h = dispatch.matmul(torch.relu(x), q, constants, bias=bias)
        return dispatch.matmul(h, q, constants, transposed=False), dispatch.dequantize(
            q, dtype, constants
        )

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for tokens in (3, 40):
        twins = [random(tokens, 70, dtype=dtype).requires_grad_() for _ in range(2)]
        y, whole = layer(twins[0])
        y_compiled, whole_compiled = compiled(twins[1])
        assert same_bits(y_compiled, y) and same_bits(whole_compiled, whole)
        for result in (y, y_compiled):
            result.backward(random(tokens, 70, dtype=dtype, seed=1))
        assert same_bits(twins[0].grad, twins[1].grad)


# memory


def most_alive(case: Product) -> tuple[int, int]:
    """The bytes of y, and the most that is alive within the product besides x and the weight."""
    q, constants = case.weight()
    stored = flatten(q, constants)
    x = case.x()
    with Live(x, *(part for part in stored if isinstance(part, Tensor))) as live:
        before = live.now()
        y = dispatch._matmul(x, None, *stored, case.transposed)
    return y.nbytes, live.peak - before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(
    ("shape", "window"),
    [((512, 384), 2**14), ((384, 512), 2**15), ((256, 1000), 2**14), ((64, 30), 2**20)],
)
def test_a_product_holds_one_window_and_its_result_and_nothing_else(
    shape: tuple[int, int],
    window: int,
    dtype: torch.dtype,
    transposed: bool,
    double: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Besides the 16 levels. A window has at most WINDOW elements, in 64s of rows or columns."""
    monkeypatch.setattr(launch, "NATIVE", {dtype})
    monkeypatch.setattr(launch, "WINDOW", window)
    long, across = (shape[1], shape[0]) if transposed else shape
    size = min(max(window // long // 64 * 64, 64), across) * long
    y, most = most_alive(Product(shape, 50, transposed, dtype, double))
    assert most == y + size * dtype.itemsize + 16 * 4
    assert size < shape[0] * shape[1] or window == 2**20


class Results(TorchDispatchMode):
    """Records the name and the dtype of the result of each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        result = function(*args, **(kwargs or {}))
        self.seen.append((function.__name__.partition(".")[0], result.dtype))
        return result


@pytest.mark.skipif(not launch.vectors.LOOK_UP, reason="there are no kernels for few rows here")
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tokens"),
    [(torch.float32, 600), (torch.float32, 50), (torch.float32, 3), (torch.bfloat16, 3)],
)
def test_a_float32_product_holds_its_result_and_some_rows_of_a_factor(
    dtype: torch.dtype, tokens: int, transposed: bool
) -> None:
    """The levels, y, and for at most AT_ONCE rows: a copy of x, or of y and, if padded, of x."""
    case = Product((512, 384), tokens, transposed, dtype)
    into, out = (384, 512) if transposed else (512, 384)
    y, most = most_alive(case)
    rows = min(tokens, launch.AT_ONCE)
    group = launch.products.WIDTH if transposed else 4
    padded = -(-rows // group) * group
    columns = 0  # of the copies; the kernels for few rows make none
    if tokens > 3:
        columns = into if transposed else out
        if not transposed and padded > rows:
            columns += into
    scratch = 4 * padded * columns
    if dtype != torch.float32:
        scratch = max(scratch + 4 * rows * into, y)
    assert most == 16 * 4 + 4 * tokens * out + scratch


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_thin_product_is_added_in_float32_where_16_bits_are_not_native(
    dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact products of small integers: y + 2 a b is rounded once from float32, at most twice by
    torch, which may round the product first."""
    torch.manual_seed(0)
    monkeypatch.setattr(launch, "NATIVE", {torch.bfloat16, torch.float16} if native else set())
    y, a, b = (torch.randint(-15, 16, size).to(dtype) for size in ((50, 30), (50, 4), (4, 30)))
    product = a.double() @ b.double()
    exact = y.double() + 2 * product
    with Results() as results:
        found = dispatch.add_product_(y, a, b, 2.0)
    assert found is y and y.dtype == dtype
    products = {kind for name, kind in results.seen if name in ("mm", "addmm_")}
    assert products == {dtype if native else torch.float32}
    # u of the result, and if the product was rounded first, of twice the product.
    bound = cast(exact.abs(), dtype) + native * 2 * cast(product.abs(), dtype)
    assert ((y.double() - exact).abs() <= (1 + gamma(1, dtype)) * bound).all()


def test_constants_in_float32_need_no_decoding() -> None:
    q = nf4.quantize(torch.ones(64))
    assert with_decoded_absmax(q, None) is q
