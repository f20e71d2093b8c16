"""Fine-tune a language model through a frozen 4-bit base: load, quantize, adapt, train, evaluate, report.

python train.py                                    SmolLM2-135M learns to turn sentences into JSON orders
python train.py --data my.jsonl --model my/model   your data, your model
python train.py --adapter out --prompt "..."       ask the result
torchrun --nproc-per-node 4 train.py               four processes, on as many GPUs or on none
python train.py --help                             the rest
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from checkpoints import base_model, checkpoint
from checkpoints import io as files
from checkpoints import sources as pretrained
from data import dataset as data
from data import packing
from memory import measured as memory
from nf4 import normal_float
from paged_optim import PagedAdamW
from training import distributed as processes
from training import dtypes as precision
from training import preflight as plan
from training import report
from training import sharding as parallel
from training import state as resume
from training import use_adapter as export
from training.loss_and_eval import LabelLoss, measure
from training.options import QUANT, Options, parse_args


def adapted_model(args: Options, quant: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base, frozen and quantized layer by layer as it is read, with adapters that start from the seed.

    With --shard it is read into the host's memory, and goes to the device once it is only this process's share.
    """
    kept = args.save_4bit if args.resume else None  # the very base that the run had
    folder = kept or pretrained.find(args.model or pretrained.DEFAULT)
    tokenizer = pretrained.tokenizer_in(folder)
    codebook = normal_float(QUANT[quant]) if QUANT[quant] else None
    base = {
        "block_size": args.block_size,
        "double_quant": not args.no_double_quant,
        "codebook": codebook,
    }
    adapter = {"r": args.lora_r}
    adapter |= {
        name: getattr(args, name)
        for name in ("lora_alpha", "lora_dropout", "use_rslora", "use_dora")
    }
    device = "cpu" if args.shard else args.device
    model = base_model.load_with_adapters(
        folder, args.dtype, device, "default" if kept else args.lora_start, args.seed, adapter, base
    )
    model.name_or_path = args.model or str(folder)  # which the adapter's config will name
    if args.save_4bit and processes.first():  # which is then what it names
        export.save_4bit(model, tokenizer, args.save_4bit)
    if args.packing:
        packing.check(model)
    if args.grad_checkpoint:
        model.activation_checkpointing_enable()
    if args.shard:
        parallel.shard(model, args.device)
    return model, tokenizer


