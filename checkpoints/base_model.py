"""Loads the frozen base model from a folder, dense or in 4 bits, and saves it in 4 bits.

A dense model is read tensor by tensor and quantized as it is read, so it never exists as a whole.
config.json gives a skeleton of the model (skeleton.py), and the headers of the files give the names
and shapes of its tensors; whatever does not fit is an error before any weight is read. Then each
tensor is visited once, in the mapped file. The weight of a linear layer becomes a QLoRALinear in
its place. Any other tensor is copied, in the dtype that the model needs. Loading never takes more
memory than

    the final model, 4.127 bits a weight and the rest in 16  +  its largest tensor  +  io.WINDOW

and produces the same bits as from_pretrained of transformers followed by lora.attach.

A 4-bit model is the folder that transformers saves after quantizing with bitsandbytes: config.json
with a quantization_config, and model.safetensors, which holds each 4-bit weight as bnb_4bit.py
describes. Each becomes a QLoRALinear without an adapter.

Only nn.Linear is quantized. Some architectures keep most matrices elsewhere: GPT-2 in Conv1D,
mixtures of experts in one tensor for all experts. They would stay dense without a warning, so they
are an error.

Differs from transformers: nothing missing is replaced by random numbers, load_4bit casts nothing,
and a model that is saved again has the bytes that were loaded.
"""

from __future__ import annotations  # type hints must not load the classes of transformers

import copy
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from checkpoints import bnb_4bit, headers, io, skeleton
from checkpoints.peft_adapter import plain_name
from lora import FrozenWeight, QLoRALinear, attach, names_of, naming, unadapted, unwrap
from variants.init import maker as layer_maker

PROBE = 5  # tokens
MakeLayer = Callable[[Tensor, Tensor | None], QLoRALinear]


def load_with_adapters(
    folder: Path,
    dtype: torch.dtype,
    device: str,
    start: str,
    seed: int,
    adapter: dict,
    quantization: dict,
) -> transformers.PreTrainedModel:
    """Loads and quantizes a model layer by layer and adds adapters, initialized as `start` says.

    Raises: ValueError as load_quantized and lora.attach do, and if `start` needs the dense weights
    of a model that is already in 4 bits.
    """
    began = time.perf_counter()
    model = load_quantized(folder, dtype, device, layer_maker(start, adapter, quantization))
    print(f"base loaded layer by layer, {time.perf_counter() - began:.1f} s")
    torch.manual_seed(seed)
    if start == "default":
        attach(model, **adapter)
    elif unadapted(model):
        raise ValueError(
            f"{start} starts from dense weights, and {folder} is in 4 bits already: "
            "take the default start"
        )
    return model


# Dense folders


def load_quantized(
    folder: Path, dtype: torch.dtype, device: str, make: MakeLayer
) -> transformers.PreTrainedModel:
    """Loads the model of a folder, dense or in 4 bits, to a device, in evaluation mode.

    dtype: of its parameters. make: maps the weight (out, in) of a linear layer, in `dtype` on
    `device`, and its bias, on the meta device or None, to the layer that replaces it. A folder in 4
    bits is not quantized again: its 4-bit layers keep their base, its dense layers stay dense.
    Raises: ValueError naming the file, tensor or layer that is missing, unknown, damaged or not
    supported.
    """
    model, shards, quantization = headers.read(folder, dtype)
    if quantization is None:
        model = _fill_and_quantize(model, shards, folder, device, make)
    else:
        model = _cast(load_4bit(folder), dtype, device)
    require_causal(model, folder)
    return model


def _fill_and_quantize(
    model: transformers.PreTrainedModel,
    shards: dict[Path, dict[str, str]],
    folder: Path,
    device: str,
    make: MakeLayer,
) -> transformers.PreTrainedModel:
    """Reads the tensors of a dense folder into a model without weights, quantizing as it reads."""
    empty = skeleton.empty_of(model)
    tied = model.all_tied_weights_keys
    linears = {f"{names[0]}.weight": names for names in unadapted(model)}
    dense = {}
    for path, names in shards.items():
        for key, tensor in io.iterate_tensors(path):
            if key not in names:
                continue
            name = names[key]
            parameter = empty[tied.get(name, name)]
            wanted = parameter.dtype if tensor.is_floating_point() else tensor.dtype
            if name in linears:
                _replace_linear(model, linears[name], tensor.to(device, wanted), make)
            else:
                dense[name] = tensor.to(device, wanted, copy=True)
    skeleton.fill(model, dense, folder)
    return model.to(device).eval()


