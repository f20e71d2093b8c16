"""Loads a copy of a module with one replacement in its source; the real module stays loaded."""

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType

COPIES = itertools.count()


def mutated(module: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    """A copy of the module with `old`, which occurs once, replaced; other modules keep the original."""
    source = Path(module.__file__).read_text()
    assert source.count(old) == 1, f"{module.__name__}.py has {source.count(old)} of {old!r}"
    path = folder / f"{module.__name__}_{next(COPIES)}.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    copy = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = copy  # where dataclasses look up their module
    spec.loader.exec_module(copy)
    return copy
