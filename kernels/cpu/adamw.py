"""AdamW in one pass: parameter, gradient and moments are read once, and all but the gradient are written once.

Torch makes a pass of each operation. Its lerp_ and addcmul_ multiply and add with one rounding, all others round one by one,
and so it is here: the bits of paged_optim.adamw_.
"""

import ctypes

import numpy as np
from numba import njit, prange, types
from numba.extending import intrinsic, overload

PIECE = 1024  # elements: what a thread takes at once


@njit(parallel=True, cache=True, error_model="numpy")
def update(param, grad, moments, first, decay, weight, beta2, value, divisor, eps, step_size):
    """Change float32 param (k,) and moments (2, k) as paged_optim.adamw_ does; if `first`, the moments are not read but 0.

    The scalars are those of its operations, in their order, not yet rounded to float32. 16 bytes read, 12 written an element.
    """
    decay, weight, beta2, value = (
        np.float32(decay),
        np.float32(weight),
        np.float32(beta2),
        np.float32(value),
    )
    divisor, eps, step_size = np.float32(divisor), np.float32(eps), np.float32(step_size)
    near = weight < np.float32(0.5)  # lerp_ starts from the nearer end
    factor = weight if near else weight - np.float32(1)
    zero = np.float32(
        0.0 if weight == 1 else -0.0
    )  # to add -0 changes nothing, to add 0 makes each zero +0
    for piece in prange((param.size + PIECE - 1) // PIECE):
        start, stop = piece * PIECE, min(piece * PIECE + PIECE, param.size)
        p, g, m, v = (
            param[start:stop],
            grad[start:stop],
            moments[0, start:stop],
            moments[1, start:stop],
        )
        if first:
            m[:], v[:] = 0, 0
        for i in range(
            p.size
        ):  # a loop of its own: LLVM does not vectorise what Numba makes of prange over elements
            m[i] = fma(factor, g[i] - m[i], m[i] if near else g[i]) + zero
            v[i] = fma(value * g[i], g[i], v[i] * beta2)
            p[i] = p[i] * decay + step_size * m[i] / (np.sqrt(v[i]) / divisor + eps)


def fma(a, b, c):
    """a * b + c of float32, rounded once."""
    function = ctypes.CFUNCTYPE(ctypes.c_float, *[ctypes.c_float] * 3)(("fmaf", ctypes.CDLL(None)))
    return np.float32(function(a, b, c))


@overload(fma)
def _compiled_fma(a, b, c):
    return lambda a, b, c: _fma(a, b, c)


@intrinsic
def _fma(_, a, b, c):
    return types.float32(a, b, c), lambda context, builder, signature, args: builder.fma(*args)
