"""The method again, one number at a time: the oracle that the tests compare the torch code with.

It is written only to be plainly right. Numbers are Python floats, vectors are lists, matrices are
lists of rows, and every loop is written out. It imports only the standard library, so it shares no
code, and no bug, with the code under test.

Python computes in float64. Where the format says float32, each single operation is done in float64
and then rounded by `float32`. The result is that of float32 hardware: 53 bits are at least
2 * 24 + 2, so +, -, *, / and square root rounded twice equal the same operation rounded once
(Figueroa, When is double rounding innocuous?, 1995).

Two results depend on torch or on the CPU, so they are arguments. `offset`: torch does not specify
the order in which it adds up the mean of the constants, so the last bits of the mean vary. `fused`:
whether the CPU multiplies and adds with one rounding, as torch.linspace does where it can.
"""

import math
import struct
from statistics import NormalDist

Vector = list[float]
Matrix = list[list[float]]


# rounding


def float32(x: float) -> float:
    """The float32 nearest to x; infinite where x is too large."""
    try:
        return struct.unpack("<f", struct.pack("<f", x))[0]
    except OverflowError:
        return math.copysign(math.inf, x)


def float16(x: float) -> float:
    """The float16 nearest to a float32 x."""
    try:
        return struct.unpack("<e", struct.pack("<e", x))[0]
    except OverflowError:
        return math.copysign(math.inf, x)


def bfloat16(x: float) -> float:
    """The bfloat16 nearest to a float32 x: the upper 16 bits, rounded; a tie goes to even."""
    word = bits_of(x)
    upper = word >> 16
    lower = word & 0xFFFF
    if lower > 0x8000 or (lower == 0x8000 and upper % 2 == 1):
        upper += 1
    return from_bits(upper << 16)


ROUND = {"float64": float, "float32": float32, "float16": float16, "bfloat16": bfloat16}


def bits_of(x: float) -> int:
    """The 32 bits of a float32, as an integer.

    >>> hex(bits_of(1.0))
    '0x3f800000'
    """
    return struct.unpack("<I", struct.pack("<f", x))[0]


def from_bits(word: int) -> float:
    return struct.unpack("<f", struct.pack("<I", word))[0]


# levels


NF4_BITS = """
    BF800000 BF3239B1 BF066B30 BECA32A0 BE91A24D BE3D353F BDBA7871 00000000
    3DA2FAFF 3E24CAE3 3E7C04DD 3EAD033A 3EE1A4B8 3F1007AB 3F3913B3 3F800000
""".split()
NF4 = [from_bits(int(word, 16)) for word in NF4_BITS]

# By code, in twelfths. Code 8 is minus zero; its level in the table of bitsandbytes is 0.
FP4 = [
    float32(twelfths / 12)
    for twelfths in (0, 1 / 16, 8, 12, 4, 6, 2, 3, 0, -1 / 16, -8, -12, -4, -6, -2, -3)
]


def linspace(start: float, end: float, count: int, fused: bool) -> Vector:
    """torch.linspace in float32: steps are counted from the nearer end, so both ends are exact."""
    start, end = float32(start), float32(end)
    step = float32(float32(end - start) / (count - 1))
    points = []
    for i in range(count):
        from_start = i < count // 2
        distance = step * (i if from_start else count - 1 - i)
        if not fused:
            distance = float32(distance)
        points.append(float32(start + distance) if from_start else float32(end - distance))
    return points


def normal_float(bits: int, fused: bool) -> Vector:
    """The levels of NF4 (4 bits), or of a normal float of another size, from normal quantiles."""
    size = 2**bits
    half = 2 ** (bits - 1)
    quantile = NormalDist().inv_cdf
    outermost = round(1 - (1 / (2 * size) + 1 / (2 * (size - 1))) / 2, 7)
    levels = [0.0]
    for probability in linspace(outermost, 0.5, half + 1, fused)[:-1]:
        levels.append(float32(quantile(probability)))
    for probability in linspace(outermost, 0.5, half, fused)[:-1]:
        levels.append(-float32(quantile(probability)))
    largest = max(levels)
    return sorted(float32(level / largest) for level in levels)


