"""The benchmark of a CPU: peers do the same work in turns, and the pages show the results."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import nf4
from bench import __main__ as command
from bench import as_avx2, cpu, figures, peers, turns
from helpers.bounds import Bounded, lora_backward
from kernels.packed_weight import with_decoded_absmax
from lora import FrozenWeight

SHAPE = (256, 128)  # torchao needs a multiple of 64 * 256


def weight() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 0.05


def test_peers_take_turns_and_the_first_call_is_not_timed() -> None:
    calls: list[str] = []
    works = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = cpu.race(works, 4)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert all(len(times) == 4 and min(times) >= 0 for times in seconds.values())


def test_a_ratio_is_the_median_of_the_ratios_of_one_turn() -> None:
    # a machine that is ten times slower in the second turn
    seconds = {"ours": [1.0, 20.0, 3.0], "other": [2.0, 10.0, 12.0]}
    result = cpu.summary(seconds)
    assert result["other"]["ours_to_this"] == 0.5 and result["ours"]["ours_to_this"] == 1
    assert result["ours"]["seconds"] == 3.0


def test_a_copy_is_counted_in_bytes_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(turns.time, "perf_counter", lambda: float(next(clock)))
    assert cpu.bandwidth(3) == 2 * 2**28  # one second per copy


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_peers_multiply_by_the_same_weight(dtype: torch.dtype, backward: bool) -> None:
    """torchao's levels differ (tests/test_peers.py), so only its shape and dtype are compared."""
    torch.manual_seed(0)
    x = torch.randn(5, SHAPE[1]).to(dtype)
    g = torch.randn(5, SHAPE[0]).to(dtype)
    decoded = FrozenWeight(weight().to(dtype))(torch.float32)
    for name, work in peers.multiplying(weight(), x, g if backward else None).items():
        result = work()
        assert result.shape == (5, SHAPE[1] if backward else SHAPE[0]), name
        assert result.dtype == dtype, name
        exact = weight().to(dtype) if name == "dense" else decoded
        matrix = Bounded.exact(exact).to(dtype)  # few rows multiply it unrounded, many rounded
        if backward:
            product = Bounded.exact(g).matmul(matrix, dtype)
        else:
            product = Bounded.exact(x).matmul(matrix.T, dtype)
        assert name == "torchao" or product.allows(result), name


def test_all_peers_quantize_and_dequantize_the_same_numbers() -> None:
    works = peers.quantizing(weight())
    assert list(works) == ["ours", "reference", "bitsandbytes", "torchao"]
    packed = {name: work() for name, work in works.items()}
    assert torch.equal(packed["ours"].packed, packed["reference"].packed)
    assert torch.equal(packed["ours"].packed, packed["bitsandbytes"][0])

    works = peers.dequantizing(weight(), torch.bfloat16)
    dense = {name: work() for name, work in works.items()}
    q = with_decoded_absmax(*FrozenWeight(weight().bfloat16()).packed_state())
    expected = nf4.dequantize(q, torch.bfloat16)
    for name in ("ours", "reference", "ours, allocating"):
        assert torch.equal(dense[name], expected), name
    assert {tuple(tensor.shape) for tensor in dense.values()} == {SHAPE}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_peers_give_the_gradients_of_the_same_layer_with_lora(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, SHAPE[1]).to(dtype)
    g = torch.randn(5, SHAPE[0]).to(dtype)
    decoded = FrozenWeight(weight().to(dtype))(torch.float32)
    works = peers.training(weight(), x, g, 4)
    assert list(works) == ["ours", "bitsandbytes", "dense"]
    for name, work in works.items():
        lora_A, lora_B = peers.trainable(work.args[0])
        matrix = weight().to(dtype) if name == "dense" else decoded.to(dtype)
        expected = lora_backward(g, x, matrix, lora_A, lora_B, 2.0, None, dtype)
        for gradient, bound in zip(work(), expected, strict=True):
            assert bound.allows(gradient), name


def test_the_memory_of_a_call_is_what_it_takes_beyond_what_it_returns() -> None:
    size = 2**26

    def holds_one_more() -> Tensor:
        extra = torch.ones(size, dtype=torch.uint8)
        return extra + 1

    page = 2**20  # the system counts in pages, and updates its counts in batches
    assert abs(peers.extra_bytes(holds_one_more) - size) <= page


def test_the_table_of_avx2_has_float32_next_to_the_peers_and_bfloat16_next_to_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(as_avx2, "check", lambda *state: None)
    monkeypatch.setattr(as_avx2, "ROWS", [2])
    monkeypatch.setattr(cpu, "host_seconds", lambda work: 0.001)
    lines = figures.as_avx2_table(as_avx2.ops(quick=True)).splitlines()
    rows = [line for line in lines if line.startswith("|") and not line.startswith("| ---")]
    both = "1.00 | 1.00"
    assert rows == [
        "| 512 × 512, AVX2 | ours | bitsandbytes | torchao | dense "
        "| bitsandbytes / ours | ours / dense |",
        "| quantize float32 | 1.00 | 1.00 | 1.00 | – | 1.0 × | – |",
        f"| forward float32, 2 rows | {both} | {both} | 1.0 × | 1.00 |",
        "| forward + backward float32, 2 rows | 1.00 | 1.00 | – | 1.00 | 1.0 × | 1.00 |",
        "| 512 × 512, AVX2, bfloat16 | ours | ours in float32 | bfloat16 / float32 |",
        f"| forward bfloat16, 2 rows | {both} | 1.00 |",
        f"| forward + backward bfloat16, 2 rows | {both} | 1.00 |",
    ]


@pytest.mark.parametrize("name", ["README.md", "docs/speed.md"])
def test_only_the_table_between_the_markers_is_replaced_on_the_page_that_has_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("nothing here\n")
    kept = "after\n<!-- bench: step -->\nkept\n<!-- /bench -->\n"
    page = tmp_path / name
    page.write_text(f"before\n<!-- bench: ops -->\nold\n<!-- /bench -->\n{kept}")
    for text in ("new \\1\n", "newer\n"):
        figures.fill("ops", text)
        assert page.read_text() == (f"before\n<!-- bench: ops -->\n{text}<!-- /bench -->\n{kept}")
    with pytest.raises(ValueError, match="must have the markers <!-- bench: optim -->"):
        figures.fill("optim", "text")


def test_an_unknown_part_is_refused_with_the_known_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        command.main(["sizes"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith("no part sizes on cpu: choose from ops, optim, step, growth, size")


def test_the_tables_and_plots_of_the_pages_are_those_of_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pages show what is committed in results/cpu.json."""
    found = json.loads((command.RESULTS / "cpu.json").read_text())
    committed = {path.relative_to(figures.ROOT): path.read_text() for path in figures.pages()}
    for path, text in committed.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    (tmp_path / "bench" / "results").mkdir(parents=True)
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    figures.write(found)
    figures.write_as_avx2(json.loads((command.RESULTS / "cpu-avx2.json").read_text()))
    assert set(found) == set(cpu.PARTS)
    assert {path: (tmp_path / path).read_text() for path in committed} == committed
    plots = sorted(path.name for path in (tmp_path / "bench" / "results").iterdir())
    assert plots == ["growth.png", "rows.png"]
