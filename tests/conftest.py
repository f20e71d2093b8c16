"""Settings of the whole test run: warnings, threads, Numba's cache, and how much Hypothesis tries.

Profiles of Hypothesis: dev (the default), ci (where CI is set), long (make test-long), mutate (make
mutate), few (on_aarch64.sh).
"""

import gc
import os
import sys
import sysconfig
import tempfile
import warnings
from importlib.machinery import SourceFileLoader
from types import ModuleType

from hypothesis import Phase, settings
from pytest import Item

# Warnings are errors (pyproject.toml), except those of a dependency while it is imported or
# byte-compiled: these depend on how it was installed and on what was imported before.
DEPENDENCIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "platlib", "purelib"))
import_module = SourceFileLoader.exec_module


def import_without_warnings(loader: SourceFileLoader, module: ModuleType) -> None:
    if not loader.path.startswith(DEPENDENCIES):
        return import_module(loader, module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_module(loader, module)


SourceFileLoader.exec_module = import_without_warnings

# Every process compiles the kernels: a stale cache would hide a broken one, and coverage counts the
# Python that generates code. Workers share no cache, because Numba does not lock it: two that save
# at the same time may take the same file name.
#
# A worker of pytest-xdist has one thread of torch. Numba gets two, because some tests compare one
# thread with two; our kernels use as many as torch. Both libraries read this when imported.
WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if WORKER:
    gc.disable()  # until pytest_collection_finish
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["NUMBA_NUM_THREADS"] = "2"
    os.environ["NUMBA_CACHE_DIR"] = os.path.join(os.environ["NUMBA_CACHE_DIR"], WORKER)
elif "numba" not in sys.modules:  # the server of make mutate has imported it
    NUMBA_CACHE = tempfile.TemporaryDirectory(prefix="numba-")
    os.environ["NUMBA_CACHE_DIR"] = NUMBA_CACHE.name

settings.register_profile("dev", max_examples=30, deadline=None)  # a first call may compile
settings.register_profile("ci", max_examples=200, deadline=None, derandomize=True)
settings.register_profile("long", max_examples=5000, deadline=None)
settings.register_profile("few", max_examples=3, deadline=None, derandomize=True)
# Every mutant gets the same few examples, and a counterexample is not made smaller.
settings.register_profile(
    "mutate",
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    report_multiple_bugs=False,
)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

# Files that take long come first: a process that gets one of them last would work alone at the end.
LONG = """
test_sharding.py test_train.py test_mutants.py test_cuda_kernels.py test_kill.py
""".split()


def pytest_collection_modifyitems(items: list[Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)  # a stable sort


def pytest_collection_finish() -> None:
    """No collection of garbage looks again at all that was imported."""
    gc.collect()
    gc.freeze()
    gc.enable()
