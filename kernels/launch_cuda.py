"""From tensors to kernels: what is checked before a launch, how a kernel is compiled and started, and which one is chosen.

A kernel is compiled when it is first wanted, once for each device: Numba makes PTX of the Python function for its one signature
of plain pointers and numbers, and the driver makes machine code of that. A launch then is one call of the driver with the
addresses of the tensors, on the stream that torch works on at that moment. So it is ordered with torch's own work; in a CUDA
graph it is captured, as long as it has run once before (a capture must not load code); and to torch.compile it is part of an
operator of dispatch.py.

A kernel checks no index. So all that could make it leave a tensor is looked at here, from shapes and addresses, which costs the
device nothing: sizes, 32-bit indices, and that what is read 16 bytes at a time starts at a multiple of 16. What does not fit
gets None, and dispatch.py takes the reference.
"""

import ctypes
import math
from collections.abc import Callable
from functools import cache

import torch
from cuda.bindings import driver
from numba import cuda, types
from torch import Tensor

from cuda_kernels import adamw as optimizer
from cuda_kernels import dequantize as ladder
from cuda_kernels import matmul as products
from cuda_kernels import quantize as quantizer
from cuda_kernels.device import Kernel
from kernels.packed_weight import PackedWeight, dense_matmul, largest_absmax

MOST = (
    2**32 - 2**16
)  # elements that 32 bits can count, with some room for the threads of the last block
ROWS = (
    64  # of x, at most, for the product that decodes in registers; more are multiplied by a dense W
)
ROWS_PORTABLE = 4  # W would be read again for more
NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
NUMBERS = {
    types.uint32: ctypes.c_uint32,
    types.float32: ctypes.c_float,
}  # as the driver takes them; the rest are pointers


def launch(kernel: Kernel, blocks: int, device: torch.device, *arguments: Tensor | float) -> None:
    """Start `blocks` blocks of a kernel on torch's current stream. Tensors go as addresses.

    The device's context is made the current one of this thread meanwhile: a thread of autograd's may not have one yet.
    """
    if not blocks:
        return
    function, context, kinds = loaded(kernel, device)
    values = tuple(
        argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments
    )
    stream = torch.cuda.current_stream(device).cuda_stream
    checked(driver.cuCtxPushCurrent(context))
    try:
        checked(
            driver.cuLaunchKernel(
                function, blocks, 1, 1, kernel.threads, 1, 1, 0, stream, (values, kinds), 0
            )
        )
    finally:
        checked(driver.cuCtxPopCurrent())


@cache
def loaded(
    kernel: Kernel, device: torch.device
) -> tuple[driver.CUfunction, driver.CUcontext, tuple]:
    """The kernel as machine code of the device, the device's context, and what kinds of arguments it takes."""
    code = assembly(kernel, min(capability(device), (8, 0)))
    name = code.partition(".entry ")[2].partition("(")[0].strip()
    context = checked(driver.cuDevicePrimaryCtxRetain(checked(driver.cuDeviceGet(device.index))))
    checked(driver.cuCtxPushCurrent(context))
    try:
        function = checked(
            driver.cuModuleGetFunction(
                checked(driver.cuModuleLoadData(code.encode() + b"\0")), name.encode()
            )
        )
    finally:
        checked(driver.cuCtxPopCurrent())
    return function, context, tuple(NUMBERS.get(kind, ctypes.c_void_p) for kind in kernel.signature)


def assembly(kernel: Kernel, generation: tuple[int, int]) -> str:
    """PTX: the instructions of a generation, which are those of all newer ones too. No kernel needs more than sm_80 has."""
    return cuda.compile_ptx(kernel.function, types.void(*kernel.signature), cc=generation)[0]


def checked(answer: tuple) -> object:
    """What a call of the driver gave. Raises: RuntimeError if it failed."""
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
    """Whether the device has the instructions for numbers of this dtype: bfloat16 is rounded to by sm_80 and newer."""
    return dtype in NAMES and capability(device) >= ((8, 0) if dtype == torch.bfloat16 else (7, 5))


def aligned(*tensors: Tensor) -> bool:
    return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


# The makers of kernels: one for each kind of numbers, made when it is first wanted
blockwise, v1, v4 = cache(quantizer.blockwise), cache(ladder.v1), cache(ladder.v4)
tensor_core, portable = cache(products.tensor_core), cache(products.portable)


