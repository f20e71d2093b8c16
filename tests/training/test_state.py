"""The state of a run: a resumed run gives the same bits; damaged or unfit states are refused."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from checkpoints import io
from checkpoints.peft_adapter import adapter_tensors
from data import chat_template
from helpers import models
from paged_optim import PagedAdamW
from training import report, state

ROOT = Path(state.__file__).parent.parent
IDS = torch.arange(5, 25)[None]


def take_steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, count: int, start: int = 0
) -> None:
    model.train()
    for step in range(start, start + count):
        state.seed_batch(0, step)
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def optimizer_of(model: nn.Module, **settings: int) -> PagedAdamW:
    return PagedAdamW([p for p in model.parameters() if p.requires_grad], **settings)


def save(model: nn.Module, optimizer: PagedAdamW, step: int, folder: Path, limit: int) -> None:
    tensors = state.state_tensors(model, optimizer)
    state.save_state(tensors, {"lr": "1"}, step, [0.5, None], folder, limit)


def run_with_states(folder: Path, steps: int, limit: int = 2) -> tuple[nn.Module, PagedAdamW]:
    """A run that saves a state before its first step and after each step."""
    model = models.adapted()
    optimizer = optimizer_of(model)
    save(model, optimizer, 0, folder, limit)
    for step in range(1, steps + 1):
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
    saved = state.latest_state(tmp_path)
    assert (saved.step, saved.settings, saved.before) == (3, {"lr": "1"}, [0.5, None])
    state.load_state(resumed, second, saved)
    take_steps(resumed, second, 3, start=3)
    expected = adapter_tensors(whole)
    for name, tensor in adapter_tensors(resumed).items():
        assert torch.equal(tensor, expected[name]), name


# Runs here and in a process of its own: the random order of a hash map may differ between them.
WRITER = """
import sys
from pathlib import Path
import torch
from training.state import save_state
tensors = {f"optimizer.{i}.exp_avg": torch.full((2, 3), float(i)) for i in range(9)}
for step in range(8):
    settings = {"lr": "1", "seed": "0", "data": "abc"}
    save_state(tensors, settings, step, [0.5, None], Path(sys.argv[1]), limit=8)
