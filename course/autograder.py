"""Packs the grader of a lesson for Gradescope: the zip to upload as an assignment's autograder.

Gradescope unpacks the zip into /autograder/source and runs setup.sh once. For each submission it
runs run_autograder, which finds the student's file in /autograder/submission, and leaves the grade
in /autograder/results/results.json.
"""

import stat
import subprocess
import zipfile
from pathlib import Path

from course.lesson import ROOT, Lesson

SETUP = """#!/usr/bin/env bash
# Sets up the grader, once for all submissions. Python 3.11 or newer is needed.
set -euo pipefail
apt-get update
apt-get install -y make
apt-get install -y python3.12-venv || apt-get install -y python3.11-venv
python="$(command -v python3.12 python3.11 | head -n 1)"
make -C /autograder/source/qlora PYTHON="$python" .venv/course
"""
RUN = """#!/usr/bin/env bash
# Grades a submission. A missing file and a broken law are in the results, too.
root=${{AUTOGRADER:-/autograder}}  # another folder in the tests
cd "$root/source/qlora" || exit 1
rm -rf work/{number}
mkdir -p work/{number}
cp "$root/submission/{name}" work/{number}/
.venv/bin/python -m course grade {number}
cp work/{number}/results.json "$root/results/results.json"
"""


def write(lesson: Lesson) -> Path:
    """Write autograder.zip beside the student's file, with all files that git knows."""
    path = lesson.answer.with_name("autograder.zip")
    path.parent.mkdir(parents=True, exist_ok=True)
    command = ["git", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    scripts = {
        "setup.sh": SETUP,
        "run_autograder": RUN.format(number=lesson.number, name=lesson.source.name),
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in scripts.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = (stat.S_IFREG | 0o755) << 16  # may be executed
            archive.writestr(entry, text)
        for name in sorted(filter(None, listed.split("\0"))):
            archive.write(ROOT / name, f"qlora/{name}")
    return path
