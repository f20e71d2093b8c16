"""What rounding may do, and no more: every tolerance of the tests, derived. Nothing of the project is imported here, so a wrong
implementation cannot loosen its own grade.

The model of arithmetic. A rounded operation returns fl(v) with |fl(v) - v| <= u |v| + tiny, where u is the unit roundoff of the
format and `tiny` half the distance between its subnormal numbers (sums and differences need no `tiny`: they are exact there).
Higham's gamma_n = n u / (1 - n u) covers n such factors, whatever the order of the operations: (1 + d1) ... (1 + dn) differs
from 1 by at most gamma_n (Accuracy and Stability of Numerical Algorithms, lemma 3.1).

The bounds themselves are evaluated in float64, whose own rounding is smaller than the second-order terms that are rounded up.
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

# Not of rounding, but what the ledger promises of a peak: everywhere, and where the run of 65B is held to a card's memory
OF_A_PEAK, OF_A_PEAK_ON_A_CARD = 0.05, 0.03
OF_A_LOSS_IN_SEVERAL_PROCESSES = (
    1e-5  # and of losses whose sums were rounded in another order, over some steps
)
OF_TRAFFIC = 0.05  # what headers, and the few numbers that all add up in a step, may come to
OF_A_SHARE = 0.1  # what a process may have above its share of all bytes: 55 % of two
HALF_A_PERCENT = 0.005  # what a share may be off that is printed in whole percents


def gamma(n: int, dtype: torch.dtype = torch.float32) -> float:
    """Relative error of n rounded operations in a row (Higham, lemma 3.1); a sum of n + 1 numbers or a dot product of n."""
    nu = n * UNIT_ROUNDOFF[dtype]
    return nu / (1 - nu)


def cast(magnitude: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    """Error of rounding a number of at most this magnitude to `dtype`: u |v|, or half a subnormal step."""
    return UNIT_ROUNDOFF[dtype] * magnitude + TINY[dtype]


def half_gap(codebook: Tensor) -> float:
    """The farthest that a number in [-1, 1] can lie from its nearest level: half the widest gap, or what the ends leave out."""
    levels = codebook.double()
    return max(
        (levels[1:] - levels[:-1]).max().item() / 2, 1 + levels[0].item(), 1 - levels[-1].item()
    )


def decision_error() -> float:
    """How far from the true midpoint, as a fraction of absmax, a number can still get the wrong one of two levels: 2u + u^2.

    The normalised number is fl(x fl(1/a)): the reciprocal is off by u, relatively; the product, below 1 where a midpoint is, by
    half a float32 step, u/2; and the float32 midpoint by u/2. The last term holds the products of these.
    """
    return 2 * U + U**2


def decision_slack() -> float:
    """How much farther away, as a fraction of absmax, the chosen level may be than the nearest: twice the decision error."""
    return 2 * decision_error()


def roundtrip(absmax: Tensor, codebook: Tensor, source: torch.dtype, target: torch.dtype) -> Tensor:
    """|x - dequantize(quantize(x))| for numbers of a block with this absmax that came in `source` and are returned in `target`.

        a (h + 2u + u^2)     the nearest level, h away, and the decision error
        a u + tiny           the float32 product level * absmax
        cast                 to `target`, of a number no larger than a (1 + u); nothing where target holds all float32 numbers
        a u + tiny           the cast of float64 input to float32

    The products of a block that is first scaled by a power of two are those of a block with a larger absmax: no new term.
    """
    a = absmax.double()
    error = a * (half_gap(codebook) + decision_error()) + cast(a, torch.float32)
    if target in (torch.float16, torch.bfloat16):
        error = error + cast(a * (1 + U) + TINY[torch.float32], target)
    return error + cast(a, torch.float32) if source == torch.float64 else error


def requantizing_is_safe(absmax: Tensor, codebook: Tensor, dtype: torch.dtype) -> Tensor:
    """Bool, a block: whether the level that a decoded number came from is certainly its nearest one again.

    Needs a codebook that holds -1 and 1: then absmax itself decodes exactly (it came in `dtype`). A level l decodes to
    l a (1 + u) (1 + u_dtype) + tiny + tiny_dtype; then the decision error comes in. All this must stay under half
    the narrower gap at l. It does unless the subnormal steps are wide beside absmax, or the format is too coarse for the code.
    A block of zeros stays one.
    """
    a, levels = absmax.double()[:, None], codebook.double()
    gaps = levels[1:] - levels[:-1]
    inf = torch.full((1,), math.inf, dtype=torch.float64)
    room = torch.minimum(torch.cat([inf, gaps]), torch.cat([gaps, inf])) / 2  # (levels,)
    half = dtype in (torch.float16, torch.bfloat16)
    factor, step = (
        U + (UNIT_ROUNDOFF[dtype] if half else 0.0),
        TINY[torch.float32] + (TINY[dtype] if half else 0.0),
    )
    moved = (
        levels.abs() * factor * (1 + U) + step / a.clamp(min=TINY[torch.float32]) + decision_error()
    )
    return (moved < room).all(1) | (a[:, 0] == 0)


def double_quantized(constants: Tensor, nested_absmax: Tensor, codebook: Tensor) -> Tensor:
    """|c - dequantize(quantize(c))| for constants c, given for each the nested absmax N of its block (same shape).

    The stored offset o is used on both ways, so that its own rounding costs nothing:
        u |c - o| <= u N (1 + 2u)      the subtraction
        roundtrip(N)                   the 8-bit code, to float32
        u (c + all of the above)       the addition of o; clamping to [0, largest] only comes nearer
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
    """|w - w'|, a block, where its absmax was itself quantized: no level is above 1, so an error of absmax counts once."""
    constants = double_quantized(absmax, nested_absmax, code8)
    return constants + roundtrip(absmax.double() + constants, codebook, source, target)


