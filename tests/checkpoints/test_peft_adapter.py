"""PEFT reads our adapters and we read PEFT's; one that does not fit leaves the model unchanged."""

import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import checkpoints
from checkpoints import bnb_4bit, io, peft_adapter
from checkpoints.quantization import quantization_of
from helpers import models
from helpers.bounds import cast
from helpers.models import adapted, trained
from lora import QLoRALinear, attach
from nf4 import normal_float

IDS = torch.arange(5, 25)[None]


def base() -> nn.Module:
    return models.tiny_llama(torch.float64, vocab_size=256)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def assert_the_same(ours: torch.Tensor, theirs: torch.Tensor, without: torch.Tensor) -> None:
    """Equal within the rounding of float32, and different from the model without the adapter."""
    bound = cast(theirs.abs(), torch.float32)
    assert ((ours - theirs).abs() <= bound).all()
    assert ((theirs - without).abs() > bound).any()


def on_the_same_base(ours: nn.Module) -> nn.Module:
    """A dense model with the weights that our layers decode to: what PEFT is to adapt."""
    plain = base()
    with torch.no_grad():
        for name, layer in peft_adapter.adapted_layers(ours).items():
            plain.get_submodule(name).weight.copy_(layer.base())
    return plain


def assert_peft_computes_the_same(ours: nn.Module, folder: Path) -> None:
    plain = on_the_same_base(ours)
    without = logits(plain)
    theirs = PeftModel.from_pretrained(plain, folder)
    assert_the_same(logits(ours), logits(theirs), without)
    for name, layer in peft_adapter.adapted_layers(ours).items():
        assert layer.scaling == theirs.base_model.model.get_submodule(name).scaling["default"], name


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora_alpha": 3.5},
        {"use_rslora": True},
        {"r": 1},
        {"targets": "v_proj"},
        {"targets": ["layers.0.self_attn.q_proj"]},
        {"r": 70},  # more than the 64 of the smaller side, which PEFT does not mind
    ],
    ids=str,
)
def test_peft_loads_our_adapter_and_computes_the_same(tmp_path: Path, settings: dict) -> None:
    ours = adapted(**settings)
    checkpoints.save_adapter(ours, tmp_path)
    assert_peft_computes_the_same(ours, tmp_path)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_loads_layers_of_different_ranks_and_scalings(
    tmp_path: Path, use_rslora: bool
) -> None:
    ours = base()
    for targets, r, alpha in (
        (["q_proj", "layers.0.mlp.up_proj"], 4, 8),
        (["v_proj"], 2, 8),
        (["layers.1.mlp.up_proj"], 4, 3),
    ):
        attach(ours, targets, r=r, lora_alpha=alpha, use_rslora=use_rslora)
    trained(ours)
    checkpoints.save_adapter(ours, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(config["rank_pattern"].values()) == [2, 2]
    assert list(config["alpha_pattern"].values()) == [3]
    assert_peft_computes_the_same(ours, tmp_path)
    again = checkpoints.load_adapter(base(), tmp_path)
    assert torch.equal(logits(again), logits(ours))


PEFT_CONFIGS = [
    {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 12},
    {"target_modules": "all-linear", "use_rslora": True, "lora_dropout": 0.25},
    {"target_modules": r".*\.(q|v)_proj"},
    {"target_modules": ["up_proj", "v_proj"], "layers_to_transform": [1]},
    {
        "target_modules": ["q_proj", "up_proj"],
        "exclude_modules": ["layers.0.mlp.up_proj"],
        "init_lora_weights": "gaussian",
    },
    {
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"v_proj": 2, r"layers\.1\..*up_proj": 6},
        "alpha_pattern": {"model.layers.0.self_attn.q_proj": 5, "up_proj|v_proj": 1.5},
    },
    {
        "target_modules": ["q_proj"],
        "rank_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 3},
        "use_rslora": True,
    },
]


