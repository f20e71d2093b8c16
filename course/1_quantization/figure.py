"""Left: one block with and without an outlier. Right: the error of the others by block size."""

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import nf4

WEIGHTS = "#1f3a5f"
LEVELS = "#9db8d2"
OUTLIER = "#b5442e"
CODE = torch.arange(-7, 8) / 7  # levels at equal distances, with an exact zero
SIZES = [2**k for k in range(4, 13)]


def draw(figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    draw_block(left)
    draw_errors(right)


def normal(n: int) -> Tensor:
    """float32 (n,): the same bits on every processor, which torch.randn does not promise."""
    return torch.from_numpy(np.random.default_rng(1).standard_normal(n)).float()


def draw_block(axes: Axes) -> None:
    """A block of 32 numbers, then the same with an outlier, and the levels of both."""
    for start, outlier in ((0, 2.0), (40, 8.0)):
        weight = normal(32).clamp(-2, 2)
        weight[20] = outlier
        q = nf4.quantize(weight, 32, CODE)
        decoded = nf4.dequantize(q)
        place = torch.arange(start, start + 32)
        axes.hlines(CODE * q.absmax, start - 1, start + 32, color=LEVELS, linewidth=0.8)
        axes.plot(place, weight, "o", color=WEIGHTS, markersize=3)
        axes.vlines(place, weight, decoded, color=OUTLIER, linewidth=1)
        axes.annotate(f"absmax {outlier:.0f}", (start + 8, -5.5), color=WEIGHTS)
    axes.set(
        title="32 weights, the levels, the errors (red)",
        ylabel="weight",
        xticks=[],
        ylim=(-8.5, 8.5),
    )


def draw_errors(axes: Axes) -> None:
    """The mean error of the numbers that are no outliers, in percent of their magnitude."""
    weight = normal(2**18)
    with_outliers = weight.clone()
    with_outliers[::4096] = 100.0
    usual = with_outliers == weight
    mean = weight[usual].double().abs().mean()
    for tensor, color, name in (
        (weight, WEIGHTS, "normal weights"),
        (with_outliers, OUTLIER, "one outlier of 100 σ in 4096 weights"),
    ):
        errors = []
        for size in SIZES:
            error = tensor.double() - nf4.dequantize(nf4.quantize(tensor, size, CODE))
            errors.append(100 * (error[usual].abs().mean() / mean).item())
        axes.plot(SIZES, errors, "o-", color=color, markersize=4, label=name)
    axes.set(
        title="error of all weights but the outliers",
        xlabel="block size",
        ylabel="% of their mean magnitude",
        ylim=(0, 105),
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(SIZES, [str(size) for size in SIZES])
    axes.legend(frameon=False, loc="upper left")
