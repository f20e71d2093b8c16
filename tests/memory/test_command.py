"""python -m memory: what it prints is the prediction, and wrong arguments end in one line."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_formula import APART, GROUPED, WIDE, config_of
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
)

from helpers.pages import text_of_pages
from memory import __main__ as command
from memory.formula import (
    FULL,
    KNOWN_MODELS,
    QLORA,
    SHAPES,
    predict,
    shape_from,
    shape_of,
)

SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
MANY = 10**9
# Models of other layers, and a Llama with biases; each with a count by hand.
LAYER = 4 * 64 * 64 + 3 * 64 * 96
KINDS = "llama mistral mixtral qwen2 qwen3 qwen3_moe gemma gemma2 gpt_neox bert phi3 olmo2".split()
NOT_COVERED = [
    (
        MixtralConfig(**SMALL, num_key_value_heads=4, num_local_experts=8),
        2 * 300 * 64 + 2 * (4 * 64 * 64 + 8 * (3 * 64 * 96 + 64)) + 5 * 64,
    ),
    (
        LlamaConfig(**SMALL, attention_bias=True),
        2 * 300 * 64 + 2 * (LAYER + 4 * 64) + 5 * 64,
    ),
    (
        Gemma2Config(**SMALL, num_key_value_heads=4, head_dim=16, tie_word_embeddings=True),
        300 * 64 + 2 * LAYER + 9 * 64,
    ),
]


def test_only_the_config_of_a_folder_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for shape in (WIDE, GROUPED, APART):
        config_of(shape).save_pretrained(tmp_path)
        assert shape_of(str(tmp_path)) == shape
    config = json.loads((tmp_path / "config.json").read_text())
    del config["head_dim"], config["num_key_value_heads"]  # as in older files
    (tmp_path / "config.json").write_text(json.dumps(config))
    older = shape_of(str(tmp_path))
    assert (older.heads, older.kv_heads, older.head_dim) == (3, 3, 32)
    assert command.main(["--model", str(tmp_path), "--seq", "64", "--r", "4"]) == 0
    assert "sequences of 64 that fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no .*config.json"),
        ("{", "Expecting"),
        ("[]", "its type is list"),
        ("{}", "no causal language model"),
        (json.dumps({"model_type": "t5"}), "no causal language model"),
        (json.dumps({"model_type": "llama", "hidden_size": "64"}), "hidden_size"),
        (json.dumps({"model_type": "llama", "num_hidden_layers": MANY}), "num_hidden_layers is"),
    ],
)
def test_what_is_not_the_config_of_a_model_is_refused_in_one_line(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        shape_of(str(tmp_path))
    assert command.main(["--model", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("memory: ") and str(tmp_path) in error and error.count("\n") == 1


@pytest.mark.parametrize(("config", "count"), NOT_COVERED)
def test_a_model_that_the_formula_does_not_cover_is_refused_with_its_parameters(
    config: PretrainedConfig, count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.save_pretrained(tmp_path)
    assert command.main(["--model", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert f" of {count:,} parameters" in error and error.count("\n") == 1


@given(
    kind=st.sampled_from([LlamaConfig, MistralConfig]),
    kv_heads=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([8, 16, None]),
    tied=st.booleans(),
    layers=st.integers(1, 3),
)
def test_the_parameters_of_a_shape_are_those_that_transformers_counts(
    kind: type[PretrainedConfig],
    kv_heads: int,
    head_dim: int | None,
    tied: bool,
    layers: int,
) -> None:
    sizes = SMALL | {"num_hidden_layers": layers}
    heads = {"num_key_value_heads": kv_heads, "head_dim": head_dim}
    config = kind(**sizes, **heads, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = shape_from(config.to_dict())
    assert shape.parameters() == sum(parameter.numel() for parameter in model.parameters())
    weights = predict(shape, FULL, 1, 2).components
    assert 2 * shape.parameters() == sum(
        weights[name] for name in ("base", "embedding, head", "norms")
    )


@pytest.mark.parametrize("kind", KINDS)
def test_no_architecture_is_taken_for_another(kind: str, tmp_path: Path) -> None:
    """With its default sizes, each is predicted for the parameters it has, or refused."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    try:
        shape = shape_of(str(tmp_path))
    except ValueError:
        assert kind not in KNOWN_MODELS
    else:
        assert kind in KNOWN_MODELS and shape.parameters() > 6e9


def test_every_component_is_printed_for_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--model", "llama-7b"]) == 0
    text = capsys.readouterr().out
    predicted = predict(SHAPES["llama-7b"], QLORA, 1, 512)
    for peak in (predicted.peak(), predicted.peak(paged=True)):
        assert f"{peak / 1e9:.3f}" in text
    for name, nbytes in predicted.components.items():
        line = next(line for line in text.splitlines() if line.startswith(name))
        assert line.split()[-1] == f"{nbytes / 1e9:.3f}"


def test_a_size_below_1_is_refused() -> None:
    with pytest.raises(SystemExit):
        command.main(["--batch", "0"])


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("size", [4, 24, 48])
def test_the_largest_batch_fits_and_the_next_one_does_not(size: int, paged: bool) -> None:
    shape = SHAPES["llama-7b"]
    room = size * 2**30
    count = command.largest_batch(shape, QLORA, 512, 64, room, paged)
    at_most = predict(shape, QLORA, max(count, 1), 512, 64).peak(paged)
    one_more = predict(shape, QLORA, count + 1, 512, 64).peak(paged)
    assert (at_most <= room) == (count > 0) and one_more > room


def test_the_pages_show_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "llama-65b", "--seq", "512", "--batch", "1", "--r", "64"]
    assert command.main(flags) == 0
    assert capsys.readouterr().out in text_of_pages()
