"""LoRA on a frozen 4-bit layer: train a small update beside weights that never change.

A linear layer's weight W (out, in) is frozen in NF4. Beside it stand two thin matrices, A (r, in) random and B (out, r)
zero, so that training starts exactly at the pretrained model (paper, section 3, equations 3 and 5; LoRA, arXiv 2106.09685):

    y = x W'^T + b + s (d(x) A^T) B^T        W' = the dequantized weight,  s = lora_alpha / r,  d = dropout

Differs from PEFT: a merge goes to a dense weight and says what a 4-bit merge would have lost; unmerging is exact, because the
codes are never touched.

A weight that never changes, kept in 4 bits: nf4 and double_quant put together as one module of a network.

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

The product of a frozen weight with a low-rank update beside it, and its gradients by hand.

    y = x W'^T + b + s (d(x) A^T) B^T        W' = the dequantized weight,  s = lora_alpha / r,  d = dropout

(paper, section 3, equations 3 and 5). With g = dL/dy and h = d(x) A^T (tokens, r), the chain rule by hand:

    dL/dB = s g^T h        dL/dh = s g B        dL/dA = (dL/dh)^T d(x)        dL/dx = g W' + d'((dL/dh) A)

No gradient for W is wanted, so x is kept for A alone, and W' is needed only while it multiplies: piece by piece, once in
forward and once more in backward. What lives on between the two, besides the parameters, is x (tokens, in),
h (tokens, r), and with dropout its mask, one bool for each element of x.

Differs from PEFT: base and adapter are one autograd function, and what it keeps is chosen, not left to autograd.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

import nf4
from double_quant import DoubleQuantized
from double_quant import quantize as quantize_absmax
from kernels import dispatch
from kernels.packed_weight import decoded
from nf4 import NF4, check_finite
from variants.dora import Magnitude, Scaled


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
                q, quantize_absmax(q.absmax, blockwise=dispatch.quantize) if double_quant else None
            )

    @classmethod
    def from_quantized(cls, q: nf4.Quantized, constants: DoubleQuantized | None) -> "FrozenWeight":
        """What a checkpoint holds. q.absmax does not count where `constants` stand for it."""
        frozen = cls.__new__(cls)
        nn.Module.__init__(frozen)
        frozen._keep(q, constants)
        return frozen

    def _keep(self, q: nf4.Quantized, constants: DoubleQuantized | None) -> None:
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

    def stored(self) -> tuple[nf4.Quantized, DoubleQuantized | None]:
        """The weight as it lies in memory: with double quantization, its absmax are the second's codes."""
        q = nf4.Quantized(
            self.packed, self.absmax, self.codebook, self.shape, self.dtype, self.block_size
        )
        if not self.double_quant:
            return q, None
        return q, DoubleQuantized(
            self.absmax,
            self.nested_absmax,
            self.nested_offset,
            self.nested_block_size,
            self.nested_codebook,
        )

    def quantized(self) -> tuple[nf4.Quantized, DoubleQuantized | None]:
        """The weight as `nf4.dequantize` takes it, its constants decoded, and the constants as they are stored."""
        q, constants = self.stored()
        return decoded(q, constants), constants

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


