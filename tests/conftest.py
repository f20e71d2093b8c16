"""How much the property tests try: dev (the default), ci (where CI is set), long (make test-long), mutate (make mutate)."""

import os
import sys
import tempfile

from hypothesis import Phase, settings

# Numba compiles in every run of the tests, and nothing stale is used: what generates its code must be tested, and counted, too.
if "numba" not in sys.modules:  # it is there already in make mutate, where each mutant has a run
    NUMBA_CACHE = tempfile.TemporaryDirectory(prefix="numba-")
    os.environ["NUMBA_CACHE_DIR"] = NUMBA_CACHE.name

settings.register_profile(
    "dev", max_examples=30, deadline=None
)  # no deadline: a first call may compile
settings.register_profile("ci", max_examples=200, deadline=None, derandomize=True)
settings.register_profile("long", max_examples=5000, deadline=None)
# The same few examples for every mutant, and no time spent on a smaller counterexample: one is enough.
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
