"""Left: the 16 levels of NF4 under a normal density. Right: how often normal weights use each."""

from statistics import NormalDist

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import nf4

CURVE = "#1f3a5f"
NORMAL_FLOAT = "#b5442e"
EVEN = "#9db8d2"
LARGEST = NormalDist().inv_cdf(0.9677083)  # the largest quantile of NF4: 1.85 deviations


def draw(figure: Figure) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(1, 1))
    draw_levels(left)
    draw_shares(right)


def draw_levels(axes: Axes) -> None:
    x = torch.linspace(-3, 3, 301, dtype=torch.float64)
    axes.plot(x, density(x), color=CURVE)
    levels = nf4.NF4.double() * LARGEST
    axes.vlines(levels, 0, density(levels), color=NORMAL_FLOAT, linewidth=1.4)
    even = torch.linspace(-LARGEST, LARGEST, 16, dtype=torch.float64)
    axes.plot(even, torch.full_like(even, -0.02), "|", color=CURVE, markersize=9)
    axes.annotate("equal\ndistances", (-3, -0.036), fontsize=8, color=CURVE)
    axes.set(
        title="NF4 has more levels where weights are dense",
        xlabel="weight, in standard deviations",
        ylim=(-0.05, 0.43),
        yticks=[],
    )


def density(x: Tensor) -> Tensor:
    return torch.exp(-(x**2) / 2) / (2 * torch.pi) ** 0.5


def draw_shares(axes: Axes) -> None:
    place = np.arange(16)
    for codebook, color, shift, name in (
        (nf4.NF4, NORMAL_FLOAT, -0.2, "NF4"),
        (torch.linspace(-1, 1, 16), EVEN, 0.2, "equal distances"),
    ):
        axes.bar(place + shift, 100 * shares(codebook).numpy(), width=0.4, color=color, label=name)
    axes.axhline(100 / 16, color=CURVE, linewidth=0.8, linestyle="dashed", label="equal use")
    axes.set(
        title="how often normal weights use each level",
        xlabel="code, in blocks of 64",
        ylabel="% of the weights",
        xticks=range(0, 16, 3),
    )
    axes.legend(frameon=False, loc="upper left")


def shares(codebook: Tensor) -> Tensor:
    """The share of each code (16,) in a million normal numbers, quantized in blocks of 64."""
    weight = torch.from_numpy(np.random.default_rng(0).standard_normal(2**20))
    packed = nf4.quantize(weight.float(), 64, codebook).packed
    codes = torch.cat([packed >> 4, packed & 15]).flatten()
    return codes.bincount(minlength=16) / weight.numel()
