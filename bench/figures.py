"""What bench.py measured, as people read it: the tables of the README, between markers, and the plots in results/."""

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (after the choice of a backend that needs no screen)

ROOT = Path(__file__).parent.parent
OPS = ["ours", "bitsandbytes", "torchao", "dense"]  # the columns
COLORS = {"ours": "tab:blue", "bitsandbytes": "tab:orange", "torchao": "tab:green", "dense": "0.5"}


def write(found: dict) -> None:
    """Tables and plots of all the parts that there are."""
    for part, table in {
        "ops": ops_table,
        "optim": optim_table,
        "step": step_table,
        "growth": growth_table,
    }.items():
        if part in found:
            fill(ROOT / "README.md", part, table(found[part]) + conditions(found[part]["machine"]))
    if "ops" in found:
        plot_rows(found["ops"]["rows"], ROOT / "bench/results" / "rows.png")
    if "growth" in found:
        plot_growth(found["growth"]["rows"], ROOT / "bench/results" / "growth.png")


def write_cuda(found: dict) -> None:
    """The tables of a GPU, one below the other."""
    made = {
        "ops": cuda_ops_table,
        "optim": cuda_optim_table,
        "step": cuda_step_table,
        "sizes": cuda_sizes_table,
    }
    tables = [table(found[part]) for part, table in made.items() if part in found]
    machine = next(iter(found.values()))["machine"]
    fill(
        ROOT / "README.md",
        "cuda",
        "\n".join(tables) + f"\n{machine['card']}." + conditions(machine),
    )


def fill(path: Path, part: str, text: str) -> None:
    """Put `text` between <!-- bench: part --> and <!-- /bench -->. Raises: ValueError if the markers are not there."""
    marked = re.compile(rf"(<!-- bench: {part} -->\n).*?(<!-- /bench -->)", re.DOTALL)
    old = path.read_text()
    if not marked.search(old):
        raise ValueError(
            f"{path.name} must have the markers <!-- bench: {part} --> and <!-- /bench --> around the table"
        )
    path.write_text(marked.sub(lambda found: found[1] + text + found[2], old))


def conditions(machine: dict) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    computer = f"{machine['cpu']}, {machine['threads']} threads, {machine['capability']}"
    return f"\n*{computer}; commit {machine['commit']}; {versions}.*\n"


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |\n"


def ops_table(part: dict) -> str:
    """Milliseconds, and ours over theirs, the best other 4-bit library and dense torch."""
    rows, speed = part["rows"], part["rows"]["copy"]["bytes_per_second"]
    table = row(
        f"{part['side']} × {part['side']}, double-quantized",
        *OPS,
        "bitsandbytes / ours",
        "ours / dense",
    )
    table += row("---", *["---:"] * 6)
    for name, entry in rows.items():
        if name == "copy":
            continue
        cells = [f"{1e3 * entry[who]['seconds']:.2f}" if who in entry else "–" for who in OPS]
        against = [f"{1 / entry['bitsandbytes']['ours_to_this']:.1f} ×"]
        against += [f"{entry['dense']['ours_to_this']:.2f}" if "dense" in entry else "–"]
        kind, _, rest = name.rpartition(" ")
        name = f"{kind}, {rest} row{'s' * (rest != '1')}" if rest.isdigit() else name
        table += row(name, *cells, *against)
    entry = rows["dequantize bfloat16"]
    alone, in_turn = (
        100 * entry["bytes"] / seconds / speed
        for seconds in (entry["alone"], entry["ours"]["seconds"])
    )
    extra = rows["forward + backward bfloat16 256"]["extra_bytes"]
    table += (
        f"\nMilliseconds, medians. A plain copy, again and again, moves {speed / 1e9:.0f} GB/s here; dequantizing to "
        f"bfloat16, again and again, reaches {alone:.0f} % of that, and {in_turn:.0f} % in turns, where the caches are "
        "full of others' numbers. Memory beyond what is there before and what is returned, at the peak of "
        "forward + backward of 256 rows: "
        + ", ".join(f"{who} {extra[who] / 1e6:.1f} MB" for who in OPS)
    )
    return (
        table
        + f"; the product itself, kept meanwhile, has {256 * part['side'] * 2 / 1e6:.1f} MB of each.\n"
    )


def optim_table(part: dict) -> str:
    table = row(
        f"AdamW, {part['parameters'] / 1e6:.0f} M parameters, all pages resident",
        "ms",
        "ours / this",
    )
    table += row("---", "---:", "---:")
    for name, entry in part["rows"].items():
        table += row(name, f"{1e3 * entry['seconds']:.0f}", f"{entry['ours_to_this']:.2f}")
    return table


NAMES = {
    "ours": "ours",
    "bitsandbytes": "PEFT + bitsandbytes",
    "bitsandbytes autocast": "PEFT + bitsandbytes, autocast",
    "dense": "PEFT on the dense bfloat16 base",
    "dense autocast": "PEFT on the dense base, autocast",
}


def step_table(part: dict) -> str:
    title = f"a step of {part['batch']} × {part['length']} tokens"
    table = row(
        title, "s", "peak GB", "this / ours", "s, checkpointing", "peak GB", "this / ours"
    ) + row("---", *["---:"] * 6)
    for name in part["rows"]["plain"]:
        cells = []
        for kind in ("plain", "checkpointing"):
            entry = part["rows"][kind][name]
            cells += [
                f"{entry['seconds']:.2f}",
                f"{entry['peak_bytes'] / 1e9:.2f}",
                f"{1 / entry['ours_to_this']:.2f}",
            ]
        table += row(NAMES[name], *cells)
    return table


