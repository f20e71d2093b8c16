"""Checks the folder of a base model before any of its weights is read.

config.json gives a model without weights (skeleton.py). The headers of the safetensors files give
the names, shapes and dtypes of the tensors. Together they show whatever cannot be loaded: a missing
file, a tensor that fits nothing, another way of quantization, an architecture whose matrices are
not in nn.Linear, a model that is not causal. --dry-run therefore refuses what a run would refuse.

The names in the files may be those of another version of transformers, which renamed its modules,
or lack the name of the model around the decoder, as in `layers.0...` for `model.layers.0...`.
transformers itself maps them to the names in the model.
"""

from __future__ import annotations  # type hints must not load the classes of transformers

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from checkpoints import bnb_4bit, io, skeleton
from checkpoints.quantization import Quantization


class Headers(NamedTuple):
    """What is known of a folder before its weights are read.

    model: on the meta device. shards: for each file, the name in the model of each of its tensors
    that the model needs, by the name in the file. quantization: None for a dense model.
    """

    model: transformers.PreTrainedModel
    shards: dict[Path, dict[str, str]]
    quantization: Quantization | None


def read(folder: Path, dtype: torch.dtype | None = None) -> Headers:
    """Reads and checks the config and the headers of a folder.

    dtype: of the parameters of the model; None takes that of config.json.
    Raises: ValueError naming the file, tensor or layer that is missing, unknown, damaged or not
    supported.
    """
    quantized = is_quantized(folder)
    if quantized:
        read_quantization(folder)
    described = io.describe_model(folder)
    tensors = {name: tensor for each in described.values() for name, tensor in each.items()}
    model = skeleton.build(folder, tensors, dtype)
    require_linear_matrices(model, folder)
    require_causal_attention(model, folder)
    names = names_in_model(model, tensors, folder)
    if not quantized:
        tied = model.all_tied_weights_keys
        found = {tied.get(name, name): tensors[key] for key, name in names.items()}
        io.check_like(found, skeleton.empty_of(model), folder)
    shards = {
        path: {key: names[key] for key in each if key in names} for path, each in described.items()
    }
    return Headers(model, shards, packed_base(described, folder) if quantized else None)


def is_quantized(folder: Path) -> bool:
    """Whether config.json says that the weights of a folder are quantized."""
    return io.read_json(folder / "config.json").get("quantization_config") is not None


def read_quantization(folder: Path) -> dict:
    """Reads and checks the quantization_config of a folder; adds the defaults of transformers."""
    path = folder / "config.json"
    given = io.read_json(path).get("quantization_config")
    if (
        not isinstance(given, dict)
        or given.get("quant_method") != "bitsandbytes"
        or not given.get("load_in_4bit")
    ):
        raise ValueError(
            f"{path}: quantization_config is not that of 4 bits by bitsandbytes, but "
            f"{str(given)[:200]}; load a dense model with transformers and quantize it with "
            "lora.attach"
        )
    quantization = bnb_4bit.CONFIG | {"bnb_4bit_compute_dtype": "float32"} | given
    supported = {
        "bnb_4bit_compute_dtype": list(bnb_4bit.DTYPES),
        "bnb_4bit_quant_storage": list(bnb_4bit.STORAGES),
    }
    for key, values in supported.items():
        if quantization[key] not in values:
            raise ValueError(
                f"{path}: {key} must be one of {', '.join(values)}; got {quantization[key]}"
            )
    return quantization


def quantization_of(folder: Path) -> Quantization | None:
    """Reads how a folder is quantized; None for a dense one. Raises: ValueError."""
    if not is_quantized(folder):
        return None
    read_quantization(folder)
    return packed_base(io.describe_model(folder), folder)


def packed_base(described: dict[Path, dict[str, Tensor]], folder: Path) -> Quantization:
    """Reads how the first 4-bit weight of a folder is quantized.

    Raises: ValueError if the folder has none: its quantization_config is then wrong.
    """
    for path, tensors in described.items():
        for name in tensors:
            if bnb_4bit.STATE in name:
                return bnb_4bit.read_quantization(io.read_tensor(path, name), name)
    raise ValueError(
        f"{folder / 'config.json'} has a quantization_config, and no tensor of the files is in 4 "
        "bits: remove the entry if the weights are dense"
    )


# Architectures


def require_linear_matrices(model: transformers.PreTrainedModel, where: Path) -> None:
    """Raises a ValueError naming the first matrix outside nn.Linear, embeddings and the head."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if type(module) is nn.Linear or isinstance(module, nn.Embedding) or module is head:
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                shape, kind = tuple(parameter.shape), type(module).__name__
                raise ValueError(
                    f"{where}: {name}.{key} {shape} is the matrix of a {kind}, and only nn.Linear "
                    f"can be put in 4 bits: {type(model).__name__} is not supported"
                )


def require_causal_attention(model: transformers.PreTrainedModel, where: Path) -> None:
    """Raises a ValueError if the config and the layers say that a token sees later ones.

    An architecture may have other ways: base_model.require_causal finds them when the weights are
    there.
    """
    if getattr(model.config, "causal", True) is False:  # XLM
        raise ValueError(not_causal(model, where, "causal is False in its config"))
    is_encoder = getattr(model.config, "is_decoder", True) is False
    for name, module in model.named_modules():
        if is_encoder and getattr(module, "is_decoder", True) is False:
            raise ValueError(not_causal(model, where, f"{name}.is_decoder is False"))


def not_causal(model: transformers.PreTrainedModel, where: object, reason: str) -> str:
    """The message for a model that sees the tokens it must predict."""
    flag = "causal" if hasattr(model.config, "causal") else "is_decoder"
    return (
        f"{where}: {type(model).__name__} sees the tokens that it must predict ({reason}), so "
        f'fine-tuning would teach it to copy: take a causal model, or set "{flag}": true in '
        "config.json if it was trained as one"
    )


# Names of tensors


def names_in_model(
    model: transformers.PreTrainedModel, names: Iterable[str], where: Path
) -> dict[str, str]:
    """Maps the name of each tensor in the files to its name in the model.

    Tensors that older versions of transformers saved and that no model needs are left out.
    Raises: ValueError if two have the same name in the model.
    """
    ignored = _ignored_names(model)
    rename = _renamer(model)
    found: dict[str, str] = {}
    for name in names:
        weight, suffix = bnb_4bit.split_name(name)
        renamed = rename(weight) + suffix
        if ignored.search(renamed):
            continue
        if renamed in found:
            both = f"{found[renamed]} and {name}"
            raise ValueError(f"{where}: {both} are both {renamed} in the model")
        found[renamed] = name
    return {name: renamed for renamed, name in found.items()}


def _ignored_names(model: transformers.PreTrainedModel) -> re.Pattern:
    """Matches tensors that older versions of transformers saved and that no model needs."""
    patterns = model._keys_to_ignore_on_load_unexpected or []
    return re.compile("|".join([*patterns, r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"]))


def _renamer(model: transformers.PreTrainedModel) -> Callable[[str], str]:
    """Returns a function from the name of a weight in a file to its name in the model.

    Some conversions of transformers also merge or split tensors. They are left out, so the tensors
    that need one keep a name that the model does not have.
    """
    known = dict.fromkeys(model.state_dict(), True)
    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]

    def rename(name: str) -> str:
        prefix = model.base_model_prefix
        renamed, _ = rename_source_key(name, renamings, [], prefix, known)
        if renamed not in known:  # it may have had its name already
            unchanged, _ = rename_source_key(name, [], [], prefix, known)
            renamed = unchanged if unchanged in known else renamed
        return renamed

    return rename
