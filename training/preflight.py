"""What a run will be, found out before a weight is loaded; `--dry-run` stops here and says it.

Weights take minutes to fetch, load and quantize, so whatever else can be wrong is looked at before them: the output folder, the
model's config and tokenizer, every row of the data, the state to resume from. A dry run does not look by itself: it is the
beginning of a real one, which prints its plan and ends.
"""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from checkpoints import io as files
from checkpoints import sources as pretrained
from data import chat_template as template
from data import dataset as data
from memory import formula
from training import distributed as processes
from training import state as resume
from training.options import Options


class Plan(NamedTuple):
    """What is known before the model is. settings: what a resumed run must share; state: what it goes on from."""

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    task: data.Task
    settings: dict[str, str]
    state: resume.State | None


def make(args: Options, folder: Path) -> Plan:
    """The plan of a run into `folder`; it sets args.max_steps where epochs are given.

    Raises: ValueError for a folder that takes no files, a model, data or state that cannot be read, and what does not fit.
    """
    files.claim(folder)
    config, tokenizer = pretrained.outline(args.model or pretrained.DEFAULT)
    context = getattr(config, "max_position_embeddings", None)
    if context and args.max_seq_len > context:
        raise ValueError(
            f"--max-seq-len {args.max_seq_len} is longer than the model's context of {context} tokens"
        )
    task = data.load(
        args.data, tokenizer, args.max_seq_len, args.seed, args.train_on_prompt, args.packing
    )
    batches = args.grad_accum * processes.world()
    if args.num_train_epochs:
        args.max_steps = max(
            1, round(args.num_train_epochs * len(task.train) / (args.batch_size * batches))
        )
    settings = args.settings() | {
        "batches a step (processes times --grad-accum)": str(batches),
        "data (a hash of its token ids)": template.fingerprint(task.train),
    }
    state = None
    if args.resume and (
        folder == args.output_dir or resume.states(folder)
    ):  # --compare may not have begun
        state = resume.newest(folder)
        resume.refuse_changes(state, settings, args.resume_anyway)
    return Plan(config, tokenizer, task, settings, state)


def describe(plan: Plan, args: Options, folder: Path) -> str:
    """The plan as text."""
    task, world, name = plan.task, processes.world(), args.model or pretrained.DEFAULT
    per_step = args.batch_size * args.grad_accum * world
    longest = max(len(example.ids) for example in task.train)
    seen = args.max_steps * per_step / len(task.train)
    start = (
        f"step {plan.state.step}, by {plan.state.path}" if plan.state else "the pretrained model"
    )
    return "\n".join(
        [
            f"model     {name}: {(plan.config.architectures or ['?'])[0]}, to be kept in "
            f"{'16 bits' if args.quant == 'none' else args.quant}",
            f"data      {args.data}: {len(task.train)} sequences to train on, the longest of {longest} tokens; "
            f"{len(task.test) + len(task.unseen)} held out",
            f"training  {args.max_steps} steps of {per_step} sequences, {seen:.2f} epochs, from {start}"
            + f"; {world} processes" * (world > 1),
            f"output    {folder}/ can be written; {shutil.disk_usage(folder).free / 1e9:.1f} GB are free",
            f"memory    {memory_of(plan.config, args, longest)}",
        ]
    )


def memory_of(config: PretrainedConfig, args: Options, length: int) -> str:
    """The peak of a step, predicted, beside what the device has."""
    total = device_bytes(args.device)
    has = f"; {args.device} has {total / 1e9:.2f} GB"
    predicted = formula.predict_step(
        config, step_settings(args), args.batch_size, length, args.grad_accum > 1
    )
    if predicted is None:
        known = f"{' and '.join(formula.KNOWN_MODELS)}, from dense weights, without biases or DoRA"
        return (
            f"not predicted: the ledger knows {known}, and this is another {config.model_type}{has}"
        )
    peak = predicted.peak()
    advice = (
        ", which is too little: see --batch-size, --max-seq-len, --grad-checkpoint"
        if peak > total
        else ""
    )
    return f"{peak / 1e9:.2f} GB at a step's peak, predicted{has}{advice}"


def step_settings(args: Options) -> formula.StepSettings:
    """The flags that the memory of a step depends on."""
    return formula.StepSettings(
        method=formula.LORA if args.quant == "none" else formula.QLORA,
        r=args.lora_r,
        checkpointing=args.grad_checkpoint,
        dropout=args.lora_dropout > 0,
        block_size=args.block_size,
        double_quant=not args.no_double_quant,
        width=args.dtype.itemsize,
        use_dora=args.use_dora,
    )


def device_bytes(device: str) -> int:
    """The memory of a GPU, or of this machine."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