def growth_table(part: dict) -> str:
    table = row("batch × length", "s", "peak GB", "s, checkpointing", "peak GB") + row(
        "---", *["---:"] * 4
    )
    rows = part["rows"]
    for plain, checkpointed in zip(rows[::2], rows[1::2]):
        cells = [
            f(entry)
            for entry in (plain, checkpointed)
            for f in (lambda e: f"{e['seconds']:.1f}", lambda e: f"{e['peak_bytes'] / 1e9:.2f}")
        ]
        table += row(f"{plain['batch']} × {plain['length']}", *cells)
    return table


def cuda_ops_table(part: dict) -> str:
    """Microseconds; the share of the card's ceiling that ours reaches; and how much longer the others take."""
    copy, product = part["ceilings"]["bytes_per_second"], part["ceilings"]["operations_per_second"]
    table = row(
        "double-quantized NF4, bfloat16",
        "µs",
        "of the ceiling",
        "bitsandbytes / ours",
        "dense / ours",
    )
    table += row("---", *["---:"] * 4)
    for name, entry in part["rows"].items():
        ours = entry["ours"]["seconds"]
        least = entry["bytes"] / copy if "bytes" in entry else entry["operations"] / product
        others = (
            f"{1 / entry[who]['ours_to_this']:.2f}" if who in entry else ""
            for who in ("bitsandbytes", "dense")
        )
        table += row(name, f"{1e6 * ours:.1f}", f"{100 * least / ours:.0f} %", *others)
    return table + (
        f"\nMedians. The ceiling is a plain copy's, {copy / 1e9:.0f} GB/s; of forward + backward, that of a large "
        f"product in bfloat16, {product / 1e12:.0f} TFLOP/s.\n"
    )


def cuda_optim_table(part: dict) -> str:
    copy = part["ceilings"]["bytes_per_second"]
    table = row(
        f"AdamW, {part['parameters'] / 1e6:.0f} M parameters, resident",
        "ms",
        "of a copy's bandwidth",
        "ours / this",
    )
    table += row("---", *["---:"] * 3)
    for name, entry in part["rows"].items():
        share = part["bytes"] / entry["seconds"] / copy
        table += row(
            name,
            f"{1e3 * entry['seconds']:.2f}",
            f"{100 * share:.0f} %",
            f"{entry['ours_to_this']:.2f}",
        )
    return table


def cuda_step_table(part: dict) -> str:
    title = f"a step of LLaMA-7B's shapes, {part['batch']} × {part['length']} tokens, r 64, checkpointing"
    table = row(title, "tokens/s", "peak GB")
    table += row("---", "---:", "---:")
    for name, entry in part["rows"].items():
        table += row(name, f"{entry['tokens_per_second']:.0f}", f"{entry['peak_bytes'] / 1e9:.2f}")
    return table


def cuda_sizes_table(part: dict) -> str:
    table = row(
        "in at most 48 GiB", "in passes of", "predicted GB", "peak GB", "off", "tokens/s"
    ) + row("---", *["---:"] * 5)
    for entry in part["rows"]:
        predicted, peak, speed = (
            entry["predicted"]["peak"],
            entry["measured"]["peak"],
            entry["measured"]["tokens_per_second"],
        )
        table += row(
            f"{entry['model']}, {entry['batch']} × {entry['length']} tokens",
            str(entry["passes_of"]),
            f"{predicted / 1e9:.2f}",
            f"{peak / 1e9:.2f}",
            f"{100 * (predicted / peak - 1):+.1f} %",
            f"{speed:.0f}",
        )
    return table


def plot_rows(rows: dict, picture: Path) -> None:
    """Time of forward + backward against the number of rows, in both dtypes."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, dtype in zip(axes, ("bfloat16", "float32")):
        names = [name for name in rows if name.startswith(f"forward + backward {dtype}")]
        for who in OPS:
            counts = [int(name.rpartition(" ")[2]) for name in names]
            axis.plot(
                counts,
                [1e3 * rows[name][who]["seconds"] for name in names],
                "o-",
                color=COLORS[who],
                label=who,
            )
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="rows of x (tokens)",
            title=f"forward + backward, {dtype}",
        )
        axis.set_xticks(counts, counts)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("milliseconds")
    axes[0].legend()
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def plot_growth(rows: list[dict], picture: Path) -> None:
    """Peak memory and time of a training step against length and batch."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), layout="constrained", sharey="row")
    for column, (x, fixed, value) in enumerate((("length", "batch", 1), ("batch", "length", 256))):
        for checkpointing in (False, True):
            chosen = sorted(
                (r for r in rows if r[fixed] == value and r["checkpointing"] == checkpointing),
                key=lambda r: r[x],
            )
            color, label = (
                ("tab:green", "checkpointing") if checkpointing else ("tab:blue", "plain")
            )
            style = {"color": color, "label": label}
            axes[0, column].plot(
                [r[x] for r in chosen], [r["peak_bytes"] / 1e9 for r in chosen], "o-", **style
            )
            axes[1, column].plot(
                [r[x] for r in chosen], [r["seconds"] for r in chosen], "o-", **style
            )
        axes[0, column].set(title=f"{fixed} {value}")
        axes[1, column].set(xlabel="tokens a sequence" if x == "length" else "sequences")
        for axis in axes[:, column]:
            axis.grid(alpha=0.3)
            axis.set_xticks([r[x] for r in chosen])
            axis.tick_params("x", rotation=45)
    for axis in axes.flat:  # now that all that share an axis are drawn
        axis.set_ylim(0)
    axes[0, 0].set_ylabel("peak GB")
    axes[1, 0].set_ylabel("seconds a step")
    axes[0, 0].legend()
    figure.savefig(picture, dpi=120)
    plt.close(figure)
