"""Does training in several languages help?

The paper leaves it open (section 8): OASST1 has many languages, and how much they help with
instructions in languages other than English was not examined.

Here: orders in English, German and Spanish (orders.py). The base has seen all three. The adapter
is trained on one language, or on all three with a third of the examples each: the same number of
examples and steps. Each model is tested on each language, half of it in unseen phrasings.

Three questions: what a language gains from the mixture against training in English alone; whether
the mixture costs English anything; whether it reaches training in the language itself.

The number of runs was chosen from the spread of 10 runs, so that the margin is about as wide as
half an interval.
"""

import random
import statistics

from matplotlib.figure import Figure

from paper import experiment, orders
from paper.experiment import Finding, Setting
from paper.parity import MARGIN
from paper.small_base import LORA_LR, Base, exact_match, train

STEPS = 25
RUNS = 10  # for each seed asked for: the spread of 10 runs asks for about 50
N_TRAIN = 300
ENGLISH, *OTHERS = LANGUAGES = list(orders.LANGUAGES)
MIXED = "all three"


def compute(setting: Setting) -> dict:
    base = Base(setting)
    steps = 3 if setting.quick else STEPS
    n_test = 30 if setting.quick else 200
    rng = setting.rng("multilingual: tests")
    tests = {language: base.task(rng, n_test, language)[1] for language in LANGUAGES}
    scores: dict = {name: {language: [] for language in tests} for name in [*LANGUAGES, MIXED]}
    for seed in setting.more_seeds(RUNS):
        rng = random.Random(f"multilingual {seed}")
        sets = {
            language: [orders.extraction(rng, language) for _ in range(N_TRAIN)]
            for language in LANGUAGES
        }
        sets[MIXED] = [pair for pairs in sets.values() for pair in pairs[: N_TRAIN // 3]]
        for name, pairs in sets.items():
            model = train(base.adapted(seed), base.encode(pairs), steps, LORA_LR, seed)
            for language, test in tests.items():
                scores[name][language].append(exact_match(model, test))
    return {"model": base.folder.name, "scores": scores}


def gains(results: dict, trained_on: str, languages: list[str]) -> list[float]:
    """The mixture minus training on one language, in points, averaged over tests; per seed."""
    scores = results["scores"]
    by_language = [
        [a - b for a, b in zip(scores[MIXED][language], scores[trained_on][language])]
        for language in languages
    ]
    return [statistics.fmean(changes) for changes in zip(*by_language)]


def table(results: dict) -> str:
    rows = []
    for name, by_language in results["scores"].items():
        row = [name]
        for scores in by_language.values():
            mean = experiment.interval(scores)
            row.append(f"{mean.mean:.1f} ({mean.span('.1f')})")
        rows.append(row)
    header = ["trained on", *(f"tested on {language}, %" for language in LANGUAGES)]
    return f"{experiment.markdown(header, rows)}\n\nThe paper has no figures for this question."


def draw(results: dict, figure: Figure) -> None:
    axes = figure.subplots()
    names = list(results["scores"])
    for number, name in enumerate(names):
        for place, scores in enumerate(results["scores"][name].values()):
            x = place + 0.2 * (number - 1.5)
            axes.plot([x - 0.05] * len(scores), scores, "o", color=f"C{number}", alpha=0.25)
            label = f"trained on {name}" if place == 0 else None
            style = {"fmt": "s", "color": f"C{number}", "capsize": 3, "label": label}
            experiment.errorbars(axes, [x], [experiment.interval(scores)], **style)
    axes.set(
        xticks=range(len(LANGUAGES)),
        xticklabels=[f"tested on {language}" for language in LANGUAGES],
        ylabel="exact match, %: each seed, mean, 95 % interval",
    )
    figure.legend(loc="outside right center")


def findings(results: dict) -> list[Finding]:
    return [helps_others(results), costs_english_nothing(results), replaces_own(results)]


def helps_others(results: dict) -> Finding:
    """Held: the interval is above 0. Did not hold: below 0, or within the margin."""
    change = gains(results, ENGLISH, OTHERS)
    rules = experiment.is_gain(change, MARGIN)
    return finding("training in three languages helps the other two", rules, [change], ENGLISH)


def costs_english_nothing(results: dict) -> Finding:
    """Held: not worse than English alone by the margin. Did not hold: worse for certain."""
    change = gains(results, ENGLISH, [ENGLISH])
    return finding("and costs English nothing", not_worse([change]), [change], ENGLISH)


def replaces_own(results: dict) -> Finding:
    """Held: in no language worse than that language alone, by the margin. Bends: in some."""
    changes = [gains(results, language, [language]) for language in OTHERS]
    claim = "three languages replace training in the own one"
    return finding(claim, not_worse(changes), changes, "the language alone")


def not_worse(changes: list[list[float]]) -> dict[str, bool]:
    """The rules of the claim that nothing is lost, within the margin (one-sided tests at 5 %).

    Did not hold: something is lost for certain, and perhaps more than the margin.
    """
    shown = [experiment.interval(change, level=0.90).low > -MARGIN for change in changes]
    lost = [experiment.interval(change).high < 0 for change in changes]
    return {
        "held": all(shown),
        "did not hold": any(is_lost and not within for is_lost, within in zip(lost, shown)),
        "bends": any(shown),
    }


def finding(
    claim: str, rules: dict[str, bool], changes: list[list[float]], reference: str
) -> Finding:
    means = [experiment.interval(change) for change in changes]
    return experiment.decide(
        claim,
        "section 8, left open",
        rules,
        f"minus {reference}: " + ", ".join(f"{m.mean:+.1f}" for m in means) + " points",
        ", ".join(mean.span("+.1f") for mean in means)
        + f" (paired t, {len(changes[0])} seeds; margin {MARGIN:.0f})",
    )


if __name__ == "__main__":
    experiment.main("multilingual")
