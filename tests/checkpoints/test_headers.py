"""Any architecture loads as from_pretrained loads it, or is refused in one line."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_base_model import SMALL
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BigBirdConfig,
    DiffLlamaConfig,
    FalconConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import checkpoints
from checkpoints import base_model, headers
from helpers import models
from helpers.strategies import same_bits
from lora import FrozenWeight, QLoRALinear, attach

OTHER_NAMES = {  # of the sizes in SMALL
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 96,
    "n_positions": 64,
    "rotary_dim": 8,
    "d_model": 64,
    "n_layers": 2,
    "n_heads": 4,
    "max_seq_len": 64,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 96,
    "encoder_layers": 1,
    "ffn_dim": 96,
    "word_embed_proj_dim": 64,
    "head_dim": 16,
    "sliding_window": 16,
}
KINDS = """
    apertus arcee bart biogpt bitnet bloom codegen cohere cohere2 ctrl cwm doge ernie4_5 exaone4
    gemma gemma2 gemma3_text glm glm4 gpt_bigcode gpt_neox gpt_neox_japanese gptj granite helium
    hunyuan_v1_dense internlm3 jais2 lfm2 llama ministral mistral modernbert-decoder mpt nanochat
    nemotron olmo olmo2 olmo3 opt persimmon phi phi3 qwen2 qwen3 seed_oss smollm3 stablelm
    starcoder2 vaultgemma
""".split()


def tiny(kind: str) -> PretrainedConfig:
    """A config of an architecture with small sizes, whatever it calls them."""
    config_class = CONFIG_MAPPING[kind]
    known = config_class().to_dict()
    sizes = {key: value for key, value in (OTHER_NAMES | SMALL).items() if key in known}
    return config_class(**sizes, **({"layer_types": None} if "layer_types" in known else {}))


def save(config: PretrainedConfig, folder: Path) -> nn.Module:
    """Saves a random model as transformers does."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return model


def dense(weight: torch.Tensor, bias: torch.Tensor | None) -> QLoRALinear:
    return QLoRALinear(FrozenWeight(weight.clone(), codebook=None), bias)


def assert_loads_as_transformers_does(folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    ours = base_model.load_quantized(folder, dtype, "cpu", dense)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        logits = [model(input_ids=ids, use_cache=False).logits for model in (ours, theirs)]
    assert same_bits(*logits)


@pytest.mark.parametrize("kind", KINDS)
def test_an_architecture_gives_the_logits_of_from_pretrained(kind: str, tmp_path: Path) -> None:
    save(tiny(kind), tmp_path)
    assert_loads_as_transformers_does(tmp_path)


def test_names_that_transformers_changes_when_it_saves_are_changed_back(tmp_path: Path) -> None:
    model = save(GPTNeoXConfig(**SMALL, tie_word_embeddings=False), tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() != model.state_dict().keys()
    assert_loads_as_transformers_does(tmp_path)


def test_names_without_that_of_the_model_around_the_decoder_are_known(tmp_path: Path) -> None:
    model = models.tiny_llama(vocab_size=256)
    model.model.save_pretrained(tmp_path)
    assert "embed_tokens.weight" in load_file(tmp_path / "model.safetensors")
    assert_loads_as_transformers_does(tmp_path)


def test_in_4_bits_too(tmp_path: Path) -> None:
    model = attach(models.tiny_llama(vocab_size=256), r=1)
    checkpoints.save_4bit(model, tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    short = {name.removeprefix("model."): tensor for name, tensor in expected.items()}
    save_file(short, tmp_path / "model.safetensors", {"format": "pt"})
    again = checkpoints.load_4bit(tmp_path)
    checkpoints.save_4bit(again, tmp_path / "again")
    found = load_file(tmp_path / "again" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_two_tensors_of_one_name_in_the_model_are_refused(tmp_path: Path) -> None:
    models.tiny_llama(vocab_size=256).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["norm.weight"] = tensors["model.norm.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="model.norm.weight and norm.weight are both model.norm"):
        headers.read(tmp_path)


def test_a_small_model_may_have_a_window_that_begins_beyond_its_depth(tmp_path: Path) -> None:
    save(Qwen2Config(**SMALL, max_window_layers=28), tmp_path)
    assert_loads_as_transformers_does(tmp_path)


def test_parameters_that_a_layer_makes_outside_the_meta_device_are_filled_too(
    tmp_path: Path,
) -> None:
    save(DiffLlamaConfig(**SMALL), tmp_path)
    model = base_model.load_quantized(tmp_path, torch.float32, "cpu", dense)
    name = "model.layers.1.self_attn.lambda_q1"
    assert torch.equal(model.get_parameter(name), load_file(tmp_path / "model.safetensors")[name])


def test_parameters_that_transformers_keeps_in_float32_are_kept(tmp_path: Path) -> None:
    save(tiny("flint"), tmp_path)
    model = base_model.load_quantized(tmp_path, torch.bfloat16, "cpu", dense)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {torch.float32, torch.bfloat16} <= set(dtypes.values())
    assert_loads_as_transformers_does(tmp_path)


BERT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("bert", "bert.encoder.layer.0.is_decoder is False"),
        ("big_bird", "bert.encoder.layer.0.is_decoder is False"),
        ("megatron-bert", "bert.encoder.layer.0.is_decoder is False"),
        ("rembert", "rembert.encoder.layer.0.is_decoder is False"),
        ("roformer", "roformer.encoder.layer.0.is_decoder is False"),
        ("xlm", "causal is False in its config"),
    ],
)
def test_a_model_that_sees_what_it_must_predict_is_refused_by_what_its_config_says(
    kind: str, reason: str
) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind]())
    flag = "causal" if kind == "xlm" else "is_decoder"
    complaint = rf'must predict \({re.escape(reason)}\), .* or set "{flag}": true'
    with pytest.raises(ValueError, match=complaint):
        headers.require_causal_attention(model, Path("folder"))


@pytest.mark.parametrize("kind", [BertConfig, BigBirdConfig])
def test_it_is_accepted_if_it_was_trained_as_a_decoder(
    kind: type[PretrainedConfig], tmp_path: Path
) -> None:
    save(kind(**BERT), tmp_path)
    with pytest.raises(ValueError, match="sees the tokens that it must predict"):
        base_model.load_quantized(tmp_path, torch.float32, "cpu", dense)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"is_decoder": True}))
    assert_loads_as_transformers_does(tmp_path)


