"""Chooses the dtypes of a run, and shows which numbers are stored and computed in which dtype.

The paper has two dtypes, one to store weights and one to compute in (section 3). A run has more:

    frozen weights   stored in 4 bits, decoded to the compute dtype for each matmul
    adapters         float32, because an update below 1/512 of a number can round to nothing in
                     bfloat16; they are cast for the matmuls, and their gradients are cast back
    norms, head      in the model's own dtype. A norm that casts to float32 in its code (Llama's)
                     computes in float32 for any dtype of its weight. For torch's LayerNorm,
                     autocast decides, with one list of operations for GPUs and another for CPUs
    loss             float32, a few rows of logits at a time (loss_and_eval.py)

The table is measured, not assumed: two tokens run through the model under autocast, and a dispatch
mode records the dtype of every result, by the kind of module that computes it. The dtype inside an
operation, such as the accumulator of a sum, cannot be seen this way.

Differs from PEFT, whose prepare_model_for_kbit_training casts everything that is not in 4 bits to
float32: norms, embedding and head. Embedding and head are about half of a small 4-bit model.
"""

from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora import FrozenWeight, QLoRALinear
from memory import formula
from training.options import Options, usage_error
from variants.dora import Magnitude


def resolve_device_and_dtype(args: Options) -> Options:
    """Set args.device to a device that works and args.dtype to a torch.dtype; returns args.

    Error: if torch cannot use the device, one line and exit status 2, as for any wrong flag.
    """
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        usage_error(f"--device {args.device} cannot be used ({reason}): try cpu")
    args.dtype = pick_dtype(args.dtype, args.device)
    return args


def pick_dtype(name: str, device: str) -> torch.dtype:
    """The dtype of that name; for "auto", bfloat16 if the hardware multiplies it, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.startswith("cuda"):
        native = torch.cuda.is_bf16_supported()
    else:
        cpu = torch.cpu.get_capabilities()
        native = any(cpu.get(feature) for feature in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The context in which matmuls compute in `dtype`; disabled for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


class Row(NamedTuple):
    """One line of the table."""

    what: str
    kept: str
    computed: str
    because: str


class DtypeRecorder(TorchDispatchMode):
    """Records the float dtypes of results by the kind of module that runs.

    inside: the results of its operations; output: what the module returns.
    """

    def __init__(self) -> None:
        super().__init__()
        self.running: list[str] = []
        self.inside: dict[str, set[torch.dtype]] = {}
        self.output: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> object:  # noqa: ANN001
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, (list, tuple)) else (result,)
        for tensor in results:
            if self.running and isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.inside.setdefault(self.running[-1], set()).add(tensor.dtype)
        return result

    def enter(self, kind: str, module: nn.Module, inputs: tuple) -> None:
        """The forward pre-hook of a module of that kind."""
        self.running.append(kind)

    def leave(self, kind: str, module: nn.Module, inputs: tuple, output: object) -> None:
        """The forward hook of a module of that kind."""
        self.running.pop()
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        self.output.setdefault(kind, set()).update(tensor.dtype for tensor in tensors)

    def computed(self, kind: str) -> str:
        """The widest dtype inside, then the output's if it differs."""
        if not self.output.get(kind) or not self.inside.get(kind):
            return "-"
        inside = widest(self.inside[kind])
        output = widest(self.output[kind])
        return name(inside) if inside == output else f"{name(inside)}, then {name(output)}"


