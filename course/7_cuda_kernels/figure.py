"""What a warp writes at once, and how many accesses an element costs, in the simulator."""

import sys
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import nf4
from cuda_kernels import dequantize
from kernels.launch_cuda import kernel_weight
from kernels.packed_weight import flatten

sys.path.append(str(Path(__file__).parents[2] / "tests"))  # where the simulator is
from helpers import warpsim  # noqa: E402

N = 9216  # elements; a whole number of blocks of threads of each kernel but the last
RUNGS = {"v1": 1, "v2": 2, "v3": 8, "v4": 32}  # elements of a thread


def accesses_of(rung: str) -> tuple[list[warpsim.Access], Tensor]:
    """All accesses to global memory, and the decoded numbers."""
    weight = torch.randn(N, generator=torch.Generator().manual_seed(0)).bfloat16()
    q = nf4.quantize(weight)
    packed_weight = kernel_weight(flatten(q, None))  # constants in float32
    out = torch.empty(N, dtype=torch.bfloat16)
    arguments = {
        "v1": (q.packed, out, 0, N),
        "v2": (q.packed, out, N),
        "v3": (out, N),
        "v4": (out, N // 1024),
    }[rung]
    kernel = getattr(dequantize, rung)("bfloat16")
    blocks = -(-N // (RUNGS[rung] * kernel.threads))
    accesses: list[warpsim.Access] = []
    warpsim.run(kernel, blocks, (packed_weight, *arguments), 0, accesses)
    return accesses, out


def draw(figure: Figure) -> None:
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    recorded = {rung: accesses_of(rung) for rung in RUNGS}
    draw_writes(left, recorded)
    draw_accesses(right, recorded)


def draw_writes(axes: Axes, recorded: dict[str, tuple[list[warpsim.Access], Tensor]]) -> None:
    """The writes of the first warp: a row for each instruction, a color for each lane."""
    colors = ["#1f3a5f", "#9db8d2", "#b5442e", "#e3b3a6"]
    labels = []
    for rung, (accesses, out) in recorded.items():
        done = dict.fromkeys(range(32), 0)
        for access in accesses:
            if access.is_write and access.block == 0 and access.thread < 32:
                row = len(labels) + done[access.thread]
                done[access.thread] += 1
                span = (access.address - out.data_ptr(), access.nbytes)
                color = colors[access.thread % len(colors)]
                axes.broken_barh([span], (row - 0.4, 0.8), color=color, linewidth=0)
        count = max(done.values())
        labels += [f"{rung}, write {number + 1}" for number in range(count)]
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("byte of the result")
    axes.set_title("What the 32 lanes of a warp write at once (a color: a lane)", fontsize=10)


def draw_accesses(axes: Axes, recorded: dict[str, tuple[list[warpsim.Access], Tensor]]) -> None:
    """Accesses to global memory for each element."""
    for place, (accesses, _) in enumerate(recorded.values()):
        writes = sum(access.is_write for access in accesses) / N
        reads = len(accesses) / N - writes
        first = place == 0  # its labels are in the legend
        axes.bar(place, reads, color="#1f3a5f", label="reads" if first else "")
        top = axes.bar(
            place, writes, bottom=reads, color="#b5442e", label="writes" if first else ""
        )
        axes.bar_label(top, [f"{reads + writes:.2f}"], padding=2)
    axes.margins(y=0.1)
    axes.set_xticks(range(len(RUNGS)), RUNGS)
    axes.set_title("Accesses to global memory, per element", fontsize=10)
    axes.legend(frameon=False)
