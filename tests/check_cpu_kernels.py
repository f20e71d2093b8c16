"""Compares the CPU kernels on this processor with the reference, and prints a line for each.

The sizes are small, so that it also ends in emulation (on_aarch64.sh). It fails if a result that
must have the bits of the reference differs, or if the error of a product exceeds its bound.
"""

import platform
import sys
from collections.abc import Iterator
from itertools import chain

import llvmlite.binding
import torch
from torch import Tensor

import double_quant
import nf4
from helpers.bounds import Bounded, in_float64
from helpers.strategies import same_bits
from kernels.cpu import launch, vectors
from kernels.packed_weight import PackedWeight, flatten, unflatten

HEIGHT = 130  # more than one piece of W for each kernel (matmul.BACK rows, matmul.DEPTH columns)
WIDTH = 576
FEW = 3  # rows of x for the kernels for few rows
MANY = 21


def main() -> None:
    processor = f"{platform.machine()}, {llvmlite.binding.get_host_cpu_name()}"
    look_up = f"look_up {vectors.LOOK_UP or 'none'}, {vectors.WIDTH} numbers in a vector"
    print(f"{processor}; {look_up}", flush=True)
    torch.manual_seed(0)
    q = nf4.quantize(torch.randn(HEIGHT, WIDTH))
    weight = flatten(q, double_quant.quantize(q.absmax))
    results = []
    for name, is_right, text in chain(quantized(), decoded(weight), products(weight)):
        print(f"{name:26}{text}{'' if is_right else '   WRONG'}", flush=True)
        results.append(is_right)
    sys.exit(0 if all(results) else 1)


def quantized() -> Iterator[tuple[str, bool, str]]:
    for codebook in (nf4.NF4, double_quant.DYNAMIC):
        numbers = torch.randn(HEIGHT * WIDTH - 1)
        expected = nf4.quantize(numbers, 64, codebook)
        packed, absmax = launch.quantize(numbers, 64, codebook)
        is_same = same_bits(packed, expected.packed) and same_bits(absmax, expected.absmax)
        yield bits(f"quantize, {codebook.numel()} levels", is_same)


def decoded(weight: PackedWeight) -> Iterator[tuple[str, bool, str]]:
    for dtype in launch.DECODED:
        out = torch.empty(HEIGHT, WIDTH, dtype=dtype)
        has_kernel = launch.dequantize(weight, out)
        is_same = has_kernel and same_bits(out, nf4.dequantize(unflatten(weight), dtype))
        yield bits(f"decode, {dtype}".replace("torch.", ""), is_same)


def products(weight: PackedWeight) -> Iterator[tuple[str, bool, str]]:
    w = nf4.dequantize(unflatten(weight), torch.float32)
    arguments = (launch.kernel_weight(weight), weight.shape)
    for tokens in (FEW, MANY):
        for transposed in (True, False):
            x = torch.randn(tokens, WIDTH if transposed else HEIGHT)
            y = launch.float32_matmul(x, *arguments, transposed, None)
            bound = Bounded.exact(x).matmul(Bounded.exact(w.T if transposed else w), torch.float32)
            name = f"{'x W^T' if transposed else 'x W'}, {tokens} rows of x"
            yield error(name, y, in_float64(bound, 2 * x.shape[1]))


def bits(name: str, is_same: bool) -> tuple[str, bool, str]:
    return name, is_same, "the bits of the reference" if is_same else "other bits"


def error(name: str, y: Tensor, bound: Bounded) -> tuple[str, bool, str]:
    errors = (y.double() - bound.value).abs()
    share = (errors / bound.error).max().item()
    return name, bound.allows(y), f"errors up to {errors.max():.1e} and {share:.1%} of their bound"


if __name__ == "__main__":
    main()
