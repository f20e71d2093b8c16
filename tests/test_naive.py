"""The torch code against the oracle of naive.py.

Bit for bit where the format specifies each rounding, else within its bound.
"""

import ast
import math
import operator
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

import double_quant
import nf4
import paged_optim
from helpers import naive
from helpers.bounds import (
    Bounded,
    U,
    adamw,
    apart,
    cast,
    gamma,
    lora_backward,
    lora_forward,
    product,
    quotient,
    root,
)
from helpers.strategies import (
    BLOCK_SIZES,
    DTYPES,
    Adapted,
    Constants,
    Recipe,
    adapted,
    constants,
    peer_recipes,
    recipes,
    same_bits,
    seeds,
    uniform_code,
)
from lora import QLoRALinear
from paged_optim import PagedAdamW

# Coverage slows these tests down, and they reach no line that others do not.
pytestmark = pytest.mark.no_cover

SINGLE_AND_DOUBLE = [torch.float32, torch.float64]
DYNAMIC = double_quant.DYNAMIC.tolist()
float32s = st.floats(width=32, allow_nan=False)

# Levels in any order, some twice, of any size. Up to 16 there are two codes a byte, above one.
large = st.floats(-(2.0**127), 2.0**127, width=32)
level = st.one_of(st.sampled_from([-1.0, -0.0, 0.0, 1.0]), st.floats(-1, 1, width=32), large)
any_code = (
    st.lists(level, min_size=2, max_size=20)
    .filter(lambda levels: len(set(levels)) > 1)
    .map(torch.tensor)
)
known_codes = [nf4.NF4, nf4.FP4, uniform_code(), *(nf4.normal_float(bits) for bits in (2, 3, 5, 8))]
codebooks = st.one_of(st.sampled_from(known_codes), any_code)


def small(recipe: Recipe | Constants, most: int = 500) -> Recipe | Constants:
    """The same recipe with at most so many numbers, because the oracle is slow."""
    side = int(most ** (1 / max(len(recipe.shape), 1)))
    return replace(recipe, shape=tuple(size % (side + 1) for size in recipe.shape))


def numbers(tensor: Tensor) -> list[float]:
    """All numbers of a tensor, row by row."""
    return tensor.detach().double().flatten().tolist()


def matrix(tensor: Tensor) -> list[list[float]]:
    return tensor.detach().double().tolist()


def is_exactly(tensor: Tensor, wanted: list[float]) -> bool:
    """Whether every number is equal; 0 and -0 are not."""
    return same_bits(tensor.detach().double().flatten(), in_float64(wanted))


def in_float64(lists: list) -> Tensor:
    return torch.tensor(lists, dtype=torch.float64)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# the oracle itself


def test_the_oracle_imports_nothing_but_the_standard_library() -> None:
    imported = set()
    for node in ast.walk(ast.parse(Path(naive.__file__).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("." if node.level else node.module.partition(".")[0])
    assert imported and imported <= sys.stdlib_module_names


@given(
    float32s,
    float32s,
    st.sampled_from([operator.add, operator.sub, operator.mul, operator.truediv]),
)
@example(2.0**-126, 1 + 2.0**-23, operator.truediv)
@example(2.0**-100, 2.0**-49, operator.mul)
def test_an_operation_in_float64_that_is_then_rounded_is_that_of_float32(
    a: float, b: float, operation: Callable
) -> None:
    wanted = operation(torch.tensor(a), torch.tensor(b))
    if wanted.isfinite() and (b != 0 or operation != operator.truediv):
        assert is_exactly(wanted[None], [naive.float32(operation(a, b))])


@given(float32s, st.sampled_from(DTYPES))
@example(65520.0, torch.float16)
@example(1.00390625, torch.bfloat16)
@example(-3.4e38, torch.bfloat16)
def test_a_float32_is_rounded_to_each_dtype_as_torch_rounds_it(
    x: float, dtype: torch.dtype
) -> None:
    assert is_exactly(torch.tensor([x]).to(dtype), [naive.ROUND[name_of(dtype)](x)])


@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 2),
    st.randoms(use_true_random=False),
)
def test_the_gradients_of_the_oracle_are_the_differences_of_its_forward(
    tokens: int, inputs: int, outputs: int, r: int, random: object
) -> None:
    """The loss sum(g y) is linear in each argument, so its difference over a step of 1 is exact.

    The numbers are integers, so nothing is rounded.
    """

    def integers(rows: int, columns: int, low: int = -3, high: int = 3) -> list[list[float]]:
        return [[float(random.randint(low, high)) for _ in range(columns)] for _ in range(rows)]

    g = integers(tokens, outputs)
    keep = integers(tokens, inputs, low=0, high=1)
    weight = integers(outputs, inputs)
    x = integers(tokens, inputs)
    lora_A = integers(r, inputs)
    lora_B = integers(outputs, r)
    (bias,) = integers(1, outputs)

    def loss() -> float:
        y = naive.lora_forward(x, weight, lora_A, lora_B, bias, 3.0, keep)
        return sum(g[t][i] * y[t][i] for t in range(tokens) for i in range(outputs))

    def differences(row: list[float]) -> list[float]:
        slopes = []
        before = loss()
        for k in range(len(row)):
            row[k] += 1
            slopes.append(loss() - before)
            row[k] -= 1
        return slopes

    gradients = naive.lora_backward(g, x, weight, lora_A, lora_B, 3.0, keep)
    assert gradients == (
        *([differences(row) for row in each] for each in (x, lora_A, lora_B)),
        differences(bias),
    )


