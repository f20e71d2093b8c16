"""What the scripts of the paper's claims share: settings, statistics, results and the ledger.

Each script has four functions. `compute(setting)` returns results that fit into JSON; the others
only read them: `table(results)` is Markdown, `draw(results, figure)` fills a figure of matplotlib,
`findings(results)` are the lines of the ledger. So every verdict can be checked without computing
again.

Statistics. The numbers d_1 ... d_n are paired differences: of one seed, or one piece of text, under
two treatments. Their mean m and standard deviation s give

    interval        m +- t(level, n - 1) s / sqrt(n)                      Student's t
    p value         of the two-sided t-test that the mean is 0
    equivalence     the 90 % interval lies inside +- margin, which is two one-sided tests at 5 %
    Holm            multiplies the k-th smallest of K p values by K - k + 1

No significant difference is not equivalence: a test with few seeds finds no difference either.

Seeds. Learning rates, steps and rules were chosen by looking at results of seeds below 100, so a
full run begins at 100 (--first-seed). The random sets of examples and questions depend on the first
seed, too (`Setting.rng`). One thing was chosen later: parity, dataset_quality, multilingual,
three_bits and judge were given more runs after their first runs from 100 on, some of which decided
nothing. Their intervals are not corrected for this look.
"""

import argparse
import contextlib
import importlib
import io
import json
import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import matplotlib
import torch
from matplotlib.axes import Axes
from scipy import stats

from bench.machine import machine
from checkpoints import sources

HERE = Path(__file__).parent
OUT = HERE.parent / "out" / "paper"  # of quick runs
ORDER = """
datatypes optimality normality double_quant_bill parity layers_and_rank outliers memory_figure
paging dataset_quality multilingual three_bits judge
""".split()
SCRIPTS = [name for name in ORDER if (HERE / f"{name}.py").exists()]
VERDICTS = ("held", "bends", "did not hold", "not testable here")
FIRST_SEED = 100  # of a full run
SIGNIFICANT = 0.05  # level of a test
LIBRARIES = ("torch", "numpy", "scipy", "transformers", "matplotlib")
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 10,
    "legend.frameon": False,
}
COLORS = """
#1f3a5f #b5442e #3f8f6b #d39b2a #7a5a9e #6f7f8f #2f9fb5 #a0527a #8a6d3b
""".split()


@dataclass(frozen=True)
class Setting:
    """What the command line chose."""

    model: Path  # a folder
    device: torch.device
    seeds: range
    quick: bool

    def rng(self, name: str) -> random.Random:
        """Random numbers for a set of examples that all seeds share."""
        return random.Random(f"{name} {self.seeds.start}")

    def more_seeds(self, factor: int) -> range:
        """`factor` times as many seeds; in a quick run no more."""
        count = len(self.seeds) * (1 if self.quick else factor)
        return range(self.seeds.start, self.seeds.start + count)


class Finding(NamedTuple):
    """A line of the ledger."""

    claim: str
    place: str  # where the paper says it
    verdict: str  # one of VERDICTS
    value: str  # with its unit
    interval: str  # 95 %, and how it was made; "exact" for arithmetic


class Interval(NamedTuple):
    mean: float
    low: float
    high: float

    def span(self, spec: str = ".2f") -> str:
        """As text: from its low end to its high end."""
        return f"{self.low:{spec}} to {self.high:{spec}}"


def interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """The mean of independent numbers, with Student's t interval.

    >>> [round(number, 3) for number in interval([1.0, 2.0, 3.0])]
    [2.0, -0.484, 4.484]
    """
    if len(values) < 2:
        raise ValueError(f"an interval needs at least 2 values, got {len(values)}")
    mean = statistics.fmean(values)
    error = statistics.stdev(values) / math.sqrt(len(values))
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * error
    return Interval(mean, mean - half, mean + half)


