"""The memory ledger: what a model's components weigh, read off the tensors, and what the process has taken.

QLoRA is a method for saving memory, so a run says where its bytes are. One row a component:

    linear layers      the frozen weights, 4.127 bits each instead of 16
    embedding, head    as they came, in 16 bits; a tied head is the same tensor and is counted once
    norms, biases      as they came
    adapters           float32; with gradients and two AdamW moments in training: 16 bytes a parameter in all
"""

import resource
import sys
from pathlib import Path
from typing import NamedTuple

from torch import nn


class Component(NamedTuple):
    """One row of the ledger. `elements` counts numbers, not bytes of storage: a 4-bit weight is one element."""

    elements: int
    bytes_16bit: int
    bytes_now: int


def ledger(model: nn.Module) -> dict[str, Component]:
    """Elements and bytes of each component of a model whose linear layers may be lora.QLoRALinear."""
    rows = {name: [0, 0] for name in ("linear layers", "embedding, head", "norms, biases", "adapters")}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    big = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding) or module is head}
    for parameter in model.parameters():
        kind = "adapters" if parameter.requires_grad else "embedding, head" if id(parameter) in big else "norms, biases"
        kind = "linear layers" if kind == "norms, biases" and parameter.dim() > 1 else kind
        rows[kind][0] += parameter.numel()
        rows[kind][1] += parameter.nbytes
    for module in model.modules():
        if hasattr(module, "codebook"):  # a FrozenWeight, which keeps its bytes in buffers
            rows["linear layers"][0] += module.shape.numel()
            rows["linear layers"][1] += module.nbytes
    return {name: Component(elements, 2 * elements, nbytes) for name, (elements, nbytes) in rows.items()}


def summary(model: nn.Module) -> dict:
    """The ledger and its totals, as report.json keeps them; bits_per_weight is measured on the linear layers' tensors."""
    rows = ledger(model)
    base = [row for name, row in rows.items() if name != "adapters"]
    return {
        "components": rows,
        "base_bytes_16bit": sum(row.bytes_16bit for row in base), "base_bytes_4bit": sum(row.bytes_now for row in base),
        "bits_per_weight": 8 * rows["linear layers"].bytes_now / rows["linear layers"].elements,
        "trainable_parameters": rows["adapters"].elements, "total_parameters": sum(row.elements for row in rows.values()),
    }


def rss_bytes() -> int:
    """Memory of this process that is resident now; where the system does not tell, its peak."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else peak_rss_bytes()


def peak_rss_bytes() -> int:
    """The most memory that was ever resident in this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
