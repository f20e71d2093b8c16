"""A paged optimizer is as fast as a resident one; how slow it is when it pages was left open.

Claim (section 3): at 65B, batch 16 and 48 GB, training with the paged optimizer is as fast as with
a regular one. The paper leaves open what a step costs when pages do move.

Here: adapters of rank 64 on every linear layer, AdamW's state in pages of 2 MiB, and budgets from
all of it down to 5 %. The step of the optimizer is timed at each budget; forward and backward do
not depend on it, so they are timed once. A repetition times all budgets in turn and takes the
fastest of three steps each, and the ratios are those of one repetition. Other programs disturb the
times, so nothing else should run.

A long sequence makes the activations peak: for one step, all pages must leave. The right panel
shows the steps around it. The pager uses the page that was not used for longest as the first to
leave, while a step visits all pages in a fixed order. So the cost is a cliff and not a slope.

Differs from the paper: a small model on a processor, and a mapped file as the store. What moves is
counted; whether it reaches a disk is up to the operating system's cache.
"""

import statistics
import time
from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import AutoModelForCausalLM

from lora import attach
from paged_optim import PagedAdamW
from paper import experiment
from paper.experiment import Finding, Setting
from paper.small_base import trainable

BUDGETS = [1.0, 0.9, 0.75, 0.5, 0.25, 0.1, 0.05]  # of the state
RESIDENT = "torch.optim.AdamW"
ALL_FIT = "100%"
PAGE = 2**21  # bytes
STEPS = 3  # of which the fastest counts
MARGIN = 0.05  # of the time of a training step
SPIKE = 5  # the step with the long sequence
TOKENS = [(1, 128), (4, 256)]  # batch, length


def compute(setting: Setting) -> dict:
    torch.manual_seed(setting.seeds.start)
    model = AutoModelForCausalLM.from_pretrained(setting.model, dtype=torch.float32)
    attach(model, r=8 if setting.quick else 64)
    model = model.to(setting.device)
    sizes = TOKENS[:1] if setting.quick else TOKENS
    passes = {f"{batch} x {length}": time_pass(model, batch, length) for batch, length in sizes}
    parameters = trainable(model)  # with the gradients of the last pass
    state = sum(2 * parameter.numel() * parameter.element_size() for parameter in parameters)
    makers: dict[str, Callable[[], Optimizer]] = {RESIDENT: lambda: torch.optim.AdamW(parameters)}
    for budget in BUDGETS:
        makers[f"{budget:.0%}"] = lambda budget=budget: paged(parameters, budget * state)
    makers["5%, no prefetch"] = lambda: without_prefetch(paged(parameters, 0.05 * state))
    rows: dict = {name: {"seconds": []} for name in makers}
    for _ in setting.seeds:
        for name, make in makers.items():
            seconds, rows[name]["moved"] = measure(make())
            rows[name]["seconds"].append(seconds)
    spikes = []
    for _ in setting.seeds:
        tries = zip(*(spike(parameters, state) for _ in range(STEPS)))
        spikes.append([min(seconds) for seconds in tries])
    return {"state": state, "passes": passes, "rows": rows, "spikes": spikes}


def time_pass(model: nn.Module, batch: int, length: int) -> float:
    """The seconds of a forward and a backward pass: the fastest of two."""
    ids = torch.randint(model.config.vocab_size, (batch, length), device=model.device)
    seconds = []
    for _ in range(2):
        model.zero_grad()
        began = clock()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        seconds.append(clock() - began)
    return min(seconds)


def paged(parameters: list[Tensor], budget: float) -> PagedAdamW:
    return PagedAdamW(parameters, page_bytes=PAGE, resident_bytes=max(PAGE, int(budget)))


def without_prefetch(optimizer: PagedAdamW) -> PagedAdamW:
    optimizer.pager.prefetch = lambda pages: None
    return optimizer


