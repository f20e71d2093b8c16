"""The pieces in the loops of others: Accelerate, the Trainer of transformers, and one's own."""

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset
from safetensors.torch import load_file
from test_paged_optim import TorchAdamW
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

import lora
from helpers.models import save_tiny_llama, tiny_llama, tokenizer, trained
from helpers.pages import ROOT
from paged_optim import PagedAdamW

VOCAB_SIZE = 256
SETTINGS = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "save_steps": 2,
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
CODE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)

# Of the libraries: TRL's default settings, Trainer without a GPU, and torch while it traces
pytestmark = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:'pin_memory' argument is set as true:UserWarning",
    "ignore:.* should not be instantiated:DeprecationWarning",
)


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
    args = TrainingArguments(folder, **SETTINGS)
    optimizers = (make(model), None)
    trainer = Trainer(model, args, train_dataset=rows(8), optimizers=optimizers)
    trainer.add_callback(StopAfter(stop))
    trainer.train(resume_from_checkpoint=resume)
    return bits_of(model)


def sft_steps(folder: Path, stop: int, resume: bool) -> dict[str, bytes]:
    """The same with the SFTTrainer of TRL."""
    model = adapted_model(lora_dropout=0.1)
    data = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows(8)])
    trainer = SFTTrainer(
        model,
        SFTConfig(folder, bf16=False, activation_checkpointing=False, **SETTINGS),
        train_dataset=data,
        processing_class=tokenizer(),
        optimizers=(paged(model), None),
    )
    trainer.add_callback(StopAfter(stop))
    trainer.train(resume_from_checkpoint=resume)
    return bits_of(model)


def test_with_the_trainer_a_run_that_was_saved_continues_with_the_same_bits(tmp_path: Path) -> None:
    expected = trainer_steps(tmp_path / "whole", paged, stop=4, resume=False)
    trainer_steps(tmp_path / "parts", paged, stop=2, resume=False)
    assert trainer_steps(tmp_path / "parts", paged, stop=4, resume=True) == expected


def test_with_the_sfttrainer_a_run_that_was_saved_continues_with_the_same_bits(
    tmp_path: Path,
) -> None:
    expected = sft_steps(tmp_path / "whole", stop=4, resume=False)
    sft_steps(tmp_path / "parts", stop=2, resume=False)
    assert (
        sft_steps(tmp_path / "parts", stop=4, resume=True) == expected != bits_of(adapted_model())
    )


# Saved by the wrong call


def test_from_pretrained_refuses_what_save_pretrained_wrote_after_attach(tmp_path: Path) -> None:
    """It would start its linear layers at random. Trainer saves and loads such folders."""
    adapted_model().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    twin = adapted_model()
    assert not twin.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)[1]


def test_a_state_of_torch_distributed_checkpoint_is_taken_and_loaded() -> None:
    """It looks up every key of the state as an attribute of the model."""
    model = adapted_model()
    state = {name: value.clone() for name, value in get_model_state_dict(model).items()}
    twin = adapted_model()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    set_model_state_dict(twin, state)
    assert all(map(torch.equal, twin.parameters(), model.parameters()))


# The examples of docs/library.md


def examples() -> dict[str, str]:
    """The code of each section of the page."""
    sections = (ROOT / "docs/library.md").read_text().split("\n## ")
    found = {section.partition("\n")[0]: CODE.search(section) for section in sections}
    return {title: match[1] for title, match in found.items() if match}