@dataclass(frozen=True)
class Bounded:
    """A float64 tensor and how far, element by element, a rounded computation of it may be off: running error analysis.

    The operations here say what a low-precision program may do; writing a formula with them yields its bound. A product may be
    accumulated in any order, in float32 or better (float64 for float64), and may be rounded to `dtype` at its end.
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
        """Rounded to dtype: cast(most) more."""
        return Bounded(self.value, self.error + cast(self.most, dtype))

    def times(self, factor: Tensor | float, dtype: torch.dtype) -> "Bounded":
        """Times numbers that are exact in float64: rounded to float32 (or better) once, and the product once more."""
        factor = torch.as_tensor(factor, dtype=torch.float64)
        scaled = Bounded(self.value * factor, self.error * factor.abs())
        return Bounded(scaled.value, scaled.error + U * scaled.most * (dtype != torch.float64)).to(
            dtype
        )

    def plus(self, other: "Bounded", dtype: torch.dtype) -> "Bounded":
        return Bounded(self.value + other.value, self.error + other.error).to(dtype)

    def matmul(self, other: "Bounded", dtype: torch.dtype) -> "Bounded":
        """X Y for X, Y in error by E, F: |X| F + E |Y| + E F, gamma_K |X| |Y| for K products and sums, and one rounding."""
        inner = max(self.value.shape[-1], 1)
        spread = (
            self.value.abs() @ other.error
            + self.error @ other.value.abs()
            + self.error @ other.error
        )
        accumulator = dtype if dtype == torch.float64 else torch.float32
        rounding = (
            gamma(inner, accumulator) * (self.most @ other.most) + 2 * inner * TINY[accumulator]
        )
        product = Bounded(self.value @ other.value, spread + rounding)
        return product if dtype in (torch.float32, torch.float64) else product.to(dtype)

    def allows(self, computed: Tensor, reference: Tensor | None = None) -> bool:
        """Whether a computed tensor is within the bound of `value`, or of another computation of it in float64."""
        reference = self.value if reference is None else reference.detach()
        distance = (computed.detach().double() - reference).abs()
        return computed.shape == self.error.shape and bool((distance <= self.error).all())


def in_float64(bounded: Bounded, terms: int) -> Bounded:
    """The same with the rounding of the float64 reference itself allowed for: where a bound may be as small as that."""
    return Bounded(bounded.value, bounded.error + gamma(terms, torch.float64) * bounded.most)


def operand(tensor: Tensor, dtype: torch.dtype) -> Bounded:
    """A tensor as it enters a product in `dtype`: rounded, unless it is in that dtype already."""
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
    """y = x W^T + b + s ((keep x) A^T) B^T in `dtype`, from operands that are rounded to `dtype` first."""
    x_, W, A, B = (operand(t, dtype) for t in (x, weight, lora_A, lora_B))
    h = (x_ if keep is None else x_.times(keep.double(), torch.float64)).matmul(A.T, dtype)
    y = x_.matmul(W.T, dtype)
    if bias is not None:
        y = y.plus(operand(bias, dtype), dtype)
    return in_float64(
        y.plus(h.matmul(B.T, dtype).times(scaling, dtype), dtype), 4 * max(x.shape[-1], 1)
    )


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Bounded:
    """y = x W^T + b in x's dtype, by a kernel that rounds the levels of W to it, but not their products with the constants.

    So W is off by its own rounding. The sums are float32's, and rounded once at the end. A product of two 16-bit numbers is
    exact in float32, and a tensor core adds 16 of them to a sum; it may cut off what does not fit instead of rounding it, which
    is 2u for each of 17 numbers. Then comes a product and sum for each 64 columns, a sum for each of 8 warps or 5 shuffles,
    and b. For float32 it is one rounding for each product with a sum.
    """
    W, inner = operand(weight, x.dtype), x.shape[1]
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
    """y = x (W + s B A)^T + b in `dtype`, where the sum is made in float32 and kept in the dtype `kept_in`."""
    update = (
        Bounded.exact(lora_B)
        .matmul(Bounded.exact(lora_A), torch.float32)
        .times(scaling, torch.float32)
    )
    W = update.plus(Bounded.exact(weight), torch.float32)
    W = W if kept_in == torch.float32 else W.to(kept_in)
    y = operand(x, dtype).matmul((W if dtype in (kept_in, torch.float32) else W.to(dtype)).T, dtype)
    return in_float64(
        y if bias is None else y.plus(operand(bias, dtype), dtype), 4 * max(x.shape[-1], 1)
    )


def dora_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Bounded:
    """The norm of each row of W + s B A (out,), in the adapter's dtype, from float64 sums and a product W A^T in that dtype.

    n^2 = w^2 + 2 s sum_r B (W A^T) + s^2 sum_r B (B A A^T), where w, the norm of W alone, has been rounded to that dtype.
    Clamping at zero only comes nearer.
    """
    dtype, in_64 = lora_A.dtype, torch.float64
    W, A, B = (Bounded.exact(each) for each in (weight, lora_A, lora_B))
    ones, B = Bounded.exact(torch.ones(lora_A.shape[0], 1)), B.times(scaling, in_64)
    of_base = root(
        product(W, W, in_64).matmul(Bounded.exact(torch.ones(weight.shape[1], 1)), in_64), in_64
    ).to(dtype)
    crossed, gram = W.matmul(A.T, dtype).times(2, in_64), B.matmul(A.matmul(A.T, in_64), in_64)
    square = product(of_base, of_base, in_64).plus(
        product(B, crossed.plus(gram, in_64), in_64).matmul(ones, in_64), in_64
    )
    norm = root(Bounded(square.value.clamp(min=0), square.error), in_64).to(dtype)
    return Bounded(norm.value[:, 0], norm.error[:, 0])


def dora_scale(magnitude: Tensor, norm: Bounded) -> Bounded:
    """c = m / n (out,)."""
    return quotient(Bounded.exact(magnitude), norm, magnitude.dtype)


def dora_forward(y: Bounded, c: Bounded, bias: Tensor | None, dtype: torch.dtype) -> Bounded:
    """c y + (1 - c) b in float32, then in `dtype`, for y with a bias in it."""
    wide = torch.float32
    scaled = product(y, c, wide)
    if bias is not None:
        rest = Bounded(1 - c.value, c.error).to(wide)
        scaled = scaled.plus(product(rest, operand(bias, dtype), wide), wide)
    return scaled if dtype == wide else scaled.to(dtype)


def dora_backward(
    g: Tensor, y: Bounded, c: Bounded, norm: Bounded, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Bounded, Bounded]:
    """The gradients of y in `dtype`, which is c g, and of m: what tokens add up to of g (y - b), over n."""
    wide, ones, g_ = torch.float32, Bounded.exact(torch.ones(1, len(g))), operand(g, dtype)
    of_c = ones.matmul(product(g_, y, wide), wide)
    if bias is not None:
        total = product(ones.matmul(g_, wide), operand(bias, dtype), wide)
        of_c = of_c.plus(Bounded(-total.value, total.error), wide)
    of_y = product(g_, c, wide)
    return (of_y if dtype == wide else of_y.to(dtype)), quotient(
        Bounded(of_c.value[0], of_c.error[0]), norm, wide
    )


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
    """dL/dx, dL/dA and dL/dB of the same, for an incoming gradient g.

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
    dx = (through if keep is None else through.times(keep.double(), torch.float64)).plus(
        g_.matmul(W, dtype), dtype
    )
    terms = 4 * max(*x.shape, *lora_B.shape, 1)
    return in_float64(dx, terms), in_float64(dA, terms), in_float64(dB, terms)


