"""A file of ours with one replacement in its source, loaded beside the real one."""

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType

COPIES = itertools.count()


def mutated(module: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    """The module with `old`, which it has once, replaced. Other modules keep the real one."""
    source = Path(module.__file__).read_text()
    assert source.count(old) == 1, f"{module.__name__}.py has {source.count(old)} of {old!r}"
    path = folder / f"{module.__name__}_{next(COPIES)}.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    copy = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = copy  # dataclasses look their module up
    spec.loader.exec_module(copy)
    return copy
