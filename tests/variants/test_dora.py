"""The laws of dora.py: the norm without a dense matrix, c, the gradients, and PEFT's results."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_init import SHAPES, weight_of
from test_lora import MODES, losses_around_ten_steps, saved_by
from test_peft_adapter import assert_peft_computes_the_same, logits
from test_state import optimizer_of, save, take_steps
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lora
import train
from checkpoints import peft_adapter
from helpers.bounds import (
    Bounded,
    cast,
    dora_backward,
    dora_forward,
    dora_norm,
    dora_scale,
    gamma,
    in_float64,
    lora_backward,
    lora_forward,
)
from helpers.models import adapted as adapted_llama
from helpers.models import save_tiny_llama, tiny_llama, trained
from helpers.strategies import Adapted, TowerWithHead, adapted, same_bits
from lora import FrozenWeight, QLoRALinear
from memory import measured
from training import state, use_adapter
from training.options import Options
from variants import dora, init
from variants.dora import DoRALinear

DORA = {"lora_A", "lora_B", "lora_magnitude_vector.weight"}


def untrained(case: Adapted, dtype: torch.dtype = torch.float32, **settings: object) -> DoRALinear:
    return DoRALinear.from_linear(case.linear(dtype), **case.settings() | settings)


def adapt(case: Adapted, dtype: torch.dtype = torch.float32, **settings: object) -> DoRALinear:
    """A layer as after some training, with changed magnitudes too."""
    layer = case.trained(untrained(case, dtype, **settings))
    with torch.no_grad():
        layer.lora_magnitude_vector.weight.mul_(1 + 0.3 * case.random(case.out_features, offset=7))
    return layer


def norm_in_float64(layer: DoRALinear) -> Tensor:
    """By the definition."""
    update = layer.scaling * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    return (layer.base(torch.float64) + update).norm(dim=1)


def bound_of_norm(layer: DoRALinear) -> Bounded:
    A, B = layer.lora_A, layer.lora_B
    return in_float64(dora_norm(layer.base(A.dtype), A, B, layer.scaling), 4 * layer.in_features)


# the norm, and c


@given(
    adapted,
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.booleans(),
    st.sampled_from([0.01, 1, 50]),
)
def test_the_norm_is_that_of_the_rows_of_the_dense_sum(
    case: Adapted, dtype: torch.dtype, dense: bool, size: float
) -> None:
    layer = adapt(case, dtype, **{"codebook": None} if dense else {})
    with torch.no_grad():
        layer.lora_B.mul_(size)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # must not change the norm
        norm = layer.row_norm()
    assert norm.dtype == layer.lora_A.dtype and not norm.requires_grad
    assert bound_of_norm(layer).allows(norm, norm_in_float64(layer))


def test_a_norm_of_more_rows_than_are_squared_at_once_has_all_of_them() -> None:
    weight = torch.randn(2 * dora.ROWS + 3, 4)
    layer = DoRALinear(FrozenWeight(weight, codebook=None), None, 1, 1)
    norm = weight.double().norm(dim=1)
    error = (layer.lora_magnitude_vector.weight.double() - norm).abs()
    assert (error <= cast(norm, torch.float32)).all()


@given(adapted, st.sampled_from(MODES))
@example(Adapted(lora_dropout=0.9), MODES[0])
def test_an_untrained_layer_gives_the_output_of_its_base_to_the_bit(
    case: Adapted, mode: tuple
) -> None:
    """Its magnitudes are the norms of its base, and c is exactly 1."""
    x_dtype, autocast, compute_dtype = mode
    layer = untrained(case, compute_dtype=compute_dtype)
    x = case.x(x_dtype)
    assert (layer.scale() == 1).all()
    assert same_bits(layer.lora_magnitude_vector.weight, layer.lora_magnitude_vector.base_norm)
    without = QLoRALinear(layer.base, layer.bias, compute_dtype=compute_dtype)
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        assert same_bits(layer(x), without(x))
    assert not layer.update().any()


@given(adapted, st.sampled_from([0.5, 2.0, 8.0, -1.0]))
def test_a_layer_whose_magnitudes_double_gives_the_double_output_for_any_adapter(
    case: Adapted, factor: float
) -> None:
    layer = adapt(case, lora_dropout=0.0)
    layer.bias = None
    before = layer(case.x())
    with torch.no_grad():
        layer.lora_magnitude_vector.weight.mul_(factor)
    assert torch.equal(layer(case.x()), before * factor)


def test_a_change_of_a_magnitude_that_16_bits_cannot_represent_counts() -> None:
    layer = untrained(Adapted(64, 64, bias=False))
    x = torch.randn(50, 64).bfloat16()
    before = layer(x)
    with torch.no_grad():
        layer.lora_magnitude_vector.weight.mul_(1.003)
    assert torch.tensor(1.003).bfloat16() == 1 and not torch.equal(layer(x), before)


@pytest.mark.parametrize("bias", [True, False])
def test_a_row_of_zeros_is_the_bias_and_can_learn(bias: bool) -> None:
    """Where the norm is zero c is 1, and B gets a gradient; where m alone is zero, m gets one."""
    case = Adapted(bias=bias)
    linear = case.linear()
    linear.weight.data[3] = 0
    layer = DoRALinear.from_linear(linear, **case.settings())
    optimizer = torch.optim.SGD([layer.get_parameter(name) for name in DORA], lr=0.1)
    for moving in ("lora_B", "lora_magnitude_vector.weight"):
        y = layer(case.x())
        assert torch.equal(y[:, 3], torch.full((5,), layer.bias[3].item() if bias else 0.0))
        y.backward(case.g())
        assert all(layer.get_parameter(name).grad.isfinite().all() for name in DORA)
        assert layer.get_parameter(moving).grad[3].any()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(layer(case.x())[:, 3], y[:, 3]) and norm_in_float64(layer)[3] > 0


@given(st.integers(0, 200), st.sampled_from([1.0, 1e-18, 1e25]))
@example(133, 1e-18)
def test_rows_that_the_update_cancels_leave_all_that_is_computed_finite(
    seed: int, size: float
) -> None:
    """The square of the norm is only rounding error there, and may come out below zero."""
    layer = DoRALinear.from_linear(nn.Linear(8, 6), r=1, lora_alpha=1, codebook=None)
    case = Adapted(8, 6, 1, seed=seed)
    a, b = (case.random(size, offset=offset).float() for size, offset in ((8, 1), (6, 2)))
    with torch.no_grad():
        layer.base.weight.copy_(torch.outer(b, a) * size)
        layer.reset_magnitude()
        layer.lora_A.copy_(a[None])
        layer.lora_B.copy_(-b[:, None] * size)
    assert bound_of_norm(layer).allows(layer.row_norm(), norm_in_float64(layer))
    y = layer(case.x())
    y.backward(case.g())
    assert y.isfinite().all()
    assert all(layer.get_parameter(name).grad.isfinite().all() for name in DORA)


# the layer


@given(adapted, st.sampled_from(MODES))
@example(Adapted(leading=(0,), lora_dropout=0.3), MODES[0])
@example(Adapted(leading=(2, 0, 3)), MODES[1])
def test_output_and_gradients_are_those_of_a_plain_autograd_dora(
    case: Adapted, mode: tuple
) -> None:
    """In float64 with a dense weight and a constant norm; dropout is on the adapter only."""
    x_dtype, autocast, compute_dtype = mode
    result = autocast or x_dtype
    dtype = compute_dtype or result
    layer = adapt(case, compute_dtype=compute_dtype)
    x = case.x(x_dtype).requires_grad_()
    g = case.g(result)
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        y, kept = saved_by(lambda: layer(x))
    masks = [tensor for tensor in kept if tensor.dtype == torch.bool and tensor.dim() == 2]
    assert len(masks) == (1 if case.lora_dropout else 0)
    keep = masks[0] if masks else None
    assert (y.dtype, y.shape) == (result, (*case.leading, case.out_features))
    y.backward(g)

    flat = x.detach().reshape(-1, case.in_features)
    g_flat = g.reshape(-1, case.out_features)
    parameters = [layer.get_parameter(name) for name in sorted(DORA)]
    exact = [tensor.detach().double().requires_grad_() for tensor in (flat, *parameters)]
    bias = None if layer.bias is None else layer.bias.detach()
    scaling = case.lora_alpha / case.r
    dropped = exact[0] if keep is None else exact[0] * keep / (1 - case.lora_dropout)
    direction = exact[0] @ layer.base(torch.float64).T + dropped @ exact[1].T @ exact[2].T * scaling
    plain = direction * exact[3] / norm_in_float64(layer) + (0 if bias is None else bias.double())
    gradients = torch.autograd.grad(plain, exact, g_flat.double())

    operands = flat, layer.base(torch.float32), layer.lora_A, layer.lora_B
    dropping = scaling / (1 - case.lora_dropout)
    before = lora_forward(*operands, bias, dropping, keep, dtype)
    norm = bound_of_norm(layer)
    c = dora_scale(parameters[2], norm)
    forward = in_float64(dora_forward(before, c, bias, dtype), 4)
    forward = forward if result == dtype else forward.to(result)
    assert forward.allows(y.reshape(-1, case.out_features), plain)
    of_y, of_m = dora_backward(g_flat, before, c, norm, bias, dtype)
    of_x, of_A, of_B = lora_backward(of_y, *operands, dropping, keep, dtype)
    of_x = of_x if x_dtype == dtype else of_x.to(x_dtype)
    assert of_x.allows(x.grad.reshape(-1, case.in_features), gradients[0])
    for parameter, bound, gradient in zip(parameters, (of_A, of_B, of_m), gradients[1:]):
        assert parameter.grad.dtype == torch.float32 and bound.allows(parameter.grad, gradient)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
def test_the_backward_passes_gradcheck_in_float64_for_a_norm_that_stays(
    dropout: float, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Adapted(6, 5, 2, leading=(4,), lora_dropout=dropout, bias=bias)
    layer = adapt(case, torch.float64)
    x = case.x(torch.float64).requires_grad_()
    inputs = [x, *(layer.get_parameter(name) for name in sorted(DORA))]
    inputs += [layer.bias.requires_grad_()] if bias else []
    norm = norm_in_float64(layer)
    monkeypatch.setattr(DoRALinear, "row_norm", lambda _: norm)

    def seeded(*_: Tensor) -> Tensor:
        torch.manual_seed(5)  # one mask for all evaluations
        return layer(x)

    assert torch.autograd.gradcheck(seeded, inputs, raise_exception=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_saves_what_lora_does_and_one_product_and_nothing_dense(dtype: torch.dtype) -> None:
    case = Adapted(48, 40, 3, leading=(2, 5), bias=False)
    layer = adapt(case)
    x = case.x(dtype)
    plain = case.trained(QLoRALinear.from_linear(case.linear(), **case.settings()))
    kept = saved_by(lambda: layer(x))[1]
    without = saved_by(lambda: plain(x))[1]
    assert all(tensor.numel() != 48 * 40 for tensor in kept)
    more = sum(tensor.nbytes for tensor in kept) - sum(tensor.nbytes for tensor in without)
    before_c = 10 * 40 * dtype.itemsize
    c_and_n_and_nonzero = 40 * (4 + 4 + 1)
    assert more == before_c + c_and_n_and_nonzero


@given(adapted, st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_merged_row_has_the_length_of_its_magnitude_and_the_layer_computes_the_same(
    case: Adapted, dtype: torch.dtype
) -> None:
    assume(math.prod(case.leading))
    layer = adapt(case, dtype).eval()
    m = layer.lora_magnitude_vector.weight.detach().double()
    base = layer.base(torch.float64)
    n = bound_of_norm(layer)
    update = Bounded.exact(layer.lora_B).matmul(Bounded.exact(layer.lora_A), torch.float32)
    update = update.times(layer.scaling, torch.float32)
    c = dora_scale(m.float(), n)
    c = Bounded(c.value[:, None], c.error[:, None])
    less = Bounded(c.value - 1, c.error).to(torch.float32)
    product = [
        Bounded(a.value * b.value, a.most * b.most - (a.value * b.value).abs()).to(torch.float32)
        for a, b in ((less, Bounded.exact(base)), (c, update))
    ]
    total = product[0].plus(product[1], torch.float32)
    assert total.allows(layer.update())
    total = in_float64(total.plus(Bounded.exact(base), torch.float32), 4)
    total = total if dtype == torch.float32 else total.to(dtype)
    merged = lora.merge(nn.Sequential(layer))[0][0]
    assert merged.weight.dtype == dtype and total.allows(merged.weight)
    x = case.x().reshape(-1, case.in_features)
    y = Bounded.exact(x).matmul(total.T, torch.float32)
    bias = None if layer.bias is None else layer.bias.float()
    y = y if bias is None else y.plus(Bounded.exact(bias), torch.float32)
    assert y.allows(F.linear(x, merged.weight.float(), bias))
    lengths = (total.value.norm(dim=1) - m.abs()).abs()
    assert (lengths <= n.error * (m / n.value).abs() * 2).all(), "by the definition of c"


def test_training_lowers_the_loss_and_moves_the_magnitudes_and_nothing_frozen() -> None:
    torch.manual_seed(0)
    model = lora.attach(TowerWithHead(tied=True), r=4, lora_dropout=0.1, layer_type=DoRALinear)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {name.partition("up.")[2] or name.partition("down.")[2] for name in trainable} == DORA
    start = copy.deepcopy(model.state_dict())
    before, after = losses_around_ten_steps(model)
    assert after < before
    for name, tensor in model.state_dict().items():
        assert same_bits(tensor, start[name]) == ("lora_" not in name)


def test_the_norms_of_the_base_are_not_saved() -> None:
    assert "base_norm" not in "".join(untrained(Adapted()).state_dict())  # the base has it


def test_a_loaded_state_brings_the_norms_of_its_base() -> None:
    torch.manual_seed(0)
    saved, layer = (DoRALinear.from_linear(nn.Linear(64, 8), r=2) for _ in range(2))
    nn.init.normal_(saved.lora_B)
    layer.load_state_dict(saved.state_dict())
    x = torch.randn(3, 64)
    assert same_bits(layer(x), saved(x))


def test_the_ledger_counts_magnitudes_and_the_norms_of_the_base_among_the_adapters() -> None:
    dora_model = tiny_llama(vocab_size=256)
    lora_model = tiny_llama(vocab_size=256)
    with_dora = measured.ledger(lora.attach(dora_model, layer_type=DoRALinear, r=4))
    without = measured.ledger(lora.attach(lora_model, r=4))
    outputs = 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64)
    more = [a - b for a, b in zip(with_dora.pop("adapters"), without.pop("adapters"))]
    assert more == [outputs, 2 * outputs, 2 * 4 * outputs]
    assert with_dora == without


# files, and PEFT


def dense_base() -> nn.Module:
    return tiny_llama(torch.float64, vocab_size=256)


def moved(model: nn.Module) -> nn.Module:
    """The model with changed magnitudes, as after some training."""
    for name, parameter in model.named_parameters():
        if "lora_magnitude_vector" in name:
            with torch.no_grad():
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    "settings",
    [{}, {"lora_alpha": 3.5}, {"use_rslora": True}, {"r": 70}, {"targets": ["v_proj"]}],
    ids=str,
)
def test_peft_loads_our_adapter_and_computes_the_same(tmp_path: Path, settings: dict) -> None:
    ours = moved(adapted_llama(layer_type=DoRALinear, **settings))
    peft_adapter.save_adapter(ours, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"] is True
    assert_peft_computes_the_same(ours, tmp_path)
    assert torch.equal(
        logits(peft_adapter.load_adapter(attached(dense_base(), ours), tmp_path)), logits(ours)
    )


def attached(model: nn.Module, like: nn.Module) -> nn.Module:
    """The model with untrained adapters on the same layers."""
    for name, layer in peft_adapter.adapted_layers(like).items():
        lora.attach(model, [name], type(layer), r=layer.r, codebook=None)
    return model


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": "all-linear", "use_rslora": True, "lora_dropout": 0.25},
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"v_proj": 2, r"layers\.1\..*up_proj": 6},
            "alpha_pattern": {"model.layers.0.self_attn.q_proj": 5, "up_proj|v_proj": 1.5},
        },
    ],
    ids=lambda config: str(config["target_modules"]),
)
def test_we_load_the_adapter_of_peft_and_compute_the_same(tmp_path: Path, config: dict) -> None:
    settings = {"task_type": "CAUSAL_LM", "r": 4, "use_dora": True} | config
    theirs = moved(trained(get_peft_model(dense_base(), LoraConfig(**settings))))
    theirs.save_pretrained(tmp_path)
    ours = peft_adapter.load_adapter(dense_base(), tmp_path)
    assert_peft_computes_the_same(ours, tmp_path)
    for name, layer in peft_adapter.adapted_layers(ours).items():
        their = theirs.base_model.model.get_submodule(name).lora_magnitude_vector["default"].weight
        assert isinstance(layer, DoRALinear)
        assert torch.equal(layer.lora_magnitude_vector.weight, their)


def test_an_untrained_adapter_that_was_saved_and_loaded_still_changes_no_bit(
    tmp_path: Path,
) -> None:
    model = tiny_llama(torch.bfloat16, vocab_size=256)
    saved = lora.attach(copy.deepcopy(model), layer_type=DoRALinear, r=4)
    peft_adapter.save_adapter(saved, tmp_path)
    loaded = peft_adapter.load_adapter(
        lora.attach(copy.deepcopy(model), layer_type=DoRALinear, r=4), tmp_path
    )
    assert torch.equal(logits(peft_adapter.load_adapter(model, tmp_path)), logits(loaded))
    for layer in peft_adapter.adapted_layers(model).values():
        x = torch.randn(5, layer.in_features, dtype=torch.bfloat16)
        assert same_bits(layer(x), QLoRALinear(layer.base, None)(x))


def test_adapters_of_both_kinds_are_not_saved_and_one_is_not_loaded_onto_the_other(
    tmp_path: Path,
) -> None:
    both = lora.attach(lora.attach(dense_base(), ["q_proj"], DoRALinear), ["v_proj"])
    with pytest.raises(ValueError, match="differ in lora_dropout, use_rslora or use_dora"):
        peft_adapter.save_adapter(both, tmp_path / "both")
    for use_dora in (True, False):
        same, other = (DoRALinear, QLoRALinear) if use_dora else (QLoRALinear, DoRALinear)
        folder = tmp_path / str(use_dora)
        peft_adapter.save_adapter(adapted_llama(layer_type=same), folder)
        message = f"has use_dora {use_dora}, and the model's adapter has not"
        with pytest.raises(ValueError, match=message):
            peft_adapter.load_adapter(adapted_llama(layer_type=other), folder)
    path = tmp_path / "True" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": False}))
    with pytest.raises(ValueError, match="lora_magnitude_vector belongs to nothing in the model"):
        peft_adapter.load_adapter(dense_base(), tmp_path / "True")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": "yes"}))
    with pytest.raises(ValueError, match="use_dora cannot be yes"):
        peft_adapter.load_adapter(dense_base(), tmp_path / "True")


def test_a_resumed_run_ends_with_the_bits_of_one_that_never_stopped(tmp_path: Path) -> None:
    whole = adapted_llama(layer_type=DoRALinear, lora_dropout=0.3)
    first = optimizer_of(whole)
    take_steps(whole, first, 2)
    save(whole, first, 2, tmp_path, 1)
    take_steps(whole, first, 2, start=2)
    torch.manual_seed(2)
    resumed = adapted_llama(layer_type=DoRALinear, lora_dropout=0.3)
    second = optimizer_of(resumed)
    state.load_state(resumed, second, state.latest_state(tmp_path))
    take_steps(resumed, second, 2, start=2)
    tensors = peft_adapter.adapter_tensors(resumed)
    expected = peft_adapter.adapter_tensors(whole)
    assert len(tensors) == 3 * 14
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("shape", SHAPES)
def test_with_another_start_the_magnitudes_are_those_of_base_and_adapter_and_c_is_1(
    shape: tuple[int, int],
) -> None:
    """On the dense base of PiSSA they are those of PEFT."""
    weight = weight_of(shape)
    for start in ("pissa", "loftq"):
        layer = init.maker(start, {"r": 4, "layer_type": DoRALinear}, {})(weight, None)
        assert (layer.scale() == 1).all() and layer.lora_B.any()
        magnitude = layer.lora_magnitude_vector.weight
        assert bound_of_norm(layer).allows(magnitude, norm_in_float64(layer))
    model = nn.Sequential(nn.Linear(*shape[::-1], bias=False))
    model[0].weight.data = weight.clone()
    config = LoraConfig(
        r=4, lora_alpha=16, init_lora_weights="pissa", target_modules=["0"], use_dora=True
    )
    theirs = get_peft_model(model, config).base_model.model[0]
    make = init.maker("pissa", {"r": 4, "layer_type": DoRALinear}, {"codebook": None})
    ours = make(weight, None)
    assert same_bits(ours.lora_A, theirs.lora_A["default"].weight)
    our_magnitude = ours.lora_magnitude_vector.weight
    their_magnitude = theirs.lora_magnitude_vector["default"].weight
    their_error = gamma(shape[1] + 8) * weight.double().norm(dim=1)  # of dense float32 sums
    both = 2 * bound_of_norm(ours).error + their_error
    assert ((our_magnitude - their_magnitude).abs() <= both).all()


def test_a_run_with_use_dora_is_merged_as_peft_merges_it(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tiny = save_tiny_llama(tmp_path / "model")
    out = tmp_path / "out"
    book = tmp_path / "book.txt"
    book.write_text(" ".join(f"The {n}th of the numbers is {n}." for n in range(400)))
    flags = ["--model", str(tiny), "--output-dir", str(out), "--data", str(book)]
    flags += "--max-seq-len 32 --max-steps 3 --batch-size 2 --dtype float32".split()
    assert train.main([*flags, "--use-dora", "--save-every", "2"]) == 0
    names = load_file(out / "adapter_model.safetensors").keys()
    assert sum(name.endswith("lora_magnitude_vector") for name in names) == 14
    assert train.main([*flags, "--resume"]) == 1
    assert "use_dora was True, is False" in capsys.readouterr().err
    assert train.main(["--adapter", str(out), "--merge", str(tmp_path / "merged")]) == 0
    assert train.main(["--adapter", str(out), "--merge-4bit", str(tmp_path / "merged-4bit")]) == 0
    assert "A merge into 4 bits keeps" in capsys.readouterr().out
    ours, _ = use_adapter.load_adapted_model(Options(adapter=out, device="cpu"), torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64)
    for name, layer in peft_adapter.adapted_layers(ours).items():
        dense.get_submodule(name).weight.data = layer.base(torch.float64)
    theirs = PeftModel.from_pretrained(dense, out).merge_and_unload()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    for name, layer in peft_adapter.adapted_layers(ours).items():
        weight = merged.get_submodule(name).weight
        base = layer.base(torch.float64)
        their = theirs.get_submodule(name).weight
        assert weight.dtype == torch.bfloat16 and not torch.equal(weight.double(), base)
        # At most 8 float32 roundings of numbers no larger than these, and the cast.
        sums = cast(8 * (their.abs() + base.abs()), torch.float32)
        error = (weight.double() - their).abs()
        assert (error <= cast(their.abs(), torch.bfloat16) + sums).all(), name


def test_a_row_of_zeros_is_finite_where_peft_makes_it_nan() -> None:
    plain = nn.Sequential(nn.Linear(8, 4))
    plain[0].weight.data[2] = 0
    ours = lora.attach(copy.deepcopy(plain), layer_type=DoRALinear, r=2, codebook=None)
    x = torch.randn(3, 8)
    assert same_bits(ours(x), plain(x))
    theirs = get_peft_model(plain, LoraConfig(r=2, target_modules=["0"], use_dora=True))
    assert theirs(x)[:, 2].isnan().all()  # if this fails, remove the exception


def test_dropout_leaves_the_frozen_branch_alone_where_peft_drops_its_inputs_too() -> None:
    """B is zero, so only the frozen branch is left, and m is doubled."""
    plain = nn.Sequential(nn.Linear(8, 4, bias=False))
    x = torch.randn(3, 8)
    settings = {"layer_type": DoRALinear, "r": 2, "codebook": None, "lora_dropout": 0.5}
    ours = lora.attach(copy.deepcopy(plain), **settings).train()
    config = LoraConfig(r=2, target_modules=["0"], use_dora=True, lora_dropout=0.5)
    theirs = get_peft_model(copy.deepcopy(plain), config).train()
    with torch.no_grad():
        for model in (ours, theirs):
            next(p for name, p in model.named_parameters() if "magnitude" in name).mul_(2)
    assert torch.equal(ours(x), 2 * plain(x))
    # If this fails, PEFT leaves the frozen branch alone too: remove the exception.
    assert not torch.equal(theirs(x), ours(x))
