"""The house: who may import whom, what the README names, and that every concept fits on a few screens."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEAVES = ["files", "tasks", "memory", "pretrained", "report"]  # import nothing of ours
ORDER = ["nf4", "double_quant", "frozen", "lora_matmul", "lora", "pager", "paged_optim",
         "bnb_format", "peft_format", "skeleton", "checkpoint", "resume", "data", "evaluate", "train"]
SOURCES = sorted(path.stem for path in ROOT.glob("*.py"))


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
    assert set(SOURCES) == {*LEAVES, *ORDER}


@pytest.mark.parametrize("name", SOURCES)
def test_a_file_imports_only_what_comes_before_it(name: str) -> None:
    allowed = set() if name in LEAVES else {*ORDER[: ORDER.index(name)], *LEAVES}
    ours = imports_of(ROOT / f"{name}.py") & set(SOURCES)
    assert ours <= allowed, f"{name}.py must not import {sorted(ours - allowed)}"


@pytest.mark.parametrize("name", ["nf4", "double_quant", "frozen", "lora_matmul", "lora", "pager", "paged_optim"])
def test_a_concept_needs_torch_and_scipy_alone(name: str) -> None:
    others = {"transformers", "peft", "bitsandbytes", "numpy", "numba", "matplotlib", "tqdm"}
    assert not imports_of(ROOT / f"{name}.py") & others


def test_the_bounds_of_the_tests_import_nothing_of_ours() -> None:
    assert not imports_of(ROOT / "tests" / "bounds.py") & set(SOURCES)


@pytest.mark.parametrize("name", SOURCES)
def test_a_concept_fits_on_a_few_screens(name: str) -> None:
    assert len((ROOT / f"{name}.py").read_text().splitlines()) <= (250 if name == "train" else 200)


def test_the_tour_of_the_readme_names_every_file() -> None:
    readme = (ROOT / "README.md").read_text()
    others = ["Makefile", "requirements.txt", "requirements-dev.txt", "pyproject.toml", "paper/", "tests/", "LICENSE"]
    assert not [name for name in [*(f"{source}.py" for source in SOURCES), *others] if name not in readme]
