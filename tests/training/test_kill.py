"""Kill it when you like: a run that goes on afterwards ends with the bits of one that nobody disturbed (tests/killed.py)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

KILLED, MOMENTS = Path(__file__).parent.parent / "helpers/killed.py", 60
SAVE = [
    "save_file",
    "half of save_file",
    "fsync",
    "replace",
    "fsync",
    "rmdir",
]  # what write_tensors does to files


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """What tests/killed.py saw, and the folder of all its runs."""
    folder = tmp_path_factory.mktemp("runs")
    done = subprocess.run(
        [sys.executable, str(KILLED), str(folder), str(MOMENTS)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["whole"] == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "metrics.jsonl",
        "report.json",
        "state-000002.safetensors",
        "state-000004.safetensors",
    ]
    return result, folder


def test_killed_at_60_random_moments_runs_end_with_the_same_bits(runs: tuple[dict, Path]) -> None:
    assert runs[0]["moments"]["kills"] == MOMENTS and runs[0]["moments"]["different"] == []


@pytest.mark.parametrize("kind", ["kill", "fail"])
def test_disturbed_at_any_operation_on_files_a_run_goes_on_to_the_same_bits(
    runs: tuple[dict, Path], kind: str
) -> None:
    """SIGKILL before each operation, and with half of a file written; or an error in its place, as of a full disk."""
    result = runs[0][kind]
    assert result["different"] == [] and result["status at last"] == 0
    seen = result["operations"]
    assert sum(seen[i : i + len(SAVE)] == SAVE for i in range(len(seen))) == 4, (
        "three states and the adapter"
    )


def test_a_run_that_cannot_write_ends_with_a_word(runs: tuple[dict, Path]) -> None:
    logs = [log.read_text() for log in (runs[1] / "fail").glob("*.log")]
    assert sum("train.py: [Errno 28] No space left on device" in log for log in logs) == len(
        runs[0]["fail"]["operations"]
    )
