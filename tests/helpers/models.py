"""Small random models for tests that need a complete model."""

from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from checkpoints import sources
from lora import attach


def tokenizer() -> PreTrainedTokenizerBase:
    """SmolLM2's tokenizer, from the folder that the first call creates."""
    return AutoTokenizer.from_pretrained(sources.find_local_model(sources.DEFAULT_MODEL))


def tiny_llama(dtype: torch.dtype = torch.float32, vocab_size: int = 49152) -> LlamaForCausalLM:
    """Two random layers with grouped keys and a tied head: 14 linear layers to adapt."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    # model.to(dtype) would round the rotary frequencies too.
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def save_tiny_llama(folder: Path) -> Path:
    """Saves the tiny model and SmolLM2's tokenizer to a Hugging Face folder."""
    tiny_llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def adapted(
    codebook: torch.Tensor | None = None, targets: str | list[str] = "all-linear", **settings: float
) -> nn.Module:
    """A tiny model in float64 with random adapters; on a dense base, to compare with PEFT."""
    settings = {"r": 4, "lora_alpha": 8} | settings
    model = tiny_llama(torch.float64, vocab_size=256)
    return trained(attach(model, targets, codebook=codebook, **settings))


def trained(model: nn.Module) -> nn.Module:
    """Gives the adapters of a model random values, as if trained."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model
