"""Checks all that can be checked before a weight is read; --dry-run prints the result and exits.

Weights take minutes to download, load and quantize. So the output folder, the model's config and
tokenizer, every row of the data and the state to resume from are checked first. A dry run is the
beginning of a real run: it has no checks of its own.
"""

from __future__ import annotations  # type hints must not load the classes of transformers

import datetime
import os
import shutil
import sys
import time
from functools import partial
from typing import NamedTuple

import torch
import transformers

from checkpoints import sources
from data import dataset
from data.chat_template import fingerprint
from data.rendering import today
from memory import formula
from training import distributed, one_run
from training.base_check import check_base, ids_of, require_known_ids
from training.model import adopt_settings, base_folder, check_init_adapter
from training.options import Options
from training.state import State, latest_state, require_same_settings, saved_states


class Job(NamedTuple):
    """What is known of a run before its model is loaded.

    settings: what must be the same in a resumed run.
    state: the state to resume from, or None.
    started: time.perf_counter() at the start of the run.
    """

    config: transformers.PretrainedConfig
    tokenizer: transformers.PreTrainedTokenizerBase
    task: dataset.Task
    settings: dict[str, str]
    state: State | None
    started: float


def preflight(args: Options) -> Job:
    """Check folder, model, data and state.

    Sets args.max_steps if epochs are given, and the flags that describe a base in 4 bits.

    Raises: ValueError if the folder cannot be written to; if the model, the data or the state
    cannot be read; if settings contradict each other; if ranks see different data or states.
    """
    if distributed.restart_count() > 0 and saved_states(args.output_dir):  # by torchrun
        args.resume = True
        args.overwrite = False  # the first attempt has removed the earlier run
    turn = min(distributed.local_rank(), 1)  # the first process on a machine may download the model
    job = distributed.all_or_none(partial(_check, args), turn)
    step = job.state.step if job.state else 0
    distributed.require_same_on_all(job.settings | {"step to resume from": step})
    return job


def _check(args: Options) -> Job:
    started = time.perf_counter()
    one_run.check_folder(args)
    adopt_settings(args)
    name = args.model or sources.DEFAULT_MODEL
    config, tokenizer = sources.load_config_and_tokenizer(name)
    context = getattr(config, "max_position_embeddings", None)
    if context and args.max_seq_len > context:
        raise ValueError(
            f"--max-seq-len {args.max_seq_len} is longer than the model's context of {context} "
            "tokens"
        )
    state = latest_state(args.output_dir) if args.resume else None
    task = _load_task(args, tokenizer, _date_of(state))
    if args.dry_run and sources.find_local_model(name) is None:
        rows = config.get_text_config().vocab_size
        require_known_ids(ids_of(task), rows, tokenizer, name)
    else:
        check_init_adapter(args)
        check_base(*base_folder(args), args, task, tokenizer)
    batches = args.grad_accum * distributed.world_size()
    if args.num_train_epochs:
        steps_per_epoch = len(task.train) / (args.batch_size * batches)
        args.max_steps = max(1, round(args.num_train_epochs * steps_per_epoch))
    settings = args.settings() | {
        "batches a step (processes times --grad-accum)": str(batches),
        "data (a hash of its token ids)": fingerprint(task.train),
    }
    if state:
        require_same_settings(state, settings, args.resume_anyway)
    if task.date:
        settings["date"] = str(task.date)
    return Job(config, tokenizer, task, settings, state, started)


def _date_of(state: State | None) -> datetime.date:
    """The date for a chat template that prints one: a resumed run keeps the date of its start.

    Raises: ValueError if the date in the state is not one.
    """
    if state is None or "date" not in state.settings:
        return today()
    return datetime.date.fromisoformat(state.settings["date"])


def _load_task(
    args: Options,
    tokenizer: transformers.PreTrainedTokenizerBase,
    date: datetime.date | None = None,
) -> dataset.Task:
    return dataset.load_task(
        args.data, tokenizer, args.max_seq_len, args.train_on_prompt, args.packing, date
    )


def preview(args: Options) -> str:
    """The first sequences of the data as text, with the tokens in the loss marked."""
    adopt_settings(args)
    _, tokenizer = sources.load_config_and_tokenizer(args.model or sources.DEFAULT_MODEL)
    return dataset.preview(_load_task(args, tokenizer), tokenizer, sys.stdout.isatty())


def batches_of(job: Job, step: int, args: Options) -> list[dataset.Batch]:
    """The batches of one step, of all processes. They depend on the step and the seed alone."""
    return dataset.batches_of_step(
        job.task.train,
        step,
        args.batch_size,
        args.grad_accum * distributed.world_size(),
        args.seed,
        job.tokenizer.eos_token_id,
        args.group_by_length,
    )


def describe(job: Job, args: Options) -> str:
    """The job as text, for --dry-run."""
    task = job.task
    world_size = distributed.world_size()
    name = args.model or sources.DEFAULT_MODEL
    architecture = (job.config.architectures or ["?"])[0]
    kept = "16 bits" if args.quant == "none" else args.quant
    unseen = "" if sources.find_local_model(name) else "; its weights are not here to be checked"
    longest = max(len(example.ids) for example in task.train)
    per_step = args.batch_size * args.grad_accum * world_size
    epochs = args.max_steps * per_step / len(task.train)
    adapter = f"the adapter in {args.init_adapter}" if args.init_adapter else "the pretrained model"
    start = f"step {job.state.step}, by {job.state.path}" if job.state else adapter
    processes = f"; {world_size} processes" if world_size > 1 else ""
    free = shutil.disk_usage(args.output_dir).free
    held_out = len(task.test) + len(task.unseen)
    lines = {
        "model": f"{name}: {architecture}, to be kept in {kept}{unseen}",
        "data": f"{args.data}: {len(task.train)} sequences to train on, "
        f"the longest of {longest} tokens; {held_out} held out",
        "training": f"{args.max_steps} steps of {per_step} sequences, {epochs:.2f} epochs, "
        f"from {start}{processes}",
        "output": f"{args.output_dir}/ can be written; {free / 1e9:.1f} GB are free",
        "memory": describe_memory(job.config, args, longest),
    }
    return "\n".join(f"{what:10}{text}" for what, text in lines.items())


def describe_memory(config: transformers.PretrainedConfig, args: Options, length: int) -> str:
    """The predicted peak of a step, and the memory of the device."""
    available = device_bytes(args.device)
    device = f"{args.device} has {available / 1e9:.2f} GB"
    accumulating = args.grad_accum > 1
    predicted = formula.predict_step(
        config, step_settings(args), args.batch_size, length, accumulating
    )
    if predicted is None:
        known = " and ".join(formula.KNOWN_MODELS)
        return (
            f"not predicted: the formula covers {known}, from dense weights, without biases or "
            f"DoRA, and not this {config.model_type}; {device}"
        )
    peak = predicted.peak()
    advice = ""
    if peak > available:
        advice = ", which is too little: see --batch-size, --max-seq-len, --grad-checkpoint"
    return f"{peak / 1e9:.2f} GB at a step's peak, predicted; {device}{advice}"


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
