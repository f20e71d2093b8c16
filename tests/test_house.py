"""The house: who may import whom, what the README names, and that every concept fits on a few screens."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEAVES = ["command_line", "files", "processes", "tasks", "predict", "pretrained", "figures"]  # import nothing of ours
PACKAGES = ["cpu_kernels", "cuda_kernels"]  # nor do their files
ORDER = ["memory", "report", "nf4", "double_quant", "stored", "cpu_kernels", "cuda_kernels", "dispatch", "frozen", "parallel",
         "lora_matmul", "dora", "lora", "stores", "pager", "paged_optim", "bnb_format", "peft_format", "skeleton",
         "checkpoint", "streaming", "variants", "resume", "formats", "template", "packing", "data", "precision", "evaluate",
         "random_llama", "options", "weigh", "plan", "export", "train", "contenders", "contenders_cuda", "bench_cuda",
         "bench"]
SOURCES = sorted(path.stem for path in ROOT.glob("*.py"))
TORCH = "cpu_kernels/host.py"  # is not compiled, but calls those that are, and torch
DRIVER = "cuda_kernels/managed.py"  # talks to CUDA's driver and torch's streams, and compiles nothing
FILES = {path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).glob("*.py")}
LAUNCH = "cuda_kernels/launch.py"  # nor is this: from tensors to the driver
KERNELS = sorted(FILES - {TORCH, LAUNCH, DRIVER})
OURS = {*SOURCES, *PACKAGES}


def imports_of(path: Path) -> set[str]:
    """The top-level names that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def test_every_source_file_has_its_place_in_the_order() -> None:
    assert {*LEAVES, *ORDER} == OURS
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == {*PACKAGES}


@pytest.mark.parametrize("name", SOURCES)
def test_a_file_imports_only_what_comes_before_it(name: str) -> None:
    allowed = set() if name in LEAVES else {*ORDER[: ORDER.index(name)], *LEAVES}
    ours = imports_of(ROOT / f"{name}.py") & OURS
    assert ours <= allowed, f"{name}.py must not import {sorted(ours - allowed)}"


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_stands_alone(name: str) -> None:
    """On Numba and NumPy: neither torch nor anything of ours, nor the file beside it, whose changes Numba would not see.

    So some lines are in more than one of them, and they may be a little longer. Those for a GPU are not kept on disk, and
    share the building blocks of device.py.
    """
    source, shared = (ROOT / name).read_text(), {"cuda_kernels"} if name.startswith("cuda_kernels/") else set()
    assert imports_of(ROOT / name) <= {"numba", "numpy", "llvmlite", *shared, *sys.stdlib_module_names}
    assert "from ." not in source
    assert set(re.findall(r"from (cuda_kernels.*) import", source)) <= ({"cuda_kernels.device"} if shared else set())
    assert len(source.splitlines()) <= (320 if name == "cuda_kernels/device.py" else 240)


def test_what_calls_the_kernels_needs_them_and_torch() -> None:
    assert imports_of(ROOT / TORCH) & {*OURS, "numba", "transformers"} == {"cpu_kernels", "stored", "numba"}


def test_unified_memory_needs_torch_alone() -> None:
    assert imports_of(ROOT / DRIVER) == {"ctypes", "weakref", "torch"}


def test_what_launches_needs_kernels_torch_and_the_driver() -> None:
    assert imports_of(ROOT / LAUNCH) & {*OURS, "numba", "cuda", "numpy"} == {"cuda_kernels", "stored", "numba", "cuda"}
    assert all(len((ROOT / name).read_text().splitlines()) <= 220 for name in (TORCH, LAUNCH, DRIVER))


def test_the_kernels_of_a_gpu_are_imported_when_a_tensor_of_one_comes() -> None:
    """And cost nothing before: not their compiler either, which need not be installed."""
    code = "import sys, dispatch; sys.exit(any(name.startswith(('numba.cuda', 'numba_cuda', 'cuda_')) for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("name", ["nf4", "double_quant", "stored", "frozen", "lora_matmul", "lora", "stores", "pager",
                                  "paged_optim"])  # fmt: skip
def test_a_concept_needs_torch_and_scipy_alone(name: str) -> None:
    others = {"transformers", "peft", "bitsandbytes", "numpy", "numba", "llvmlite", "matplotlib", "tqdm"}
    assert not imports_of(ROOT / f"{name}.py") & others


@pytest.mark.parametrize("name", SOURCES)
def test_dispatch_alone_knows_the_kernels_and_their_compiler_and_stores_the_memory(name: str) -> None:
    compiler, kernels = {"numba", "llvmlite"}, set(PACKAGES)
    allowed = {"dispatch": kernels, "stores": {"cuda_kernels"}}
    assert imports_of(ROOT / f"{name}.py") & (compiler | kernels) <= allowed.get(name, set())


def test_the_bounds_of_the_tests_import_nothing_of_ours() -> None:
    assert not imports_of(ROOT / "tests" / "bounds.py") & OURS


@pytest.mark.parametrize("name", SOURCES)
def test_a_concept_fits_on_a_few_screens(name: str) -> None:
    assert len((ROOT / f"{name}.py").read_text().splitlines()) <= (250 if name == "train" else 200)


def test_the_tour_of_the_readme_names_every_file() -> None:
    readme = (ROOT / "README.md").read_text()
    others = ["Makefile", "requirements.txt", "requirements-gpu.txt", "requirements-dev.txt", "pyproject.toml", "paper/",
              "tests/", "LICENSE"]  # fmt: skip
    ours = [*(f"{source}.py" for source in SOURCES), *(f"{package}/" for package in PACKAGES)]
    assert not [name for name in [*ours, *others] if name not in readme]
