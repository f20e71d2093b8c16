"""The laws of lora.py: the hand-derived backward pass and what it saves, attach, and merge."""

import copy
import dataclasses
import gc
import math
import re
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import double_quant
import lora
import nf4
from helpers.bounds import (
    Bounded,
    both_quantized,
    cast,
    cosine,
    gamma,
    is_tight,
    least_cosine,
    lora_backward,
    lora_forward,
    merged_forward,
    of_a_mean,
)
from helpers.strategies import Adapted, Tower, TowerWithHead, adapted, same_bits
from lora import FrozenWeight, QLoRALinear
from memory.live import Live

# dtype of x, dtype of autocast or None, compute_dtype
MODES = [
    (torch.float32, None, None),
    (torch.bfloat16, None, None),
    (torch.float16, None, None),
    (torch.float32, torch.bfloat16, None),
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.float32, None, torch.bfloat16),
    (torch.bfloat16, None, torch.float32),
]
TINY = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LINEARS = [f"blocks.{i}.{name}" for i in range(3) for name in ("down", "up")]


def adapt(case: Adapted, dtype: torch.dtype = torch.float32, **settings: object) -> QLoRALinear:
    return case.trained(QLoRALinear.from_linear(case.linear(dtype), **case.settings() | settings))


def saved_by(run: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """What a forward pass returns, and all tensors that autograd saves for it."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return run(), kept


def decoded(weight: Tensor, double: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
    """W', the weight in 4 bits and back, by the functions of the files before lora.py."""
    q = nf4.quantize(weight)
    if double:
        absmax = double_quant.dequantize(double_quant.quantize(q.absmax))
        q = dataclasses.replace(q, absmax=absmax)
    return nf4.dequantize(q, dtype)


def plain_lora(
    case: Adapted, x: Tensor, lora_A: Tensor, lora_B: Tensor, keep: Tensor | None
) -> Tensor:
    """The textbook formula in float64 on the dequantized weight, differentiated by autograd."""
    linear = case.linear()
    bias = None if linear.bias is None else linear.bias.detach().double()
    dropped = x if keep is None else x * keep / (1 - case.lora_dropout)
    update = dropped @ lora_A.T @ lora_B.T * (case.lora_alpha / case.r)
    return F.linear(x, decoded(linear.weight, case.double_quant).double(), bias) + update


# the layer


@given(adapted, st.sampled_from(MODES))
@example(Adapted(leading=(0,), lora_dropout=0.3), MODES[0])
@example(Adapted(leading=(), lora_dropout=0.3), MODES[3])
@example(Adapted(leading=(2, 0, 3)), MODES[1])
def test_output_and_gradients_are_those_of_a_plain_autograd_lora(
    case: Adapted, mode: tuple
) -> None:
    x_dtype, autocast, compute_dtype = mode
    result = autocast or x_dtype
    dtype = compute_dtype or result
    layer = adapt(case, compute_dtype=compute_dtype)
    x = case.x(x_dtype).requires_grad_()
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        y, kept = saved_by(lambda: layer(x))
    masks = [tensor for tensor in kept if tensor.dtype == torch.bool]
    assert len(masks) == (1 if case.lora_dropout else 0)
    keep = masks[0] if masks else None
    assert (y.dtype, y.shape) == (result, (*case.leading, case.out_features))
    g = case.g(result)
    y.backward(g)

    flat = x.detach().reshape(-1, case.in_features)
    g_flat = g.reshape(-1, case.out_features)
    inputs = flat, layer.lora_A, layer.lora_B
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    plain = plain_lora(case, *exact, keep)
    gradients = torch.autograd.grad(plain, exact, g_flat.double())

    linear = case.linear()
    operands = flat, decoded(linear.weight, case.double_quant), layer.lora_A, layer.lora_B
    scaling = case.lora_alpha / case.r / (1 - case.lora_dropout)
    forward = lora_forward(*operands, linear.bias, scaling, keep, dtype)
    forward = forward if result == dtype else forward.to(result)
    assert forward.allows(y.reshape(-1, case.out_features), plain)
    of_x, of_A, of_B = lora_backward(g_flat, *operands, scaling, keep, dtype)
    of_x = of_x if x_dtype == dtype else of_x.to(x_dtype)
    assert of_x.allows(x.grad.reshape(-1, case.in_features), gradients[0])
    assert of_A.allows(layer.lora_A.grad, gradients[1])
    assert of_B.allows(layer.lora_B.grad, gradients[2])
    assert x.grad.dtype == x_dtype
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32


@pytest.mark.parametrize("leading", [(), (0,), (4,), (2, 3), (2, 1, 2)])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
def test_the_backward_passes_gradcheck_in_float64(
    leading: tuple[int, ...], dropout: float, bias: bool
) -> None:
    layer = adapt(Adapted(6, 5, 2, leading=leading, lora_dropout=dropout, bias=bias), torch.float64)
    x = Adapted(6, 5, leading=leading).x(torch.float64).requires_grad_()
    inputs = [x, layer.lora_A, layer.lora_B]
    inputs += [layer.bias.requires_grad_()] if bias else []
    assert layer.lora_A.dtype == torch.float64

    def seeded(*_: Tensor) -> Tensor:
        torch.manual_seed(5)  # one mask for all evaluations
        return layer(x)

    if math.prod(leading):
        assert torch.autograd.gradcheck(seeded, inputs, raise_exception=False)
    else:  # gradcheck has nothing to vary: the gradients are empty, or zero
        seeded().sum().backward()
        assert x.grad.shape == (*leading, 6)
        assert not layer.lora_A.grad.any()
        assert not layer.lora_B.grad.any()


def test_a_trainable_bias_gets_the_sum_of_the_gradients_in_its_own_dtype() -> None:
    case = Adapted()
    layer = adapt(case)
    layer.bias.requires_grad_()
    x = case.x(torch.bfloat16)
    g = case.g(torch.bfloat16)
    layer(x).backward(g)
    bound = Bounded.exact(torch.ones(1, len(g))).matmul(Bounded.exact(g), torch.bfloat16)
    assert layer.bias.grad.dtype == torch.float32 and bound.allows(layer.bias.grad[None])


def test_a_second_derivative_is_refused() -> None:
    case = Adapted()
    x = case.x().requires_grad_()
    (first,) = torch.autograd.grad(adapt(case)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@given(adapted, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.booleans())
@example(Adapted(lora_dropout=0.9), torch.float32, False)
def test_lora_at_initialisation_leaves_the_output_bitwise_unchanged(
    case: Adapted, dtype: torch.dtype, strided: bool
) -> None:
    """It equals the output of the same base without an adapter."""
    layer = QLoRALinear.from_linear(case.linear(), **case.settings())
    flat = case.x(dtype).reshape(-1, case.in_features)
    flat = flat.T.contiguous().T if strided else flat
    expected = QLoRALinear(layer.base, layer.bias)(flat)
    assert same_bits(layer(flat), expected)
    y = layer(flat.reshape(*case.leading, case.in_features))
    assert same_bits(y, expected.reshape(*case.leading, case.out_features))


@given(adapted, st.sampled_from(MODES), st.booleans())
@example(Adapted(), MODES[4], True)
def test_a_layer_without_an_adapter_multiplies_by_its_base_in_its_compute_dtype(
    case: Adapted, mode: tuple, dense: bool
) -> None:
    x_dtype, autocast, compute_dtype = mode
    result = autocast or x_dtype
    dtype = compute_dtype or result
    linear = case.linear()
    x = case.x(x_dtype)
    base = FrozenWeight(linear.weight, **{"codebook": None} if dense else {})
    layer = QLoRALinear(base, linear.bias, compute_dtype=compute_dtype)
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        y = layer(x)
    bias = None if linear.bias is None else linear.bias.to(dtype)
    flat = x.reshape(-1, case.in_features).to(dtype)
    expected = base.matmul(flat, bias=bias).to(result)
    assert same_bits(y, expected.reshape(*case.leading, case.out_features))


@given(adapted)
def test_an_evaluating_layer_drops_nothing(case: Adapted) -> None:
    layer = adapt(case)
    x = case.x()
    without = adapt(case, lora_dropout=0.0)
    with torch.no_grad():
        without.lora_A.copy_(layer.lora_A)
    assert same_bits(layer.eval()(x), without(x))


def test_dropout_keeps_as_many_inputs_as_it_says() -> None:
    layer = adapt(Adapted(100, 4, 2, lora_dropout=0.3))
    torch.manual_seed(0)
    _, kept = saved_by(lambda: layer(torch.randn(1000, 100)))
    (mask,) = [tensor for tensor in kept if tensor.dtype == torch.bool]
    assert abs(mask.double().mean().item() - (1 - layer.lora_dropout)) <= of_a_mean(mask)


# what it saves


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_saves_x_and_h_and_the_mask_and_nothing_dense(
    dtype: torch.dtype, compute_dtype: torch.dtype | None, dropout: float
) -> None:
    case = Adapted(48, 40, 3, leading=(2, 5), lora_dropout=dropout)
    layer = adapt(case, compute_dtype=compute_dtype)
    x = case.x(dtype).requires_grad_()
    _, kept = saved_by(lambda: layer(x))
    assert all(tensor.numel() != 48 * 40 for tensor in kept)
    tokens = 10
    x_and_h = tokens * (48 + 3) * (compute_dtype or dtype).itemsize
    mask = tokens * 48 if dropout else 0
    parameters = layer.lora_A.nbytes + layer.lora_B.nbytes
    assert sum(tensor.nbytes for tensor in kept) == x_and_h + mask + parameters


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_forward_nothing_is_alive_but_the_output_and_what_is_saved(
    dtype: torch.dtype, dropout: float
) -> None:
    """Nor in a place that is not for saved tensors."""
    case = Adapted(48, 40, 3, leading=(10,), lora_dropout=dropout)
    layer = adapt(case)
    x = case.x(dtype).requires_grad_()
    with Live(x, *layer.parameters(), *layer.buffers()) as live:
        before = live.now()
        y = layer(x)
        after = live.now()
    h = 10 * 3 * dtype.itemsize
    mask = 10 * 48 if dropout else 0
    assert after - before == y.nbytes + h + mask


def test_a_frozen_adapter_saves_nothing_of_x() -> None:
    case = Adapted(48, 40, 3)
    layer = adapt(case)
    layer.lora_A.requires_grad_(False)
    layer.lora_B.requires_grad_(False)
    x = case.x().requires_grad_()
    y, kept = saved_by(lambda: layer(x))
    assert sum(tensor.nbytes for tensor in kept) == layer.lora_A.nbytes + layer.lora_B.nbytes
    y.backward(case.g())
    assert x.grad is not None and layer.lora_A.grad is None


def test_x_is_saved_for_A_alone() -> None:
    case = Adapted(48, 40, 3)
    layer = adapt(case)
    layer.lora_A.requires_grad_(False)
    _, kept = saved_by(lambda: layer(case.x()))
    assert all(tensor.numel() != 5 * 48 for tensor in kept)


def test_the_frozen_base_gets_no_gradient() -> None:
    case = Adapted()
    layer = adapt(case)
    before = {name: buffer.clone() for name, buffer in layer.base.named_buffers()}
    layer(case.x()).backward(case.g())
    with_gradient = {name for name, tensor in layer.named_parameters() if tensor.grad is not None}
    assert with_gradient == {"lora_A", "lora_B"}
    assert list(layer.base.parameters()) == [] and layer.bias.grad is None
    assert all(same_bits(buffer, before[name]) for name, buffer in layer.base.named_buffers())


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_only_the_gradient_that_is_needed_is_computed_and_it_is_the_same(
    needs: tuple[bool, bool, bool],
) -> None:
    case = Adapted()
    layer = adapt(case)
    g = case.g()

    def gradients(*wanted: bool) -> list[Tensor | None]:
        tensors = [case.x(), layer.lora_A, layer.lora_B]
        for tensor, want in zip(tensors, wanted, strict=True):
            tensor.grad = None
            tensor.requires_grad_(want)
        layer(tensors[0]).backward(g)
        return [tensor.grad for tensor in tensors]

    everything = gradients(True, True, True)
    some = gradients(*needs)
    assert [gradient is not None for gradient in some] == list(needs)
    assert all(same_bits(a, b) for a, b, need in zip(everything, some, needs, strict=True) if need)


def test_the_update_is_made_in_the_dtype_of_the_adapter_within_autocast_too() -> None:
    layer = adapt(Adapted())
    update = layer.update()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same_bits(layer.update(), update)


# a whole model


def adapted_names(model: nn.Module) -> list[str]:
    """All names of the QLoRALinear layers of a model."""
    modules = model.named_modules(remove_duplicate=False)
    return sorted(name for name, module in modules if isinstance(module, QLoRALinear))


@pytest.mark.parametrize(
    "make", [lambda: Tower(tied=True), TowerWithHead, lambda: TowerWithHead(tied=True)]
)
def test_attach_adapts_every_linear_layer_but_the_head_and_freezes_the_rest(
    make: Callable[[], Tower],
) -> None:
    model = make()
    head = model.lm_head
    tied = head.weight is model.embed.weight
    assert lora.attach(model, r=3) is model
    assert adapted_names(model) == LINEARS
    assert model.lm_head is head and type(head) is nn.Linear
    assert (head.weight is model.embed.weight) == tied
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{name}.{side}" for name in LINEARS[:5] for side in ("lora_A", "lora_B")}
    assert model(torch.tensor([[1, 2, 3]])).shape == (1, 3, 11)


def test_a_head_that_is_neither_named_nor_tied_is_an_ordinary_layer() -> None:
    assert isinstance(lora.attach(Tower(), r=3).lm_head, QLoRALinear)


def test_a_layer_that_is_used_twice_stays_one_layer() -> None:
    model = lora.attach(TowerWithHead(), r=3)
    assert model.blocks[0]["up"] is model.blocks[2]["up"]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", LINEARS),
        ("down", LINEARS[0:5:2]),
        (["down"], LINEARS[0:5:2]),
        (("up", "down"), LINEARS),
        ("blocks.1.down", ["blocks.1.down"]),
        (["0.down", "blocks.1.up"], ["blocks.0.down", "blocks.1.up"]),
        ("2.up", ["blocks.0.up", "blocks.2.up"]),
        (iter(["down"]), LINEARS[0:5:2]),
    ],
)
def test_targets_are_names_or_the_ends_of_names(targets: object, expected: list[str]) -> None:
    model = lora.attach(TowerWithHead(), targets, r=3)
    assert adapted_names(model) == expected


