"""Fine-tune a language model through a frozen 4-bit base: load, quantize, adapt, train, evaluate, report.

    python train.py                                    SmolLM2-135M learns to turn sentences into JSON orders
    python train.py --data my.jsonl --model my/model   your data, your model
    python train.py --adapter out --prompt "..."       ask the result
    python train.py --help                             the rest
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import checkpoint
import data
import export
import files
import memory
import packing
import plan
import pretrained
import report
import resume
import variants
from evaluate import label_loss, measure
from nf4 import normal_float
from options import QUANT, Options, parse_args
from paged_optim import PagedAdamW


def adapted_model(args: Options, quant: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base, frozen and quantized layer by layer as it is read, with adapters that start from the seed."""
    kept = args.save_4bit if args.resume else None  # the very base that the run had
    folder = kept or pretrained.find(args.model or pretrained.DEFAULT)
    tokenizer = pretrained.tokenizer_in(folder)
    codebook = normal_float(QUANT[quant]) if QUANT[quant] else None
    base = {"block_size": args.block_size, "double_quant": not args.no_double_quant, "codebook": codebook}
    adapter = {"r": args.lora_r}
    adapter |= {name: getattr(args, name) for name in ("lora_alpha", "lora_dropout", "use_rslora", "use_dora")}
    model = variants.adapted(folder, args.dtype, args.device, "default" if kept else args.lora_start, args.seed, adapter, base)
    model.name_or_path = args.model or str(folder)  # which the adapter's config will name
    if args.save_4bit:  # which is then what it names
        export.save_4bit(model, tokenizer, args.save_4bit)
    if args.grad_checkpoint:
        model.activation_checkpointing_enable()
    return model, tokenizer


def learning_rate(step: int, args: Options) -> float:
    """Linear warm-up over the first tenth of the steps, then half a cosine down to a tenth of --lr."""
    warm_up = max(1, args.max_steps // 10)
    if step < warm_up:
        return args.lr * (step + 1) / warm_up
    return args.lr * (0.55 + 0.45 * math.cos(math.pi * (step - warm_up) / max(1, args.max_steps - warm_up)))


def train_step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, batches: list[data.Batch],
               args: Options) -> tuple[float, float]:
    """Forward, backward and update; the loss is the mean over all labels of the step. -> loss, norm of the gradient"""
    labels, loss = sum(batch.n_labels for batch in batches), 0.0
    for batch in batches:
        share = label_loss(model, batch.to(args.device), args.dtype) / labels
        share.backward()
        loss += share.item()
    norm = torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], args.max_grad_norm).item()
    if not math.isfinite(norm):
        raise ValueError(f"the gradient is not finite (loss {loss}): lower --lr or use --dtype float32")
    optimizer.step()
    optimizer.zero_grad()
    return loss, norm


def train(model: PreTrainedModel, optimizer: torch.optim.Optimizer, examples: list[data.Example], pad_id: int, start: int,
          save: Callable[[int], None], metrics: Path, args: Options) -> None:
    """Steps start + 1 to max_steps, each a line in `metrics`. Raises: KeyboardInterrupt after a signal, the state saved."""
    model.train()
    bar = tqdm(range(start, args.max_steps), initial=start, total=args.max_steps, dynamic_ncols=True, mininterval=1)
    with resume.StopAfterStep() as stop, open(metrics, "a", encoding="utf-8") as log:
        for step in bar:
            began = time.perf_counter()
            batches = data.batches_of_step(examples, step, args.batch_size, args.grad_accum, args.seed, pad_id)
            optimizer.param_groups[0]["lr"] = lr = learning_rate(step, args)
            loss, norm = train_step(model, optimizer, batches, args)
            tokens, seconds = sum(int(b.attention_mask.sum()) for b in batches), time.perf_counter() - began
            line = {"step": step + 1, "loss": loss, "tokens": tokens, "seconds": seconds, "lr": lr, "grad_norm": norm,
                    "rss_bytes": memory.rss_bytes()}
            log.write(json.dumps(line) + "\n")
            log.flush()
            seen = f"loss {loss:.4f}, {tokens / seconds:.0f} tokens/s, {line['rss_bytes'] / 1e9:.2f} GB"
            bar.set_postfix_str(seen, refresh=False)
            last = step + 1 == args.max_steps
            if stop.asked or last or (args.save_every and (step + 1) % args.save_every == 0):
                os.fsync(log.fileno())  # a state must not outlive the lines before it
                save(step + 1)
            if stop.asked and not last:
                raise KeyboardInterrupt


