"""Left: what a weight costs by block size. Right: constants, and the levels that they take."""

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import double_quant
import nf4

SINGLE = "#9db8d2"
DOUBLE = "#b5442e"
CURVE = "#1f3a5f"
SIZES = (32, 64, 128, 256)


def draw(figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    draw_costs(left)
    draw_constants(right)


def draw_costs(axes: Axes) -> None:
    """Bits of a weight: the code, and its share of the constants, counted in stored bytes."""
    weight = torch.ones(2**20)
    place = np.arange(len(SIZES))
    single, double = [], []
    for size in SIZES:
        q = nf4.quantize(weight, size)
        dq = double_quant.quantize(q.absmax)
        single.append(32 * q.absmax.numel() / weight.numel())
        double.append((8 * dq.codes.numel() + 32 * dq.absmax.numel() + 32) / weight.numel())
    for shift, bits, color, name in (
        (-0.2, single, SINGLE, "constants in float32"),
        (0.2, double, DOUBLE, "constants in 8 bits"),
    ):
        bars = axes.bar(place + shift, bits, width=0.4, color=color, label=name)
        axes.bar_label(bars, [f"{bit:.3f}" for bit in bits], fontsize=8)
    axes.set(
        title="bits a weight, in addition to its 4-bit code",
        xlabel="block size",
        xticks=place,
        xticklabels=SIZES,
    )
    axes.legend(frameon=False)


def draw_constants(axes: Axes) -> None:
    """The constants of normal weights, and the 8-bit levels of one block of 256 constants."""
    weight = torch.from_numpy(np.random.default_rng(0).standard_normal(2**20))
    absmax = nf4.quantize(weight.float()).absmax
    dq = double_quant.quantize(absmax)
    counts, _, _ = axes.hist(absmax.numpy(), bins=80, color=SINGLE)
    # Rounded, because the last bits of levels and sums depend on the processor.
    offset, nested_absmax = (round(x.item(), 3) for x in (dq.offset, dq.absmax[0]))
    levels = double_quant.DYNAMIC.double().round(decimals=5) * nested_absmax + offset
    axes.vlines(levels, -0.09 * max(counts), -0.02 * max(counts), color=DOUBLE, linewidth=0.5)
    axes.axvline(offset, color=CURVE, linewidth=0.8, linestyle="dashed")
    axes.annotate(" mean", (offset, 1.02 * max(counts)), color=CURVE, fontsize=8)
    axes.set(
        title="constants of normal weights; the 256 levels",
        xlabel="absmax of blocks of 64",
        yticks=[],
        ylim=(-0.11 * max(counts), 1.1 * max(counts)),
    )
