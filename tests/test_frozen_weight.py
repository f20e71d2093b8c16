"""The laws of lora.FrozenWeight: its error, its bytes, and that no cast changes them."""

import copy
import dataclasses
import math
import weakref
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

import double_quant
import nf4
from helpers.bounds import Bounded, both_quantized, in_float64, is_tight, operand
from helpers.strategies import DTYPES, PATTERNS, Recipe, recipes, same_bits
from kernels.packed_weight import with_decoded_absmax
from lora import FrozenWeight, attach

CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": nn.Module.half,
    "bfloat16": nn.Module.bfloat16,
    "float": nn.Module.float,
    "double": nn.Module.double,
    "to(bfloat16)": lambda module: module.to(torch.bfloat16),
    "to(cpu, half)": lambda module: module.to("cpu", torch.float16),
    "type(half)": lambda module: module.type(torch.float16),
}
# Weights small enough that a decoded constant is finite in every dtype.
moderate = st.builds(
    Recipe,
    st.sampled_from([(), (0,), (7,), (40, 33), (3, 5, 7), (2, 4096)]),
    st.sampled_from(DTYPES),
    st.just("contiguous"),
    st.sampled_from([2, 64, 512]),
    st.sampled_from(PATTERNS[:-2]),
    st.integers(-14, 0),
)


def state_of(frozen: FrozenWeight) -> dict[str, Tensor]:
    """Copies of all buffers, the codebook included."""
    return {name: buffer.clone() for name, buffer in frozen.named_buffers()}


def bytes_held(frozen: FrozenWeight) -> int:
    """The bytes of all tensors of a weight, whether it counts them or not, without codebooks."""
    tensors = vars(frozen) | dict(frozen.named_buffers()) | dict(frozen.named_parameters())
    return sum(
        tensor.nbytes
        for name, tensor in tensors.items()
        if isinstance(tensor, Tensor) and not name.endswith("codebook")
    )


def is_in_state(frozen: FrozenWeight, state: dict[str, Tensor]) -> bool:
    now = state_of(frozen)
    return now.keys() == state.keys() and all(same_bits(now[name], state[name]) for name in state)


@given(recipes, st.sampled_from(DTYPES))
def test_without_double_quantization_it_is_nf4_and_nothing_else(
    recipe: Recipe, dtype: torch.dtype
) -> None:
    weight = recipe.tensor()
    expected = nf4.dequantize(nf4.quantize(weight, recipe.block_size), dtype)
    assert same_bits(FrozenWeight(weight, recipe.block_size, double_quant=False)(dtype), expected)


@given(recipes, st.sampled_from(DTYPES))
def test_equation_6_is_one_dequantization_inside_the_other(
    recipe: Recipe, dtype: torch.dtype
) -> None:
    weight = recipe.tensor()
    q = nf4.quantize(weight, recipe.block_size)
    largest = min(torch.finfo(recipe.dtype).max, torch.finfo(torch.float32).max)
    absmax = double_quant.dequantize(double_quant.quantize(q.absmax)).clamp(max=largest)
    expected = nf4.dequantize(dataclasses.replace(q, absmax=absmax), dtype)
    assert same_bits(FrozenWeight(weight, recipe.block_size)(dtype), expected)


@given(moderate)
def test_the_error_is_within_that_of_both_quantizations(recipe: Recipe) -> None:
    weight = recipe.tensor()
    frozen = FrozenWeight(weight, recipe.block_size)
    q = nf4.quantize(weight, recipe.block_size)
    nested = double_quant.quantize(q.absmax).absmax
    nested = nested.repeat_interleave(256)[: q.absmax.numel()]
    bound = both_quantized(
        q.absmax, nested, nf4.NF4, double_quant.DYNAMIC, recipe.dtype, recipe.dtype
    )
    error = (weight.double() - frozen().double()).abs().reshape(-1)
    assert (error <= bound.repeat_interleave(recipe.block_size)[: error.numel()]).all()


