"""The benchmark of a GPU, with the host's clock: peers do the same work; pages show the results."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_unified_memory import CPU, CUDA

import nf4
from bench import __main__ as command
from bench import capped_run, cuda, figures, peers_cuda
from bench.cuda import Clock, race
from bench.peers_cuda import Layer
from helpers.bounds import Bounded
from helpers.pages import text_of_pages
from kernels.packed_weight import with_decoded_absmax

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


class Scripted(Clock):
    """A clock with the seconds of each run written down beforehand."""

    def __init__(self, seconds: list[float]) -> None:
        super().__init__(CPU)
        self.script = iter(seconds)
        self.graphs = 0

    def seconds(self, work: Callable[[], object]) -> float:
        work()
        return next(self.script)

    def graph(self, work: Callable[[], object]) -> Callable[[], object]:
        self.graphs += 1
        return work


def test_each_turn_uses_every_set_and_the_first_turn_is_not_timed() -> None:
    calls: list[str] = []
    sets = [
        {name: lambda call=f"{name}{index}": calls.append(call) for name in ("ours", "other")}
        for index in (0, 1)
    ]
    clock = Scripted([100, 100, 8, 2, 2, 4])  # ours, other; other, ours; ours, other
    result = race(sets, clock, 2)
    ours = ["ours0", "ours1"]
    other = ["other0", "other1"]
    assert calls == [*ours, *other, *ours, *other, *other, *ours, *ours, *other]
    assert clock.graphs == 0
    assert result["ours"] == {"seconds": 1.0, "range": [1.0, 1.0], "ours_to_this": 1.0}
    assert result["other"] == {
        "seconds": 3.0,
        "range": [2.0, 4.0],
        "ours_to_this": (0.25 + 0.5) / 2,
    }


def test_a_graph_is_made_of_each_peer_after_it_has_run_once() -> None:
    ran: list[int] = []
    clock = Scripted([1.0] * 4)
    race([{"ours": lambda: ran.append(clock.graphs)}], clock, 1, graphed=True)
    assert ran[0] == 0 and clock.graphs == 1


def test_the_sets_of_buffers_exceed_the_cache() -> None:
    clock = Clock(CPU)
    clock.cache = 50
    assert [clock.sets(nbytes) for nbytes in (1, 50, 150, 1000)] == [200, 4, 2, 2]


def test_the_clock_of_a_gpu_is_its_events_and_its_graphs_are_replayed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, after: "Event") -> float:
            return 250.0  # milliseconds

    class Graph:
        def __enter__(self) -> None:
            log.append("capture")

        def __exit__(self, *error: object) -> None:
            log.append("captured")

        def replay(self) -> None:
            log.append("replay")

    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: type("", (), {"L2_cache_size": 7})
    )
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    clock = Clock(CUDA)
    assert clock.cache == 7
    assert clock.seconds(clock.graph(lambda: log.append("work"))) == 0.25
    assert log == ["capture", "work", "captured", "record", "replay", "record", "wait"]


@pytest.mark.parametrize("rows", [1, 5])
def test_all_peers_multiply_by_the_same_weight(rows: int) -> None:
    torch.manual_seed(0)
    layer = Layer((64, 128), CPU)
    x = torch.randn(rows, 128).bfloat16()
    decoded = layer.base(torch.float32)
    weights = {"dense": layer.weight.float(), "ours": decoded, "bitsandbytes": decoded}
    for name, product in layer.products().items():
        matrix = Bounded.exact(weights[name]).to(torch.bfloat16)
        assert Bounded.exact(x).matmul(matrix.T, torch.bfloat16).allows(product(x)), name


def test_all_peers_quantize_and_dequantize_the_same_numbers() -> None:
    torch.manual_seed(0)
    layer = Layer((64, 128), CPU)
    packed = {name: work() for name, work in layer.quantizing().items()}
    assert torch.equal(packed["ours"].packed, packed["bitsandbytes"][0])
    dense = {name: work() for name, work in layer.dequantizing().items()}
    expected = nf4.dequantize(with_decoded_absmax(*layer.base.packed_state()), torch.bfloat16)
    assert torch.equal(dense["ours"], expected) and torch.equal(dense["bitsandbytes"], expected)
    gradients = {name: work() for name, work in layer.both_ways(3).items()}
    assert {(tensor.shape, tensor.dtype) for tensor in gradients.values()} == {
        (torch.Size((3, 128)), torch.bfloat16)
    }


def test_the_optimizers_differ_in_their_pages() -> None:
    works = peers_cuda.updating(2**19, CPU)  # moments of 4 MiB
    pages = {}
    for name, work in works.items():
        if name.startswith("ours"):
            (of_the_parameter,) = work.__self__.pages.values()
            pages[name] = len(of_the_parameter)
    assert pages == {"ours": 1, "ours, pages of 2 MiB": 2, "ours, no unified memory": 1}


def test_the_peers_model_has_the_same_layers_in_4_bits_and_trains() -> None:
    shape = capped_run.TINY
    model = peers_cuda.peft_model(shape, 4, CPU)
    linears = [each for each in model.modules() if isinstance(each, peers_cuda.Linear4bit)]
    assert len(linears) == 7 * shape.layers
    assert {(linear.out_features, linear.in_features) for linear in linears} == set(shape.maps())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adapters = sum(4 * (n_out + n_in) for n_out, n_in in shape.maps())
    assert sum(each.numel() for each in trained) == shape.layers * adapters
    before = [parameter.clone() for parameter in trained]
    optimizer = torch.optim.AdamW(trained)
    for _ in range(2):  # B is zero at first, and the gradient of A too
        peers_cuda.peft_step(model, optimizer, torch.randint(0, shape.vocabulary, (2, 8)))
    assert not any(torch.equal(old, new) for old, new in zip(before, trained, strict=True))


@NO_GPU
def test_without_a_gpu_it_says_so_in_one_line_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["--device", "cuda"])
    assert ended.value.code != 0
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith("--device cuda needs an NVIDIA GPU that torch can see")


@NO_GPU
def test_without_a_gpu_all_parts_run_on_tiny_shapes_and_end_in_the_tables_of_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- bench: cuda -->\nold\n<!-- /bench -->\nafter\n")
    quick_parts = {
        name: lambda clock, quick, part=part: part(clock, True) for name, part in cuda.PARTS.items()
    }
    monkeypatch.setattr(cuda, "PARTS", quick_parts)
    monkeypatch.setattr(cuda, "Clock", lambda device: Clock(CPU))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some Card 1")
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    command.main(["--device", "cuda"])

    found = json.loads((tmp_path / "results" / "some-card-1.json").read_text())
    assert set(found) == {"ops", "optim", "step", "sizes"}
    assert {part["machine"]["card"] for part in found.values()} == {"Some Card 1"}
    text = page.read_text()
    assert text.startswith("before\n<!-- bench: cuda -->\n|")
    assert text.endswith("<!-- /bench -->\nafter\n")
    for name, entry in found["ops"]["rows"].items():
        assert f"| {name} | {1e6 * entry['ours']['seconds']:.1f} |" in text
    for who, entry in found["step"]["rows"].items():
        speed = f"{entry['tokens_per_second']:.0f}"
        assert f"| {who} | {speed} | {entry['peak_bytes'] / 1e9:.2f} |" in text
    for who, entry in found["optim"]["rows"].items():
        assert f"| {who} | {1e3 * entry['seconds']:.2f} |" in text
    assert text.count("| tiny, ") == len(found["sizes"]["rows"]) == 2
    assert "Some Card 1." in text and "old" not in text


def test_the_pages_show_the_card_of_the_results_or_that_nothing_was_measured() -> None:
    text = text_of_pages()
    table = text.partition("<!-- bench: cuda -->\n")[2].partition("<!-- /bench -->")[0]
    cards = sorted(
        path for path in command.RESULTS.glob("*.json") if not path.stem.startswith("cpu")
    )
    assert bool(cards) == (table != "Not measured: the last run of the benchmarks had no GPU.\n")
    for path in cards[:1]:
        assert json.loads(path.read_text())["ops"]["machine"]["card"] in table
