"""Several processes make one run: who is who, what they tell each other, and what is done by one for all.

    torchrun --nproc-per-node 4 train.py

starts train.py four times, and gives each process its number in the environment. All run the same program on the same data;
what differs by number is only which part of the work they do. So each knows without asking what the others are at, and they
talk only to add up numbers, to move gradients and weights (parallel.py), and to fail together: whatever is wrong in one of
them, a row, a file, a full disk, is said once, and all end.

What is said, written or measured is so once: printed and saved by the first process, and measured by all, each its part.
Without torchrun there is one process, and every function here is what it is then: sums of one number, work that is just done.
"""

import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

Result, Item = TypeVar("Result"), TypeVar("Item")


def launched() -> bool:
    """Whether torchrun or its like has started this process as one of a number."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def begin(device: str) -> None:
    """Join the other processes, if this is one of several; from now on the first one alone is heard.

    On GPUs, "cuda" is from now on the one that has the process's number on its machine.
    """
    if not launched() or dist.is_initialized():
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(local_rank())
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    store, number, count = next(rendezvous("env://"))
    # torchrun's store outlives a restart, and what the lost processes have written there would be taken for the new ones'.
    store = dist.PrefixStore(f"attempt {attempt()}", store)
    dist.init_process_group(backend, store=store, rank=number, world_size=count)
    if not first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)


def leave(status: int) -> NoReturn:
    """End this process. One of several ends at once: on Python's way out it meets gloo's threads, and now and then aborts."""
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def attempt() -> int:
    """How often torchrun --max-restarts has started the processes anew, after one of them was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """The number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def on_this_machine() -> int:
    """How many of the processes this machine has."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if dist.is_initialized() else 1


def first() -> bool:
    return rank() == 0


def total(*numbers: float) -> list[float]:
    """Sums over all processes, in float64; the same bits in each of them."""
    if not dist.is_initialized():
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64)  # on the host, also beside GPUs
    dist.all_reduce(sums)
    return sums.tolist()


def gather(thing: Item) -> list[Item]:
    """What each process has, in their order."""
    if not dist.is_initialized():
        return [thing]
    things: list[Item] = [thing] * world()
    dist.all_gather_object(things, thing)
    return things


def together(work: Callable[[], Result], turn: int = 0) -> Result:
    """The result of `work`, which each process does in its turn, 0 first; or none goes on.

    Raises: ValueError in the first process if `work` raises a ValueError or OSError in any; the others end quietly.
    """
    if not dist.is_initialized():
        return work()
    result, error = None, ""
    for now in range(max(gather(turn)) + 1):
        if now == turn:
            try:
                result = work()
            except (ValueError, OSError) as fault:
                error = str(fault)
        total(0)  # until all have come here
    errors = gather(error)
    if any(errors):
        if not first():
            raise SystemExit(1)
        number = next(number for number, error in enumerate(errors) if error)
        raise ValueError(
            errors[number] + (f" (in process {number} of {world()})" if number else "")
        )
    return result


def in_first(work: Callable[[], object]) -> None:
    """Let the first process do it, and the others wait."""
    together(work if first() else lambda: None)


def lost_another(error: BaseException) -> str:
    """Where an error says that a connection to another process has broken: this, in words; else nothing."""
    reason = str(error).partition("\n")[0]
    if not dist.is_initialized() or not re.search(
        "gloo|nccl|connection|peer", reason, re.IGNORECASE
    ):
        return ""
    plain = re.sub(r"^\[[^]]*\] *", "", reason).partition(". ")[
        0
    ]  # without the place in gloo's source, and its advice
    return f"train.py: process {rank()} of {world()} has lost another one ({plain})"


def refuse_differences(facts: Mapping[str, object]) -> None:
    """Raises: ValueError in the first process, naming the fact, if processes differ in one; the others end quietly."""

    def check() -> None:
        for number, theirs in enumerate(everyones):
            for name, value in theirs.items():
                if value != facts[name]:
                    raise ValueError(
                        f"process {number} of {world()} has another {name}: {value}, not {facts[name]}"
                    )

    everyones = gather(dict(facts))
    in_first(check)


def part(items: list[Item]) -> tuple[list[Item], int]:
    """This process's share of what is worked on together, and how many of it count: all have as many, some of them again."""
    n, size = len(items), -(-len(items) // world())
    return [items[place % n] for place in range(rank(), size * world(), world())], len(
        range(rank(), n, world())
    )
