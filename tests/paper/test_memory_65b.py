"""The script of figure 6: what it prints and writes."""

import json
from pathlib import Path

import pytest
import torch

from bench import capped_run
from helpers.pages import text_of_pages
from paper import memory_65b

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would measure")


def test_a_card_that_is_too_small_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(capped_run, "room", lambda device: 2**30)
    assert memory_65b.main(["--model", "llama-7b", "--json", str(tmp_path / "found.json")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("memory_65b.py: a sequence of 512 tokens needs ")


@NO_GPU
def test_without_a_gpu_the_papers_models_are_only_predicted_and_the_tiny_one_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "found.json"
    assert memory_65b.main(["--model", "llama-65b", "tiny", "--json", str(path)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("no GPU here: the models of the paper are predicted, not measured\n")
    found = json.loads(path.read_text())
    rows = found["rows"]
    assert found["card"] is None
    assert [(row["model"], row["batch"]) for row in rows] == [
        ("llama-65b", 1),
        ("llama-65b", 16),
        ("tiny", 1),
        ("tiny", 16),
    ]
    assert [row["measured"] is None for row in rows] == [True, True, False, False]
    assert f"{rows[0]['predicted']['peak'] / 1e9:12.3f}           -" in text
    only_predicted, _, measured = text.partition("tiny")
    assert "predicted peak" in measured and "predicted peak" not in only_predicted


@NO_GPU
def test_the_pages_show_what_is_printed_without_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = str(tmp_path / "found.json")
    assert memory_65b.main(["--model", "llama-65b", "--json", found]) == 0
    assert capsys.readouterr().out in text_of_pages()
