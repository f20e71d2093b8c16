"""The numbers of a GPU, beside bitsandbytes and dense bfloat16 on the same card: bench.py --device cuda, in four parts.

    ops       dequantize, quantize, and products of few rows and of many
    optim     an AdamW step, with its state in unified memory and in ordinary memory, and torch's own
    step      a training step on the shapes of LLaMA-7B, 16 x 512 tokens, beside PEFT + bitsandbytes
    sizes     7B to 65B in 48 GB of the card (paper/memory_65b.py)

What makes a figure fair here:

    events       the GPU's own clock, before and after; the host waits for nothing in between
    rotation     as many sets of buffers as it takes that no cache holds what the next call reads
    graphs       a product of few rows is shorter than its launch, so a CUDA graph of all sets is replayed
    turns        contenders take turns, and a ratio is the median of the ratios of one turn
    ceilings     a large copy and a large product on the same card, by torch: what bytes and operations cost at least

Without a GPU the same code runs with the host's clock and tiny shapes. That measures nothing: it is how it is rehearsed.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from bench import peers_cuda as contenders_cuda
from bench import random_llama
from bench.peers_cuda import Layer, Work
from memory import formula as predict
from memory.weigh import peak_of
from paged_optim import PagedAdamW
from paper import memory_65b

SHAPES = [
    (28672, 8192),
    (4096, 4096),
]  # (out, in): the largest layers of a 70B model, and a square one of a 7B
TINY = [(128, 64), (64, 64)]
FEW = [1, 2, 4, 8, 16, 32, 64]
MANY = 2048
DEVICE = "cuda"


class Clock:
    """Seconds by the GPU's events; by the host's clock where there is no GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"
        self.cache = (
            torch.cuda.get_device_properties(device).L2_cache_size if self.on_gpu else 0
        )  # bytes

    def seconds(self, work: Work) -> float:
        if not self.on_gpu:
            began = time.perf_counter()
            work()
            return time.perf_counter() - began
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        work()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3

    def graph(self, work: Work) -> Work:
        """The kernels of this work as one launch. It must have run before: a graph can neither compile nor wait."""
        if not self.on_gpu:
            return work
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def sets(self, nbytes: float) -> int:
        """How many sets of so many bytes are four times what the cache holds; at least two."""
        return max(2, math.ceil(4 * self.cache / nbytes))


