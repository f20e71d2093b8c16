"""Adapters that PEFT reads and writes, states that go on bitwise, and files that are whole or not there."""

import errno
import json
from pathlib import Path

import pytest
import torch
from bounds import cast
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import checkpoint
import models
from lora import QLoRALinear, attach
from paged_optim import PagedAdamW

IDS = torch.arange(5, 25)[None]


def base() -> nn.Module:
    return models.tiny_llama(torch.float64, vocab_size=256)


def adapted(codebook: torch.Tensor | None = None, **settings: float) -> nn.Module:
    """A tiny model with adapters that do something; on its own dense base, to compare with PEFT's."""
    model = attach(base(), codebook=codebook, **({"r": 4, "lora_alpha": 8} | settings))
    for layer in model.modules():
        if isinstance(layer, QLoRALinear):
            nn.init.normal_(layer.lora_B, std=0.1)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def assert_the_same(ours: torch.Tensor, theirs: torch.Tensor, without: torch.Tensor) -> None:
    """Computed in float64 and equal as far as float32 can tell, which is far below what the adapter does."""
    bound = cast(theirs.abs(), torch.float32)
    assert ((ours - theirs).abs() <= bound).all()
    assert ((theirs - without).abs() > bound).any()


def test_peft_loads_our_adapter_and_computes_the_same(tmp_path: Path) -> None:
    model = adapted()
    checkpoint.save_adapter(model, tmp_path)
    plain = base()
    before = logits(plain)
    assert_the_same(logits(model), logits(PeftModel.from_pretrained(plain, tmp_path)), before)


def test_we_load_the_adapter_of_peft_and_compute_the_same(tmp_path: Path) -> None:
    plain = base()
    before = logits(plain)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    theirs = get_peft_model(plain, config)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path)
    ours = attach(base(), ["q_proj", "down_proj"], r=4, codebook=None)
    checkpoint.load_adapter(ours, tmp_path)
    assert_the_same(logits(ours), logits(theirs), before)


