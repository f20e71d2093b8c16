"""The weights of a trained network are normal with mean zero (section 3; appendix F).

Two claims. The paper assumes zero-centred normal weights, and reports that about 7.5 % of the
neurons of LLaMA-7B fail a Shapiro-Wilk test at 5 %: the row of one output of a matrix is a neuron.
If all rows were normal, 5 % would fail by chance.

Shapiro-Wilk finds smaller differences in longer rows, so the share of failures says as much about
the length of the rows as about the weights. The table therefore also has measures that do not
depend on it: the mean in standard deviations, skewness, and excess kurtosis, which are 0 for a
normal. The kurtosis of standardized rows leaves out that rows have different sizes, which alone
gives a layer heavier tails.

Differs from the paper: small models, and three bases. A rotation replaces each weight by a sum over
its row or column, so the central limit theorem makes most rotated weights normal. The base that was
trained here began as normal numbers, and its training is short.
"""

from statistics import fmean

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

from paper import bases, experiment
from paper.experiment import Finding, Setting

LEVEL = 0.05
PAPER = 7.5  # % of LLaMA-7B's neurons
ROWS = 40  # tested in each layer
QUANTILES = 101


def compute(setting: Setting) -> dict:
    """Of each base, what `layer_statistics` says of each layer; quantiles of all weights."""
    turns: dict[str, list] = {}
    found: dict[str, dict] = {}
    for base in bases.bases(setting, n_windows=1):
        layers = bases.linear_layers(base.model)
        rows = [layer_statistics(name, layer.weight) for name, layer in layers.items()]
        turns.setdefault(base.name, []).append(rows)
        found[base.name] = {
            "layers": mean_of_turns(turns[base.name]),
            "quantiles": quantiles([layer.weight for layer in layers.values()]),
        }
    generator = torch.Generator().manual_seed(setting.seeds.start)
    normal = torch.randn(ROWS * 30, 576, generator=generator)
    found["normal"] = {"layers": [layer_statistics("normal", part) for part in normal.split(ROWS)]}
    return found


def mean_of_turns(turns: list[list[dict]]) -> list[dict]:
    """The statistics of each layer, averaged over the rotations."""
    merged = []
    for rows in zip(*turns):
        numbers = [key for key in rows[0] if key != "kind"]
        means = {key: fmean(row[key] for row in rows) for key in numbers}
        merged.append(rows[0] | means)
    return merged


