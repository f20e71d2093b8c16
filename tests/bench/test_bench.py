"""The benchmark: contenders take turns, do the same work, and what was measured is what the README shows."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import nf4
from bench import cpu as bench
from bench import figures
from bench import peers as contenders
from helpers.bounds import Bounded
from kernels.packed_weight import decoded
from lora import FrozenWeight

SHAPE = (256, 128)  # as torchao wants it, a multiple of 64 * 256


def weight() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 0.05


def test_contenders_take_turns_and_the_first_call_does_not_count() -> None:
    calls: list[str] = []
    works = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = bench.race(works, 4)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert all(len(times) == 4 and min(times) >= 0 for times in seconds.values())


def test_a_ratio_is_the_median_of_the_ratios_of_one_turn() -> None:
    seconds = {
        "ours": [1.0, 20.0, 3.0],
        "other": [2.0, 10.0, 12.0],
    }  # a machine ten times slower in the second turn
    result = bench.summary(seconds)
    assert result["other"]["ours_to_this"] == 0.5 and result["ours"]["ours_to_this"] == 1
    assert result["ours"]["seconds"] == 3.0


def test_a_copy_is_counted_in_bytes_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(bench.time, "perf_counter", lambda: float(next(clock)))
    assert bench.bandwidth(3) == 2 * 2**28  # one second a copy


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_contenders_multiply_by_the_same_weight(dtype: torch.dtype, backward: bool) -> None:
    """torchao's levels are other ones (tests/test_peers.py), so of it only the kind of the result is compared."""
    torch.manual_seed(0)
    x, g = torch.randn(5, SHAPE[1]).to(dtype), torch.randn(5, SHAPE[0]).to(dtype)
    base = FrozenWeight(weight().to(dtype))
    for name, work in contenders.multiplying(weight(), x, g if backward else None).items():
        result, exact = work(), weight().to(dtype) if name == "dense" else base(torch.float32)
        assert result.shape == (5, SHAPE[1] if backward else SHAPE[0]) and result.dtype == dtype, (
            name
        )
        matrix = Bounded.exact(exact).to(dtype)  # few rows are multiplied unrounded, many rounded
        product = (
            Bounded.exact(g).matmul(matrix, dtype)
            if backward
            else Bounded.exact(x).matmul(matrix.T, dtype)
        )
        assert name == "torchao" or product.allows(result), name


def test_all_contenders_quantize_and_dequantize_the_same_numbers() -> None:
    ours = contenders.quantizing(weight())
    assert list(ours) == ["ours", "reference", "bitsandbytes", "torchao"]
    packed = {name: work() for name, work in ours.items()}
    assert torch.equal(packed["ours"].packed, packed["reference"].packed)
    assert torch.equal(packed["ours"].packed, packed["bitsandbytes"][0])
    dense = {
        name: work() for name, work in contenders.dequantizing(weight(), torch.bfloat16).items()
    }
    assert torch.equal(dense["ours"], dense["reference"]) and torch.equal(
        dense["ours"], dense["ours, allocating"]
    )
    assert torch.equal(
        dense["ours"],
        nf4.dequantize(decoded(*FrozenWeight(weight().bfloat16()).packed_state()), torch.bfloat16),
    )
    assert {tuple(tensor.shape) for tensor in dense.values()} == {SHAPE}


def test_the_memory_of_a_call_is_what_it_takes_beyond_what_it_returns() -> None:
    size = 2**26

    def holds_one_more() -> Tensor:
        extra = torch.ones(size, dtype=torch.uint8)
        return extra + 1

    page = 2**20  # the system counts in pages, and batches its counts
    assert abs(contenders.extra_bytes(holds_one_more) - size) <= page


def test_the_table_between_the_markers_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(
        "before\n<!-- bench: ops -->\nold\n<!-- /bench -->\nafter\n<!-- bench: step -->\nkept\n<!-- /bench -->\n"
    )
    for text in ("new \\1\n", "newer\n"):
        figures.fill(page, "ops", text)
        assert page.read_text() == (
            f"before\n<!-- bench: ops -->\n{text}<!-- /bench -->\nafter\n"
            "<!-- bench: step -->\nkept\n<!-- /bench -->\n"
        )
    with pytest.raises(ValueError, match="must have the markers"):
        figures.fill(page, "optim", "text")


def test_the_tables_and_plots_of_the_readme_are_those_of_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is committed in results/cpu.json is what README.md says."""
    found = json.loads((bench.RESULTS / "cpu.json").read_text())
    readme = (bench.ROOT / "README.md").read_text()
    (tmp_path / "README.md").write_text(readme)
    (tmp_path / "bench/results").mkdir(parents=True)
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    figures.write(found)
    assert set(found) == set(bench.PARTS)
    assert (tmp_path / "README.md").read_text() == readme
    assert sorted(path.name for path in (tmp_path / "bench/results").iterdir()) == [
        "growth.png",
        "rows.png",
    ]
