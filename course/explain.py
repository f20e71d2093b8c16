"""Shows what a student's function returned beside what it should have returned."""

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from inspect import BoundArguments, signature
from types import FunctionType, ModuleType

import torch
from torch import Tensor

MOST_ROWS = 4  # of a result with many numbers, the first that differ
WIDTH = 100
SHOWN_NUMBERS = 6  # of a tensor


@dataclass
class Raised:
    """An exception as the result of a call; `line` is that of the student's file."""

    error: BaseException
    line: int | None = None


@dataclass
class Call:
    """A call of a public function of the student's file, with copies of what it was given."""

    function: str
    arguments: dict[str, object]
    result: object = None


class Trace:
    """Records the calls that a test makes of the functions of a module, not those within it."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.calls: list[Call] = []
        self.inside = False
        for name, value in list(vars(module).items()):
            is_own = isinstance(value, FunctionType) and value.__module__ == module.__name__
            if is_own and not name.startswith("_"):
                setattr(module, name, self._recording(name, value))

    def start(self) -> None:
        self.calls = []
        self.inside = False

    def _recording(self, name: str, function: Callable) -> Callable:
        @wraps(function)
        def recording(*args: object, **kwargs: object) -> object:
            if self.inside:
                return function(*args, **kwargs)
            call = Call(name, self._copies(function, args, kwargs))
            self.calls.append(call)
            self.inside = True
            try:
                result = function(*args, **kwargs)
                call.result = copied(result)
                return result
            except BaseException as error:
                call.result = Raised(error, line_in(self.module.__file__, error))
                raise
            finally:
                self.inside = False

        return recording

    def _copies(
        self, function: Callable, args: tuple, kwargs: dict[str, object]
    ) -> dict[str, object]:
        """The arguments by name; a tensor that the module defines, such as NF4, is not copied."""
        arguments = signature(function).bind(*args, **kwargs).arguments
        own = {id(value) for value in tensors_of(self.module).values()}
        return {
            name: value if id(value) in own else copied(value) for name, value in arguments.items()
        }


def tensors_of(module: ModuleType) -> dict[str, Tensor]:
    """The public tensors that a module defines."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and not name.startswith("_")
    }


def copied(value: object) -> object:
    try:
        return copy.deepcopy(value)
    except Exception:  # such as a tensor with a gradient function
        return value.detach().clone() if isinstance(value, Tensor) else value


def line_in(path: str, error: BaseException) -> int | None:
    """The last line of a file that an exception passed through."""
    line = None
    trace = error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == path:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def explain(calls: list[Call], student: ModuleType, reference: ModuleType) -> str:
    """The calls of a failed test with wanted and got side by side; "" if nothing differs.

    The first call that differs is enough: later calls may get its result. Without a call that
    differs, the tensors that the modules define are compared.
    """
    prefix = student.__name__.rpartition(".")[2]
    for call in calls:
        wanted = again(call, reference)
        if different(wanted, call.result):
            title = f"{prefix}.{call.function}({described(call.arguments, student)})"
            return side_by_side(title, wanted, call.result)
    for name, wanted in tensors_of(reference).items():
        got = vars(student).get(name)
        if different(wanted, got):
            return side_by_side(f"{prefix}.{name}", wanted, got)
    return ""


def again(call: Call, reference: ModuleType) -> object:
    """The result of the same call of the reference."""
    function = getattr(reference, call.function)
    try:
        bound = BoundArguments(signature(function), copied(call.arguments))
        return function(*bound.args, **bound.kwargs)
    except Exception as error:
        return Raised(error)


def different(wanted: object, got: object) -> bool:
    return parts_of(wanted) != parts_of(got)


def described(arguments: dict[str, object], module: ModuleType) -> str:
    """The arguments of a call; a tensor that the module defines is shown by its name."""
    names = {id(value): name for name, value in tensors_of(module).items()}
    return ", ".join(
        f"{name}={names.get(id(value)) or short(value)}" for name, value in arguments.items()
    )


def short(value: object) -> str:
    """An argument in a few words."""
    if isinstance(value, Tensor):
        return f"tensor({listed(elements(value))}{kind_unless_plain(value)})"
    if dataclasses.is_dataclass(value):
        fields = [f"{f.name}={short(getattr(value, f.name))}" for f in dataclasses.fields(value)]
        return f"{type(value).__name__}({', '.join(fields)})"
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return repr(value)


