"""What processes send each other in a training step: computed, and counted by the kernel.

    python -m bench.traffic               SmolLM2-135M in 2 processes, by DDP and by FSDP2
    python -m bench.traffic --model my/model --grad-accum 2
    python -m bench.traffic --computed    the paper's models in 8 processes: nothing is run

The processes talk over this machine's loopback, whose bytes Linux counts. The difference of two
runs with different numbers of steps gives the bytes of a step. Nothing else should use the loopback
meanwhile.

Fails (exit status 1) if the counted bytes differ from the computed ones by more than 5 %.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from checkpoints import base_model, sources
from memory.formula import QLORA, SHAPES, predict
from training import sharding

ROOT = Path(__file__).parent.parent
FEW_STEPS = 2
MANY_STEPS = 12
LINKS = {  # bytes per second
    "NVLink, 450 GB/s": 450e9,
    "PCIe, 25 GB/s": 25e9,
    "100 Gbit/s": 12.5e9,
    "10 Gbit/s": 1.25e9,
}
ADAPTER = {"r": 8, "lora_alpha": 16.0, "lora_dropout": 0.0, "use_rslora": False}
WAYS = {"DDP": [], "FSDP2": ["--shard"]}


def sent() -> int:
    """Bytes sent over the loopback so far."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    loopback = next(line for line in lines if line.strip().startswith("lo:"))
    return int(loopback.split()[9])


def bytes_of_a_run(folder: Path, steps: int, flags: list[str]) -> int:
    """Bytes over the loopback in a run of train.py in two processes."""
    rows = [{"prompt": f"{i}?", "completion": f"{i}!"} for i in range(20)]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *torchrun, "train.py", *flags]
    command += ["--data", str(data), "--output-dir", str(folder / "out")]
    command += ["--batch-size", "1", "--max-steps", str(steps)]
    command += ["--device", "cpu", "--dtype", "float32"]
    before = sent()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return sent() - before


def measured(flags: list[str]) -> float:
    """Bytes that each of two processes sends in a step."""
    with tempfile.TemporaryDirectory() as folder:
        few = bytes_of_a_run(Path(folder), FEW_STEPS, flags)
        many = bytes_of_a_run(Path(folder), MANY_STEPS, flags)
    return (many - few) / (MANY_STEPS - FEW_STEPS) / 2


def of_the_papers_models() -> str:
    """GB that a process sends in a step of one batch, r 64, 8 processes, and the time on links."""
    heads = "".join(f"{name:>{len(name) + 2}}" for name in LINKS)
    lines = [f"8 processes, r 64       GB{heads}"]
    for name, shape in SHAPES.items():
        parts = predict(shape, QLORA, 1, 512, 64).components
        blocks = sum(parts[part] for part in ("base", "constants", "norms", "adapters"))
        by_way = sharding.bytes_sent_per_step(
            blocks, parts["embedding, head"], parts["adapters"], 8, 1
        )
        for way, nbytes in by_way.items():
            times = (f"{nbytes / rate:{len(link)}.2f} s" for link, rate in LINKS.items())
            lines.append(f"{name:12}{way:6}{nbytes / 1e9:8.2f}{''.join(times)}")
    return "\n".join(lines)


def computed(model: str, grad_accum: int) -> dict[str, float]:
    """Bytes that each of two processes sends in a step, with gloo, by DDP and by FSDP2."""
    folder = sources.find_model(model)
    loaded = base_model.load_with_adapters(folder, torch.float32, "cpu", "default", 0, ADAPTER, {})
    sizes = sharding.sizes_in_bytes(loaded)
    by_way = sharding.bytes_sent_per_step(*sizes, 2, grad_accum)
    adapters = sizes[-1]
    by_way["FSDP2"] += grad_accum * adapters / 2  # gloo, unlike NCCL, also sends these sums around
    return by_way


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.traffic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default=sources.DEFAULT_MODEL)
    parser.add_argument("--grad-accum", type=int, default=1)
    parser.add_argument(
        "--computed", action="store_true", help="the paper's models in 8 processes; run nothing"
    )
    args = parser.parse_args()
    if args.computed:
        print(of_the_papers_models())
        return 0
    expected = computed(args.model, args.grad_accum)
    print(
        f"{args.model}, 2 processes, --grad-accum {args.grad_accum}: "
        f"MB that a process sends in a step\n{'':8}{'computed':>10}{'measured':>10}"
    )
    flags = ["--model", args.model, "--grad-accum", str(args.grad_accum)]
    errors = []
    for way, more in WAYS.items():
        seen = measured([*flags, *more])
        errors.append(abs(seen / expected[way] - 1))
        print(f"{way:8}{expected[way] / 1e6:10.2f}{seen / 1e6:10.2f}", flush=True)
    return int(max(errors) > 0.05)


if __name__ == "__main__":
    sys.exit(main())
