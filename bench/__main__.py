"""Measures every number about speed and memory in the documentation, next to the peers.

    python -m bench                   everything; then writes the tables and the plots in results/
    python -m bench ops --quick       one part, a rough look: nothing is written
    python -m bench --device cuda     on a GPU

Parts on a CPU (cpu.py): ops (single operations), optim (an optimizer step), step (a training step),
growth (of a step's cost). Parts on a GPU (cuda.py): ops, optim, step, sizes (7B to 65B in 48 GB).
"""

import argparse
import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from bench import cpu, cuda, figures

HERE = Path(__file__).parent
RESULTS = HERE / "results"
LIBRARIES = ("torch", "numba", "transformers", "bitsandbytes", "peft", "torchao")


def machine() -> dict:
    """What the numbers depend on: processor, threads, commit, versions."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = cpuinfo.partition("model name")[2].partition("\n")[0].strip("\t :")
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=HERE, capture_output=True, text=True).stdout.strip()
    return {
        "cpu": model or platform.processor(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "commit": commit,
        "versions": {name: version(name) for name in LIBRARIES},
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", help="default: all")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--quick", action="store_true", help="few turns, small sizes, nothing written"
    )
    args = parser.parse_args(argv)
    on_gpu = args.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("--device cuda needs an NVIDIA GPU that torch can see")
    parts = cuda.parts() if on_gpu else cpu.PARTS
    for name in args.parts:
        if name not in parts:
            parser.error(f"no part {name} on {args.device}: choose from {', '.join(parts)}")

    conditions = machine()
    results = RESULTS / "cpu.json"
    if on_gpu:
        conditions["card"] = cuda.card()
        results = RESULTS / f"{cuda.card().lower().replace(' ', '-')}.json"
    found = json.loads(results.read_text()) if results.exists() else {}
    for name in args.parts or parts:
        found[name] = parts[name](args.quick) | {"machine": conditions}
        if not args.quick:
            RESULTS.mkdir(exist_ok=True)
            results.write_text(json.dumps(found, indent=1) + "\n")
    if args.quick:
        return
    if on_gpu:
        figures.write_cuda(found)
    else:
        figures.write(found)


if __name__ == "__main__":
    main()
