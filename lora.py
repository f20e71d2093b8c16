"""LoRA on a frozen 4-bit layer: train a small update beside weights that never change.

A linear layer's weight W (out, in) is frozen in NF4. Beside it stand two thin matrices, A (r, in) random and B (out, r)
zero, so that training starts exactly at the pretrained model (paper, section 3, equations 3 and 5; LoRA, arXiv 2106.09685):

    y = x W'^T + b + s (d(x) A^T) B^T        W' = the dequantized weight,  s = lora_alpha / r,  d = dropout

With g = dL/dy and h = d(x) A^T (tokens, r), the chain rule by hand:

    dL/dB = s g^T h        dL/dh = s g B        dL/dA = (dL/dh)^T d(x)        dL/dx = g W' + d'((dL/dh) A)

No gradient for W is wanted, so x is kept for A alone, and W' is needed only while it multiplies: it is dequantized in
forward, dropped, and dequantized again in backward. What lives on between the two, besides the parameters, is x (tokens, in),
h (tokens, r), and with dropout its mask, one bool for each element of x.

Differs from PEFT: base and adapter are one autograd function; a merge goes to a dense weight and says what a 4-bit merge
would have lost; unmerging is exact, because the codes are never touched.
"""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from frozen import FrozenWeight, MergeAudit
from nf4 import NF4


class LoRAMatmul(torch.autograd.Function):
    """y = x W^T + b + s (keep x A^T) B^T, where `base(dtype)` makes W (out, in) whenever it is needed."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, keep: Tensor | None,
                scaling: float, base: Callable[[torch.dtype], Tensor]) -> Tensor:
        """x (tokens, in), lora_A (r, in), lora_B (out, r), bias (out,), keep bool (tokens, in) -> (tokens, out)."""
        with torch.autocast(x.device.type, enabled=False):
            y = F.linear(x, base(x.dtype), bias)  # (tokens, out)
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
            dA = (dh.T @ (x if keep is None else x * keep)).to(lora_A.dtype) if needs_A else None  # (r, in)
            if needs_x:
                dx = dh @ lora_A.to(g.dtype)  # (tokens, in)
                dx = (dx if keep is None else dx.mul_(keep)).addmm_(g, ctx.base(g.dtype))
        return dx, dA, dB, g.sum(0) if needs_bias else None, None, None, None


class QLoRALinear(nn.Module):
    """A frozen 4-bit linear layer with a trainable adapter. Made by `from_linear` or, for a whole model, by `attach`.

    base: FrozenWeight (out, in). lora_A (r, in), lora_B (out, r): float32, cast for the products. bias (out,): frozen, or None.
    """

    def __init__(self, linear: nn.Linear, base: FrozenWeight, r: int, lora_alpha: float, lora_dropout: float,
                 compute_dtype: torch.dtype | None) -> None:
        super().__init__()
        self.base, (self.out_features, self.in_features) = base, base.shape
        if type(r) is not int or not 1 <= r <= min(base.shape):
            raise ValueError(f"r must be a whole number from 1 to {min(base.shape)}, the layer's smaller side; got {r}")
        if not 0 < lora_alpha < math.inf:
            raise ValueError(f"lora_alpha must be positive and finite, often 2 * r; got {lora_alpha}")
        if not 0 <= lora_dropout < 1:
            raise ValueError(f"lora_dropout is a probability, 0 <= p < 1; got {lora_dropout}")
        self.r, self.lora_alpha, self.scaling = r, lora_alpha, lora_alpha / r
        self.lora_dropout, self.compute_dtype = lora_dropout, compute_dtype
        kind = {"dtype": torch.promote_types(base.dtype, torch.float32), "device": linear.weight.device}
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, **kind))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, **kind))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as the authors of LoRA, and PEFT, do
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        self.register_buffer("merged", None, persistent=False)
        self.train(linear.training)

    @classmethod
    def from_linear(cls, linear: nn.Linear, r: int = 8, lora_alpha: float = 16, lora_dropout: float = 0.0, block_size: int = 64,
                    double_quant: bool = True, codebook: Tensor | None = NF4,
                    compute_dtype: torch.dtype | None = None) -> "QLoRALinear":
        """Quantize a dense layer; codebook=None keeps it dense, for 16-bit LoRA. Raises: ValueError."""
        frozen = FrozenWeight(linear.weight, block_size, double_quant, codebook)
        return cls(linear, frozen, r, lora_alpha, lora_dropout, compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in autocast's dtype where it is on, else in x's; computed in compute_dtype if given."""
        device = x.device.type
        result = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        flat = x.to(self.compute_dtype or result).reshape(-1, self.in_features)  # (tokens, in)
        bias = None if self.bias is None else self.bias.to(flat.dtype)
        if self.merged is not None:
            with torch.autocast(device, enabled=False):
                y = F.linear(flat, self.merged.to(flat.dtype), bias)
        else:
            p = self.lora_dropout if self.training else 0.0
            keep = torch.rand(flat.shape, device=x.device) >= p if p else None
            y = LoRAMatmul.apply(flat, self.lora_A, self.lora_B, bias, keep, self.scaling / (1 - p), self.base)
        return y.reshape(*x.shape[:-1], self.out_features).to(result)

    def update(self) -> Tensor:
        """What the adapter adds to the weight: s B A (out, in), in the adapter's dtype."""
        with torch.autocast(self.lora_A.device.type, enabled=False):
            return (self.lora_B @ self.lora_A).detach() * self.scaling

    def merge(self) -> None:
        """From now on compute with base + update, one dense weight in the base's original dtype. The base is kept."""
        self.merged = (self.base(self.lora_A.dtype) + self.update()).to(self.base.dtype)

    def unmerge(self) -> None:
        """Drop the merged weight: the layer is bit for bit what it was."""
        self.merged = None


