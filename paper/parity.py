"""4-bit QLoRA recovers 16-bit fine-tuning.

Claim (section 4, MMLU after fine-tuning LLaMA, 8 runs): BF16 53.0, FP4 52.2, NF4 with double
quantization 53.1. What quantization lost, training the adapter gives back.

Here: a model learns to list all fields of an order, by full fine-tuning, by LoRA on a base that is
not quantized, and by QLoRA with five codes. Half of the test has phrasings that training never
sees. All methods of a seed see the same batches, so each seed gives paired differences. Parity is
equivalence: the 90 % interval of the mean difference must lie inside +- 2 points. "No significant
difference" would not do: few seeds find none either.

It is measured after long training, as in the paper, where nearly all answers are right, and after
short training, where a method that learns more slowly has not caught up. Equal scores near 100 %
say little. The learning rates were chosen with other seeds.

What quantization loses before training is measured on what the base knows: it answers questions
about orders (small_base.py).

Differs from the paper: a small model and task (small_base.py); exact match in place of MMLU;
float32 in place of BF16; Int4, NF3 and NF2 besides.
"""

from matplotlib.figure import Figure
from transformers import PreTrainedModel

from paper import codebooks, experiment, orders
from paper.experiment import Finding, Setting
from paper.small_base import FULL_LR, LORA_LR, Base, exact_match, train

MARGIN = 2.0  # points of exact match
STEPS = {"long": 80, "short": 25}
FULL = "full fine-tuning"
LORA = "LoRA, not quantized"
RUNS = 2  # for each seed asked for: the spread of 5 seeds leaves the short training open
CODES = {
    "NF4": codebooks.nf(4),
    "FP4": codebooks.fp4(),
    "Int4": codebooks.integers(4),
    "NF3": codebooks.nf(3),
    "NF2": codebooks.nf(2),
}
METHODS = [FULL, LORA, *CODES]
PAPER = {FULL: 53.0, "FP4": 52.2, "NF4": 53.1}  # MMLU


def compute(setting: Setting) -> dict:
    base = Base(setting)
    n_test = 50 if setting.quick else 500
    rng = setting.rng("parity")
    training, test = base.task(rng, n_test)
    known = base.encode([orders.field_question(rng, "English") for _ in range(n_test)])
    first = setting.seeds.start
    before = {method: exact_match(start(base, method, first), known) for method in METHODS}
    results: dict = {"model": base.folder.name, "known": before}
    for length, steps in STEPS.items():
        results[length] = {method: [] for method in METHODS}
        for method, scores in results[length].items():
            lr = FULL_LR if method == FULL else LORA_LR
            for seed in setting.more_seeds(RUNS):
                model = start(base, method, seed)
                train(model, training, 3 if setting.quick else steps, lr, seed)
                scores.append(exact_match(model, test))
    return results


def start(base: Base, method: str, seed: int) -> PreTrainedModel:
    """The model of a method before its training."""
    if method == FULL:
        return base.dense()
    return base.adapted(seed, codebook=CODES.get(method))


def differences(results: dict, length: str, method: str, reference: str) -> list[float]:
    """Method minus reference, in points, for each seed."""
    scores = results[length]
    return [a - b for a, b in zip(scores[method], scores[reference])]


def table(results: dict) -> str:
    rows = []
    others = [method for method in METHODS if method != LORA]
    for length, steps in STEPS.items():
        changes = [differences(results, length, method, LORA) for method in others]
        p_values = experiment.holm([experiment.p_value(change) for change in changes])
        against_lora = dict(zip(others, zip(changes, p_values)))
        for method in METHODS:
            mean = experiment.interval(results[length][method]).mean
            row = [method, steps, f"{results['known'][method]:.1f}", f"{mean:.1f}"]
            if method == LORA:
                row += [None, None, None]
            else:
                change, p = against_lora[method]
                difference = experiment.interval(change)
                row += [f"{difference.mean:+.2f} ({difference.span('+.2f')})", f"{p:.3f}"]
                row.append("yes" if experiment.equivalent(change, MARGIN) else "not shown")
            rows.append([*row, PAPER.get(method) if length == "long" else None])
    header = ["method", "steps", "base knows, before, %", "exact match after, %"]
    header += ["minus LoRA, points (95 %)", "p (Holm)", f"within +-{MARGIN:.0f}", "paper, MMLU"]
    return experiment.markdown(header, rows)


