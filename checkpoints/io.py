"""Files: what we write is whole or not there, and what we read may come from a stranger.

Writing. A file is written beside its final place, seen to be on the disk, and moved there: a reader finds the old file or the
new one, and never half of one.

Reading. Only JSON and safetensors are read; nothing is unpickled, and no name leads out of the folder (a link in it may: caches
are made of links). What does not fit is one ValueError that names the file and, where there is one, the key. The library checks
the header of a safetensors file against its length, so that none can make us allocate more than the file holds.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

LARGEST_CONFIG, LARGEST_JSON = (
    2**20,
    2**26,
)  # bytes; the index of a model of a million tensors is about as long as the latter
UNFINISHED = ".unfinished"  # how the name of a folder ends in which a file is not whole yet
WINDOW = 2**26  # bytes of a file that are read before it is mapped anew
DEEPEST_JSON = 50  # so that what walks through it does not run out of stack
WITH_NAN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def claim(folder: Path, nbytes: int = 0) -> None:
    """Make a folder, and see before any work is done for it that it takes files and has room for nbytes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be written to ({error.strerror}): choose another --output-dir"
        ) from None
    if shutil.disk_usage(folder).free < nbytes:
        raise ValueError(
            f"{folder} has too little free space: {nbytes / 1e6:.0f} MB are needed for adapter and state"
        )


def read_text(path: Path) -> str:
    """A file's text. Raises: ValueError if it is not UTF-8."""
    try:
        return path.read_text(
            encoding="utf-8-sig"
        )  # with or without the mark that Windows puts first
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it"
        ) from None


def parse_json(text: bytes) -> dict:
    """The object that a JSON text stands for. Raises: ValueError if it is none, or nested deeper than anybody means."""
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError(error) from None
    if not isinstance(content, dict):
        raise ValueError(f"it is no object, but a {type(content).__name__}")
    level = [content]
    for _ in range(DEEPEST_JSON):
        level = [
            inner
            for each in level
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, (dict, list))
        ]
    if level:
        raise ValueError(f"it is nested more than {DEEPEST_JSON} deep")
    return content


def read_json(path: Path, largest: int = LARGEST_CONFIG) -> dict:
    """The object in a JSON file of at most `largest` bytes."""
    if not os.path.isfile(path):  # unlike path.is_file(), also for a name that no file can have
        raise ValueError(f"there is no {path}")
    if path.stat().st_size > largest:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes; no more than {largest} are read as JSON"
        )
    try:
        return parse_json(path.read_bytes())
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not a JSON object ({error})") from None


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    """A safetensors file, its header read and checked against its length; its numbers are mapped, and read when used."""
    if not os.path.isfile(path):
        pickles = sorted(each.name for each in path.parent.glob("*.bin"))
        hint = (
            f"; {pickles[0]} is a pickle, which could run code: convert it to safetensors"
            if pickles
            else ""
        )
        raise ValueError(f"there is no {path}{hint}")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (
        SafetensorError,
        RuntimeError,
        TypeError,
        OSError,
    ) as error:  # TypeError: 2**63 of something, or more
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is damaged ({reason})") from None


def each_tensor(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a safetensors file in turn, as a view of the mapped file: copy what is to stay.

    What was read of a mapping is memory of ours as long as it is mapped; so the file is mapped anew every WINDOW bytes.
    """
    with _opened(path) as file:
        names = list(file.keys())
    while names:
        with _opened(path) as file:
            unread = WINDOW
            while names and unread > 0:
                tensor = file.get_tensor(names[0])
                unread -= tensor.nbytes
                yield names.pop(0), tensor


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, in memory of its own: the file may change or go afterwards."""
    return {name: tensor.clone() for name, tensor in each_tensor(path)}


def describe(path: Path) -> dict[str, Tensor]:
    """Name, shape and dtype of every tensor of a safetensors file, as tensors on the meta device: no number is read."""
    with _opened(path) as file:
        return {name: file.get_tensor(name).to("meta") for name in file.keys()}  # noqa: SIM118 (it is no dict)


def refuse_nan(tensors: dict[str, Tensor], where: Path) -> None:
    """Raise a ValueError naming the first tensor with NaN or infinity in it."""
    for name, tensor in tensors.items():
        if (
            tensor.dtype in WITH_NAN
            and tensor.numel()
            and not all(end.isfinite() for end in tensor.aminmax())
        ):
            raise ValueError(f"{where}: {name} holds NaN or infinity")


def read_metadata(path: Path) -> dict[str, str]:
    """The strings in the header of a safetensors file that `read_tensors` has read."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def describe_model(folder: Path) -> dict[Path, dict[str, Tensor]]:
    """The safetensors files of a model's folder, model.safetensors or those that its index names, and what each describes."""
    path, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if path.is_file() or not index.is_file():
        return {path: describe(path)}
    places = read_json(index, LARGEST_JSON).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise ValueError(f"{index}: weight_map does not give the file of each tensor")
    for name, place in places.items():
        if place in ("", "..") or "\0" in place or Path(place).name != place:
            raise ValueError(
                f"{index}: {name} is said to be in {place!r}, which is no file of this folder"
            )
    shards = {folder / place: describe(folder / place) for place in sorted(set(places.values()))}
    strays = [
        (path, name)
        for path, its in shards.items()
        for name in its
        if places.get(name) != path.name
    ]
    if strays:
        raise ValueError(f"{strays[0][0]}: {strays[0][1]} is not where {index.name} says")
    lost = [name for name, place in places.items() if name not in shards[folder / place]]
    if lost:
        raise ValueError(f"{index}: {lost[0]} is not in {places[lost[0]]}")
    return shards


def read_model(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a model's folder, in memory of its own."""
    return {
        name: tensor
        for path in describe_model(folder)
        for name, tensor in read_tensors(path).items()
    }


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file. Raises: OSError; what was there before is untouched then."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        atomically(path, lambda unfinished: save_file(contiguous, unfinished, metadata))
    except SafetensorError as error:
        raise OSError(
            f"{path} could not be written ({error}); what was there before is untouched"
        ) from None


def write_text(text: str, path: Path) -> None:
    """Write a text file. Raises: OSError; what was there before is untouched then."""
    atomically(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file, see that it is on the disk, and give it its name; that reaches the disk, too."""
    # Until then it has a folder of its own: a library may write beside what it writes, and be killed there.
    folder = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")
    folder.mkdir(exist_ok=True)
    try:
        write(folder / path.name)
        _sync(folder / path.name)
        os.replace(folder / path.name, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(folder)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_unfinished(folder: Path) -> None:
    """Remove what processes that were killed while they wrote have left. No other may be writing there."""
    for path in folder.glob(f".*{UNFINISHED}"):
        shutil.rmtree(path)
