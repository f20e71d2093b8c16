"""Uses a trained adapter: answers a prompt, or merges it into its base and saves the result.

    python train.py --adapter out --prompt "..."          prints the answer word by word
    python train.py --adapter out --merge my-model        16 bits, for transformers, vLLM, llama.cpp
    python train.py --adapter out --merge-4bit my-model   4 bits, for transformers and bitsandbytes

The base is the one that the adapter was trained on: the adapter's files name it and say how it was
quantized. A merge adds the update to the decoded 4-bit weights, not to the weights before
quantization, because training ran on the decoded weights.

A merge into 4 bits quantizes the sum again. The decoded weights are levels of the 4-bit code, and
an update is small compared with the gaps between levels, so rounding removes most or all of it. The
audit of lora.merge says how much. A 16-bit merge prints it, too, so that a user knows it before a
4-bit merge.
"""

from __future__ import annotations  # type hints must not load the classes of transformers

import math
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers

import lora
from checkpoints import base_model, headers, io, peft_adapter, portable, sources
from checkpoints.bnb_4bit import DTYPES
from checkpoints.quantization import DENSE, Quantization
from data.dataset import encode_prompt
from lora import FrozenWeight, MergeAudit, QLoRALinear
from training import end_tokens
from training.base_check import (
    adopt_quantization,
    quantization_of,
    require_known_ids,
    require_no_dense_model,
)
from training.loss_and_eval import generate_answers
from training.options import Options
from variants import init

# Writes a merged model to a folder; returns the audit as text.
Merge = Callable[
    ["transformers.PreTrainedModel", "transformers.PreTrainedTokenizerBase", Path], str
]


def use_adapter(args: Options) -> int:
    """Carries out --prompt, --merge and --merge-4bit. Returns the exit status, 0."""
    if args.prompt is not None:
        answer_prompt(args)
    if args.merge is not None:
        merge_into(args.merge, merge_16bit, args)
    if args.merge_4bit is not None:
        merge_into(args.merge_4bit, merge_4bit, args)
    return 0


def answer_prompt(args: Options) -> None:
    """Prints the answer to --prompt while it is generated."""
    model, tokenizer = load_adapted_model(args, args.dtype)
    prompts = [encode_prompt(tokenizer, args.prompt, args.system)]
    rows = model.get_input_embeddings().num_embeddings
    require_known_ids(prompts, rows, tokenizer, model.name_or_path)
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    generate_answers(model, tokenizer, prompts, args.max_seq_len, args.dtype, streamer=streamer)


def merge_into(folder: Path, merge: Merge, args: Options) -> None:
    """Merges --adapter into its base, saves the result to a new folder and prints the audit."""
    require_empty_folder(folder)
    model, tokenizer = load_adapted_model(args)
    print(f"{args.adapter} is merged into {folder}: {merge(model, tokenizer, folder)}")