def modules_by_kind(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The modules of each kind. A norm is any other module whose weight is a vector."""
    head = model.get_output_embeddings()
    found = {"linear layers": [], "embedding": [], "head": [head], "norms": []}
    for module in model.modules():
        if isinstance(module, (FrozenWeight, Magnitude)):
            continue  # part of a linear layer
        if isinstance(module, QLoRALinear):
            found["linear layers"].append(module)
        elif isinstance(module, nn.Embedding):
            found["embedding"].append(module)
        elif module is not head and has_vector_weight(module):
            found["norms"].append(module)
    return found


def has_vector_weight(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 1


@torch.no_grad()
def record(model: nn.Module, dtype: torch.dtype) -> DtypeRecorder:
    """Run two tokens through the model, in eval mode so that no random numbers are drawn."""
    recorder = DtypeRecorder()
    training = model.training
    with ExitStack() as stack:
        for kind, modules in modules_by_kind(model).items():
            before = partial(recorder.enter, kind)
            after = partial(recorder.leave, kind)
            for module in modules:
                stack.enter_context(module.register_forward_pre_hook(before))
                stack.enter_context(module.register_forward_hook(after))
        stack.enter_context(autocast(model.device, dtype))
        ids = torch.tensor([[0, 1]], device=model.device)  # (1, 2)
        try:
            with recorder:
                model.eval()(input_ids=ids, use_cache=False)
        finally:
            model.train(training)
    return recorder


def dtype_rows(model: nn.Module, dtype: torch.dtype) -> list[Row]:
    """The rows of the table, for an adapted model whose matmuls compute in `dtype`."""
    recorder = record(model, dtype)
    modules = modules_by_kind(model)
    head = model.get_output_embeddings()
    frozen = [layer.base for layer in modules["linear layers"]]
    matmuls = recorder.computed("linear layers")
    trained = names({tensor.dtype for tensor in model.parameters() if tensor.requires_grad})
    [logits] = recorder.output["head"]
    loss = torch.promote_types(logits, torch.float32)  # as loss_and_eval.CrossEntropy does

    dense = all(base.codebook is None for base in frozen)
    weights = "as loaded" if dense else "decoded for each matmul, then freed"
    tied = any(head.weight is embedding.weight for embedding in modules["embedding"])
    norms = " and ".join(sorted({type(norm).__name__ for norm in modules["norms"]}))
    labels = f"only at labels, {formula.ROWS} rows at a time"
    if loss != logits:
        labels += f"; the logits stay {name(logits)}"

    def module_row(kind: str, because: str) -> Row:
        return Row(kind, kept(modules[kind]), recorder.computed(kind), because)

    return [
        Row("linear layers", stored(frozen), matmuls, weights),
        Row("adapters", trained, matmuls, "small updates would round to nothing in 16 bits"),
        module_row("embedding", "as loaded; rows are looked up"),
        module_row("head", "tied to the embedding" if tied else "as loaded"),
        module_row("norms", f"not cast by us: {norms} and autocast decide"),
        Row("loss", name(logits), name(loss), labels),
        Row("gradients", trained, matmuls, "matmuls as in forward, cast before they are summed"),
        Row("optimizer state", trained, trained, "as the adapters"),
    ]


def dtype_table(model: nn.Module, dtype: torch.dtype) -> str:
    """The table as text, in columns; the reason if it cannot be made, as it must not stop a run."""
    try:
        rows = dtype_rows(model, dtype)
    except Exception as error:
        return f"precision: no table for {type(model).__name__} ({type(error).__name__}: {error})"
    lines = [Row("precision", "kept in", "computed in", "because"), *rows]
    widths = [max(len(cell) for cell in column) + 2 for column in zip(*lines)]
    text = []
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths)]
        text.append("".join(cells).rstrip())
    return "\n".join(text)


def stored(frozen: list[FrozenWeight]) -> str:
    """How frozen weights are stored, and bits per weight, measured on their tensors."""
    found = set()
    for base in frozen:
        if base.codebook is None:
            found.add(name(base.weight.dtype))
        else:
            constants = f"{8 * base.absmax.element_size()}-bit constants"
            found.add(f"{base.codebook.numel()} levels, {constants}")
    text = " and ".join(sorted(found))
    if all(base.codebook is None for base in frozen):
        return text
    bits = 8 * sum(base.nbytes for base in frozen) / sum(base.shape.numel() for base in frozen)
    return f"{text} ({bits:.3f} bits)"


def kept(modules: list[nn.Module]) -> str:
    """The dtypes of the parameters of these modules, without their children's."""
    own = [parameter for module in modules for parameter in module.parameters(recurse=False)]
    return names({parameter.dtype for parameter in own})


def widest(dtypes: set[torch.dtype]) -> torch.dtype:
    return max(dtypes, key=lambda dtype: dtype.itemsize)


def names(dtypes: set[torch.dtype]) -> str:
    return " and ".join(sorted(name(dtype) for dtype in dtypes)) or "-"


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
