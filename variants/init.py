"""Where an adapter starts: at nothing, or where it makes up for what quantization loses.

LoRA starts with B = 0, so that training starts at the 4-bit model, which is not quite the pretrained one. Two variants start
with a B A that is not zero, and a base Q that is quantized with regard to it; s is the adapter's scaling, svd_r the nearest
matrix of rank r, which the first r singular values and vectors make (Eckart and Young):

    default    Q = quantize(W)                    B = 0
    pissa      s B A = svd_r(W)                   Q = quantize(W - s B A)        PiSSA, arXiv 2404.02948
    loftq      s B A = svd_r(W - Q), then         Q = quantize(W - s B A), in turn; LOFTQ_STEPS times   LoftQ, arXiv 2310.08659

PiSSA trains the directions in which W is largest, and leaves less to be rounded. LoftQ's |W - Q - s B A|, the error at the
start of training, is at most |W - Q|. Both share the singular values between A and B, each of which takes their root.

The base is then not quantize(W), and an adapter is worth nothing on another base: it is saved too (checkpoint.save_4bit).
rsLoRA, s = lora_alpha / sqrt(r) (arXiv 2312.03732), is a flag of the layer: lora.QLoRALinear. So is DoRA (dora.py), which goes
with any start: its magnitudes begin as the lengths of the rows of Q + s B A.

Differs from PEFT: its LoftQ leaves s out, so that it starts nearer to W only where lora_alpha = r. Its PiSSA leaves the base
dense, to be quantized by the user.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lora import FrozenWeight, QLoRALinear
from variants.dora import Magnitude

LOFTQ_STEPS = 5  # as in the paper; each costs a singular value decomposition of every weight
STARTS = ("default", "pissa", "loftq")


def maker(
    start: str, adapter: dict, quantization: dict
) -> Callable[[Tensor, Tensor | None], QLoRALinear]:
    """What makes a layer of a weight (out, in) and a bias: without an adapter for "default", else with one that starts there.

    adapter: r, lora_alpha, lora_dropout, use_rslora, use_dora, as QLoRALinear.from_linear takes them; quantization: block_size,
    double_quant, codebook, as FrozenWeight does.
    """

    def make(weight: Tensor, bias: Tensor | None) -> QLoRALinear:
        if quantization.get("codebook", weight) is None:
            weight = weight.clone()  # or it would stay in the mapped file
        layer = QLoRALinear(FrozenWeight(weight, **quantization), bias)
        if start != "default":
            layer = QLoRALinear.from_linear(layer, **adapter)
            for _ in range(LOFTQ_STEPS if start == "loftq" else 1):
                step(layer, weight.to(layer.lora_A.dtype), start, quantization)
            if (
                layer.use_dora
            ):  # on another base, and with another B A, than the layer was made with
                layer.lora_magnitude_vector = Magnitude(
                    layer.base, layer.lora_A, layer.lora_B, layer.scaling
                )
        return layer

    return make


@torch.no_grad()
def step(layer: QLoRALinear, weight: Tensor, start: str, quantization: dict) -> None:
    """A step of LoftQ, or the only one of PiSSA: A and B from the weight and the base, the base from the weight, A and B.

    weight (out, in): in the dtype of the adapter.
    """

    def requantize() -> None:
        remainder = weight - layer.scaling * layer.lora_B @ layer.lora_A
        layer.base = FrozenWeight(remainder.to(layer.base.dtype), **quantization)

    if start == "pissa":
        fit(layer, weight)
        requantize()
    else:
        requantize()
        fit(layer, weight - layer.base(weight.dtype))


def fit(layer: QLoRALinear, target: Tensor) -> None:
    """Let s B A be the nearest to a matrix (out, in) that rank r can be; what is beyond its own rank is zero."""
    u, values, vh = torch.linalg.svd(target, full_matrices=False)  # (out, k), (k,), (k, in)
    k = min(layer.r, len(values))
    roots = (values[:k] / layer.scaling).sqrt()
    layer.lora_A.zero_()[:k] = roots[:, None] * vh[:k]
    layer.lora_B.zero_()[:, :k] = u[:, :k] * roots
