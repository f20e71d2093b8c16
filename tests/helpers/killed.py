"""Runs of train.py that are killed and go on, each forked from one warmed process, so that it costs tens of milliseconds.

    python tests/killed.py FOLDER 60

    moments    SIGKILL at 60 random moments
    kill       SIGKILL at each operation on files that a run makes, and in the middle of each write
    fail       the operation fails instead, as on a full disk

The model and the data are tiny, and made here; what only takes time, the measuring and the picture, is left out. All else is
train.py. Prints, as JSON, what happened; `different` lists the runs that did not end as one that nobody disturbed.

A process of its own, for a fork of one that has used autograd or its threads is not sound; this one never does.
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
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":
    os.environ |= {"QLORA_KERNELS": "reference", "OMP_NUM_THREADS": "1"}
sys.path[:0] = [str(Path(__file__).parents[level]) for level in (1, 2)]

import torch  # noqa: E402 (after the number of threads is set)

import train  # noqa: E402
from checkpoints import base_model as streaming  # noqa: E402
from checkpoints import io as files  # noqa: E402
from checkpoints import sources as pretrained  # noqa: E402
from data import dataset as data  # noqa: E402
from helpers import models  # noqa: E402
from training import report  # noqa: E402
from training import state as resume  # noqa: E402

FLAGS = [
    "--max-steps",
    "4",
    "--save-every",
    "2",
    "--batch-size",
    "2",
    "--lora-dropout",
    "0.2",
    "--dtype",
    "float32",
    "--device",
    "cpu",
]
TIMES = ("seconds", "rss_bytes")  # of metrics.jsonl: no two runs share them


def warm() -> None:
    """Have in memory what each run would read, and leave out what only takes time."""
    torch.set_num_threads(1)
    model, tokenizer, draw = (
        models.tiny_llama(vocab_size=256),
        SimpleNamespace(eos_token_id=2),
        random.Random(0),
    )
    texts = [[draw.randrange(3, 256) for _ in range(draw.randrange(4, 20))] for _ in range(9)]
    rows = [data.Example(ids, [data.IGNORE_INDEX] * 2 + ids[2:]) for ids in texts]
    data.load_task = lambda *args: data.Task("perplexity", rows[:-1], rows[-1:])
    pretrained.outline = lambda name: (model.config, tokenizer)
    pretrained.find, pretrained.tokenizer_in = lambda name: Path("."), lambda folder: tokenizer
    streaming.load = lambda *args: copy.deepcopy(model)
    train.measure = lambda *args: [0.5, None]
    report.plot_loss = lambda *args: None
    os.fsync = lambda descriptor: (
        None
    )  # it takes long, and what it is for, a power cut, is not tried here


def begin(
    folder: Path, disturb: Callable[[], None] = lambda: None, more: tuple[str, ...] = ()
) -> int:
    """Start train.py in a fork, going on if there is a state; `disturb` prepares what goes wrong. -> process id"""
    flags = [
        *FLAGS,
        *more,
        "--output-dir",
        str(folder),
        *(["--resume"] if resume.states(folder) else []),
    ]
    child = os.fork()
    if child:
        return child
    status = 99  # of whatever is no clean end
    try:
        for stream in (1, 2):
            os.dup2(
                os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream
            )
        disturb()
        status = train.main(flags)
    finally:
        os._exit(status)


def end(child: int) -> int:
    """The exit status of a run, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def trace(folder: Path) -> dict[str, object]:
    """Everything that a run leaves, but for the time that it took, and the order of the entries in a file's header."""
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    lines = report.read_metrics(folder / "metrics.jsonl")
    steps = [{key: each for key, each in line.items() if key not in TIMES} for line in lines]
    states = {
        path.name: resume.checksum(state.tensors, json.dumps(state[2:]))
        for path in resume.states(folder)
        for state in [resume.read_state(path)]
    }
    adapter = folder / "adapter_model.safetensors"
    header = json.dumps(files.read_metadata(adapter), sort_keys=True)
    states[adapter.name] = resume.checksum(files.read_tensors(adapter), header)
    return (
        contents
        | {"metrics.jsonl": steps, "report.json": json.loads(contents["report.json"])["steps"]}
        | states
    )


def finish(folder: Path, wanted: dict[str, object]) -> list[str]:
    """Let a disturbed run go on to its end. -> what is then not as it should be"""
    status = end(begin(folder))
    if status:
        return [f"{folder.name}: status {status}"]
    got = trace(folder)
    return [
        f"{folder.name}: {name}"
        for name in sorted({*got, *wanted})
        if got.get(name) != wanted.get(name)
    ]


def moments(root: Path, count: int, seconds: float, wanted: dict[str, object]) -> dict[str, object]:
    """SIGKILL at random moments, again and again in the same run, until one has come through; then the next run."""
    draw, kills, halves, different, folder = random.Random(0), 0, 0, [], root / "0"
    while kills < count:
        child = begin(folder)
        time.sleep(draw.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        if end(child) == -signal.SIGKILL:
            kills += 1
            halves += bool(list(folder.glob(f".*{files.UNFINISHED}")))
        else:
            different += finish(folder, wanted)
            folder = root / str(kills)
    return {
        "kills": kills,
        "in the middle of a write": halves,
        "different": different + finish(folder, wanted),
    }


def disturb(number: int, act: Callable[[], None], seen: Path) -> None:
    """Call `act` at the operation of that number on files that follow in this process; its name is added to the file `seen`."""
    numbers = itertools.count(1)

    def happen(name: str, path: str | Path | None = None) -> None:
        if next(numbers) == number:
            with open(seen, "a") as names:
                names.write(name + "\n")
            if path:
                os.truncate(path, os.path.getsize(path) // 2)
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
    wrap(files, "save_file", path_at=1)
    wrap(Path, "write_text", path_at=0)


def operations(
    root: Path, wanted: dict[str, object], act: Callable[[], None], status: int
) -> dict[str, object]:
    """One run disturbed at its first operation, one at its second, ..., until one gets to its end undisturbed."""
    seen, different, ended = root / "seen", [], status
    for number in itertools.count(1):
        folder = root / str(number)
        ended = end(begin(folder, lambda number=number: disturb(number, act, seen)))
        if len(seen.read_text().splitlines()) < number:
            break
        different += (
            finish(folder, wanted) if ended == status else [f"{folder.name}: status {ended}"]
        )
    return {
        "operations": seen.read_text().splitlines(),
        "status at last": ended,
        "different": different,
    }


def full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def main(root: Path, count: int) -> None:
    warm()
    for name in ("whole", "moments", "kill", "fail"):
        (root / name).mkdir()
    began = time.perf_counter()
    status = end(begin(root / "whole" / "run"))
    seconds = time.perf_counter() - began
    assert status == 0, (root / "whole" / "run.log").read_text()
    wanted = trace(root / "whole" / "run")
    print(
        json.dumps(
            {
                "whole": sorted(wanted),
                "moments": moments(root / "moments", count, seconds, wanted),
                "kill": operations(
                    root / "kill",
                    wanted,
                    lambda: os.kill(os.getpid(), signal.SIGKILL),
                    -signal.SIGKILL,
                ),
                "fail": operations(root / "fail", wanted, full, 1),
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
