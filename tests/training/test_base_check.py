"""Flags, data and files that do not fit the base are errors before a weight is read."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertConfig, MambaConfig, MixtralConfig, T5Config

import lora
import train
from checkpoints import bnb_4bit, sources
from checkpoints.quantization import Quantization
from helpers import models
from training import base_check, use_adapter
from training.options import Options

FP4 = {"codebook": bnb_4bit.CODES["fp4"], "block_size": 128, "double_quant": False}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save_tiny_llama(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def fp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in 4 bits that is nothing like the defaults."""
    folder = tmp_path_factory.mktemp("fp4")
    model = lora.attach(models.tiny_llama(torch.bfloat16), r=1, **FP4)
    use_adapter.save_4bit(model, models.tokenizer(), folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    line = json.dumps({"prompt": "one", "completion": "two"}) + "\n"
    path.write_text(line * 8)
    return path


def dry(folder: Path, rows: Path, out: Path, *flags: str) -> int:
    words = ["--model", str(folder), "--data", str(rows), "--output-dir", str(out), *flags]
    return train.main([*words, "--device", "cpu", "--dry-run"])


def test_a_base_in_4_bits_is_reported_as_it_is_and_not_as_the_defaults_are(
    fp4: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert dry(fp4, rows, tmp_path) == 0
    assert "LlamaForCausalLM, to be kept in fp4\n" in capsys.readouterr().out
    words = ["--model", str(fp4), "--data", str(rows), "--output-dir", str(tmp_path)]
    assert train.main([*words, "--max-steps", "1", "--device", "cpu", "--max-seq-len", "64"]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["quant"] == "fp4"
    assert "fp4 base" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--quant none", "--quant none disagrees with .*, whose base is fp4 in blocks of 128, "),
        ("--quant nf4", "--quant nf4 disagrees with"),
        ("--quant nf3", "--quant nf3 disagrees with"),
        ("--block-size 256", "--block-size 256 disagrees with"),
        ("--compare", "--compare needs dense weights, and .* is in 4 bits already: leave it out"),
        ("--lora-start pissa --save-4bit base", "--lora-start pissa needs dense weights"),
    ],
)
def test_a_flag_that_a_base_in_4_bits_cannot_follow_is_refused_by_name(
    fp4: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture, flags: str, complaint: str
) -> None:
    assert dry(fp4, rows, tmp_path, *flags.split()) == 1
    error = capsys.readouterr().err
    assert re.search(complaint, error) and error.count("\n") == 1, error


def test_a_resumed_run_that_saved_its_base_may_still_compare(tmp_path: Path) -> None:
    args = Options(compare=True, save_4bit=tmp_path)
    base_check.require_no_dense_weights(args, "default", tmp_path)
    with pytest.raises(ValueError, match="--compare needs dense weights"):
        base_check.require_no_dense_weights(args, "default", tmp_path / "other")


def test_a_flag_without_a_value_is_named_without_one(tmp_path: Path) -> None:
    args = Options(no_double_quant=True)
    with pytest.raises(ValueError, match="^--no-double-quant disagrees with"):
        base_check.adopt_quantization(args, Quantization("nf4", 64, True), tmp_path)


def test_a_flag_that_says_what_the_base_is_anyway_is_accepted() -> None:
    args = Options(quant="nf3", block_size=128, no_double_quant=True)
    base_check.adopt_quantization(args, Quantization("nf3", 128, False), Path("base"))
    assert (args.quant, args.block_size, args.no_double_quant) == ("nf3", 128, True)
    args = Options(block_size=128)
    base_check.adopt_quantization(args, Quantization("none", 64, True), Path("base"))
    assert (args.quant, args.block_size) == ("none", 128)  # a dense base has no blocks


@pytest.mark.parametrize("quant", ["nf4", "nf3", "nf2", "fp4", "none"])
def test_the_flags_are_what_a_frozen_weight_takes(quant: str) -> None:
    weight = lora.FrozenWeight(
        torch.randn(8, 64), **base_check.quantization_of(Options(quant=quant))
    )
    if quant == "none":
        assert weight.codebook is None
    else:
        assert weight.codebook.numel() == {"nf3": 8, "nf2": 4}.get(quant, 16)
        assert bnb_4bit.quant_type(weight.codebook) in (quant, None)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--save-4bit base --quant nf3", "cannot save --quant nf3 in blocks of 64"),
        ("--save-4bit base --block-size 16", "cannot save --quant nf4 in blocks of 16"),
    ],
)
def test_a_base_that_bitsandbytes_has_no_format_for_is_refused_before_it_is_made(
    dense: Path,
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    flags: str,
    complaint: str,
) -> None:
    assert dry(dense, rows, tmp_path, *flags.split()) == 1
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1, error


