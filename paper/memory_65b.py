"""LLaMA-65B on one card of 48 GB (paper, figure 6): real training steps on its shapes, and their peak by component.

    python paper/memory_65b.py                 7B, 13B, 33B and 65B, batch 1 and 16: measured on a GPU, else only predicted
    python paper/memory_65b.py --model tiny    the same steps of a model so small that a CPU does them in a second

The model is random (random_llama.py) and the rest as in train.py: adapters of rank 64 on every linear layer, checkpointing, the
loss at the labels, PagedAdamW.

The card may be larger; the process is held to 48 GiB of it. One of these is left to CUDA's context and libraries, the others
torch's tensors and the optimizer's pages share. The ledger (predict.py) says beforehand how to split a batch into passes that
fit, and how much of AdamW's state may stay on the card, with 3 % to spare; the run shows whether it was right.
"""

import argparse
import gc
import json
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench import random_llama
from data import dataset as data
from memory import formula as predict
from memory import measured as memory
from memory.formula import QLORA, Prediction, Shape
from memory.weigh import is_managed, on_gpu, peak_of
from paged_optim import PagedAdamW
from training.loss_and_eval import label_loss

CAP = 48 * 2**30  # bytes: what the process may use of the card
SPARE = 0.97  # of what torch's tensors and the pages may take, this much is planned for
LENGTH, RANK, BATCHES = 512, 64, (1, 16)
PAGE = 2**21
TINY = Shape(
    layers=3, hidden=64, intermediate=176, heads=4, kv_heads=4, head_dim=16, vocabulary=500
)


class Plan:
    """How to train a batch in `room` bytes: in passes of `size` sequences, `resident` bytes of AdamW's state on the device."""

    def __init__(self, shape: Shape, batch: int, length: int, room: int) -> None:
        """Raises: ValueError if not even one sequence fits."""
        self.batch, self.length, self.size = batch, length, batch
        while (left := room - self.predicted(shape).peak(paged=True)) < PAGE:
            if self.size == 1:
                raise ValueError(
                    f"a sequence of {length} tokens needs {room - left + PAGE} bytes, and there are {room}"
                )
            self.size //= 2
        self.prediction = self.predicted(shape)
        self.resident = min(left, max(self.prediction.components["AdamW moments"], PAGE))

    def predicted(self, shape: Shape) -> Prediction:
        return predict.predict(
            shape, QLORA, self.size, self.length, RANK, accumulating=self.size < self.batch
        )

    @property
    def peak(self) -> int:
        return self.prediction.peak(paged=True) + min(
            self.resident, self.prediction.components["AdamW moments"]
        )


def step(model: nn.Module, optimizer: PagedAdamW, ids: torch.Tensor, size: int) -> int:
    """One training step on ids (batch, length), `size` sequences at a time. -> bytes of gradients"""
    for part in ids.split(size):
        batch = data.Batch(part, torch.ones_like(part), part)
        (label_loss(model, batch, torch.bfloat16) / (len(ids) * (ids.shape[1] - 1))).backward()
    parameters = optimizer.param_groups[0]["params"]
    gradients = sum(parameter.grad.nbytes for parameter in parameters)
    norm = torch.nn.utils.clip_grad_norm_(parameters, 0.3)
    if not norm.isfinite():
        raise RuntimeError(f"the gradient is not finite: {norm}")
    optimizer.step()
    optimizer.zero_grad()
    return gradients


def room(device: torch.device) -> int:
    """What torch's tensors and the pages may take: of the card, or of 48 GiB if it has more."""
    total = torch.cuda.get_device_properties(device).total_memory if on_gpu(device) else CAP
    return min(CAP, total) - memory.OUTSIDE


