"""Fine-tune a language model through a frozen 4-bit base: load, quantize, adapt, train, evaluate, report.

    python train.py                                    SmolLM2-135M learns to turn sentences into JSON orders
    python train.py --data my.jsonl --model my/model   your data, your model
    python train.py --adapter out --prompt "..."       ask the result
    python train.py --help                             the rest
"""

import argparse
import json
import math
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import checkpoint
import data
import files
import memory
import packing
import pretrained
import report
import resume
from evaluate import answers, label_loss, measure, pick_dtype
from lora import attach
from nf4 import normal_float
from paged_optim import PagedAdamW

QUANT = {"nf4": 4, "nf3": 3, "nf2": 2, "none": 0}  # bits of the base's code; none leaves it in 16 bits
MAY_CHANGE = ("output_dir", "resume", "save_every", "compare", "adapter", "prompt", "optim", "resident_mb")  # on --resume


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help=f"a Hugging Face folder or hub id (default: {pretrained.DEFAULT}, from a Python package)")
    add("--data", default="orders", help="orders, text, roman, a .txt, .jsonl or .json file, or a hub id (default: orders)")
    add("--train-on-prompt", action="store_true", help="learn the questions too, not the answers alone")
    add("--packing", action="store_true", help="several examples a sequence, none of which sees another")
    add("--preview", action="store_true", help="show the first sequences, what is learnt in them marked, and stop")
    add("--output-dir", type=Path, default=Path("out"), help="where adapter, metrics and report go (default: out)")
    add("--max-steps", type=int, default=60, help="optimizer steps (default: 60)")
    add("--batch-size", type=int, default=4, help="sequences in one forward pass (default: 4)")
    add("--grad-accum", type=int, default=1, help="forward passes a step (default: 1)")
    add("--lr", type=float, default=1e-3, help="learning rate after warm-up (default: 1e-3)")
    add("--max-grad-norm", type=float, default=1.0, help="clip the gradient to this norm (default: 1)")
    add("--max-seq-len", type=int, default=256, help="tokens in the longest sequence (default: 256)")
    add("--lora-r", type=int, default=8, help="rank of the adapters (default: 8)")
    add("--lora-alpha", type=float, default=16, help="the update is scaled by alpha / r (default: 16)")
    add("--lora-dropout", type=float, default=0.0, help="dropout before the adapters (default: 0)")
    add("--quant", choices=QUANT, default="nf4", help="code of the frozen base (default: nf4; none: 16-bit LoRA)")
    add("--no-double-quant", action="store_true", help="keep the quantization constants in float32")
    add("--block-size", type=int, default=64, help="weights that share a constant (default: 64)")
    add("--optim", choices=["paged_adamw", "adamw"], default="paged_adamw", help="default: paged_adamw")
    add("--resident-mb", type=float, help="megabytes of optimizer state that may stay on the device (default: all)")
    add("--grad-checkpoint", action="store_true", help="keep only each block's input: less memory, more time")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help="of products (auto: bfloat16 if native)")
    add("--save-every", type=int, default=0, metavar="N", help="save the state every N steps (default: at the end)")
    add("--resume", action="store_true", help="go on from the state in --output-dir")
    add("--compare", action="store_true", help="then train 16-bit LoRA from the same seed")
    add("--adapter", type=Path, help="a trained adapter, to be asked with --prompt")
    add("--prompt", help="a question to --adapter")
    args = parser.parse_args(argv)
    for name in ("max_steps", "batch_size", "grad_accum", "lr", "max_seq_len", "max_grad_norm"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}")
    if (args.adapter is None) != (args.prompt is None):
        parser.error("--adapter and --prompt go together")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device} cannot be used: {str(error).partition(chr(10))[0]}")
    args.dtype = pick_dtype(args.dtype, args.device)
    return args


