"""What a student's file may do, checked before it runs and while it runs.

It must not reach the reference, the oracles or the grader. This stops what a student may try; it is
no sandbox for hostile programs, so grade files of strangers in a container.
"""

import ast
import builtins
import importlib
import math
import os
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from course.lesson import ROOT, Lesson
from course.stubs import stub

LIBRARIES = {"numpy", "scipy", "torch"}
STANDARD = set(
    "__future__ bisect collections copy dataclasses functools heapq itertools math operator random"
    " statistics struct typing".split()
)
# Names that lead to other modules, or run text as code.
UNSAFE_NAMES = set(
    "__builtins__ __import__ breakpoint compile delattr eval exec getattr globals input locals"
    " open setattr vars".split()
)
UNSAFE_ATTRIBUTES = set(
    "__builtins__ __code__ __dict__ __globals__ __subclasses__ __traceback__ builtins ctypes"
    " ctypeslib f_back f_builtins f_globals f_locals gc gi_frame hub importlib inspect ops os"
    " subprocess sys tb_frame tofile".split()
)
PEERS = {"bitsandbytes", "peft", "torchao", "trl"}
# Events of sys.addaudithook that no exercise needs, in addition to opening a file of the project.
UNSAFE_EVENTS = set(
    "ctypes.dlopen ctypes.string_at ctypes.memset os.exec os.fork os.kill os.posix_spawn os.remove"
    " os.rename os.system shutil.rmtree socket.connect subprocess.Popen".split()
)


def fault_of(source: str, lesson: Lesson) -> str | None:
    """What is not allowed in a student's source, in one line, or None."""
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        return f"line {error.lineno}: this is not Python: {error.msg}"
    except (ValueError, RecursionError, MemoryError) as error:
        return f"this is not Python: {error}"
    real = ast.parse(lesson.source.read_text())
    allowed = LIBRARIES | STANDARD | imported(real)
    in_real = {name for node in ast.walk(real) for name in names_of(node)}
    for node in [part for part in ast.walk(tree) if part is not tree]:
        for module in sorted(imported(node) - allowed):
            remedy = f"import only {', '.join(sorted(allowed - {'__future__'}))}"
            return f"line {node.lineno}: {module} is not for this exercise: {remedy}"
        for name in names_of(node) - in_real:
            return f"line {node.lineno}: {name} is not for this exercise"
    return changed_by_student(tree, lesson)


def imported(node: ast.AST) -> set[str]:
    """The top-level names of the modules that a node imports; of a module's node, all of them."""
    if isinstance(node, ast.Module):
        return set().union(*map(imported, list(ast.walk(node))[1:]))
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {(node.module or ".").partition(".")[0] if node.level == 0 else "a relative import"}
    return set()