def cosine(n: int) -> float:
    """Error of <p, q> / (|p| |q|), or of <p, q> / |q|^2 over |p| / |q|, for p, q of n numbers, computed in float32.

    The dot product is off by gamma_n |p| |q|; a sum of squares by a factor of at least 1 - gamma_n, of which a norm takes the
    root and rounds it. The cosine is at most 1. What is left is done in float64.
    """
    return (1 + gamma(n)) / ((1 - gamma(n)) * (1 - U) ** 2) * (1 + gamma(4, torch.float64)) - 1


def least_cosine(relative_error: float) -> float:
    """The least cosine between v and v + e with |e| <= relative_error |v|: the sine of the angle is at most relative_error."""
    return math.sqrt(max(0.0, 1 - relative_error**2)) if relative_error < 1 else -1.0


def mean_absolute_error(codebook: Tensor, block_size: int) -> float:
    """The mean |x - x'| of N(0, 1) numbers, quantized in blocks, without rounding: an integral over order statistics.

    The largest magnitude c of a block of B has the density B F(c)^(B-1) f(c), where F and f belong to |x|. It is decoded
    exactly; the other B - 1 are independent N(0, 1) numbers cut off at c. On [low, high] around a level, the integral of
    |x - level| phi(x) is made of phi and Phi at low, level and high.
    """
    levels = codebook.double().tolist()
    edges = [
        -1.0,
        *((low + high) / 2 for low, high in zip(levels[:-1], levels[1:], strict=True)),
        1.0,
    ]

    def above(low: float, high: float, level: float) -> float:
        """The integral of (x - level) phi(x) from low to high."""
        phi = (math.exp(-(low**2) / 2) - math.exp(-(high**2) / 2)) / math.sqrt(2 * math.pi)
        return phi - level * (special.ndtr(high) - special.ndtr(low))

    def truncated(c: float) -> float:
        """Mean error of a number that is known to lie in [-c, c]."""
        cells = zip(levels, edges[:-1], edges[1:], strict=True)
        errors = (
            above(c * at, c * high, c * at) - above(c * low, c * at, c * at)
            for at, low, high in cells
        )
        return sum(errors) / special.erf(c / math.sqrt(2))

    def integrand(c: float) -> float:
        smaller, here = (
            special.erf(c / math.sqrt(2)),
            math.sqrt(2 / math.pi) * math.exp(-(c**2) / 2),
        )  # F, f
        return block_size * smaller ** (block_size - 1) * here * truncated(c)

    return (block_size - 1) / block_size * integrate.quad(integrand, 1e-6, 10, limit=400)[0]


