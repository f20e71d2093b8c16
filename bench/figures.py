"""Writes what was measured into the documentation: tables between markers, and plots.

A table stands in README.md or docs/*.md between <!-- bench: part --> and <!-- /bench -->; the plots
are in bench/results/.
"""

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (after the choice of a backend without a screen)
from matplotlib.axes import Axes  # noqa: E402

ROOT = Path(__file__).parent.parent
OPS = ["ours", "bitsandbytes", "torchao", "dense"]  # the columns
ALLOCATING = "ours, allocating"  # a dequantize that allocates its result, as the peers do
COLORS = {"ours": "tab:blue", "bitsandbytes": "tab:orange", "torchao": "tab:green", "dense": "0.5"}


def write(found: dict) -> None:
    """Writes tables and plots of the parts measured on a CPU."""
    tables = {
        "ops": ops_table,
        "optim": optim_table,
        "step": step_table,
        "growth": growth_table,
        "size": size_table,
    }
    for part, table in tables.items():
        if part in found:
            fill(part, table(found[part]) + conditions(found[part]["machine"]))
    if {"ops", "step"} <= found.keys():
        fill("summary", summary_table(found["ops"], found["step"]))
    results = ROOT / "bench" / "results"
    if "ops" in found:
        plot_rows(found["ops"]["rows"], results / "rows.png")
    if "growth" in found:
        plot_growth(found["growth"]["rows"], results / "growth.png")


def write_as_avx2(found: dict) -> None:
    """Writes the tables of bench/as_avx2.py."""
    fill("ops-avx2", as_avx2_table(found["ops"]) + conditions(found["ops"]["machine"]))
    if "step" in found:
        names = NAMES | {"dense": "PEFT on the dense float32 base"}
        table = step_table(found["step"], names)
        fill("step-avx2", table + conditions(found["step"]["machine"]))


def write_cuda(found: dict) -> None:
    """Writes the tables of a GPU, one below the other."""
    tables = {
        "ops": cuda_ops_table,
        "optim": cuda_optim_table,
        "step": cuda_step_table,
        "sizes": cuda_sizes_table,
    }
    texts = [table(found[part]) for part, table in tables.items() if part in found]
    machine = next(iter(found.values()))["machine"]
    fill("cuda", "\n".join(texts) + f"\n{machine['card']}." + conditions(machine))


def pages() -> list[Path]:
    """The pages that may have a table: README.md and docs/*.md."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def fill(part: str, text: str) -> None:
    """Puts `text` between the markers of a part, on the page that has them.

    Raises: ValueError if no page has them.
    """
    marked = re.compile(rf"(<!-- bench: {part} -->\n).*?(<!-- /bench -->)", re.DOTALL)
    filled = False
    for page in pages():
        old = page.read_text()
        if marked.search(old):
            page.write_text(marked.sub(lambda found: found[1] + text + found[2], old))
            filled = True
    if not filled:
        markers = f"<!-- bench: {part} --> and <!-- /bench -->"
        raise ValueError(f"README.md or a page of docs/ must have the markers {markers}")


def conditions(machine: dict) -> str:
    """The line below a table: machine, commit, versions."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    computer = f"{machine['cpu']}, {machine['threads']} threads, {machine['capability']}"
    return f"\n*{computer}; commit {machine['commit']}; {versions}.*\n"


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |\n"


def header(*cells: str) -> str:
    """The first two lines of a table whose first column is text, the others numbers."""
    return row(*cells) + row("---", *["---:"] * (len(cells) - 1))


def ops_table(part: dict) -> str:
    side = part["side"]
    return peers_table(f"{side} × {side}, double-quantized", part["rows"]) + ops_notes(part)


def peers_table(title: str, rows: dict) -> str:
    """Milliseconds of each library; bitsandbytes relative to ours, ours relative to dense torch."""
    table = header(title, *OPS, "bitsandbytes / ours", "ours / dense")
    for name, entry in rows.items():
        if "bitsandbytes" not in entry:
            continue
        cells = [f"{1e3 * entry[who]['seconds']:.2f}" if who in entry else "–" for who in OPS]
        cells.append(f"{1 / entry['bitsandbytes']['ours_to_this']:.1f} ×")
        cells.append(f"{entry['dense']['ours_to_this']:.2f}" if "dense" in entry else "–")
        table += row(op_title(name), *cells)
    return table


