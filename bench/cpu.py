"""Every number about speed and memory in the README, measured in one run, next to the libraries people use.

    python bench.py                   all of it, then the README's tables and the plots in results/ are written anew
    python bench.py ops --quick       one part, a rough look: nothing is written
    python bench.py --device cuda     a GPU instead: bench_cuda.py
    parts: ops (single operations), optim (an optimizer step), step (a training step), growth (of a step's cost)

What makes a figure fair here:

    interleaved    contenders take turns, call by call, so that whatever else the machine does hits all of them alike
    medians        of many turns, with the spread between the quartiles beside them in the JSON
    ratios         the machine's own speed cancels; a ratio is the median of the ratios of one turn
    bytes          each operation is also held against the bytes that it must move, at the speed of a plain copy
    processes      where memory is measured each contender has a process of its own

Kernels are compiled, and libraries warmed up, by a first call that does not count.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from bench import cuda as bench_cuda
from bench import figures
from bench import peers as contenders
from bench.peers import Work

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results"
ROWS = [1, 4, 16, 64, 256, 1024]
LENGTHS, BATCHES = [128, 256, 512, 1024, 2048], [1, 2, 4, 8, 16]


def race(works: dict[str, Work], turns: int) -> dict[str, list[float]]:
    """Seconds of each turn of each contender; each round starts with another one."""
    names, seconds = list(works), {name: [] for name in works}
    for work in works.values():
        work()
    for turn in range(turns):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            began = time.perf_counter()
            works[name]()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def summary(seconds: dict[str, list[float]]) -> dict[str, dict]:
    """Median, quartiles, and the median of ours / theirs, turn by turn."""
    result = {}
    for name, times in seconds.items():
        low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
        ratio = statistics.median(mine / other for mine, other in zip(seconds["ours"], times))
        result[name] = {"seconds": middle, "quartiles": [low, high], "ours_to_this": ratio}
    return result


def bandwidth(turns: int) -> float:
    """Bytes a second of copying a tensor that no cache holds, read and written ones together."""
    source, target = torch.ones(2**26), torch.empty(2**26)
    (times,) = race({"copy": lambda: target.copy_(source)}, turns).values()
    return 2 * source.nbytes / statistics.median(times)


def ops(quick: bool) -> dict:
    """Quantize, dequantize, multiply: one layer of 4096 x 4096, block 64, constants double-quantized."""
    side = 1024 if quick else 4096
    n, constants = side * side, side * side / 64 * (1 + 4 / 256)
    torch.manual_seed(0)
    weight, turns = torch.randn(side, side) * 0.05, 5 if quick else 30
    rows = {"copy": {"bytes_per_second": bandwidth(turns)}}

    def row(name: str, works: dict[str, Work], nbytes: float, turns: int) -> None:
        rows[name] = summary(race(works, turns)) | {"bytes": nbytes}
        times = (f"{k} {1e3 * v['seconds']:.2f} ms" for k, v in rows[name].items() if k != "bytes")
        print(f"{name:33}", *times, sep="   ", flush=True)

    row("quantize float32", contenders.quantizing(weight), 4 * n + n / 2 + constants, min(turns, 7))
    for dtype in (torch.bfloat16, torch.float32):
        kind = str(dtype).removeprefix("torch.")
        works = contenders.dequantizing(weight, dtype)
        row(f"dequantize {kind}", works, n / 2 + constants + n * dtype.itemsize, turns)
        alone = race({"ours": works["ours"]}, turns)["ours"]  # in a loop, as the copy is
        rows[f"dequantize {kind}"]["alone"] = statistics.median(alone)
        for m in ROWS:
            fewer = turns if m < 64 else min(turns, 9)
            x, g = (torch.randn(m, side).to(dtype) for _ in range(2))
            row(f"forward {kind} {m}", contenders.multiplying(weight, x), n / 2 + constants, fewer)
            works = contenders.multiplying(weight, x, g)
            row(f"forward + backward {kind} {m}", works, n + 2 * constants, fewer)
            rows[f"forward + backward {kind} {m}"]["extra_bytes"] = {
                k: contenders.extra_bytes(w) for k, w in works.items()
            }
    return {"side": side, "rows": rows}


def optim(quick: bool) -> dict:
    """AdamW on a hundred million parameters."""
    count = 2**24 if quick else 6 * 2**24
    result = summary(race(contenders.updating(count), 3 if quick else 9))
    print(
        "optimizer step",
        *(f"{name} {1e3 * row['seconds']:.0f} ms" for name, row in result.items()),
        sep="   ",
        flush=True,
    )
    return {"parameters": count, "rows": result}


class Stepper:
    """A contender in a process of its own, which does one training step whenever it is asked."""

    def __init__(self, name: str) -> None:
        command, pipe = [sys.executable, "-m", "bench.peers", name], subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )
        while (line := self.process.stdout.readline()) != "ready\n":
            if not line:
                raise RuntimeError(f"{name} did not start: run {' '.join(command)}")

    def step(self, batch: int, length: int, checkpointing: bool = False) -> dict:
        self.process.stdin.write(f"{batch} {length} {int(checkpointing)}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()


def step(quick: bool) -> dict:
    """A training step of SmolLM2: 4 x 256 tokens, LoRA of rank 8 on all linear layers, bfloat16."""
    names = ["ours", "bitsandbytes", "bitsandbytes autocast", "dense", "dense autocast"]
    steppers, rows = {name: Stepper(name) for name in names}, {}
    for checkpointing in (False, True):
        seconds, peaks = {name: [] for name in names}, dict.fromkeys(names, 0)
        for turn in range(2 if quick else 6):
            for name in names:
                result = steppers[name].step(4, 256, checkpointing)
                seconds[name] += [result["seconds"]] if turn else []  # the first warms up
                peaks[name] = max(peaks[name], result["peak_bytes"])
        kind = "checkpointing" if checkpointing else "plain"
        rows[kind] = {
            name: row | {"peak_bytes": peaks[name]} for name, row in summary(seconds).items()
        }
        for name, row in rows[kind].items():
            print(
                f"step {kind:14} {name:22} {row['seconds']:.2f} s   {row['peak_bytes'] / 1e9:.2f} GB   "
                f"ours takes {row['ours_to_this']:.2f} of it",
                flush=True,
            )
    for stepper in steppers.values():
        stepper.close()
    return {"batch": 4, "length": 256, "rows": rows}


def growth(quick: bool) -> dict:
    """How a step's time and peak grow with length (batch 1) and batch (256 tokens), with and without checkpointing."""
    shapes = [(1, length) for length in LENGTHS] + [(batch, 256) for batch in BATCHES[1:]]
    stepper, rows = Stepper("ours"), []
    stepper.step(1, 128)
    for batch, length in shapes[:2] if quick else shapes:
        for checkpointing in (False, True):
            results = [stepper.step(batch, length, checkpointing) for _ in range(1 if quick else 3)]
            rows.append(
                {
                    "batch": batch,
                    "length": length,
                    "checkpointing": checkpointing,
                    "seconds": statistics.median(result["seconds"] for result in results),
                    "peak_bytes": max(result["peak_bytes"] for result in results),
                }
            )
            print("growth", rows[-1], flush=True)
    stepper.close()
    return {"rows": rows}


