"""Makes the model and the optimizer of a run from the flags.

The model is a frozen base, quantized as it is read, with adapters to train. The adapters are new,
or those of --init-adapter, which are trained on. The latter fit only the base on which they were
trained, so their files decide about base and adapters, and the flags for these must be left out.
"""

from __future__ import annotations  # type hints must not load the classes of transformers

from pathlib import Path

import torch
import transformers
from torch import nn
from torch.optim import Optimizer

from checkpoints import peft_adapter, sources
from checkpoints.base_model import load_with_adapters
from data import packing
from lora import QLoRALinear
from nf4 import normal_float
from paged_optim import PagedAdamW
from training import distributed, sharding
from training.options import QUANT_BITS, Options
from training.use_adapter import load_adapted_model, save_4bit
from variants.dora import DoRALinear


def load_model(
    args: Options, tokenizer: transformers.PreTrainedTokenizerBase
) -> transformers.PreTrainedModel:
    """The frozen base with adapters: each nn.Linear is quantized as it is read."""
    folder, start = base_folder(args)
    device = "cpu" if args.shard else args.device  # a sharded model moves block by block
    if args.init_adapter:
        model, _ = load_adapted_model(args.init_adapter, str(folder), args.dtype, device)
    else:
        adapter = adapter_settings(args)
        base = quantization_settings(args)
        model = load_with_adapters(folder, args.dtype, device, start, args.seed, adapter, base)
    model.name_or_path = args.model or str(folder)  # the base that adapter_config.json names
    if args.save_4bit and distributed.is_main():
        save_4bit(model, tokenizer, args.save_4bit)
    if args.packing:
        packing.check(model)
    if args.grad_checkpoint:
        model.activation_checkpointing_enable()
    if args.shard:
        sharding.shard_model(model, args.device)
    return model


def base_folder(args: Options) -> tuple[Path, str]:
    """The folder to read the base from, and how its adapters start.

    A resumed run with --save-4bit reads the saved base, which --lora-start has already changed.
    """
    if args.resume and args.save_4bit:
        return args.save_4bit, "default"
    return sources.find_model(args.model or sources.DEFAULT_MODEL), args.lora_start


def adapter_settings(args: Options) -> dict:
    """The settings of new adapters, as lora.attach takes them."""
    return {
        "layer_type": DoRALinear if args.use_dora else QLoRALinear,
        "r": args.lora_r,
        "lora_alpha": args.lora_alpha,
        "lora_dropout": args.lora_dropout,
        "use_rslora": args.use_rslora,
    }


def quantization_settings(args: Options) -> dict:
    """How the base is kept, as FrozenWeight takes it."""
    bits = QUANT_BITS[args.quant]
    return {
        "block_size": args.block_size,
        "double_quant": not args.no_double_quant,
        "codebook": normal_float(bits) if bits else None,  # None: 16-bit LoRA
    }


def adopt_settings(args: Options) -> None:
    """With --init-adapter, set the flags of the base and of the adapters to what its files say.

    Raises: ValueError if they are missing or damaged, or the base has a code that no flag names.
    """
    if args.init_adapter is None:
        return
    config = peft_adapter.read_config(args.init_adapter)
    base, _ = peft_adapter.base_of(args.init_adapter)
    levels = 1 if base["codebook"] is None else base["codebook"].numel()
    names = {2**bits: name for name, bits in QUANT_BITS.items()}
    if levels not in names:
        raise ValueError(
            f"{args.init_adapter} was trained on a base of {levels} levels, and this program has "
            f"{', '.join(QUANT_BITS)}: train a new adapter"
        )
    args.quant = names[levels]
    args.block_size = base["block_size"]
    args.no_double_quant = not base["double_quant"]
    args.model = args.model or config["base_model_name_or_path"]
    args.lora_r = config["r"]
    args.lora_alpha = float(config["lora_alpha"])
    args.lora_dropout = float(config["lora_dropout"])
    args.use_rslora = config["use_rslora"]
    args.use_dora = config["use_dora"]


def make_optimizer(model: nn.Module, args: Options) -> Optimizer:
    """AdamW for the adapters: paged, or torch's own; both give the same bits."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if args.optim == "adamw":
        return torch.optim.AdamW(trainable, weight_decay=0.0)
    resident = None if args.resident_mb is None else int(args.resident_mb * 2**20)
    return PagedAdamW(trainable, weight_decay=0.0, resident_bytes=resident)
