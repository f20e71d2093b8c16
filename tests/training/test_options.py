"""The flags, the help, one line for each mistake, and what a dry run finds before training."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import transformers

import train
from checkpoints import quantization, sources
from helpers import models
from memory import formula
from training import options, preflight
from training.dtypes import resolve_device_and_dtype
from training.exit_status import how_to_resume
from training.options import Options, parse_args
from training.state import seed_batch
from variants import init

ROOT = Path(__file__).parent.parent.parent
SPELLINGS = {
    "model": "--model_name_or_path m",
    "max_seq_len": "--max_length 9",
    "batch_size": "--per_device_train_batch_size 2",
    "grad_accum": "--gradient-accumulation-steps 3",
    "lr": "--learning_rate=2e-4",
    "grad_checkpoint": "--gradient_checkpointing",
    "save_every": "--save_steps 5",
    "save_total_limit": "--save_total_limit=3",
    "num_train_epochs": "--num-train-epochs 1.5",
    "max_grad_norm": "--max_grad_norm 0.3",
    "lora_dropout": "--lora_dropout 0.1",
    "output_dir": "--output_dir a_b",
    "data": "--dataset_name my_rows.jsonl",
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_command_line_for_the_trainers_of_hugging_face_is_understood(name: str) -> None:
    ours = parse_args(SPELLINGS[name].split())
    default = parse_args([])
    given = re.split("[ =]", SPELLINGS[name])[-1]
    wanted = {"2e-4": "0.0002", "--gradient_checkpointing": "True"}.get(given, given)
    assert str(getattr(ours, name)) == wanted
    names = [option.name for option in fields(Options)]
    changed = [each for each in names if getattr(ours, each) != getattr(default, each)]
    assert changed == (["max_steps", name] if name == "num_train_epochs" else [name])


def test_the_help_has_every_flag_in_a_group_and_its_default(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_args(["--help"], "What it does.")
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "What it does." in text
    names = [option.name for option in fields(Options)]
    assert names[0] in options.GROUPS and {*options.GROUPS} | {*options.ALIASES} <= {*names}
    assert options.MAY_DIFFER.issubset(names)
    position = 0
    for name in names:
        if name in options.GROUPS:
            position = text.index(f"\n{options.GROUPS[name]}:\n", position)
        position = text.index(f"\n  {options.spelling(name)}", position)
        assert all(alias in text for alias in options.ALIASES.get(name, []))
    assert "(default: 0.001)" in text and "(default: 0)" in text
    assert "(default: None)" not in text and "(default: False)" not in text


def test_options_imports_the_standard_library_only() -> None:
    """So --help and a wrong flag are answered before torch loads."""
    code = """
import sys
before = set(sys.modules)
from training.options import parse_args
parse_args([])
print(*set(sys.modules) - before)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "training" in loaded and "torch" not in loaded
    assert loaded - {"training"} <= sys.stdlib_module_names


def test_the_names_that_options_repeats_are_those_of_their_modules() -> None:
    assert options.DEFAULT_MODEL == sources.DEFAULT_MODEL
    assert tuple(options.LORA_STARTS) == tuple(init.STARTS)
    assert {*options.QUANTS} <= {*quantization.CODEBOOKS, quantization.DENSE}


