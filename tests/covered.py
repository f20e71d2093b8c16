"""Whether the run of the tests that coverage has just recorded reached every line and 95 % of the branches of every file."""

import json
import subprocess
import sys
from pathlib import Path

BIN, REPORT = Path(sys.executable).parent, Path(".venv/covered.json")
LEAST_BRANCHES = 95.0


def main() -> None:
    subprocess.run([BIN / "coverage", "json", "--quiet"], check=True)
    files = json.loads(REPORT.read_text())["files"]
    print(f"\n{'reached by the tests':26}{'lines':>8}{'branches':>10}")
    short = []
    for name, file in sorted(files.items()):
        summary = file["summary"]
        lines, branches = summary["percent_statements_covered"], summary["percent_branches_covered"]
        print(f"  {name:24}{lines:7.1f}%{branches:9.1f}%")
        if file["missing_lines"] or branches < LEAST_BRANCHES:
            short.append(
                f"{name}: lines {file['missing_lines']}, branches {file['missing_branches']}"
            )
    if short:
        rule = (
            f"every line and {LEAST_BRANCHES:.0f} % of the branches must be tested; these are not:"
        )
        sys.exit("\n  ".join([rule, *short]))


if __name__ == "__main__":
    main()
