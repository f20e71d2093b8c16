"""The autograder for Gradescope, unpacked and run as Gradescope does it."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from course import __main__


def grade(autograder: Path) -> dict:
    """Run the autograder on what is in its submission folder. Returns the results."""
    (autograder / "results").mkdir(exist_ok=True)
    script = autograder / "source" / "run_autograder"
    environment = {"AUTOGRADER": str(autograder), "PATH": "/usr/bin:/bin"}
    subprocess.run(["bash", script], env=environment, capture_output=True, check=True)
    return json.loads((autograder / "results" / "results.json").read_text())


def test_the_zip_grades_a_submission_in_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("course.lesson.WORK", tmp_path / "work")
    __main__.main(["autograder", "2"])
    path = tmp_path / "work" / "2" / "autograder.zip"
    assert str(path) in capsys.readouterr().out
    source = tmp_path / "source"
    with zipfile.ZipFile(path) as archive:
        archive.extractall(source)
        modes = [
            archive.getinfo(name).external_attr >> 16 for name in ("setup.sh", "run_autograder")
        ]
    assert all(mode & 0o111 for mode in modes), "both scripts may be executed"
    (source / "qlora" / ".venv").symlink_to(sys.prefix)  # in place of setup.sh

    submission = tmp_path / "submission"
    submission.mkdir()
    (submission / "nf4.py").write_text("def normal_float(:")
    results = grade(tmp_path)
    assert results["score"] == 0 and results["max_score"] == 20
    assert "line 1: this is not Python" in results["output"]

    (submission / "nf4.py").unlink()
    assert "there is no work/2/nf4.py" in grade(tmp_path)["output"]


def test_the_setup_is_a_script_that_bash_can_read() -> None:
    from course.autograder import SETUP

    subprocess.run(["bash", "-n"], input=SETUP, text=True, check=True)
