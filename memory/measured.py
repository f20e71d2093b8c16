"""The memory ledger: what a model's components weigh, read off the tensors, and what the process has taken.

    python memory.py --model llama-65b --seq 512 --batch 1 --r 64     before a run: predicted (predict.py), and what fits where

QLoRA is a method for saving memory, so a run says where its bytes are. One row a component:

    linear layers      the frozen weights, 4.127 bits each instead of 16
    embedding, head    as they came, in 16 bits; a tied head is the same tensor and is counted once
    norms, biases      as they came
    adapters           float32; with gradients and two AdamW moments in training: 16 bytes a parameter in all
"""

import argparse
import resource
import sys
import weakref
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from memory import formula as predict

CARDS = [8, 12, 16, 24, 32, 40, 48, 80, 140]  # GiB: what graphics cards come with
OUTSIDE = (
    2**30
)  # bytes of a card that torch's tensors cannot have: CUDA's context, libraries, gaps between tensors


class Component(NamedTuple):
    """One row of the ledger. `elements` counts numbers, not bytes of storage: a 4-bit weight is one element."""

    elements: int
    bytes_16bit: int
    bytes_now: int


def ledger(model: nn.Module) -> dict[str, Component]:
    """Elements and bytes of each component of a model whose linear layers may be lora.QLoRALinear."""
    rows = {
        name: [0, 0] for name in ("linear layers", "embedding, head", "norms, biases", "adapters")
    }
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    big = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Embedding) or module is head
    }
    frozen = [
        module for module in model.modules() if hasattr(module, "codebook")
    ]  # a FrozenWeight keeps its bytes in
    theirs = {
        id(parameter) for module in frozen for parameter in module.parameters()
    }  # buffers; sharded, in parameters
    for parameter in (parameter for parameter in model.parameters() if id(parameter) not in theirs):
        kind = (
            "adapters"
            if parameter.requires_grad
            else "embedding, head"
            if id(parameter) in big
            else "norms, biases"
        )
        kind = "linear layers" if kind == "norms, biases" and parameter.dim() > 1 else kind
        rows[kind][0] += parameter.numel()
        rows[kind][1] += parameter.nbytes
    for module in frozen:
        rows["linear layers"][0] += module.shape.numel()
        rows["linear layers"][1] += module.nbytes
    rows["adapters"][1] += sum(
        module.base_norm.nbytes for module in model.modules() if hasattr(module, "base_norm")
    )  # DoRA's
    return {
        name: Component(elements, 2 * elements, nbytes) for name, (elements, nbytes) in rows.items()
    }


def summary(model: nn.Module) -> dict:
    """The ledger and its totals, as report.json keeps them; bits_per_weight is measured on the linear layers' tensors."""
    rows = ledger(model)
    base = [row for name, row in rows.items() if name != "adapters"]
    return {
        "components": rows,
        "base_bytes_16bit": sum(row.bytes_16bit for row in base),
        "base_bytes_4bit": sum(row.bytes_now for row in base),
        "bits_per_weight": 8 * rows["linear layers"].bytes_now / rows["linear layers"].elements,
        "trainable_parameters": rows["adapters"].elements,
        "total_parameters": sum(row.elements for row in rows.values()),
    }


def rss_bytes() -> int:
    """Memory of this process that is resident now; where the system does not tell, its peak."""
    statm = Path("/proc/self/statm")
    return (
        int(statm.read_text().split()[1]) * resource.getpagesize()
        if statm.exists()
        else peak_rss_bytes()
    )


