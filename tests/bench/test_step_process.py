"""Training steps in other processes: what they answer, and what is said of one that runs out."""

import io
import json
import sys

import pytest
import torch

from bench import cpu, figures, random_llama, step_process
from bench.random_llama import SIZES
from bench.step_process import OutOfMemory, Stepper

READY = "print('ready', flush=True); input()"
KILLED = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"


def runs(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    monkeypatch.setattr(Stepper, "program", (sys.executable, "-c", program))


@pytest.mark.parametrize("program", [KILLED, "print('out of memory')"])
def test_a_process_that_runs_out_of_memory_is_not_taken_for_a_failure(
    monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    runs(monkeypatch, program)
    with pytest.raises(OutOfMemory):
        Stepper("ours")
    runs(monkeypatch, f"{READY}; {program}")
    stepper = Stepper("ours", "1.1B")
    with pytest.raises(OutOfMemory):
        stepper.step(1, 512)


def test_a_process_that_was_killed_before_a_request_ran_out_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs(monkeypatch, f"print('ready', flush=True); {KILLED}")
    stepper = Stepper("ours", "1.1B")
    stepper.process.wait()
    with pytest.raises(OutOfMemory):
        stepper.step(1, 512)


@pytest.mark.parametrize("program", ["raise SystemExit(2)", "pass"])
def test_a_process_that_ends_for_another_reason_is_an_error_that_names_it(
    monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    runs(monkeypatch, f"{READY}; {program}")
    stepper = Stepper("ours", "1.1B")
    with pytest.raises(RuntimeError, match="the process ended with [02]: run .* ours 1.1B"):
        stepper.step(1, 512)


@pytest.mark.parametrize("name", ["ours", "bitsandbytes autocast"])
def test_a_random_model_answers_each_request(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("1 16 1\n2 8 0\n"))
    step_process.serve_steps(name, "tiny")
    ready, *answers = capsys.readouterr().out.splitlines()
    assert ready == "ready" and len(answers) == 2
    for answer in map(json.loads, answers):
        assert answer["seconds"] > 0 and answer["peak_bytes"] > 0
        assert 0 < answer["loss"] < 2 * torch.tensor(float(SIZES["tiny"].vocabulary)).log()


def test_only_a_lack_of_memory_is_called_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step_process.resource, "setrlimit", lambda *limit: None)
    monkeypatch.setattr(step_process, "serve_steps", lambda *arguments: torch.empty(2**60))
    step_process.main()
    assert capsys.readouterr().out == step_process.NO_MEMORY
    monkeypatch.setattr(
        step_process, "serve_steps", lambda *arguments: torch.ones(2) @ torch.ones(3)
    )
    with pytest.raises(RuntimeError, match="size"):
        step_process.main()


def test_a_tied_head_is_the_embedding() -> None:
    shape = random_llama.TINY._replace(tied=True)
    model = random_llama.build(shape, 2, torch.device("cpu"))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "parameters"), [("135M", 134_515_008), ("360M", 361_821_120), ("1.1B", 1_100_048_384)]
)
def test_the_sizes_are_those_of_the_models_they_are_named_after(name: str, parameters: int) -> None:
    assert SIZES[name].parameters() == parameters


def test_the_table_says_where_memory_ran_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Limited:
        """The peer needs too much without checkpointing."""

        def __init__(self, name: str, model: str) -> None:
            self.peer = name != "ours"

        def step(self, batch: int, length: int, checkpointing: bool) -> dict[str, float]:
            if self.peer and not checkpointing:
                raise OutOfMemory
            return {"seconds": 3.0 if self.peer else 2.0, "peak_bytes": 4e9 if self.peer else 1e9}

        def close(self) -> None:
            pass

    monkeypatch.setattr(cpu, "Stepper", Limited)
    rows = figures.size_table(cpu.size(quick=True)).splitlines()[2:]
    assert rows == [
        "| tiny, 1 × 64 | 2.00 | 1.00 | out of memory | – | – | – |",
        "| tiny, 1 × 64, checkpointing | 2.00 | 1.00 | 3.00 | 4.00 | 1.50 | 4.00 |",
    ]
