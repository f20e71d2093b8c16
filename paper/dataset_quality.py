"""The quality of a data set matters more than its size.

Claim (section 5): a small set of good conversations (OASST1) trains a better chatbot than a much
larger one (FLAN v2), and the choice of the set matters more than its size.

Here: n clean examples of the task of parity.py against 10 n examples in which a share of the
answers is wrong: one field has a value from another order. Both see the same number of steps, so
more data cost nothing. With the share from 0 to 80 %, the crossing point is where more data stop
being better. It is interpolated in each seed, so it has an interval.

Differs from the paper: one kind of error, at random, of known share. The sets of the paper differ
in task and style as well, and nobody knows their share of errors.
"""

import random
from functools import partial

from matplotlib.figure import Figure

from data.toy_tasks import Pair
from paper import experiment, orders
from paper.experiment import Finding, Setting
from paper.parity import MARGIN, task
from paper.small_base import LORA_LR, Base, exact_match, train

STEPS = 60
N_CLEAN = 20
TIMES = 10
SHARES = [0.0, 0.2, 0.4, 0.6, 0.8]  # of wrong answers


def compute(setting: Setting) -> dict:
    base = Base(setting)
    steps = 3 if setting.quick else STEPS
    rng = random.Random("quality: test")
    _, test = task(base, rng, n_test=50 if setting.quick else 500)
    results: dict = {"clean": [], "noisy": {str(share): [] for share in SHARES}}
    for seed in range(setting.seeds):
        rng = random.Random(f"quality {seed}")
        make = partial(orders.random_order, rng, "English", "phrasings")
        found = [make() for _ in range(TIMES * N_CLEAN)]

        def score(pairs: list[Pair], seed: int = seed) -> float:
            model = train(base.adapted(seed), base.encode(pairs), steps, LORA_LR, seed)
            return exact_match(model, test)

        results["clean"].append(score(spoil(found[:N_CLEAN], 0.0, rng)))
        for share in SHARES:
            results["noisy"][str(share)].append(score(spoil(found, share, rng)))
    return results


def spoil(found: list[tuple[str, dict]], share: float, rng: random.Random) -> list[Pair]:
    """Orders as questions and answers; in a share of them, one field is that of another order."""
    wrong = set(rng.sample(range(len(found)), round(share * len(found))))
    pairs = []
    for index, (sentence, order) in enumerate(found):
        if index in wrong:
            field = rng.choice(orders.FIELDS)
            others = [other[field] for _, other in found if other[field] != order[field]]
            order = order | {field: rng.choice(others)}
        pairs.append((sentence, orders.as_list(order, orders.FIELDS)))
    return pairs


def gains(results: dict, share: float) -> list[float]:
    """10 n noisy examples minus n clean ones, in points, for each seed."""
    return [a - b for a, b in zip(results["noisy"][str(share)], results["clean"])]


def crossings(results: dict) -> list[float]:
    """The share of errors at which more data stop being better, for each seed; 0 and 1: none."""
    by_share = [gains(results, share) for share in SHARES]
    return [crossing(list(line)) for line in zip(*by_share)]


def crossing(line: list[float]) -> float:
    """Where a line through the gains at SHARES first falls below 0.

    >>> crossing([2.0, 1.0, -1.0, -2.0, -3.0])
    0.3
    """
    if line[0] <= 0:
        return 0.0
    for place in range(1, len(SHARES)):
        if line[place] <= 0:
            before, after = line[place - 1], line[place]
            width = SHARES[place] - SHARES[place - 1]
            return round(SHARES[place - 1] + width * before / (before - after), 4)
    return 1.0


def table(results: dict) -> str:
    mean, low, high = experiment.interval(results["clean"])
    rows = [[f"{N_CLEAN} clean", f"{mean:.1f}", f"{low:.1f} to {high:.1f}", None, None]]
    p_values = experiment.holm([experiment.p_value(gains(results, share)) for share in SHARES])
    for share, p in zip(SHARES, p_values):
        mean, low, high = experiment.interval(results["noisy"][str(share)])
        gain = experiment.interval(gains(results, share))
        row = [f"{TIMES * N_CLEAN}, {share:.0%} wrong", f"{mean:.1f}", f"{low:.1f} to {high:.1f}"]
        row.append(f"{gain.mean:+.1f} ({gain.low:+.1f} to {gain.high:+.1f})")
        rows.append([*row, f"{p:.3f}"])
    header = ["examples", "exact match, %", "95 % interval", "minus clean, points", "p (Holm)"]
    note = "The paper's scores by data set are not in our reference."
    return f"{experiment.markdown(header, rows)}\n\n{note}"


def draw(results: dict, figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    percent = [100 * share for share in SHARES]
    means = [experiment.interval(results["noisy"][str(share)]) for share in SHARES]
    errors = [[m.mean - m.low for m in means], [m.high - m.mean for m in means]]
    label = f"{TIMES * N_CLEAN} examples"
    left.errorbar(percent, [m.mean for m in means], errors, fmt="o-", capsize=3, label=label)
    mean, low, high = experiment.interval(results["clean"])
    left.axhline(mean, color="C1", label=f"{N_CLEAN} clean examples")
    left.axhspan(low, high, color="C1", alpha=0.15)
    left.set(xlabel="wrong answers among them, %", ylabel="exact match, %: mean, 95 % interval")
    left.legend()
    for line in zip(*(gains(results, share) for share in SHARES)):
        right.plot(percent, line, "o-", color="C0", alpha=0.35, markersize=4)
    right.axhline(0, color="0.4", linewidth=1)
    mean, low, high = experiment.interval(crossings(results))
    right.axvline(100 * mean, color="C1", label=f"crossing point, {mean:.0%}")
    right.axvspan(100 * low, 100 * high, color="C1", alpha=0.15)
    right.set(xlabel="wrong answers, %", ylabel="minus clean, points: each seed")
    right.legend()


def findings(results: dict) -> list[Finding]:
    """Held: some share makes ten times the data worse. Bends: but clean, they are better."""
    p_values = experiment.holm([experiment.p_value(gains(results, share)) for share in SHARES])
    means = [experiment.interval(gains(results, share)) for share in SHARES]
    worse = [p < 0.05 and m.mean < 0 for p, m in zip(p_values, means)]
    better = [p < 0.05 and m.mean > 0 for p, m in zip(p_values, means)]
    if any(worse) and any(better):
        verdict = "bends"
    elif any(worse):
        verdict = "held"
    elif any(better) or all(m.low > -MARGIN for m in means):
        verdict = "did not hold"
    else:
        verdict = "not testable here"
    points = crossings(results)
    mean, low, high = experiment.interval(points)
    return [
        Finding(
            "quality matters more than size",
            "section 5",
            verdict,
            f"{N_CLEAN} clean examples equal {TIMES * N_CLEAN} with {mean:.0%} wrong answers",
            f"{max(low, 0):.0%} to {min(high, 1):.0%} (t, {len(points)} seeds); ten times the data "
            f"minus clean, by share: "
            + ", ".join(f"{share:.0%} {m.mean:+.1f}" for share, m in zip(SHARES, means))
            + f" points (Holm p {min(p_values):.3f} at the least)",
        )
    ]


if __name__ == "__main__":
    experiment.main("dataset_quality")
