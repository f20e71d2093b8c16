"""The numbers of a GPU, next to bitsandbytes and dense bfloat16 on the same card, in four parts.

    ops       dequantize, quantize, and matmuls of few rows and of many
    optim     an AdamW step, with its state in unified and in ordinary memory, and torch's own
    step      a training step of LLaMA-7B's shapes, 16 x 512 tokens, also by PEFT + bitsandbytes
    sizes     7B to 65B in 48 GB of the card (capped_run.py)

What makes the comparison fair:

    events       the GPU's own clock, before and after; the host does not wait in between
    rotation     so many sets of buffers that no cache holds what the next call reads
    graphs       a matmul of few rows is shorter than its launch: one CUDA graph launches all sets
    turns        peers take turns (turns.py); ratios are medians of the ratios of one turn
    ceilings     torch's copy and matmul of large tensors on the same card: the minimum for bytes
                 and for operations

Without a GPU the same code runs with the host's clock and tiny shapes, so that tests can run it;
its numbers then mean nothing.
"""

import gc
import math
import statistics
from collections.abc import Callable
from functools import partial

import torch

from bench import capped_run, peers_cuda, random_llama
from bench.capped_run import RANK, TINY
from bench.peers import trainable
from bench.peers_cuda import Layer
from bench.turns import Work, host_seconds, ours_to_this, take_turns
from memory.formula import SHAPES
from memory.measured import measure_peak
from paged_optim import PagedAdamW

# (out, in): the largest layers of a 70B model, and a square one of a 7B
LAYERS = [(28672, 8192), (4096, 4096)]
TINY_LAYERS = [(128, 64), (64, 64)]
FEW = [1, 2, 4, 8, 16, 32, 64]
MANY = 2048


