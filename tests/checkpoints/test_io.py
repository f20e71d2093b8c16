"""Writes are atomic; an untrusted file is read, or refused by name."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

import checkpoints
from checkpoints import io
from helpers import models
from lora import QLoRALinear


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_a_save_that_fails_at_any_moment_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    model = models.adapted()
    checkpoints.save_adapter(model, tmp_path)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for layer in model.modules():
        if isinstance(layer, QLoRALinear):
            nn.init.ones_(layer.lora_B)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    target = {
        "write": (io, "save_file"),
        "fsync": (io.os, "fsync"),
        "replace": (io.os, "replace"),
    }
    monkeypatch.setattr(*target[moment], fail)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save_adapter(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old


PATHS = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
SAVE = """
import os, sys
umask = os.umask(int(sys.argv[2], 8))
import checkpoints, lora
from helpers import models
model = lora.attach(models.tiny_llama(vocab_size=256))
checkpoints.save_adapter(model, sys.argv[1])
checkpoints.save_4bit(model, sys.argv[1])
os.umask(umask)
"""


def test_two_processes_write_the_same_bytes_with_the_permissions_of_their_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process and another one."""
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "here"), "022"])
    exec(SAVE, {})  # noqa: S102
    command = [sys.executable, "-c", SAVE, str(tmp_path / "there"), "007"]
    subprocess.run(command, env=PATHS, check=True)
    contents = []
    for name, umask in (("here", 0o022), ("there", 0o007)):
        paths = sorted((tmp_path / name).iterdir())
        assert [path.stat().st_mode & 0o777 for path in paths] == [0o666 & ~umask] * 5
        contents.append({path.name: path.read_bytes() for path in paths})
    assert contents[0] == contents[1]


def test_a_second_entry_in_the_header_which_would_have_a_random_place_is_refused(
    tmp_path: Path,
) -> None:
    with pytest.raises(AssertionError, match="one entry, has format, base"):
        io.write_tensors({}, tmp_path / "file", {"format": "pt", "base": "{}"})


def test_a_folder_that_is_read_only_or_too_small_is_an_error_before_the_work(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written to .*choose another --output-dir"):
        io.prepare_folder(tmp_path / "file" / "out")
    with pytest.raises(ValueError, match="too little free space"):
        io.prepare_folder(tmp_path / "out", nbytes=2**60)
    io.prepare_folder(tmp_path / "out", nbytes=1)
    assert list((tmp_path / "out").iterdir()) == []


JSON = {
    "is not a JSON object .*Expecting": b"{",
    "its type is list": b"[1]",
    "is not a JSON object .*start byte": b'{"a": "\xff"}',
    "is not a JSON object .*recursion": b"[" * 100_000,
    "is not a JSON object .*digits": b'{"a": ' + b"9" * 5000 + b"}",
    "is not a JSON object .*nested more than 50 levels deep": b'{"a": ' * 60 + b"1" + b"}" * 60,
}


@pytest.mark.parametrize("complaint", JSON)
def test_a_file_that_is_not_a_json_object_is_refused_by_name(
    tmp_path: Path, complaint: str
) -> None:
    (tmp_path / "some.json").write_bytes(JSON[complaint])
    with pytest.raises(ValueError, match=f"some.json .*{complaint}"):
        io.read_json(tmp_path / "some.json")


def test_a_json_file_that_is_missing_or_huge_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no .*some.json"):
        io.read_json(tmp_path / "some.json")
    with open(tmp_path / "some.json", "wb") as file:
        file.truncate(io.LARGEST_JSON + 1)  # a sparse file, which takes no space
    with pytest.raises(ValueError, match="some.json has 67108865 bytes"):
        io.read_json(tmp_path / "some.json")


INDEX = {
    "weight_map does not give the file of each tensor": [None, [], {"a": 1}],
    "given for a, is not a file of this folder": [
        {"a": name} for name in ("../x", "/etc/passwd", "", "..", "x/y", "x\0y")
    ],
    "there is no .*absent": [{"a": "absent"}],
    "one: .*index.json does not place a in this file": [{"b": "one"}],
    "index.json: b is not in one": [{"a": "one", "b": "one"}],
}
INDEX_CASES = [(complaint, places) for complaint in INDEX for places in INDEX[complaint]]


@pytest.mark.parametrize("complaint, places", INDEX_CASES)
def test_an_index_that_is_wrong_or_leads_out_of_the_folder_is_refused(
    tmp_path: Path, complaint: str, places: object
) -> None:
    io.write_tensors({"a": torch.ones(2)}, tmp_path / "one", {})
    io.write_text(json.dumps({"weight_map": places}), tmp_path / "model.safetensors.index.json")
    with pytest.raises(ValueError, match=complaint):
        io.read_model(tmp_path)


def test_tensors_that_were_read_stay_when_the_file_changes(tmp_path: Path) -> None:
    io.write_tensors({"a": torch.ones(1000)}, tmp_path / "one", {})
    tensor = io.read_tensors(tmp_path / "one")["a"]
    with open(tmp_path / "one", "r+b") as file:
        file.truncate(0)
    assert torch.equal(tensor, torch.ones(1000))


def test_a_write_that_fails_in_the_library_is_an_os_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise SafetensorError("disk quota exceeded")

    monkeypatch.setattr(io, "save_file", fail)
    message = "one could not be written .disk quota exceeded.; the previous file is unchanged"
    with pytest.raises(OSError, match=message):
        io.write_tensors({"a": torch.ones(2)}, tmp_path / "one", {})
    assert list(tmp_path.iterdir()) == []
