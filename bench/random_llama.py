"""A Llama with the sizes of a real one and random weights, to measure memory and time.

Memory and time depend on sizes alone, so a 4-bit weight may be random bytes. No dense weight ever
exists, and a model of 65B parameters is built in seconds on a card that could not hold it in 16
bits. The constants are around 0.05, so weights have the magnitude of trained ones and nothing
overflows.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from double_quant import DoubleQuantized
from lora import FrozenWeight, QLoRALinear
from memory.formula import Shape
from nf4 import NF4, Quantized

TINY = Shape(
    layers=3, hidden=64, intermediate=176, heads=4, kv_heads=4, head_dim=16, vocabulary=500
)
SIZES = {
    "tiny": TINY,
    "135M": Shape(30, 576, 1536, 9, 3, 64, 49152, tied=True),  # SmolLM2
    "360M": Shape(32, 960, 2560, 15, 5, 64, 49152, tied=True),  # SmolLM2
    "1.1B": Shape(22, 2048, 5632, 32, 4, 64, 32000),  # TinyLlama
}


def random_weight(n_out: int, n_in: int, device: torch.device) -> FrozenWeight:
    """A double-quantized NF4 weight of random bytes."""
    n = n_out * n_in
    blocks = -(-n // 64)
    packed = torch.randint(0, 256, ((n + 1) // 2, 1), dtype=torch.uint8, device=device)
    codes = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device)
    nested = torch.full((-(-blocks // 256),), 0.01, device=device)
    mean = torch.full((1,), 0.05, device=device)
    shape = torch.Size((n_out, n_in))
    q = Quantized(packed, codes, NF4.to(device), shape, torch.bfloat16, 64)
    return FrozenWeight.from_quantized(q, DoubleQuantized(codes, nested, mean))


def skeleton(shape: Shape) -> nn.Module:
    """A Llama of this shape on the meta device, which takes no memory."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=2048,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def fill(
    model: nn.Module, make: Callable[[int, int], nn.Module], device: torch.device
) -> nn.Module:
    """Replaces each linear layer but the head by make(out, in); the rest gets random values."""
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and linear is not model.get_output_embeddings():
            model.set_submodule(name, make(linear.out_features, linear.in_features))
    for name, parameter in list(model.named_parameters()):
        if not parameter.is_meta:
            continue
        value = torch.ones_like(parameter, device=device)
        if value.dim() > 1:  # not the weight of a norm, which stays 1
            value.normal_(std=0.02)
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, nn.Parameter(value, requires_grad=False))
    model.tie_weights()  # a tied head still has the embedding without memory
    with device:  # the buffers of the rotation are computed, not random
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model.train()


def build(shape: Shape, r: int, device: torch.device) -> nn.Module:
    """A Llama of this shape after lora.attach, with checkpointing."""

    def layer(n_out: int, n_in: int) -> QLoRALinear:
        return QLoRALinear(random_weight(n_out, n_in, device), None, r, lora_alpha=16)

    model = fill(skeleton(shape), layer, device)
    model.activation_checkpointing_enable()
    return model