def measure(optimizer: Optimizer) -> tuple[float, dict[str, int]]:
    """The seconds of the fastest of a few steps, and what the pager counts in one step."""
    optimizer.step()  # creates the pages
    before = dict(getattr(optimizer, "counters", {}))
    seconds = min(time_step(optimizer) for _ in range(STEPS))
    after = getattr(optimizer, "counters", {})
    return seconds, {name: (count - before[name]) // STEPS for name, count in after.items()}


def time_step(optimizer: Optimizer) -> float:
    began = clock()
    optimizer.step()
    return clock() - began


def clock() -> float:
    """Seconds on the wall; on a GPU, when its work is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def spike(parameters: list[Tensor], state: int) -> list[float]:
    """The seconds of steps; before one of them, a long sequence has driven all pages out."""
    optimizer = paged(parameters, 0)  # so that there is a store
    pager = optimizer.pager
    seconds = []
    for step in range(2 * SPIKE):
        pager.budget = state
        if step == SPIKE:
            while pager.cache:
                pager._evict()
        seconds.append(time_step(optimizer))
    return seconds


def slowdowns(results: dict, name: str, reference: str, tokens: str) -> list[float]:
    """The time of a whole training step against that with the reference, in each repetition."""
    work = results["passes"][tokens]
    pairs = zip(results["rows"][name]["seconds"], results["rows"][reference]["seconds"])
    return [(work + paged) / (work + resident) - 1 for paged, resident in pairs]


def largest(results: dict) -> str:
    """The batch with the most tokens that was timed."""
    return list(results["passes"])[-1]


def table(results: dict) -> str:
    rows = []
    for name, row in results["rows"].items():
        moved = row["moved"]
        megabytes = (moved["bytes_in"] + moved["bytes_out"]) / 1e6 if moved else None
        line = [name, f"{1e3 * statistics.median(row['seconds']):.1f}", moved.get("faults")]
        line += [None if megabytes is None else f"{megabytes:.0f}"]
        for tokens in results["passes"]:
            mean = experiment.interval(slowdowns(results, name, RESIDENT, tokens))
            line.append(f"{mean.mean:+.1%} ({mean.span('+.1%')})")
        rows.append(line)
    header = ["resident", "optimizer step, ms", "faults a step", "MB moved a step"]
    header += [f"whole step of {tokens} tokens, against torch" for tokens in results["passes"]]
    works = ", ".join(f"{tokens} tokens: {s:.2f} s" for tokens, s in results["passes"].items())
    return (
        f"{experiment.markdown(header, rows)}\n\nThe state is {results['state'] / 1e6:.0f} MB. "
        f"Forward and backward, {works}. The paper has one row: all resident, the same speed."
    )


def draw(results: dict, figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    names = [f"{budget:.0%}" for budget in BUDGETS]
    for tokens in results["passes"]:
        percent = [[100 * s for s in slowdowns(results, n, ALL_FIT, tokens)] for n in names]
        means = [experiment.interval(values) for values in percent]
        places = [100 * budget for budget in BUDGETS]
        experiment.errorbars(left, places, means, fmt="o-", label=f"{tokens} tokens a step")
    left.axhline(0, color="0.6", linewidth=1)
    left.set(
        xlabel="budget, % of the state", ylabel="slow-down against 100 %, % of a training step"
    )
    left.invert_xaxis()
    left.legend()
    for number, seconds in enumerate(results["spikes"]):
        milliseconds = [1e3 * value for value in seconds]
        label = "one repetition" if number == 0 else None
        right.plot(range(1 - SPIKE, SPIKE), milliseconds[1:], color="C0", alpha=0.4, label=label)
    right.axvline(0, color="C1", linestyle="--", label="a long sequence drove the pages out")
    right.set(xlabel="step", ylabel="optimizer step, ms", ylim=(0, None))
    right.legend()


def findings(results: dict) -> list[Finding]:
    return [as_fast(results), cost_of_paging(results), cost_of_a_spike(results)]


def as_fast(results: dict) -> Finding:
    """Held: the 90 % interval of the slow-down ends below the margin."""
    changes = slowdowns(results, ALL_FIT, RESIDENT, largest(results))
    mean = experiment.interval(changes)
    return experiment.decide(
        "a paged optimizer is as fast as a resident one while all pages fit",
        "section 3",
        {
            "held": experiment.interval(changes, level=0.90).high < MARGIN,
            "did not hold": mean.low > MARGIN,
        },
        f"{mean.mean:+.1%} of a training step of {largest(results)} tokens",
        f"{mean.span('+.1%')} (paired t, {len(changes)} repetitions; not slower than by "
        f"{MARGIN:.0%})",
    )


def cost_of_paging(results: dict) -> Finding:
    """Held: below the margin at the largest batch. Bends: below it, but not at the smallest."""
    by_size = {
        tokens: experiment.interval(slowdowns(results, "5%", ALL_FIT, tokens))
        for tokens in results["passes"]
    }
    is_small = [m.high < MARGIN for m in by_size.values()]
    return experiment.decide(
        "a step is hardly slower when all pages move (budget 5 %)",
        "section 3, left open",
        {
            "held": all(is_small),
            "bends": any(is_small),
            "did not hold": all(m.low > MARGIN for m in by_size.values()),
        },
        ", ".join(f"{m.mean:+.1%} at {tokens} tokens" for tokens, m in by_size.items()),
        ", ".join(m.span("+.1%") for m in by_size.values())
        + f" (paired t, against all pages resident; margin {MARGIN:.0%})",
    )


def cost_of_a_spike(results: dict) -> Finding:
    """Held: a long sequence costs one slow step. Bends: the step after it is slow, too."""
    usual = [statistics.median(seconds[1:SPIKE]) for seconds in results["spikes"]]
    extra = [
        [seconds[SPIKE + later] / base - 1 for seconds, base in zip(results["spikes"], usual)]
        for later in (0, 1)
    ]
    now, later = map(experiment.interval, extra)
    return experiment.decide(
        "pages that a long sequence drives out cost one slow step, not more",
        "section 3",
        {"bends": later.low > 0.5, "held": now.low > 0},
        f"that optimizer step {now.mean:+.0%}, the next {later.mean:+.0%}",
        f"{now.span('+.0%')}, {later.span('+.0%')} (t, {len(usual)} repetitions)",
    )


if __name__ == "__main__":
    experiment.main("paging")
