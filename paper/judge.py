"""Judges favour the answer they see first; Elo ratings need many orders; do judges agree?

Claims (section 5): GPT-4 prefers the answer that stands first, so both orders are judged; an Elo
rating depends on the order of the matches, so it is averaged over random orders; the rankings of
judges agree moderately.

Here: an instruct model is shown an order and the answers of two systems, and is asked which one is
better. Its choice is the more probable of two letters. Each pair is judged in both orders, and in
each with the letters A, B and B, A. So a judge without a bias picks the first in half of the cases
whatever the answers are, and a liking for a letter is not taken for one for a place. The mean of
the four log odds is what the judge thinks of the pair. The systems are made: their answers have 0,
1, 2 or 4 wrong fields, so the truth is known. Two wordings of the question are two judges; the
count of right fields is a third, the key.

Elo ratings (elo.py) over random orders of the same matches are tried on synthetic tournaments,
where a system wins by known ratings, and on the first judge's choices.

Differs from the paper: a small model as the judge, no people, and systems with known faults.
"""

import random
import statistics
from itertools import combinations, permutations

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.dataset import encode_prompt
from paper import elo, experiment, orders
from paper.bases import load
from paper.experiment import Finding, Setting

WRONG_FIELDS = [0, 1, 2, 4]  # of the systems
WORDINGS = {
    "judge 1": (
        "Order: {order}\n\n{one}: {first}\n\n{other}: {second}\n\nWhich list fits the order "
        "better, {one} or {other}? Answer with one letter."
    ),
    "judge 2": (
        "Two assistants extracted the fields of this order:\n{order}\nAssistant {one}: {first}\n"
        "Assistant {other}: {second}\nOne of them made fewer mistakes. Name it: {one} or {other}."
    ),
}
KEY = "the key"
PAIRS = [("judge 1", "judge 2"), ("judge 1", KEY), ("judge 2", KEY)]
MEASURES = {"Kendall": stats.kendalltau, "Spearman": stats.spearmanr}
BIASES = {"first": "the first answer", "letter": "the letter A"}
QUESTIONS = 6  # for each seed
MARGIN = 0.05  # of the share that is picked
WEAK = 0.4  # a Kendall correlation
RATINGS = [1000.0, 1050.0, 1100.0, 1150.0]  # of the synthetic systems
MATCHES = 20  # of each synthetic pair


def compute(setting: Setting) -> dict:
    model, tokenizer = load(setting.model, setting.device)
    rng = setting.rng("judge")
    systems = WRONG_FIELDS[:2] if setting.quick else WRONG_FIELDS
    questions = [question(rng, systems) for _ in setting.more_seeds(QUESTIONS)]
    judged = {
        name: [judge(model, tokenizer, wording, *each) for each in questions]
        for name, wording in WORDINGS.items()
    }
    n_orders = 20 if setting.quick else 500
    real = [match for each in judged["judge 1"] for match in matches_of(each)]
    synthetic = []
    for seed in setting.seeds:
        by_seed = random.Random(f"elo {seed}")
        matches = elo.tournament(RATINGS, MATCHES, by_seed)
        synthetic.append(elo.over_orders(matches, len(RATINGS), n_orders, by_seed))
    return {
        "systems": systems,
        "judged": judged,
        "real": elo.over_orders(real, len(systems), n_orders, rng),
        "synthetic": synthetic,
    }


def question(rng: random.Random, systems: list[int]) -> tuple[str, list[str]]:
    """An order, and the answer of each system."""
    sentence, order = orders.random_order(rng, "English", "phrasings")
    answers = []
    for wrong in systems:
        _, other = orders.random_order(rng, "English", "phrasings")
        fields = set(rng.sample(orders.FIELDS, wrong))
        mixed = {field: (other if field in fields else order)[field] for field in orders.FIELDS}
        answers.append(orders.as_list(mixed, orders.FIELDS))
    return sentence, answers


@torch.no_grad()
def judge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    wording: str,
    sentence: str,
    answers: list[str],
) -> list[dict]:
    """The log odds of the first answer, for each ordered pair of systems with both letterings."""
    tokens = {x: tokenizer(x, add_special_tokens=False).input_ids[0] for x in "AB"}
    found = []
    for first, second in permutations(range(len(answers)), 2):
        for one, other in ("AB", "BA"):
            text = wording.format(
                order=sentence, first=answers[first], second=answers[second], one=one, other=other
            )
            ids = torch.tensor([encode_prompt(tokenizer, text)], device=model.device)
            logits = model(ids, use_cache=False, logits_to_keep=1).logits[0, -1]
            odds = float(logits[tokens[one]] - logits[tokens[other]])
            found.append({"first": first, "second": second, "letter": one, "odds": odds})
    return found


