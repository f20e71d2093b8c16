"""A tensor that may be sharded over processes (a DTensor of FSDP2): to its local rows and back.

Each function returns an ordinary tensor unchanged. torch.distributed is imported at the first
DTensor only, so an optimizer in a single process does not load it.
"""

from torch import Tensor


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor: only those have `to_local`."""
    return hasattr(tensor, "to_local")


def local_shard(tensor: Tensor) -> Tensor:
    """The rows of a tensor that this process holds."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def from_local_shard(rows: Tensor, parameter: Tensor) -> Tensor:
    """A tensor sharded like `parameter`, made from the rows that each process holds."""
    if not is_dtensor(parameter):
        return rows
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        rows,
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def full_tensor(tensor: Tensor) -> Tensor:
    """All rows of a tensor. A collective: every process must call it."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Shard a tensor, of which every process has all rows, like `parameter`. Sends nothing."""
    if not is_dtensor(parameter) or is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh = parameter.device_mesh
    on_mesh = tensor.to(mesh.device_type)
    return distribute_tensor(on_mesh, mesh, parameter.placements, src_data_rank=None)
