"""NF4 is better than FP4 and Int4 (section 4, table 2 and figure 3), without training.

Each linear layer of a model is quantized and decoded again. Then two numbers say what a code costs:
the error of the weights, relative to their size, and the perplexity of held-out text.

Three bases stand side by side (bases.py), because the weights at hand lie on a lattice that suits
some codes by chance. The second is a new random rotation for each seed, measured on its own part of
the text. Comparisons are paired by window of text; Holm's correction counts all of them.

Differs from the paper: small models and Python's documentation instead of 125M to 13B models and
Common Crawl. The optimal codes (codebooks.py) are newer than the paper.
"""

import math
from collections.abc import Callable
from statistics import fmean

from matplotlib import scale
from matplotlib.figure import Figure
from torch import Tensor

from lora import FrozenWeight
from paper import bases, codebooks, experiment
from paper.experiment import Finding, Setting

CODES: dict[str, Callable[[int], Tensor]] = {  # the code for a block size
    "Int4": lambda block: codebooks.integers(4),
    "FP4 (bitsandbytes)": lambda block: codebooks.fp4(),
    "E2M1": lambda block: codebooks.e2m1(),
    "E3M0": lambda block: codebooks.e3m0(),
    "NF4": lambda block: codebooks.nf(4),
    "NF4 + DQ": lambda block: codebooks.nf(4),
    "AF4": codebooks.af4,
    "BOF4": codebooks.bof4,
    "BOF4-S": codebooks.bof4_s,
    "least squares": lambda block: codebooks.optimal(2, block),
    "NF3": lambda block: codebooks.nf(3),
    "NF2": lambda block: codebooks.nf(2),
}
BLOCKS = [32, 64, 128, 256, 512, 1024, 2048, 4096]
SWEPT = ["Int4", "E2M1", "NF4", "BOF4"]  # perplexity at more block sizes than 64
NEWER = ["BOF4", "BOF4-S", "least squares"]  # of least squared error
RIVALS = ["Int4", "FP4 (bitsandbytes)", "E2M1", "E3M0", *NEWER]  # of NF4
PAPER = {"Int4": 34.34, "E2M1": 31.07, "E3M0": 29.48, "NF4 + DQ": 27.41}  # mean perplexity
NAMES = (bases.AS_GIVEN, bases.ROTATED, bases.TRAINED_HERE)


class Quantizer:
    """Quantizes and decodes weights, and adds up their squared errors."""

    def __init__(self, code: str, block: int) -> None:
        self.codebook = CODES[code](block)
        self.block = block
        self.double_quant = code.endswith("DQ")
        self.signed = code == "BOF4-S"
        self.squared_error = 0.0
        self.square = 0.0

    def __call__(self, weight: Tensor) -> Tensor:
        if self.signed:
            signs = codebooks.signs(weight, self.block)
            decoded = signs * self.decoded(signs * weight)
        else:
            decoded = self.decoded(weight)
        self.squared_error += (decoded - weight).square().sum().item()
        self.square += weight.square().sum().item()
        return decoded

    def decoded(self, weight: Tensor) -> Tensor:
        return FrozenWeight(weight, self.block, self.double_quant, self.codebook)()

    @property
    def relative_error(self) -> float:
        return math.sqrt(self.squared_error / self.square)


def compute(setting: Setting) -> dict:
    """Of each base: the losses of its windows, dense and quantized, and errors of its weights."""
    codes = SWEPT if setting.quick else list(CODES)
    found: dict[str, dict] = {name: {"dense": [], "losses": {}, "errors": {}} for name in NAMES}
    for base in bases.bases(setting, n_windows=2 if setting.quick else 12):
        rows = found[base.name]
        rows["dense"] += bases.losses(base.model, base.windows)
        cells = [(code, 64) for code in codes]
        if base.name != bases.ROTATED and not setting.quick:
            cells += [(code, block) for code in SWEPT for block in (256, 4096)]
        for code, block in cells:
            with bases.changed(base.model, Quantizer(code, block)):
                losses = bases.losses(base.model, base.windows)
            rows["losses"].setdefault(f"{code}, {block}", []).extend(losses)
        rows["errors"] = rows["errors"] or weight_errors(base, codes)  # of one rotation
    return found


