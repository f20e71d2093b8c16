"""Saves and loads the adapters of a model in PEFT's format.

An adapter is a folder with two files:

    adapter_model.safetensors
        base_model.model.<layer>.lora_A.weight (r, in)
        base_model.model.<layer>.lora_B.weight (out, r)
        base_model.model.<layer>.lora_magnitude_vector (out,)   with DoRA only
    adapter_config.json
        r, lora_alpha, lora_dropout, use_rslora, use_dora       for all layers
        rank_pattern, alpha_pattern                             for layers that differ: regular
            expressions, of which the first that matches the end of a layer's name counts

The header of the safetensors file has one entry, "base": how the frozen base was quantized, as
JSON. PEFT has no place for it and ignores it.

Differs from PEFT: there an adapter with a wrong prefix loads nothing, silently. Here the adapter of
every layer must be in the file with the right shape, and every tensor of the file must belong to a
layer.

A hostile regular expression can take years to match. A pattern therefore has at most three
repetitions and no groups, so matching it takes at most the cube of the length of a name, and the
patterns of a config have a common limit.
"""

import functools
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from checkpoints import io, quantization
from checkpoints.quantization import Quantization
from lora import QLoRALinear, adapt, names_of, naming, unadapted, unwrap
from variants.dora import DoRALinear

PREFIX = "base_model.model."
DEFAULTS = {  # PEFT's
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
}
UNSUPPORTED = """
    lora_bias alora_invocation_tokens modules_to_save trainable_token_indices
    target_parameters layer_replication arrow_config velora_config monteclora_config kasa_config
""".split()
# Other values of init_lora_weights change the base, so the adapter would need that base.
SUPPORTED_INITS = (True, False, "gaussian", "orthogonal", "eva")

MOST_REPETITIONS = 3  # in a pattern
LONGEST_PATTERN = 1000  # characters
MOST_PATTERNS = 10_000
MOST_WORK = 10**5  # the sum of 10 ** repetitions over all patterns: seconds for a large model


# The adapters of a model


def adapted_layers(model: nn.Module) -> dict[str, QLoRALinear]:
    """Finds every layer with an adapter, by the name that it has in a model without wrappers."""
    layers = names_of(unwrap(model), QLoRALinear)
    return {plain_name(names[0]): layer for layer, names in layers.items() if layer.r}


def plain_name(name: str) -> str:
    """Removes what torch.compile and checkpoint_wrapper of a block add to the names inside it."""
    return re.sub(r"\b(_orig_mod|_checkpoint_wrapped_module)\.", "", name)


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Maps PEFT's name to the parameter, for every adapter of the model."""
    tensors = {}
    for layer_name, layer in adapted_layers(model).items():
        for ours, peft_name in tensor_names(layer_name, isinstance(layer, DoRALinear)).items():
            tensors[peft_name] = layer.get_parameter(ours)
    return tensors


def tensor_names(layer: str, use_dora: bool) -> dict[str, str]:
    """Maps the name of each adapter parameter in a QLoRALinear to its name in PEFT's file."""
    names = {
        "lora_A": f"{PREFIX}{layer}.lora_A.weight",
        "lora_B": f"{PREFIX}{layer}.lora_B.weight",
    }
    if use_dora:
        names["lora_magnitude_vector.weight"] = f"{PREFIX}{layer}.lora_magnitude_vector"
    return names


