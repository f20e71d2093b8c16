"""Launches the CUDA kernels on tensors: validates, chooses, compiles and starts them.

A kernel is compiled when it is first used, once per device: Numba compiles the Python function to
PTX for its one signature of plain pointers and numbers, and the driver compiles that to machine
code. A launch is then one call of the driver with the addresses of the tensors, on torch's current
stream. So it is ordered with torch's own work. A CUDA graph captures it if it has run once before
(a capture must not load code). For torch.compile it is part of an operator of dispatch.py.

Kernels check no index. So everything that could make one leave a tensor is checked here, from
shapes and addresses, which costs the device nothing: sizes, 32-bit indices, and that memory which
is read 16 bytes at a time starts at a multiple of 16. Where a check fails the result is None, and
dispatch.py uses the reference.
"""

import ctypes
import math
from collections.abc import Callable, Iterator
from functools import cache

import torch
import torch.nn.functional as F
from cuda.bindings import driver
from numba import cuda, types
from torch import Tensor

from cuda_kernels import adamw as optimizer
from cuda_kernels import dequantize as ladder
from cuda_kernels import matmul as products
from cuda_kernels import quantize as quantizer
from cuda_kernels.device import Kernel
from kernels.packed_weight import PackedWeight, dense_matmul, largest_absmax

# Elements that 32 bits can count, with room for the threads of the last block
MAX_ELEMENTS = 2**32 - 2**16
# Rows of x that are multiplied by decoding in registers; W is made dense for more
MAX_ROWS = 64
MAX_ROWS_PORTABLE = 4  # W would be read again for more
NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
# Numbers as the driver takes them; all other arguments are pointers
NUMBERS = {types.uint32: ctypes.c_uint32, types.float32: ctypes.c_float}


def launch(
    kernel: Kernel, blocks: int, device: torch.device, *arguments: Tensor | float | tuple
) -> None:
    """Start `blocks` blocks of a kernel on torch's current stream; tensors go as addresses.

    The device's context is current in this thread meanwhile: a thread of autograd may have none.
    """
    if not blocks:
        return
    function, context, kinds = loaded(kernel, device)
    values = tuple(
        argument.data_ptr() if isinstance(argument, Tensor) else argument
        for argument in flattened(arguments)
    )
    stream = torch.cuda.current_stream(device).cuda_stream
    checked(driver.cuCtxPushCurrent(context))
    try:
        grid = (blocks, 1, 1)
        block = (kernel.threads, 1, 1)
        parameters = (values, kinds)
        checked(driver.cuLaunchKernel(function, *grid, *block, 0, stream, parameters, 0))
    finally:
        checked(driver.cuCtxPopCurrent())


def flattened(nested: tuple) -> Iterator:
    """The arguments, or their types, with each tuple replaced by its elements."""
    for item in nested:
        if isinstance(item, tuple | types.Tuple):
            yield from item
        else:
            yield item


@cache
def loaded(
    kernel: Kernel, device: torch.device
) -> tuple[driver.CUfunction, driver.CUcontext, tuple]:
    """The kernel loaded on the device, the device's context, and the C types of the arguments."""
    code = assembly(kernel, min(capability(device), (8, 0)))
    name = code.partition(".entry ")[2].partition("(")[0].strip()
    handle = checked(driver.cuDeviceGet(device.index))
    context = checked(driver.cuDevicePrimaryCtxRetain(handle))
    checked(driver.cuCtxPushCurrent(context))
    try:
        module = checked(driver.cuModuleLoadData(code.encode() + b"\0"))
        function = checked(driver.cuModuleGetFunction(module, name.encode()))
    finally:
        checked(driver.cuCtxPopCurrent())
    kinds = tuple(NUMBERS.get(kind, ctypes.c_void_p) for kind in flattened(kernel.signature))
    return function, context, kinds


