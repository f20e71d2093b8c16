"""The options of train.py: the flags, the parser and the checks of their combinations.

Each field of `Options` is one flag: its type, default, help text and rule. `parse_args` builds the
parser and the help from these fields. It answers any mistake with one line and exit status 2. An
underscore in a flag counts as a dash.

A run either trains or, with --adapter, uses a trained adapter. A flag without an effect on what the
other flags ask for is an error, so nothing that a user typed is ignored.

This module imports only the standard library, so --help and a wrong flag are answered before torch
loads. The device and the dtype need torch: dtypes.resolve_device_and_dtype sets them later.

Differs from transformers.HfArgumentParser, which also builds a parser from a dataclass: it loads
transformers, has no rules for values, suggests no flags, and shows a traceback for an unknown flag.
"""

import argparse
import difflib
import math
import os
import sys
from collections.abc import Callable, Iterator, Set
from dataclasses import Field, dataclass, field, fields, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import NoReturn, get_args, get_type_hints

DEFAULT_MODEL = "SmolLM2-135M-Instruct"  # equals the name in checkpoints.sources
LORA_STARTS = ["default", "pissa", "loftq"]  # equals variants.init.STARTS
DTYPES = ["auto", "bfloat16", "float32"]
QUANTS = ["nf4", "nf3", "nf2", "none"]  # some codes of checkpoints.quantization
STEPS = 60  # if neither --max-steps nor --num-train-epochs is given
COMPARED = "16-bit"  # the folder of the second run of --compare, in the output folder
LARGEST_INT = 2**63 - 1  # torch and the files hold whole numbers in 64 bits

RULES: dict[str, Callable[[float], bool]] = {
    "above 0": lambda x: 0 < x < math.inf,
    "0 or more": lambda x: 0 <= x < math.inf,
    "2 or more, the megabytes of a page": lambda x: 2 <= x < math.inf,
    "a probability, 0 <= p < 1": lambda x: 0 <= x < 1,
    "a power of two, 2 or more": lambda x: x >= 2 and x & (x - 1) == 0,
}
GROUPS = {  # the first flag of each group of the help
    "model": "the frozen base",
    "init_adapter": "the adapters",
    "data": "the data",
    "max_steps": "training",
    "output_dir": "saving and resuming",
    "preview": "before, after and instead of training",
}
ALIASES = {  # the names in Hugging Face's trainers
    "model": ["--model-name-or-path"],
    "data": ["--dataset-name"],
    "max_seq_len": ["--max-length", "--max-seq-length"],
    "batch_size": ["--per-device-train-batch-size"],
    "grad_accum": ["--gradient-accumulation-steps"],
    "lr": ["--learning-rate"],
    "grad_checkpoint": ["--gradient-checkpointing"],
    "eval_every": ["--eval-steps"],
    "save_every": ["--save-steps"],
}
# These may differ when a run resumes. Every other flag must have the value in the state, also the
# flags that --init-adapter sets.
MAY_DIFFER = {"shard", "data", "num_train_epochs", "grad_accum", "optim", "resident_mb"}
MAY_DIFFER |= {"eval_every", "save_every", "save_total_limit", "output_dir", "resume"}
MAY_DIFFER |= {"resume_anyway", "overwrite", "preview", "dry_run", "compare"}
MAY_DIFFER |= {"init_adapter", "adapter", "prompt", "system", "merge", "merge_4bit"}

