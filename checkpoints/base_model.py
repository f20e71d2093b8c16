"""A model's files, read tensor by tensor and put in 4 bits as they come: the dense model never exists.

config.json gives a skeleton of the model (skeleton.py), and the headers of the files the names and shapes of its tensors; so
what does not fit is refused before a number is read. Then each tensor is looked at once, where it lies in the mapped file. The
weight of a linear layer becomes a QLoRALinear in its place; anything else is copied, in the dtype the model wants it in.
So loading never takes more memory than

    the model as it will be, 4.127 bits a weight and the rest in 16  +  its largest tensor  +  files.WINDOW

and leaves the bits that transformers' from_pretrained and lora.attach would have left. A folder that is in 4 bits already is
taken as it is (checkpoint.load_4bit).

Only nn.Linear is put in 4 bits. Where an architecture keeps matrices in something else, GPT-2 in Conv1D, mixtures of experts in
one tensor for all experts, most of it would silently stay dense: it is refused instead.
"""

import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from checkpoints import checkpoint, skeleton
from checkpoints import io as files
from lora import QLoRALinear, attach, naming, unadapted
from variants.init import maker as layer_maker


def load(
    folder: Path,
    dtype: torch.dtype,
    device: str,
    make: Callable[[Tensor, Tensor | None], QLoRALinear],
) -> PreTrainedModel:
    """The model in a folder, dense or in 4 bits, on `device`, in evaluation mode; its parameters are in `dtype`.

    make: a linear layer's weight (out, in), in `dtype` on `device`, and its bias (not there yet) -> the layer in its place;
    a layer in 4 bits keeps its base.
    Raises: ValueError naming the file, tensor or layer if anything is missing, left over, damaged, or not covered.
    """
    if files.read_json(folder / "config.json").get("quantization_config") is not None:
        return _in_dtype(checkpoint.load_4bit(folder), dtype, device)
    shards = files.describe_model(folder)
    described = {name: tensor for its in shards.values() for name, tensor in its.items()}
    model = skeleton.build(folder, described, dtype)
    refuse_uncovered(model, folder)
    tied, empty, ignored = model.all_tied_weights_keys, skeleton.empty_of(model), _ignored(model)
    skeleton.check_like(
        {tied.get(name, name): like for name, like in described.items() if not ignored(name)},
        empty,
        folder,
    )
    linears = {f"{names[0]}.weight": names for names in unadapted(model)}
    dense = {}
    for name, tensor in (
        (name, tensor)
        for path in shards
        for name, tensor in files.each_tensor(path)
        if not ignored(name)
    ):
        wanted = empty[tied.get(name, name)].dtype
        if name in linears:
            with naming(linears[name][0]):
                layer = make(tensor.to(device, wanted), model.get_submodule(linears[name][0]).bias)
            for each in linears[name]:
                model.set_submodule(each, layer)
        else:
            dense[name] = tensor.to(
                device, wanted if tensor.is_floating_point() else tensor.dtype, copy=True
            )
    skeleton.fill(model, dense, folder)
    return model.to(device).eval()


def _in_dtype(model: PreTrainedModel, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """What is not in 4 bits is cast, but for buffers, as it would be in a dense folder; and layers compute in what they get."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, dtype)
    for layer in model.modules():
        if isinstance(layer, QLoRALinear):
            layer.compute_dtype = None
    return model.to(device)


def _ignored(model: PreTrainedModel) -> Callable[[str], bool]:
    """Whether transformers passes a tensor of this name over: what an older version of it saved and no one needs."""
    patterns = [*(model._keys_to_ignore_on_load_unexpected or []), r"rotary_emb\.inv_freq$"]
    return lambda name: any(re.search(pattern, name) for pattern in patterns)


def refuse_uncovered(model: PreTrainedModel, where: Path) -> None:
    """Raise a ValueError naming the first matrix that is in no nn.Linear, embedding or output head."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if type(module) is nn.Linear or isinstance(module, nn.Embedding) or module is head:
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                raise ValueError(
                    f"{where}: {name}.{key} {tuple(parameter.shape)} is the matrix of a {type(module).__name__}, "
                    f"and only nn.Linear can be put in 4 bits: {type(model).__name__} is not covered"
                )


def load_with_adapters(
    folder: Path,
    dtype: torch.dtype,
    device: str,
    start: str,
    seed: int,
    adapter: dict,
    quantization: dict,
) -> PreTrainedModel:
    """The model in a folder, loaded layer by layer, frozen and quantized, with adapters that start as `start` says.

    Raises: ValueError as load and lora.attach do, and for a start that needs the dense weights of a 4-bit folder.
    """
    began = time.perf_counter()
    model = load(folder, dtype, device, layer_maker(start, adapter, quantization))
    print(f"base loaded layer by layer, {time.perf_counter() - began:.1f} s")
    torch.manual_seed(seed)
    if start == "default":
        attach(model, **adapter)
    elif unadapted(model):
        raise ValueError(
            f"{start} starts from dense weights, and {folder} is in 4 bits already: take the default start"
        )
    return model
