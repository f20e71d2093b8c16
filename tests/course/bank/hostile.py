"""Answers to lesson 2 that attack the grader, by intent or by accident.

Each is told to the student in one line, and gets no points for what was not shown before.
"""

from dataclasses import dataclass

from bank.answers import Answer

FIND = "\nfrom operator import attrgetter as find\n"
MODULES = FIND + 'modules = find("sys.modules")(torch)\n'


@dataclass(frozen=True)
class Hostile:
    """An attack: code at the end of the file, or as the body of a helper of `quantize`.

    says: what the line that the student reads contains.
    points: those of the first two laws, the second of which calls the helper.
    """

    name: str
    says: str
    at_import: str = ""
    in_call: str = ""
    points: int = 0

    @property
    def answer(self) -> Answer:
        functions = {}
        if self.in_call:
            body = "".join(f"    {line}\n" for line in self.in_call.splitlines())
            functions["_nearest"] = f"def _nearest(x, codebook):\n{body}"
        return Answer(self.name, functions=functions)


CODE_POINTS = 2  # of the law about the levels alone

HOSTILE = [
    Hostile("an endless loop", "an endless loop?", in_call="while True: pass", points=CODE_POINTS),
    Hostile("an endless loop at import", "an endless loop?", at_import="while True: pass"),
    Hostile(
        "an exit",
        "your code ended the process that tests it.",
        in_call='from operator import attrgetter as find\nfind("os._exit")(torch)(0)',
        points=CODE_POINTS,
    ),
    Hostile(
        "an exit at import",
        "your code ended the process that tests it.",
        at_import=FIND + 'find("os._exit")(torch)(0)',
    ),
    Hostile("SystemExit at import", "cannot be imported: line", at_import="raise SystemExit"),
    Hostile(
        "SystemExit in a call",
        "SystemExit",
        in_call="raise SystemExit",
        points=CODE_POINTS,
    ),
    Hostile(
        "a crash",
        "your code crashed Python (SIGSEGV).",
        in_call="import numpy as np\n"
        "wild = np.lib.stride_tricks.as_strided(np.zeros(1), (9,), (2**44,))\n"
        "return wild.sum()",
        points=CODE_POINTS,
    ),
    Hostile(
        "a crash by ctypes",
        "ctypes.string_at",
        in_call='from operator import attrgetter as find\nfind("ctypes.string_at")(torch)(0)',
        points=CODE_POINTS,
    ),
    Hostile(
        "endless recursion",
        "RecursionError",
        in_call="return _nearest(x, codebook)",
        points=CODE_POINTS,
    ),
    Hostile(
        "more memory than there is",
        "RuntimeError",
        in_call="return torch.zeros(2**36)",
        points=CODE_POINTS,
    ),
    Hostile("no Python", "this is not Python", at_import="def normal_float(:"),
    Hostile("a name that is not there", "NameError", at_import="levels_of(4)"),
    Hostile("a name that the tests need is deleted", "has no attribute", at_import="del NF4"),
    # the reference
    Hostile("ctypes", "ctypes is not for this exercise", at_import="import ctypes"),
    Hostile("a peer", "bitsandbytes is not for this", in_call="import bitsandbytes"),
    Hostile("our kernels", "kernels is not for this", at_import="from kernels import dispatch"),
    Hostile(
        "the oracle", "helpers is not for this", at_import="from helpers.naive import quantize"
    ),
    Hostile(
        "the real file by its path",
        "importlib is not for this",
        at_import="import importlib.util\n"
        'spec = importlib.util.spec_from_file_location("real", "nf4.py")',
    ),
    Hostile(
        "the real file as text",
        "exec is not for this",
        at_import='exec(open("nf4.py").read())',
    ),
    Hostile("the import function", "__import__ is not for this", in_call='__import__("lora")'),
    Hostile(
        "our kernels by a detour",
        "your code must not do this: open",
        at_import=FIND + 'find("importlib.import_module")(torch)("kernels.dispatch")',
    ),
    Hostile(
        "our layers by a detour, with the exception caught",
        "your code must not do this: open",
        in_call="from operator import attrgetter as find\n"
        "try:\n"
        '    find("importlib.import_module")(torch)("lora")\n'
        "except Exception:\n"
        "    pass",
        points=CODE_POINTS,
    ),
    Hostile(
        "the real file by numpy",
        "your code must not do this: open",
        at_import='import numpy\nnumpy.fromfile("nf4.py", dtype="u1")',
    ),
    # the tests
    Hostile(
        "torch.equal is replaced",
        "your code replaces torch.equal",
        at_import="torch.equal = lambda *_: True",
    ),
    Hostile(
        "a comparison is replaced while a test runs",
        "your code replaces Tensor.all",
        in_call="torch.Tensor.all = lambda *_: torch.tensor(True)",
        points=CODE_POINTS,
    ),
    Hostile(
        "hypothesis is replaced",
        "your code replaces hypothesis.given",
        at_import=MODULES + 'modules["hypothesis"].given = lambda *_: lambda test: lambda: None',
    ),
    Hostile(
        "pytest is replaced",
        "your code replaces pytest.raises",
        at_import=MODULES + 'modules["pytest"].raises = None',
    ),
    Hostile(
        "a bound is replaced",
        "your code replaces helpers.bounds.decision_slack",
        at_import=MODULES + 'modules["helpers.bounds"].decision_slack = lambda: 9.0',
    ),
    Hostile(
        "a module of the tests is replaced",
        "your code replaces the module helpers.strategies",
        at_import=MODULES + 'modules["helpers.strategies"] = modules["math"]',
    ),
    Hostile(
        "a given function is changed",
        "check_finite is not part of this exercise",
        at_import="def check_finite(flat, shape): pass",
    ),
    Hostile("a given codebook is changed", "FP4 is not part of this", at_import="FP4 = NF4"),
]
