"""The folder of an adapter, in PEFT's format: which layer has which rank and scaling, and under which name.

    adapter_model.safetensors   base_model.model.<layer>.lora_A.weight (r, in) and ...lora_B.weight (out, r)
                                with use_dora, base_model.model.<layer>.lora_magnitude_vector (out,)
    adapter_config.json         r, lora_alpha, lora_dropout, use_rslora, use_dora for all layers; rank_pattern and alpha_pattern
                                for those that differ: regular expressions, the first that matches the end of a layer's name
                                counts

A regular expression from a stranger can take longer than a life to match. So a pattern may hold three repetitions and no
groups, which bounds its time by the cube of the length of a name; and there may not be too many, the slow ones least of all.
"""

import functools
import json
import re
import warnings
from pathlib import Path

import torch
from torch import Tensor

import nf4
from checkpoints import bnb_4bit as bnb_format
from checkpoints import io as files
from lora import FrozenWeight

PREFIX = "base_model.model."
DEFAULTS = {
    "r": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "base_model_name_or_path": None,
    "bias": "none",
    "init_lora_weights": True,
}  # PEFT's
UNSUPPORTED = """use_qalora use_bdlora lora_bias alora_invocation_tokens modules_to_save trainable_token_indices
    target_parameters layer_replication arrow_config velora_config monteclora_config kasa_config""".split()
HARMLESS_STARTS = (
    True,
    False,
    "gaussian",
    "orthogonal",
    "eva",
)  # the others change the base, and need it changed again


def tensor_names(layer: str, use_dora: bool) -> dict[str, str]:
    """The parameters of a layer's adapter: QLoRALinear's name -> PEFT's."""
    ours = ["lora_A", "lora_B", *(["lora_magnitude_vector.weight"] if use_dora else [])]
    return dict(
        zip(
            ours,
            (
                f"{PREFIX}{layer}.{name}"
                for name in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
            ),
        )
    )


def layers_of(tensors: dict[str, Tensor]) -> set[str]:
    """The layers that a file has adapters for."""
    return {
        name.removeprefix(PREFIX).rpartition(".lora_")[0]
        for name in tensors
        if name.startswith(PREFIX)
    }


def write_config(settings: dict[str, tuple[int, float]], rest: dict, folder: Path) -> None:
    """settings: layer -> (r, lora_alpha). rest: what is the same for all of them, and target_modules."""
    r, lora_alpha = next(iter(settings.values()))
    exactly = {
        layer: f"^{re.escape(layer)}" for layer in settings
    }  # a pattern that no other layer's name matches
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": r,
        "lora_alpha": lora_alpha,
        **rest,
        "rank_pattern": {exactly[layer]: its for layer, (its, _) in settings.items() if its != r},
        "alpha_pattern": {
            exactly[layer]: its for layer, (_, its) in settings.items() if its != lora_alpha
        },
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    files.write_text(json.dumps(config, indent=2), folder / "adapter_config.json")


def of_layer(config: dict, layer: str) -> tuple[int, float]:
    """A layer's r and lora_alpha."""

    def first_match(patterns: dict, otherwise: float) -> float:
        return next(
            (value for pattern, value in patterns.items() if _at_the_end(pattern).match(layer)),
            otherwise,
        )

    return first_match(config["rank_pattern"], config["r"]), first_match(
        config["alpha_pattern"], config["lora_alpha"]
    )