@pytest.mark.parametrize(
    "words, answer",
    [
        ("--lr fast", "argument --lr/--learning-rate: must be a number, above 0; got 'fast'"),
        ("--lr nan", "must be above 0; got nan"),
        ("--lr -1", "must be above 0; got -1"),
        ("--max-steps 2.5", "must be a whole number, above 0; got '2.5'"),
        ("--max-steps 0", "argument --max-steps: must be above 0; got 0"),
        ("--lora-r 0", "argument --lora-r: must be above 0; got 0"),
        ("--lora-dropout 1", "must be a probability, 0 <= p < 1; got 1"),
        ("--lora-dropout x", "must be a number, a probability, 0 <= p < 1; got 'x'"),
        ("--block-size 48", "must be a power of two, 2 or more; got 48"),
        ("--resident-mb 0.001", "must be 2 or more, the megabytes of a page; got 0.001"),
        ("--save-total-limit 0", "must be above 0; got 0"),
        ("--seed -1", "must be 0 or more; got -1"),
        (f"--seed {2**63}", f"argument --seed: must be below 2..63; got {2**63}"),
        (f"--max-steps {2**64}", f"argument --max-steps: must be below 2..63; got {2**64}"),
        ("--output-dir=", "argument --output-dir: must not be empty"),
        ("--model=", "argument --model/--model-name-or-path: must not be empty"),
        ("--quant nf5", "argument --quant: invalid choice: 'nf5' .choose from"),
        ("--device abacus", "--device abacus cannot be used .*: try cpu"),
        ("--batchsize 3", "--batchsize is not a flag: did you mean --batch-size?"),
        ("--resum", "--resum is not a flag: did you mean --resume?"),
        ("nonsense", "nonsense is not a flag: --help shows all flags"),
        ("--lr", "argument --lr/--learning-rate: expected one argument"),
        ("--prompt alone", "--prompt does nothing without --adapter: give both, or neither"),
        (
            "--adapter alone",
            "--adapter does nothing without --prompt, --merge or --merge-4bit: give one of them, "
            "or train on from an adapter with --init-adapter",
        ),
        ("--system alone", "--system does nothing without --prompt: give both, or neither"),
        ("--merge alone", "--merge does nothing without --adapter: give both, or neither"),
        (
            "--lora-start pissa",
            "--lora-start pissa changes the base: give --save-4bit FOLDER too",
        ),
        ("--resume-anyway", "--resume-anyway does nothing without --resume: give both, or neither"),
        (
            "--max-steps 5 --num-train-epochs 1",
            "--max-steps and --num-train-epochs exclude each other: leave one out",
        ),
        (
            "--adapter a --prompt b --resume",
            "--resume does nothing with --adapter and --prompt: leave it out",
        ),
        (
            "--adapter a --prompt b --data orders",  # the default, but typed
            "--data does nothing with --adapter and --prompt: leave it out",
        ),
        (
            "--adapter a --merge b --dtype bfloat16",
            "--dtype does nothing with --adapter and a merge: leave it out",
        ),
        ("--resume --overwrite", "--resume and --overwrite exclude each other: leave one out"),
        ("--preview --dry-run", "--preview and --dry-run exclude each other: leave one out"),
        (
            "--init-adapter a --lora-r 8",
            "--lora-r is that of the adapter with --init-adapter: leave it out",
        ),
        (
            "--init-adapter a --output-dir ./a",
            "--output-dir and --init-adapter are both a: choose another folder for one of them",
        ),
        ("--init-adapter out", "--output-dir and --init-adapter are both out: choose another"),
        ("--model a --output-dir b/../a", "--output-dir and --model are both b/../a"),
        ("--adapter a --merge b --merge-4bit b", "--merge and --merge-4bit are both b: choose"),
        (
            "--quant none --compare",
            "--compare does nothing with --quant none, which is 16-bit LoRA: leave one out",
        ),
        ("--quant none --block-size 128", "--block-size does nothing with --quant none"),
        (
            "--optim adamw --resident-mb 4",
            "--resident-mb is for --optim paged_adamw, whose state has pages: leave one out",
        ),
    ],
)
def test_a_wrong_flag_gets_one_line_before_anything_is_loaded(
    words: str, answer: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "preflight", lambda *args: pytest.fail("went on"))
    with pytest.raises(SystemExit) as stop:
        train.main(words.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("train.py: ") and error.count("\n") == 1
    assert re.search(answer, error), error


def test_each_flag_that_has_an_effect_with_an_adapter_is_accepted() -> None:
    asks = "--adapter out --model m --device cpu --prompt a --system b --dtype float32"
    both = parse_args([*asks.split(), "--max-seq-len", "9", "--merge", "c", "--merge-4bit", "d"])
    assert both.adapter == Path("out") and both.system == "b"


def test_two_names_that_are_no_folders_may_be_equal() -> None:
    assert parse_args("--data orders --output-dir orders".split()).data == "orders"


def test_a_tilde_in_a_path_is_the_home_folder_wherever_it_is_typed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    words = {name: f"{options.spelling(name)}=~/{name}" for name in options.PATHS}
    uses = ["adapter", "merge", "merge_4bit"]
    using = vars(parse_args([words[name] for name in uses]))
    training = vars(parse_args([words[name] for name in options.PATHS if name not in uses]))
    for name in options.PATHS:
        expanded = using[name] if name in uses else training[name]
        assert str(expanded) == f"/home/ada/{name}"
    assert parse_args(["--adapter", "a", "--prompt", "~"]).prompt == "~", "no path"


@pytest.mark.parametrize("seed", [0, 2**32, 2**63 - 1])
def test_a_seed_that_the_parser_accepts_seeds_every_generator(seed: int) -> None:
    assert parse_args(["--seed", str(seed)]).seed == seed
    torch.manual_seed(seed)
    seed_batch(seed, 2**63)


def test_a_resumed_run_must_share_the_flags_that_the_bits_depend_on() -> None:
    flags = "--output-dir elsewhere --lora-alpha 16 --num-train-epochs 3"
    settings = parse_args(flags.split()).settings()
    assert settings.keys() == set(
        """
        model quant no_double_quant block_size dtype device lora_r lora_alpha lora_dropout
        use_rslora use_dora lora_start save_4bit max_seq_len train_on_prompt packing group_by_length
        max_steps batch_size lr max_grad_norm grad_checkpoint seed
    """.split()
    )
    assert settings["lora_alpha"] == parse_args([]).settings()["lora_alpha"] == "16.0"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(f'{{"prompt": "What is {n}?", "completion": "A number."}}\n' for n in range(20))
    )
    return path


def dry(tiny: Path, out: Path, *more: str) -> int:
    return train.main(["--model", str(tiny), "--output-dir", str(out), "--dry-run", *more])


