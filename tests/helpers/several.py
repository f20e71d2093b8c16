"""Runs train.py in several processes, forked as in killed.py, with the environment of torchrun.

    python tests/helpers/several.py FOLDER 10

    alike      1, 2 and 3 processes, with DDP and with FSDP2, train on the same batches
    moments    one of two processes is killed, at 10 random moments; the other must end by itself,
               and one or two processes resume the run
    apart      something differs between the ranks, or fails on one of them
    traffic    bytes that each of two processes sends in a step, computed and counted (traffic.py)

Prints the results as JSON.
"""

import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    os.environ |= {"QLORA_KERNELS": "reference", "OMP_NUM_THREADS": "1"}
sys.path[:0] = [str(Path(__file__).parents[level]) for level in (1, 2)]

import train  # noqa: E402 (after the number of threads is set)
from bench import traffic  # noqa: E402
from checkpoints import base_model, io  # noqa: E402
from data import dataset  # noqa: E402
from helpers import killed  # noqa: E402
from lora import attach  # noqa: E402
from training import one_run, report, sharding, state  # noqa: E402

WAYS = {"DDP": [], "FSDP2": ["--shard"]}


def undisturbed(rank: int) -> None:
    """The default of launch's `disturb`."""


def launch(
    folder: Path, world_size: int, *flags: str, disturb: Callable[[int], None] = undisturbed
) -> list[int]:
    """Start a run in `world_size` processes; `disturb` is called in each, with its rank.

    Returns the process ids in the order of the ranks.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def prepare(rank: int) -> None:
        if world_size > 1:
            os.environ["MASTER_ADDR"] = "127.0.0.1"
            os.environ["MASTER_PORT"] = str(port)
            os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
            os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
        disturb(rank)

    return [
        killed.start(folder, lambda rank=rank: prepare(rank), flags) for rank in range(world_size)
    ]


def end(children: list[int], seconds: float = 60.0) -> list[int | None]:
    """The exit status of each process; None if it did not end in time and had to be killed."""
    statuses = dict.fromkeys(children)
    deadline = time.monotonic() + seconds
    while None in statuses.values() and time.monotonic() < deadline:
        for child in running(statuses):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                statuses[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for child in running(statuses):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return [statuses[child] for child in children]


def running(statuses: dict[int, int | None]) -> list[int]:
    return [child for child, status in statuses.items() if status is None]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in report.read_metrics(folder / "metrics.jsonl")]


def model_bytes(folder: Path) -> int:
    return json.loads((folder / "report.json").read_text())["model_bytes_per_process"]


def alike(root: Path) -> dict[str, dict]:
    """Each way and the one process that works on the same batches."""
    seen = {}
    for batches in (2, 6):
        alone = root / f"1x{batches}"
        assert end(launch(alone, 1, "--grad-accum", str(batches))) == [0]
        for world_size in (2, 3):
            if batches % world_size:
                continue
            each = batches // world_size
            for way, flags in WAYS.items():
                folder = root / f"{way}-{world_size}x{each}"
                children = launch(folder, world_size, "--grad-accum", str(each), *flags)
                seen[folder.name] = {
                    "statuses": end(children),
                    "far": largest_difference(alone, folder),
                    "same bits": killed.outcome(folder) == killed.outcome(alone),
                    "share of the bytes": model_bytes(folder) / model_bytes(alone),
                }
    return seen


def largest_difference(alone: Path, folder: Path) -> float:
    """The largest relative difference of a loss or of an adapter tensor."""
    differ = [abs(a - b) / abs(a) for a, b in zip(losses(alone), losses(folder))]
    one = io.read_tensors(alone / "adapter_model.safetensors")
    other = io.read_tensors(folder / "adapter_model.safetensors")
    differ += [float((one[name] - other[name]).norm() / one[name].norm()) for name in one]
    return max(differ)


def moments(root: Path, count: int) -> dict[str, object]:
    """One of two processes is killed; then 1 or 2 resume, either way, until the run ends."""
    draw = random.Random(0)
    kills = 0
    stuck = 0
    messages = 0
    number = 0
    different = []
    whole = root / "whole"
    began = time.monotonic()
    assert end(launch(whole, 2)) == [0, 0]
    seconds = time.monotonic() - began
    wanted = killed.outcome(whole)
    while kills < count:
        number += 1
        folder = root / str(number)
        log = folder.with_suffix(".log")
        children = launch(folder, 2, *WAYS[draw.choice([*WAYS])])
        time.sleep(draw.uniform(0.3, 1) * seconds)
        victim = draw.choice(children)
        os.kill(victim, signal.SIGKILL)
        statuses = end(children)
        stuck += None in statuses
        if statuses[children.index(victim)] != -signal.SIGKILL:
            continue  # it had ended before
        kills += 1
        said = log.read_text()
        saved = bool(state.saved_states(folder))
        # The other may have ended its part before: rank 0 works alone after the last collective.
        has_ended = statuses[1 - children.index(victim)] == 0
        has_said = "has lost another one" in said and saved == ("resume with" in said)
        messages += has_ended or has_said
        world_size = draw.choice((1, 2))
        flags = WAYS[draw.choice([*WAYS])] if world_size == 2 else ["--grad-accum", "2"]
        assert end(launch(folder, world_size, *flags)) == [0] * world_size, log.read_text()
        got = killed.outcome(folder)
        names = [name for name in {*got, *wanted} if got.get(name) != wanted.get(name)]
        different += [f"{folder.name}: {name}" for name in sorted(names)]
    return {"kills": kills, "different": different, "stuck": stuck, "said so": messages}


def apart(root: Path) -> dict[str, tuple[list[int | None], str]]:
    """How the processes ended after each failure, and everything that they printed."""

    def other_rows(rank: int) -> None:
        if rank == 1:
            rows = dataset.load_task()
            dataset.load_task = lambda *args: dataset.Task(
                "perplexity", rows.train[::-1], rows.test
            )

    def no_model(rank: int) -> None:
        def fail(*args: object) -> None:
            raise ValueError("model.safetensors is damaged")

        if rank == 1:
            base_model.load_quantized = fail

    def full_disk(rank: int) -> None:
        if rank == 0:
            killed.disturb_operation(12, killed.fail_like_a_full_disk, root / "seen")

    def one_is_asked_to_stop(rank: int) -> None:
        real = train.train_step
        steps = []

        def step(*args: object) -> tuple[float, float]:
            steps.append(1)
            if len(steps) == 3 and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*args)

        train.train_step = step

    result = {}
    in_use = root / "in_use"
    with one_run.locked(in_use):
        statuses = end(launch(in_use, 2))
        result["in_use"] = statuses, in_use.with_suffix(".log").read_text()
    for disturb in (other_rows, no_model, full_disk, one_is_asked_to_stop):
        folder = root / disturb.__name__
        statuses = end(launch(folder, 2, disturb=disturb))
        result[disturb.__name__] = statuses, folder.with_suffix(".log").read_text()
    stopped = root / one_is_asked_to_stop.__name__
    steps = [line["step"] for line in report.read_metrics(stopped / "metrics.jsonl")]
    result["steps before it stopped"] = steps, ""
    # Three processes resume what two began, with another number of batches in a step.
    statuses = end(launch(stopped, 3))
    result["another number"] = statuses, stopped.with_suffix(".log").read_text()
    return result


def sent(root: Path) -> dict[str, tuple[float, float]]:
    """For DDP and FSDP2: bytes per step, computed, and counted by two runs of different lengths.

    The adapters are large for the model: headers and other users of the loopback add little.
    """
    rank = 64
    sizes = sharding.sizes_in_bytes(attach(base_model.load_quantized(), r=rank))
    computed = sharding.bytes_sent_per_step(*sizes, 2, 1)
    computed["FSDP2"] += sizes[-1] / 2  # gloo, unlike NCCL, all-reduces the gradients
    seen = {}
    for way, flags in WAYS.items():
        bytes_of = {}
        for steps in (2, 42):
            more = ["--max-steps", str(steps), "--save-every", "0", "--lora-r", str(rank)]
            before = traffic.sent()
            assert end(launch(root / f"{way}-{steps}", 2, *flags, *more)) == [0, 0]
            bytes_of[steps] = traffic.sent() - before
        seen[way] = computed[way], (bytes_of[42] - bytes_of[2]) / 40 / 2
    return seen


def main(root: Path, count: int) -> None:
    killed.warm()
    for name in ("alike", "moments", "apart", "traffic"):
        (root / name).mkdir()
    result = {
        "alike": alike(root / "alike"),
        "moments": moments(root / "moments", count),
        "apart": apart(root / "apart"),
        "traffic": sent(root / "traffic"),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
