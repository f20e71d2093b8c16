"""Measures memory: the bytes of a model by component, of the process, and of one training step.

The ledger reads the tensors of a model. One row per component:

    linear layers      the frozen weights, 4.127 bits each instead of 16
    embedding, head    in 16 bits as loaded; a tied head is the same tensor and is counted once
    norms, biases      as loaded
    adapters           float32; with gradients and two AdamW moments 16 bytes per parameter

`measure_step` runs one step of a run and compares it with the prediction (formula.py). The
prediction uses only shapes. The measurement adds up the bytes of tensors: gradients, AdamW's
moments, and the peak. On a GPU the peak is that of CUDA's allocator; elsewhere it is the maximum,
after any operation, of the bytes of all live storages (`Live`). So the two columns are computed
independently.

The step to measure is the second one, in which AdamW already has its moments. Tracking every
operation makes this step slower, also in metrics.jsonl, but changes no bit of the result. In a run
of several processes, each measures its own batches; DDP keeps its gradients from step to step, as
gradient accumulation does. FSDP2 is not measured: the prediction does not cover its buffers.
"""

from __future__ import annotations  # type hints must not load the classes of transformers

import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import transformers
from torch import Tensor, nn
from torch.optim import Optimizer

from data.dataset import Batch
from kernels.page_store import Managed, Page
from lora import FrozenWeight
from memory.formula import StepSettings, predict_step
from memory.live import Live
from paged_optim import PagedAdamW

T = TypeVar("T")


class Component(NamedTuple):
    """One row of the ledger. A 4-bit weight counts as one element."""

    elements: int
    bytes_16bit: int
    bytes_now: int


def ledger(model: nn.Module) -> dict[str, Component]:
    """Elements and bytes of each component of a model, before or after lora.attach."""
    frozen = [module for module in model.modules() if isinstance(module, FrozenWeight)]
    frozen_ids = {id(each) for module in frozen for each in module.parameters()}  # with FSDP2 only
    embedding_ids = {id(weight) for weight in embeddings(model)}

    names = ("linear layers", "embedding, head", "norms, biases", "adapters")
    elements = dict.fromkeys(names, 0)
    nbytes = dict.fromkeys(names, 0)
    for parameter in model.parameters():
        if id(parameter) in frozen_ids:
            continue
        if parameter.requires_grad:
            name = "adapters"
        elif id(parameter) in embedding_ids:
            name = "embedding, head"
        elif parameter.dim() > 1:
            name = "linear layers"
        else:
            name = "norms, biases"
        elements[name] += parameter.numel()
        nbytes[name] += parameter.nbytes
    for weight in frozen:
        elements["linear layers"] += weight.shape.numel()
        nbytes["linear layers"] += weight.nbytes
    for module in model.modules():
        if hasattr(module, "base_norm"):  # DoRA: the norm of each row of the base
            nbytes["adapters"] += module.base_norm.nbytes
    return {name: Component(elements[name], 2 * elements[name], nbytes[name]) for name in names}


def embeddings(model: nn.Module) -> list[Tensor]:
    """The weights of the embeddings and of the output head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Embedding) or module is head
    ]


def summary(model: nn.Module) -> dict:
    """The ledger and its totals, as written to report.json."""
    rows = ledger(model)
    linear = rows["linear layers"]
    base = [row for name, row in rows.items() if name != "adapters"]
    return {
        "components": rows,
        "base_bytes_16bit": sum(row.bytes_16bit for row in base),
        "base_bytes_4bit": sum(row.bytes_now for row in base),
        "bits_per_weight": 8 * linear.bytes_now / linear.elements,
        "trainable_parameters": rows["adapters"].elements,
        "total_parameters": sum(row.elements for row in rows.values()),
    }


def rss_bytes() -> int:
    """The resident memory of this process; its peak if the system has no /proc."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return peak_rss_bytes()
    pages = int(statm.read_text().split()[1])
    return pages * resource.getpagesize()


def peak_rss_bytes() -> int:
    """The largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_gpu_bytes(device: str) -> int | None:
    """The most that torch has allocated on a GPU since the peak was last reset; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else None