@pytest.mark.parametrize(
    ("targets", "reason"),
    [
        ("own", "target 'own' matches no linear layer; the model has down, up"),
        ("wn", "target 'wn' matches no linear layer; the model has down, up"),
        ("blocks", "target 'blocks' matches no linear layer; the model has down, up"),
        ("", "target '' matches no linear layer; the model has down, up"),
        (["up", "q_proj"], "target 'q_proj' matches no linear layer; the model has down, up"),
        ("lm_head", "target 'lm_head' matches the head lm_head, which stays dense; leave it out"),
        (["up", "embed"], "target 'embed' matches embed of type Embedding, and only nn.Linear can"),
        ([], "targets must name a layer, got []; all-linear takes all"),
    ],
)
def test_a_target_that_matches_no_layer_is_refused_with_the_reason(
    targets: object, reason: str
) -> None:
    model = TowerWithHead()
    with pytest.raises(ValueError, match=re.escape(reason)):
        lora.attach(model, targets, r=3)
    assert not adapted_names(model)


@pytest.mark.parametrize(
    "model", [nn.LayerNorm(3), nn.Linear(3, 3), nn.Sequential(), nn.Sequential(nn.ReLU())]
)
def test_a_model_without_linear_layers_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="no nn.Linear besides its output head"):
        lora.attach(model)


