"""The program from end to end: on the real model for a few steps, and on a tiny one stopped, resumed and misused."""

import json
import math
import os
import re
import signal
from pathlib import Path

import bitsandbytes
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_paged_optim import TorchAdamW
from transformers import AutoModelForCausalLM

import train
from checkpoints import peft_adapter as checkpoint
from checkpoints import sources as pretrained
from data import dataset as data
from helpers import models
from helpers.bounds import OF_A_PEAK
from lora import QLoRALinear, attach
from training import loss_and_eval as evaluate
from training import use_adapter as export
from training.dtypes import resolve_device_and_dtype

REPORT_KEYS = {
    "metric",
    "before",
    "after",
    "before_unseen",
    "after_unseen",
    "seconds",
    "steps",
    "tokens_per_second",
    "peak_rss_bytes",
    "bits_per_weight",
    "base_bytes_16bit",
    "base_bytes_4bit",
    "trainable_parameters",
    "total_parameters",
    "pager",
    "seed",
    "versions",
}
METRIC_KEYS = {"step", "loss", "tokens", "seconds", "lr", "grad_norm", "rss_bytes"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def few_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold out 4 + 2 questions instead of 150: generation is most of a short run."""
    whole = data.load_task

    def load(*args: object) -> data.Task:
        task = whole(*args)
        return data.Task(task.metric, task.train, task.test[:4], task.unseen[:2])

    monkeypatch.setattr(data, "load_task", load)


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
        "metrics.jsonl",
        "report.json",
        "loss.png",
        *(f"state-00000{step}.safetensors" for step in (0, 8)),
    }
    metrics = lines_of(out)
    assert [line["step"] for line in metrics] == list(range(1, 9))
    assert all(line.keys() >= METRIC_KEYS for line in metrics)
    assert (
        sum(line["loss"] for line in metrics[-2:]) < sum(line["loss"] for line in metrics[:2]) / 2
    )

    report = json.loads((out / "report.json").read_text())
    assert report.keys() >= REPORT_KEYS
    assert report["before"] == 0 and report["steps"] == 8 and report["metric"] == "exact match"
    weights = 106_168_320  # 210 layers: 30 of (576 + 2 * 192 + 576 + 3 * 1536) * 576
    assert (
        report["bits_per_weight"]
        == 4 + 8 / 64 + 32 / (64 * 256) + 210 * 32 / weights + partial_blocks() / weights
    )
    assert report["trainable_parameters"] == sum(
        t.numel() for t in load_file(out / "adapter_model.safetensors").values()
    )
    assert report["base_bytes_16bit"] == 2 * (
        weights + 49152 * 576 + 61 * 576
    )  # and the embedding, and 61 norms
    assert report["pager"]["evictions"] > 0 < report["pager"]["bytes_in"]
    *lasting, peak = report["memory"].values()
    assert len(lasting) == 6 and all(row["predicted"] == row["measured"] > 0 for row in lasting), (
        "to the byte"
    )
    assert abs(peak["predicted"] - peak["measured"]) <= OF_A_PEAK * peak["measured"]
    assert "4.127 bits a weight" in capsys.readouterr().out

    assert_same_logits_after_reload(out)


def partial_blocks() -> float:
    """Bits of the second-level constants beyond 32/(64 * 256) a weight: where 256 does not divide a layer's blocks."""
    shapes = [576 * 576, 192 * 576, 192 * 576, 576 * 576, 1536 * 576, 1536 * 576, 576 * 1536]
    return 30 * sum(32 * (-(-n // 64 // 256) - n / 64 / 256) for n in shapes)


def assert_same_logits_after_reload(out: Path) -> None:
    """Adapter and base, loaded afresh, give the logits of adapter tensors copied by hand; and PEFT knows every key."""
    ids = torch.arange(100, 120)[None]
    model, by_hand = (
        AutoModelForCausalLM.from_pretrained(pretrained.default_folder(), dtype=torch.float32)
        for _ in range(2)
    )
    checkpoint.load_adapter(attach(model), out)
    with torch.no_grad():
        ours = model(input_ids=ids).logits
    attach(by_hand)
    tensors = load_file(out / "adapter_model.safetensors")
    for name, layer in by_hand.named_modules():
        if isinstance(layer, QLoRALinear):
            layer.lora_A.data = tensors.pop(f"base_model.model.{name}.lora_A.weight")
            layer.lora_B.data = tensors.pop(f"base_model.model.{name}.lora_B.weight")
    with torch.no_grad():
        assert not tensors and torch.equal(by_hand(input_ids=ids).logits, ours)


def run(tiny: Path, out: Path, *more: str) -> int:
    return train.main(
        [
            "--model",
            str(tiny),
            "--output-dir",
            str(out),
            "--max-steps",
            "6",
            "--batch-size",
            "2",
            "--dtype",
            "float32",
            "--lora-dropout",
            "0.1",
            *more,
        ]
    )


def test_a_run_stopped_by_ctrl_c_and_resumed_ends_with_the_same_bits(
    tiny: Path,
    tmp_path: Path,
    few_questions: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    assert run(tiny, tmp_path / "whole") == 0
    real, steps = train.train_step, []

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
    monkeypatch.setattr(
        torch.optim, "AdamW", TorchAdamW
    )  # with MKL, torch's roots are not rounded to nearest everywhere
    assert run(tiny, tmp_path / "parts", "--resume", "--optim", "adamw") == 0
    assert len(steps) == 6
    for name in ("adapter_model.safetensors", "state-000006.safetensors"):
        one, other = load_file(tmp_path / "whole" / name), load_file(tmp_path / "parts" / name)
        assert one.keys() == other.keys() and all(
            torch.equal(one[key], other[key]) for key in one
        ), name
    assert [line["loss"] for line in lines_of(tmp_path / "whole")] == [
        line["loss"] for line in lines_of(tmp_path / "parts")
    ]


def test_resuming_under_other_settings_says_which(
    tiny: Path, tmp_path: Path, few_questions: None, capsys: pytest.CaptureFixture
) -> None:
    assert run(tiny, tmp_path) == 0
    adapter = (tmp_path / "adapter_model.safetensors").read_bytes()
    assert run(tiny, tmp_path, "--resume", "--lr", "0.5", "--lora-alpha", "4") == 1
    assert (
        "lora_alpha was 16.0, is 4.0; lr was 0.001, is 0.5. Use the old settings or --resume-anyway"
        in capsys.readouterr().err
    )
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == adapter


def test_checkpointing_changes_no_gradient_and_accumulation_divides_by_the_labels_of_the_whole_step(
    tiny: Path,
) -> None:
    def gradients(*flags: str) -> tuple[float, list[torch.Tensor]]:
        shape = [
            "--dtype",
            "float32",
            "--max-grad-norm",
            "1e9",
            "--batch-size",
            "2",
            "--grad-accum",
            "2",
        ]
        args = resolve_device_and_dtype(train.parse_args(["--model", str(tiny), *shape, *flags]))
        model, tokenizer = train.adapted_model(args, "nf4")
        task = data.load_task("orders", tokenizer, 256, 0)
        batches = data.batches_of_step(task.train, 0, args.batch_size, args.grad_accum, 0, 2)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        kept = []
        optimizer.register_step_pre_hook(
            lambda *_: kept.extend(p.grad.clone() for p in optimizer.param_groups[0]["params"])
        )
        loss, _ = train.train_step(
            evaluate.LabelLoss(model.train(), args.dtype), optimizer, batches, 0, args
        )
        if not flags:  # by definition: the sum over all labels of the step, divided by their number
            model.load_state_dict(train.adapted_model(args, "nf4")[0].state_dict())
            total = sum(batch.n_labels for batch in batches)
            for batch in batches:
                (evaluate.label_loss(model, batch, torch.float32) / total).backward()
            assert all(
                torch.equal(p.grad, g) for p, g in zip(optimizer.param_groups[0]["params"], kept)
            )
        return loss, kept

    plain, checkpointed = gradients(), gradients("--grad-checkpoint")
    assert any(g.any() for g in plain[1])
    assert plain[0] == checkpointed[0] and all(
        torch.equal(a, b) for a, b in zip(plain[1], checkpointed[1])
    )


def test_compare_trains_16_bit_lora_beside_it(
    tiny: Path, tmp_path: Path, few_questions: None, capsys: pytest.CaptureFixture
) -> None:
    assert run(tiny, tmp_path, "--compare") == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["compare"].keys() >= {"before", "after"}
    assert "16-bit LoRA, same seed" in capsys.readouterr().out
    assert (tmp_path / "16-bit" / "adapter_model.safetensors").exists()


def test_text_is_measured_in_perplexity_and_it_falls(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("the quick brown fox jumps over the lazy dog. " * 300)
    assert (
        run(
            tiny,
            tmp_path / "out",
            "--data",
            str(tmp_path / "book.txt"),
            "--max-seq-len",
            "64",
            "--lr",
            "0.02",
        )
        == 0
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (
        report["metric"] == "perplexity"
        and report["after"] < report["before"]
        and report["before_unseen"] is None
    )


@pytest.fixture
def book(tmp_path: Path) -> list[str]:
    """Flags for data that cost no generation."""
    (tmp_path / "book.txt").write_text("the quick brown fox jumps over the lazy dog. " * 300)
    return ["--data", str(tmp_path / "book.txt"), "--max-seq-len", "64"]


def test_an_adapter_answers_a_prompt_word_by_word(
    tiny: Path,
    book: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(data, "chat", lambda tokenizer, prompt: tokenizer(prompt).input_ids)
    assert (
        run(tiny, tmp_path, *book, "--max-steps", "1", "--quant", "nf3", "--block-size", "128") == 0
    )
    capsys.readouterr()
    asked = [
        "--adapter",
        str(tmp_path),
        "--prompt",
        "Who?",
        "--max-seq-len",
        "8",
        "--dtype",
        "float32",
    ]
    assert train.main(asked) == 0
    streamed = capsys.readouterr().out
    model, tokenizer = export.load_adapted_model(tmp_path, None, torch.float32, "cpu")
    assert {layer.base.codebook.numel() for layer in checkpoint.adapted_layers(model).values()} == {
        8
    }
    whole = evaluate.generate_answers(
        model, tokenizer, [data.encode_prompt(tokenizer, "Who?")], 8, torch.float32
    )
    assert streamed.strip() == whole[0] != ""


@pytest.mark.parametrize("start", ["pissa", "loftq"])
def test_a_start_that_changes_the_base_keeps_it_and_goes_on_from_it(
    tiny: Path, book: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    flags = [
        *book,
        "--lora-start",
        start,
        "--save-4bit",
        str(tmp_path / "base"),
        "--use-rslora",
        "--save-every",
        "2",
    ]
    assert run(tiny, tmp_path / "whole", *flags) == 0
    tensors = [load_file(tmp_path / "whole" / "adapter_model.safetensors")]
    (tmp_path / "parts").mkdir()
    real = train.train_step
    counter = iter(range(100))
    monkeypatch.setattr(
        train, "train_step", lambda *args: real(*args) if next(counter) != 3 else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        run(tiny, tmp_path / "parts", *flags)
    assert run(tiny, tmp_path / "parts", *flags, "--resume") == 0
    tensors.append(load_file(tmp_path / "parts" / "adapter_model.safetensors"))
    one, other = tensors
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "whole"
    )
    ours, _ = export.load_adapted_model(tmp_path / "whole", None, torch.float32, "cpu")
    assert ours.name_or_path == str(tmp_path / "base")
    for name, layer in checkpoint.adapted_layers(ours).items():
        their = theirs.base_model.model.get_submodule(name)
        weight = bitsandbytes.functional.dequantize_4bit(
            their.base_layer.weight, their.base_layer.weight.quant_state
        )
        assert torch.equal(layer.base(), weight) and their.scaling[
            "default"
        ] == layer.scaling == 16 / math.sqrt(8)
        assert torch.equal(layer.lora_A, their.lora_A["default"].weight)


def test_a_start_from_dense_weights_needs_them(
    tiny: Path, book: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert (
        run(
            tiny, tmp_path / "out", *book, "--save-4bit", str(tmp_path / "base"), "--max-steps", "1"
        )
        == 0
    )
    again = ["--save-4bit", str(tmp_path / "other"), "--lora-start", "loftq"]
    assert run(tmp_path / "base", tmp_path / "out", *book, *again) == 1
    assert "loftq starts from dense weights, and" in capsys.readouterr().err
    assert run(tmp_path / "base", tmp_path / "out", *book, "--max-steps", "1") == 0, (
        "a 4-bit folder is a model"
    )
    assert run(tiny, tmp_path / "out", *book, "--save-4bit", str(tiny)) == 1
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
    drawn, real = [], train.report.plot_loss
    monkeypatch.setattr(
        train.report, "plot_loss", lambda *args: (drawn.append(args[2]), real(*args))
    )
    assert run(tiny, tmp_path / "without", *book, "--group-by-length") == 0
    assert run(tiny, tmp_path / "with", *book, "--group-by-length", "--eval-steps", "2") == 0
    one, other = (
        load_file(tmp_path / name / "state-000006.safetensors") for name in ("without", "with")
    )
    assert all(torch.equal(one[key], other[key]) for key in one)
    measured = {
        line["step"]: line["eval"] for line in lines_of(tmp_path / "with") if "eval" in line
    }
    assert list(measured) == [2, 4] and all(
        math.isfinite(value) and unseen is None for value, unseen in measured.values()
    )
    assert (
        drawn == ["perplexity"] * 4
        and f"step 2: perplexity {measured[2][0]:.4f}" in capsys.readouterr().out
    )
    assert (tmp_path / "with" / "loss.png").read_bytes() != (
        tmp_path / "without" / "loss.png"
    ).read_bytes()


def test_a_preview_reads_no_weights_and_writes_nothing(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        pretrained.AutoModelForCausalLM,
        "from_pretrained",
        lambda *args, **kwargs: pytest.fail("weights"),
    )
    monkeypatch.chdir(tmp_path)
    assert train.main(["--model", str(tiny), "--preview"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("--- ") == 3 and '⟦{"name"' in shown and "\033" not in shown
    assert not list(tmp_path.iterdir())


def test_packed_rows_train_and_what_was_packed_may_not_be_unpacked_on_resume(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"{i}?", "completion": f"{i}!"}) + "\n" for i in range(40))
    )
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
    monkeypatch.setattr(pretrained.HfApi, "model_info", lambda *args, **kwargs: 1 / 0)
    monkeypatch.setattr(train, "measure", lambda *args: pytest.fail("got as far as evaluating"))
    assert train.main(["--model", str(tiny), "--output-dir", str(tmp_path / "out"), *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith("train.py: ") and error.count("\n") == 1
    assert re.search(complaint, error), error


def test_an_output_folder_that_cannot_be_written_is_found_out_before_loading(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "adapted_model", lambda *args: pytest.fail("loaded a model first"))
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
    model, tokenizer = train.adapted_model(args, "nf4")
    layer = next(layer for layer in model.modules() if isinstance(layer, QLoRALinear))
    torch.nn.init.constant_(layer.lora_B, float("inf"))
    before = layer.lora_A.detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    batches = data.batches_of_step(data.load_task("orders", tokenizer, 256, 0).train, 0, 2, 1, 0, 2)
    with pytest.raises(ValueError, match="the gradient is not finite"):
        train.train_step(evaluate.LabelLoss(model, args.dtype), optimizer, batches, 0, args)
    assert torch.equal(layer.lora_A, before)


def test_the_learning_rate_warms_up_and_comes_down() -> None:
    args = train.parse_args(["--max-steps", "100", "--lr", "1"])
    rates = [train.learning_rate(step, args) for step in range(100)]
    assert rates[:10] == [(step + 1) / 10 for step in range(10)]
    assert all(a >= b for a, b in zip(rates[9:], rates[10:])) and rates[10] == 1
    tenth, angle = (
        args.lr / 10,
        math.pi / 90,
    )  # one step before the end of half a turn; 1 - cos x <= x^2 / 2
    assert tenth <= rates[-1] <= tenth + (args.lr - tenth) / 2 * angle**2 / 2
