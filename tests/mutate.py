"""Mutation testing, `make mutate`: changes one place of the code at a time; a test must notice.

cosmic-ray makes the mutants of a file, one by one, in a temporary copy of the tree, and runs the
tests of that file on each. survivors.md lists every mutant that no test kills, with the reason why
it does no harm; any other survivor is an error.

Importing torch and the peers takes longer than the tests of most mutants. So one server for each
file imports them once and forks for every mutant; the command that cosmic-ray runs only sends it a
request (`ask`, `serve`).

    make mutate                         all files, two at a time
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

TESTS = {  # the longest first
    "nf4": "tests/test_nf4.py tests/test_naive.py",
    "lora": "tests/test_lora.py tests/test_frozen_weight.py",
    "double_quant": "tests/test_double_quant.py tests/test_naive.py",
}
HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
PYTEST_OPTIONS = "-x -p no:cacheprovider --hypothesis-profile=mutate".split()
# The server has imported the plugins, so pytest cannot rewrite their assertions.
PYTEST_OPTIONS += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
TIME_LIMIT = 240  # seconds for one mutant: a longer run has an endless loop
ONE_CORE = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}


def mutate(file: str) -> set[str]:
    """Tests all mutants of a file. Returns the survivors, as `marked` shows them."""
    with tempfile.TemporaryDirectory() as folder:
        not_code = shutil.ignore_patterns(".*", "models", "out", "__pycache__")
        tree = shutil.copytree(HERE.parent, Path(folder, "tree"), ignore=not_code)
        settings = (HERE / "mutate.toml").read_text().replace("{file}", file)
        settings = settings.replace("{ask}", f"{sys.executable} {__file__} ask")
        (tree / "mutate.toml").write_text(settings)
        server = subprocess.Popen(
            [sys.executable, __file__, "serve", file],
            cwd=tree,
            env=ONE_CORE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            return {marked(diff) for diff in survivors(file, tree)}
        finally:
            server.kill()
            server.wait()


def survivors(file: str, tree: Path) -> list[str]:
    """Runs cosmic-ray on a file. Returns the diffs of the mutants that no test kills."""
    run("cosmic-ray init mutate.toml mutants", tree)
    run("cr-filter-operators mutants mutate.toml", tree)
    run("cosmic-ray baseline mutate.toml", tree)  # the tests must pass on the file as it is
    command = [BIN / "cosmic-ray", "exec", "mutate.toml", "mutants"]
    execution = subprocess.Popen(command, cwd=tree, env=ONE_CORE)
    while execution.poll() is None:
        with suppress(subprocess.TimeoutExpired):
            execution.wait(timeout=60)
        dump = run("cosmic-ray dump mutants", tree)
        results = [json.loads(line)[1] for line in dump.splitlines()]
        tested = [result for result in results if result and result["worker_outcome"] == "normal"]
        survived = [result["diff"] for result in tested if result["test_outcome"] == "survived"]
        pending = results.count(None)
        progress = f"{len(tested)} of {len(tested) + pending} mutants tested"
        print(f"{file}.py: {progress}, {len(survived)} survive", flush=True)
    outcomes = {result["worker_outcome"] for result in results if result}
    if pending or not outcomes <= {"normal", "skipped"}:
        sys.exit(f"{file}.py: cosmic-ray did not finish")
    return survived


def serve(file: str) -> None:
    """Runs the tests of a file in a fork for each request; answers 0 if they pass, else 1."""
    # Peers look for a package named kernels. Without this they would find the folder tests/kernels.
    sys.path[0] = os.getcwd()
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import pytest
    import transformers  # noqa: F401

    # The next mutant, of the same second and size, would run from this one's bytecode.
    sys.dont_write_bytecode = True
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        server.listen()
        while True:
            connection, _ = server.accept()
            child = os.fork()
            if child == 0:
                signal.alarm(TIME_LIMIT)
                os._exit(pytest.main([*PYTEST_OPTIONS, f"{file}.py", *TESTS[file].split()]))
            _, status = os.waitpid(child, 0)
            connection.send(bytes([status != 0]))
            connection.close()


def ask() -> None:
    """Sends the server a request and exits with its answer."""
    with socket.socket(socket.AF_UNIX) as connection:
        while connection.connect_ex("socket"):
            time.sleep(1)  # the server is still importing
        sys.exit(connection.recv(1)[0])


def run(command: str, tree: Path) -> str:
    """Runs one of cosmic-ray's commands. Returns what it prints."""
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
    old = words_of(changes, "-")
    new = words_of(changes, "+")
    start = len(os.path.commonprefix([old, new]))
    end = len(os.path.commonprefix([old[start:][::-1], new[start:][::-1]]))
    removed = "".join(old[start : len(old) - end]).strip()
    added = "".join(new[start : len(new) - end]).strip()
    return f"{''.join(old[:start])}«{removed} → {added}»{''.join(old[len(old) - end :])}"


def words_of(changes: list[str], sign: str) -> list[str]:
    """The words, operators and spaces of the lines of a diff with this sign."""
    text = " ".join(line[1:].strip() for line in changes if line.startswith(sign))
    return re.findall(r"[\w.]+|\*\*|<<|>>|[<>=!]=|\s|.", text)


def explained(file: str) -> set[str]:
    """The mutants of a file that survivors.md lists."""
    text = (HERE / "survivors.md").read_text()
    section = text.partition(f"\n## {file}.py\n")[2].partition("\n## ")[0]
    return set(re.findall(r"^- `(.*)`$", section, re.MULTILINE))


def main(files: list[str]) -> None:
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(files, pool.map(mutate, files)))
    new = 0
    for file, survivors in found.items():
        for line in sorted(explained(file) - survivors):
            print(f"{file}.py, a test kills it; remove it from tests/survivors.md:  {line}")
        for line in sorted(survivors - explained(file)):
            new += 1
            print(f"{file}.py, SURVIVES:  {line}")
    if new:
        remedy = "write a test that kills each, or give the reason in tests/survivors.md"
        sys.exit(f"{new} mutants survive that tests/survivors.md does not list: {remedy}")
    print("every surviving mutant is listed in tests/survivors.md")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", file]:
            serve(file)
        case ["ask"]:
            ask()
        case files:
            main(files or [*TESTS])