@pytest.mark.parametrize(("title", "code"), examples().items(), ids=list(examples()))
def test_an_example_of_the_page_runs_and_saves_an_adapter(
    title: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    save_tiny_llama(tmp_path / "my/model")
    data = rows(8)
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    names = {"rows": data, "batches": [{key: row[key][None] for key in row} for row in data[:2]]}
    exec(compile(code, title, "exec"), names | {"chats": [{"messages": turns}] * 8})
    saved = load_file("out/adapter_model.safetensors")
    assert len(saved) == 28 and any(tensor.any() for name, tensor in saved.items() if "_B" in name)


# What works on a model and an optimizer of torch works on ours


def loss_of(model: nn.Module, row: dict[str, Tensor]) -> Tensor:
    return model(**{name: ids[None] for name, ids in row.items()}).loss


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, n: int = 3) -> list[float]:
    """The losses of some steps on one row."""
    losses = []
    for _ in range(n):
        torch.manual_seed(1)  # of dropout
        loss = loss_of(model, rows(1)[0])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def loraplus(model: nn.Module, kind: type[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """LoRA+ (arXiv 2402.12354): B learns faster than A."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trained if name.endswith("A")], "lr": 1e-3},
        {"params": [p for name, p in trained if name.endswith("B")], "lr": 1e-2},
    ]
    return kind(groups, foreach=False) if kind is TorchAdamW else kind(groups)


def test_groups_of_loraplus_and_a_scheduler_give_the_losses_of_torch() -> None:
    ends = []
    for kind in (PagedAdamW, TorchAdamW):
        model = adapted_model()
        optimizer = loraplus(model, kind)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
        losses = []
        for _ in range(4):
            losses += steps(model, optimizer, n=1)
            scheduler.step()
        ends.append((losses, [group["lr"] for group in optimizer.param_groups]))
    assert ends[0] == ends[1]
    assert ends[0][0][-1] < ends[0][0][0]


def test_optimizers_that_step_in_backward_give_the_bits_of_one_step() -> None:
    together, alone = adapted_model(), adapted_model()
    optimizer = paged(together)
    loss_of(together, rows(1)[0]).backward()
    optimizer.step()
    optimizers = {}
    for parameter in alone.parameters():
        if parameter.requires_grad:
            optimizers[parameter] = PagedAdamW([parameter], lr=1e-2)
            parameter.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    loss_of(alone, rows(1)[0]).backward()
    assert bits_of(alone) == bits_of(together)


def test_checkpointed_activations_give_the_bits_of_kept_ones_with_dropout() -> None:
    ends = []
    for checkpointed in (False, True):
        model = adapted_model(lora_dropout=0.3)
        if checkpointed:
            model.activation_checkpointing_enable()
        losses = steps(model, paged(model))
        ends.append((losses, bits_of(model)))
    assert ends[0] == ends[1]


def test_a_compiled_model_has_the_loss_and_gradients_of_the_plain_one() -> None:
    plain, other = adapted_model(), adapted_model()
    compiled = torch.compile(other, backend="aot_eager")
    for model in (plain, compiled):
        loss_of(model, rows(1)[0]).backward()
    for ours, theirs in zip(plain.parameters(), other.parameters()):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            assert torch.equal(ours.grad, theirs.grad)


def test_an_adapted_layer_compiles_into_one_graph() -> None:
    model = lora.attach(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)))
    x = torch.randn(3, 64)
    assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))


def test_a_copy_and_an_average_follow_the_adapters_and_share_nothing() -> None:
    model = adapted_model()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    twin = copy.deepcopy(model)
    before = bits_of(model)
    optimizer = paged(model)
    steps(model, optimizer, n=1)
    average.update_parameters(model)  # the first update copies
    assert bits_of(average.module) == bits_of(model) != before
    assert bits_of(twin) == before
    middle = {name: p.detach().clone() for name, p in model.named_parameters()}
    steps(model, optimizer, n=1)
    average.update_parameters(model)
    now = dict(model.named_parameters())
    for name, parameter in average.module.named_parameters():
        if parameter.requires_grad:
            expected = middle[name].lerp(now[name], 0.5)
            assert torch.equal(parameter, expected)


@pytest.mark.parametrize(
    "how",
    [
        {"num_beams": 3},
        {"cache_implementation": "static"},
        {"assistant": True},
    ],
    ids=str,
)
def test_an_adapted_model_generates_what_the_merged_one_does(how: dict) -> None:
    """With a margin between tokens that rounding cannot close: the adapters are large."""
    model = trained(adapted_model()).eval()
    settings = {"max_new_tokens": 6, "do_sample": False} | how
    if settings.pop("assistant", None):
        settings["assistant_model"] = tiny_llama(vocab_size=VOCAB_SIZE)
    ids = rows(1)[0]["input_ids"][None]
    mask = torch.ones_like(ids)
    adapted = model.generate(ids, attention_mask=mask, **settings)
    merged, _ = lora.merge(model)
    assert torch.equal(merged.generate(ids, attention_mask=mask, **settings), adapted)
    assert adapted.shape == (1, 14)


def test_the_trainer_makes_the_steps_of_torch(tmp_path: Path) -> None:
    def plain(model: nn.Module) -> torch.optim.AdamW:
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return TorchAdamW(trainable, lr=1e-2, foreach=False)

    ours, theirs = (
        trainer_steps(tmp_path / make.__name__, make, stop=2, resume=False)
        for make in (paged, plain)
    )
    assert ours == theirs