def of_a_mean(samples: Tensor, sigmas: float = 6.0) -> float:
    """How far the mean of independent samples may be from its expectation: six standard errors, exceeded once in 5e8 times."""
    return sigmas * samples.double().std().item() / math.sqrt(samples.numel())


def apart(first: Bounded, second: Bounded) -> Bounded:
    """How far two computations of one value may be from each other: their errors add up."""
    return Bounded(first.value, first.error + second.error)


def product(a: Bounded, b: Bounded, dtype: torch.dtype) -> Bounded:
    """a b, number by number: |a| F + E |b| + E F for a, b in error by E, F, and one rounding."""
    error = a.value.abs() * b.error + a.error * b.value.abs() + a.error * b.error
    return Bounded(a.value * b.value, error).to(dtype)


def quotient(a: Bounded, b: Bounded, dtype: torch.dtype) -> Bounded:
    """a / b for b > 0: a'/b' - a/b = ((a' - a) - (b' - b) a/b) / b', and one rounding. Nothing is promised if b' may be 0."""
    least = (b.value - b.error).clamp(min=0)
    return Bounded(a.value / b.value, (a.error + (a.value / b.value).abs() * b.error) / least).to(
        dtype
    )


def root(a: Bounded, dtype: torch.dtype) -> Bounded:
    """sqrt(a), for a and a computed a' >= 0: |sqrt(a') - sqrt(a)| = |a' - a| / (sqrt(a') + sqrt(a)), and <= sqrt(|a' - a|)."""
    least = (a.value - a.error).clamp(min=0)
    error = torch.where(least > 0, a.error / (least.sqrt() + a.value.sqrt()), a.error.sqrt())
    return Bounded(a.value.sqrt(), error).to(dtype)