def test_a_model_whose_matrices_are_elsewhere_is_refused_with_their_places() -> None:
    model = nn.Sequential(nn.Bilinear(3, 3, 3))
    with pytest.raises(ValueError, match=r"so there is nothing to adapt; it has 1 Bilinear \(0\)"):
        lora.attach(model)


def with_hook(model: nn.Module) -> str:
    model.blocks[1]["down"].register_forward_hook(lambda *_: None)
    return "layer blocks.1.down: a new layer would lose the hooks of this one; register them after"


def with_backward_hook(model: nn.Module) -> str:
    model.blocks[1]["down"].register_full_backward_pre_hook(lambda *_: None)
    return "layer blocks.1.down: a new layer would lose the hooks of this one; register them after"


def without_weights(model: nn.Module) -> str:
    model.blocks[1]["down"].to("meta")
    return "layer blocks.1.down: its weight is on the meta device; load the weights first"


def with_another_adapter(model: nn.Module) -> str:
    model.blocks[1]["down"].base_layer = nn.Linear(4, 4)  # as PEFT's layers have
    return "adapters go into a plain model, got blocks.1.down, a layer that PEFT has wrapped"


@pytest.mark.parametrize(
    "change", [with_hook, with_backward_hook, without_weights, with_another_adapter]
)
def test_a_layer_that_cannot_be_replaced_is_refused_by_name(
    change: Callable[[nn.Module], str],
) -> None:
    model = TowerWithHead()
    with pytest.raises(ValueError, match=change(model)):
        lora.attach(model, r=3)
    assert not adapted_names(model)


