"""A folder holds one run: a second process and the files of an earlier run are refused."""

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from training import one_run
from training.options import Options, parse_args

# Locks a file as a run does, says so, and waits to be killed.
HOLDER = """
import fcntl, os, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
file.write(f"{os.getpid()} elsewhere")
file.flush()
print("locked", flush=True)
time.sleep(600)
"""
STATE = "state-000002.safetensors"


def refusal(folder: Path) -> str:
    """The error of a run that wants a folder; empty if it gets the folder."""
    try:
        with one_run.locked(folder):
            return ""
    except ValueError as error:
        return str(error)


def test_a_second_run_is_told_which_process_writes_to_the_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with one_run.locked(out):
        told = refusal(out)
        assert told.startswith(f"process {os.getpid()} is writing to {out}: wait for its end or ")
        assert "\n" not in told
        assert refusal(tmp_path / "other") == ""
        assert out.exists(), "the one that was refused removes nothing"
    assert refusal(out) == ""


def test_a_killed_run_blocks_the_next_one_only_while_it_lives(tmp_path: Path) -> None:
    lock = tmp_path / ".train.lock"
    command = [sys.executable, "-c", HOLDER, str(lock)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"locked\n"
        assert f"process {holder.pid} on elsewhere is writing" in refusal(tmp_path)
        holder.send_signal(signal.SIGKILL)
    assert lock.exists(), "a kill leaves the file"
    with one_run.locked(tmp_path):
        assert lock.read_text() == f"{os.getpid()} {socket.gethostname()}"
    assert not lock.exists()


def test_a_lock_that_its_owner_removes_in_between_is_not_taken_for_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or two runs would hold a lock each: one on the removed file, one on the new file."""
    real = fcntl.flock
    lock = tmp_path / ".train.lock"
    inodes = []

    def remove_before(file: object, how: int) -> None:
        if len(inodes) < 2:
            lock.unlink()
        if len(inodes) == 1:
            lock.touch()
        inodes.append(os.fstat(file.fileno()).st_ino)
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", remove_before)
    with one_run.locked(tmp_path):
        assert len(inodes) == 3 and inodes[-1] == lock.stat().st_ino
        assert f"process {os.getpid()} is writing" in refusal(tmp_path)


def test_a_disk_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    assert "cannot be locked (No locks available): put --output-dir on" in refusal(tmp_path)


def test_a_folder_in_which_nothing_was_written_is_removed_if_the_run_created_it(
    tmp_path: Path,
) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new/er/est"):
        assert refusal(tmp_path / name) == ""
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    with one_run.locked(tmp_path / "a/b"):
        (tmp_path / "a/b/loss.png").touch()
    assert (tmp_path / "a/b/loss.png").exists()
    with one_run.locked(tmp_path / "c/d"):
        (tmp_path / "c/file").touch()
        (tmp_path / "c/d/.train.lock").unlink()
        (tmp_path / "c/d").rmdir()
    assert (tmp_path / "c/file").exists(), "also if somebody removes the folder during the run"


def options_for(folder: Path, *more: str) -> Options:
    return parse_args(["--output-dir", str(folder), *more])


@pytest.mark.parametrize(
    "name", [*one_run.RESULTS, one_run.METRICS, STATE, f"16-bit/{STATE}", "16-bit/report.json"]
)
def test_any_file_of_an_earlier_run_is_named_and_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "16-bit").mkdir()
    one_run.check_folder(options_for(tmp_path))
    (tmp_path / name).touch()
    message = f"{tmp_path} holds an earlier run ({name}): continue it with --resume, remove it with"
    with pytest.raises(ValueError, match=re.escape(message)):
        one_run.check_folder(options_for(tmp_path))
    one_run.check_folder(options_for(tmp_path, "--resume"))
    one_run.check_folder(options_for(tmp_path, "--overwrite"))


def test_overwriting_removes_the_files_that_a_run_writes_and_no_others(tmp_path: Path) -> None:
    ours = [*one_run.RESULTS, one_run.METRICS, STATE, "state-000010.safetensors"]
    theirs = ["rows.jsonl", "state-1.txt", "README.md", "adapter_model.safetensors.old"]
    for folder in (tmp_path, tmp_path / "16-bit"):
        folder.mkdir(exist_ok=True)
        for name in ours + theirs:
            (folder / name).touch()
    args = options_for(tmp_path)
    one_run.remove_earlier_run(args)
    assert (tmp_path / STATE).exists(), "nothing without --overwrite"
    args = options_for(tmp_path, "--overwrite")
    one_run.remove_earlier_run(args)
    assert not args.overwrite, "done"
    for folder in (tmp_path, tmp_path / "16-bit"):
        assert sorted(path.name for path in folder.iterdir() if path.is_file()) == sorted(theirs)


def test_a_folder_with_a_model_or_the_data_is_refused_even_to_be_overwritten(
    tmp_path: Path,
) -> None:
    data = tmp_path / "metrics.jsonl"
    data.touch()
    args = options_for(tmp_path, "--overwrite", "--data", str(data))
    with pytest.raises(ValueError, match="metrics.jsonl is a file that a run writes: choose"):
        one_run.check_folder(args)
    (tmp_path / "config.json").touch()
    with pytest.raises(ValueError, match=r"holds a model: choose another --output-dir"):
        one_run.check_folder(options_for(tmp_path, "--overwrite"))
