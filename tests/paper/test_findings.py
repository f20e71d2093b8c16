"""The verdicts follow from the numbers: made-up results turn them each way."""

import copy

import pytest

from paper import (
    datatypes,
    double_quant_bill,
    experiment,
    memory_figure,
    normality,
    optimality,
    outliers,
)
from paper.bases import AS_GIVEN, ROTATED, TRAINED_HERE

NAMES = (AS_GIVEN, ROTATED, TRAINED_HERE)
NOISE = [0.001, -0.001, 0.002, 0.0]


def around(mean: float) -> list[float]:
    return [mean + noise for noise in NOISE]


def verdicts(findings: list[experiment.Finding]) -> list[str]:
    return [finding.verdict for finding in findings]


def losses_of(rivals: dict[str, float]) -> dict:
    """Losses in which each rival loses so much more than NF4; the same on each base."""
    windows = {"NF4, 64": [2.0, 3.0, 2.5, 4.0]}
    for rival in datatypes.RIVALS:
        extra = around(rivals.get(rival, 0.1))
        windows[f"{rival}, 64"] = [a + b for a, b in zip(windows["NF4, 64"], extra)]
    errors = {"NF4": [0.1] * 8} | {code: [0.09] * 8 for code in datatypes.NEWER}
    return {"dense": [2.0] * 4, "losses": windows, "errors": errors}


def test_the_verdict_on_data_types_follows_the_losses_of_each_base() -> None:
    better = {name: losses_of({"BOF4": -0.1, "Int4": 0.2}) for name in NAMES}
    assert verdicts(datatypes.findings(better)) == ["held"] * 4
    worse = {name: losses_of(dict.fromkeys(datatypes.RIVALS, -0.1)) for name in NAMES}
    assert verdicts(datatypes.findings(worse))[:3] == ["did not hold"] * 3
    mixed = better | {AS_GIVEN: losses_of({"Int4": 0.0, "E2M1": 0.0, "E3M0": -0.1})}
    assert verdicts(datatypes.findings(mixed)) == ["bends"] * 4
    unclear = {name: losses_of(dict.fromkeys(datatypes.RIVALS, 0.0)) for name in NAMES}
    found = datatypes.findings(unclear)
    assert verdicts(found) == ["not testable here"] * 4
    assert all(finding.value.startswith("undecided: ") for finding in found)


def test_a_newer_code_must_win_in_error_too() -> None:
    results = {name: losses_of({"BOF4": -0.1}) for name in NAMES}
    assert verdicts(datatypes.findings(results))[3] == "held"
    for entry in results.values():
        entry["errors"]["BOF4"] = [0.2] * 8
    assert verdicts(datatypes.findings(results))[3] == "did not hold"


@pytest.mark.parametrize(
    ("shares", "errors", "decoded", "expected"),
    [
        ([1 / 16] * 16, [1.0, 1.0], 9, ["held", "held", "held"]),
        ([0.05] * 8 + [0.075] * 8, [1.05, 1.05], 5, ["bends", "bends", "bends"]),
        ([0.9] + [0.1 / 15] * 15, [1.2, 1.2], 0, ["did not hold"] * 3),
    ],
)
def test_optimality_is_judged_by_use_by_error_and_by_zeros(
    shares: list[float], errors: list[float], decoded: int, expected: list[str]
) -> None:
    best = {"least absolute error": [1.0, 1.0], "least squared error": [1.0, 1.0]}
    results = {
        "theory": {"64": shares},
        "counted": {name: optimality.summary([[shares, shares]]) for name in NAMES},
        "errors": {"64": {"NF4": errors, **best}},
        "zeros that stay": {"zeros": 9, "zeros decoded": decoded},
    }
    assert verdicts(optimality.findings(results)) == expected


def layers(failed: list[int], mean: float) -> dict:
    rows = [{"kind": "q", "tested": 100, "failed": n, "mean": mean} for n in failed]
    return {"layers": normality.mean_of_turns([rows, rows])}


