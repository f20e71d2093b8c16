"""What goes to disk and comes back: adapters in PEFT's format, and whole models in bitsandbytes' 4-bit format.

An adapter is the folder that peft_format.py describes. A 4-bit model is the folder that transformers saves when it has
quantized with bitsandbytes: config.json with a quantization_config, and model.safetensors, in which each weight of a linear
layer is what bnb_format.py says.

Loading a 4-bit model starts from a skeleton of it, without numbers (skeleton.py). Each 4-bit weight becomes a QLoRALinear
without an adapter; every other parameter is the tensor of its name.

Differs from PEFT: there a missing prefix loads nothing and says nothing; here every layer's adapter must be in the file with
the right shape, and every tensor in the file must find its layer. Differs from transformers: likewise; nothing is filled in
with random numbers, no number is cast, and what is saved again has the bytes that were loaded.
"""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from checkpoints import bnb_4bit as bnb_format
from checkpoints import io as files
from checkpoints import skeleton
from checkpoints.peft_adapter import (
    describe_base,
    layers_of,
    of_layer,
    read_config,
    tensor_names,
    write_config,
)
from checkpoints.skeleton import check_like
from lora import QLoRALinear, adapt, names_of, unadapted
from variants.dora import DoRALinear

QUANTIZATION = {
    "_load_in_4bit": True,
    "_load_in_8bit": False,
    "bnb_4bit_quant_storage": "uint8",
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_skip_modules": None,
    "llm_int8_threshold": 6.0,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "quant_method": "bitsandbytes",
}  # what transformers writes, but for what depends on the layers


def adapted_layers(model: nn.Module) -> dict[str, QLoRALinear]:
    """Every layer with an adapter, by its name."""
    return {names[0]: layer for layer, names in names_of(model, QLoRALinear).items() if layer.r}


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """PEFT's name -> parameter, for every adapter in the model."""
    return {
        key: layer.get_parameter(ours)
        for name, layer in adapted_layers(model).items()
        for ours, key in tensor_names(name, isinstance(layer, DoRALinear)).items()
    }


def save_adapter(
    model: nn.Module, folder: str | Path, tensors: dict[str, Tensor] | None = None
) -> None:
    """Write the adapters of a model into a folder, as PEFT would. Raises: ValueError if the model has none.

    tensors: what `adapter_tensors` gives, made whole, where the model's own are sharded.
    """
    folder, layers = Path(folder), adapted_layers(model)
    if not layers:
        raise ValueError("the model has no adapters: lora.attach puts them there")
    common = {
        (layer.lora_dropout, layer.use_rslora, isinstance(layer, DoRALinear))
        for layer in layers.values()
    }
    if len(common) > 1:
        raise ValueError(
            "the adapters differ in lora_dropout, use_rslora or use_dora: PEFT's format has one value for all"
        )
    [same] = common
    rest = {
        **dict(zip(("lora_dropout", "use_rslora", "use_dora"), same)),
        "target_modules": _target_modules(model),
        "base_model_name_or_path": getattr(model, "name_or_path", None),
    }
    folder.mkdir(parents=True, exist_ok=True)
    header = {"format": "pt", "base": describe_base(next(iter(layers.values())).base)}
    files.write_tensors(
        tensors or adapter_tensors(model), folder / "adapter_model.safetensors", header
    )
    write_config(
        {name: (layer.r, layer.lora_alpha) for name, layer in layers.items()}, rest, folder
    )


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put the adapter of a folder, ours or PEFT's, on a model in place; one without adapters gets them first (NF4 base).

    Raises: ValueError for missing or damaged files, a kind of adapter that is not covered, and names, ranks or shapes that do
    not fit, the first of them named. The model is then as it was.
    """
    config, path = read_config(Path(folder)), Path(folder) / "adapter_model.safetensors"
    tensors, layers = files.read_tensors(path), adapted_layers(model)
    new = [] if layers else [names for names in unadapted(model) if names[0] in layers_of(tensors)]
    layers |= {names[0]: model.get_submodule(names[0]) for names in new}
    expected = {}
    for name, layer in layers.items():
        r, _ = of_layer(config, name)
        if not new and layer.r != r:
            raise ValueError(
                f"{folder}/adapter_config.json gives {name} rank {r}, and the model's adapter has {layer.r}"
            )
        if not new and isinstance(layer, DoRALinear) != config["use_dora"]:
            raise ValueError(
                f"{folder}/adapter_config.json has use_dora {config['use_dora']}, and the model's adapter has not"
            )
        shapes = (r, layer.in_features), (layer.out_features, r), (layer.out_features,)
        names = tensor_names(name, config["use_dora"]).values()
        expected |= {key: torch.empty(shape, device="meta") for key, shape in zip(names, shapes)}
    check_like(tensors, expected, path)
    if not expected:
        raise ValueError(f"{path} has no adapter for any layer of the model")
    files.refuse_nan(
        {name: tensor.float() for name, tensor in tensors.items()}, path
    )  # also what float64 can hold alone
    same = {key: config[key] for key in ("lora_dropout", "use_rslora")}
    layer_type = DoRALinear if config["use_dora"] else QLoRALinear
    settings = {
        name: dict(zip(("r", "lora_alpha"), of_layer(config, name))) | same for name in layers
    }
    adapt(model, [(names, settings[names[0]]) for names in new], layer_type)
    for name, layer in adapted_layers(model).items():
        layer.lora_alpha, layer.use_rslora = (
            settings[name]["lora_alpha"],
            settings[name]["use_rslora"],
        )
    copy_tensors(tensors, adapter_tensors(model))
    return model


@torch.no_grad()
def copy_tensors(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])


def _target_modules(model: nn.Module) -> list[str]:
    """The last parts of the adapted layers' names where they single these layers out, else their whole names."""
    adapted = set(adapted_layers(model))
    suffixes = {name.rpartition(".")[2] for name in adapted}
    others = {
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, QLoRALinear))
    } - adapted
    return sorted(adapted if suffixes & {name.rpartition(".")[2] for name in others} else suffixes)


