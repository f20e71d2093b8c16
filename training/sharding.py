"""The two ways to train one model in several processes: all of it in each (DDP), or its share of everything (FSDP2).

    torchrun --nproc-per-node 4 train.py               DDP: each has the whole 4-bit base, and works on other sequences
    torchrun --nproc-per-node 4 train.py --shard       FSDP2: each has a quarter of every tensor too

A step's batches are known to all, from seed and step alone. Of N processes, number i works on every Nth of them, from the ith
on. The loss of a step is the sum over all of its L labels, divided by L. Both engines average gradients, so process i
differentiates N / L times its own sum, and the average is the gradient of one process that works on all batches:

    1/N sum_i d(N / L loss_i) = d(1/L sum_i loss_i)

DDP sends the gradients of the adapters while the last batch's backward pass goes on: 4 bytes a trainable number, once a step,
whatever the base weighs. FSDP2 cuts each tensor into N runs of rows. A block of layers is put together when its turn comes, in
forward and again in backward, and dropped after it. For that the packed codes and their constants become parameters, frozen
and of integers: 4-bit weights travel as 4 bits, where a dense model sends 16.

Nothing is sent to start with: all load the same base and draw the same adapters. Sharding needs no other process either, so
those of a machine load one after the other, that no two have the whole base in host memory; and a GPU gets block by block.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from kernels.dtensor import full_tensor, local_shard
from lora import FrozenWeight
from training.distributed import first, total, world


def shard(model: nn.Module, device: str) -> None:
    """Leave this process its rows of every parameter of a model, in place and on `device`: block by block, then the rest.

    Blocks are the members of a list of modules, as the decoder layers of a transformer are.
    """
    mesh = init_device_mesh(torch.device(device).type, (world(),))
    for frozen in [module for module in model.modules() if isinstance(module, FrozenWeight)]:
        for name, tensor in list(frozen.named_buffers()):
            if not name.endswith("codebook"):  # of which each process needs all
                delattr(frozen, name)
                frozen.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    for blocks in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for block in blocks:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def bytes_here(model: nn.Module) -> int:
    """What the parameters and the frozen base of a model weigh in this process, between steps."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return sum(local_shard(tensor).nbytes for tensor in weights_of(model))


def weights_of(module: nn.Module) -> list[Tensor]:
    """All parameters, and the frozen base, which lies in buffers or, once sharded, in parameters."""
    bases = [frozen for frozen in module.modules() if isinstance(frozen, FrozenWeight)]
    buffers = [
        buffer
        for base in bases
        for name, buffer in base.named_buffers()
        if not name.endswith("codebook")
    ]
    return [*module.parameters(), *buffers]


def sizes(model: nn.Module) -> tuple[int, int, int]:
    """Bytes of a model that is not sharded yet: of its blocks, of what is in no block, and of its gradients."""

    def nbytes(tensors: list[Tensor]) -> int:
        return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    blocks = nbytes([tensor for blocks in lists for tensor in weights_of(blocks)])
    gradients = nbytes([parameter for parameter in model.parameters() if parameter.requires_grad])
    return blocks, nbytes(weights_of(model)) - blocks, gradients


def sent_in_a_step(
    blocks: int, rest: int, gradients: int, world: int, batches: int
) -> dict[str, float]:
    """Bytes that each of `world` processes sends in a step of so many batches of its own, by DDP and by FSDP2.

    Of n bytes that all want to have, or to add up, each sends (N - 1) / N n. DDP adds up gradients and hands the sums round,
    once a step. For each batch, FSDP2 hands round every block, in forward and in backward, and what is in no block in forward
    alone, and adds up gradients, of which each process keeps its rows.
    """
    share = (world - 1) / world
    return {
        "DDP": 2 * share * gradients,
        "FSDP2": batches * share * (2 * blocks + rest + gradients),
    }


def parallel(losses: nn.Module) -> nn.Module:
    """A module whose backward pass leaves the average gradient of all processes, where that takes more than it does already."""
    if not dist.is_initialized() or is_sharded(losses):
        return losses
    return DistributedDataParallel(
        losses, init_sync=False, forward_sync_buffers=False, gradient_as_bucket_view=True
    )


@contextmanager
def sending(losses: nn.Module, now: bool) -> Iterator[None]:
    """A backward pass of what `parallel` gave; DDP keeps its gradients, to send them with later ones, unless it is `now`."""
    with (
        nullcontext()
        if now or not isinstance(losses, DistributedDataParallel)
        else losses.no_sync()
    ):
        yield


def clip_gradients(parameters: list[nn.Parameter], limit: float) -> float:
    """Scale all gradients by the same factor, so that their common norm is at most `limit`. -> the norm before

    Differs from torch.nn.utils.clip_grad_norm_: squares are added up in float64 before the norm is rounded to float32, and then
    it hardly ever shows in a bit of the result which process had which of them.
    """
    gradients = [
        local_shard(parameter.grad) for parameter in parameters if parameter.grad is not None
    ]
    norms = torch.stack(
        [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
    )
    (squares,) = (
        total(norms.square().sum().item())
        if isinstance(parameters[0], DTensor)
        else [norms.square().sum().item()]
    )
    norm = torch.tensor(squares).sqrt().item()  # in float32
    if norm > limit:
        torch._foreach_mul_(gradients, limit / norm)
    return norm


@torch.no_grad()
def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All rows of each tensor, on the host; only the first process keeps them."""
    kept = {}
    for name, tensor in tensors.items():
        every = full_tensor(tensor)
        if first():
            kept[name] = every.cpu()
    return kept
