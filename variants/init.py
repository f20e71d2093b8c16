"""Initial adapters that compensate for a part of the quantization error: PiSSA and LoftQ.

LoRA starts with B = 0, so training starts from the quantized model, which differs a little from the
pretrained one. Two variants start with a nonzero B A, and with a base Q that is quantized to match
it. s is the scaling of the adapter. svd_r(W) is the nearest matrix of rank r, made of the first r
singular values and vectors (Eckart and Young):

    default    Q = quantize(W)          B = 0
    pissa      s B A = svd_r(W)         Q = quantize(W - s B A)
    loftq      Q = quantize(W - s B A)  s B A = svd_r(W - Q)      LOFTQ_STEPS times, from B = 0

PiSSA (arXiv 2404.02948) trains the directions in which W is largest, so less is left to round.
LoftQ (arXiv 2310.08659) starts with an error |W - Q - s B A| of at most |W - Q|. In both, A and B
are each scaled by the square roots of the singular values.

With both, Q is not quantize(W), and the adapter works with this Q only. So Q must be saved too
(--save-4bit). DoRA (dora.py) works with each start: its magnitudes start as the row norms of
Q + s B A. rsLoRA (arXiv 2312.03732) is the option use_rslora of QLoRALinear.

Differs from PEFT: its LoftQ ignores s, so it starts closer to W only if lora_alpha = r. Its PiSSA
leaves the base dense; the user quantizes it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lora import FrozenWeight, QLoRALinear
from variants.dora import DoRALinear

LOFTQ_STEPS = 5  # as in the paper; each step costs one singular value decomposition per weight
STARTS = ("default", "pissa", "loftq")


def maker(
    start: str, adapter: dict, quantization: dict
) -> Callable[[Tensor, Tensor | None], QLoRALinear]:
    """Returns a function that makes a layer from a weight (out, in) and a bias.

    With "default" the layer has no adapter; with another start it has the adapter of that start.
    adapter: layer_type, r, lora_alpha, lora_dropout and use_rslora, as `lora.attach` takes them.
    quantization: block_size, double_quant and codebook, as FrozenWeight takes them.
    """
    settings = dict(adapter)
    layer_type = settings.pop("layer_type", QLoRALinear)

    def make(weight: Tensor, bias: Tensor | None) -> QLoRALinear:
        if quantization.get("codebook", weight) is None:
            weight = weight.clone()  # a view would keep the checkpoint file mapped
        layer = QLoRALinear(FrozenWeight(weight, **quantization), bias)
        if start == "default":
            return layer
        layer = layer_type.from_linear(layer, **settings)
        weight = weight.to(layer.lora_A.dtype)
        if start == "pissa":
            start_pissa(layer, weight, quantization)
        else:
            start_loftq(layer, weight, quantization)
        if isinstance(layer, DoRALinear):
            layer.reset_magnitude()  # base and adapter have changed
        return layer

    return make


@torch.no_grad()
def start_pissa(layer: QLoRALinear, weight: Tensor, quantization: dict) -> None:
    """Fit the adapter to the weight (out, in), and quantize the difference as the base."""
    fit(layer, weight)
    requantize(layer, weight, quantization)


@torch.no_grad()
def start_loftq(layer: QLoRALinear, weight: Tensor, quantization: dict) -> None:
    """In turn, quantize weight (out, in) minus the adapter, and fit the adapter to the error."""
    for _ in range(LOFTQ_STEPS):
        requantize(layer, weight, quantization)
        fit(layer, weight - layer.base(weight.dtype))


def requantize(layer: QLoRALinear, weight: Tensor, quantization: dict) -> None:
    """Set the base to quantize(W - s B A)."""
    remainder = weight - layer.scaling * layer.lora_B @ layer.lora_A  # (out, in)
    layer.base = FrozenWeight(remainder.to(layer.base.dtype), **quantization)


def fit(layer: QLoRALinear, target: Tensor) -> None:
    """Set s B A to svd_r of `target` (out, in); A and B are zero beyond its rank."""
    u, values, vh = torch.linalg.svd(target, full_matrices=False)  # (out, k), (k,), (k, in)
    k = min(layer.r, len(values))
    roots = (values[:k] / layer.scaling).sqrt()
    layer.lora_A.zero_()[:k] = roots[:, None] * vh[:k]
    layer.lora_B.zero_()[:, :k] = u[:, :k] * roots
