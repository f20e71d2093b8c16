"""Small Llamas that the scripts train themselves, each once: it is cached in models/."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

MODELS = Path(__file__).parent.parent / "models"


def cached(name: str, make: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerFast]]) -> Path:
    """The folder models/`name`; the first call makes the model and the tokenizer in it."""
    folder = MODELS / name
    if not (folder / "config.json").exists():
        temporary = folder.with_name(f"{name}.{os.getpid()}")
        for part in make():
            part.save_pretrained(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    return folder


def small_llama(
    vocabulary: int, width: int, mlp_width: int, layers: int, key_value_heads: int
) -> PreTrainedModel:
    """A random Llama in float32 with four heads, a tied head, and token 0 as its end."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=mlp_width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
