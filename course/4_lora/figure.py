"""What a layer keeps for its backward pass, and the share of a model that is trained."""

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from lora import QLoRALinear
from memory.formula import QLORA, SHAPES, predict

WIDTH = 512
RANK = 16
TOKENS = [64, 128, 256, 512, 1024]
RANKS = [2**k for k in range(9)]
MODEL = "llama-7b"


def saved_bytes(layer: QLoRALinear, tokens: int, by_hand: bool) -> int:
    """What the forward pass saves, without the parameters, which exist anyway."""
    x = torch.zeros(tokens, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    parameters = {parameter.data_ptr() for parameter in layer.parameters()}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x) if by_hand else by_autograd(layer, x)
    assert y.shape == x.shape
    return sum(tensor.nbytes for tensor in kept.values())


def by_autograd(layer: QLoRALinear, x: Tensor) -> Tensor:
    """The same output from three products that autograd differentiates."""
    A = layer.lora_A.to(x.dtype)
    B = layer.lora_B.to(x.dtype)
    return F.linear(x, layer.base(x.dtype)) + layer.scaling * F.linear(F.linear(x, A), B)


def draw(figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    draw_saved(left)
    draw_trained(right)


def draw_saved(axes: Axes) -> None:
    linear = nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16)
    layer = QLoRALinear.from_linear(linear, r=RANK)
    rules = [
        (False, "autograd, on the dequantized weight", "s--", "#b3261e"),
        (True, "backward by hand", "o-", "#1a5fa8"),
    ]
    for by_hand, label, style, color in rules:
        saved = [saved_bytes(layer, tokens, by_hand) / 2**20 for tokens in TOKENS]
        axes.plot(TOKENS, saved, style, color=color, label=label)
    axes.axhline(linear.weight.nbytes / 2**20, color="gray", linewidth=0.8, linestyle=":")
    axes.text(TOKENS[-1], linear.weight.nbytes / 2**20, "dense weight", ha="right", va="bottom")
    axes.set_title(f"Saved by one layer of {WIDTH} x {WIDTH}, r = {RANK}", fontsize=10)
    axes.set_xlabel("tokens")
    axes.set_ylabel("MiB saved for the backward pass")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="upper left")


def draw_trained(axes: Axes) -> None:
    shape = SHAPES[MODEL]
    shares = []
    for r in RANKS:
        adapters = predict(shape, QLORA, batch=1, length=1, r=r).components["adapters"]
        shares.append(100 * adapters / 4 / shape.parameters())  # float32: 4 bytes a number
    axes.loglog(RANKS, shares, "o-", color="#1a5fa8", base=2)
    axes.set_yscale("log", base=10)
    for r, share in zip(RANKS, shares):
        if r in (1, 16, 256):
            place = {"ha": "left", "va": "top"} if r < 256 else {"ha": "right", "va": "bottom"}
            axes.text(r * (1.15 if r < 256 else 0.85), share, f"{share:.2f} %", **place)
    axes.set_xticks(RANKS, [str(r) for r in RANKS])
    axes.set_title(f"Trained share of {MODEL} (all seven maps)", fontsize=10)
    axes.set_xlabel("rank r")
    axes.set_ylabel("% of the model's parameters")