def test_without_eps_and_decay_the_first_step_of_the_oracle_is_lr_times_the_sign() -> None:
    grad = [3.0, -0.001, 2.0**40]
    moved = naive.adamw(
        [0.0] * 3,
        grad,
        [0.0] * 3,
        [0.0] * 3,
        1,
        lr=0.25,
        beta1=0.5,
        beta2=0.75,
        eps=0.0,
        weight_decay=0.0,
    )
    assert moved == ([-0.25, 0.25, -0.25], [g / 2 for g in grad], [g * g / 4 for g in grad])


# the levels


def test_the_nf4_and_fp4_levels_are_those_of_the_oracle_and_of_bitsandbytes() -> None:
    for ours, wanted, peer in [(nf4.NF4, naive.NF4, "nf4"), (nf4.FP4, naive.FP4, "fp4")]:
        assert is_exactly(ours, wanted)
        assert is_exactly(bnb.get_4bit_type(peer, device="cpu"), wanted)


@pytest.mark.parametrize("fused", [True, False])
def test_the_oracle_makes_the_published_nf4_levels_from_the_quantiles_of_a_normal(
    fused: bool,
) -> None:
    assert naive.normal_float(4, fused) == naive.NF4


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_levels_of_a_normal_float_are_those_of_the_oracle(bits: int) -> None:
    """With one of two roundings: on some CPUs torch.linspace fuses its product and sum."""
    assert any(
        is_exactly(nf4.normal_float(bits), naive.normal_float(bits, fused))
        for fused in (True, False)
    )


def test_the_levels_of_the_dynamic_code_are_those_of_the_oracle() -> None:
    assert any(
        is_exactly(double_quant.dynamic_code(), naive.dynamic_code(fused))
        for fused in (True, False)
    )


# quantization


@given(recipes.map(small), codebooks, st.sampled_from(DTYPES))
@example(Recipe((5000,), block_size=4096), nf4.NF4, torch.bfloat16)
@example(Recipe((70,), exponent=-149), nf4.NF4, torch.float32)
@example(Recipe((70,), exponent=127), nf4.FP4, torch.float16)
@example(Recipe((70,), pattern="largest"), nf4.NF4, torch.float64)
@example(Recipe((33,), block_size=8, pattern="ties"), uniform_code(), torch.float32)
@example(Recipe((9,), pattern="zeros", block_size=4), torch.tensor([-1.0, 0.5, 1.0]), torch.float32)
@example(Recipe((65,)), torch.tensor([0.0, 1.0, -0.0, -1.0, 1.0]), torch.float32)
def test_bytes_constants_and_decoded_values_are_those_of_the_oracle(
    recipe: Recipe, codebook: Tensor, wanted: torch.dtype
) -> None:
    weight = recipe.tensor()
    levels = codebook.tolist()
    q = nf4.quantize(weight, recipe.block_size, codebook)
    packed, absmax = naive.quantize(numbers(weight), recipe.block_size, levels)
    assert q.packed.flatten().tolist() == packed
    assert is_exactly(q.absmax, absmax)
    decoded = naive.dequantize(
        packed, absmax, levels, weight.numel(), recipe.block_size, name_of(wanted)
    )
    assert is_exactly(nf4.dequantize(q, wanted), decoded)


