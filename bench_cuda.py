"""The numbers of a GPU: bench.py --device cuda, beside bitsandbytes and dense bfloat16 on the same card.

    ops       dequantize, quantize, and products of few rows and of many
    optim     an AdamW step, its state in unified memory, in ordinary memory, and torch's own
    step      a training step of LLaMA-7B's shapes, beside PEFT + bitsandbytes
    sizes     7B to 65B on 48 GB of the card: paper/memory_65b.py

What makes a figure fair here:

    events        the GPU's own clock, before and after; the host waits for nothing in between
    rotation      as many sets of buffers as it takes that no cache holds what the next call reads
    graphs        products of few rows are shorter than their launch, so a CUDA graph of all sets is replayed
    turns         contenders take turns, and a ratio is the median of the ratios of one turn
    ceilings      a large copy and a large product on the same card, by torch: what bytes and operations cost at least

Without a GPU the same code runs with the host's clock and tiny shapes, which measures nothing: it is how the tests rehearse it.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dispatch
import predict
from cuda_kernels import managed
from frozen import FrozenWeight
from paged_optim import PagedAdamW
from paper import memory_65b

Work = Callable[[], object]
LARGE, SMALL = (28672, 8192), (4096, 4096)  # (out, in)
FEW = [1, 2, 4, 8, 16, 32, 64]


class Clock:
    """Seconds by CUDA's events; by the host's clock where there is no GPU."""

    def __init__(self, device: str) -> None:
        self.device, self.on_gpu = torch.device(device), device == "cuda"
        self.cache = torch.cuda.get_device_properties(self.device).L2_cache_size if self.on_gpu else 0  # bytes

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
        """The work as one launch that repeats every kernel of it; it must have run before."""
        if not self.on_gpu:
            return work
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def sets(self, nbytes: float) -> int:
        """How many buffers of so many bytes it takes that four caches could not hold them."""
        return max(2, math.ceil(4 * self.cache / nbytes))


def race(contenders: list[dict[str, Work]], clock: Clock, turns: int, graphed: bool = False) -> dict[str, dict]:
    """Median seconds of a call of each contender, and ours / theirs. Each turn makes one call on each set of buffers."""
    names, runs = list(contenders[0]), {}
    for name in names:
        calls = [contender[name] for contender in contenders]
        runs[name] = partial(all_of, calls)
        runs[name]()  # compiles, and asks for memory
        runs[name] = clock.graph(runs[name]) if graphed else runs[name]
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(turns + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds = clock.seconds(runs[name]) / len(contenders)
            times[name] += [seconds] if turn else []  # the first warms up
    return {name: {"seconds": statistics.median(each), "spread": [min(each), max(each)],
                   "ours_to_this": statistics.median(mine / other for mine, other in zip(times["ours"], each))}
            for name, each in times.items()}


def all_of(calls: list[Work]) -> None:
    for call in calls:
        call()


def ceilings(clock: Clock, quick: bool) -> dict[str, float]:
    """What torch reaches here: bytes a second of a copy, read and written, and operations a second of a bfloat16 product."""
    source = torch.randn(2**16 if quick else 2**28, device=clock.device)
    target = torch.empty_like(source)
    side = 128 if quick else 8192
    a, b = (torch.randn(side, side, device=clock.device).bfloat16() for _ in range(2))
    copy = race([{"ours": partial(target.copy_, source)}] * 4, clock, 5)["ours"]["seconds"]
    product = race([{"ours": partial(torch.mm, a, b)}] * 4, clock, 5)["ours"]["seconds"]
    return {"bytes_per_second": 2 * source.nbytes / copy, "operations_per_second": 2 * side**3 / product}


class Contenders:
    """One weight, as each contender keeps it."""

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        import bitsandbytes.functional as bnb

        self.weight = torch.randn(shape, device=device).mul_(0.02).bfloat16()
        self.base = FrozenWeight(self.weight)
        self.quantized, self.constants = self.base.stored()
        self.packed, self.state = bnb.quantize_4bit(self.weight, blocksize=64, quant_type="nf4", compress_statistics=True)
        self.out = torch.empty_like(self.weight)

    def quantizing(self) -> dict[str, Work]:
        import bitsandbytes.functional as bnb

        return {"ours": partial(dispatch.quantize, self.weight),
                "bitsandbytes": partial(bnb.quantize_4bit, self.weight, blocksize=64, quant_type="nf4")}

    def dequantizing(self) -> dict[str, Work]:
        import bitsandbytes.functional as bnb

        return {"ours": partial(dispatch.dequantize, self.quantized, constants=self.constants, out=self.out),
                "bitsandbytes": partial(bnb.dequantize_4bit, self.packed, self.state, out=self.out)}

    def multiplying(self, rows: int) -> dict[str, Work]:
        """x W^T, nothing to be kept for a gradient."""
        x = torch.randn(rows, self.weight.shape[1], device=self.weight.device).bfloat16()
        works = {"ours": partial(self.base.matmul, x), "bitsandbytes": partial(self.theirs, x), "dense": partial(F.linear, x, self.weight)}
        return {name: torch.no_grad()(work) for name, work in works.items()}

    def theirs(self, x: Tensor) -> Tensor:
        import bitsandbytes

        return bitsandbytes.matmul_4bit(x, self.packed.t(), quant_state=self.state)

    def both_ways(self, rows: int) -> dict[str, Work]:
        """x W^T and the gradient of x."""
        x, g = (torch.randn(rows, side, device=self.weight.device).bfloat16() for side in self.weight.shape[::-1])

        def once(product: Callable[[Tensor], Tensor]) -> Tensor:
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(product(leaf), leaf, g)[0]

        return {"ours": partial(once, self.base.matmul), "bitsandbytes": partial(once, self.theirs),
                "dense": partial(once, partial(F.linear, weight=self.weight))}


def ops(clock: Clock, quick: bool) -> dict:
    """Each row: seconds a call of each contender, and the bytes or operations that the call cannot do without."""
    rows, turns = {}, 3 if quick else 20
    for shape in [(128, 64), (64, 64)] if quick else [LARGE, SMALL]:
        n, (height, width) = math.prod(shape), shape
        packed = n / 2 + n / 64 + n / 64 / 64
        weights = [Contenders(shape, clock.device) for _ in range(clock.sets(packed))]

        def row(name: str, works: list[dict[str, Work]], **least: float) -> None:
            rows[f"{name} {height}x{width}"] = race(works, clock, turns, graphed="forward +" not in name) | least  # noqa: B023
            print(f"{name:22} {height}x{width}  " + "   ".join(  # noqa: B023
                f"{who} {1e6 * v['seconds']:.1f} us" for who, v in rows[f"{name} {height}x{width}"].items() if who not in least))  # noqa: B023

        if shape != SMALL:
            row("quantize", [weight.quantizing() for weight in weights], bytes=2 * n + n / 2 + n / 16)
            row("dequantize", [weight.dequantizing() for weight in weights], bytes=packed + 2 * n)
        for m in FEW:
            row(f"matmul {m}", [weight.multiplying(m) for weight in weights], bytes=packed + 2 * m * (height + width))
        row("forward + backward 2048", [weight.both_ways(16 if quick else 2048) for weight in weights], operations=4 * 2048 * n)
    return {"ceilings": ceilings(clock, quick), "rows": rows}