def load_adapted_model(
    args: Options, dtype: torch.dtype | None = None
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """Loads the base of --adapter with the adapter, and its tokenizer.

    dtype: None stands for the dtype that the adapter was trained with, or else that of the base.
    """
    folder = sources.find_model(base_name(args, args.adapter))
    tokenizer = sources.load_tokenizer(folder)
    trained_dtype = adopt_trained_base(args, args.adapter, folder)
    dtype = dtype or trained_dtype or dtype_of(folder)
    make_layer = init.maker("default", {}, quantization_of(args))
    model = base_model.load_quantized(folder, dtype, args.device, make_layer)
    model = peft_adapter.load_adapter(model, args.adapter)
    end_tokens.load(model, args.adapter)
    return model, tokenizer


def base_name(args: Options, adapter: Path) -> str:
    """The base of an adapter: --model, or else what its files name.

    Raises: ValueError naming the entry of adapter_config.json if that base is nowhere.
    """
    if args.model:
        return args.model
    name = peft_adapter.read_config(adapter)["base_model_name_or_path"] or sources.DEFAULT_MODEL
    try:
        sources.find_local_model(name)
    except ValueError as error:
        entry = f"{adapter / 'adapter_config.json'}: base_model_name_or_path"
        reason = str(error).removesuffix(f"; {sources.REMEDY}")
        raise ValueError(f"{entry}: {reason}: give the base as --model") from None
    return name


def adopt_trained_base(args: Options, adapter: Path, folder: Path) -> torch.dtype | None:
    """Sets the flags that describe the base to what an adapter was trained on; returns its dtype.

    PEFT's adapters do not say what that was: the base is then what the folder is, or what the flags
    make of a dense one, and a line on stderr says so.
    Raises: ValueError if adapter, folder and flags disagree.
    """
    base = peft_adapter.base_of(adapter)
    trained = base.quantization if base else None
    found = headers.quantization_of(folder)
    if trained and found and trained != found:
        raise ValueError(
            f"{adapter} was trained on a base that was {trained}, and {folder} is "
            f"{found}: give --model the base that it was trained on"
        )
    if base and base.layers and not found:
        name, other = next(iter(base.layers.items()))
        raise ValueError(
            f"{adapter} was trained on a base that was {trained}, and {name} was {other}; train.py "
            "quantizes all layers alike: use checkpoints.load_adapter and lora.merge in Python"
        )
    known = trained or found
    if known:
        adopt_quantization(args, known, adapter if trained else folder)
        quantization_of(args)  # raises a ValueError if the codebook has no name
    else:
        kept = Quantization(args.quant, args.block_size, not args.no_double_quant)
        other = "nf4 quantizes it" if args.quant == DENSE else "none keeps it dense"
        print(
            f"{adapter} does not say how its base was quantized: {folder} is used "
            f"{kept}; --quant {other}",
            file=sys.stderr,
        )
    return base.dtype if base else None


def dtype_of(folder: Path) -> torch.dtype:
    """The dtype in the config of a folder, bfloat16 if there is none."""
    config = io.read_json(folder / "config.json")
    name = config.get("dtype") or config.get("torch_dtype")
    return DTYPES[name] if name in list(DTYPES) else torch.bfloat16


def require_empty_folder(folder: Path) -> None:
    """Raises: ValueError if the path exists, unless it is an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty: choose another folder, or delete it")


def write_folder_atomically(folder: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with a temporary folder, then renames it: `folder` is never incomplete."""
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        write(unfinished)
        if folder.exists():
            folder.rmdir()  # fails unless the folder is empty
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@torch.no_grad()
def merge_16bit(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    folder: Path,
) -> str:
    """Writes base + adapter as a dense model: float16 if the base is float16, else bfloat16.

    Returns the audit as text.
    """
    model, audit = lora.merge(model)
    for parameter in model.parameters():
        is_half = parameter.dtype == torch.float16
        parameter.data = parameter.data.to(torch.float16 if is_half else torch.bfloat16)

    def write(unfinished: Path) -> None:
        base_model.save_dense(model, unfinished)
        tokenizer.save_pretrained(unfinished)
        portable.add_older_names(unfinished)

    write_folder_atomically(folder, write)
    return f"all of the update, rounded to 16 bits. {describe_audit(audit)}"


@torch.no_grad()
def merge_4bit(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    folder: Path,
) -> str:
    """Writes base + adapter as a 4-bit model, quantized as the base is.

    Returns the audit as text.
    """
    audit = {}
    for layer, names in lora.names_of(model, QLoRALinear).items():
        base = layer.base
        update = layer.update()
        merged = base(update.dtype) + update
        if base.codebook is None:  # bitsandbytes was told to skip this layer
            layer.base = FrozenWeight(merged.to(base.dtype), codebook=None)
            continue
        audit |= dict.fromkeys(names, lora.audit_merge(base, update))
        layer.base = FrozenWeight(merged, base.block_size, base.double_quant, base.codebook)
        layer.base.dtype = base.dtype  # the dtype in which it decodes

    write_folder_atomically(folder, partial(save_4bit, model, tokenizer))
    return describe_audit(audit)


def save_4bit(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    folder: Path,
) -> None:
    """Writes the frozen base of a model and its tokenizer.

    An adapter of this model that is saved later names this folder as its base.
    Raises: ValueError if the folder holds a dense model.
    """
    require_no_dense_model(folder)
    base_model.save_4bit(model, folder)
    tokenizer.save_pretrained(folder)
    portable.add_older_names(folder)
    model.name_or_path = str(folder.absolute())


def describe_audit(audit: dict[str, MergeAudit]) -> str:
    """How much of the update a merge into 4 bits keeps, over the model and in the worst layer.

    Over the model, <realized, update> / <update, update> is the mean of the layers' fractions,
    weighted by the squared norms of their updates.
    """
    if not audit:
        return "The base is dense: there are no 4 bits to merge into."
    weights = {name: layer.update_norm**2 for name, layer in audit.items()}
    total = math.fsum(weights.values())
    kept = 1.0
    if total:
        kept = math.fsum(layer.kept * weights[name] for name, layer in audit.items()) / total
    worst = min(audit, key=lambda name: audit[name].cosine)
    return (
        f"A merge into 4 bits keeps {kept:.0%} of the update over {len(audit)} layers; worst is "
        f"{worst}, where the merged change has a cosine of {audit[worst].cosine:.2f} with the "
        "update."
    )
