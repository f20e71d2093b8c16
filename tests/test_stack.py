"""A deep stack of 4-bit layers holds its packed bytes and the activations, and never a dense layer: byte for byte.

What is alive is read off the storages of all tensors after each operation, not off the process, whose allocator rounds and
remembers. What an operator holds until it returns is not seen: the window of W that a product is made from is counted in
test_dispatch.py. What a kernel allocates for itself is seen nowhere.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora
from lora import FrozenWeight, LoRAMatmul, QLoRALinear
from memory.measured import Live

LAYERS, WIDTH, RANK, BLOCK = 12, 256, 8, 64


def stack(dtype: torch.dtype, dropout: float = 0.0, **settings: object) -> nn.Sequential:
    linears = [nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype) for _ in range(LAYERS)]
    return nn.Sequential(
        *(
            QLoRALinear.from_linear(linear, RANK, lora_dropout=dropout, **settings)
            for linear in linears
        )
    )


def held_by(model: nn.Module) -> int:
    """The bytes of a model's parameters and buffers; the codebooks are one tensor for all layers."""
    return Live(*model.parameters(), *model.buffers()).now()


def forward_and_backward(
    model: nn.Sequential, tokens: int, dtype: torch.dtype, segment: int = LAYERS
) -> tuple[int, int, int]:
    """Live bytes, above those of the model, of x and of the gradient: after the forward pass, at the peak, at the end."""
    x, g = (torch.ones(tokens, WIDTH, dtype=dtype, requires_grad=needs) for needs in (True, False))
    with Live(*model.parameters(), *model.buffers(), x, g) as live:
        before, y = live.now(), x
        for start in range(0, LAYERS, segment):
            part = model[start : start + segment]
            y = part(y) if segment == LAYERS else checkpoint(part, y, use_reentrant=False)
        after = live.now()
        y.backward(g)
        del y
    return after - before, live.peak - before, live.now() - before


def of_activations(tokens: int, dtype: torch.dtype, layers: int, dropout: float) -> int:
    """What forward leaves for backward: for each layer its output (the next one's x), its h, and with dropout its mask."""
    return layers * tokens * ((WIDTH + RANK) * dtype.itemsize + (WIDTH if dropout else 0))


def peak(tokens: int, dtype: torch.dtype, segment: int, dropout: float) -> int:
    """The most that is alive besides the model, x and the gradient of the output.

    Backward stands in layer i of a segment, where the gradient that goes out has been made by W and A is to be added, and there
    are: the output of the stack; the inputs of the segments before; the activations of this one up to layer i, of whose outputs
    only those that were some layer's input; the gradients of lora_A and lora_B of this and of all later layers, float32; dL/dh;
    the gradient that came in, unless it is the first one; and the one that goes out. Besides, lora_A in 16 bits, if those are
    the dtype; and with dropout the product of dL/dh and A, as large as x, before it is masked.
    """
    x, h = tokens * WIDTH * dtype.itemsize, tokens * RANK * dtype.itemsize
    gradients, alive = 2 * RANK * WIDTH * 4, []
    for done in range(LAYERS):  # layers that backward has behind it
        segments, i = divmod(LAYERS - 1 - done, segment)
        activations = of_activations(tokens, dtype, i + 1, dropout) - x
        alive.append(
            x + segments * x + activations + (done + 1) * gradients + h + (x if done else 0) + x
        )
    return (
        max(alive)
        + (RANK * WIDTH * dtype.itemsize if dtype != torch.float32 else 0)
        + (x if dropout else 0)
    )


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
    """With checkpointing, by segments of 3 layers, the activations are those of one segment and an input for each other."""
    after, most, end = forward_and_backward(stack(dtype, dropout), tokens, dtype, segment)
    gradients = LAYERS * 2 * RANK * WIDTH * 4
    assert most == peak(tokens, dtype, segment, dropout)
    if segment == LAYERS:
        assert after == of_activations(tokens, dtype, LAYERS, dropout)
    else:
        assert after == LAYERS // segment * tokens * WIDTH * dtype.itemsize
    assert end == gradients + tokens * WIDTH * dtype.itemsize  # and that of x


def test_a_stack_weighs_its_bits_and_its_adapters_and_two_codebooks_for_all() -> None:
    n, adapters, codebooks = WIDTH**2, LAYERS * 2 * RANK * WIDTH * 4, 4 * (16 + 256)
    bits = LAYERS * (4 * n + 8 * n // 64 + 32 * n // (64 * 256) + 32)
    assert held_by(stack(torch.float32)) == bits // 8 + adapters + codebooks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("segment", [LAYERS, 3])
def test_a_dense_stack_would_exceed_the_bound(dtype: torch.dtype, segment: int) -> None:
    dense, packed = stack(dtype, codebook=None), stack(dtype)
    assert held_by(dense) + forward_and_backward(dense, 8, dtype, segment)[1] > held_by(
        packed
    ) + peak(8, dtype, segment, 0.0)


def saved_by(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What autograd keeps of a forward pass, without the parameters."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    ):
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
    assert Live(*saved).now() == sum(
        tensor.nbytes for tensor in saved
    )  # none is a view of something larger


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_is_saved_under_autocast_is_saved_in_its_dtype(dropout: float) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        saved = saved_by(stack(torch.float32, dropout), torch.ones(8, WIDTH))
    assert sum(tensor.nbytes for tensor in saved) == of_activations(
        8, torch.bfloat16, LAYERS, dropout
    )


# mutants: what the formula must notice


class KeepsTheDenseWeight(LoRAMatmul):
    """On the context and not among the saved tensors, where no hook sees it."""

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


MUTANTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "the autograd function keeps the dense weight": lambda patch: patch.setattr(
        lora, "LoRAMatmul", KeepsTheDenseWeight
    ),
    "the module remembers the dense weight": lambda patch: patch.setattr(
        FrozenWeight, "matmul", remembers
    ),
}


@pytest.mark.parametrize("segment", [LAYERS, 3])
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_dense_weight_that_outlives_its_product_is_noticed(
    mutant: str, segment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    MUTANTS[mutant](monkeypatch)
    after, most, _ = forward_and_backward(stack(torch.bfloat16), 8, torch.bfloat16, segment)
    assert most > peak(8, torch.bfloat16, segment, 0.0)
