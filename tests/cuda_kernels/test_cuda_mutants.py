"""Broken CUDA kernels, made by a rule: each barrier is removed, and each comparison and each number
in an index is changed by one.

The simulator must notice each of them, under one of three orders of threads. Mutants that do no
harm are listed with the reason.
"""

import ast
import copy
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from test_cuda_kernels import dense, random, scalars, simulated, special, weight_of

import nf4
from helpers import warpsim
from helpers.bounds import few_rows
from helpers.strategies import Recipe, same_bits
from kernels import dispatch, launch_cuda
from kernels.cpu import adamw
from kernels.packed_weight import flatten

# Coverage slows these tests down, and they reach no line that others do not.
pytestmark = pytest.mark.no_cover

FOLDER = Path(launch_cuda.__file__).parent.parent / "cuda_kernels"
OTHER = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
SIGNS = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}


class Mutant(NamedTuple):
    """A file of kernels, which of its places is changed (None: no place), and how that reads."""

    file: str
    place: int | None
    label: str

    def __str__(self) -> str:
        return f"{self.file}: {self.label}"


class Place(NamedTuple):
    """A node that the rule changes, and the innermost statement that it belongs to."""

    statement: ast.stmt
    node: ast.expr


def kernel_tree(file: str) -> ast.Module:
    return ast.parse((FOLDER / f"{file}.py").read_text())


def is_barrier(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "cuda.syncthreads"


def is_number(node: ast.AST) -> bool:
    """Whether it is U32(n) for a constant n > 0."""
    if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "U32"):
        return False
    return isinstance(node.args[0], ast.Constant) and bool(node.args[0].value)


def is_comparison(node: ast.AST) -> bool:
    return isinstance(node, ast.Compare) and type(node.ops[0]) in OTHER


def places_in(node: ast.AST, statement: ast.stmt | None = None) -> list[Place]:
    """Every node below this one that the rule changes, in the order of the source."""
    found = []
    for child in ast.iter_child_nodes(node):
        own = child if isinstance(child, ast.stmt) else statement
        if is_barrier(child) or is_number(child) or is_comparison(child):
            found.append(Place(own, child))
        found += places_in(child, own)
    return found


def change(place: Place) -> None:
    """Apply the rule to the tree that the place is in."""
    node = place.node
    if is_barrier(node):
        place.statement.value = ast.Constant(None)
    elif is_number(node):
        node.args[0].value += 1
    else:
        node.ops[0] = OTHER[type(node.ops[0])]()


def label_of(place: Place) -> str:
    """The statement, on one line however the file breaks it, with [old -> new] at the place."""
    statement, node = copy.deepcopy(place)
    if is_barrier(node):
        return "[cuda.syncthreads() -> pass]"
    if is_number(node):
        value = node.args[0].value
        node.args[0] = ast.Name(f"[{value} -> {value + 1}]")
    else:
        old = type(node.ops[0])
        sign = SIGNS[old]
        node.left = ast.Name(f"{ast.unparse(node.left)} [{sign} -> {SIGNS[OTHER[old]]}]\0")
        return header_of(statement).replace(f"\0 {sign}", "")
    return header_of(statement)


def header_of(statement: ast.stmt) -> str:
    """The statement without the statements in it."""
    if hasattr(statement, "body"):
        statement.body = [ast.Pass()]
        statement.orelse = []
    return ast.unparse(statement).removesuffix("\n    pass")


def mutants_of(file: str) -> list[Mutant]:
    """Every mutant that the rule makes of a file."""
    places = places_in(kernel_tree(file))
    return [Mutant(file, index, label_of(place)) for index, place in enumerate(places)]


# Mutants that do no harm, as they print, and why
HARMLESS = {
    "quantize: is_tiny = scale [< -> <=] F32(2.0 ** (-64))": (
        "at the end of the range, another power of two changes no code"
    ),
    "quantize: is_huge = scale [> -> >=] F32(2.0 ** 64)": "the same at the other end",
    "quantize: if start [< -> <=] n and n - start >= U32(8):": "at n the other half is false",
    "quantize: if start < n and n - start [>= -> >] U32(8):": "the last 8 are read one by one",
    "quantize: if start < n and n - start >= U32([8 -> 9]):": "the same",
    "quantize: if n - start [>= -> >] U32(8):": "their codes are written byte by byte",
    "quantize: if n - start >= U32([8 -> 9]):": "the same",
    "matmul: a0 = shared_word(pairs, U32(top << U32(7)) & U32([32640 -> 32641]) | bank)": (
        "the bit was shifted out"
    ),
    "matmul: a1 = shared_word(pairs, U32(low << U32(7)) & U32([32640 -> 32641]) | bank)": (
        "the same"
    ),
    "matmul: while remaining [> -> >=] 1:": "in one more round no warp has anything to do",
    "matmul: if split [< -> <=] U32(remaining):": (
        "a warp that has passed on its sums adds to what it will not use"
    ),
}


def mutated(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    tree = kernel_tree(mutant.file)
    if mutant.place is not None:
        change(places_in(tree)[mutant.place])
    name = f"cuda_kernels.broken_{mutant.file}"
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader=None))
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(ast.fix_missing_locations(tree), f"<{name}>", "exec"), vars(module))  # noqa: S102
    return module


