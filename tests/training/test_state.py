"""The state of a run: going on from it gives the same bits, and what is damaged or does not fit is refused by name."""

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from checkpoints import checkpoint
from checkpoints import io as files
from data import chat_template as template
from helpers import models
from paged_optim import PagedAdamW
from training import report
from training import state as resume

IDS = torch.arange(5, 25)[None]


def take_steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, count: int, start: int = 0
) -> None:
    model.train()
    for step in range(start, start + count):
        resume.reseed(0, step)
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def optimizer_of(model: nn.Module, **settings: int) -> PagedAdamW:
    return PagedAdamW([p for p in model.parameters() if p.requires_grad], **settings)


def save(model: nn.Module, optimizer: PagedAdamW, step: int, folder: Path, limit: int) -> None:
    resume.save(resume.tensors_of(model, optimizer), {"lr": "1"}, step, [0.5, None], folder, limit)


def run_with_states(folder: Path, steps: int, limit: int = 2) -> tuple[nn.Module, PagedAdamW]:
    """A run that saves after each step."""
    model = models.adapted()
    optimizer = optimizer_of(model)
    for step in range(steps + 1):
        if step:
            take_steps(model, optimizer, 1)
        save(model, optimizer, step, folder, limit)
    return model, optimizer


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_resumed_run_ends_with_the_bits_of_one_that_never_stopped(tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = models.adapted(lora_dropout=0.3)
    first = optimizer_of(whole)
    take_steps(whole, first, 3)
    save(whole, first, 3, tmp_path, 1)
    take_steps(whole, first, 3, start=3)

    torch.manual_seed(2)
    resumed = models.adapted(lora_dropout=0.3)
    second = optimizer_of(resumed, page_bytes=256, resident_bytes=1024)  # other pages, same bits
    state = resume.newest(tmp_path)
    assert (state.step, state.settings, state.before) == (3, {"lr": "1"}, [0.5, None])
    resume.load_state(resumed, second, state)
    take_steps(resumed, second, 3, start=3)
    for (name, ours), theirs in zip(
        checkpoint.adapter_tensors(resumed).items(), checkpoint.adapter_tensors(whole).values()
    ):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_the_last_states_are_kept_and_their_number_is_not_an_order_of_letters(
    tmp_path: Path, limit: int
) -> None:
    run_with_states(tmp_path, 3, limit)
    kept = [f"state-00000{step}.safetensors" for step in (3, 2, 1, 0)[:limit]]
    assert [path.name for path in resume.states(tmp_path)] == kept
    for path in resume.states(tmp_path):
        path.unlink()
    for step in (999_999, 1_000_000, 5):
        (tmp_path / f"state-{step:06d}.safetensors").write_text("")
    (tmp_path / "state-7.txt").write_text("somebody's")
    assert [path.name for path in resume.states(tmp_path)][0] == "state-1000000.safetensors"
    resume.tidy(tmp_path, None, limit)
    assert names(tmp_path) == ["state-7.txt"]


def test_what_killed_processes_left_goes_and_no_state_that_is_ahead_of_a_save(
    tmp_path: Path,
) -> None:
    unfinished = tmp_path / ".state-000001.safetensors.4711.unfinished"
    unfinished.mkdir()
    (unfinished / ".tmp1a2b").write_text("half of")
    files.remove_unfinished(tmp_path)
    assert names(tmp_path) == []
    (tmp_path / "state-000009.safetensors").write_text("damaged, and passed over on --resume")
    run_with_states(tmp_path, 2)
    assert names(tmp_path) == [f"state-00000{step}.safetensors" for step in (1, 2, 9)]


def test_a_damaged_state_is_passed_over_for_the_one_before_with_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run_with_states(tmp_path, 3, limit=3)
    last, middle, first = resume.states(tmp_path)
    last.write_bytes(last.read_bytes()[:-8])
    save_file({"adapter": torch.zeros(1)}, middle)
    assert resume.newest(tmp_path).path == first
    words = capsys.readouterr().err.splitlines()
    assert len(words) == 2 and all(
        ": passed over for the state before it" in word for word in words
    )
    assert (
        "state-000003.safetensors is damaged" in words[0]
        and "state-000002.safetensors is not the state" in words[1]
    )
    first.write_bytes(b"")
    with pytest.raises(
        ValueError, match="there is no state in .* to resume from: start without --resume"
    ):
        resume.newest(tmp_path)


@pytest.fixture(scope="module")
def one_state(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("state")
    run_with_states(folder, 1, limit=1)
    [path] = resume.states(folder)
    return path, path.read_bytes()


@given(
    share=st.floats(0, 1, exclude_max=True),
    header=st.booleans(),
    bit=st.integers(0, 7),
    cut=st.booleans(),
)
def test_no_bit_of_a_state_can_change_and_no_byte_can_go_unnoticed(
    one_state: tuple[Path, bytes], share: float, header: bool, bit: int, cut: bool
) -> None:
    path, whole = one_state
    place = int(share * (8 + int.from_bytes(whole[:8], "little") if header else len(whole)))
    changed = bytearray(whole)
    changed[place] ^= 1 << bit
    path.write_bytes(whole[:place] if cut else changed)
    with pytest.raises(
        ValueError, match="state-000001.safetensors is (damaged|not the state of a run)"
    ):
        resume.read_state(path)


def test_other_settings_are_named_and_refused_unless_told(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model, optimizer = run_with_states(tmp_path, 1)
    state = resume.newest(tmp_path)
    resume.refuse_changes(state, {"lr": "1"}, anyway=False)
    with pytest.raises(
        ValueError,
        match="cannot go on from .*: lr was 1, is 2; seed was None, is 0. Give what was, or --res",
    ):
        resume.refuse_changes(state, {"lr": "2", "seed": "0"}, anyway=False)
    assert capsys.readouterr().err == ""
    resume.refuse_changes(state, {"lr": "2"}, anyway=True)
    assert capsys.readouterr().err == f"going on from {state.path} although lr was 1, is 2\n"


def test_a_run_that_was_stopped_before_its_first_step_begins_again(tmp_path: Path) -> None:
    model, optimizer = run_with_states(tmp_path, 0)
    state = resume.newest(tmp_path)
    resume.load_state(model, optimizer, state)
    assert state.step == 0 and optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize(
    "name, value", [("optimizer.0.exp_avg_sq", -1.0), ("optimizer.3.step", 2.0)]
)
def test_a_state_that_no_run_can_have_is_refused(tmp_path: Path, name: str, value: float) -> None:
    model, optimizer = run_with_states(tmp_path, 1)
    state = resume.newest(tmp_path)
    state.tensors[name].fill_(value)
    with pytest.raises(ValueError, match=f"{name} is not of step 1, or negative"):
        resume.load_state(model, optimizer, state)


def test_a_state_of_other_ranks_is_refused_even_if_settings_may_differ(tmp_path: Path) -> None:
    run_with_states(tmp_path, 1)
    model = models.adapted(r=2)
    with pytest.raises(ValueError, match="does not fit the model"):
        resume.load_state(model, optimizer_of(model), resume.newest(tmp_path))


def test_random_numbers_follow_from_the_seed_and_the_number_of_the_batch_alone() -> None:
    def drawn(seed: int, batch: int) -> tuple[float, ...]:
        resume.reseed(seed, batch)
        return tuple(torch.rand(4).tolist())

    pairs = [(seed, batch) for seed in range(12) for batch in range(12)]
    assert len({drawn(*pair) for pair in pairs}) == len(pairs), (
        "no two batches of no two seeds share a mask"
    )
    torch.rand(5)
    assert drawn(3, 4) == drawn(3, 4)


@pytest.mark.gpu
def test_dropout_on_a_gpu_follows_from_them_too() -> None:
    resume.reseed(1, 2)
    drawn = torch.rand(8, device="cuda")
    resume.reseed(1, 2)
    assert torch.equal(torch.rand(8, device="cuda"), drawn)


def test_data_are_other_data_if_an_id_or_what_is_learnt_or_the_order_changes() -> None:
    def example(ids: list[int], given: int, *texts: str) -> template.Example:
        return template.Example(ids, [template.IGNORE_INDEX] * given + ids[given:], *texts)

    rows = [example([1, 2, 3], 1), example([4, 5], 0)]
    others = [
        [example([1, 2, 4], 1), rows[1]],
        [example([1, 2, 3], 2), rows[1]],
        rows[::-1],
        rows[:1],
        [example([1, 2], 1), example([3, 4, 5], 0)],
    ]
    same = [example([1, 2, 3], 1, "another", "text"), rows[1]]
    assert template.fingerprint(same) == template.fingerprint(rows)
    assert len({template.fingerprint(each) for each in [rows, *others]}) == 1 + len(others)


def test_metrics_are_those_of_the_steps_before_the_state(tmp_path: Path) -> None:
    path, lines = (
        tmp_path / "metrics.jsonl",
        [json.dumps({"step": step, "loss": random.random()}) for step in (1, 2, 3)],
    )
    path.write_text("\n".join(lines) + '\n{"step": 4, "lo')  # as a kill in mid-write would leave it
    report.keep_metrics(path, 2)
    assert path.read_text().splitlines() == lines[:2]
    for text in ("", "\n".join(lines[1:]), '{"step": 1}\nnothing', '{"step": 1}\n[]'):
        path.write_text(text)
        with pytest.raises(
            ValueError, match="metrics.jsonl lacks lines of the 2 steps before the state"
        ):
            report.keep_metrics(path, 2)
        assert path.read_text() == text
    path.unlink()
    report.keep_metrics(path, 0)
    assert path.read_text() == ""
