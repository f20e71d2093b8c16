"""The tests of the tests: every bound is reached, and no test has another tolerance.

A bound that nothing can reach misses bugs. So each bound has an input for which all its roundings
have one direction: ties just above a power of two, where a rounding is relatively largest. Where an
error cannot reach 99 % of its bound, the test says why.
"""

import ast
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

import double_quant
import nf4
from helpers.bounds import (
    TINY,
    UNIT_ROUNDOFF,
    Bounded,
    apart,
    both_quantized,
    cast,
    cosine,
    decision_error,
    dora_backward,
    dora_forward,
    dora_norm,
    dora_scale,
    double_quantized,
    few_rows,
    gamma,
    half_gap,
    in_float64,
    is_tight,
    least_cosine,
    lora_backward,
    lora_forward,
    merged_forward,
    operand,
    requantizing_is_safe,
    roundtrip,
)
from helpers.strategies import DTYPES, HALF_AND_SINGLE

U = 2.0**-24
EPS = 2.0**-23  # the distance from 1 to the next float32
ALMOST = 1 - 2.0**-11  # times half a step: just below a tie, in any of the formats


def distance(computed: Tensor, wanted: Tensor) -> Tensor:
    return (computed.double() - wanted.double()).abs()


# every law has its test, every bound is reached, and no other tolerance is used

HERE = Path(__file__).parent
LAWS = {
    "the round trip is within h * absmax and rounding": "test_roundtrip_error_is_within_half_gap",
    "re-quantizing": "test_requantizing_a_dequantized_tensor_gives_the_same_codes",
    "scaling by 2^k leaves the codes": "test_scaling_by_a_power_of_two_leaves_codes_unchanged",
    "zero stays exactly zero": "test_zero_stays_exactly_zero_and_never_becomes_minus_zero",
    "all-zero blocks too": "test_blocks_of_zeros_stay_exactly_zero_under_double_quantization_too",
    "a tie takes the lower code": "test_a_tie_takes_the_lower_code",
    "a ragged last block": "test_any_shape_and_stride_gives_the_layout_that_is_documented",
    "any shape, numel 0": "test_any_shape_and_stride_gives_the_layout_that_is_documented",
    "any stride": "test_a_strided_tensor_gives_the_bytes_of_its_contiguous_copy",
    "the bits of storage": "test_a_weight_costs_exactly_4_bits_and_its_constants_and_one_mean",
    "bitsandbytes' bytes": "test_bytes_constants_and_decoded_values_equal_those_of_bitsandbytes",
    "NaN and Inf": "test_what_is_not_finite_in_float32_is_refused_with_its_count_and_first_index",
    "LoRA starts at the model": "test_lora_at_initialisation_leaves_the_output_bitwise_unchanged",
    "gradcheck": "test_the_backward_passes_gradcheck_in_float64",
    "nothing dense": "test_a_stack_saves_x_and_h_and_the_mask_of_each_layer_and_nothing_dense",
    "no frozen-branch input": "test_x_is_saved_for_A_alone",
    "paged AdamW": "test_any_page_size_and_budget_gives_the_bits_of_one_page",
    "paged and resident AdamW": "test_any_page_size_and_budget_gives_the_bits_of_torch",
    "resume after a kill": "test_a_resumed_run_ends_with_the_bits_of_one_that_never_stopped",
    "a kill in a save": "test_a_save_that_fails_at_any_moment_leaves_the_old_file_and_no_other",
}
LOOSE = set("allclose isclose assert_close approx assert_allclose".split())
LOOSE |= {"assert_almost_equal", "atol", "rtol"}
# No bounds of rounding; the last two are about chance.
NO_BOUNDS = {"is_tight", "requantizing_is_safe", "of_a_mean", "mean_absolute_error"}


def functions_of(path: Path) -> dict[str, ast.FunctionDef]:
    return {
        node.name: node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }


def names_in(node: ast.AST) -> set[str]:
    """Every name, attribute and keyword in a piece of code."""
    kinds = {ast.Name: "id", ast.Attribute: "attr", ast.keyword: "arg", ast.alias: "name"}
    named = (part for part in ast.walk(node) if type(part) in kinds)
    return {getattr(part, kinds[type(part)]) for part in named} - {None}


def has_share(node: ast.AST) -> bool:
    return any(isinstance(part, ast.Constant) and part.value == 0.99 for part in ast.walk(node))


TESTS = {
    name: node
    for path in sorted(HERE.rglob("test_*.py"))
    for name, node in functions_of(path).items()
}


@pytest.mark.parametrize("law", LAWS)
def test_every_law_has_its_test(law: str) -> None:
    assert LAWS[law] in TESTS


def test_every_bound_is_reached_or_is_part_of_one_that_is() -> None:
    bounds = {
        name: names_in(node) for name, node in functions_of(HERE / "helpers/bounds.py").items()
    }
    tight = [node for node in TESTS.values() if "is_tight" in names_in(node) or has_share(node)]
    reached = set().union(*map(names_in, tight))
    while parts := set().union(*(bounds[name] for name in reached & set(bounds))) - reached:
        reached |= parts
    assert set(bounds) - reached - NO_BOUNDS == set()


def tolerances_in(source: str) -> list[str | float]:
    """The comparisons with a tolerance of their own, and the fractions in comparisons of asserts.

    0.99 is the share of a bound that an error must reach, so it is no tolerance.
    """
    tree = ast.parse(source)
    found: list[str | float] = sorted(names_in(tree) & LOOSE)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            found += fractions_compared_in(node.test)
    return found


