"""A weight that never changes, kept in 4 bits: nf4 and double_quant put together as one module of a network.

Equation 6 of the paper: the dense weight is made of the packed codes and of constants that are themselves made of codes,

    W' = dequant(dequant(nested_absmax, absmax), packed)

Buffers, for a weight of n elements (the names are those of a bitsandbytes checkpoint):

    packed          uint8 (ceil(n/2), 1)
    absmax          uint8 (ceil(n/64),); float32 without double quantization
    nested_absmax   float32 (ceil(n/64/256),)      } with double quantization only
    nested_offset   float32 (1,)                   }
    weight          the dense tensor itself, and nothing else, with codebook=None: ordinary 16-bit LoRA stands on it

together 4 + 8/64 + 32/(64 * 256) = 4.127 bits an element and one mean. The codebooks are constants of the format, the same for
all layers, and are neither saved nor counted.

Calling the module dequantizes. Who calls drops the result as soon as it has been multiplied: the dense weights of a model
never exist together.

Differs from bitsandbytes: the state lives in ordinary buffers, so that state_dict, .to() and deepcopy need no special case
but one: `.half()` and its kin must not round the float32 constants, and here they do not.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import double_quant as second
import nf4
from kernels import dispatch
from kernels.packed_weight import with_decoded_absmax


class MergeAudit(NamedTuple):
    """How an update of a weight would survive being merged into its 4 bits."""

    update_norm: float  # the Frobenius norm of the update
    kept: float  # <realised, update> / <update, update>: 1 if the update arrives whole, 0 if rounding swallows it
    cosine: float  # between the realised change and the update: 1 if it points the right way


class FrozenWeight(nn.Module):
    """A weight of any shape in 4 bits (or dense, with codebook=None). `frozen(dtype)` gives it back, dense, in that dtype."""

    def __init__(
        self,
        weight: Tensor,
        block_size: int = 64,
        double_quant: bool = True,
        codebook: Tensor | None = nf4.NF4,
    ) -> None:
        """Raises: ValueError as `nf4.quantize` does: NaN, infinity, a block size that is not a power of two."""
        super().__init__()
        if codebook is None:
            self.shape, self.dtype, self.double_quant = weight.shape, weight.dtype, False
            self.register_buffer("weight", weight.detach())
            self.register_buffer("codebook", None)
        else:
            q = dispatch.quantize(weight, block_size, codebook)
            self._keep(
                q, second.quantize(q.absmax, blockwise=dispatch.quantize) if double_quant else None
            )

    @classmethod
    def from_quantized(
        cls, q: nf4.Quantized, constants: second.DoubleQuantized | None
    ) -> "FrozenWeight":
        """What a checkpoint holds. q.absmax does not count where `constants` stand for it."""
        frozen = cls.__new__(cls)
        nn.Module.__init__(frozen)
        frozen._keep(q, constants)
        return frozen

    def _keep(self, q: nf4.Quantized, constants: second.DoubleQuantized | None) -> None:
        self.shape, self.dtype, self.block_size, self.double_quant = (
            q.shape,
            q.dtype,
            q.block_size,
            constants is not None,
        )
        self.register_buffer("packed", q.packed)
        self.register_buffer("absmax", q.absmax if constants is None else constants.codes)
        self.register_buffer("codebook", q.codebook, persistent=False)
        if constants is not None:
            self.nested_block_size = constants.block_size
            self.register_buffer("nested_absmax", constants.absmax)
            self.register_buffer("nested_offset", constants.offset)
            self.register_buffer("nested_codebook", constants.codebook, persistent=False)

    def stored(self) -> tuple[nf4.Quantized, second.DoubleQuantized | None]:
        """The weight as it lies in memory: with double quantization, its absmax are the second's codes."""
        q = nf4.Quantized(
            self.packed, self.absmax, self.codebook, self.shape, self.dtype, self.block_size
        )
        if not self.double_quant:
            return q, None
        return q, second.DoubleQuantized(
            self.absmax,
            self.nested_absmax,
            self.nested_offset,
            self.nested_block_size,
            self.nested_codebook,
        )

    def quantized(self) -> tuple[nf4.Quantized, second.DoubleQuantized | None]:
        """The weight as `nf4.dequantize` takes it, its constants decoded, and the constants as they are stored."""
        q, constants = self.stored()
        return with_decoded_absmax(q, constants), constants

    def forward(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight, in `dtype` or in the dtype it came in; the caller owns it, unless the base is dense already."""
        if self.codebook is None:
            return self.weight.to(dtype or self.dtype)
        q, constants = self.stored()
        return dispatch.dequantize(q, dtype, constants)

    def matmul(self, x: Tensor, transposed: bool = True, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias (tokens, out) for x (tokens, in), or x W (tokens, in) for x (tokens, out), without a dense weight."""
        if self.codebook is None:
            weight = self.weight.to(x.dtype)
            return F.linear(x, weight, bias) if transposed else x @ weight
        q, constants = self.stored()
        return dispatch.matmul(x, q, constants, transposed, bias)

    def audit(self, update: Tensor) -> MergeAudit:
        """Quantize weight + update anew, and compare the change that is realised with the one that was wanted."""
        before = self(update.dtype)
        after = FrozenWeight(before + update, self.block_size, self.double_quant, self.codebook)()
        realised, wanted = (after - before).flatten(), update.flatten()
        length, moved, dot = (
            wanted.norm().item(),
            realised.norm().item(),
            (realised @ wanted).item(),
        )
        if not length:
            return MergeAudit(0.0, 1.0, 1.0)
        return MergeAudit(length, dot / length**2, dot / (length * moved) if moved else 0.0)

    @property
    def nbytes(self) -> int:
        """What the weight costs in memory, read off the tensors that hold it (of all processes, if it is sharded)."""
        buffers = [buffer for name, buffer in self.named_buffers() if not name.endswith("codebook")]
        return sum(tensor.nbytes for tensor in [*buffers, *self.parameters()])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """What .to(), .half() and .cuda() call. Buffers change their device, but 4-bit ones never their dtype."""
        exact = {} if self.codebook is None else dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, tensor in exact.items():
            if getattr(self, name).dtype != tensor.dtype:
                setattr(self, name, tensor.to(getattr(self, name).device))
        return self

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {8 * self.nbytes / max(self.shape.numel(), 1):.3f} bits an element"
