"""A merged model equals PEFT's, transformers loads it, and the audit of a 4-bit merge is right."""

import json
import re
from pathlib import Path

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora
import train
from checkpoints import base_model, bnb_4bit, peft_adapter
from checkpoints.quantization import Quantization
from data.dataset import encode_prompt
from helpers import models
from helpers.bounds import HALF_A_PERCENT, cosine
from lora import MergeAudit
from nf4 import NF4
from training import use_adapter
from training.options import Options

DTYPE = torch.bfloat16
OTHER_LEVELS = torch.linspace(-1, 1, 16)


def options(adapter: Path, **flags: object) -> Options:
    return Options(adapter=adapter, device="cpu", **flags)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder with an adapter whose update is not zero, for a tiny model in tmp_path / model."""
    folder = models.save_tiny_llama(tmp_path / "model")
    model = lora.attach(AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE), r=4)
    for layer in peft_adapter.adapted_layers(model).values():
        # An update that is small compared with the gaps between levels.
        torch.nn.init.normal_(layer.lora_B, std=0.001)
    peft_adapter.save_adapter(model, tmp_path / "out")
    return tmp_path / "out"


def test_a_merge_is_what_peft_merges_into_the_decoded_base_and_transformers_loads_it(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert train.main(["--adapter", str(out), "--merge", str(tmp_path / "merged")]) == 0
    said = capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    ours, _ = use_adapter.load_adapted_model(options(out))
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for name, layer in peft_adapter.adapted_layers(ours).items():
        dense.get_submodule(name).weight.data = layer.base(torch.float32)
    theirs = PeftModel.from_pretrained(dense, out).merge_and_unload()
    for (name, one), other in zip(merged.named_parameters(), theirs.parameters()):
        assert one.dtype == DTYPE and torch.equal(one, other.to(DTYPE)), name
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("order").input_ids == models.tokenizer()("order").input_ids
    assert "quantization_config" not in json.loads(
        (tmp_path / "merged" / "config.json").read_text()
    )
    keeps = r"A merge into 4 bits keeps \d+% of the update over 14 layers; worst is model\."
    assert re.search(f"all of the update.* {keeps}", said)


def test_a_merge_into_the_base_of_a_4_bit_folder_is_dense_and_stays_float16(
    tmp_path: Path,
) -> None:
    model = lora.attach(models.tiny_llama(torch.float16), r=4)
    use_adapter.save_4bit(model, models.tokenizer(), tmp_path / "base")
    peft_adapter.save_adapter(models.trained(model), tmp_path / "out")
    assert peft_adapter.read_config(tmp_path / "out")["base_model_name_or_path"] == str(
        tmp_path / "base"
    )
    flags = ["--adapter", str(tmp_path / "out"), "--merge", str(tmp_path / "merged")]
    assert train.main(flags) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    for name, layer in peft_adapter.adapted_layers(model).items():
        weight = merged.get_submodule(name).weight
        assert weight.dtype == torch.float16
        assert torch.equal(weight, (layer.base(torch.float32) + layer.update()).half())
    assert not hasattr(merged.config, "quantization_config")


def test_a_merge_into_4_bits_keeps_what_the_audit_said_and_transformers_loads_it(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model, _ = use_adapter.load_adapted_model(options(out))
    layers = peft_adapter.adapted_layers(model)
    before = {name: layer.base(torch.float32) for name, layer in layers.items()}
    updates = {name: layer.update() for name, layer in layers.items()}
    _, audit = lora.merge(use_adapter.load_adapted_model(options(out))[0])
    assert train.main(["--adapter", str(out), "--merge-4bit", str(tmp_path / "merged")]) == 0
    said = int(re.search(r"keeps (\d+)%", capsys.readouterr().out)[1]) / 100
    with torch.compiler.set_stance("force_eager"):
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    merged = base_model.load_4bit(tmp_path / "merged")
    wanted = realised = 0.0
    for name, update in updates.items():
        weight = theirs.get_submodule(name).weight
        base = merged.get_submodule(name).base
        assert torch.equal(
            base(), bitsandbytes.functional.dequantize_4bit(weight, weight.quant_state)
        )
        assert base.dtype == DTYPE
        after = base(torch.float32)
        change = (after - before[name]).double().flatten() @ update.double().flatten()
        length = update.double().norm() ** 2
        moved = (after - before[name]).double().norm() / length.sqrt()
        assert abs(change / length - audit[name].kept) <= cosine(update.numel()) * moved, name
        wanted = wanted + length
        realised = realised + change
    assert 0 < said < 1 and abs(said - realised / wanted) <= HALF_A_PERCENT + cosine(2**14)


def test_the_fraction_over_a_model_weights_layers_by_the_square_of_their_updates() -> None:
    audit = {
        "a": MergeAudit(3.0, 0.5, 0.9),
        "b": MergeAudit(1.0, 1.0, 0.8),
        "c": MergeAudit(0.0, 1.0, 1.0),
    }
    worst = "worst is b, where the merged change has a cosine of 0.80 with the update."
    expected = f"A merge into 4 bits keeps 55% of the update over 3 layers; {worst}"
    assert use_adapter.describe_audit(audit) == expected
    assert "keeps 100%" in use_adapter.describe_audit({"c": audit["c"]})
    assert "dense" in use_adapter.describe_audit({})


@pytest.mark.parametrize("flag", ["--merge", "--merge-4bit"])
def test_a_merge_overwrites_nothing_and_leaves_nothing_incomplete(
    out: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    flag: str,
) -> None:
    assert train.main(["--adapter", str(out), flag, str(tmp_path / "model")]) == 1
    assert "exists and is not empty" in capsys.readouterr().err

    def full(*args: object) -> None:
        (args[1] / "half").write_text("")
        raise OSError("the disk is full")

    monkeypatch.setattr(type(models.tokenizer()), "save_pretrained", full)
    (tmp_path / "merged").mkdir()
    before = sorted(tmp_path.iterdir())
    assert train.main(["--adapter", str(out), flag, str(tmp_path / "merged")]) == 1
    assert "the disk is full" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before and not list((tmp_path / "merged").iterdir())
    monkeypatch.undo()
    assert train.main(["--adapter", str(out), flag, str(tmp_path / "merged")]) == 0


def test_an_adapter_records_its_base(out: Path) -> None:
    expected = peft_adapter.TrainedBase(Quantization("nf4", 64, True), DTYPE, layers={})
    assert peft_adapter.base_of(out) == expected


@pytest.mark.parametrize(
    "header, complaint",
    [
        ("{", "describes no base"),
        ('{"bits": 4}', None),
        ('{"bits": 99}', "describes no base"),
        ('{"dtype": "int8"}', "no base"),
        ('{"bits": "4"}', "no base"),
        ('{"code": "int8"}', "no base"),
        ('{"bits": [4]}', "no base"),
        ('{"block_size": 48}', "no base"),
        ('{"block_size": 0}', "no base"),
        ('{"double_quant": 1}', "no base"),
        ('{"layers": []}', "no base"),
        ('{"layers": {"model": {"code": "int8"}}}', "no base"),
        ("[]", "no base"),
        ('{"bits": 0, "dtype": "float16"}', None),
        (None, None),
    ],
)
def test_a_header_that_describes_no_base_is_refused(
    out: Path, header: str | None, complaint: str | None
) -> None:
    path = out / "adapter_model.safetensors"
    save_file(
        load_file(path), path, {"format": "pt"} | ({} if header is None else {"base": header})
    )
    if complaint is None:
        base = peft_adapter.base_of(out)
        assert (base is None) == (header is None)
        assert base is None or (base.quantization.code == "none") == (base.dtype == torch.float16)
    else:
        with pytest.raises(ValueError, match=complaint):
            peft_adapter.base_of(out)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model and an adapter that PEFT trained on it."""
    root = tmp_path_factory.mktemp("foreign")
    folder = models.save_tiny_llama(root / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    theirs = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    models.trained(theirs)
    theirs.save_pretrained(root / "adapter")
    return root


def merged_logits(root: Path, out: Path, *flags: str) -> torch.Tensor:
    words = ["--adapter", str(root / "adapter"), "--model", str(root / "model"), *flags]
    assert train.main([*words, "--merge", str(out), "--device", "cpu"]) == 0
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(20)[None]).logits