def test_a_model_that_is_adapted_already_is_refused() -> None:
    model = lora.attach(TowerWithHead(), r=3)
    with pytest.raises(ValueError, match="adapted already"):
        lora.attach(model, r=3)


@pytest.mark.parametrize("targets", ["down", ["up", "1.down"]])
def test_a_second_adapter_for_a_layer_is_refused_by_name(targets: object) -> None:
    model = lora.attach(TowerWithHead(), "1.down", r=3)
    before = copy.deepcopy(model.state_dict())
    message = "a layer has one adapter, got the target blocks.1.down, which has one; name other"
    with pytest.raises(ValueError, match=message):
        lora.attach(model, targets, r=4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_all_linear_says_which_layers_keep_the_adapter_they_had(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = lora.attach(TowerWithHead(), "1.down", r=3)
    lora.attach(model, r=4)
    assert model.blocks[1]["down"].r == 3 and model.blocks[0]["down"].r == 4
    assert "unchanged: 1 linear layers that had an adapter" in capsys.readouterr().out


def mixtral() -> nn.Module:
    from transformers import AutoModelForCausalLM, MixtralConfig  # slow, and only here needed

    return AutoModelForCausalLM.from_config(MixtralConfig(**TINY))


def classifier() -> nn.Module:
    from transformers import AutoModelForSequenceClassification, LlamaConfig

    return AutoModelForSequenceClassification.from_config(LlamaConfig(**TINY))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            mixtral,
            "left dense: 1 MixtralTopKRouter (gate); 1 MixtralExperts (experts)",
        ),
        (
            classifier,
            "left dense: 1 Linear (score)",
        ),
        (
            lambda: nn.ModuleList(
                [nn.Linear(2, 2), nn.modules.linear.NonDynamicallyQuantizableLinear(2, 2)]
            ),
            "left dense: 1 NonDynamicallyQuantizableLinear (1)",
        ),
    ],
)
def test_attach_says_which_matrices_it_leaves(
    capsys: pytest.CaptureFixture[str], model: Callable[[], nn.Module], said: str
) -> None:
    lora.attach(model(), r=2)
    assert said in capsys.readouterr().out


