"""Loading tensor by tensor gives the bits of from_pretrained followed by lora.attach."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen3Config,
)

import checkpoints
from bench import loading_peak
from checkpoints import base_model
from helpers import models
from helpers.strategies import same_bits
from lora import FrozenWeight, QLoRALinear, attach, merge
from nf4 import NF4

SMALL = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
ARCHITECTURES = [
    LlamaConfig(**SMALL, rope_parameters=LLAMA_3),  # has computed buffers
    LlamaConfig(**SMALL, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    MistralConfig(**SMALL, sliding_window=8),
    Qwen3Config(**SMALL, head_dim=16, max_window_layers=2),
    GemmaConfig(**SMALL, head_dim=16),  # a tied head, a scaled embedding
    PhiConfig(**SMALL),  # biases, in the head too
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def quantized(weight: torch.Tensor, bias: torch.Tensor | None) -> QLoRALinear:
    return QLoRALinear(FrozenWeight(weight), bias)


def saved(
    config: PretrainedConfig, folder: Path, dtype: torch.dtype = torch.bfloat16, **settings: object
) -> Path:
    """Saves a model; its norms and biases are random too, to detect exchanged ones."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder, **settings)
    return folder


def assert_same_model(ours: nn.Module, theirs: nn.Module) -> None:
    for kind in ("named_parameters", "named_buffers"):
        one = dict(getattr(ours, kind)(remove_duplicate=False))
        other = dict(getattr(theirs, kind)(remove_duplicate=False))
        assert one.keys() == other.keys()
        for name in one:
            assert same_bits(one[name], other[name])
            assert one[name].requires_grad == other[name].requires_grad
    names = [name for name, _ in ours.named_modules()]
    assert names == [name for name, _ in theirs.named_modules()]
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert same_bits(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)


