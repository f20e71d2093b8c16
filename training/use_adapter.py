"""What becomes of a trained adapter: it is asked, or merged into its base and written as a model of its own.

    python train.py --adapter out --prompt "..."          answers, word by word
    python train.py --adapter out --merge my-model        16 bits: what transformers, vLLM or llama.cpp read
    python train.py --adapter out --merge-4bit my-model   4 bits, as transformers and bitsandbytes read them

The base is the one that the adapter was trained on: the file says which, and how it was quantized. A merge adds the update to
what the 4-bit weights decode to, not to the weights that they were made of: that is the model that was trained.

A merge into 4 bits quantizes the sum anew. The base lies on the levels already, and an update is small beside the gaps between
them, so that rounding swallows most of it or all. How much, lora.merge says beforehand; 16 bits are the default.
"""

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

import lora
from checkpoints import base_model as streaming
from checkpoints import checkpoint
from checkpoints import io as files
from checkpoints import peft_adapter as peft_format
from checkpoints import sources as pretrained
from data import dataset as data
from lora import FrozenWeight, MergeAudit, QLoRALinear
from training.loss_and_eval import answers
from training.options import Options
from variants import init as variants


def load(
    adapter: Path, base: str | None, dtype: torch.dtype | None, device: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model with a trained adapter, and its tokenizer. base, dtype: where they are None, what the adapter was trained on."""
    quantization, was = peft_format.base_of(adapter)
    folder = pretrained.find(
        base or peft_format.read_config(adapter)["base_model_name_or_path"] or pretrained.DEFAULT
    )
    tokenizer = pretrained.tokenizer_in(folder)
    model = streaming.load(
        folder, dtype or was or torch.bfloat16, device, variants.maker("default", {}, quantization)
    )
    return checkpoint.load_adapter(model, adapter), tokenizer


def use(args: Options) -> int:
    """Do with --adapter what --prompt, --merge and --merge-4bit ask for. -> 0"""
    if args.prompt is not None:
        model, tokenizer = load(args.adapter, args.model, args.dtype, args.device)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        answers(
            model,
            tokenizer,
            [data.chat(tokenizer, args.prompt)],
            args.max_seq_len,
            args.dtype,
            streamer=streamer,
        )
    for folder, merged in ((args.merge, merge_16bit), (args.merge_4bit, merge_4bit)):
        if folder is not None:
            claim(folder)
            model, tokenizer = load(args.adapter, args.model, None, args.device)
            print(f"{args.adapter} is merged into {folder}: {merged(model, tokenizer, folder)}")
    return 0


def claim(folder: Path) -> None:
    """Refuse a folder that has something in it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"{folder} is there already and is not empty: choose another folder, or delete it"
        )


def whole(folder: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a folder, which appears whole or not at all."""
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        write(unfinished)
        if folder.exists():
            folder.rmdir()  # it is empty, or it stays
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@torch.no_grad()
def merge_16bit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
    """Write base + adapter as a dense model in float16 if the base is, else bfloat16. -> the audit in words"""
    model, audit = lora.merge(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(
            torch.float16 if parameter.dtype == torch.float16 else torch.bfloat16
        )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    whole(
        folder, lambda unfinished: [each.save_pretrained(unfinished) for each in (model, tokenizer)]
    )
    return f"all of the update, rounded to 16 bits. {in_words(audit)}"


@torch.no_grad()
def merge_4bit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
    """Write base + adapter as a model in 4 bits, quantized as the base is. -> the audit in words"""
    audit = {}
    for layer, names in lora.names_of(model, QLoRALinear).items():
        base, update = layer.base, layer.update()
        audit |= dict.fromkeys(names, lora.audit_merge(base, update))
        layer.base = FrozenWeight(
            base(update.dtype) + update, base.block_size, base.double_quant, base.codebook
        )
        layer.base.dtype = base.dtype  # that of what it decodes to
    whole(folder, lambda unfinished: save_4bit(model, tokenizer, unfinished))
    return in_words(audit)


def save_4bit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the frozen base of a model and its tokenizer; from now on this is the base that an adapter of the model names.

    Raises: ValueError if that would overwrite a dense model.
    """
    config = folder / "config.json"
    if config.is_file() and "quantization_config" not in files.read_json(config):
        raise ValueError(f"{folder} holds a model that is not in 4 bits: choose another folder")
    checkpoint.save_4bit(model, folder)
    tokenizer.save_pretrained(folder)
    model.name_or_path = str(folder.absolute())


def in_words(audit: dict[str, MergeAudit]) -> str:
    """How much of the whole model's update a merge into 4 bits keeps, and of the layer that loses most.

    Over the model, <realised, update> / <update, update> is the mean of the layers' shares, weighted by their squared norms.
    """
    if not audit:
        return "The base is dense: there are no 4 bits to merge into."
    total = math.fsum(each.update_norm**2 for each in audit.values())
    kept = (
        math.fsum(each.kept * each.update_norm**2 for each in audit.values()) / total
        if total
        else 1.0
    )
    worst = min(audit, key=lambda name: audit[name].cosine)
    return (
        f"A merge into 4 bits keeps {kept:.0%} of the update over {len(audit)} layers; worst is {worst}, where the change "
        f"has a cosine of {audit[worst].cosine:.2f} with the one that was wanted."
    )
