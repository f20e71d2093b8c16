"""The ledger against sums done by hand, and a step of a run against its prediction."""

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
from data import packing
from data.chat_template import IGNORE_INDEX
from data.dataset import Batch, Example, collate
from helpers import models
from helpers.bounds import OF_A_PEAK
from lora import attach
from memory import measured
from memory.formula import Shape
from paged_optim import PagedAdamW
from training import report
from training.base_check import quantization_of
from training.dtypes import resolve_device_and_dtype
from training.loss_and_eval import LabelLoss
from training.options import Options, parse_args
from training.preflight import step_settings

WEIGHTS = ["linear layers", "embedding, head", "norms, biases", "adapters"]
LASTING = [*WEIGHTS, "gradients", "AdamW moments"]


def test_the_ledger_counts_each_number_once_and_each_byte_that_is_there() -> None:
    model = models.tiny_llama(torch.bfloat16, vocab_size=1024)
    elements = sum(parameter.numel() for parameter in model.parameters())  # the head is tied
    rows = measured.ledger(attach(model, r=4))
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    adapters = sum(4 * (layer.in_features + layer.out_features) for layer in layers)
    assert rows["adapters"] == (adapters, 2 * adapters, 4 * adapters)
    assert rows["embedding, head"] == (1024 * 64, 2 * 1024 * 64, 2 * 1024 * 64)
    assert rows["norms, biases"] == (5 * 64, 2 * 5 * 64, 2 * 5 * 64)
    assert sum(row.elements for row in rows.values()) == elements + adapters
    not_counted = ("codebook", "inv_freq")
    buffers = [each for name, each in model.named_buffers() if not name.endswith(not_counted)]
    nbytes = sum(tensor.nbytes for tensor in [*model.parameters(), *buffers])
    assert sum(row.bytes_now for row in rows.values()) == nbytes


def test_bits_per_weight_are_those_of_the_paper() -> None:
    layer = nn.Sequential(nn.Linear(16384, 4, bias=False))
    summary = measured.summary(attach(layer, r=1))
    weights = 4 * 16384
    mean = 32 / weights
    assert summary["bits_per_weight"] == 4 + 8 / 64 + 32 / (64 * 256) + mean
    assert summary["trainable_parameters"] == 4 + 16384
    assert summary["total_parameters"] == weights + 4 + 16384
    assert summary["base_bytes_16bit"] == 2 * weights


def test_a_storage_is_counted_once_while_it_is_alive() -> None:
    kept = torch.zeros(100)
    mapped = torch.zeros(1000)
    with measured.Live(kept, kept[:10], outside=[mapped]) as live:
        assert live.now() == live.peak == 400
        other = kept + 1
        view = other.view(10, 10)
        mapped.copy_(mapped)
        assert live.now() == 800
        del other
        assert live.now() == 800, "its view still holds the bytes"
        del view
        assert live.now() == 400
        for _ in range(3):
            torch.zeros(50)  # each may have the address of the one before
    assert live.now() == 400 and live.peak == 800


def test_resident_memory_grows_by_what_is_touched() -> None:
    before = measured.rss_bytes()
    block = torch.ones(2**25)
    assert measured.rss_bytes() - before > block.nbytes // 2
    assert measured.peak_rss_bytes() >= measured.rss_bytes() - block.nbytes


def test_without_proc_the_resident_memory_is_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert measured.rss_bytes() == measured.peak_rss_bytes()


def setting(
    config: PretrainedConfig, flags: str
) -> tuple[Options, nn.Module, torch.optim.Optimizer]:
    """The options, model and optimizer of train.py with these flags and a random model."""
    args = resolve_device_and_dtype(parse_args(["--device", "cpu", *flags.split()]))
    torch.manual_seed(0)
    model = attach(
        AutoModelForCausalLM.from_config(config, dtype=args.dtype).train(),
        r=args.lora_r,
        lora_dropout=args.lora_dropout,
        **quantization_of(args),
    )
    if args.grad_checkpoint:
        model.activation_checkpointing_enable()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if args.optim == "adamw":
        return args, model, torch.optim.AdamW(parameters)
    return args, model, PagedAdamW(parameters, page_bytes=2**14)


