"""AdamW in one pass, as paged_optim.adamw_ defines it, with the same bits.

torch makes a pass over memory for each operation. Here the parameter, the gradient and the moments
are read once, and all but the gradient are written once: 16 bytes read, 12 written per element.

torch's lerp_ and addcmul_ compute a product and a sum with one rounding, and every other operation
rounds its result. This kernel does the same.
"""

import ctypes

import numpy as np
from numba import njit, prange, types
from numba.extending import intrinsic, overload

PIECE = 1024  # elements that a thread takes at once


@njit(parallel=True, cache=True, error_model="numpy")
def update(param, grad, moments, first, decay, weight, beta2, value, divisor, eps, step_size):
    """Update float32 param (k,) and moments (2, k) in place, as paged_optim.adamw_ does.

    The scalars are those of its operations, in order, not yet rounded to float32. If `first`,
    the moments are set to 0 without being read. 16 bytes read, 12 written per element.
    """
    decay = np.float32(decay)
    weight = np.float32(weight)
    beta2 = np.float32(beta2)
    value = np.float32(value)
    divisor = np.float32(divisor)
    eps = np.float32(eps)
    step_size = np.float32(step_size)
    near = weight < np.float32(0.5)  # lerp_ starts from the nearer end
    factor = weight if near else weight - np.float32(1)
    zero = np.float32(0.0 if weight == 1 else -0.0)  # adding -0 changes nothing; 0 turns -0 into +0
    for piece in prange((param.size + PIECE - 1) // PIECE):
        start = piece * PIECE
        stop = min(start + PIECE, param.size)
        p = param[start:stop]
        g = grad[start:stop]
        m = moments[0, start:stop]
        v = moments[1, start:stop]
        if first:
            m[:] = 0
            v[:] = 0
        # An inner loop, because LLVM does not vectorize what Numba generates for a prange itself.
        for i in range(p.size):
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
    def codegen(context, builder, signature, args):
        return builder.fma(*args)

    return types.float32(a, b, c), codegen
