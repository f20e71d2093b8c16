"""How much the property tests try: dev (the default), ci (where CI is set), long (--hypothesis-profile=long)."""

import os

from hypothesis import settings

settings.register_profile("dev", max_examples=30, deadline=None)  # no deadline: a first call may compile
settings.register_profile("ci", max_examples=200, deadline=None, derandomize=True)
settings.register_profile("long", max_examples=5000, deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")
