"""States, from which a run that was stopped at any moment goes on to the same bits.

A state is one file, state-<step>.safetensors: the adapter, both moments of every parameter, and as JSON in its header the step
and the settings, among them a hash of the data's token ids. Everything else follows from the step and the seed: the learning
rate, the place in the data, and the masks of dropout, for which `reseed` starts the random numbers of each batch. So a state
says nothing of the processes that wrote it: any number of others that share out the same batches go on from it.

    step             0 ........ 10 ........ 20 ........ 30 ....        --save-every 10 --save-total-limit 2
    on the disk      0        0 10       10 20       20 30             a state appears whole, and only then an old one goes

Two things can go wrong. Killed while it writes, a run leaves the states before, and a file of no state's name (files.py). A
disk that loses bytes is found out by the checksum in the header, of all that the file says; then the state before is taken.
Neither costs more than the steps since. What is intact, but of other settings or data, is refused: that is no accident.
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

from checkpoints import io as files
from checkpoints.io import check_like
from checkpoints.peft_adapter import adapter_tensors, copy_tensors
from kernels.dtensor import shard_like
from training import sharding as parallel


class State(NamedTuple):
    """What a file holds, which is intact. settings: what may not change; before: the metric at the run's start."""

    path: Path
    tensors: dict[str, Tensor]
    step: int
    settings: dict[str, str]
    before: list[float | None]


def states(folder: Path) -> list[Path]:
    """The files that are named like states, the last step first."""
    named = [
        (re.fullmatch(r"state-(\d+)\.safetensors", path.name), path)
        for path in folder.glob("state-*")
    ]
    return [
        path
        for _, path in sorted(
            ((int(match[1]), path) for match, path in named if match), reverse=True
        )
    ]


def save(
    tensors: dict[str, Tensor],
    settings: dict[str, str],
    step: int,
    before: list[float | None],
    folder: Path,
    limit: int,
) -> None:
    """Write the state after `step`, and then remove all up to it but the last `limit`."""
    path = folder / f"state-{step:06d}.safetensors"
    save_state(tensors, settings, step, before, path)
    keep_last(path, limit)


def keep_last(path: Path, limit: int) -> None:
    """Remove the states up to this one but the last `limit`. Those after it, which were passed over, stay."""
    held = states(path.parent)
    for old in held[held.index(path) + limit :]:
        old.unlink()


def tidy(folder: Path, state: State | None, limit: int) -> None:
    """Remove what earlier runs have left: unfinished files, and states: up to the last `limit`, or all if none goes on."""
    files.remove_unfinished(folder)
    if state:
        keep_last(state.path, limit)  # a kill may have come between a save and that
    else:
        for path in reversed(states(folder)):  # the last one last
            path.unlink()


def newest(folder: Path) -> State:
    """The last intact state in a folder; any after it is passed over with a word. Raises: ValueError if there is none."""
    for path in states(folder):
        try:
            return read_state(path)
        except ValueError as error:
            print(f"{error}: passed over for the state before it", file=sys.stderr)
    raise ValueError(f"there is no state in {folder} to resume from: start without --resume")


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What a state has of tensors. All processes make it together, and the first one has it then."""
    tensors = {f"adapter.{name}": tensor for name, tensor in adapter_tensors(model).items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
    return parallel.gather_full_tensors(tensors)


def save_state(
    tensors: dict[str, Tensor],
    settings: dict[str, str],
    step: int,
    before: list[float | None],
    path: Path,
) -> None:
    """Write all that a run needs to go on after `step` into a file. Raises: OSError; what was there is untouched then."""
    progress = json.dumps({"step": step, "settings": settings, "before": before})
    files.write_tensors(
        tensors, path, {"progress": progress, "sha256": checksum(tensors, progress)}
    )


def reseed(seed: int, batch: int) -> None:
    """Start the random numbers, on all devices, for the batch of that number, counted from the start of the run.

    The same whichever process works on it, after however many others.
    """
    torch.manual_seed(random.Random(f"{seed} {batch}").getrandbits(63))


@torch.no_grad()
def checksum(tensors: dict[str, Tensor], progress: str) -> str:
    """The SHA-256 of all that a state says: each tensor's name, kind, shape and bytes, and its progress."""
    digest = hashlib.sha256(progress.encode())
    for name in sorted(tensors):
        tensor = tensors[name].cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read_state(path: Path) -> State:
    """What `save_state` wrote. Raises: ValueError if a byte of it has changed or is missing."""
    tensors = files.read_tensors(path)
    metadata = files.read_metadata(path)
    if not {"progress", "sha256"} <= metadata.keys():
        raise ValueError(f"{path} is not the state of a run")
    if checksum(tensors, metadata["progress"]) != metadata["sha256"]:
        raise ValueError(f"{path} is damaged (its checksum has changed)")
    try:
        progress = files.parse_json(metadata["progress"].encode())
        state = State(path, tensors, progress["step"], progress["settings"], progress["before"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path} is not the state of a run") from None
    if (
        type(state.step) is not int
        or state.step < 0
        or not isinstance(state.settings, dict)
        or not _is_pair(state.before)
    ):
        raise ValueError(f"{path} is not the state of a run")
    return state


def _is_pair(before: object) -> bool:
    return isinstance(before, list) and len(before) == 2


def refuse_changes(state: State, settings: dict[str, str], anyway: bool) -> None:
    """Say how `settings` differ from those of the state. Raises: ValueError if they do, unless told to go on anyway."""
    pairs = {key: (state.settings.get(key), now) for key, now in settings.items()}
    differs = [f"{key} was {was}, is {now}" for key, (was, now) in pairs.items() if was != now]
    if differs and not anyway:
        raise ValueError(
            f"cannot go on from {state.path}: {'; '.join(differs)}. Give what was, or --resume-anyway"
        )
    if differs:
        print(f"going on from {state.path} although {'; '.join(differs)}", file=sys.stderr)


def load_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: State) -> None:
    """Set adapters and optimizer to a state. Raises: ValueError if it does not fit; nothing has changed then."""
    tensors = state.tensors
    targets = {f"adapter.{name}": parameter for name, parameter in adapter_tensors(model).items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    like: dict[int, dict[str, Tensor]] = {}
    if state.step:  # else no parameter has moments yet
        count = torch.tensor(float(state.step))
        like = {
            index: {"step": count, "exp_avg": p, "exp_avg_sq": p}
            for index, p in enumerate(parameters)
        }
    moments = {
        f"optimizer.{index}.{key}": tensor
        for index, its in like.items()
        for key, tensor in its.items()
    }
    wanted = targets | moments
    check_like(tensors, wanted, state.path)
    files.require_finite(tensors, state.path)
    for name in moments:
        tensor, key = tensors[name], name.rpartition(".")[2]
        if (key == "step" and tensor != state.step) or (key == "exp_avg_sq" and (tensor < 0).any()):
            raise ValueError(f"{state.path}: {name} is not of step {state.step}, or negative")
    here = {name: shard_like(tensor, wanted[name]) for name, tensor in tensors.items()}
    loaded = {
        index: {key: here[f"optimizer.{index}.{key}"] for key in its} for index, its in like.items()
    }
    optimizer.load_state_dict(
        {"state": loaded, "param_groups": optimizer.state_dict()["param_groups"]}
    )
    copy_tensors(here, targets)


class StopAfterStep:
    """Ctrl-C and SIGTERM let the step in hand finish, so that what is saved is whole. A second one stops at once."""

    def __enter__(self) -> "StopAfterStep":
        self.asked = False
        self.before = {
            number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(number, self.before[number])

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