def adapted_model(args: argparse.Namespace, quant: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base, frozen and quantized layer by layer, with fresh adapters from the seed."""
    model, tokenizer = pretrained.load(args.model or pretrained.DEFAULT, args.dtype, args.device)
    context = getattr(model.config, "max_position_embeddings", None)
    if context and args.max_seq_len > context:
        raise ValueError(f"--max-seq-len {args.max_seq_len} is longer than the model's context of {context} tokens")
    torch.manual_seed(args.seed)
    started = time.perf_counter()
    codebook = normal_float(QUANT[quant]) if QUANT[quant] else None
    attach(model, r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout, block_size=args.block_size,
           double_quant=not args.no_double_quant, codebook=codebook)
    print(f"base {'kept in 16 bits' if codebook is None else f'quantized to {quant}'}, {time.perf_counter() - started:.1f} s")
    for parameter in model.parameters():  # what is left of the base lies in the mapped file; a copy lets the file go
        parameter.data = parameter.data.clone()
    if args.grad_checkpoint:
        model.activation_checkpointing_enable()
    return model, tokenizer


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up over the first tenth of the steps, then half a cosine down to a tenth of --lr."""
    warm_up = max(1, args.max_steps // 10)
    if step < warm_up:
        return args.lr * (step + 1) / warm_up
    return args.lr * (0.55 + 0.45 * math.cos(math.pi * (step - warm_up) / max(1, args.max_steps - warm_up)))


def train_step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, batches: list[data.Batch],
               args: argparse.Namespace) -> tuple[float, float]:
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


class StopAfterStep:
    """Ctrl-C and SIGTERM let the step in hand finish, so that what is saved is whole. A second one stops at once."""

    def __enter__(self) -> "StopAfterStep":
        self.asked = False
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(number, self.before[number])

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def train(model: PreTrainedModel, optimizer: torch.optim.Optimizer, examples: list[data.Example], pad_id: int, start: int,
          save: Callable[[int], None], metrics: Path, args: argparse.Namespace) -> None:
    """Steps start + 1 to max_steps, each a line in `metrics`. Raises: KeyboardInterrupt after a signal, the state saved."""
    model.train()
    bar = tqdm(range(start, args.max_steps), initial=start, total=args.max_steps, dynamic_ncols=True, mininterval=1)
    with StopAfterStep() as stop, open(metrics, "a", encoding="utf-8") as log:
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
                save(step + 1)
            if stop.asked and not last:
                raise KeyboardInterrupt


def finetune(args: argparse.Namespace, quant: str, folder: Path) -> dict:
    """One run from the base to its adapter in `folder`. -> its report"""
    began = time.perf_counter()
    files.claim(folder)
    model, tokenizer = adapted_model(args, quant)
    if args.packing:
        packing.check(model)
    task = data.load(args.data, tokenizer, args.max_seq_len, args.seed, args.train_on_prompt, args.packing)
    parameters = [p for p in model.parameters() if p.requires_grad]
    files.claim(folder, 32 * sum(p.numel() for p in parameters))  # adapter, and state with both moments, old and new
    if args.optim == "paged_adamw":
        resident = None if args.resident_mb is None else int(args.resident_mb * 2**20)
        optimizer = PagedAdamW(parameters, weight_decay=0.0, resident_bytes=resident)
    else:
        optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    state, metrics = folder / "state.safetensors", folder / "metrics.jsonl"
    settings = {key: str(value) for key, value in vars(args).items() if key not in MAY_CHANGE}
    if args.resume and (state.exists() or folder == args.output_dir):
        start, before = resume.load_state(model, optimizer, settings, state)
    else:
        start, before = 0, measure(model, tokenizer, task, args.batch_size, args.dtype, "before")
        state.unlink(missing_ok=True)
    report.keep_metrics(metrics, start)

    def save(step: int) -> None:
        resume.save_state(model, optimizer, settings, step, before, state)

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


def ask(args: argparse.Namespace) -> None:
    """Answer --prompt with --adapter on the 4-bit base that it was trained on."""
    base = args.model or checkpoint.read_config(args.adapter)["base_model_name_or_path"] or pretrained.DEFAULT
    model, tokenizer = pretrained.load(base, args.dtype, args.device)
    checkpoint.load_adapter(model, args.adapter)
    print(answers(model, tokenizer, [data.chat(tokenizer, args.prompt)], args.max_seq_len, args.dtype)[0])


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        if args.prompt is not None:
            ask(args)
            return 0
        if args.preview:
            tokenizer = pretrained.load_tokenizer(args.model or pretrained.DEFAULT)
            task = data.load(args.data, tokenizer, args.max_seq_len, args.seed, args.train_on_prompt, args.packing)
            print(data.preview(task, tokenizer, sys.stdout.isatty()))
            return 0
        result = finetune(args, args.quant, args.output_dir)
        report.write_report(result, args.output_dir)
        if args.compare:
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
        saved = (args.output_dir / "state.safetensors").exists()
        print(f"\nstopped; go on with\n  {again}" if saved else "\nstopped: no step to save", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