def attach(model: nn.Module, targets: str | Iterable[str] = "all-linear", **settings: object) -> nn.Module:
    """Freeze a model and give its linear layers a 4-bit base and an adapter, in place, one layer at a time.

    Every nn.Linear takes part but the output head (adapters on all of them are what it takes to match 16-bit fine-tuning:
    paper, section 4), or those whose name is, or ends in, one of `targets`. `settings`: see QLoRALinear.from_linear.
    Raises: ValueError if there is no such layer, or naming the one that cannot be quantized or adapted.
    """
    groups = _find_layers(model, targets)
    model.requires_grad_(False)
    dense_bytes = base_bytes = 0
    for names in groups:
        linear = model.get_submodule(names[0])
        try:
            layer = QLoRALinear.from_linear(linear, **settings)
        except ValueError as error:
            raise ValueError(f"layer {names[0]}: {error}") from None
        for name in names:
            model.set_submodule(name, layer)
        dense_bytes, base_bytes = dense_bytes + linear.weight.nbytes, base_bytes + layer.base.nbytes
    print(f"adapters of rank {layer.r} on {len(groups)} linear layers; "
          f"their frozen weights: {dense_bytes / 1e6:.1f} MB before, {base_bytes / 1e6:.1f} MB now")
    return model


def _find_layers(model: nn.Module, targets: str | Iterable[str]) -> list[list[str]]:
    """The layers to adapt, each as the list of its names in the model."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    tied = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    groups = [names for module, names in names_of(model, nn.Linear).items() if module is not head and module.weight not in tied]
    if not groups:
        raise ValueError("the model has no nn.Linear besides its output head: nothing to adapt (has it been adapted already?)")
    wanted = [targets] if isinstance(targets, str) else list(targets)
    ends = ("",) if targets == "all-linear" else tuple(f".{target}" for target in wanted)
    chosen = [names for names in groups if any(f".{name}".endswith(ends) for name in names)]
    if not chosen:
        known = sorted({name.rpartition(".")[2] for names in groups for name in names})
        raise ValueError(f"no linear layer is named {' or '.join(wanted) or 'by no target'}; there are {', '.join(known)}")
    return chosen


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
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta").train(layer.training)
        linear.weight, linear.bias = nn.Parameter((frozen(update.dtype) + update).to(frozen.dtype), False), layer.bias
        for name in names:
            model.set_submodule(name, linear)
    return model, audit