def read_config(folder: Path) -> dict:
    """adapter_config.json, PEFT's defaults filled in. Raises: ValueError if it is missing, damaged, or not plain LoRA."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise ValueError(
            f"there is no {path}: an adapter is a folder with adapter_config.json and adapter_model.safetensors"
        )
    config = DEFAULTS | {
        key: value for key, value in files.read_json(path).items() if value is not None
    }
    plain = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": HARMLESS_STARTS}
    uncovered = [key for key in UNSUPPORTED if config.get(key)] + [
        key for key in plain if config.get(key) not in plain[key]
    ]
    if uncovered:
        wishes = ", ".join(f"{key} {config.get(key)}" for key in uncovered)
        raise ValueError(f"{path} asks for {wishes[:200]}; plain LoRA is what is covered")
    ranks, alphas, base = (
        config["rank_pattern"],
        config["alpha_pattern"],
        config["base_model_name_or_path"],
    )
    rules = {
        "rank_pattern": _are_patterns(ranks) and all(map(_is_rank, ranks.values())),
        "alpha_pattern": _are_patterns(alphas) and all(map(_is_alpha, alphas.values())),
        "r": _is_rank(config["r"]),
        "lora_alpha": _is_alpha(config["lora_alpha"]),
        "lora_dropout": type(config["lora_dropout"]) in (int, float)
        and 0 <= config["lora_dropout"] < 1,
        "use_rslora": type(config["use_rslora"]) is bool,
        "use_dora": type(config["use_dora"]) is bool,
        "base_model_name_or_path": base is None or isinstance(base, str),
    }
    broken = [key for key, holds in rules.items() if not holds]
    if broken:
        raise ValueError(f"{path}: {broken[0]} cannot be {str(config[broken[0]])[:200]}")
    return config


def _is_rank(value: object) -> bool:
    return type(value) is int and 1 <= value < 2**31


def _is_alpha(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < 2**31


def is_pattern(text: str) -> bool:
    """A regular expression of at most three repetitions, without groups or alternatives inside one another."""
    try:
        with warnings.catch_warnings(action="error"):  # of what a later Python may read otherwise
            re.compile(text)
    except (re.error, OverflowError, Warning):
        return False
    return len(text) <= 1000 and "(" not in text and _repetitions(text) <= 3


def _repetitions(text: str) -> int:
    return sum(text.count(repetition) for repetition in "*+?{")


def _are_patterns(patterns: object) -> bool:
    """Whether these are regular expressions as keys, and few enough to be matched with every layer in seconds."""
    return (
        isinstance(patterns, dict)
        and len(patterns) <= 10_000
        and all(map(is_pattern, patterns))
        and sum(10 ** _repetitions(pattern) for pattern in patterns) <= 10**5
    )


def describe_base(base: FrozenWeight) -> str:
    """How a base is quantized, as JSON for the header of its adapter: PEFT has no place for it, and does not mind."""
    said = {"bits": 0, "dtype": str(base.dtype).removeprefix("torch.")}
    if base.codebook is not None:
        said["bits"] = base.codebook.numel().bit_length() - 1
        said |= {"block_size": base.block_size, "double_quant": base.double_quant}
    return json.dumps(said)


def base_of(folder: Path) -> tuple[dict, torch.dtype | None]:
    """How the base of an adapter is quantized, as FrozenWeight takes it, and its dtype; NF4 and None if the file does not say.

    Raises: ValueError for a file that is missing or damaged, or says what cannot be.
    """
    path = folder / "adapter_model.safetensors"
    files.describe(path)  # or refuse it
    text = files.read_metadata(path).get("base")
    said = {"bits": 4, "block_size": 64, "double_quant": True, "dtype": None}
    try:
        said |= {} if text is None else files.parse_json(text.encode())
        dtype = said["dtype"] and bnb_format.DTYPES[said["dtype"]]
        codebook = nf4.normal_float(said["bits"]) if said["bits"] else None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: its header describes no base ({type(error).__name__}: {error})"
        ) from None
    return {
        "block_size": said["block_size"],
        "double_quant": bool(said["double_quant"]),
        "codebook": codebook,
    }, dtype


@functools.lru_cache(
    2**15
)  # the cache of re itself holds fewer patterns than a large model has layers
def _at_the_end(pattern: str) -> re.Pattern:
    return re.compile(rf"(.*\.)?({pattern})$")