def quantizes(kernels: ModuleType, order: int, patch: pytest.MonkeyPatch) -> bool:
    patch.setattr(launch_cuda, "blockwise", kernels.blockwise)
    exact = torch.arange(-8, 8) / 8  # levels with exact midpoints, each of which is a tie
    ties = torch.cat([torch.ones(1), (exact[1:] + exact[:-1]) / 2])
    for weight, block_size, codebook in [
        (Recipe((334,), torch.bfloat16).tensor(), 16, nf4.NF4),
        (ties, 16, exact),
        (Recipe((2055,), pattern="blocks of all sizes").tensor(), 256, nf4.NF4),
        (Recipe((133,), block_size=32, pattern="zero blocks").tensor(), 32, nf4.NF4),
    ]:
        expected = nf4.quantize(weight, block_size, codebook)
        with simulated(order):
            q = dispatch.quantize(weight, block_size, codebook)
        if not (same_bits(q.packed, expected.packed) and same_bits(q.absmax, expected.absmax)):
            return False
    return True


def dequantizes(kernels: ModuleType, order: int, patch: pytest.MonkeyPatch) -> bool:
    patch.setattr(launch_cuda, "v1", kernels.v1)
    patch.setattr(launch_cuda, "v4", kernels.v4)
    q, constants = weight_of(Recipe((2048,), torch.bfloat16), True)
    for rung, unit in ((kernels.v2, 2), (kernels.v3, 8)):
        out = torch.full((2048,), torch.nan, dtype=torch.bfloat16)
        rest = (q.packed, out, 2048) if unit == 2 else (out, 2048)
        kernel = rung("bfloat16")
        warpsim.run(
            kernel,
            2048 // unit // kernel.threads + 1,
            (launch_cuda.kernel_weight(flatten(q, constants)), *rest),
            order,
        )
        if not same_bits(out, dense(q, constants)):
            return False
    for recipe, dtype in [
        (Recipe((2341,), torch.bfloat16), torch.bfloat16),
        (Recipe((2049,), block_size=8), torch.float32),
    ]:
        q, constants = weight_of(recipe, True)
        with simulated(order):
            if not same_bits(dispatch.dequantize(q, dtype, constants), dense(q, constants, dtype)):
                return False
    return True


def multiplies(kernels: ModuleType, order: int, patch: pytest.MonkeyPatch) -> bool:
    patch.setattr(launch_cuda, "tensor_core", kernels.tensor_core)
    patch.setattr(launch_cuda, "portable", kernels.portable)
    patch.setattr(launch_cuda, "widest", lambda height, tiles, device: min(tiles, 2))
    for tokens, shape, dtype, block_size, capability in [
        (3, (9, 64), torch.float32, 32, (9, 0)),
        (4, (2, 1056), torch.float32, 32, (9, 0)),
        (3, (2, 64), torch.float16, 64, (7, 5)),
        (10, (40, 320), torch.bfloat16, 64, (9, 0)),
        (8, (32, 1088), torch.float16, 128, (8, 0)),
    ]:
        q, constants = weight_of(Recipe(shape, block_size=block_size), True)
        x = random(tokens, shape[1], dtype=dtype)
        bias = random(shape[0], seed=1)
        with simulated(order, capability):
            y = launch_cuda.few_rows(x, flatten(q, constants), bias)
        if not few_rows(x, dense(q, constants, torch.float32), bias).allows(y):
            return False
    return True


def updates(kernels: ModuleType, order: int, patch: pytest.MonkeyPatch) -> bool:
    patch.setattr(launch_cuda.optimizer, "ADAMW", kernels.ADAMW)
    group = {"betas": (0.9, 0.999), "lr": 1e-3, "eps": 1e-8, "weight_decay": 0.01}
    for n in (1032, 261):
        param = special(n, 1)
        grad = special(n, 2)
        moments = special(2 * n, 3).view(2, n).abs()
        expected = param.clone(), moments.clone()
        adamw.update(
            expected[0].numpy(), grad.numpy(), expected[1].numpy(), *scalars(step=2, **group)
        )
        with simulated(order):
            dispatch.adamw(param, grad, 2, group)(0, moments)
        if not (same_bits(param, expected[0]) and same_bits(moments, expected[1])):
            return False
    return True


CHECKS: dict[str, Callable[[ModuleType, int, pytest.MonkeyPatch], bool]] = {
    "quantize": quantizes,
    "dequantize": dequantizes,
    "matmul": multiplies,
    "adamw": updates,
}
MUTANTS = [mutant for file in CHECKS for mutant in mutants_of(file)]


def is_killed(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> bool:
    for order in range(3):
        try:
            if not CHECKS[mutant.file](mutated(mutant, monkeypatch), order, monkeypatch):
                return True
        except (AssertionError, IndexError, ValueError, RuntimeError, OverflowError):
            return True
    return False


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_mutant_is_killed(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_killed(mutant, monkeypatch) != (str(mutant) in HARMLESS)


def test_every_harmless_mutant_is_one() -> None:
    assert {*HARMLESS} <= {str(mutant) for mutant in MUTANTS}


@pytest.mark.parametrize("file", CHECKS)
def test_the_kernels_as_they_are_pass(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_killed(Mutant(file, None, "as it is"), monkeypatch)
