"""Training steps under a memory cap: a tiny Llama on a CPU; with a GPU the models of the paper."""

from types import SimpleNamespace

import pytest
import torch
from test_unified_memory import CPU, CUDA, recording

from bench import capped_run, random_llama
from bench.capped_run import BATCHES, CAP, LENGTH, PAGE, RANK, SPARE, TINY, Plan, room
from helpers.bounds import OF_A_PEAK, OF_A_PEAK_ON_A_CARD
from memory import measured
from memory.formula import OUTSIDE_TORCH, QLORA, SHAPES, Shape, predict

TINY_LENGTH = 64
PLENTY = int(SPARE * room(CPU))


def paged_peak(shape: Shape, size: int, batch: int, length: int) -> int:
    prediction = predict(shape, QLORA, size, length, RANK, accumulating=size < batch)
    return prediction.peak(paged=True)


def room_for(size: int, batch: int) -> int:
    """The bytes that a batch in passes of `size` needs."""
    return paged_peak(TINY, size, batch, TINY_LENGTH) + PAGE


@pytest.mark.parametrize(("batch", "size"), [(1, 1), (16, 16), (16, 4)])
def test_a_step_takes_what_was_predicted(batch: int, size: int) -> None:
    plan = Plan(TINY, batch, TINY_LENGTH, room_for(size, batch))
    assert plan.size == size
    result = capped_run.measure(TINY, plan, CPU)
    expected = plan.predicted()
    peak = expected.pop("peak")
    assert {name: result[name] for name in expected} == expected
    assert abs(result["peak"] - peak) <= OF_A_PEAK * peak
    assert result["pager"]["evictions"] == 0 and result["seconds"] > 0


def test_no_dense_layer_is_ever_made() -> None:
    with measured.Live() as live:
        model = random_llama.build(TINY, RANK, CPU)
    kept = measured.Live(*model.parameters(), *model.buffers()).now()
    largest = max(layer.base.nbytes for layer in model.modules() if hasattr(layer, "lora_A"))
    dense = max(n_out * n_in for n_out, n_in in TINY.maps())
    assert live.peak - kept <= 2 * largest < 2 * dense


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", SHAPES)
def test_every_size_of_the_paper_fits_its_48_gb(name: str, batch: int) -> None:
    plan = Plan(SHAPES[name], batch, LENGTH, PLENTY)
    assert plan.peak <= PLENTY < CAP
    is_largest = name == "llama-65b" and batch == 16  # it alone needs passes, and pages that leave
    assert (plan.size < batch) == is_largest
    assert (plan.resident < plan.prediction.components["AdamW moments"]) == is_largest
    if plan.size < batch:
        assert paged_peak(SHAPES[name], 2 * plan.size, batch, LENGTH) + PAGE > PLENTY


def test_a_batch_that_fits_in_no_way_is_refused() -> None:
    too_small = min(room_for(1, 2), room_for(2, 2)) - 1
    with pytest.raises(ValueError, match="a sequence of 64 tokens needs .* bytes, and there are"):
        Plan(TINY, 2, TINY_LENGTH, too_small)


def test_a_gradient_that_is_not_finite_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def infinite_loss(model: torch.nn.Module, *_: object) -> torch.Tensor:
        return sum(parameter.sum() for parameter in model.parameters()) * torch.inf

    monkeypatch.setattr(capped_run, "label_loss", infinite_loss)
    plan = Plan(TINY, 1, TINY_LENGTH, PLENTY)
    with pytest.raises(RuntimeError, match="the gradient is not finite"):
        capped_run.measure(TINY, plan, CPU)


def test_on_a_gpu_torch_and_the_pages_share_the_room_and_the_peak_is_that_of_both() -> None:
    """With a driver that records its calls, and an allocator whose answers are given."""
    log: list[object] = []
    total = 80 * 2**30
    plan = Plan(TINY, 2, TINY_LENGTH, PLENTY)
    with recording() as driver, pytest.MonkeyPatch.context() as patch:
        for module in (capped_run, measured):
            patch.setattr(module, "on_gpu", lambda device: True)
        for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
            patch.setattr(torch.cuda, name, lambda *device, name=name: log.append(name))
        patch.setattr(torch.cuda, "max_memory_allocated", lambda: 1000)
        card = SimpleNamespace(total_memory=total)
        patch.setattr(torch.cuda, "get_device_properties", lambda device: card)
        patch.setattr(torch.cuda, "set_per_process_memory_fraction", log.append)
        result = capped_run.measure(TINY, plan, CPU)
    assert driver.moves and not driver.blocks
    moments = plan.prediction.components["AdamW moments"]
    assert result["peak"] == 1000 + moments and result["AdamW moments"] == moments
    share = (CAP - OUTSIDE_TORCH - plan.resident) / total
    peak_measured = ["synchronize", "reset_peak_memory_stats", "synchronize"]
    timed = ["synchronize"]
    freed = ["synchronize"]
    assert log == ["empty_cache", share, *peak_measured, *timed, 1.0, *freed]


def test_the_state_of_another_optimizer_is_in_torchs_memory() -> None:
    parameters = random_llama.build(TINY, RANK, CPU).parameters()
    assert not measured.uses_unified_memory(torch.optim.AdamW(parameters))


def test_a_smaller_card_has_less_room(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert room(CUDA) == 24 * 2**30 - OUTSIDE_TORCH
    assert room(CPU) == CAP - OUTSIDE_TORCH


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama-7b", "llama-65b"])
def test_on_a_gpu_a_step_takes_what_was_predicted(name: str) -> None:
    needed = CAP if name == "llama-65b" else 0
    if torch.cuda.mem_get_info()[0] < needed or room(CUDA) < 8 * 2**30:
        pytest.skip("the card is too small")
    plan = Plan(SHAPES[name], 1, LENGTH, int(SPARE * room(CUDA)))
    result = capped_run.measure(SHAPES[name], plan, CUDA)
    expected = plan.predicted()
    peak = expected.pop("peak")
    assert {row: result[row] for row in expected} == expected
    assert abs(result["peak"] - peak) <= OF_A_PEAK_ON_A_CARD * peak
