"""DDP and FSDP2 give the losses of one process, and all ranks end when one of them is lost."""

import copy
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
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import train
from bench import traffic
from checkpoints import io, peft_adapter
from data import dataset
from helpers import bounds, models
from helpers.pages import text_of_pages
from kernels.dtensor import full_tensor
from lora import attach
from memory.measured import ledger
from paged_optim import PagedAdamW
from training import distributed, report, sharding
from training.dtypes import dtype_table
from variants.dora import DoRALinear

SEVERAL = Path(__file__).parent.parent / "helpers/several.py"
MOMENTS = 10
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The results of helpers/several.py."""
    folder = tmp_path_factory.mktemp("several")
    command = [sys.executable, str(SEVERAL), str(folder), str(MOMENTS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("way", ["DDP", "FSDP2"])
def test_two_processes_give_the_bits_of_one_that_works_on_both_their_batches(
    seen: dict, way: str
) -> None:
    """Halving is exact; a sum of two has one order. Dropout is on: the batch seeds its masks."""
    run = seen["alike"][f"{way}-2x1"]
    assert run["statuses"] == [0, 0] and run["same bits"] and run["far"] == 0


@pytest.mark.parametrize("way", ["DDP", "FSDP2"])
@pytest.mark.parametrize("world_size, each", [(2, 3), (3, 2)])
def test_where_sums_have_another_order_only_rounding_differs(
    seen: dict, way: str, world_size: int, each: int
) -> None:
    run = seen["alike"][f"{way}-{world_size}x{each}"]
    assert run["statuses"] == [0] * world_size
    assert run["far"] <= bounds.OF_A_LOSS_IN_SEVERAL_PROCESSES


@pytest.mark.parametrize("world_size, each", [(2, 1), (2, 3), (3, 2)])
def test_fsdp2_leaves_each_rank_its_share_of_all_bytes(
    seen: dict, world_size: int, each: int
) -> None:
    """The README says 55 % for two. A size that is not divisible, such as 64 / 3, rounds up."""
    share = seen["alike"][f"FSDP2-{world_size}x{each}"]["share of the bytes"]
    assert 1 / world_size <= share <= (1 + bounds.OF_A_SHARE) / world_size


def test_a_run_that_lost_one_of_two_processes_resumes_on_any_number_with_the_same_bits(
    seen: dict,
) -> None:
    moments = seen["moments"]
    assert moments["kills"] == moments["said so"] == MOMENTS
    assert moments["different"] == [] and moments["stuck"] == 0


@pytest.mark.parametrize(
    "mishap, complaint",
    [
        ("other_rows", "process 1 of 2 has another data (a hash of its token ids)"),
        ("no_model", "model.safetensors is damaged (in process 1 of 2)"),
        ("full_disk", "No space left on device"),
        ("in_use", "in_use: wait for its end or choose another --output-dir"),
    ],
)
def test_an_error_on_one_rank_is_printed_once_and_ends_all_ranks(
    seen: dict, mishap: str, complaint: str
) -> None:
    statuses, said = seen["apart"][mishap]
    assert statuses[0] == 1 and None not in statuses and 0 not in statuses
    assert said.count("train.py: ") == 1 and complaint in said and "Traceback" not in said


def test_a_signal_to_one_stops_all_after_the_same_step(seen: dict) -> None:
    statuses, said = seen["apart"]["one_is_asked_to_stop"]
    assert statuses == [130, 130] and seen["apart"]["steps before it stopped"][0] == [1, 2, 3]
    assert (
        said.count("stopped; resume with") == 1 and "torchrun --nproc-per-node 2 train.py" in said
    )


def test_another_number_of_batches_a_step_is_refused(seen: dict) -> None:
    statuses, said = seen["apart"]["another number"]
    assert statuses[0] == 1 and "batches a step (processes times --grad-accum) was 2, is 3" in said


def have_the_same_bits(one: Path, other: Path) -> bool:
    ours = io.read_tensors(one / "adapter_model.safetensors")
    theirs = io.read_tensors(other / "adapter_model.safetensors")
    same_names = ours.keys() == theirs.keys()
    return same_names and all(torch.equal(ours[name], theirs[name]) for name in ours)


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in report.read_metrics(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def few_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with open(path, "w") as file:
        for i in range(20):
            answer = f"{i} is {'odd' if i % 2 else 'even'}"
            file.write(json.dumps({"prompt": f"{i}?", "completion": answer}) + "\n")
    return path


BEGIN = """
import os, signal, sys, train
from training.distributed import exit_process
real, steps = train.train_step, []
def step(*args):
    steps.append(1)
    first_start = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if len(steps) == 4 and os.environ["RANK"] == "1" and first_start:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
