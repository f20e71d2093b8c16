"""The memory of a stack of 4-bit layers is its packed bytes and its activations, to the byte.

The live bytes are those of the storages of all tensors after each operation. The process has more,
because its allocator rounds up and keeps freed memory. What an operator allocates and frees before
it returns is not seen here: test_dispatch.py counts the part of W that a product decodes. What a
kernel allocates internally is not counted anywhere.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora
from kernels import dispatch
from lora import FrozenWeight, LoRAMatmul, QLoRALinear
from memory.live import Live

LAYERS = 12
WIDTH = 256
RANK = 8
BLOCK = 64


def stack(dtype: torch.dtype, dropout: float = 0.0, **settings: object) -> nn.Sequential:
    layers = []
    for _ in range(LAYERS):
        linear = nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype)
        layers.append(QLoRALinear.from_linear(linear, RANK, lora_dropout=dropout, **settings))
    return nn.Sequential(*layers)


def held_by(model: nn.Module) -> int:
    """The bytes of parameters and buffers; the codebooks are one tensor for all layers."""
    return Live(*model.parameters(), *model.buffers()).now()


def forward_and_backward(
    model: nn.Sequential, tokens: int, dtype: torch.dtype, segment: int = LAYERS
) -> tuple[int, int, int]:
    """Live bytes besides the model, x and g: after the forward pass, at the peak, at the end."""
    x = torch.ones(tokens, WIDTH, dtype=dtype, requires_grad=True)
    g = torch.ones(tokens, WIDTH, dtype=dtype)
    with Live(*model.parameters(), *model.buffers(), x, g) as live:
        before = live.now()
        y = x
        for start in range(0, LAYERS, segment):
            part = model[start : start + segment]
            y = part(y) if segment == LAYERS else checkpoint(part, y, use_reentrant=False)
        after = live.now()
        y.backward(g)
        del y
    return after - before, live.peak - before, live.now() - before


def of_activations(tokens: int, dtype: torch.dtype, layers: int, dropout: float) -> int:
    """What forward saves: of each layer the output (x of the next one), h, and a dropout mask."""
    mask = WIDTH if dropout else 0
    return layers * tokens * ((WIDTH + RANK) * dtype.itemsize + mask)


def peak(tokens: int, dtype: torch.dtype, segment: int, dropout: float) -> int:
    """The peak of the live bytes besides the model, x and the gradient of the output.

    It is reached in the backward pass of layer i of a segment, when dx = g W' is there and dh A is
    to be added. These are alive then:
    - the output of the stack, and the inputs of the segments before
    - the activations of this segment up to layer i, without the output of layer i
    - the float32 gradients of lora_A and lora_B of this layer and all later ones, and dh
    - g, unless it is the gradient of the stack's output, and dx
    - lora_A in the dtype of the products, if that has 16 bits
    - with dropout dh A, as large as x, before it is masked
    - where the processor has no products of 16 bits, dh, A and dh A in float32
    """
    x = tokens * WIDTH * dtype.itemsize
    h = tokens * RANK * dtype.itemsize
    gradients = 2 * RANK * WIDTH * 4
    alive = []
    for done in range(LAYERS):  # layers whose backward pass is over
        segments, i = divmod(LAYERS - 1 - done, segment)
        inputs = x + segments * x
        activations = of_activations(tokens, dtype, i + 1, dropout) - x
        g = x if done else 0
        dx = x
        alive.append(inputs + activations + (done + 1) * gradients + h + g + dx)
    cast_A = RANK * WIDTH * dtype.itemsize if dtype != torch.float32 else 0
    thin = 0
    if not dispatch.multiplies_natively("cpu", dtype):
        thin = 4 * (tokens * RANK + RANK * WIDTH + tokens * WIDTH)
    return max(alive) + cast_A + (x if dropout else 0) + thin


CASES = [
    pytest.param(dtype, tokens, segment, dropout, id=f"{dtype}-{tokens}-{segment}-{dropout}")
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for tokens in (8, 200)
    for segment in (LAYERS, 3)
    for dropout in (0.0, 0.1)
]


@pytest.mark.parametrize(("dtype", "tokens", "segment", "dropout"), CASES)
def test_the_peak_is_the_packed_bytes_and_the_activations_and_no_dense_layer(
    dtype: torch.dtype, tokens: int, segment: int, dropout: float
) -> None:
    """With checkpointing: the activations of one segment, and the inputs of the others."""
    after, most, end = forward_and_backward(stack(dtype, dropout), tokens, dtype, segment)
    gradients = LAYERS * 2 * RANK * WIDTH * 4
    assert most == peak(tokens, dtype, segment, dropout)
    if segment == LAYERS:
        assert after == of_activations(tokens, dtype, LAYERS, dropout)
    else:
        assert after == LAYERS // segment * tokens * WIDTH * dtype.itemsize
    gradient_of_x = tokens * WIDTH * dtype.itemsize
    assert end == gradients + gradient_of_x


def test_the_bytes_of_a_stack_are_its_weights_its_adapters_and_two_shared_codebooks() -> None:
    n = WIDTH**2
    adapters = LAYERS * 2 * RANK * WIDTH * 4
    codebooks = 4 * (16 + 256)
    bits = LAYERS * (4 * n + 8 * n // 64 + 32 * n // (64 * 256) + 32)
    assert held_by(stack(torch.float32)) == bits // 8 + adapters + codebooks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("segment", [LAYERS, 3])
def test_a_dense_stack_would_exceed_the_bound(dtype: torch.dtype, segment: int) -> None:
    dense, packed = stack(dtype, codebook=None), stack(dtype)
    _, most, _ = forward_and_backward(dense, 8, dtype, segment)
    assert held_by(dense) + most > held_by(packed) + peak(8, dtype, segment, 0.0)


def saved_by(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What autograd saves in a forward pass, without the parameters."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    return [tensor for tensor in kept if tensor.data_ptr() not in parameters]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stack_saves_x_and_h_and_the_mask_of_each_layer_and_nothing_dense(
    dtype: torch.dtype, dropout: float
) -> None:
    saved = saved_by(stack(dtype, dropout), torch.ones(8, WIDTH, dtype=dtype))
    assert sum(tensor.nbytes for tensor in saved) == of_activations(8, dtype, LAYERS, dropout)
    assert {tuple(tensor.shape) for tensor in saved} == {(8, WIDTH), (8, RANK)}
    # None is a view of a larger storage.
    assert Live(*saved).now() == sum(tensor.nbytes for tensor in saved)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_is_saved_under_autocast_is_saved_in_its_dtype(dropout: float) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        saved = saved_by(stack(torch.float32, dropout), torch.ones(8, WIDTH))
    assert sum(tensor.nbytes for tensor in saved) == of_activations(
        8, torch.bfloat16, LAYERS, dropout
    )


# mutants that the formula must notice


class KeepsTheDenseWeight(LoRAMatmul):
    """Keeps it on ctx and not as a saved tensor, where no hook sees it."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, *others: object) -> Tensor:
        ctx.dense = others[-1](x.dtype)
        return LoRAMatmul.forward(ctx, x, *others)


def remembers(
    self: FrozenWeight, x: Tensor, transposed: bool = True, bias: Tensor | None = None
) -> Tensor:
    if not hasattr(self, "dense"):
        self.dense = self(x.dtype)
    return x @ (self.dense.T if transposed else self.dense)


MUTANTS = {
    "the autograd function keeps the dense weight": (lora, "LoRAMatmul", KeepsTheDenseWeight),
    "the module remembers the dense weight": (FrozenWeight, "matmul", remembers),
}


@pytest.mark.parametrize("segment", [LAYERS, 3])
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_dense_weight_that_outlives_its_product_is_noticed(
    mutant: str, segment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*MUTANTS[mutant])
    after, most, _ = forward_and_backward(stack(torch.bfloat16), 8, torch.bfloat16, segment)
    assert most > peak(8, torch.bfloat16, segment, 0.0)
