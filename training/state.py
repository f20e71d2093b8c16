"""Saves the state of a run: a run stopped at any moment resumes and ends with the same bits.

A state is one file, state-<step>.safetensors, with the adapter and both moments of every parameter.
Its header has only one key, "state", because safetensors writes keys in random order:

    {"progress": {"step": 20, "settings": {...}, "before": [...]}, "sha256": "..."}

The settings include a hash of the data's token ids. Everything else follows from the step and the
seed: the learning rate, the position in the data and, as `seed_batch` seeds each batch, the dropout
masks. A state does not depend on the number of processes: any number of processes that split the
same batches can resume from it.

    step             0 ........ 10 ........ 20 ........ 30 ....    --save-every 10
    on the disk      0        0 10       10 20       20 30         --save-total-limit 2

A new state is complete before its file gets the name of a state; then an old one is removed. Two
things can go wrong. A run that is killed while it writes leaves the previous states and a file with
another name (checkpoints/io.py). If the disk loses bytes, the checksum of the tensors and the
progress does not match, and the previous state is used. In both cases only the steps since that
state are lost. A valid state with other settings or data is an error, not something to skip.
"""

import hashlib
import json
import random
import re
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from checkpoints import io
from checkpoints.io import check_like
from checkpoints.peft_adapter import adapter_tensors, copy_tensors
from kernels.dtensor import shard_like
from training import sharding


class State(NamedTuple):
    """The content of a valid state file.

    settings: what must be the same in a resumed run.
    before: the metrics before training.
    """

    path: Path
    tensors: dict[str, Tensor]
    step: int
    settings: dict[str, str]
    before: list[float | None]


def saved_states(folder: Path) -> list[Path]:
    """The state files in a folder, by name only, the last step first."""
    steps = {}
    for path in folder.glob("state-*"):
        match = re.fullmatch(r"state-(\d+)\.safetensors", path.name)
        if match:
            steps[path] = int(match[1])
    return sorted(steps, key=lambda path: (steps[path], path), reverse=True)


def save_state(
    tensors: dict[str, Tensor],
    settings: dict[str, str],
    step: int,
    before: list[float | None],
    folder: Path,
    limit: int,
) -> None:
    """Write the state after `step`, then remove the states before it except the last `limit`.

    Raises: OSError; the states in the folder are unchanged then.
    """
    path = folder / f"state-{step:06d}.safetensors"
    write_state(tensors, settings, step, before, path)
    _keep_last(path, limit)


def write_state(
    tensors: dict[str, Tensor],
    settings: dict[str, str],
    step: int,
    before: list[float | None],
    path: Path,
) -> None:
    """Write a state file. Raises: OSError; an existing file is unchanged then."""
    progress = {"step": step, "settings": settings, "before": before}
    header = {"progress": progress, "sha256": checksum(tensors, json.dumps(progress))}
    io.write_tensors(tensors, path, {"state": json.dumps(header)})


def _keep_last(path: Path, limit: int) -> None:
    """Keep the last `limit` states up to this one, and the damaged ones after it."""
    states = saved_states(path.parent)
    for old in states[states.index(path) + limit :]:
        old.unlink()


def remove_old_files(folder: Path, state: State | None, limit: int) -> None:
    """Remove unfinished files and old states that earlier runs left.

    Keeps the last `limit` states up to `state`, from which the run resumes, if it does.
    """
    io.remove_unfinished(folder)
    if state:
        _keep_last(state.path, limit)  # a kill may have come between a save and its cleanup


def latest_state(folder: Path) -> State:
    """Read the last valid state in a folder and print a warning for each damaged one after it.

    Raises: ValueError if there is no valid state.
    """
    for path in saved_states(folder):
        try:
            return read_state(path)
        except ValueError as error:
            print(f"{error}: skipped, the state before it is used", file=sys.stderr)
    raise ValueError(f"there is no state in {folder} to resume from: start without --resume")


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of a state, in host memory of rank 0. All ranks must call this."""
    tensors = _named_adapter(model) | _named_moments(optimizer.state_dict()["state"])
    return sharding.gather_full_tensors(tensors)


def _named_adapter(model: nn.Module) -> dict[str, Tensor]:
    return {f"adapter.{name}": tensor for name, tensor in adapter_tensors(model).items()}


def _named_moments(optimizer_state: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The step and the moments of each parameter, named optimizer.<index>.<key>."""
    return {
        f"optimizer.{index}.{key}": tensor
        for index, values in optimizer_state.items()
        for key, tensor in values.items()
    }