train.train_step = step
exit_process(train.main(sys.argv[1:]))
"""


def test_a_run_that_torchrun_restarts_after_a_lost_process_resumes_by_itself(
    few_rows: Path, tmp_path: Path
) -> None:
    tiny = models.save_tiny_llama(tmp_path / "tiny")
    script = tmp_path / "begin.py"
    script.write_text(BEGIN)
    paths = ["--model", tiny, "--data", few_rows, "--output-dir", tmp_path / "out"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "loss.png").write_text("of an earlier run")
    flags = "--max-steps 6 --save-every 2 --dtype float32 --overwrite".split()
    command = [*TORCHRUN, "2", "--max-restarts", "1", script, *paths, *flags]
    env = os.environ | {
        "PYTHONPATH": str(traffic.ROOT),
        "OMP_NUM_THREADS": "1",
        "QLORA_KERNELS": "reference",  # else four processes would compile kernels
    }
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "out")) == 6 and done.stdout.count("base loaded") == 2
    assert done.stdout.count("perplexity") == 1, "measured only before the first start"


def test_over_3_steps_of_the_real_model_torchrun_gives_the_losses_of_one_process(
    few_rows: Path, tmp_path: Path
) -> None:
    """A loss may differ by 1e-5; here all bits of the adapters are the same.

    Three steps show as much as more: the first changes only the adapters' B, which starts at zero;
    the second also A; the third works with both. With the same bits after it, the next is the same.
    """
    shape = "--max-steps 3 --batch-size 1 --dtype float32".split()
    flags = ["train.py", "--data", str(few_rows), *shape]
    ways = {
        "one": [sys.executable, *flags, "--grad-accum", "2"],
        "DDP": [*TORCHRUN, "2", *flags],
        "FSDP2": [*TORCHRUN, "2", *flags, "--shard"],
    }
    env = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    env["OMP_NUM_THREADS"] = "1"
    model_bytes = {}
    for name, command in ways.items():
        folder = tmp_path / name
        command = [*command, "--output-dir", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        saved = json.loads((folder / "report.json").read_text())
        model_bytes[name] = saved["model_bytes_per_process"]
    for name in ("DDP", "FSDP2"):
        off = [abs(a - b) for a, b in zip(losses(tmp_path / "one"), losses(tmp_path / name))]
        assert len(off) == 3 and max(off) <= bounds.OF_A_LOSS_IN_SEVERAL_PROCESSES
        assert have_the_same_bits(tmp_path / "one", tmp_path / name)
    assert model_bytes["DDP"] == model_bytes["one"]
    assert model_bytes["FSDP2"] <= (1 + bounds.OF_A_SHARE) / 2 * model_bytes["one"]


@pytest.mark.parametrize("way", ["DDP", "FSDP2"])
def test_the_bytes_sent_in_a_step_are_those_computed(seen: dict, way: str) -> None:
    computed, counted = seen["traffic"][way]
    assert computed <= counted <= (1 + bounds.OF_TRAFFIC) * computed


def test_the_table_of_the_readme_is_the_computed_one() -> None:
    assert traffic.of_the_papers_models() in text_of_pages()


def test_the_blocks_and_the_rest_are_all_bytes_of_a_model() -> None:
    model = attach(models.tiny_llama(vocab_size=256), r=4)
    blocks, rest, gradients = sharding.sizes_in_bytes(model)
    tied_embedding = 256 * 64 * 4
    last_norm = 64 * 4
    assert rest == tied_embedding + last_norm
    assert blocks + rest == sharding.bytes_on_this_rank(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert gradients == 4 * sum(parameter.numel() for parameter in trained)


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def adapted(**settings: bool) -> nn.Module:
    torch.manual_seed(0)
    return models.trained(attach(models.tiny_llama(vocab_size=256), r=4, **settings))


def sharded(**settings: bool) -> nn.Module:
    model = adapted(**settings)
    sharding.shard_model(model, "cpu")
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"double_quant": False, "use_rslora": True},
        {"layer_type": DoRALinear},
        {"codebook": None},
    ],
    ids=str,
)
def test_a_sharded_model_computes_the_same_bits(group: None, settings: dict) -> None:
    plain = adapted(**settings)
    model = sharded(**settings)
    assert dtype_table(model, torch.float32) == dtype_table(plain, torch.float32)
    assert ledger(model) == ledger(plain)
    assert sharding.bytes_on_this_rank(model) == sharding.bytes_on_this_rank(plain)
    ids = torch.arange(5, 25)[None]  # (1, T)
    for each in (plain, model):
        each(input_ids=ids, labels=ids).loss.backward()
    assert sharding.is_sharded(model) and not sharding.is_sharded(plain)
    parameters = dict(model.named_parameters())
    packed = [tensor for name, tensor in parameters.items() if name.endswith("base.packed")]
    assert len(packed) == (0 if "codebook" in settings else 14)
    assert all(isinstance(codes, DTensor) and codes.dtype == torch.uint8 for codes in packed)
    ours = peft_adapter.adapter_tensors(model)
    theirs = peft_adapter.adapter_tensors(plain)
    for name in ours:
        assert isinstance(ours[name], DTensor)
        assert torch.equal(full_tensor(ours[name]), theirs[name])
        assert torch.equal(full_tensor(ours[name].grad), theirs[name].grad)


class Experts(nn.Module):
    """A block that sends its input to one of the members of a list."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))

    def forward(self, x: Tensor, expert: int = 1) -> Tensor:
        return x + self.experts[expert](x)


