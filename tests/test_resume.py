"""The state of a run: going on from it gives the same bits, and what does not fit is refused before anything changes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import checkpoint
import files
import models
import resume
from paged_optim import PagedAdamW

IDS = torch.arange(5, 25)[None]


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
    whole = models.adapted(lora_dropout=0.3)
    first = optimizer_of(whole)
    take_steps(whole, first, 3)
    resume.save_state(whole, first, {"lr": "1"}, 3, [0.5, None], tmp_path / "state.safetensors")
    take_steps(whole, first, 3)

    torch.manual_seed(2)
    resumed = models.adapted(lora_dropout=0.3)
    second = optimizer_of(resumed, page_bytes=256, resident_bytes=1024)  # other pages, same bits
    assert resume.load_state(resumed, second, {"lr": "1"}, tmp_path / "state.safetensors") == (3, [0.5, None])
    take_steps(resumed, second, 3)
    for (name, ours), theirs in zip(checkpoint.adapter_tensors(resumed).items(), checkpoint.adapter_tensors(whole).values()):
        assert torch.equal(ours, theirs), name


def test_a_state_of_other_settings_or_none_or_half_of_one_is_refused(tmp_path: Path) -> None:
    model, path = models.adapted(), tmp_path / "state.safetensors"
    optimizer = optimizer_of(model)
    with pytest.raises(ValueError, match="there is no .* to resume from"):
        resume.load_state(model, optimizer, {}, path)
    take_steps(model, optimizer, 1)
    resume.save_state(model, optimizer, {"lr": "1", "seed": "0"}, 1, [0.0, 0.0], path)
    with pytest.raises(ValueError, match="lr was 1, is 2"):
        resume.load_state(model, optimizer, {"lr": "2", "seed": "0"}, path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="is damaged"):
        resume.load_state(model, optimizer, {"lr": "1", "seed": "0"}, path)
    save_file({"rng": torch.get_rng_state()}, path)
    with pytest.raises(ValueError, match="is not the state of a run"):
        resume.load_state(model, optimizer, {"lr": "1", "seed": "0"}, path)


def test_a_run_that_was_stopped_before_its_first_step_begins_again(tmp_path: Path) -> None:
    model, path = models.adapted(), tmp_path / "state.safetensors"
    optimizer = optimizer_of(model)
    resume.save_state(model, optimizer, {}, 0, [None, None], path)
    assert resume.load_state(model, optimizer, {}, path) == (0, [None, None])
    assert optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize("name, value", [("optimizer.0.exp_avg_sq", -1.0), ("optimizer.3.step", 2.0)])
def test_a_state_that_no_run_can_have_is_refused(tmp_path: Path, name: str, value: float) -> None:
    model, path = models.adapted(), tmp_path / "state.safetensors"
    optimizer = optimizer_of(model)
    take_steps(model, optimizer, 1)
    resume.save_state(model, optimizer, {}, 1, [0.0, 0.0], path)
    tensors, metadata = files.read_tensors(path), files.read_metadata(path)
    tensors[name].fill_(value)
    files.write_tensors(tensors, path, metadata)
    with pytest.raises(ValueError, match=f"{name} is not of step 1, or negative"):
        resume.load_state(model, optimizer, {}, path)
