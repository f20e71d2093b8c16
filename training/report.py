"""Reports a run: loss.png, report.json, and tables on the terminal.

Their numbers come from metrics.jsonl and the model.
"""

import json
import platform
import shlex
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import nn
from torch.optim import Optimizer

from checkpoints import io
from memory import measured
from training import distributed, sharding
from training.one_run import METRICS
from training.options import Options
from training.preflight import Job

PAGER_COUNTERS = ("hits", "faults", "evictions", "bytes_in", "bytes_out")


def keep_metrics(path: Path, steps: int) -> None:
    """Keep the lines of the first `steps`; a resumed run writes the later ones again.

    Raises: ValueError if lines of these steps are missing; the file is unchanged then.
    """
    lines = path.read_text().splitlines()[:steps] if path.exists() else []
    try:
        numbers = [json.loads(line)["step"] for line in lines]
    except (ValueError, KeyError, TypeError):
        numbers = []
    if numbers != list(range(1, steps + 1)):
        raise ValueError(
            f"{path} lacks lines of the {steps} steps before the state: "
            "put it back, or start without --resume"
        )
    io.write_text("".join(line + "\n" for line in lines), path)


def read_metrics(path: Path) -> list[dict]:
    """The lines of metrics.jsonl, one per step."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def totals(metrics: Path) -> dict:
    """Steps, seconds and tokens per second over all lines."""
    lines = read_metrics(metrics)
    seconds = sum(line["seconds"] for line in lines)
    tokens = sum(line["tokens"] for line in lines)
    return {"steps": len(lines), "seconds": seconds, "tokens_per_second": tokens / seconds}


def peak_gpu_bytes(metrics: Path, device: str) -> int | None:
    """The most that torch has allocated on the GPU in the whole run; None on a CPU.

    The measured step resets torch's peak, so the lines before that step have the peak until then.
    """
    peak = measured.peak_gpu_bytes(device)
    if peak is None:
        return None
    return max([peak, *(line.get("peak_gpu_bytes", 0) for line in read_metrics(metrics))])


def summarize(
    args: Options,
    job: Job,
    model: nn.Module,
    optimizer: Optimizer,
    before: list[float | None],
    after: list[float | None],
    memory: dict,
) -> dict:
    """The report of a run, as written to report.json.

    before, after: the metric on the held-out rows, and on phrasings that training never sees.
    """
    counters = getattr(optimizer, "counters", dict.fromkeys(PAGER_COUNTERS, 0))
    return {
        "processes": distributed.world_size(),
        "model_bytes_per_process": sharding.bytes_on_this_rank(model),
        "metric": job.task.metric,
        "quant": args.quant,
        "before": before[0],
        "after": after[0],
        "before_unseen": before[1],
        "after_unseen": after[1],
        **totals(args.output_dir / METRICS),
        "seconds_total": time.perf_counter() - job.started,
        "peak_rss_bytes": measured.peak_rss_bytes(),
        "peak_gpu_bytes": peak_gpu_bytes(args.output_dir / METRICS, args.device),
        **measured.summary(model),
        "memory": memory,
        "pager": dict(counters),
        "seed": args.seed,
    }


def metrics_of(report: dict) -> dict:
    """The metrics of a report, for the comparison with another run."""
    keys = ("before", "after", "before_unseen", "after_unseen")
    return {key: report[key] for key in keys}


def write_report(report: dict, folder: Path) -> None:
    """Write report.json, with the versions of the libraries. Only rank 0 writes."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    text = json.dumps(report | {"versions": versions}, indent=2) + "\n"
    distributed.run_on_main(partial(io.write_text, text, folder / "report.json"))


def plot_loss(metrics: Path, picture: Path, metric: str = "") -> None:
    """Draw the loss by step, its running mean and the evaluations during training, as a PNG."""
    import matplotlib  # only when something is drawn: the import is slow

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_metrics(metrics)
    losses = [line["loss"] for line in lines]
    smooth = [statistics.fmean(losses[max(0, i - 4) : i + 1]) for i in range(len(losses))]
    steps = range(1, len(losses) + 1)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, losses, color="0.7", linewidth=1, label="each step")
    axes.plot(steps, smooth, color="tab:blue", linewidth=2, label="mean of 5 steps")
    axes.set(xlabel="step", ylabel="cross entropy per token in the loss", yscale="log")
    axes.set_title("Training loss")
    axes.grid(alpha=0.3)
    evaluations = [(line["step"], line["eval"][0]) for line in lines if "eval" in line]
    if evaluations:
        axes.plot([], [], "o", color="tab:orange", label=metric)  # an entry in the legend
        right_axis = axes.twinx()
        right_axis.plot(*zip(*evaluations), "o", color="tab:orange")
        right_axis.set_ylabel(f"{metric} on the held-out rows")
    axes.legend()
    io.write_atomically(picture, lambda path: figure.savefig(path, dpi=120, format="png"))
    plt.close(figure)


