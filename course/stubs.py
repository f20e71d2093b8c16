"""Cuts the file that a student starts from out of the real file.

The body of each function of the exercise becomes `raise NotImplementedError`; its signature and
docstring stay. Private helpers that only these functions use are removed. All other lines stay as
they are.
"""

import ast

from course.lesson import ROOT, Lesson


def definitions(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    """The functions of a file by "name"; methods, and functions in functions, by "outer.name"."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            inner = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            found |= {f"{node.name}.{part.name}": part for part in inner}
    return found


def stub(lesson: Lesson) -> str:
    """The source that the student starts from."""
    source = lesson.source.read_text()
    tree = ast.parse(source)
    functions = definitions(tree)
    missing = [name for name in lesson.cut if name not in functions]
    if missing:
        where = f"course/exercises/{lesson.slug}.py"
        raise ValueError(f"{lesson.file} has no function {missing[0]}: see {where}")
    lines = source.splitlines(keepends=True)
    changed = {*lesson.cut, *only_used_by_cut(tree, lesson)}
    for name in sorted(changed, key=lambda name: -functions[name].lineno):  # the last one first
        node = functions[name]
        if name in lesson.cut:
            body = slice(start_of_body(node), node.end_lineno)
            indent = " " * (node.col_offset + 4)
            lines[body] = [f'{indent}raise NotImplementedError("write {node.name}")\n']
        else:
            del lines[with_blank_lines(node, lines)]
    return "".join(lines).rstrip("\n") + "\n"


def start_of_body(node: ast.FunctionDef) -> int:
    """The index of the first line of a function after its docstring."""
    if ast.get_docstring(node) is not None:
        return node.body[0].end_lineno
    return node.body[0].lineno - 1


def with_blank_lines(node: ast.FunctionDef, lines: list[str]) -> slice:
    """The lines of a function, its decorators and the blank lines that follow."""
    start = min(part.lineno for part in [node, *node.decorator_list]) - 1
    end = node.end_lineno
    while end < len(lines) and not lines[end].strip():
        end += 1
    return slice(start, end)


def only_used_by_cut(tree: ast.Module, lesson: Lesson) -> set[str]:
    """The private functions that only functions of the exercise use, directly or indirectly."""
    stay = {*lesson.cut, *lesson.given}
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    private = [name for name in functions if name.startswith("_") and name not in stay]
    gone = set()
    while True:
        used = names_used(tree, without={*lesson.cut, *gone})
        unused = {name for name in private if not used.get(name, set()) - {name}}
        if unused == gone:
            return gone
        gone = unused


def names_used(tree: ast.Module, without: set[str]) -> dict[str, set[str]]:
    """For each name in a file: the functions that use it; "" stands for code outside functions.

    without: functions whose code does not count.
    """
    users = {}
    owner_of = {id(node): name for name, node in definitions(tree).items()}

    def visit(node: ast.AST, owner: str) -> None:
        owner = owner_of.get(id(node), owner)
        if owner in without:
            return
        name = getattr(node, "id", None) or getattr(node, "attr", None)
        if name:
            users.setdefault(name, set()).add(owner)
        for child in ast.iter_child_nodes(node):
            visit(child, owner)

    visit(tree, "")
    return users


def write_stub(lesson: Lesson) -> str:
    """Write the student's file, unless there is one. Returns what to tell the student."""
    path = lesson.answer
    name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    if path.exists():
        return f"{name} is there already and was not changed; to start again, rename it"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(stub(lesson))
    functions = ", ".join(lesson.cut)
    return f"""\
wrote {name}: write {functions}
to try it:  PYTHONPATH={name.parent}:. .venv/bin/python   and there: import {path.stem}
to grade it:  make grade LESSON={lesson.number}"""