def test_attach_says_which_layers_are_no_targets(capsys: pytest.CaptureFixture[str]) -> None:
    lora.attach(TowerWithHead(), "up", r=2)
    assert "left dense: 3 Linear (down)" in capsys.readouterr().out
    lora.attach(TowerWithHead(), r=2)
    assert "left dense" not in capsys.readouterr().out


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, AveragedModel])
def test_a_wrapped_model_is_merged_and_not_adapted(wrap: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.raises(ValueError, match="adapters go into the model itself, got a .* around it"):
        lora.attach(wrap(TowerWithHead()), r=2)
    model = lora.attach(TowerWithHead(), r=2)
    wrapped, audit = lora.merge(wrap(model))
    assert sorted(audit) == LINEARS and not adapted_names(wrapped)
    assert all(type(lora.unwrap(wrapped).get_submodule(name)) is nn.Linear for name in LINEARS)


@pytest.mark.parametrize("r", [-1, 0, 2.0, "8", True])
def test_a_rank_that_is_no_integer_from_1_is_refused_with_the_layer(r: object) -> None:
    with pytest.raises(ValueError, match=f"layer blocks.0.up: r must be an integer >= 1.*got {r}"):
        lora.attach(TowerWithHead(), r=r)


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 6 / 9), (True, 6 / 3)])
def test_with_use_rslora_the_scaling_is_alpha_over_the_root_of_r(
    use_rslora: bool, scaling: float
) -> None:
    layer = QLoRALinear.from_linear(nn.Linear(16, 16), r=9, lora_alpha=6, use_rslora=use_rslora)
    assert layer.scaling == scaling


def test_a_state_of_another_scaling_is_refused() -> None:
    layer, other = (QLoRALinear.from_linear(nn.Linear(64, 8), 4, alpha) for alpha in (8, 16))
    other.load_state_dict(copy.deepcopy(other.state_dict()))
    message = "scaling must be 2.0, as in this model, got 4.0 in the state; quantize and attach"
    with pytest.raises(ValueError, match=message):
        layer.load_state_dict(other.state_dict())


def test_a_model_without_adapters_refuses_the_state_of_one_with_adapters() -> None:
    """Also with strict=False, which from_pretrained means: it would leave random weights."""
    model = nn.Sequential(nn.Linear(64, 8))
    adapted = lora.attach(copy.deepcopy(model))
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight"):
        model.load_state_dict(adapted.state_dict(), strict=False)


def test_a_state_without_the_description_of_a_layer_is_incomplete() -> None:
    layer = QLoRALinear.from_linear(nn.Linear(64, 8))
    state = {name: tensor for name, tensor in layer.state_dict().items() if name != "weight"}
    del state["base._extra_state"]
    with pytest.raises(RuntimeError, match='Missing key.* "base._extra_state"'):
        layer.load_state_dict(state)


def test_a_layer_of_rank_0_has_no_adapter_and_the_scaling_0() -> None:
    layer = QLoRALinear(FrozenWeight(torch.ones(4, 4)), None)
    assert layer.scaling == 0
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_a_weight_that_is_refused_leaves_every_layer_dense() -> None:
    model = TowerWithHead()
    with torch.no_grad():
        model.blocks[2]["down"].weight[1, 2] = math.nan
    with pytest.raises(ValueError, match=r"layer blocks.2.down: 1 of 512 .*\(1, 2\)"):
        lora.attach(model)
    assert not any(isinstance(module, QLoRALinear) for module in model.modules())