def fractions_compared_in(test: ast.expr) -> list[float]:
    """The fractions in <, <=, > and >= of an expression, except 0.99."""
    order = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
    found = []
    for node in ast.walk(test):
        if isinstance(node, ast.Compare) and any(isinstance(op, order) for op in node.ops):
            found += [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
    fractions = [value for value in found if isinstance(value, float) and not value.is_integer()]
    return [value for value in fractions if value != 0.99]


@pytest.mark.parametrize("path", sorted(HERE.rglob("*.py")), ids=lambda path: path.stem)
def test_no_tolerance_comes_from_anywhere_but_the_bounds(path: Path) -> None:
    found = tolerances_in(path.read_text())
    assert path.stem == "bounds" or not found, f"derive {found} in bounds.py"


def test_a_tolerance_is_found() -> None:
    assert tolerances_in("assert abs(x - y) < 1e-3 * z") == [0.001]
    assert tolerances_in("assert torch.allclose(x, y, atol=2)") == ["allclose", "atol"]
    assert tolerances_in("from pytest import approx") == ["approx"]
    assert tolerances_in("assert 0.99 <= ratio <= 1 and x == 0.5") == []


def test_a_bound_that_is_two_per_cent_too_wide_or_is_exceeded_is_not_tight() -> None:
    assert is_tight(torch.tensor([0.5, 0.995]), 1.0)
    assert not is_tight(0.98, 1.0)
    assert not is_tight(torch.tensor([0.995, 1.001]), torch.ones(2))
    assert not is_tight(math.nan, 1.0)


# one rounding


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_the_bound_of_a_cast_is_reached_by_normal_and_by_subnormal_numbers(
    dtype: torch.dtype,
) -> None:
    eps = torch.finfo(dtype).eps
    normal = torch.finfo(dtype).smallest_normal
    for value in (1 + eps / 2, normal * eps / 2):  # ties, both rounded down
        number = torch.tensor(value, dtype=torch.float64)
        assert is_tight(distance(number.to(dtype), number), cast(value, dtype))


def test_the_bound_of_a_float64_rounding_is_reached_by_normal_numbers() -> None:
    """No float64 is half a subnormal step, so `tiny` is the smallest float64 that is not less."""
    u = Fraction(1, 2**53)
    assert is_tight(float(1 + u - Fraction(float(1 + u))), cast(1.0, torch.float64))
    tie = Fraction(1, 2**1075)
    assert float(tie) == 0 and 2 * tie == Fraction(TINY[torch.float64])


@pytest.mark.parametrize(
    ("dtype", "n"), [(torch.float32, 1000), (torch.float16, 5), (torch.bfloat16, 1)]
)
def test_gamma_is_reached_by_a_sum_whose_every_rounding_goes_down(
    dtype: torch.dtype, n: int
) -> None:
    """Only a few terms in 16 bits, because the bound contains the squares of n u."""
    u = UNIT_ROUNDOFF[dtype]
    total = torch.ones((), dtype=dtype)
    for term in torch.full((n,), u, dtype=dtype):
        total += term  # 1 + u is a tie, and goes to 1
    assert is_tight(1 + n * u - total.item(), gamma(n, dtype) * (1 + n * u))


def test_the_rounding_of_the_float64_reference_is_reached() -> None:
    n = 1000
    total = 1.0
    for _ in range(n):
        total += 2.0**-53
    error = 1 + Fraction(n, 2**53) - Fraction(total)
    assert is_tight(float(error), in_float64(Bounded.exact(torch.tensor([total])), n).error)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_an_operand_is_off_by_its_cast_and_by_nothing_if_it_is_in_the_dtype_already(
    dtype: torch.dtype,
) -> None:
    tie = torch.tensor([1 + UNIT_ROUNDOFF[dtype]], dtype=torch.float64)
    assert is_tight(distance(tie.to(dtype), tie), operand(tie, dtype).error)
    assert operand(tie.to(dtype), dtype).error.item() == 0


# the nearest level and the way back

ABSMAX = 1 + torch.arange(8192, dtype=torch.float64) / 8192
SOURCES_AND_TARGETS = [(source, target) for source in DTYPES for target in DTYPES]
# In a coarse format absmax decodes exactly, and it is one of the two levels of NF4's widest gap.
COARSE = {(torch.bfloat16, torch.bfloat16), (torch.float16, torch.bfloat16)}
# For subnormal numbers: a quarter of absmax is half a step, which the product rounds to 0.
QUARTERS = torch.tensor([-1.0, -0.5, 0.0, 0.25, 0.75, 1.0])


def roundtrip_ratio(absmax: Tensor, target: torch.dtype, codebook: Tensor) -> float:
    """The largest share of the bound that numbers around the middle of the widest gap reach."""
    levels = codebook.double()
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[absmax.element_size()]
    gap = int((levels[1:] - levels[:-1]).argmax())
    middles = absmax.double() * (levels[gap] + levels[gap + 1]) / 2
    words = middles.to(absmax.dtype).view(integers)
    ratios = []
    for ulps in (-1, 0, 1):
        weight = torch.stack([absmax, (words + ulps).view(absmax.dtype)], 1)  # (blocks, 2)
        q = nf4.quantize(weight, 2, codebook)
        error = distance(nf4.dequantize(q, target), weight).amax(1)
        ratios.append((error / roundtrip(q.absmax, codebook, absmax.dtype, target)).max())
    return max(ratios).item()


@pytest.mark.parametrize(("source", "target"), SOURCES_AND_TARGETS)
def test_the_half_gap_is_reached_from_every_dtype_to_every_other(
    source: torch.dtype, target: torch.dtype
) -> None:
    codebook = nf4.normal_float(2) if (source, target) in COARSE else nf4.NF4
    assert is_tight(roundtrip_ratio(ABSMAX.to(source), target, codebook), 1)


@pytest.mark.parametrize(("source", "target"), SOURCES_AND_TARGETS)
def test_the_half_gap_is_reached_by_the_largest_numbers_that_both_dtypes_hold(
    source: torch.dtype, target: torch.dtype
) -> None:
    largest = min(torch.finfo(dtype).max for dtype in (source, target, torch.float32))
    absmax = (ABSMAX / 2 * largest).to(source)
    codebook = nf4.normal_float(2) if (source, target) in COARSE else nf4.NF4
    assert is_tight(roundtrip_ratio(absmax[absmax.double() <= largest], target, codebook), 1)


def test_no_bound_covers_numbers_beyond_the_largest_of_the_target() -> None:
    q = nf4.quantize(torch.tensor([65504.0, 65520.0]), 2)
    assert nf4.dequantize(q, torch.float16).tolist() == [math.inf, math.inf]


@pytest.mark.parametrize(("source", "target"), SOURCES_AND_TARGETS)
def test_the_half_gap_is_reached_with_both_roundings_of_subnormal_numbers(
    source: torch.dtype, target: torch.dtype
) -> None:
    """An absmax of two steps of the target, or of the source if its steps are wider.

    In the second case only the half gap counts.
    """
    step = 2 * max(TINY[dtype] for dtype in (target, torch.float32) if dtype != torch.float64)
    x = step
    if source == torch.float64 and step < 2.0**-140:
        x = 1.5 * step * ALMOST  # the cast to float32 loses another half step
    least = 2 * TINY[source] if source != torch.float64 else 0
    if least > step:
        steps = torch.arange(2, 512, dtype=torch.float64) * least
        assert is_tight(roundtrip_ratio(steps.to(source), target, nf4.normal_float(2)), 1)
    else:
        weight = torch.tensor([2 * step, x], dtype=torch.float64).to(source)
        q = nf4.quantize(weight, 2, QUARTERS)
        assert nf4.dequantize(q, target)[1] == 0
        assert is_tight(
            distance(nf4.dequantize(q, target), weight),
            roundtrip(q.absmax, QUARTERS, source, target),
        )


@pytest.mark.parametrize("exponent", [-120, 0, 126])
def test_the_decision_error_is_reached_and_a_number_farther_from_the_midpoint_gets_its_level(
    exponent: int,
) -> None:
    """All roundings add up for some numbers near a midpoint just below 1.

    Their absmax is a little below a power of two.
    """
    absmax = (2 - torch.arange(110_000, 118_000) * EPS) * 2.0**exponent
    codebook = torch.tensor([-1.0, 1 - 153 * U, 1.0])
    middle = codebook[1:].double().sum() / 2
    wrong = [0.0]
    for ulps in range(-4, 5):
        x = ((middle * absmax.double()).float().view(torch.int32) + ulps).view(torch.float32)
        low_nibbles = nf4.quantize(torch.stack([absmax, x], 1), 2, codebook).packed[:, 0] & 15
        beyond = x.double() / absmax.double() - middle
        wrong += beyond.abs()[(beyond > 0) != (low_nibbles == 2)].tolist()
    assert is_tight(max(wrong), decision_error())


@pytest.mark.parametrize(
    "codebook",
    [nf4.NF4, double_quant.DYNAMIC, QUARTERS, torch.tensor([-0.5, 0.75]), nf4.FP4.sort()[0]],
)
def test_the_half_gap_is_the_farthest_that_a_number_can_lie_from_all_levels(
    codebook: Tensor,
) -> None:
    levels = codebook.double()
    numbers = torch.cat([torch.tensor([-1.0, 1.0]), (levels[1:] + levels[:-1]) / 2])
    assert is_tight((numbers[:, None] - levels).abs().amin(1).max(), half_gap(codebook), share=1)


@pytest.mark.parametrize(
    ("dtype", "regime"),
    [
        *((dtype, "subnormal") for dtype in HALF_AND_SINGLE),
        (torch.float16, "coarse"),
        (torch.bfloat16, "coarse"),
    ],
)
def test_requantizing_is_called_safe_up_to_one_per_cent_before_it_goes_wrong(
    dtype: torch.dtype, regime: str
) -> None:
    """A level moves by half a step, or by u, towards the level below it.

    The distance to that level is about twice as large.
    """
    u = UNIT_ROUNDOFF[dtype]
    if regime == "subnormal":
        absmax = 4 * TINY[dtype]
        level = 0.25
        inside = 2 * TINY[dtype]
        moved = TINY[dtype] / absmax  # to 0: the product is half a step
    else:
        absmax = 2 - 2 * u
        level = (1 + u) / (2 - 2 * u)
        inside = 1 + 2 * u
        moved = u / absmax  # to 1: the product 1 + u is a tie
    for gap, safe in ((2.02 * moved, True), (1.98 * moved, False)):
        codebook = torch.tensor([-1, level - gap, level, 1], dtype=torch.float64).float()
        q = nf4.quantize(torch.tensor([absmax, inside], dtype=torch.float64).to(dtype), 2, codebook)
        again = nf4.quantize(nf4.dequantize(q), 2, codebook)
        assert q.packed.item() == 0x32
        assert requantizing_is_safe(q.absmax, codebook, dtype).item() == safe
        assert (again.packed.item() == 0x32) == safe


# the constants


@pytest.mark.parametrize(
    "constants",
    [
        [0.0, 2.0],  # minus their mean: -1, 1; the code has no -1
        [0.0, 2.0**127],
        [0.0, 144 * 2.0**-149],  # also, the product has an error of half a step
        [1.0, 1 + 144 * EPS],  # also, the sum with a mean far larger than the spread has one
    ],
    ids=["normal", "largest", "subnormal", "close together"],
)
def test_the_bound_of_double_quantization_is_reached(constants: list[float]) -> None:
    absmax = torch.tensor(constants)
    dq = double_quant.quantize(absmax)
    bound = double_quantized(absmax, dq.absmax.expand(2), double_quant.DYNAMIC)
    assert is_tight(distance(double_quant.dequantize(dq), absmax), bound)


@pytest.mark.parametrize("target", DTYPES)
def test_the_bound_of_both_quantizations_is_reached(target: torch.dtype) -> None:
    """The lower constant decodes too large, as the code has no -1.

    So does the farther level of the widest gap.
    """
    middle = math.nextafter((nf4.NF4[0].item() + nf4.NF4[1].item()) / 2, -1.0)
    errors, bound = [], []
    # For some of these constants the cast to 16 bits has its largest error.
    for lower in (1 + torch.arange(1, 200) / 8192).tolist():
        absmax = torch.tensor([2.0, lower])
        weight = torch.tensor([2.0, 0.0, lower, lower * middle])
        q, dq = nf4.quantize(weight, 2), double_quant.quantize(absmax)
        decoded = nf4.dequantize(replace(q, absmax=double_quant.dequantize(dq)), target)
        errors.append(distance(decoded, weight).reshape(2, 2).amax(1))
        nested = dq.absmax.expand(2)
        codebooks = nf4.NF4, double_quant.DYNAMIC
        bound.append(both_quantized(absmax, nested, *codebooks, torch.float32, target))
    assert is_tight(torch.stack(errors), torch.stack(bound))


# products and sums of inexact numbers


def test_a_product_with_an_inexact_number_has_the_errors_of_both_roundings() -> None:
    factor = 1 + 2.0**-12 + U  # a tie; the rounded product is another
    x = torch.tensor([1 + 2.0**-12])
    computed = x * torch.tensor(factor, dtype=torch.float64).float()
    exact = Bounded.exact(x).times(factor, torch.float32)
    assert is_tight(distance(computed, exact.value), exact.error)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_product_with_a_number_is_off_by_its_rounding_to_16_bits(dtype: torch.dtype) -> None:
    tie = 1 + UNIT_ROUNDOFF[dtype]
    bound = Bounded.exact(torch.ones(1)).times(tie, dtype)
    assert is_tight(distance(torch.tensor([tie]).to(dtype), bound.value), bound.error)


def test_an_error_grows_with_the_factor_and_adds_up_in_a_sum() -> None:
    off = Bounded(torch.tensor([[2.0]]).double(), torch.tensor([[0.25]]).double())
    assert is_tight(3 * 0.25, off.times(-3.0, torch.float64).error)
    assert is_tight(0.25 + 0.25, off.plus(off, torch.float64).error)
    assert is_tight(0.25 + 0.25, apart(off, off).error)
    assert is_tight(0.25, off.to(torch.float64).error) and torch.equal(off.T.error, off.error)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_the_bound_of_a_sum_is_reached_by_its_rounding(dtype: torch.dtype) -> None:
    one = torch.ones(1, dtype=dtype)
    u = torch.full((1,), UNIT_ROUNDOFF[dtype], dtype=dtype)
    bound = Bounded.exact(one).plus(Bounded.exact(u), dtype)
    assert is_tight(distance(one + u, bound.value), bound.error)


def test_the_bound_of_a_product_of_inexact_factors_is_reached() -> None:
    """The errors of the factors have the signs of their values; the product is not rounded."""
    make = torch.Generator().manual_seed(0)
    X, Y, E, D = (
        torch.randn(shape, generator=make, dtype=torch.float64).abs()
        for shape in ((3, 5), (5, 2), (3, 5), (5, 2))
    )
    bound = Bounded(X, E).matmul(Bounded(Y, D), torch.float64)
    error = distance((X + E) @ (Y + D), X @ Y)
    assert is_tight(error, bound.error)
    assert is_tight(error.min(), bound.error.flatten()[error.argmin()])


def down(dtype: torch.dtype) -> Tensor:
    """1, and then numbers that a sum from left to right loses.

    Many in float32, where the accumulator rounds; one in 16 bits, where only the result does.
    """
    count = 1000 if dtype == torch.float32 else 1
    return torch.tensor([1.0, *[UNIT_ROUNDOFF[dtype]] * count]).to(dtype)


def in_sequence(X: Tensor, Y: Tensor, dtype: torch.dtype) -> Tensor:
    """X Y as a program may compute it: a sum from left to right in float32, rounded to dtype."""
    total = torch.zeros(len(X), Y.shape[1])
    for k in range(len(Y)):
        total = total + X[:, k : k + 1].float() * Y[k : k + 1].float()
    return total.to(dtype)


def share(dtype: torch.dtype) -> float:
    """The share of the bound of several operations that an error can reach.

    The bound of each operation also covers the errors before it, and bfloat16's u is 0.4 %.
    """
    if dtype == torch.bfloat16:
        return (1 - UNIT_ROUNDOFF[dtype]) ** 5
    return 0.99


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_the_bound_of_a_matrix_product_is_reached_by_a_sum_in_sequence(dtype: torch.dtype) -> None:
    """In float32 every term is lost, in 16 bits the last rounding goes down."""
    x = down(dtype)[None]
    bound = Bounded.exact(torch.ones_like(x)).matmul(Bounded.exact(x.T), dtype)
    assert is_tight(distance(in_sequence(torch.ones_like(x), x.T, dtype), bound.value), bound.error)


def test_half_of_what_a_matrix_product_may_lose_below_the_normal_numbers_is_reached() -> None:
    """Each of n products has an error of half a step.

    The bound doubles it, where 1 + gamma as a factor would be enough.
    """
    x = torch.full((1, 100), 2.0**-75)
    y = torch.full((100, 1), 2.0**-75)
    bound = Bounded.exact(x).matmul(Bounded.exact(y), torch.float32)
    assert is_tight(distance(in_sequence(x, y, torch.float32), bound.value), bound.error / 2)


def test_a_bound_allows_no_nan_no_other_shape_and_nothing_beyond_it() -> None:
    bound = Bounded(torch.ones(2).double(), torch.tensor([0.0, 0.25]).double())
    assert bound.allows(torch.tensor([1.0, 1.25]))
    assert bound.allows(torch.tensor([2.0, 2.25]), reference=torch.full((2,), 2.0))
    assert not bound.allows(torch.tensor([1.0, 1.25 + EPS]))
    assert not bound.allows(torch.tensor([1.0 - EPS, 1.0]))
    assert not bound.allows(torch.tensor([1.0, math.nan]))
    assert not bound.allows(torch.ones(3, 2))


# whole layers: the programs that the bounds describe, where every rounding goes down


def times(tensor: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    return (tensor.float() * torch.tensor(factor, dtype=torch.float64).float()).to(dtype)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("way", ["base", "adapter"])
def test_the_bound_of_the_forward_pass_is_reached(way: str, dtype: torch.dtype) -> None:
    u = torch.tensor([[UNIT_ROUNDOFF[dtype]]]).to(dtype)
    loses = down(dtype)[None]
    x = torch.ones_like(loses)
    n = loses.numel()
    if way == "base":  # x W^T, and the bias, and what the adapter adds
        W = loses
        A = torch.eye(1, n).to(dtype)
        B = u
        bias = u[0]
        scaling = 1.0
    else:  # x A^T, h B^T, s times that, and what the base adds
        W = u * torch.eye(1, n).to(dtype)
        A = loses.expand(n, n)
        B = loses
        bias = None
        scaling = 1 + u.item()
    y = in_sequence(x, W.T, dtype) + (0 if bias is None else bias)
    y = y + times(in_sequence(in_sequence(x, A.T, dtype), B.T, dtype), scaling, dtype)
    assert y.item() == 1
    bound = lora_forward(x, W, A, B, bias, scaling, None, dtype)
    assert is_tight(distance(y, bound.value), bound.error, share(dtype))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("way", ["A", "B", "x through the adapter", "x through the base"])
def test_the_bounds_of_the_backward_pass_are_reached(way: str, dtype: torch.dtype) -> None:
    u = torch.tensor([[UNIT_ROUNDOFF[dtype]]]).to(dtype)
    loses = down(dtype)[:, None]
    scaling = 1 + UNIT_ROUNDOFF[dtype]
    n = len(loses)
    one = torch.ones(1, 1, dtype=dtype)
    ones = torch.ones(n, n, dtype=dtype)
    first = torch.eye(n, 1).to(dtype)
    g, x, W, A, B = {  # (tokens, out), (tokens, in), (out, in), (r, in), (out, r)
        "A": lambda: (ones, loses, 0 * first, one, loses),
        "B": lambda: (loses, ones, 0 * loses.T, loses.T, one),
        "x through the adapter": lambda: (ones[:1], one, u * first, loses, loses.expand(n, n)),
        "x through the base": lambda: (ones[:1], one, loses, u, first),
    }[way]()
    dh = times(in_sequence(g, B, dtype), scaling, dtype)
    dB = times(in_sequence(g.T, in_sequence(x, A.T, dtype), dtype), scaling, dtype)
    dA = in_sequence(dh.T, x, dtype)
    dx = in_sequence(dh, A, dtype) + in_sequence(g, W, dtype)
    of_x, of_A, of_B = lora_backward(g, x, W, A, B, scaling, None, dtype)
    computed, bound = {"A": (dA, of_A), "B": (dB, of_B)}.get(way, (dx, of_x))
    assert computed.eq(1).all()
    assert is_tight(distance(computed, bound.value), bound.error, share(dtype))


@pytest.mark.parametrize(
    ("kept_in", "dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
)
def test_the_bound_of_a_merged_layer_is_reached(kept_in: torch.dtype, dtype: torch.dtype) -> None:
    """By the sums of the update and of the base; with one dtype by the product too."""
    x = down(dtype)[None] if dtype == kept_in else torch.ones(1, 1)
    n = x.numel()
    loses = down(kept_in).float()[None] if kept_in == torch.float32 else torch.ones(1, 1)
    A = torch.ones(loses.numel(), n)
    W = torch.full((1, n), UNIT_ROUNDOFF[kept_in])
    bias = torch.full((1,), UNIT_ROUNDOFF[dtype])
    merged = (in_sequence(loses, A, torch.float32) + W).to(kept_in)
    y = in_sequence(x, merged.to(dtype).T, dtype) + bias.to(dtype)
    assert y.item() == 1
    bound = merged_forward(x, W, A, loses, bias, 1.0, kept_in, dtype)
    assert is_tight(distance(y, bound.value), bound.error, share(kept_in))


def test_the_bound_of_the_norm_of_dora_is_reached_by_the_product_with_the_base() -> None:
    """B makes the error of the product count most, and the norm rounds down by nearly u."""
    loses = torch.tensor([[1.0, *[U] * 2**14]])
    A = torch.ones_like(loses)
    B = torch.tensor([[0.0325781256]])
    w = loses.double().norm().float().double()
    crossed = in_sequence(loses, A.T, torch.float32).double()
    b = B.double()
    norm = (w**2 + b * (2 * crossed + b * A.numel())).sqrt().float()[0]
    bound = dora_norm(loses, A, B, 1.0)
    assert is_tight(distance(norm, bound.value), bound.error)


def test_the_bounds_of_dora_are_reached_by_a_norm_that_is_too_small() -> None:
    g, y = torch.ones(1, 1), torch.ones(1, 1)
    bias = torch.zeros(1)
    m = torch.ones(1)
    norm = torch.tensor([0.75])
    bound = Bounded(torch.ones(1).double(), torch.tensor([0.25]).double())
    c = dora_scale(m, bound)
    computed = m / norm
    of_y, of_m = dora_backward(g, Bounded.exact(y), c, bound, bias, torch.float32)
    forward = dora_forward(Bounded.exact(y), c, bias, torch.float32)
    pairs = [
        (computed, c),
        (y * computed + (1 - computed) * bias, forward),
        (g * computed, of_y),
        (y[0] / norm, of_m),
    ]
    assert all(is_tight(distance(value, each.value), each.error) for value, each in pairs)


# angles


def test_the_bound_of_a_cosine_is_reached() -> None:
    """The dot product loses its negative terms, and the sums of squares their positive ones."""
    n = 20_000
    root = math.sqrt(U) * (1 - 2.0**-11)
    p = torch.tensor([1 + 2.0**-11, *[root] * (n - 1)])
    q = torch.cat([p[:1], -p[1:]])
    dot, square = (
        in_sequence(a[None], b[:, None], torch.float32).double() for a, b in ((p, q), (p, p))
    )
    exact = (p.double() @ q.double()) / (p.double() @ p.double())
    assert is_tight(distance(dot / square, exact), cosine(n))


def test_the_least_cosine_is_reached_by_an_error_at_a_right_angle_to_the_sum() -> None:
    relative = 0.25
    angle = math.asin(relative)
    v = torch.tensor([1.0, 0.0], dtype=torch.float64)
    total = math.cos(angle) * torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    assert (total - v).norm().item() <= relative * (1 + gamma(2))
    assert is_tight(least_cosine(relative), (v @ total / total.norm()).item() * (1 + gamma(4)))


def test_an_error_as_large_as_the_vector_may_reverse_it() -> None:
    assert least_cosine(1.0) == -1 and least_cosine(0.0) == 1


def test_few_rows_of_bfloat16_reach_their_bound() -> None:
    """The weight is a tie and rounds down, and so does the sum. float32 adds little to that."""
    u = UNIT_ROUNDOFF[torch.bfloat16]
    x = torch.tensor([[1.0, u]], dtype=torch.bfloat16)
    weight = torch.full((1, 2), 1 + u)
    y = (x.float() @ weight.bfloat16().float().T).bfloat16()
    bound = few_rows(x, weight, None)
    assert is_tight(distance(y, bound.value), bound.error)
