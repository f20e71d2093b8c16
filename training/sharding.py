"""Two ways to train one model on several ranks: a copy on each (DDP), or a shard on each (FSDP2).

    torchrun --nproc-per-node 4 train.py               DDP: each rank has the whole 4-bit base
    torchrun --nproc-per-node 4 train.py --shard       FSDP2: each rank has a quarter of each tensor

Both split the batches. Seed and step alone determine the batches of a step, so all ranks know
them. With N ranks, rank i works on every N-th batch, starting at batch i. The loss of a step is the
sum over all its L labels divided by L. DDP and FSDP2 average gradients over the ranks. So rank i
scales the sum of its own losses by N / L, and the average is the gradient of one process that
works on all batches:

    1/N sum_i d(N / L loss_i) = d(1/L sum_i loss_i)

DDP all-reduces the gradients of the adapters during the last batch's backward pass: 4 bytes for
each trainable number, once per step. The size of the base does not matter.

FSDP2 splits each tensor by rows into N shards. It all-gathers a block of layers when the block
runs, in forward and again in backward, and frees it afterwards. Only parameters are split, so the
packed codes and their constants become frozen parameters. Each weight is then sent in 4 bits, where
a dense model sends 16. The gradients are reduce-scattered, so each rank keeps the rows of its own
shard.

Nothing is sent at the start: all ranks load the same base and draw the same adapters. Sharding
needs no communication either, so the ranks of one machine can load one after the other. Then only
one of them has the whole base in host memory, and a GPU receives its shard block by block.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kernels.dispatch import on_float64_device
from kernels.dtensor import full_tensor, is_dtensor, local_shard
from lora import FrozenWeight
from training.distributed import all_reduce_sum, is_main, world_size


def shard_model(model: nn.Module, device: str) -> None:
    """Replace every parameter by this rank's rows on `device`, in place, block by block (FSDP2).

    The blocks are the members of an nn.ModuleList, such as the decoder layers of a transformer. A
    list inside a block is not split further: which of its members run may depend on the tokens, as
    for experts, and a rank that skips one would leave the others waiting.
    """
    from torch.distributed.device_mesh import init_device_mesh  # slow to import, needed only here
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(torch.device(device).type, (world_size(),))
    for frozen in frozen_weights(model):
        for name, tensor in base_buffers(frozen).items():
            delattr(frozen, name)
            frozen.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Whether shard_model has split this model."""
    return any(is_dtensor(parameter) for parameter in model.parameters())


def frozen_weights(module: nn.Module) -> list[FrozenWeight]:
    return [child for child in module.modules() if isinstance(child, FrozenWeight)]


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The members of every nn.ModuleList that is not inside a block; each once."""
    blocks = []
    for child in module.children():
        is_container = isinstance(child, nn.ModuleList | nn.ModuleDict)  # it has no forward
        if isinstance(module, nn.ModuleList) and not is_container:
            blocks.append(child)
        else:
            blocks += blocks_of(child)
    return list(dict.fromkeys(blocks))


def base_buffers(frozen: FrozenWeight) -> dict[str, Tensor]:
    """The buffers of a frozen weight that can be split; every rank needs the complete codebooks."""
    buffers = dict(frozen.named_buffers())
    return {name: tensor for name, tensor in buffers.items() if not name.endswith("codebook")}


def weights_of(module: nn.Module) -> list[Tensor]:
    """All parameters and the frozen base, which is in buffers or, if sharded, in parameters."""
    tensors = list(module.parameters())
    for frozen in frozen_weights(module):
        tensors += base_buffers(frozen).values()
    return tensors


def bytes_on_this_rank(model: nn.Module) -> int:
    """Bytes of the parameters and the frozen base on this rank between steps."""
    for module in model.modules():
        if hasattr(module, "reshard"):  # a module of FSDP2
            module.reshard()
    return sum(local_shard(tensor).nbytes for tensor in weights_of(model))


def sizes_in_bytes(model: nn.Module) -> tuple[int, int, int]:
    """Bytes of the blocks, of the weights outside blocks and of the gradients, before sharding."""
    in_blocks = [tensor for block in blocks_of(model) for tensor in weights_of(block)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    blocks = unique_bytes(in_blocks)
    return blocks, unique_bytes(weights_of(model)) - blocks, unique_bytes(trained)


def unique_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the tensors; one that occurs twice counts once."""
    unique = {id(tensor): tensor for tensor in tensors}
    return sum(tensor.nbytes for tensor in unique.values())


def bytes_sent_per_step(
    blocks: int, rest: int, gradients: int, world_size: int, batches: int
) -> dict[str, float]:
    """Bytes that each rank sends in a step of `batches` batches per rank, with DDP and with FSDP2.

    In an all-gather or a reduce-scatter of n bytes, each of N ranks sends n (N - 1) / N bytes; an
    all-reduce is both. DDP all-reduces the gradients once per step. For each batch, FSDP2
    all-gathers every block in forward and in backward, and the weights outside blocks in forward
    only, and reduce-scatters the gradients.
    """
    share = (world_size - 1) / world_size
    return {
        "DDP": 2 * share * gradients,
        "FSDP2": batches * share * (2 * blocks + rest + gradients),
    }


def wrap_ddp(losses: nn.Module) -> nn.Module:
    """Make backward average the gradients over all ranks. FSDP2 and one process need no wrapper."""
    if not dist.is_initialized() or is_sharded(losses):
        return losses
    return DistributedDataParallel(
        losses, init_sync=False, forward_sync_buffers=False, gradient_as_bucket_view=True
    )


@contextmanager
def gradient_sync(losses: nn.Module, now: bool) -> Iterator[None]:
    """The context of a backward pass. Unless `now`, DDP only accumulates gradients locally."""
    if now or not isinstance(losses, DistributedDataParallel):
        yield
    else:
        with losses.no_sync():
            yield


def clip_grad_norm(parameters: list[nn.Parameter], max_norm: float) -> float:
    """Scale all gradients in place so that the norm of all of them is at most `max_norm`.

    Returns the norm before scaling. Differs from torch.nn.utils.clip_grad_norm_: the squares are
    summed in float64 before the norm is rounded to float32. So the bits of the result almost never
    depend on how the squares are split among the ranks.
    """
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    gradients = [local_shard(parameter.grad) for parameter in with_gradient]
    norms = [
        torch.linalg.vector_norm(on_float64_device(gradient), dtype=torch.float64)
        for gradient in gradients
    ]
    squares = torch.stack(norms).square().sum().item()
    if is_dtensor(parameters[0]):
        [squares] = all_reduce_sum(squares)
    norm = torch.tensor(squares).sqrt().item()  # in float32
    if norm > max_norm:
        torch._foreach_mul_(gradients, max_norm / norm)
    return norm


@torch.no_grad()
def gather_full_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All rows of each tensor, in host memory of rank 0; other ranks get an empty dict."""
    gathered = {}
    for name, tensor in tensors.items():
        full = full_tensor(tensor)  # every rank takes part
        if is_main():
            gathered[name] = full.cpu()
    return gathered