@given(st.floats(0, exclude_min=True, allow_infinity=False, width=32), codebooks)
@example(1.9999998807907104, nf4.NF4)
@example(2.5e38, nf4.NF4)  # 1 / absmax would be subnormal
@example(2.0**-130, nf4.FP4)
def test_numbers_within_two_ulps_of_an_edge_between_levels_go_where_the_oracle_sends_them(
    absmax: float, codebook: Tensor
) -> None:
    """An additional rounding shows only here; random numbers are seldom so close to an edge."""
    levels = codebook.sort().values
    edges = ((levels[1:] + levels[:-1]) / 2).clamp(-1, 1) * absmax
    words = edges.view(torch.int32)[:, None] + torch.arange(-2, 3)  # (edges, 5)
    near = words.int().view(torch.float32).flatten()
    weight = torch.cat([torch.tensor([absmax]), near[near.abs() <= absmax]])  # drops NaN too
    packed, constants = naive.quantize(numbers(weight), 2048, codebook.tolist())
    q = nf4.quantize(weight, 2048, codebook)
    assert q.packed.flatten().tolist() == packed and is_exactly(q.absmax, constants)


@given(constants.map(lambda recipe: small(recipe, 200)), st.sampled_from(BLOCK_SIZES))
@example(Constants((600,)), 256)
@example(Constants((40,), "largest"), 8)
@example(Constants((40,), exponent=-149), 8)
@example(Constants((40,), "all sizes", exponent=128), 2)
def test_double_quantization_is_that_of_the_oracle_about_a_mean_within_rounding_of_its_mean(
    recipe: Constants, block_size: int
) -> None:
    absmax = recipe.tensor()
    dq = double_quant.quantize(absmax, block_size)
    offset = dq.offset.item()
    mean = naive.mean(numbers(absmax))
    rounding = gamma(absmax.numel()) * mean + cast(mean, torch.float32)
    assert abs(offset - mean) <= rounding  # n - 1 additions, one division
    codes, nested_absmax = naive.double_quantize(numbers(absmax), offset, block_size, DYNAMIC)
    assert dq.codes.flatten().tolist() == codes
    assert is_exactly(dq.absmax, nested_absmax)
    decoded = naive.double_dequantize(codes, nested_absmax, offset, block_size, DYNAMIC)
    assert is_exactly(double_quant.dequantize(dq), decoded)


@given(peer_recipes, st.sampled_from([64, 128, 256]), st.integers(1, 3))
@example(Recipe(pattern="outliers"), 64, 3)
def test_fp4_of_bitsandbytes_is_that_of_the_oracle(
    recipe: Recipe, block_size: int, rows: int
) -> None:
    """In whole blocks; code 8 is minus zero, and is compared as 0."""
    weight = replace(recipe, shape=(rows, block_size), block_size=block_size).tensor()
    packed, state = bnb.quantize_4bit(weight, blocksize=block_size, quant_type="fp4")
    wanted, absmax = naive.quantize(numbers(weight), block_size, naive.FP4)
    codes = naive.unpack(packed.flatten().tolist(), weight.numel(), naive.FP4)
    wanted_codes = naive.unpack(wanted, weight.numel(), naive.FP4)
    assert [0 if code == 8 else code for code in codes] == wanted_codes
    assert is_exactly(state.absmax, absmax)
    decoded = naive.dequantize(
        wanted, absmax, naive.FP4, weight.numel(), block_size, name_of(weight.dtype)
    )
    with torch.compiler.set_stance("force_eager"):  # compiling its paths takes seconds
        assert bnb.dequantize_4bit(packed, state).double().flatten().tolist() == decoded


