"""The ledger before the run, held against tensors: exactly where they are counted, closely where they come and go."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from data import dataset as data
from helpers.bounds import OF_A_PEAK
from lora import attach
from memory import formula as predict
from memory import measured as memory
from memory.formula import FULL, LORA, METHODS, QLORA, SHAPES, Shape
from nf4 import NF4
from paged_optim import PagedAdamW
from training.loss_and_eval import label_loss

WIDE = Shape(
    layers=6, hidden=128, intermediate=344, heads=4, kv_heads=4, head_dim=32, vocabulary=100
)
GROUPED = Shape(
    layers=5,
    hidden=64,
    intermediate=176,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vocabulary=1000,
    tied=True,
)
APART = Shape(
    layers=5, hidden=96, intermediate=200, heads=3, kv_heads=1, head_dim=64, vocabulary=300
)  # q is wider than d
PAPER = {
    "llama-7b": (288, 1152, 6.9),
    "llama-13b": (450, 1800, 11.3),  # MB of adapters and moments, GB in all; powers of two
    "llama-33b": (877.5, 3510, 24.7),
    "llama-65b": (1440, 5760, 45.0),
}


def config_of(shape: Shape) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=512,
    )


def model_of(shape: Shape, method: str, r: int) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(shape), dtype=torch.bfloat16).train()
    return (
        model if method == FULL else attach(model, r=r, codebook=NF4 if method == QLORA else None)
    )


def step(model: nn.Module, shape: Shape, batch: int, length: int) -> int:
    """Forward and backward on random tokens. -> the most bytes that were alive beside the model and the tokens"""
    ids = torch.randint(0, shape.vocabulary, (batch, length))
    tokens = data.Batch(ids, torch.ones_like(ids), ids)
    with memory.Live(*model.parameters(), *model.buffers(), ids, tokens.attention_mask) as live:
        before = live.now()
        label_loss(model, tokens, torch.bfloat16).backward()
    return live.peak - before


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [WIDE, GROUPED, APART])
def test_what_lasts_is_predicted_to_the_byte(shape: Shape, method: str) -> None:
    model, r = model_of(shape, method, 8), 8
    predicted = predict.predict(shape, method, 2, 16, r).components
    base = {name: row.bytes_now for name, row in memory.ledger(model).items()}
    if method == FULL:  # all is trained, and the ledger calls what is trained an adapter
        assert (
            sum(base.values())
            == predicted["base"] + predicted["embedding, head"] + predicted["norms"]
        )
    else:
        assert base == {
            "linear layers": predicted["base"] + predicted["constants"],
            "norms, biases": predicted["norms"],
            "embedding, head": predicted["embedding, head"],
            "adapters": predicted["adapters"],
        }
    step(model, shape, 1, 4)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(parameter.grad.nbytes for parameter in trained) == predicted["gradients"]
    moments = sum(
        2 * 4 * parameter.numel() for parameter in trained
    )  # float32, whatever the parameter is
    assert moments == predicted["AdamW moments"]
    if method != FULL:
        optimizer = PagedAdamW(trained)
        optimizer.step()
        assert optimizer.pager.resident == moments
    assert predicted["buffer"] == (
        2
        * max(
            m.weight.numel()
            for m in model_of(shape, FULL, 1).model.layers.modules()
            if isinstance(m, nn.Linear)
        )
        if method == QLORA
        else 0
    )


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [WIDE, GROUPED, APART])
def test_what_one_more_layer_keeps_for_backward_is_predicted_to_the_byte(
    shape: Shape, method: str, checkpointing: bool
) -> None:
    kept, tokens = [], 2 * 24
    for layers in (2, 3):
        model = model_of(shape._replace(layers=layers), method, 8)
        if checkpointing:
            model.activation_checkpointing_enable()
        ids = torch.randint(0, shape.vocabulary, (2, 24))
        batch = data.Batch(ids, torch.ones_like(ids), ids)
        with memory.Live(*model.parameters(), *model.buffers(), ids, batch.attention_mask) as live:
            before = live.now()
            loss = label_loss(model, batch, torch.bfloat16)
            kept.append(live.now() - before)
        del loss
    expected = [
        predict.predict(shape._replace(layers=layers), method, 2, 24, 8, checkpointing)
        .instants["the loss"]
        .activations
        for layers in (2, 3)
    ]
    assert kept[1] - kept[0] == expected[1] - expected[0]
    of_a_token = (
        2 * shape.hidden if checkpointing else predict._kept(shape, 0 if method == FULL else 8)
    )
    assert expected[1] - expected[0] == tokens * of_a_token


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("shape", "batch", "length", "r"), [(WIDE, 2, 128, 8), (GROUPED, 2, 100, 8), (APART, 4, 64, 4)]
)
def test_the_peak_of_what_comes_and_goes_is_predicted_closely(
    shape: Shape, batch: int, length: int, r: int, method: str, checkpointing: bool
) -> None:
    model = model_of(shape, method, r)
    if checkpointing:
        model.activation_checkpointing_enable()
    predicted = predict.predict(shape, method, batch, length, r, checkpointing)
    expected = max(map(sum, predicted.instants.values()))
    assert abs(step(model, shape, batch, length) - expected) <= OF_A_PEAK * expected


def test_each_instant_is_the_peak_of_some_run() -> None:
    """So each of them is needed."""

    def peak(shape: Shape, method: str, batch: int, length: int, checkpointing: bool) -> str:
        instants = predict.predict(shape, method, batch, length, 64, checkpointing).instants
        return max(instants, key=lambda name: sum(instants[name]))

    assert peak(GROUPED, QLORA, 2, 100, False) == "the loss"
    assert peak(WIDE, QLORA, 2, 128, False) == "the last norm's backward"
    assert peak(SHAPES["llama-65b"], QLORA, 16, 512, True) == "the last layer's backward"
    assert peak(SHAPES["llama-65b"], QLORA, 1, 512, True) == "the first layer's backward"
    assert peak(SHAPES["llama-65b"], FULL, 1, 512, True) == "the end of backward"


def test_full_fine_tuning_of_65b_takes_the_papers_780_gb_and_qlora_fits_its_card() -> None:
    shape, gib = SHAPES["llama-65b"], 2**30
    parts = predict.predict(shape, FULL, 1, 512).components
    at_rest = sum(nbytes for name, nbytes in parts.items() if name not in ("activations", "loss"))
    assert 780e9 < at_rest < 790e9
    assert at_rest == 6 * (
        parts["base"] + parts["embedding, head"] + parts["norms"]
    )  # 12 bytes for 2 of weight
    assert predict.predict(shape, QLORA, 1, 512).peak() < 48 * gib - memory.OUTSIDE
    assert predict.predict(shape, LORA, 1, 512).peak() > 80 * gib


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_adapters_are_those_of_an_mlp_of_two_maps(name: str) -> None:
    """18 r d a layer, and 10 and 20 MB more for the adapters at 7B and 33B: our inference, from all four sizes."""
    shape, (adapters, moments, _) = SHAPES[name], PAPER[name]
    elements = 18 * 64 * shape.hidden * shape.layers
    assert (2 * elements, 8 * elements) == (adapters * 2**20, moments * 2**20)
    ours = predict.predict(shape, QLORA, 1, 512).components["AdamW moments"]
    attention, mlp = 8 * 64 * shape.hidden, 3 * 64 * (shape.hidden + shape.intermediate)
    assert ours == 8 * shape.layers * (attention + mlp) > 8 * elements


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_totals_lie_the_outside_of_a_card_above_ours(name: str) -> None:
    above = PAPER[name][2] * 2**30 - predict.predict(SHAPES[name], QLORA, 1, 512).peak()
    assert memory.OUTSIDE / 3 < above < memory.OUTSIDE


def test_a_folder_is_read_and_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for shape in (WIDE, GROUPED, APART):
        config_of(shape).save_pretrained(tmp_path)
        assert predict.shape_of(str(tmp_path)) == shape
    config = json.loads((tmp_path / "config.json").read_text())
    del config["head_dim"], config["num_key_value_heads"]  # as in older files
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert predict.shape_of(str(tmp_path))[3:6] == (3, 3, 32)
    assert memory.main(["--model", str(tmp_path), "--seq", "64", "--r", "4"]) == 0
    assert "sequences of 64 that fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("{", "Expecting"),
        ("[]", "indices"),
        ("{}", "no 'num_attention_heads'"),
        (
            json.dumps(
                {
                    "num_attention_heads": 2,
                    "hidden_size": 4,
                    "num_hidden_layers": -1,
                    "intermediate_size": 4,
                    "vocab_size": 9,
                }
            ),
            "whole numbers above 0",
        ),
    ],
)
def test_what_is_no_config_of_a_llama_is_refused_in_one_line(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        predict.shape_of(str(tmp_path))
    assert memory.main(["--model", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("memory.py: ") and str(tmp_path) in error and error.count("\n") == 1


def test_the_command_prints_every_component_for_every_method(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert memory.main(["--model", "llama-7b"]) == 0
    text = capsys.readouterr().out
    predicted = predict.predict(SHAPES["llama-7b"], QLORA, 1, 512)
    assert (
        f"{predicted.peak() / 1e9:.3f}" in text
        and f"{predicted.peak(paged=True) / 1e9:.3f}" in text
    )
    for name, nbytes in predicted.components.items():
        (line, *_) = (line for line in text.splitlines() if line.startswith(name))
        assert line.split()[-1] == f"{nbytes / 1e9:.3f}"
    with pytest.raises(SystemExit):
        memory.main(["--batch", "0"])


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("size", [4, 24, 48])
def test_the_largest_batch_fits_and_the_next_one_does_not(size: int, paged: bool) -> None:
    shape, room = SHAPES["llama-7b"], size * 2**30
    count = memory.most(shape, QLORA, 512, 64, room, paged)
    peaks = [
        predict.predict(shape, QLORA, batch, 512, 64).peak(paged)
        for batch in (max(count, 1), count + 1)
    ]
    assert (peaks[0] <= room) == (count > 0) and peaks[1] > room


def test_the_readme_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert memory.main(["--model", "llama-65b", "--seq", "512", "--batch", "1", "--r", "64"]) == 0
    assert (
        capsys.readouterr().out in (Path(memory.__file__).parent.parent / "README.md").read_text()
    )
