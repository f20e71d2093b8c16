"""What a run weighs, measured in one of its own steps, beside what the ledger says of such a step.

The ledger (predict.py) knows the shape of a model and of a batch, and no tensor. Here a step of the run itself is weighed: what
lasts, gradients and AdamW's moments by the bytes of their tensors, and the peak as CUDA's allocator has it, or on a processor
by the storages that are alive after any operation (memory.Live). So the two columns owe each other nothing.

It is the second step that is weighed, in which AdamW has its moments. Looking at each operation takes time, which is in that
step's seconds; no bit depends on it. Of several processes each has a step of its own batches, and DDP keeps its gradients from
one step to the next, as accumulation does. FSDP2 is not weighed: the ledger does not know its buffers.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from data import dataset as data
from kernels.page_store import Managed
from memory import formula as predict
from memory import measured as memory
from paged_optim import PagedAdamW
from training import distributed as processes
from training.options import Options

LLAMAS = ("llama", "mistral")  # whose layers are the seven maps that predict.py counts
BESIDE = (
    "attention_bias",
    "mlp_bias",
    "quantization_config",
)  # in a config: what it does not count, or not know
T = TypeVar("T")


def ledger(
    config: PretrainedConfig,
    args: Options,
    batch: int,
    length: int,
    accumulating: bool = False,
    labels: int | None = None,
    masked: bool = True,
    packed: bool = False,
) -> predict.Prediction | None:
    """What the ledger says of a pass of batch * length tokens; None of a model that it does not know."""
    if (
        config.model_type not in LLAMAS
        or any(getattr(config, name, None) for name in BESIDE)
        or args.use_dora
    ):
        return None
    method = predict.LORA if args.quant == "none" else predict.QLORA
    return predict.predict(
        predict.shape_from(config.to_dict()),
        method,
        batch,
        length,
        args.lora_r,
        args.grad_checkpoint,
        accumulating,
        labels,
        masked,
        packed,
        args.lora_dropout > 0,
        args.block_size,
        not args.no_double_quant,
        args.dtype.itemsize,
    )


def step(
    work: Callable[[], T],
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batches: list[data.Batch],
    args: Options,
) -> tuple[T, dict[str, dict[str, int | None]]]:
    """Do a training step on these batches, `work`, and weigh it. -> its result; bytes by component, predicted and measured"""
    before, gradients = sum(tensor.nbytes for tensor in held(optimizer)), []

    def look(*_: object) -> None:
        parameters = [
            parameter for group in optimizer.param_groups for parameter in group["params"]
        ]
        gradients.append(sum(parameter.grad.nbytes for parameter in parameters))

    with ExitStack() as stack:
        stack.callback(optimizer.register_step_pre_hook(look).remove)
        result, peak = peak_of(work, model, optimizer, model.device)
    lasting = {name: row.bytes_now for name, row in memory.ledger(model).items()}
    measured = lasting | {
        "gradients": gradients[0],
        "AdamW moments": moments(optimizer),
        "peak of a step": peak,
    }
    expected = predicted(model, optimizer, batches, args, before)
    return result, {
        name: {"predicted": expected.get(name), "measured": nbytes}
        for name, nbytes in measured.items()
    }


def predicted(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batches: list[data.Batch],
    args: Options,
    before: int,
) -> dict[str, int]:
    """The ledger's side of a step that began with so many bytes of moments on the device; empty if it knows nothing of it."""
    passes = [
        ledger(
            model.config,
            args,
            *batch.input_ids.shape,
            number > 0 or processes.world_size() > 1,
            batch.n_labels,
            is_masked(batch),
            batch.position_ids is not None,
        )
        for number, batch in enumerate(batches)
    ]
    if None in passes:
        return {}
    parts = passes[0].components
    rows = {
        "linear layers": parts["base"] + parts["constants"],
        "embedding, head": parts["embedding, head"],
        "norms, biases": parts["norms"],
        "adapters": parts["adapters"],
    }
    lasting = sum(rows.values()) + (
        parts["buffer"] if on_gpu(model.device) else 0
    )  # a processor decodes into its cache
    passing = before + max(sum(instant) for each in passes for instant in each.instants.values())
    resident = (
        optimizer.pager.resident if isinstance(optimizer, PagedAdamW) else parts["AdamW moments"]
    )
    update = parts["gradients"] + resident
    return rows | {
        "gradients": parts["gradients"],
        "AdamW moments": parts["AdamW moments"],
        "peak of a step": lasting + max(passing, update),
    }


def is_masked(batch: data.Batch) -> bool:
    """Whether attention has a mask: where nothing is padded or packed, transformers leaves it out."""
    return batch.position_ids is not None or not bool(batch.attention_mask.all())


def held(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors of an AdamW's state that are on the device now."""
    if isinstance(optimizer, PagedAdamW):
        return list(optimizer.pager.cache.values())
    return [
        tensor
        for state in optimizer.state.values()
        for name, tensor in state.items()
        if name.startswith("exp_avg")
    ]


def moments(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an AdamW's moments, wherever they are."""
    if isinstance(optimizer, PagedAdamW):
        return sum(page.nbytes for pages in optimizer.pages.values() for page in pages)
    return sum(tensor.nbytes for tensor in held(optimizer))


def peak_of(
    work: Callable[[], T],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> tuple[T, int]:
    """A call's result, and the most bytes that live in it: by the allocator and the pager on a GPU, by tensors elsewhere."""
    if on_gpu(device):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        result = work()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() + (
            optimizer.pager.peak if is_managed(optimizer) else 0
        )
    pages = (
        [page for cut in optimizer.pages.values() for page in cut]
        if isinstance(optimizer, PagedAdamW)
        else []
    )
    mapped = [page.store.bytes for page in pages if page.store]
    with memory.Live(
        *model.parameters(), *model.buffers(), *held(optimizer), outside=mapped
    ) as live:
        result = work()
    return result, live.peak


def on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def is_managed(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its state is unified memory, which torch does not count as its own."""
    pages = optimizer.pages.values() if isinstance(optimizer, PagedAdamW) else ()
    return any(isinstance(page.store, Managed) for cut in pages for page in cut)
