"""What lies in the root, which package imports which, what importing a file of the method loads."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
METHOD = ["nf4", "double_quant", "lora", "paged_optim"]  # in reading order
# A file imports its own package and those before it; tests may import everything.
ORDER = [
    "nf4",
    "double_quant",
    "cuda_kernels",
    "kernels",
    "lora",
    "paged_optim",
    "variants",
    "checkpoints",
    "data",
    "memory",
    "training",
    "train",
    "bench",
    "paper",
    "course",
]
PACKAGES = [name for name in ORDER if (ROOT / name).is_dir()]
FILES = [*ROOT.glob("*.py"), *(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))]
NAMES = sorted(path.relative_to(ROOT).as_posix() for path in FILES)
LAUNCHERS = {"kernels/cpu/launch.py"}  # from tensors to compiled kernels
CPU_KERNELS = [name for name in NAMES if name.startswith("kernels/cpu/")]
CUDA_KERNELS = [name for name in NAMES if name.startswith("cuda_kernels/")]
UNIFIED_MEMORY = "cuda_kernels/unified_memory.py"


def imports_of(name: str) -> set[str]:
    """The modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            found.add(node.module)
    return found


def top_level(modules: set[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules}


@cache
def loaded_by(statement: str) -> set[str]:
    """The top-level modules that a fresh process has after a statement."""
    program = f"{statement}\nimport sys\nprint(*sys.modules)"
    command = [sys.executable, "-c", program]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return set(output.split())


def test_the_root_holds_the_five_files_of_the_method() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == {*METHOD, "train"}


def test_every_folder_with_python_files_has_its_place_in_the_order() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    folders = {name.partition("/")[0] for name in tracked if "/" in name}
    assert folders == {*PACKAGES, "tests"}


@pytest.mark.parametrize("name", NAMES)
def test_a_file_imports_only_what_comes_before_its_package(name: str) -> None:
    own = name.removesuffix(".py").partition("/")[0]
    later = ORDER[ORDER.index(own) + 1 :]
    assert not top_level(imports_of(name)) & {*later}


@pytest.mark.parametrize("name", METHOD)
def test_importing_a_concept_loads_torch_and_scipy_and_nothing_heavier(name: str) -> None:
    heavy = {
        *("numba", "numba_cuda", "llvmlite", "transformers", "peft", "bitsandbytes", "safetensors"),
        *("matplotlib", "tqdm", "checkpoints", "data", "memory", "training"),
        *("torch.distributed.fsdp", "torch.distributed.tensor"),
    }
    baseline = loaded_by("import torch, scipy.special")
    assert not (loaded_by(f"import {name}") - baseline) & heavy


def test_parsing_flags_loads_nothing_heavy() -> None:
    loaded = loaded_by("from training.options import parse_args")
    assert not loaded & {"torch", "numpy", "numba", "transformers", "checkpoints", "matplotlib"}


def test_kernels_are_imported_when_the_first_one_is_wanted() -> None:
    """Those of a GPU not even then on a processor: their compiler need not be installed."""
    loaded = loaded_by(
        "import torch\nfrom kernels import dispatch\ndispatch.quantize(torch.ones(2))"
    )
    assert "kernels.cpu.launch" in loaded and "kernels.launch_cuda" not in loaded


@pytest.mark.parametrize("name", [*CPU_KERNELS, *CUDA_KERNELS])
def test_a_kernel_stands_alone(name: str) -> None:
    """Kernels import nothing of ours but other kernels and their building blocks.

    Numba's disk cache misses changes in an import; vectors.kernel notices them within kernels/cpu.
    """
    if name in LAUNCHERS or name == UNIFIED_MEMORY:
        return
    shared = {"cuda_kernels.device"}
    if name in CPU_KERNELS:
        shared = {"kernels.cpu.vectors", "kernels.cpu.decode"}
    others = top_level(imports_of(name) - shared)
    assert others <= {"numba", "numpy", "llvmlite", *sys.stdlib_module_names}


def test_unified_memory_needs_torch_and_the_standard_library() -> None:
    assert top_level(imports_of(UNIFIED_MEMORY)) <= {"torch", *sys.stdlib_module_names}


@pytest.mark.parametrize("name", NAMES)
def test_only_kernels_know_their_compiler(name: str) -> None:
    compiler = {"numba", "llvmlite", "cuda"}
    if not name.startswith(("kernels/cpu/", "cuda_kernels/", "kernels/launch_cuda", "bench/")):
        assert not top_level(imports_of(name)) & compiler


def test_the_bounds_of_the_tests_import_nothing_of_ours() -> None:
    assert not top_level(imports_of("tests/helpers/bounds.py")) & {*ORDER}


def test_the_readme_names_every_file_of_the_method_and_every_package() -> None:
    readme = (ROOT / "README.md").read_text()
    others = ["Makefile", "requirements.txt", "requirements-gpu.txt"]
    others += ["requirements-course.txt", "requirements-dev.txt"]
    others += ["pyproject.toml", "LICENSE", "tests/", "docs/"]
    names = [*(f"{name}.py" for name in [*METHOD, "train"]), *(f"{name}/" for name in PACKAGES)]
    assert not [name for name in [*names, *others] if name not in readme]
    assert not [page.name for page in (ROOT / "docs").glob("*.md") if page.name not in readme]


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
        local = [link for link in links if not link.startswith("http")]
        assert not [link for link in local if not (page.parent / link).exists()], page.name