@torch.no_grad()
def copy_tensors(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    """Copies each tensor of `source` into the tensor of the same name in `target`."""
    for name, tensor in target.items():
        tensor.copy_(source[name])


# Saving


def save_adapter(
    model: nn.Module, folder: str | Path, tensors: dict[str, Tensor] | None = None
) -> None:
    """Writes the adapters of a model into a folder, in PEFT's format.

    tensors: the unsharded result of `adapter_tensors`, where the model's own tensors are sharded.
    Raises: ValueError if the model has no adapters, or some that one config cannot describe.
    """
    folder = Path(folder)
    model = unwrap(model)
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("the model has no adapters: add them with lora.attach")
    _check_trained(model)
    config = _config_of(model, layers)
    folder.mkdir(parents=True, exist_ok=True)
    io.write_tensors(
        tensors or adapter_tensors(model),
        folder / "adapter_model.safetensors",
        metadata={"base": describe_bases(layers)},
    )
    io.write_text(json.dumps(config, indent=2), folder / "adapter_config.json")


def _check_trained(model: nn.Module) -> None:
    """Raises a ValueError naming a parameter that is trained and that no adapter holds."""
    saved = {id(parameter) for parameter in adapter_tensors(model).values()}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    lost = [name for name in trained if id(model.get_parameter(name)) not in saved]
    if lost:
        raise ValueError(
            f"an adapter folder cannot hold other trained parameters, got {lost[0]} "
            f"({len(lost)} in all); freeze them with requires_grad_(False), or merge and save all"
        )


def _config_of(model: nn.Module, layers: dict[str, QLoRALinear]) -> dict:
    """Describes the adapters of a model as PEFT's LoraConfig does."""
    first = next(iter(layers.values()))
    shared = _shared_settings(first)
    rank_pattern = {}
    alpha_pattern = {}
    for name, layer in layers.items():
        if _shared_settings(layer) != shared:
            raise ValueError(
                "the adapters differ in lora_dropout, use_rslora or use_dora: "
                "PEFT's format has one value for all"
            )
        pattern = f"^{re.escape(name)}"  # matches the name of this layer only
        if layer.r != first.r:
            rank_pattern[pattern] = layer.r
        if layer.lora_alpha != first.lora_alpha:
            alpha_pattern[pattern] = layer.lora_alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": first.r,
        "lora_alpha": first.lora_alpha,
        **shared,
        "target_modules": _target_modules(model),
        "base_model_name_or_path": getattr(model, "name_or_path", None),
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _shared_settings(layer: QLoRALinear) -> dict:
    """The settings for which PEFT's format has one value for all layers."""
    return {
        "lora_dropout": layer.lora_dropout,
        "use_rslora": layer.use_rslora,
        "use_dora": isinstance(layer, DoRALinear),
    }


def _target_modules(model: nn.Module) -> list[str]:
    """Last parts of the adapted layers' names; full names if another layer shares a last part."""
    adapted = set(adapted_layers(model))
    linears = {
        plain_name(name)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, QLoRALinear))
    }
    suffixes = {name.rpartition(".")[2] for name in adapted}
    other_suffixes = {name.rpartition(".")[2] for name in linears - adapted}
    return sorted(adapted if suffixes & other_suffixes else suffixes)


def describe_bases(layers: dict[str, QLoRALinear]) -> str:
    """Describes the bases of an adapter's layers as JSON for the header of its file.

    The first base in 4 bits stands for all, and "layers" has those that are quantized otherwise.
    """
    bases = {name: layer.base for name, layer in layers.items()}
    found = {name: quantization.quantization_of(base) for name, base in bases.items()}
    in_4_bits = [name for name, each in found.items() if each.code != quantization.DENSE]
    first = in_4_bits[0] if in_4_bits else next(iter(found))
    others = {name: each._asdict() for name, each in found.items() if each != found[first]}
    entries = found[first]._asdict() | {"dtype": str(bases[first].dtype).removeprefix("torch.")}
    return json.dumps(entries | ({"layers": others} if others else {}))