def as_avx2_table(part: dict) -> str:
    """float32 next to the peers, and bfloat16 next to our own float32."""
    side = part["side"]
    title = f"{side} × {side}, AVX2"
    text = peers_table(title, part["rows"])
    text += "\n" + header(f"{title}, bfloat16", "ours", "ours in float32", "bfloat16 / float32")
    for name, entry in part["rows"].items():
        if "ours in float32" in entry:
            single = entry["ours in float32"]
            times = [f"{1e3 * who['seconds']:.2f}" for who in (entry["ours"], single)]
            text += row(op_title(name), *times, f"{single['ours_to_this']:.2f}")
    return text + (
        f"\nMedians in milliseconds. Forward + backward includes LoRA of rank {part['rank']} and "
        f"the gradients of x, A and B, for bitsandbytes by PEFT's layer. The environment variables "
        f"of Numba, torch, oneDNN and MKL restrict them to AVX2. bitsandbytes has none: it decodes "
        f"with AVX-512 where the processor has it, and only its matmul, which is torch's, is "
        f"restricted. bfloat16 has no peers here, because torch's bfloat16 matmul, which they use, "
        f"takes seconds in backward where ours takes milliseconds.\n"
    )


def op_title(name: str) -> str:
    """The name of a row as people read it: "forward float32, 4 rows"."""
    kind, _, rows = name.rpartition(" ")
    if not rows.isdigit():
        return name
    return f"{kind}, {rows} row" if rows == "1" else f"{kind}, {rows} rows"


def ops_notes(part: dict) -> str:
    """The paragraph below the table: bandwidth, and memory of forward + backward."""
    rows = part["rows"]
    speed = rows["copy"]["bytes_per_second"]
    dequantize = rows["dequantize bfloat16"]
    alone = 100 * dequantize["bytes"] / dequantize["alone"] / speed
    in_turns = 100 * dequantize["bytes"] / dequantize["ours"]["seconds"] / speed
    extra = rows["forward + backward bfloat16 256"]["extra_bytes"]
    memory = ", ".join(f"{who} {extra[who] / 1e6:.1f} MB" for who in OPS)
    product = 256 * part["side"] * 2 / 1e6
    allocating = allocating_note(rows)
    return (
        f"\nMedians in milliseconds. In a loop, a plain copy moves {speed / 1e9:.0f} GB/s and "
        f"dequantizing to bfloat16 reaches {alone:.0f} % of that; in turns, where the peers fill "
        f"the caches, {in_turns:.0f} %. Memory at the peak of forward + backward of 256 rows, "
        f"beyond what existed before and what is returned: {memory}; each includes the product, "
        f"{product:.1f} MB. Dequantizing writes ours into an existing buffer, as a matmul does; "
        f"the peers allocate the result. {allocating}\n"
    )


def allocating_note(rows: dict) -> str:
    """What ours takes to dequantize if it allocates, too."""
    names = [name for name, entry in rows.items() if ALLOCATING in entry]
    times = [f"{1e3 * rows[name][ALLOCATING]['seconds']:.2f} ms to {name}" for name in names]
    return f"If it allocates, ours takes {' and '.join(times)}."


def optim_table(part: dict) -> str:
    count = f"{part['parameters'] / 1e6:.0f} M parameters"
    table = header(f"AdamW, {count}, all pages resident", "ms", "ours / this")
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


STEP_PEERS = ("bitsandbytes autocast", "dense autocast")  # the faster way of each, as we compute


def step_table(part: dict, names: dict[str, str] = NAMES) -> str:
    title = f"a step of {part['batch']} × {part['length']} tokens"
    plain = ["s", "peak GB", "this / ours"]
    table = header(title, *plain, "s, checkpointing", "peak GB", "this / ours")
    for name in part["rows"]["plain"]:
        cells = []
        for kind in ("plain", "checkpointing"):
            entry = part["rows"][kind][name]
            cells.append(f"{entry['seconds']:.2f}")
            cells.append(f"{entry['peak_bytes'] / 1e9:.2f}")
            cells.append(f"{1 / entry['ours_to_this']:.2f}")
        table += row(names[name], *cells)
    return table


