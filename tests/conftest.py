"""Settings of the whole test run: warnings, threads, Numba's cache, and how much Hypothesis tries.

Profiles of Hypothesis: dev (the default), ci (where CI is set), long (make test-long), mutate (make
mutate).
"""

import os
import sys
import sysconfig
import tempfile
import warnings
from importlib.machinery import SourceFileLoader
from types import ModuleType

from hypothesis import Phase, settings

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

# Under pytest-xdist, each worker is one thread of torch. Numba has two, because some tests compare
# one thread with two; our kernels use as many as torch has. Both libraries read this when imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["NUMBA_NUM_THREADS"] = "2"

# Every process compiles the kernels: a stale cache would hide a broken one, and coverage counts the
# Python that generates code. Workers share no cache, because Numba does not lock it: two that save
# at the same time may take the same file name. In make mutate a server has imported Numba already.
if "numba" not in sys.modules:
    NUMBA_CACHE = tempfile.TemporaryDirectory(prefix="numba-")
    os.environ["NUMBA_CACHE_DIR"] = NUMBA_CACHE.name

settings.register_profile("dev", max_examples=30, deadline=None)  # a first call may compile
settings.register_profile("ci", max_examples=200, deadline=None, derandomize=True)
settings.register_profile("long", max_examples=5000, deadline=None)
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