@pytest.mark.parametrize("config", PEFT_CONFIGS, ids=lambda config: str(config["target_modules"]))
def test_we_load_the_adapter_of_peft_and_compute_the_same(tmp_path: Path, config: dict) -> None:
    theirs = trained(get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", **{"r": 4} | config)))
    theirs.save_pretrained(tmp_path)
    ours = checkpoints.load_adapter(base(), tmp_path)
    assert_peft_computes_the_same(ours, tmp_path)
    for name, layer in peft_adapter.adapted_layers(ours).items():
        assert layer.lora_dropout == config.get("lora_dropout", 0.0)
        their = theirs.base_model.model.get_submodule(name)
        assert layer.lora_A.shape[0] == layer.r == their.r["default"]


# The base that an adapter was trained on

NF3 = {"codebook": normal_float(3), "block_size": 256}
FP4 = {"codebook": bnb_4bit.CODES["fp4"], "double_quant": False}
OTHER_LEVELS = {"codebook": torch.linspace(-1, 1, 16)}


def small() -> nn.Module:
    return models.tiny_llama(vocab_size=256)


def test_the_base_is_read_from_the_header_also_if_that_has_the_two_entries_of_older_files(
    tmp_path: Path,
) -> None:
    path = tmp_path / "adapter_model.safetensors"
    checkpoints.save_adapter(attach(small(), r=2, **NF3), tmp_path)
    header = io.read_metadata(path)
    assert header.keys() == {"base"}
    older = {"base": json.dumps({"bits": 3, "block_size": 256, "dtype": "float32"})}
    for metadata in (header, {"format": "pt"} | older):
        save_file(load_file(path), path, metadata)
        base = peft_adapter.base_of(tmp_path)
        assert base[:3] == (("nf3", 256, True), torch.float32, {})
        assert base.is_older == (metadata != header)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_header_has_the_first_base_in_4_bits_and_those_that_differ(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = attach(models.tiny_llama(dtype, vocab_size=256), ["0.self_attn.q_proj"], codebook=None)
    attach(model, ["0.self_attn.k_proj"], **FP4)
    attach(model, ["0.self_attn.v_proj"], **NF3)
    checkpoints.save_adapter(model, tmp_path)
    base = peft_adapter.base_of(tmp_path)
    assert base[:2] == (("fp4", 64, False), dtype)
    codes = [base.of_layer(f"model.layers.0.self_attn.{name}_proj").code for name in "qkvo"]
    assert codes == ["none", "fp4", "nf3", "fp4"]
    again = checkpoints.load_adapter(models.tiny_llama(dtype, vocab_size=256), tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("settings", [{"codebook": None}, NF3, FP4], ids=["dense", "nf3", "fp4"])
def test_a_model_without_adapters_gets_the_base_of_the_training_and_no_other_is_accepted(
    settings: dict, tmp_path: Path
) -> None:
    model = trained(attach(small(), r=2, **settings))
    checkpoints.save_adapter(model, tmp_path / "out")
    again = checkpoints.load_adapter(small(), tmp_path / "out")
    assert torch.equal(logits(again), logits(model))

    complaint = r"base that was .*, and model.layers.0.self_attn.q_proj is nf4 in blocks of 64, "
    with pytest.raises(ValueError, match=complaint):
        checkpoints.load_adapter(attach(small(), r=2), tmp_path / "out")
    checkpoints.save_4bit(attach(small(), r=1), tmp_path / "base")
    with pytest.raises(ValueError, match=complaint):
        checkpoints.load_adapter(checkpoints.load_4bit(tmp_path / "base"), tmp_path / "out")


def test_a_codebook_without_a_name_is_compared_and_not_replaced_by_another(tmp_path: Path) -> None:
    model = trained(attach(small(), r=2, **OTHER_LEVELS))
    checkpoints.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="known by name, got 16 levels .*; attach adapters with"):
        checkpoints.load_adapter(small(), tmp_path)
    again = checkpoints.load_adapter(attach(small(), r=2, **OTHER_LEVELS), tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_a_line_says_what_base_an_adapter_gets_that_does_not_say_it(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    get_peft_model(small(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    said = "does not say how its base was quantized: it is made nf4 in blocks of 64, double"
    checkpoints.load_adapter(small(), tmp_path)
    assert said in capsys.readouterr().out
    checkpoints.load_adapter(attach(small(), "q_proj", codebook=None), tmp_path)
    assert said not in capsys.readouterr().out


def test_layers_that_a_folder_in_4_bits_keeps_dense_stay_dense_under_an_adapter(
    tmp_path: Path,
) -> None:
    checkpoints.save_4bit(attach(small(), "q_proj", r=1), tmp_path)
    get_peft_model(small(), LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path)
    for model in (
        checkpoints.load_adapter(checkpoints.load_4bit(tmp_path), tmp_path),
        attach(checkpoints.load_4bit(tmp_path)),
    ):
        layers = peft_adapter.adapted_layers(model)
        codes = {name: quantization_of(layer.base).code for name, layer in layers.items()}
        assert len(codes) == 14
        assert {name for name, code in codes.items() if code == "nf4"} == {
            f"model.layers.{number}.self_attn.q_proj" for number in range(2)
        }
        assert {*codes.values()} == {"nf4", "none"}


def test_an_older_file_does_not_say_which_layers_of_a_base_in_4_bits_are_dense(
    tmp_path: Path,
) -> None:
    checkpoints.save_4bit(attach(small(), "q_proj", r=1), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    checkpoints.save_adapter(attach(checkpoints.load_4bit(tmp_path), r=2), tmp_path)
    older = {"bits": 4, "dtype": "float32", "block_size": 64, "double_quant": True}
    save_file(load_file(path), path, {"base": json.dumps(older)})
    model = checkpoints.load_adapter(checkpoints.load_4bit(tmp_path), tmp_path)
    assert len(peft_adapter.adapted_layers(model)) == 14
    with pytest.raises(ValueError, match="trained on a base that was nf4 in blocks of 64"):
        checkpoints.load_adapter(attach(small(), r=2, **NF3), tmp_path)


def test_an_adapter_goes_onto_adapters_that_are_there_and_takes_its_settings_with_it(
    tmp_path: Path,
) -> None:
    first = adapted(targets=["q_proj", "up_proj"], lora_alpha=12, use_rslora=True)
    checkpoints.save_adapter(first, tmp_path)
    second = adapted(targets=["q_proj", "up_proj"], lora_alpha=8, lora_dropout=0.5)
    checkpoints.load_adapter(second, tmp_path)
    assert torch.equal(logits(second), logits(first))
    assert {layer.lora_dropout for layer in peft_adapter.adapted_layers(second).values()} == {0.0}


def test_loading_into_adapters_does_not_change_what_is_trained(tmp_path: Path) -> None:
    model = adapted()
    model.model.norm.weight.requires_grad_(True)
    model.model.layers[0].mlp.up_proj.lora_A.requires_grad_(False)
    before = {name: each.requires_grad for name, each in model.named_parameters()}
    checkpoints.save_adapter(adapted(), tmp_path)
    checkpoints.load_adapter(model, tmp_path)
    assert {name: each.requires_grad for name, each in model.named_parameters()} == before


def test_a_model_without_adapters_gets_those_of_the_folder(tmp_path: Path) -> None:
    model = attach(base(), ["v_proj", "up_proj"], r=3)
    nn.init.normal_(model.model.layers[0].mlp.up_proj.lora_B)
    checkpoints.save_adapter(model, tmp_path)
    again = checkpoints.load_adapter(base(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert sum(isinstance(layer, QLoRALinear) for layer in again.modules()) == 4
    trainable = {
        name.rpartition(".")[2]
        for name, parameter in again.named_parameters()
        if parameter.requires_grad
    }
    assert trainable == {"lora_A", "lora_B"}


def test_layers_whose_short_names_others_share_are_saved_by_their_full_names(
    tmp_path: Path,
) -> None:
    model = attach(base(), ["layers.0.self_attn.q_proj"], r=3)
    checkpoints.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.0.self_attn.q_proj"]


def test_adapters_that_one_config_cannot_describe_are_not_saved(tmp_path: Path) -> None:
    model = attach(attach(base(), ["q_proj"], use_rslora=True), ["v_proj"])
    with pytest.raises(ValueError, match="differ in lora_dropout, use_rslora or use_dora"):
        checkpoints.save_adapter(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_weight_that_cannot_be_quantized_leaves_the_model_dense(tmp_path: Path) -> None:
    checkpoints.save_adapter(adapted(), tmp_path)
    model = base()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = math.nan
    with pytest.raises(
        ValueError, match=r"layer model.layers.1.mlp.down_proj: 1 of 8192 .*index \(3, 5\)"
    ):
        checkpoints.load_adapter(model, tmp_path)
    assert not any(isinstance(module, QLoRALinear) for module in model.modules())


def rewrite(folder: Path, change: str | dict) -> None:
    """Spoil an adapter folder in one of the ways that happen."""
    weights = folder / "adapter_model.safetensors"
    config = folder / "adapter_config.json"
    tensors = load_file(weights)
    settings = json.loads(config.read_text())
    if change == "no prefix":
        tensors = {
            name.removeprefix(peft_adapter.PREFIX): tensor for name, tensor in tensors.items()
        }
    elif change == "other rank":
        tensors = {
            name: tensor[:2].contiguous() if "lora_A" in name else tensor
            for name, tensor in tensors.items()
        }
    elif change == "one missing":
        del tensors[next(iter(tensors))]
    elif change == "one too many":
        tensors["base_model.model.elsewhere.lora_A.weight"] = torch.zeros(4, 4)
    elif change in ("lm_head.lora_A", "model.embed_tokens"):
        tensors[f"base_model.model.{change}.weight"] = torch.ones(4)
    elif change == "NaN":
        next(iter(tensors.values()))[0, 0] = math.nan
    elif change == "integers":
        tensors = {name: tensor.int() for name, tensor in tensors.items()}
    elif isinstance(change, dict):
        settings |= change
    save_file(tensors, weights)
    config.write_text(json.dumps(settings))
    if change == "pickle":
        weights.rename(folder / "adapter_model.bin")
    if change == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif change == "garbage":
        weights.write_bytes(b"\xff" * 1000)
    elif change == "config garbage":
        config.write_text("{")
    elif change == "config list":
        config.write_text("[]")
    elif change == "gone":
        weights.unlink()
    elif change == "config gone":
        config.unlink()


@pytest.mark.parametrize(
    "change, complaint",
    [
        (
            "no prefix",
            r"adapter_model.safetensors does not fit .*layers.0.\w+.\w+_proj.lora_A.weight "
            "(is missing|belongs to)",
        ),
        ("other rank", r"is \(2, 64\), floating point, and must be \(4, 64\)"),
        ("one missing", "is missing"),
        ("lm_head.lora_A", "lora_A.weight, and lm_head has no adapter in the model: attach"),
        (
            "model.embed_tokens",
            "holds base_model.model.model.embed_tokens.weight, a whole weight, and",
        ),
        ("one too many", "elsewhere.lora_A.weight belongs to nothing in the model"),
        ("NaN", "lora_A.weight holds NaN"),
        ("integers", r"is \(4, 64\), torch.int32, and must be"),
        ("truncated", "is damaged"),
        ("garbage", "is damaged"),
        ("config garbage", "is not a JSON object"),
        ("config list", "is not a JSON object"),
        ("gone", "there is no .*adapter_model.safetensors"),
        ("config gone", "there is no .*adapter_config.json"),
        ("pickle", "adapter_model.bin is a pickle, which could run code"),
        ({"peft_type": "IA3"}, "asks for peft_type IA3"),
        ({"use_bdlora": {"x": 1}}, "asks for use_bdlora"),
        ({"use_what_comes_next": True}, "asks for use_what_comes_next True"),
        ({"bias": "all"}, "asks for bias all"),
        ({"init_lora_weights": "pissa"}, "asks for init_lora_weights pissa"),
        ({"modules_to_save": ["lm_head"]}, r"asks for modules_to_save \['lm_head'\]"),
        ({"r": 3}, "q_proj rank 3, and the model's adapter has 4"),
        ({"r": "4"}, "adapter_config.json: r cannot be 4"),
        ({"r": 10**12}, "r cannot be 1000000000000"),
        ({"rank_pattern": {"q_proj": 2}}, "rank 2, and the model's adapter has 4"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern cannot be"),
        ({"rank_pattern": {"(a+)+$": 2}}, "rank_pattern cannot be"),
        ({"alpha_pattern": {"q_proj": math.nan}}, "alpha_pattern cannot be"),
        ({"alpha_pattern": {"[": 2}}, "alpha_pattern cannot"),
        ({"lora_alpha": math.inf}, "lora_alpha cannot be inf"),
        ({"lora_dropout": 1.0}, "lora_dropout cannot be 1.0"),
        ({"use_rslora": "yes"}, "use_rslora cannot be yes"),
        ({"base_model_name_or_path": 7}, "name_or_path cannot be 7"),
    ],
    ids=str,
)
@pytest.mark.parametrize("has_adapters", [True, False])
def test_an_adapter_that_does_not_fit_is_refused_and_changes_nothing(
    tmp_path: Path, change: str | dict, complaint: str, has_adapters: bool
) -> None:
    checkpoints.save_adapter(adapted(), tmp_path)
    rewrite(tmp_path, change)
    model = adapted(lora_alpha=5) if has_adapters else base()
    before = copy.deepcopy(model.state_dict())
    names = [name for name, _ in model.named_modules()]
    fits_a_model_without = not has_adapters and "has 4" in complaint
    with pytest.raises(ValueError, match=r"is \(4, 64\)" if fits_a_model_without else complaint):
        checkpoints.load_adapter(model, tmp_path)
    after = model.state_dict()
    assert [name for name, _ in model.named_modules()] == names and after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in after)
    assert all(layer.lora_alpha == 5 for layer in peft_adapter.adapted_layers(model).values())


@pytest.mark.parametrize("pattern", ["(a|aa)(a|aa)", ".*.*.*.*x", "a{2}{3}{4}{5}", "a" * 2000, "["])
def test_a_text_that_may_take_forever_to_match_is_no_pattern(pattern: str) -> None:
    assert not peft_adapter.is_pattern(pattern)


# Models inside wrappers


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled_block(model: nn.Module) -> nn.Module:
    model.model.layers[1] = torch.compile(model.model.layers[1])
    return model


def checkpointed_block(model: nn.Module) -> nn.Module:
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    return model


WRAPPERS = {
    "torch.compile": torch.compile,
    "DataParallel": nn.DataParallel,
    "DDP": DistributedDataParallel,
    "AveragedModel": AveragedModel,
    "DDP of torch.compile": lambda model: DistributedDataParallel(torch.compile(model)),
    "a compiled block": compiled_block,
    "a checkpointed block": checkpointed_block,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_model_is_saved_and_loaded_as_the_model_inside(
    group: None, tmp_path: Path, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    model = trained(attach(models.tiny_llama(vocab_size=256), r=4))
    checkpoints.save_adapter(model, tmp_path / "plain")
    checkpoints.save_4bit(model, tmp_path / "plain")
    wrapped = wrap(model)
    checkpoints.save_adapter(wrapped, tmp_path / "wrapped")
    checkpoints.save_4bit(wrapped, tmp_path / "wrapped")
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / "wrapped" / file.name).read_bytes() == file.read_bytes(), file.name
    twin = wrap(attach(models.tiny_llama(vocab_size=256), r=4))
    checkpoints.load_adapter(twin, tmp_path / "plain")
    ours = peft_adapter.adapter_tensors(model)
    loaded = peft_adapter.adapter_tensors(twin)
    assert all(torch.equal(loaded[name], ours[name]) for name in ours) and len(ours) == 28


@pytest.mark.parametrize("wrap", list(WRAPPERS.values())[:2], ids=list(WRAPPERS)[:2])
def test_an_adapter_is_not_added_to_a_model_that_is_wrapped(
    tmp_path: Path, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    checkpoints.save_adapter(adapted(), tmp_path)
    with pytest.raises(ValueError, match="adapters go into the model itself, got a .* around it"):
        checkpoints.load_adapter(wrap(base()), tmp_path)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_what_is_trained_but_not_saved_is_refused_by_name(tmp_path: Path, name: str) -> None:
    model = adapted()
    model.resize_token_embeddings(257, mean_resizing=False)
    model.get_parameter(name).requires_grad_(True)
    message = rf"cannot hold other trained parameters, got {name} \(1 in all\); freeze them"
    with pytest.raises(ValueError, match=message):
        checkpoints.save_adapter(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_without_adapters_cannot_save_any(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the model has no adapters"):
        checkpoints.save_adapter(base(), tmp_path)
