"""The CUDA kernels on a GPU, with random numbers and outputs that are garbage before, in float64.

What can be tested without a GPU is in test_cuda_kernels.py and test_sass.py; these tests run with
`pytest -m gpu`.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from test_cuda_kernels import scalars
from torch import Tensor

import double_quant
import nf4
import paged_optim
from helpers.bounds import few_rows, in_float64, operand
from helpers.strategies import HALF_AND_SINGLE, same_bits
from kernels import dispatch
from kernels.cpu import adamw
from nf4 import Quantized

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)
SHAPES = [(4096, 4096), (1000, 192), (33, 64), (11008, 4096)]
GROUP = {"betas": (0.9, 0.999), "lr": 1e-3, "eps": 1e-8, "weight_decay": 0.01}


@pytest.fixture(autouse=True)
def garbage_in_new_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """NaN, or the largest integer. torch warns if cuBLAS does not have this setting."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def weight_of(
    shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16
) -> tuple[Quantized, double_quant.DoubleQuantized]:
    """A random 4-bit weight with all its tensors on the GPU."""
    q = nf4.quantize((torch.randn(shape) / 30).to(dtype))
    constants = double_quant.quantize(q.absmax)
    there = [tensor.to(DEVICE) for tensor in (q.packed, q.absmax, q.codebook)]
    of_constants = [
        tensor.to(DEVICE) for tensor in (constants.codes, constants.absmax, constants.offset)
    ]
    return (
        Quantized(*there, q.shape, q.dtype, q.block_size),
        double_quant.DoubleQuantized(
            *of_constants, constants.block_size, constants.codebook.to(DEVICE)
        ),
    )


def dense(q: Quantized, constants: double_quant.DoubleQuantized, dtype: torch.dtype) -> Tensor:
    """By the reference, on the CPU."""
    pieces = [tensor.cpu() for tensor in (constants.codes, constants.absmax, constants.offset)]
    moved = double_quant.DoubleQuantized(*pieces, constants.block_size)
    here = Quantized(
        q.packed.cpu(),
        double_quant.dequantize(moved),
        q.codebook.cpu(),
        q.shape,
        q.dtype,
        q.block_size,
    )
    return nf4.dequantize(here, dtype)


def test_the_gpu_has_kernels() -> None:
    """Otherwise the tests below would test the reference."""
    assert dispatch._kernels(torch.empty(1, device=DEVICE)) is not None


@pytest.mark.parametrize("shape", [*SHAPES, (1,), (65537,), (1025,)])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("block_size", [8, 64, 256])
def test_quantizing_gives_the_bits_of_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype, block_size: int
) -> None:
    weight = torch.randn(shape).to(dtype)
    q = dispatch.quantize(weight.to(DEVICE), block_size)
    expected = nf4.quantize(weight, block_size)
    assert same_bits(q.packed.cpu(), expected.packed) and same_bits(q.absmax.cpu(), expected.absmax)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    weight = torch.randn(300, device=DEVICE)
    weight[100] = bad
    with pytest.raises(ValueError, match=r"1 of 300 .*\(100,\)"):
        dispatch.quantize(weight)


@pytest.mark.parametrize("shape", [*SHAPES, (1,), (65537,), (1025,)])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_decoding_gives_the_bits_of_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    q, constants = weight_of(shape)
    assert same_bits(dispatch.dequantize(q, dtype, constants).cpu(), dense(q, constants, dtype))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 17, 33, 64])
def test_a_product_with_few_rows_is_within_its_bound(
    shape: tuple[int, int], dtype: torch.dtype, tokens: int
) -> None:
    q, constants = weight_of(shape)
    x = torch.randn(tokens, shape[1], dtype=dtype)
    y = dispatch.matmul(x.to(DEVICE), q, constants)
    assert y.dtype == dtype
    assert few_rows(x, dense(q, constants, torch.float32), None).allows(y.cpu())


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_a_product_with_many_rows_is_within_its_bound(transposed: bool, dtype: torch.dtype) -> None:
    q, constants = weight_of((1000, 192))
    x = torch.randn(200, 192 if transposed else 1000, dtype=dtype)
    weight = dense(q, constants, dtype)
    y = dispatch.matmul(x.to(DEVICE), q, constants, transposed)
    bound = operand(x, dtype).matmul(operand(weight.T if transposed else weight, dtype), dtype)
    assert in_float64(bound, 2 * x.shape[1]).allows(y.cpu())