class LoRAMatmul(torch.autograd.Function):
    """y = x W^T + b + s (keep x A^T) B^T, where base.matmul(x, bias=b) is x W^T + b and base.matmul(g, False) is g W."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        keep: Tensor | None,
        scaling: float,
        base: FrozenWeight,
    ) -> Tensor:
        """x (tokens, in), lora_A (r, in), lora_B (out, r), bias (out,), keep bool (tokens, in) -> (tokens, out)."""
        with torch.autocast(x.device.type, enabled=False):
            y = base.matmul(x, bias=bias)  # (tokens, out)
            h = F.linear(x if keep is None else x * keep, lora_A.to(x.dtype))  # (tokens, r)
            y.addmm_(h, lora_B.to(x.dtype).T, alpha=scaling)
        needs_A, needs_B = ctx.needs_input_grad[1:3]
        ctx.save_for_backward(x if needs_A else None, h if needs_B else None, keep, lora_A, lora_B)
        ctx.scaling, ctx.base = scaling, base
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, g: Tensor) -> tuple[Tensor | None, ...]:
        """g (tokens, out) -> the gradients of x, lora_A, lora_B and bias. A second derivative is refused."""
        x, h, keep, lora_A, lora_B = ctx.saved_tensors
        needs_x, needs_A, needs_B, needs_bias = ctx.needs_input_grad[:4]
        dx = None
        with torch.autocast(g.device.type, enabled=False):
            dh = (g @ lora_B.to(g.dtype)).mul_(ctx.scaling)  # (tokens, r)
            dB = (g.T @ h).mul_(ctx.scaling).to(lora_B.dtype) if needs_B else None  # (out, r)
            dA = (
                (dh.T @ (x if keep is None else x * keep)).to(lora_A.dtype) if needs_A else None
            )  # (r, in)
            if needs_x:
                dx = ctx.base.matmul(g, transposed=False)  # (tokens, in)
                A = lora_A.to(g.dtype)
                dx = dx.addmm_(dh, A) if keep is None else dx.add_((dh @ A).mul_(keep))
        return dx, dA, dB, g.sum(0) if needs_bias else None, None, None, None


class QLoRALinear(nn.Module):
    """A frozen 4-bit linear layer with a trainable adapter. Made by `from_linear` or, for a whole model, by `attach`.

    base: FrozenWeight (out, in). lora_A (r, in), lora_B (out, r): float32, cast for the products. bias (out,): frozen, or None.
    lora_magnitude_vector: with use_dora, the trained length of each row of the weight, or None.
    Made by `QLoRALinear(base, bias)` it has no adapter yet, which is an adapter of rank 0: the layers of a 4-bit checkpoint.
    """

    def __init__(
        self,
        base: FrozenWeight,
        bias: Tensor | None,
        r: int = 0,
        lora_alpha: float = 0,
        lora_dropout: float = 0.0,
        compute_dtype: torch.dtype | None = None,
        use_rslora: bool = False,
        use_dora: bool = False,
    ) -> None:
        super().__init__()
        self.base, (self.out_features, self.in_features) = base, base.shape
        self.r, self.lora_alpha, self.use_rslora, self.use_dora = (
            r,
            lora_alpha,
            use_rslora,
            use_dora,
        )
        self.lora_dropout, self.compute_dtype = lora_dropout, compute_dtype
        kind = {
            "dtype": torch.promote_types(base.dtype, torch.float32),
            "device": next(base.buffers()).device,
        }
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, **kind), requires_grad=r > 0)
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, **kind), requires_grad=r > 0)
        if r:
            nn.init.kaiming_uniform_(
                self.lora_A, a=math.sqrt(5)
            )  # as the authors of LoRA, and PEFT, do
        self.lora_magnitude_vector = (
            Magnitude(base, self.lora_A, self.lora_B, self.scaling) if use_dora else None
        )
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_buffer("merged", None, persistent=False)

    @property
    def scaling(self) -> float:
        """s = lora_alpha / r; lora_alpha / sqrt(r) with use_rslora, under which a larger r does not learn more slowly."""
        return self.lora_alpha / ((math.sqrt(self.r) if self.use_rslora else self.r) or 1)

    @classmethod
    def from_linear(
        cls,
        linear: "nn.Linear | QLoRALinear",
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        block_size: int = 64,
        double_quant: bool = True,
        codebook: Tensor | None = NF4,
        compute_dtype: torch.dtype | None = None,
        use_rslora: bool = False,
        use_dora: bool = False,
    ) -> "QLoRALinear":
        """Quantize a dense layer; codebook=None keeps it dense, for 16-bit LoRA. A layer in 4 bits keeps its base.

        Raises: ValueError for what `nf4.quantize` refuses, and an r, lora_alpha or lora_dropout out of range.
        """
        if type(r) is not int or r < 1:
            raise ValueError(f"r must be a whole number >= 1, such as 8; got {r}")
        if not 0 < lora_alpha < math.inf:
            raise ValueError(
                f"lora_alpha must be positive and finite, often 2 * r; got {lora_alpha}"
            )
        if not 0 <= lora_dropout < 1:
            raise ValueError(f"lora_dropout is a probability, 0 <= p < 1; got {lora_dropout}")
        if isinstance(linear, QLoRALinear):
            base, compute_dtype = linear.base, compute_dtype or linear.compute_dtype
        else:
            base = FrozenWeight(linear.weight, block_size, double_quant, codebook)
        return cls(
            base, linear.bias, r, lora_alpha, lora_dropout, compute_dtype, use_rslora, use_dora
        ).train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in autocast's dtype where it is on, else in x's; computed in compute_dtype if given."""
        device = x.device.type
        result = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        flat = x.to(self.compute_dtype or result).reshape(-1, self.in_features)  # (tokens, in)
        bias = None if self.bias is None else self.bias.to(flat.dtype)
        if self.merged is not None or not self.r:
            with torch.autocast(device, enabled=False):
                merged = None if self.merged is None else self.merged.to(flat.dtype)
                y = (
                    self.base.matmul(flat, bias=bias)
                    if merged is None
                    else F.linear(flat, merged, bias)
                )
        else:
            p = self.lora_dropout if self.training else 0.0
            keep = torch.rand(flat.shape, device=x.device) >= p if p else None
            y = LoRAMatmul.apply(
                flat, self.lora_A, self.lora_B, bias, keep, self.scaling / (1 - p), self.base
            )
            if self.use_dora:
                y = Scaled.apply(
                    y,
                    self.lora_magnitude_vector(self.base, self.lora_A, self.lora_B, self.scaling),
                    bias,
                )
        return y.reshape(*x.shape[:-1], self.out_features).to(result)

    def update(self) -> Tensor:
        """What the adapter adds to the weight: s B A (out, in), with use_dora c (W' + s B A) - W'; in the adapter's dtype."""
        with torch.autocast(self.lora_A.device.type, enabled=False):
            update = (self.lora_B @ self.lora_A).detach() * self.scaling
        if not self.use_dora:
            return update
        c = self.lora_magnitude_vector(self.base, self.lora_A, self.lora_B, self.scaling).detach()[
            :, None
        ]  # (out, 1)
        return (c - 1) * self.base(update.dtype) + c * update

    def merge(self) -> None:
        """From now on compute with base + update, one dense weight in the base's original dtype. The base is kept."""
        self.merged = (self.base(self.lora_A.dtype) + self.update()).to(self.base.dtype)

    def unmerge(self) -> None:
        """Drop the merged weight: the layer is bit for bit what it was."""
        self.merged = None


