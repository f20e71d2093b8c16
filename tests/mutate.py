"""Mutation testing, `make mutate`: break the code in one place after the other, and see that a test of that file notices.

cosmic-ray makes the mutants of a file, one by one, in a temporary copy of the tree, and runs the tests of the file on each. One
that no test kills must be listed in survivors.md, under the reason why it does no harm; any other is an error.

Importing torch and the peers takes longer than most mutants live. So for each file a server imports them once, and forks for
each mutant; the command that cosmic-ray runs only asks it (`ask`, `serve`).

    make mutate                         all files, two at a time: about half an hour on two cores
    make mutate ARGS="double_quant"     one of them
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

TESTS = {  # the long ones first
    "nf4": "tests/test_nf4.py tests/test_naive.py",
    "lora": "tests/test_lora.py tests/test_frozen_weight.py",
    "double_quant": "tests/test_double_quant.py tests/test_naive.py",
}
HERE, BIN = Path(__file__).parent, Path(sys.executable).parent
IMPORTED_ALREADY = [
    "-W",
    "ignore::pytest.PytestAssertRewriteWarning",
]  # by the server, so that pytest cannot rewrite them
SECONDS = 240  # no mutant of a terminating program needs more
ONE_CORE = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}


def mutate(file: str) -> set[str]:
    """Test all mutants of a file. -> those that survive, as `marked` shows them"""
    with tempfile.TemporaryDirectory() as folder:
        not_code = shutil.ignore_patterns(".*", "models", "out", "__pycache__")
        tree = shutil.copytree(HERE.parent, Path(folder, "tree"), ignore=not_code)
        settings = (HERE / "mutate.toml").read_text().replace("{file}", file)
        (tree / "mutate.toml").write_text(
            settings.replace("{ask}", f"{sys.executable} {__file__} ask")
        )
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        server = subprocess.Popen(
            [sys.executable, __file__, "serve", file], cwd=tree, env=ONE_CORE, **quiet
        )
        try:
            return {marked(diff) for diff in survivors(file, tree)}
        finally:
            server.kill()
            server.wait()


def survivors(file: str, tree: Path) -> list[str]:
    """Let cosmic-ray work through the mutants of a file. -> the diffs of those that the tests let pass"""
    run("cosmic-ray init mutate.toml mutants", tree)
    run("cr-filter-operators mutants mutate.toml", tree)
    run("cosmic-ray baseline mutate.toml", tree)  # the tests must pass on the file as it is
    execution = subprocess.Popen(
        [BIN / "cosmic-ray", "exec", "mutate.toml", "mutants"], cwd=tree, env=ONE_CORE
    )
    while execution.poll() is None:
        with suppress(subprocess.TimeoutExpired):
            execution.wait(timeout=60)
        results = [
            json.loads(line)[1] for line in run("cosmic-ray dump mutants", tree).splitlines()
        ]
        done = [result for result in results if result and result["worker_outcome"] == "normal"]
        passed = [result["diff"] for result in done if result["test_outcome"] == "survived"]
        to_do = sum(result is None for result in results)
        print(
            f"{file}.py: {len(done)} of {len(done) + to_do} mutants tested, {len(passed)} survive",
            flush=True,
        )
    if to_do or any(result["worker_outcome"] not in ("normal", "skipped") for result in results):
        sys.exit(f"{file}.py: cosmic-ray did not finish")
    return passed


def serve(file: str) -> None:
    """Run the tests of a file in a fork of this process, each time that somebody asks; the answer is pytest's exit status."""
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import pytest
    import transformers  # noqa: F401

    sys.dont_write_bytecode = (
        True  # a mutant of the same second and size would pass for the one before
    )
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        server.listen()
        while True:
            asker, _ = server.accept()
            child = os.fork()
            if not child:
                signal.alarm(SECONDS)
                options = [
                    "-x",
                    "-p",
                    "no:cacheprovider",
                    "--hypothesis-profile=mutate",
                    *IMPORTED_ALREADY,
                ]
                os._exit(pytest.main([*options, f"{file}.py", *TESTS[file].split()]))
            asker.send(bytes([os.waitpid(child, 0)[1] != 0]))
            asker.close()


def ask() -> None:
    """Exit as the tests do."""
    with socket.socket(socket.AF_UNIX) as connection:
        while connection.connect_ex("socket"):
            time.sleep(1)  # the server is still importing
        sys.exit(connection.recv(1)[0])


def run(command: str, tree: Path) -> str:
    """What one of cosmic-ray's commands prints."""
    tool, *words = command.split()
    result = subprocess.run(
        [BIN / tool, *words], cwd=tree, env=ONE_CORE, capture_output=True, text=True
    )
    if result.returncode:
        sys.exit(f"{command}: {result.stdout}{result.stderr}")
    return result.stdout


def marked(diff: str) -> str:
    """The line that a diff of one line changes, with the change marked in it.

    >>> marked("--- a/f.py\\n+++ b/f.py\\n@@ -1 +1 @@\\n-    return 2**bits\\n+    return 2** 3")
    'return 2**«bits → 3»'
    """
    changes = diff.partition("\n@@")[2].splitlines()[1:]
    old, new = (
        " ".join(line[1:].strip() for line in changes if line.startswith(sign)) for sign in "-+"
    )
    old, new = (re.findall(r"[\w.]+|\*\*|<<|>>|[<>=!]=|\s|.", text) for text in (old, new))
    start = len(os.path.commonprefix([old, new]))
    end = len(os.path.commonprefix([old[start:][::-1], new[start:][::-1]]))
    was, becomes = ("".join(words[start : len(words) - end]).strip() for words in (old, new))
    return f"{''.join(old[:start])}«{was} → {becomes}»{''.join(old[len(old) - end :])}"


def explained(file: str) -> set[str]:
    """The mutants of a file that survivors.md lists."""
    section = (
        (HERE / "survivors.md").read_text().partition(f"\n## {file}.py\n")[2].partition("\n## ")[0]
    )
    return set(re.findall(r"^- `(.*)`$", section, re.MULTILINE))


def main(files: list[str]) -> None:
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(files, pool.map(mutate, files)))
    for file, survivors in found.items():
        for line in sorted(explained(file) - survivors):
            print(f"{file}.py, killed by now, strike it from tests/survivors.md:  {line}")
        for line in sorted(survivors - explained(file)):
            print(f"{file}.py, SURVIVES:  {line}")
    new = sum(len(survivors - explained(file)) for file, survivors in found.items())
    if new:
        sys.exit(
            f"{new} mutants survive: write a test that kills each, or the reason why it may live into tests/survivors.md"
        )
    print("no mutant survives but those that tests/survivors.md explains")


if __name__ == "__main__":
    commands = {"serve": lambda: serve(sys.argv[2]), "ask": ask}
    commands.get(sys.argv[1] if sys.argv[1:] else "", lambda: main(sys.argv[1:] or [*TESTS]))()
