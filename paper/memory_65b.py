"""LLaMA-65B on one card of 48 GB (paper, figure 6): real training steps on its shapes, and their peak by component.

    python paper/memory_65b.py                 7B, 13B, 33B and 65B, batch 1 and 16: measured on a GPU, else only predicted
    python paper/memory_65b.py --model tiny    the same steps of a model so small that a CPU does them in a second

The weights are random bytes: a weight in 4 bits is nothing else, and memory does not care which. So no dense layer ever
exists, not even while the model is made. The rest is as in train.py: adapters of rank 64 on every linear layer, checkpointing,
the loss at the labels, PagedAdamW.

The card may be larger; the process is held to 48 GiB of it. One of these is left to CUDA's context and libraries, the others
torch's tensors and the optimizer's pages share. The ledger (predict.py) says beforehand how to split a batch into passes that
fit, and how much of AdamW's state may stay on the card, with 3 % to spare; the run shows whether it was right.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import memory
import predict
from double_quant import DoubleQuantized
from evaluate import label_loss
from frozen import FrozenWeight
from lora import QLoRALinear
from nf4 import NF4, Quantized
from paged_optim import PagedAdamW
from predict import QLORA, Prediction, Shape
from stores import Managed

CAP = 48 * 2**30  # bytes: what the process may use of the card
ROOM = CAP - memory.OUTSIDE  # for tensors and pages
SPARE = 0.97  # of it is planned for
LENGTH, RANK, BATCHES = 512, 64, (1, 16)
PAGE = 2**21
TINY = Shape(layers=3, hidden=64, intermediate=176, heads=4, kv_heads=4, head_dim=16, vocabulary=500)


class Plan:
    """How to train a batch in `room` bytes: in passes of `size` sequences, `resident` bytes of AdamW's state on the device."""

    def __init__(self, shape: Shape, batch: int, length: int, room: int) -> None:
        """Raises: ValueError if not even one sequence fits."""
        self.batch, self.size = batch, batch
        while (left := room - self.predicted(shape, length).peak(paged=True)) < PAGE:
            if self.size == 1:
                raise ValueError(f"a sequence of {length} tokens needs {room - left + PAGE} bytes, and there are {room}")
            self.size //= 2
        self.prediction = self.predicted(shape, length)
        self.resident = min(left, max(self.prediction.components["AdamW moments"], PAGE))

    def predicted(self, shape: Shape, length: int) -> Prediction:
        return predict.predict(shape, QLORA, self.size, length, RANK, accumulating=self.size < self.batch)

    @property
    def peak(self) -> int:
        return self.prediction.peak(paged=True) + min(self.resident, self.prediction.components["AdamW moments"])