@pytest.mark.parametrize("n", [1, 3, 1000, 2**20, 2**20 + 1])
def test_an_update_has_the_bits_of_the_cpus(n: int) -> None:
    param = torch.randn(n)
    moments = torch.zeros(2, n)
    there = param.to(DEVICE), torch.full((2, n), torch.nan, device=DEVICE)
    for step in (1, 2, 3):
        grad = torch.randn(n)
        dispatch.adamw(there[0], grad.to(DEVICE), step, GROUP)(0, there[1])
        arrays = (param.numpy(), grad.numpy(), moments.numpy())
        adamw.update(*arrays, *scalars(step, **GROUP))
    assert same_bits(there[0].cpu(), param) and same_bits(there[1].cpu(), moments)


def test_the_optimizer_takes_the_steps_of_the_cpu() -> None:
    start, grads = torch.randn(1000), torch.randn(3, 1000)
    results = []
    for device in ("cpu", DEVICE):
        param = torch.nn.Parameter(start.to(device, copy=True))
        optimizer = paged_optim.PagedAdamW([param], page_bytes=1024, resident_bytes=2048)
        for grad in grads:
            param.grad = grad.to(device)
            optimizer.step()
        results.append(param.detach().cpu())
    assert same_bits(*results)


# streams, graphs, torch.compile

WORK: dict[str, Callable[..., Tensor]] = {
    "dequantize": lambda x, q, constants: dispatch.dequantize(q, torch.bfloat16, constants),
    "few rows": lambda x, q, constants: dispatch.matmul(x[:3], q, constants),
    "many rows": lambda x, q, constants: dispatch.matmul(x, q, constants),
    "gradient": lambda x, q, constants: dispatch.matmul(
        x @ x.T @ x[:, :1].expand(-1, q.shape[0]), q, constants, False
    ),
}


@pytest.mark.parametrize("what", WORK)
def test_another_stream_sees_what_was_put_on_it_before(what: str) -> None:
    """A kernel on the default stream would overtake the copy that is still to come."""
    q, constants = weight_of((512, 256))
    x = torch.randn(100, 256, device=DEVICE).bfloat16()
    stream = torch.cuda.Stream()
    expected = WORK[what](x, q, constants)
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)
        late.copy_(x)
        result = WORK[what](late, q, constants)
    stream.synchronize()
    assert same_bits(result, expected)


@pytest.mark.parametrize("what", WORK)
def test_a_graph_replays_it_with_new_numbers(what: str) -> None:
    q, constants = weight_of((512, 256))
    x = torch.randn(100, 256, device=DEVICE).bfloat16()
    WORK[what](x, q, constants)  # compiled and loaded before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = WORK[what](x, q, constants)
    x.copy_(torch.randn(100, 256))
    result.fill_(torch.nan)
    graph.replay()
    assert same_bits(result, WORK[what](x, q, constants))


@pytest.mark.parametrize("what", WORK)
def test_torch_compile_takes_it_as_it_is(what: str) -> None:
    q, constants = weight_of((512, 256))
    x = torch.randn(100, 256, device=DEVICE).bfloat16()
    compiled = torch.compile(
        lambda x: WORK[what](x, q, constants), fullgraph=True, backend="aot_eager"
    )
    assert same_bits(compiled(x), WORK[what](x, q, constants))


def test_a_thread_of_autograds_launches_too() -> None:
    q, constants = weight_of((512, 256))
    x = torch.randn(3, 256, device=DEVICE).bfloat16().requires_grad_()
    g = torch.randn(3, 512, device=DEVICE).bfloat16()
    dispatch.matmul(x, q, constants).backward(g)
    weight = operand(dense(q, constants, torch.bfloat16), torch.bfloat16)
    bound = operand(g.detach().cpu(), torch.bfloat16).matmul(weight, torch.bfloat16)
    assert in_float64(bound, 1024).allows(x.grad.cpu())