def test_the_defaults_are_the_documented_ones() -> None:
    layer = QLoRALinear.from_linear(nn.Linear(256, 256))
    assert (layer.r, layer.lora_alpha, layer.lora_dropout) == (8, 16, 0.0)
    assert (layer.use_rslora, layer.compute_dtype) == (False, None)
    assert (layer.base.block_size, layer.base.double_quant) == (64, True)
    assert same_bits(layer.base.codebook, nf4.NF4)
    without = QLoRALinear(FrozenWeight(torch.ones(4, 4)), None)
    assert (without.r, without.lora_alpha, without.lora_dropout) == (0, 0, 0.0)
    assert (without.use_rslora, without.compute_dtype) == (False, None)


def test_lora_A_starts_uniform_within_one_over_the_root_of_its_inputs() -> None:
    """The bound of kaiming_uniform_ with a = sqrt(5): sqrt(6 / ((1 + 5) in))."""
    A = QLoRALinear.from_linear(nn.Linear(64, 4096), r=64).lora_A.detach()
    assert is_tight(A.abs().max(), 1 / 8)
    assert abs(A.mean()) <= of_a_mean(A.flatten())


def test_layers_without_an_adapter_stay_frozen_when_others_get_one() -> None:
    layers = {name: QLoRALinear(FrozenWeight(torch.randn(8, 8)), None) for name in ("a", "b")}
    model = nn.ModuleDict(layers)
    lora.attach(model, ["a"], r=1)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable == ["a.lora_A", "a.lora_B"]
    lora.attach(model, ["b"], r=2)  # the first adapter goes on training
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("given", "taken"), [(None, torch.bfloat16), (torch.float16, torch.float16)]
)
def test_an_adapter_takes_the_compute_dtype_of_the_layer_without_one_by_default(
    given: torch.dtype | None, taken: torch.dtype
) -> None:
    without = QLoRALinear(FrozenWeight(torch.randn(8, 8)), None, compute_dtype=torch.bfloat16)
    layer = QLoRALinear.from_linear(without, r=2, compute_dtype=given)
    assert layer.base is without.base and layer.compute_dtype == taken


def test_adapt_returns_the_bytes_of_the_weights_before_and_now() -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 32), "b": nn.Linear(128, 16, dtype=torch.bfloat16)})
    bytes_before, bytes_now = lora.adapt(model, [(["a"], {"r": 2}), (["b"], {"r": 2})])
    assert bytes_before == 4 * 2048 + 2 * 2048
    assert bytes_now == 2 * (1024 + 32 + 4 + 4)


@pytest.mark.parametrize("alpha", [0, -1.0, math.inf, math.nan, "16", np.float32(16)])
def test_a_lora_alpha_that_is_not_positive_and_finite_is_refused(alpha: float) -> None:
    """So is a number that JSON cannot hold: an adapter could not be saved after the training."""
    message = f"lora_alpha must be an int or float, positive and finite; got {alpha!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        QLoRALinear.from_linear(nn.Linear(4, 4), r=2, lora_alpha=alpha)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e5m2, "bfloat16"])
def test_a_compute_dtype_that_is_none_of_a_product_is_refused(dtype: object) -> None:
    """A product in whole numbers would be computed, and mean nothing."""
    with pytest.raises(ValueError, match=f"compute_dtype must be one of .*; got {dtype}"):
        QLoRALinear.from_linear(nn.Linear(4, 4), r=2, compute_dtype=dtype)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 1.5, math.nan, "0"])
def test_a_dropout_that_is_no_probability_below_1_is_refused(dropout: float) -> None:
    with pytest.raises(ValueError, match="lora_dropout is a probability"):
        QLoRALinear.from_linear(nn.Linear(4, 4), r=2, lora_dropout=dropout)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_refused_with_the_layer_the_count_and_the_first_index(
    bad: float,
) -> None:
    model = TowerWithHead()
    with torch.no_grad():
        model.blocks[1]["down"].weight[3, 4] = bad
        model.blocks[1]["down"].weight[5, 0] = -bad
    message = r"layer blocks.1.down: 2 of 512 .*first at index \(3, 4\)"
    with pytest.raises(ValueError, match=message):
        lora.attach(model, r=3)


def test_the_dense_weights_are_freed() -> None:
    model = TowerWithHead()
    weights = [weakref.ref(model.get_submodule(name).weight) for name in LINEARS]
    lora.attach(model, r=3)
    gc.collect()
    assert [weight() for weight in weights] == [None] * len(weights)


