"""Shows what a student's function returned beside what it should have returned."""

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from inspect import BoundArguments, signature
from types import FunctionType, ModuleType

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.utils._python_dispatch import _get_current_dispatch_mode

MOST_ROWS = 4  # of a result with many numbers, the first that differ
WIDTH = 100
SHOWN_NUMBERS = 6  # of a tensor that is wanted or got
NUMBERS_OF_ARGUMENTS = 16  # of a tensor that is an argument
MOST_CALLS = 100  # of a test that are recorded


@dataclass
class Raised:
    """An exception as the result of a call; `line` is that of the student's file."""

    error: BaseException
    line: int | None = None


@dataclass
class Call:
    """A call of a public function, with copies of its arguments before and after it."""

    function: str
    arguments: dict[str, object]
    after: dict[str, object] = field(default_factory=dict)
    result: object = None


@dataclass
class Passes(Call):
    """The forward pass of an autograd function and, if it was run, its backward pass.

    needs: for each argument, whether it needs a gradient. g: the gradient of the output.
    result: the output and the gradients by name.
    """

    needs: tuple[bool, ...] = ()
    g: Tensor | None = None


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
            is_class = isinstance(value, type) and value.__module__ == module.__name__
            if is_class and issubclass(value, torch.autograd.Function):
                self._record_passes(value)

    def start(self) -> None:
        self.calls = []
        self.inside = False

    def _recording(self, name: str, function: Callable) -> Callable:
        @wraps(function)
        def recording(*args: object, **kwargs: object) -> object:
            if self.inside or len(self.calls) == MOST_CALLS:
                return function(*args, **kwargs)
            call = self._call(name, signature(function).bind(*args, **kwargs).arguments)
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
                call.after = copied(signature(function).bind(*args, **kwargs).arguments)

        return recording

    def _call(self, name: str, arguments: dict[str, object]) -> Call:
        """A tensor that the module defines, such as NF4, is not copied, so it has its name."""
        own = {id(value) for value in tensors_of(self.module).values()}
        before = {
            key: value if id(value) in own else copied(value) for key, value in arguments.items()
        }
        return Call(name, before)

    def _record_passes(self, function: type[torch.autograd.Function]) -> None:
        """Let an autograd function record its arguments, its output and its gradients."""
        forward = function.forward
        backward = function.backward
        names = list(signature(forward).parameters)[1:]  # without ctx

        @wraps(forward)
        def recording_forward(ctx: FunctionCtx, *args: object) -> Tensor:
            if _get_current_dispatch_mode():  # the test counts bytes, also those of copies
                return forward(ctx, *args)
            call = Passes(function.__name__, copied(dict(zip(names, args))))
            call.needs = ctx.needs_input_grad
            self.calls.append(call)
            ctx.call = call
            with self._telling(call):
                output = forward(ctx, *args)
            call.result = {"output": copied(output)}
            return output

        @wraps(backward)
        def recording_backward(ctx: FunctionCtx, g: Tensor) -> tuple[Tensor | None, ...]:
            if not hasattr(ctx, "call"):
                return backward(ctx, g)
            ctx.call.g = copied(g)
            with self._telling(ctx.call):
                gradients = backward(ctx, g)
            for name, gradient in zip(names, gradients):
                ctx.call.result[f"gradient of {name}"] = copied(gradient)
            return gradients

        function.forward = staticmethod(recording_forward)
        function.backward = staticmethod(recording_backward)

    @contextmanager
    def _telling(self, call: Call) -> Iterator[None]:
        """Make an exception the result of a call."""
        try:
            yield
        except BaseException as error:
            call.result = Raised(error, line_in(self.module.__file__, error))
            raise


