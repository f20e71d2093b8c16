"""Predicts the memory of fine-tuning before a run, by component, and what fits on which card.

    python -m memory --model llama-65b --seq 512 --batch 1 --r 64

Only the shape of the model is needed: a name, or a Hugging Face folder with config.json. A model
that the formula does not cover is an error, with its number of parameters.
"""

import argparse
import sys

from memory.formula import METHODS, OUTSIDE_TORCH, QLORA, SHAPES, Shape, predict, shape_of

CARDS = [8, 12, 16, 24, 32, 40, 48, 80, 140]  # GiB: common sizes of graphics cards
MOST_SEQUENCES = 2**16  # upper limit of the search


def component_table(shape: Shape, batch: int, length: int, r: int) -> str:
    """The prediction by component and method, in GB (1e9 bytes), with and without checkpointing."""
    checkpointed = [predict(shape, method, batch, length, r, True) for method in METHODS]
    all_kept = [predict(shape, method, batch, length, r, False) for method in METHODS]
    lines = [table_line("GB", METHODS)]

    def add(name: str, sizes: list[int]) -> None:
        lines.append(table_line(name, [f"{size / 1e9:.3f}" for size in sizes]))

    for name in checkpointed[0].components:
        sizes = [prediction.components[name] for prediction in checkpointed]
        if name == "activations":
            add("activations, checkpointing", sizes)
            add("activations, all kept", [each.components[name] for each in all_kept])
        else:
            add(name, sizes)
    add("peak, checkpointing", [prediction.peak() for prediction in checkpointed])
    add("peak, all kept", [prediction.peak() for prediction in all_kept])
    paged = [prediction.peak(paged=True) for prediction in checkpointed]
    add("  AdamW's moments paged out", paged)

    instants = checkpointed[METHODS.index(QLORA)].instants
    at_peak = max(instants, key=lambda name: sum(instants[name]))
    lines.append(f"QLoRA with checkpointing is at its peak in {at_peak}")
    return "\n".join(lines)


def table_line(name: str, cells: list[str] | tuple[str, ...]) -> str:
    return f"{name:34}" + "".join(f"{cell:>18}" for cell in cells)


def largest_batch(
    shape: Shape, method: str, length: int, r: int, room: int, paged: bool = False
) -> int:
    """How many sequences of `length` fit in `room` bytes, with checkpointing: 0 to 2**16."""
    fits = 0
    too_many = MOST_SEQUENCES + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if predict(shape, method, middle, length, r).peak(paged) <= room:
            fits = middle
        else:
            too_many = middle
    return fits


def batch_table(shape: Shape, length: int, r: int) -> str:
    """The largest batch on cards of common sizes, by method."""
    columns = [(method, False) for method in METHODS] + [(QLORA, True)]
    heads = [f"{method}, paged" if paged else method for method, paged in columns]
    lines = [table_line(f"sequences of {length} that fit", heads)]
    for size in CARDS:
        room = size * 2**30 - OUTSIDE_TORCH
        batches = [
            largest_batch(shape, method, length, r, room, paged) for method, paged in columns
        ]
        lines.append(table_line(f"a card of {size} GiB", [str(batch or "-") for batch in batches]))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m memory",
        description="Predict the memory of fine-tuning before a run, by component.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    known = ", ".join(SHAPES)
    parser.add_argument("--model", default="llama-65b", help=f"{known}, or a folder")
    parser.add_argument("--seq", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--batch", type=int, default=1, help="sequences per batch")
    parser.add_argument("--r", type=int, default=64, help="rank of the adapters")
    args = parser.parse_args(argv)
    if min(args.seq, args.batch, args.r) < 1:
        parser.error("--seq, --batch and --r must be at least 1")
    try:
        shape = shape_of(args.model)
    except ValueError as error:
        print(f"memory: {error}", file=sys.stderr)
        return 1
    print(f"{args.model}, {args.batch} x {args.seq} tokens, r {args.r}: predicted\n")
    print(component_table(shape, args.batch, args.seq, args.r))
    print()
    print(batch_table(shape, args.seq, args.r))
    return 0


if __name__ == "__main__":
    sys.exit(main())
