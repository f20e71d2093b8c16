"""Which numbers are kept in which precision, and computed in which: said at the start of a run, as seen in the model itself.

The paper tells two dtypes apart, one to store weights in and one to compute in (section 3). A run has more of each:

    frozen weights     stored in 4 bits, decoded to the dtype of the products where they are multiplied
    adapters           float32, for an update of less than 1/512 of a number can round to nothing in bfloat16; they are cast
                       for the products, and their gradients are cast back
    norms, head        as the model has them. Architectures differ: a norm that says float32 in its own code (Llama's) computes
                       in it whatever its weight is, and torch's LayerNorm is for autocast to decide, which has one list of
                       operations for GPUs and another for processors
    loss               float32, a few rows of logits at a time (evaluate.py)

Nothing of this is taken on trust: two tokens go through the model under autocast, and what every operation gives is written
down by the kind of module it happens in. What an operation does inside, such as a sum, cannot be seen from there.

Differs from PEFT, whose prepare_model_for_kbit_training casts all that is not in 4 bits to float32: norms, embedding and head,
of which the last two are most of a small model.
"""

from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora import FrozenWeight, QLoRALinear
from memory import formula as predict
from variants.dora import Magnitude


def pick_dtype(name: str, device: str) -> torch.dtype:
    """bfloat16 where the hardware multiplies it, else float32, unless the user says which."""
    if name != "auto":
        return getattr(torch, name)
    cpu = torch.cpu.get_capabilities()
    on_cpu = any(cpu.get(feature) for feature in ("avx512_bf16", "amx_bf16", "bf16"))
    return (
        torch.bfloat16
        if (torch.cuda.is_bf16_supported() if device.startswith("cuda") else on_cpu)
        else torch.float32
    )


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Products in `dtype`; nothing to cast for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


class Row(NamedTuple):
    """One line of the table."""

    what: str
    kept: str
    computed: str
    because: str


class Watch(TorchDispatchMode):
    """The float dtypes of what operations give, by the kind of the module that is running, and of what it gives itself."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[str] = []
        self.inside: dict[str, set[torch.dtype]] = {}
        self.output: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> object:  # noqa: ANN001
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else (result,):
            if self.running and isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.inside.setdefault(self.running[-1], set()).add(tensor.dtype)
        return result

    def enter(self, kind: str, module: nn.Module, inputs: tuple) -> None:
        """What to call before a module of that kind."""
        self.running.append(kind)

    def leave(self, kind: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        """What to call after it."""
        self.running.pop()
        self.output.setdefault(kind, set()).add(output.dtype)

    def computed(self, kind: str) -> str:
        """The widest dtype inside, and the one that comes out if it is another."""
        if kind not in self.output:
            return "-"
        inside, output = (
            max(dtypes, key=lambda dtype: dtype.itemsize)
            for dtypes in (self.inside[kind], self.output[kind])
        )
        return name(inside) + (f", then {name(output)}" if output != inside else "")


def kinds(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The modules that have numbers of their own, by what they are. A norm is what has vectors and is nothing else."""
    head = model.get_output_embeddings()
    found = {"linear layers": [], "embedding": [], "head": [head], "norms": []}
    for module in model.modules():
        if isinstance(module, (FrozenWeight, Magnitude)):
            continue  # it belongs to its layer
        if isinstance(module, QLoRALinear):
            found["linear layers"].append(module)
        elif isinstance(module, nn.Embedding):
            found["embedding"].append(module)
        elif module is not head and any(
            parameter.dim() == 1 for parameter in module.parameters(recurse=False)
        ):
            found["norms"].append(module)
    return found


@torch.no_grad()
def watch(model: nn.Module, dtype: torch.dtype) -> Watch:
    """What is seen while two tokens pass through the model, in evaluation, so that no random number is drawn."""
    watched, training = Watch(), model.training
    with ExitStack() as stack:
        for kind, modules in kinds(model).items():
            for module in modules:
                stack.enter_context(module.register_forward_pre_hook(partial(watched.enter, kind)))
                stack.enter_context(module.register_forward_hook(partial(watched.leave, kind)))
        stack.enter_context(autocast(model.device, dtype))
        ids = torch.tensor([[0, 1]], device=model.device)
        with watched:
            model.eval()(input_ids=ids, use_cache=False)
    model.train(training)
    return watched


def rows(model: nn.Module, dtype: torch.dtype) -> list[Row]:
    """The table of an adapted model whose products are to be in `dtype`."""
    seen, modules, head = watch(model, dtype), kinds(model), model.get_output_embeddings()
    frozen, products = (
        [layer.base for layer in modules["linear layers"]],
        seen.computed("linear layers"),
    )
    trained = names(
        {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    )
    [logits] = seen.output["head"]
    exact = torch.promote_types(logits, torch.float32)  # as evaluate.CrossEntropy does
    tied = any(head.weight is embedding.weight for embedding in modules["embedding"])
    norms = " and ".join(sorted({type(norm).__name__ for norm in modules["norms"]}))
    dense = all(base.codebook is None for base in frozen)
    few = f"at labels alone, {predict.ROWS} rows at a time"
    return [
        Row(
            "linear layers",
            stored(frozen),
            products,
            "as loaded" if dense else "decoded as they are multiplied, and dropped",
        ),
        Row("adapters", trained, products, "small updates would round to nothing in 16 bits"),
        Row(
            "embedding",
            kept(modules["embedding"]),
            seen.computed("embedding"),
            "as loaded; rows are looked up",
        ),
        Row(
            "head",
            kept([head]),
            seen.computed("head"),
            "the embedding, once more" if tied else "as loaded",
        ),
        Row(
            "norms",
            kept(modules["norms"]),
            seen.computed("norms"),
            f"not cast by us: {norms} and autocast decide",
        ),
        Row(
            "loss",
            name(logits),
            name(exact),
            few if exact == logits else f"{few}: the logits never are {name(exact)}",
        ),
        Row("gradients", trained, products, "products as in forward, cast before they add up"),
        Row("optimizer state", trained, trained, "as the adapters"),
    ]


def table(model: nn.Module, dtype: torch.dtype) -> str:
    """The rows as text."""
    lines = [Row("precision", "kept in", "computed in", "because"), *rows(model, dtype)]
    widths = [max(map(len, column)) + 2 for column in zip(*lines)]
    return "\n".join(
        "".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines
    )


def stored(frozen: list[FrozenWeight]) -> str:
    """How frozen weights are kept, and what an element costs, read off their tensors."""
    bits = 8 * sum(base.nbytes for base in frozen) / sum(base.shape.numel() for base in frozen)
    dense = {name(base.weight.dtype) for base in frozen if base.codebook is None}
    coded = {
        f"{base.codebook.numel()} levels, {8 * base.absmax.element_size()}-bit constants"
        for base in frozen
        if base.codebook is not None
    }
    return f"{' and '.join(sorted(dense | coded))}" + f" ({bits:.3f} bits)" * bool(coded)


def kept(modules: list[nn.Module]) -> str:
    """The dtypes of the modules' own parameters."""
    return names(
        {parameter.dtype for module in modules for parameter in module.parameters(recurse=False)}
    )


def names(dtypes: set[torch.dtype]) -> str:
    return " and ".join(sorted(map(name, dtypes))) or "-"


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
