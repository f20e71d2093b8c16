"""Fewer bits: does fine-tuning also recover a base in 3 or 2 bits?

The paper leaves it open (section 8): with adapters, more aggressive quantization might do.

Here: NF4, NF3 and NF2 (the same construction with 16, 8 and 4 levels) as the base of QLoRA, with
three starts of the adapters (variants/init.py): zero, LoftQ, which fits them to the quantization
error, and PiSSA, which fits them to the weight and quantizes the rest. Each is measured before
training, on what the base knew, and after long and after short training, on the task of parity.py.
After long training nearly all answers are right, so only large differences can be seen there.

The bits are those of a packed code with its constants: k + 8/64 + 32/(64 * 256) bits a weight. The
file keeps NF3 and NF2 in 4 bits a code, because only 4-bit kernels exist.
"""

import statistics

from matplotlib.figure import Figure

from paper import codebooks, experiment, orders
from paper.experiment import Finding, Setting
from paper.parity import MARGIN
from paper.small_base import LORA_LR, Base, exact_match, train
from variants.init import STARTS

STEPS = {"long": 60, "short": 25}
RANK = 4
RUNS = 2  # for each seed asked for, as in parity.py
CONSTANTS = 8 / 64 + 32 / (64 * 256)  # bits per weight
DENSE = "not quantized"
BITS = {"NF4": 4, "NF3": 3, "NF2": 2}


def compute(setting: Setting) -> dict:
    base = Base(setting)
    n_test = 50 if setting.quick else 500
    rng = setting.rng("three bits")
    training, test = base.task(rng, n_test)
    known = base.encode([orders.field_question(rng, "English") for _ in range(n_test)])
    results: dict = {"model": base.folder.name, "cells": {}}
    for code, start in [(DENSE, "default"), *((code, start) for code in BITS for start in STARTS)]:
        codebook = codebooks.nf(BITS[code]) if code in BITS else None
        # Before training a copy does not depend on its seed: B = 0, or a decomposition.
        knows = exact_match(base.adapted(setting.seeds.start, codebook, start, r=RANK), known)
        cell: dict = {"before": knows, "long": [], "short": []}
        for length, steps in STEPS.items():
            for seed in setting.more_seeds(RUNS):
                model = base.adapted(seed, codebook, start, r=RANK)
                train(model, training, 3 if setting.quick else steps, LORA_LR, seed)
                cell[length].append(exact_match(model, test))
        results["cells"][f"{code}, {start}"] = cell
    return results


def minus(results: dict, length: str, cell: str, reference: str) -> list[float]:
    """One cell minus another, in points, for each seed."""
    cells = results["cells"]
    return [a - b for a, b in zip(cells[cell][length], cells[reference][length])]


def bits(code: str) -> float:
    return BITS[code] + CONSTANTS if code in BITS else 32


def table(results: dict) -> str:
    rows = []
    for name, cell in results["cells"].items():
        code, start = name.split(", ")
        row = [code, f"{bits(code):.3f}", start, cell["before"]]
        for length in STEPS:
            after = experiment.interval(cell[length])
            row.append(f"{after.mean:.1f} ({after.span('.1f')})")
        rows.append(row)
    header = ["base", "bits a weight", "adapters start as", "base knows, before, %"]
    header += [f"exact match after {steps} steps, % (95 %)" for steps in STEPS.values()]
    return experiment.markdown(header, rows)


def draw(results: dict, figure: Figure) -> None:
    before, *after = figure.subplots(1, 3)
    for number, start in enumerate(STARTS):
        cells = [results["cells"][f"{code}, {start}"] for code in BITS]
        places = [bits(code) + 0.06 * (number - 1) for code in BITS]
        before.plot(places, [cell["before"] for cell in cells], "o-", label=f"start: {start}")
        for axes, length in zip(after, STEPS):
            means = [experiment.interval(cell[length]) for cell in cells]
            experiment.errorbars(axes, places, means, fmt="o-", capsize=3)
    before.set_title("before: what the base knew", fontsize=10)
    before.set_ylabel("exact match, %")
    dense = results["cells"][f"{DENSE}, default"]
    for axes, (length, steps) in zip(after, STEPS.items()):
        mean = statistics.fmean(dense[length])
        label = "base not quantized" if length == "long" else None
        axes.axhline(mean, color="0.4", linestyle="--", label=label)
        axes.set_title(f"the new task after {steps} steps, 95 %", fontsize=10)
    for axes in (before, *after):
        axes.set_xlabel("bits a weight")
    figure.legend(loc="outside lower center", ncols=len(STARTS) + 1)


def findings(results: dict) -> list[Finding]:
    return [*(recovers(results, code) for code in ("NF3", "NF2")), start_matters(results)]


def recovers(results: dict, code: str) -> Finding:
    """Held: equivalent to the dense base, early and late. Bends: late only.

    Did not hold: after long training, worse than the dense base by more than the margin.
    """
    changes = {
        length: minus(results, length, f"{code}, default", f"{DENSE}, default") for length in STEPS
    }
    shown = {length: experiment.equivalent(change, MARGIN) for length, change in changes.items()}
    means = {length: experiment.interval(change) for length, change in changes.items()}
    parts = [f"{mean.mean:+.2f} after {STEPS[length]} steps" for length, mean in means.items()]
    return experiment.decide(
        f"a base in {code} is recovered by fine-tuning",
        "section 8, left open",
        {
            "held": all(shown.values()),
            "bends": shown["long"],
            "did not hold": means["long"].high < -MARGIN,
        },
        f"points minus LoRA on a dense base: {', '.join(parts)}",
        ", ".join(mean.span("+.2f") for mean in means.values())
        + f" (paired t, {len(changes['long'])} seeds; equivalence within +-{MARGIN:.0f})",
    )


def start_matters(results: dict) -> Finding:
    """Held: on NF2, LoftQ and PiSSA are both better than zero, early and late. Bends: one is, once.

    Did not hold: neither can be better by the margin.
    """
    pairs = [(start, length) for length in STEPS for start in STARTS if start != "default"]
    changes = [minus(results, length, f"NF2, {start}", "NF2, default") for start, length in pairs]
    means = [experiment.interval(change) for change in changes]
    better = [sign > 0 for sign in experiment.signs(changes)]
    parts = [
        f"{start} {mean.mean:+.2f} after {STEPS[length]} steps"
        for (start, length), mean in zip(pairs, means)
    ]
    return experiment.decide(
        "at 2 bits, adapters should start as LoftQ or PiSSA",
        "not in the paper (arXiv 2310.08659, 2404.02948)",
        {
            "held": all(better),
            "bends": any(better),
            "did not hold": all(mean.high < MARGIN for mean in means),
        },
        f"points minus zero: {', '.join(parts)}",
        ", ".join(mean.span("+.2f") for mean in means)
        + f" (paired t, {len(changes[0])} seeds; Holm)",
    )


if __name__ == "__main__":
    experiment.main("three_bits")