# low-rank adapters


def small_layer(case: Adapted) -> Adapted:
    return replace(
        case,
        in_features=4 + case.in_features % 20,
        out_features=4 + case.out_features % 12,
        leading=tuple(size % 4 for size in case.leading),
    )


def weight_of_the_oracle(weight: Tensor, block_size: int, double: bool) -> Tensor:
    """Quantized and back, float64."""
    packed, absmax = naive.quantize(numbers(weight), block_size, naive.NF4)
    if double:
        offset = double_quant.quantize(torch.tensor(absmax)).offset.item()
        codes, nested_absmax = naive.double_quantize(absmax, offset, 256, DYNAMIC)
        absmax = naive.double_dequantize(codes, nested_absmax, offset, 256, DYNAMIC)
    decoded = naive.dequantize(packed, absmax, naive.NF4, weight.numel(), block_size, "float64")
    return in_float64(decoded).reshape(weight.shape)


@given(adapted.map(small_layer), st.sampled_from(SINGLE_AND_DOUBLE), st.sampled_from([16, 64]))
@example(Adapted(lora_dropout=0.3, bias=False), torch.float64, 16)
@example(Adapted(leading=(0,)), torch.float32, 64)
def test_the_output_and_the_gradients_of_a_layer_are_within_rounding_of_the_oracle(
    case: Adapted, dtype: torch.dtype, block_size: int
) -> None:
    linear = case.linear(dtype)
    layer = case.trained(QLoRALinear.from_linear(linear, **case.settings(), block_size=block_size))
    weight = weight_of_the_oracle(linear.weight, block_size, case.double_quant)
    assert is_exactly(layer.base(dtype), numbers(weight))

    x = case.x(dtype).requires_grad_()
    g = case.g(dtype)
    masks = []

    def pack(tensor: Tensor) -> Tensor:
        masks.extend([tensor] if tensor.dtype == torch.bool else [])
        return tensor

    if case.bias:
        layer.bias.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    y.backward(g)

    flat = x.detach().reshape(-1, case.in_features)
    g = g.reshape(-1, case.out_features)
    keep = masks[0] if case.lora_dropout else None
    mask = matrix(torch.ones_like(flat) if keep is None else keep)
    bias = numbers(layer.bias) if case.bias else [0.0] * case.out_features
    scaling = case.lora_alpha / case.r / (1 - case.lora_dropout)
    operands = flat, weight.to(dtype), layer.lora_A, layer.lora_B
    as_lists = *(matrix(each) for each in operands), scaling, mask

    def within(got: Tensor, wanted: list, *bounds: Bounded) -> bool:
        bound = apart(*bounds)
        assert bound.error.isfinite().all()
        shape = bound.value.shape
        return bound.allows(got.reshape(shape), in_float64(wanted).reshape(shape))

    both = dtype, torch.float64  # the layer's arithmetic, the oracle's
    forwards = [lora_forward(*operands, layer.bias, scaling, keep, each) for each in both]
    assert within(y, naive.lora_forward(*as_lists[:4], bias, *as_lists[4:]), *forwards)
    wanted = naive.lora_backward(matrix(g), *as_lists)
    backwards = zip(*(lora_backward(g, *operands, scaling, keep, each) for each in both))
    for got, exact, bounds in zip(
        (x.grad, layer.lora_A.grad, layer.lora_B.grad), wanted, backwards
    ):
        assert within(got, exact, *bounds)
    if case.bias:
        ones = Bounded.exact(torch.ones(1, len(g)))
        incoming = Bounded.exact(g)
        assert within(layer.bias.grad, wanted[3], *(ones.matmul(incoming, each) for each in both))


# AdamW


