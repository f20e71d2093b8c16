"""Makes the model and the optimizer of a run from the flags.

The model is a frozen base, quantized as it is read, with adapters to train. The adapters are new,
or those of --init-adapter, which are trained on. The latter fit only the base on which they were
trained, so their files say what base and adapters are, and flags cannot change that.
"""

from __future__ import annotations  # type hints must not load the classes of transformers

from pathlib import Path

import torch
import transformers
from torch import nn
from torch.optim import Optimizer

from checkpoints import peft_adapter, sources
from checkpoints.base_model import load_quantized, load_with_adapters
from data import packing
from lora import QLoRALinear
from paged_optim import PagedAdamW
from training import attention, distributed, end_tokens, sharding
from training.base_check import adopt_quantization, quantization_of
from training.options import Options
from training.use_adapter import adopt_trained_base, base_name, save_4bit
from variants.dora import DoRALinear
from variants.init import maker as layer_maker


def load_model(
    args: Options, tokenizer: transformers.PreTrainedTokenizerBase
) -> transformers.PreTrainedModel:
    """The frozen base with adapters: each nn.Linear is quantized as it is read."""
    quantization = quantization_of(args)
    folder, start = base_folder(args)
    device = "cpu" if args.shard else args.device  # a sharded model moves block by block
    if args.init_adapter:
        make_layer = layer_maker("default", {}, quantization)
        model = load_quantized(folder, args.dtype, device, make_layer)
        peft_adapter.load_adapter(model, args.init_adapter)
        end_tokens.load(model, args.init_adapter)
    else:
        adapter = adapter_settings(args)
        model = load_with_adapters(
            folder, args.dtype, device, start, args.seed, adapter, quantization
        )
    model.name_or_path = args.model or str(folder)  # the base that adapter_config.json names
    if args.save_4bit and distributed.is_main():
        save_4bit(model, tokenizer, args.save_4bit)
    if torch.device(args.device).type == "cpu":
        attention.use(model)
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


def adopt_settings(args: Options) -> None:
    """With --init-adapter, set the flags of the model to what the adapter's files say.

    Raises: ValueError if the files are missing or damaged, or a flag about the base disagrees.
    """
    if args.init_adapter is None:
        return
    config = peft_adapter.read_config(args.init_adapter)
    trained = peft_adapter.base_of(args.init_adapter)
    if trained:  # PEFT's files do not say it
        adopt_quantization(args, trained.quantization, args.init_adapter)
    args.model = base_name(args, args.init_adapter)
    args.lora_r = config["r"]
    args.lora_alpha = float(config["lora_alpha"])
    args.lora_dropout = float(config["lora_dropout"])
    args.use_rslora = config["use_rslora"]
    args.use_dora = config["use_dora"]


def check_init_adapter(args: Options) -> None:
    """Check that the base is what --init-adapter was trained on. Raises: ValueError."""
    if args.init_adapter is not None:
        adopt_trained_base(args, args.init_adapter, base_folder(args)[0])


def make_optimizer(model: nn.Module, args: Options) -> Optimizer:
    """AdamW for the adapters: paged, or torch's own; both give the same bits."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if args.optim == "adamw":
        return torch.optim.AdamW(trainable, weight_decay=0.0)
    resident = None if args.resident_mb is None else int(args.resident_mb * 2**20)
    return PagedAdamW(trainable, weight_decay=0.0, resident_bytes=resident)
