"""The options of train.py: one dataclass, of which command_line.py makes the parser and the help, and --resume what to compare.

Spellings besides our own are those of Hugging Face's trainers. With `free=True` a flag may have another value on --resume.
Nothing is loaded before flags make sense, each by itself and all of them together (`wrong_combination`).
"""

from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch

from checkpoints import sources as pretrained
from training import distributed as processes
from training.command_line import flag, parser_of, read, spelling
from training.dtypes import pick_dtype
from variants.init import STARTS

QUANT = {
    "nf4": 4,
    "nf3": 3,
    "nf2": 2,
    "none": 0,
}  # bits of the base's code; none leaves it in 16 bits
STEPS = 60  # that are taken where neither their number nor one of epochs is given
base, adapters, rows = (
    partial(flag, group) for group in ("the frozen base", "the adapters", "the data")
)
training, saving = partial(flag, "training"), partial(flag, "saving and resuming", free=True)
instead = partial(flag, "before, after and instead of training", free=True)


@dataclass
class Options:
    """What the command line says. `dtype` is a torch.dtype once `parse_args` has seen the device."""

    model: str | None = base(
        None,
        f"a Hugging Face folder or hub id (default: {pretrained.DEFAULT}, from a Python package)",
        "--model-name-or-path",
    )
    quant: str = base(
        "nf4", "code of the frozen weights; none: they stay in 16 bits", choices=list(QUANT)
    )
    no_double_quant: bool = base(False, "keep the quantization constants in float32")
    block_size: int = base(64, "weights that share a constant", rule="a power of two, 2 or more")
    save_4bit: Path | None = base(
        None, "keep the 4-bit base, as transformers and bitsandbytes read it"
    )
    dtype: str = base(
        "auto", "of products; auto: bfloat16 if native", choices=["auto", "bfloat16", "float32"]
    )
    device: str = base("cuda" if torch.cuda.is_available() else "cpu", "where the model is")
    shard: bool = base(
        False, "under torchrun: each process keeps its share of every tensor (FSDP2)", free=True
    )

    lora_r: int = adapters(8, "their rank", rule="above 0")
    lora_alpha: float = adapters(16.0, "the update is scaled by alpha / r", rule="above 0")
    lora_dropout: float = adapters(
        0.0, "dropout before the adapters", rule="a probability, 0 <= p < 1"
    )
    use_rslora: bool = adapters(
        False, "scale by alpha / sqrt(r), so that a larger r does not learn more slowly"
    )
    use_dora: bool = adapters(
        False, "train the length of each row of a weight apart from its direction (dora.py)"
    )
    lora_start: str = adapters(
        "default", "pissa, loftq: see variants.py; with --save-4bit", choices=list(STARTS)
    )

    data: str = rows(
        "orders",
        "orders, text, roman, a .txt, .jsonl or .json file, or a hub id",
        "--dataset-name",
        free=True,
    )
    max_seq_len: int = rows(
        256, "tokens in the longest sequence", "--max-length", "--max-seq-length", rule="above 0"
    )
    train_on_prompt: bool = rows(False, "learn the questions too, not the answers alone")
    packing: bool = rows(False, "several examples a sequence, none of which sees another")
    group_by_length: bool = rows(
        False, "sequences of similar length share a batch, so that less of it is padding"
    )

    max_steps: int | None = training(None, f"optimizer steps (default: {STEPS})", rule="above 0")
    num_train_epochs: float | None = training(
        None, "instead of --max-steps: passes over the data", rule="above 0", free=True
    )
    batch_size: int = training(
        4,
        "sequences in one forward pass of a process",
        "--per-device-train-batch-size",
        rule="above 0",
    )
    grad_accum: int = training(
        1, "forward passes a step", "--gradient-accumulation-steps", rule="above 0", free=True
    )
    lr: float = training(1e-3, "learning rate after warm-up", "--learning-rate", rule="above 0")
    max_grad_norm: float = training(1.0, "clip the gradient to this norm", rule="above 0")
    optim: str = training(
        "paged_adamw", "the same bits from either", choices=["paged_adamw", "adamw"], free=True
    )
    resident_mb: float | None = training(
        None,
        "megabytes of optimizer state that may stay on the device (default: all)",
        rule="2 or more, the megabytes of a page",
        free=True,
    )
    grad_checkpoint: bool = training(
        False, "keep only each block's input: less memory, more time", "--gradient-checkpointing"
    )
    seed: int = training(0, "of adapters, dropout and the order of the data", rule="0 or more")
    eval_every: int = training(
        0,
        "measure every N steps too; 0: only before and after training",
        "--eval-steps",
        rule="0 or more",
        free=True,
    )

    output_dir: Path = saving(Path("out"), "where adapter, metrics and report go")
    save_every: int = saving(
        0,
        "save the state every N steps; 0: before the first and after the last",
        "--save-steps",
        rule="0 or more",
    )
    save_total_limit: int = saving(2, "how many states to keep, the last ones", rule="above 0")
    resume: bool = saving(False, "go on from the last whole state in --output-dir")
    resume_anyway: bool = saving(
        False, "with --resume: go on although flags or data are not those of the state"
    )

    preview: bool = instead(
        False, "show the first sequences, with the tokens in the loss marked, and stop"
    )
    dry_run: bool = instead(
        False,
        "check flags, model, data, folder and memory, say what a run would be, and train nothing",
    )
    compare: bool = instead(False, "then train 16-bit LoRA from the same seed")
    adapter: Path | None = instead(None, "a trained adapter, for one of the following")
    prompt: str | None = instead(None, "a question to --adapter")
    merge: Path | None = instead(None, "write base and --adapter as one model in 16 bits")
    merge_4bit: Path | None = instead(
        None, "the same in 4 bits, which loses most of a small update"
    )

    def settings(self) -> dict[str, str]:
        """What a resumed run must have been started with."""
        return {
            each.name: str(getattr(self, each.name))
            for each in fields(self)
            if not each.metadata["free"]
        }


