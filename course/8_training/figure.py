"""How much a label counts in a step, and what intervals of a difference say about a margin."""

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paper.experiment import equivalent, interval, p_value
from training.loss_and_eval import CrossEntropy

LABELS = (2, 4, 8, 16)  # of the four batches of a step
BY_STEP = "#1f3a5f"
BY_BATCH = "#9db8d2"
DIFFERENT = "#b5442e"
MARGIN = 2.0  # points of exact match that would not matter
DIFFERENCES = {  # of two methods, in points, one number for each seed
    "3 seeds": [3.0, -3.0, 1.0],
    "10 seeds": [0.5, -1.0, 0.0, 1.0, -0.5, 0.5, 0.0, -0.5, 1.0, -1.0],
    "10 seeds, small": [0.9, 0.4, 1.2, 0.8, 0.5, 1.1, 0.7, 1.3, 0.6, 1.0],
    "10 seeds, large": [3.1, 2.2, 4.0, 2.9, 3.6, 2.4, 3.3, 2.7, 3.9, 3.0],
}


def weights(divisors: list[int]) -> list[float]:
    """How much each label counts, by the gradient at its logit: all tokens are equally probable."""
    found = []
    for n, divisor in zip(LABELS, divisors):
        logits = torch.zeros(n, 2, requires_grad=True)
        labels = torch.zeros(n, dtype=torch.int64)
        loss = CrossEntropy.apply(logits, labels, False) / divisor
        (gradient,) = torch.autograd.grad(loss, logits)
        found += (gradient[:, 0] / (1 / 2 - 1)).tolist()
    return found


def draw(figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    draw_weights(left)
    draw_intervals(right)


def draw_weights(axes: Axes) -> None:
    n_batches = len(LABELS)
    by_batch = weights([n * n_batches for n in LABELS])
    by_step = weights([sum(LABELS)] * n_batches)
    places = range(sum(LABELS))
    axes.bar(places, by_batch, width=1, color=BY_BATCH, label="each batch by its own labels")
    axes.step(places, by_step, where="mid", color=BY_STEP, label="by the labels of the step")
    start = 0
    for n in LABELS:
        axes.text(start + (n - 1) / 2, 0.003, str(n), ha="center", fontsize=9)
        start += n
        axes.axvline(start - 0.5, color="white", linewidth=1.5)
    axes.set_title("How much a label counts in the step", fontsize=10)
    axes.set_xlabel("labels of four batches (number of labels in each)")
    axes.set_xticks([])
    axes.set_ylabel("weight")
    axes.legend(frameon=False)


def draw_intervals(axes: Axes) -> None:
    axes.axvspan(-MARGIN, MARGIN, color="#e6eef7")
    axes.axvline(0, color="gray", linewidth=0.8, linestyle=":")
    for place, (name, values) in enumerate(DIFFERENCES.items()):
        mean, low, high = interval(values, level=0.90)
        color = BY_STEP if equivalent(values, MARGIN) else DIFFERENT
        axes.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", color=color)
        axes.text(-5.3, place - 0.18, f"{name}: {verdict(values)}", fontsize=9)
    axes.set_xlim(-5.5, 5.5)
    axes.set_ylim(len(DIFFERENCES) - 0.6, -0.6)
    axes.set_yticks([])
    axes.set_title("Significant and equivalent are two questions", fontsize=10)
    axes.set_xlabel(f"difference in points, 90 % interval; shaded: margin of {MARGIN:.0f}")


def verdict(values: list[float]) -> str:
    significant = "significant" if p_value(values) < 0.05 else "not significant"
    return f"{significant}, {'equivalent' if equivalent(values, MARGIN) else 'not equivalent'}"