def test_attach_prints_what_it_did(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 512, bias=False))
    lora.attach(model, r=5)
    before = 4 * (1024 * 1024 + 1024 * 512) / 1e6
    now = sum(layer.base.nbytes for layer in model) / 1e6
    assert capsys.readouterr().out == (
        "adapters of rank 5 on 2 linear layers; "
        f"their frozen weights: {before:.1f} MB before, {now:.1f} MB now\n"
    )


def losses_around_ten_steps(model: nn.Module) -> tuple[float, float]:
    """The loss of a tower on a few random tokens before and after training on them."""
    ids = torch.randint(11, (4, 9))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def loss() -> Tensor:
        return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    before = loss().item()
    for _ in range(10):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return before, loss().item()


@pytest.mark.parametrize(
    ("codebook", "compute_dtype"),
    [(nf4.NF4, None), (nf4.normal_float(3), torch.bfloat16), (None, None)],
)
def test_training_a_small_adapted_model_lowers_its_loss_and_moves_nothing_else(
    codebook: Tensor | None, compute_dtype: torch.dtype | None
) -> None:
    torch.manual_seed(0)
    settings = {"codebook": codebook, "compute_dtype": compute_dtype}
    model = lora.attach(TowerWithHead(tied=True), r=4, lora_dropout=0.1, **settings)
    frozen = {n: t.clone() for n, t in model.state_dict().items() if "lora_" not in n}
    before, after = losses_around_ten_steps(model)
    assert after < before
    assert all(same_bits(model.state_dict()[name], tensor) for name, tensor in frozen.items())