def command(words: list[str], processes: int = 1) -> str:
    """A command line for train.py with these words, under torchrun if processes > 1."""
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    program = [str(python)]
    if processes > 1:
        program = [str(python.with_name("torchrun")), "--nproc-per-node", str(processes)]
    return shlex.join([*program, "train.py", *words])


def print_report(report: dict, folder: Path) -> None:
    """Print the tables and the command that asks the adapter a question."""
    ask = command(["--adapter", str(folder), "--prompt", "your question"])
    print(f"\n{table(report)}\n")
    print(f"adapter, metrics and report are in {folder}/; ask it with\n  {ask}")


def table(report: dict) -> str:
    """The report as text for a terminal."""
    parts = [base_table(report), step_table(report), metric_table(report), run_table(report)]
    return "\n\n".join(part for part in parts if part)


def base_table(report: dict) -> str:
    """The bytes of the frozen base, in 16 bits and as it is stored."""

    def line(name: str, in_16_bits: int, kept: int) -> str:
        return f"  {name:30}{in_16_bits / 1e6:10.1f} MB{kept / 1e6:10.1f} MB"

    lines = [f"{'frozen base':32}{'16-bit':>13}{'as kept':>13}"]
    for name, (_, in_16_bits, kept) in report["components"].items():
        if name != "adapters":
            lines.append(line(name, in_16_bits, kept))
    lines.append(line("total", report["base_bytes_16bit"], report["base_bytes_4bit"]))
    lines.append(f"  {report['bits_per_weight']:.3f} bits a weight in the linear layers")
    return "\n".join(lines)


def step_table(report: dict) -> str:
    """The bytes of one step, predicted and measured; empty if no step was measured."""
    if not report["memory"]:
        return ""
    lines = [f"{'bytes of a step':32}{'predicted':>15}{'measured':>15}"]
    for name, row in report["memory"].items():
        predicted = "-" if row["predicted"] is None else f"{row['predicted']:,}"
        lines.append(f"  {name:30}{predicted:>15}{row['measured']:>15,}")
    return "\n".join(lines)


def metric_table(report: dict) -> str:
    """The metric before and after training."""
    is_share = report["metric"] == "exact match"

    def line(name: str, values: dict, suffix: str = "") -> str:
        cells = [values["before" + suffix], values["after" + suffix]]
        texts = [f"{100 * cell:.0f} %" if is_share else f"{cell:.2f}" for cell in cells]
        return f"  {name:30}{texts[0]:>13}{texts[1]:>13}"

    lines = [f"{report['metric']:32}{'before':>13}{'after':>13}"]
    lines.append(line(f"{report['quant']} base", report))
    if report["before_unseen"] is not None:
        lines.append(line("  phrasings never trained on", report, "_unseen"))
    if "compare" in report:
        lines.append(line("16-bit LoRA, same seed", report["compare"]))
    return "\n".join(lines)


def run_table(report: dict) -> str:
    """What was trained, what the pager did, time and memory."""
    trained = report["trainable_parameters"]
    in_all = report["total_parameters"]
    adapter_mb = report["components"]["adapters"][2] / 1e6
    counters = ", ".join(f"{name} {count:,}" for name, count in report["pager"].items())
    lines = {
        "trained": f"{trained:,} of {in_all:,} parameters ({trained / in_all:.2%}), "
        f"{adapter_mb:.1f} MB",
        "pager": counters,
        "time": f"{report['seconds']:.0f} s for {report['steps']} steps, "
        f"{report['tokens_per_second']:.0f} tokens/s; "
        f"{report['seconds_total']:.0f} s with loading and evaluation",
        "memory": f"{report['peak_rss_bytes'] / 1e9:.2f} GB resident at the peak",
    }
    if report["peak_gpu_bytes"] is not None:
        lines["memory"] += f"; {report['peak_gpu_bytes'] / 1e9:.2f} GB on the GPU"
    return "\n".join(f"{name:11}{text}" for name, text in lines.items())