def test_the_error_of_both_quantizations_is_reached() -> None:
    """Without -1 in its code, the lower constant decodes too large, on the widest gap of NF4."""
    middle = (nf4.NF4[0].item() + nf4.NF4[1].item()) / 2
    weight = torch.tensor([2.0, 0.0, 1.96, 1.96 * math.nextafter(middle, -1.0)])
    frozen = FrozenWeight(weight, 2)
    absmax = nf4.quantize(weight, 2).absmax
    nested = frozen.nested_absmax.expand(2)
    codes = (nf4.NF4, double_quant.DYNAMIC)
    bound = both_quantized(absmax, nested, *codes, torch.float32, torch.float32)
    error = (weight.double() - frozen().double()).abs().reshape(2, 2).amax(1)
    assert is_tight(error, bound)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_finite_weight_is_decoded_to_finite_numbers_of_its_dtype(dtype: torch.dtype) -> None:
    """A constant may decode up to 0.7 % too large, and must not overflow in the largest weights."""
    weight = torch.zeros(12, dtype=dtype)
    weight[2::2] = torch.finfo(dtype).max  # the constants: 0 once, the largest number five times
    frozen = FrozenWeight(weight, 2)
    assert frozen().isfinite().all()
    assert nf4.dequantize(with_decoded_absmax(*frozen.packed_state())).isfinite().all()


@given(moderate.filter(lambda recipe: recipe.pattern in ("zero blocks", "zeros", "one-hot")))
@example(Recipe((4, 64), pattern="zero blocks"))
def test_blocks_of_zeros_stay_exactly_zero_under_double_quantization_too(recipe: Recipe) -> None:
    weight = recipe.tensor()
    decoded = FrozenWeight(weight, recipe.block_size)()
    zeros = decoded[weight == 0]
    assert same_bits(zeros, torch.zeros_like(zeros))


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_a_weight_costs_exactly_4_bits_and_its_constants_and_one_mean(blocks: int) -> None:
    frozen = FrozenWeight(torch.randn(64 * blocks, 256))
    n = 64 * blocks * 256
    assert 8 * frozen.nbytes == n * 4 + n * 8 // 64 + n * 32 // (64 * 256) + 32
    assert bytes_held(frozen) == frozen.nbytes
    without = FrozenWeight(torch.randn(64, 256), double_quant=False)
    assert 8 * without.nbytes == 64 * 256 * 4 + 64 * 256 * 32 // 64
    assert bytes_held(without) == without.nbytes
    saved = frozen.state_dict()
    assert saved.pop("_extra_state").nbytes < 256  # how it is decoded
    assert frozen.nbytes == sum(tensor.nbytes for tensor in saved.values())


