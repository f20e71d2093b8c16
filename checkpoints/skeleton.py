"""Builds a model without weights from its config.json, and fills it with the tensors of its files.

transformers builds the model on the "meta" device, where a tensor has a shape but no memory. Every
parameter is then replaced by the tensor of its name, so there are never two copies of a weight and
never a random one. Buffers that no file holds, such as the frequencies of rotary embeddings, are
computed by transformers.

The config may come from a stranger. No code of its folder is run, and building is limited to what
the tensors of the folder account for: transformers knows several hundred architectures, and in each
some other key of the config can ask for endless work or memory. No list of keys covers that, so the
limits are on what the building does.
"""

from __future__ import annotations  # type hints must not load the classes of transformers

import re
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from checkpoints import io

SPARE_BYTES = 2**26  # for buffers that no file holds
# Some entries count modules that a model lacks: max_window_layers of a small Qwen2, num_experts of
# a Doge without experts.
SPARE_MODULES = 2**15
COUNTS = ("layers", "experts", "blocks", "cycles", "labels")  # in keys that count modules


def build(
    folder: Path, tensors: dict[str, Tensor], dtype: torch.dtype | None = None
) -> transformers.PreTrainedModel:
    """Builds the model of config.json on the meta device, with its computed buffers on the CPU.

    tensors: those of its files; only their number and size matter.
    dtype: of the parameters; None takes that of config.json.
    """
    max_bytes = sum(tensor.nbytes for tensor in tensors.values()) + SPARE_BYTES
    model = from_config(folder, len(tensors), max_bytes, dtype)
    path = folder / "config.json"
    try:
        _compute_buffers(model, max_bytes)
        if (folder / "generation_config.json").is_file():
            path = folder / "generation_config.json"
            model.generation_config = transformers.GenerationConfig.from_dict(io.read_json(path))
    except Exception as error:  # a hostile config can cause any exception in transformers
        raise ValueError(_cannot_build(path, error)) from None
    return model


def from_config(
    folder: Path, n_tensors: int, max_bytes: int, dtype: torch.dtype | None = None
) -> transformers.PreTrainedModel:
    """Builds the model of config.json on the meta device, its computed buffers too.

    n_tensors: how many it may have, about. max_bytes: how much memory building may take.
    """
    path = folder / "config.json"
    _check_counts(io.read_json(path), n_tensors, path)
    max_calls = 10_000 + 100 * n_tensors  # building a tensor takes about 5 calls
    kwargs = {} if dtype is None else {"dtype": dtype}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"), _Limits(max_calls, max_bytes):
            model = transformers.AutoModelForCausalLM.from_config(
                config, trust_remote_code=False, **kwargs
            ).to("meta")  # a few layers ignore the device
        _keep_in_float32(model)
    except Exception as error:  # a hostile config can cause any exception in transformers
        raise ValueError(_cannot_build(path, error)) from None
    return model


def _cannot_build(path: Path, error: Exception) -> str:
    reason = f"{type(error).__name__}: {io.one_line(error)}"
    return f"{path} describes no causal language model that transformers can build ({reason})"


def _keep_in_float32(model: transformers.PreTrainedModel) -> None:
    """Gives float32 to the parameters that transformers loads in float32 in a model of 16 bits."""
    patterns = [pattern.replace("*", ".*") for pattern in model._get_dtype_plan(model.dtype)]
    for name, parameter in model.named_parameters():
        if patterns and re.search("|".join(patterns), name):
            parameter.data = parameter.data.float()


def _compute_buffers(model: transformers.PreTrainedModel, max_bytes: int) -> None:
    """Lets transformers compute the buffers that no file holds, and no random weights."""
    buffers = dict(model.named_non_persistent_buffers())
    nbytes = sum(buffer.nbytes for buffer in buffers.values())
    if nbytes > max_bytes:
        raise ValueError(f"its buffers {', '.join(buffers)[:200]} would take {nbytes} bytes")
    for module in model.modules():
        module._is_hf_initialized = not module._non_persistent_buffers_set
    for name, buffer in buffers.items():
        _set(model, name, torch.empty_like(buffer, device="cpu"))
    model.initialize_weights()


class _Limits(TorchFunctionMode):
    """Stops building after so many calls of torch, or so many allocated bytes."""

    def __init__(self, max_calls: int, max_bytes: int) -> None:
        super().__init__()
        self.calls_left = max_calls
        self.bytes_left = max_bytes

    def __torch_function__(
        self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        result = function(*args, **(kwargs or {}))
        self.calls_left -= 1
        takes_memory = isinstance(result, Tensor) and not result.is_meta
        self.bytes_left -= result.nbytes if takes_memory else 0
        if self.calls_left < 0 or self.bytes_left < 0:
            raise ValueError("it takes far more steps or memory than its tensors account for")
        return result


def _check_counts(entries: dict, n_tensors: int, path: Path) -> None:
    """Refuses more modules than tensors, and code to download.

    _Limits does not replace this: it counts calls of torch, and a config with many labels builds a
    dictionary of them without one.
    """
    for key, value in entries.items():
        if isinstance(value, dict):
            _check_counts(value, n_tensors, path)
        is_count = key == "n_layer" or any(word in key for word in COUNTS)
        if is_count and type(value) is int and value > n_tensors + SPARE_MODULES:
            raise ValueError(f"{path}: {key} is {value}, and there are {n_tensors} tensors in all")
        if "implementation" in key and "/" in str(value):
            raise ValueError(f"{path}: {key} names code to download, {value}: remove it")


def fill(model: transformers.PreTrainedModel, tensors: dict[str, Tensor], where: Path) -> None:
    """Replaces each meta parameter and buffer by the tensor of its name; tied ones share one.

    Raises: ValueError naming the tensors that are missing, unknown, not finite or of another shape.
    """
    _merge_tied(model, tensors, where)
    empty = empty_of(model)
    io.check_like(tensors, empty, where)
    io.require_finite(tensors, where)
    for name, placeholder in empty.items():
        is_parameter = isinstance(placeholder, nn.Parameter)
        tensor = tensors[name]
        _set(model, name, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
    model.tie_weights()


def _merge_tied(
    model: transformers.PreTrainedModel, tensors: dict[str, Tensor], where: Path
) -> None:
    """Keeps one of the tensors of each tied pair, under the name of its source."""
    dense = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for target, source in model.all_tied_weights_keys.items():
        if not {target, source} <= dense:
            raise ValueError(
                f"{where}: {target} or {source} is in 4 bits, and config.json ties them"
            )
        if target in tensors:
            tensor = tensors.pop(target)
            if not _same(tensor, tensors.setdefault(source, tensor)):
                raise ValueError(
                    f"{where}: {target} and {source} differ, and config.json ties them"
                )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def empty_of(model: transformers.PreTrainedModel) -> dict[str, Tensor]:
    """Finds the parameters and buffers that are still on the meta device."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor for name, tensor in tensors if tensor.is_meta}


def _set(model: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, tensor)
