"""The house: who may import whom, what the README names, and that every concept fits on a few screens."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEAVES = ["files", "tasks", "predict", "pretrained", "report", "figures"]  # import nothing of ours
PACKAGES = ["cpu_kernels", "cuda_kernels"]  # nor do their files
ORDER = ["memory", "nf4", "double_quant", "cpu_kernels", "cuda_kernels", "dispatch", "frozen", "lora_matmul", "lora", "stores",
         "pager", "paged_optim", "bnb_format", "peft_format", "skeleton", "checkpoint", "resume", "data", "evaluate",
         "random_llama", "train", "contenders", "contenders_cuda", "bench_cuda", "bench"]
SOURCES = sorted(path.stem for path in ROOT.glob("*.py"))
TORCH = "cpu_kernels/host.py"  # is not compiled, but calls those that are, and torch
DRIVER = "cuda_kernels/managed.py"  # talks to CUDA's driver and torch's streams, and compiles nothing
FILES = {path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).glob("*.py")}
KERNELS = sorted(FILES - {TORCH, DRIVER})
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

    So some lines are in more than one of them, and they may be a little longer.
    """
    source = (ROOT / name).read_text()
    assert imports_of(ROOT / name) <= {"numba", "numpy", "llvmlite", *sys.stdlib_module_names} and "from ." not in source
    assert len(source.splitlines()) <= 240


def test_what_calls_the_kernels_needs_them_and_torch() -> None:
    assert imports_of(ROOT / TORCH) & {*OURS, "numba", "transformers"} == {"cpu_kernels"}


def test_unified_memory_needs_torch_alone() -> None:
    assert imports_of(ROOT / DRIVER) == {"ctypes", "weakref", "torch"}


@pytest.mark.parametrize("name", ["nf4", "double_quant", "frozen", "lora_matmul", "lora", "stores", "pager", "paged_optim"])
def test_a_concept_needs_torch_and_scipy_alone(name: str) -> None:
    others = {"transformers", "peft", "bitsandbytes", "numpy", "numba", "llvmlite", "matplotlib", "tqdm"}
    assert not imports_of(ROOT / f"{name}.py") & others


@pytest.mark.parametrize("name", SOURCES)
def test_dispatch_alone_knows_the_kernels_and_their_compiler_and_stores_the_memory(name: str) -> None:
    compiler, kernels = {"numba", "llvmlite"}, set(PACKAGES)
    allowed = {"dispatch": kernels | {"numba"}, "stores": {"cuda_kernels"}, "bench": {"numba"}, "contenders": {"numba"}}
    assert imports_of(ROOT / f"{name}.py") & (compiler | kernels) <= allowed.get(name, set())


def test_the_bounds_of_the_tests_import_nothing_of_ours() -> None:
    assert not imports_of(ROOT / "tests" / "bounds.py") & OURS


@pytest.mark.parametrize("name", SOURCES)
def test_a_concept_fits_on_a_few_screens(name: str) -> None:
    assert len((ROOT / f"{name}.py").read_text().splitlines()) <= (250 if name == "train" else 200)


def test_the_tour_of_the_readme_names_every_file() -> None:
    readme = (ROOT / "README.md").read_text()
    others = ["Makefile", "requirements.txt", "requirements-dev.txt", "pyproject.toml", "paper/", "tests/", "LICENSE"]
    ours = [*(f"{source}.py" for source in SOURCES), *(f"{package}/" for package in PACKAGES)]
    assert not [name for name in [*ours, *others] if name not in readme]