def learning_rate(step: int, args: Options) -> float:
    """Linear warm-up over the first tenth of the steps, then half a cosine down to a tenth of --lr."""
    warm_up = max(1, args.max_steps // 10)
    if step < warm_up:
        return args.lr * (step + 1) / warm_up
    return args.lr * (
        0.55 + 0.45 * math.cos(math.pi * (step - warm_up) / max(1, args.max_steps - warm_up))
    )


def train_step(
    losses: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[data.Batch],
    step: int,
    args: Options,
) -> tuple[float, float]:
    """Forward, backward and update, on every Nth batch if there are N processes.

    losses: a batch -> the sum of its losses. -> the mean loss over all labels of the step, and the norm of the gradient
    """
    labels, world, loss = sum(batch.n_labels for batch in batches), processes.world(), 0.0
    mine = range(processes.rank(), len(batches), world)
    for number in mine:
        resume.reseed(args.seed, step * len(batches) + number)
        with parallel.sending(losses, number == mine[-1]):
            share = losses(batches[number].to(args.device)) / (
                labels / world
            )  # of which the gradients are averaged
            share.backward()
        loss += share.item() / world
    norm, (loss,) = (
        parallel.clip_gradients(optimizer.param_groups[0]["params"], args.max_grad_norm),
        processes.total(loss),
    )
    if not math.isfinite(norm):
        raise ValueError(
            f"the gradient is not finite (loss {loss}): lower --lr or use --dtype float32"
        )
    optimizer.step()
    optimizer.zero_grad()
    return loss, norm


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    task: data.Task,
    start: int,
    save: Callable[[int], None],
    metrics: Path,
    args: Options,
) -> dict[str, dict[str, int | None]]:
    """Steps start + 1 to max_steps, each a line in `metrics`. -> what a step took, if there was one (memory/measured.py)

    Raises: KeyboardInterrupt after a signal, the state saved.
    """
    losses, world = parallel.parallel(LabelLoss(model.train(), args.dtype)), processes.world()
    weighed, weights = (
        min(start + 1, args.max_steps - 1),
        {},
    )  # the second step, in which AdamW has its moments, if it comes
    bar = tqdm(
        range(start, args.max_steps),
        initial=start,
        total=args.max_steps,
        dynamic_ncols=True,
        mininterval=1,
        disable=not processes.first(),
    )
    with (
        resume.StopAfterStep() as stop,
        open(metrics if processes.first() else os.devnull, "a", encoding="utf-8") as log,
    ):
        for step in bar:
            began = time.perf_counter()
            batches = data.batches_of_step(
                task.train,
                step,
                args.batch_size,
                args.grad_accum * world,
                args.seed,
                tokenizer.eos_token_id,
                args.group_by_length,
            )
            optimizer.param_groups[0]["lr"] = lr = learning_rate(step, args)
            work = partial(train_step, losses, optimizer, batches, step, args)
            if step == weighed and not args.shard:
                (loss, norm), weights = memory.measure_step(
                    work,
                    model,
                    optimizer,
                    batches[processes.rank() :: world],
                    plan.step_settings(args),
                    world,
                )
            else:
                loss, norm = work()
            tokens, seconds = (
                sum(int(b.attention_mask.sum()) for b in batches),
                time.perf_counter() - began,
            )
            line = {
                "step": step + 1,
                "loss": loss,
                "tokens": tokens,
                "seconds": seconds,
                "lr": lr,
                "grad_norm": norm,
                "rss_bytes": memory.rss_bytes(),
            }
            last = step + 1 == args.max_steps
            if args.eval_every and (step + 1) % args.eval_every == 0 and not last:
                line["eval"] = measure(model, tokenizer, task, args.batch_size, args.dtype)
                bar.write(f"step {step + 1}: {task.metric} {line['eval'][0]:.4f}")
                model.train()
            log.write(json.dumps(line) + "\n")
            log.flush()
            if "eval" in line and processes.first():
                report.plot_loss(metrics, metrics.with_name("loss.png"), task.metric)
            seen = f"loss {loss:.4f}, {tokens / seconds:.0f} tokens/s, {line['rss_bytes'] / 1e9:.2f} GB"
            bar.set_postfix_str(seen, refresh=False)
            (asked,) = processes.total(stop.asked)  # of any process: all stop after the same step
            if asked or last or (args.save_every and (step + 1) % args.save_every == 0):
                if processes.first():
                    os.fsync(log.fileno())  # a state must not outlive the lines before it
                save(step + 1)
            if asked and not last:
                raise KeyboardInterrupt
    return weights


