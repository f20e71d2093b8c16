"""Fails unless the last test run reached every line and 95 % of the branches of each file."""

import json
import subprocess
import sys
from pathlib import Path

BIN = Path(sys.executable).parent
REPORT = Path(".venv/covered.json")  # as in pyproject.toml
MIN_BRANCHES = 95.0  # %


def main() -> None:
    subprocess.run([BIN / "coverage", "json", "--quiet"], check=True)
    files = json.loads(REPORT.read_text())["files"]
    print(f"\n{'reached by the tests':26}{'lines':>8}{'branches':>10}")
    failures = []
    for name, file in sorted(files.items()):
        lines = file["summary"]["percent_statements_covered"]
        branches = file["summary"]["percent_branches_covered"]
        print(f"  {name:24}{lines:7.1f}%{branches:9.1f}%")
        if file["missing_lines"] or branches < MIN_BRANCHES:
            missing = f"lines {file['missing_lines']}, branches {file['missing_branches']}"
            failures.append(f"{name}: {missing}")
    if failures:
        rule = f"the tests must reach every line and {MIN_BRANCHES:.0f} % of the branches; missing:"
        sys.exit("\n  ".join([rule, *failures]))


if __name__ == "__main__":
    main()
