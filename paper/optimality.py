"""NF4 is information-theoretically optimal, and fills each bin equally (section 3).

A code that uses its 16 levels equally often carries 4 bits a weight, the most that fits. Quantiles
of a normal do so for normal weights divided by their standard deviation. But NF4 divides by the
largest weight of a block. `bins` gives the share of each level from the exact distribution
(codebooks.py), and counts it in real weights.

Equal use is not least error, either. `errors` compares NF4 with the codes of least absolute and
squared error for each block size, and with Shannon's bound: no code of R bits a weight has a mean
squared error below 4^-R for normal weights.

`derivations` computes NF4 in several ways, and counts how far their levels are from the published
ones, in units in the last place (ulp). Zero: the code must give back exact zeros.

Differs from the paper, which states optimality and does not measure it.
"""

import math
from statistics import fmean

import torch
from matplotlib.figure import Figure
from scipy.special import ndtri
from torch import Tensor

from double_quant import quantize as quantize_constants
from kernels import dispatch
from nf4 import NF4
from paper import bases, codebooks, experiment
from paper.experiment import Finding, Setting

BLOCKS = [32, 64, 128, 256, 512, 1024, 2048, 4096]
CONSTANT_BITS = 32


def compute(setting: Setting) -> dict:
    theory = {str(block): bins(block) for block in BLOCKS}
    turns: dict[str, list] = {}
    for base in bases.bases(setting, n_windows=1):
        layers = bases.linear_layers(base.model).values()
        turns.setdefault(base.name, []).append([count(layer.weight) for layer in layers])
    blocks = [64] if setting.quick else BLOCKS
    return {
        "theory": theory,
        "counted": {name: summary(shares) for name, shares in turns.items()},
        "errors": {str(block): errors(block) for block in blocks},
        "derivations": derivations(),
        "zeros that stay": zeros_that_stay(setting.seeds.start),
    }


def bins(block_size: int) -> list[float]:
    """The share of normal weights on each level of NF4."""
    levels = NF4.double().numpy()
    return codebooks.BlockDistribution(block_size, power=0).cells(levels)[0].tolist()


def count(weight: Tensor) -> list[float]:
    """The share of real weights on each level of NF4, block 64."""
    packed = dispatch.quantize(weight).packed.flatten().int()
    codes = torch.cat([packed >> 4, packed & 15])
    return (codes.bincount(minlength=16) / len(codes)).tolist()


def entropy(shares: list[float]) -> float:
    """Bits that a code carries with these shares of its levels."""
    return -sum(share * math.log2(share) for share in shares if share > 0)


def summary(turns: list[list[list[float]]]) -> dict[str, list[float]]:
    """The mean share of each level, and the entropy of each layer.

    turns: the shares by rotation, layer and level.
    """
    layers = [[fmean(column) for column in zip(*rotated)] for rotated in zip(*turns)]
    return {
        "shares": [fmean(column) for column in zip(*layers)],
        "entropies": [entropy(shares) for shares in layers],
    }


def errors(block_size: int) -> dict[str, list[float]]:
    """Mean absolute and root mean squared error of codes, for weights of variance 1."""
    codes = {
        "NF4": NF4,
        "AF4": codebooks.af4(block_size),
        "BOF4": codebooks.bof4(block_size),
        "least absolute error": codebooks.optimal(1, block_size),
        "least squared error": codebooks.optimal(2, block_size),
    }
    absolute = codebooks.BlockDistribution(block_size, power=1)
    squared = codebooks.BlockDistribution(block_size, power=2)
    return {
        name: [absolute.absolute_error(code), math.sqrt(squared.squared_error(code))]
        for name, code in codes.items()
    }


def derivations() -> dict[str, dict]:
    """NF4's levels, derived in four ways, against the published ones."""
    edges = torch.tensor(ndtri(torch.arange(17, dtype=torch.float64).numpy() / 17))
    ways = {
        "float32 steps, 0.9677083 (ours)": NF4,
        "float64 steps, 0.9677083": quantiles(0.9677083),
        "float64 steps, 1 - (1/32 + 1/30)/2": quantiles(1 - (1 / 32 + 1 / 30) / 2),
        "equation 4 as printed": scaled((edges[1:] + edges[:-1]) / 2),  # Q(0) is infinite
    }
    table = {}
    for name, levels in ways.items():
        finite = levels.isfinite()
        # For numbers of one sign, the bit patterns of neighbours differ by 1.
        ulp = (levels.view(torch.int32).long() - NF4.view(torch.int32)).abs()[finite]
        table[name] = {
            "finite": int(finite.sum()),
            "equal": int((ulp == 0).sum()),
            "largest ulp": int(ulp.max()) if ulp.max() < 2**23 else None,  # else another sign
        }
    return table


def scaled(levels: Tensor) -> Tensor:
    """float64 levels divided by the largest, and rounded once."""
    levels = levels.sort().values
    return (levels / levels.max()).float()


def quantiles(outermost: float) -> Tensor:
    """The published construction in float64, rounded once at the end."""
    positive = torch.linspace(outermost, 0.5, 9, dtype=torch.float64)[:-1]
    negative = torch.linspace(outermost, 0.5, 8, dtype=torch.float64)[:-1]
    levels = [*ndtri(positive.numpy()), 0.0, *-ndtri(negative.numpy())]
    return scaled(torch.tensor(levels, dtype=torch.float64))


def zeros_that_stay(seed: int) -> dict[str, int]:
    """Exact zeros among normal weights, before and after NF4 with double quantization."""
    weight = torch.randn(2**16, generator=torch.Generator().manual_seed(seed))
    weight[::7] = 0
    q = dispatch.quantize(weight)
    decoded = dispatch.dequantize(q, constants=quantize_constants(q.absmax))
    before = weight == 0
    return {"zeros": int(before.sum()), "zeros decoded": int((decoded[before] == 0).sum())}