@pytest.mark.parametrize(
    ("failed", "means", "expected"),
    [
        ([[5, 6, 7]] * 3, [0.0] * 3, ["held", "held"]),
        ([[60, 61, 62], [5, 6, 7], [5, 6, 7]], [0.0, 0.0, 1.0], ["bends", "bends"]),
        ([[60, 61, 62]] * 3, [1.0] * 3, ["did not hold", "did not hold"]),
    ],
)
def test_normality_is_judged_by_failing_rows_and_by_means(
    failed: list[list[int]], means: list[float], expected: list[str]
) -> None:
    rows = [layers(each, mean) for each, mean in zip(failed, means)]
    results = dict(zip(NAMES, rows)) | {"normal": layers([5, 5, 6], 0.0)}
    assert verdicts(normality.findings(results)) == expected


def billed(saved: float, added: float, ours: float) -> dict:
    """Results in which double quantization saves bits and adds loss; int8 has the error 1."""
    double = 4.5 - saved
    errors = {
        "no double quantization": {"constants": 0.0},
        "dynamic (ours), minus the mean": {"constants": ours},
        "int8, minus the mean": {"constants": 1.0},
    }
    return {
        "NF4": [2.0] * 4,
        "NF4 + DQ": [2.0 + each / 10 for each in around(10 * added)],
        "bytes, NF4": 4.5e6 / 8,
        "bytes, NF4 + DQ": double * 1e6 / 8,
        "weights": 1e6,
        "layers": 0,
        "variants": [errors, errors],
    }


def test_the_bill_is_judged_by_bits_by_loss_and_by_the_code() -> None:
    good = {name: billed(0.373, 0.0, ours=0.5) for name in NAMES}
    assert verdicts(double_quant_bill.findings(good)) == ["held", "held", "held"]
    mixed = good | {AS_GIVEN: billed(0.35, 0.01, ours=2.0)}
    assert verdicts(double_quant_bill.findings(mixed)) == ["bends", "bends", "bends"]
    bad = {name: billed(0.1, 0.5, ours=2.0) for name in NAMES}
    assert verdicts(double_quant_bill.findings(bad)) == ["did not hold"] * 3


def outlying(whole: float, blocks: float) -> dict:
    """Results in which an outlier multiplies the error so much, in one block and in many."""
    planted = {}
    for code in outliers.CODES:
        for block, growth in ((64, blocks), (outliers.WHOLE, whole)):
            by_size = [[1.0, 1.0, 1.0] for _ in outliers.SIZES]
            by_size[outliers.SIZES.index(outliers.PLANTED)] = [growth, growth, growth]
            planted[f"{code}, {block}"] = by_size
    row = {"blocks": 1.0, "whole": whole}
    return {"one outlier": planted, "layers": {name: [row, row] for name in NAMES}}


def test_outliers_are_judged_by_the_growth_of_the_error() -> None:
    assert verdicts(outliers.findings(outlying(whole=5, blocks=1))) == ["held", "held"]
    assert verdicts(outliers.findings(outlying(whole=1, blocks=1))) == ["bends", "did not hold"]
    assert verdicts(outliers.findings(outlying(whole=1, blocks=2)))[0] == "did not hold"
    mixed = outlying(whole=5, blocks=1)
    mixed["layers"][AS_GIVEN] = [{"blocks": 1.0, "whole": 1.0}] * 2
    assert verdicts(outliers.findings(mixed)) == ["held", "bends"]


def test_memory_is_judged_by_bytes() -> None:
    sizes = {name: memory_figure.size(shape) for name, shape in memory_figure.SHAPES.items()}
    run = {"predicted": {"peak": 100}, "measured": {"peak": 101}}
    results = {"sizes": sizes, "measured": [run]}
    found = verdicts(memory_figure.findings(results))

    def change(key: str, factor: float, place: int) -> str:
        changed = copy.deepcopy(results)
        for entry in changed["sizes"].values():
            entry[key] *= factor
        return verdicts(memory_figure.findings(changed))[place]

    assert found[0] == "held"
    assert change("QLoRA", 2, 0) == "bends"  # no longer fits
    assert change("QLoRA", 2, 1) == "did not hold"
    assert change("QLoRA", 1.06, 1) == "held"  # nearer to the paper's totals
    assert change("activations", 1000, 2) == "held"
    assert change("all activations", 0.1, 2) == "did not hold"
    assert change("adapters", 0.1, 3) == "held"
    assert change("adapters of rank 8", 10, 3) == "did not hold"
    run["measured"]["peak"] = 200
    assert verdicts(memory_figure.findings(results))[0] == "bends"