def test_a_model_without_adapters_gets_those_of_the_folder(tmp_path: Path) -> None:
    model = attach(base(), ["v_proj", "up_proj"], r=3)
    nn.init.normal_(model.model.layers[0].mlp.up_proj.lora_B)
    checkpoint.save_adapter(model, tmp_path)
    again = checkpoint.load_adapter(base(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert sum(isinstance(layer, QLoRALinear) for layer in again.modules()) == 4


def test_layers_whose_short_names_others_share_are_saved_by_their_whole_names(tmp_path: Path) -> None:
    model = attach(base(), ["layers.0.self_attn.q_proj"], r=3)
    checkpoint.save_adapter(model, tmp_path)
    assert checkpoint.read_config(tmp_path)["target_modules"] == ["model.layers.0.self_attn.q_proj"]


def rewrite(folder: Path, change: str) -> None:
    """Spoil an adapter folder in one of the ways that happen."""
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors, settings = load_file(weights), json.loads(config.read_text())
    if change == "no prefix":
        tensors = {name.removeprefix(checkpoint.PREFIX): tensor for name, tensor in tensors.items()}
    elif change == "other rank":
        tensors = {name: tensor[:2].contiguous() if "lora_A" in name else tensor for name, tensor in tensors.items()}
    elif change == "one missing":
        del tensors[next(iter(tensors))]
    elif change == "one too many":
        tensors["base_model.model.elsewhere.lora_A.weight"] = torch.zeros(4, 4)
    elif change == "rslora":
        settings["use_rslora"] = True
    elif change == "other kind":
        settings["peft_type"] = "IA3"
    save_file(tensors, weights)
    config.write_text(json.dumps(settings))
    if change == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif change == "garbage":
        weights.write_bytes(b"\xff" * 1000)
    elif change == "config garbage":
        config.write_text("{")
    elif change == "config list":
        config.write_text("[]")
    elif change == "gone":
        weights.unlink()
    elif change == "config gone":
        config.unlink()


@pytest.mark.parametrize("change, complaint", [
    ("no prefix", "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight is missing"),
    ("other rank", r"is \(2, 64\), the layer's is \(4, 64\)"),
    ("one missing", "is missing"), ("one too many", "elsewhere.lora_A.weight belongs to no adapted layer"),
    ("rslora", "asks for use_rslora"), ("other kind", "asks for IA3"), ("truncated", "is damaged"), ("garbage", "is damaged"),
    ("config garbage", "is not a JSON object"), ("config list", "is not a JSON object"),
    ("gone", "there is no .*adapter_model.safetensors"), ("config gone", "there is no .*adapter_config.json"),
])
def test_an_adapter_that_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path, change: str, complaint: str) -> None:
    checkpoint.save_adapter(adapted(), tmp_path)
    rewrite(tmp_path, change)
    model = adapted()
    before = logits(model)
    with pytest.raises(ValueError, match=complaint):
        checkpoint.load_adapter(model, tmp_path)
    assert torch.equal(logits(model), before)


def test_a_model_without_adapters_cannot_save_any(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the model has no adapters"):
        checkpoint.save_adapter(base(), tmp_path)


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    model.train()
    for _ in range(count):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def optimizer_of(model: nn.Module, **settings: int) -> PagedAdamW:
    return PagedAdamW([p for p in model.parameters() if p.requires_grad], **settings)


def test_a_resumed_run_ends_with_the_bits_of_one_that_never_stopped(tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = adapted(lora_dropout=0.3)
    first = optimizer_of(whole)
    take_steps(whole, first, 3)
    checkpoint.save_state(whole, first, {"lr": "1"}, 3, [0.5, None], tmp_path / "state.safetensors")
    take_steps(whole, first, 3)

    torch.manual_seed(2)
    resumed = adapted(lora_dropout=0.3)
    second = optimizer_of(resumed, page_bytes=256, resident_bytes=1024)  # other pages, same bits
    assert checkpoint.load_state(resumed, second, {"lr": "1"}, tmp_path / "state.safetensors") == (3, [0.5, None])
    take_steps(resumed, second, 3)
    for (name, ours), theirs in zip(checkpoint.adapter_tensors(resumed).items(), checkpoint.adapter_tensors(whole).values()):
        assert torch.equal(ours, theirs), name


def test_a_state_of_other_settings_or_none_or_half_of_one_is_refused(tmp_path: Path) -> None:
    model, path = adapted(), tmp_path / "state.safetensors"
    optimizer = optimizer_of(model)
    with pytest.raises(ValueError, match="there is no .* to resume from"):
        checkpoint.load_state(model, optimizer, {}, path)
    take_steps(model, optimizer, 1)
    checkpoint.save_state(model, optimizer, {"lr": "1", "seed": "0"}, 1, [0.0, 0.0], path)
    with pytest.raises(ValueError, match="lr was 1, is 2"):
        checkpoint.load_state(model, optimizer, {"lr": "2", "seed": "0"}, path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.load_state(model, optimizer, {"lr": "1", "seed": "0"}, path)
    save_file({"rng": torch.get_rng_state()}, path)
    with pytest.raises(ValueError, match="is not the state of a run"):
        checkpoint.load_state(model, optimizer, {"lr": "1", "seed": "0"}, path)


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_a_save_that_fails_at_any_moment_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    model = adapted()
    checkpoint.save_adapter(model, tmp_path)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for layer in model.modules():
        if isinstance(layer, QLoRALinear):
            nn.init.ones_(layer.lora_B)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    target = {"write": (checkpoint, "save_file"), "fsync": (checkpoint.os, "fsync"), "replace": (checkpoint.os, "replace")}
    monkeypatch.setattr(*target[moment], full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save_adapter(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old


def test_a_folder_that_cannot_be_written_or_is_too_small_is_found_out_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written to .*choose another --output-dir"):
        checkpoint.claim(tmp_path / "file" / "out")
    with pytest.raises(ValueError, match="too little free space"):
        checkpoint.claim(tmp_path / "out", nbytes=2**60)
    checkpoint.claim(tmp_path / "out", nbytes=1)
    assert list((tmp_path / "out").iterdir()) == []