def finetune(args: Options, quant: str, folder: Path) -> dict:
    """One run from the base to its adapter in `folder`. -> its report"""
    began = time.perf_counter()
    _, tokenizer, task, settings, state = plan.make(args, folder)
    model, _ = adapted_model(args, quant)
    if args.packing:
        packing.check(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    copies = 2 * 4 + (args.save_total_limit + 1) * 12  # bytes: adapter, and states with both moments, and a new one of each
    files.claim(folder, copies * sum(p.numel() for p in parameters))
    if args.optim == "paged_adamw":
        resident = None if args.resident_mb is None else int(args.resident_mb * 2**20)
        optimizer = PagedAdamW(parameters, weight_decay=0.0, resident_bytes=resident)
    else:
        optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    files.remove_unfinished(folder)
    metrics = folder / "metrics.jsonl"
    if state:
        start, before = state.step, state.before
        resume.load_state(model, optimizer, state)
        resume.keep_last(state.path, args.save_total_limit)  # a kill may have come between a save and that
    else:
        start, before = 0, measure(model, tokenizer, task, args.batch_size, args.dtype, "before")
        resume.forget(folder)
    report.keep_metrics(metrics, start)

    def save(step: int) -> None:
        resume.save(model, optimizer, settings, step, before, folder, args.save_total_limit)

    if not start:
        save(start)
    train(model, optimizer, task.train, tokenizer.eos_token_id, start, save, metrics, args)
    checkpoint.save_adapter(model, folder)
    report.plot_loss(metrics, folder / "loss.png")
    after = measure(model, tokenizer, task, args.batch_size, args.dtype, "after")
    pager = getattr(optimizer, "counters", dict.fromkeys(("hits", "faults", "evictions", "bytes_in", "bytes_out"), 0))
    return {
        "metric": task.metric, "quant": quant, "before": before[0], "after": after[0],
        "before_unseen": before[1], "after_unseen": after[1], **report.totals(metrics),
        "seconds_total": time.perf_counter() - began, "peak_rss_bytes": memory.peak_rss_bytes(),
        **memory.summary(model), "pager": dict(pager), "seed": args.seed,
    }


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv, __doc__)
    try:
        if args.adapter is not None:
            return export.use(args)
        if args.preview:
            _, tokenizer = pretrained.outline(args.model or pretrained.DEFAULT)
            task = data.load(args.data, tokenizer, args.max_seq_len, args.seed, args.train_on_prompt, args.packing)
            print(data.preview(task, tokenizer, sys.stdout.isatty()))
            return 0
        if args.dry_run:
            print(plan.describe(plan.make(args, args.output_dir), args, args.output_dir))
            return 0
        result = finetune(args, args.quant, args.output_dir)
        report.write_report(result, args.output_dir)
        if args.compare:
            args.lora_start, args.save_4bit = "default", None
            other = finetune(args, "none", args.output_dir / "16-bit")
            result["compare"] = {key: other[key] for key in ("before", "after", "before_unseen", "after_unseen")}
            report.write_report(result, args.output_dir)
        print(f"\n{report.table(result)}\n\nadapter, metrics and report are in {args.output_dir}/; ask it with\n"
              f"  {report.command(['--adapter', str(args.output_dir), '--prompt', 'your question'])}")
        return 0
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        again = report.command([word for word in (argv or sys.argv[1:]) if word != "--resume"] + ["--resume"])
        print(f"\nstopped; go on with\n  {again}" if resume.states(args.output_dir) else "\nstopped before anything was saved",
              file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
