"""The program from end to end: a few steps on the real model; a tiny one stopped and resumed."""

import datetime
import itertools
import json
import math
import os
import re
import signal
from functools import partial
from pathlib import Path

import bitsandbytes
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_paged_optim import TorchAdamW
from transformers import AutoModelForCausalLM

import train
from checkpoints import base_model, peft_adapter, sources
from data import dataset
from helpers import models
from helpers.bounds import OF_A_PEAK
from lora import QLoRALinear, attach
from memory import measured
from training import distributed, loss_and_eval, preflight, use_adapter
from training import report as run_report
from training.dtypes import resolve_device_and_dtype
from training.options import Options
from training.state import latest_state

REPORT_KEYS = set(
    """
    metric before after before_unseen after_unseen seconds steps tokens_per_second peak_rss_bytes
    bits_per_weight base_bytes_16bit base_bytes_4bit trainable_parameters total_parameters pager
    seed versions
""".split()
)
METRIC_KEYS = {"step", "loss", "tokens", "seconds", "lr", "grad_norm", "rss_bytes"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def few_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold out 4 + 2 questions instead of 150: generation is most of a short run."""
    load_task = dataset.load_task

    def load(*args: object) -> dataset.Task:
        task = load_task(*args)
        return dataset.Task(task.metric, task.train, task.test[:4], task.unseen[:2])

    monkeypatch.setattr(dataset, "load_task", load)


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_real_model_learns_and_its_adapter_comes_back_to_the_same_logits(
    tmp_path: Path, few_questions: None, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert train.main(["--output-dir", str(out), "--max-steps", "8", "--resident-mb", "4"]) == 0
    assert {path.name for path in out.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "generation_config.json",
        "metrics.jsonl",
        "report.json",
        "loss.png",
        *(f"state-00000{step}.safetensors" for step in (0, 8)),
    }
    metrics = lines_of(out)
    assert [line["step"] for line in metrics] == list(range(1, 9))
    assert all(line.keys() >= METRIC_KEYS for line in metrics)
    losses = [line["loss"] for line in metrics]
    assert sum(losses[-2:]) < sum(losses[:2]) / 2

    report = json.loads((out / "report.json").read_text())
    assert report.keys() >= REPORT_KEYS
    assert report["before"] == 0 and report["steps"] == 8 and report["metric"] == "exact match"
    weights = 106_168_320  # 210 layers: 30 of (576 + 2 * 192 + 576 + 3 * 1536) * 576
    bits = 4 + 8 / 64 + 32 / (64 * 256) + 210 * 32 / weights + partial_blocks() / weights
    assert report["bits_per_weight"] == bits
    adapter = load_file(out / "adapter_model.safetensors")
    assert report["trainable_parameters"] == sum(tensor.numel() for tensor in adapter.values())
    embedding = 49152 * 576
    norms = 61 * 576
    assert report["base_bytes_16bit"] == 2 * (weights + embedding + norms)
    assert report["pager"]["evictions"] > 0
    assert report["pager"]["bytes_in"] > 0
    *lasting, peak = report["memory"].values()
    assert len(lasting) == 6
    assert all(row["predicted"] == row["measured"] > 0 for row in lasting), "to the byte"
    assert abs(peak["predicted"] - peak["measured"]) <= OF_A_PEAK * peak["measured"]
    assert "4.127 bits a weight" in capsys.readouterr().out

    assert_same_logits_after_reload(out)


def partial_blocks() -> float:
    """Bits of the second-level constants beyond 32/(64 * 256) a weight.

    They are there because 256 does not divide the number of blocks of a layer.
    """
    shapes = [576 * 576, 192 * 576, 192 * 576, 576 * 576, 1536 * 576, 1536 * 576, 576 * 1536]
    return 30 * sum(32 * (-(-n // 64 // 256) - n / 64 / 256) for n in shapes)


def assert_same_logits_after_reload(out: Path) -> None:
    """A loaded adapter gives the logits of its tensors copied by hand, by PEFT's names."""
    ids = torch.arange(100, 120)[None]
    folder = sources.default_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    by_hand = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    peft_adapter.load_adapter(attach(model), out)
    with torch.no_grad():
        ours = model(input_ids=ids).logits
    attach(by_hand)
    tensors = load_file(out / "adapter_model.safetensors")
    for name, layer in by_hand.named_modules():
        if isinstance(layer, QLoRALinear):
            layer.lora_A.data = tensors.pop(f"base_model.model.{name}.lora_A.weight")
            layer.lora_B.data = tensors.pop(f"base_model.model.{name}.lora_B.weight")
    with torch.no_grad():
        assert torch.equal(by_hand(input_ids=ids).logits, ours)
    assert not tensors


def run(tiny: Path, out: Path, *more: str) -> int:
    folders = ["--model", str(tiny), "--output-dir", str(out)]
    flags = "--max-steps 6 --batch-size 2 --dtype float32 --lora-dropout 0.1".split()
    return train.main([*folders, *flags, *more])


def assert_same_tensors(one: Path, other: Path) -> None:
    tensors = load_file(one)
    others = load_file(other)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[key], others[key]) for key in tensors), one.name


