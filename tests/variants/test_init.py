"""PiSSA and LoftQ start as in PEFT, and nearer to W than quantization."""

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.utils.loftq_utils import _low_rank_decomposition
from torch import Tensor, nn

import double_quant
import nf4
from helpers.bounds import Bounded, both_quantized, cast, gamma, lora_forward
from helpers.strategies import same_bits
from lora import FrozenWeight, QLoRALinear
from variants import init

SHAPES = [(48, 64), (64, 48), (30, 70), (64, 64)]


def weight_of(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """A model of trained weights: noise, and a few directions with large singular values."""
    generator = torch.Generator().manual_seed(seed)
    thin = [torch.randn(size, 3, generator=generator) for size in shape]
    return 0.02 * torch.randn(shape, generator=generator) + 0.01 * thin[0] @ thin[1].T


def started(
    start: str,
    weight: Tensor,
    r: int = 4,
    lora_alpha: float = 16,
    use_rslora: bool = False,
    **quantization: object,
) -> QLoRALinear:
    adapter = {"r": r, "lora_alpha": lora_alpha, "use_rslora": use_rslora}
    return init.maker(start, adapter, quantization)(weight, None)


def error(layer: QLoRALinear, weight: Tensor) -> float:
    """|W - Q - s B A|, the Frobenius norm, in float64."""
    update = layer.scaling * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    return (weight.double() - layer.base(torch.float64) - update).norm().item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_pissa_has_the_adapter_of_peft_and_quantizes_what_peft_leaves(
    shape: tuple[int, int], use_rslora: bool
) -> None:
    weight = weight_of(shape)
    model = nn.Sequential(nn.Linear(*shape[::-1], bias=False))
    model[0].weight.data = weight.clone()
    config = LoraConfig(
        r=4, lora_alpha=6, init_lora_weights="pissa", target_modules=["0"], use_rslora=use_rslora
    )
    theirs = get_peft_model(model, config).base_model.model[0]
    ours = started("pissa", weight, lora_alpha=6, use_rslora=use_rslora)
    assert same_bits(ours.lora_A, theirs.lora_A["default"].weight)
    assert same_bits(ours.lora_B, theirs.lora_B["default"].weight)
    left = FrozenWeight(theirs.base_layer.weight)
    assert torch.equal(ours.base.packed, left.packed) and torch.equal(ours.base.absmax, left.absmax)


@pytest.mark.parametrize("shape", SHAPES)
def test_loftq_has_the_adapter_and_the_codes_of_peft_and_bitsandbytes_where_alpha_is_r(
    shape: tuple[int, int],
) -> None:
    weight = weight_of(shape)
    ours = started("loftq", weight, lora_alpha=4, double_quant=False)
    remainder = weight
    for _ in range(init.LOFTQ_STEPS):  # what PEFT does on a GPU
        packed, state = bnb.quantize_4bit(remainder, quant_type="nf4", compress_statistics=False)
        decoded = nf4.dequantize(
            nf4.Quantized(packed, state.absmax, nf4.NF4, weight.shape, torch.float32, 64)
        )
        parts = _low_rank_decomposition(weight - decoded, reduced_rank=4)
        remainder = weight - parts["L"] @ parts["R"]
    assert torch.equal(ours.base.packed, packed) and same_bits(ours.base.absmax, state.absmax)
    assert same_bits(ours.lora_A, parts["R"]) and same_bits(ours.lora_B, parts["L"])


@given(
    st.sampled_from(SHAPES),
    st.integers(0, 50),
    st.sampled_from([1, 4, 12]),
    st.sampled_from([1.0, 16.0]),
)
def test_both_start_nearer_to_the_weight_than_quantization_does_for_any_scaling(
    shape: tuple[int, int], seed: int, r: int, lora_alpha: float
) -> None:
    weight = weight_of(shape, seed)
    plain = error(started("default", weight), weight)
    loftq = error(started("loftq", weight, r, lora_alpha), weight)
    pissa = error(started("pissa", weight, r, lora_alpha), weight)
    assert loftq < plain
    if r >= 4:  # enough for the large directions, so there is less to round
        assert pissa < plain


@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_of_loftq_falls_with_its_steps_and_is_what_rank_r_must_leave(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = weight_of(shape)
    errors = []
    for steps in (1, 2, 5):
        monkeypatch.setattr(init, "LOFTQ_STEPS", steps)
        layer = started("loftq", weight)
        errors.append(error(layer, weight))
        left = torch.linalg.svdvals(weight.double() - layer.base(torch.float64))[4:].norm().item()
        # Rounding of the SVD, the roots and the product.
        rounding = gamma(4 * max(shape)) * (weight.norm() + layer.update().norm()).item()
        assert left * (1 - gamma(4, torch.float64)) <= errors[-1] <= left + rounding
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_first_output_with_pissa_is_off_by_no_more_than_the_rounding_of_what_is_left(
    shape: tuple[int, int],
) -> None:
    weight = weight_of(shape)
    x = torch.randn(5, shape[1], generator=torch.Generator().manual_seed(1))
    layer = started("pissa", weight)
    A, B = (Bounded.exact(each) for each in (layer.lora_A, layer.lora_B))
    update = B.times(layer.scaling, torch.float32).matmul(A, torch.float32)
    remainder = Bounded.exact(weight).plus(Bounded(-update.value, update.error), torch.float32)
    _, constants = layer.base.packed_state()
    blocks = nf4.quantize(remainder.value.float()).absmax * (1 + gamma(1)) + remainder.error.max()
    nested = constants.absmax.repeat_interleave(constants.block_size)[: blocks.numel()]
    codes = nf4.NF4, double_quant.DYNAMIC
    bound = both_quantized(blocks, nested, *codes, torch.float32, torch.float32)
    per_weight = bound.repeat_interleave(64)[: weight.numel()].reshape(shape) + remainder.error
    forward = lora_forward(
        x, layer.base(), layer.lora_A, layer.lora_B, None, layer.scaling, None, torch.float32
    )
    wanted = x.double() @ weight.double().T
    allowed = forward.error + x.double().abs() @ per_weight.T + cast(wanted.abs(), torch.float64)
    assert ((layer(x).double() - wanted).abs() <= allowed).all()


@pytest.mark.parametrize("start", ["pissa", "loftq"])
def test_a_rank_beyond_that_of_the_weight_adds_nothing(start: str) -> None:
    weight = weight_of((8, 64))
    layer = started(start, weight, r=12)
    assert layer.lora_A.shape == (12, 64) and layer.lora_A.requires_grad
    assert not layer.lora_A[8:].any() and not layer.lora_B[:, 8:].any()
    assert error(layer, weight) <= error(started("default", weight), weight)