def seed_batch(seed: int, batch: int) -> None:
    """Seed the random numbers of all devices for a batch, counted from the start of the run.

    They depend neither on the rank that trains on the batch nor on earlier batches.
    """
    torch.manual_seed(random.Random(f"{seed} {batch}").getrandbits(63))


@torch.no_grad()
def checksum(tensors: dict[str, Tensor], progress: str) -> str:
    """The SHA-256 of the progress and of each tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(progress.encode())
    for name in sorted(tensors):
        tensor = tensors[name].cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read_state(path: Path) -> State:
    """Read and validate a state file. Raises: ValueError if it is damaged or not a state."""
    tensors = io.read_tensors(path)
    try:
        header = io.parse_json(io.read_metadata(path)["state"].encode())
        progress = header["progress"]
        expected = header["sha256"]
        state = State(path, tensors, progress["step"], progress["settings"], progress["before"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path} is not the state of a run") from None
    if checksum(tensors, json.dumps(progress)) != expected:
        raise ValueError(f"{path} is damaged (its checksum has changed)")
    if not _has_valid_types(state):
        raise ValueError(f"{path} is not the state of a run")
    return state


def _has_valid_types(state: State) -> bool:
    return (
        type(state.step) is int
        and 0 <= state.step < 2**63
        and isinstance(state.settings, dict)
        and isinstance(state.before, list)
        and len(state.before) == 2
    )


def require_same_settings(state: State, settings: dict[str, str], anyway: bool) -> None:
    """Compare settings with those of a state.

    Raises: ValueError if they differ; with `anyway`, only prints how they differ.
    """
    old = state.settings
    changes = [
        f"{key} was {old.get(key)}, is {value}"
        for key, value in settings.items()
        if old.get(key) != value
    ]
    if not changes:
        return
    differences = "; ".join(changes)
    if not anyway:
        raise ValueError(
            f"cannot resume from {state.path}: {differences}. "
            "Use the old settings or --resume-anyway"
        )
    print(f"resuming from {state.path} although {differences}", file=sys.stderr)


def load_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: State) -> None:
    """Set the adapters and the optimizer to a state.

    Raises: ValueError if the state does not fit them; nothing has changed then.
    """
    adapter = _named_adapter(model)
    templates: dict[int, dict[str, Tensor]] = {}
    if state.step:  # before the first step no parameter has moments
        count = torch.tensor(float(state.step))
        parameters = [param for group in optimizer.param_groups for param in group["params"]]
        for index, parameter in enumerate(parameters):
            templates[index] = {"step": count, "exp_avg": parameter, "exp_avg_sq": parameter}
    moments = _named_moments(templates)
    expected = adapter | moments
    check_like(state.tensors, expected, state.path)
    io.require_finite(state.tensors, state.path)
    _check_moments(state, moments)
    tensors = {name: shard_like(tensor, expected[name]) for name, tensor in state.tensors.items()}
    optimizer_state = {
        index: {key: tensors[f"optimizer.{index}.{key}"] for key in keys}
        for index, keys in templates.items()
    }
    param_groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": optimizer_state, "param_groups": param_groups})
    copy_tensors(tensors, adapter)


def _check_moments(state: State, names: dict[str, Tensor]) -> None:
    """Raise a ValueError if a step count or a second moment cannot be that of the state's step."""
    for name in names:
        tensor = state.tensors[name]
        if name.endswith(".step") and tensor != state.step:
            raise ValueError(f"{state.path}: {name} must be the step of the state, {state.step}")
        if name.endswith(".exp_avg_sq") and (tensor < 0).any():
            raise ValueError(f"{state.path}: {name} must not be negative")


class StopAfterStep:
    """Delays Ctrl-C and SIGTERM until the step is done and can be saved. A second one stops now."""

    def __enter__(self) -> "StopAfterStep":
        self.requested = False
        self.previous = {
            number: signal.signal(number, self.request)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(number, self.previous[number])

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
