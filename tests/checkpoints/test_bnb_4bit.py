"""We load what transformers with bitsandbytes saves, bit for bit, and it loads what we save."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

import checkpoints
import lora
import nf4
from checkpoints import bnb_4bit, peft_adapter
from helpers import models
from helpers.strategies import same_bits
from lora import FrozenWeight, QLoRALinear

IDS = torch.arange(5, 25)[None]
NAMES = ["config.json", "generation_config.json", "model.safetensors"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """Keeps bitsandbytes from compiling some of its functions, which takes seconds each."""
    with torch.compiler.set_stance("force_eager"):
        yield


def logits(model: PreTrainedModel) -> torch.Tensor:
    """The logits in train mode, because bitsandbytes repacks its weights before it evaluates.

    Our kernels sum in another order, so the reference is used: the test is about loading.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_KERNELS", "reference")
        return model.train()(input_ids=IDS).logits.detach()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def quantized_by_peer(dense: PreTrainedModel, folder: Path, **settings: object) -> Path:
    """A folder that transformers saves after quantizing with bitsandbytes."""
    dense.save_pretrained(folder / "dense")
    config = BitsAndBytesConfig(load_in_4bit=True, **settings)
    AutoModelForCausalLM.from_pretrained(
        folder / "dense", quantization_config=config
    ).save_pretrained(folder / "theirs")
    return folder / "theirs"