def growth_table(part: dict) -> str:
    table = header("batch × length", "s", "peak GB", "s, checkpointing", "peak GB")
    rows = part["rows"]
    for plain, checkpointing in zip(rows[::2], rows[1::2]):
        cells = []
        for entry in (plain, checkpointing):
            cells.append(f"{entry['seconds']:.1f}")
            cells.append(f"{entry['peak_bytes'] / 1e9:.2f}")
        table += row(f"{plain['batch']} × {plain['length']}", *cells)
    return table


def size_table(part: dict) -> str:
    """Ours and the peer by model and length, with and without checkpointing."""
    names = ("ours", STEP_PEERS[0])
    titles = [f"{NAMES[name]}: {unit}" for name in names for unit in ("s", "peak GB")]
    table = header("model, tokens", *titles, "time / ours", "peak / ours")
    for entry in part["rows"]:
        for kind in ("plain", "checkpointing"):
            ours, peer = (entry[name][kind] for name in names)
            title = f"{entry['model']}, 1 × {entry['length']}"
            title += ", checkpointing" if kind == "checkpointing" else ""
            cells = [*step_cells(ours), *step_cells(peer), "–", "–"]
            if ours and peer:
                cells[4:] = [f"{peer[key] / ours[key]:.2f}" for key in ("seconds", "peak_bytes")]
            table += row(title, *cells)
    return table


def step_cells(found: dict | None) -> list[str]:
    """Seconds and peak GB of a step; None means that memory ran out."""
    if found is None:
        return ["out of memory", "–"]
    return [f"{found['seconds']:.2f}", f"{found['peak_bytes'] / 1e9:.2f}"]


def summary_table(ops: dict, step: dict) -> str:
    """Three operations and a step; PEFT's steps, on a 4-bit and a dense base, under autocast."""
    columns = ["ours", "bitsandbytes", "dense"]
    side = ops["side"]
    table = header(f"a {side} × {side} weight, or a step of SmolLM2-135M", *columns)
    for name in ("quantize float32", "dequantize bfloat16", "forward + backward float32 256"):
        entry = ops["rows"][name]
        entry = entry | {"ours": entry.get(ALLOCATING, entry["ours"])}  # as the peers do
        cells = [f"{1e3 * entry[who]['seconds']:.1f}" if who in entry else "–" for who in columns]
        table += row(f"{op_title(name)}, ms", *cells)
    entries = [step["rows"]["plain"][who] for who in ("ours", *STEP_PEERS)]
    cells = [f"{e['seconds']:.2f} ({e['peak_bytes'] / 1e9:.2f})" for e in entries]
    size = f"{step['batch']} × {step['length']}"
    return table + row(f"step of {size} tokens in bfloat16, s (peak GB)", *cells)


def cuda_ops_table(part: dict) -> str:
    """Microseconds, the share of the card's ceiling, and the peers' times relative to ours."""
    copy = part["ceilings"]["bytes_per_second"]
    product = part["ceilings"]["operations_per_second"]
    titles = ["µs", "of the ceiling", "bitsandbytes / ours", "dense / ours"]
    table = header("double-quantized NF4, bfloat16", *titles)
    for name, entry in part["rows"].items():
        ours = entry["ours"]["seconds"]
        least = entry["bytes"] / copy if "bytes" in entry else entry["operations"] / product
        cells = [f"{1e6 * ours:.1f}", f"{100 * least / ours:.0f} %"]
        for who in ("bitsandbytes", "dense"):
            cells.append(f"{1 / entry[who]['ours_to_this']:.2f}" if who in entry else "")
        table += row(name, *cells)
    return table + (
        f"\nMedians. The ceiling is a plain copy, {copy / 1e9:.0f} GB/s; for forward + backward a "
        f"large bfloat16 matmul, {product / 1e12:.0f} TFLOP/s.\n"
    )


