"""What goes to disk and comes back: adapters in PEFT's format, and the state from which an interrupted run goes on.

An adapter is a folder of two files, which PEFT reads and writes too:

    adapter_model.safetensors   base_model.model.<layer>.lora_A.weight (r, in) and ...lora_B.weight (out, r)
    adapter_config.json         peft_type, r, lora_alpha, lora_dropout, target_modules, base_model_name_or_path

The state of a run is one file: adapter, both moments of every parameter, the random number generator, and as JSON in its
header the step and the settings. Everything else, the learning rate and the place in the data, follows from the step.

Every file is written beside its final name and renamed, so that a reader finds the old file or the new one, and never half.
Only safetensors and JSON are read, and nothing is unpickled.

Differs from PEFT: there a missing prefix loads nothing and says nothing; here every layer's adapter must be in the file with
the right shape, and every tensor in the file must find its layer.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora import QLoRALinear, attach

PREFIX = "base_model.model."
UNSUPPORTED = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "layers_to_transform", "modules_to_save")


def claim(folder: Path, nbytes: int = 0) -> None:
    """Make a folder, and see before any work is done for it that it takes files and has room for nbytes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{folder} cannot be written to ({error.strerror}): choose another --output-dir") from None
    if shutil.disk_usage(folder).free < nbytes:
        raise ValueError(f"{folder} has too little free space: {nbytes / 1e6:.0f} MB are needed for adapter and state")


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """PEFT's name -> parameter, for every adapter in the model."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QLoRALinear)}
    return {f"{PREFIX}{name}.{side}.weight": getattr(layer, side)
            for name, layer in layers.items() for side in ("lora_A", "lora_B")}


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Write the adapters of a model into a folder, as PEFT would. Raises: ValueError if the model has none."""
    folder, tensors = Path(folder), adapter_tensors(model)
    if not tensors:
        raise ValueError("the model has no adapters: lora.attach puts them there")
    layers = [layer for layer in model.modules() if isinstance(layer, QLoRALinear)]
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": getattr(model, "name_or_path", None),
        "r": layers[0].r, "lora_alpha": layers[0].lora_alpha, "lora_dropout": layers[0].lora_dropout, "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "target_modules": _target_modules(model),
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write_tensors(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    _atomically(folder / "adapter_config.json", lambda path: path.write_text(json.dumps(config, indent=2)))


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put the adapter of a folder, ours or PEFT's, on a model in place; one without adapters gets them first (NF4 base).

    Raises: ValueError for missing or damaged files, a kind of adapter that is not covered, and names or shapes that do not fit,
    the first of them named. Adapters that the model had are then as they were.
    """
    folder = Path(folder)
    config = read_config(folder)
    tensors = read_tensors(folder / "adapter_model.safetensors")
    if not adapter_tensors(model):
        attach(model, config["target_modules"], **{key: config[key] for key in ("r", "lora_alpha", "lora_dropout")})
    copy_tensors(tensors, adapter_tensors(model), str(folder))
    for layer in model.modules():
        if isinstance(layer, QLoRALinear):
            layer.lora_alpha, layer.scaling = config["lora_alpha"], config["lora_alpha"] / config["r"]
    return model


def save_state(model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, str], step: int,
               before: list[float | None], path: Path) -> None:
    """Write all that a run needs to go on after `step`. settings: what may not change; before: the metric at its start."""
    tensors = {f"adapter.{name}": tensor for name, tensor in adapter_tensors(model).items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
    tensors["rng"] = torch.get_rng_state()
    progress = json.dumps({"step": step, "settings": settings, "before": before})
    _write_tensors(tensors, path, {"progress": progress})


def load_state(model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, str], path: Path) -> tuple[int, list]:
    """Set adapters, optimizer and random numbers to what `save_state` wrote. -> step, before

    Raises: ValueError if there is none, it is damaged, or `settings` are not those that it was written under.
    """
    if not path.is_file():
        raise ValueError(f"there is no {path} to resume from: it is written on Ctrl-C, at the end, and with --save-every")
    tensors = read_tensors(path)
    with safe_open(path, "pt") as file:
        progress = json.loads((file.metadata() or {}).get("progress", "{}"))
    if progress.keys() != {"step", "settings", "before"}:
        raise ValueError(f"{path} is not the state of a run")
    was = progress["settings"]
    differs = [f"{key} was {was.get(key)}, is {now}" for key, now in settings.items() if was.get(key) != now]
    if differs:
        raise ValueError(f"cannot go on from {path}: {'; '.join(differs)}")
    adapter = {name.removeprefix("adapter."): tensor for name, tensor in tensors.items() if name.startswith("adapter.")}
    copy_tensors(adapter, adapter_tensors(model), str(path))
    state: dict[int, dict[str, Tensor]] = {}
    for name in (name for name in tensors if name.startswith("optimizer.")):
        _, index, key = name.split(".")
        state.setdefault(int(index), {})[key] = tensors[name]
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["rng"])
    return progress["step"], progress["before"]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file. Raises: ValueError if it is missing or damaged."""
    if not path.is_file():
        raise ValueError(f"there is no {path}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error})") from None


def copy_tensors(source: dict[str, Tensor], target: dict[str, Tensor], where: str) -> None:
    """Copy by name, all or nothing. Raises: ValueError naming what is missing, unknown or of another shape."""
    wrong = [f"{name} is missing" for name in target if name not in source]
    wrong += [f"{name} belongs to no adapted layer" for name in source if name not in target]
    wrong += [f"{name} is {tuple(source[name].shape)}, the layer's is {tuple(target[name].shape)}"
              for name in target if name in source and source[name].shape != target[name].shape]
    if wrong:
        raise ValueError(f"{where} does not fit the model, {len(wrong)} tensors in all: {'; '.join(wrong[:3])}")
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])


def read_config(folder: Path) -> dict:
    """adapter_config.json, PEFT's defaults filled in. Raises: ValueError if it is missing, damaged, or not plain LoRA."""
    path = folder / "adapter_config.json"
    defaults = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear", "base_model_name_or_path": None}
    if not path.is_file():
        raise ValueError(f"there is no {path}: an adapter is a folder with adapter_config.json and adapter_model.safetensors")
    try:
        config = defaults | json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"{path} is not a JSON object ({error})") from None
    uncovered = [key for key in UNSUPPORTED if config.get(key)]
    if config.get("peft_type") != "LORA" or uncovered:
        raise ValueError(f"{path} asks for {', '.join(uncovered) or config.get('peft_type')}; plain LoRA is what is covered")
    return config


def _target_modules(model: nn.Module) -> list[str]:
    """The last parts of the adapted layers' names where they single these layers out, else their whole names."""
    adapted = {name for name, module in model.named_modules() if isinstance(module, QLoRALinear)}
    suffixes = {name.rpartition(".")[2] for name in adapted}
    others = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return sorted(adapted if suffixes & others else suffixes)


def _write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        _atomically(path, lambda unfinished: save_file(contiguous, unfinished, metadata))
    except SafetensorError as error:
        raise OSError(f"{path} could not be written ({error}); what was there before is untouched") from None


def _atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, see that it is on the disk, and give it its name."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(unfinished)
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
