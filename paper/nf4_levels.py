"""Draws NF4's levels on the weights of a real layer, before and after division by absmax.

Left: one layer of SmolLM2, and a normal density with the same standard deviation. Right: the same
weights, each block of 64 divided by its largest magnitude, with the 16 levels of NF4 and the share
of the weights on each.

    python paper/nf4_levels.py        writes paper/nf4_levels.png
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from safetensors import safe_open
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import nf4
from checkpoints import sources

LAYER = "model.layers.15.mlp.up_proj.weight"
PICTURE = Path(__file__).with_suffix(".png")
BARS = "#9db8d2"
CURVE = "#1f3a5f"
LEVELS = "#b5442e"


def draw_weights(axes: Axes, weight: Tensor) -> None:
    """A histogram of the weights, and the normal density with their standard deviation."""
    sigma = weight.std().item()
    limits = (-4 * sigma, 4 * sigma)
    axes.hist(weight.flatten().numpy(), bins=200, range=limits, density=True, color=BARS)
    x = torch.linspace(*limits, 400)
    density = torch.exp(-((x / sigma) ** 2) / 2) / (sigma * (2 * torch.pi) ** 0.5)
    axes.plot(x, density, color=CURVE, linewidth=1.5, label=f"normal, σ = {sigma:.3f}")
    axes.set(title=f"weights of {LAYER.removesuffix('.weight')}", xlabel="weight", yticks=[])
    axes.legend(frameon=False, loc="upper right")


def draw_levels(axes: Axes, weight: Tensor) -> None:
    """A histogram of weight / absmax, NF4's levels, and the percentage of weights on each."""
    q = nf4.quantize(weight)
    normalized = weight.reshape(-1, q.block_size) / q.absmax[:, None]  # (blocks, block_size)
    codes = torch.cat([q.packed >> 4, q.packed & 15]).flatten().int()
    share = codes.bincount(minlength=16) / weight.numel()
    axes.hist(normalized.flatten().numpy(), bins=201, range=(-1, 1), density=True, color=BARS)
    top = axes.get_ylim()[1]
    for level, used in zip(nf4.NF4.tolist(), share.tolist()):
        axes.axvline(level, ymax=0.88, color=LEVELS, linewidth=1.2)
        axes.text(level, top * 1.06, f"{100 * used:.0f}", ha="center", fontsize=8, color=LEVELS)
    axes.set(
        title="divided by the absmax of their block: NF4's levels, % of weights on each",
        xlabel="weight / absmax",
        yticks=[],
    )
    axes.set_ylim(0, top * 1.18)


def main() -> None:
    with safe_open(sources.default_folder() / "model.safetensors", "pt") as file:
        weight = file.get_tensor(LAYER).float()
    plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 3.6), layout="constrained", width_ratios=(2, 3)
    )
    draw_weights(left, weight)
    draw_levels(right, weight)
    figure.savefig(PICTURE, dpi=130)
    print(f"wrote {PICTURE.name}")


if __name__ == "__main__":
    main()
