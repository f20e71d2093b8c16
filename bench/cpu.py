"""The numbers of a CPU, in five parts.

    ops       single operations on one layer: quantize, dequantize, matmul
    optim     an AdamW step
    step      a training step of SmolLM2
    growth    how a training step grows with length and batch
    size      how a training step grows with length and the size of the model, ours and PEFT's

What makes the comparison fair:

    turns        peers take turns (turns.py); ratios are medians of the ratios of one turn
    medians      of many turns, with the quartiles in the JSON
    bytes        an operation is also compared with a plain copy of the bytes it must move
    processes    where memory is measured, each peer runs in its own process

The first call of each peer compiles kernels and warms up libraries, and is not timed.
"""

import statistics

import torch

from bench import peers
from bench.step_process import OutOfMemory, Stepper
from bench.turns import Work, host_seconds, ours_to_this, take_turns

ROWS = [1, 4, 16, 64, 256, 1024]
LENGTHS = [128, 256, 512, 1024, 2048]
BATCHES = [1, 2, 4, 8, 16]
# Sizes of random_llama.SIZES, and tokens of the one sequence
MODELS = [
    ("135M", 512),
    ("360M", 512),
    ("1.1B", 512),
    ("135M", 1024),
    ("135M", 2048),
    ("135M", 4096),
]


def race(works: dict[str, Work], turns: int) -> dict[str, list[float]]:
    """Seconds of each turn of each peer, after a call that is not timed."""
    for work in works.values():
        work()
    return take_turns(works, turns, host_seconds)


def summary(seconds: dict[str, list[float]]) -> dict[str, dict]:
    """Of each peer: the median, the quartiles, and the time of ours relative to it."""
    result = {}
    for name, times in seconds.items():
        low = middle = high = times[0]
        if len(times) > 1:
            low, middle, high = statistics.quantiles(times, n=4)
        result[name] = {
            "seconds": middle,
            "quartiles": [low, high],
            "ours_to_this": ours_to_this(seconds, name),
        }
    return result


def bandwidth(turns: int) -> float:
    """Bytes per second, read and written, of copying a tensor larger than any cache."""
    source = torch.ones(2**26)
    target = torch.empty(2**26)
    times = race({"copy": lambda: target.copy_(source)}, turns)["copy"]
    return 2 * source.nbytes / statistics.median(times)


def ops(quick: bool) -> dict:
    """Quantize, dequantize, matmul: a 4096 x 4096 layer, block 64, double quantization."""
    side = 1024 if quick else 4096
    turns = 5 if quick else 30
    torch.manual_seed(0)
    weight = torch.randn(side, side) * 0.05
    n = weight.numel()
    constants = n / 64 * (1 + 4 / 256)
    stored = n / 2 + constants  # bytes

    rows = {"copy": {"bytes_per_second": bandwidth(turns)}}
    quantizing = peers.quantizing(weight)
    rows["quantize float32"] = measure_op(
        "quantize float32", quantizing, min(turns, 7), 4 * n + stored
    )
    for dtype in (torch.bfloat16, torch.float32):
        kind = str(dtype).removeprefix("torch.")
        name = f"dequantize {kind}"
        dequantizing = peers.dequantizing(weight, dtype)
        rows[name] = measure_op(name, dequantizing, turns, stored + n * dtype.itemsize)
        alone = race({"ours": dequantizing["ours"]}, turns)["ours"]  # in a loop, like the copy
        rows[name]["alone"] = statistics.median(alone)
        for m in ROWS:
            m_turns = turns if m < 64 else min(turns, 9)
            x = torch.randn(m, side).to(dtype)
            g = torch.randn(m, side).to(dtype)
            name = f"forward {kind} {m}"
            rows[name] = measure_op(name, peers.multiplying(weight, x), m_turns, stored)
            name = f"forward + backward {kind} {m}"
            both = peers.multiplying(weight, x, g)
            rows[name] = measure_op(name, both, m_turns, 2 * stored)
            rows[name]["extra_bytes"] = {who: peers.extra_bytes(work) for who, work in both.items()}
    return {"side": side, "rows": rows}


def measure_op(name: str, works: dict[str, Work], turns: int, nbytes: float) -> dict:
    """One row of `ops`, which is printed too; nbytes: what the operation must move."""
    row = summary(race(works, turns))
    print_row(name, row)
    return row | {"bytes": nbytes}