def preference(judged: list[dict], a: int, b: int) -> float:
    """The mean log odds of system a against b, over both orders and letterings."""
    for_a = [each["odds"] for each in judged if (each["first"], each["second"]) == (a, b)]
    for_b = [each["odds"] for each in judged if (each["first"], each["second"]) == (b, a)]
    return (statistics.fmean(for_a) - statistics.fmean(for_b)) / 2


def matches_of(judged: list[dict]) -> list[elo.Match]:
    """One match for each pair of systems, won by the one that the judge prefers."""
    systems = sorted({each["first"] for each in judged})
    pairs = combinations(systems, 2)
    return [(a, b) if preference(judged, a, b) > 0 else (b, a) for a, b in pairs]


def shares(results: dict, name: str, of: str) -> list[float]:
    """How often a judge picks the first answer, or the letter A, for each question."""
    by_question = []
    for judged in results["judged"][name]:
        picks_first = [each["odds"] > 0 for each in judged]
        picks_a = [(each["odds"] > 0) == (each["letter"] == "A") for each in judged]
        by_question.append(statistics.fmean(picks_first if of == "first" else picks_a))
    return by_question


def wins(results: dict, name: str) -> list[list[int]]:
    """How good the systems are to a judge, for each question: their wins, or their right fields."""
    systems = results["systems"]
    if name == KEY:
        return [[-wrong for wrong in systems]] * len(results["judged"]["judge 1"])
    by_question = []
    for judged in results["judged"][name]:
        winners = [winner for winner, _ in matches_of(judged)]
        by_question.append([winners.count(system) for system in range(len(systems))])
    return by_question


def agreement(results: dict, one: str, other: str, measure: str) -> list[float]:
    """The rank correlation of the wins by two judges, for each question; 0 if one has only ties."""
    values = []
    for a, b in zip(wins(results, one), wins(results, other)):
        is_tied = len(set(a)) == 1 or len(set(b)) == 1
        values.append(0.0 if is_tied else float(MEASURES[measure](a, b).statistic))
    return values


def table(results: dict) -> str:
    bias = []
    for name in WORDINGS:
        means = [experiment.interval(shares(results, name, of)) for of in BIASES]
        bias.append([name, *(f"{mean.mean:.0%} ({mean.span('.0%')})" for mean in means)])
    agree = []
    for pair in PAIRS:
        means = [experiment.interval(agreement(results, *pair, measure)) for measure in MEASURES]
        cells = [f"{mean.mean:+.2f} ({mean.span('+.2f')})" for mean in means]
        agree.append([", ".join(pair), *cells])
    real = results["real"]
    rated = [
        [f"{wrong} wrong", f"{mean:.0f}", f"{spread:.0f}"]
        for wrong, mean, spread in zip(results["systems"], real["mean"], real["spread"])
    ]
    parts = [
        experiment.markdown(["", *(f"picks {of}" for of in BIASES.values())], bias),
        experiment.markdown(["rank correlation per question", *MEASURES], agree),
        experiment.markdown(["fields", "Elo by judge 1", "standard deviation over orders"], rated),
        "The paper's judges are GPT-4 and people: their numbers are not comparable.",
    ]
    return "\n\n".join(parts)


def draw(results: dict, figure: Figure) -> None:
    left, middle, right = figure.subplots(1, 3)
    draw_bias(results, left)
    draw_elo(results, middle)
    draw_agreement(results, right)


def draw_bias(results: dict, axes: Axes) -> None:
    for number, (of, label) in enumerate(BIASES.items()):
        percent = [[100 * share for share in shares(results, name, of)] for name in WORDINGS]
        places = [place + 0.3 * number - 0.15 for place in range(len(WORDINGS))]
        for x, values in zip(places, percent):
            axes.plot([x - 0.06] * len(values), values, "o", color=f"C{number}", alpha=0.25)
        means = [experiment.interval(values) for values in percent]
        experiment.errorbars(axes, places, means, fmt="s", color=f"C{number}", label=label)
    axes.axhline(50, color="0.5", linestyle="--")
    axes.set(xticks=range(len(WORDINGS)), xticklabels=WORDINGS, xlim=(-0.5, 1.5), ylim=(-5, 105))
    axes.set_title("what a judge picks, % of cases\n(dashed: no bias)", fontsize=10)
    axes.legend(loc="lower right")