def cuda_optim_table(part: dict) -> str:
    copy = part["ceilings"]["bytes_per_second"]
    title = f"AdamW, {part['parameters'] / 1e6:.0f} M parameters, resident"
    table = header(title, "ms", "of a copy's bandwidth", "ours / this")
    for name, entry in part["rows"].items():
        share = part["bytes"] / entry["seconds"] / copy
        milliseconds = f"{1e3 * entry['seconds']:.2f}"
        table += row(name, milliseconds, f"{100 * share:.0f} %", f"{entry['ours_to_this']:.2f}")
    return table


def cuda_step_table(part: dict) -> str:
    tokens = f"{part['batch']} × {part['length']} tokens"
    title = f"a step of LLaMA-7B's shapes, {tokens}, r 64, checkpointing"
    table = header(title, "tokens/s", "peak GB")
    for name, entry in part["rows"].items():
        table += row(name, f"{entry['tokens_per_second']:.0f}", f"{entry['peak_bytes'] / 1e9:.2f}")
    return table


def cuda_sizes_table(part: dict) -> str:
    titles = ["in passes of", "predicted GB", "peak GB", "off", "tokens/s"]
    table = header("in at most 48 GiB", *titles)
    for entry in part["rows"]:
        predicted = entry["predicted"]["peak"]
        peak = entry["measured"]["peak"]
        table += row(
            f"{entry['model']}, {entry['batch']} × {entry['length']} tokens",
            str(entry["passes_of"]),
            f"{predicted / 1e9:.2f}",
            f"{peak / 1e9:.2f}",
            f"{100 * (predicted / peak - 1):+.1f} %",
            f"{entry['measured']['tokens_per_second']:.0f}",
        )
    return table


def plot_rows(rows: dict, picture: Path) -> None:
    """Plots the time of forward + backward against the number of rows, in both dtypes."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, dtype in zip(axes, ("bfloat16", "float32")):
        names = [name for name in rows if name.startswith(f"forward + backward {dtype}")]
        counts = [int(name.rpartition(" ")[2]) for name in names]
        for who in OPS:
            milliseconds = [1e3 * rows[name][who]["seconds"] for name in names]
            axis.plot(counts, milliseconds, "o-", color=COLORS[who], label=who)
        axis.set(xscale="log", yscale="log", xlabel="rows of x (tokens)")
        axis.set_title(f"forward + backward, {dtype}")
        axis.set_xticks(counts, counts)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("milliseconds")
    axes[0].legend()
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def plot_growth(rows: list[dict], picture: Path) -> None:
    """Plots peak memory and time of a training step against length and batch."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), layout="constrained", sharey="row")
    by_length = [row for row in rows if row["batch"] == 1]
    by_batch = [row for row in rows if row["length"] == 256]
    plot_column(axes[:, 0], by_length, "length")
    plot_column(axes[:, 1], by_batch, "batch")
    axes[0, 0].set_title("batch 1")
    axes[0, 1].set_title("length 256")
    axes[1, 0].set_xlabel("tokens a sequence")
    axes[1, 1].set_xlabel("sequences")
    axes[0, 0].set_ylabel("peak GB")
    axes[1, 0].set_ylabel("seconds a step")
    axes[0, 0].legend()
    for axis in axes.flat:  # after everything on a shared axis is drawn
        axis.set_ylim(0)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def plot_column(axes: list[Axes], rows: list[dict], x: str) -> None:
    """Plots peaks above and seconds below, with and without checkpointing, against column x."""
    above, below = axes
    for checkpointing in (False, True):
        chosen = [row for row in rows if row["checkpointing"] == checkpointing]
        chosen.sort(key=lambda row: row[x])
        color = "tab:green" if checkpointing else "tab:blue"
        label = "checkpointing" if checkpointing else "plain"
        values = [row[x] for row in chosen]
        peaks = [row["peak_bytes"] / 1e9 for row in chosen]
        above.plot(values, peaks, "o-", color=color, label=label)
        below.plot(values, [row["seconds"] for row in chosen], "o-", color=color, label=label)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.set_xticks(sorted({row[x] for row in rows}))
        axis.tick_params("x", rotation=45)
