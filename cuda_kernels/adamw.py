"""AdamW in one pass over float32 states: a thread for four elements, 16 bytes of each of four arrays, three written back.

Torch's optimizer makes a pass over memory for each operation, seven or more; this makes one: 16 bytes read and 12 written an
element. Each element is updated by itself, so a page of the optimizer's state is a launch, and any run of elements will do.

The bits are those of paged_optim.adamw_ on a CPU. Its lerp_ and addcmul_ multiply and add with one rounding, all others round
one by one; so `fma` stands where they do and `mul`, `add` elsewhere. No operation is approximate: the square root is rounded
to nearest, and so is the division.
"""

import math

from numba import cuda

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


@inlined
def updated(p, g, m, v, first, decay, factor, near, zero, beta2, value, divisor, eps, step_size):
    """The new p, m, v of an element, as bits. `factor`, `near`, `zero`: lerp_ starts from the nearer end; see launch.py."""
    m, v = F32(0) if first else m, F32(0) if first else v
    m = add(fma(factor, add(g, -m), m if near else g), zero)
    v = fma(mul(value, g), g, mul(v, beta2))
    denominator = add(F32(math.sqrt(v)) / divisor, eps)
    p = add(mul(p, decay), mul(step_size, m) / denominator)
    return bits(p), bits(m), bits(v)


def adamw(
    p4,
    g4,
    m4,
    v4,
    p,
    g,
    m,
    v,
    n,
    wide,
    first,
    decay,
    factor,
    near,
    zero,
    beta2,
    value,
    divisor,
    eps,
    step_size,
):
    """Elements 0 ... n - 1, by threads that take four each if `wide`, else one. p4 and p are the same memory, and so on.

    Wide needs n to be a multiple of 4, and arrays that start at 16 bytes.
    """
    i = U32(U32(cuda.blockIdx.x) * U32(THREADS) + U32(cuda.threadIdx.x))
    if wide:
        if i < n >> U32(2):
            old_p, old_g, old_m, old_v = (
                load4_written(p4, i),
                load4(g4, i),
                load4_written(m4, i),
                load4_written(v4, i),
            )
            new_p, new_m, new_v = (
                cuda.local.array(4, U32),
                cuda.local.array(4, U32),
                cuda.local.array(4, U32),
            )
            for j in range(4):
                new_p[j], new_m[j], new_v[j] = updated(
                    number(old_p[j]),
                    number(old_g[j]),
                    number(old_m[j]),
                    number(old_v[j]),
                    first,
                    decay,
                    factor,
                    near,
                    zero,
                    beta2,
                    value,
                    divisor,
                    eps,
                    step_size,
                )
            store4(p4, i, new_p[0], new_p[1], new_p[2], new_p[3])
            store4(m4, i, new_m[0], new_m[1], new_m[2], new_m[3])
            store4(v4, i, new_v[0], new_v[1], new_v[2], new_v[3])
    elif i < n:
        a, b, c = updated(
            p[i],
            g[i],
            m[i],
            v[i],
            first,
            decay,
            factor,
            near,
            zero,
            beta2,
            value,
            divisor,
            eps,
            step_size,
        )
        p[i], m[i], v[i] = number(a), number(b), number(c)


ADAMW = Kernel(
    adamw,
    (*[WORDS] * 4, *[FLOATS] * 4, U32, U32, U32, F32, F32, U32, F32, F32, F32, F32, F32, F32),
    THREADS,
)
