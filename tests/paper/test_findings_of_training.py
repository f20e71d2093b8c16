"""The verdicts of the scripts that train and judge follow from the numbers, each way."""

import pytest

from paper import (
    dataset_quality,
    judge,
    layers_and_rank,
    multilingual,
    paging,
    parity,
    three_bits,
)
from paper.experiment import Finding
from variants.init import STARTS

NOISE = [0.1, -0.1, 0.2, -0.2, 0.0]
WILD = [9.0, -9.0, 7.0, -7.0, 0.0]


def around(mean: float, noise: list[float] = NOISE) -> list[float]:
    return [mean + each for each in noise]


def verdicts(found: list[Finding]) -> list[str]:
    return [finding.verdict for finding in found]


def of_methods(full: list[float], lora: list[float], nf4: list[float], fp4: list[float]) -> dict:
    return {parity.FULL: full, parity.LORA: lora, "NF4": nf4, "FP4": fp4}


def test_parity_is_equivalence_to_both_references_early_and_late() -> None:
    nf4 = around(90.0, NOISE[::-1])
    equal = of_methods(around(90.2), around(90.1), nf4, around(89.0))
    worse = of_methods(around(99.0), around(90.1), nf4, around(90.0))
    unclear = of_methods(around(91.0, WILD), around(90.1), nf4, around(90.0, WILD))
    assert verdicts(parity.findings({"long": equal, "short": equal})) == ["held", "held"]
    assert verdicts(parity.findings({"long": equal, "short": worse})) == ["bends", "held"]
    assert verdicts(parity.findings({"long": worse, "short": equal})) == ["did not hold"] * 2
    found = parity.findings({"long": unclear, "short": equal})
    assert verdicts(found) == ["not testable here"] * 2


def cells(part: list[float], rank_64: list[float]) -> dict:
    found = []
    for targets in layers_and_rank.TARGETS:
        for rank in layers_and_rank.RANKS:
            scores = part
            if targets == layers_and_rank.ALL:
                scores = rank_64 if rank == 64 else around(90.0)
            found.append({"targets": targets, "rank": rank, "scores": scores})
    return {"cells": found}


def test_all_layers_are_needed_if_they_beat_each_part_and_rank_is_equivalence() -> None:
    found = layers_and_rank.findings(cells(around(80, NOISE[::-1]), around(90.5, NOISE[::-1])))
    assert verdicts(found) == ["held", "held"]
    found = layers_and_rank.findings(cells(around(92, NOISE[::-1]), around(95, NOISE[::-1])))
    assert verdicts(found) == ["did not hold", "did not hold"]
    found = layers_and_rank.findings(cells(around(89, WILD), around(91, WILD)))
    assert verdicts(found) == ["not testable here", "bends"]
    one_part_is_enough = cells(around(80, NOISE[::-1]), around(90))
    for cell in one_part_is_enough["cells"]:
        if cell["targets"] == "MLP":
            cell["scores"] = around(92)
    assert verdicts(layers_and_rank.findings(one_part_is_enough)) == ["bends", "held"]
    wild_ranks = cells(around(89), around(91, WILD))
    for cell in wild_ranks["cells"]:
        if (cell["targets"], cell["rank"]) in {("all", 1), ("all", 4)}:
            cell["scores"] = around(91, WILD)
    assert verdicts(layers_and_rank.findings(wild_ranks))[1] == "not testable here"


def of_codes(long: dict[str, list[float]], short: dict[str, list[float]] | None = None) -> dict:
    """Scores by code and start after long and short training; 90 points where none are given."""
    names = [f"{three_bits.DENSE}, default"]
    names += [f"{code}, {start}" for code in three_bits.BITS for start in STARTS]
    cells = {
        name: {
            "long": long.get(name, around(90.0)),
            "short": (long if short is None else short).get(name, around(90.0)),
        }
        for name in names
    }
    return {"cells": cells}


def test_fewer_bits_are_recovered_if_equivalent_to_a_dense_base_early_and_late() -> None:
    low = around(70, NOISE[::-1])
    lost = {"NF2, default": low, "NF3, default": around(88, WILD)}
    found = three_bits.findings(of_codes({}))
    assert verdicts(found) == ["held", "held", "did not hold"]
    assert verdicts(three_bits.findings(of_codes({}, lost)))[:2] == ["bends", "bends"]
    expected = ["not testable here", "did not hold"]
    assert verdicts(three_bits.findings(of_codes(lost)))[:2] == expected


def test_a_start_of_the_adapters_matters_if_it_is_better_than_zero_early_and_late() -> None:
    low = {"NF2, default": around(70, NOISE[::-1])}
    assert verdicts(three_bits.findings(of_codes(low)))[2] == "held"
    assert verdicts(three_bits.findings(of_codes({}, low)))[2] == "bends"
    wild = {"NF2, pissa": around(91, WILD)}
    assert verdicts(three_bits.findings(of_codes(wild)))[2] == "not testable here"