def race(
    sets: list[dict[str, Work]], clock: Clock, turns: int, graphed: bool = False
) -> dict[str, dict]:
    """Seconds a call of each contender, and the ratio of ours to theirs: medians of turns of one call on each set."""
    names, runs = list(sets[0]), {}
    for name in names:
        runs[name] = partial(call_all, [works[name] for works in sets])
        runs[name]()  # compiles, and asks for memory
        runs[name] = clock.graph(runs[name]) if graphed else runs[name]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(turns + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            took = clock.seconds(runs[name]) / len(sets)
            seconds[name] += [took] if turn else []  # the first warms up
    return {
        name: {
            "seconds": statistics.median(times),
            "range": [min(times), max(times)],
            "ours_to_this": statistics.median(
                mine / other for mine, other in zip(seconds["ours"], times)
            ),
        }
        for name, times in seconds.items()
    }


def call_all(works: list[Work]) -> None:
    for work in works:
        work()


def ceilings(clock: Clock, quick: bool) -> dict[str, float]:
    """What torch reaches here: bytes a second of a copy, read and written ones, and operations a second of a product."""
    source = torch.randn(2**12 if quick else 2**28, device=clock.device)
    target, side = torch.empty_like(source), 64 if quick else 8192
    a, b = (torch.randn(side, side, device=clock.device).bfloat16() for _ in range(2))
    copy, product = (
        race([{"ours": work}] * 4, clock, 5)["ours"]["seconds"]
        for work in (partial(target.copy_, source), partial(torch.mm, a, b))
    )
    return {
        "bytes_per_second": 2 * source.nbytes / copy,
        "operations_per_second": 2 * side**3 / product,
    }


def ops(clock: Clock, quick: bool) -> dict:
    """Of each row: seconds of each contender, and the bytes or operations that no contender can do without."""
    rows: dict[str, dict] = {}

    def row(name: str, sets: list[dict[str, Work]], graphed: bool = False, **least: float) -> None:
        rows[name] = race(sets, clock, 3 if quick else 20, graphed)
        times = (f"{who} {1e6 * entry['seconds']:.1f} us" for who, entry in rows[name].items())
        print(f"{name:36}", *times, sep="   ", flush=True)
        rows[name] |= least

    for shape in TINY if quick else SHAPES:
        (height, width), n = shape, math.prod(shape)
        packed, where = n / 2 + n / 64 + n / 64 / 64, f"{height} x {width}"
        layers = [Layer(shape, clock.device) for _ in range(clock.sets(packed))]
        if height != width:
            row(
                f"dequantize {where}",
                [layer.dequantizing() for layer in layers],
                bytes=packed + 2 * n,
            )
            row(
                f"quantize {where}",
                [layer.quantizing() for layer in layers],
                bytes=2 * n + n / 2 + n / 16,
            )
        for rows_of_x in FEW:
            sets = [layer.multiplying(rows_of_x) for layer in layers]
            row(
                f"matmul {rows_of_x}, {where}",
                sets,
                True,
                bytes=packed + 2 * rows_of_x * (height + width),
            )
        many = 4 if quick else MANY
        row(
            f"forward + backward {MANY}, {where}",
            [layer.both_ways(many) for layer in layers],
            operations=4 * many * n,
        )
    return {"ceilings": ceilings(clock, quick), "rows": rows}


def optim(clock: Clock, quick: bool) -> dict:
    """28 bytes an element: parameter, gradient and moments are read, and all but the gradient are written."""
    count = 2**10 if quick else 2**27
    rows = race([contenders_cuda.updating(count, clock.device)], clock, 3 if quick else 10)
    print(
        "optim   "
        + "   ".join(f"{who} {1e3 * entry['seconds']:.2f} ms" for who, entry in rows.items()),
        flush=True,
    )
    return {
        "ceilings": ceilings(clock, quick),
        "parameters": count,
        "bytes": 28 * count,
        "rows": rows,
    }


def step(clock: Clock, quick: bool) -> dict:
    """Tokens a second and the peak, of one contender after the other, because memory is what they differ in."""
    shape = memory_65b.TINY if quick else predict.SHAPES["llama-7b"]
    ids = torch.randint(0, shape.vocabulary, (2, 16) if quick else (16, 512), device=clock.device)
    rows = {}
    for who in ("ours", "PEFT + bitsandbytes"):
        torch.manual_seed(0)
        if who == "ours":
            model = random_llama.build(shape, memory_65b.RANK, clock.device)
            optimizer = PagedAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
            work = partial(memory_65b.step, model, optimizer, ids, len(ids))
        else:
            model = contenders_cuda.peft_model(shape, memory_65b.RANK, clock.device)
            optimizer = torch.optim.AdamW(
                [p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True
            )
            work = partial(contenders_cuda.peft_step, model, optimizer, ids)
        work()  # compiles, and makes the moments
        _, peak = peak_of(work, model, optimizer, clock.device)
        seconds = statistics.median(clock.seconds(work) for _ in range(2 if quick else 5))
        rows[who] = {
            "seconds": seconds,
            "tokens_per_second": ids.numel() / seconds,
            "peak_bytes": peak,
        }
        print(
            f"step {who}   {rows[who]['tokens_per_second']:.0f} tokens/s   {peak / 1e9:.2f} GB",
            flush=True,
        )
        del model, optimizer, work
        gc.collect()
    return {"batch": ids.shape[0], "length": ids.shape[1], "rows": rows}


def sizes(clock: Clock, quick: bool) -> dict:
    """Every size of the paper that fits the card."""
    names = ["tiny"] if quick else list(predict.SHAPES)
    rows = []
    for name in names:
        for batch in memory_65b.BATCHES:
            try:
                rows.append(memory_65b.compare(name, batch, clock.device))
            except ValueError as error:  # the card is smaller than 48 GB
                print(f"{name}: {error}", flush=True)
    return {"rows": rows}


PARTS: dict[str, Callable[[Clock, bool], dict]] = {
    "ops": ops,
    "optim": optim,
    "step": step,
    "sizes": sizes,
}


def parts() -> dict[str, Callable[[bool], dict]]:
    """PARTS on the card that torch has chosen, as bench.py takes them."""
    clock = Clock(torch.device(DEVICE))
    return {name: partial(part, clock) for name, part in PARTS.items()}


def card() -> str:
    return torch.cuda.get_device_name()
