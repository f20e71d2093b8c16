"""Operations as a processor with AVX2 alone runs them: in a process of its own, that is checked."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import __main__ as command
from bench import as_avx2

AVX2 = pytest.mark.skipif(not as_avx2.is_possible(), reason="the processor has no AVX2")


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit):
        command.main(list(arguments))
    return capsys.readouterr().err.splitlines()[-1]


def test_a_processor_without_avx2_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(as_avx2.llvmlite.binding, "get_host_cpu_features", dict)
    error = error_of(capsys, "ops", "--as", "avx2")
    assert error.endswith("--as avx2 needs a processor with AVX2, and this one has none")


@AVX2
def test_only_operations_are_measured_so(capsys: pytest.CaptureFixture[str]) -> None:
    error = error_of(capsys, "growth", "--as", "avx2")
    assert error.endswith("no part growth on cpu-avx2: choose from ops, step")


def test_a_gpu_is_not_restricted(capsys: pytest.CaptureFixture[str]) -> None:
    error = error_of(capsys, "--device", "cuda", "--as", "avx2")
    assert error.endswith("--as avx2 measures a CPU: leave out --device cuda")


@AVX2
def test_the_part_runs_in_a_process_with_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[list[str], dict[str, str]]] = []

    def run(program: list[str], cwd: Path, env: dict[str, str]) -> SimpleNamespace:
        ran.append((program, env))
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr(as_avx2, "subprocess", SimpleNamespace(run=run))
    with pytest.raises(SystemExit) as ended:
        command.main(["ops", "--as", "avx2", "--quick"])
    assert ended.value.code == 3
    ((program, env),) = ran
    assert program[1:] == ["-m", "bench", "ops", "--as", "avx2", "--quick"]
    assert env == os.environ | as_avx2.SETTINGS and not as_avx2.is_set()
    monkeypatch.setattr(os, "environ", env)
    assert as_avx2.is_set()


@AVX2
def test_the_settings_restrict_numba_and_torch() -> None:
    program = """
import torch
from kernels.cpu import launch, vectors
print(vectors.LOOK_UP, torch.backends.cpu.get_cpu_capability(), *launch.NATIVE)
"""
    python = [sys.executable, "-c", program]
    env = os.environ | as_avx2.SETTINGS
    done = subprocess.run(python, cwd=as_avx2.ROOT, env=env, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    assert done.stdout.split() == ["avx2", "AVX2"]  # and no 16-bit dtype that it multiplies


@pytest.mark.parametrize("state", [("avx512", "AVX2"), ("avx2", "AVX512"), ("", "AVX2")])
def test_a_restriction_without_effect_is_an_error(state: tuple[str, str]) -> None:
    as_avx2.check("avx2", "AVX2")
    with pytest.raises(RuntimeError, match="the settings must restrict Numba and torch to AVX2"):
        as_avx2.check(*state)
