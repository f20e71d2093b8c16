"""Runs of train.py in several processes, each forked like those of tests/killed.py, told who they are as torchrun would.

    python tests/several.py FOLDER 10

    alike      1, 2 and 3 processes, by DDP and by FSDP2, that share out the same batches
    moments    one of two processes is killed at 10 random moments; the other must end by itself, and any number of them go on
    apart      what differs between processes, or goes wrong in one of them
    traffic    bytes that each of two processes sends in a step, computed and counted (bench/traffic.py)

Prints, as JSON, what happened.
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
from bench import traffic
from checkpoints import io as files
from data import dataset as data
from helpers import killed  # it sets the number of threads
from lora import attach
from training import report
from training import sharding as parallel
from training import state as resume

WAYS = {"DDP": (), "FSDP2": ("--shard",)}


def launch(
    folder: Path, world: int, *flags: str, disturb: Callable[[int], None] = lambda rank: None
) -> list[int]:
    """Start a run in so many processes. -> their ids, the first one's first"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def told(rank: int) -> Callable[[], None]:
        def tell() -> None:
            several = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": world,
                "LOCAL_WORLD_SIZE": world,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            os.environ.update(
                {name: str(value) for name, value in several.items()} if world > 1 else {}
            )
            disturb(rank)

        return tell

    return [killed.begin(folder, told(rank), flags) for rank in range(world)]


def end(children: list[int], seconds: float = 60.0) -> list[int | None]:
    """The exit status of each; None for one that had to be killed because it did not end."""
    statuses, deadline = dict.fromkeys(children), time.monotonic() + seconds
    while None in statuses.values() and time.monotonic() < deadline:
        for child in [child for child, status in statuses.items() if status is None]:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                statuses[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for child in [child for child, status in statuses.items() if status is None]:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return [statuses[child] for child in children]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in report.read_metrics(folder / "metrics.jsonl")]


def alike(root: Path) -> dict[str, dict]:
    """Each way beside the one process that does the same. far: the largest relative difference of a loss or adapter weight."""
    seen = {}
    for batches in (2, 6):
        alone = root / f"1x{batches}"
        assert end(launch(alone, 1, "--grad-accum", str(batches))) == [0]
        for world in (2, 3):
            for way, flags in WAYS.items():
                each, rest = divmod(batches, world)
                folder = root / f"{way}-{world}x{each}"
                if rest:
                    continue
                statuses = end(launch(folder, world, "--grad-accum", str(each), *flags))
                one, other = (
                    files.read_tensors(run / "adapter_model.safetensors") for run in (alone, folder)
                )
                differ = [abs(a - b) / abs(a) for a, b in zip(losses(alone), losses(folder))]
                differ += [
                    float((one[name] - other[name]).norm() / one[name].norm()) for name in one
                ]
                facts = json.loads((folder / "report.json").read_text())
                whole = json.loads((alone / "report.json").read_text())["model_bytes_per_process"]
                same = killed.trace(folder) == killed.trace(alone)
                seen[folder.name] = {
                    "statuses": statuses,
                    "far": max(differ),
                    "same bits": same,
                    "share of the bytes": facts["model_bytes_per_process"] / whole,
                }
    return seen


