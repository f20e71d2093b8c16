"""Measures every number about speed and memory in the documentation, next to the peers.

    python -m bench                   everything; then writes the tables and the plots in results/
    python -m bench ops --quick       one part, a rough look: nothing is written
    python -m bench --device cuda     on a GPU
    python -m bench ops --as avx2     as a processor with AVX2 alone runs it

Parts on a CPU (cpu.py): ops (single operations), optim (an optimizer step), step (a training step),
growth (of a step's cost), size (a step of larger models). With --as avx2 (as_avx2.py): ops.
Parts on a GPU (cuda.py): ops, optim, step, sizes (7B to 65B in 48 GB).
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from bench import as_avx2, cpu, cuda, figures
from bench.machine import machine

HERE = Path(__file__).parent
RESULTS = HERE / "results"
LIBRARIES = ("torch", "numba", "transformers", "bitsandbytes", "peft", "torchao")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", help="default: all")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--as", dest="restricted_to", choices=["avx2"], help="use these instructions of the CPU"
    )
    parser.add_argument(
        "--quick", action="store_true", help="few turns, small sizes, nothing written"
    )
    args = parser.parse_args(argv)
    on_gpu = args.device == "cuda"
    if on_gpu and args.restricted_to:
        parser.error("--as avx2 measures a CPU: leave out --device cuda")
    if on_gpu and not torch.cuda.is_available():
        parser.error("--device cuda needs an NVIDIA GPU that torch can see")
    if args.restricted_to and not as_avx2.is_possible():
        parser.error("--as avx2 needs a processor with AVX2, and this one has none")

    conditions = machine(LIBRARIES)
    where = args.device
    parts = cpu.PARTS
    write = figures.write
    if args.restricted_to:
        where = "cpu-avx2"
        parts = as_avx2.PARTS
        write = figures.write_as_avx2
    if on_gpu:
        conditions["card"] = cuda.card()
        where = cuda.card().lower().replace(" ", "-")
        parts = cuda.parts()
        write = figures.write_cuda
    for name in args.parts:
        if name not in parts:
            parser.error(f"no part {name} on {where}: choose from {', '.join(parts)}")
    if args.restricted_to and not as_avx2.is_set():
        sys.exit(as_avx2.run(sys.argv[1:] if argv is None else argv))

    results = RESULTS / f"{where}.json"
    found = json.loads(results.read_text()) if results.exists() else {}
    for name in args.parts or parts:
        found[name] = parts[name](args.quick) | {"machine": conditions}
        if not args.quick:
            RESULTS.mkdir(exist_ok=True)
            results.write_text(json.dumps(found, indent=1) + "\n")
    if not args.quick:
        write(found)


if __name__ == "__main__":
    main()