def draw_elo(results: dict, axes: Axes) -> None:
    series = [results["real"], *results["synthetic"]]
    labels = ["judge 1", "synthetic"] + [None] * (len(series) - 2)
    for number, (rated, label) in enumerate(zip(series, labels)):
        shift = 0.1 * (number - len(series) / 2)
        places = [system + shift for system in range(len(rated["mean"]))]
        color = "C1" if number == 0 else "C0"
        axes.errorbar(places, rated["mean"], rated["spread"], fmt="o", color=color, label=label)
    names = [f"{wrong} wrong\n{rating:.0f}" for wrong, rating in zip(WRONG_FIELDS, RATINGS)]
    axes.set(xticks=range(len(names)), xticklabels=names)
    axes.set_xlabel("fields (judge 1) / true rating (synthetic)")
    axes.set_title("Elo, mean and standard deviation\nover orders of the matches", fontsize=10)
    axes.legend()


def draw_agreement(results: dict, axes: Axes) -> None:
    for number, measure in enumerate(MEASURES):
        means = [experiment.interval(agreement(results, *pair, measure)) for pair in PAIRS]
        places = [place + 0.2 * number - 0.1 for place in range(len(PAIRS))]
        experiment.errorbars(axes, places, means, fmt="s", color=f"C{number}", label=measure)
    axes.axhline(0, color="0.5", linestyle="--")
    names = [f"{one},\n{other}" for one, other in PAIRS]
    axes.set(xticks=range(len(PAIRS)), xticklabels=names, ylim=(-1, 1))
    axes.set_title("agreement: rank correlation\nper question, 95 % interval", fontsize=10)
    axes.legend()


def findings(results: dict) -> list[Finding]:
    return [favours_first(results), elo_needs_orders(results), judges_agree(results)]


def favours_first(results: dict) -> Finding:
    """Held: both judges pick the first more often. Bends: one. Did not hold: neither can."""
    means = [experiment.interval(shares(results, name, "first")) for name in WORDINGS]
    letters = [statistics.fmean(shares(results, name, "letter")) for name in WORDINGS]
    first = [mean.low > 0.5 for mean in means]
    parts = [f"{name} {mean.mean:.0%}" for name, mean in zip(WORDINGS, means)]
    return experiment.decide(
        "judges favour the answer they see first",
        "section 5",
        {
            "held": all(first),
            "did not hold": all(mean.high < 0.5 + MARGIN for mean in means),
            "bends": any(first),
        },
        f"picked first: {', '.join(parts)}; the letter A: "
        + ", ".join(f"{share:.0%}" for share in letters),
        f"{', '.join(mean.span('.0%') for mean in means)} (t, {n_questions(results)} questions)",
    )


def n_questions(results: dict) -> int:
    return len(results["judged"]["judge 1"])


def elo_needs_orders(results: dict) -> Finding:
    """Held: more than one order in twenty ranks the systems in another way than the mean."""
    differs = [rated["differs"] for rated in results["synthetic"]]
    mean = experiment.interval(differs)
    return experiment.decide(
        "an Elo ranking depends on the order of the matches",
        "section 5",
        {"held": mean.low > 0.05, "did not hold": mean.high < 0.05},
        f"{mean.mean:.0%} of the orders rank four systems differently from the mean (synthetic); "
        f"{results['real']['differs']:.0%} on the choices of judge 1",
        f"{mean.span('.0%')} (t, {len(differs)} tournaments)",
    )


def judges_agree(results: dict) -> Finding:
    """Held: with each other and with the key. Bends: with one. Did not hold: weakly at most."""
    pairs = PAIRS[:2]
    means = [experiment.interval(agreement(results, *pair, "Kendall")) for pair in pairs]
    agree = [mean.low > 0 for mean in means]
    parts = [f"{one} and {other} {m.mean:+.2f}" for (one, other), m in zip(pairs, means)]
    return experiment.decide(
        "judges agree",
        "section 5",
        {
            "held": all(agree),
            "bends": any(agree),
            "did not hold": all(mean.high < WEAK for mean in means),
        },
        f"Kendall {', '.join(parts)}",
        f"{', '.join(mean.span('+.2f') for mean in means)} (t, {n_questions(results)} questions)",
    )


if __name__ == "__main__":
    experiment.main("judge")
