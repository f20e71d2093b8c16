"""LoRA on a frozen 4-bit weight: the weight, the adapter next to it, and the product of both.

The weight W (out, in) of a linear layer is quantized once and never changes. Training updates two
thin matrices, A (r, in) and B (out, r). B starts at zero, so at first the output is that of the
quantized model (paper, section 3, equations 3 and 5; LoRA, arXiv 2106.09685):

    y = x W'^T + b + s (d(x) A^T) B^T       s = lora_alpha / r,  d = dropout

W' is the dequantized weight. Its constants are quantized too (equation 6):

    W' = dequantize(dequantize(nested_absmax, absmax), packed)

With g = dL/dy and h = d(x) A^T (tokens, r), the chain rule gives the backward pass:

    dL/dB = s g^T h      dL/dh = s g B      dL/dA = (dL/dh)^T d(x)
    dL/dx = g W' + d'((dL/dh) A)            d' = the gradient of dropout: the same mask and factor

W needs no gradient, so x is saved only for dL/dA. W' is needed only during a product, so each
product decodes it again, piece by piece. The forward pass saves x (tokens, in), h (tokens, r), A
and B, and with dropout a mask of one bool per element of x.

Layout of a FrozenWeight of n elements. The names of the buffers are those of bitsandbytes:

    packed          uint8 (ceil(n/2), 1)
    absmax          uint8 (ceil(n/64),); float32 without double quantization
    nested_absmax   float32 (ceil(n/64/256),)       with double quantization only
    nested_offset   float32 (1,)                    with double quantization only
    weight          the dense tensor and no other buffer, with codebook=None (16-bit LoRA)

This is 4 + 8/64 + 32/(64 * 256) = 4.127 bits per element, plus one mean per weight matrix. All
layers share the codebooks. They are constants of the format, so they are neither saved nor counted.

Error. |w - w'| <= h absmax + e plus rounding. h is half the widest gap between the levels (nf4.py),
and e is the error of the decoded constant (double_quant.py).

Differs from bitsandbytes: the 4-bit state is in ordinary buffers, so state_dict, .to() and deepcopy
work on them unchanged; .half() and other casts change the dtype that the weight decodes to, and do
not round the float32 constants.
Differs from PEFT: base and adapter are one autograd function, which chooses what it saves; a merge
gives a dense weight and reports what a merge into 4 bits would lose.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from double_quant import DoubleQuantized
from double_quant import quantize as quantize_constants
from kernels import dispatch, weight_state
from nf4 import NF4, Quantized, check_finite

COMPUTE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class FrozenWeight(nn.Module):
    """A weight of any shape in 4 bits, or dense with codebook=None. Calling it dequantizes it.

    The caller frees the result right after its use, so the dense weights of a model never exist at
    the same time.
    """

    def __init__(
        self,
        weight: Tensor,
        block_size: int = 64,
        double_quant: bool = True,
        codebook: Tensor | None = NF4,
    ) -> None:
        """Raises: ValueError where `nf4.quantize` does, for example for NaN or a bad block size."""
        super().__init__()
        if codebook is None:
            self.shape = weight.shape
            self.dtype = weight.dtype
            self.decoded_dtype = weight.dtype
            self.double_quant = False
            self.register_buffer("weight", weight.detach())
            self.register_buffer("codebook", None)
            return
        q = dispatch.quantize(weight, block_size, codebook)
        constants = None
        if double_quant:
            constants = quantize_constants(q.absmax, quantizer=dispatch.quantize)
        self._register(q, constants)

    @classmethod
    def from_quantized(cls, q: Quantized, constants: DoubleQuantized | None) -> "FrozenWeight":
        """Make a weight from quantized tensors. `constants`, if given, replace q.absmax."""
        frozen = cls.__new__(cls)  # without __init__, which would quantize
        nn.Module.__init__(frozen)
        frozen._register(q, constants)
        return frozen

    def _register(self, q: Quantized, constants: DoubleQuantized | None) -> None:
        self.shape = q.shape
        self.dtype = q.dtype  # of the weight that was quantized
        self.decoded_dtype = q.dtype  # a cast of the module changes it, and no bits
        self.block_size = q.block_size
        self.double_quant = constants is not None
        self.register_buffer("packed", q.packed)
        self.register_buffer("absmax", q.absmax if constants is None else constants.codes)
        self.register_buffer("codebook", q.codebook, persistent=False)
        if constants is not None:
            self.nested_block_size = constants.block_size
            self.register_buffer("nested_absmax", constants.absmax)
            self.register_buffer("nested_offset", constants.offset)
            self.register_buffer("nested_codebook", constants.codebook, persistent=False)

    def packed_state(self) -> tuple[Quantized, DoubleQuantized | None]:
        """The stored tensors, not copied: with double quantization, q.absmax holds 8-bit codes."""
        q = Quantized(
            self.packed, self.absmax, self.codebook, self.shape, self.dtype, self.block_size
        )
        if not self.double_quant:
            return q, None
        constants = DoubleQuantized(
            self.absmax,
            self.nested_absmax,
            self.nested_offset,
            self.nested_block_size,
            self.nested_codebook,
        )
        return q, constants

    def forward(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight in `dtype`, by default as it was cast. A copy, unless it is dense."""
        dtype = dtype or self.decoded_dtype
        if self.codebook is None:
            return self.weight.to(dtype)
        q, constants = self.packed_state()
        return dispatch.dequantize(q, dtype, constants)

    def matmul(self, x: Tensor, transposed: bool = True, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias for x (tokens, in), or x W for x (tokens, out) if not `transposed`."""
        if self.codebook is None:
            weight = self.weight.to(x.dtype)
            return F.linear(x, weight, bias) if transposed else x @ weight
        q, constants = self.packed_state()
        return dispatch.matmul(x, q, constants, transposed, bias)

    @property
    def nbytes(self) -> int:
        """The bytes of the weight without codebooks, over all processes if it is sharded."""
        buffers = [buffer for name, buffer in self.named_buffers() if not name.endswith("codebook")]
        return sum(tensor.nbytes for tensor in [*buffers, *self.parameters()])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Apply .to(), .half(), .cuda() and the like; 4-bit weights move but keep their dtypes."""
        exact = {} if self.codebook is None else dict(self.named_buffers())
        super()._apply(fn, recurse)
        if self.codebook is None:
            self.dtype = self.weight.dtype
            self.decoded_dtype = self.dtype
        else:
            empty = torch.empty(0, dtype=self.decoded_dtype, device=self.packed.device)
            self.decoded_dtype = fn(empty).dtype
        for name, tensor in exact.items():
            changed = getattr(self, name)
            if name.endswith("codebook"):  # no state_dict restores it after to_empty()
                setattr(self, name, tensor if changed.is_meta else tensor.to(changed.device))
            elif changed.dtype != tensor.dtype:
                setattr(self, name, tensor.to(changed.device))
        return self

    def get_extra_state(self) -> Tensor:
        """How the weight is decoded: in the state_dict, next to its tensors."""
        if self.codebook is None:
            return weight_state.encode({"shape": list(self.shape)})
        return weight_state.encode(weight_state.describe(*self.packed_state()))

    def set_extra_state(self, state: Tensor) -> None:
        """Raises: ValueError if the tensors of a state_dict are decoded in another way."""
        own = weight_state.decode(self.get_extra_state())
        weight_state.check_same(weight_state.decode(state), own)

    def extra_repr(self) -> str:
        bits = 8 * self.nbytes / max(self.shape.numel(), 1)
        return f"{tuple(self.shape)}, {bits:.3f} bits an element"


class LoRAMatmul(torch.autograd.Function):
    """y = x W'^T + b + s (d(x) A^T) B^T, with the backward pass of the module docstring.

    `keep` is the dropout mask. The caller divides `scaling` by 1 - p, and turns autocast off, so
    all products are in the dtype of x.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        keep: Tensor | None,
        scaling: float,
        base: FrozenWeight,
    ) -> Tensor:
        """x (tokens, in), A (r, in), B (out, r), bias (out,), keep bool (tokens, in) -> y."""
        y = base.matmul(x, bias=bias)  # (tokens, out)
        h = F.linear(_drop(x, keep), lora_A.to(x.dtype))  # (tokens, r)
        dispatch.add_product_(y, h, _transpose(lora_B, x.dtype), scaling)
        needs_A, needs_B = ctx.needs_input_grad[1:3]
        ctx.save_for_backward(x if needs_A else None, h if needs_B else None, keep, lora_A, lora_B)
        ctx.scaling = scaling
        ctx.base = base
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, g: Tensor) -> tuple[Tensor | None, ...]:
        """g (tokens, out) -> the gradients of x, A, B and bias. A second derivative is an error."""
        x, h, keep, lora_A, lora_B = ctx.saved_tensors
        needs_x, needs_A, needs_B, needs_bias = ctx.needs_input_grad[:4]
        dx = dA = dB = dbias = None
        with torch.autocast(g.device.type, enabled=False):
            # Transposed like this, torch reads g and x by rows, which is several times faster.
            dh = (_transpose(lora_B, g.dtype) @ g.T).mul_(ctx.scaling).T.contiguous()  # (tokens, r)
            if needs_B:
                dB = (h.T @ g).mul_(ctx.scaling).to(lora_B.dtype).T  # (out, r)
            if needs_A:
                dA = (dh.T @ _drop(x, keep)).to(lora_A.dtype)  # (r, in)
            if needs_x:
                dx = ctx.base.matmul(g, transposed=False)  # (tokens, in)
                A = lora_A.to(g.dtype)
                if keep is None:
                    dispatch.add_product_(dx, dh, A)
                else:
                    dropped = dispatch.add_product_(torch.zeros_like(dx), dh, A)
                    dx.add_(dropped.mul_(keep))
            if needs_bias:
                dbias = g.sum(0)  # (out,)
        return dx, dA, dB, dbias, None, None, None


def _transpose(lora_B: Tensor, dtype: torch.dtype) -> Tensor:
    """B^T (r, out), row by row, which all products read faster."""
    return lora_B.to(dtype).T.contiguous()


def _drop(x: Tensor, keep: Tensor | None) -> Tensor:
    """Apply the dropout mask, if there is one."""
    return x if keep is None else x * keep


class QLoRALinear(nn.Module):
    """A frozen 4-bit linear layer with a trainable adapter; see `from_linear` and `attach`.

    base: FrozenWeight (out, in). lora_A (r, in) and lora_B (out, r): float32, or float64 if the
    base is float64; the products cast them. bias (out,): frozen, or None.
    `QLoRALinear(base, bias)` has rank 0, which means no adapter; the layers of a loaded 4-bit
    checkpoint are like this.
    """

    def __init__(
        self,
        base: FrozenWeight,
        bias: Tensor | None,
        r: int = 0,
        lora_alpha: float = 0,
        lora_dropout: float = 0.0,
        compute_dtype: torch.dtype | None = None,
        use_rslora: bool = False,
    ) -> None:
        super().__init__()
        self.base = base
        self.out_features, self.in_features = base.shape
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.compute_dtype = compute_dtype
        self.use_rslora = use_rslora
        dtype = torch.promote_types(base.dtype, torch.float32)
        device = next(base.buffers()).device
        A = torch.empty(r, self.in_features, dtype=dtype, device=device)
        B = torch.zeros(self.out_features, r, dtype=dtype, device=device)
        if r:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))  # as in the code of LoRA and in PEFT
        self.lora_A = nn.Parameter(A, requires_grad=r > 0)
        self.lora_B = nn.Parameter(B, requires_grad=r > 0)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def weight(self) -> "NoTensor":
        """No tensor: code that multiplies by it itself would skip the adapter, so that must fail.

        Without the attribute, torch.distributed.checkpoint would fail: it looks up each key of a
        state_dict as an attribute.
        """
        return NoTensor()

    @property
    def scaling(self) -> float:
        """s = lora_alpha / r; lora_alpha / sqrt(r) with use_rslora, for large ranks. 0 if r = 0."""
        if self.r == 0:
            return 0.0
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @classmethod
    def from_linear(
        cls,
        linear: "nn.Linear | QLoRALinear",
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        block_size: int = 64,
        double_quant: bool = True,
        codebook: Tensor | None = NF4,
        compute_dtype: torch.dtype | None = None,
        use_rslora: bool = False,
    ) -> "QLoRALinear":
        """Quantize a dense layer and add an adapter. The new layer is in the mode of the old one.

        If `linear` is a QLoRALinear, its base is kept, and its compute_dtype unless one is given.
        codebook=None keeps the weight dense, for 16-bit LoRA. compute_dtype: see `forward`.
        Raises: ValueError if r, lora_alpha, lora_dropout or compute_dtype is not possible, and
        where `nf4.quantize` does.
        """
        check_settings(r, lora_alpha, lora_dropout, compute_dtype)
        if isinstance(linear, QLoRALinear):
            base = linear.base
            compute_dtype = compute_dtype or linear.compute_dtype
        else:
            base = FrozenWeight(linear.weight, block_size, double_quant, codebook)
        layer = cls(base, linear.bias, r, lora_alpha, lora_dropout, compute_dtype, use_rslora)
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out) in autocast's dtype, or in that of x without autocast.

        The products are computed in compute_dtype if it is set, else in the dtype of the result.
        """
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        flat = x.to(self.compute_dtype or dtype).reshape(-1, self.in_features)  # (tokens, in)
        bias = None if self.bias is None else self.bias.to(flat.dtype)
        with torch.autocast(device, enabled=False):
            y = self.matmul(flat, bias)  # (tokens, out)
        return y.reshape(*x.shape[:-1], self.out_features).to(dtype)

    def matmul(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (tokens, in) -> base and adapter applied to x, plus bias: (tokens, out)."""
        if self.r == 0:
            return self.base.matmul(x, bias=bias)
        p = self.lora_dropout if self.training else 0.0
        keep = torch.rand(x.shape, device=x.device) >= p if p else None
        scaling = self.scaling / (1 - p)
        return LoRAMatmul.apply(x, self.lora_A, self.lora_B, bias, keep, scaling, self.base)

    def _save_to_state_dict(self, state: dict, prefix: str, *others: object) -> None:
        # Under the name of a dense weight, so a model without attach refuses this state by shape.
        super()._save_to_state_dict(state, prefix, *others)
        state[f"{prefix}weight"] = weight_state.encode({"scaling": self.scaling})

    def _load_from_state_dict(self, state: dict, prefix: str, *others: object) -> None:
        if f"{prefix}weight" in state:
            saved = weight_state.decode(state.pop(f"{prefix}weight"))
            weight_state.check_same(saved, {"scaling": self.scaling})
        super()._load_from_state_dict(state, prefix, *others)

    def update(self) -> Tensor:
        """What the adapter adds to the weight: s B A (out, in), in the dtype of the adapter.

        No gradient is recorded, and autocast does not change the dtype.
        """
        with torch.autocast(self.lora_A.device.type, enabled=False):
            return (self.lora_B @ self.lora_A).detach() * self.scaling


def check_settings(
    r: int, lora_alpha: float, lora_dropout: float, compute_dtype: torch.dtype | None
) -> None:
    """Raise a ValueError if an adapter cannot have these settings."""
    if type(r) is not int or r < 1:
        raise ValueError(f"r must be an integer >= 1, such as 8; got {r}")
    if not isinstance(lora_alpha, int | float) or not 0 < lora_alpha < math.inf:
        raise ValueError(
            f"lora_alpha must be an int or float, positive and finite; got {lora_alpha!r}"
        )
    if not isinstance(lora_dropout, int | float) or not 0 <= lora_dropout < 1:
        raise ValueError(f"lora_dropout is a probability, 0 <= p < 1; got {lora_dropout!r}")
    if compute_dtype not in (None, *COMPUTE_DTYPES):
        raise ValueError(f"compute_dtype must be one of {COMPUTE_DTYPES}; got {compute_dtype}")


class NoTensor:
    """Stands for the weight of a QLoRALinear; every function of torch refuses it.

    nn.TransformerEncoderLayer multiplies by its weights itself, unless one is not a plain tensor.
    """

    @classmethod
    def __torch_function__(cls, function: Callable, *_: object) -> None:
        raise TypeError(
            f"{function.__name__} needs a tensor, got the weight of a QLoRALinear; "
            "call the layer instead, or its base() for the decoded weight"
        )


def attach(
    model: nn.Module,
    targets: str | Iterable[str] = "all-linear",
    layer_type: type[QLoRALinear] = QLoRALinear,
    **settings: object,
) -> nn.Module:
    """Freeze a model, and quantize and adapt its linear layers in place, one at a time.

    "all-linear" adapts every nn.Linear except the output head; the paper (section 4) finds this
    necessary to match 16-bit fine-tuning. Other targets are names: a layer is adapted if its dotted
    name is one of them, or ends in a dot and one of them. The layers of a loaded 4-bit model keep
    their bases. settings: as in `from_linear`.
    Raises: ValueError if a target matches no such layer, if one that is named has an adapter, or if
    one cannot be quantized (the message names it). The model is then unchanged.
    """
    groups = unadapted(model)
    if not groups:
        reason = f"it has {left}" if (left := left_dense(model)) else "is it adapted already?"
        raise ValueError(
            "the model has no nn.Linear besides its output head, so there is nothing to adapt; "
            f"{reason}"
        )
    adapted = [names for layer, names in names_of(model, QLoRALinear).items() if layer.r]
    chosen = groups if targets == "all-linear" else _matching(model, groups, adapted, targets)
    layers = [(names, settings) for names in chosen]
    bytes_before, bytes_now = adapt(model, layers, layer_type)
    print(
        f"adapters of rank {model.get_submodule(chosen[0][0]).r} on {len(chosen)} linear layers; "
        f"their frozen weights: {bytes_before / 1e6:.1f} MB before, {bytes_now / 1e6:.1f} MB now"
    )
    if adapted:
        print(f"  unchanged: {len(adapted)} linear layers that had an adapter")
    if left := left_dense(model):
        print(f"  left dense: {left}")
    return model


def _matching(
    model: nn.Module,
    groups: list[list[str]],
    adapted: list[list[str]],
    targets: str | Iterable[str],
) -> list[list[str]]:
    """The layers that have a name ending in a target; a layer is given as the list of its names."""
    wanted = [targets] if isinstance(targets, str) else list(targets)
    if not wanted:
        raise ValueError(f"targets must name a layer, got {wanted}; all-linear takes all")

    def matching(layers: list[list[str]], *sought: str) -> list[list[str]]:
        endings = tuple(f".{target}" for target in sought)
        return [names for names in layers if any(f".{name}".endswith(endings) for name in names)]

    if twice := matching(adapted, *wanted):
        raise ValueError(
            f"a layer has one adapter, got the target {twice[0][0]}, which has one; "
            "name other targets or merge first"
        )
    for target in wanted:
        if not matching(groups, target):
            raise ValueError(f"target {target!r} {_why_not_linear(model, groups, target)}")
    return matching(groups, *wanted)


def _why_not_linear(model: nn.Module, groups: list[list[str]], target: str) -> str:
    """Why a target matches none of these layers."""
    for name, module in model.named_modules():
        if f".{name}".endswith(f".{target}"):
            if type(module) is nn.Linear:
                return f"matches the head {name}, which stays dense; leave it out"
            if any(weight.dim() > 1 for weight in module.parameters(recurse=False)):
                kind = type(module).__name__
                rule = "only nn.Linear can be adapted; leave it out"
                return f"matches {name} of type {kind}, and {rule}"
    known = sorted({name.rpartition(".")[2] for names in groups for name in names})
    return f"matches no linear layer; the model has {', '.join(known)}"


def left_dense(model: nn.Module) -> str:
    """Names the matrices outside adapted layers, embeddings and output head, by kind of module."""
    kinds: dict[str, list[str]] = {}
    head = output_head(model)
    for name, module in model.named_modules():
        is_matrix = any(weight.dim() > 1 for weight in module.parameters(recurse=False))
        if is_matrix and module is not head and not isinstance(module, QLoRALinear | nn.Embedding):
            kinds.setdefault(type(module).__name__, []).append(name.rpartition(".")[2])
    return "; ".join(
        f"{len(names)} {kind} ({', '.join(sorted({*names}))})" for kind, names in kinds.items()
    )


def adapt(
    model: nn.Module,
    layers: list[tuple[list[str], dict]],
    layer_type: type[QLoRALinear] = QLoRALinear,
) -> tuple[int, int]:
    """Adapt all given layers, or none if one of them cannot be quantized.

    layers: (names, settings) for each layer. Returns the bytes of their weights before and after.
    """
    if layers and unwrap(model) is not model:
        raise ValueError(
            f"adapters go into the model itself, got a {type(model).__name__} around it; "
            "add them first, then wrap or compile the model"
        )
    check_no_other_adapters(model)
    for names, _ in layers:
        with naming(names[0]):
            check_replaceable(model.get_submodule(names[0]))
    bytes_before = 0
    bytes_now = 0
    for names, settings in layers:
        linear = model.get_submodule(names[0])
        with naming(names[0]):
            layer = layer_type.from_linear(linear, **settings)
        for name in names:
            model.set_submodule(name, layer)
        bytes_before += layer.base.shape.numel() * layer.base.dtype.itemsize
        bytes_now += layer.base.nbytes
    model.requires_grad_(False)
    for layer in names_of(model, QLoRALinear):  # including those of an earlier call
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(layer.r > 0 and name != "bias")
    return bytes_before, bytes_now


def check_no_other_adapters(model: nn.Module) -> None:
    """Raise a ValueError if PEFT has wrapped a layer: its adapters are nn.Linear themselves."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "base_layer", None), nn.Module):
            raise ValueError(
                f"adapters go into a plain model, got {name}, a layer that PEFT has wrapped; "
                "call merge_and_unload() or unload() first, or load its adapter with load_adapter"
            )


def check_replaceable(linear: "nn.Linear | QLoRALinear") -> None:
    """Raise a ValueError if a layer has hooks, which would be lost, or no finite weight."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(linear, kind) for kind in kinds):
        raise ValueError("a new layer would lose the hooks of this one; register them afterwards")
    if isinstance(linear, nn.Linear):
        weight = linear.weight.detach()
        if weight.is_meta:
            raise ValueError(
                "its weight is on the meta device; load the weights first, without offloading them"
            )
        check_finite(weight.float().flatten(), weight.shape)


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Put the name of the layer in front of the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"layer {name}: {error}") from None


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DataParallel, DistributedDataParallel or AveragedModel."""
    while [name for name, _ in model.named_children()] in (["module"], ["_orig_mod"]):
        [model] = model.children()
    return model


def unadapted(model: nn.Module) -> list[list[str]]:
    """The linear layers without an adapter, except the output head; each is a list of its names."""
    head = output_head(model)
    tied = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    body = {*model.modules()}
    if head is None and hasattr(model, "base_model"):
        body = {*model.base_model.modules()}  # the head of a classifier is outside
    groups = []
    for module, names in names_of(model, nn.Linear).items():
        # A subclass of nn.Linear may compute something else, so it is not replaced.
        is_head = module is head or module.weight in tied or module not in body
        if type(module) is nn.Linear and not is_head:
            groups.append(names)
    groups += [names for layer, names in names_of(model, QLoRALinear).items() if layer.r == 0]
    return groups


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that makes logits from hidden states, if a model of transformers has one."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def names_of(model: nn.Module, layer_type: type[nn.Module]) -> dict[nn.Module, list[str]]:
    """Every submodule of a class, with all the names under which the model uses it."""
    found: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, layer_type) and name:
            found.setdefault(module, []).append(name)
    return found


class MergeAudit(NamedTuple):
    """How much of an update survives when it is merged into a 4-bit weight.

    `update` is the wanted change of the decoded weight, `realized` is its actual change.
    """

    update_norm: float  # the Frobenius norm of the update
    kept: float  # <realized, update> / <update, update>: 1 keeps all, 0 loses all to rounding
    cosine: float  # between realized and update: 1 if the change has the right direction


def merge(model: nn.Module) -> tuple[nn.Module, dict[str, MergeAudit]]:
    """Replace each QLoRALinear, in place, by a dense nn.Linear of base + update.

    The weight has the dtype of the base, or that to which the model was cast, is rounded once, and
    stays frozen.
    Returns the model and, for each 4-bit layer, what a merge into 4 bits would keep: an update is
    small compared with the gaps between levels, so rounding removes much of it. Hooks of the layers
    are not kept.
    """
    audit = {}
    inner = unwrap(model)
    for layer, names in names_of(inner, QLoRALinear).items():
        base = layer.base
        update = layer.update()
        if base.codebook is not None:
            audit |= dict.fromkeys(names, audit_merge(base, update))
        weight = (base(update.dtype) + update).to(base.decoded_dtype)
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = layer.bias
        linear.train(layer.training)
        for name in names:
            inner.set_submodule(name, linear)
    config = getattr(inner, "config", None)
    if hasattr(config, "quantization_config"):  # of a base that was saved in 4 bits
        del config.quantization_config
    return model, audit


def audit_merge(base: FrozenWeight, update: Tensor) -> MergeAudit:
    """Quantize base + update with the settings of base; compare the actual change with update."""
    before = base(update.dtype)
    merged = FrozenWeight(before + update, base.block_size, base.double_quant, base.codebook)
    realized = (merged() - before).flatten()
    wanted = update.flatten()
    realized_norm = realized.norm().item()
    wanted_norm = wanted.norm().item()
    if wanted_norm == 0:
        return MergeAudit(update_norm=0.0, kept=1.0, cosine=1.0)
    dot = (realized @ wanted).item()
    cosine = dot / (realized_norm * wanted_norm) if realized_norm else 0.0
    return MergeAudit(wanted_norm, dot / wanted_norm**2, cosine)