@pytest.mark.parametrize("codebook", [None, nf4.NF4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_output_is_that_of_lora_on_a_dense_and_on_a_4_bit_base(
    dtype: torch.dtype, codebook: Tensor | None
) -> None:
    case = Adapted()
    linear = case.linear(dtype)
    layer = case.trained(QLoRALinear.from_linear(linear, codebook=codebook, **case.settings()))
    assert (layer.base().data_ptr() == linear.weight.data_ptr()) == (codebook is None)
    assert layer.lora_A.dtype == torch.float32
    weight = linear.weight if codebook is None else decoded(linear.weight)
    x = case.x(dtype)
    operands = weight, layer.lora_A, layer.lora_B, linear.bias
    bound = lora_forward(x, *operands, case.lora_alpha / case.r, None, dtype)
    assert bound.allows(layer(x))


# merging a model


@given(adapted, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.booleans())
def test_a_merged_model_computes_what_the_adapted_one_did(
    case: Adapted, dtype: torch.dtype, dense: bool
) -> None:
    assume(math.prod(case.leading))
    layer = adapt(case, dtype, **{"codebook": None} if dense else {}).eval()
    x = case.x(torch.float32).reshape(-1, case.in_features)
    weight = case.linear(dtype).weight
    base = weight if dense else decoded(weight, case.double_quant)
    scaling = case.lora_alpha / case.r
    bound = merged_forward(
        x, base, layer.lora_A, layer.lora_B, layer.bias, scaling, dtype, torch.float32
    )
    model, audit = lora.merge(nn.Sequential(layer))
    merged = model[0]
    assert type(merged) is nn.Linear and merged.weight.dtype == dtype
    assert not merged.weight.requires_grad
    bias = None if layer.bias is None else layer.bias.float()
    assert bound.allows(F.linear(x, merged.weight.float(), bias))
    assert merged.bias is layer.bias
    assert set(audit) == (set() if dense else {"0"})


@given(adapted, st.sampled_from([1e-4, 1e-2, 1.0]))
def test_the_audit_measures_what_a_4_bit_merge_would_change(case: Adapted, size: float) -> None:
    layer = adapt(case)
    with torch.no_grad():
        layer.lora_B.mul_(size)
    base = decoded(case.linear().weight, case.double_quant)
    update = layer.update()
    realized = (decoded(base + update, case.double_quant) - base).double()
    wanted = update.double()
    assume(realized.any())
    _, audit = lora.merge(nn.Sequential(layer))
    dot = (realized * wanted).sum().item()
    length, moved = wanted.norm().item(), realized.norm().item()
    n = update.numel()
    assert abs(audit["0"].update_norm - length) <= gamma(n + 2) * length
    assert abs(audit["0"].cosine - dot / (length * moved)) <= cosine(n)
    assert abs(audit["0"].kept - dot / length**2) <= cosine(n) * moved / length


@pytest.mark.parametrize("double", [True, False])
def test_an_update_of_zero_is_kept(double: bool) -> None:
    layer = QLoRALinear.from_linear(nn.Linear(64, 32), double_quant=double)
    assert lora.merge(nn.Sequential(layer))[1]["0"] == (0.0, 1.0, 1.0)


def test_an_update_that_rounding_removes_is_reported_as_lost() -> None:
    layer = QLoRALinear.from_linear(nn.Linear(64, 32), double_quant=False)
    nn.init.constant_(layer.lora_B, 1e-12)
    _, audit = lora.merge(nn.Sequential(layer))
    assert audit["0"].update_norm > 0 and audit["0"].kept == 0 and audit["0"].cosine == 0


@pytest.mark.parametrize("factor", [1e3, 1e5])
def test_a_huge_update_is_kept_up_to_the_error_of_quantization(factor: float) -> None:
    case = Adapted(64, 48, 8, seed=3)
    layer = adapt(case)
    with torch.no_grad():
        layer.lora_B.mul_(factor)
    target = decoded(case.linear().weight) + layer.update()
    update = layer.update().double()
    absmax = nf4.quantize(target).absmax
    nested = double_quant.quantize(absmax).absmax.expand(len(absmax))
    codes = (nf4.NF4, double_quant.DYNAMIC)
    error = both_quantized(absmax, nested, *codes, torch.float32, torch.float32)
    two_sums = 2 * cast(2 * target.abs().max().item(), torch.float32)
    error = error.repeat_interleave(64) + two_sums
    relative = (error.norm() / update.norm()).item()
    slack = cosine(update.numel())
    _, audit = lora.merge(nn.Sequential(layer))
    assert audit["0"].cosine >= least_cosine(relative) - slack
    assert abs(audit["0"].kept - 1) <= relative + slack * (1 + relative)


def test_merge_leaves_an_ordinary_model_with_the_same_training_mode_and_no_adapter() -> None:
    model = lora.attach(TowerWithHead(), r=3).eval()
    names = {name for name, _ in TowerWithHead().named_parameters()}
    merged, audit = lora.merge(model)
    assert merged is model and set(audit) == set(LINEARS)
    assert {name for name, _ in model.named_parameters()} >= names
    assert not adapted_names(model)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_layer_that_is_used_twice_stays_one_layer_when_merged() -> None:
    model, audit = lora.merge(lora.attach(TowerWithHead(), r=3))
    assert model.blocks[0]["up"] is model.blocks[2]["up"]
    assert audit["blocks.0.up"] == audit["blocks.2.up"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_that_was_cast_after_attach_has_one_dtype_after_a_merge(dtype: torch.dtype) -> None:
    model, _ = lora.merge(lora.attach(TowerWithHead(), r=3).to(dtype))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model(torch.tensor([[1, 2, 3]])).dtype == dtype


def test_an_encoder_layer_of_torch_calls_our_layers_also_in_its_fast_path() -> None:
    """In evaluation without gradients, it multiplies by the weights of its layers itself."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True).eval()
    lora.attach(model, r=2)
    x = torch.randn(2, 5, 64)
    expected = model(x)
    with torch.no_grad():
        assert torch.equal(model(x), expected)


def test_a_function_of_torch_refuses_the_weight_of_an_adapted_layer() -> None:
    layer = QLoRALinear.from_linear(nn.Linear(64, 8))
    message = "linear needs a tensor, got the weight of a QLoRALinear; call the layer instead"
    with pytest.raises(TypeError, match=message):
        F.linear(torch.ones(64), layer.weight)


@pytest.mark.parametrize("training", [True, False])
def test_an_adapted_layer_is_in_the_mode_of_the_layer_it_replaces(training: bool) -> None:
    assert QLoRALinear.from_linear(nn.Linear(8, 8).train(training), r=2).training == training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_merged_weight_is_rounded_once(dtype: torch.dtype) -> None:
    """To the dtype of its base, after the sum in float32."""
    case = Adapted(48, 40, 3)
    layer = case.trained(QLoRALinear.from_linear(case.linear(dtype), **case.settings()))
    update = Bounded.exact(layer.lora_B).matmul(Bounded.exact(layer.lora_A), torch.float32)
    base = Bounded.exact(decoded(case.linear(dtype).weight))
    total = update.times(case.lora_alpha / case.r, torch.float32).plus(base, torch.float32)
    merged, _ = lora.merge(nn.Sequential(layer))
    assert merged[0].weight.dtype == dtype
    assert (total if dtype == torch.float32 else total.to(dtype)).allows(merged[0].weight)


def test_attaching_changes_no_dtype_of_what_it_does_not_quantize() -> None:
    model = TowerWithHead().bfloat16()
    state = model.state_dict().items()
    before = {name: tensor.clone() for name, tensor in state if not name.startswith("blocks")}
    after = lora.attach(model, r=3).state_dict()
    assert all(same_bits(after[name], tensor) for name, tensor in before.items())