beta = st.one_of(st.sampled_from([0.0, 0.5, 0.9, 0.999]), st.floats(1e-6, 0.9999))
hyperparameters = st.fixed_dictionaries(
    {
        "lr": st.one_of(st.sampled_from([0.0, 1e-3, 1.0]), st.floats(1e-6, 1)),
        "betas": st.tuples(beta, beta),
        "eps": st.sampled_from([0.0, 1e-8, 1e-3]),
        "weight_decay": st.one_of(st.sampled_from([0.0, 0.01, 1.5]), st.floats(1e-6, 2)),
    }
)
DEFAULTS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def verdicts(
    hyper: dict, dtype: torch.dtype, steps: int, scale: float, seed: int
) -> dict[str, bool]:
    """Whether a run of PagedAdamW leaves the parameters and the moments within their bounds."""
    make = torch.Generator().manual_seed(seed)
    start = torch.randn(5, generator=make).to(dtype)
    param = nn.Parameter(start.clone())
    optimizer = PagedAdamW(
        [param], page_bytes=4 * dtype.itemsize, resident_bytes=8 * dtype.itemsize, **hyper
    )
    zeros = torch.zeros(5, dtype=dtype)
    beta1, beta2 = hyper["betas"]
    rest = {"lr": hyper["lr"], "beta1": beta1, "beta2": beta2}
    rest |= {"eps": hyper["eps"], "weight_decay": hyper["weight_decay"]}
    oracle = numbers(start), numbers(zeros), numbers(zeros)
    bounds = {
        each: tuple(Bounded.exact(tensor) for tensor in (start, zeros, zeros))
        for each in (dtype, torch.float64)
    }
    for step in range(1, steps + 1):
        grad = (torch.randn(5, generator=make) * scale).to(dtype)
        if hyper["eps"]:
            grad[step % 5] = 0.0  # with eps = 0 the first would be 0 / 0
        param.grad = grad
        optimizer.step()
        oracle = naive.adamw(oracle[0], numbers(grad), *oracle[1:], step, **rest)
        bounds = {
            each: adamw(*bound, grad, step, **hyper, dtype=each) for each, bound in bounds.items()
        }
    slot = optimizer.state_dict()["state"][0]
    results = {"param": param, "exp_avg": slot["exp_avg"], "exp_avg_sq": slot["exp_avg_sq"]}
    allowed = [apart(*pair) for pair in zip(bounds[dtype], bounds[torch.float64])]
    assert all(bound.error.isfinite().all() for bound in allowed)
    return {
        name: bound.allows(got, in_float64(wanted))
        for (name, got), wanted, bound in zip(results.items(), oracle, allowed)
    }


@given(
    hyperparameters,
    st.sampled_from(SINGLE_AND_DOUBLE),
    st.integers(1, 20),
    st.sampled_from([1e-30, 1e-3, 1.0, 1e4]),
    seeds,
)
def test_paged_adamw_is_within_rounding_of_the_oracle(
    hyper: dict, dtype: torch.dtype, steps: int, scale: float, seed: int
) -> None:
    if hyper["eps"] == 0:
        scale = 1.0  # in float32 the square of 1e-30 is 0, and so is the denominator
    assert all(verdicts(hyper, dtype, steps, scale, seed).values())


adamw_ = paged_optim.adamw_


def eps_before_bias_correction(
    param: Tensor, grad: Tensor, moments: Tensor, step: int, group: dict
) -> None:
    eps = group["eps"] / math.sqrt(1 - group["betas"][1] ** step)
    adamw_(param, grad, moments, step, group | {"eps": eps})


def decay_without_lr(param: Tensor, grad: Tensor, moments: Tensor, step: int, group: dict) -> None:
    weight_decay = group["weight_decay"] / group["lr"]
    adamw_(param, grad, moments, step, group | {"weight_decay": weight_decay})


def decay_through_the_gradient(
    param: Tensor, grad: Tensor, moments: Tensor, step: int, group: dict
) -> None:
    decayed = grad + group["weight_decay"] * param
    adamw_(param, decayed, moments, step, group | {"weight_decay": 0.0})


def decay_after_the_update(
    param: Tensor, grad: Tensor, moments: Tensor, step: int, group: dict
) -> None:
    adamw_(param, grad, moments, step, group | {"weight_decay": 0.0})
    param.mul_(1 - group["lr"] * group["weight_decay"])


def bias_correction_a_step_late(
    param: Tensor, grad: Tensor, moments: Tensor, step: int, group: dict
) -> None:
    if step == 1:
        moments.zero_()
    adamw_(param, grad, moments, step + 1, group)