def save_4bit(model: PreTrainedModel, folder: str | Path) -> None:
    """Write the frozen base of a model as transformers would after quantizing it with bitsandbytes. Adapters go elsewhere.

    Raises: ValueError if it has no layer in 4 bits, or one that the format cannot hold (a dense base, another code).
    """
    folder, layers = Path(folder), names_of(model, QLoRALinear)
    if not layers or not isinstance(model, PreTrainedModel):
        raise ValueError(
            "save_4bit needs a model of transformers with layers in 4 bits: lora.attach makes them"
        )
    ours = {
        f"{name}.{key}"
        for layer, names in layers.items()
        for name in names
        for key in layer.state_dict()
        if key != "bias"
    }
    tied = model.all_tied_weights_keys
    tensors = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name not in ours and name not in tied
    }
    config = _config_of(model, next(iter(layers)))
    storage = bnb_format.STORAGES[config.quantization_config["bnb_4bit_quant_storage"]]
    for layer, (name, *_) in layers.items():
        tensors |= bnb_format.pack(layer.base, f"{name}.weight", storage)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_tensors(tensors, folder / "model.safetensors", {"format": "pt"})
    if model.can_generate():
        files.write_text(
            model.generation_config.to_json_string(), folder / "generation_config.json"
        )
    files.write_text(config.to_json_string(), folder / "config.json")


def _config_of(model: PreTrainedModel, layer: QLoRALinear) -> PretrainedConfig:
    """A copy of the model's config that says how it is quantized; what a folder said stands, where it is still true."""
    config = copy.deepcopy(model.config)
    dtype = model.get_input_embeddings().weight.dtype
    config.architectures, config.dtype = [type(model).__name__], dtype
    said = QUANTIZATION | (getattr(config, "quantization_config", None) or {})
    head = [
        name for name, module in model.named_modules() if module is model.get_output_embeddings()
    ]
    dense = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    said = said | {
        "bnb_4bit_quant_type": bnb_format.quant_type(layer.base.codebook),
        "bnb_4bit_use_double_quant": layer.base.double_quant,
        "bnb_4bit_compute_dtype": str(layer.compute_dtype or dtype).removeprefix("torch."),
    }
    if dense != head and not set(dense) <= set(said["llm_int8_skip_modules"] or []):
        said["llm_int8_skip_modules"] = [*dense, *head]
    config.quantization_config = said
    return config


def load_4bit(folder: str | Path) -> PreTrainedModel:
    """The model in a folder that save_4bit, or transformers with bitsandbytes, has saved; frozen, in evaluation mode.

    Each layer in 4 bits is a QLoRALinear without an adapter; lora.attach or load_adapter gives it one.
    Raises: ValueError naming the file and the key if anything is missing, left over, or not what it must be.
    """
    folder = Path(folder)
    said = files.read_json(folder / "config.json").get("quantization_config")
    if (
        not isinstance(said, dict)
        or said.get("quant_method") != "bitsandbytes"
        or not said.get("load_in_4bit")
    ):
        raise ValueError(
            f"{folder}/config.json: quantization_config is not that of 4 bits by bitsandbytes, but "
            f"{str(said)[:200]}; a dense model is loaded with transformers, and given 4 bits by lora.attach"
        )
    said = (
        QUANTIZATION | {"bnb_4bit_compute_dtype": "float32"} | said
    )  # what transformers takes where a file is silent
    for key, known in (
        ("bnb_4bit_compute_dtype", bnb_format.DTYPES),
        ("bnb_4bit_quant_storage", bnb_format.STORAGES),
    ):
        if said[key] not in [*known]:
            raise ValueError(
                f"{folder}/config.json: {key} must be one of {', '.join(known)}; got {said[key]}"
            )
    tensors = files.read_model(folder)
    model = skeleton.build(folder, tensors)
    modules, compute_dtype = (
        dict(model.named_modules()),
        bnb_format.DTYPES[said["bnb_4bit_compute_dtype"]],
    )
    try:
        for weight in bnb_format.packed_names(tensors):
            name = weight.removesuffix(".weight")
            if type(modules.get(name)) is not nn.Linear or name == weight:
                raise ValueError(
                    f"{weight} is in 4 bits, and {name} is no linear layer of the model"
                )
            base = bnb_format.unpack(tensors, weight, modules[name].weight.shape)
            model.set_submodule(
                name, QLoRALinear(base, modules[name].bias, compute_dtype=compute_dtype)
            )
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    skeleton.fill(model, tensors, folder)
    return model.requires_grad_(False).eval()
