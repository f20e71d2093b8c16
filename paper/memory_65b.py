"""LLaMA-65B on one card of 48 GB (paper, figure 6): training steps on its real shapes.

    python paper/memory_65b.py                 7B, 13B, 33B and 65B, batch 1 and 16
    python paper/memory_65b.py --model tiny    a model so small that a CPU trains it

On a GPU the peak of a step is measured by component next to its prediction; without one the models
of the paper are only predicted. The card may be larger: the process is limited to 48 GiB of it
(bench/capped_run.py).
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.capped_run import BATCHES, CAP, compare
from memory.formula import SHAPES


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=["tiny", *SHAPES], nargs="*", default=list(SHAPES))
    parser.add_argument(
        "--json",
        type=Path,
        default=Path(__file__).with_suffix(".json"),
        help="file for the bytes (default: next to this script)",
    )
    args = parser.parse_args(argv)
    if torch.cuda.is_available():
        device = torch.device("cuda")
        card = torch.cuda.get_device_name(device)
        print(card)
    else:
        device = torch.device("cpu")
        card = None
        print("no GPU here: the models of the paper are predicted, not measured")
    try:
        rows = [compare(name, batch, device) for name in args.model for batch in BATCHES]
    except ValueError as error:
        print(f"memory_65b.py: {error}", file=sys.stderr)
        return 1
    args.json.write_text(json.dumps({"card": card, "cap": CAP, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