def test_a_dry_run_says_what_a_run_would_be_and_loads_nothing(
    tiny: Path,
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM,
        "from_pretrained",
        lambda *args, **kwargs: pytest.fail("loaded"),
    )
    shape = "--batch-size 2 --grad-accum 3 --num-train-epochs 4 --dtype bfloat16".split()
    assert dry(tiny, tmp_path / "out", "--data", str(rows), *shape) == 0
    text = capsys.readouterr().out
    for line in (
        r"model +\S+: LlamaForCausalLM, to be kept in nf4",
        r"data +\S+: 18 sequences to train on, .* 2 held out",
        r"training +12 steps of 6 sequences, 4.00 epochs, from the pretrained model",
        r"output .* GB are free",
        r"memory +0.0\d GB at a step's peak, predicted; cpu has",
    ):
        assert re.search(line, text), text
    assert not (tmp_path / "out").exists()


def test_a_dry_run_finds_what_a_run_would_fail_at(
    tiny: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "half.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for flags, answer in {
        ("--model", str(tmp_path / "empty")): "empty is not a model that can be read",
        ("--data", str(tmp_path / "half.jsonl")): "half.jsonl:2: ",
        (
            "--data",
            str(rows),
            "--max-seq-len",
            "9999",
        ): "longer than the model's context of 512 tokens",
        (
            "--data",
            str(rows),
            "--output-dir",
            str(tmp_path / "file" / "out"),
        ): "choose another --output-dir",
        ("--data", str(rows), "--resume"): "there is no state in .* to resume from",
    }.items():
        assert dry(tiny, tmp_path / "out", *flags) == 1
        error = capsys.readouterr().err
        lines = 2 if "half" in answer else 1  # rows have a line each
        assert re.search(answer, error) and error.count("\n") == lines, error


def test_memory_is_predicted_for_a_llama_and_said_to_be_too_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = models.tiny_llama(vocab_size=256).config
    args = resolve_device_and_dtype(parse_args("--dtype bfloat16 --device cpu".split()))
    in_float32 = resolve_device_and_dtype(parse_args("--dtype float32 --device cpu".split()))
    predicted = preflight.describe_memory(config, in_float32, 64)
    assert predicted.startswith("0.00 GB at a step's peak, predicted; cpu has")
    half, full = (
        formula.predict_step(config, preflight.step_settings(each), 4, 64).components["activations"]
        for each in (args, in_float32)
    )
    assert half < full < 2 * half
    monkeypatch.setattr(preflight, "device_bytes", lambda device: 1000)
    assert preflight.describe_memory(config, args, 64).endswith(
        "which is too little: see --batch-size, --max-seq-len, --grad-checkpoint"
    )
    config.model_type = "gemma"
    known = "not predicted: the formula covers llama and mistral, from dense weights, "
    known += "without biases or DoRA, and not this "
    assert preflight.describe_memory(config, args, 64).startswith(f"{known}gemma; cpu has")
    config.model_type = "llama"
    config.attention_bias = True
    assert preflight.describe_memory(config, args, 64).startswith(f"{known}llama; cpu has")


def test_a_gpus_memory_is_asked_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: type("Card", (), {"total_memory": 24})
    )
    assert preflight.device_bytes("cuda:0") == 24 < preflight.device_bytes("cpu")


def test_other_data_are_refused_on_resume_unless_allowed_and_a_renamed_file_is_not(
    tiny: Path,
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paths = ["--model", str(tiny), "--output-dir", str(tmp_path / "out")]
    run = [*paths, "--max-steps", "2", "--batch-size", "2"]
    assert train.main([*run, "--data", str(rows)]) == 0
    renamed = rows.rename(tmp_path / "renamed.jsonl")
    other = tmp_path / "other.jsonl"
    other.write_text(renamed.read_text().replace("What is 7?", "Who is 7?"))
    capsys.readouterr()
    assert dry(tiny, tmp_path / "out", *run[4:], "--data", str(renamed), "--resume") == 0
    assert "from step 2, by " in capsys.readouterr().out
    assert train.main([*run, "--data", str(other), "--resume"]) == 1
    said = capsys.readouterr().err
    assert re.search(
        "cannot resume from .*: data .a hash of its token ids. was .*, is .*. "
        "Use the old settings or",
        said,
    )
    assert train.main([*run, "--data", str(other), "--resume", "--resume-anyway"]) == 0
    assert "although data (a hash of its token ids) was" in capsys.readouterr().err


def test_a_run_that_saved_nothing_cannot_be_resumed(tmp_path: Path) -> None:
    words = ["--max-steps", "2"]
    args = Options(output_dir=tmp_path)
    assert how_to_resume(args, words) == " before anything was saved"
    (tmp_path / "state-000001.safetensors").touch()
    assert how_to_resume(args, words).endswith("train.py --max-steps 2 --resume")
    assert how_to_resume(args, [*words, "--overwrite"]).endswith("--max-steps 2 --resume")
    args.overwrite = True
    assert how_to_resume(args, words) == " before anything was saved", (
        "the state is an earlier run's"
    )
