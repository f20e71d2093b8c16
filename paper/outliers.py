"""Blocks confine an outlier (section 2, block-wise k-bit quantization; equations 1 and 2).

Division by absmax puts the largest weight on the outermost level. If one weight is far larger than
the others, these fall onto the few levels around zero, and their error grows with the outlier. With
blocks of B weights, only the B - 1 neighbours of an outlier suffer, at the price of a constant per
block: 32 / B bits a weight, or with double quantization 8 / B + 32 / (256 B).

`one_outlier` plants one weight of a given size among normal ones, and measures the error of the
others. `real_layers` quantizes the layers of the three bases as one block and in blocks of 64.
`bill` is the trade between bits and error for normal weights, from the exact distribution.

Differs from the paper, which explains this and does not measure it.
"""

import math
from statistics import fmean

import torch
from matplotlib.figure import Figure
from torch import Tensor

from kernels import dispatch
from nf4 import NF4
from paper import bases, codebooks, experiment
from paper.experiment import Finding, Setting

CODES = {"int8": (8, codebooks.integers(8)), "NF4": (4, NF4)}
SIZES = [0, 5, 10, 20, 50, 100, 200, 500, 1000]  # of the outlier, in standard deviations
BLOCKS = [64, 256, 1024, 4096, 2**20]
BILL_BLOCKS = [16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
SIDE = 1024
WHOLE = 2**20  # all weights of a layer of SIDE x SIDE
PLANTED = 100  # the outlier that the verdict is about


def compute(setting: Setting) -> dict:
    return {
        "one outlier": {
            f"{code}, {block}": [
                [one_outlier(code, block, size, seed) for seed in setting.seeds] for size in SIZES
            ]
            for code in CODES
            for block in BLOCKS
        },
        "layers": real_layers(setting),
        "bill": {str(block): bill(block) for block in BILL_BLOCKS},
    }


def one_outlier(code: str, block: int, size: float, seed: int) -> float:
    """Root mean squared error of standard normal weights next to an outlier; 0: without one."""
    weight = torch.randn(SIDE * SIDE, generator=torch.Generator().manual_seed(seed))
    place = SIDE * SIDE // 2
    if size:
        weight[place] = size
    error = decoded(weight, block, CODES[code][1]) - weight
    error[place] = 0
    return error.square().mean().sqrt().item()


def decoded(weight: Tensor, block: int, codebook: Tensor) -> Tensor:
    return dispatch.dequantize(dispatch.quantize(weight, block, codebook))


def real_layers(setting: Setting) -> dict[str, list[dict]]:
    """Of some layers of each base: the largest weight, and the error of NF4 by block size."""
    found: dict[str, list[dict]] = {}
    for base in bases.bases(setting, n_windows=1):
        for layer in list(bases.linear_layers(base.model).values())[::3]:
            weight = layer.weight
            size = weight.square().mean().sqrt()
            row = {"largest": (weight.abs().max() / weight.std()).item()}
            whole = 1 << (weight.numel() - 1).bit_length()  # the next power of two
            for key, block in (("blocks", 64), ("whole", whole)):
                error = decoded(weight, block, NF4) - weight
                row[key] = (error.square().mean().sqrt() / size).item()
            found.setdefault(base.name, []).append(row)
    return found


def bill(block: int) -> dict[str, float]:
    """Bits a weight and root mean squared error of NF4 for normal weights."""
    squared = codebooks.BlockDistribution(block, power=2).squared_error(NF4)
    return {
        "bits": 4 + 32 / block,
        "bits with double quantization": 4 + 8 / block + 32 / (256 * block),
        "error": math.sqrt(squared),
    }


def table(results: dict) -> str:
    rows = []
    for key, by_size in results["one outlier"].items():
        code, block = key.split(", ")
        name = "whole" if int(block) == WHOLE else block
        rows.append([code, name, *(f"{fmean(errors):.4f}" for errors in by_size)])
    header = ["code", "block", "error without an outlier", *(f"{size} σ" for size in SIZES[1:])]
    parts = [experiment.markdown(header, rows)]
    rows = []
    for name, layers in results["layers"].items():
        row = [name, fmean(layer["largest"] for layer in layers)]
        row += [max(layer["largest"] for layer in layers)]
        for key in ("blocks", "whole"):
            row.append(100 * fmean(layer[key] for layer in layers))
        rows.append(row)
    header = ["base", "largest weight of a layer / σ, mean", "largest of all"]
    header += ["error of NF4, block 64, %", "one block a layer, %"]
    parts.append(experiment.markdown(header, rows))
    rows = [[block, *row.values()] for block, row in results["bill"].items()]
    header = ["block", "bits a weight", "with double quantization", "error of NF4 / σ"]
    parts.append(experiment.markdown(header, rows))
    return "\n\n".join(parts)


def draw(results: dict, figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    for index, block in enumerate(BLOCKS):
        label = "one block" if block == WHOLE else f"blocks of {block}"
        for code, style in (("NF4", "-"), ("int8", "--")):
            by_size = results["one outlier"][f"{code}, {block}"]
            values = [fmean(errors) for errors in by_size[1:]]
            color = experiment.COLORS[index]
            left.plot(SIZES[1:], values, style, color=color, label=label if style == "-" else None)
    left.set(
        title="one outlier in a million: NF4 (lines), int8 (dashed)",
        xlabel="size of the outlier, σ",
        ylabel="root mean squared error of the others, σ",
        xscale="log",
        yscale="log",
    )
    left.legend(fontsize=8)
    rows = list(results["bill"].values())
    errors = [row["error"] for row in rows]
    for key, label in (("bits", "NF4"), ("bits with double quantization", "NF4 + DQ")):
        right.plot([row[key] for row in rows], errors, "o-", markersize=4, label=label)
    for block, row in results["bill"].items():
        if block in ("16", "32", "64", "256", "4096"):
            right.annotate(
                block, (row["bits"], row["error"]), xytext=(5, 4), textcoords="offset points"
            )
    right.set(
        title="the bill, by block size: normal weights",
        xlabel="bits a weight",
        ylabel="root mean squared error, σ",
    )
    right.legend()


def findings(results: dict) -> list[Finding]:
    return [confined(results), needed(results)]


def growth(results: dict, code: str, block: int) -> list[float]:
    """Error next to the outlier over error without one, by seed."""
    by_size = results["one outlier"][f"{code}, {block}"]
    with_outlier = by_size[SIZES.index(PLANTED)]
    return [after / before for after, before in zip(with_outlier, by_size[0])]


def confined(results: dict) -> Finding:
    """held: for both codes the error doubles in one block, and grows by < 10 % in blocks of 64.

    bends: only some of this.
    """
    parts, limits, agree = [], [], []
    for code in CODES:
        whole = experiment.interval(growth(results, code, WHOLE))
        blocks = experiment.interval(growth(results, code, 64))
        agree += [whole.low > 2, blocks.high < 1.1]
        parts.append(f"{code} x {whole.mean:.2f} in one block, x {blocks.mean:.3f} in blocks of 64")
        limits += [whole.span(), blocks.span(".3f")]
    verdict = "held" if all(agree) else "bends" if any(agree) else "did not hold"
    claim = f"blocks confine an outlier (here of {PLANTED} σ)"
    value = "error of the others: " + "; ".join(parts)
    interval = "; ".join(limits) + " (t, over seeds)"
    return Finding(claim, "section 2, equations 1 and 2", verdict, value, interval)


def needed(results: dict) -> Finding:
    """held: on every base, one block a layer has more than 1.1 times the error. bends: on some."""
    parts, limits, more = [], [], []
    for name, layers in results["layers"].items():
        ratios = [layer["whole"] / layer["blocks"] for layer in layers]
        ratio = experiment.interval(ratios)
        more.append(ratio.low > 1.1)
        parts.append(f"{name} {ratio.mean:.2f}")
        limits.append(ratio.span())
    verdict = "held" if all(more) else "bends" if any(more) else "did not hold"
    value = "error with one block a layer / in blocks of 64: " + ", ".join(parts)
    claim = "real weights need blocks"
    interval = "; ".join(limits) + " (t, over layers)"
    return Finding(claim, "section 2", verdict, value, interval)


if __name__ == "__main__":
    experiment.main("outliers")