# What has an effect with --adapter, and what each of these flags needs.
WITH_ADAPTER = {"adapter", "model", "device", "prompt", "merge", "merge_4bit"}
WITH_ADAPTER |= {"quant", "no_double_quant", "block_size"}  # for an adapter that does not say it
WITH_PROMPT = {"system", "dtype", "max_seq_len"}
NEEDS = [("prompt", "adapter"), ("system", "prompt"), ("merge", "adapter")]
NEEDS += [("merge_4bit", "adapter"), ("resume_anyway", "resume")]
EXCLUSIVE = [("max_steps", "num_train_epochs"), ("group_by_length", "packing")]
EXCLUSIVE += [("resume", "overwrite"), ("preview", "dry_run"), ("init_adapter", "compare")]
# What an adapter that exists has already.
SET_BY_ADAPTER = ["lora_r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "lora_start"]
# A folder that is written must not be another folder of the command, which is why it comes first.
WRITTEN = ["output_dir", "save_4bit", "merge", "merge_4bit"]
FOLDERS = [*WRITTEN, "model", "init_adapter", "adapter"]
PATHS = [*FOLDERS, "data"]


def flag(default: object, text: str, rule: str = "", choices: list[str] | None = None) -> Field:
    """A field of Options, with the help text and the valid values of its flag."""
    return field(default=default, metadata={"help": text, "rule": rule, "choices": choices})


@dataclass
class Options:
    """The values of the flags. dtypes.resolve_device_and_dtype sets `device` and `dtype`."""

    given = frozenset()  # the names of the flags that were typed; not a field

    model: str | None = flag(None, f"folder or hub id (default: {DEFAULT_MODEL}, from a package)")
    quant: str = flag("nf4", "code of the frozen weights; none: 16 bits", choices=QUANTS)
    no_double_quant: bool = flag(False, "keep the quantization constants in float32")
    block_size: int = flag(64, "weights per quantization constant", "a power of two, 2 or more")
    save_4bit: Path | None = flag(None, "save the 4-bit base for transformers and bitsandbytes")
    dtype: str = flag("auto", "dtype of the matmuls; auto: bfloat16 if native", choices=DTYPES)
    device: str | None = flag(None, "where the model runs (default: cuda if available, else cpu)")
    shard: bool = flag(False, "under torchrun: each rank keeps its part of every tensor (FSDP2)")

    init_adapter: Path | None = flag(None, "train on from this adapter, not from a new one")
    lora_r: int = flag(8, "rank of the adapters", "above 0")
    lora_alpha: float = flag(16.0, "the update is scaled by alpha / r", "above 0")
    lora_dropout: float = flag(0.0, "dropout before the adapters", "a probability, 0 <= p < 1")
    use_rslora: bool = flag(False, "scale by alpha / sqrt(r) instead of alpha / r, for large r")
    use_dora: bool = flag(False, "train the norm of each weight row separately (variants/dora.py)")
    lora_start: str = flag(
        "default",
        "initial adapters (variants/init.py); pissa, loftq: with --save-4bit",
        choices=LORA_STARTS,
    )

    data: str = flag("orders", "orders, text, roman, a file (.txt, .jsonl, .csv, ...), or a hub id")
    max_seq_len: int = flag(256, "tokens in the longest sequence", "above 0")
    train_on_prompt: bool = flag(False, "put the prompts in the loss too, not only the answers")
    packing: bool = flag(False, "pack several examples into one sequence; none attends to another")
    group_by_length: bool = flag(False, "batch sequences of similar length: less padding")

    max_steps: int | None = flag(None, f"optimizer steps (default: {STEPS})", "above 0")
    num_train_epochs: float | None = flag(None, "epochs, instead of --max-steps", "above 0")
    batch_size: int = flag(4, "sequences in one forward pass of one process", "above 0")
    grad_accum: int = flag(1, "forward passes per optimizer step", "above 0")
    lr: float = flag(1e-3, "learning rate after warm-up", "above 0")
    max_grad_norm: float = flag(1.0, "clip the gradient to this norm", "above 0")
    optim: str = flag("paged_adamw", "both give the same bits", choices=["paged_adamw", "adamw"])
    resident_mb: float | None = flag(
        None, "MB of state kept on the device (default: all)", "2 or more, the megabytes of a page"
    )
    grad_checkpoint: bool = flag(False, "keep only the input of each block: less memory, more time")
    seed: int = flag(0, "seed of the adapters, dropout and the order of the data", "0 or more")
    eval_every: int = flag(0, "evaluate every N steps; 0: only before and after", "0 or more")

    output_dir: Path = flag(Path("out"), "folder for the adapter, the metrics and the report")
    save_every: int = flag(0, "save the state every N steps; 0: only at start and end", "0 or more")
    save_total_limit: int = flag(2, "how many states to keep, the newest ones", "above 0")
    resume: bool = flag(False, "continue from the newest valid state in --output-dir")
    overwrite: bool = flag(False, "remove the earlier run in --output-dir first")
    resume_anyway: bool = flag(False, "with --resume: accept other flags or data than the state's")

    preview: bool = flag(False, "show the first sequences, mark the tokens in the loss, and exit")
    dry_run: bool = flag(False, "check flags, model, data, folder and memory; print a plan; exit")
    compare: bool = flag(False, "also train 16-bit LoRA from the same seed")
    adapter: Path | None = flag(None, "a trained adapter, for --prompt, --merge or --merge-4bit")
    prompt: str | None = flag(None, "a question to --adapter")
    system: str | None = flag(None, "the system message before --prompt")
    merge: Path | None = flag(None, "write the base with --adapter merged, as a 16-bit model")
    merge_4bit: Path | None = flag(None, "the same in 4 bits, which loses most of a small update")

    def in_16_bits(self) -> "Options":
        """The second run of --compare: the same options with 16-bit LoRA, in its own folder."""
        folder = self.output_dir / COMPARED
        has_begun = any(folder.glob("state-*"))
        return replace(
            self,
            quant="none",
            lora_start="default",
            save_4bit=None,
            output_dir=folder,
            resume=self.resume and has_begun,
            overwrite=False,  # the first run has removed both
        )

    def settings(self) -> dict[str, str]:
        """The flags that must be the same when a run resumes, as text."""
        names = [option.name for option in fields(self) if option.name not in MAY_DIFFER]
        return {name: str(getattr(self, name)) for name in names}


def parse_args(argv: list[str] | None = None, description: str | None = None) -> Options:
    """The options of a command line, sys.argv by default. Error: one line, exit status 2."""
    words = sys.argv[1:] if argv is None else argv
    parser = make_parser(description)
    values, unknown = parser.parse_known_args([with_dashes(word) for word in words])
    if unknown:
        usage_error(f"{unknown[0]} is not a flag: {suggestion(unknown[0])}")
    given = vars(values)  # without the flags that were left out
    options = Options(**given)
    options.given = frozenset(given)
    mistake = next(mistakes(options, given.keys()), None)
    if mistake:
        usage_error(mistake)
    if options.max_steps is None and options.num_train_epochs is None:
        options.max_steps = STEPS
    return options


def usage_error(message: str) -> NoReturn:
    """Print one line, on rank 0 only because all ranks have the same flags; exit with status 2."""
    if os.environ.get("RANK", "0") == "0":
        print(f"train.py: {message}", file=sys.stderr)
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        usage_error(message)


def make_parser(description: str | None) -> Parser:
    """A parser with one flag for each field of Options, in the groups of GROUPS."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        "train.py",
        description=description,
        formatter_class=layout,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    types = get_type_hints(Options)
    for option in fields(Options):
        if option.name in GROUPS:
            group = parser.add_argument_group(GROUPS[option.name])
        kind = types[option.name]
        kind = get_args(kind)[0] if get_args(kind) else kind  # int for `int | None`
        group.add_argument(*spellings(option.name), **arguments(option, kind))
    return parser


def arguments(option: Field, kind: type) -> dict[str, object]:
    """The keyword arguments of add_argument for a field of type `kind`."""
    text, rule, choices = option.metadata.values()
    if kind is bool:
        return {"action": "store_true", "help": text}
    return {
        "type": partial(parse_path, kind)
        if option.name in PATHS
        else partial(parse_value, kind, rule),
        "choices": choices,
        "metavar": None if choices else {int: "N", float: "X", Path: "FOLDER"}.get(kind),
        "help": text if option.default is None else f"{text} (default: {option.default})",
    }


def parse_value(kind: type, rule: str, text: str) -> int | float | str:
    """The value of a flag. Raises: ArgumentTypeError that says what the value must be."""
    try:
        value = kind(text)
    except ValueError:
        noun = "a whole number" if kind is int else "a number"
        wanted = f"{noun}, {rule}" if rule else noun
        raise argparse.ArgumentTypeError(f"must be {wanted}; got {text!r}") from None
    if rule and not RULES[rule](value):
        raise argparse.ArgumentTypeError(f"must be {rule}; got {text}")
    if kind is int and value > LARGEST_INT:
        raise argparse.ArgumentTypeError(f"must be below 2**63; got {text}")
    return value


def parse_path(kind: type, text: str) -> str | Path:
    """A path, or a name in its place. ~ is the home folder, also where no shell expands it.

    Raises: ArgumentTypeError if it is empty, as an unset variable of a shell is.
    """
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return kind(os.path.expanduser(text))


def spelling(name: str) -> str:
    """The flag of a field: --batch-size for batch_size."""
    return "--" + name.replace("_", "-")


def spellings(name: str) -> list[str]:
    """All names of the flag of a field."""
    return [spelling(name), *ALIASES.get(name, [])]


def with_dashes(word: str) -> str:
    """--batch_size=2 -> --batch-size=2. A value keeps its underscores."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def suggestion(unknown: str) -> str:
    """What to type instead of an unknown flag."""
    known = [name for option in fields(Options) for name in spellings(option.name)]
    near = difflib.get_close_matches(unknown, known)
    return f"did you mean {near[0]}?" if near else "--help shows all flags"


def launched_by_torchrun() -> bool:
    """Whether torchrun, or a launcher like it, started this process as one of several."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def mistakes(options: Options, given: Set[str]) -> Iterator[str]:
    """Each wrong combination of flags that are valid on their own, with the remedy.

    given: the names of the flags that were typed.
    """
    for one, other in NEEDS:
        if one in given and other not in given:
            yield f"{spelling(one)} does nothing without {spelling(other)}: give both, or neither"
    for one, other in EXCLUSIVE:
        if one in given and other in given:
            yield f"{spelling(one)} and {spelling(other)} exclude each other: leave one out"
    yield from without_effect(options, given)
    yield from mistakes_with_processes(options, given)
    yield from same_paths(options, given)


def without_effect(options: Options, given: Set[str]) -> Iterator[str]:
    """Each flag that has no effect because of another one."""
    if "adapter" in given:
        if not {"prompt", "merge", "merge_4bit"} & given:
            yield (
                "--adapter does nothing without --prompt, --merge or --merge-4bit: give one of "
                "them, or train on from an adapter with --init-adapter"
            )
        useful = WITH_ADAPTER | WITH_PROMPT if "prompt" in given else WITH_ADAPTER
        for name in sorted(given - useful):
            use = "--adapter and --prompt" if "prompt" in given else "--adapter and a merge"
            yield f"{spelling(name)} does nothing with {use}: leave it out"
    if "init_adapter" in given:
        for name in sorted(given & {*SET_BY_ADAPTER}):
            yield f"{spelling(name)} is that of the adapter with --init-adapter: leave it out"
    if options.quant == "none":
        for name in sorted(given & {"block_size", "no_double_quant", "compare"}):
            nothing = f"{spelling(name)} does nothing with --quant none"
            yield f"{nothing}, which is 16-bit LoRA: leave one out"
    if options.lora_start != "default" and "save_4bit" not in given:
        yield f"--lora-start {options.lora_start} changes the base: give --save-4bit FOLDER too"
    if "resident_mb" in given and options.optim != "paged_adamw":
        yield "--resident-mb is for --optim paged_adamw, whose state has pages: leave one out"


def mistakes_with_processes(options: Options, given: Set[str]) -> Iterator[str]:
    """Each flag that does not fit the number of processes."""
    several = launched_by_torchrun()
    if "shard" in given and not several:
        start = "torchrun --nproc-per-node N train.py --shard"
        yield f"--shard splits a model among processes: start them with {start}"
    if "adapter" in given and several:
        yield "--adapter is for one process: leave torchrun out"
    if "device" in given and options.device.startswith("cuda:") and several:
        same = f"--device {options.device} is the same GPU for all processes"
        yield f"{same}: give --device cuda, and each process takes its own"


def same_paths(options: Options, given: Set[str]) -> Iterator[str]:
    """Each pair of flags that name the same folder, if one of them is written."""
    used = given if "adapter" in given else given | {"output_dir"}
    paths = {name: getattr(options, name) for name in FOLDERS if name in used}
    real = {name: os.path.realpath(path) for name, path in paths.items()}
    for one, other in combinations(real, 2):
        if one in WRITTEN and real[one] == real[other]:
            flags = f"{spelling(one)} and {spelling(other)}"
            yield f"{flags} are both {paths[one]}: choose another folder for one of them"