def test_the_probe_finds_a_dependence_that_no_config_mentions() -> None:
    """The last token must not reach an earlier logit; the first one may reach a later one."""
    model = models.tiny_llama(vocab_size=256)
    base_model.require_causal(model, "folder")
    norm = model.model.norm

    def leak(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        return output + 1e-3 * output.flip(1)

    hook = norm.register_forward_hook(leak)
    with pytest.raises(ValueError, match="folder: LlamaForCausalLM sees the tokens that it must"):
        base_model.require_causal(model, "folder")
    hook.remove()


def test_a_model_that_reads_the_weight_of_a_layer_itself_is_refused(tmp_path: Path) -> None:
    model = attach(models.tiny_llama(vocab_size=256), r=1)
    attention = model.model.layers[0].self_attn
    attention.forward = lambda hidden_states, **_: (
        F.linear(hidden_states, attention.q_proj.weight),
        None,
    )
    with pytest.raises(ValueError, match="LlamaForCausalLM does not run on 4-bit layers"):
        base_model.require_causal(model, "folder")


def test_a_subclass_of_a_linear_layer_is_refused_by_name(tmp_path: Path) -> None:
    save(FalconConfig(**BERT), tmp_path)
    with pytest.raises(ValueError, match="FalconForCausalLM is not supported"):
        headers.read(tmp_path)


def test_the_dense_layers_of_a_folder_in_4_bits_stay_dense(tmp_path: Path) -> None:
    """bitsandbytes was told to skip them, so 4-bit adapters must not be trained on NF4 there."""
    model = attach(models.tiny_llama(vocab_size=256), "q_proj", r=1)
    checkpoints.save_4bit(model, tmp_path / "some")
    again = base_model.load_quantized(
        tmp_path / "some", torch.float32, "cpu", lambda *args: pytest.fail("quantized again")
    )
    attach(again, r=1)
    kept = {
        name.rpartition(".")[2]
        for name, layer in again.named_modules()
        if isinstance(layer, QLoRALinear) and layer.base.codebook is None
    }
    assert kept == {"k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    checkpoints.save_4bit(again, tmp_path / "again")
    files = [tmp_path / name / "model.safetensors" for name in ("some", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    configs = [json.loads((file.parent / "config.json").read_text()) for file in files]
    assert configs[0] == configs[1]


def test_a_dense_llama_has_no_quantization(tmp_path: Path) -> None:
    LlamaConfig(**SMALL).save_pretrained(tmp_path)
    assert headers.quantization_of(tmp_path) is None