# Loading


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Loads an adapter, ours or PEFT's, into a model in place.

    A model without adapters gets them first, and its dense layers are quantized as in the training.
    PEFT's files do not say how: the base becomes NF4, unless adapters were attached with
    codebook=None before. Scaling and lora_dropout become those of the folder.
    Raises: ValueError for missing or damaged files, an unsupported kind of adapter, names, ranks or
    shapes that do not fit, and a base that is quantized in another way than in the training, naming
    the first one. The model is then unchanged.
    """
    folder = Path(folder)
    config = read_config(folder)
    path = folder / "adapter_model.safetensors"
    tensors = io.read_tensors(path)
    layers = adapted_layers(model)
    new = []
    if not layers:
        in_file = layers_of(tensors)
        inner = unwrap(model)
        new = [names for names in unadapted(inner) if names[0] in in_file]
        layers = {names[0]: inner.get_submodule(names[0]) for names in new}
    settings = {name: settings_of(name, config) for name in layers}
    if not new:
        _check_settings(layers, settings, config["use_dora"], folder)
    _check_places(model, tensors, layers, path)
    io.check_like(tensors, _expected_tensors(layers, settings, config["use_dora"]), path)
    if not layers:
        raise ValueError(f"{path} has no adapter for any layer of the model")
    # As float32, because a float64 in the file may be beyond its range.
    io.require_finite({name: tensor.float() for name, tensor in tensors.items()}, path)
    bases = _bases_for(layers, path)
    if new:
        layer_type = DoRALinear if config["use_dora"] else QLoRALinear
        chosen = [(names, settings[names[0]] | bases.get(names[0], {})) for names in new]
        adapt(model, chosen, layer_type)
    for name, layer in adapted_layers(model).items():
        for key, value in settings[name].items():
            setattr(layer, key, value)
    copy_tensors(tensors, adapter_tensors(model))
    return model


def _bases_for(layers: dict[str, nn.Linear | QLoRALinear], path: Path) -> dict[str, dict]:
    """Returns how to quantize each layer that is dense, as `from_linear` takes it.

    Raises: ValueError if a layer is quantized already, and in another way than in the training.
    """
    trained = base_of(path.parent)
    if trained is None:
        if any(isinstance(layer, nn.Linear) for layer in layers.values()):
            default = Quantization("nf4")
            print(f"{path} does not say how its base was quantized: it is made {default}")
        return {}
    bases = {}
    for name, layer in layers.items():
        wanted = trained.of_layer(name)
        if isinstance(layer, nn.Linear):
            with naming(f"{name} in {path}"):
                bases[name] = wanted.settings()
            continue
        found = quantization.quantization_of(layer.base)
        may_be_dense = trained.is_older and found.code == quantization.DENSE
        if found != wanted and not may_be_dense:
            raise ValueError(
                f"{path} was trained on a base that was {wanted}, and {name} is {found}: load it "
                "into a dense model without adapters, or quantize the model as in the training"
            )
    return bases


def _check_settings(
    layers: dict[str, QLoRALinear], settings: dict[str, dict], use_dora: bool, folder: Path
) -> None:
    """Raises a ValueError if a config has another rank or use_dora than a model's adapters."""
    path = folder / "adapter_config.json"
    for name, layer in layers.items():
        r = settings[name]["r"]
        if layer.r != r:
            raise ValueError(f"{path} gives {name} rank {r}, and the model's adapter has {layer.r}")
        if isinstance(layer, DoRALinear) != use_dora:
            raise ValueError(f"{path} has use_dora {use_dora}, and the model's adapter has not")


def _check_places(
    model: nn.Module, tensors: dict[str, Tensor], layers: dict[str, nn.Module], path: Path
) -> None:
    """Raises a ValueError naming a tensor that the model has a place for, but no adapter."""
    modules = {plain_name(name) for name, _ in unwrap(model).named_modules()}
    for name in tensors:
        place, is_adapter, _ = name.partition(".lora_")
        if not place.startswith(PREFIX):
            continue
        module = place.removeprefix(PREFIX)
        if not is_adapter and module.removesuffix(".weight") in modules:
            raise ValueError(
                f"{path} holds {name}, a whole weight, and not adapters alone: save the adapter "
                "without it (save_embedding_layers=False in PEFT), or merge both with PEFT"
            )
        if is_adapter and module in modules and module not in layers:
            raise ValueError(
                f"{path} holds {name}, and {module} has no adapter in the model: attach adapters "
                "to the same layers, none of which may be the output head or an embedding"
            )


def _expected_tensors(
    layers: dict[str, nn.Linear | QLoRALinear], settings: dict[str, dict], use_dora: bool
) -> dict[str, Tensor]:
    """Creates the tensors that the file must hold, on the meta device."""
    expected = {}
    for name, layer in layers.items():
        r = settings[name]["r"]
        shapes = {
            "lora_A": (r, layer.in_features),
            "lora_B": (layer.out_features, r),
            "lora_magnitude_vector.weight": (layer.out_features,),
        }
        for ours, peft_name in tensor_names(name, use_dora).items():
            expected[peft_name] = torch.empty(shapes[ours], device="meta")
    return expected


def layers_of(tensors: dict[str, Tensor]) -> set[str]:
    """Names the layers that a file has adapters for."""
    names = {name.removeprefix(PREFIX) for name in tensors if name.startswith(PREFIX)}
    return {name.rpartition(".lora_")[0] for name in names}


def settings_of(layer: str, config: dict) -> dict:
    """Looks up the settings of a layer in a config, as `from_linear` of its type takes them."""
    return {
        "r": _first_match(config["rank_pattern"], layer, config["r"]),
        "lora_alpha": _first_match(config["alpha_pattern"], layer, config["lora_alpha"]),
        "lora_dropout": config["lora_dropout"],
        "use_rslora": config["use_rslora"],
    }


def _first_match(patterns: dict[str, float], layer: str, default: float) -> float:
    for pattern, value in patterns.items():
        if _compile(pattern).match(layer):
            return value
    return default


@functools.lru_cache(2**15)  # the cache of re holds fewer patterns than a large model has layers
def _compile(pattern: str) -> re.Pattern:
    return re.compile(rf"(.*\.)?({pattern})$")


