"""Kills runs of train.py and resumes them. Each is forked from one warm process, which is fast.

    python tests/helpers/killed.py FOLDER 60

    moments    SIGKILL at 60 random moments
    kill       SIGKILL before each file operation of a run, and in the middle of each write
    fail       the operation fails instead, as on a full disk

The model and the data are tiny and made here; measuring and plotting are left out, because they
only take time. Everything else is train.py. Prints the results as JSON; `different` lists the runs
that did not end like an undisturbed one.

It runs in a process of its own, because a fork is not safe once autograd or its threads were used;
this process never uses them.
"""

import copy
import errno
import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":
    os.environ |= {"QLORA_KERNELS": "reference", "OMP_NUM_THREADS": "1"}
sys.path[:0] = [str(Path(__file__).parents[level]) for level in (1, 2)]

import torch  # noqa: E402 (after the number of threads is set)

import train  # noqa: E402
from checkpoints import base_model, io, sources  # noqa: E402
from data import dataset  # noqa: E402
from helpers import models  # noqa: E402
from training import preflight, report, state  # noqa: E402

FLAGS = [
    *("--max-steps", "4"),
    *("--save-every", "2"),
    *("--batch-size", "2"),
    *("--lora-dropout", "0.2"),
    *("--dtype", "float32"),
    *("--device", "cpu"),
]
TIMES = ("seconds", "rss_bytes")  # of metrics.jsonl: they differ between runs


def warm() -> None:
    """Load what every run would read, and leave out what only takes time."""
    torch.set_num_threads(1)
    model = models.tiny_llama(vocab_size=256)
    tokenizer = SimpleNamespace(eos_token_id=2)
    draw = random.Random(0)
    rows = []
    for _ in range(9):
        ids = [draw.randrange(3, 256) for _ in range(draw.randrange(4, 20))]
        rows.append(dataset.Example(ids, [dataset.IGNORE_INDEX] * 2 + ids[2:]))
    dataset.load_task = lambda *args: dataset.Task("perplexity", rows[:-1], rows[-1:])
    sources.load_config_and_tokenizer = lambda name: (model.config, tokenizer)
    sources.find_model = lambda name: Path(".")
    sources.load_tokenizer = lambda folder: tokenizer
    preflight.check_base = lambda *args: None
    base_model.load_quantized = lambda *args: copy.deepcopy(model)
    train.evaluate = lambda *args: [0.5, None]
    report.plot_loss = lambda *args: None
    os.fsync = lambda descriptor: None  # slow, and only a power cut would show its effect


def start(
    folder: Path, disturb: Callable[[], None] | None = None, more: tuple[str, ...] = ()
) -> int:
    """Start train.py in a fork, with --resume if there is a state. Returns the process id.

    disturb: is called before train.py and prepares what goes wrong. more: flags.
    """
    flags = [*FLAGS, *more, "--output-dir", str(folder)]
    if state.saved_states(folder):
        flags.append("--resume")
    child = os.fork()
    if child:
        return child
    status = 99  # of a run that does not end by returning
    try:
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if disturb:
            disturb()
        status = train.main(flags)
    finally:
        os._exit(status)


def wait(child: int) -> int:
    """The exit status of a run, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outcome(folder: Path) -> dict[str, object]:
    """The content of each file of a run, without what depends on the time that the run took."""
    contents: dict[str, object] = {path.name: path.read_bytes() for path in folder.iterdir()}
    contents["metrics.jsonl"] = [
        {key: value for key, value in line.items() if key not in TIMES}
        for line in report.read_metrics(folder / "metrics.jsonl")
    ]
    contents["report.json"] = json.loads(contents["report.json"])["steps"]
    return contents


def finish(folder: Path, expected: dict[str, object]) -> list[str]:
    """Resume a disturbed run to its end. Returns the files that differ from the expected ones."""
    status = wait(start(folder))
    if status:
        return [f"{folder.name}: status {status}"]
    found = outcome(folder)
    return [
        f"{folder.name}: {name}"
        for name in sorted({*found, *expected})
        if found.get(name) != expected.get(name)
    ]


def kill_at_random_moments(
    root: Path, count: int, seconds: float, expected: dict[str, object]
) -> dict[str, object]:
    """Kill a run and resume it until it gets to its end; then do the same to the next run."""
    draw = random.Random(0)
    kills = 0
    half_written = 0
    different = []
    folder = root / "0"
    while kills < count:
        child = start(folder)
        time.sleep(draw.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        if wait(child) == -signal.SIGKILL:
            kills += 1
            half_written += bool(list(folder.glob(f".*{io.UNFINISHED}")))
        else:
            different += finish(folder, expected)
            folder = root / str(kills)
    different += finish(folder, expected)
    return {"kills": kills, "in the middle of a write": half_written, "different": different}


def disturb_operation(number: int, act: Callable[[], None], seen: Path) -> None:
    """Call `act` at one of the file operations of this process.

    number: which of them, counted from 1. The operation's name is appended to the file `seen`.
    """
    numbers = itertools.count(1)

    def happen(name: str, half_of: str | Path | None = None) -> None:
        if next(numbers) == number:
            with open(seen, "a") as names:
                names.write(name + "\n")
            if half_of:
                os.truncate(half_of, os.path.getsize(half_of) // 2)
            act()

    def wrap(place: object, name: str, path_at: int | None = None) -> None:
        operation = getattr(place, name)

        def wrapped(*args: object, **kwargs: object) -> object:
            happen(name)
            result = operation(*args, **kwargs)
            if path_at is not None:
                happen(f"half of {name}", args[path_at])
            return result

        setattr(place, name, wrapped)

    for name in ("fsync", "replace", "rmdir", "unlink"):
        wrap(os, name)
    wrap(io, "save_file", path_at=1)
    wrap(Path, "write_text", path_at=0)


def disturb_each_operation(
    root: Path, expected: dict[str, object], act: Callable[[], None], expected_status: int
) -> dict[str, object]:
    """Disturb a run at its first file operation, the next at its second, until one has no more."""
    seen = root / "seen"
    different = []
    for number in itertools.count(1):
        folder = root / str(number)
        status = wait(start(folder, partial(disturb_operation, number, act, seen)))
        operations = seen.read_text().splitlines()
        if len(operations) < number:
            break
        if status == expected_status:
            different += finish(folder, expected)
        else:
            different.append(f"{folder.name}: status {status}")
    return {"operations": operations, "status at last": status, "different": different}


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail_like_a_full_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def main(root: Path, count: int) -> None:
    warm()
    for name in ("whole", "moments", "kill", "fail"):
        (root / name).mkdir()
    undisturbed = root / "whole" / "run"
    began = time.perf_counter()
    status = wait(start(undisturbed))
    seconds = time.perf_counter() - began
    assert status == 0, undisturbed.with_suffix(".log").read_text()
    expected = outcome(undisturbed)
    kill = disturb_each_operation(root / "kill", expected, kill_self, -signal.SIGKILL)
    fail = disturb_each_operation(root / "fail", expected, fail_like_a_full_disk, 1)
    result = {
        "whole": sorted(expected),
        "moments": kill_at_random_moments(root / "moments", count, seconds, expected),
        "kill": kill,
        "fail": fail,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