"""


def test_the_same_state_saved_by_two_processes_has_identical_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = folders = [tmp_path / "here", tmp_path / "there"]
    for folder in folders:
        folder.mkdir()
    monkeypatch.setattr(sys, "argv", ["", str(here)])
    exec(WRITER, {})  # noqa: S102
    subprocess.run([sys.executable, "-c", WRITER, str(there)], cwd=ROOT, check=True)
    assert len(names(here)) == 8
    assert names(here) == names(there)
    for name in names(here):
        assert (here / name).read_bytes() == (there / name).read_bytes()


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_the_last_states_are_kept_in_the_order_of_their_steps_not_of_their_letters(
    tmp_path: Path, limit: int
) -> None:
    run_with_states(tmp_path, 3, limit)
    kept = [f"state-00000{step}.safetensors" for step in (3, 2, 1, 0)[:limit]]
    assert [path.name for path in state.saved_states(tmp_path)] == kept
    for path in state.saved_states(tmp_path):
        path.unlink()
    for step in (999_999, 1_000_000, 5):
        (tmp_path / f"state-{step:06d}.safetensors").write_text("")
    (tmp_path / "state-7.txt").write_text("another file")
    assert state.saved_states(tmp_path)[0].name == "state-1000000.safetensors"
    assert "state-7.txt" not in {path.name for path in state.saved_states(tmp_path)}


def test_unfinished_files_are_removed_and_a_state_after_the_saved_one_is_not(
    tmp_path: Path,
) -> None:
    unfinished = tmp_path / ".state-000001.safetensors.4711.unfinished"
    unfinished.mkdir()
    (unfinished / ".tmp1a2b").write_text("half of")
    io.remove_unfinished(tmp_path)
    assert names(tmp_path) == []
    (tmp_path / "state-000009.safetensors").write_text("damaged, and skipped by --resume")
    run_with_states(tmp_path, 2)
    assert names(tmp_path) == [f"state-00000{step}.safetensors" for step in (1, 2, 9)]


def test_a_damaged_state_is_skipped_with_a_warning_and_the_one_before_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run_with_states(tmp_path, 3, limit=3)
    last, middle, first = state.saved_states(tmp_path)
    last.write_bytes(last.read_bytes()[:-8])
    save_file({"adapter": torch.zeros(1)}, middle)
    assert state.latest_state(tmp_path).path == first
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2
    assert all(": skipped, the state before it is used" in warning for warning in warnings)
    assert "state-000003.safetensors is damaged" in warnings[0]
    assert "state-000002.safetensors is not the state" in warnings[1]
    first.write_bytes(b"")
    message = "there is no state in .* to resume from: start without --resume"
    with pytest.raises(ValueError, match=message):
        state.latest_state(tmp_path)


@pytest.fixture(scope="module")
def one_state(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("state")
    run_with_states(folder, 1, limit=1)
    [path] = state.saved_states(folder)
    return path, path.read_bytes()


@given(
    share=st.floats(0, 1, exclude_max=True),
    header=st.booleans(),
    bit=st.integers(0, 7),
    cut=st.booleans(),
)
def test_a_changed_bit_or_a_missing_byte_is_always_noticed(
    one_state: tuple[Path, bytes], share: float, header: bool, bit: int, cut: bool
) -> None:
    path, whole = one_state
    header_bytes = 8 + int.from_bytes(whole[:8], "little")
    place = int(share * (header_bytes if header else len(whole)))
    changed = bytearray(whole)
    changed[place] ^= 1 << bit
    path.write_bytes(whole[:place] if cut else changed)
    message = "state-000001.safetensors is (damaged|not the state of a run)"
    with pytest.raises(ValueError, match=message):
        state.read_state(path)


def test_other_settings_are_named_and_refused_unless_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run_with_states(tmp_path, 1)
    saved = state.latest_state(tmp_path)
    state.require_same_settings(saved, {"lr": "1"}, anyway=False)
    message = "cannot resume from .*: lr was 1, is 2; seed was None, is 0. Use the old settings or"
    with pytest.raises(ValueError, match=message):
        state.require_same_settings(saved, {"lr": "2", "seed": "0"}, anyway=False)
    assert capsys.readouterr().err == ""
    state.require_same_settings(saved, {"lr": "2"}, anyway=True)
    warning = f"resuming from {saved.path} although lr was 1, is 2\n"
    assert capsys.readouterr().err == warning


def test_a_run_stopped_before_its_first_step_starts_again(tmp_path: Path) -> None:
    model, optimizer = run_with_states(tmp_path, 0)
    saved = state.latest_state(tmp_path)
    state.load_state(model, optimizer, saved)
    assert saved.step == 0 and optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize(
    "name, value, rule",
    [
        ("optimizer.0.exp_avg_sq", -1.0, "must not be negative"),
        ("optimizer.3.step", 2.0, "must be the step of the state, 1"),
    ],
)
def test_a_state_that_no_run_can_have_is_refused(
    tmp_path: Path, name: str, value: float, rule: str
) -> None:
    model, optimizer = run_with_states(tmp_path, 1)
    saved = state.latest_state(tmp_path)
    saved.tensors[name].fill_(value)
    with pytest.raises(ValueError, match=f"{name} {rule}"):
        state.load_state(model, optimizer, saved)


def test_a_state_of_another_rank_is_refused_even_if_settings_may_differ(tmp_path: Path) -> None:
    run_with_states(tmp_path, 1)
    model = models.adapted(r=2)
    with pytest.raises(ValueError, match="does not fit the model"):
        state.load_state(model, optimizer_of(model), state.latest_state(tmp_path))


def test_random_numbers_depend_on_the_seed_and_the_number_of_the_batch_alone() -> None:
    def draw(seed: int, batch: int) -> tuple[float, ...]:
        state.seed_batch(seed, batch)
        return tuple(torch.rand(4).tolist())

    pairs = [(seed, batch) for seed in range(12) for batch in range(12)]
    assert len({draw(*pair) for pair in pairs}) == len(pairs), "two batches share a mask"
    torch.rand(5)
    assert draw(3, 4) == draw(3, 4)


@pytest.mark.gpu
def test_dropout_on_a_gpu_depends_on_them_too() -> None:
    state.seed_batch(1, 2)
    drawn = torch.rand(8, device="cuda")
    state.seed_batch(1, 2)
    assert torch.equal(torch.rand(8, device="cuda"), drawn)


def test_the_fingerprint_changes_with_any_id_with_the_labels_and_with_the_order() -> None:
    def example(ids: list[int], prompt: int, *texts: str) -> chat_template.Example:
        labels = [chat_template.IGNORE_INDEX] * prompt + ids[prompt:]
        return chat_template.Example(ids, labels, *texts)

    rows = [example([1, 2, 3], 1), example([4, 5], 0)]
    others = [
        [example([1, 2, 4], 1), rows[1]],
        [example([1, 2, 3], 2), rows[1]],
        rows[::-1],
        rows[:1],
        [example([1, 2], 1), example([3, 4, 5], 0)],
    ]
    same = [example([1, 2, 3], 1, "another", "text"), rows[1]]
    assert chat_template.fingerprint(same) == chat_template.fingerprint(rows)
    fingerprints = {chat_template.fingerprint(each) for each in [rows, *others]}
    assert len(fingerprints) == 1 + len(others)


def test_metrics_keep_the_steps_up_to_the_state(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": random.random()}) for step in (1, 2, 3)]
    path.write_text("\n".join(lines) + '\n{"step": 4, "lo')  # as a kill during a write leaves it
    report.keep_metrics(path, 2)
    assert path.read_text().splitlines() == lines[:2]
    message = "metrics.jsonl lacks lines of the 2 steps before the state"
    for text in ("", "\n".join(lines[1:]), '{"step": 1}\nnothing', '{"step": 1}\n[]'):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            report.keep_metrics(path, 2)
        assert path.read_text() == text
    path.unlink()
    report.keep_metrics(path, 0)
    assert path.read_text() == ""
