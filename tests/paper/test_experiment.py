"""What the scripts share: intervals, corrections, the ledger; and the committed results."""

import json
import random
from pathlib import Path

import pytest
import torch

from helpers.bounds import SIGNIFICANT
from paper import experiment
from paper.__main__ import main

FULL_RUN = experiment.HERE / "results.json"


def test_an_interval_covers_the_mean_in_95_of_100_samples() -> None:
    """Of 2000 samples 1900 are expected; the bound is 4 standard deviations."""
    rng = random.Random(0)
    covered = 0
    for _ in range(2000):
        _, low, high = experiment.interval([rng.gauss(3, 2) for _ in range(5)])
        covered += low < 3 < high
    assert abs(covered - 1900) < 4 * (2000 * (1 - SIGNIFICANT) * SIGNIFICANT) ** (1 / 2)


def test_a_p_value_is_below_5_percent_exactly_where_the_interval_misses_0() -> None:
    rng = random.Random(0)
    for _ in range(200):
        values = [rng.gauss(1, 1) for _ in range(5)]
        _, low, high = experiment.interval(values)
        assert (experiment.p_value(values) < SIGNIFICANT) == (not low < 0 < high)


def test_equal_differences_are_certain() -> None:
    assert experiment.p_value([0.0, 0.0]) == 1
    assert experiment.p_value([2.0, 2.0]) == 0
    assert experiment.interval([2.0, 2.0]) == (2, 2, 2)


def test_few_noisy_values_are_no_equivalence_and_no_difference() -> None:
    noisy = [3.0, -3.0, 1.0]
    assert experiment.p_value(noisy) > SIGNIFICANT
    assert not experiment.equivalent(noisy, margin=2)


def test_a_single_value_has_no_interval() -> None:
    with pytest.raises(ValueError, match="needs at least 2 values, got 1"):
        experiment.interval([1.0])


def test_holm_corrects_the_smallest_p_value_most_and_keeps_the_order() -> None:
    assert experiment.holm([0.5, 0.001, 0.02]) == [0.5, 0.003, 0.04]
    assert experiment.holm([]) == []
    assert max(experiment.holm([0.9, 0.8])) == 1


def test_a_sign_is_sure_only_after_the_correction() -> None:
    barely = [1.0, 0.2, 0.8, 0.3, 0.2]
    assert experiment.p_value(barely) < SIGNIFICANT
    assert experiment.signs([barely]) == [1]
    assert experiment.signs([barely] * 2) == [0, 0]


def test_the_first_true_rule_is_the_verdict_and_without_one_the_number_says_undecided() -> None:
    def decide(**rules: bool) -> experiment.Finding:
        return experiment.decide("a claim", "section 1", rules, "1 point", "-9 to 9")

    assert decide(held=False, bends=True, other=True).verdict == "bends"
    found = decide(held=False, bends=False)
    assert found.verdict == "not testable here"
    assert found.value == "undecided: 1 point"


def test_a_table_shows_four_digits_and_a_dash_for_nothing() -> None:
    text = experiment.markdown(["a", "b|c"], [[1.23456, None]])
    assert text == "| a | b\\|c |\n| --- | --- |\n| 1.235 | – |"


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["nothing"], "no script nothing"), (["--seeds", "1"], "at least 2 seeds, got 1")],
)
def test_impossible_flags_are_one_clear_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        experiment.parse_args(flags, None, names=True)
    assert message in capsys.readouterr().err


def test_a_quick_run_has_two_seeds_and_a_full_run_five_that_no_design_has_seen() -> None:
    def seeds(*flags: str) -> range:
        args = experiment.parse_args([*flags], None, names=False)
        return experiment.setting_of(args).seeds

    assert seeds() == range(100, 105)
    assert seeds("--quick") == range(2)
    assert seeds("--seeds", "10") == range(100, 110)
    assert seeds("--first-seed", "0") == range(5)


def test_the_random_sets_depend_on_the_first_seed() -> None:
    def drawn(first: int) -> float:
        seeds = range(first, first + 2)
        setting = experiment.Setting(Path("a model"), torch.device("cpu"), seeds, quick=False)
        assert setting.more_seeds(2) == range(first, first + 4)
        return setting.rng("parity").random()

    assert drawn(0) == drawn(0) != drawn(100)


def test_an_unknown_model_is_one_clear_line() -> None:
    args = experiment.parse_args(["--model", "./nowhere"], None, names=False)
    with pytest.raises(SystemExit, match="^paper: .*nowhere"):
        experiment.setting_of(args)


def test_the_page_and_its_ledger_are_those_of_the_results() -> None:
    found = json.loads(FULL_RUN.read_text())
    assert FULL_RUN.with_name("RESULTS.md").read_text() == experiment.report(found)


def test_the_page_and_the_figures_are_drawn_again_without_computing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "HERE", tmp_path)
    monkeypatch.setattr(experiment, "run", None)
    (tmp_path / "results.json").write_text(FULL_RUN.read_text())
    main(["--page", "outliers"])
    assert (tmp_path / "RESULTS.md").read_text() == FULL_RUN.with_name("RESULTS.md").read_text()
    assert [path.name for path in tmp_path.glob("*.png")] == ["outliers.png"]


def test_results_of_an_older_version_are_one_line_that_says_what_to_run(tmp_path: Path) -> None:
    found = json.loads(FULL_RUN.read_text())
    found["judge"]["results"] = {"judged": [1, 2]}
    page = experiment.report(found)
    assert "\njudge: results of an older version; run `make paper ARGS=judge`\n" in page
    assert "[judge.py]" not in page and "[outliers.py]" in page
    (tmp_path / "results.json").write_text(json.dumps(found))
    experiment.write_page(tmp_path, ["judge"])  # draws nothing
    assert [*tmp_path.glob("*.png")] == []


def test_every_script_has_full_results_and_a_figure() -> None:
    found = json.loads(FULL_RUN.read_text())
    assert list(experiment.SCRIPTS) == [name for name in experiment.ORDER if name in found]
    for name, entry in found.items():
        assert experiment.is_current(name, entry["results"])
        assert not entry["quick"] and entry["seeds"] >= 5
        assert (experiment.HERE / f"{name}.png").exists()


@pytest.mark.parametrize("name", experiment.SCRIPTS)
def test_a_quick_run_gives_a_table_a_figure_and_findings(name: str, tmp_path: Path) -> None:
    args = experiment.parse_args(["--quick"], None, names=False)
    torch.manual_seed(0)
    entry = experiment.run(name, experiment.setting_of(args))
    experiment.save(name, entry, tmp_path)
    page = (tmp_path / "RESULTS.md").read_text()
    assert (tmp_path / f"{name}.png").stat().st_size > 0
    findings = experiment.script(name).findings(entry["results"])
    assert findings
    for finding in findings:
        assert finding.verdict in experiment.VERDICTS
        assert f"| {experiment.cell(finding.claim)} |" in page
