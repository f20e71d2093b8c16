"""Counts the bytes of all tensors that are alive at the same time."""

import weakref
from collections.abc import Iterable
from functools import partial

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Live(TorchDispatchMode):
    """Tracks the bytes of all live storages: now, and the maximum after any operation.

    A storage is added when it is first seen and subtracted when it is freed, so the cost of an
    operation does not depend on their number. outside: tensors that do not count, such as a mapped
    file.
    """

    def __init__(self, *tensors: Tensor, outside: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.known: dict[int, weakref.ref] = {}
        self.bytes = 0
        self.see(outside, counting=False)
        self.see(tensors)
        self.peak = self.bytes

    def see(self, tensors: Iterable[Tensor], counting: bool = True) -> None:
        """Adds the storages of these tensors that are not known yet."""
        for tensor in tensors:
            if tensor.is_meta:
                continue
            storage = tensor.untyped_storage()
            address = storage._cdata
            if address in self.known:
                continue
            nbytes = storage.nbytes() if counting else 0
            self.bytes += nbytes
            # torch keeps the Python object of a storage alive as long as its bytes
            self.known[address] = weakref.ref(storage, partial(self._forget, address, nbytes))

    def _forget(self, address: int, nbytes: int, _: weakref.ref) -> None:
        del self.known[address]
        self.bytes -= nbytes

    def now(self) -> int:
        return self.bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> object:  # noqa: ANN001
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (list, tuple)) else (result,)
        self.see(output for output in outputs if isinstance(output, Tensor))
        self.peak = max(self.peak, self.bytes)
        return result