def test_an_adapter_that_peft_trained_on_a_dense_base_merges_into_one(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    ours = merged_logits(foreign, tmp_path / "dense", "--quant", "none")
    said = capsys.readouterr().err
    assert "does not say how its base was quantized" in said and "is used dense; " in said
    base = AutoModelForCausalLM.from_pretrained(foreign / "model", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, foreign / "adapter").merge_and_unload()
    for parameter in theirs.parameters():  # a merge has 16 bits
        parameter.data = parameter.to(DTYPE).float()
    with torch.no_grad():
        assert torch.equal(ours, theirs(torch.arange(20)[None]).logits)

    quantized = merged_logits(foreign, tmp_path / "nf4")
    said = capsys.readouterr().err
    assert "is used nf4 in blocks of 64, double quantization; --quant none keeps it dense" in said
    assert not torch.equal(quantized, ours)


def test_an_adapter_for_another_base_than_the_given_one_is_refused(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    base = lora.attach(models.tiny_llama(DTYPE), r=1, block_size=128)
    use_adapter.save_4bit(base, models.tokenizer(), tmp_path / "base")
    words = ["--adapter", str(out), "--merge", str(tmp_path / "merged"), "--device", "cpu"]
    assert train.main([*words, "--model", str(tmp_path / "base")]) == 1
    error = capsys.readouterr().err
    assert "was trained on a base that was nf4 in blocks of 64, double quantization, and" in error
    assert "is nf4 in blocks of 128" in error and error.count("\n") == 1
    assert train.main([*words, "--quant", "none"]) == 1
    error = capsys.readouterr().err
    assert "--quant none disagrees with" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("q_proj", "others", "complaint"),
    [
        (
            None,
            NF4,
            "base that was nf4 in blocks of 64, .*q_proj was dense; train.py quantizes all",
        ),
        (OTHER_LEVELS, OTHER_LEVELS, "a codebook must be known by name, got 16 levels"),
    ],
)
def test_a_base_that_only_python_can_make_is_refused_in_a_dry_run_too(
    out: Path,
    tmp_path: Path,
    q_proj: torch.Tensor | None,
    others: torch.Tensor,
    complaint: str,
    capsys: pytest.CaptureFixture,
) -> None:
    model = lora.attach(models.tiny_llama(DTYPE), "q_proj", codebook=q_proj)
    peft_adapter.save_adapter(lora.attach(model, codebook=others), out)
    words = ["--init-adapter", str(out), "--model", str(tmp_path / "model"), "--dry-run"]
    assert train.main([*words, "--output-dir", str(tmp_path / "next"), "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert re.search(complaint, error) and error.count("\n") == 1, error


@pytest.mark.parametrize("flags", ["--init-adapter {} --dry-run", "--adapter {} --prompt hello"])
def test_a_base_that_is_nowhere_is_named_by_the_entry_of_the_adapter(
    out: Path, flags: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    config = out / "adapter_config.json"
    entries = json.loads(config.read_text()) | {"base_model_name_or_path": "../elsewhere/model"}
    config.write_text(json.dumps(entries))
    monkeypatch.chdir(out)
    assert train.main([*flags.format(out).split(), "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    entry = f"{config}: base_model_name_or_path: ../elsewhere/model is neither a folder nor a hub"
    assert entry in error and "give the base as --model" in error and error.count("\n") == 1


def test_the_base_of_an_adapter_that_does_not_say_is_what_its_folder_is(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    settings = {"codebook": bnb_4bit.CODES["fp4"], "block_size": 128}
    base = lora.attach(models.tiny_llama(DTYPE), r=1, **settings)
    use_adapter.save_4bit(base, models.tokenizer(), tmp_path)
    args = options(foreign / "adapter", model=str(tmp_path))
    model, _ = use_adapter.load_adapted_model(args)
    assert (args.quant, args.block_size) == ("fp4", 128)
    for layer in peft_adapter.adapted_layers(model).values():
        assert bnb_4bit.quant_type(layer.base.codebook) == "fp4"
    assert capsys.readouterr().err == ""


def test_a_merge_into_4_bits_keeps_the_dense_layers_of_its_base_dense(tmp_path: Path) -> None:
    base = lora.attach(models.tiny_llama(DTYPE), "q_proj", r=1)
    use_adapter.save_4bit(base, models.tokenizer(), tmp_path / "base")
    model = base_model.load_quantized(tmp_path / "base", DTYPE, "cpu", pytest.fail)
    peft_adapter.save_adapter(models.trained(lora.attach(model, r=2)), tmp_path / "adapter")
    args = options(tmp_path / "adapter", model=str(tmp_path / "base"))
    model, tokenizer = use_adapter.load_adapted_model(args)
    layer = model.model.layers[0].mlp.up_proj
    expected = (layer.base(torch.float32) + layer.update()).to(DTYPE)
    use_adapter.merge_4bit(model, tokenizer, tmp_path / "merged")
    merged = base_model.load_4bit(tmp_path / "merged")
    assert torch.equal(merged.model.layers[0].mlp.up_proj.base(), expected)


@pytest.mark.parametrize("name, expected", [("float16", torch.float16), (None, torch.bfloat16)])
def test_a_base_has_the_dtype_of_its_config(
    tmp_path: Path, name: str | None, expected: torch.dtype
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"torch_dtype": name}))
    assert use_adapter.dtype_of(tmp_path) == expected


TURNS = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}"
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
DROPS = TURNS.replace("in messages", "in messages if turn.role != 'system'")


def test_a_system_message_takes_the_place_of_the_default_one() -> None:
    tokenizer = models.tokenizer()
    default = tokenizer.decode(encode_prompt(tokenizer, "Who?"))
    other = tokenizer.decode(encode_prompt(tokenizer, "Who?", "Be kind."))
    assert other == default.replace("Answer briefly.", "Be kind.") != default
    tokenizer.chat_template = None
    assert tokenizer.decode(encode_prompt(tokenizer, "Who?", "Be kind.")) == "Be kind.\nWho?\n"


@pytest.mark.parametrize(
    "template, complaint",
    [
        (REFUSES + TURNS, "refuses it .no system."),
        (DROPS, "turn 1 .system.: .* drops or changes .Be kind"),
    ],
)
def test_a_template_without_a_system_message_refuses_one(template: str, complaint: str) -> None:
    tokenizer = models.tokenizer()
    tokenizer.chat_template = template
    assert "Who?" in tokenizer.decode(encode_prompt(tokenizer, "Who?"))
    with pytest.raises(ValueError, match=complaint):
        encode_prompt(tokenizer, "Who?", "Be kind.")


def test_the_system_message_of_the_command_line_reaches_the_model(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = []
    monkeypatch.setattr(use_adapter, "generate_answers", lambda *args, **_: prompts.extend(args[2]))
    words = ["--adapter", str(out), "--prompt", "Who?", "--system", "Be kind."]
    assert train.main(words) == 0
    assert prompts == [encode_prompt(models.tokenizer(), "Who?", "Be kind.")]


def test_settings_of_generation_that_transformers_will_not_save_do_not_stop_a_merge(
    out: Path, tmp_path: Path
) -> None:
    """They may be invalid together, or in config.json, where older versions kept them."""
    base = tmp_path / "model"
    settings = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}
    (base / "generation_config.json").write_text(json.dumps(settings))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"num_beams": 3}))
    assert train.main(["--adapter", str(out), "--merge", str(tmp_path / "merged")]) == 0
    merged = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert settings.items() <= merged.items()
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_a_base_that_generates_with_beams_still_answers_a_prompt(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ["--adapter", str(out), "--prompt", "order", "--max-seq-len", "4"]
    assert train.main(flags) == 0
    answer = capsys.readouterr().out
    settings = {"num_beams": 4, "num_return_sequences": 2, "return_dict_in_generate": True}
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    assert train.main(flags) == 0
    assert capsys.readouterr().out == answer != ""


def test_a_prompt_with_a_token_beyond_the_embedding_is_refused(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tokenizer = models.tokenizer()
    tokenizer.add_tokens(["<zebra>"])
    tokenizer.save_pretrained(tmp_path / "model")
    assert train.main(["--adapter", str(out), "--prompt", "a <zebra>"]) == 1
    assert "gives '<zebra>' the id 49152" in capsys.readouterr().err
