"""The product with a weight that stays in 4 bits: decoded window by window, multiplied by torch, never dense.

A window is as much of W as fits the cache. It is decoded into a scratch buffer, multiplied, and overwritten by the next one:

    y = x W^T     window: some rows of W, all columns       gives these columns of y, whole sums
    y = g W       window: all rows of W, some columns       gives these columns of y, whole sums

Windows of rows would do for both, but then y = g W would be added up, and rounded, window by window.

Traffic: the packed bytes are read once from memory; the window is written and read in the cache; x is read once for each
window, from the cache too where its TOKENS rows fit. Scratch: WINDOW elements.
"""

import numpy as np
import torch
from torch import Tensor

from cpu_kernels import decode

WINDOW = 2**20  # elements: 2 MB in 16 bits, what the L2 caches of two cores hold
TOKENS = 512  # rows of x that are multiplied by a window at once: more would push it out of the cache
KINDS = {torch.float32: torch.float32, torch.bfloat16: torch.uint16, torch.float16: torch.int16}  # as the kernels see them


def numbers_of(tensor: Tensor) -> np.ndarray:
    """The memory of a contiguous tensor, flat, as the kernels take it."""
    return tensor.detach().view(KINDS[tensor.dtype]).numpy().reshape(-1)


def matmul(x: Tensor, weight: tuple, shape: list[int], transposed: bool) -> Tensor:
    """x W^T or, not transposed, x W, in x's dtype, for x (tokens, ...) and W of `shape`, as decode.py takes it.

    Few rows are multiplied in float32 by what is not even rounded to 16 bits.
    """
    (height, width), tokens = shape, len(x)
    if transposed and tokens <= 2**x.element_size():  # 4 rows of 16 bits, 16 of float32: measured, where windows win
        y = torch.zeros(tokens, height)
        decode.few_rows(weight, x.detach().to(torch.float32).contiguous().numpy(), y.numpy())
        return y.to(x.dtype)
    full, total = (width, height) if transposed else (height, width)
    step = min(max(WINDOW // full // 64, 1) * 64, total)  # a multiple of the usual block size
    y, scratch = x.new_empty(tokens, total), x.new_empty(step * full)
    for start in range(0, total, step):
        size = min(step, total - start)
        rows, cols = (size, width) if transposed else (height, size)
        window = scratch[: rows * cols]
        decode.decode(weight, start * width if transposed else start, width, rows, cols, numbers_of(window))
        window = window.view(rows, cols).T if transposed else window.view(rows, cols)
        for token in range(0, tokens, TOKENS):
            torch.mm(x[token : token + TOKENS], window, out=y[token : token + TOKENS, start : start + size])
    return y
