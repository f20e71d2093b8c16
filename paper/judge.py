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

Elo: K = 32 and 1000 at the start, over random orders of the same matches. It is tried on synthetic
tournaments, where a system wins by known ratings, and on the first judge's choices.

Differs from the paper: a small model as the judge, no people, and systems with known faults.
"""

import random
import statistics
from collections.abc import Sequence
from itertools import combinations, permutations

import torch
from matplotlib.figure import Figure
from scipy import stats
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.dataset import encode_prompt
from paper import experiment, orders
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
QUESTIONS = 2  # for each seed
MARGIN = 0.05  # of the share that is picked
RATINGS = [1000.0, 1050.0, 1100.0, 1150.0]  # of the synthetic systems
MATCHES = 20  # of each synthetic pair
Match = tuple[int, int]  # the winner, the loser


def compute(setting: Setting) -> dict:
    model, tokenizer = load(setting.model, setting.device)
    rng = random.Random("judge")
    n_questions = setting.seeds if setting.quick else QUESTIONS * setting.seeds
    systems = WRONG_FIELDS[:2] if setting.quick else WRONG_FIELDS
    n_orders = 20 if setting.quick else 500
    questions = [question(rng, systems) for _ in range(n_questions)]
    judged = {
        name: [judge(model, tokenizer, wording, *each) for each in questions]
        for name, wording in WORDINGS.items()
    }
    real = [match for each in judged["judge 1"] for match in matches_of(each)]
    synthetic = [tournament(random.Random(f"elo {seed}")) for seed in range(setting.seeds)]
    return {
        "systems": systems,
        "judged": judged,
        "real": elo_over_orders(real, len(systems), n_orders),
        "synthetic": [elo_over_orders(matches, len(RATINGS), n_orders) for matches in synthetic],
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


def matches_of(judged: list[dict]) -> list[Match]:
    """One match for each pair of systems, won by the one that the judge prefers."""
    systems = sorted({each["first"] for each in judged})
    pairs = combinations(systems, 2)
    return [(a, b) if preference(judged, a, b) > 0 else (b, a) for a, b in pairs]


def tournament(rng: random.Random) -> list[Match]:
    """Matches in which a system wins as often as its rating says."""
    matches = []
    for a, b in combinations(range(len(RATINGS)), 2):
        for _ in range(MATCHES):
            a_wins = rng.random() < expected(RATINGS[a], RATINGS[b])
            matches.append((a, b) if a_wins else (b, a))
    return matches


def expected(rating: float, other: float) -> float:
    """The probability of a win.

    >>> expected(1000, 1000), round(expected(1400, 1000), 3)
    (0.5, 0.909)
    """
    return 1 / (1 + 10 ** ((other - rating) / 400))


def elo(matches: Sequence[Match], n_systems: int) -> list[float]:
    """Ratings after the matches in this order.

    >>> elo([(0, 1)], 2)
    [1016.0, 984.0]
    """
    ratings = [1000.0] * n_systems
    for winner, loser in matches:
        gain = 32 * (1 - expected(ratings[winner], ratings[loser]))
        ratings[winner] += gain
        ratings[loser] -= gain
    return ratings


def elo_over_orders(matches: Sequence[Match], n_systems: int, n_orders: int) -> dict:
    """Mean and standard deviation of each rating over orders, and how often the ranking differs."""
    rng = random.Random("orders")
    runs = [elo(rng.sample(matches, len(matches)), n_systems) for _ in range(n_orders)]
    by_system = list(zip(*runs))
    mean = [statistics.fmean(ratings) for ratings in by_system]
    differs = statistics.fmean(ranking(run) != ranking(mean) for run in runs)
    spread = [statistics.stdev(ratings) for ratings in by_system]
    return {"mean": mean, "spread": spread, "differs": differs}


def ranking(ratings: Sequence[float]) -> list[int]:
    return sorted(range(len(ratings)), key=ratings.__getitem__)


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
    correlation = {"Kendall": stats.kendalltau, "Spearman": stats.spearmanr}[measure]
    values = []
    for a, b in zip(wins(results, one), wins(results, other)):
        is_tied = len(set(a)) == 1 or len(set(b)) == 1
        values.append(0.0 if is_tied else float(correlation(a, b).statistic))
    return values


PAIRS = [("judge 1", "judge 2"), ("judge 1", KEY), ("judge 2", KEY)]


def table(results: dict) -> str:
    judged = []
    for name in WORDINGS:
        row = [name]
        for of in ("first", "letter"):
            mean, low, high = experiment.interval(shares(results, name, of))
            row.append(f"{mean:.0%} ({low:.0%} to {high:.0%})")
        judged.append(row)
    bias = experiment.markdown(["", "picks the first answer", "picks the letter A"], judged)
    rows = []
    for one, other in PAIRS:
        row = [f"{one}, {other}"]
        for measure in ("Kendall", "Spearman"):
            mean, low, high = experiment.interval(agreement(results, one, other, measure))
            row.append(f"{mean:+.2f} ({low:+.2f} to {high:+.2f})")
        rows.append(row)
    agree = experiment.markdown(["rank correlation per question", "Kendall", "Spearman"], rows)
    real = results["real"]
    ratings = [
        [f"{wrong} wrong", f"{mean:.0f}", f"{spread:.0f}"]
        for wrong, mean, spread in zip(results["systems"], real["mean"], real["spread"])
    ]
    rated = experiment.markdown(
        ["fields", "Elo by judge 1", "standard deviation over orders"], ratings
    )
    note = "The paper's shares and correlations are not in our reference."
    return "\n\n".join([bias, agree, rated, note])


def draw(results: dict, figure: Figure) -> None:
    left, middle, right = figure.subplots(1, 3)
    for number, of in enumerate(("first", "letter")):
        for place, name in enumerate(WORDINGS):
            percent = [100 * share for share in shares(results, name, of)]
            x = place + 0.3 * number - 0.15
            left.plot([x - 0.06] * len(percent), percent, "o", color=f"C{number}", alpha=0.25)
            mean, low, high = experiment.interval(percent)
            label = ("the first answer", "the letter A")[number] if place == 0 else None
            errors = [[mean - low], [high - mean]]
            left.errorbar(x, mean, errors, fmt="s", color=f"C{number}", label=label)
    left.axhline(50, color="0.5", linestyle="--")
    left.set(xticks=range(len(WORDINGS)), xticklabels=WORDINGS, xlim=(-0.5, 1.5), ylim=(-5, 105))
    left.set_title("what a judge picks, % of cases\n(dashed: no bias)", fontsize=10)
    left.legend(loc="lower right")
    series = [("judge 1", results["real"]), *(("synthetic", one) for one in results["synthetic"])]
    for number, (name, rated) in enumerate(series):
        shift = 0.1 * (number - len(series) / 2)
        places = [system + shift for system in range(len(rated["mean"]))]
        color = "C1" if number == 0 else "C0"
        label = name if number < 2 else None
        middle.errorbar(places, rated["mean"], rated["spread"], fmt="o", color=color, label=label)
    names = [f"{wrong} wrong\n{rating:.0f}" for wrong, rating in zip(WRONG_FIELDS, RATINGS)]
    middle.set(xticks=range(len(names)), xticklabels=names)
    middle.set_xlabel("fields (judge 1) / true rating (synthetic)")
    middle.set_title("Elo, mean and standard deviation\nover orders of the matches", fontsize=10)
    middle.legend()
    for number, measure in enumerate(("Kendall", "Spearman")):
        for place, pair in enumerate(PAIRS):
            mean, low, high = experiment.interval(agreement(results, *pair, measure))
            label = measure if place == 0 else None
            x = place + 0.2 * number - 0.1
            errors = [[mean - low], [high - mean]]
            right.errorbar(x, mean, errors, fmt="s", color=f"C{number}", label=label)
    right.axhline(0, color="0.5", linestyle="--")
    names = [f"{one},\n{other}" for one, other in PAIRS]
    right.set(xticks=range(len(PAIRS)), xticklabels=names, ylim=(-1, 1))
    right.set_title("agreement: rank correlation\nper question, 95 % interval", fontsize=10)
    right.legend()


def findings(results: dict) -> list[Finding]:
    return [favours_first(results), elo_needs_orders(results), judges_agree(results)]


def favours_first(results: dict) -> Finding:
    """Held: both judges pick the first more often. Bends: one. Did not hold: neither can."""
    means = {name: experiment.interval(shares(results, name, "first")) for name in WORDINGS}
    first = [low > 0.5 for _, low, _ in means.values()]
    refuted = [high < 0.5 + MARGIN for _, _, high in means.values()]
    if all(first):
        verdict = "held"
    elif all(refuted):
        verdict = "did not hold"
    elif any(first):
        verdict = "bends"
    else:
        verdict = "not testable here"
    return Finding(
        "judges favour the answer they see first",
        "section 5",
        verdict,
        "picked first: "
        + ", ".join(f"{name} {m.mean:.0%}" for name, m in means.items())
        + "; the letter A: "
        + ", ".join(f"{statistics.fmean(shares(results, n, 'letter')):.0%}" for n in WORDINGS),
        ", ".join(f"{m.low:.0%} to {m.high:.0%}" for m in means.values())
        + f" (t, {len(results['judged']['judge 1'])} questions)",
    )


def elo_needs_orders(results: dict) -> Finding:
    """Held: more than one order in twenty ranks the systems in another way than the mean."""
    shares = [rated["differs"] for rated in results["synthetic"]]
    mean, low, high = experiment.interval(shares)
    if low > 0.05:
        verdict = "held"
    elif high < 0.05:
        verdict = "did not hold"
    else:
        verdict = "not testable here"
    return Finding(
        "an Elo ranking depends on the order of the matches",
        "section 5",
        verdict,
        f"{mean:.0%} of the orders rank four systems differently from the mean (synthetic); "
        f"{results['real']['differs']:.0%} on the choices of judge 1",
        f"{low:.0%} to {high:.0%} (t, {len(shares)} tournaments)",
    )


def judges_agree(results: dict) -> Finding:
    """Held: with each other and with the key. Bends: with one of them. Did not hold: neither."""
    pairs = PAIRS[:2]
    means = [experiment.interval(agreement(results, *pair, "Kendall")) for pair in pairs]
    agree = [low > 0 for _, low, _ in means]
    if all(agree):
        verdict = "held"
    elif any(agree):
        verdict = "bends"
    elif all(high < 0.4 for _, _, high in means):
        verdict = "did not hold"  # at most weakly
    else:
        verdict = "not testable here"
    return Finding(
        "judges agree",
        "section 5",
        verdict,
        "Kendall " + ", ".join(f"{a} and {b} {m.mean:+.2f}" for (a, b), m in zip(pairs, means)),
        ", ".join(f"{m.low:+.2f} to {m.high:+.2f}" for m in means)
        + f" (t, {len(results['judged']['judge 1'])} questions)",
    )


if __name__ == "__main__":
    experiment.main("judge")
