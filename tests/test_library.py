"""The pieces in the loops of others: Accelerate, the Trainer of transformers, and one's own."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import lora
from helpers.models import tiny_llama
from paged_optim import PagedAdamW

VOCAB_SIZE = 256


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its state in classes."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def adapted_model(**settings: object) -> nn.Module:
    torch.manual_seed(0)
    model = lora.attach(tiny_llama(vocab_size=VOCAB_SIZE), r=4, **settings)
    return model.train()


def paged(model: nn.Module) -> PagedAdamW:
    """With pages that do not all fit."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return PagedAdamW(trainable, lr=1e-2, page_bytes=1024, resident_bytes=4096)


def rows(n: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCAB_SIZE, (n, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def bits_of(model: nn.Module) -> dict[str, bytes]:
    """The bits of everything that is trained."""
    return {
        name: parameter.detach().numpy().tobytes()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


# Save and resume


def accelerated_steps(folder: Path, steps: range, resume: bool, save: bool) -> dict[str, bytes]:
    """The adapters after some steps with Accelerate, from a saved state or from the start."""
    accelerator = Accelerator(cpu=True)
    model = adapted_model(lora_dropout=0.1)
    model, optimizer = accelerator.prepare(model, paged(model))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, lambda step: 1 / (step + 1))
    accelerator.register_for_checkpointing(scheduler)
    if resume:
        accelerator.load_state(folder)
    data = rows(steps.stop)
    for step in steps:
        batch = {name: row[None] for name, row in data[step].items()}
        accelerator.backward(model(**batch).loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    if save:
        accelerator.save_state(folder)
    return bits_of(model)


def test_with_accelerate_a_run_that_was_saved_continues_with_the_same_bits(tmp_path: Path) -> None:
    expected = accelerated_steps(tmp_path, range(4), resume=False, save=False)
    accelerated_steps(tmp_path, range(2), resume=False, save=True)
    assert accelerated_steps(tmp_path, range(2, 4), resume=True, save=False) == expected


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **others) -> None:  # noqa: ANN001
        control.should_training_stop = state.global_step >= self.step


def trainer_steps(
    folder: Path, make: Callable[[nn.Module], torch.optim.Optimizer], stop: int, resume: bool
) -> dict[str, bytes]:
    """The adapters after `stop` of four steps with the Trainer of transformers."""
    model = adapted_model(lora_dropout=0.1)
    args = TrainingArguments(
        output_dir=folder,
        max_steps=4,
        per_device_train_batch_size=2,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    optimizers = (make(model), None)
    trainer = Trainer(model, args, train_dataset=rows(8), optimizers=optimizers)
    trainer.add_callback(StopAfter(stop))
    trainer.train(resume_from_checkpoint=resume)
    return bits_of(model)


def test_with_the_trainer_a_run_that_was_saved_continues_with_the_same_bits(tmp_path: Path) -> None:
    expected = trainer_steps(tmp_path / "whole", paged, stop=4, resume=False)
    trainer_steps(tmp_path / "parts", paged, stop=2, resume=False)
    assert trainer_steps(tmp_path / "parts", paged, stop=4, resume=True) == expected


# Saved by the wrong call


def test_from_pretrained_refuses_what_save_pretrained_wrote_after_attach(tmp_path: Path) -> None:
    """It would start its linear layers at random. Trainer saves and loads such folders."""
    adapted_model().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    twin = adapted_model()
    assert not twin.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)[1]