def test_a_4_bit_base_is_not_saved_over_a_dense_model(dense: Path) -> None:
    with pytest.raises(ValueError, match="holds a model that is not in 4 bits"):
        base_check.require_4bit_format(Options(save_4bit=dense))


def set_config(folder: Path, **entries: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def gptq(folder: Path) -> None:
    set_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def awq(folder: Path) -> None:
    set_config(folder, quantization_config={"quant_method": "awq", "bits": 4})


def stale(folder: Path) -> None:
    set_config(folder, quantization_config=bnb_4bit.CONFIG)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_a_shard(folder: Path) -> None:
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: "model-00001-of-00002.safetensors" for name in names}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))


def a_pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"
    (folder / "model.safetensors").write_text(text)


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def t5(folder: Path) -> None:
    T5Config(num_layers=1).save_pretrained(folder)


def mixture(folder: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    MixtralConfig(**sizes, **heads).save_pretrained(folder)


def mamba(folder: Path) -> None:
    MambaConfig(hidden_size=32, num_hidden_layers=1, state_size=4).save_pretrained(folder)


def bert(folder: Path) -> None:
    BertConfig(num_hidden_layers=1).save_pretrained(folder)


FOLDERS = {
    gptq: "quantization_config is not that of 4 bits by bitsandbytes, but .*gptq",
    awq: "quantization_config is not that of 4 bits by bitsandbytes, but .*awq",
    stale: "has a quantization_config, and no tensor of the files is in 4 bits: remove",
    pickled: "pytorch_model.bin is a pickle",
    without_a_shard: "there is no .*model-00001-of-00002.safetensors",
    a_pointer: "model.safetensors is damaged .* pointer of Git LFS: fetch its content",
    without_a_tensor: "does not fit the model, 1 tensors in all: model.norm.weight is missing",
    t5: "describes no causal language model",
    mixture: "is the matrix of a Mixtral.*: MixtralForCausalLM is not supported",
    mamba: "MambaForCausalLM is not supported",
    bert: 'BertLMHeadModel sees the tokens that it must predict .* set "is_decoder": true',
}


@pytest.mark.parametrize("change", FOLDERS, ids=lambda change: change.__name__)
def test_a_dry_run_refuses_a_folder_that_a_run_would_refuse(
    dense: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture, change: Callable
) -> None:
    folder = shutil.copytree(dense, tmp_path / "model")
    change(folder)
    assert dry(folder, rows, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert re.search(FOLDERS[change], error) and error.count("\n") == 1, error


def test_a_token_beyond_the_embedding_is_refused_and_one_that_never_occurs_is_not(
    dense: Path, tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = shutil.copytree(dense, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(dense)
    tokenizer.add_tokens(["<zebra>"])
    tokenizer.save_pretrained(folder)
    assert dry(folder, rows, tmp_path / "out") == 0
    capsys.readouterr()
    line = json.dumps({"prompt": "one", "completion": "<zebra>"}) + "\n"
    (tmp_path / "rows.jsonl").write_text(line * 8)
    assert dry(folder, tmp_path / "rows.jsonl", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "gives '<zebra>' the id 49152, and the embedding has 49152 rows" in error


def test_a_hub_model_that_is_not_here_is_checked_by_its_config(
    dense: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    config, tokenizer = sources.load_config_and_tokenizer(dense)
    monkeypatch.setattr(sources, "find_local_model", lambda name: None)
    monkeypatch.setattr(sources, "load_config_and_tokenizer", lambda name: (config, tokenizer))
    assert dry(Path("owner/model"), rows, tmp_path) == 0
    assert "in nf4; its weights are not here to be checked" in capsys.readouterr().out
    config.vocab_size = 10
    assert dry(Path("owner/model"), rows, tmp_path) == 1
    assert "owner/model: its tokenizer gives" in capsys.readouterr().err
