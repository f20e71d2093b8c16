"""Every tolerance of the tests, derived from how floating-point numbers are rounded.

This file imports nothing of the project, so a wrong implementation cannot loosen its own grade.

The model of arithmetic. A rounded operation returns fl(v) with |fl(v) - v| <= u |v| + tiny. Here u
is the unit roundoff of the format, and `tiny` is half the distance between its subnormal numbers.
Sums and differences need no `tiny`: they are exact there. Higham's gamma_n = n u / (1 - n u) covers
n such factors in any order of the operations: (1 + d1) ... (1 + dn) differs from 1 by at most
gamma_n (Accuracy and Stability of Numerical Algorithms, lemma 3.1).

The bounds are evaluated in float64. Its rounding errors are smaller than the second-order terms,
which the bounds round up.
"""

import math
from dataclasses import dataclass

import torch
from scipy import integrate, special
from torch import Tensor

UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
TINY = {
    torch.float64: 2.0**-1074,
    torch.float32: 2.0**-150,
    torch.float16: 2.0**-25,
    torch.bfloat16: 2.0**-134,
}
U = UNIT_ROUNDOFF[torch.float32]

# Tolerances that are promises of the program, not bounds of rounding. All are relative.
OF_A_PEAK = 0.05  # the predicted peak of memory
OF_A_PEAK_ON_A_CARD = 0.03  # the same, where the run of 65B must fit the memory of a card
OF_A_LOSS_IN_SEVERAL_PROCESSES = 1e-5  # over some steps, with sums in another order
OF_TRAFFIC = 0.05  # headers, and the few numbers that every step adds up over all processes
OF_A_SHARE = 0.1  # above an equal share of all bytes: 55 % for one of two processes
HALF_A_PERCENT = 0.005  # a share that is printed in whole percents
SIGNIFICANT = 0.05  # the level of the tests of paper/
OF_A_ROTATED_MODEL = 2.0**-12  # its RMSNorm rounds to float32; errors stay below half the digits
A_TENTH = 0.1  # what a rotation changes at least of a weight
OF_A_SAMPLED_ERROR = 2e-4  # published with four digits, the last of which is uncertain
OF_A_SAMPLED_MEAN = 3e-5  # of bitsandbytes' tests, over a few million numbers
OF_AN_ITERATION = 5e-6  # it ends when no level moves by 1e-7, a small part of what is left
OF_AN_INTEGRAL = 1e-9  # the quadrature of paper/codebooks.py


def gamma(n: int, dtype: torch.dtype = torch.float32) -> float:
    """Relative error of n rounded operations in a row (Higham, lemma 3.1).

    A sum of n + 1 numbers has n of them, and so does a dot product of n numbers.
    """
    nu = n * UNIT_ROUNDOFF[dtype]
    return nu / (1 - nu)


