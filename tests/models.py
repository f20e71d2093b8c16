"""Small models for the tests that need a whole one, and not a good one."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

import pretrained


def tokenizer() -> PreTrainedTokenizerBase:
    """SmolLM2's, from the folder that the first call makes."""
    return AutoTokenizer.from_pretrained(pretrained.default_folder())


def tiny_llama(dtype: torch.dtype = torch.float32, vocab_size: int = 49152) -> LlamaForCausalLM:
    """Two random layers with grouped keys and a tied head: 14 linear layers to adapt."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
                         tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    return LlamaForCausalLM(config).to(dtype).eval()


def save_tiny_llama(folder: Path) -> Path:
    """A Hugging Face folder with the tiny model and SmolLM2's tokenizer."""
    tiny_llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
