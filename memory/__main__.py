"""python -m memory: the memory of a run, predicted before it."""

import sys

from memory.measured import main

sys.exit(main())
