"""What a run leaves for people: metrics.jsonl line by line while it goes, then loss.png, report.json and a table."""

import json
import platform
import shlex
import statistics
import sys
from pathlib import Path

import matplotlib
import torch
import transformers

from checkpoints import io as files

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (after the choice of a backend that needs no screen)


def keep_metrics(path: Path, steps: int) -> None:
    """Keep the lines of the first `steps`. The others a resumed run writes again, one cut short by a kill among them.

    Raises: ValueError if lines of these steps are missing; nothing has changed then.
    """
    lines = path.read_text().splitlines()[:steps] if path.exists() else []
    try:
        numbers = [json.loads(line)["step"] for line in lines]
    except (ValueError, KeyError, TypeError):
        numbers = []
    if numbers != list(range(1, steps + 1)):
        raise ValueError(
            f"{path} lacks lines of the {steps} steps before the state: put it back, or start without --resume"
        )
    files.write_text("".join(line + "\n" for line in lines), path)


def read_metrics(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def totals(metrics: Path) -> dict:
    """Steps, seconds and tokens a second of all the lines."""
    lines = read_metrics(metrics)
    seconds = sum(line["seconds"] for line in lines)
    return {
        "steps": len(lines),
        "seconds": seconds,
        "tokens_per_second": sum(line["tokens"] for line in lines) / seconds,
    }


def plot_loss(metrics: Path, picture: Path, metric: str = "") -> None:
    """Loss by step, its running mean, and what was measured on the way of a metric of that name, as a PNG."""
    lines = read_metrics(metrics)
    losses, measured = (
        [line["loss"] for line in lines],
        [(line["step"], line["eval"][0]) for line in lines if "eval" in line],
    )
    smooth = [statistics.fmean(losses[max(0, i - 4) : i + 1]) for i in range(len(losses))]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="0.7", linewidth=1, label="each step")
    axes.plot(steps, smooth, color="tab:blue", linewidth=2, label="mean of 5 steps")
    axes.set(xlabel="step", ylabel="cross entropy per token", yscale="log", title="Training loss")
    axes.grid(alpha=0.3)
    if measured:
        axes.plot([], [], "o", color="tab:orange", label=metric)  # for the legend
        beside = axes.twinx()
        beside.plot(*zip(*measured), "o", color="tab:orange")
        beside.set_ylabel(f"{metric} of what was held out")
    axes.legend()
    files.atomically(picture, lambda unfinished: figure.savefig(unfinished, dpi=120, format="png"))
    plt.close(figure)


def write_report(report: dict, folder: Path) -> None:
    """report.json, with the versions that made it."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    files.write_text(
        json.dumps(report | {"versions": versions}, indent=2) + "\n", folder / "report.json"
    )


def command(words: list[str], processes: int = 1) -> str:
    """A command line that runs train.py again with these words, by the Python that runs now, in so many processes."""
    python = Path(sys.executable)
    python = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
    start = (
        [str(python)]
        if processes == 1
        else [str(python.with_name("torchrun")), "--nproc-per-node", str(processes)]
    )
    return shlex.join([*start, "train.py", *words])


def table(report: dict) -> str:
    """The report as text for a terminal."""
    mb = "{:10.1f} MB".format
    lines = [f"{'frozen base':32}{'16-bit':>13}{'as kept':>13}"]
    base = {name: row for name, row in report["components"].items() if name != "adapters"}
    lines += [
        f"  {name:30}{mb(in_16bit / 1e6)}{mb(kept / 1e6)}"
        for name, (_, in_16bit, kept) in base.items()
    ]
    lines.append(
        f"  {'together':30}{mb(report['base_bytes_16bit'] / 1e6)}{mb(report['base_bytes_4bit'] / 1e6)}"
    )
    lines.append(f"  {report['bits_per_weight']:.3f} bits a weight in the linear layers")
    if report["memory"]:  # of a run that had a step to weigh
        lines.append(f"\n{'bytes of a step':32}{'predicted':>15}{'measured':>15}")
        for name, row in report["memory"].items():
            predicted = "-" if row["predicted"] is None else f"{row['predicted']:,}"
            lines.append(f"  {name:30}{predicted:>15}{row['measured']:>15,}")
    lines.append(f"\n{report['metric']:32}{'before':>13}{'after':>13}")
    shown = (
        (lambda x: f"{100 * x:.0f} %")
        if report["metric"] == "exact match"
        else (lambda x: f"{x:.2f}")
    )
    rows = {f"{report['quant']} base": (report["before"], report["after"])}
    if report["before_unseen"] is not None:
        rows["  phrasings never trained on"] = report["before_unseen"], report["after_unseen"]
    if "compare" in report:
        rows["16-bit LoRA, same seed"] = report["compare"]["before"], report["compare"]["after"]
    lines += [
        f"  {name:30}{shown(before):>13}{shown(after):>13}"
        for name, (before, after) in rows.items()
    ]
    share = report["trainable_parameters"] / report["total_parameters"]
    adapters = report["components"]["adapters"][2] / 1e6
    lines.append(
        f"\ntrained    {report['trainable_parameters']:,} of {report['total_parameters']:,} parameters ({share:.2%}), "
        f"{adapters:.1f} MB"
    )
    lines.append(
        "pager      " + ", ".join(f"{name} {count:,}" for name, count in report["pager"].items())
    )
    lines.append(
        f"time       {report['seconds']:.0f} s for {report['steps']} steps, "
        f"{report['tokens_per_second']:.0f} tokens/s; {report['seconds_total']:.0f} s with loading and evaluation"
    )
    lines.append(f"memory     {report['peak_rss_bytes'] / 1e9:.2f} GB resident at the peak")
    return "\n".join(lines)
