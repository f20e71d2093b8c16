"""What a processor with AVX2 alone would need, measured on one that may have AVX-512.

    python -m bench --as avx2          operations, and a step of SmolLM2 in float32

The libraries choose their code when they are imported, so everything runs in a process of its own,
whose environment restricts each of them:

    Numba     compiles for the features of Haswell, the first processor with AVX2
    torch     its own code, oneDNN (products in 16 bits), MKL (products in float32)

MKL follows its setting on Intel's processors. On AMD's it has one kernel, which uses AVX2, whatever
the setting. bitsandbytes asks the processor, not the environment: on one with AVX-512 it decodes
with AVX-512 here too, and only the product that follows, which is torch's, is restricted.

bfloat16 is compared with our own float32 only. Without AVX-512, the product of torch that gives the
gradient of x in bfloat16, which the peers use too, takes seconds where ours takes milliseconds.
"""

import os
import subprocess
import sys
from pathlib import Path

import llvmlite.binding
import torch

from bench import peers
from bench.cpu import print_row, race, steps_of_smollm, summary
from bench.turns import Work
from kernels.cpu import vectors

ROOT = Path(__file__).parent.parent
SETTINGS = {
    "NUMBA_CPU_NAME": "haswell",  # which alone would keep the features of the host
    "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+popcnt,+movbe,+avx,+sse4.2,+ssse3",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
ROWS = [1, 16, 256, 1024]
RANK = 8
PEERS_OF_A_STEP = ("ours", "bitsandbytes", "dense")


def is_possible() -> bool:
    return bool(llvmlite.binding.get_host_cpu_features().get("avx2"))


def is_set() -> bool:
    """Whether the environment of this process has the settings."""
    return SETTINGS.items() <= os.environ.items()


def run(arguments: list[str]) -> int:
    """`python -m bench` with the settings. Returns its exit status."""
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | SETTINGS).returncode


def check(look_up: str, capability: str) -> None:
    """Raises: RuntimeError if the kernels' look_up or torch's capability is not that of AVX2."""
    if (look_up, capability) != ("avx2", "AVX2"):
        raise RuntimeError(
            f"the settings must restrict Numba and torch to AVX2, but the kernels use "
            f"{look_up or 'no look_up'} and torch {capability}"
        )


def ops(quick: bool) -> dict:
    """A 2048 x 2048 layer: block 64, double quantization, LoRA in forward + backward."""
    check(vectors.LOOK_UP, torch.backends.cpu.get_cpu_capability())
    side = 512 if quick else 2048
    turns = 3 if quick else 30
    torch.manual_seed(0)
    weight = torch.randn(side, side) * 0.05
    rows = {}

    def measure(name: str, works: dict[str, Work], most: int) -> None:
        rows[name] = summary(race(works, min(turns, most)))
        print_row(name, rows[name])

    measure("quantize float32", peers.quantizing(weight), 7)
    for m in ROWS:
        most = turns if m < 64 else 9
        x = torch.randn(m, side)
        g = torch.randn(m, side)
        forward = peers.multiplying(weight, x)
        training = peers.training(weight, x, g, RANK)
        measure(f"forward float32 {m}", forward, most)
        measure(f"forward + backward float32 {m}", training, most)
        half = x.bfloat16()
        measure(
            f"forward bfloat16 {m}", ours_in_both(peers.multiplying(weight, half), forward), most
        )
        in_half = peers.training(weight, half, g.bfloat16(), RANK)
        measure(f"forward + backward bfloat16 {m}", ours_in_both(in_half, training), most)
    return {"side": side, "rank": RANK, "rows": rows}


def ours_in_both(half: dict[str, Work], single: dict[str, Work]) -> dict[str, Work]:
    """Our work in bfloat16, and in float32 as its peer."""
    return {"ours": half["ours"], "ours in float32": single["ours"]}


def step(quick: bool) -> dict:
    """A training step of SmolLM2 in float32."""
    check(vectors.LOOK_UP, torch.backends.cpu.get_cpu_capability())
    return steps_of_smollm({name: f"{name} float32" for name in PEERS_OF_A_STEP}, quick)


PARTS = {"ops": ops, "step": step}