@given(recipes, st.booleans())
def test_bytes_of_any_shape_are_those_of_the_formula(recipe: Recipe, double: bool) -> None:
    frozen = FrozenWeight(recipe.tensor(), recipe.block_size, double)
    n = frozen.shape.numel()
    n_blocks = -(-n // recipe.block_size)
    constants = n_blocks + 4 * -(-n_blocks // 256) + 4 if double else 4 * n_blocks
    assert frozen.nbytes == -(-n // 2) + constants


@pytest.mark.parametrize("name", CASTS)
@pytest.mark.parametrize("double", [True, False])
def test_no_cast_of_the_module_changes_a_byte_of_it(name: str, double: bool) -> None:
    model = nn.Sequential(FrozenWeight(torch.randn(33, 70), double_quant=double), nn.Linear(2, 2))
    before = state_of(model[0])
    decoded = model[0]()
    dtype = CASTS[name](model)[1].weight.dtype
    assert is_in_state(model[0], before) and same_bits(model[0](torch.float32), decoded)
    assert same_bits(model[0](), decoded.to(dtype)) and model[0].dtype == torch.float32
    assert model[0].codebook.dtype == nf4.NF4.dtype and same_bits(nf4.NF4, nf4.normal_float(4))


def test_a_move_to_another_device_keeps_every_dtype() -> None:
    frozen = FrozenWeight(torch.randn(8, 64))
    dtypes = {name: buffer.dtype for name, buffer in frozen.named_buffers()}
    frozen.to("meta", torch.float16)
    assert {name: buffer.dtype for name, buffer in frozen.named_buffers()} == dtypes
    on_meta = {name for name, buffer in frozen.named_buffers() if buffer.is_meta}
    assert on_meta == {"packed", "absmax", "nested_absmax", "nested_offset"}


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("from_meta", [True, False])
def test_an_emptied_weight_keeps_its_code_so_its_state_restores_it(
    double: bool, from_meta: bool
) -> None:
    frozen = FrozenWeight(torch.randn(8, 64), double_quant=double, codebook=nf4.FP4)
    before, decoded = copy.deepcopy(state_of(frozen)), frozen()
    saved = copy.deepcopy(frozen.state_dict())
    if from_meta:
        frozen.to("meta")
    frozen.to_empty(device="cpu")
    frozen.load_state_dict(saved)
    assert is_in_state(frozen, before) and same_bits(frozen(), decoded)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"codebook": nf4.FP4},
            "codebook must be 16 levels .*, as in this model, got 16 levels .* ",
        ),
        ({"dtype": torch.bfloat16}, "dtype must be torch.float32, .*, got torch.bfloat16 in the "),
        ({"shape": (64, 16)}, r"shape must be \[16, 64\], as in this model, got \[64, 16\] in "),
        ({"block_size": 65536}, "block_size must be 32768, as in this model, got 65536 in the "),
    ],
)
def test_a_state_that_is_decoded_in_another_way_is_refused(
    settings: dict, message: str, double: bool
) -> None:
    def make(
        shape: tuple[int, int] = (16, 64),
        dtype: torch.dtype = torch.float32,
        block_size: int = 32768,
        codebook: Tensor = nf4.NF4,
    ) -> FrozenWeight:
        return FrozenWeight(torch.ones(shape, dtype=dtype), block_size, double, codebook)

    with pytest.raises(ValueError, match=message):
        make().load_state_dict(make(**settings).state_dict())


def test_a_state_of_other_nested_levels_is_refused() -> None:
    q = nf4.quantize(torch.ones(2, 64))
    constants = double_quant.quantize(q.absmax)
    frozen = FrozenWeight.from_quantized(q, constants)
    other = FrozenWeight.from_quantized(
        q, dataclasses.replace(constants, codebook=-constants.codebook)
    )
    with pytest.raises(ValueError, match="nested_codebook must be 256 levels"):
        frozen.load_state_dict(other.state_dict())


@pytest.mark.parametrize("double", [True, False])
def test_constants_of_the_other_kind_are_refused_also_if_names_may_differ(double: bool) -> None:
    frozen, other = (
        FrozenWeight(torch.ones(2, 64), double_quant=kind) for kind in (double, not double)
    )
    with pytest.raises(ValueError, match="nested_block_size must be"):
        frozen.load_state_dict(other.state_dict(), strict=False)


def test_a_dense_base_is_cast_like_any_weight() -> None:
    frozen = FrozenWeight(torch.randn(2, 64), codebook=None).half()
    assert frozen.dtype == frozen.weight.dtype == frozen().dtype == torch.float16
    twin = FrozenWeight(torch.zeros(2, 64), codebook=None).half()
    twin.load_state_dict(frozen.state_dict())
    assert same_bits(twin(), frozen())


@given(recipes, st.booleans())
def test_a_deep_copy_has_the_same_bytes_and_shares_none(recipe: Recipe, double: bool) -> None:
    frozen = FrozenWeight(recipe.tensor(), recipe.block_size, double)
    twin = copy.deepcopy(frozen)
    assert is_in_state(twin, state_of(frozen)) and same_bits(twin(), frozen())
    before = state_of(frozen)
    twin.packed.fill_(0)
    twin.absmax.fill_(0)
    assert is_in_state(frozen, before)


