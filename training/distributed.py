"""Runs train.py in several processes: ranks, collectives, and errors that stop all ranks.

    torchrun --nproc-per-node 4 train.py

starts train.py four times and gives each process a rank, 0 to 3, in the environment. All ranks
run the same program on the same data. Only their shares of the work differ: rank i takes every
fourth item, starting at item i. So a rank needs no message to know what the others do. The ranks
communicate only to sum numbers, to exchange gradients and weights (sharding.py), and to fail
together: an error in one rank (a bad row, a missing file, a full disk) is printed once and ends all
ranks.

Rank 0 prints and saves. All ranks evaluate, each its share of the examples. Without torchrun there
is one process with rank 0 and world size 1, and no function here communicates.
"""

import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from training.options import launched_by_torchrun

Result = TypeVar("Result")
Item = TypeVar("Item")
# gloo raises a plain RuntimeError, and begins each message with the place in its source.
GLOO_SOURCE = re.compile(r"\[\S*/gloo/\S+:\d+\] *")
NCCL_SIGNS = ("ncclRemoteError", "communicator was aborted")


def init_distributed(device: str) -> None:
    """Join the process group if torchrun started this process. Ranks above 0 stop printing.

    On GPUs, "cuda" then means the GPU whose index is the local rank.
    """
    if not launched_by_torchrun() or dist.is_initialized():
        return
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(local_rank())
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    store, number, count = next(rendezvous("env://"))
    # torchrun's store survives a restart. The prefix hides the keys of earlier attempts.
    store = dist.PrefixStore(f"attempt {restart_count()}", store)
    dist.init_process_group(backend, store=store, rank=number, world_size=count)
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)


def exit_process(status: int) -> NoReturn:
    """End this process. One of several skips Python's teardown: gloo's threads can abort in it."""
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def restart_count() -> int:
    """How often torchrun --max-restarts has restarted the processes after one of them was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def rank() -> int:
    """The number of this process, 0 to world_size - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes on all machines."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """The number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """The number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process prints and saves."""
    return rank() == 0


def all_reduce_sum(*numbers: float) -> list[float]:
    """The sum of each number over all ranks, in float64; every rank gets the same bits."""
    if not dist.is_initialized():
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64)  # on the host, also in a run on GPUs
    dist.all_reduce(sums)
    return sums.tolist()


def all_gather(item: Item) -> list[Item]:
    """The items of all ranks, in the order of the ranks."""
    if not dist.is_initialized():
        return [item]
    items: list[Item] = [item] * world_size()
    dist.all_gather_object(items, item)
    return items


def all_or_none(work: Callable[[], Result], turn: int = 0) -> Result:
    """The result of `work` on this rank, if it succeeds on all ranks; else every rank stops.

    Ranks with the same `turn` work at the same time, those with turn 0 first.
    Raises: ValueError on rank 0 if any rank raises ValueError or OSError; SystemExit on the others.
    """
    if not dist.is_initialized():
        return work()
    result = None
    error = ""
    for current in range(max(all_gather(turn)) + 1):
        if current == turn:
            try:
                result = work()
            except (ValueError, OSError) as fault:
                error = str(fault)
        all_reduce_sum(0)  # a barrier: the next turn starts when this one has ended
    errors = all_gather(error)
    if any(errors):
        raise_on_main(errors)
    return result


def raise_on_main(errors: list[str]) -> NoReturn:
    """Raise the first error of all ranks on rank 0, and end the other ranks without output."""
    if not is_main():
        raise SystemExit(1)
    failed = next(number for number, error in enumerate(errors) if error)
    place = f" (in process {failed} of {world_size()})" if failed else ""
    raise ValueError(errors[failed] + place)


def run_on_main(work: Callable[[], object]) -> None:
    """Call `work` on rank 0 while the other ranks wait. Raises: see all_or_none."""
    all_or_none(work if is_main() else lambda: None)


def describe_lost_process(error: BaseException) -> str:
    """One line for an error that means a broken connection to another rank; "" for other errors."""
    if not dist.is_initialized() or not is_lost_connection(error):
        return ""
    reason = GLOO_SOURCE.sub("", str(error).partition("\n")[0])
    cause = reason.partition(". ")[0]  # the advice of gloo follows the first sentence
    return f"train.py: process {rank()} of {world_size()} has lost another one ({cause})"


def is_lost_connection(error: BaseException) -> bool:
    """Whether a library for communication says that it no longer reaches another rank.

    The words of an error do not decide this: they may be about anything.
    """
    if isinstance(error, dist.DistBackendError):  # NCCL's, also for a wrong use of it
        return any(sign in str(error) for sign in NCCL_SIGNS)
    is_from_store = isinstance(error, (dist.DistNetworkError, dist.DistStoreError))
    return is_from_store or GLOO_SOURCE.match(str(error)) is not None


def require_same_on_all(facts: Mapping[str, object]) -> None:
    """Stop all ranks if a fact differs between them. Raises: ValueError on rank 0 that names it."""
    facts_by_rank = all_gather(dict(facts))

    def check() -> None:
        for number, theirs in enumerate(facts_by_rank):
            for name, value in theirs.items():
                if value != facts[name]:
                    other = f"process {number} of {world_size()} has another {name}"
                    raise ValueError(f"{other}: {value}, not {facts[name]}")

    run_on_main(check)


def split_among_ranks(items: list[Item]) -> tuple[list[Item], int]:
    """This rank's items, every world_size-th one, and how many of them count.

    All ranks get the same number of items, because all must join every collective. If the items do
    not divide evenly, some ranks also get one from the start of the list, which does not count.
    """
    n = len(items)
    each = -(-n // world_size())  # rounded up
    places = range(rank(), each * world_size(), world_size())
    counted = len(range(rank(), n, world_size()))
    return [items[place % n] for place in places], counted