@pytest.mark.parametrize(
    "stored, dtype",
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("config", ARCHITECTURES, ids=lambda config: config.model_type)
def test_a_streamed_model_has_the_bits_of_from_pretrained_and_attach(
    tmp_path: Path, config: PretrainedConfig, stored: torch.dtype, dtype: torch.dtype
) -> None:
    saved(config, tmp_path, stored, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ours = base_model.load_quantized(tmp_path, dtype, "cpu", quantized)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert ours.config.dtype == theirs.config.dtype
    assert ours.name_or_path == theirs.name_or_path
    assert not ours.training
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    torch.manual_seed(1)
    attach(theirs)
    torch.manual_seed(1)
    assert_same_model(attach(ours), theirs)


def test_a_dense_base_is_streamed_too(tmp_path: Path) -> None:
    saved(ARCHITECTURES[1], tmp_path)

    def dense(weight: torch.Tensor, bias: torch.Tensor | None) -> QLoRALinear:
        return QLoRALinear(FrozenWeight(weight.clone(), codebook=None), bias)

    ours = base_model.load_quantized(tmp_path, torch.bfloat16, "cpu", dense)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    attach(theirs, codebook=None)
    frozen = [parameter for parameter in ours.parameters() if parameter.numel()]
    expected = [parameter for parameter in theirs.parameters() if not parameter.requires_grad]
    assert len(frozen) == len(expected)
    assert all(same_bits(a, b) for a, b in zip(frozen, expected))
    layers = [name for name, layer in ours.named_modules() if isinstance(layer, QLoRALinear)]
    assert len(layers) == 14
    for name in layers:
        weights = [model.get_submodule(name).base.weight for model in (ours, theirs)]
        assert same_bits(*weights), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_folder_in_4_bits_starts_where_the_dense_one_does(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    first = base_model.load_quantized(
        saved(ARCHITECTURES[1], tmp_path / "dense"), dtype, "cpu", quantized
    )
    checkpoints.save_4bit(first, tmp_path / "4-bit")
    again = base_model.load_quantized(
        tmp_path / "4-bit", dtype, "cpu", lambda *args: pytest.fail("quantized again")
    )
    torch.manual_seed(1)
    attach(first)
    torch.manual_seed(1)
    assert_same_model(attach(again), first)


def test_a_folder_in_4_bits_is_cast_to_the_dtype_that_was_asked_for_and_its_codes_are_not(
    tmp_path: Path,
) -> None:
    first = base_model.load_quantized(
        saved(ARCHITECTURES[0], tmp_path / "dense"), torch.float16, "cpu", quantized
    )
    checkpoints.save_4bit(first, tmp_path / "4-bit")
    again = base_model.load_quantized(tmp_path / "4-bit", torch.bfloat16, "cpu", quantized)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    assert all(
        layer.compute_dtype is None for layer in again.modules() if isinstance(layer, QLoRALinear)
    )
    buffers = [dict(model.named_buffers(remove_duplicate=False)) for model in (first, again)]
    # Constants, and rotary frequencies.
    assert all(same_bits(buffers[0][name], buffers[1][name]) for name in buffers[0])


def test_tensors_that_only_older_versions_saved_are_ignored(tmp_path: Path) -> None:
    path = saved(ARCHITECTURES[0], tmp_path) / "model.safetensors"
    save_file(
        load_file(path) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)},
        path,
        {"format": "pt"},
    )
    base_model.load_quantized(tmp_path, torch.bfloat16, "cpu", quantized)


LOAD = """
import sys
from pathlib import Path
import torch
import train
from checkpoints import base_model, sources
folder = sources.find_model(sys.argv[1])
sources.load_config_and_tokenizer(folder)
base_model.load_with_adapters(folder, torch.bfloat16, "cpu", "default", 0, {"r": 2}, {})
"""


def test_no_library_writes_to_the_screen_of_a_run(tmp_path: Path) -> None:
    folder = models.save_tiny_llama(tmp_path)
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", LOAD, folder]
    run = subprocess.run(command, env=paths, capture_output=True, text=True)
    assert run.stderr == ""
    assert [line.split()[0] for line in run.stdout.splitlines()] == ["base", "adapters"]


GPT2 = GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
EXPERTS = MixtralConfig(**SMALL, num_local_experts=2)


@pytest.mark.parametrize(
    "config, complaint",
    [
        (
            GPT2,
            r"h.0.attn.c_attn.weight \(64, 192\) is the matrix of a Conv1D, .*: "
            "GPT2LMHeadModel is not supported",
        ),
        (
            EXPERTS,
            r"mlp.* \(2, .*\) is the matrix of a Mixtral.*: MixtralForCausalLM is not supported",
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_an_architecture_that_would_mostly_stay_dense_is_refused_in_one_line(
    tmp_path: Path, config: PretrainedConfig, complaint: str
) -> None:
    saved(config, tmp_path)
    with pytest.raises(ValueError, match=complaint) as error:
        base_model.load_quantized(tmp_path, torch.bfloat16, "cpu", quantized)
    assert "\n" not in str(error.value)


def change(folder: Path, what: str) -> None:
    """Damages a folder in one of the ways that happen."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    if what == "missing":
        del tensors[name]
    elif what == "unknown":
        tensors["model.layers.2.mlp.up_proj.weight"] = tensors[name].clone()
    elif what == "shape":
        tensors[name] = tensors[name].T.contiguous()
    elif what == "integers":
        tensors[name] = tensors[name].int()
    elif what == "NaN":
        tensors[name][3, 5] = torch.nan
    elif what == "NaN in a norm":
        tensors["model.norm.weight"][5] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    if what == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif what == "pickle":
        path.rename(folder / "pytorch_model.bin")
    elif what == "code":
        config = json.loads((folder / "config.json").read_text())
        auto = {
            "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"},
            "model_type": "strange",
        }
        (folder / "config.json").write_text(json.dumps(config | auto))
        (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")


@pytest.mark.parametrize(
    "what, complaint",
    [
        ("missing", "1 tensors in all: model.layers.1.mlp.up_proj.weight is missing"),
        ("unknown", "model.layers.2.mlp.up_proj.weight belongs to nothing in the model"),
        ("shape", r"up_proj.weight is \(64, 160\), floating point, and must be \(160, 64\)"),
        ("integers", r"up_proj.weight is \(160, 64\), torch.int32, and must be"),
        ("NaN", r"layer model.layers.1.mlp.up_proj: 1 of 10240 .*index \(3, 5\)"),
        ("NaN in a norm", "model.norm.weight holds NaN or infinity"),
        ("truncated", "model.safetensors is damaged"),
        ("pickle", "pytorch_model.bin is a pickle, which could run code"),
        ("code", "config.json describes no causal language model that transformers can build"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, what: str, complaint: str
) -> None:
    change(saved(ARCHITECTURES[0], tmp_path), what)
    made = []

    def make(weight: torch.Tensor, bias: torch.Tensor | None) -> QLoRALinear:
        made.append(weight)
        return quantized(weight, bias)

    with pytest.raises(ValueError, match=complaint):
        base_model.load_quantized(tmp_path, torch.bfloat16, "cpu", make)
    assert "NaN" in what or not made, "refused before any layer was quantized"
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads the peak of memory from Linux"
)
def test_loading_takes_no_more_than_the_4_bit_model_its_largest_tensor_and_300_mb(
    tmp_path: Path,
) -> None:
    """The files are in float32, so their sum is larger than the bound.

    In one of two runs: other processes may add to a peak, and never take from it.
    """
    largest = loading_peak.write_checkpoint(
        loading_peak.shape(1024, 16, 2000), torch.float32, tmp_path
    )
    size = sum(path.stat().st_size for path in tmp_path.iterdir())

    def is_within() -> bool:
        got = loading_peak.measure(tmp_path)
        bound = got["kept"] + largest + loading_peak.ALLOWED
        return got["peak"] - got["before"] <= bound < size

    assert is_within() or is_within()


def test_a_tied_head_may_be_in_the_file_and_generation_config_json_may_be_missing(
    tmp_path: Path,
) -> None:
    tiny = models.tiny_llama(vocab_size=256)
    tiny.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path, {"format": "pt"})
    (tmp_path / "generation_config.json").unlink()
    model = base_model.load_quantized(tmp_path, torch.float32, "cpu", quantized)
    assert torch.equal(model.lm_head.weight, tiny.lm_head.weight)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_start_that_needs_dense_weights_refuses_a_base_in_4_bits(tmp_path: Path) -> None:
    checkpoints.save_4bit(attach(models.tiny_llama(vocab_size=256), r=1), tmp_path)
    quantization = {"block_size": 64, "double_quant": True, "codebook": NF4}
    with pytest.raises(ValueError, match="pissa starts from dense weights"):
        base_model.load_with_adapters(
            tmp_path, torch.float32, "cpu", "pissa", 0, {"r": 1}, quantization
        )


def test_settings_of_generation_in_the_config_are_saved_in_their_own_file(tmp_path: Path) -> None:
    model = models.tiny_llama(vocab_size=256)
    model.config.num_beams = 3
    base_model.save_dense(model, tmp_path)
    assert "num_beams" not in json.loads((tmp_path / "config.json").read_text())
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_model_that_does_not_generate_is_saved_without_settings_of_generation(
    tmp_path: Path,
) -> None:
    model = models.tiny_llama(vocab_size=256)
    model.can_generate = lambda: False
    base_model.save_dense(model, tmp_path)
    assert not (tmp_path / "generation_config.json").exists()


def test_a_model_in_4_bits_is_dense_after_a_merge_in_its_config_too(tmp_path: Path) -> None:
    checkpoints.save_4bit(attach(models.tiny_llama(vocab_size=256), r=1), tmp_path / "base")
    model = attach(checkpoints.load_4bit(tmp_path / "base"), r=1)
    merge(model)[0].save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.arange(20)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