def measure_step(
    work: Callable[[], T],
    model: transformers.PreTrainedModel,
    optimizer: Optimizer,
    batches: list[Batch],
    settings: StepSettings,
    world_size: int,
) -> tuple[T, dict[str, dict[str, int | None]]]:
    """Runs `work`, which is one training step on these batches, and measures it.

    Returns the result of `work`, and bytes by component: predicted (or None) and measured.
    """
    moments_before = sum(tensor.nbytes for tensor in resident_moments(optimizer))
    gradients = 0

    def count_gradients(*_: object) -> None:
        nonlocal gradients
        for group in optimizer.param_groups:
            gradients += sum(parameter.grad.nbytes for parameter in group["params"])

    hook = optimizer.register_step_pre_hook(count_gradients)
    try:
        result, peak = measure_peak(work, model, optimizer, model.device)
    finally:
        hook.remove()
    measured = {name: row.bytes_now for name, row in ledger(model).items()}
    measured["gradients"] = gradients
    measured["AdamW moments"] = moment_bytes(optimizer)
    measured["peak of a step"] = peak
    predicted = predicted_bytes(model, optimizer, batches, settings, world_size, moments_before)
    rows = {
        name: {"predicted": predicted.get(name), "measured": nbytes}
        for name, nbytes in measured.items()
    }
    return result, rows


def predicted_bytes(
    model: transformers.PreTrainedModel,
    optimizer: Optimizer,
    batches: list[Batch],
    settings: StepSettings,
    world_size: int,
    moments_before: int,
) -> dict[str, int]:
    """The predicted bytes of a step by component; empty for a model that the formula lacks.

    moments_before: bytes of AdamW's moments that are on the device when the step begins.
    """
    passes = []
    for index, batch in enumerate(batches):
        size, length = batch.input_ids.shape
        prediction = predict_step(
            model.config,
            settings,
            size,
            length,
            accumulating=index > 0 or world_size > 1,
            labels=batch.n_labels,
            masked=is_masked(batch),
            packed=batch.position_ids is not None,
        )
        if prediction is None:
            return {}
        passes.append(prediction)

    parts = passes[0].components
    rows = lasting_rows(parts)
    buffer = parts["buffer"] if on_gpu(model.device) else 0  # a CPU decodes into its cache
    lasting = sum(rows.values()) + buffer
    rows["gradients"] = parts["gradients"]
    rows["AdamW moments"] = parts["AdamW moments"]

    temporary = max(sum(instant) for each in passes for instant in each.instants.values())
    resident = parts["AdamW moments"]
    if isinstance(optimizer, PagedAdamW):
        resident = optimizer.pager.resident
    forward_and_backward = moments_before + temporary
    update = parts["gradients"] + resident
    rows["peak of a step"] = lasting + max(forward_and_backward, update)
    return rows


def lasting_rows(parts: dict[str, int]) -> dict[str, int]:
    """Predicted components under the names of the ledger."""
    return {
        "linear layers": parts["base"] + parts["constants"],
        "embedding, head": parts["embedding, head"],
        "norms, biases": parts["norms"],
        "adapters": parts["adapters"],
    }


def is_masked(batch: Batch) -> bool:
    """Whether attention has a mask: only packed documents need one."""
    return batch.position_ids is not None


def pages_of(optimizer: Optimizer) -> list[Page]:
    """The pages of a PagedAdamW; an empty list for another optimizer."""
    if not isinstance(optimizer, PagedAdamW):
        return []
    return [page for pages in optimizer.pages.values() for page in pages]


def resident_moments(optimizer: Optimizer) -> list[Tensor]:
    """The tensors of AdamW's moments that are on the device now."""
    if isinstance(optimizer, PagedAdamW):
        return list(optimizer.pager.cache.values())
    return [
        tensor
        for state in optimizer.state.values()
        for name, tensor in state.items()
        if name.startswith("exp_avg")
    ]


def moment_bytes(optimizer: Optimizer) -> int:
    """Bytes of AdamW's moments, on the device or elsewhere."""
    if isinstance(optimizer, PagedAdamW):
        return sum(page.nbytes for page in pages_of(optimizer))
    return sum(tensor.nbytes for tensor in resident_moments(optimizer))


def uses_unified_memory(optimizer: Optimizer) -> bool:
    """Whether the state is in unified memory, which torch's allocator does not count."""
    return any(isinstance(page.store, Managed) for page in pages_of(optimizer))


def measure_peak(
    work: Callable[[], T], model: nn.Module, optimizer: Optimizer, device: torch.device
) -> tuple[T, int]:
    """Returns the result of `work` and the largest number of bytes alive during it.

    Counted by CUDA's allocator and the pager on a GPU, by `Live` elsewhere.
    """
    if on_gpu(device):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        result = work()
        torch.cuda.synchronize()
        paged = optimizer.pager.peak if uses_unified_memory(optimizer) else 0
        return result, torch.cuda.max_memory_allocated() + paged
    mapped_files = [page.store.bytes for page in pages_of(optimizer) if page.store]
    tensors = [*model.parameters(), *model.buffers(), *resident_moments(optimizer)]
    with Live(*tensors, outside=mapped_files) as live:
        result = work()
    return result, live.peak


def on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"