def table(results: dict) -> str:
    header = ["weights", "block", "entropy, bits of 4", "least used level, %", "most used, %"]
    rows = []
    for block, shares in results["theory"].items():
        ends = [100 * min(shares), 100 * max(shares)]
        rows.append(["normal (exact)", block, f"{entropy(shares):.4f}", *ends])
    for name, counted in results["counted"].items():
        shares = counted["shares"]
        ends = [100 * min(shares), 100 * max(shares)]
        rows.append([f"{name}, mean of layers", 64, f"{entropy(shares):.4f}", *ends])
    parts = [experiment.markdown(header, rows)]
    header = ["block", "bits", "Shannon's bound", "root mean squared error of NF4", "AF4", "BOF4"]
    rows = []
    for block, found in results["errors"].items():
        bits = 4 + CONSTANT_BITS / int(block)
        row = [block, f"{bits:.3f}", f"{2**-bits:.4f}"]
        row += [f"{found[name][1]:.4f}" for name in ("NF4", "AF4", "BOF4", "least squared error")]
        absolute = [found[name][0] for name in ("NF4", "least absolute error")]
        rows.append(row + [f"{value:.4f}" for value in absolute])
    header += ["least possible", "mean absolute error of NF4", "least possible"]
    parts.append(experiment.markdown(header, rows))
    rows = [[name, *way.values()] for name, way in results["derivations"].items()]
    header = ["derivation of NF4", "finite levels", "equal to ours", "largest difference, ulp"]
    parts.append(experiment.markdown(header, rows))
    return "\n\n".join(parts)


def draw(results: dict, figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    levels = range(16)
    left.bar(
        levels, [100 * share for share in results["theory"]["64"]], color="0.85", label="normal"
    )
    for name, counted in results["counted"].items():
        shares = counted["shares"]
        left.plot(levels, [100 * share for share in shares], "o-", markersize=4, label=name)
    left.axhline(100 / 16, color="0.4", linestyle="--", linewidth=1)
    left.text(15.6, 100 / 16 + 0.15, "equal use", ha="right", color="0.3", fontsize=9)
    left.set(title="use of NF4's levels, block 64", xlabel="level", ylabel="% of the weights")
    left.legend(fontsize=8)
    blocks = [int(block) for block in results["errors"]]
    for name, norm, style in (
        ("NF4", 1, "-"),
        ("AF4", 1, "-"),
        ("BOF4", 1, "-"),
        ("least squared error", 1, "--"),
    ):
        values = [found[name][norm] for found in results["errors"].values()]
        right.plot(blocks, values, style, label=name)
    bound = [2 ** -(4 + CONSTANT_BITS / block) for block in blocks]
    right.plot(blocks, bound, ":", color="0.3", label="Shannon's bound for the same bits")
    right.set_xscale("log", base=2)
    right.set_ylim(bottom=0)
    right.set(
        title="error for normal weights", xlabel="block size", ylabel="root mean squared error / σ"
    )
    right.legend(fontsize=8)


def findings(results: dict) -> list[Finding]:
    return [equal_use(results), least_error(results), exact_zero(results)]


def equal_use(results: dict) -> Finding:
    """held: no level is used 10 % more or less than another. bends: 95 % of the bits are used."""
    means, limits, ratios = [], [], []
    for name, counted in results["counted"].items():
        mean = experiment.interval(counted["entropies"])
        means.append(mean.mean)
        ratios.append(max(counted["shares"]) / max(min(counted["shares"]), 1e-12))
        limits.append(f"{name} {mean.span('.3f')}")
    verdict = "did not hold"
    if max(ratios) < 1.1:
        verdict = "held"
    elif min(means) > 0.95 * 4:
        verdict = "bends"
    theory = results["theory"]["64"]
    value = (
        f"entropy {', '.join(f'{mean:.3f}' for mean in means)} of 4 bits (normal: "
        f"{entropy(theory):.3f}); the most used level has {max(ratios):.1f} times the least used"
    )
    claim = "NF4 puts the same number of weights in each bin"
    interval = "; ".join(limits) + " (t, over layers)"
    return Finding(claim, "section 3, 4-bit NormalFloat", verdict, value, interval)


def least_error(results: dict) -> Finding:
    """held: NF4 has at most 1 % more error than any code. bends: at most 10 % at block 64."""
    excess = {}
    for block, found in results["errors"].items():
        absolute = found["NF4"][0] / found["least absolute error"][0] - 1
        squared = found["NF4"][1] / found["least squared error"][1] - 1
        excess[block] = (absolute, squared)
    verdict = "did not hold"
    if max(max(pair) for pair in excess.values()) < 0.01:
        verdict = "held"
    elif max(excess["64"]) < 0.10:
        verdict = "bends"
    parts = [
        f"block {block}: {100 * absolute:.1f} % absolute, {100 * squared:.1f} % squared (root)"
        for block, (absolute, squared) in excess.items()
        if block in ("64", "4096")
    ]
    value = "more error than the best code for normal weights, " + "; ".join(parts)
    claim = "NF4 is information-theoretically optimal for normal weights"
    return Finding(claim, "abstract, section 3", verdict, value, "exact")


def exact_zero(results: dict) -> Finding:
    """held: every zero is decoded as zero."""
    zeros, decoded = results["zeros that stay"].values()
    verdict = "held" if decoded == zeros else "bends" if decoded else "did not hold"
    value = f"{decoded} of {zeros} zeros are exact after NF4 with double quantization"
    claim = "zero is represented exactly"
    return Finding(claim, "section 3, 4-bit NormalFloat", verdict, value, "exact")


if __name__ == "__main__":
    experiment.main("optimality")