def batches(vocabulary: int, lengths: list[int], args: Options) -> list[Batch]:
    """A batch per pass: rows of these lengths, the second half of each in the loss."""
    examples = []
    for length in lengths:
        ids = torch.randint(3, vocabulary, (length,)).tolist()
        labels = [IGNORE_INDEX] * (length // 2) + ids[length // 2 :]
        examples.append(Example(ids, labels))
    if args.packing:
        examples = packing.pack(examples, max(lengths))
    return [collate(examples, 0)] * args.grad_accum


Rows = dict[str, dict[str, int | None]]


def measured_step(
    args: Options, model: nn.Module, optimizer: torch.optim.Optimizer, passes: list[Batch]
) -> Rows:
    losses = LabelLoss(model, args.dtype)
    work = partial(train.train_step, losses, optimizer, passes, 0, args)
    settings = step_settings(args)
    (loss, _), rows = measured.measure_step(work, model, optimizer, passes, settings, 1)
    assert loss > 0 and not optimizer._optimizer_step_pre_hooks
    return rows


def last_step(config: PretrainedConfig, flags: str, lengths: list[int], steps: int = 2) -> Rows:
    """The last of a few steps."""
    args, model, optimizer = setting(config, flags)
    passes = batches(config.vocab_size, lengths, args)
    for _ in range(steps):
        rows = measured_step(args, model, optimizer, passes)
    return rows


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
def test_a_step_takes_what_was_predicted(shape: Shape, flags: str, lengths: list[int]) -> None:
    rows = last_step(config_of(shape), flags, lengths)
    assert list(rows) == [*LASTING, "peak of a step"]
    for name in LASTING:
        assert rows[name]["predicted"] == rows[name]["measured"] > 0, name
    peak = rows["peak of a step"]
    lasting = sum(rows[name]["measured"] for name in LASTING if name != "gradients")
    temporary = peak["measured"] - lasting
    assert abs(peak["predicted"] - peak["measured"]) <= OF_A_PEAK * temporary, (peak, lasting)


def is_close(peak: dict[str, int | None]) -> bool:
    return abs(peak["predicted"] - peak["measured"]) <= OF_A_PEAK * peak["measured"]


def test_in_the_first_step_the_moments_appear_after_the_activations_are_freed() -> None:
    config = config_of(WIDE)
    first = last_step(config, "--dtype bfloat16", [9, 9], steps=1)["peak of a step"]
    second = last_step(config, "--dtype bfloat16", [9, 9], steps=2)["peak of a step"]
    assert first["measured"] < second["measured"]
    assert is_close(first) and is_close(second)


def test_moments_that_wait_in_a_file_are_not_in_memory() -> None:
    args, model, _ = setting(config_of(WIDE), "--dtype bfloat16 --lora-r 64")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    passes = batches(100, [30, 30], args)
    peaks = []
    for budget in (None, 2**16):
        optimizer = PagedAdamW(parameters, page_bytes=2**14, resident_bytes=budget)
        for _ in range(2):
            rows = measured_step(args, model, optimizer, passes)
        moments = rows["AdamW moments"]
        assert moments["predicted"] == moments["measured"]
        assert is_close(rows["peak of a step"])
        peaks.append(rows["peak of a step"]["measured"])
    assert peaks[0] - peaks[1] > moments["measured"] / 2


def test_a_model_that_the_formula_does_not_know_is_measured_alone() -> None:
    rows = last_step(PhiConfig(**SMALL), "--dtype bfloat16", [20, 10])
    assert all(row["predicted"] is None and row["measured"] > 0 for row in rows.values())
    text = report.table(
        {
            "components": dict.fromkeys(WEIGHTS, (1, 1, 1)),
            "base_bytes_16bit": 1,
            "base_bytes_4bit": 1,
            "bits_per_weight": 4,
            "memory": rows,
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
            "peak_gpu_bytes": None,
        }
    )
    assert f"  {'gradients':30}{'-':>15}{rows['gradients']['measured']:>15,}\n" in text


def test_measuring_changes_no_bit_and_a_run_without_steps_measures_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    tiny = models.save_tiny_llama(tmp_path / "tiny")
    book = tmp_path / "book.txt"
    book.write_text("the quick brown fox jumps over the lazy dog. " * 300)
    flags = ["--model", str(tiny), "--data", str(book), "--max-seq-len", "64"]
    flags += ["--max-steps", "3", "--batch-size", "2", "--lora-dropout", "0.2"]
    heading = "bytes of a step                       predicted       measured"

    with_measuring = [*flags, "--output-dir", str(tmp_path / "measured")]
    assert train.main(with_measuring) == 0
    assert heading in capsys.readouterr().out
    assert train.main([*with_measuring, "--resume"]) == 0
    assert "bytes of a step" not in capsys.readouterr().out

    monkeypatch.setattr(measured, "measure_step", lambda work, *rest: (work(), {}))
    assert train.main([*flags, "--output-dir", str(tmp_path / "not")]) == 0
    one = load_file(tmp_path / "measured" / "state-000003.safetensors")
    other = load_file(tmp_path / "not" / "state-000003.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_ledger_of_a_model_without_adapters_counts_its_dense_linear_layers() -> None:
    model = models.tiny_llama(vocab_size=256).requires_grad_(False)
    row = measured.ledger(model)["linear layers"]
    assert row.elements > 0 and row.bytes_now == 4 * row.elements


def test_the_peak_of_a_gpu_is_that_of_torchs_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", {"cuda:1": 24}.get)
    assert measured.peak_gpu_bytes("cuda:1") == 24
    assert measured.peak_gpu_bytes("cpu") is None