def weight_errors(base: bases.Base, codes: list[str]) -> dict[str, list[float]]:
    """Root mean squared error over root mean square, at each block size, of some layers."""
    layers = list(bases.linear_layers(base.model).values())
    sample = layers[::10]
    errors: dict[str, list[float]] = {}
    for code in codes:
        quantizers = [Quantizer(code, block) for block in BLOCKS]
        for quantizer in quantizers:
            for layer in sample:
                quantizer(layer.weight)
        errors[code] = [quantizer.relative_error for quantizer in quantizers]
    return errors


def comparisons(results: dict) -> list[dict]:
    """NF4 against each rival on each base, at block 64: loss of the rival minus NF4's."""
    rows = []
    for base in NAMES:
        losses = results[base]["losses"]
        for rival in [rival for rival in RIVALS if f"{rival}, 64" in losses]:
            differences = [
                theirs - ours for theirs, ours in zip(losses[f"{rival}, 64"], losses["NF4, 64"])
            ]
            rows.append({"base": base, "rival": rival, "differences": differences})
    corrected = experiment.holm([experiment.p_value(row["differences"]) for row in rows])
    for row, p in zip(rows, corrected):
        row["interval"] = experiment.interval(row["differences"])
        row["p"] = p
        row["nf4 is"] = "equal?"
        if p < 0.05:
            row["nf4 is"] = "better" if row["interval"].mean > 0 else "worse"
    return rows


def perplexity(losses: list[float]) -> float:
    return math.exp(fmean(losses))


def table(results: dict) -> str:
    """Perplexity and error by code, and the comparisons with NF4."""
    header = ["code, block", *(f"perplexity, {name}" for name in NAMES), "paper"]
    header += [f"error %, {name}" for name in NAMES]
    rows = [["not quantized", *(perplexity(results[name]["dense"]) for name in NAMES)]]
    rows[0] += [None] * 4
    for key in results[bases.AS_GIVEN]["losses"]:
        code, block = key.split(", ")
        cells = [results[name]["losses"].get(key) for name in NAMES]
        row = [key, *(cell and perplexity(cell) for cell in cells)]
        row.append(PAPER.get(code) if block == "64" else None)
        place = BLOCKS.index(int(block))
        rows.append(row + [100 * results[name]["errors"][code][place] for name in NAMES])
    text = experiment.markdown(header, rows)
    header = ["base", "rival of NF4, block 64", "its loss - NF4's, nats", "95 %", "p (Holm)"]
    rows = []
    for row in comparisons(results):
        mean = row["interval"].mean
        span = row["interval"].span("+.4f")
        p = f"{row['p']:.2g}"
        rows.append([row["base"], row["rival"], f"{mean:+.4f}", span, p, row["nf4 is"]])
    note = "The paper's column is its mean over models and data sets of its own: compare the order."
    return f"{text}\n\n{note}\n\n{experiment.markdown([*header, 'NF4 is'], rows)}"


def draw(results: dict, figure: Figure) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    codes = [code for code in CODES if f"{code}, 64" in results[NAMES[0]]["losses"]]
    codes = [code for code in codes if code not in ("NF3", "NF2")]  # far off to the right
    for shift, name in enumerate(NAMES):
        dense = results[name]["dense"]
        for place, code in enumerate(codes):
            losses = results[name]["losses"][f"{code}, 64"]
            mean, low, high = experiment.interval([q - d for q, d in zip(losses, dense)])
            left.errorbar(
                mean,
                place + 0.22 * (shift - 1),
                xerr=[[mean - low], [high - mean]],
                fmt="o",
                markersize=5,
                color=experiment.COLORS[shift],
                label=name if place == 0 else None,
            )
    left.set(
        title="what 4 bits cost, block 64",
        xlabel="loss added, nats per token",
        xscale=scale.SymmetricalLogScale(None, linthresh=0.01),
        yticks=range(len(codes)),
    )
    left.xaxis.set_major_formatter("{x:g}")
    left.set_yticklabels(codes)
    left.invert_yaxis()
    left.axvline(0, color="0.7", linewidth=0.8)
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
    for code, errors in results[bases.TRAINED_HERE]["errors"].items():
        if code in codes and code != "NF4 + DQ":
            style = {"linewidth": 2.5} if code == "NF4" else {"linewidth": 1.2}
            right.plot(BLOCKS, [100 * error for error in errors], label=code, **style)
    right.set_xscale("log", base=2)
    right.set(
        title="error of the weights, trained here",
        xlabel="block size",
        ylabel="% of their size",
        ylim=(8, 23),
    )
    right.legend(fontsize=8, ncols=2)