def p_value(differences: Sequence[float]) -> float:
    """The two-sided t-test that the mean of paired differences is 0."""
    mean = interval(differences).mean
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * stats.t.sf(abs(mean) / error, len(differences) - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: p values that may each be compared with 5 %.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def signs(comparisons: Sequence[Sequence[float]]) -> list[int]:
    """For each list of differences 1 or -1 if its mean is surely above or below 0, at 5 %, else 0.

    >>> signs([[1.0, 1.1, 1.2], [-1.0, -1.1, -1.2], [1.0, -1.0, 0.1]])
    [1, -1, 0]
    """
    corrected = holm([p_value(differences) for differences in comparisons])
    means = [interval(differences).mean for differences in comparisons]
    return [(p < SIGNIFICANT) * (1 if mean > 0 else -1) for p, mean in zip(corrected, means)]


def equivalent(differences: Sequence[float], margin: float) -> bool:
    """Whether the mean difference is shown to be smaller than `margin`, at 5 % (TOST).

    >>> equivalent([0.1, -0.1, 0.0], margin=1.0), equivalent([2.0, -2.0, 0.0], margin=1.0)
    (True, False)
    """
    _, low, high = interval(differences, level=0.90)
    return -margin < low and high < margin


def is_gain(differences: Sequence[float], margin: float) -> dict[str, bool]:
    """The rules of a claim that a treatment gains something.

    Held: surely above 0. Did not hold: surely below 0, or surely smaller than the margin.
    """
    _, low, high = interval(differences)
    return {"held": low > 0, "did not hold": high < 0 or equivalent(differences, margin)}


def decide(claim: str, place: str, rules: dict[str, bool], value: str, limits: str) -> Finding:
    """The line of the ledger with the first verdict whose rule is true.

    If no rule is, the intervals are too wide to decide anything: "not testable here", and the
    number says so.
    """
    for verdict, is_true in rules.items():
        if is_true:
            return Finding(claim, place, verdict, value, limits)
    return Finding(claim, place, "not testable here", f"undecided: {value}", limits)


def errorbars(
    axes: Axes, places: Sequence[float], intervals: Sequence[Interval], **style: object
) -> None:
    """Draw means with their intervals, one above each place."""
    below = [one.mean - one.low for one in intervals]
    above = [one.high - one.mean for one in intervals]
    axes.errorbar(places, [one.mean for one in intervals], [below, above], **style)


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; floats get four significant digits, None a dash."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell(value) for value in line) + " |" for line in lines)


def cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "\\|")


def parse_args(argv: list[str] | None, description: str | None, names: bool) -> argparse.Namespace:
    """The flags of every script; with `names`, which scripts to run as well."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if names:
        parser.add_argument("scripts", nargs="*", metavar="script", help=", ".join(SCRIPTS))
        parser.add_argument("--page", action="store_true", help="compute nothing: only draw again")
    parser.add_argument("--model", help="folder or hub id of a Llama (default: SmolLM2)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--seeds", type=int, help="default: 5, with --quick 2")
    parser.add_argument("--first-seed", type=int, help="default: 100, with --quick 0")
    parser.add_argument("--quick", action="store_true", help="a rough look, written to out/paper")
    args = parser.parse_args(argv)
    if names and (unknown := [name for name in args.scripts if name not in SCRIPTS]):
        parser.error(f"no script {unknown[0]}: choose from {', '.join(SCRIPTS)}")
    if args.seeds is not None and args.seeds < 2:
        parser.error(f"an interval needs at least 2 seeds, got {args.seeds}")
    return args


def setting_of(args: argparse.Namespace) -> Setting:
    try:
        model = sources.find_model(args.model or sources.DEFAULT_MODEL)
    except ValueError as error:
        raise SystemExit(f"paper: {error}") from None
    count = args.seeds or (2 if args.quick else 5)
    first = args.first_seed
    if first is None:
        first = 0 if args.quick else FIRST_SEED
    return Setting(model, args.device, range(first, first + count), args.quick)


def script(name: str) -> ModuleType:
    return importlib.import_module(f"paper.{name}")


def run(name: str, setting: Setting) -> dict:
    """Compute one script; what it prints meanwhile is dropped. Returns its entry in the results."""
    conditions = machine(LIBRARIES)
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        results = script(name).compute(setting)
    return {
        "machine": conditions,
        "model": results.pop("model", setting.model.name),  # some train a small one
        "device": str(setting.device),
        "seeds": len(setting.seeds),
        "first seed": setting.seeds.start,
        "quick": setting.quick,
        "seconds": round(time.perf_counter() - began, 1),
        # As they are read again later: with keys that are strings, and eight digits.
        "results": json.loads(json.dumps(results, allow_nan=False), parse_float=eight_digits),
    }


def eight_digits(text: str) -> float:
    return float(f"{float(text):.8g}")


def save(name: str, entry: dict, folder: Path) -> None:
    """Add one script's entry to results.json, and write RESULTS.md and the figure."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    found[name] = entry
    path.write_text(json.dumps(found, indent=1) + "\n")
    write_page(folder, [name])