def moments(root: Path, count: int) -> dict[str, object]:
    """One of two processes is killed; then 1 or 2 go on, by either way, until the run ends."""
    draw, kills, different, stuck, words = random.Random(0), 0, [], 0, 0
    whole = root / "whole"
    began = time.monotonic()
    assert end(launch(whole, 2)) == [0, 0]
    seconds, wanted, number = time.monotonic() - began, killed.trace(whole), 0
    while kills < count:
        number += 1
        folder = root / str(number)
        children = launch(folder, 2, *WAYS[draw.choice([*WAYS])])
        time.sleep(draw.uniform(0.3, 1) * seconds)
        os.kill(victim := draw.choice(children), signal.SIGKILL)
        statuses, log = end(children), folder.with_suffix(".log")
        stuck += None in statuses
        if statuses[children.index(victim)] != -signal.SIGKILL:
            continue  # it had ended before
        kills += 1
        said, saved = log.read_text(), bool(resume.states(folder))
        words += "has lost another one" in said and saved == ("go on with" in said)
        world = draw.choice((1, 2))
        flags = WAYS[draw.choice([*WAYS])] if world == 2 else ("--grad-accum", "2")
        assert end(launch(folder, world, *flags)) == [0] * world, log.read_text()
        got = killed.trace(folder)
        different += [
            f"{folder.name}: {name}"
            for name in sorted({*got, *wanted})
            if got.get(name) != wanted.get(name)
        ]
    return {"kills": kills, "different": different, "stuck": stuck, "said so": words}


def apart(root: Path) -> dict[str, tuple[list[int | None], str]]:
    """-> for each mishap, how the processes ended, and all that they wrote to the terminal"""

    def other_rows(rank: int) -> None:
        if rank == 1:
            rows = data.load()
            data.load = lambda *args: data.Task("perplexity", rows.train[::-1], rows.test)

    def no_model(rank: int) -> None:
        def fail(*args: object) -> None:
            raise ValueError("model.safetensors is damaged")

        if rank == 1:
            killed.streaming.load = fail

    def full_disk(rank: int) -> None:
        if rank == 0:
            killed.disturb(12, killed.full, root / "seen")

    def one_is_asked_to_stop(rank: int) -> None:
        real, steps = killed.train.train_step, []

        def step(*args: object) -> tuple[float, float]:
            steps.append(1)
            if len(steps) == 3 and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*args)

        killed.train.train_step = step

    result = {}
    for disturb in (other_rows, no_model, full_disk, one_is_asked_to_stop):
        folder = root / disturb.__name__
        statuses = end(launch(folder, 2, disturb=disturb))
        result[disturb.__name__] = statuses, folder.with_suffix(".log").read_text()
    steps = [
        line["step"]
        for line in report.read_metrics(root / "one_is_asked_to_stop" / "metrics.jsonl")
    ]
    three = (
        root / "three"
    )  # what two of them began, with as many batches a step, and with another number
    folder = root / "one_is_asked_to_stop"
    end(launch(three, 1, "--grad-accum", "3"))
    result["steps before it stopped"] = steps, ""
    result["another number"] = end(launch(folder, 3)), folder.with_suffix(".log").read_text()
    return result


def sent(root: Path) -> dict[str, tuple[float, float]]:
    """By each way: computed, and counted as the difference of two runs of other lengths.

    With adapters that are large for the model, beside which headers, and whatever else uses the loopback, weigh little.
    """
    model, rank = killed.streaming.load(), "64"
    sizes = parallel.sizes(attach(model, r=int(rank)))
    computed = parallel.sent_in_a_step(*sizes, 2, 1)
    computed["FSDP2"] += sizes[-1] / 2  # gloo, unlike NCCL, hands round these sums, too
    seen = {}
    for way, flags in WAYS.items():
        bytes_of = {}
        for steps in (2, 42):
            before = traffic.sent()
            more = ["--max-steps", str(steps), "--save-every", "0", "--lora-r", rank]
            assert end(launch(root / f"{way}-{steps}", 2, *flags, *more)) == [0, 0]
            bytes_of[steps] = traffic.sent() - before
        seen[way] = computed[way], (bytes_of[42] - bytes_of[2]) / 40 / 2
    return seen


def main(root: Path, count: int) -> None:
    killed.warm()
    for name in ("alike", "moments", "apart", "traffic"):
        (root / name).mkdir()
    print(
        json.dumps(
            {
                "alike": alike(root / "alike"),
                "moments": moments(root / "moments", count),
                "apart": apart(root / "apart"),
                "traffic": sent(root / "traffic"),
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
