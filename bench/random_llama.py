"""A Llama with the shape of a real one and random numbers, for what depends on sizes alone: memory, and time.

A weight in 4 bits is packed bytes and constants, and neither memory nor time cares which. So it is made of random bytes, layer
by layer: no dense weight ever exists, and a model of 65B parameters is there in seconds, on a card that could never hold it in
16 bits. The constants lie around 0.05, so that weights are as large as trained ones and nothing overflows.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from double_quant import DoubleQuantized
from lora import FrozenWeight, QLoRALinear
from memory.formula import Shape
from nf4 import NF4, Quantized


def random_weight(out: int, width: int, device: torch.device) -> FrozenWeight:
    """A double-quantized NF4 weight of random bytes."""
    n = out * width
    packed = torch.randint(0, 256, ((n + 1) // 2, 1), dtype=torch.uint8, device=device)
    codes = torch.randint(0, 256, (-(-n // 64),), dtype=torch.uint8, device=device)
    nested = torch.full((-(-codes.numel() // 256),), 0.01, device=device)
    q = Quantized(packed, codes, NF4.to(device), torch.Size((out, width)), torch.bfloat16, 64)
    return FrozenWeight.from_quantized(
        q, DoubleQuantized(codes, nested, torch.full((1,), 0.05, device=device))
    )


def described(shape: Shape) -> nn.Module:
    """A Llama of this shape on the meta device: shapes and no memory."""
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
    """Replace the linear layers by make(out, in), one at a time, and give the rest numbers; the head stays dense."""
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and linear is not model.get_output_embeddings():
            model.set_submodule(name, make(linear.out_features, linear.in_features))
    for name, parameter in [each for each in model.named_parameters() if each[1].is_meta]:
        value = torch.ones_like(parameter, device=device)  # a norm's weight
        module, _, attribute = name.rpartition(".")
        value = value if value.dim() == 1 else value.normal_(std=0.02)
        setattr(model.get_submodule(module), attribute, nn.Parameter(value, requires_grad=False))
    with device:  # the rotation's buffers are no parameters, and no random ones will do
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model.train()


def build(shape: Shape, r: int, device: torch.device) -> nn.Module:
    """A Llama of this shape as lora.attach leaves it, with checkpointing."""

    def layer(out: int, width: int) -> QLoRALinear:
        return QLoRALinear(random_weight(out, width, device), None, r, lora_alpha=16)

    model = fill(described(shape), layer, device)
    model.activation_checkpointing_enable()
    return model