def random_weight(out: int, width: int, device: torch.device) -> FrozenWeight:
    """A double-quantized NF4 weight of random codes, with constants around 0.05 as in a trained layer."""
    n = out * width
    packed = torch.randint(0, 256, ((n + 1) // 2, 1), dtype=torch.uint8, device=device)
    codes = torch.randint(0, 256, (-(-n // 64),), dtype=torch.uint8, device=device)
    nested = torch.full((-(-codes.numel() // 256),), 0.01, device=device)
    q = Quantized(packed, codes, NF4.to(device), torch.Size((out, width)), torch.bfloat16, 64)
    return FrozenWeight.from_quantized(q, DoubleQuantized(codes, nested, torch.full((1,), 0.05, device=device)))


def build(shape: Shape, device: torch.device) -> nn.Module:
    """A Llama of this shape as attach leaves it: described on the meta device, then filled one layer at a time."""
    config = LlamaConfig(vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
                         num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
                         head_dim=shape.head_dim, tie_word_embeddings=shape.tied, max_position_embeddings=2048)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, linear in [each for each in model.named_modules() if isinstance(each[1], nn.Linear)]:
        if linear is not model.get_output_embeddings():
            layer = QLoRALinear(random_weight(linear.out_features, linear.in_features, device), None, RANK, lora_alpha=16)
            model.set_submodule(name, layer)
    for name, parameter in [each for each in model.named_parameters() if each[1].is_meta]:
        value = torch.ones_like(parameter, device=device)  # the norms
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute,
                nn.Parameter(value if value.dim() == 1 else value.normal_(std=0.02), requires_grad=False))
    with device:  # its buffers are no parameters, and no random ones will do
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.activation_checkpointing_enable()
    return model.train()


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


def peak_of(work: Callable[[], object], model: nn.Module, optimizer: PagedAdamW, device: torch.device) -> int:
    """The most bytes that live during a call: the allocator's and the pager's count on a GPU, living tensors' elsewhere."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() + (optimizer.pager.peak if is_managed(optimizer) else 0)
    with memory.Live(*model.parameters(), *model.buffers(), *optimizer.pager.cache.values()) as live:
        work()
    return live.peak


def is_managed(optimizer: PagedAdamW) -> bool:
    """Whether the pages are unified memory, which torch does not count as its own."""
    return any(isinstance(page.store, Managed) for page in optimizer.pager.cache)


def measure(shape: Shape, plan: Plan, length: int, device: torch.device) -> dict:
    """Three steps: the first makes AdamW's moments, the second is held against the ledger, the third is timed."""
    torch.manual_seed(0)
    model = build(shape, device)
    optimizer = PagedAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0,
                           page_bytes=PAGE, resident_bytes=plan.resident)
    ids = torch.randint(0, shape.vocabulary, (plan.batch, length), device=device)
    gradients = step(model, optimizer, ids, plan.size)
    if device.type == "cuda":  # what is more than that raises torch's OutOfMemoryError
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, (ROOM - plan.resident * is_managed(optimizer)) / total))
    peak = peak_of(partial(step, model, optimizer, ids, plan.size), model, optimizer, device)
    began = time.perf_counter()
    step(model, optimizer, ids, plan.size)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    lasting = {name: row.bytes_now for name, row in memory.ledger(model).items()}
    return {**lasting, "gradients": gradients, "AdamW moments": optimizer.pager.peak, "peak": peak, "seconds": seconds,
            "tokens_per_second": ids.numel() / seconds, "pager": dict(optimizer.counters)}


def predicted(plan: Plan) -> dict:
    """The ledger's side, by the same names."""
    parts = plan.prediction.components
    return {"linear layers": parts["base"] + parts["constants"], "embedding, head": parts["embedding, head"],
            "norms, biases": parts["norms"], "adapters": parts["adapters"], "gradients": parts["gradients"],
            "AdamW moments": min(plan.resident, parts["AdamW moments"]), "peak": plan.peak}


def table(name: str, plan: Plan, length: int, result: dict | None) -> str:
    """Predicted and, if there was a run, measured bytes, by component."""
    unit, size = ("GB", 1e9) if plan.peak > 1e9 else ("MB", 1e6)
    lines = [f"{name}, {plan.batch} x {length} tokens in passes of {plan.size}", f"{unit:24}{'predicted':>12}{'measured':>12}"]
    for row, nbytes in predicted(plan).items():
        measured = f"{result[row] / size:12.3f}" if result else f"{'-':>12}"
        lines.append(f"  {row:22}{nbytes / size:12.3f}{measured}")
    if result:
        off, speed = 100 * (predicted(plan)["peak"] / result["peak"] - 1), result["tokens_per_second"]
        lines.append(f"  predicted peak {off:+.1f} %; {result['seconds']:.2f} s a step, {speed:.0f} tokens/s")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = {"tiny": TINY, **predict.SHAPES}
    parser.add_argument("--model", choices=shapes, nargs="*", default=list(predict.SHAPES))
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"), help="where the numbers go, in bytes")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    print(card or "no GPU here: the models of the paper are predicted, not measured")
    rows = []
    for name in args.model:
        length = 64 if name == "tiny" else LENGTH
        for batch in BATCHES:
            plan = Plan(shapes[name], batch, length, int(SPARE * ROOM))
            result = measure(shapes[name], plan, length, device) if card or name == "tiny" else None
            print("\n" + table(name, plan, length, result), end="", flush=True)
            rows.append({"model": name, "batch": batch, "length": length, "passes_of": plan.size, "resident": plan.resident,
                         "predicted": predicted(plan), "measured": result})
    args.json.write_text(json.dumps({"card": card, "cap": CAP, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