def of_exp(dtype: torch.dtype) -> float:
    """Relative error granted to an exponential: 32 units. The vectorized ones of torch promise 20 units of the last place."""
    return gamma(32, dtype)


def softmax(scores: Bounded, dtype: torch.dtype) -> Bounded:
    """e^s / sum e^s over the last dimension, -inf where nothing is seen.

    Scores in error by E change each exponential by a factor of at most e^E, and so the sum of them; a rounded difference s - m
    from the largest one adds u |s - m| to E. The largest itself cancels. Then two exponentials, n sums and a quotient.
    """
    seen = scores.value.isfinite()
    size = torch.where(seen, scores.value.abs() + scores.error, 0.0).amax(-1, keepdim=True)
    off = (
        torch.where(seen, scores.error, 0.0).amax(-1, keepdim=True)
        + 2 * UNIT_ROUNDOFF[dtype] * size
    )
    value = scores.value.softmax(-1)
    n = value.shape[-1]
    return Bounded(
        value,
        value * (torch.expm1(2 * off) + 2 * of_exp(dtype) + gamma(n + 4, dtype)) + 2 * TINY[dtype],
    )


def silu(x: Bounded, dtype: torch.dtype) -> Bounded:
    """x / (1 + e^-x), whose slope is below 1.1: the error of x by that, an exponential, a sum and a quotient."""
    value = x.value * torch.sigmoid(x.value)
    return Bounded(
        value, 1.1 * x.error + (of_exp(dtype) + gamma(3, dtype)) * value.abs() + 2 * TINY[dtype]
    )


def rms_norm(x: Bounded, weight: Tensor, eps: float, dtype: torch.dtype) -> Bounded:
    """w x / sqrt(mean(x^2) + eps) over the last dimension of (T, n)."""
    n = x.value.shape[-1]
    ones = Bounded.exact(torch.ones(n, 1))
    mean = (
        product(x, x, dtype).matmul(ones, dtype).times(1 / n, dtype).plus(factor(eps, dtype), dtype)
    )
    return product(quotient(x, root(mean, dtype), dtype).to(dtype), Bounded.exact(weight), dtype)