def attach(
    model: nn.Module, targets: str | Iterable[str] = "all-linear", **settings: object
) -> nn.Module:
    """Freeze a model and give its linear layers a 4-bit base and an adapter, in place, one layer at a time.

    Every nn.Linear takes part but the output head (adapters on all of them are what it takes to match 16-bit fine-tuning:
    paper, section 4), or those whose name is, or ends in, one of `targets`; and layers in 4 bits, which keep their base.
    `settings`: see QLoRALinear.from_linear.
    Raises: ValueError if there is no such layer, or naming the one that cannot be quantized; nothing is changed then.
    """
    groups = unadapted(model)
    if not groups:
        raise ValueError(
            "the model has no nn.Linear besides its output head: nothing to adapt (has it been adapted already?)"
        )
    wanted = [targets] if isinstance(targets, str) else list(targets)
    ends = ("",) if targets == "all-linear" else tuple(f".{target}" for target in wanted)
    chosen = [names for names in groups if any(f".{name}".endswith(ends) for name in names)]
    if not chosen:
        known = sorted({name.rpartition(".")[2] for names in groups for name in names})
        raise ValueError(
            f"no linear layer is named {' or '.join(wanted) or 'by no target'}; there are {', '.join(known)}"
        )
    before, after = adapt(model, [(names, settings) for names in chosen])
    print(
        f"adapters of rank {model.get_submodule(chosen[0][0]).r} on {len(chosen)} linear layers; "
        f"their frozen weights: {before / 1e6:.1f} MB before, {after / 1e6:.1f} MB now"
    )
    return model


def adapt(model: nn.Module, layers: list[tuple[list[str], dict]]) -> tuple[int, int]:
    """Adapt layers, each given by its names and settings, all or none. -> bytes of their weights before, and now"""
    for (name, *_), _ in layers:
        linear = model.get_submodule(name)
        if isinstance(linear, nn.Linear):
            with naming(name):
                check_finite(linear.weight.detach().float().flatten(), linear.weight.shape)
    before = after = 0
    for names, settings in layers:
        linear = model.get_submodule(names[0])
        with naming(names[0]):
            layer = QLoRALinear.from_linear(linear, **settings)
        for name in names:
            model.set_submodule(name, layer)
        before += layer.base.shape.numel() * layer.base.dtype.itemsize
        after += layer.base.nbytes
    model.requires_grad_(False)
    for layer in names_of(model, QLoRALinear):  # those of an earlier call too
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(layer.r > 0 and name != "bias")
    return before, after


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Let a ValueError say which layer it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"layer {name}: {error}") from None


def unadapted(model: nn.Module) -> list[list[str]]:
    """The linear layers without an adapter, but for the output head, each as the list of its names in the model."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    tied = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    dense = [
        names
        for module, names in names_of(model, nn.Linear).items()
        if module is not head and module.weight not in tied
    ]
    return dense + [names for layer, names in names_of(model, QLoRALinear).items() if not layer.r]


def names_of(model: nn.Module, kind: type[nn.Module]) -> dict[nn.Module, list[str]]:
    """Every module of exactly this class in a model, with all the names under which the model uses it."""
    found: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is kind and name:
            found.setdefault(module, []).append(name)
    return found


def merge(model: nn.Module) -> tuple[nn.Module, dict[str, MergeAudit]]:
    """Replace every adapted layer, in place, by a dense nn.Linear of base + update in the base's original dtype.

    The audit says, by layer, what a merge into 4 bits would do instead: quantize base + update, and compare the change that is
    realised with the one that was wanted. An update is small beside the gaps between levels, so rounding swallows much of it.
    """
    audit = {}
    for layer, names in names_of(model, QLoRALinear).items():
        frozen, update = layer.base, layer.update()
        if frozen.codebook is not None:
            audit |= dict.fromkeys(names, frozen.audit(update))
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta").train(
            layer.training
        )
        linear.weight, linear.bias = (
            nn.Parameter((frozen(update.dtype) + update).to(frozen.dtype), False),
            layer.bias,
        )
        for name in names:
            model.set_submodule(name, linear)
    return model, audit
