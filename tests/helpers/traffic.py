"""What several processes send each other in a step of training: computed, and counted by the kernel on the way.

    python tests/traffic.py                    SmolLM2-135M in 2 processes, by DDP and by FSDP2
    python tests/traffic.py --model my/model --grad-accum 2
    python tests/traffic.py --computed         the paper's models in 8 processes: nothing is run

The processes talk through this machine's loopback, of which Linux counts the bytes. Two runs that differ in their number of
steps alone give those of a step; nothing else should use the loopback meanwhile.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402 (after the path is set)

from checkpoints import base_model
from checkpoints import sources as pretrained  # noqa: E402
from memory import formula as predict  # noqa: E402
from training import sharding as parallel  # noqa: E402

STEPS = 2, 12
LINKS = {
    "NVLink, 450 GB/s": 450e9,
    "PCIe, 25 GB/s": 25e9,
    "100 Gbit/s": 12.5e9,
    "10 Gbit/s": 1.25e9,
}  # bytes a second
ADAPTER = {"r": 8, "lora_alpha": 16.0, "lora_dropout": 0.0, "use_rslora": False}
DTYPE = torch.float32


def sent() -> int:
    """Bytes that have gone over the loopback so far."""
    [line] = [
        line
        for line in Path("/proc/net/dev").read_text().splitlines()
        if line.strip().startswith("lo:")
    ]
    return int(line.split()[9])


def bytes_of_a_run(folder: Path, steps: int, flags: list[str]) -> int:
    rows = folder / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"{i}?", "completion": f"{i}!"}) + "\n" for i in range(20))
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "train.py",
        *flags,
        "--data",
        str(rows),
        "--batch-size",
        "1",
        "--max-steps",
        str(steps),
        "--output-dir",
        str(folder / "out"),
        "--device",
        "cpu",
        "--dtype",
        str(DTYPE).removeprefix("torch."),
    ]
    before = sent()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return sent() - before


def measured(flags: list[str]) -> float:
    """Bytes that each of two processes sends in a step."""
    with tempfile.TemporaryDirectory() as folder:
        few, many = (bytes_of_a_run(Path(folder), steps, flags) for steps in STEPS)
    return (many - few) / (STEPS[1] - STEPS[0]) / 2


def of_the_papers_models() -> str:
    """What a process sends in a step of one batch, r 64, 8 processes, in GB, and how long that takes on common links."""
    lines = ["8 processes, r 64       GB" + "".join(f"{name:>{len(name) + 2}}" for name in LINKS)]
    for name, shape in predict.SHAPES.items():
        parts = predict.predict(shape, predict.QLORA, 1, 512, 64).components
        blocks = sum(parts[part] for part in ("base", "constants", "norms", "adapters"))
        for way, sent in parallel.bytes_sent_per_step(
            blocks, parts["embedding, head"], parts["adapters"], 8, 1
        ).items():
            seconds = "".join(f"{sent / rate:{len(name)}.2f} s" for name, rate in LINKS.items())
            lines.append(f"{name:12}{way:6}{sent / 1e9:8.2f}{seconds}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=pretrained.DEFAULT_MODEL)
    parser.add_argument("--grad-accum", type=int, default=1)
    parser.add_argument(
        "--computed",
        action="store_true",
        help="for the paper's models in 8 processes; nothing is run",
    )
    args = parser.parse_args()
    if args.computed:
        print(of_the_papers_models())
        return 0
    model = base_model.load_with_adapters(
        pretrained.find_model(args.model), DTYPE, "cpu", "default", 0, ADAPTER, {}
    )
    sizes = parallel.sizes_in_bytes(model)
    computed = parallel.bytes_sent_per_step(*sizes, 2, args.grad_accum)
    computed["FSDP2"] += (
        args.grad_accum * sizes[-1] / 2
    )  # gloo, unlike NCCL, hands round these sums, too
    print(
        f"{args.model}, 2 processes, {args.grad_accum} batches each: MB that a process sends in a step\n"
        f"{'':8}{'computed':>10}{'measured':>10}"
    )
    flags, off = ["--model", args.model, "--grad-accum", str(args.grad_accum)], []
    for way, more in (("DDP", []), ("FSDP2", ["--shard"])):
        seen = measured([*flags, *more])
        off.append(abs(seen / computed[way] - 1))
        print(f"{way:8}{computed[way] / 1e6:10.2f}{seen / 1e6:10.2f}", flush=True)
    return int(max(off) > 0.05)


if __name__ == "__main__":
    sys.exit(main())
