"""A run that is killed at any moment and resumed ends with the same bits (helpers/killed.py)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

KILLED = Path(__file__).parent.parent / "helpers/killed.py"
MOMENTS = 60
# The file operations of write_tensors.
SAVE = ["save_file", "half of save_file", "fsync", "replace", "fsync", "rmdir"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """What helpers/killed.py prints, and the folder of all its runs."""
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, str(KILLED), str(folder), str(MOMENTS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["whole"] == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "generation_config.json",
        "metrics.jsonl",
        "report.json",
        "state-000002.safetensors",
        "state-000004.safetensors",
    ]
    return result, folder


def test_killed_at_60_random_moments_runs_end_with_the_same_bits(runs: tuple[dict, Path]) -> None:
    result = runs[0]["moments"]
    assert result["kills"] == MOMENTS
    assert result["different"] == []


@pytest.mark.parametrize("kind", ["kill", "fail"])
def test_interrupted_at_any_file_operation_a_run_resumes_to_the_same_bits(
    runs: tuple[dict, Path], kind: str
) -> None:
    """SIGKILL before each operation or in the middle of a write; or an error, as on a full disk."""
    result = runs[0][kind]
    assert result["different"] == [] and result["status at last"] == 0
    seen = result["operations"]
    saves = [seen[i : i + len(SAVE)] == SAVE for i in range(len(seen))]
    assert sum(saves) == 4, "three states and the adapter"


def test_a_run_that_cannot_write_ends_with_a_message(runs: tuple[dict, Path]) -> None:
    result, folder = runs
    logs = [log.read_text() for log in (folder / "fail").glob("*.log")]
    failed = ["train.py: [Errno 28] No space left on device" in log for log in logs]
    assert sum(failed) == len(result["fail"]["operations"])
