"""python -m bench: every number about speed, measured in one run."""

import sys

from bench.cpu import main

sys.exit(main())