def cast(magnitude: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    """Error of rounding a number of at most this magnitude to `dtype`: u |v| + tiny."""
    return UNIT_ROUNDOFF[dtype] * magnitude + TINY[dtype]


def half_gap(codebook: Tensor) -> float:
    """The largest distance of a number in [-1, 1] to its nearest level.

    That is half the widest gap, or the distance of -1 or 1 to the outermost level.
    """
    levels = codebook.double()
    widest = (levels[1:] - levels[:-1]).max().item()
    below_lowest = 1 + levels[0].item()
    above_highest = 1 - levels[-1].item()
    return max(widest / 2, below_lowest, above_highest)


def decision_error() -> float:
    """The largest distance to the midpoint of two levels where the wrong one is taken: 2u + u^2.

    As a fraction of absmax. The normalised number is fl(x fl(1/a)). The reciprocal has a relative
    error of u. The product is below 1 near a midpoint, so its error is half a float32 step, u/2.
    The float32 midpoint has an error of u/2. The last term bounds the products of these errors.
    """
    return 2 * U + U**2


def decision_slack() -> float:
    """How much farther the chosen level may be than the nearest: twice the decision error.

    As a fraction of absmax.
    """
    return 2 * decision_error()


def roundtrip(absmax: Tensor, codebook: Tensor, source: torch.dtype, target: torch.dtype) -> Tensor:
    """|x - dequantize(quantize(x))| for numbers x of a block with this absmax a.

        a (h + 2u + u^2)     the nearest level, at most h away, and the decision error
        a u + tiny           the float32 product level * absmax
        cast                 from float32 to `target`, of a number no larger than a (1 + u)
        a u + tiny           the cast of x to float32, if `source` is float64

    A 16-bit target needs the cast; float32 and float64 hold every float32 number. A block that is
    first scaled by a power of two has the products of a block with a larger absmax: no new term.
    """
    a = absmax.double()
    error = a * (half_gap(codebook) + decision_error()) + cast(a, torch.float32)
    if target in (torch.float16, torch.bfloat16):
        error = error + cast(a * (1 + U) + TINY[torch.float32], target)
    if source == torch.float64:
        error = error + cast(a, torch.float32)
    return error


def requantizing_is_safe(absmax: Tensor, codebook: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether every decoded number of a block certainly gets its own code again. Bool (blocks,).

    The codebook must hold -1 and 1: then absmax itself, which is in `dtype`, decodes exactly. A
    level l decodes to l a (1 + u) (1 + u_dtype) + tiny + tiny_dtype; the decision error is added to
    that. The sum of the errors must be less than half the narrower gap next to l. It is, unless
    absmax is close to the subnormal numbers, or the format is too coarse for the code. A block of
    zeros decodes to zeros.
    """
    a = absmax.double()[:, None]
    levels = codebook.double()
    gaps = levels[1:] - levels[:-1]
    inf = torch.full((1,), math.inf, dtype=torch.float64)
    room = torch.minimum(torch.cat([inf, gaps]), torch.cat([gaps, inf])) / 2  # (levels,)
    relative = U
    step = TINY[torch.float32]
    if dtype in (torch.float16, torch.bfloat16):
        relative += UNIT_ROUNDOFF[dtype]
        step += TINY[dtype]
    moved = levels.abs() * relative * (1 + U) + step / a.clamp(min=TINY[torch.float32])
    return (moved + decision_error() < room).all(1) | (a[:, 0] == 0)


def double_quantized(constants: Tensor, nested_absmax: Tensor, codebook: Tensor) -> Tensor:
    """|c - dequantize(quantize(c))| for constants c; N is the nested absmax of each one's block.

    `constants` and `nested_absmax` have the same shape. Both directions use the stored offset o, so
    the rounding of o itself adds no error:
        u |c - o| <= u N (1 + 2u)      the subtraction
        roundtrip(N)                   the 8-bit code, to float32
        u (c + all of the above)       the addition of o; clamping to [0, largest] adds no error
    """
    c, n = constants.double(), nested_absmax.double()
    error = roundtrip(n, codebook, torch.float32, torch.float32) + U * n * (1 + 2 * U)
    return error + U * (c + error)


def both_quantized(
    absmax: Tensor,
    nested_absmax: Tensor,
    codebook: Tensor,
    code8: Tensor,
    source: torch.dtype,
    target: torch.dtype,
) -> Tensor:
    """|w - w'| for each block, where its absmax was quantized too.

    No level is above 1, so the error of absmax counts once.
    """
    constants = double_quantized(absmax, nested_absmax, code8)
    return constants + roundtrip(absmax.double() + constants, codebook, source, target)


@dataclass(frozen=True)
class Bounded:
    """A float64 tensor, and for each element a bound on the error of a rounded computation of it.

    This is running error analysis: each operation here bounds that operation in a low-precision
    program, so a formula written with them yields its own bound. A matrix product may be summed in
    any order, in float32 or better (float64 for float64), and be rounded to `dtype` at its end.
    """

    value: Tensor
    error: Tensor

    @classmethod
    def exact(cls, tensor: Tensor) -> "Bounded":
        value = tensor.detach().double()
        return cls(value, torch.zeros_like(value))

    @property
    def most(self) -> Tensor:
        """The largest magnitude that the rounded computation can have here."""
        return self.value.abs() + self.error

    @property
    def T(self) -> "Bounded":
        return Bounded(self.value.T, self.error.T)

    def to(self, dtype: torch.dtype) -> "Bounded":
        """Rounds to dtype: adds cast(most)."""
        return Bounded(self.value, self.error + cast(self.most, dtype))

    def times(self, factor: Tensor | float, dtype: torch.dtype) -> "Bounded":
        """Times numbers that are exact in float64.

        The factor is rounded to float32 (to nothing less for float64), and the product to dtype.
        """
        factor = torch.as_tensor(factor, dtype=torch.float64)
        scaled = Bounded(self.value * factor, self.error * factor.abs())
        if dtype != torch.float64:
            scaled = Bounded(scaled.value, scaled.error + U * scaled.most)
        return scaled.to(dtype)

    def plus(self, other: "Bounded", dtype: torch.dtype) -> "Bounded":
        return Bounded(self.value + other.value, self.error + other.error).to(dtype)

    def matmul(self, other: "Bounded", dtype: torch.dtype) -> "Bounded":
        """X Y, where X and Y have the errors E and F.

        The factors add |X| F + E |Y| + E F, the K products and sums gamma_K |X| |Y|, and a 16-bit
        result one rounding.
        """
        inner = max(self.value.shape[-1], 1)
        inherited = self.value.abs() @ other.error
        inherited = inherited + self.error @ other.value.abs()
        inherited = inherited + self.error @ other.error
        accumulator = dtype if dtype == torch.float64 else torch.float32
        rounding = gamma(inner, accumulator) * (self.most @ other.most)
        rounding = rounding + 2 * inner * TINY[accumulator]
        product = Bounded(self.value @ other.value, inherited + rounding)
        return product if dtype in (torch.float32, torch.float64) else product.to(dtype)

    def allows(self, computed: Tensor, reference: Tensor | None = None) -> bool:
        """Whether a computed tensor is within the bound of `value`, or of `reference` instead."""
        reference = self.value if reference is None else reference.detach()
        distance = (computed.detach().double() - reference).abs()
        return computed.shape == self.error.shape and bool((distance <= self.error).all())


def in_float64(bounded: Bounded, terms: int) -> Bounded:
    """Adds the rounding of the float64 reference itself, where a bound may be as small as that."""
    return Bounded(bounded.value, bounded.error + gamma(terms, torch.float64) * bounded.most)


def operand(tensor: Tensor, dtype: torch.dtype) -> Bounded:
    """A tensor as a factor in `dtype`: rounded, unless it has that dtype already."""
    return Bounded.exact(tensor) if tensor.dtype == dtype else Bounded.exact(tensor).to(dtype)


def lora_forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    keep: Tensor | None,
    dtype: torch.dtype,
) -> Bounded:
    """y = x W^T + b + s ((keep x) A^T) B^T in `dtype`, from operands rounded to `dtype`."""
    x_, W, A, B = (operand(t, dtype) for t in (x, weight, lora_A, lora_B))
    dropped = x_ if keep is None else x_.times(keep.double(), torch.float64)
    h = dropped.matmul(A.T, dtype)
    y = x_.matmul(W.T, dtype)
    if bias is not None:
        y = y.plus(operand(bias, dtype), dtype)
    y = y.plus(h.matmul(B.T, dtype).times(scaling, dtype), dtype)
    return in_float64(y, terms=4 * max(x.shape[-1], 1))


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Bounded:
    """y = x W^T + b in x's dtype, by a kernel that rounds the levels of W to that dtype.

    The kernel does not round the products of levels and constants, so W has the error of one
    rounding. The sums are in float32 and rounded once at the end. A product of two 16-bit numbers
    is exact in float32, and a tensor core adds 16 of them to a sum. It may truncate instead of
    rounding: 2u for each of 17 numbers. There follow a product and a sum for each 64 columns, a sum
    for each of 8 warps or 5 shuffles, and b. In float32, each product and its sum round once.
    """
    W = operand(weight, x.dtype)
    inner = x.shape[1]
    roundings = 2 * 17 * -(-inner // 16) + -(-inner // 32) + 9
    exact = Bounded.exact(x).matmul(W.T, torch.float64)
    spread = gamma(roundings) * (x.double().abs() @ W.most.T) + 2 * roundings * TINY[torch.float32]
    y = Bounded(exact.value, exact.error + spread)
    if bias is not None:
        y = y.plus(Bounded.exact(bias), torch.float32)
    return y.to(x.dtype)


def merged_forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    kept_in: torch.dtype,
    dtype: torch.dtype,
) -> Bounded:
    """y = x (W + s B A)^T + b in `dtype`; the sum is made in float32 and stored as `kept_in`."""
    update = Bounded.exact(lora_B).matmul(Bounded.exact(lora_A), torch.float32)
    update = update.times(scaling, torch.float32)
    W = update.plus(Bounded.exact(weight), torch.float32)
    if kept_in != torch.float32:
        W = W.to(kept_in)
    if dtype not in (kept_in, torch.float32):
        W = W.to(dtype)
    y = operand(x, dtype).matmul(W.T, dtype)
    if bias is not None:
        y = y.plus(operand(bias, dtype), dtype)
    return in_float64(y, terms=4 * max(x.shape[-1], 1))


def dora_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Bounded:
    """The norm of each row of W + s B A, (out,), in the adapter's dtype.

    n^2 = w^2 + 2 s sum_r B (W A^T) + s^2 sum_r B (B A A^T), with sums in float64. W A^T and w, the
    norm of W alone, are rounded to the adapter's dtype. Clamping at zero adds no error.
    """
    dtype = lora_A.dtype
    double = torch.float64
    W = Bounded.exact(weight)
    A = Bounded.exact(lora_A)
    B = Bounded.exact(lora_B).times(scaling, double)
    all_inputs = Bounded.exact(torch.ones(weight.shape[1], 1))
    all_ranks = Bounded.exact(torch.ones(lora_A.shape[0], 1))
    base_norm = root(product(W, W, double).matmul(all_inputs, double), double).to(dtype)
    base_square = product(base_norm, base_norm, double)
    crossed = W.matmul(A.T, dtype).times(2, double)
    gram = B.matmul(A.matmul(A.T, double), double)
    update_square = product(B, crossed.plus(gram, double), double).matmul(all_ranks, double)
    square = base_square.plus(update_square, double)
    norm = root(Bounded(square.value.clamp(min=0), square.error), double).to(dtype)
    return Bounded(norm.value[:, 0], norm.error[:, 0])


def dora_scale(magnitude: Tensor, norm: Bounded) -> Bounded:
    """c = m / n (out,)."""
    return quotient(Bounded.exact(magnitude), norm, magnitude.dtype)


def dora_forward(y: Bounded, c: Bounded, bias: Tensor | None, dtype: torch.dtype) -> Bounded:
    """c y + (1 - c) b in float32, rounded to `dtype`; y includes the bias."""
    wide = torch.float32
    scaled = product(y, c, wide)
    if bias is not None:
        rest = Bounded(1 - c.value, c.error).to(wide)
        scaled = scaled.plus(product(rest, operand(bias, dtype), wide), wide)
    return scaled if dtype == wide else scaled.to(dtype)


def dora_backward(
    g: Tensor, y: Bounded, c: Bounded, norm: Bounded, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Bounded, Bounded]:
    """The gradients of y and of m: c g in `dtype`, and the sum over tokens of g (y - b), over n."""
    wide = torch.float32
    g_ = operand(g, dtype)
    all_tokens = Bounded.exact(torch.ones(1, len(g)))
    of_c = all_tokens.matmul(product(g_, y, wide), wide)
    if bias is not None:
        of_bias = product(all_tokens.matmul(g_, wide), operand(bias, dtype), wide)
        of_c = of_c.plus(Bounded(-of_bias.value, of_bias.error), wide)
    of_y = product(g_, c, wide)
    if dtype != wide:
        of_y = of_y.to(dtype)
    of_m = quotient(Bounded(of_c.value[0], of_c.error[0]), norm, wide)
    return of_y, of_m


def lora_backward(
    g: Tensor | Bounded,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    keep: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Bounded, Bounded, Bounded]:
    """dL/dx, dL/dA and dL/dB of lora_forward, for an incoming gradient g.

    dh = s g B, dB = s g^T h, dA = dh^T (keep x), dx = g W + keep (dh A).
    """
    x_, W, A, B = (operand(t, dtype) for t in (x, weight, lora_A, lora_B))
    g_ = g if isinstance(g, Bounded) else operand(g, dtype)
    dropped = x_ if keep is None else x_.times(keep.double(), torch.float64)
    h = dropped.matmul(A.T, dtype)
    dh = g_.matmul(B, dtype).times(scaling, dtype)
    dB = g_.T.matmul(h, dtype).times(scaling, dtype)
    dA = dh.T.matmul(dropped, dtype)
    through = dh.matmul(A, dtype)
    if keep is not None:
        through = through.times(keep.double(), torch.float64)
    dx = through.plus(g_.matmul(W, dtype), dtype)
    terms = 4 * max(*x.shape, *lora_B.shape, 1)
    return in_float64(dx, terms), in_float64(dA, terms), in_float64(dB, terms)


def cosine(n: int) -> float:
    """Error of <p, q> / (|p| |q|) for p and q of n numbers, with sums in float32.

    It is also the error of <p, q> / |q|^2, relative to |p| / |q|. The dot product has an error of
    gamma_n |p| |q|. A sum of squares has a factor of at least 1 - gamma_n; a norm takes its root
    and rounds it. The cosine is at most 1. All other operations are in float64.
    """
    return (1 + gamma(n)) / ((1 - gamma(n)) * (1 - U) ** 2) * (1 + gamma(4, torch.float64)) - 1


def least_cosine(relative_error: float) -> float:
    """The least cosine between v and v + e with |e| <= relative_error |v|.

    The sine of the angle is at most relative_error.
    """
    if relative_error >= 1:
        return -1.0
    return math.sqrt(1 - relative_error**2)


def mean_absolute_error(codebook: Tensor, block_size: int) -> float:
    """The mean |x - x'| of N(0, 1) numbers that are quantized in blocks, without rounding.

    It is an integral over order statistics. The largest magnitude c of a block of B numbers has the
    density B F(c)^(B-1) f(c), where F and f are the distribution and the density of |x|. It decodes
    exactly. The other B - 1 are independent N(0, 1) numbers, truncated to [-c, c]. On [low, high]
    around a level, the integral of |x - level| phi(x) follows from phi and Phi at low, level, high.
    """
    levels = codebook.double().tolist()
    midpoints = [(low + high) / 2 for low, high in zip(levels[:-1], levels[1:], strict=True)]
    edges = [-1.0, *midpoints, 1.0]

    def above(low: float, high: float, level: float) -> float:
        """The integral of (x - level) phi(x) from low to high."""
        phi = (math.exp(-(low**2) / 2) - math.exp(-(high**2) / 2)) / math.sqrt(2 * math.pi)
        return phi - level * (special.ndtr(high) - special.ndtr(low))

    def truncated(c: float) -> float:
        """The mean error of a number that lies in [-c, c]."""
        error = 0.0
        for level, low, high in zip(levels, edges[:-1], edges[1:], strict=True):
            error += above(c * level, c * high, c * level)
            error -= above(c * low, c * level, c * level)
        return error / special.erf(c / math.sqrt(2))

    def integrand(c: float) -> float:
        F = special.erf(c / math.sqrt(2))
        f = math.sqrt(2 / math.pi) * math.exp(-(c**2) / 2)
        return block_size * F ** (block_size - 1) * f * truncated(c)

    return (block_size - 1) / block_size * integrate.quad(integrand, 1e-6, 10, limit=400)[0]


def of_a_mean(samples: Tensor, sigmas: float = 6.0) -> float:
    """How far the mean of independent samples may be from its expectation.

    Chance exceeds six standard errors once in 5e8 times.
    """
    return sigmas * samples.double().std().item() / math.sqrt(samples.numel())


def apart(first: Bounded, second: Bounded) -> Bounded:
    """How far two computations of one value may be apart: the sum of their errors."""
    return Bounded(first.value, first.error + second.error)


def product(a: Bounded, b: Bounded, dtype: torch.dtype) -> Bounded:
    """a b, element by element, where a and b have the errors E and F.

    |a| F + E |b| + E F, and one rounding.
    """
    error = a.value.abs() * b.error + a.error * b.value.abs() + a.error * b.error
    return Bounded(a.value * b.value, error).to(dtype)


def quotient(a: Bounded, b: Bounded, dtype: torch.dtype) -> Bounded:
    """a / b for b > 0: a'/b' - a/b = ((a' - a) - (b' - b) a/b) / b', and one rounding.

    The error is infinite if b' may be 0.
    """
    value = a.value / b.value
    least = (b.value - b.error).clamp(min=0)
    return Bounded(value, (a.error + value.abs() * b.error) / least).to(dtype)


def root(a: Bounded, dtype: torch.dtype) -> Bounded:
    """sqrt(a), for a and a computed a' >= 0, and one rounding.

    |sqrt(a') - sqrt(a)| = |a' - a| / (sqrt(a') + sqrt(a)), which is at most sqrt(|a' - a|).
    """
    least = (a.value - a.error).clamp(min=0)
    error = torch.where(least > 0, a.error / (least.sqrt() + a.value.sqrt()), a.error.sqrt())
    return Bounded(a.value.sqrt(), error).to(dtype)


def of_exp(dtype: torch.dtype) -> float:
    """The relative error allowed for an exponential: 32 u.

    The vectorized exponentials of torch promise 20 units in the last place.
    """
    return gamma(32, dtype)


def softmax(scores: Bounded, dtype: torch.dtype) -> Bounded:
    """e^s / sum e^s over the last dimension; a masked score is -inf.

    Scores with errors of E change each exponential, and so their sum, by a factor of at most e^E.
    The rounded difference s - m to the largest score m adds u |s - m| to E; the error of m itself
    cancels. There follow two exponentials, n sums and a quotient.
    """
    visible = scores.value.isfinite()
    size = torch.where(visible, scores.most, 0.0).amax(-1, keepdim=True)
    E = torch.where(visible, scores.error, 0.0).amax(-1, keepdim=True)
    E = E + 2 * UNIT_ROUNDOFF[dtype] * size
    value = scores.value.softmax(-1)
    n = value.shape[-1]
    relative = torch.expm1(2 * E) + 2 * of_exp(dtype) + gamma(n + 4, dtype)
    return Bounded(value, value * relative + 2 * TINY[dtype])


def silu(x: Bounded, dtype: torch.dtype) -> Bounded:
    """x / (1 + e^-x): an exponential, a sum and a quotient. The slope is below 1.1."""
    value = x.value * torch.sigmoid(x.value)
    rounding = (of_exp(dtype) + gamma(3, dtype)) * value.abs() + 2 * TINY[dtype]
    return Bounded(value, 1.1 * x.error + rounding)


def rms_norm(x: Bounded, weight: Tensor, eps: float, dtype: torch.dtype) -> Bounded:
    """w x / sqrt(mean(x^2) + eps) over the last dimension of (T, n)."""
    n = x.value.shape[-1]
    ones = Bounded.exact(torch.ones(n, 1))
    mean_square = product(x, x, dtype).matmul(ones, dtype).times(1 / n, dtype)
    rms = root(mean_square.plus(factor(eps, dtype), dtype), dtype)
    normed = quotient(x, rms, dtype).to(dtype)
    return product(normed, Bounded.exact(weight), dtype)


def rotated(x: Bounded, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Bounded:
    """Rotary embedding of x (T, d), for pairs (i, i + d/2); cos and sin (T, d) are in `dtype`."""
    half = x.value.shape[-1] // 2
    swapped = torch.cat([-x.value[:, half:], x.value[:, :half]], -1)  # (T, d)
    turned = Bounded(swapped, x.error.roll(half, -1))
    along = product(x, Bounded.exact(cos), dtype)
    across = product(turned, Bounded.exact(sin), dtype)
    return along.plus(across, dtype)


def factor(x: float, dtype: torch.dtype, magnitude: float | None = None) -> Bounded:
    """A number computed in float64 by up to three operations and rounded to dtype.

    No intermediate result is above `magnitude`, which is |x| by default.
    """
    value = torch.tensor(x, dtype=torch.float64)
    largest = value.abs() if magnitude is None else torch.tensor(magnitude)
    computed = Bounded(value, gamma(3, torch.float64) * largest)
    return computed if dtype == torch.float64 else computed.to(dtype)


def adamw(
    param: Bounded,
    exp_avg: Bounded,
    exp_avg_sq: Bounded,
    grad: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    dtype: torch.dtype,
) -> tuple[Bounded, Bounded, Bounded]:
    """Step `step` (the first is 1) of AdamW in `dtype`, for exact gradients.

    The state p, m, v has the errors of the steps before.

        p <- p - lr weight_decay p              or p (1 - lr weight_decay)
        m <- m + (1 - beta1) (g - m)            or g - beta1 (g - m) if beta1 <= 1/2, as lerp does
        v <- beta2 v + (1 - beta2) g g
        p <- p - s m / (sqrt(v) / c + eps)      s = lr / (1 - beta1^t), c = sqrt(1 - beta2^t)

    Products and quotients are evaluated from left to right; a product may be fused with the sum
    that it is part of. The factors that all elements share are computed in float64 and rounded to
    dtype (1 - beta^t is the same float64 in all programs). Nothing overflows.

    m occurs twice in its formula. Its error F becomes beta1 F: with w = 1 - beta1, m' + w (g - m')
    differs from m + w (g - m) by (1 - w)(m' - m). To this are added gamma_3 w |g - m'| for the
    factor, the difference and the product, and the rounding of the sum. In the other form,
    beta1 <= w has an error of at most u w.
    """
    beta1, beta2 = betas
    g = Bounded.exact(grad)
    if weight_decay:
        decay = factor(1 - lr * weight_decay, dtype, magnitude=1 + lr * weight_decay)
        param = product(param, decay, dtype)

    w = 1 - beta1
    difference = g.value - exp_avg.value
    rounding = gamma(3, dtype) * w * (difference.abs() + exp_avg.error) + 2 * TINY[dtype]
    exp_avg = Bounded(exp_avg.value + w * difference, beta1 * exp_avg.error + rounding).to(dtype)

    square = product(g.times(1 - beta2, dtype), g, dtype)
    exp_avg_sq = exp_avg_sq.times(beta2, dtype).plus(square, dtype)

    denominator = quotient(root(exp_avg_sq, dtype), factor((1 - beta2**step) ** 0.5, dtype), dtype)
    denominator = denominator.plus(factor(eps, dtype), dtype)
    step_size = factor(lr / (1 - beta1**step), dtype)
    change = quotient(product(exp_avg, step_size, dtype), denominator, dtype)
    return param.plus(Bounded(-change.value, change.error), dtype), exp_avg, exp_avg_sq


def table_error(points: int) -> float:
    """How far a number in [-1, 1] may be from the point whose level a table gives it: half a step.

    The table has equally spaced points. float32 adds the decision error, and u of at most 2 each
    for the sum 1 + x, its product with (points - 1) / 2, and the point itself.
    """
    return 1 / (points - 1) + decision_error() + 3 * 2 * U


def is_tight(errors: Tensor | float, bounds: Tensor | float, share: float = 0.99) -> bool:
    """Whether every error is within its bound and one of them reaches this share of it."""
    errors = torch.as_tensor(errors, dtype=torch.float64)
    bounds = torch.as_tensor(bounds, dtype=torch.float64)
    return bool(share <= (errors / bounds).max() <= 1)
