"""Keeps the output folder to one run: refuses a second process and the files of an earlier run.

While a run lasts, it holds a lock (flock) on the file .train.lock in the folder. It says which
process holds the lock. The system releases the lock when the process ends, in whatever way, so a
run that was killed does not block the next one.

A folder that holds an earlier run is an error, unless --resume continues that run or --overwrite
removes it. Only files with the names that a run writes are ever removed.
"""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO

from checkpoints import io
from training import distributed, end_tokens
from training.options import COMPARED, Options
from training.state import saved_states

# In the order in which they are removed: as long as a state is there, so are its metrics.
RESULTS = ["report.json", "loss.png", "adapter_model.safetensors", "adapter_config.json"]
RESULTS += [end_tokens.FILE]
METRICS = "metrics.jsonl"


# Another process


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create a folder and keep other runs out of it. If nothing was written, it is removed again.

    Raises: ValueError if another run is writing there, or if the folder cannot be written to.
    """
    created = [each for each in (folder, *folder.parents) if not each.exists()]
    lock: list[IO[str]] = []  # on rank 0 only
    distributed.run_on_main(lambda: lock.append(_lock(folder)))
    try:
        yield
    finally:
        for file in lock:
            Path(file.name).unlink(missing_ok=True)
            file.close()  # only now can another run lock the folder
            _remove_empty(created)


def _lock(folder: Path) -> IO[str]:
    """Lock a folder. Returns the open file that holds the lock until it is closed."""
    io.prepare_folder(folder)
    path = folder / ".train.lock"
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (open as long as the run)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ValueError(_why_not_locked(error, path)) from None
    if not (path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())):
        file.close()  # the run before has removed the file after we opened it
        return _lock(folder)
    file.truncate(0)
    file.write(f"{os.getpid()} {socket.gethostname()}")
    file.flush()
    return file


def _why_not_locked(error: OSError, lock: Path) -> str:
    if not isinstance(error, BlockingIOError):
        return f"{lock} cannot be locked ({error.strerror}): put --output-dir on another disk"
    pid, _, host = lock.read_text(encoding="utf-8").partition(" ")
    place = "" if host == socket.gethostname() else f" on {host}"
    return (
        f"process {pid}{place} is writing to {lock.parent}: wait for its end or choose another "
        f"--output-dir (if there is no such process any more, delete {lock})"
    )


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


# An earlier run


def check_folder(args: Options) -> None:
    """Check that the output folder is free for this run.

    Raises: ValueError if it holds a model, the data, or an earlier run that no flag allows for.
    """
    folder = args.output_dir
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} holds a model: choose another --output-dir")
    files = earlier_files(folder)
    data = Path(args.data)
    if any(data.exists() and data.samefile(file) for file in files):
        raise ValueError(f"{data} is a file that a run writes: choose another --output-dir")
    if files and not (args.resume or args.overwrite):
        names = ", ".join(str(file.relative_to(folder)) for file in files)
        raise ValueError(
            f"{folder} holds an earlier run ({names}): continue it with --resume, remove it with "
            "--overwrite, or choose another --output-dir"
        )


def earlier_files(folder: Path) -> list[Path]:
    """The files of a run in a folder, and those of the second run of --compare."""
    files = []
    for place in (folder / COMPARED, folder):
        named = [place / name for name in RESULTS]
        candidates = [*named, *saved_states(place), place / METRICS]
        files += [path for path in candidates if path.exists()]
    return files


def remove_earlier_run(args: Options) -> None:
    """With --overwrite, remove the earlier run. The options are then those of a new run."""
    if args.overwrite:
        distributed.run_on_main(partial(_remove, args.output_dir))
        args.overwrite = False


def _remove(folder: Path) -> None:
    for path in earlier_files(folder):
        path.unlink()
        print(f"removed {path}")