def timings(all_fit: list[float], paged: list[float], after_spike: float) -> dict:
    def spike(base: float) -> list[float]:
        return [base] * 5 + [3 * base, after_spike * base] + [base] * 3

    rows = {paging.RESIDENT: [0.1, 0.1, 0.1], "100%": all_fit, "5%": paged}
    return {
        "passes": {"1 x 128": 0.5, "4 x 256": 10.0},
        "rows": {name: {"seconds": seconds} for name, seconds in rows.items()},
        "spikes": [spike(base) for base in (0.1, 0.11, 0.12)],
    }


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        (timings([0.1, 0.11, 0.1], [0.1, 0.11, 0.1], 1.1), ["held", "held", "held"]),
        (timings([3, 3.1, 3], [9, 9.1, 9], 3), ["did not hold", "did not hold", "bends"]),
        (timings([0.1, 0.11, 0.1], [0.3, 0.31, 0.3], 1), ["held", "bends", "held"]),
        (timings([0.1, 9, 0.1], [9, 0.1, 0.1], 1), ["not testable here"] * 2 + ["held"]),
    ],
)
def test_paging_is_judged_by_the_time_of_a_whole_step(results: dict, expected: list[str]) -> None:
    assert verdicts(paging.findings(results)) == expected


def test_a_spike_that_cannot_be_seen_is_no_verdict() -> None:
    results = timings([0.1, 0.11, 0.1], [0.1, 0.11, 0.1], 1.0)
    for seconds, factor in zip(results["spikes"], (1.0, 0.5, 2.0)):
        seconds[paging.SPIKE] = factor * seconds[0]
    assert verdicts(paging.findings(results))[2] == "not testable here"


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([95, 85, 80, 75], "held"),
        ([95, 92, 85, 80], "bends"),
        ([95, 94, 93, 92], "did not hold"),
    ],
)
def test_quality_is_judged_by_the_share_of_errors_that_ten_times_the_data_bear(
    scores: list[float], expected: str
) -> None:
    shares = map(str, dataset_quality.SHARES)
    by_share = dict(zip(shares, map(around, scores)))
    results = {"clean": around(90, NOISE[::-1]), "noisy": dict.fromkeys(["random"], by_share)}
    assert dataset_quality.quality(results, "random").verdict == expected
    results["clean"] = around(94, [3 * each for each in WILD])
    assert dataset_quality.quality(results, "random").verdict == "not testable here"


def test_the_crossing_point_is_where_more_data_stop_being_better() -> None:
    assert dataset_quality.crossing([-1.0, 1.0, 1.0, 1.0]) == 0
    assert dataset_quality.crossing([1.0, 1.0, 0.0, 1.0]) == 0.5
    assert dataset_quality.crossing([1.0, 1.0, 1.0, 1.0]) == 1


def languages(mixed: float, own: float, english: float, noise: list[float] = NOISE) -> dict:
    def scores(trained_on: str, tested_on: str) -> list[float]:
        if trained_on == multilingual.MIXED:
            return around(mixed, noise[::-1])
        return around(own if trained_on == tested_on else english)

    names = [*multilingual.LANGUAGES, multilingual.MIXED]
    return {"scores": {a: {b: scores(a, b) for b in multilingual.LANGUAGES} for a in names}}


def test_several_languages_help_if_they_beat_english_and_cost_nothing_within_the_margin() -> None:
    assert verdicts(multilingual.findings(languages(90, 90, 80))) == ["held"] * 3
    assert verdicts(multilingual.findings(languages(80, 90, 80))) == ["did not hold"] * 3
    wild = multilingual.findings(languages(88, 90, 87, WILD))
    assert verdicts(wild) == ["not testable here"] * 3
    rules = multilingual.not_worse([around(0), WILD])
    assert [verdict for verdict, is_true in rules.items() if is_true] == ["bends"]


def judged(odds: dict[tuple[int, int], float], first: float, letter: float) -> list[dict]:
    """Two systems: log odds of a better than b, with a liking for the first and for A."""
    found = []
    for a, b in ((0, 1), (1, 0)):
        quality = odds[0, 1] if a == 0 else -odds[0, 1]
        for name, sign in (("A", 1), ("B", -1)):
            total = quality + first + sign * letter
            found.append({"first": a, "second": b, "letter": name, "odds": total})
    return found


def of_judges(one: list[dict], two: list[dict], differs: list[float]) -> dict:
    rated = [{"differs": each} for each in differs]
    judges = {"judge 1": [one] * 4, "judge 2": [two] * 4}
    return {"systems": [0, 1], "judged": judges, "real": rated[0], "synthetic": rated}


def test_a_liking_for_a_letter_is_none_for_a_place() -> None:
    place = judged({(0, 1): 0.5}, first=2.0, letter=0.1)
    letter = judged({(0, 1): 0.5}, first=0.0, letter=2.0)
    found = judge.findings(of_judges(place, place, [0.3, 0.31]))
    assert verdicts(found) == ["held"] * 3
    found = judge.findings(of_judges(letter, letter, [0.01, 0.011]))
    assert verdicts(found) == ["did not hold", "did not hold", "held"]
    found = judge.findings(of_judges(place, letter, [0.0, 0.9]))
    assert verdicts(found) == ["bends", "not testable here", "held"]


def test_judges_agree_only_if_their_rankings_do() -> None:
    right = judged({(0, 1): 0.5}, first=0.0, letter=0.0)
    wrong = judged({(0, 1): -0.5}, first=0.0, letter=0.0)
    assert verdicts(judge.findings(of_judges(right, wrong, [0.3, 0.3])))[2] == "bends"
    results = of_judges(wrong, right, [0.3, 0.3])
    assert verdicts(judge.findings(results))[2] == "did not hold"
    results["judged"]["judge 1"] = [right, wrong, right, wrong]
    assert verdicts(judge.findings(results))[2] == "not testable here"
