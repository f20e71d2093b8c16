"""The machine code of the CUDA kernels, compiled for three generations of GPUs without having one.

It shows what results do not: registers spilled to memory, loads narrower than intended, unused
tensor cores, and loads that may return an old copy of what the kernel itself has written.
"""

import re
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import nvidia
import pytest

from cuda_kernels import adamw, dequantize, matmul, quantize
from cuda_kernels.device import Kernel
from kernels import launch_cuda

TOOLS = Path(nvidia.__path__[0], "cu13", "bin")
GENERATIONS = ["sm_80", "sm_89", "sm_90"]
KINDS = ["bfloat16", "float16", "float32"]
KERNELS: dict[str, Callable[[], Kernel]] = {
    **{f"quantize {kind}": lambda kind=kind: quantize.blockwise(kind) for kind in KINDS},
    **{f"dequantize v1 {kind}": lambda kind=kind: dequantize.v1(kind) for kind in KINDS},
    **{
        f"dequantize {rung.__name__} bfloat16": lambda rung=rung: rung("bfloat16")
        for rung in (dequantize.v2, dequantize.v3)
    },
    **{f"dequantize v4 {kind}": lambda kind=kind: dequantize.v4(kind) for kind in KINDS},
    **{
        f"matmul {kind} {tiles}x{groups}": lambda kind=kind, tiles=tiles, groups=groups: (
            matmul.tensor_core(kind, tiles, groups)
        )
        for kind, tiles, groups in [
            ("bfloat16", 1, 1),
            ("float16", 1, 1),
            ("bfloat16", 2, 2),
            ("bfloat16", 4, 4),
            ("bfloat16", 8, 4),
            ("bfloat16", 8, 1),
        ]
    },
    **{
        f"matmul portable {kind} {rows}": lambda kind=kind, rows=rows: matmul.portable(kind, rows)
        for kind, rows in [("float32", 1), ("float32", 4), ("float16", 4)]
    },
    "adamw": lambda: adamw.ADAMW,
}
CASES = [(name, gpu) for name in KERNELS for gpu in GENERATIONS]
CASES += [
    ("matmul portable float16 4", "sm_75"),
    ("dequantize v4 float16", "sm_75"),
    ("quantize float32", "sm_75"),
]


class Code(NamedTuple):
    """The assembler's report on a kernel; its instructions, without predicates, and its labels."""

    report: str
    lines: list[str]

    @property
    def instructions(self) -> list[str]:
        return [line for line in self.lines if not line.startswith(".L")]

    def count(self, name: str) -> int:
        return sum(instruction.startswith(name) for instruction in self.instructions)

    def loop(self, name: str) -> list[str]:
        """The innermost loop with such an instruction: from a label to a branch back to it."""
        ends = [(at, re.search(r"BRA.*`\((\.L\w+)\)", line)) for at, line in enumerate(self.lines)]
        starts = {line[:-1]: at for at, line in enumerate(self.lines) if line.startswith(".L")}
        bodies = [
            self.lines[starts[end[1]] + 1 : at + 1]
            for at, end in ends
            if end and starts[end[1]] < at
        ]
        return min(
            (body for body in bodies if any(line.startswith(name) for line in body)), key=len
        )


@cache
def compiled(name: str, gpu: str) -> Code:
    """Compiled as launch_cuda.py does, but with the toolkit's assembler, not the driver's."""
    ptx = assembly(name, (8, 0) if gpu in GENERATIONS else (7, 5))
    with TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        binary = Path(folder, "kernel.cubin")
        source.write_text(ptx)
        made = run("ptxas", "-v", f"-arch={gpu}", source, "-o", binary)
        listing = run("nvdisasm", "-c", binary)
    found = re.findall(
        r"^(\.L\w+:)|/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ )?([A-Z][^;]*?)\s*;",
        listing.stdout,
        re.MULTILINE,
    )
    return Code(made.stderr, [label or instruction for label, instruction in found])


@cache
def assembly(name: str, generation: tuple[int, int]) -> str:
    return launch_cuda.assembly(KERNELS[name](), generation)


def run(tool: str, *arguments: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run([TOOLS / tool, *arguments], check=True, capture_output=True, text=True)


def tiles_of(name: str) -> int:
    """Of 8 rows of x, from the name of a product: matmul bfloat16 4x2 has 4."""
    return int(name.split()[2].partition("x")[0])


@pytest.mark.parametrize(("name", "gpu"), CASES)
def test_no_register_is_spilled_and_no_array_lies_in_memory(name: str, gpu: str) -> None:
    code = compiled(name, gpu)
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in code.report
    assert not code.count("LDL") and not code.count("STL")


@pytest.mark.parametrize(("name", "gpu"), CASES)
def test_loads_and_stores_are_as_wide_as_the_docstrings_say(name: str, gpu: str) -> None:
    code = compiled(name, gpu)
    wide = code.count("LDG.E.128")
    stored = code.count("STG.E.128")
    if name.startswith("quantize"):
        assert wide == (2 if "float32" in name else 1)
    elif "v4" in name:
        assert wide == 1 and stored >= (8 if "float32" in name else 4)
    elif "v3" in name:
        assert stored >= 1
    elif name == "adamw":
        assert (wide, stored) == (4, 3)
    elif "portable" in name:
        assert wide >= 2
    elif "matmul" in name:
        assert wide >= 4 + 4 * tiles_of(name)  # 4 of W, and 4 of x per 8 rows of it


@pytest.mark.parametrize(
    ("name", "gpu"), [case for case in CASES if "matmul" in case[0] and "portable" not in case[0]]
)
def test_tensor_cores_multiply(name: str, gpu: str) -> None:
    """Sixteen times for each 8 rows of x: 32 rows of W, two blocks of 64 columns."""
    assert compiled(name, gpu).count("HMMA.16816.F32") >= 16 * tiles_of(name)


# How many loads of a kernel may use the read-only path, which is for what it never writes
READ_ONLY = {"quantize": 2, "dequantize": 1, "matmul": None, "adamw": 1}


@pytest.mark.parametrize(("name", "gpu"), CASES)
def test_nothing_that_a_kernel_writes_is_read_as_if_it_were_constant(name: str, gpu: str) -> None:
    """AdamW may do so for the gradient alone; the other kernels do not read what they write."""
    loads = [
        instruction
        for instruction in compiled(name, gpu).instructions
        if instruction.startswith("LD")
    ]
    constant = sum("CONSTANT" in load for load in loads)
    most = READ_ONLY[name.split()[0]]
    assert most is None or constant <= most


def test_each_rung_of_the_ladder_needs_fewer_instructions_an_element() -> None:
    """v4 has its loop twice, with and without double quantization, and runs it once."""
    per_element = [
        len(compiled(f"dequantize {rung} bfloat16", "sm_90").instructions) / elements
        for rung, elements in (("v1", 1), ("v2", 2), ("v3", 8), ("v4", 2 * 32))
    ]
    assert per_element == sorted(per_element, reverse=True)


def test_decoding_leaves_the_memory_time() -> None:
    """The product with 8 rows must decode three quarters of the 3e12 bytes that memory can read.

    An H100 has 132 processors with 4 schedulers each. A scheduler starts an instruction for 32
    lanes in each of 1.7e9 cycles. A step of the loop decodes 128 elements per lane.
    """
    elements = 0.75 * 3e12 / (1 / 2 + 1 / 64)  # per second
    slots = 4 * 132 * 32 * 1.7e9 / elements  # instructions per element
    assert len(compiled("matmul bfloat16 1x1", "sm_90").loop("HMMA")) / 128 < slots
