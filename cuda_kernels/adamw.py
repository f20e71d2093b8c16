"""AdamW in one pass over float32 states: a thread updates four elements, 16 bytes of each array.

torch's optimizer makes a pass over memory for each operation, seven or more; this kernel makes one:
16 bytes read and 12 written per element. Elements are independent, so a page of the optimizer's
state is one launch, and any run of elements can be updated.

The bits are those of paged_optim.adamw_ on a CPU. There, lerp_ and addcmul_ compute a product
and a sum with one rounding, and every other operation rounds its result. So this kernel uses `fma`
for lerp_ and addcmul_, and `mul` and `add` for the others. No operation is approximate: square root
and division are rounded to nearest.
"""

import math

from numba import cuda, types

from cuda_kernels.device import (
    F32,
    FLOATS,
    U32,
    WORDS,
    Kernel,
    add,
    bits,
    fma,
    inlined,
    load4,
    load4_written,
    mul,
    number,
    store4,
)

THREADS = 256
# first, decay, factor, near, zero, beta2, value, divisor, eps, step_size
# (launch_cuda.update_run has their values)
SCALARS = types.Tuple((U32, F32, F32, U32, F32, F32, F32, F32, F32, F32))


@inlined
def updated(p, g, m, v, scalars):
    """The new p, m, v of an element, as bits."""
    first, decay, factor, near, zero, beta2, value, divisor, eps, step_size = scalars
    m = F32(0) if first else m
    v = F32(0) if first else v
    m = add(fma(factor, add(g, -m), m if near else g), zero)  # lerp_ starts from the nearer end
    v = fma(mul(value, g), g, mul(v, beta2))
    denominator = add(F32(math.sqrt(v)) / divisor, eps)
    p = add(mul(p, decay), mul(step_size, m) / denominator)
    return bits(p), bits(m), bits(v)


def adamw(p4, g4, m4, v4, p, g, m, v, n, wide, scalars):
    """Update elements 0 ... n - 1; a thread takes four of them if `wide`, else one.

    p4 and p are the same memory, and so on. `wide` requires that n is a multiple of 4 and that the
    arrays start at a multiple of 16 bytes.
    """
    i = U32(U32(cuda.blockIdx.x) * U32(THREADS) + U32(cuda.threadIdx.x))
    if wide:
        if i < n >> U32(2):
            old_p = load4_written(p4, i)
            old_g = load4(g4, i)
            old_m = load4_written(m4, i)
            old_v = load4_written(v4, i)
            new_p = cuda.local.array(4, U32)
            new_m = cuda.local.array(4, U32)
            new_v = cuda.local.array(4, U32)
            for j in range(4):
                old = number(old_p[j]), number(old_g[j]), number(old_m[j]), number(old_v[j])
                new_p[j], new_m[j], new_v[j] = updated(old[0], old[1], old[2], old[3], scalars)
            store4(p4, i, new_p[0], new_p[1], new_p[2], new_p[3])
            store4(m4, i, new_m[0], new_m[1], new_m[2], new_m[3])
            store4(v4, i, new_v[0], new_v[1], new_v[2], new_v[3])
    elif i < n:
        new_p1, new_m1, new_v1 = updated(p[i], g[i], m[i], v[i], scalars)
        p[i] = number(new_p1)
        m[i] = number(new_m1)
        v[i] = number(new_v1)


ADAMW = Kernel(adamw, (*[WORDS] * 4, *[FLOATS] * 4, U32, U32, SCALARS), THREADS)
