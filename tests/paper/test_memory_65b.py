"""The 65B run, rehearsed on a model of the same make that a CPU can train; and on a GPU (make gpu), itself."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_unified_memory import CPU, CUDA, recording

from bench import random_llama
from helpers.bounds import OF_A_PEAK, OF_A_PEAK_ON_A_CARD
from memory import formula as predict
from memory import measured as memory
from memory import weigh
from memory.formula import QLORA, SHAPES
from paper import memory_65b as paper

TINY, LENGTH = paper.TINY, 64
PLENTY = int(paper.SPARE * paper.room(CPU))
LASTING = (
    "linear layers",
    "embedding, head",
    "norms, biases",
    "adapters",
    "gradients",
    "AdamW moments",
)


def room_for(size: int, batch: int) -> int:
    """As many bytes as a batch in passes of `size` needs, and no more."""
    prediction = predict.predict(TINY, QLORA, size, LENGTH, paper.RANK, accumulating=size < batch)
    return prediction.peak(paged=True) + paper.PAGE


@pytest.mark.parametrize(("batch", "size"), [(1, 1), (16, 16), (16, 4)])
def test_a_rehearsal_weighs_what_was_predicted(batch: int, size: int) -> None:
    plan = paper.Plan(TINY, batch, LENGTH, room_for(size, batch))
    assert plan.size == size
    result, expected = paper.measure(TINY, plan, CPU), paper.predicted(plan)
    assert {name: result[name] for name in LASTING} == {name: expected[name] for name in LASTING}
    assert abs(result["peak"] - expected["peak"]) <= OF_A_PEAK * expected["peak"]
    assert result["pager"]["evictions"] == 0 and result["seconds"] > 0


def test_no_dense_layer_is_ever_made() -> None:
    with memory.Live() as live:
        model = random_llama.build(TINY, paper.RANK, CPU)
    held = memory.Live(*model.parameters(), *model.buffers()).now()
    largest = max(layer.base.nbytes for layer in model.modules() if hasattr(layer, "lora_A"))
    assert live.peak - held <= 2 * largest < 2 * max(out * width for out, width in TINY.maps())


@pytest.mark.parametrize("batch", paper.BATCHES)
@pytest.mark.parametrize("name", SHAPES)
def test_every_size_of_the_paper_fits_its_48_gb(name: str, batch: int) -> None:
    plan = paper.Plan(SHAPES[name], batch, paper.LENGTH, PLENTY)
    assert plan.peak <= PLENTY < paper.CAP
    smaller = plan.resident < plan.prediction.components["AdamW moments"]
    assert (plan.size < batch, smaller) == (
        name == "llama-65b" and batch == 16,
    ) * 2  # there alone, pages must leave
    if plan.size < batch:
        more = 2 * plan.size
        twice = predict.predict(
            SHAPES[name], QLORA, more, paper.LENGTH, paper.RANK, accumulating=more < batch
        )
        assert twice.peak(paged=True) + paper.PAGE > PLENTY


def test_what_fits_in_no_way_is_refused() -> None:
    with pytest.raises(ValueError, match="a sequence of 64 tokens needs .* bytes, and there are"):
        paper.Plan(TINY, 2, LENGTH, min(room_for(1, 2), room_for(2, 2)) - 1)


def test_a_gradient_that_is_not_finite_is_an_error() -> None:
    plan = paper.Plan(TINY, 1, LENGTH, PLENTY)
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(RuntimeError, match="the gradient is not finite"),
    ):
        patch.setattr(
            paper,
            "label_loss",
            lambda model, batch, dtype: sum(p.sum() for p in model.parameters()) * torch.inf,
        )
        paper.measure(TINY, plan, CPU)


def test_on_a_gpu_torch_and_the_pages_share_the_room_and_the_peak_is_that_of_both() -> None:
    """Rehearsed on a driver that writes down what it is asked, and on an allocator that says what it is told to."""
    log, total = [], 80 * 2**30
    plan = paper.Plan(TINY, 2, LENGTH, PLENTY)
    with recording() as driver, pytest.MonkeyPatch.context() as patch:
        for module in (paper, weigh):
            patch.setattr(module, "on_gpu", lambda device: True)
        for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
            patch.setattr(torch.cuda, name, lambda *device, name=name: log.append(name))
        patch.setattr(torch.cuda, "max_memory_allocated", lambda: 1000)
        patch.setattr(
            torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=total)
        )
        patch.setattr(torch.cuda, "set_per_process_memory_fraction", log.append)
        result = paper.measure(TINY, plan, CPU)
    assert driver.moves and not driver.blocks
    moments = plan.prediction.components["AdamW moments"]
    assert result["peak"] == 1000 + moments and result["AdamW moments"] == moments
    share = (paper.CAP - memory.OUTSIDE - plan.resident) / total
    measured, timed, freed = (
        ["synchronize", "reset_peak_memory_stats", "synchronize"],
        ["synchronize"],
        ["synchronize"],
    )
    assert log == ["empty_cache", share, *measured, *timed, 1.0, *freed]


def test_the_state_of_another_optimizer_is_torchs_own() -> None:
    parameters = random_llama.build(TINY, paper.RANK, CPU).parameters()
    assert not paper.is_managed(torch.optim.AdamW(parameters))


def test_a_smaller_card_has_less_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=24 * 2**30)
    )
    assert (
        paper.room(CUDA)
        == 24 * 2**30 - memory.OUTSIDE
        < paper.room(CPU)
        == paper.CAP - memory.OUTSIDE
    )


def test_a_card_that_is_too_small_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(paper, "room", lambda device: 2**30)
    assert paper.main(["--model", "llama-7b", "--json", str(tmp_path / "found.json")]) == 1
    assert capsys.readouterr().err.startswith("memory_65b.py: a sequence of 512 tokens needs ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would measure")
def test_without_a_gpu_the_papers_models_are_predicted_only_and_the_tiny_one_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert paper.main(["--model", "llama-65b", "tiny", "--json", str(tmp_path / "found.json")]) == 0
    text, found = capsys.readouterr().out, json.loads((tmp_path / "found.json").read_text())
    assert text.startswith("no GPU here: the models of the paper are predicted, not measured\n")
    assert found["card"] is None and [(row["model"], row["batch"]) for row in found["rows"]] == [
        ("llama-65b", 1),
        ("llama-65b", 16),
        ("tiny", 1),
        ("tiny", 16),
    ]
    assert [row["measured"] is None for row in found["rows"]] == [True, True, False, False]
    assert f"{found['rows'][0]['predicted']['peak'] / 1e9:12.3f}           -" in text
    assert (
        "predicted peak" in text.partition("tiny")[2]
        and "predicted peak" not in text.partition("tiny")[0]
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would measure")
def test_the_readme_shows_what_is_printed_without_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert paper.main(["--model", "llama-65b", "--json", str(tmp_path / "found.json")]) == 0
    assert (
        capsys.readouterr().out in (Path(memory.__file__).parent.parent / "README.md").read_text()
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama-7b", "llama-65b"])
def test_on_a_gpu_the_ledger_is_right(name: str) -> None:
    device = torch.device("cuda")
    if (
        torch.cuda.mem_get_info()[0] < paper.CAP
        and name == "llama-65b"
        or paper.room(device) < 8 * 2**30
    ):
        pytest.skip("the card is smaller than that")
    plan = paper.Plan(SHAPES[name], 1, paper.LENGTH, int(paper.SPARE * paper.room(device)))
    result, expected = paper.measure(SHAPES[name], plan, device), paper.predicted(plan)
    assert {row: result[row] for row in LASTING} == {row: expected[row] for row in LASTING}
    assert abs(result["peak"] - expected["peak"]) <= OF_A_PEAK_ON_A_CARD * expected["peak"]
