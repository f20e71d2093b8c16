"""Several processes train as one would: the same losses, by DDP and by FSDP2, and none is left behind when one is lost."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

import train
from bench import traffic
from checkpoints import checkpoint
from checkpoints import io as files
from data import dataset as data
from helpers import bounds, models
from helpers.pages import text_of_pages
from kernels.dtensor import full_tensor
from lora import attach
from memory.measured import ledger
from paged_optim import PagedAdamW
from training import distributed as processes
from training import dtypes as precision
from training import report
from training import sharding as parallel

SEVERAL, MOMENTS = Path(__file__).parent.parent / "helpers/several.py", 10
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What tests/several.py saw."""
    done = subprocess.run(
        [sys.executable, str(SEVERAL), str(tmp_path_factory.mktemp("several")), str(MOMENTS)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("way", ["DDP", "FSDP2"])
def test_two_processes_leave_the_bits_of_one_that_works_on_both_their_batches(
    seen: dict, way: str
) -> None:
    """Halves and doubles are exact, and a sum of two has no order. Dropout is on: masks come with the batch."""
    run = seen["alike"][f"{way}-2x1"]
    assert run["statuses"] == [0, 0] and run["same bits"] and run["far"] == 0


@pytest.mark.parametrize("way", ["DDP", "FSDP2"])
@pytest.mark.parametrize("world, each", [(2, 3), (3, 2)])
def test_where_sums_have_another_order_only_rounding_differs(
    seen: dict, way: str, world: int, each: int
) -> None:
    run = seen["alike"][f"{way}-{world}x{each}"]
    assert run["statuses"] == [0] * world and run["far"] <= bounds.OF_A_LOSS_IN_SEVERAL_PROCESSES


@pytest.mark.parametrize("world, each", [(2, 1), (2, 3), (3, 2)])
def test_fsdp2_leaves_each_process_its_share_of_all_bytes(
    seen: dict, world: int, each: int
) -> None:
    """55 % are promised for two; what does not divide, a norm's 64 numbers by 3 or a mean, rounds up."""
    share = seen["alike"][f"FSDP2-{world}x{each}"]["share of the bytes"]
    assert 1 / world <= share <= (1 + bounds.OF_A_SHARE) / world


def test_one_of_two_killed_at_random_moments_leaves_a_run_that_any_number_finish_with_the_same_bits(
    seen: dict,
) -> None:
    moments = seen["moments"]
    assert (
        moments["kills"] == MOMENTS == moments["said so"]
        and moments["different"] == []
        and moments["stuck"] == 0
    )


@pytest.mark.parametrize(
    "mishap, complaint",
    [
        ("other_rows", "process 1 of 2 has another data (a hash of its token ids)"),
        ("no_model", "model.safetensors is damaged (in process 1 of 2)"),
        ("full_disk", "No space left on device"),
    ],
)
def test_what_is_wrong_in_one_process_is_said_once_and_ends_all(
    seen: dict, mishap: str, complaint: str
) -> None:
    statuses, said = seen["apart"][mishap]
    assert statuses[0] == 1 and None not in statuses and 0 not in statuses
    assert said.count("train.py: ") == 1 and complaint in said and "Traceback" not in said


def test_a_signal_to_one_stops_all_after_the_same_step(seen: dict) -> None:
    statuses, said = seen["apart"]["one_is_asked_to_stop"]
    assert statuses == [130, 130] and seen["apart"]["steps before it stopped"][0] == [1, 2, 3]
    assert said.count("stopped; go on with") == 1 and "torchrun --nproc-per-node 2 train.py" in said


def test_another_number_of_batches_a_step_is_refused(seen: dict) -> None:
    statuses, said = seen["apart"]["another number"]
    assert statuses[0] == 1 and "batches a step (processes times --grad-accum) was 2, is 3" in said


def have_the_same_bits(*folders: Path) -> bool:
    one, other = (files.read_tensors(folder / "adapter_model.safetensors") for folder in folders)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in report.read_metrics(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def few_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text(
        "".join(
            json.dumps({"prompt": f"{i}?", "completion": f"{i} is {'odd' if i % 2 else 'even'}"})
            + "\n"
            for i in range(20)
        )
    )
    return path


def test_torchrun_starts_a_run_anew_that_lost_a_process_and_it_goes_on_by_itself(
    few_rows: Path, tmp_path: Path
) -> None:
    tiny = models.save_tiny_llama(tmp_path / "tiny")
    begin = """
import os, signal, sys, train
real, steps = train.train_step, []
def step(*args):
    steps.append(1)
    if len(steps) == 4 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
train.train_step = step
train.processes.leave(train.main(sys.argv[1:]))
"""
    (tmp_path / "begin.py").write_text(begin)
    flags = [
        "--model",
        str(tiny),
        "--data",
        str(few_rows),
        "--max-steps",
        "6",
        "--save-every",
        "2",
        "--dtype",
        "float32",
        "--output-dir",
        str(tmp_path / "out"),
    ]
    env = os.environ | {"PYTHONPATH": str(traffic.ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*TORCHRUN, "2", "--max-restarts", "1", str(tmp_path / "begin.py"), *flags],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "out")) == 6 and done.stdout.count("base loaded") == 2
    assert done.stdout.count("perplexity") == 1, "measured before the first start alone"


def test_over_20_steps_of_the_real_model_torchrun_gives_the_losses_of_one_process(
    few_rows: Path, tmp_path: Path
) -> None:
    """Which a loss may be 1e-5 off; here all bits of the adapters are the same."""
    flags = [
        "train.py",
        "--data",
        str(few_rows),
        "--max-steps",
        "20",
        "--batch-size",
        "1",
        "--dtype",
        "float32",
    ]
    ways = {
        "one": [sys.executable, *flags, "--grad-accum", "2"],
        "DDP": [*TORCHRUN, "2", *flags],
        "FSDP2": [*TORCHRUN, "2", *flags, "--shard"],
    }
    env = {name: value for name, value in os.environ.items() if not name.startswith("COV")} | {
        "OMP_NUM_THREADS": "1"
    }
    for name, command in ways.items():
        done = subprocess.run(
            [*command, "--output-dir", str(tmp_path / name)],
            capture_output=True,
            text=True,
            env=env,
        )
        assert done.returncode == 0, done.stderr
    for name in ("DDP", "FSDP2"):
        off = [abs(a - b) for a, b in zip(losses(tmp_path / "one"), losses(tmp_path / name))]
        assert len(off) == 20 and max(off) <= bounds.OF_A_LOSS_IN_SEVERAL_PROCESSES
        assert have_the_same_bits(tmp_path / "one", tmp_path / name)
    bytes_of = {
        name: json.loads((tmp_path / name / "report.json").read_text())["model_bytes_per_process"]
        for name in ways
    }
    assert (
        bytes_of["DDP"] == bytes_of["one"]
        and bytes_of["FSDP2"] <= (1 + bounds.OF_A_SHARE) / 2 * bytes_of["one"]
    )


@pytest.mark.parametrize("way", ["DDP", "FSDP2"])
def test_what_is_sent_in_a_step_is_what_was_computed(seen: dict, way: str) -> None:
    computed, counted = seen["traffic"][way]
    assert computed <= counted <= (1 + bounds.OF_TRAFFIC) * computed


def test_the_table_of_the_readme_is_what_is_computed() -> None:
    assert traffic.of_the_papers_models() in text_of_pages()


def test_all_bytes_of_a_model_are_in_its_blocks_or_not() -> None:
    model = attach(models.tiny_llama(vocab_size=256), r=4)
    blocks, rest, gradients = parallel.sizes(model)
    assert blocks + rest == parallel.bytes_here(model) and rest == 256 * 64 * 4 + 64 * 4, (
        "tied embedding, last norm"
    )
    assert gradients == 4 * sum(
        parameter.numel() for parameter in model.parameters() if parameter.requires_grad
    )


@pytest.fixture
def group() -> Iterator[None]:
    """A group of this process alone, in which everything that several do can be done."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def adapted(**settings: bool) -> nn.Module:
    torch.manual_seed(0)
    return models.trained(attach(models.tiny_llama(vocab_size=256), r=4, **settings))


def sharded(**settings: bool) -> nn.Module:
    model = adapted(**settings)
    parallel.shard(model, "cpu")
    return model


@pytest.mark.parametrize(
    "settings",
    [{}, {"double_quant": False, "use_rslora": True}, {"use_dora": True}, {"codebook": None}],
    ids=str,
)
def test_a_sharded_model_computes_what_it_did(group: None, settings: dict) -> None:
    plain, model, ids = adapted(**settings), sharded(**settings), torch.arange(5, 25)[None]
    assert precision.table(model, torch.float32) == precision.table(plain, torch.float32)
    assert ledger(model) == ledger(plain) and parallel.bytes_here(model) == parallel.bytes_here(
        plain
    )
    for each in (plain, model):
        each(input_ids=ids, labels=ids).loss.backward()
    assert parallel.is_sharded(model) and not parallel.is_sharded(plain)
    packed = [
        parameter for name, parameter in model.named_parameters() if name.endswith("base.packed")
    ]
    assert all(
        isinstance(codes, DTensor) and codes.dtype == torch.uint8 for codes in packed
    ) and len(packed) in (0, 14)
    ours, theirs = checkpoint.adapter_tensors(model), checkpoint.adapter_tensors(plain)
    for name in ours:
        assert isinstance(ours[name], DTensor)
        assert torch.equal(full_tensor(ours[name]), theirs[name])
        assert torch.equal(full_tensor(ours[name].grad), theirs[name].grad)


@pytest.mark.parametrize("kind", [PagedAdamW, torch.optim.AdamW])
def test_the_moments_of_a_sharded_parameter_are_sharded_like_it(
    group: None, kind: type[torch.optim.Optimizer]
) -> None:
    model, ids = sharded(), torch.arange(5, 25)[None]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, again = kind(parameters), kind(parameters)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    state = optimizer.state_dict()
    for slot, parameter in zip(state["state"].values(), parameters):
        for key in ("exp_avg", "exp_avg_sq"):
            assert isinstance(slot[key], DTensor) and slot[key].shape == parameter.shape
            assert slot[key].placements == parameter.placements
    again.load_state_dict(state)
    assert all(
        torch.equal(one["exp_avg"].full_tensor(), other["exp_avg"].full_tensor())
        for one, other in zip(state["state"].values(), again.state_dict()["state"].values())
    )


@pytest.mark.parametrize("flags", [["--shard"], ["--grad-accum", "2"], ["--shard", "--resume"]])
def test_a_group_of_one_is_one_process(
    group: None, flags: list[str], tmp_path: Path, few_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By either engine; a run begun without goes on with FSDP2."""
    tiny = models.save_tiny_llama(tmp_path / "tiny")
    more = ["--model", str(tiny), "--data", str(few_rows), "--max-steps", "4", "--dtype", "float32"]
    common = [*more, *(["--grad-accum", "2"] if "--grad-accum" in flags else [])]
    real = dist.is_initialized
    with monkeypatch.context() as alone:
        alone.setattr(dist, "is_initialized", lambda: False)
        assert train.main([*common, "--output-dir", str(tmp_path / "alone")]) == 0
        if "--resume" in flags:
            assert (
                train.main([*common, "--output-dir", str(tmp_path / "group"), "--save-every", "2"])
                == 0
            )
            (tmp_path / "group" / "state-000004.safetensors").unlink()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    assert real() and train.main([*more, "--output-dir", str(tmp_path / "group"), *flags]) == 0
    assert have_the_same_bits(tmp_path / "alone", tmp_path / "group")
    assert losses(tmp_path / "alone") == losses(tmp_path / "group")


def test_another_process_than_the_first_writes_and_says_nothing(
    group: None,
    tmp_path: Path,
    few_rows: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    tiny, real = models.save_tiny_llama(tmp_path / "tiny"), train.train_step
    for module in (processes, parallel):
        monkeypatch.setattr(module, "first", lambda: False)
    monkeypatch.setattr(
        train, "train_step", lambda *args: (os.kill(os.getpid(), signal.SIGTERM), real(*args))[1]
    )
    flags = [
        "--model",
        str(tiny),
        "--data",
        str(few_rows),
        "--dtype",
        "float32",
        "--save-4bit",
        str(tmp_path / "base"),
    ]
    capsys.readouterr()
    assert train.main([*flags, "--output-dir", str(tmp_path / "out")]) == 130
    assert (
        not list((tmp_path / "out").iterdir())
        and not (tmp_path / "base").exists()
        and capsys.readouterr().err == ""
    )


def test_gradients_are_clipped_to_a_norm_that_is_rounded_once() -> None:
    parameters = [nn.Parameter(torch.zeros(n)) for n in (3, 0, 5)] + [nn.Parameter(torch.zeros(1))]
    for parameter in parameters[:-1]:  # the last has none
        parameter.grad = torch.full_like(parameter, 3.0)
    exact = torch.tensor(72.0, dtype=torch.float64).sqrt().float()
    assert parallel.clip_gradients(parameters, 100.0) == exact and parameters[0].grad[0] == 3
    assert parallel.clip_gradients(parameters, 1.0) == exact
    again = parallel.clip_gradients(parameters, 1.0)
    assert abs(again - 1) <= bounds.gamma(3)
    parameters[0].grad[0] = float("inf")
    assert parallel.clip_gradients(parameters, 1.0) == float("inf")


def test_examples_are_shared_out_and_each_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for world in (1, 2, 3, 7):
        for n in (1, 2, 5, 6):
            counted, lengths = [], set()
            for rank in range(world):
                monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
                monkeypatch.setattr(processes, "world", lambda world=world: world)
                mine, count = processes.part(list(range(n)))
                counted += mine[:count]
                lengths.add(len(mine))
            assert sorted(counted) == list(range(n)) and len(lengths) == 1


def test_the_batches_of_a_step_are_the_same_however_they_are_shared_out() -> None:
    rows = [data.Example([i, i + 1], [i, i + 1]) for i in range(9)]
    batches = data.batches_of_step(rows, 1, 2, 6, 0, 0)
    for world in (1, 2, 3, 6):
        shared = [
            batches[number] for rank in range(world) for number in range(rank, len(batches), world)
        ]
        assert sorted(batch.input_ids.tolist() for batch in shared) == sorted(
            batch.input_ids.tolist() for batch in batches
        )
