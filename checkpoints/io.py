"""Reads and writes files: a write is atomic, and a file to read may come from a stranger.

Writing. A file is written to a temporary folder next to its destination, synchronized to disk and
then renamed. A reader sees the old file or the new one, never a part of either. The permissions are
those that the umask gives, and the bytes depend on nothing but the content.

Reading. Only JSON and safetensors are read. Nothing is unpickled, and no file name in an index
leads out of the folder (a symbolic link in the folder may: download caches consist of links).
Invalid input raises one ValueError that names the file and, where there is one, the key. The
safetensors library checks the header against the length of the file, so a header cannot make us
allocate more than the file holds.
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

LARGEST_CONFIG = 2**20  # bytes
LARGEST_JSON = 2**26  # bytes; about the length of the index of a model with a million tensors
DEEPEST_JSON = 50  # levels, so that a recursive function can walk through it
WINDOW = 2**26  # bytes that are read from a mapped file before it is mapped again
UNFINISHED = ".unfinished"  # suffix of a temporary folder
LFS_POINTER = b"version https://git-lfs"  # how such a file begins
FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


# Reading


def first_line(error: Exception) -> str:
    """The first line of the message of an error."""
    return str(error).strip().partition("\n")[0]


def one_line(error: Exception) -> str:
    """The message of an error on one line, without its end if it is long."""
    return " ".join(str(error).split())[:300]


def parse_json(
    text: bytes, allowed: tuple[type, ...] = (dict,), unique_keys: bool = False
) -> dict | list:
    """Parses a JSON object, or a list if that is allowed.

    Raises: ValueError if it is of another type, or nested too deeply, or has a key twice in one
    object although keys must be unique.
    """
    try:
        content = json.loads(text, object_pairs_hook=_unique_keys if unique_keys else None)
    except RecursionError as error:
        raise ValueError(error) from None
    if not isinstance(content, allowed):
        raise ValueError(f"it is not an object, its type is {type(content).__name__}")
    level = [content]
    for _ in range(DEEPEST_JSON):
        level = [child for parent in level for child in _containers_in(parent)]
    if level:
        raise ValueError(f"it is nested more than {DEEPEST_JSON} levels deep")
    return content


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"an object has the key {twice!r:.50} twice: keep one of them")
    return content


def _containers_in(parent: dict | list) -> list[dict | list]:
    values = parent.values() if isinstance(parent, dict) else parent
    return [value for value in values if isinstance(value, (dict, list))]


def read_json(path: Path, largest: int = LARGEST_CONFIG) -> dict:
    """Reads the object in a JSON file of at most `largest` bytes."""
    if not os.path.isfile(path):  # path.is_file() raises for a name that no file can have
        raise ValueError(f"there is no {path}")
    size = path.stat().st_size
    if size > largest:
        raise ValueError(f"{path} has {size} bytes; the limit for JSON is {largest}")
    try:
        return parse_json(path.read_bytes())
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not a JSON object ({error}){_lfs_hint(path)}") from None


def _lfs_hint(path: Path) -> str:
    """What to do about a file that only points to its content in Git LFS, or nothing."""
    with open(path, "rb") as file:
        is_pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    return "; it is a pointer of Git LFS: fetch its content with git lfs pull" if is_pointer else ""


@contextmanager
def _open_tensors(path: Path) -> Iterator[safe_open]:
    """Opens a safetensors file: checks its header, maps its data. Errors become ValueErrors."""
    if not os.path.isfile(path):
        pickles = sorted(each.name for each in path.parent.glob("*.bin"))
        hint = ""
        if pickles:
            hint = f"; {pickles[0]} is a pickle, which could run code: convert it to safetensors"
        raise ValueError(f"there is no {path}{hint}")
    try:
        with safe_open(path, "pt") as file:
            yield file
    # safetensors raises a TypeError for a size of 2**63 or more.
    except (SafetensorError, RuntimeError, TypeError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is damaged ({reason}){_lfs_hint(path)}") from None


def iterate_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yields each tensor of a safetensors file as a view of the mapped file: copy what must stay.

    Pages read from a mapping count as our memory until it is closed, so the file is mapped again
    after every WINDOW bytes.
    """
    with _open_tensors(path) as file:
        names = list(file.keys())
    while names:
        with _open_tensors(path) as file:
            unread = WINDOW
            while names and unread > 0:
                tensor = file.get_tensor(names[0])
                unread -= tensor.nbytes
                yield names.pop(0), tensor


def read_tensor(path: Path, name: str) -> Tensor:
    """Copies one tensor of a safetensors file to memory."""
    with _open_tensors(path) as file:
        return file.get_tensor(name).clone()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Copies each tensor of a safetensors file to memory; the file may then change or vanish."""
    return {name: tensor.clone() for name, tensor in iterate_tensors(path)}


def read_metadata(path: Path) -> dict[str, str]:
    """Reads the metadata in the header of a safetensors file that was already validated."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def describe(path: Path) -> dict[str, Tensor]:
    """Reads name, shape and dtype of each tensor of a safetensors file, as meta tensors."""
    with _open_tensors(path) as file:
        names = list(file.keys())
        return {name: file.get_tensor(name).to("meta") for name in names}


