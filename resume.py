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
        progress = files.parse_json(files.read_metadata(path)["progress"].encode())
        step, was, before = progress["step"], progress["settings"], progress["before"]
        if type(step) is not int or step < 0 or not isinstance(was, dict) or not isinstance(before, list) or len(before) != 2:
            raise ValueError
        torch.Generator().set_state(tensors["rng"])  # would torch take it?
    except (KeyError, ValueError, TypeError, RuntimeError):
        raise ValueError(f"{path} is not the state of a run") from None
    differs = [f"{key} was {was.get(key)}, is {now}" for key, now in settings.items() if was.get(key) != now]
    if differs:
        raise ValueError(f"cannot go on from {path}: {'; '.join(differs)}")
    targets = {f"adapter.{name}": parameter for name, parameter in adapter_tensors(model).items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    if step:  # else no parameter has moments yet
        count = torch.tensor(float(step))
        state = {index: {"step": count, "exp_avg": p, "exp_avg_sq": p} for index, p in enumerate(parameters)}
    moments = {f"optimizer.{index}.{key}": like for index, its in state.items() for key, like in its.items()}
    check_like(tensors, targets | moments | {"rng": torch.get_rng_state()}, path)
    files.refuse_nan(tensors, path)
    for name in moments:
        tensor, key = tensors[name], name.rpartition(".")[2]
        if (key == "step" and tensor != step) or (key == "exp_avg_sq" and (tensor < 0).any()):
            raise ValueError(f"{path}: {name} is not of step {step}, or negative")
    state = {index: {key: tensors[f"optimizer.{index}.{key}"] for key in its} for index, its in state.items()}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    copy_tensors(tensors, targets)
    torch.set_rng_state(tensors["rng"])
    return step, before