def dynamic_code(fused: bool) -> Vector:
    """The 256 levels of double quantization: 0, 1 and seven decades.

    Each decade has twice as many levels as the one below.
    """
    levels = [0.0, 1.0]
    for i in range(7):
        edges = linspace(0.1, 1, 2**i + 1, fused)
        for low, high in zip(edges[:-1], edges[1:]):
            level = float32(float32(float32(low + high) / 2) * float32(10.0 ** (i - 6)))
            levels += [level, -level]
    return sorted(levels)


# blockwise quantization


def nearest(x: float, codebook: Vector) -> int:
    """The code of the level nearest to x.

    A tie takes the lower level: x equals the midpoint as float32 computes it. A level that occurs
    twice has its first code.

    >>> nearest(0.25, [-1.0, 0.0, 0.5, 1.0]), nearest(0.26, [-1.0, 0.0, 0.5, 1.0])
    (1, 2)
    >>> nearest(0.0, [1.0, 0.0, -1.0, 0.0])
    1
    """
    levels = sorted(set(codebook))
    place = 0
    while place + 1 < len(levels) and x > float32(float32(levels[place] + levels[place + 1]) / 2):
        place += 1
    return codebook.index(levels[place])


def normalise(block: Vector) -> tuple[Vector, float]:
    """The numbers of a float32 block times 1/absmax, and absmax, the largest magnitude.

    If absmax is below 2^-64 or above 2^64, the block is first scaled by a power of two, so that the
    reciprocal keeps all its bits.
    """
    absmax = max(abs(x) for x in block)
    if absmax == 0:
        return [0.0 for _ in block], 0.0
    shift = 1.0
    if absmax < 2.0**-64:
        shift = 2.0**64
    if absmax > 2.0**64:
        shift = 2.0**-64
    reciprocal = float32(1 / float32(absmax * shift))
    return [float32(float32(x * shift) * reciprocal) for x in block], absmax


def quantize(weight: Vector, block_size: int, codebook: Vector) -> tuple[list[int], Vector]:
    """The packed bytes of a flattened weight, and the absmax of each block.

    >>> quantize([2.0, 0.0, -1.4], 2, NF4)
    ([247, 7], [2.0, 1.399999976158142])
    """
    weight = [float32(x) for x in weight]
    codes, constants = [], []
    for start in range(0, len(weight), block_size):
        normalised, absmax = normalise(weight[start : start + block_size])
        constants.append(absmax)
        for x in normalised:
            codes.append(nearest(x, codebook))
    return pack(codes, codebook), constants


def pack(codes: list[int], codebook: Vector) -> list[int]:
    """Two codes a byte, the first in the high half; one code a byte for more than 16 levels.

    The code of 0 fills the last byte of an odd number of codes.
    """
    if len(codebook) > 16:
        return codes
    if len(codes) % 2 == 1:
        codes = [*codes, nearest(0.0, codebook)]
    return [16 * codes[i] + codes[i + 1] for i in range(0, len(codes), 2)]