def quantize(flat: Tensor, block_size: int, codebook: Tensor) -> tuple[Tensor, Tensor] | None:
    """packed (ceil(n/2), 1) and absmax (blocks,) of (n,); the codebook, which ascends, is on the device."""
    if codebook.numel() > 16:
        return None
    midpoints = torch.nn.functional.pad(
        (codebook[1:] + codebook[:-1]) / 2, (0, 16 - codebook.numel()), value=math.inf
    )
    n, device, lanes = flat.numel(), flat.device, block_size // 8
    if flat.dtype == torch.float64:
        flat = flat.to(torch.float32)
    if not (0 < n <= MOST and 1 <= lanes <= 32 and supports(device, flat.dtype)):
        return None
    flat = flat.contiguous()
    flat = flat if aligned(flat) else flat.clone()
    packed = torch.empty(-(-n // 2), 1, dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=device)
    kernel = blockwise(NAMES[flat.dtype])
    launch(
        kernel,
        -(-n // (8 * kernel.threads)),
        device,
        flat,
        flat,
        midpoints,
        packed,
        packed,
        absmax,
        n,
        lanes,
    )
    return packed, absmax


def weight(s: PackedWeight) -> tuple | None:
    """A stored weight, whose sizes fit, as the arguments device.WEIGHT of a kernel."""
    if math.prod(s.shape) > MOST or s.codebook.numel() > 16:
        return None
    levels = (
        torch.nn.functional.pad(s.codebook, (0, 16 - s.codebook.numel()))
        if s.codebook.numel() < 16
        else s.codebook
    )
    double = s.nested_absmax is not None
    shift, shift8 = s.block_size.bit_length() - 1, s.nested_block_size.bit_length() - 1
    absmax, codes = (s.nested_absmax, s.absmax) if double else (s.absmax, s.packed)
    levels8, offset = (s.nested_codebook, s.nested_offset) if double else (levels, levels)
    return (
        s.packed,
        levels,
        absmax,
        codes,
        levels8,
        offset,
        largest_absmax(s.dtype),
        shift,
        shift8,
        int(double),
    )


def dequantize(s: PackedWeight, out: Tensor) -> bool:
    """Decode a stored weight into contiguous `out`, of its shape; False if there is no kernel for it."""
    n, device, arguments = out.numel(), out.device, weight(s)
    if arguments is None or not supports(device, out.dtype):
        return False
    whole = 0
    if s.block_size >= 8 and aligned(out, s.packed):
        runs, kernel = n // ladder.RUN, v4(NAMES[out.dtype])
        launch(kernel, -(-runs * 32 // kernel.threads), device, *arguments, out, runs)
        whole = runs * ladder.RUN
    kernel = v1(NAMES[out.dtype])
    launch(kernel, -(-(n - whole) // kernel.threads), device, *arguments, s.packed, out, whole, n)
    return True


def few_rows(x: Tensor, s: PackedWeight, bias: Tensor | None = None) -> Tensor | None:
    """x W^T + bias for x (m, width), W stored: (m, height) in x's dtype, rounded once; None if there is no kernel."""
    x, (m, width), (height, _), device = x.contiguous(), x.shape, s.shape, x.device
    cores = x.dtype != torch.float32 and capability(device) >= (8, 0)
    fits = (
        width % 64 == 0 and s.block_size >= 64 if cores else width % 32 == 0 and s.block_size >= 32
    )
    fits = fits and 0 < m <= (ROWS if cores else ROWS_PORTABLE) and m * max(width, height) <= MOST
    if (
        (arguments := weight(s)) is None
        or not fits
        or not supports(device, x.dtype)
        or not aligned(x, s.packed)
    ):
        return None
    y = x.new_empty(m, height)
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    rest = (x, arguments[1] if bias is None else bias, int(bias is not None), y, m, height, width)
    if cores:
        tiles = (
            2 ** max(-(-m // 8) - 1, 0).bit_length()
        )  # tensor cores multiply by 8 rows at once: 1, 2, 4 or 8 times
        groups = widest(height, tiles, device)
        launch(
            tensor_core(NAMES[x.dtype], tiles, groups),
            -(-height // (products.TILE * groups)),
            device,
            *arguments,
            *rest,
        )
    else:
        kernel = portable(NAMES[x.dtype], 1 if m == 1 else ROWS_PORTABLE)
        launch(kernel, -(-height // products.WARPS), device, *arguments, *rest)
    return y


def widest(height: int, tiles: int, device: torch.device) -> int:
    """How many tiles of W share what a block reads of x: 1, or with more rows of x up to 4 as long as no processor is idle."""
    groups = min(tiles, 4)
    while groups > 1 and height < products.TILE * groups * processors(device):
        groups //= 2
    return groups


def matmul(x: Tensor, s: PackedWeight, transposed: bool, bias: Tensor | None) -> Tensor | None:
    """x W^T + bias or, not transposed, x W, in x's dtype, for x (m, ...) and a stored weight; None if there is no kernel.

    With many rows, W is made dense for as long as it takes: torch's allocator gives each layer the same memory for it.
    """
    y = few_rows(x, s, bias) if transposed else None
    if y is not None:
        return y
    dense = x.new_empty(*s.shape)
    return dense_matmul(x, dense, transposed, bias) if dequantize(s, dense) else None


def adamw(param: Tensor, grad: Tensor, scalars: tuple) -> Callable[[int, Tensor], None]:
    """What updates the flat parameter from element `start` on, as far as `moments` go; scalars in the order of update_run."""

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
    """Update float32 param (k,) and moments (2, k) in place, as paged_optim.adamw_ does; its scalars in their order."""
    weight32 = ctypes.c_float(weight).value
    near = weight32 < 0.5  # lerp_ starts from the nearer end
    factor = weight32 if near else ctypes.c_float(weight32 - 1).value
    zero = 0.0 if weight32 == 1 else -0.0  # to add -0 changes nothing, to add 0 makes each zero +0
    n, four = param.numel(), (param, grad, moments[0], moments[1])
    wide = n % 4 == 0 and aligned(*four)
    blocks = -(-n // (optimizer.THREADS * (4 if wide else 1)))
    launch(
        optimizer.ADAMW,
        blocks,
        param.device,
        *four,
        *four,
        n,
        int(wide),
        int(first),
        decay,
        factor,
        int(near),
        zero,
        beta2,
        value,
        divisor,
        eps,
        step_size,
    )
