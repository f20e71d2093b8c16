"""A tensor that may be sharded over several processes (a DTensor of FSDP2): its local rows, and the way back.

Without sharding every function returns its argument. torch.distributed is imported only once there is a DTensor, so an
optimizer that is used in one process does not load it.
"""

from torch import Tensor


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is sharded, without importing DTensor: no other tensor has `to_local`."""
    return hasattr(tensor, "to_local")


def local_shard(tensor: Tensor) -> Tensor:
    """The rows of a tensor that this process holds."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def from_local_shard(rows: Tensor, parameter: Tensor) -> Tensor:
    """A tensor sharded like `parameter`, made of the rows that each process holds."""
    if not is_dtensor(parameter):
        return rows
    from torch.distributed.tensor import DTensor

    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(
        rows, mesh, placements, shape=parameter.shape, stride=parameter.stride()
    )


def full_tensor(tensor: Tensor) -> Tensor:
    """All rows of a tensor. A collective: every process must call it."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A tensor that every process holds whole, sharded like `parameter`. Nothing is sent."""
    if not is_dtensor(parameter) or is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor.to(mesh.device_type), mesh, placements, src_data_rank=None)