class Nested(nn.Module):
    """Blocks with a list inside, a list of lists, and a block that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        shared = Experts()
        self.layers = nn.ModuleList([shared, Experts(), shared])
        self.more = nn.ModuleList([nn.ModuleList([Experts(), Experts()])])
        self.named = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(64, 64)})])

    def forward(self, x: Tensor) -> Tensor:
        for block in [*self.layers, *self.more[0], self.named[0]["up"]]:
            x = block(x)
        return 2 * x  # FSDP2 warns of a view


def test_a_model_with_lists_inside_its_blocks_is_sharded_block_by_block(group: None) -> None:
    torch.manual_seed(0)
    plain = models.trained(attach(Nested(), r=4))
    model = copy.deepcopy(plain)
    blocks = [*model.layers[:2], *model.more[0]]
    assert sharding.blocks_of(model) == blocks
    sharding.shard_model(model, "cpu")
    assert all(isinstance(block, FSDPModule) for block in blocks)
    x = torch.randn(3, 64)
    for each in (plain, model):
        each(x).square().sum().backward()
    theirs = dict(plain.named_parameters())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        expected = theirs[name].grad  # None for an expert that did not run
        got = parameter.grad
        assert (got is None) == (expected is None), name
        assert got is None or torch.equal(full_tensor(got), expected), name


@pytest.mark.parametrize("kind", [PagedAdamW, torch.optim.AdamW])
def test_the_moments_of_a_sharded_parameter_are_sharded_like_it(
    group: None, kind: type[torch.optim.Optimizer]
) -> None:
    model = sharded()
    ids = torch.arange(5, 25)[None]  # (1, T)
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
    loaded = again.state_dict()["state"]
    for index, slot in state["state"].items():
        assert torch.equal(slot["exp_avg"].full_tensor(), loaded[index]["exp_avg"].full_tensor())


@pytest.mark.parametrize("flags", [["--shard"], ["--grad-accum", "2"], ["--shard", "--resume"]])
def test_a_group_of_one_trains_as_one_process(
    group: None, flags: list[str], tmp_path: Path, few_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With DDP and with FSDP2, which also resumes a run that began without a group."""
    tiny = models.save_tiny_llama(tmp_path / "tiny")
    more = ["--model", str(tiny), "--data", str(few_rows), "--max-steps", "4", "--dtype", "float32"]
    common = [*more, *flags] if "--grad-accum" in flags else more
    alone, grouped = tmp_path / "alone", tmp_path / "group"
    real = dist.is_initialized
    with monkeypatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: False)
        assert train.main([*common, "--output-dir", str(alone)]) == 0
        if "--resume" in flags:
            run = [*common, "--output-dir", str(grouped), "--save-every", "2"]
            assert train.main(run) == 0
            (grouped / "state-000004.safetensors").unlink()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    assert real() and train.main([*more, "--output-dir", str(grouped), *flags]) == 0
    assert have_the_same_bits(alone, grouped)
    assert losses(alone) == losses(grouped)


