"""The collectives in a group of one, where every line runs; helpers/several.py runs several."""

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from training import distributed, report
from training.options import parse_args

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def set_torchrun_environment(monkeypatch: pytest.MonkeyPatch, **variables: int) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


# Two processes meet; the second vanishes, and the first waits for it.
VANISH = """
import os, tempfile
import torch.distributed as dist
from training import distributed
path = tempfile.mktemp()
child = os.fork()
rank = 0 if child else 1
dist.init_process_group("gloo", store=dist.FileStore(path, 2), rank=rank, world_size=2)
distributed.all_reduce_sum(1)
if rank:
    os._exit(9)
os.wait()
try:
    distributed.all_reduce_sum(1)
except RuntimeError as error:
    print(distributed.describe_lost_process(error), flush=True)
os._exit(0)
"""


def fail() -> None:
    raise ValueError("a rule was broken")


def test_one_process_waits_for_no_other() -> None:
    assert distributed.rank() == 0
    assert distributed.world_size() == distributed.local_world_size() == 1
    assert distributed.is_main()
    assert distributed.all_reduce_sum(1, 2.5) == [1, 2.5]
    assert distributed.all_gather("it") == ["it"]
    assert distributed.all_or_none(lambda: 3) == 3
    assert distributed.describe_lost_process(RuntimeError("Connection reset by peer")) == ""
    with pytest.raises(ValueError, match="a rule was broken"):
        distributed.run_on_main(fail)
    with pytest.raises(SystemExit) as ended:
        distributed.exit_process(3)
    assert ended.value.code == 3


def test_one_of_several_processes_exits_without_pythons_teardown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the teardown about one of ten processes aborted."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    statuses = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    with pytest.raises(SystemExit):  # the real _exit does not return
        distributed.exit_process(4)
    assert statuses == [4] and not dist.is_initialized()


def test_a_group_of_one_sums_gathers_and_agrees(group: None) -> None:
    assert distributed.all_reduce_sum(1, 2.5) == [1, 2.5]
    assert distributed.all_gather({"a": 1}) == [{"a": 1}]
    assert distributed.all_or_none(lambda: 3, turn=2) == 3
    distributed.require_same_on_all({"lr": 1})
    with pytest.raises(ValueError, match="^a rule was broken$"):
        distributed.run_on_main(fail)


def test_an_error_is_raised_on_rank_0_and_ends_the_other_ranks_without_output(
    group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_gather(item: object) -> list[object]:
        return [0, 0] if item == 0 else ["", "it is broken"]

    monkeypatch.setattr(distributed, "all_gather", all_gather)
    with pytest.raises(ValueError, match=r"^it is broken \(in process 1 of 1\)$"):
        distributed.all_or_none(lambda: None)
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    with pytest.raises(SystemExit) as ended:
        distributed.all_or_none(lambda: None)
    assert ended.value.code == 1


def test_the_fact_that_differs_is_named(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def all_gather(item: object) -> list[object]:
        return [{"lr": 1}, {"lr": 2}] if isinstance(item, dict) else [item]

    monkeypatch.setattr(distributed, "all_gather", all_gather)
    with pytest.raises(ValueError, match="process 1 of 1 has another lr: 2, not 1"):
        distributed.require_same_on_all({"lr": 1})


GLOO_SOURCE = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] "
CLOSED = "Connection closed by peer [127.0.0.1]:7059"
NCCL = "NCCL error in: NCCLUtils.cpp:94, remote process exited or there was a network error"


@pytest.mark.parametrize(
    "error, cause",
    [
        (RuntimeError(f"{GLOO_SOURCE}{CLOSED}. This is typically caused by"), CLOSED),
        (dist.DistNetworkError(CLOSED), CLOSED),
        (dist.DistStoreError("wait timeout after 300000ms"), "wait timeout after 300000ms"),
        (dist.DistBackendError(f"{NCCL}\nncclRemoteError: A call failed"), NCCL),
    ],
)
def test_a_broken_connection_is_recognised_by_its_library(
    group: None, error: RuntimeError, cause: str
) -> None:
    described = distributed.describe_lost_process(error)
    assert described == f"train.py: process 0 of 1 has lost another one ({cause})"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes cannot be multiplied"),
        RuntimeError("a peer of the connection [gloo] is no nccl"),
        RuntimeError(f"wrapped: {GLOO_SOURCE}{CLOSED}"),
        dist.DistBackendError("NCCL error in: a.cpp:94\nncclInvalidUsage: two ranks, one GPU"),
        KeyboardInterrupt(),
    ],
)
def test_an_error_that_only_speaks_of_connections_is_not_a_broken_one(
    group: None, error: BaseException
) -> None:
    assert distributed.describe_lost_process(error) == ""


def test_a_process_that_vanished_is_recognised_in_the_error_that_gloo_raises_today() -> None:
    """A version of torch that words it in another way must fail here, not in a user's run."""
    done = subprocess.run([sys.executable, "-c", VANISH], cwd=ROOT, capture_output=True, text=True)
    assert "train.py: process 0 of 2 has lost another one (Connection closed" in done.stdout, done


@pytest.mark.parametrize("device, backend", [("cpu", "gloo"), ("cuda", "cpu:gloo,cuda:nccl")])
def test_processes_join_and_all_but_rank_0_are_silent(
    monkeypatch: pytest.MonkeyPatch, device: str, backend: str
) -> None:
    joined = []
    gpus = []
    out = sys.stdout

    def init_process_group(*args: object, **kwargs: object) -> None:
        joined.append((args, kwargs))

    monkeypatch.setattr(distributed, "rendezvous", lambda url: iter([(dist.HashStore(), 3, 4)]))
    monkeypatch.setattr(dist, "init_process_group", init_process_group)
    monkeypatch.setattr(torch.cuda, "set_device", gpus.append)
    distributed.init_distributed(device)
    assert joined == []
    set_torchrun_environment(monkeypatch, RANK=3, WORLD_SIZE=4, LOCAL_RANK=1)
    distributed.init_distributed(device)
    [(args, kwargs)] = joined
    assert args == (backend,) and (kwargs["rank"], kwargs["world_size"]) == (3, 4)
    assert gpus == ([1] if device == "cuda" else []) and sys.stdout is out
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    distributed.init_distributed(device)
    assert sys.stdout.name == os.devnull
    sys.stdout.close()


def test_a_run_that_torchrun_restarted_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert distributed.restart_count() == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert distributed.restart_count() == 1


def test_the_command_that_resumes_starts_as_many_processes(
    group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    command = report.command(["--resume"], distributed.local_world_size())
    assert command.endswith("torchrun --nproc-per-node 3 train.py --resume")
    assert "torchrun" not in report.command(["--resume"])


@pytest.mark.parametrize(
    "flags, ranks, complaint",
    [
        ("--shard", 1, "--shard splits a model among processes: start them with torchrun"),
        ("--adapter out --prompt x", 2, "--adapter is for one process: leave torchrun out"),
        ("--device cuda:1", 2, "--device cuda:1 is the same GPU for all processes"),
        ("--lr -1", 2, "must be above 0"),
    ],
)
def test_wrong_flags_under_torchrun_are_reported_once_by_rank_0(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    flags: str,
    ranks: int,
    complaint: str,
) -> None:
    for rank in range(ranks):
        if ranks > 1:
            set_torchrun_environment(monkeypatch, RANK=rank, WORLD_SIZE=ranks)
        with pytest.raises(SystemExit) as ended:
            parse_args(flags.split())
        error = capsys.readouterr().err
        assert ended.value.code == 2
        assert complaint in error if rank == 0 else error == ""
