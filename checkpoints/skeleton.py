"""A model without its numbers, as config.json describes it, and then with them: never two copies, never random ones.

transformers builds the model on the "meta" device, where a tensor has a shape and no memory. Then every parameter becomes the
tensor of its name. The few buffers that no file holds, such as the frequencies of rotary embeddings, transformers computes.

The config may come from a stranger. No code of its folder is run, and nothing is built or allocated beyond what the tensors
of the folder account for.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from checkpoints import io as files


def build(
    folder: Path, tensors: dict[str, Tensor], dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The model that config.json describes, on the meta device but for the buffers that no file holds.

    tensors: those of its files, of which only number and size count. dtype: of its parameters, unless that of config.json.
    """
    path = folder / "config.json"
    _refuse_endless(files.read_json(path), len(tensors), path)
    most = sum(tensor.nbytes for tensor in tensors.values()) + 2**26
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with (
            torch.device("meta"),
            _Bounded(10_000 + 100 * len(tensors), most),
        ):  # a tensor needs about 5 calls
            model = AutoModelForCausalLM.from_config(
                config, trust_remote_code=False, **{"dtype": dtype} if dtype else {}
            )
        computed = dict(model.named_non_persistent_buffers())
        nbytes = sum(buffer.nbytes for buffer in computed.values())
        if nbytes > most:
            raise ValueError(f"its buffers {', '.join(computed)[:200]} would take {nbytes} bytes")
        for (
            module
        ) in model.modules():  # what transformers is to compute: buffers, and no random weights
            module._is_hf_initialized = not module._non_persistent_buffers_set
        for name, buffer in computed.items():
            _set(model, name, torch.empty_like(buffer, device="cpu"))
        model.initialize_weights()
        if (folder / "generation_config.json").is_file():
            path = folder / "generation_config.json"
            model.generation_config = GenerationConfig.from_dict(files.read_json(path))
    except Exception as error:  # whatever a stranger's config brings about in transformers
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(
            f"{path} describes no causal language model that transformers can build ({reason})"
        ) from None
    return model


class _Bounded(TorchFunctionMode):
    """Stops what would call torch without end or fill the memory, whichever key of config.json is the cause."""

    def __init__(self, calls: int, nbytes: int) -> None:
        super().__init__()
        self.calls, self.nbytes = calls, nbytes

    def __torch_function__(
        self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        result = function(*args, **(kwargs or {}))
        self.calls -= 1
        self.nbytes -= result.nbytes if isinstance(result, Tensor) and not result.is_meta else 0
        if self.calls < 0 or self.nbytes < 0:
            raise ValueError("it takes far more steps or memory than its tensors account for")
        return result


def _refuse_endless(entries: dict, n_tensors: int, path: Path) -> None:
    """Refuse what would make transformers build modules without end, or fetch code."""
    for key, value in entries.items():
        if isinstance(value, dict):
            _refuse_endless(value, n_tensors, path)
        many = key == "n_layer" or any(
            word in key for word in ("layers", "experts", "blocks", "cycles", "labels")
        )
        if type(value) is int and many and value > n_tensors:
            raise ValueError(f"{path}: {key} is {value}, and there are {n_tensors} tensors in all")
        if "implementation" in key and "/" in str(value):
            raise ValueError(f"{path}: {key} names code to be fetched, {value}, which is not done")


def fill(model: PreTrainedModel, tensors: dict[str, Tensor], where: Path) -> None:
    """Give every parameter and buffer on the meta device the tensor of its name; tied parameters are one."""
    dense = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for target, source in model.all_tied_weights_keys.items():
        if not {target, source} <= dense:
            raise ValueError(
                f"{where}: {target} or {source} is in 4 bits, and config.json ties them"
            )
        if target in tensors and not _equal(
            tensors[target], tensors.setdefault(source, tensors[target])
        ):
            raise ValueError(f"{where}: {target} and {source} differ, and config.json ties them")
        tensors.pop(target, None)
    empty = empty_of(model)
    check_like(tensors, empty, where)
    files.refuse_nan(tensors, where)
    for name, tensor in empty.items():
        _set(
            model,
            name,
            nn.Parameter(tensors[name], False)
            if isinstance(tensor, nn.Parameter)
            else tensors[name],
        )
    model.tie_weights()


def empty_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """The parameters and buffers that have no numbers yet."""
    return {
        name: tensor
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if tensor.is_meta
    }


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _set(model: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, tensor)


def check_like(tensors: dict[str, Tensor], expected: dict[str, Tensor], where: Path) -> None:
    """Raise a ValueError naming what is missing, unknown, of another shape, or not floating point where it should be."""
    wrong = [f"{name} is missing" for name in expected if name not in tensors]
    wrong += [f"{name} belongs to nothing in the model" for name in tensors if name not in expected]
    wrong += [
        f"{name} is {_kind(tensors[name])}, and must be {_kind(like)}"
        for name, like in expected.items()
        if name in tensors and _kind(tensors[name]) != _kind(like)
    ]
    if wrong:
        raise ValueError(
            f"{where} does not fit the model, {len(wrong)} tensors in all: {'; '.join(wrong[:3])}"
        )


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}, {'floating point' if tensor.dtype in files.WITH_NAN else tensor.dtype}"