def rules_of(rows: list[dict]) -> dict[str, bool]:
    """held: NF4 is better in every comparison. bends: in some. did not hold: worse in some."""
    nf4_is = {row["nf4 is"] for row in rows}
    return {
        "held": nf4_is == {"better"},
        "bends": "better" in nf4_is,
        "did not hold": "worse" in nf4_is,
    }


def describe(rows: list[dict]) -> str:
    """What the rivals lose more than NF4, by base."""
    parts = []
    for name in NAMES:
        values = [
            f"{row['rival']} {row['interval'].mean:+.4f}" for row in rows if row["base"] == name
        ]
        parts.append(f"{name}: {', '.join(values)}")
    return f"loss of the rival minus that of NF4, nats; {'; '.join(parts)}"


def limits(rows: list[dict]) -> str:
    spans = [row["interval"].span("+.4f") for row in rows]
    return "; ".join(spans) + " (t, paired by window; Holm)"


def findings(results: dict) -> list[Finding]:
    rows = comparisons(results)
    lines = []
    for claim, place, rivals in (
        ("NF4 is better than Int4", "section 4, table 2", ["Int4"]),
        ("NF4 is better than FP4", "section 4, table 2", ["FP4 (bitsandbytes)", "E2M1", "E3M0"]),
    ):
        chosen = [row for row in rows if row["rival"] in rivals]
        numbers = (describe(chosen), limits(chosen))
        lines.append(experiment.decide(claim, place, rules_of(chosen), *numbers))
    return [*lines, same_order(results), newer_codes(results, rows)]


def same_order(results: dict) -> Finding:
    """held: on every base NF4 < E2M1 < Int4 in loss, each step for sure. bends: some steps are.

    did not hold: some step is reversed for sure. Holm's correction counts the six steps.
    """
    steps = []
    for name in NAMES:
        losses = results[name]["losses"]
        for better, worse in (("NF4", "E2M1"), ("E2M1", "Int4")):
            pairs = zip(losses[f"{better}, 64"], losses[f"{worse}, 64"])
            steps.append([worse - better for better, worse in pairs])
    signs = experiment.signs(steps)
    spans = [experiment.interval(step).span("+.4f") for step in steps]
    orders = []
    for name in NAMES:
        losses = results[name]["losses"]
        codes = [code for code in CODES if code not in ("NF3", "NF2") and f"{code}, 64" in losses]
        means = {code: fmean(losses[f"{code}, 64"]) for code in codes}
        orders.append(f"{name}: {' < '.join(sorted(codes, key=means.__getitem__))}")
    return experiment.decide(
        "NF4 < E2M1 < Int4 in perplexity, whatever the base",
        "table 2",
        {"did not hold": min(signs) < 0, "held": all(signs), "bends": any(signs)},
        "order by mean loss: " + "; ".join(orders),
        f"E2M1 - NF4 and Int4 - E2M1 by base: {'; '.join(spans)} (t, paired by window; Holm)",
    )


def newer_codes(results: dict, rows: list[dict]) -> Finding:
    """held: one code of least error beats NF4 in error and in loss on every base.

    bends: on some base one does. did not hold: each has more error, or surely more loss.
    """
    codes = [code for code in NEWER if code in results[NAMES[0]]["errors"]]
    place = BLOCKS.index(64)
    chosen = [row for row in rows if row["rival"] in codes]
    wins, losses, parts = [], [], []
    for code in codes:
        of_code = [row for row in chosen if row["rival"] == code]
        errors = [results[row["base"]]["errors"] for row in of_code]
        ratios = [error[code][place] / error["NF4"][place] for error in errors]
        wins.append([r < 1 and row["nf4 is"] == "worse" for r, row in zip(ratios, of_code)])
        losses += [r >= 1 or row["nf4 is"] == "better" for r, row in zip(ratios, of_code)]
        parts.append(f"error {code} / NF4 {', '.join(f'{ratio:.3f}' for ratio in ratios)}")
    rules = {
        "held": any(all(each) for each in wins),
        "bends": any(any(each) for each in wins),
        "did not hold": all(losses),
    }
    claim = "a code of least squared error beats NF4 in error and in perplexity"
    value = f"{'; '.join(parts)}; {describe(chosen)}"
    return experiment.decide(claim, "later: arXiv 2505.06653", rules, value, limits(chosen))


if __name__ == "__main__":
    experiment.main("datatypes")
