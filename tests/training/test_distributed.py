"""What several processes tell each other, by a group of one, in which every line runs; tests/several.py has more."""

import io
import os
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from training import distributed as processes
from training import report
from training.options import parse_args


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def fail() -> None:
    raise ValueError("a rule was broken")


def test_without_others_nothing_is_waited_for() -> None:
    assert (
        processes.rank(),
        processes.world(),
        processes.on_this_machine(),
        processes.first(),
    ) == (0, 1, 1, True)
    assert processes.total(1, 2.5) == [1, 2.5] and processes.gather("it") == ["it"]
    assert (
        processes.together(lambda: 3) == 3
        and processes.lost_another(RuntimeError("Connection reset by peer")) == ""
    )
    with pytest.raises(ValueError, match="a rule was broken"):
        processes.in_first(fail)
    with pytest.raises(SystemExit) as ended:
        processes.leave(3)
    assert ended.value.code == 3


def test_one_of_several_leaves_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Python's teardown, in which one of about ten aborted."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    statuses = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    with pytest.raises(SystemExit):  # where _exit would not return
        processes.leave(4)
    assert statuses == [4] and not dist.is_initialized()


def test_a_group_of_one_adds_up_gathers_and_agrees(group: None) -> None:
    assert processes.total(1, 2.5) == [1, 2.5] and processes.gather({"a": 1}) == [{"a": 1}]
    assert processes.together(lambda: 3, turn=2) == 3
    processes.refuse_differences({"lr": 1})
    with pytest.raises(ValueError, match="^a rule was broken$"):
        processes.in_first(fail)


def test_a_fault_is_raised_in_the_first_and_ends_the_others_quietly(
    group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        processes, "gather", lambda thing: [0, 0] if thing == 0 else ["", "it is broken"]
    )
    with pytest.raises(ValueError, match=r"^it is broken \(in process 1 of 1\)$"):
        processes.together(lambda: None)
    monkeypatch.setattr(processes, "first", lambda: False)
    with pytest.raises(SystemExit) as ended:
        processes.together(lambda: None)
    assert ended.value.code == 1


def test_the_fact_that_differs_is_named(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        processes,
        "gather",
        lambda thing: [{"lr": 1}, {"lr": 2}] if isinstance(thing, dict) else [thing],
    )
    with pytest.raises(ValueError, match="process 1 of 1 has another lr: 2, not 1"):
        processes.refuse_differences({"lr": 1})


@pytest.mark.parametrize(
    "said, short",
    [
        (
            "[/src/gloo/tcp/pair.cc:537] Read error [127.0.0.1]:24755: Connection reset by peer. This is typically caused by",
            "Read error [127.0.0.1]:24755: Connection reset by peer",
        ),
        ("NCCL communicator was aborted on rank 1", "NCCL communicator was aborted on rank 1"),
    ],
)
def test_a_broken_connection_is_told_from_other_errors(group: None, said: str, short: str) -> None:
    assert (
        processes.lost_another(RuntimeError(said))
        == f"train.py: process 0 of 1 has lost another one ({short})"
    )
    assert processes.lost_another(RuntimeError("shapes cannot be multiplied")) == ""


@pytest.mark.parametrize("device, backend", [("cpu", "gloo"), ("cuda", "cpu:gloo,cuda:nccl")])
def test_processes_join_and_all_but_the_first_are_silent(
    monkeypatch: pytest.MonkeyPatch, device: str, backend: str
) -> None:
    joined, cards, out = [], [], sys.stdout
    monkeypatch.setattr(processes, "rendezvous", lambda url: iter([(dist.HashStore(), 3, 4)]))
    monkeypatch.setattr(
        dist, "init_process_group", lambda *args, **kwargs: joined.append((args, kwargs))
    )
    monkeypatch.setattr(torch.cuda, "set_device", cards.append)
    processes.begin(device)
    assert joined == []
    for name, value in {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "127.0.0.1",
        "LOCAL_RANK": "1",
    }.items():
        monkeypatch.setenv(name, value)
    processes.begin(device)
    [(args, told)] = joined
    assert args == (backend,) and (told["rank"], told["world_size"]) == (3, 4)
    assert cards == ([1] if device == "cuda" else []) and sys.stdout is out
    monkeypatch.setattr(processes, "first", lambda: False)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    processes.begin(device)
    assert sys.stdout.name == os.devnull
    sys.stdout.close()


def test_a_run_that_torchrun_began_again_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes.attempt() == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert processes.attempt() == 1


def test_the_command_to_go_on_with_starts_as_many_processes(
    group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert report.command(["--resume"], processes.on_this_machine()).endswith(
        "torchrun --nproc-per-node 3 train.py --resume"
    )
    assert "torchrun" not in report.command(["--resume"])


@pytest.mark.parametrize(
    "flags, launched, complaint",
    [
        (
            ["--shard"],
            False,
            "--shard shares a model out among processes: start them with torchrun",
        ),
        (
            ["--adapter", "out", "--prompt", "x"],
            True,
            "--adapter is for one process: leave torchrun out",
        ),
        (["--device", "cuda:1"], True, "--device cuda:1 would be the same GPU for all processes"),
        (["--lr", "-1"], True, "must be above 0"),
    ],
)
def test_flags_that_do_not_go_with_several_processes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    flags: list[str],
    launched: bool,
    complaint: str,
) -> None:
    for rank in ("0", "1") if launched else ("0",):
        if launched:
            for name, value in {
                "RANK": rank,
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
            }.items():
                monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            parse_args(flags)
        said = capsys.readouterr().err
        assert ended.value.code == 2 and (complaint in said if rank == "0" else said == ""), (
            "once, by the first"
        )
