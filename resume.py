"""The state from which an interrupted run goes on, in one file.

It holds the adapter, both moments of every parameter, the random number generator, and as JSON in its header the step and the
settings. Everything else, the learning rate and the place in the data, follows from the step.
"""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

import files
from checkpoint import adapter_tensors, check_like, copy_tensors


def save_state(model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, str], step: int,
               before: list[float | None], path: Path) -> None:
    """Write all that a run needs to go on after `step`. settings: what may not change; before: the metric at its start."""
    tensors = {f"adapter.{name}": tensor for name, tensor in adapter_tensors(model).items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
    tensors["rng"] = torch.get_rng_state()
    progress = json.dumps({"step": step, "settings": settings, "before": before})
    files.write_tensors(tensors, path, {"progress": progress})


def load_state(model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, str], path: Path) -> tuple[int, list]:
    """Set adapters, optimizer and random numbers to what `save_state` wrote. -> step, before

    Raises: ValueError if there is none, it is damaged, or `settings` are not those that it was written under; nothing has
    changed then.
    """
    if not path.is_file():
        raise ValueError(f"there is no {path} to resume from: it is written on Ctrl-C, at the end, and with --save-every")
    tensors = files.read_tensors(path)
    try:
        progress = json.loads(files.read_metadata(path)["progress"])
        step, was, before, rng = progress["step"], progress["settings"], progress["before"], tensors["rng"]
        state: dict[int, dict[str, Tensor]] = {}
        for name in (name for name in tensors if name.startswith("optimizer.")):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = tensors[name]
    except (KeyError, ValueError, TypeError):
        raise ValueError(f"{path} is not the state of a run") from None
    differs = [f"{key} was {was.get(key)}, is {now}" for key, now in settings.items() if was.get(key) != now]
    if differs:
        raise ValueError(f"cannot go on from {path}: {'; '.join(differs)}")
    adapter = {name.removeprefix("adapter."): tensor for name, tensor in tensors.items() if name.startswith("adapter.")}
    targets = adapter_tensors(model)
    check_like(adapter | {"rng": rng}, targets | {"rng": torch.get_rng_state()}, path)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    copy_tensors(adapter, targets)
    torch.set_rng_state(rng)
    return step, before