def test_a_run_stopped_by_ctrl_c_and_resumed_ends_with_the_same_bits(
    tiny: Path,
    tmp_path: Path,
    few_questions: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    assert run(tiny, tmp_path / "uninterrupted") == 0
    real = train.train_step
    steps = []

    def interrupted(*args: object) -> tuple[float, float]:
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(train, "train_step", interrupted)
    assert run(tiny, tmp_path / "parts") == 130
    assert len(lines_of(tmp_path / "parts")) == 3
    assert "--resume" in capsys.readouterr().err
    with open(tmp_path / "parts" / "metrics.jsonl", "a", encoding="utf-8") as log:
        log.write('{"step": 4, "loss": 0.')  # as a kill in mid-write would leave it
    # With MKL, torch's roots are not rounded to nearest everywhere.
    monkeypatch.setattr(torch.optim, "AdamW", TorchAdamW)
    assert run(tiny, tmp_path / "parts", "--resume", "--optim", "adamw") == 0
    assert len(steps) == 6
    for name in ("adapter_model.safetensors", "state-000006.safetensors"):
        assert_same_tensors(tmp_path / "uninterrupted" / name, tmp_path / "parts" / name)
    losses = [line["loss"] for line in lines_of(tmp_path / "uninterrupted")]
    assert losses == [line["loss"] for line in lines_of(tmp_path / "parts")]


def test_a_resumed_run_keeps_the_date_that_its_chat_template_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = models.save_tiny_llama(tmp_path / "model")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text("{{ strftime_now('%d %B %Y') }}" + template)
    row = json.dumps({"prompt": "Who?", "completion": "Me."})
    (tmp_path / "rows.jsonl").write_text(f"{row}\n" * 4)
    flags = ["--data", str(tmp_path / "rows.jsonl")]
    monkeypatch.setattr(preflight, "today", partial(datetime.date, 2026, 11, 28))
    assert run(folder, tmp_path / "out", *flags) == 0
    before = latest_state(tmp_path / "out")
    assert before.settings["date"] == "2026-11-28"
    monkeypatch.setattr(preflight, "today", partial(datetime.date, 2026, 11, 29))
    assert run(folder, tmp_path / "out", *flags, "--resume") == 0
    assert latest_state(tmp_path / "out").settings == before.settings

    older = before._replace(settings={})  # as a version saved it that did not know dates
    assert preflight._date_of(older) == datetime.date(2026, 11, 29)
    assert run(folder, tmp_path / "other", *flags) == 0
    data = "data (a hash of its token ids)"
    assert latest_state(tmp_path / "other").settings[data] != before.settings[data]

    (folder / "chat_template.jinja").write_text(template)
    assert run(folder, tmp_path / "dateless", *flags) == 0
    assert "date" not in latest_state(tmp_path / "dateless").settings, "a state has no other bytes"


def test_resuming_under_other_settings_says_which(
    tiny: Path, tmp_path: Path, few_questions: None, capsys: pytest.CaptureFixture
) -> None:
    assert run(tiny, tmp_path) == 0
    adapter = (tmp_path / "adapter_model.safetensors").read_bytes()
    assert run(tiny, tmp_path, "--resume", "--lr", "0.5", "--lora-alpha", "4") == 1
    complaint = "lora_alpha was 16.0, is 4.0; lr was 0.001, is 0.5. Use the old settings"
    assert f"{complaint} or --resume-anyway" in capsys.readouterr().err
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == adapter


def test_checkpointing_changes_no_gradient_and_accumulation_divides_by_the_labels_of_the_step(
    tiny: Path,
) -> None:
    def gradients(*flags: str) -> tuple[float, list[torch.Tensor]]:
        shape = "--dtype float32 --max-grad-norm 1e9 --batch-size 2 --grad-accum 2".split()
        args = resolve_device_and_dtype(train.parse_args(["--model", str(tiny), *shape, *flags]))
        tokenizer = models.tokenizer()
        model = train.load_model(args, tokenizer)
        task = dataset.load_task("orders", tokenizer, 256)
        batches = dataset.batches_of_step(task.train, 0, args.batch_size, args.grad_accum, 0, 2)
        params = [param for param in model.parameters() if param.requires_grad]
        optimizer = torch.optim.SGD(params, lr=1.0)
        kept = []

        def keep_gradients(*_: object) -> None:
            kept.extend(param.grad.clone() for param in params)

        optimizer.register_step_pre_hook(keep_gradients)
        losses = loss_and_eval.LabelLoss(model.train(), args.dtype)
        loss, _ = train.train_step(losses, optimizer, batches, 0, args)
        if not flags:  # by definition: the sum over all labels of the step, divided by their number
            model.load_state_dict(train.load_model(args, tokenizer).state_dict())
            total = sum(batch.n_labels for batch in batches)
            for batch in batches:
                (loss_and_eval.label_loss(model, batch, torch.float32) / total).backward()
            assert all(torch.equal(param.grad, grad) for param, grad in zip(params, kept))
        return loss, kept

    loss, plain = gradients()
    checkpointed_loss, checkpointed = gradients("--grad-checkpoint")
    assert any(grad.any() for grad in plain)
    assert loss == checkpointed_loss
    assert all(torch.equal(grad, other) for grad, other in zip(plain, checkpointed))


def test_compare_trains_16_bit_lora_too(
    tiny: Path, tmp_path: Path, few_questions: None, capsys: pytest.CaptureFixture
) -> None:
    assert run(tiny, tmp_path, "--compare") == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["compare"].keys() >= {"before", "after"}
    assert "16-bit LoRA, same seed" in capsys.readouterr().out
    assert (tmp_path / "16-bit" / "adapter_model.safetensors").exists()


@pytest.fixture
def book(tmp_path: Path) -> list[str]:
    """Flags for a text, which needs no generation."""
    (tmp_path / "book.txt").write_text("the quick brown fox jumps over the lazy dog. " * 300)
    return ["--data", str(tmp_path / "book.txt"), "--max-seq-len", "64"]


def test_text_is_measured_in_perplexity_and_it_falls(
    tiny: Path, book: list[str], tmp_path: Path
) -> None:
    assert run(tiny, tmp_path / "out", *book, "--lr", "0.02") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["metric"] == "perplexity"
    assert report["after"] < report["before"]
    assert report["before_unseen"] is None


def test_an_adapter_answers_a_prompt_word_by_word(
    tiny: Path,
    book: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        use_adapter, "encode_prompt", lambda tokenizer, prompt, system: tokenizer(prompt).input_ids
    )
    flags = "--max-steps 1 --quant nf3 --block-size 128".split()
    assert run(tiny, tmp_path, *book, *flags) == 0
    capsys.readouterr()
    flags = "--prompt Who? --max-seq-len 8 --dtype float32".split()
    assert train.main(["--adapter", str(tmp_path), *flags]) == 0
    streamed = capsys.readouterr().out
    model, tokenizer = use_adapter.load_adapted_model(
        Options(adapter=tmp_path, device="cpu"), torch.float32
    )
    layers = peft_adapter.adapted_layers(model).values()
    assert all(layer.base.codebook.numel() == 8 for layer in layers)
    prompt = tokenizer("Who?").input_ids
    [answer] = loss_and_eval.generate_answers(model, tokenizer, [prompt], 8, torch.float32)
    assert streamed.strip() == answer != ""


@pytest.mark.parametrize("start", ["pissa", "loftq"])
def test_a_start_that_changes_the_base_keeps_it_and_goes_on_from_it(
    tiny: Path, book: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    flags = [*book, "--lora-start", start, "--save-4bit", str(tmp_path / "base"), "--use-rslora"]
    flags += ["--save-every", "2"]
    out = tmp_path / "uninterrupted"
    parts = tmp_path / "parts"
    assert run(tiny, out, *flags) == 0
    parts.mkdir()
    real = train.train_step
    counter = itertools.count()

    def fail_once(*args: object) -> tuple[float, float]:
        if next(counter) == 3:
            raise ZeroDivisionError
        return real(*args)

    monkeypatch.setattr(train, "train_step", fail_once)
    with pytest.raises(ZeroDivisionError):
        run(tiny, parts, *flags)
    assert run(tiny, parts, *flags, "--resume") == 0
    file = "adapter_model.safetensors"
    assert_same_tensors(out / file, parts / file)

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = PeftModel.from_pretrained(base, out)
    ours, _ = use_adapter.load_adapted_model(Options(adapter=out, device="cpu"), torch.float32)
    assert ours.name_or_path == str(tmp_path / "base")
    for name, layer in peft_adapter.adapted_layers(ours).items():
        their = theirs.base_model.model.get_submodule(name)
        weight = their.base_layer.weight
        dense = bitsandbytes.functional.dequantize_4bit(weight, weight.quant_state)
        assert torch.equal(layer.base(), dense)
        assert their.scaling["default"] == layer.scaling == 16 / math.sqrt(8)
        assert torch.equal(layer.lora_A, their.lora_A["default"].weight)


def test_a_start_from_dense_weights_needs_them(
    tiny: Path, book: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = [*book, "--max-steps", "1"]
    assert run(tiny, tmp_path / "out", *flags, "--save-4bit", str(tmp_path / "base")) == 0
    again = ["--save-4bit", str(tmp_path / "other"), "--lora-start", "loftq"]
    assert run(tmp_path / "base", tmp_path / "dense", *book, *again) == 1
    assert "--lora-start loftq needs dense weights, and" in capsys.readouterr().err
    assert run(tmp_path / "base", tmp_path / "4-bit", *flags) == 0, "a 4-bit folder is a model"
    models.save_tiny_llama(tmp_path / "other model")
    other = ["--save-4bit", str(tmp_path / "other model")]
    assert run(tiny, tmp_path / "another", *book, *other) == 1
    assert "holds a model that is not in 4 bits" in capsys.readouterr().err


def test_an_error_that_no_lost_process_explains_is_not_explained_by_one(
    tiny: Path, book: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("peer gynt")

    monkeypatch.setattr(train, "train_step", fail)
    with pytest.raises(RuntimeError, match="peer gynt"):
        run(tiny, tmp_path / "out", *book)


def test_measuring_on_the_way_changes_no_bit_and_is_drawn(
    tiny: Path,
    book: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    drawn = []
    plot_loss = run_report.plot_loss

    def record_and_plot(*args: object) -> None:
        drawn.append(args[2])
        plot_loss(*args)

    monkeypatch.setattr(run_report, "plot_loss", record_and_plot)
    without = tmp_path / "without"
    measuring = tmp_path / "with"
    assert run(tiny, without, *book, "--group-by-length") == 0
    assert run(tiny, measuring, *book, "--group-by-length", "--eval-steps", "2") == 0
    one = load_file(without / "state-000006.safetensors")
    other = load_file(measuring / "state-000006.safetensors")
    assert all(torch.equal(one[key], other[key]) for key in one)
    measured = {line["step"]: line["eval"] for line in lines_of(measuring) if "eval" in line}
    assert list(measured) == [2, 4]
    for value, unseen in measured.values():
        assert math.isfinite(value)
        assert unseen is None
    assert drawn == ["perplexity"] * 4
    assert f"step 2: perplexity {measured[2][0]:.4f}" in capsys.readouterr().out
    assert (measuring / "loss.png").read_bytes() != (without / "loss.png").read_bytes()


def test_a_preview_reads_no_weights_and_writes_nothing(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        pytest.fail("reads weights")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    monkeypatch.chdir(tmp_path)
    assert train.main(["--model", str(tiny), "--preview"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("--- ") == 3 and '⟦{"name"' in shown and "\033" not in shown
    assert not list(tmp_path.iterdir())


def test_packed_rows_train_and_resuming_without_packing_is_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": f"{i}?", "completion": f"{i}!"}) for i in range(40)]
    rows.write_text("\n".join(lines) + "\n")
    flags = ["--data", str(rows), "--lr", "0.02"]
    assert run(tiny, tmp_path / "out", *flags, "--packing", "--max-seq-len", "128") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["metric"] == "perplexity" and report["after"] < report["before"]
    capsys.readouterr()
    assert run(tiny, tmp_path / "out", *flags, "--max-seq-len", "128", "--resume") == 1
    assert "packing was True, is False" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (["--model", "nowhere/at-all/three"], "neither a folder nor a hub id within reach"),
        (["--data", "nothing.jsonl"], "--data nothing.jsonl is not a file"),
        (["--max-seq-len", "9999"], "longer than the model's context of 512 tokens"),
        (["--max-seq-len", "16"], "more than --max-seq-len 16"),
        (["--resume"], "there is no state in .* to resume from: start without --resume"),
    ],
)
def test_bad_input_gets_one_line_and_starts_nothing(
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    flags: list[str],
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sources.HfApi, "model_info", lambda *args, **kwargs: 1 / 0)
    monkeypatch.setattr(train, "evaluate", lambda *args: pytest.fail("got as far as evaluating"))
    assert train.main(["--model", str(tiny), "--output-dir", str(tmp_path / "out"), *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith("train.py: ") and error.count("\n") == 1
    assert re.search(complaint, error), error


def test_an_output_folder_that_cannot_be_written_is_found_out_before_loading(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "load_model", lambda *args: pytest.fail("loaded a model first"))
    (tmp_path / "file").write_text("")
    assert train.main(["--output-dir", str(tmp_path / "file" / "out")]) == 1
    assert "choose another --output-dir" in capsys.readouterr().err


def test_a_nan_in_a_weight_is_named_by_layer_count_and_index(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = models.tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    model.save_pretrained(tmp_path)
    models.tokenizer().save_pretrained(tmp_path)
    assert train.main(["--model", str(tmp_path), "--output-dir", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "layer model.layers.1.mlp.up_proj: 1 of 8192 weights" in error and "(3, 5)" in error


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_spoils_the_adapter(
    tiny: Path,
) -> None:
    args = resolve_device_and_dtype(train.parse_args(["--model", str(tiny), "--dtype", "float32"]))
    tokenizer = models.tokenizer()
    model = train.load_model(args, tokenizer)
    layer = next(layer for layer in model.modules() if isinstance(layer, QLoRALinear))
    torch.nn.init.constant_(layer.lora_B, float("inf"))
    before = layer.lora_A.detach().clone()
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.SGD(params, lr=1.0)
    task = dataset.load_task("orders", tokenizer, 256)
    batches = dataset.batches_of_step(task.train, 0, 2, 1, 0, 2)
    with pytest.raises(ValueError, match="the gradient is not finite"):
        train.train_step(loss_and_eval.LabelLoss(model, args.dtype), optimizer, batches, 0, args)
    assert torch.equal(layer.lora_A, before)


def test_the_learning_rate_warms_up_and_comes_down() -> None:
    args = train.parse_args(["--max-steps", "100", "--lr", "1"])
    rates = [train.learning_rate(step, args) for step in range(100)]
    assert rates[:10] == [(step + 1) / 10 for step in range(10)]
    assert all(rate >= following for rate, following in zip(rates[9:], rates[10:]))
    assert rates[10] == 1
    tenth = args.lr / 10
    angle = math.pi / 90  # one step before the end of half a turn; 1 - cos x <= x^2 / 2
    assert tenth <= rates[-1] <= tenth + (args.lr - tenth) / 2 * angle**2 / 2


def files_of(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_an_earlier_run_is_kept_until_overwrite_and_then_nothing_of_it_is_left(
    tiny: Path, book: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert run(tiny, out, *book, "--eval-every", "2") == 0
    before = files_of(out)
    for more in ([], ["--lr", "0.5"], ["--dry-run"]):
        assert run(tiny, out, *book, *more) == 1
        error = capsys.readouterr().err
        assert f"train.py: {out} holds an earlier run (report.json, loss.png, adapter" in error
    assert run(tiny, out, *book, "--overwrite", "--max-seq-len", "9999") == 1
    assert run(tiny, out, *book, "--overwrite", "--dry-run") == 0
    assert files_of(out) == before, "a run that cannot start and a dry run remove nothing"

    more = ["--max-steps", "2", "--seed", "1"]
    assert run(tiny, out, *book, *more, "--overwrite") == 0
    assert run(tiny, tmp_path / "fresh", *book, *more) == 0
    again = files_of(out)
    fresh = files_of(tmp_path / "fresh")
    assert again.keys() == fresh.keys()
    for name in fresh.keys() - {"metrics.jsonl", "report.json"}:  # these hold times
        assert again[name] == fresh[name], name
    assert len(lines_of(out)) == 2


def test_a_run_beside_a_running_one_is_refused_and_changes_nothing(
    tiny: Path,
    book: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    real = train.train_step
    errors = []

    def start_others(*args: object) -> tuple[float, float]:
        monkeypatch.setattr(train, "train_step", real)
        before = files_of(out)
        for more in ([], ["--resume"], ["--overwrite"], ["--resume", "--dry-run"]):
            capsys.readouterr()
            assert run(tiny, out, *book, *more) == 1
            errors.append(capsys.readouterr().err)
        assert files_of(out) == before
        return real(*args)

    monkeypatch.setattr(train, "train_step", start_others)
    assert run(tiny, out, *book, "--max-steps", "2") == 0
    expected = f"train.py: process {os.getpid()} is writing to {out}: wait for its end or choose"
    assert len(errors) == 4 and all(error.startswith(expected) for error in errors)
    assert ".train.lock" not in files_of(out)


def test_a_typo_in_the_model_leaves_no_folder(tmp_path: Path, book: list[str]) -> None:
    assert run(tmp_path / "tyni", tmp_path / "new" / "out", *book) == 1
    assert not (tmp_path / "new").exists()


def test_overwriting_that_is_stopped_before_a_step_offers_no_resume_of_the_earlier_run(
    tiny: Path,
    book: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = [*book, "--max-steps", "1"]
    assert run(tiny, tmp_path, *words) == 0
    with monkeypatch.context() as torchrun:
        torchrun.setattr(distributed, "restart_count", lambda: 1)
        assert run(tiny, tmp_path, *words, "--overwrite") == 0
        assert "removed" not in capsys.readouterr().out, "a restarted run resumes"

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "preflight", stop)
    assert run(tiny, tmp_path, *book, "--overwrite") == 130
    assert "stopped before anything was saved" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [["--use-dora"], ["--quant", "nf3", "--block-size", "32"]])
def test_training_on_starts_from_the_adapter_and_its_base(
    tiny: Path, book: list[str], tmp_path: Path, kind: list[str]
) -> None:
    """The loss before the first step is the loss after the last step of the first run."""
    first = tmp_path / "first"
    shape = ["--lora-r", "4", "--lora-alpha", "32", "--use-rslora", *kind]
    assert run(tiny, first, *book, *shape, "--lr", "0.02") == 0
    second = tmp_path / "second"
    flags = "--dtype float32 --max-steps 3 --batch-size 2 --lr 0.02 --output-dir".split()
    words = ["--init-adapter", str(first), *book, *flags, str(second)]
    assert train.main(words) == 0
    one, other = (json.loads((each / "report.json").read_text()) for each in (first, second))
    assert one["before"] != one["after"] == other["before"] != other["after"]
    assert other["quant"] == one["quant"]
    assert other["base_bytes_4bit"] == one["base_bytes_4bit"]
    config, new = (peft_adapter.read_config(each) for each in (first, second))
    assert config == new
    complete = files_of(second)
    assert train.main([*words, "--resume"]) == 0, "the complete run"
    name = "adapter_model.safetensors"
    assert files_of(second)[name] == complete[name]


def test_training_on_keeps_the_layers_that_an_adapter_of_peft_has(
    tiny: Path, book: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lora = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 3}, lora_dropout=0.5
    )
    model = AutoModelForCausalLM.from_pretrained(tiny)
    get_peft_model(model, lora).save_pretrained(tmp_path / "theirs")
    words = ["--init-adapter", str(tmp_path / "theirs"), "--model", str(tiny), *book]
    words += ["--max-steps", "1", "--output-dir", str(tmp_path / "out")]
    assert train.main([*words, "--preview"]) == 0
    capsys.readouterr()
    assert train.main([*words, "--dry-run"]) == 0
    assert f"from the adapter in {tmp_path / 'theirs'}" in capsys.readouterr().out
    assert train.main(words) == 0
    theirs = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    ours = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {name: t.shape for name, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    assert peft_adapter.read_config(tmp_path / "out")["lora_dropout"] == 0.5


def test_training_on_from_another_base_than_the_adapters_is_refused(
    tiny: Path, tmp_path: Path, book: list[str], capsys: pytest.CaptureFixture
) -> None:
    model = attach(models.tiny_llama(), block_size=128)
    peft_adapter.save_adapter(model, tmp_path / "adapter")
    base_model.save_4bit(attach(models.tiny_llama()), tmp_path / "base")
    models.tokenizer().save_pretrained(tmp_path / "base")
    words = ["--init-adapter", str(tmp_path / "adapter"), "--model", str(tmp_path / "base"), *book]
    assert train.main([*words, "--dry-run"]) == 1
    assert "adapter was trained on a base that was nf4" in capsys.readouterr().err
    words = [*words[:2], "--model", str(tiny), *book]
    assert train.main([*words, "--block-size", "32", "--dry-run"]) == 1
    assert "--block-size 32 disagrees with" in capsys.readouterr().err


def test_a_run_on_a_gpu_shows_and_reports_the_memory_of_the_gpu(
    tiny: Path,
    book: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The device is a processor that reports a GPU's peak: 7 GB while loading, 5 GB from there."""
    peaks = itertools.chain([7_000_000_000], itertools.repeat(5_000_000_000))
    monkeypatch.setattr(measured, "peak_gpu_bytes", lambda device: next(peaks))
    assert run(tiny, tmp_path, *book, "--max-steps", "3") == 0
    shown = capsys.readouterr()
    assert "tokens/s, 5.00 GB of GPU memory" in shown.err
    assert re.search(r"memory +\d.\d\d GB resident at the peak; 7.00 GB on the GPU\n", shown.out)
    assert [line["peak_gpu_bytes"] // 10**9 for line in lines_of(tmp_path)] == [7, 5, 5]
    assert json.loads((tmp_path / "report.json").read_text())["peak_gpu_bytes"] == 7 * 10**9