# The config and the header, which may come from a stranger


def read_config(folder: Path) -> dict:
    """Reads adapter_config.json and fills in PEFT's defaults.

    Raises: ValueError if the file is missing or damaged, or asks for more than plain LoRA or DoRA.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise ValueError(
            f"there is no {path}: an adapter is a folder with adapter_config.json "
            "and adapter_model.safetensors"
        )
    given = {key: value for key, value in io.read_json(path).items() if value is not None}
    config = DEFAULTS | given
    _check_supported(config, path)
    dropout, base = config["lora_dropout"], config["base_model_name_or_path"]
    rules = {
        "rank_pattern": _are_patterns(config["rank_pattern"], _is_rank),
        "alpha_pattern": _are_patterns(config["alpha_pattern"], _is_alpha),
        "r": _is_rank(config["r"]),
        "lora_alpha": _is_alpha(config["lora_alpha"]),
        "lora_dropout": type(dropout) in (int, float) and 0 <= dropout < 1,
        "use_rslora": type(config["use_rslora"]) is bool,
        "use_dora": type(config["use_dora"]) is bool,
        "base_model_name_or_path": base is None or isinstance(base, str),
    }
    for key, holds in rules.items():
        if not holds:
            raise ValueError(f"{path}: {key} cannot be {str(config[key])[:200]}")
    return config


def _check_supported(config: dict, path: Path) -> None:
    """Raises a ValueError naming every setting that this project does not support."""
    supported = {
        "peft_type": ("LORA",),
        "bias": ("none",),
        "init_lora_weights": SUPPORTED_INITS,
    }
    unknown = [key for key in config if key.startswith("use_") and key not in DEFAULTS]
    wrong = [key for key in [*UNSUPPORTED, *unknown] if config.get(key)]
    wrong += [key for key, values in supported.items() if config.get(key) not in values]
    if wrong:
        settings = ", ".join(f"{key} {config.get(key)}" for key in wrong)
        raise ValueError(f"{path} asks for {settings[:200]}; only plain LoRA is supported")


def _is_rank(value: object) -> bool:
    return type(value) is int and 1 <= value < 2**31


def _is_alpha(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < 2**31


def _are_patterns(patterns: object, is_valid: Callable[[object], bool]) -> bool:
    """Whether each key is a safe pattern, each value valid, and matching them all takes seconds."""
    return (
        isinstance(patterns, dict)
        and len(patterns) <= MOST_PATTERNS
        and all(is_pattern(pattern) for pattern in patterns)
        and sum(10 ** _repetitions(pattern) for pattern in patterns) <= MOST_WORK
        and all(is_valid(value) for value in patterns.values())
    )


def is_pattern(text: str) -> bool:
    """Whether a text is a regular expression that is fast to match."""
    try:
        # A FutureWarning says that a later Python reads the pattern differently.
        with warnings.catch_warnings(action="error"):
            re.compile(text)
    except (re.error, OverflowError, Warning):
        return False
    is_short = len(text) <= LONGEST_PATTERN and _repetitions(text) <= MOST_REPETITIONS
    return is_short and "(" not in text


def _repetitions(text: str) -> int:
    return sum(text.count(repetition) for repetition in "*+?{")


class TrainedBase(NamedTuple):
    """The base that an adapter was trained on: its quantization and its dtype.

    layers: the quantization of each layer that is quantized otherwise. An older file does not say
    which layers of a base in 4 bits are dense.
    """

    quantization: Quantization
    dtype: torch.dtype | None
    layers: dict[str, Quantization]
    is_older: bool = False

    def of_layer(self, name: str) -> Quantization:
        """How the base of one layer was quantized."""
        return self.layers.get(name, self.quantization)


def base_of(folder: Path) -> TrainedBase | None:
    """Reads from the header of an adapter what base it was trained on; PEFT's does not say it.

    Raises: ValueError if the file is missing or damaged, or the header describes no possible base.
    """
    path = folder / "adapter_model.safetensors"
    io.describe(path)  # validates the file
    text = io.read_metadata(path).get("base")
    if text is None:
        return None
    try:
        entries = io.parse_json(text.encode())
        dtypes = {None: None} | {str(dtype).removeprefix("torch."): dtype for dtype in io.FLOATING}
        layers = {
            name: quantization.parse(each) for name, each in entries.get("layers", {}).items()
        }
        dtype = dtypes[entries.get("dtype")]
        return TrainedBase(quantization.parse(entries), dtype, layers, is_older="bits" in entries)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: its header describes no base ({reason})") from None