def write_page(folder: Path, figures: list[str]) -> None:
    """Write RESULTS.md and some figures from the results.json in a folder."""
    found = json.loads((folder / "results.json").read_text())
    (folder / "RESULTS.md").write_text(report(found))
    for name in figures:
        if is_current(name, found[name]["results"]):
            draw(name, found[name]["results"], folder / f"{name}.png")


def is_current(name: str, results: dict) -> bool:
    """Whether results have all that their script reads: those of an older version may not."""
    try:
        script(name).findings(results)
        script(name).table(results)
    except (AttributeError, LookupError, TypeError, ValueError):
        return False
    return True


def draw(name: str, results: dict, path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors = pyplot.cycler(color=COLORS)
    with pyplot.rc_context(STYLE | {"axes.prop_cycle": colors}):
        figure = pyplot.figure(figsize=(11, 4.2), layout="constrained")
        script(name).draw(results, figure)
        figure.savefig(path, dpi=130)
        pyplot.close(figure)


def report(found: dict[str, dict]) -> str:
    """RESULTS.md: the ledger, then each script's table and figure."""
    names = [name for name in SCRIPTS if name in found]
    current = [name for name in names if is_current(name, found[name]["results"])]
    parts = ["# The paper's claims, tested", LEGEND]
    for name in names:
        if name not in current:
            parts.append(f"{name}: results of an older version; run `make paper ARGS={name}`")
    parts.append(ledger({name: found[name] for name in current}))
    for name in current:
        entry = found[name]
        title = (script(name).__doc__ or name).partition("\n")[0].rstrip(".")
        parts += [f"## {name}.py: {title}", script(name).table(entry["results"])]
        parts += [f"![{name}]({name}.png)", conditions(entry)]
    return "\n\n".join(parts) + "\n"


LEGEND = """`make paper` writes this page from results.json. A rule in each script computes the
verdict from the numbers: *held*, *bends* (holds in part, or under conditions), *did not hold*, or
*not testable here*; then the number says why: *undecided* if the interval is too wide to tell.
Intervals are 95 % intervals."""


def ledger(found: dict[str, dict]) -> str:
    rows = []
    for name, entry in found.items():
        for finding in script(name).findings(entry["results"]):
            rows.append([*finding, f"[{name}.py]({name}.py)"])
    header = ["claim", "in the paper", "verdict", "number", "interval", "script"]
    return markdown(header, rows)


def conditions(entry: dict) -> str:
    versions = ", ".join(
        f"{name} {number}" for name, number in entry["machine"]["versions"].items()
    )
    quick = "a quick run, " if entry["quick"] else ""
    first = entry["first seed"]
    return (
        f"<sub>{quick}{entry['model']}, --seeds {entry['seeds']} --first-seed {first}, "
        f"{entry['seconds']:.0f} s on "
        f"{entry['device']} ({entry['machine']['cpu']}, {entry['machine']['threads']} threads), "
        f"commit {entry['machine']['commit']}, {versions}</sub>"
    )


def main(name: str, argv: list[str] | None = None) -> None:
    """Run one script from its own command line: compute, save, print its table and findings."""
    args = parse_args(argv, script(name).__doc__, names=False)
    entry = run(name, setting_of(args))
    save(name, entry, OUT if args.quick else HERE)
    print(script(name).table(entry["results"]))
    for finding in script(name).findings(entry["results"]):
        print(f"\n{finding.claim} ({finding.place}): {finding.verdict}")
        print(f"  {finding.value}; {finding.interval}")