def describe_model(folder: Path) -> dict[Path, dict[str, Tensor]]:
    """Describes each safetensors file of a model: model.safetensors, or the files of its index."""
    path, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if path.is_file() or not index.is_file():
        return {path: describe(path)}
    places = _read_index(index)
    shards = {folder / place: describe(folder / place) for place in sorted(set(places.values()))}
    for shard, tensors in shards.items():
        for name in tensors:
            if places.get(name) != shard.name:
                raise ValueError(f"{shard}: {index.name} does not place {name} in this file")
    for name, place in places.items():
        if name not in shards[folder / place]:
            raise ValueError(f"{index}: {name} is not in {place}")
    return shards


def _read_index(path: Path) -> dict[str, str]:
    """Reads which file of the folder holds which tensor."""
    places = read_json(path, LARGEST_JSON).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise ValueError(f"{path}: weight_map does not give the file of each tensor")
    for name, place in places.items():
        if place in ("", "..") or "\0" in place or Path(place).name != place:
            raise ValueError(f"{path}: {place!r}, given for {name}, is not a file of this folder")
    return places


def read_model(folder: Path) -> dict[str, Tensor]:
    """Copies each tensor of a model's folder to memory."""
    tensors = {}
    for path in describe_model(folder):
        tensors |= read_tensors(path)
    return tensors


# Checking


def check_like(tensors: dict[str, Tensor], expected: dict[str, Tensor], where: Path) -> None:
    """Compares names, shapes and kinds; any floating-point dtype fits another one.

    Raises: ValueError naming the first tensors that are missing, unknown, or of another shape or
    kind.
    """
    wrong = [f"{name} is missing" for name in expected if name not in tensors]
    wrong += [f"{name} belongs to nothing in the model" for name in tensors if name not in expected]
    for name in expected:
        if name not in tensors:
            continue
        got = _kind(tensors[name])
        wanted = _kind(expected[name])
        if got != wanted:
            wrong.append(f"{name} is {got}, and must be {wanted}")
    if wrong:
        raise ValueError(
            f"{where} does not fit the model, {len(wrong)} tensors in all: {'; '.join(wrong[:3])}"
        )


def _kind(tensor: Tensor) -> str:
    dtype = "floating point" if tensor.dtype in FLOATING else tensor.dtype
    return f"{tuple(tensor.shape)}, {dtype}"


def require_finite(tensors: dict[str, Tensor], where: Path) -> None:
    """Raises a ValueError naming the first tensor that holds NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.dtype in FLOATING and tensor.numel():
            low, high = tensor.aminmax()  # NaN if there is one
            if not (low.isfinite() and high.isfinite()):
                raise ValueError(f"{where}: {name} holds NaN or infinity")


# Writing


def prepare_folder(folder: Path, nbytes: int = 0) -> None:
    """Creates a folder and checks, before any work, that it is writable and has room for nbytes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be written to ({error.strerror}): choose another --output-dir"
        ) from None
    if shutil.disk_usage(folder).free < nbytes:
        needed = f"{nbytes / 1e6:.0f} MB are needed for adapter and state"
        raise ValueError(f"{folder} has too little free space: {needed}")


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file. Raises: OSError; the previous file is then unchanged.

    metadata: at most one entry, because safetensors writes several in random order: the same run
    would leave other bytes. Put JSON into the one entry instead.
    """
    assert len(metadata) <= 1, f"metadata must have one entry, has {', '.join(metadata)}"
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        write_atomically(path, lambda temporary: save_file(contiguous, temporary, metadata))
    except SafetensorError as error:
        raise OSError(
            f"{path} could not be written ({error}); the previous file is unchanged"
        ) from None


def write_text(text: str, path: Path) -> None:
    """Writes a UTF-8 text file. Raises: OSError; the previous file is then unchanged."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary path, synchronizes the file to disk and renames it to path."""
    # In a folder of its own, because `write` may create more files, and the process may be killed.
    folder = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")
    folder.mkdir(exist_ok=True)
    temporary = folder / path.name
    try:
        write(temporary)
        # safetensors allows the owner alone; the new folder has what the umask allows.
        temporary.chmod(folder.stat().st_mode & 0o666)
        _synchronize(temporary)
        os.replace(temporary, path)
        _synchronize(path.parent)
    finally:
        shutil.rmtree(folder)


def _synchronize(path: Path) -> None:
    """Waits until a file, or the list of names in a folder, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_unfinished(folder: Path) -> None:
    """Removes what killed processes left. No other process may be writing to the folder."""
    for path in folder.glob(f".*{UNFINISHED}"):
        shutil.rmtree(path)