def unpack(packed: list[int], n: int, codebook: Vector) -> list[int]:
    if len(codebook) > 16:
        return packed
    codes = []
    for byte in packed:
        codes += [byte // 16, byte % 16]
    return codes[:n]


def dequantize(
    packed: list[int], absmax: Vector, codebook: Vector, n: int, block_size: int, dtype: str
) -> Vector:
    """The n numbers that the codes stand for: level * absmax, rounded to float32 and then to dtype.

    >>> dequantize([247, 7], [2.0, 1.0], NF4, 3, 2, "float32")
    [2.0, 0.0, -1.0]
    """
    weight = []
    for i, code in enumerate(unpack(packed, n, codebook)):
        weight.append(ROUND[dtype](float32(codebook[code] * absmax[i // block_size])))
    return weight


# double quantization


def mean(numbers: Vector) -> float:
    """The mean; the sum is rounded once, and the quotient once."""
    return math.fsum(numbers) / len(numbers) if numbers else 0.0


def double_quantize(
    constants: Vector, offset: float, block_size: int, codebook: Vector
) -> tuple[list[int], Vector]:
    """The 8-bit codes of the constants minus `offset`, and the nested absmax of each block."""
    centred = [float32(constant - offset) for constant in constants]
    return quantize(centred, block_size, codebook)


def double_dequantize(
    codes: list[int], nested_absmax: Vector, offset: float, block_size: int, codebook: Vector
) -> Vector:
    """level * nested_absmax + offset, each operation in float32, clamped to [0, largest]."""
    largest = from_bits(0x7F7FFFFF)
    constants = []
    for centred in dequantize(codes, nested_absmax, codebook, len(codes), block_size, "float32"):
        constants.append(min(max(float32(centred + offset), 0.0), largest))
    return constants


# low-rank adapters


def dot(a: Vector, b: Vector) -> float:
    total = 0.0
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


def column(matrix: Matrix, j: int) -> Vector:
    return [row[j] for row in matrix]


def dropout(x: Matrix, keep: Matrix) -> Matrix:
    """x where keep is 1, and 0 where it is 0. The 1 / (1 - p) of dropout is part of `scaling`."""
    return [[x[t][k] * keep[t][k] for k in range(len(x[t]))] for t in range(len(x))]


def lora_forward(
    x: Matrix,
    weight: Matrix,
    lora_A: Matrix,
    lora_B: Matrix,
    bias: Vector,
    scaling: float,
    keep: Matrix,
) -> Matrix:
    """y = x W^T + b + s h B^T with h = (keep x) A^T.

    Shapes: x and keep (tokens, in), W (out, in), A (r, in), B (out, r), y (tokens, out).
    """
    dropped = dropout(x, keep)
    y = []
    for t in range(len(x)):
        h = [dot(dropped[t], row) for row in lora_A]
        row = []
        for i in range(len(weight)):
            row.append(dot(x[t], weight[i]) + bias[i] + scaling * dot(h, lora_B[i]))
        y.append(row)
    return y


def lora_backward(
    g: Matrix,
    x: Matrix,
    weight: Matrix,
    lora_A: Matrix,
    lora_B: Matrix,
    scaling: float,
    keep: Matrix,
) -> tuple[Matrix, Matrix, Matrix, Vector]:
    """dL/dx, dL/dA, dL/dB and dL/db of lora_forward, for g = dL/dy (tokens, out)."""
    tokens = range(len(x))
    inputs = range(len(weight[0]))
    outputs = range(len(weight))
    ranks = range(len(lora_A))
    dropped = dropout(x, keep)
    h = [[dot(dropped[t], lora_A[j]) for j in ranks] for t in tokens]
    dh = [[scaling * dot(g[t], column(lora_B, j)) for j in ranks] for t in tokens]
    dx = [
        [dot(g[t], column(weight, k)) + keep[t][k] * dot(dh[t], column(lora_A, k)) for k in inputs]
        for t in tokens
    ]
    dA = [[dot(column(dh, j), column(dropped, k)) for k in inputs] for j in ranks]
    dB = [[scaling * dot(column(g, i), column(h, j)) for j in ranks] for i in outputs]
    db = [sum(column(g, i)) for i in outputs]
    return dx, dA, dB, db


# AdamW


def adamw(
    param: Vector,
    grad: Vector,
    exp_avg: Vector,
    exp_avg_sq: Vector,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> tuple[Vector, Vector, Vector]:
    """Step number `step` (the first is 1) in float64. Returns the parameters and their two moments.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019, algorithm 2, with
    the decay multiplied by the learning rate as in torch.optim.AdamW.
    """
    new_param = []
    new_exp_avg = []
    new_exp_avg_sq = []
    for p, g, m, v in zip(param, grad, exp_avg, exp_avg_sq):
        p = p - lr * weight_decay * p
        m = m + (1 - beta1) * (g - m)
        v = beta2 * v + (1 - beta2) * g * g
        p = p - lr / (1 - beta1**step) * m / (math.sqrt(v) / math.sqrt(1 - beta2**step) + eps)
        new_param.append(p)
        new_exp_avg.append(m)
        new_exp_avg_sq.append(v)
    return new_param, new_exp_avg, new_exp_avg_sq