def draw(results: dict, figure: Figure) -> None:
    before, after, change = figure.subplots(1, 3)
    places = range(len(METHODS))
    before.barh(places, [results["known"][method] for method in METHODS], color="C5")
    before.set(yticks=places, yticklabels=METHODS, xlabel="exact match, %")
    before.set_title("before: what the base knows", fontsize=10)
    for number, (length, steps) in enumerate(STEPS.items()):
        color = f"C{number}"
        for place, method in enumerate(METHODS):
            y = place + 0.3 * number - 0.15
            scores = results[length][method]
            label = f"{steps} steps" if place == 0 else None
            after.plot(scores, [y] * len(scores), "o", color=color, alpha=0.4, label=label)
            if method != LORA:
                difference = differences(results, length, method, LORA)
                mean, low, high = experiment.interval(difference, level=0.90)
                change.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="s", color=color)
    after.set(yticks=[], xlabel="exact match, %: each seed")
    after.set_title("after: the new task", fontsize=10)
    change.axvspan(-MARGIN, MARGIN, color="C2", alpha=0.15)
    change.axvline(0, color="0.6", linewidth=1)
    change.set(yticks=[], xlabel="points; green: equivalent")
    change.set_title("minus LoRA, 90 % interval", fontsize=10)
    for axes in (before, after, change):
        axes.set_ylim(len(METHODS) - 0.5, -0.5)
    figure.legend(loc="outside lower center", ncols=len(STEPS))


def findings(results: dict) -> list[Finding]:
    return [parity(results), better_code(results)]


def parity(results: dict) -> Finding:
    """Held: equivalent to both references, early and late. Bends: late only.

    Did not hold: after long training, worse than a reference by more than the margin.
    """
    changes = {
        length: [differences(results, length, "NF4", reference) for reference in (FULL, LORA)]
        for length in STEPS
    }
    shown = {
        length: all(experiment.equivalent(change, MARGIN) for change in both)
        for length, both in changes.items()
    }
    means = {length: [*map(experiment.interval, both)] for length, both in changes.items()}
    n_seeds = len(changes["long"][0])
    return experiment.decide(
        "4-bit QLoRA reaches 16-bit fine-tuning",
        "section 4, MMLU 53.0 and 53.1",
        {
            "held": all(shown.values()),
            "bends": shown["long"],
            "did not hold": any(mean.high < -MARGIN for mean in means["long"]),
        },
        "NF4 minus full fine-tuning and minus LoRA: "
        + "; ".join(
            f"{full.mean:+.2f} and {lora.mean:+.2f} points after {STEPS[length]} steps"
            for length, (full, lora) in means.items()
        ),
        "; ".join(" and ".join(mean.span("+.2f") for mean in both) for both in means.values())
        + f" (paired t, {n_seeds} seeds; equivalence within +-{MARGIN:.0f} points)",
    )


def better_code(results: dict) -> Finding:
    """Held: the interval is above 0. Did not hold: below 0, or smaller than the paper's gain."""
    change = differences(results, "long", "NF4", "FP4")
    gain = PAPER["NF4"] - PAPER["FP4"]
    mean = experiment.interval(change)
    return experiment.decide(
        "after fine-tuning, NF4 is better than FP4",
        "section 4, MMLU 53.1 and 52.2",
        experiment.is_gain(change, gain),
        f"NF4 minus FP4 {mean.mean:+.2f} points",
        f"{mean.span('+.2f')} (paired t, {len(change)} seeds; equivalence within +-{gain:.1f})",
    )


if __name__ == "__main__":
    experiment.main("parity")
