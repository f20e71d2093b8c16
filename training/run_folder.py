"""Writes the output folder of a run: metrics, states, the plot of the loss, the adapter.

    metrics.jsonl                one line per step, appended during the run
    state-<step>.safetensors     --resume continues from it (state.py)
    loss.png                     drawn at the end and at each evaluation during training
    adapter_model.safetensors, adapter_config.json, generation_config.json

Only rank 0 writes.
"""

from __future__ import annotations  # type hints must not load the classes of transformers

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import transformers
from torch.optim import Optimizer
from tqdm import tqdm

from checkpoints import io
from checkpoints.peft_adapter import adapter_tensors, save_adapter
from data.dataset import Batch
from memory import measured
from training import distributed, end_tokens, report
from training.one_run import METRICS
from training.options import Options
from training.preflight import Job
from training.sharding import gather_full_tensors
from training.state import remove_old_files, save_state, state_tensors


class RunFolder:
    """The output folder of one run. All ranks must call each method, at the same point."""

    def __init__(
        self, args: Options, job: Job, model: transformers.PreTrainedModel, optimizer: Optimizer
    ) -> None:
        """Raises: ValueError if the folder cannot be written to or its disk lacks space."""
        self.args = args
        self.job = job
        self.model = model
        self.optimizer = optimizer
        self.path = args.output_dir
        self.metrics = self.path / METRICS
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        adapter_bytes = 4 * trainable
        state_bytes = 3 * adapter_bytes  # the adapter and both moments
        # A new adapter or state is written before the old one is removed.
        needed = 2 * adapter_bytes + (args.save_total_limit + 1) * state_bytes
        distributed.run_on_main(partial(io.prepare_folder, self.path, needed))

    def begin(self, start: int, before: list[float | None]) -> None:
        """Keep the states and the metrics of the first `start` steps, nothing later.

        At step 0, saves a state. before: the metrics of the pretrained model, saved in states.
        """
        self.before = before
        distributed.run_on_main(self._remove_leftovers)
        if start == 0:
            self.save_state(0)
        distributed.run_on_main(partial(report.keep_metrics, self.metrics, start))

    def _remove_leftovers(self) -> None:
        remove_old_files(self.path, self.job.state, self.args.save_total_limit)

    @contextmanager
    def progress(self, start: int) -> Iterator[Iterator[int]]:
        """Yields the steps from `start` on, with a progress bar, while metrics.jsonl is open."""
        self.bar = tqdm(
            range(start, self.args.max_steps),
            initial=start,
            total=self.args.max_steps,
            dynamic_ncols=True,
            mininterval=1,
            disable=not distributed.is_main(),
        )
        path = self.metrics if distributed.is_main() else os.devnull
        with open(path, "a", encoding="utf-8") as self.log_file:
            yield self._timed_steps()

    def _timed_steps(self) -> Iterator[int]:
        for step in self.bar:
            self.step_began = time.perf_counter()
            yield step

    def line(
        self, step: int, batches: list[Batch], loss: float, norm: float, lr: float
    ) -> dict[str, object]:
        """The line of metrics.jsonl about a step that has just ended."""
        line = {
            "step": step + 1,
            "loss": loss,
            "tokens": sum(int(batch.attention_mask.sum()) for batch in batches),
            "seconds": time.perf_counter() - self.step_began,
            "lr": lr,
            "grad_norm": norm,
            "rss_bytes": measured.rss_bytes(),
        }
        gpu_bytes = measured.peak_gpu_bytes(self.args.device)
        return line if gpu_bytes is None else line | {"peak_gpu_bytes": gpu_bytes}

    def log(self, line: dict) -> None:
        """Append one step to metrics.jsonl and show it in the progress bar."""
        self.log_file.write(json.dumps(line) + "\n")
        self.log_file.flush()
        tokens_per_second = line["tokens"] / line["seconds"]
        memory = f"{line['rss_bytes'] / 1e9:.2f} GB"
        if "peak_gpu_bytes" in line:
            memory = f"{line['peak_gpu_bytes'] / 1e9:.2f} GB of GPU memory"
        shown = f"loss {line['loss']:.4f}, {tokens_per_second:.0f} tokens/s, {memory}"
        self.bar.set_postfix_str(shown, refresh=False)
        if "eval" in line and distributed.is_main():
            self.bar.write(f"step {line['step']}: {self.job.task.metric} {line['eval'][0]:.4f}")
            self._plot()

    def _plot(self) -> None:
        report.plot_loss(self.metrics, self.path / "loss.png", self.job.task.metric)

    def save_state(self, step: int) -> None:
        """Save the state after `step`."""
        if step and distributed.is_main():
            os.fsync(self.log_file.fileno())  # the lines must reach the disk before the state
        tensors = state_tensors(self.model, self.optimizer)
        limit = self.args.save_total_limit
        save = partial(save_state, tensors, self.job.settings, step, self.before, self.path, limit)
        distributed.run_on_main(save)

    def save_adapter(self) -> None:
        """Write the adapter in PEFT's format, and draw the plot."""
        tensors = gather_full_tensors(adapter_tensors(self.model))
        distributed.run_on_main(partial(save_adapter, self.model, self.path, tensors))
        distributed.run_on_main(partial(end_tokens.save, self.model, self.path))
        distributed.run_on_main(self._plot)