def layer_statistics(name: str, weight: Tensor) -> dict:
    """Shapiro-Wilk on some rows, and the shape of the distribution of the whole layer."""
    rows = weight[:: max(1, len(weight) // ROWS)][:ROWS].double().cpu().numpy()
    failed = [bool(stats.shapiro(row[:5000]).pvalue < LEVEL) for row in rows]
    numbers = weight.double()
    sigma = numbers.std()
    z = (numbers - numbers.mean()) / sigma
    by_row = (numbers - numbers.mean(1, keepdim=True)) / numbers.std(1, keepdim=True)
    return {
        "kind": name.rpartition(".")[2],
        "length": weight.shape[1],
        "failed": sum(failed),
        "tested": len(failed),
        "mean": (numbers.mean() / sigma).item(),
        "skewness": z.pow(3).mean().item(),
        "kurtosis": z.pow(4).mean().item() - 3,
        "kurtosis within rows": by_row.pow(4).mean().item() - 3,
    }


def quantiles(weights: list[Tensor]) -> list[float]:
    """Quantiles of all weights of a base, each layer divided by its standard deviation."""
    probabilities = (np.arange(QUANTILES) + 0.5) / QUANTILES
    sample = [weight.flatten()[:: max(1, weight.numel() // 20_000)] for weight in weights]
    z = torch.cat([(part - part.mean()) / part.std() for part in sample])
    return np.quantile(z.double().cpu().numpy(), probabilities).tolist()


def failing(layers: list[dict]) -> experiment.Interval:
    """The percentage of rows that fail, over layers."""
    return experiment.interval([100 * layer["failed"] / layer["tested"] for layer in layers])


def table(results: dict) -> str:
    header = [
        "base",
        "layers",
        "length of a row",
        "rows that fail, %",
        "95 %",
        "mean / σ",
        "skewness",
    ]
    header += ["excess kurtosis", "of standardized rows"]
    rows = [["LLaMA-7B (paper)", "all", "4096, 11008", PAPER, *[None] * 5]]
    for base, entry in results.items():
        layers = entry["layers"]
        rows.append(table_row(base, "all", layers))
        kinds = dict.fromkeys(layer["kind"] for layer in layers)
        if len(kinds) > 1:
            for kind in kinds:
                chosen = [layer for layer in layers if layer["kind"] == kind]
                rows.append(table_row(base, kind, chosen))
    return experiment.markdown(header, rows)


def table_row(base: str, kind: str, layers: list[dict]) -> list[object]:
    share = failing(layers)
    lengths = sorted({int(layer["length"]) for layer in layers})
    row = [base, kind, ", ".join(str(length) for length in lengths), f"{share.mean:.1f}"]
    row.append(f"{max(0, share.low):.1f} to {share.high:.1f}")
    keys = ("mean", "skewness", "kurtosis", "kurtosis within rows")
    return row + [f"{fmean(layer[key] for layer in layers):+.3f}" for key in keys]


def draw(results: dict, figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    expected = stats.norm.ppf((np.arange(QUANTILES) + 0.5) / QUANTILES)
    left.axhline(0, color="0.7", linewidth=1)
    drawn = {name: entry for name, entry in results.items() if name != "normal"}
    for name, entry in drawn.items():
        left.plot(expected, entry["quantiles"] - expected, ".", markersize=4, label=name)
    left.set(
        title="quantiles of all weights, each layer divided by its σ",
        xlabel="quantile of a normal",
        ylabel="quantile of the weights, minus that of a normal",
    )
    left.legend()
    kinds = list(dict.fromkeys(row["kind"] for row in next(iter(drawn.values()))["layers"]))
    for shift, entry in enumerate(drawn.values()):
        layers = entry["layers"]
        for place, kind in enumerate(kinds):
            chosen = [row for row in layers if row["kind"] == kind]
            mean, low, high = failing(chosen)
            right.errorbar(
                place + 0.2 * (shift - 1),
                mean,
                yerr=[[mean - max(0, low)], [high - mean]],
                fmt="o",
                markersize=5,
                color=experiment.COLORS[shift],
            )
    right.axhline(PAPER, color="0.3", linestyle="--", linewidth=1)
    right.text(len(kinds) - 0.5, PAPER, "paper 7.5 %", va="bottom", fontsize=9)
    right.axhline(100 * LEVEL, color="0.6", linestyle=":", linewidth=1)
    right.text(len(kinds) - 0.5, 100 * LEVEL, "by chance 5 %", va="top", fontsize=9)
    right.set(title="rows that fail Shapiro-Wilk at 5 %", ylabel="%", xticks=range(len(kinds)))
    right.set_xticklabels([kind.removesuffix("_proj") for kind in kinds])
    right.set(xlim=(-0.6, len(kinds) + 0.9), ylim=(0, None))


def findings(results: dict) -> list[Finding]:
    return [few_rows_fail(results), centred(results)]


def few_rows_fail(results: dict) -> Finding:
    """held: on no base do more rows fail than in the paper. did not hold: on both unrotated ones.

    More means that the whole interval is above 7.5 %.
    """
    shares = {name: failing(results[name]["layers"]) for name in results}
    more = {name for name, share in shares.items() if share.low > PAPER}
    verdict = "bends"
    if not more - {"normal"}:
        verdict = "held"
    elif {bases.AS_GIVEN, bases.TRAINED_HERE} <= more:
        verdict = "did not hold"
    value = ", ".join(f"{name} {share.mean:.1f} %" for name, share in shares.items())
    limits = [f"{name} {share.span('.1f')} %" for name, share in shares.items()]
    claim = "weights are normal: 7.5 % of the neurons fail a test at 5 %"
    interval = "; ".join(limits) + " (t, over layers)"
    return Finding(claim, "appendix F", verdict, f"{value} of the rows fail", interval)


def centred(results: dict) -> Finding:
    """held: on each base the mean of a layer is 0, up to 0.01 standard deviations (equivalence)."""
    verdicts = []
    limits = []
    for name in (bases.AS_GIVEN, bases.ROTATED, bases.TRAINED_HERE):
        means = [row["mean"] for row in results[name]["layers"]]
        verdicts.append(experiment.equivalent(means, margin=0.01))
        mean = experiment.interval(means)
        limits.append((f"{name} {mean.mean:+.4f} σ", mean.span("+.4f")))
    verdict = "held" if all(verdicts) else "bends" if any(verdicts) else "did not hold"
    value = "mean of a layer: " + ", ".join(value for value, _ in limits)
    interval = "; ".join(limit for _, limit in limits) + " σ (t, over layers; equal within 0.01 σ)"
    return Finding("weights are zero-centred", "section 3", verdict, value, interval)


if __name__ == "__main__":
    experiment.main("normality")
