"""A step of a run, weighed: what is predicted is what is measured, and measuring changes no bit."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_base_model import SMALL
from test_formula import APART, GROUPED, WIDE, config_of
from torch import nn
from transformers import AutoModelForCausalLM, PhiConfig, PretrainedConfig

import train
from data import dataset as data
from data import packing
from helpers import models
from helpers.bounds import OF_A_PEAK
from lora import attach
from memory import formula as predict
from memory import weigh
from nf4 import normal_float
from paged_optim import PagedAdamW
from training import report
from training.dtypes import resolve_device_and_dtype
from training.loss_and_eval import LabelLoss
from training.options import QUANT, Options, parse_args

LASTING = [
    "linear layers",
    "embedding, head",
    "norms, biases",
    "adapters",
    "gradients",
    "AdamW moments",
]


def setting(
    config: PretrainedConfig, flags: str
) -> tuple[Options, nn.Module, torch.optim.Optimizer]:
    """What train.py would have made of these flags and a random model."""
    args = resolve_device_and_dtype(parse_args(["--device", "cpu", *flags.split()]))
    torch.manual_seed(0)
    codebook = normal_float(QUANT[args.quant]) if QUANT[args.quant] else None
    model = attach(
        AutoModelForCausalLM.from_config(config, dtype=args.dtype).train(),
        r=args.lora_r,
        codebook=codebook,
        lora_dropout=args.lora_dropout,
        block_size=args.block_size,
        double_quant=not args.no_double_quant,
    )
    if args.grad_checkpoint:
        model.activation_checkpointing_enable()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kind = {"paged_adamw": partial(PagedAdamW, page_bytes=2**14), "adamw": torch.optim.AdamW}[
        args.optim
    ]
    return args, model, kind(parameters)


def batches(vocabulary: int, lengths: list[int], args: Options) -> list[data.Batch]:
    """One a pass: rows of these lengths, of which the second half is learnt."""
    examples = []
    for length in lengths:
        ids = torch.randint(3, vocabulary, (length,)).tolist()
        examples.append(data.Example(ids, [data.IGNORE_INDEX] * (length // 2) + ids[length // 2 :]))
    examples = packing.pack(examples, max(lengths)) if args.packing else examples
    return [data.collate(examples, 0)] * args.grad_accum


def weighed(
    config: PretrainedConfig, flags: str, lengths: list[int], steps: int = 2
) -> dict[str, dict[str, int | None]]:
    """The last of a few steps."""
    args, model, optimizer = setting(config, flags)
    passes = batches(config.vocab_size, lengths, args)
    for _ in range(steps):
        work = partial(train.train_step, LabelLoss(model, args.dtype), optimizer, passes, 0, args)
        (loss, _), found = weigh.step(work, model, optimizer, passes, args)
    assert loss > 0 and not optimizer._optimizer_step_pre_hooks
    return found


PLAIN = ["", "--grad-checkpoint", "--packing --grad-checkpoint"]
OTHERS = [
    "--quant none",
    "--grad-accum 2",
    "--lora-dropout 0.1",
    "--optim adamw",
    "--packing",
    "--quant nf3 --lora-r 4",
    "--no-double-quant --block-size 128",
    "--lora-dropout 0.2 --grad-checkpoint",
]
RUNS = [
    (shape, f"{flags} --dtype {dtype}")
    for shape in (WIDE, GROUPED, APART)
    for flags in PLAIN
    for dtype in ("bfloat16", "float32")
] + [(GROUPED, f"{flags} --dtype bfloat16") for flags in OTHERS]


@pytest.mark.parametrize("lengths", [[120, 120], [100, 60, 31]], ids=["even", "padded"])
@pytest.mark.parametrize(("shape", "flags"), RUNS)
def test_a_step_weighs_what_was_predicted(
    shape: predict.Shape, flags: str, lengths: list[int]
) -> None:
    found = weighed(config_of(shape), flags, lengths)
    assert list(found) == [*LASTING, "peak of a step"]
    for name in LASTING:
        assert found[name]["predicted"] == found[name]["measured"] > 0, name
    peak = found["peak of a step"]
    lasting = sum(found[name]["measured"] for name in LASTING if name != "gradients")
    assert abs(peak["predicted"] - peak["measured"]) <= OF_A_PEAK * (peak["measured"] - lasting), (
        peak,
        lasting,
    )


def test_in_the_first_step_the_moments_come_when_the_activations_have_left() -> None:
    first, second = (
        weighed(config_of(WIDE), "--dtype bfloat16", [9, 9], steps)["peak of a step"]
        for steps in (1, 2)
    )
    assert first["measured"] < second["measured"]
    for peak in (first, second):
        assert abs(peak["predicted"] - peak["measured"]) <= OF_A_PEAK * peak["measured"]


def test_moments_that_wait_in_a_file_are_not_in_memory() -> None:
    args, model, _ = setting(config_of(WIDE), "--dtype bfloat16 --lora-r 64")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    passes, peaks = batches(100, [30, 30], args), []
    for budget in (None, 2**16):
        optimizer = PagedAdamW(parameters, page_bytes=2**14, resident_bytes=budget)
        for _ in range(2):
            work = partial(
                train.train_step, LabelLoss(model, args.dtype), optimizer, passes, 0, args
            )
            _, found = weigh.step(work, model, optimizer, passes, args)
        assert found["AdamW moments"]["predicted"] == found["AdamW moments"]["measured"]
        peak = found["peak of a step"]
        assert abs(peak["predicted"] - peak["measured"]) <= OF_A_PEAK * peak["measured"]
        peaks.append(peak["measured"])
    assert peaks[0] - peaks[1] > found["AdamW moments"]["measured"] / 2


def test_what_the_ledger_does_not_know_is_measured_alone() -> None:
    found = weighed(PhiConfig(**SMALL), "--dtype bfloat16", [20, 10])
    assert all(row["predicted"] is None and row["measured"] > 0 for row in found.values())
    row = {"elements": 1, "bytes_16bit": 1, "bytes_now": 1}
    text = report.table(
        {
            "components": dict.fromkeys(LASTING[:4], tuple(row.values())),
            "base_bytes_16bit": 1,
            "base_bytes_4bit": 1,
            "bits_per_weight": 4,
            "memory": found,
            "metric": "perplexity",
            "before": 2.0,
            "after": 1.0,
            "before_unseen": None,
            "quant": "nf4",
            "trainable_parameters": 1,
            "total_parameters": 2,
            "pager": {},
            "seconds": 1,
            "steps": 1,
            "tokens_per_second": 1,
            "seconds_total": 1,
            "peak_rss_bytes": 1,
        }
    )
    assert f"  {'gradients':30}{'-':>15}{found['gradients']['measured']:>15,}\n" in text


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save_tiny_llama(tmp_path_factory.mktemp("tiny"))


def test_weighing_changes_no_bit_and_a_run_without_steps_weighs_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "book.txt").write_text("the quick brown fox jumps over the lazy dog. " * 300)
    flags = [
        "--model",
        str(tiny),
        "--data",
        str(tmp_path / "book.txt"),
        "--max-seq-len",
        "64",
        "--max-steps",
        "3",
        "--batch-size",
        "2",
        "--lora-dropout",
        "0.2",
    ]
    assert train.main([*flags, "--output-dir", str(tmp_path / "weighed")]) == 0
    assert (
        "bytes of a step                       predicted       measured" in capsys.readouterr().out
    )
    assert train.main([*flags, "--output-dir", str(tmp_path / "weighed"), "--resume"]) == 0
    assert "bytes of a step" not in capsys.readouterr().out
    monkeypatch.setattr(weigh, "step", lambda work, *rest: (work(), {}))
    assert train.main([*flags, "--output-dir", str(tmp_path / "not")]) == 0
    one, other = (
        load_file(tmp_path / name / "state-000003.safetensors") for name in ("weighed", "not")
    )
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