def measure(shape: Shape, plan: Plan, device: torch.device) -> dict:
    """Three steps: the first makes AdamW's moments, the second is held against the ledger, the third is timed."""
    torch.manual_seed(0)
    model = random_llama.build(shape, RANK, device)
    optimizer = PagedAdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=1e-4,
        weight_decay=0.0,
        page_bytes=PAGE,
        resident_bytes=plan.resident,
    )
    ids = torch.randint(0, shape.vocabulary, (plan.batch, plan.length), device=device)
    work = partial(step, model, optimizer, ids, plan.size)
    if on_gpu(device):  # more than that raises torch's OutOfMemoryError
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(
            (room(device) - plan.resident * is_managed(optimizer)) / total
        )
    gradients = work()
    (_, peak), began = peak_of(work, model, optimizer, device), time.perf_counter()
    work()
    if on_gpu(device):
        torch.cuda.synchronize()
        torch.cuda.set_per_process_memory_fraction(1.0)
    seconds = time.perf_counter() - began
    lasting = {name: row.bytes_now for name, row in memory.ledger(model).items()}
    return {
        **lasting,
        "gradients": gradients,
        "AdamW moments": optimizer.pager.peak,
        "peak": peak,
        "seconds": seconds,
        "tokens_per_second": ids.numel() / seconds,
        "pager": dict(optimizer.counters),
    }


def predicted(plan: Plan) -> dict:
    """The ledger's side, by the same names."""
    parts = plan.prediction.components
    return {
        "linear layers": parts["base"] + parts["constants"],
        "embedding, head": parts["embedding, head"],
        "norms, biases": parts["norms"],
        "adapters": parts["adapters"],
        "gradients": parts["gradients"],
        "AdamW moments": min(plan.resident, parts["AdamW moments"]),
        "peak": plan.peak,
    }


def table(name: str, plan: Plan, result: dict | None) -> str:
    """Predicted and, if there was a run, measured bytes, by component."""
    unit, size = ("GB", 1e9) if plan.peak > 1e9 else ("MB", 1e6)
    lines = [f"{name}, {plan.batch} x {plan.length} tokens in passes of {plan.size}"]
    lines += [f"{unit:24}{'predicted':>12}{'measured':>12}"]
    for row, nbytes in predicted(plan).items():
        measured = f"{result[row] / size:12.3f}" if result else f"{'-':>12}"
        lines.append(f"  {row:22}{nbytes / size:12.3f}{measured}")
    if result:
        off, speed = (
            100 * (predicted(plan)["peak"] / result["peak"] - 1),
            result["tokens_per_second"],
        )
        lines.append(
            f"  predicted peak {off:+.1f} %; {result['seconds']:.2f} s a step, {speed:.0f} tokens/s"
        )
    return "\n".join(lines) + "\n"


def compare(name: str, batch: int, device: torch.device) -> dict:
    """One row: predicted and, on a GPU or for the tiny model, measured; printed as it is found."""
    shape, length = {"tiny": TINY, **predict.SHAPES}[name], 64 if name == "tiny" else LENGTH
    plan = Plan(shape, batch, length, int(SPARE * room(device)))
    result = measure(shape, plan, device) if on_gpu(device) or name == "tiny" else None
    gc.collect()  # the optimizer, which refers to itself, and its pages
    print("\n" + table(name, plan, result), end="", flush=True)
    return {
        "model": name,
        "batch": batch,
        "length": length,
        "passes_of": plan.size,
        "resident": plan.resident,
        "predicted": predicted(plan),
        "measured": result,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", choices=["tiny", *predict.SHAPES], nargs="*", default=list(predict.SHAPES)
    )
    parser.add_argument(
        "--json", type=Path, default=Path(__file__).with_suffix(".json"), help="where the bytes go"
    )
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    card = torch.cuda.get_device_name(device) if on_gpu(device) else None
    print(card or "no GPU here: the models of the paper are predicted, not measured")
    try:
        rows = [compare(name, batch, device) for name in args.model for batch in BATCHES]
    except ValueError as error:
        print(f"memory_65b.py: {error}", file=sys.stderr)
        return 1
    args.json.write_text(json.dumps({"card": card, "cap": CAP, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