def test_a_rank_above_0_writes_and_prints_nothing(
    group: None,
    tmp_path: Path,
    few_rows: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    tiny = models.save_tiny_llama(tmp_path / "tiny")
    real = train.train_step

    def step(*args: object) -> tuple[float, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    for module in (distributed, sharding):
        monkeypatch.setattr(module, "is_main", lambda: False)
    monkeypatch.setattr(train, "train_step", step)
    base, out = tmp_path / "base", tmp_path / "out"
    flags = ["--model", str(tiny), "--data", str(few_rows), "--dtype", "float32"]
    capsys.readouterr()
    assert train.main([*flags, "--save-4bit", str(base), "--output-dir", str(out)]) == 130
    assert not out.exists() and not base.exists()
    assert capsys.readouterr().err == ""


def test_gradients_are_clipped_to_a_norm_that_is_rounded_once() -> None:
    parameters = [nn.Parameter(torch.zeros(n)) for n in (3, 0, 5)] + [nn.Parameter(torch.zeros(1))]
    for parameter in parameters[:-1]:  # the last has none
        parameter.grad = torch.full_like(parameter, 3.0)
    exact = torch.tensor(72.0, dtype=torch.float64).sqrt().float()
    assert sharding.clip_grad_norm(parameters, 100.0) == exact and parameters[0].grad[0] == 3
    assert sharding.clip_grad_norm(parameters, 1.0) == exact
    again = sharding.clip_grad_norm(parameters, 1.0)
    assert abs(again - 1) <= bounds.gamma(3)
    parameters[0].grad[0] = float("inf")
    assert sharding.clip_grad_norm(parameters, 1.0) == float("inf")


def test_items_are_split_among_ranks_and_each_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for world_size in (1, 2, 3, 7):
        monkeypatch.setattr(distributed, "world_size", lambda size=world_size: size)
        for n in (1, 2, 5, 6):
            counted = []
            lengths = set()
            for rank in range(world_size):
                monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
                mine, count = distributed.split_among_ranks(list(range(n)))
                counted += mine[:count]
                lengths.add(len(mine))
            assert sorted(counted) == list(range(n)) and len(lengths) == 1


def test_the_batches_of_a_step_are_the_same_for_any_number_of_ranks() -> None:
    rows = [dataset.Example([i, i + 1], [i, i + 1]) for i in range(9)]
    batches = dataset.batches_of_step(rows, 1, 2, 6, 0, 0)
    everything = sorted(batch.input_ids.tolist() for batch in batches)
    for world_size in (1, 2, 3, 6):
        of_ranks = [batches[rank::world_size] for rank in range(world_size)]
        ids = [batch.input_ids.tolist() for share in of_ranks for batch in share]
        assert sorted(ids) == everything