@given(recipes, st.booleans())
def test_the_state_dict_round_trips_bit_for_bit(recipe: Recipe, double: bool) -> None:
    weight = recipe.tensor()
    frozen = FrozenWeight(weight, recipe.block_size, double)
    names = {"packed", "absmax", "_extra_state"}
    if double:
        names |= {"nested_absmax", "nested_offset"}
    assert frozen.state_dict().keys() == names  # the codebook is a constant of the format
    twin = FrozenWeight(torch.zeros_like(weight), recipe.block_size, double)
    twin.load_state_dict(copy.deepcopy(frozen.state_dict()))
    assert is_in_state(twin, state_of(frozen)) and same_bits(twin(), frozen())


def test_a_decoded_weight_is_not_kept() -> None:
    frozen = FrozenWeight(torch.ones(64, 64))
    decoded = frozen()
    reference = weakref.ref(decoded)
    del decoded
    assert reference() is None, "wanted no dense weight after its last use, got one in the module"


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_codebook_the_dense_tensor_itself_is_kept(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.randn(5, 7, dtype=dtype))
    frozen = FrozenWeight(weight, codebook=None)
    assert frozen().data_ptr() == weight.data_ptr() and same_bits(frozen(), weight)
    assert not frozen().requires_grad and list(frozen.parameters()) == []
    assert frozen.nbytes == weight.nbytes and list(frozen.state_dict())[:-1] == ["weight"]
    assert same_bits(frozen(torch.float64), weight.detach().double())
    assert frozen.half()(torch.float16).dtype == torch.float16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "settings", [{}, {"double_quant": False}, {"codebook": nf4.normal_float(8)}, {"codebook": None}]
)
@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_it_multiplies_as_the_dense_weight_does_within_the_bound_of_the_dtype(
    dtype: torch.dtype, settings: dict, tokens: int
) -> None:
    frozen = FrozenWeight(torch.randn(33, 70), **settings)
    for transposed, width in [(True, 70), (False, 33)]:
        x = torch.randn(tokens, width).to(dtype)
        weight = operand(frozen(torch.float32), dtype)
        y = frozen.matmul(x, transposed)
        bound = Bounded.exact(x).matmul(weight.T if transposed else weight, dtype)
        assert y.dtype == dtype and in_float64(bound, 2 * width).allows(y)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_any_code_can_be_frozen(bits: int) -> None:
    weight = torch.randn(9, 31)
    codebook = nf4.normal_float(bits)
    expected = nf4.dequantize(nf4.quantize(weight, 64, codebook))
    assert same_bits(FrozenWeight(weight, double_quant=False, codebook=codebook)(), expected)


def test_changing_the_decoded_weight_does_not_change_the_frozen_one() -> None:
    frozen = FrozenWeight(torch.randn(4, 64))
    before = state_of(frozen)
    decoded = frozen().clone()
    frozen().zero_()
    assert is_in_state(frozen, before) and same_bits(frozen(), decoded)


def test_a_weight_that_nf4_refuses_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1 of 4 .*index \(1, 0\)"):
        FrozenWeight(torch.tensor([[1.0, 2.0], [torch.nan, 3.0]]))
    with pytest.raises(ValueError, match="power of two"):
        FrozenWeight(torch.ones(4), block_size=63)


def test_it_prints_its_shape_and_its_bits_per_element() -> None:
    frozen = FrozenWeight(torch.randn(64, 256))
    assert str(frozen) == "FrozenWeight((64, 256), 4.129 bits an element)"
    assert "(0,)" in str(FrozenWeight(torch.zeros(0)))


def test_the_state_of_a_dense_model_is_refused_after_attach() -> None:
    dense = nn.Sequential(nn.Linear(64, 64, bias=False))
    state = dense.state_dict()
    adapted = attach(nn.Sequential(nn.Linear(64, 64, bias=False)), r=1)
    with pytest.raises(ValueError, match=r"dense weight \(64, 64\) .* before attach"):
        adapted.load_state_dict(state, strict=False)