def imports_of_ours(lesson: Lesson) -> list[str]:
    """The modules of the project that the real file imports."""
    names = set()
    for node in ast.walk(ast.parse(lesson.source.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return sorted(filter(is_our_module, names))


def is_our_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


def names_of(node: ast.AST) -> set[str]:
    """The unsafe name that a node is, if it is one."""
    if isinstance(node, ast.Name):
        return {node.id} & UNSAFE_NAMES
    if isinstance(node, ast.Attribute):
        return {node.attr} & UNSAFE_ATTRIBUTES
    if isinstance(node, ast.ImportFrom):
        return {alias.name for alias in node.names} & (UNSAFE_ATTRIBUTES | UNSAFE_NAMES)
    return set()


def changed_by_student(tree: ast.Module, lesson: Lesson) -> str | None:
    """The first public name of the file that is not in the exercise and is not as in the stub.

    The tests use such names, for example a codebook, so a change could make a grade easier.
    """
    wanted = public_code(ast.parse(stub(lesson)), lesson)
    found = public_code(tree, lesson)
    for name in sorted({*wanted, *found}):
        if name in wanted and wanted[name] != found.get(name):
            if any(cut.startswith(f"{name}.") for cut in lesson.cut):
                name = f"what you do not write of the class {name}"
            return f"{name} is not part of this exercise: leave it as `make lesson` wrote it"
    return None


def public_code(tree: ast.Module, lesson: Lesson) -> dict[str, str]:
    """The code that defines each public name at the top level, outside the exercise."""
    code = {}
    outer = {cut.partition(".")[0] for cut in lesson.cut}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [part.id for target in targets for part in ast.walk(target) if is_name(part)]
        else:
            continue
        if isinstance(node, ast.ClassDef):
            node = without_private(node, lesson)
        if isinstance(node, ast.FunctionDef) and node.name in outer:
            continue  # a function of the exercise, or around one
        for name in names:
            if not name.startswith("_"):
                code[name] = code.get(name, "") + ast.dump(node)
    return code


def without_private(node: ast.ClassDef, lesson: Lesson) -> ast.ClassDef:
    """A class without its docstring, its private methods and those of the exercise.

    __init__ is left without assignments to private attributes, which a student may add.
    """
    body = []
    for part in node.body:
        name = getattr(part, "name", "")
        is_private = name.startswith("_") and not name.startswith("__")
        is_cut = f"{node.name}.{name}" in lesson.cut
        if name == "__init__" and not is_cut:
            part.body = [line for line in part.body if not sets_private_attribute(line)]
        if not (is_private or is_cut or isinstance(part, ast.Expr)):
            body.append(part)
    return ast.ClassDef(node.name, node.bases, node.keywords, body, node.decorator_list)


def sets_private_attribute(node: ast.stmt) -> bool:
    """Whether a statement is `self._name = value`."""
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return all(
        isinstance(target, ast.Attribute)
        and isinstance(target.value, ast.Name)
        and target.value.id == "self"
        and target.attr.startswith("_")
        for target in targets
    )


def is_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Name)


class Watch:
    """Notices, while a student's code runs, that it reaches what it must not reach.

    path: the student's file. `fault` is what was noticed first. Code that catches the exception
    does not undo the fault.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.fault: str | None = None
        self.active = True
        self.functions = [(place, callables_of(place)) for place in self._places()]
        self.modules = {name: sys.modules[name] for name in self._modules()}
        sys.addaudithook(self.audit)

    def _modules(self) -> list[str]:
        tops = {"_pytest", "builtins", "course", "helpers", "hypothesis", "math", "pytest", "torch"}
        return [name for name in sys.modules if name.partition(".")[0] in tops]

    def _places(self) -> list[ModuleType | type]:
        torch = sys.modules["torch"]
        names = [name for name in self._modules() if not name.startswith(("torch.", "_pytest."))]
        names += ["torch.nn.functional", "_pytest.runner", "_pytest.python", "_pytest.outcomes"]
        names += ["numpy", "_pytest.raises", "torch.autograd", "torch.autograd.graph", "torch.nn"]
        modules = [sys.modules[name] for name in names]
        of_helpers = [
            value
            for name, module in zip(names, modules)
            for value in vars(module).values()
            if isinstance(value, type) and value.__module__ == name and name.startswith("helpers.")
        ]
        return [builtins, math, torch.Tensor, *modules, *of_helpers]

    def check(self) -> str | None:
        """The fault so far; looks for functions and modules that were replaced."""
        for place, before in self.functions:
            after = callables_of(place)
            changed = [name for name in before if after.get(name) is not before[name]]
            if isinstance(place, type):
                changed += [name for name in after if name not in before]
            if changed and self.fault is None:
                self.fault = f"your code replaces {place.__name__}.{changed[0]}"
        for name, module in self.modules.items():
            if sys.modules.get(name) is not module and self.fault is None:
                self.fault = f"your code replaces the module {name}"
        return self.fault

    def audit(self, event: str, args: tuple) -> None:
        """A hook of sys.addaudithook: raises if the student's code causes a forbidden event."""
        if not self.active or not self._is_forbidden(event, args) or not self._is_running():
            return
        what = f"{event} {args[0]}" if args else event
        self.fault = self.fault or f"your code must not do this: {what}"
        raise PermissionError(self.fault)

    def _is_forbidden(self, event: str, args: tuple) -> bool:
        if event == "open":
            path = os.path.realpath(args[0]) if isinstance(args[0], str) else ""
            outside = not path.startswith(f"{ROOT}/") or path.startswith(f"{ROOT}/.venv/")
            return not outside and path != self.path
        return event in UNSAFE_EVENTS

    def _is_running(self) -> bool:
        """Whether a function of the student's file is on the stack."""
        frame = sys._getframe(1)
        while frame:
            if frame.f_code.co_filename == self.path:
                return True
            frame = frame.f_back
        return False


class Absent(ModuleType):
    """Stands for a peer, which a student's code could call instead of its own.

    Tests that compare with a peer can be imported, but none of them can be part of a law.
    """

    __path__ = ()

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class AbsentPeers(MetaPathFinder, Loader):
    """Finds `Absent` for each module of a peer."""

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name.partition(".")[0] in PEERS else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Absent(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def callables_of(place: ModuleType | type) -> dict[str, Callable]:
    return {name: value for name, value in vars(place).items() if callable(value)}


def load(lesson: Lesson, path: str) -> ModuleType:
    """Import a student's file under the name of the real file, so that all others import it."""
    module = ModuleType(lesson.module)
    module.__file__ = path
    sys.modules[lesson.module] = module  # where dataclasses look up their module
    package, _, last = lesson.module.rpartition(".")
    if package:
        setattr(importlib.import_module(package), last, module)
    with open(path) as file:
        code = compile(file.read(), path, "exec")
    exec(code, module.__dict__)
    return module