def _replace_linear(
    model: transformers.PreTrainedModel, names: list[str], weight: Tensor, make: MakeLayer
) -> None:
    """Puts a quantized layer in the place of a linear layer, under all its names."""
    with naming(names[0]):
        layer = make(weight, model.get_submodule(names[0]).bias)
    for name in names:
        model.set_submodule(name, layer)


@torch.no_grad()
def require_causal(model: transformers.PreTrainedModel, where: object) -> None:
    """Raises a ValueError if the last token of a sequence changes a logit before it.

    Both passes have the same shapes, so a logit that depends on the same tokens has the same bits.
    """
    rows = model.get_input_embeddings().num_embeddings
    words = torch.arange(PROBE + 1, device=model.device) + rows // 2  # no special tokens
    ids = words[None, :-1] % rows  # (1, PROBE)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    try:
        logits = model(**inputs).logits[:, :-1]
    except (AttributeError, TypeError) as error:  # it reads the weight of a layer itself
        name = type(model).__name__
        raise ValueError(f"{where}: {name} does not run on 4-bit layers ({error})") from None
    ids[:, -1] = words[-1] % rows
    if not torch.equal(logits, model(**inputs).logits[:, :-1]):
        raise ValueError(headers.not_causal(model, where, "its last token changes earlier logits"))


def _cast(
    model: transformers.PreTrainedModel, dtype: torch.dtype, device: str
) -> transformers.PreTrainedModel:
    """Casts the parameters of a 4-bit model; its layers then compute in the dtype of their input.

    Dense weights inside the layers are cast, too; other buffers keep their dtype, as in a dense
    model.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, dtype)
    for layer in model.modules():
        if isinstance(layer, QLoRALinear):
            layer.compute_dtype = None
            layer.base.to(dtype)  # 4-bit weights keep their dtypes
    return model.to(device)


# Folders in 4 bits


def load_4bit(folder: str | Path) -> transformers.PreTrainedModel:
    """Loads a model that save_4bit, or transformers with bitsandbytes, saved.

    The model is frozen and in evaluation mode. Each linear layer is a QLoRALinear without an
    adapter, in 4 bits, or dense if bitsandbytes skipped it; lora.attach or load_adapter adds one.
    Raises: ValueError naming the file and the key of anything missing, unknown or invalid.
    """
    folder = Path(folder)
    quantization = headers.read_quantization(folder)
    compute_dtype = bnb_4bit.DTYPES[quantization["bnb_4bit_compute_dtype"]]
    tensors = io.read_model(folder)
    model = skeleton.build(folder, tensors)
    names = headers.names_in_model(model, tensors, folder)
    tensors = {name: tensors[key] for key, name in names.items()}
    modules = dict(model.named_modules())
    try:
        for weight_name in bnb_4bit.packed_names(tensors):
            name = weight_name.removesuffix(".weight")
            linear = modules.get(name)
            if type(linear) is not nn.Linear or name == weight_name:
                raise ValueError(
                    f"{weight_name} is in 4 bits, and {name} is not a linear layer of the model"
                )
            base = bnb_4bit.unpack(tensors, weight_name, linear.weight.shape)
            layer = QLoRALinear(base, linear.bias, compute_dtype=compute_dtype)
            model.set_submodule(name, layer)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    skeleton.fill(model, tensors, folder)
    return _keep_dense_layers(model.requires_grad_(False).eval())


def _keep_dense_layers(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Wraps the dense linear layers of a 4-bit model, so an adapter does not quantize them."""
    for names in unadapted(model):
        linear = model.get_submodule(names[0])
        if isinstance(linear, nn.Linear):
            layer = QLoRALinear(FrozenWeight(linear.weight, codebook=None), linear.bias)
            for name in names:
                model.set_submodule(name, layer.eval())
    return model