def parse_args(argv: list[str] | None = None, description: str | None = None) -> Options:
    """The options that a command line gives. Exits with one line and status 2 if it makes no sense."""
    parser = parser_of(Options, description)
    options = Options(**vars(read(parser, argv)))
    problem = wrong_combination(options) or unusable(options.device)
    if problem:
        parser.error(problem)
    if not options.num_train_epochs:
        options.max_steps = options.max_steps or STEPS
    options.dtype = pick_dtype(options.dtype, options.device)
    return options


def wrong_combination(options: Options) -> str | None:
    """What is wrong with flags that are right by themselves, and what to do; None if nothing is."""
    given = {each.name for each in fields(Options) if getattr(options, each.name) != each.default}
    together = "{} does nothing without {}: give both, or neither".format
    for one, other in [
        ("prompt", "adapter"),
        ("merge", "adapter"),
        ("merge_4bit", "adapter"),
        ("resume_anyway", "resume"),
    ]:
        if one in given and other not in given:
            return together(spelling(one), spelling(other))
    if "adapter" in given and not given & {"prompt", "merge", "merge_4bit"}:
        return "--adapter does nothing without --prompt, --merge or --merge-4bit: give one of them"
    if "shard" in given and not processes.launched():
        return "--shard shares a model out among processes: start them with torchrun --nproc-per-node N train.py --shard"
    if "adapter" in given and processes.launched():
        return "--adapter is for one process: leave torchrun out"
    if options.device.startswith("cuda:") and processes.launched():
        return f"--device {options.device} would be the same GPU for all processes: give --device cuda, and each takes its own"
    if "lora_start" in given and ("save_4bit" not in given or options.quant != "nf4"):
        return f"--lora-start {options.lora_start} changes the base: give --save-4bit FOLDER too, and --quant nf4"
    exclusive = [
        ("max_steps", "num_train_epochs"),
        ("group_by_length", "packing"),
        *(("prompt", name) for name in ("preview", "dry_run", "resume", "compare")),
    ]
    for one, other in exclusive:
        if {one, other} <= given:
            return f"{spelling(one)} and {spelling(other)} exclude each other: leave one out"
    if options.quant == "none":
        for name in {"block_size", "no_double_quant", "compare"} & given:
            return f"{spelling(name)} does nothing with --quant none, which is 16-bit LoRA: leave one out"
    if "resident_mb" in given and options.optim != "paged_adamw":
        return "--resident-mb is for --optim paged_adamw, whose state has pages: leave one out"
    return None


def unusable(device: str) -> str | None:
    """Why torch has no such device here, if it has not."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        return f"--device {device} cannot be used ({reason}): try cpu"
    return None