def print_row(name: str, row: dict[str, dict]) -> None:
    times = (f"{who} {1e3 * entry['seconds']:.2f} ms" for who, entry in row.items())
    print(f"{name:33}", *times, sep="   ", flush=True)


def optim(quick: bool) -> dict:
    """AdamW on a hundred million parameters."""
    count = 2**24 if quick else 6 * 2**24
    rows = summary(race(peers.updating(count), 3 if quick else 9))
    times = (f"{name} {1e3 * row['seconds']:.0f} ms" for name, row in rows.items())
    print("optimizer step", *times, sep="   ", flush=True)
    return {"parameters": count, "rows": rows}


def step(quick: bool) -> dict:
    """A training step of SmolLM2: 4 x 256 tokens, LoRA of rank 8 on all linear layers, bfloat16."""
    names = ["ours", "bitsandbytes", "bitsandbytes autocast", "dense", "dense autocast"]
    return steps_of_smollm({name: name for name in names}, quick)


def steps_of_smollm(names: dict[str, str], quick: bool) -> dict:
    """Steps of 4 x 256 tokens. names: from the name in the table to that of step_process.py."""
    steppers = {name: Stepper(process) for name, process in names.items()}
    rows = {}
    for kind in ("plain", "checkpointing"):
        rows[kind] = step_rows(steppers, kind == "checkpointing", turns=2 if quick else 6)
        for name, row in rows[kind].items():
            print(
                f"step {kind:14} {name:22} {row['seconds']:.2f} s   "
                f"{row['peak_bytes'] / 1e9:.2f} GB   ours takes {row['ours_to_this']:.2f} of it",
                flush=True,
            )
    for stepper in steppers.values():
        stepper.close()
    return {"batch": 4, "length": 256, "rows": rows}


def step_rows(steppers: dict[str, Stepper], checkpointing: bool, turns: int) -> dict[str, dict]:
    """Seconds and peak of the steps of each peer; the first turn warms up and is not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    peaks = dict.fromkeys(steppers, 0)
    for turn in range(turns):
        for name, stepper in steppers.items():
            result = stepper.step(4, 256, checkpointing)
            peaks[name] = max(peaks[name], result["peak_bytes"])
            if turn > 0:
                seconds[name].append(result["seconds"])
    return {name: row | {"peak_bytes": peaks[name]} for name, row in summary(seconds).items()}


def growth(quick: bool) -> dict:
    """Time and peak of a step by length (batch 1) and by batch (256 tokens)."""
    shapes = [(1, length) for length in LENGTHS] + [(batch, 256) for batch in BATCHES[1:]]
    if quick:
        shapes = shapes[:2]
    rows = []
    stepper = Stepper("ours")
    stepper.step(1, 128)
    for batch, length in shapes:
        for checkpointing in (False, True):
            repeats = 1 if quick else 3
            results = [stepper.step(batch, length, checkpointing) for _ in range(repeats)]
            row = {
                "batch": batch,
                "length": length,
                "checkpointing": checkpointing,
            }
            row |= cost_of(results)
            rows.append(row)
            print("growth", row, flush=True)
    stepper.close()
    return {"rows": rows}


def cost_of(results: list[dict]) -> dict[str, float]:
    """The median seconds and the largest peak of some steps."""
    return {
        "seconds": statistics.median(result["seconds"] for result in results),
        "peak_bytes": max(result["peak_bytes"] for result in results),
    }


def size(quick: bool) -> dict:
    """Time and peak of a step of one sequence by model, ours and PEFT's with bitsandbytes."""
    rows = []
    for model, length in [("tiny", 64)] if quick else MODELS:
        row = {"model": model, "length": length}
        for name in ("ours", "bitsandbytes autocast"):
            row[name] = steps_of(name, model, length, repeats=1 if quick else 3)
        rows.append(row)
        print("size", row, flush=True)
    return {"rows": rows}


def steps_of(name: str, model: str, length: int, repeats: int) -> dict[str, dict | None]:
    """Seconds and peak of a step with and without checkpointing; None where memory ran out."""
    found: dict[str, dict | None] = {"checkpointing": None, "plain": None}
    try:
        stepper = Stepper(name, model)
        stepper.step(1, length, checkpointing=True)  # warms up
        for kind in found:  # checkpointing takes less memory, so it is first
            results = [stepper.step(1, length, kind == "checkpointing") for _ in range(repeats)]
            found[kind] = cost_of(results)
        stepper.close()
    except OutOfMemory:
        pass
    return found


PARTS = {"ops": ops, "optim": optim, "step": step, "growth": growth, "size": size}
