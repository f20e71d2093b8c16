"""Fine-tune a language model on a frozen 4-bit base.

The steps: load, quantize, adapt, train, evaluate, report.

python train.py                                    SmolLM2-135M learns to turn sentences into JSON
python train.py --data my.jsonl --model my/model   your data, your model
python train.py --adapter out --prompt "..."       use the result
torchrun --nproc-per-node 4 train.py               four processes, on as many GPUs or on none
python train.py --help                             all flags
"""

from __future__ import annotations  # type hints must not load the classes of transformers

import gc

from training.options import Options, parse_args

if __name__ == "__main__":
    parse_args(description=__doc__)  # answer --help and wrong flags before the slow imports
    gc.disable()  # the imports make a million objects, and hardly any garbage

import math
from functools import partial

from torch import nn
from torch.optim import Optimizer

from data.dataset import Batch
from training import distributed, end_tokens, sharding
from training.dtypes import dtype_table, resolve_device_and_dtype
from training.exit_status import exit_status
from training.loss_and_eval import LabelLoss, evaluate
from training.model import load_model, make_optimizer
from training.one_run import locked, remove_earlier_run
from training.preflight import Job, batches_of, describe, preflight, preview
from training.report import metrics_of, print_report, summarize, write_report
from training.run_folder import RunFolder
from training.state import StopAfterStep, load_state, seed_batch
from training.step_memory import StepMemory
from training.use_adapter import use_adapter


def main(argv: list[str] | None = None) -> int:
    """Run the program. Returns the exit status; an error is one line on stderr."""
    args = parse_args(argv, __doc__)
    resolve_device_and_dtype(args)
    return exit_status(partial(run, args), args, argv)


def run(args: Options) -> None:
    """Do what the flags ask for."""
    distributed.init_distributed(args.device)  # without torchrun: one process
    if args.adapter is not None:  # --prompt, --merge, --merge-4bit
        use_adapter(args)
    elif args.preview:
        print(preview(args))
    else:
        with locked(args.output_dir):  # no other run writes there
            plan_or_train(args)


def plan_or_train(args: Options) -> None:
    """Print the plan of --dry-run; else train, report, and with --compare train again."""
    if args.dry_run:
        print(describe(preflight(args), args))
        return
    report = finetune(args)
    write_report(report, args.output_dir)
    if args.compare:
        report["compare"] = metrics_of(finetune(args.in_16_bits()))
        write_report(report, args.output_dir)
    print_report(report, args.output_dir)


def finetune(args: Options) -> dict:
    """One run, from the base to its adapter in args.output_dir. Returns the report."""
    job = preflight(args)  # finds errors before a weight is read
    remove_earlier_run(args)  # only with --overwrite
    turn = distributed.local_rank() if args.shard else 0  # sharded: one by one, to save host memory
    model = distributed.all_or_none(partial(load_model, args, job.tokenizer), turn)
    end_tokens.add(model, job.task.ends)
    print(f"\n{dtype_table(model, args.dtype)}\n")
    optimizer = make_optimizer(model, args)
    folder = RunFolder(args, job, model, optimizer)
    if job.state:
        start, before = job.state.step, job.state.before
        load_state(model, optimizer, job.state)
    else:
        start = 0
        before = evaluate(model, job.tokenizer, job.task, args.batch_size, args.dtype, "before")
    folder.begin(start, before)
    memory = train(model, optimizer, job, start, folder, args)
    folder.save_adapter()
    after = evaluate(model, job.tokenizer, job.task, args.batch_size, args.dtype, "after")
    return summarize(args, job, model, optimizer, before, after, memory)


def train(
    model: nn.Module, optimizer: Optimizer, job: Job, start: int, folder: RunFolder, args: Options
) -> dict:
    """Take the steps start + 1 to args.max_steps.

    Returns the bytes of one step by component, predicted and measured.
    Raises: KeyboardInterrupt after a signal, once the state is saved.
    """
    losses = sharding.wrap_ddp(LabelLoss(model.train(), args.dtype))
    memory = StepMemory(model, optimizer, start, args)
    with StopAfterStep() as stop, folder.progress(start) as steps:
        for step in steps:
            lr = learning_rate(step, args)
            optimizer.param_groups[0]["lr"] = lr
            batches = batches_of(job, step, args)
            work = partial(train_step, losses, optimizer, batches, step, args)
            loss, norm = memory.measure(work, step, batches)
            line = folder.line(step, batches, loss, norm, lr)
            is_last = step + 1 == args.max_steps
            if is_due(step, args.eval_every) and not is_last:
                line["eval"] = evaluate(model, job.tokenizer, job.task, args.batch_size, args.dtype)
                model.train()
            folder.log(line)
            [stop_requested] = distributed.all_reduce_sum(stop.requested)  # all ranks stop together
            if is_due(step, args.save_every) or is_last or stop_requested:
                folder.save_state(step + 1)
            if stop_requested and not is_last:
                raise KeyboardInterrupt
    return memory.rows


def train_step(
    losses: nn.Module, optimizer: Optimizer, batches: list[Batch], step: int, args: Options
) -> tuple[float, float]:
    """Forward, backward and update. Each of N processes takes every Nth batch.

    `losses` maps a batch to the sum of its cross entropies. Returns the mean loss over all labels
    of the step, and the norm of the gradient.
    """
    world_size = distributed.world_size()
    n_labels = sum(batch.n_labels for batch in batches)
    mine = range(distributed.rank(), len(batches), world_size)
    loss = 0.0
    for number in mine:
        seed_batch(args.seed, step * len(batches) + number)
        with sharding.gradient_sync(losses, number == mine[-1]):
            # DDP and FSDP2 average the gradients over the processes. The factor world_size turns
            # the average into a sum.
            batch_loss = losses(batches[number].to(args.device)) / (n_labels / world_size)
            batch_loss.backward()
        loss += batch_loss.item() / world_size
    [loss] = distributed.all_reduce_sum(loss)
    norm = sharding.clip_grad_norm(optimizer.param_groups[0]["params"], args.max_grad_norm)
    if not math.isfinite(norm):
        raise ValueError(
            f"the gradient is not finite (loss {loss}): lower --lr or use --dtype float32"
        )
    optimizer.step()
    optimizer.zero_grad()
    return loss, norm


def learning_rate(step: int, args: Options) -> float:
    """Linear warm-up in the first tenth of the steps, then half a cosine to a tenth of --lr."""
    warm_up = max(1, args.max_steps // 10)
    if step < warm_up:
        return args.lr * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, args.max_steps - warm_up)
    return args.lr * (0.55 + 0.45 * math.cos(math.pi * progress))


def is_due(step: int, every: int) -> bool:
    """Whether an action with the period `every` (0: never) is due after this step."""
    return every > 0 and (step + 1) % every == 0


if __name__ == "__main__":
    gc.freeze()  # no collection looks at what was imported
    gc.enable()
    distributed.exit_process(main())