def machine() -> dict:
    """What the figures depend on."""
    info = (
        Path("/proc/cpuinfo")
        .read_text()
        .partition("model name")[2]
        .partition("\n")[0]
        .strip("\t :")
        or platform.processor()
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True
    ).stdout.strip()
    versions = {
        name: version(name)
        for name in ("torch", "numba", "transformers", "bitsandbytes", "peft", "torchao")
    }
    return {
        "cpu": info,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "commit": commit,
        "versions": versions,
    }


PARTS = {"ops": ops, "optim": optim, "step": step, "growth": growth}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", choices=[*PARTS, *bench_cuda.PARTS, []], help="default: all"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--quick", action="store_true", help="few turns, small sizes, nothing written"
    )
    args = parser.parse_args(argv)
    on_gpu = args.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("--device cuda needs an NVIDIA GPU that torch can see")
    parts = bench_cuda.parts() if on_gpu else PARTS
    path = RESULTS / f"{bench_cuda.card().lower().replace(' ', '-') if on_gpu else 'cpu'}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for name in args.parts or parts:
        found[name] = parts[name](args.quick) | {
            "machine": machine() | ({"card": bench_cuda.card()} if on_gpu else {})
        }
        if not args.quick:
            RESULTS.mkdir(exist_ok=True)
            path.write_text(json.dumps(found, indent=1) + "\n")
    if not args.quick:
        (figures.write_cuda if on_gpu else figures.write)(found)


if __name__ == "__main__":
    main()