class Clock:
    """Seconds by the GPU's events; by the host's clock where there is no GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.cache = 0  # bytes of the L2 cache
        if self.on_gpu:
            self.cache = torch.cuda.get_device_properties(device).L2_cache_size

    def seconds(self, work: Work) -> float:
        if not self.on_gpu:
            return host_seconds(work)
        before = torch.cuda.Event(enable_timing=True)
        after = torch.cuda.Event(enable_timing=True)
        before.record()
        work()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3

    def graph(self, work: Work) -> Work:
        """The kernels of `work` as one launch.

        `work` must have run before: a graph can neither compile nor wait.
        """
        if not self.on_gpu:
            return work
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def sets(self, nbytes: float) -> int:
        """How many sets of `nbytes` are four times the size of the cache; at least two."""
        return max(2, math.ceil(4 * self.cache / nbytes))


def race(
    sets: list[dict[str, Work]], clock: Clock, turns: int, graphed: bool = False
) -> dict[str, dict]:
    """Seconds per call of each peer, and ours relative to it; a turn is one call on each set."""
    runs: dict[str, Work] = {}
    for name in sets[0]:
        run = partial(call_all, [works[name] for works in sets])
        run()  # compiles, and allocates
        runs[name] = clock.graph(run) if graphed else run
    all_turns = take_turns(runs, turns + 1, lambda run: clock.seconds(run) / len(sets))
    seconds = {name: times[1:] for name, times in all_turns.items()}  # the first turn warms up
    return {
        name: {
            "seconds": statistics.median(times),
            "range": [min(times), max(times)],
            "ours_to_this": ours_to_this(seconds, name),
        }
        for name, times in seconds.items()
    }


def call_all(works: list[Work]) -> None:
    for work in works:
        work()


def ceilings(clock: Clock, quick: bool) -> dict[str, float]:
    """What torch reaches: bytes per second, read and written, and operations per second."""
    source = torch.randn(2**12 if quick else 2**28, device=clock.device)
    target = torch.empty_like(source)
    side = 64 if quick else 8192
    a = torch.randn(side, side, device=clock.device).bfloat16()
    b = torch.randn(side, side, device=clock.device).bfloat16()
    copy = race([{"ours": partial(target.copy_, source)}] * 4, clock, 5)["ours"]["seconds"]
    product = race([{"ours": partial(torch.mm, a, b)}] * 4, clock, 5)["ours"]["seconds"]
    return {
        "bytes_per_second": 2 * source.nbytes / copy,
        "operations_per_second": 2 * side**3 / product,
    }


def ops(clock: Clock, quick: bool) -> dict:
    """Rows of seconds of each peer, and the bytes or operations that no peer can do without."""
    rows: dict[str, dict] = {}
    for shape in TINY_LAYERS if quick else LAYERS:
        rows |= layer_ops(shape, clock, quick)
    return {"ceilings": ceilings(clock, quick), "rows": rows}


def layer_ops(shape: tuple[int, int], clock: Clock, quick: bool) -> dict[str, dict]:
    """The rows of one layer (out, in)."""
    rows: dict[str, dict] = {}

    def measure(
        name: str, sets: list[dict[str, Work]], graphed: bool = False, **least: float
    ) -> None:
        row = race(sets, clock, 3 if quick else 20, graphed)
        times = (f"{who} {1e6 * entry['seconds']:.1f} us" for who, entry in row.items())
        print(f"{name:36}", *times, sep="   ", flush=True)
        rows[name] = row | least

    n_out, n_in = shape
    where = f"{n_out} x {n_in}"
    n = n_out * n_in
    packed = n / 2 + n / 64 + n / 64 / 64  # bytes of the codes and their constants
    layers = [Layer(shape, clock.device) for _ in range(clock.sets(packed))]
    if n_out != n_in:
        dequantizing = [layer.dequantizing() for layer in layers]
        measure(f"dequantize {where}", dequantizing, bytes=packed + 2 * n)
        quantizing = [layer.quantizing() for layer in layers]
        measure(f"quantize {where}", quantizing, bytes=2 * n + n / 2 + n / 16)
    for m in FEW:
        multiplying = [layer.multiplying(m) for layer in layers]
        least = packed + 2 * m * (n_out + n_in)
        measure(f"matmul {m}, {where}", multiplying, graphed=True, bytes=least)
    many = 4 if quick else MANY
    both_ways = [layer.both_ways(many) for layer in layers]
    measure(f"forward + backward {MANY}, {where}", both_ways, operations=4 * many * n)
    return rows


def optim(clock: Clock, quick: bool) -> dict:
    """28 bytes per element: parameter, gradient, moments read; all but the gradient written."""
    count = 2**10 if quick else 2**27
    rows = race([peers_cuda.updating(count, clock.device)], clock, 3 if quick else 10)
    times = (f"{who} {1e3 * entry['seconds']:.2f} ms" for who, entry in rows.items())
    print("optim", *times, sep="   ", flush=True)
    return {
        "ceilings": ceilings(clock, quick),
        "parameters": count,
        "bytes": 28 * count,
        "rows": rows,
    }


def step(clock: Clock, quick: bool) -> dict:
    """Tokens per second and the peak, one peer after the other, since memory is compared too."""
    shape = TINY if quick else SHAPES["llama-7b"]
    size = (2, 16) if quick else (16, 512)
    ids = torch.randint(0, shape.vocabulary, size, device=clock.device)
    repeats = 2 if quick else 5
    rows = {}

    def measure(who: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if who == "ours":
            work = partial(capped_run.train_step, model, optimizer, ids, len(ids))
        else:
            work = partial(peers_cuda.peft_step, model, optimizer, ids)
        work()  # compiles, and creates the moments
        _, peak = measure_peak(work, model, optimizer, clock.device)
        seconds = statistics.median(clock.seconds(work) for _ in range(repeats))
        speed = ids.numel() / seconds
        rows[who] = {"seconds": seconds, "tokens_per_second": speed, "peak_bytes": peak}
        print(f"step {who}   {speed:.0f} tokens/s   {peak / 1e9:.2f} GB", flush=True)

    torch.manual_seed(0)
    model = random_llama.build(shape, RANK, clock.device)
    measure("ours", model, PagedAdamW(trainable(model), lr=1e-4))
    del model
    gc.collect()  # the optimizer refers to itself
    torch.manual_seed(0)
    model = peers_cuda.peft_model(shape, RANK, clock.device)
    fused = torch.optim.AdamW(trainable(model), lr=1e-4, fused=True)
    measure("PEFT + bitsandbytes", model, fused)
    return {"batch": ids.shape[0], "length": ids.shape[1], "rows": rows}


def sizes(clock: Clock, quick: bool) -> dict:
    """Every size of the paper that fits the card."""
    rows = []
    for name in ["tiny"] if quick else SHAPES:
        for batch in capped_run.BATCHES:
            try:
                rows.append(capped_run.compare(name, batch, clock.device))
            except ValueError as error:  # the card has less than 48 GB
                print(f"{name}: {error}", flush=True)
    return {"rows": rows}


PARTS: dict[str, Callable[[Clock, bool], dict]] = {
    "ops": ops,
    "optim": optim,
    "step": step,
    "sizes": sizes,
}


def parts() -> dict[str, Callable[[bool], dict]]:
    """PARTS on the card that torch has chosen, with the arguments of those of cpu.py."""
    clock = Clock(torch.device("cuda"))
    return {name: partial(part, clock) for name, part in PARTS.items()}


def card() -> str:
    return torch.cuda.get_device_name()
