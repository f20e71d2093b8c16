"""The laws of the CUDA kernels, tested without a GPU.

The functions that launch the kernels run their source in warpsim.py, on CPU tensors whose memory is
garbage before it is written. Each law is tested under three orders of threads. What only a GPU can
show is in test_gpu.py.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from coverage import Coverage
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_dispatch import dense, random, said, weight_of
from torch import Tensor

import double_quant
import nf4
from cuda_kernels import dequantize
from cuda_kernels.device import FLOATS
from helpers import warpsim
from helpers.bounds import few_rows
from helpers.strategies import (
    HALF_AND_SINGLE,
    LAYOUTS,
    Recipe,
    bits,
    codes_of_2_to_16_levels,
    same_bits,
)
from kernels import dispatch, launch_cuda
from kernels.cpu import adamw, launch
from kernels.packed_weight import flatten

orders = st.integers(0, 2)
BLOCKS = [8, 16, 32, 64, 128, 256]  # what `quantize` has a kernel for
HALVES = [torch.bfloat16, torch.float16]
SECTOR = 32  # bytes that memory moves at least
FEW = settings(max_examples=25)


@pytest.fixture(scope="module", autouse=True)
def greenlets_are_measured() -> Iterator[None]:
    """Coverage per greenlet, which the simulator needs, and which would slow down all else."""
    others = Coverage.current()
    if others is None:
        yield
        return
    others.stop()
    ours = Coverage(data_suffix=True, concurrency="greenlet")
    ours.start()
    yield
    ours.stop()
    ours.save()
    others.start()


@contextmanager
def simulated(
    order: int = 0, capability: tuple[int, int] = (9, 0), processors: int = 2
) -> Iterator[list[str]]:
    """Run CUDA kernels in the simulator, on CPU tensors. Yields the names of those that ran."""
    names: list[str] = []

    def run(
        kernel: launch_cuda.Kernel, blocks: int, device: torch.device, *arguments: Tensor | float
    ) -> None:
        names.extend([kernel.function.__name__] * bool(blocks))
        warpsim.run(kernel, blocks, arguments, order)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch_cuda, "launch", run)
        patch.setattr(launch_cuda, "capability", lambda device: capability)
        patch.setattr(launch_cuda, "processors", lambda device: processors)
        patch.setattr(dispatch, "_kernels", lambda tensor: launch_cuda)
        # With this, torch.empty gives NaN, or the largest integer.
        torch.use_deterministic_algorithms(True)
        try:
            yield names
        finally:
            torch.use_deterministic_algorithms(False)


def test_uninitialized_memory_is_garbage_there() -> None:
    with simulated():
        assert torch.empty(9).isnan().all() and torch.empty(9, dtype=torch.bfloat16).isnan().all()
        assert (torch.empty(9, dtype=torch.uint8) == 255).all()


# quantize

sizes = st.one_of(st.tuples(st.integers(1, 700)), st.tuples(st.integers(1, 30), st.integers(1, 30)))
blocks_of_numbers = st.builds(
    Recipe,
    sizes,
    st.sampled_from([*HALF_AND_SINGLE, torch.float64]),
    st.sampled_from(LAYOUTS),
    st.sampled_from(BLOCKS),
    st.sampled_from(
        ["normal", "outliers", "zero blocks", "ties", "largest", "blocks of all sizes"]
    ),
    st.integers(-150, 100),
    st.integers(0, 99),
)


@FEW
@given(blocks_of_numbers, st.one_of(st.just(nf4.NF4), codes_of_2_to_16_levels), orders)
@example(Recipe((2049,), torch.bfloat16), nf4.NF4, 0)  # a second block of threads, for one number
@example(Recipe((2056,), block_size=256), nf4.NF4, 1)
@example(Recipe((127,), torch.float16, block_size=8), nf4.normal_float(2), 2)
def test_codes_and_constants_are_those_of_the_reference_bit_for_bit(
    recipe: Recipe, codebook: Tensor, order: int
) -> None:
    weight = recipe.tensor()
    expected = nf4.quantize(weight, recipe.block_size, codebook)
    with simulated(order) as ran:
        q = dispatch.quantize(weight, recipe.block_size, codebook)
    assert ran == ["quantize"]
    assert same_bits(q.packed, expected.packed)
    assert same_bits(q.absmax, expected.absmax)
    assert (q.shape, q.dtype, q.block_size) == (expected.shape, expected.dtype, expected.block_size)


@pytest.mark.parametrize("dtype", [*HALF_AND_SINGLE, torch.float64])
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused_as_the_reference_does(
    dtype: torch.dtype, bad: float
) -> None:
    for place in (0, 63, 127, 199):
        weight = random(200, dtype=dtype)
        weight[place] = bad
        with simulated():
            message = said(lambda weight=weight: dispatch.quantize(weight))
        assert message == said(lambda weight=weight: nf4.quantize(weight))


@pytest.mark.parametrize(
    ("block_size", "dtype"), [(4, torch.float32), (512, torch.float32), (64, torch.bfloat16)]
)
def test_blocks_without_a_kernel_go_to_the_reference(block_size: int, dtype: torch.dtype) -> None:
    weight = random(600, dtype=dtype)
    with simulated(capability=(7, 5)) as ran:  # which has no bfloat16
        q = dispatch.quantize(weight, block_size)
    assert ran == [] and same_bits(q.packed, nf4.quantize(weight, block_size).packed)


def test_numbers_that_do_not_start_at_16_bytes_are_copied_first() -> None:
    weight = random(1001, dtype=torch.bfloat16)[1:]
    with simulated() as ran:
        q = dispatch.quantize(weight)
    assert ran == ["quantize"] and same_bits(q.packed, nf4.quantize(weight).packed)


def test_eight_bit_codes_go_to_the_reference() -> None:
    weight = random(600)
    with simulated() as ran:
        q = dispatch.quantize(weight, 64, nf4.normal_float(8))
    assert ran == [] and same_bits(q.packed, nf4.quantize(weight, 64, nf4.normal_float(8)).packed)


# dequantize

tensors = st.builds(
    Recipe,
    st.tuples(st.one_of(st.integers(1, 400), st.integers(1000, 3000))),
    st.sampled_from(HALF_AND_SINGLE),
    st.just("contiguous"),
    st.sampled_from([2, 8, 64, 4096]),
    st.sampled_from(["normal", "zero blocks", "blocks of all sizes", "largest"]),
    st.integers(-100, 60),
    st.integers(0, 99),
)


@FEW
@given(tensors, st.booleans(), st.sampled_from(HALF_AND_SINGLE), orders)
@example(Recipe((1024,)), True, torch.bfloat16, 0)  # nothing left for v1
# A second block of v4, and one element.
@example(Recipe((9217,), torch.bfloat16), True, torch.bfloat16, 1)
@example(
    Recipe((2049,), torch.float16, block_size=8, pattern="blocks of all sizes"),
    True,
    torch.float32,
    2,
)
def test_decoded_numbers_have_the_bits_of_the_reference(
    recipe: Recipe, double: bool, dtype: torch.dtype, order: int
) -> None:
    q, constants = weight_of(recipe, double)
    with simulated(order) as ran:
        out = dispatch.dequantize(q, dtype, constants)
    assert same_bits(out, dense(q, constants, dtype))
    n = math.prod(recipe.shape)
    expected = []
    if n >= 1024 and recipe.block_size >= 8:
        expected.append("swapped")
    if n % 1024 > 0 or recipe.block_size < 8:
        expected.append("naive")
    assert ran == expected


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_constants_that_are_not_finite_decode_as_the_reference_decodes_them(bad: float) -> None:
    q, constants = weight_of(Recipe((1100,)), True)
    nested = constants.absmax.clone()
    nested[0] = bad
    for broken in (
        dataclasses.replace(constants, absmax=nested),
        dataclasses.replace(constants, offset=torch.tensor([bad])),
    ):
        expected = dense(q, broken)
        with simulated():
            decoded = dispatch.dequantize(q, None, broken)
        assert torch.equal(decoded.isnan(), expected.isnan())
        assert same_bits(decoded.nan_to_num(7), expected.nan_to_num(7))


# the ladder: the same results by four kernels


@dataclasses.dataclass(frozen=True)
class Rung:
    """A kernel of the ladder, and what it promises for numbers of 16 bits."""

    name: str
    elements: int  # that a thread decodes
    read: int  # bytes of `packed` at once
    written: int  # bytes of `out` at once
    levels: int  # how often a block reads a level from global memory; 0: once for each element
    share: int  # elements for which a constant is read once

    def __str__(self) -> str:
        return self.name


V1 = Rung("v1", 1, 1, 2, 0, 1)
V2 = Rung("v2", 2, 1, 4, 0, 2)
V3 = Rung("v3", 8, 4, 16, 16, 8)
V4 = Rung("v4", 32, 16, 16, 16, 8)
THREADS = 288  # a block and one more warp
each_rung = pytest.mark.parametrize("rung", [V1, V2, V3, V4], ids=str)


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Elements `start` ... n - 1 of a weight that a rung decodes; only v1 has a start."""

    rung: Rung
    recipe: Recipe
    n: int
    start: int = 0
    double: bool = True
    dtype: torch.dtype = torch.bfloat16

    def weight(self) -> tuple[nf4.Quantized, double_quant.DoubleQuantized | None]:
        return weight_of(self.recipe, self.double)

    def run(self, order: int, accesses: list[warpsim.Access] | None = None) -> "Decoded":
        """Decode into memory that is all NaN, and as long as the weight."""
        q, constants = self.weight()
        out = torch.full((math.prod(self.recipe.shape),), torch.nan, dtype=self.dtype)
        kernel = getattr(dequantize, self.rung.name)(launch_cuda.NAMES[self.dtype])
        weight = launch_cuda.kernel_weight(flatten(q, constants))
        arguments = {
            "v1": (q.packed, out, self.start, self.n),
            "v2": (q.packed, out, self.n),
            "v3": (out, self.n),
            "v4": (out, self.n // 1024),
        }[self.rung.name]
        blocks = -(-(self.n - self.start) // (self.rung.elements * kernel.threads))
        try:
            warpsim.run(kernel, blocks, (weight, *arguments), order, accesses)
        except (IndexError, RuntimeError, ValueError) as error:
            pytest.fail(f"{self}: wanted numbers, got {type(error).__name__}: {error}")
        return Decoded(out, weight[0], weight[1], weight[3])

    def check(self, order: int) -> None:
        """Fail unless the numbers have the bits of the reference."""
        q, constants = self.weight()
        wanted = dense(q, constants, self.dtype)
        got = self.run(order).out
        differs = (bits(got) != bits(wanted)).nonzero().flatten()
        if len(differs):
            first = differs[0]
            pytest.fail(
                f"{self}, order of threads {order}:\n  element {first}: wanted {wanted[first]}, "
                f"got {got[first]}; {len(differs)} of {self.n} differ"
            )

    def __str__(self) -> str:
        constants = "double-quantized" if self.double else "float32"
        return (
            f"{self.rung} to {launch_cuda.NAMES[self.dtype]}, {self.n} elements in blocks of "
            f"{self.recipe.block_size}, {constants} constants"
        )


class Decoded(NamedTuple):
    """What a kernel wrote, and three of the tensors that it read."""

    out: Tensor
    packed: Tensor
    levels: Tensor
    constants: Tensor  # as 8-bit codes


def decodings(
    rung: Rung, unit: int, most: int, block_sizes: list[int], dtypes: list[torch.dtype]
) -> st.SearchStrategy[Decoding]:
    """Weights of up to `most` times `unit` elements."""

    def decoding(count: int, dtype: torch.dtype, double: bool, *fields: object) -> Decoding:
        recipe = Recipe((count * unit,), dtype, "contiguous", *fields)
        return Decoding(rung, recipe, count * unit, 0, double, dtype)

    return st.builds(
        decoding,
        st.integers(1, most),
        st.sampled_from(dtypes),
        st.booleans(),
        st.sampled_from(block_sizes),
        st.sampled_from(["normal", "zero blocks", "blocks of all sizes", "largest"]),
        st.integers(-100, 60),
        st.integers(0, 99),
    )


FEWER = settings(max_examples=12)


@FEW
@given(decodings(V1, 1, 600, [2, 8, 64, 4096], HALF_AND_SINGLE), orders)
def test_v1_gives_each_element_the_bits_of_the_reference(decoding: Decoding, order: int) -> None:
    decoding.check(order)


@FEW
@given(decodings(V2, 2, 550, [2, 8, 64, 4096], HALVES), orders)
def test_v2_gives_each_pair_the_bits_of_the_reference(decoding: Decoding, order: int) -> None:
    decoding.check(order)


@FEWER
@given(decodings(V3, 8, 500, [8, 64, 4096], HALVES), orders)
def test_v3_gives_each_word_the_bits_of_the_reference(decoding: Decoding, order: int) -> None:
    decoding.check(order)


@FEWER
@given(decodings(V4, 1024, 9, [8, 64, 4096], HALF_AND_SINGLE), orders)
@example(Decoding(V4, Recipe((9216,)), 9216, dtype=torch.float32), 0)
def test_v4_gives_each_run_the_bits_of_the_reference(decoding: Decoding, order: int) -> None:
    decoding.check(order)


def many_threads(
    rung: Rung, start: int = 0, more: int = 0, dtype: torch.dtype = torch.bfloat16
) -> Decoding:
    """A block of threads and a warp; the weight has `more` elements than are decoded."""
    n = start + rung.elements * THREADS
    return Decoding(rung, Recipe((n + more,)), n, start, dtype=dtype)


@each_rung
def test_every_order_of_threads_gives_the_same_bits(rung: Rung) -> None:
    for order in range(6):
        many_threads(rung).check(order)


@each_rung
def test_each_element_is_written_once_and_nothing_beyond_them(rung: Rung) -> None:
    decoding = many_threads(rung, start=40 if rung is V1 else 0, more=1024)
    accesses: list[warpsim.Access] = []
    out = decoding.run(0, accesses).out
    written = Counter()
    for access in accesses:
        if access.is_write:
            first = (access.address - out.data_ptr()) // out.itemsize
            written.update(range(first, first + access.nbytes // out.itemsize))
    wanted = Counter(range(decoding.start, decoding.n))
    wrong = sorted({*(written - wanted), *(wanted - written)})
    assert not wrong, (
        f"{decoding}: wanted {wanted[wrong[0]]} writes of element {wrong[0]}, "
        f"got {written[wrong[0]]}; so with {len(wrong)} elements"
    )


def counted(accesses: list[warpsim.Access], tensor: Tensor) -> dict[int, int]:
    """How many accesses to a tensor there were, by their bytes."""
    end = tensor.data_ptr() + tensor.nbytes
    found = [access for access in accesses if tensor.data_ptr() <= access.address < end]
    return dict(Counter(access.nbytes for access in found))


@each_rung
def test_each_rung_reads_and_writes_as_many_bytes_at_once_as_it_promises(rung: Rung) -> None:
    decoding = many_threads(rung)
    accesses: list[warpsim.Access] = []
    decoded = decoding.run(0, accesses)
    blocks = 1 + max(access.block for access in accesses)
    wanted = {
        "packed": {rung.read: THREADS},
        "out": {rung.written: 2 * decoding.n // rung.written},
        "levels": {4: rung.levels * blocks or decoding.n},
    }
    for name, numbers in wanted.items():
        got = counted(accesses, getattr(decoded, name))
        assert got == numbers, (
            f"{decoding}: accesses to `{name}` by their bytes: wanted {numbers}, got {got}"
        )
    most = decoding.n // rung.share
    reads = counted(accesses, decoded.constants)[1]
    assert reads <= most, f"{decoding}: reads of constants: wanted at most {most}, got {reads}"


@pytest.mark.parametrize(
    ("rung", "dtype"), [*((rung, torch.bfloat16) for rung in (V1, V2, V3, V4)), (V4, torch.float32)]
)
def test_each_write_of_a_warp_fills_whole_sectors(rung: Rung, dtype: torch.dtype) -> None:
    """The k-th writes of the 32 threads of a warp are one instruction."""
    decoding = many_threads(rung, dtype=dtype)
    accesses: list[warpsim.Access] = []
    out = decoding.run(0, accesses).out
    assert out.data_ptr() % SECTOR == 0
    done = Counter()
    sectors = set()
    for access in accesses:
        if access.is_write:
            thread = access.block, access.thread
            instruction = access.block, access.thread // 32, done[thread]
            done[thread] += 1
            sectors.add((instruction, access.address // SECTOR))
    wanted = out.nbytes // SECTOR
    assert len(sectors) == wanted, (
        f"{decoding}: sectors of {SECTOR} bytes that the writes touch, one instruction after "
        f"the other: wanted {wanted}, got {len(sectors)}"
    )


def test_what_does_not_start_at_16_bytes_is_decoded_one_by_one() -> None:
    q, constants = weight_of(Recipe((1100,), torch.bfloat16), True)
    out = torch.full((1101,), torch.nan, dtype=torch.bfloat16)
    with simulated() as ran:
        dispatch.dequantize(q, None, constants, out[1:])
    assert ran == ["naive"] and same_bits(out[1:], dense(q, constants))


# the product with few rows


@dataclasses.dataclass(frozen=True)
class Product:
    """x W^T + b, by which kernel."""

    tokens: int = 3
    shape: tuple[int, int] = (40, 128)
    dtype: torch.dtype = torch.bfloat16
    double: bool = True
    bias: bool = False
    block_size: int = 64
    capability: tuple[int, int] = (9, 0)

    def is_within_its_bound(self, order: int) -> bool:
        recipe = Recipe(self.shape, block_size=self.block_size, seed=self.tokens, exponent=-3)
        q, constants = weight_of(recipe, self.double)
        x = random(self.tokens, self.shape[1], dtype=self.dtype)
        b = random(self.shape[0], seed=1) if self.bias else None
        with simulated(order, self.capability):
            y = launch_cuda.few_rows(x, flatten(q, constants), b)
        bound = few_rows(x, dense(q, constants, torch.float32), b)
        return y.dtype == self.dtype and bound.allows(y)


ON_TENSOR_CORES = [
    Product(1, (40, 128)),
    Product(8, (32, 64)),
    Product(3, (33, 192), torch.float16, bias=True),
    Product(9, (65, 1088)),
    Product(17, (70, 320), torch.float16, False),
    Product(33, (150, 128), bias=True),
    Product(64, (129, 64), torch.float16),
    Product(5, (9, 2112), block_size=4096),
    Product(2, (40, 192), block_size=128),
]
PORTABLE = [
    Product(1, (9, 96), torch.float32, block_size=32),
    Product(4, (17, 1056), torch.float32, bias=True, block_size=32),
    Product(3, (8, 64), torch.float16, False, capability=(7, 5)),
    Product(1, (20, 1088), torch.float16, bias=True, capability=(7, 5)),
]


@pytest.mark.parametrize("product", [*ON_TENSOR_CORES, *PORTABLE], ids=str)
def test_a_product_is_within_its_bound(product: Product) -> None:
    for order in range(3):
        assert product.is_within_its_bound(order)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_product_is_the_same_however_many_tiles_share_their_columns(
    groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_cuda, "widest", lambda height, tiles, device: groups)
    assert Product(17, (200, 640), bias=True).is_within_its_bound(0)


def test_every_weight_meets_its_own_number(order: int = 0) -> None:
    """Rows of x that pick one column each give columns of W, rounded: a wrong order would show."""
    q, constants = weight_of(Recipe((40, 192)), True)
    whole = dense(q, constants, torch.float32)
    for start in range(0, 192, 64):
        x = torch.eye(192, dtype=torch.bfloat16)[start : start + 64]
        with simulated(order):
            y = launch_cuda.few_rows(x, flatten(q, constants))
        assert few_rows(x, whole, None).allows(y)


def test_the_same_product_has_the_same_bits_in_every_order() -> None:
    q, constants = weight_of(Recipe((40, 1088)), True)
    x = random(9, 1088, dtype=torch.bfloat16)
    results = []
    for order in range(3):
        with simulated(order):
            results.append(launch_cuda.few_rows(x, flatten(q, constants)))
    assert all(same_bits(result, results[0]) for result in results)


WITHOUT_A_KERNEL = [
    Product(65),
    Product(3, (40, 100)),
    Product(3, block_size=32),
    Product(5, (40, 96), torch.float32),
    Product(3, (40, 96), torch.float16),
    Product(3, capability=(7, 5)),
    Product(3, (40, 96), torch.float16, block_size=16, capability=(7, 5)),
]


@pytest.mark.parametrize("product", WITHOUT_A_KERNEL, ids=str)
def test_what_the_product_has_no_kernel_for_is_multiplied_dense(product: Product) -> None:
    q, constants = weight_of(Recipe(product.shape, block_size=product.block_size), True)
    x = random(product.tokens, product.shape[1], dtype=product.dtype)
    with simulated(capability=product.capability) as ran:
        assert launch_cuda.few_rows(x, flatten(q, constants)) is None
        y = dispatch.matmul(x, q, constants)
    assert "matmul" not in ran and same_bits(y, torch.mm(x, dense(q, constants, product.dtype).T))


def test_gradients_are_multiplied_dense_and_by_a_kernel_where_there_is_one() -> None:
    q, constants = weight_of(Recipe((128, 64)), True)
    g = random(3, 128, dtype=torch.bfloat16)
    with simulated() as ran:
        dx = dispatch.matmul(g, q, constants, transposed=False)
        assert ran == ["swapped"]
        assert same_bits(dx, torch.mm(g, dense(q, constants, torch.bfloat16)))
        dispatch.matmul(random(3, 64, dtype=torch.bfloat16), q, constants)
        assert ran == ["swapped", "matmul"]


def test_wide_tiles_leave_no_processor_idle() -> None:
    with simulated(processors=100):
        device = torch.device("cpu")
        heights = (12800, 12799, 6400, 6399, 10)
        by_height = [launch_cuda.widest(height, 8, device) for height in heights]
        assert by_height == [4, 2, 2, 1, 1]
        by_tiles = [launch_cuda.widest(10**6, tiles, device) for tiles in (1, 2, 4, 8)]
        assert by_tiles == [1, 2, 4, 4]


# AdamW

hyperparameters = st.fixed_dictionaries(
    {
        "step": st.integers(1, 3),
        "betas": st.sampled_from([(0.9, 0.999), (0.3, 0.5), (0.0, 0.0), (1e-9, 0.9)]),
        "lr": st.sampled_from([1e-3, 0.0, 10.0]),
        "eps": st.sampled_from([1e-8, 0.0]),
        "weight_decay": st.sampled_from([0.01, 0.0]),
    }
)


def scalars(
    step: int, betas: tuple[float, float], lr: float, eps: float, weight_decay: float
) -> tuple:
    beta1, beta2 = betas
    return (
        step == 1,
        1 - lr * weight_decay,
        1 - beta1,
        beta2,
        1 - beta2,
        (1 - beta2**step) ** 0.5,
        eps,
        -lr / (1 - beta1**step),
    )


def special(n: int, seed: int) -> Tensor:
    """Numbers of all sizes, zeros of both signs among them."""
    numbers = random(n, seed=seed) * 2.0 ** torch.randint(
        -60, 60, (n,), generator=torch.Generator().manual_seed(seed)
    )
    return numbers.where(torch.arange(n) % 7 > 1, 0.0 * numbers)


@FEW
@given(st.integers(1, 90), st.integers(0, 5), st.integers(0, 99), hyperparameters, orders)
@example(
    1100, 0, 0, {"step": 2, "betas": (0.9, 0.999), "lr": 1e-3, "eps": 1e-8, "weight_decay": 0.01}, 0
)
def test_an_update_has_the_bits_of_the_cpus_wherever_it_starts(
    n: int, start: int, seed: int, group: dict, order: int
) -> None:
    """And that of the CPU has those of paged_optim.adamw_, as test_paged_optim.py shows."""
    param = special(n + start, seed)[start:]
    grad = special(n, seed + 1)
    moments = special(2 * n, seed + 2).view(2, n)
    moments[1] = moments[1].abs().nan_to_num()
    expected = param.clone(), grad.clone(), moments.clone()
    adamw.update(*[tensor.numpy() for tensor in expected], *scalars(**group))
    with simulated(order) as ran:
        dispatch.adamw(param, grad, group["step"], group)(0, moments)
    assert ran == ["adamw"]
    for made, wanted in zip((param, grad, moments), expected):
        nan = wanted.isnan()
        assert torch.equal(made.isnan(), nan) and torch.equal(bits(made)[~nan], bits(wanted)[~nan])


def test_a_parameter_of_16_bits_has_no_kernel() -> None:
    group = {"betas": (0.9, 0.999), "lr": 1e-3, "eps": 1e-8, "weight_decay": 0.01}
    with simulated():
        param = random(4, dtype=torch.bfloat16)
        assert dispatch.adamw(param, param.clone(), 1, group) is None


# which call goes to which implementation


def test_a_tensor_of_the_cpu_or_without_a_compiler_gets_no_kernel_of_the_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = SimpleNamespace(is_cuda=True, device=torch.device("cuda"))
    assert dispatch._kernels(random(3)) is launch and dispatch._kernels(there) is launch_cuda
    monkeypatch.setenv("QLORA_KERNELS", "reference")
    assert dispatch._kernels(there) is None
    monkeypatch.delenv("QLORA_KERNELS")
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    dispatch._launch_cuda.cache_clear()
    assert dispatch._kernels(there) is None
    dispatch._launch_cuda.cache_clear()


def test_a_weight_too_large_for_32_bits_has_no_kernel() -> None:
    q, _ = weight_of(Recipe((64,)), False)
    large = dataclasses.replace(q, shape=torch.Size((2**16, 2**16)))
    assert launch_cuda.kernel_weight(flatten(large, None)) is None


class FakeDriver:
    """Takes the place of the driver, and records its calls."""

    CUresult = launch_cuda.driver.CUresult

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.status = self.CUresult.CUDA_SUCCESS

    def __getattr__(self, name: str) -> Callable:
        def call(*arguments: object) -> tuple:
            self.calls.append((name, *arguments))
            return self.status, f"what {name} gave"

        return call


@pytest.fixture
def fake_driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    driver = FakeDriver()
    monkeypatch.setattr(launch_cuda, "driver", driver)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=7)
    )
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77)
    )
    return driver


def test_a_launch_gives_the_driver_addresses_and_numbers_on_torchs_stream(
    fake_driver: FakeDriver,
) -> None:
    kernel = dequantize.v1("float32")
    device = torch.device("cuda", 1)
    out = torch.empty(300)
    weight = (*[out] * 6, 2.5, 6, 8, 1)
    arguments = (weight, out, out, 0, 300)
    for _ in range(2):
        launch_cuda.launch(kernel, 2, device, *arguments)
    names = [name for name, *_ in fake_driver.calls]
    assert names.count("cuModuleLoadData") == 1 and names.count("cuLaunchKernel") == 2
    assert names.count("cuCtxPushCurrent") == names.count("cuCtxPopCurrent") == 3
    ptx = next(arguments[0] for name, *arguments in fake_driver.calls if name == "cuModuleLoadData")
    name = next(
        arguments[1] for name, *arguments in fake_driver.calls if name == "cuModuleGetFunction"
    )
    assert b".entry " + name in ptx and ptx.endswith(b"\0")
    launched = next(arguments for name, *arguments in fake_driver.calls if name == "cuLaunchKernel")
    function, *grid, shared, stream, (values, kinds), _ = launched
    assert (function, grid, shared, stream) == (
        "what cuModuleGetFunction gave",
        [2, 1, 1, 256, 1, 1],
        0,
        77,
    )
    assert values == (*[out.data_ptr()] * 6, 2.5, 6, 8, 1, out.data_ptr(), out.data_ptr(), 0, 300)
    wanted = ["c_void_p"] * 6 + ["c_float"] + ["c_uint"] * 3 + ["c_void_p"] * 2 + ["c_uint"] * 2
    assert [kind.__name__ for kind in kinds] == wanted
    launch_cuda.launch(kernel, 0, device, *arguments)
    assert len(fake_driver.calls) == len(names)
    assert launch_cuda.capability(device) == (9, 0) and launch_cuda.processors(device) == 7


def test_a_driver_that_refuses_is_an_error(fake_driver: FakeDriver) -> None:
    kernel = dequantize.v1("float32")
    device = torch.device("cuda", 0)
    fake_driver.status = FakeDriver.CUresult.CUDA_ERROR_UNSUPPORTED_PTX_VERSION
    with pytest.raises(
        RuntimeError, match="CUDA_ERROR_UNSUPPORTED_PTX_VERSION; QLORA_KERNELS=reference"
    ):
        launch_cuda.launch(kernel, 1, device)


# the simulator itself


def test_the_simulator_finds_a_thread_that_never_comes_to_the_barrier() -> None:
    def guarded(n):  # noqa: ANN001, ANN202
        if warpsim.FakeCuda().threadIdx.x < n:
            warpsim.FakeCuda.syncthreads()

    kernel = launch_cuda.Kernel(guarded, (warpsim.U32,), 64)
    warpsim.run(kernel, 1, (64,))
    with pytest.raises(RuntimeError, match="never reach"):
        warpsim.run(kernel, 1, (40,))


def test_the_simulator_finds_a_loop_without_end() -> None:
    def endless(n):  # noqa: ANN001, ANN202
        while n:
            warpsim.FakeCuda.syncthreads()

    with pytest.raises(RuntimeError, match="never ends"):
        warpsim.run(launch_cuda.Kernel(endless, (warpsim.U32,), 1), 1, (1,))


def test_the_simulator_records_accesses_and_finds_a_negative_index() -> None:
    def copying(x, y, back):  # noqa: ANN001, ANN202
        y[0] = x[2 - int(back)]

    kernel = launch_cuda.Kernel(copying, (FLOATS, FLOATS, warpsim.U32), 1)
    x, y = torch.arange(3.0), torch.zeros(1)
    accesses: list[warpsim.Access] = []
    warpsim.run(kernel, 1, (x, y, 0), accesses=accesses)
    assert y.item() == 2
    assert accesses == [(0, 0, False, x.data_ptr() + 8, 4), (0, 0, True, y.data_ptr(), 4)]
    with pytest.raises(IndexError, match="a thread reads index -1 of 3"):
        warpsim.run(kernel, 1, (x, y, 3), accesses=accesses)


def test_the_simulator_starts_with_garbage_and_knows_bounds() -> None:
    assert np.isnan(warpsim.garbage((2, 3), np.float32)).all()
    assert warpsim.pointer(torch.zeros(5, dtype=torch.bfloat16), np.uint32).shape == (2,)


def test_a_code_of_fewer_than_16_levels_is_padded_for_the_kernels() -> None:
    q = nf4.quantize(torch.ones(64), codebook=nf4.normal_float(3))
    levels = launch_cuda.kernel_weight(flatten(q, None))[1]
    assert levels.numel() == 16 and torch.equal(levels[:8], nf4.normal_float(3))
