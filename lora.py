"""LoRA on a frozen 4-bit layer: train a small update beside weights that never change.

A linear layer's weight W (out, in) is frozen in NF4. Beside it stand two thin matrices, A (r, in) random and B (out, r)
zero, so that training starts exactly at the pretrained model (paper, section 3, equations 3 and 5; LoRA, arXiv 2106.09685):

    y = x W'^T + b + s (d(x) A^T) B^T        W' = the dequantized weight,  s = lora_alpha / r,  d = dropout

lora_matmul.py has the product and its gradients, dora.py a variant; here are the layer, a model of them, and the way back.

Differs from PEFT: a merge goes to a dense weight and says what a 4-bit merge would have lost; unmerging is exact, because the
codes are never touched.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frozen import FrozenWeight, MergeAudit
from lora_matmul import LoRAMatmul
from nf4 import NF4, check_finite
from variants.dora import Magnitude, Scaled


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