def finetune(args: Options, quant: str, folder: Path) -> dict:
    """One run from the base to its adapter in `folder`. -> its report"""
    began = time.perf_counter()
    number = processes.local_rank()
    planned = processes.together(
        lambda: plan.make(args, folder), turn=min(number, 1)
    )  # the first may fetch the model
    _, tokenizer, task, settings, state = planned
    processes.refuse_differences(settings | {"step to go on from": state.step if state else 0})
    model, _ = processes.together(
        lambda: adapted_model(args, quant), turn=number if args.shard else 0
    )
    print(f"\n{precision.table(model, args.dtype)}\n")
    parameters = [p for p in model.parameters() if p.requires_grad]
    copies = (
        2 * 4 + (args.save_total_limit + 1) * 12
    )  # bytes: adapter, and states with both moments, and a new one of each
    processes.in_first(lambda: files.claim(folder, copies * sum(p.numel() for p in parameters)))
    if args.optim == "paged_adamw":
        resident = None if args.resident_mb is None else int(args.resident_mb * 2**20)
        optimizer = PagedAdamW(parameters, weight_decay=0.0, resident_bytes=resident)
    else:
        optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    if state:
        start, before = state.step, state.before
        resume.load_state(model, optimizer, state)
    else:
        start, before = 0, measure(model, tokenizer, task, args.batch_size, args.dtype, "before")
    metrics = folder / "metrics.jsonl"
    processes.in_first(
        lambda: (
            resume.tidy(folder, state, args.save_total_limit),
            report.keep_metrics(metrics, start),
        )
    )

    def save(step: int) -> None:
        tensors = resume.tensors_of(model, optimizer)
        processes.in_first(
            lambda: resume.save(tensors, settings, step, before, folder, args.save_total_limit)
        )

    if not start:
        save(start)
    weights = train(model, tokenizer, optimizer, task, start, save, metrics, args)
    adapter = parallel.whole(checkpoint.adapter_tensors(model))
    processes.in_first(
        lambda: (
            checkpoint.save_adapter(model, folder, adapter),
            report.plot_loss(metrics, folder / "loss.png", task.metric),
        )
    )
    after = measure(model, tokenizer, task, args.batch_size, args.dtype, "after")
    pager = getattr(
        optimizer,
        "counters",
        dict.fromkeys(("hits", "faults", "evictions", "bytes_in", "bytes_out"), 0),
    )
    return {
        "processes": processes.world(),
        "model_bytes_per_process": parallel.bytes_here(model),
        "metric": task.metric,
        "quant": quant,
        "before": before[0],
        "after": after[0],
        "before_unseen": before[1],
        "after_unseen": after[1],
        **report.totals(metrics),
        "seconds_total": time.perf_counter() - began,
        "peak_rss_bytes": memory.peak_rss_bytes(),
        **memory.summary(model),
        "memory": weights,
        "pager": dict(pager),
        "seed": args.seed,
    }


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv, __doc__)
    processes.begin(args.device)
    args.resume |= processes.attempt() > 0 and bool(
        resume.states(args.output_dir)
    )  # torchrun has started us anew
    try:
        if args.adapter is not None:
            return export.use(args)
        if args.preview:
            _, tokenizer = pretrained.outline(args.model or pretrained.DEFAULT)
            task = data.load(
                args.data,
                tokenizer,
                args.max_seq_len,
                args.seed,
                args.train_on_prompt,
                args.packing,
            )
            print(data.preview(task, tokenizer, sys.stdout.isatty()))
            return 0
        if args.dry_run:
            print(plan.describe(plan.make(args, args.output_dir), args, args.output_dir))
            return 0
        result = finetune(args, args.quant, args.output_dir)
        processes.in_first(lambda: report.write_report(result, args.output_dir))
        if args.compare:
            args.lora_start, args.save_4bit = "default", None
            other = finetune(args, "none", args.output_dir / "16-bit")
            result["compare"] = {
                key: other[key] for key in ("before", "after", "before_unseen", "after_unseen")
            }
            processes.in_first(lambda: report.write_report(result, args.output_dir))
        print(
            f"\n{report.table(result)}\n\nadapter, metrics and report are in {args.output_dir}/; ask it with\n"
            f"  {report.command(['--adapter', str(args.output_dir), '--prompt', 'your question'])}"
        )
        return 0
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, RuntimeError) as error:
        lost = processes.lost_another(error)
        if not lost and isinstance(error, RuntimeError):
            raise
        words = [word for word in (argv or sys.argv[1:]) if word != "--resume"] + ["--resume"]
        again = f"; go on with\n  {report.command(words, processes.on_this_machine())}"
        rest = again if resume.states(args.output_dir) else " before anything was saved"
        if lost or processes.first():
            print(f"\n{lost or 'stopped'}{rest}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    processes.leave(main())