def listed(numbers: list[str]) -> str:
    if len(numbers) > SHOWN_NUMBERS:
        numbers = [*numbers[: SHOWN_NUMBERS - 2], "...", numbers[-1]]
    return f"[{', '.join(numbers)}]"


def kind_unless_plain(tensor: Tensor) -> str:
    """Dtype, shape and strides, as far as they are not those of a float32 vector."""
    words = []
    if tensor.dtype != torch.float32:
        words.append(str(tensor.dtype).removeprefix("torch."))
    if tensor.dim() != 1 or tensor.numel() > SHOWN_NUMBERS:
        words.append(f"shape {tuple(tensor.shape)}")
    if not tensor.is_contiguous():
        words.append(f"strides {tensor.stride()}")
    return "".join(f", {word}" for word in words)


def elements(tensor: Tensor) -> list[str]:
    """Each number as text, with all digits that tell it from others; bytes in hexadecimal."""
    flat = tensor.detach().reshape(-1)
    if tensor.dtype == torch.uint8:
        return [f"0x{number:02x}" for number in flat.tolist()]
    if tensor.is_floating_point():
        digits = 17 if tensor.dtype == torch.float64 else 9
        return [f"{number:.{digits}g}" for number in flat.tolist()]
    return [str(number) for number in flat.tolist()]


@dataclass
class Part:
    """A value, or a field of one: what kind it is, and its numbers as text."""

    kind: str
    elements: list[str]


def parts_of(value: object) -> dict[str, Part]:
    """The fields of a result by name; a result without fields has the name ""."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return {"": Part(f"{dtype} {tuple(value.shape)}", elements(value))}
    if dataclasses.is_dataclass(value) and not isinstance(value, Raised):
        named = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(value, tuple) and not isinstance(value, torch.Size):
        named = {f"[{index}]": part for index, part in enumerate(value)}
    else:
        return {"": Part("", [outcome_text(value)])}
    found = {}
    for name, part in named.items():
        for inner, leaf in parts_of(part).items():
            found[f"{name}.{inner}" if inner else name] = leaf
    return found


def outcome_text(value: object) -> str:
    if isinstance(value, Raised):
        first = str(value.error).partition("\n")[0]
        return f"{type(value.error).__name__}: {first}"
    if isinstance(value, torch.Size):
        return str(tuple(value))
    return repr(value)


def side_by_side(title: str, wanted: object, got: object) -> str:
    """A table of wanted and got; an arrow marks what differs."""
    rows = [("", "wanted", "got")]
    wanted_parts = parts_of(wanted)
    got_parts = parts_of(got)
    absent = Part("", ["(nothing)"])
    same = []
    for name in dict.fromkeys([*wanted_parts, *got_parts]):
        left = wanted_parts.get(name, absent)
        right = got_parts.get(name, absent)
        if left == right:
            same.append(name)
        else:
            rows += rows_of(name, left, right)
    if isinstance(got, Raised) and got.line:
        rows.append(("", "", f"raised in line {got.line} of your file"))
    label_width = max(len(row[0]) for row in rows)
    room = (WIDTH - label_width - 12) // 2
    wanted_width = min(room, max(len(row[1]) for row in rows))
    lines = [cut_off(title, 3 * WIDTH)]
    for number, (label, left, right) in enumerate(rows):
        mark = "  <-" if number and left else ""
        text = f"  {label:{label_width}}  {cut_off(left, room):{wanted_width}}  "
        lines.append((text + cut_off(right, room) + mark).rstrip())
    if same:
        lines.append(f"  the same: {', '.join(same)}")
    return "\n".join(lines)


def cut_off(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def rows_of(name: str, wanted: Part, got: Part) -> list[tuple[str, str, str]]:
    """The rows for one field: all its numbers, or the first that differ if they are many."""
    rows = []
    if wanted.kind != got.kind:
        rows.append((name, wanted.kind or "(no tensor)", got.kind or "(no tensor)"))
    most = max(len(wanted.elements), len(got.elements))
    if most <= SHOWN_NUMBERS:
        return [*rows, (name, joined(wanted), joined(got))]
    pairs = zip(wanted.elements, got.elements)
    places = [place for place, (left, right) in enumerate(pairs) if left != right]
    for place in places[:MOST_ROWS]:
        rows.append((f"{name}[{place}]", wanted.elements[place], got.elements[place]))
    if len(places) > MOST_ROWS:
        rows.append((name, "", f"and {len(places) - MOST_ROWS} more that differ"))
    return rows


def joined(part: Part) -> str:
    return part.elements[0] if not part.kind else f"[{', '.join(part.elements)}]"