def rotated(x: Bounded, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Bounded:
    """Rotary embedding of (T, d), pairs (i, i + d/2), by angles whose cosines and sines (T, d) are given in `dtype`."""
    half = x.value.shape[-1] // 2
    turned = Bounded(torch.cat([-x.value[:, half:], x.value[:, :half]], -1), x.error.roll(half, -1))
    return product(x, Bounded.exact(cos), dtype).plus(
        product(turned, Bounded.exact(sin), dtype), dtype
    )


def factor(x: float, dtype: torch.dtype, magnitude: float | None = None) -> Bounded:
    """A number made in float64 by up to three operations, none of a result above `magnitude` (or x), and rounded to dtype."""
    value = torch.tensor(x, dtype=torch.float64)
    made = Bounded(
        value,
        gamma(3, torch.float64) * (value.abs() if magnitude is None else torch.tensor(magnitude)),
    )
    return made if dtype == torch.float64 else made.to(dtype)


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
    """Step `step` (from 1) of AdamW in `dtype`, for exact gradients and a state p, m, v that is in error by what came before.

        p <- p - lr weight_decay p              or p (1 - lr weight_decay)
        m <- m + (1 - beta1) (g - m)            or g - beta1 (g - m) where beta1 <= 1/2; lerp does so
        v <- beta2 v + (1 - beta2) g g
        p <- p - s m / (sqrt(v) / c + eps)      s = lr / (1 - beta1^t), c = sqrt(1 - beta2^t)

    Products and quotients from left to right; a product may be fused with the sum it enters. The factors that all elements
    share are made in float64 and rounded to dtype (1 - beta^t is the same float64 in all programs). Nothing overflows.

    m stands twice in its formula. Its error F becomes beta1 F: with w = 1 - beta1, m' + w (g - m') differs from m + w (g - m)
    by (1 - w)(m' - m). To that come gamma_3 w |g - m'| for the factor, the difference and the product, and the rounding of the
    sum. In the other form beta1 <= w is in error by u w, which is no more.
    """
    (beta1, beta2), g = betas, Bounded.exact(grad)
    if weight_decay:
        param = product(param, factor(1 - lr * weight_decay, dtype, 1 + lr * weight_decay), dtype)

    w, way = 1 - beta1, g.value - exp_avg.value
    rounding = gamma(3, dtype) * w * (way.abs() + exp_avg.error) + 2 * TINY[dtype]
    exp_avg = Bounded(exp_avg.value + w * way, beta1 * exp_avg.error + rounding).to(dtype)

    square = product(g.times(1 - beta2, dtype), g, dtype)
    exp_avg_sq = exp_avg_sq.times(beta2, dtype).plus(square, dtype)

    denominator = quotient(root(exp_avg_sq, dtype), factor((1 - beta2**step) ** 0.5, dtype), dtype)
    denominator = denominator.plus(factor(eps, dtype), dtype)
    change = quotient(
        product(exp_avg, factor(lr / (1 - beta1**step), dtype), dtype), denominator, dtype
    )
    return param.plus(Bounded(-change.value, change.error), dtype), exp_avg, exp_avg_sq


def table_error(points: int) -> float:
    """How far from a number in [-1, 1] the one may be whose level it gets from a table of equally spaced points: half a step.

    float32 adds: the decision error, the sum 1 + x, its product with (points - 1) / 2, the point itself: u of at most 2 each.
    """
    return 1 / (points - 1) + decision_error() + 3 * 2 * U


def is_tight(errors: Tensor | float, bounds: Tensor | float, share: float = 0.99) -> bool:
    """Whether the errors keep within their bounds and one of them reaches this share of its own: a bound worth its name."""
    ratio = torch.as_tensor(errors, dtype=torch.float64) / torch.as_tensor(
        bounds, dtype=torch.float64
    )
    return bool(share <= ratio.max() <= 1)