def peak_rss_bytes() -> int:
    """The most memory that was ever resident in this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Live(TorchDispatchMode):
    """The bytes of the storages that are alive: now, and at most after any operation, when inputs and outputs both are.

    A storage is counted when it is first seen and discounted as it dies, so that an operation costs the same however many live.
    `outside`: tensors that do not count, such as a mapped file.
    """

    def __init__(self, *tensors: Tensor, outside: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.known: dict[int, weakref.ref] = {}
        self.bytes = 0
        self.see(outside, counting=False)
        self.see(tensors)
        self.peak = self.bytes

    def see(self, tensors: Iterable[Tensor], counting: bool = True) -> None:
        for storage in [tensor.untyped_storage() for tensor in tensors if not tensor.is_meta]:
            if storage._cdata not in self.known:
                nbytes = storage.nbytes() if counting else 0
                self.bytes += nbytes
                forget = partial(self._forget, storage._cdata, nbytes)
                self.known[storage._cdata] = weakref.ref(
                    storage, forget
                )  # torch lets it die with the bytes, not before

    def _forget(self, address: int, nbytes: int, _: weakref.ref) -> None:
        del self.known[address]
        self.bytes -= nbytes

    def now(self) -> int:
        return self.bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> object:  # noqa: ANN001
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (list, tuple)) else (result,)
        self.see(tuple(output for output in outputs if isinstance(output, Tensor)))
        self.peak = max(self.peak, self.bytes)
        return result


def table(shape: predict.Shape, batch: int, length: int, r: int) -> str:
    """The prediction by component and method, in GB (1e9 bytes), with and without checkpointing."""
    kinds = {
        checkpointing: [
            predict.predict(shape, method, batch, length, r, checkpointing)
            for method in predict.METHODS
        ]
        for checkpointing in (True, False)
    }

    def line(name: str, numbers: list[int]) -> str:
        return f"{name:34}" + "".join(f"{number / 1e9:18.3f}" for number in numbers)

    lines = [f"{'GB':34}" + "".join(f"{method:>18}" for method in predict.METHODS)]
    for name in kinds[True][0].components:
        for checkpointing, predictions in kinds.items():
            if checkpointing or name == "activations":
                suffix = (
                    ""
                    if name != "activations"
                    else ", checkpointing"
                    if checkpointing
                    else ", all kept"
                )
                lines.append(
                    line(name + suffix, [prediction.components[name] for prediction in predictions])
                )
    for checkpointing, predictions in kinds.items():
        lines.append(
            line(
                f"peak, {'checkpointing' if checkpointing else 'all kept'}",
                [p.peak() for p in predictions],
            )
        )
    lines.append(
        line(
            "  AdamW's moments paged out",
            [prediction.peak(paged=True) for prediction in kinds[True]],
        )
    )
    instants = kinds[True][-1].instants
    lines.append(
        f"QLoRA with checkpointing is at its peak in {max(instants, key=lambda name: sum(instants[name]))}"
    )
    return "\n".join(lines)


def most(
    shape: predict.Shape, method: str, length: int, r: int, nbytes: int, paged: bool = False
) -> int:
    """How many sequences of a length fit into so many bytes, with checkpointing: 0 to 2**16."""
    fitting, above = 0, 2**16 + 1
    while above - fitting > 1:
        middle = (fitting + above) // 2
        fits = predict.predict(shape, method, middle, length, r).peak(paged) <= nbytes
        fitting, above = (middle, above) if fits else (fitting, middle)
    return fitting


def what_fits(shape: predict.Shape, length: int, r: int) -> str:
    """The largest batch for cards of usual sizes."""
    columns = [*((method, False) for method in predict.METHODS), (predict.QLORA, True)]
    heads = [method + (", paged" if paged else "") for method, paged in columns]
    lines = [f"{f'sequences of {length} that fit':34}" + "".join(f"{head:>18}" for head in heads)]
    for size in CARDS:
        counts = [
            most(shape, method, length, r, size * 2**30 - OUTSIDE, paged)
            for method, paged in columns
        ]
        lines.append(
            f"{f'a card of {size} GiB':34}" + "".join(f"{count or '-':>18}" for count in counts)
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Predict the memory of fine-tuning, by component, before the run."
    )
    parser.add_argument(
        "--model",
        default="llama-65b",
        help=f"{', '.join(predict.SHAPES)}, or a folder with config.json",
    )
    for name, value, text in (
        ("seq", 512, "tokens a sequence"),
        ("batch", 1, "sequences"),
        ("r", 64, "rank of the adapters"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text} (default: {value})")
    args = parser.parse_args(argv)
    if min(args.seq, args.batch, args.r) < 1:
        parser.error("--seq, --batch and --r must be at least 1")
    try:
        shape = predict.shape_of(args.model)
    except ValueError as error:
        print(f"memory.py: {error}", file=sys.stderr)
        return 1
    print(f"{args.model}, {args.batch} x {args.seq} tokens, r {args.r}: predicted\n")
    print(
        table(shape, args.batch, args.seq, args.r), what_fits(shape, args.seq, args.r), sep="\n\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