def save_4bit(model: transformers.PreTrainedModel, folder: str | Path) -> None:
    """Writes the frozen base of a model as transformers with bitsandbytes does, without adapters.

    Raises: ValueError if no layer is in 4 bits, or the format cannot hold one (its code or its
    block size).
    """
    folder = Path(folder)
    model = unwrap(model)
    layers = names_of(model, QLoRALinear)
    if not layers or not isinstance(model, transformers.PreTrainedModel):
        raise ValueError(
            "save_4bit needs a model of transformers with layers in 4 bits: lora.attach makes them"
        )
    packed = {layer: names for layer, names in layers.items() if not _is_dense(layer)} or layers
    config = _config_of(model, next(iter(packed)))
    tensors = _dense_tensors(model, layers)
    storage = bnb_4bit.STORAGES[config.quantization_config["bnb_4bit_quant_storage"]]
    for layer, names in packed.items():
        tensors |= bnb_4bit.pack(layer.base, f"{plain_name(names[0])}.weight", storage)
    folder.mkdir(parents=True, exist_ok=True)
    io.write_tensors(tensors, folder / "model.safetensors", {"format": "pt"})
    _write_generation_config(model, folder)
    io.write_text(config.to_json_string(), folder / "config.json")


def save_dense(model: transformers.PreTrainedModel, folder: Path) -> None:
    """Writes a dense model as transformers does, with the generation config of its base.

    transformers reads a folder whose settings of generation are invalid, or are in config.json, and
    refuses to write one.
    """
    generation = model.generation_config
    for key in model.config._get_generation_parameters():
        delattr(model.config, key)
    model.generation_config = transformers.GenerationConfig()
    model.save_pretrained(folder)
    model.generation_config = generation
    _write_generation_config(model, folder)


def _write_generation_config(model: transformers.PreTrainedModel, folder: Path) -> None:
    if model.can_generate():
        generation = model.generation_config.to_json_string()
        io.write_text(generation, folder / "generation_config.json")


def _dense_tensors(
    model: transformers.PreTrainedModel, layers: dict[QLoRALinear, list[str]]
) -> dict[str, Tensor]:
    """Finds the tensors that are saved as they are: no 4-bit weights, adapters or tied copies."""
    elsewhere = _tied_names(model)
    for layer, names in layers.items():
        keys = [key for key in layer.state_dict() if key != "bias"]
        elsewhere |= {f"{plain_name(name)}.{key}" for name in names for key in keys}
    tensors = {plain_name(name): tensor for name, tensor in model.state_dict().items()}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in elsewhere}
    dense = {names[0]: layer.base.weight for layer, names in layers.items() if _is_dense(layer)}
    return tensors | {f"{plain_name(name)}.weight": weight for name, weight in dense.items()}


def _tied_names(model: transformers.PreTrainedModel) -> set[str]:
    """Names the parameters that are saved as the parameter that they are tied to.

    Raises: ValueError if two differ, for example after training one, and the config ties them.
    """
    tied = set()
    for target, source in model.all_tied_weights_keys.items():
        if model.get_parameter(target) is model.get_parameter(source):
            tied.add(target)
        elif getattr(model.config.get_text_config(), "tie_word_embeddings", True):
            raise ValueError(
                f"{target} and {source} are no longer one parameter, and the config ties them; "
                "set config.tie_word_embeddings = False to save both"
            )
    return tied


def _is_dense(module: nn.Module) -> bool:
    """Whether a module is a linear layer with a dense weight, with or without an adapter."""
    if isinstance(module, QLoRALinear):
        return module.base.codebook is None
    return type(module) is nn.Linear


def _config_of(
    model: transformers.PreTrainedModel, layer: QLoRALinear
) -> transformers.PretrainedConfig:
    """Copies the model's config and adds how `layer`, like all its 4-bit layers, is quantized.

    Entries of a quantization_config that is already there stay, unless they have become wrong.
    """
    config = copy.deepcopy(model.config)
    dtype = model.get_input_embeddings().weight.dtype
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    compute_dtype = layer.compute_dtype or dtype
    quantization = bnb_4bit.CONFIG | (getattr(config, "quantization_config", None) or {})
    quantization |= {
        "bnb_4bit_quant_type": bnb_4bit.quant_type(layer.base.codebook),
        "bnb_4bit_use_double_quant": layer.base.double_quant,
        "bnb_4bit_compute_dtype": str(compute_dtype).removeprefix("torch."),
    }
    output = model.get_output_embeddings()
    head = [name for name, module in model.named_modules() if module is output]
    dense = [name for name, module in model.named_modules() if _is_dense(module)]
    skipped = quantization["llm_int8_skip_modules"] or []
    if dense != head and not set(dense) <= set(skipped):
        quantization["llm_int8_skip_modules"] = [*dense, *head]
    config.quantization_config = quantization
    return config
