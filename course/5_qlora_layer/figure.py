"""The bits of a frozen weight, and the bytes that are alive at the peak of a training step."""

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora import FrozenWeight
from memory.formula import METHODS, QLORA, SHAPES, Prediction, predict

BLOCK_SIZES = [32, 64, 128, 256]
SIDE = 512  # of the weight
MODEL = "llama-7b"
LENGTH = 512  # tokens in the batch
COLORS = {
    "weights": "#1a5fa8",
    "embedding, head, norms": "#9ec5e8",
    "adapters": "#2e7d32",
    "gradients": "#f2a33a",
    "AdamW moments": "#b3261e",
    "activations, loss, buffer": "#8a8a8a",
}


def at_peak(prediction: Prediction) -> dict[str, int]:
    """The bytes that are alive at the instant of a step that needs most."""
    parts = prediction.components
    peak = max(prediction.instants.values(), key=sum)
    return {
        "weights": parts["base"] + parts["constants"],
        "embedding, head, norms": parts["embedding, head"] + parts["norms"],
        "adapters": parts["adapters"],
        "gradients": peak.gradients,
        "AdamW moments": parts["AdamW moments"],
        "activations, loss, buffer": peak.activations + peak.loss + parts["buffer"],
    }


def draw(figure: Figure) -> None:
    left, right = figure.subplots(1, 2, width_ratios=[2, 3])
    draw_bits(left)
    draw_peak(right)


def draw_bits(axes: Axes) -> None:
    weight = torch.zeros(SIDE, SIDE)
    for double, style, color in [(False, "s--", "#b3261e"), (True, "o-", "#1a5fa8")]:
        sizes = [FrozenWeight(weight, block, double).nbytes for block in BLOCK_SIZES]
        bits = [8 * size / weight.numel() for size in sizes]
        label = "constants in 8 bits" if double else "constants in 32 bits"
        axes.plot(BLOCK_SIZES, bits, style, color=color, label=label)
        place = BLOCK_SIZES.index(64)
        text = {"xytext": (6, 4), "textcoords": "offset points"}
        axes.annotate(f"{bits[place]:.3f}", (64, bits[place]), **text)
    axes.set_xscale("log", base=2)
    axes.set_xticks(BLOCK_SIZES, [str(size) for size in BLOCK_SIZES])
    axes.set_ylim(4, 5.1)
    axes.set_title("The cost of a frozen weight", fontsize=10)
    axes.set_xlabel("block size")
    axes.set_ylabel("bits per weight")
    axes.legend(frameon=False)


def draw_peak(axes: Axes) -> None:
    for place, method in enumerate(METHODS):
        prediction = predict(SHAPES[MODEL], method, batch=1, length=LENGTH)
        left = 0.0
        for name, size in at_peak(prediction).items():
            label = name if method == QLORA else None
            axes.barh(place, size / 1e9, left=left, color=COLORS[name], label=label, height=0.6)
            left += size / 1e9
        axes.text(left + 1, place, f"{prediction.peak() / 1e9:.1f} GB", va="center")
    axes.set_yticks(range(len(METHODS)), ["full", "16-bit LoRA", "QLoRA"])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_title(f"Alive at the peak: {MODEL}, {LENGTH} tokens", fontsize=10)
    axes.set_xlabel("GB")
    axes.legend(frameon=False, loc="lower right")