def bytes_of(base: FrozenWeight) -> dict[str, torch.Tensor]:
    """A base as bitsandbytes would save it."""
    return bnb_4bit.pack(base, "weight")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_folder_of_transformers_and_bitsandbytes_is_loaded_and_saved_again_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, double_quant: bool, kind: str
) -> None:
    settings = {
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": dtype,
    }
    folder = quantized_by_peer(models.tiny_llama(dtype, vocab_size=256), tmp_path, **settings)
    ours = checkpoints.load_4bit(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert not ours.training and not any(parameter.requires_grad for parameter in ours.parameters())
    layers = {name: layer for name, layer in ours.named_modules() if isinstance(layer, QLoRALinear)}
    assert len(layers) == 14
    saved = load_file(folder / "model.safetensors")
    for name, layer in layers.items():
        tensors = bnb_4bit.pack(layer.base, f"{name}.weight")
        assert tensors.keys() == {key for key in saved if key.startswith(f"{name}.weight")}
        assert all(same_bits(tensors[key], saved[key]) for key in tensors)
        weight = theirs.get_submodule(name).weight
        assert torch.equal(
            layer.base(), bitsandbytes.functional.dequantize_4bit(weight, weight.quant_state)
        )
    assert same_bits(logits(ours), logits(theirs))
    checkpoints.save_4bit(ours, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", bnb_4bit.BLOCK_SIZES)
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_folder_of_ours_is_loaded_by_transformers_as_linear4bit_with_the_same_logits(
    tmp_path: Path, dtype: torch.dtype, block_size: int, double_quant: bool
) -> None:
    """For each block size of bitsandbytes.

    Rows have 1024 elements: in a row that is not a multiple of the block, bitsandbytes' AVX-512
    code is wrong, and for larger blocks it uses other code.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=1024,
        intermediate_size=1024,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    ours = lora.attach(
        AutoModelForCausalLM.from_config(config, dtype=dtype),
        block_size=block_size,
        double_quant=double_quant,
    )
    checkpoints.save_4bit(ours, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    linears = [
        module for module in theirs.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)
    ]
    assert len(linears) == 7 and linears[0].weight.quant_state.blocksize == block_size
    assert same_bits(logits(theirs), logits(ours))
    again = checkpoints.load_4bit(tmp_path)
    assert same_bits(logits(again), logits(ours))
    checkpoints.save_4bit(again, tmp_path / "again")
    assert contents(tmp_path / "again") == {name: (tmp_path / name).read_bytes() for name in NAMES}


SMALL = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
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
    LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
    MistralConfig(**SMALL, sliding_window=8),
    LlamaConfig(**SMALL, rope_parameters=LLAMA_3),
    PhiConfig(**SMALL),
    Qwen3Config(**SMALL, head_dim=16),
    GemmaConfig(**SMALL, head_dim=16),
]


@pytest.mark.parametrize("config", ARCHITECTURES, ids=lambda config: config.model_type)
def test_several_architectures_come_back_with_the_same_logits(
    tmp_path: Path, config: PretrainedConfig
) -> None:
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    # Biases and norms start as zeros and ones, which would hide that two are exchanged.
    for parameter in dense.parameters():
        nn.init.normal_(parameter, std=0.1)
    folder = quantized_by_peer(
        dense, tmp_path, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    ours = checkpoints.load_4bit(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert same_bits(logits(ours), logits(theirs))
    for name, buffer in theirs.named_buffers():
        assert same_bits(ours.get_buffer(name), buffer), name
    checkpoints.save_4bit(ours, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)


def test_the_compute_dtype_of_the_folder_is_that_of_the_layers(tmp_path: Path) -> None:
    """The default of transformers is float32, even for a base of 16 bits."""
    folder = quantized_by_peer(
        models.tiny_llama(torch.bfloat16, vocab_size=256), tmp_path, bnb_4bit_quant_type="nf4"
    )
    ours = checkpoints.load_4bit(folder)
    assert ours.model.layers[0].mlp.up_proj.compute_dtype == torch.float32
    assert same_bits(logits(ours), logits(AutoModelForCausalLM.from_pretrained(folder)))
    lora.attach(ours, r=2)
    assert ours.model.layers[0].mlp.up_proj.compute_dtype == torch.float32


def test_layers_that_were_left_dense_stay_dense_on_both_sides(tmp_path: Path) -> None:
    dense = models.tiny_llama(torch.bfloat16, vocab_size=256)
    ours = lora.attach(dense, ["q_proj", "up_proj"], r=2)
    checkpoints.save_4bit(ours, tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    again = checkpoints.load_4bit(tmp_path / "ours")
    in_4_bits = [isinstance(module, bitsandbytes.nn.Linear4bit) for module in theirs.modules()]
    assert sum(in_4_bits) == 4
    layers = [layer for layer in again.modules() if isinstance(layer, QLoRALinear)]
    assert len(layers) == 14 and sum(layer.base.codebook is not None for layer in layers) == 4
    for model in (theirs, again):
        assert same_bits(logits(model), logits(ours))
    checkpoints.save_4bit(again, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "ours")
    skip = ["down_proj", "lm_head"]
    dense = models.tiny_llama(torch.bfloat16, vocab_size=256)
    folder = quantized_by_peer(dense, tmp_path, llm_int8_skip_modules=skip)
    checkpoints.save_4bit(checkpoints.load_4bit(folder), tmp_path / "skipped")
    saved_again = AutoModelForCausalLM.from_pretrained(tmp_path / "skipped")
    assert same_bits(logits(saved_again), logits(AutoModelForCausalLM.from_pretrained(folder)))


@pytest.mark.parametrize("storage", ["bfloat16", "float32"])
def test_packed_bytes_may_be_stored_as_another_dtype(tmp_path: Path, storage: str) -> None:
    dense = models.tiny_llama(torch.bfloat16, vocab_size=256)
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    folder = quantized_by_peer(dense, tmp_path, bnb_4bit_quant_storage=storage, **settings)
    ours = checkpoints.load_4bit(folder)
    plain = checkpoints.load_4bit(quantized_by_peer(dense, tmp_path / "plain", **settings))
    assert same_bits(logits(ours), logits(plain))
    checkpoints.save_4bit(ours, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)


def split(folder: Path, into: Path) -> Path:
    """The same model in two files and an index."""
    shutil.copytree(folder, into)
    tensors = load_file(into / "model.safetensors")
    (into / "model.safetensors").unlink()
    names = sorted(tensors)
    places = {
        name: f"model-0000{1 + (index > len(names) // 2)}-of-00002.safetensors"
        for index, name in enumerate(names)
    }
    for place in set(places.values()):
        shard = {name: tensors[name] for name in names if places[name] == place}
        save_file(shard, into / place, {"format": "pt"})
    index = json.dumps({"metadata": {}, "weight_map": places})
    (into / "model.safetensors.index.json").write_text(index)
    return into


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ours; tests must not change it."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    checkpoints.save_4bit(lora.attach(models.tiny_llama(torch.bfloat16, vocab_size=256)), folder)
    return folder


def test_a_model_in_several_files_is_the_same_model(saved: Path, tmp_path: Path) -> None:
    shards = split(saved, tmp_path / "shards")
    assert same_bits(
        logits(checkpoints.load_4bit(shards)), logits(AutoModelForCausalLM.from_pretrained(shards))
    )
    checkpoints.save_4bit(checkpoints.load_4bit(shards), tmp_path / "one")
    assert contents(tmp_path / "one") == contents(saved)


def test_an_adapter_on_a_loaded_model_computes_what_it_did_on_the_base_it_was_trained_on(
    tmp_path: Path,
) -> None:
    first = lora.attach(
        models.tiny_llama(torch.bfloat16, vocab_size=256), ["q_proj", "down_proj"], r=3
    )
    for name, parameter in first.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1)
    checkpoints.save_4bit(lora.attach(models.tiny_llama(torch.bfloat16, vocab_size=256)), tmp_path)
    checkpoints.save_adapter(first, tmp_path / "adapter")
    again = checkpoints.load_4bit(tmp_path)
    checkpoints.load_adapter(again, tmp_path / "adapter")
    assert len(peft_adapter.adapted_layers(again)) == 4
    layer = first.model.layers[1].mlp.down_proj
    x = torch.randn(3, layer.in_features, dtype=torch.bfloat16)
    assert same_bits(again.model.layers[1].mlp.down_proj(x), layer(x))


def test_attach_keeps_the_bytes_of_a_layer_that_is_in_4_bits_already(saved: Path) -> None:
    model = checkpoints.load_4bit(saved)
    before = {
        name: bytes_of(layer.base)
        for name, layer in model.named_modules()
        if isinstance(layer, QLoRALinear)
    }
    plain = logits(model)
    lora.attach(model, r=2, block_size=128, codebook=nf4.FP4)  # which concern dense layers
    assert same_bits(logits(model), plain)
    assert len(peft_adapter.adapted_layers(model)) == len(before)
    for name, layer in peft_adapter.adapted_layers(model).items():
        assert all(
            same_bits(tensor, before[name][key]) for key, tensor in bytes_of(layer.base).items()
        )
    trainable = {
        name.rpartition(".")[2]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert trainable == {"lora_A", "lora_B"}


def test_a_layer_without_an_adapter_passes_the_gradient_on_and_saves_nothing(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_KERNELS", "reference")  # it multiplies as torch does
    layer = checkpoints.load_4bit(saved).model.layers[0].mlp.up_proj
    x = torch.randn(3, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    assert sum(tensor.numel() for tensor in kept) == 0
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(y) @ layer.base())


def test_a_loaded_model_merges_into_the_dense_model_it_stands_for(saved: Path) -> None:
    model = checkpoints.load_4bit(saved)
    before = logits(model)
    merged, audit = lora.merge(model)
    assert all(type(module) is not QLoRALinear for module in merged.modules()) and len(audit) == 14
    assert same_bits(logits(merged), before)


def test_what_has_no_layer_in_4_bits_or_none_of_that_format_is_not_saved(tmp_path: Path) -> None:
    refused = {
        "layers in 4 bits": models.tiny_llama(vocab_size=256),
        "model of transformers": lora.attach(nn.Sequential(nn.Linear(64, 64))),
        "it is dense": lora.attach(models.tiny_llama(vocab_size=256), codebook=None),
        "8 levels": lora.attach(models.tiny_llama(vocab_size=256), codebook=nf4.normal_float(3)),
        "blocks of 16": lora.attach(models.tiny_llama(vocab_size=256), block_size=16),
        "torch.float64": lora.attach(models.tiny_llama(torch.float64, vocab_size=256)),
    }
    for complaint, model in refused.items():
        with pytest.raises(ValueError, match=complaint):
            checkpoints.save_4bit(model, tmp_path / "folder")
        assert not (tmp_path / "folder").exists()


def test_a_head_that_is_no_longer_tied_is_saved_or_refused(tmp_path: Path) -> None:
    """After training it, or after resizing one of both."""
    model = lora.attach(models.tiny_llama(vocab_size=256), r=1)
    model.lm_head.weight = nn.Parameter(2 * model.lm_head.weight)
    message = "lm_head.weight and model.embed_tokens.weight are no longer one parameter, and the"
    with pytest.raises(ValueError, match=message):
        checkpoints.save_4bit(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    model.config.tie_word_embeddings = False
    checkpoints.save_4bit(model, tmp_path / "folder")
    assert same_bits(logits(checkpoints.load_4bit(tmp_path / "folder")), logits(model))


FIRST = "model.layers.0.self_attn.q_proj.weight"
STATE = f"{FIRST}.quant_state.bitsandbytes__nf4"


def set_state(tensors: dict[str, torch.Tensor], **entries: object) -> None:
    state = json.loads(bytes(tensors[STATE].tolist())) | entries
    text = json.dumps({key: value for key, value in state.items() if value != "gone"})
    tensors[STATE] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


SPOILED = {
    "must have 2048 bytes": lambda t: t.update({FIRST: t[FIRST][:-1]}),
    "absmax must be torch.uint8": lambda t: t.update(
        {f"{FIRST}.absmax": t[f"{FIRST}.absmax"].float()}
    ),
    "nested_absmax must be .* is missing": lambda t: t.pop(f"{FIRST}.nested_absmax"),
    "nested_absmax holds NaN": lambda t: t[f"{FIRST}.nested_absmax"].fill_(torch.nan),
    "nested_absmax holds magnitudes, and -1.0": lambda t: t[f"{FIRST}.nested_absmax"].fill_(-1),
    "quant_map is not nf4": lambda t: t[f"{FIRST}.quant_map"].mul_(0.5),
    "q_proj.weight.stray belongs to nothing": lambda t: t.update(
        {f"{FIRST}.stray": torch.zeros(2)}
    ),
    "norm.weight is missing": lambda t: t.pop("model.norm.weight"),
    "norm.weight holds NaN": lambda t: t["model.norm.weight"].fill_(torch.inf),
    r"norm.weight is \(65,\)": lambda t: t.update({"model.norm.weight": torch.ones(65)}),
    r"norm.weight is \(64,\), torch.int32": lambda t: t.update(
        {"model.norm.weight": torch.ones(64, dtype=torch.int32)}
    ),
    "lm_head.weight and model.embed_tokens.weight differ": lambda t: t.update(
        {"lm_head.weight": torch.zeros(256, 64)}
    ),
    r"shape must be \[64, 64\]": lambda t: set_state(t, shape=[32, 128]),
    "block sizes must be powers of two": lambda t: set_state(t, blocksize=48),
    "block sizes .*'nested_blocksize': 0": lambda t: set_state(t, nested_blocksize=0),
    "dtype must be float32, float16, bfloat16": lambda t: set_state(t, dtype="float8"),
    "nested_offset must be a number": lambda t: set_state(t, nested_offset=None),
    "nested_dtype must be float32": lambda t: set_state(t, nested_dtype="float16"),
    "quant_type must be nf4": lambda t: set_state(t, quant_type="fp4"),
    "it has quant_type, blocksize, dtype, shape, nested_block": lambda t: set_state(
        t, nested_offset="gone"
    ),
    "is not a quantization state in JSON": lambda t: t.update(
        {STATE: torch.tensor([123], dtype=torch.uint8)}
    ),
    "elsewhere is not a linear layer": lambda t: t.update(
        {STATE.replace(FIRST, "elsewhere.weight"): t[STATE].clone()}
    ),
    "norm is not a linear layer": lambda t: t.update(
        {STATE.replace(FIRST, "model.norm.weight"): t[STATE].clone()}
    ),
}


@pytest.mark.parametrize("complaint", SPOILED)
def test_a_tensor_that_is_not_what_it_must_be_is_named(
    saved: Path, tmp_path: Path, complaint: str
) -> None:
    shutil.copytree(saved, tmp_path / "spoiled")
    tensors = load_file(saved / "model.safetensors")
    SPOILED[complaint](tensors)
    save_file(tensors, tmp_path / "spoiled" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=complaint) as error:
        checkpoints.load_4bit(tmp_path / "spoiled")
    assert "spoiled" in str(error.value)


CONFIGS = {
    "not that of 4 bits by bitsandbytes, but None": {"quantization_config": None},
    "not that of 4 bits .*gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "not that of 4 bits .*load_in_8bit": {
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}
    },
    "compute_dtype must be one of": {
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_compute_dtype": "int8",
        }
    },
    "num_hidden_layers is 1000000000, and there are": {"num_hidden_layers": 10**9},
    "no causal language model .*no such model": {"model_type": "no such model"},
    "_proj.* shape must be": {"hidden_size": 128},
    "names code to download, kernels-community/flash": {
        "attn_implementation": "kernels-community/flash-attn"
    },
    "would take .* bytes": {"head_dim": 2**40},
}


@pytest.mark.parametrize("complaint", CONFIGS)
def test_a_config_that_does_not_fit_is_refused_by_its_key(
    saved: Path, tmp_path: Path, complaint: str
) -> None:
    shutil.copytree(saved, tmp_path / "spoiled")
    config = json.loads((saved / "config.json").read_text()) | CONFIGS[complaint]
    (tmp_path / "spoiled" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=complaint) as error:
        checkpoints.load_4bit(tmp_path / "spoiled")
    assert "spoiled" in str(error.value)
