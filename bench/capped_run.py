"""Training steps of a random Llama in a process that may use 48 GiB of the card.

The model is random (random_llama.py); the rest is as in train.py: adapters of rank 64 on every
linear layer, checkpointing, the loss at the labels, PagedAdamW.

One of the 48 GiB is left to CUDA's context and libraries; torch's tensors and the optimizer's pages
share the others. The prediction (memory/formula.py) decides beforehand how to split a batch into
passes that fit, and how much of AdamW's state may stay on the card, with 3 % to spare. The run
shows whether it was right.
"""

import gc
import time
from functools import partial

import torch
from torch import Tensor, nn

from bench import random_llama
from bench.peers import trainable
from bench.random_llama import TINY
from data.dataset import Batch
from memory.formula import OUTSIDE_TORCH, QLORA, SHAPES, Prediction, Shape, predict
from memory.measured import lasting_rows, ledger, measure_peak, on_gpu, uses_unified_memory
from paged_optim import PagedAdamW
from training.loss_and_eval import label_loss

CAP = 48 * 2**30  # bytes that the process may use of the card
SPARE = 0.97  # plan for this share of what torch's tensors and the pages may take
LENGTH = 512
RANK = 64
BATCHES = (1, 16)
PAGE = 2**21


class Plan:
    """How to train a batch in `room` bytes.

    size: sequences per pass. resident: bytes of AdamW's state on the device.
    """

    def __init__(self, shape: Shape, batch: int, length: int, room: int) -> None:
        """Halves the passes until they fit.

        Raises: ValueError if a single sequence does not fit.
        """
        self.batch = batch
        self.length = length
        self.size = batch
        while True:
            self.prediction = self._predict(shape)
            left = room - self.prediction.peak(paged=True)
            if left >= PAGE:
                break
            if self.size == 1:
                needed = room - left + PAGE
                raise ValueError(
                    f"a sequence of {length} tokens needs {needed} bytes, and there are {room}"
                )
            self.size //= 2
        self.resident = min(left, max(self.prediction.components["AdamW moments"], PAGE))

    def _predict(self, shape: Shape) -> Prediction:
        accumulating = self.size < self.batch
        return predict(shape, QLORA, self.size, self.length, RANK, accumulating=accumulating)

    @property
    def resident_moments(self) -> int:
        return min(self.resident, self.prediction.components["AdamW moments"])

    @property
    def peak(self) -> int:
        return self.prediction.peak(paged=True) + self.resident_moments

    def predicted(self) -> dict[str, int]:
        """Predicted bytes under the names of the ledger."""
        parts = self.prediction.components
        return {
            **lasting_rows(parts),
            "gradients": parts["gradients"],
            "AdamW moments": self.resident_moments,
            "peak": self.peak,
        }


def room(device: torch.device) -> int:
    """Bytes for torch's tensors and the pages: of 48 GiB, or of the card if it has less."""
    total = torch.cuda.get_device_properties(device).total_memory if on_gpu(device) else CAP
    return min(CAP, total) - OUTSIDE_TORCH


def train_step(model: nn.Module, optimizer: PagedAdamW, ids: Tensor, size: int) -> int:
    """One training step on ids (batch, length), `size` sequences per pass.

    Returns the bytes of the gradients. Raises: RuntimeError if a gradient is not finite.
    """
    batch, length = ids.shape
    n_labels = batch * (length - 1)
    for part in ids.split(size):
        loss = label_loss(model, Batch(part, torch.ones_like(part), part), torch.bfloat16)
        (loss / n_labels).backward()
    parameters = optimizer.param_groups[0]["params"]
    gradients = sum(parameter.grad.nbytes for parameter in parameters)
    norm = nn.utils.clip_grad_norm_(parameters, 0.3)
    if not norm.isfinite():
        raise RuntimeError(f"the gradient is not finite: {norm}")
    optimizer.step()
    optimizer.zero_grad()
    return gradients


def measure(shape: Shape, plan: Plan, device: torch.device) -> dict:
    """Runs three steps: one creates AdamW's moments, one measures memory, one is timed."""
    torch.manual_seed(0)
    model = random_llama.build(shape, RANK, device)
    optimizer = PagedAdamW(
        trainable(model),
        lr=1e-4,
        weight_decay=0.0,
        page_bytes=PAGE,
        resident_bytes=plan.resident,
    )
    ids = torch.randint(0, shape.vocabulary, (plan.batch, plan.length), device=device)
    work = partial(train_step, model, optimizer, ids, plan.size)
    if on_gpu(device):  # beyond this share torch raises OutOfMemoryError
        pages = plan.resident if uses_unified_memory(optimizer) else 0
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((room(device) - pages) / total)
    gradients = work()
    _, peak = measure_peak(work, model, optimizer, device)
    began = time.perf_counter()
    work()
    if on_gpu(device):
        torch.cuda.synchronize()
        torch.cuda.set_per_process_memory_fraction(1.0)
    seconds = time.perf_counter() - began
    return {
        **{name: row.bytes_now for name, row in ledger(model).items()},
        "gradients": gradients,
        "AdamW moments": optimizer.pager.peak,
        "peak": peak,
        "seconds": seconds,
        "tokens_per_second": ids.numel() / seconds,
        "pager": dict(optimizer.counters),
    }


def table(name: str, plan: Plan, result: dict | None) -> str:
    """Bytes by component: predicted, and measured if there was a run."""
    unit, size = ("GB", 1e9) if plan.peak > 1e9 else ("MB", 1e6)
    predicted = plan.predicted()
    lines = [f"{name}, {plan.batch} x {plan.length} tokens in passes of {plan.size}"]
    lines.append(f"{unit:24}{'predicted':>12}{'measured':>12}")
    for row, nbytes in predicted.items():
        measured = f"{result[row] / size:.3f}" if result else "-"
        lines.append(f"  {row:22}{nbytes / size:12.3f}{measured:>12}")
    if result:
        error = 100 * (predicted["peak"] / result["peak"] - 1)
        speed = f"{result['seconds']:.2f} s a step, {result['tokens_per_second']:.0f} tokens/s"
        lines.append(f"  predicted peak {error:+.1f} %; {speed}")
    return "\n".join(lines) + "\n"


def compare(name: str, batch: int, device: torch.device) -> dict:
    """One model and batch: predicted and, on a GPU or for the tiny model, measured; printed too."""
    tiny = name == "tiny"
    shape = TINY if tiny else SHAPES[name]
    length = 64 if tiny else LENGTH
    plan = Plan(shape, batch, length, int(SPARE * room(device)))
    result = measure(shape, plan, device) if on_gpu(device) or tiny else None
    gc.collect()  # frees the optimizer, which refers to itself, and its pages
    print("\n" + table(name, plan, result), end="", flush=True)
    return {
        "model": name,
        "batch": batch,
        "length": length,
        "passes_of": plan.size,
        "resident": plan.resident,
        "predicted": plan.predicted(),
        "measured": result,
    }