def moments_kept_in_bfloat16(
    param: Tensor, grad: Tensor, moments: Tensor, step: int, group: dict
) -> None:
    adamw_(param, grad, moments, step, group)
    moments.copy_(moments.bfloat16())


def betas_in_float16(param: Tensor, grad: Tensor, moments: Tensor, step: int, group: dict) -> None:
    betas = torch.tensor(group["betas"]).half().tolist()
    adamw_(param, grad, moments, step, group | {"betas": betas})


MUTANTS = [
    eps_before_bias_correction,
    decay_without_lr,
    decay_through_the_gradient,
    decay_after_the_update,
    bias_correction_a_step_late,
    moments_kept_in_bfloat16,
    betas_in_float16,
]


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("dtype", SINGLE_AND_DOUBLE)
def test_a_mutant_of_adamw_leaves_the_bound(
    mutant: Callable[..., None], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    hyper = {**DEFAULTS, "eps": 1e-3}
    monkeypatch.setenv("QLORA_KERNELS", "reference")
    assert all(verdicts(hyper, dtype, 20, 1.0, 0).values())
    monkeypatch.setattr(paged_optim, "adamw_", mutant)
    assert not all(verdicts(hyper, dtype, 20, 1.0, 0).values())


# the bounds


def test_the_bounds_of_a_product_a_quotient_and_a_root_are_reached() -> None:
    one, eighth, zero = (in_float64([x]) for x in (1.0, 0.125, 0.0))
    wrong = Bounded(one, eighth)
    both = torch.float64
    more = one + eighth
    less = one - eighth
    for bound, worst in [
        (product(wrong, wrong, both), more * more),
        (quotient(wrong, wrong, both), more / less),
        (root(wrong, both), less.sqrt()),
        (root(Bounded(zero, eighth), both), eighth.sqrt()),
    ]:
        assert 0.99 <= ((worst - bound.value).abs() / bound.error).item() <= 1


def test_the_bound_of_a_decayed_parameter_is_reached_where_three_roundings_go_down() -> None:
    """The decay is a little above 1/2 and half a step away from a float32.

    So are the product of p and the decay, and the sum.
    """
    change = 0.998 * U
    decay = 0.5 + 1001.499 * U
    hyper = {"lr": change, "betas": (0.0, 0.0), "eps": 0.0, "weight_decay": (1 - decay) / change}
    param = 2 + torch.arange(8000) * 2.0**-22
    grad = torch.full((8000,), -1.0)
    zeros = torch.zeros(8000)
    start = [numbers(each) for each in (param, grad, zeros, zeros)]
    wanted = naive.adamw(*start, 1, change, 0, 0, 0, hyper["weight_decay"])
    state = [Bounded.exact(each) for each in (param, zeros, zeros)]
    bound = adamw(*state, grad, 1, **hyper, dtype=torch.float32)[0]
    adamw_(param, grad, torch.zeros(2, 8000), 1, hyper)
    assert 0.99 <= ((param - in_float64(wanted[0])).abs() / bound.error).max() <= 1


def test_the_bound_of_the_first_moment_is_reached_where_four_roundings_go_down() -> None:
    """1 - beta1 is a little above 1/128 and half a step away from a float32.

    So are g - m, the product and the sum. lerp_ fuses the last two on most CPUs and rounds only
    three times, so the formula is written out here.
    """
    weight = 2.0**-7 * (1 + 2002.998 * U)
    zeros = torch.zeros(8000)
    grad = 1 + torch.arange(8000) * 2.0**-23
    exp_avg = torch.full((8000,), -(U - 2.0**-31 + 2.0**-40))
    state = (Bounded.exact(each) for each in (zeros, exp_avg, zeros))
    bound = adamw(*state, grad, 2, 0.0, (1 - weight, 0.9), 1.0, 0.0, torch.float32)[1]
    got = exp_avg + (grad - exp_avg) * weight
    wanted = exp_avg.double() + (grad.double() - exp_avg.double()) * weight
    assert 0.99 <= ((got - wanted).abs() / bound.error).max() <= 1
