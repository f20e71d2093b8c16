"""Adapters on all layers are needed; their rank matters little.

Claim (section 4, figures 2 and 4): LoRA on the queries and values alone does not reach full
fine-tuning, whatever its rank; LoRA on all linear layers does, with any rank from 8 to 256.

Here: QLoRA with adapters on q and v, on attention, on the MLP, and on all layers, each at four
ranks, next to full fine-tuning, on the task of parity.py. The whole base is in NF4 in each case.
For the layers, a seed's scores are averaged over the ranks, and each difference to "all" is tested
with Holm's correction. For the rank, equivalence is asked: within +- 2 points of the middle rank.

Differs from the paper: a small model, of width 64, so the largest rank is a full one; exact match
in place of RougeL; the same learning rate everywhere, with lora_alpha / rank as the scale.
"""

import statistics

from matplotlib.figure import Figure

from paper import experiment
from paper.experiment import Finding, Setting
from paper.parity import MARGIN
from paper.small_base import FULL_LR, LORA_LR, Base, exact_match, train, trainable

STEPS = 60
RANKS = [1, 4, 16, 64]
MIDDLE = 16
ALL = "all"
TARGETS = {
    "q, v": ["q_proj", "v_proj"],
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "MLP": ["gate_proj", "up_proj", "down_proj"],
    ALL: "all-linear",
}
FULL = "full fine-tuning"


def compute(setting: Setting) -> dict:
    base = Base(setting)
    steps = 3 if setting.quick else STEPS
    training, test = base.task(setting.rng("layers"), n_test=50 if setting.quick else 500)
    full = [train(base.dense(), training, steps, FULL_LR, seed) for seed in setting.seeds]
    results: dict = {"model": base.folder.name, "cells": []}
    results["full"] = [exact_match(model, test) for model in full]
    for name, targets in TARGETS.items():
        for rank in RANKS:
            scores = []
            for seed in setting.seeds:
                model = base.adapted(seed, targets=targets, r=rank)
                train(model, training, steps, LORA_LR, seed)
                scores.append(exact_match(model, test))
            n_trained = sum(parameter.numel() for parameter in trainable(model))
            cell = {"targets": name, "rank": rank, "trained": n_trained, "scores": scores}
            results["cells"].append(cell)
    return results


def scores_of(results: dict, targets: str, rank: int) -> list[float]:
    [cell] = [c for c in results["cells"] if (c["targets"], c["rank"]) == (targets, rank)]
    return cell["scores"]


def over_ranks(results: dict, targets: str) -> list[float]:
    """The score of each seed, averaged over the ranks."""
    by_rank = [scores_of(results, targets, rank) for rank in RANKS]
    return [statistics.fmean(scores) for scores in zip(*by_rank)]


def against_all(results: dict, targets: str) -> list[float]:
    """All layers minus these layers, in points, for each seed."""
    pairs = zip(over_ranks(results, ALL), over_ranks(results, targets))
    return [every - some for every, some in pairs]


def against_middle(results: dict, rank: int) -> list[float]:
    """A rank minus the middle one, on all layers, in points, for each seed."""
    pairs = zip(scores_of(results, ALL, rank), scores_of(results, ALL, MIDDLE))
    return [other - middle for other, middle in pairs]


def table(results: dict) -> str:
    rows = []
    for cell in results["cells"]:
        mean, low, high = experiment.interval(cell["scores"])
        row = [cell["targets"], cell["rank"], cell["trained"], f"{mean:.1f}"]
        rows.append([*row, f"{low:.1f} to {high:.1f}"])
    mean, low, high = experiment.interval(results["full"])
    rows.append([FULL, None, "everything", f"{mean:.1f}", f"{low:.1f} to {high:.1f}"])
    header = ["adapters on", "rank", "weights trained", "exact match, %", "95 % interval"]
    paper = "The paper shows it as points in figures 2 and 4, without numbers."
    return f"{experiment.markdown(header, rows)}\n\n{paper}"


def draw(results: dict, figure: Figure) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    cells = results["cells"]
    for number, name in enumerate(TARGETS):
        shown = [cell for cell in cells if cell["targets"] == name]
        means = [statistics.fmean(cell["scores"]) for cell in shown]
        left.plot([cell["rank"] for cell in shown], means, "o-", label=f"adapters on {name}")
        right.plot([cell["trained"] for cell in shown], means, "o-")
        for cell in shown:
            scores = cell["scores"]
            places = [cell["rank"]] * len(scores)
            left.plot(places, scores, ".", color=f"C{number}", alpha=0.35, zorder=0)
    for axes, unit in ((left, "rank"), (right, "weights trained")):
        axes.axhline(statistics.fmean(results["full"]), color="0.4", linestyle="--", label=FULL)
        axes.set_xscale("log", base=2 if axes is left else 10)
        axes.set_xlabel(unit)
    left.set(xticks=RANKS, xticklabels=RANKS, ylabel="exact match, %: means, and each seed")
    left.legend(loc="lower right")


def findings(results: dict) -> list[Finding]:
    return [layers(results), rank_matters_little(results)]


def layers(results: dict) -> Finding:
    """Held: all layers beat each part. Bends: some part. Did not hold: no part loses 2 points."""
    parts = [name for name in TARGETS if name != ALL]
    changes = [against_all(results, name) for name in parts]
    means = [experiment.interval(change) for change in changes]
    better = [sign > 0 for sign in experiment.signs(changes)]
    return experiment.decide(
        "adapters on all layers are needed",
        "section 4, figure 2",
        {
            "held": all(better),
            "bends": any(better),
            "did not hold": all(mean.high < MARGIN for mean in means),
        },
        "all layers minus " + ", ".join(f"{n}: {m.mean:+.1f}" for n, m in zip(parts, means)),
        ", ".join(mean.span("+.1f") for mean in means)
        + f" points (paired t, {len(changes[0])} seeds; Holm)",
    )


def rank_matters_little(results: dict) -> Finding:
    """Held: each rank is equivalent to the middle one. Did not hold: one is outside the margin."""
    others = [rank for rank in RANKS if rank != MIDDLE]
    changes = [against_middle(results, rank) for rank in others]
    means = [experiment.interval(change) for change in changes]
    shown = [experiment.equivalent(change, MARGIN) for change in changes]
    return experiment.decide(
        "the rank matters little",
        "section 4, figure 4",
        {
            "held": all(shown),
            "did not hold": any(high < -MARGIN or low > MARGIN for _, low, high in means),
            "bends": any(shown),
        },
        f"minus rank {MIDDLE}: " + ", ".join(f"{r}: {m.mean:+.1f}" for r, m in zip(others, means)),
        ", ".join(mean.span("+.1f") for mean in means)
        + f" points (paired t, {len(changes[0])} seeds; equivalence within +-{MARGIN:.0f})",
    )


if __name__ == "__main__":
    experiment.main("layers_and_rank")