def tensors_of(module: ModuleType) -> dict[str, Tensor]:
    """The public tensors that a module defines."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and not name.startswith("_")
    }


def copied(value: object) -> object:
    """A copy; of a model, which may be large and is not shown, the model itself."""
    if isinstance(value, dict):
        return {key: copied(part) for key, part in value.items()}
    if isinstance(value, nn.Module):
        return value
    try:
        return copy.deepcopy(value)
    except (RuntimeError, TypeError):  # a tensor that was computed with a gradient; a generator
        if isinstance(value, Tensor):
            return value.detach().clone().requires_grad_()
        return value


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
    for got in calls:
        title = f"{prefix}.{got.function}({described(got.arguments, student)})"
        if isinstance(got, Passes):
            try:
                wanted = passes_again(got, reference)
            except Exception:  # for these arguments there is nothing to compare with
                continue
            got = settled(wanted, got)
            if got.g is not None:
                title = cut_off(title, 2 * WIDTH) + f"\n  gradient of the output: {short(got.g)}"
        elif any(isinstance(value, nn.Module) for value in got.arguments.values()):
            continue  # the reference does not know the student's classes
        else:
            wanted = again(got, reference)
        if different(wanted.result, got.result):
            return side_by_side(title, wanted.result, got.result)
        for name, value in wanted.after.items():
            if different(value, got.after[name]):
                title += f"\n  {name}, after the call:"
                return side_by_side(title, value, got.after[name])
    for name, value in tensors_of(reference).items():
        own = vars(student).get(name)
        if different(value, own):
            return side_by_side(f"{prefix}.{name}", value, own)
    return ""


def again(call: Call, reference: ModuleType) -> Call:
    """The same call of the reference."""
    function = getattr(reference, call.function)
    bound = BoundArguments(signature(function), copied(call.arguments))
    try:
        result = function(*bound.args, **bound.kwargs)
    except Exception as error:
        result = Raised(error)
    return Call(call.function, call.arguments, bound.arguments, result)


def passes_again(call: Passes, reference: ModuleType) -> Passes:
    """The same passes of the reference; gradients of those inputs that need one."""
    function = getattr(reference, call.function)
    inputs = copied(call.arguments)
    needed = [name for name, need in zip(inputs, call.needs) if need]
    for name in needed:
        inputs[name] = inputs[name].detach().requires_grad_()
    output = function.apply(*inputs.values())
    result = {"output": output.detach()}
    if call.g is not None:
        gradients = torch.autograd.grad(output, [inputs[name] for name in needed], call.g)
        result |= {f"gradient of {name}": part for name, part in zip(needed, gradients)}
    return dataclasses.replace(call, result=result)


def settled(wanted: Passes, got: Passes) -> Passes:
    """What was got, as far as it is wanted, with numbers that are right up to rounding replaced."""
    if isinstance(got.result, Raised):
        return got
    result = {}
    for name, value in wanted.result.items():
        own = got.result.get(name)
        if isinstance(own, Tensor):
            own = own.detach()
            if (own.shape, own.dtype) == (value.shape, value.dtype) and value.numel():
                most = 8 * torch.finfo(value.dtype).eps * value.abs().max()
                own = torch.where((own - value).abs() <= most, value, own)
        result[name] = own
    return dataclasses.replace(got, result=result)


def different(wanted: object, got: object) -> bool:
    if isinstance(wanted, Raised) and isinstance(got, Raised):
        return repr(wanted.error) != repr(got.error)  # the line is known of one of them
    return parts_of(wanted) != parts_of(got)


def described(arguments: dict[str, object], module: ModuleType) -> str:
    """The arguments of a call; a tensor that the module defines is shown by its name."""
    return ", ".join(
        f"{name}={name_of(value, module) or short(value)}" for name, value in arguments.items()
    )


def name_of(value: object, module: ModuleType) -> str | None:
    """The name of the tensor of a module that has this value."""
    if isinstance(value, Tensor):
        for name, own in tensors_of(module).items():
            if value.dtype == own.dtype and torch.equal(value, own):
                return name
    return None


def short(value: object) -> str:
    """An argument in a few words."""
    if isinstance(value, Tensor):
        numbers = listed(elements(value), NUMBERS_OF_ARGUMENTS)
        return f"tensor({numbers}{kind_unless_plain(value)})"
    if dataclasses.is_dataclass(value):
        fields = [f"{f.name}={short(getattr(value, f.name))}" for f in dataclasses.fields(value)]
        return f"{type(value).__name__}({', '.join(fields)})"
    if isinstance(value, torch.Size):
        return str(tuple(value))
    if isinstance(value, dict):
        fields = [f"{key}={short(part)}" for key, part in value.items()]
        return f"{{{', '.join(fields)}}}"
    if isinstance(value, list) and value and all(isinstance(part, Tensor) for part in value):
        return f"[{len(value)} tensors]"
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return re.sub(" at 0x[0-9a-f]+", "", repr(value))


def listed(numbers: list[str], most: int) -> str:
    if len(numbers) > most:
        numbers = [*numbers[: most - 2], "...", numbers[-1]]
    return f"[{', '.join(numbers)}]"


def kind_unless_plain(tensor: Tensor) -> str:
    """Dtype, shape and strides, as far as they are not those of a float32 vector."""
    words = []
    if tensor.dtype != torch.float32:
        words.append(str(tensor.dtype).removeprefix("torch."))
    if tensor.dim() != 1 or tensor.numel() > NUMBERS_OF_ARGUMENTS:
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
        gradient = ", with a gradient" if value.requires_grad else ""
        return {"": Part(f"{dtype} {tuple(value.shape)}{gradient}", elements(value))}
    if dataclasses.is_dataclass(value) and not isinstance(value, Raised):
        named = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(value, dict):
        named = value
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
        where = f", in line {value.line} of your file" if value.line else ""
        return f"raises {type(value.error).__name__}{where}{': ' if first else ''}{first}"
    if isinstance(value, dict):
        return ", ".join(value)
    return short(value)


def side_by_side(title: str, wanted: object, got: object) -> str:
    """A table of wanted and got; an arrow marks what differs."""
    if isinstance(wanted, Raised) or isinstance(got, Raised):
        lines = [title, f"  wanted  {outcome_text(wanted)}", f"  got     {outcome_text(got)}"]
        return "\n".join(cut_off(line, 3 * WIDTH) for line in lines)
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
    label_width = max(len(row[0]) for row in rows)
    room = (WIDTH - label_width - 12) // 2
    wanted_width = min(room, max(len(row[1]) for row in rows))
    lines = [cut_off(title, 3 * WIDTH)]
    for number, (label, left, right) in enumerate(rows):
        mark = "  <-" if number and left != right and left else ""
        text = f"  {label:{label_width}}  {cut_off(left, room):{wanted_width}}  "
        lines.append((text + cut_off(right, room) + mark).rstrip())
    if same:
        lines.append(f"  the same: {', '.join(same)}")
    return "\n".join(lines)


def cut_off(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def rows_of(name: str, wanted: Part, got: Part) -> list[tuple[str, str, str]]:
    """The rows for one field: all its numbers, or the first that differ if they are many."""
    most = max(len(wanted.elements), len(got.elements))
    if wanted.kind != got.kind:
        kinds = [(name, wanted.kind or "(no tensor)", got.kind or "(no tensor)")]
        return [*kinds, (name, joined(wanted), joined(got))]
    widest = max(len(joined(wanted)), len(joined(got)))
    if most <= SHOWN_NUMBERS and widest <= WIDTH // 3:
        return [(name, joined(wanted), joined(got))]
    pairs = zip(wanted.elements, got.elements)
    places = [place for place, (left, right) in enumerate(pairs) if left != right]
    rows = [
        (f"{name}[{place}]", wanted.elements[place], got.elements[place])
        for place in places[:MOST_ROWS]
    ]
    if len(places) > MOST_ROWS:
        rows.append((name, "", f"and {len(places) - MOST_ROWS} more that differ"))
    return rows


def joined(part: Part) -> str:
    return listed(part.elements, SHOWN_NUMBERS) if part.kind else part.elements[0]