def assembly(kernel: Kernel, generation: tuple[int, int]) -> str:
    """PTX for a generation and all newer ones. No kernel needs more than sm_80 has."""
    return cuda.compile_ptx(kernel.function, types.void(*kernel.signature), cc=generation)[0]


def checked(answer: tuple) -> object:
    """The result of a driver call. Raises: RuntimeError if the call failed."""
    status, *results = answer
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(
            f"a kernel must start, got {status.name}; QLORA_KERNELS=reference runs without kernels"
        )
    return results[0] if results else None


@cache
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels can compute in this dtype: only sm_80 and newer round to bfloat16."""
    oldest = (8, 0) if dtype == torch.bfloat16 else (7, 5)
    return dtype in NAMES and capability(device) >= oldest


def aligned(*tensors: Tensor) -> bool:
    return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


# The makers of kernels: each kernel is made once, when it is first used
blockwise = cache(quantizer.blockwise)
v1 = cache(ladder.v1)
v4 = cache(ladder.v4)
tensor_core = cache(products.tensor_core)
portable = cache(products.portable)


def quantize(flat: Tensor, block_size: int, codebook: Tensor) -> tuple[Tensor, Tensor] | None:
    """packed (ceil(n/2), 1) and absmax (blocks,) of (n,) numbers; None if there is no kernel.

    The codebook ascends and is on the device.
    """
    if codebook.numel() > 16:
        return None
    midpoints = (codebook[1:] + codebook[:-1]) / 2
    midpoints = F.pad(midpoints, (0, 15 - midpoints.numel()), value=math.inf)
    n, device = flat.numel(), flat.device
    lanes = block_size // 8
    if flat.dtype == torch.float64:
        flat = flat.to(torch.float32)
    if not (0 < n <= MAX_ELEMENTS and 1 <= lanes <= 32 and supports(device, flat.dtype)):
        return None
    flat = flat.contiguous()
    flat = flat if aligned(flat) else flat.clone()
    packed = torch.empty(-(-n // 2), 1, dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=device)
    kernel = blockwise(NAMES[flat.dtype])
    blocks = -(-n // (8 * kernel.threads))
    launch(kernel, blocks, device, flat, flat, midpoints, packed, packed, absmax, n, lanes)
    return packed, absmax


def kernel_weight(w: PackedWeight) -> tuple | None:
    """A valid weight as the argument device.WEIGHT of a kernel; None if it is too large."""
    if math.prod(w.shape) > MAX_ELEMENTS or w.codebook.numel() > 16:
        return None
    levels = w.codebook
    if levels.numel() < 16:
        levels = F.pad(levels, (0, 16 - levels.numel()))
    is_double = w.nested_absmax is not None
    if is_double:
        constants = (w.nested_absmax, w.absmax, w.nested_codebook, w.nested_offset)
    else:
        constants = (w.absmax, w.packed, levels, levels)  # the last three are not read
    shift = w.block_size.bit_length() - 1
    shift8 = w.nested_block_size.bit_length() - 1
    numbers = (largest_absmax(w.dtype), shift, shift8, int(is_double))
    return (w.packed, levels, *constants, *numbers)


def dequantize(w: PackedWeight, out: Tensor) -> bool:
    """Decode a valid weight into contiguous `out`, of its shape; False if there is no kernel."""
    n, device = out.numel(), out.device
    weight = kernel_weight(w)
    if weight is None or not supports(device, out.dtype):
        return False
    done = 0
    if w.block_size >= 8 and aligned(out, w.packed):
        runs = n // ladder.RUN
        kernel = v4(NAMES[out.dtype])
        launch(kernel, -(-runs * 32 // kernel.threads), device, weight, out, runs)
        done = runs * ladder.RUN
    kernel = v1(NAMES[out.dtype])
    launch(kernel, -(-(n - done) // kernel.threads), device, weight, w.packed, out, done, n)
    return True


def few_rows(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor | None:
    """x W^T + bias (m, height), rounded once to x's dtype, for x (m, width).

    None if there is no kernel.
    """
    x = x.contiguous()
    device = x.device
    m, width = x.shape
    height, _ = w.shape
    has_cores = x.dtype != torch.float32 and capability(device) >= (8, 0)
    multiple = 64 if has_cores else 32  # of columns, that one step of the kernel takes
    most_rows = MAX_ROWS if has_cores else MAX_ROWS_PORTABLE
    fits = width % multiple == 0 and w.block_size >= multiple
    fits = fits and 0 < m <= most_rows and m * max(width, height) <= MAX_ELEMENTS
    weight = kernel_weight(w)
    if weight is None or not fits or not supports(device, x.dtype) or not aligned(x, w.packed):
        return None
    y = x.new_empty(m, height)
    is_biased = bias is not None
    levels = weight[1]  # any float32 tensor: without a bias it is not read
    bias = bias.to(torch.float32).contiguous() if is_biased else levels
    if has_cores:
        tiles = 2 ** max(-(-m // 8) - 1, 0).bit_length()  # of 8 rows of x: 1, 2, 4 or 8
        groups = widest(height, tiles, device)
        kernel = tensor_core(NAMES[x.dtype], tiles, groups)
        rows = products.TILE * groups  # of W, per block
    else:
        kernel = portable(NAMES[x.dtype], 1 if m == 1 else MAX_ROWS_PORTABLE)
        rows = products.WARPS
    blocks = -(-height // rows)
    launch(kernel, blocks, device, weight, x, bias, int(is_biased), y, m, height, width)
    return y


def widest(height: int, tiles: int, device: torch.device) -> int:
    """How many tiles of W share what a block reads of x: up to 4, if no processor is idle then."""
    groups = min(tiles, 4)
    while groups > 1 and height < products.TILE * groups * processors(device):
        groups //= 2
    return groups


def matmul(x: Tensor, w: PackedWeight, transposed: bool, bias: Tensor | None) -> Tensor | None:
    """x W^T + bias or, not transposed, x W, in x's dtype, for x (m, ...) and a valid weight.

    None if there is no kernel. With many rows W is made dense during the call: torch's allocator
    reuses that memory for each layer.
    """
    y = few_rows(x, w, bias) if transposed else None
    if y is not None:
        return y
    dense = x.new_empty(*w.shape)
    return dense_matmul(x, dense, transposed, bias) if dequantize(w, dense) else None


def adamw(param: Tensor, grad: Tensor, scalars: tuple) -> Callable[[int, Tensor], None]:
    """Returns update(start, moments), as dispatch.adamw; scalars in the order of update_run."""

    def update(start: int, moments: Tensor) -> None:
        run = slice(start, start + moments.shape[1])
        update_run(param[run], grad[run], moments, *scalars)

    return update


def update_run(
    param: Tensor,
    grad: Tensor,
    moments: Tensor,
    first: bool,
    decay: float,
    weight: float,
    beta2: float,
    value: float,
    divisor: float,
    eps: float,
    step_size: float,
) -> None:
    """Update float32 param (k,) and moments (2, k) in place, as paged_optim.adamw_ does.

    The scalars are those of its operations, in their order.
    """
    weight32 = ctypes.c_float(weight).value
    near = weight32 < 0.5  # lerp_ starts from the nearer end
    factor = weight32 if near else ctypes.c_float(weight32 - 1).value
    zero = 0.0 if weight32 == 1 else -0.0  # adding -0 changes nothing, adding 0 makes each zero +0
    rest = (beta2, value, divisor, eps, step_size)
    scalars = (int(first), decay, factor, int(near), zero, *rest)
    n = param.numel()
    arrays = (param, grad, moments[0], moments[1])
    is_wide = n % 4 == 0 and aligned(*arrays)
    blocks = -(-n // (optimizer.THREADS * (4 if is_wide else 1)))
    launch(optimizer.ADAMW, blocks, param.device, *arrays, *arrays, n, int(is_wide), scalars)
