"""Fewer bits: does fine-tuning also recover a base in 3 or 2 bits?

The paper leaves it open (section 8): with adapters, more aggressive quantization might do.

Here: NF4, NF3 and NF2 (the same construction with 16, 8 and 4 levels) as the base of QLoRA, with
three starts of the adapters (variants/init.py): zero, LoftQ, which fits them to the quantization
error, and PiSSA, which fits them to the weight and quantizes the rest. Each is measured before
training, on what the base knew, and after training, on the task of parity.py. After training nearly
all answers are right, so only large differences can be seen there.

The bits are those of a packed code with its constants: k + 8/64 + 32/(64 * 256) bits a weight. The
file keeps NF3 and NF2 in 4 bits a code, because only 4-bit kernels exist.
"""

import random
import statistics

from matplotlib.figure import Figure

from paper import codebooks, experiment, orders
from paper.experiment import Finding, Setting
from paper.parity import MARGIN, task
from paper.small_base import LORA_LR, Base, exact_match, train
from variants.init import STARTS

STEPS = 60
RANK = 4
CONSTANTS = 8 / 64 + 32 / (64 * 256)  # bits per weight
DENSE = "not quantized"
BITS = {"NF4": 4, "NF3": 3, "NF2": 2}


def compute(setting: Setting) -> dict:
    base = Base(setting)
    steps = 3 if setting.quick else STEPS
    n_test = 50 if setting.quick else 500
    rng = random.Random("three bits")
    training, test = task(base, rng, n_test)
    known = base.encode([orders.field_question(rng, "English") for _ in range(n_test)])
    cells = []
    for code, start in [(DENSE, "default"), *((code, start) for code in BITS for start in STARTS)]:
        codebook = codebooks.nf(BITS[code]) if code in BITS else None
        cell: dict = {"code": code, "start": start, "after": []}
        for seed in range(setting.seeds):
            model = base.adapted(seed, codebook, start=start, r=RANK)
            if seed == 0:  # the start does not depend on it: B = 0, or a decomposition
                cell["before"] = exact_match(model, known)
            train(model, training, steps, LORA_LR, seed)
            cell["after"].append(exact_match(model, test))
        cells.append(cell)
    return {"model": base.folder.name, "cells": cells}


def scores_of(results: dict, code: str, start: str = "default") -> list[float]:
    [cell] = [c for c in results["cells"] if (c["code"], c["start"]) == (code, start)]
    return cell["after"]


def minus_dense(results: dict, code: str, start: str = "default") -> list[float]:
    pairs = zip(scores_of(results, code, start), scores_of(results, DENSE))
    return [score - dense for score, dense in pairs]


def best_start(results: dict, code: str) -> str:
    return max(STARTS, key=lambda start: statistics.fmean(scores_of(results, code, start)))


def bits(code: str) -> float:
    return BITS[code] + CONSTANTS if code in BITS else 32


def table(results: dict) -> str:
    rows = []
    for cell in results["cells"]:
        mean, low, high = experiment.interval(cell["after"])
        row = [cell["code"], f"{bits(cell['code']):.3f}", cell["start"], cell["before"]]
        rows.append([*row, f"{mean:.1f}", f"{low:.1f} to {high:.1f}"])
    header = ["base", "bits a weight", "adapters start as", "base knows, before, %"]
    return experiment.markdown([*header, "exact match after, %", "95 % interval"], rows)


def draw(results: dict, figure: Figure) -> None:
    axes = figure.subplots(1, 2)
    for number, start in enumerate(STARTS):
        cells = [cell for cell in results["cells"] if cell["start"] == start]
        cells = [cell for cell in cells if cell["code"] != DENSE]
        places = [bits(cell["code"]) + 0.06 * (number - 1) for cell in cells]
        axes[0].plot(places, [cell["before"] for cell in cells], "o-", label=f"start: {start}")
        means = [experiment.interval(cell["after"]) for cell in cells]
        errors = [[m.mean - m.low for m in means], [m.high - m.mean for m in means]]
        axes[1].errorbar(places, [m.mean for m in means], errors, fmt="o-", capsize=3)
    dense = statistics.fmean(scores_of(results, DENSE))
    axes[1].axhline(dense, color="0.4", linestyle="--", label="base not quantized")
    axes[0].set(title="before training: what the base knew", ylabel="exact match, %")
    axes[1].set(title="after training: the new task, 95 % intervals")
    for panel in axes:
        panel.set_xlabel("bits a weight")
        panel.legend(loc="lower right")


def findings(results: dict) -> list[Finding]:
    return [*(recovers(results, code) for code in ("NF3", "NF2")), start_matters(results)]


def recovers(results: dict, code: str) -> Finding:
    """Held: equivalent to the dense base from zero. Bends: only from another start."""
    best = best_start(results, code)
    zero = minus_dense(results, code)
    other = minus_dense(results, code, best)
    mean, low, high = experiment.interval(zero)
    if experiment.equivalent(zero, MARGIN):
        verdict = "held"
    elif experiment.equivalent(other, MARGIN):
        verdict = "bends"
    elif high < -MARGIN:
        verdict = "did not hold"
    else:
        verdict = "not testable here"
    return Finding(
        f"a base in {code} is recovered by fine-tuning",
        "section 8, left open",
        verdict,
        f"{mean:+.2f} points against LoRA on a dense base; best start {best} "
        f"{experiment.interval(other).mean:+.2f}",
        f"{low:+.2f} to {high:+.2f} (paired t, {len(zero)} seeds; equivalence within "
        f"+-{MARGIN:.0f})",
    )


def start_matters(results: dict) -> Finding:
    """Held: LoftQ and PiSSA are both better than zero on NF2. Bends: one is."""
    zero = scores_of(results, "NF2")
    names = [start for start in STARTS if start != "default"]
    changes = [[a - b for a, b in zip(scores_of(results, "NF2", name), zero)] for name in names]
    p_values = experiment.holm([experiment.p_value(change) for change in changes])
    means = [experiment.interval(change) for change in changes]
    better = [p < 0.05 and m.mean > 0 for p, m in zip(p_values, means)]
    if all(better):
        verdict = "held"
    elif any(better):
        verdict = "bends"
    elif all(m.high < MARGIN for m in means):
        verdict = "did not hold"
    else:
        verdict = "not testable here"
    return Finding(
        "at 2 bits, adapters should start as LoftQ or PiSSA",
        "not in the paper (arXiv 2310.08659, 2404.02948)",
        verdict,
        "minus zero: " + ", ".join(f"{n} {m.mean:+.2f} points" for n, m in zip(names, means)),
        ", ".join(f"{m.low:+.2f} to {m.high:+.2f}" for m in means)
        + f" (paired t, {len(zero)} seeds; Holm p "
        + ", ".join(f"{p:.3f}" for p in p_values)
        + ")",
    )


if __name__ == "__main__":
    experiment.main("three_bits")
