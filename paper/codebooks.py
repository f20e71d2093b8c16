"""4-bit codes (and 3- and 2-bit ones), each computed from its definition, for nf4.quantize.

The numbers that a code sees are x = w / absmax of a block of B weights. For normal weights their
distribution is known. The block maximum M has the distribution function (2 Phi(m) - 1)^B. One
number of the block is +-1. Given M = m, the others are normal, cut off at +-m and divided by m:

    P(a < x < b | m) = (Phi(bm) - Phi(am)) / (2 Phi(m) - 1)
    E[x; a < x < b | m] = (phi(am) - phi(bm)) / (m (2 Phi(m) - 1))

`BlockDistribution` averages these over m, so errors of a code and optimal codes need no samples. An
optimal code is the fixed point of Lloyd's iteration (1957; Max, 1960): cells end halfway between
levels, and each level moves to the mean of its cell (least squared error) or to its median (least
absolute error). The error of a weight is m times that of x, so squared errors of a block count m^2
times, and absolute ones m times.

If a block is divided by its signed number of largest magnitude instead, this number is always 1,
and never -1. So -1 need not be a level. The sign of absmax, which is otherwise unused, stores it.

Codes, and what they minimize:

    integers    -7 ... 7, divided by 7: Int4                                    uniform
    fp4         the FP4 of bitsandbytes; e2m1: the FP4 of OCP; e3m0: powers of 2
    nf          quantiles of a normal: NF4, NF3, NF2                            QLoRA
    af4         E|x - level| on both sides of zero, with -1, 0 and 1 as levels  arXiv 2306.06965
    bof4        E(w - w')^2, with -1, 0 and 1 as levels                         arXiv 2505.06653
    bof4_s      the same for w / (the signed number of largest magnitude), with 0 and 1 as levels
    optimal     E(w - w')^2 or E|w - w'|, with no level fixed: the least error of any code
"""

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import torch
from scipy.special import ndtr, ndtri
from torch import Tensor, nn

import nf4

NODES = 100  # of the integral over m
Array = np.ndarray


def integers(bits: int) -> Tensor:
    """Symmetric integers, with a zero: one of the codes is not used."""
    largest = 2 ** (bits - 1) - 1
    return torch.arange(-largest, largest + 1, dtype=torch.float32) / largest


def fp4() -> Tensor:
    """The FP4 of bitsandbytes in ascending order, with one zero."""
    return nf4.FP4.unique()


def minifloat(exponent_bits: int, mantissa_bits: int) -> Tensor:
    """A float with a sign, subnormals and no infinities, divided by its largest number.

    >>> [round(6 * level, 3) for level in minifloat(2, 1).tolist()[7:]]
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """
    steps = 2**mantissa_bits
    magnitudes = [mantissa / steps for mantissa in range(steps)]  # subnormal
    for exponent in range(2**exponent_bits - 1):
        magnitudes += [(1 + mantissa / steps) * 2.0**exponent for mantissa in range(steps)]
    positive = torch.tensor(magnitudes) / magnitudes[-1]
    return torch.cat([0 - positive, positive]).unique()  # 0 - 0 is not -0


def e2m1() -> Tensor:
    return minifloat(2, 1)


def e3m0() -> Tensor:
    return minifloat(3, 0)


def nf(bits: int) -> Tensor:
    return nf4.normal_float(bits)


class BlockDistribution:
    """x = w / absmax in blocks of `block_size` standard normal weights, as nodes over the maximum.

    power: how much an error counts, as a power of the maximum m. 0 for errors of x, 1 for absolute
    and 2 for squared errors of weights. signed: x = w / (the number of largest magnitude).
    """

    def __init__(self, block_size: int, power: int, signed: bool = False) -> None:
        points, weights = np.polynomial.legendre.leggauss(NODES)
        probability = (points + 1) / 2
        # (2 Phi(m) - 1)^B = probability; the upper tail keeps the digits that 1 - ... would lose.
        tail = -np.expm1(np.log(probability) / block_size) / 2
        self.m = -ndtri(tail)[:, None]  # (NODES, 1)
        self.inside = 1 - 2 * tail[:, None]  # 2 Phi(m) - 1
        self.scale = self.m**power * (weights / 2)[:, None]
        self.others = (block_size - 1) / block_size
        largest = self.scale.sum() / block_size  # one number of the block is -1 or 1
        self.atoms = (0.0, largest) if signed else (largest / 2, largest / 2)

    def moments(self, edges: Array) -> tuple[Array, Array, Array]:
        """The moments 0, 1 and 2 of x up to each edge in (-1, 1), without the atoms at +-1."""
        z = self.m * edges  # (NODES, edges)
        density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
        at_minus_m = np.exp(-(self.m**2) / 2) / np.sqrt(2 * np.pi)
        mass = (ndtr(z) - ndtr(-self.m)) / self.inside
        first = (at_minus_m - density) / (self.m * self.inside)
        second = mass / self.m**2 - (z * density + self.m * at_minus_m) / (self.m**2 * self.inside)
        return tuple((self.scale * part).sum(0) * self.others for part in (mass, first, second))

    def cells(self, levels: Array) -> tuple[Array, Array, Array]:
        """The moments 0, 1 and 2 of the cell of each level; the outermost cells have the atoms."""
        edges = np.concatenate([[-1], (levels[1:] + levels[:-1]) / 2, [1]])
        mass, first, second = (np.diff(part) for part in self.moments(edges))
        for place, x, atom in zip((0, -1), (-1, 1), self.atoms):
            mass[place] += atom
            first[place] += atom * x
            second[place] += atom
        return mass, first, second

    def squared_error(self, codebook: Tensor) -> float:
        """E m^power (x - level)^2."""
        levels = codebook.double().sort().values.numpy()
        mass, first, second = self.cells(levels)
        return float((second - 2 * levels * first + levels**2 * mass).sum())

    def absolute_error(self, codebook: Tensor) -> float:
        """E m^power |x - level|."""
        levels = codebook.double().sort().values.numpy()
        edges = np.concatenate([[-1], (levels[1:] + levels[:-1]) / 2, [1]])
        mass, first, _ = self.moments(edges)
        mass_at, first_at, _ = self.moments(levels)
        below = levels * (mass_at - mass[:-1]) - (first_at - first[:-1])
        above = (first[1:] - first_at) - levels * (mass[1:] - mass_at)
        at_minus_1, at_1 = self.atoms
        atoms = at_minus_1 * (levels[0] + 1) + at_1 * (1 - levels[-1])
        return float((below + above).sum() + atoms)

    def means(self, levels: Array) -> Array:
        mass, first, _ = self.cells(levels)
        return first / mass

    def medians(self, levels: Array, start: float = -1) -> Array:
        """The median of each cell, by bisection. The first cell begins at `start`."""
        edges = np.concatenate([[start], (levels[1:] + levels[:-1]) / 2, [1]])
        at_minus_1, at_1 = self.atoms
        below = self.moments(edges)[0] + at_minus_1 * (edges > -1)
        below[-1] += at_1
        half = (below[:-1] + below[1:]) / 2
        low, high = edges[:-1], edges[1:]
        for _ in range(30):
            middle = (low + high) / 2
            is_low = self.moments(middle)[0] + at_minus_1 < half
            low, high = np.where(is_low, middle, low), np.where(is_low, high, middle)
        return high


def lloyd(step: Callable[[Array], Array], start: Array, fixed: tuple[float, ...] = ()) -> Array:
    """Iterate from the levels in `start` until none moves. Those that are in `fixed` stay."""
    is_fixed = np.isin(start, fixed)
    levels = start
    for _ in range(2000):
        moved = np.where(is_fixed, start, step(levels))
        if np.abs(moved - levels).max() < 1e-7:
            break
        levels = moved
    return moved


@cache
def af4(block_size: int = 64) -> Tensor:
    """8 levels above and 7 below zero, each side as if zero were its end and no level."""
    step = partial(BlockDistribution(block_size, power=0).medians, start=0)
    positive = lloyd(step, np.linspace(1 / 8, 1, 8), fixed=(1,))
    negative = lloyd(step, np.linspace(1 / 7, 1, 7), fixed=(1,))
    return torch.tensor([*-negative[::-1], 0, *positive], dtype=torch.float32)


@cache
def bof4(block_size: int = 64) -> Tensor:
    step = BlockDistribution(block_size, power=2).means
    levels = lloyd(step, nf(4).double().numpy(), fixed=(-1, 0, 1))
    return torch.tensor(levels, dtype=torch.float32)


@cache
def bof4_s(block_size: int = 64) -> Tensor:
    """For weights whose blocks have been multiplied by `signs`."""
    step = BlockDistribution(block_size, power=2, signed=True).means
    levels = lloyd(step, nf(4).double().numpy(), fixed=(0, 1))
    return torch.tensor(levels, dtype=torch.float32)


def signs(weight: Tensor, block_size: int) -> Tensor:
    """The sign, 1 or -1, of the largest magnitude of each block, in the shape of the weight.

    Times it, the largest number of a block is positive, so absmax is the number itself.
    """
    flat = weight.flatten()
    blocks = nn.functional.pad(flat, (0, -len(flat) % block_size)).view(-1, block_size)
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))  # (n_blocks, 1)
    sign = torch.where(largest < 0, -1.0, 1.0).to(weight.dtype)
    return sign.expand_as(blocks).flatten()[: len(flat)].view_as(weight)


@cache
def optimal(norm: int, block_size: int = 64, bits: int = 4) -> Tensor:
    """The code of least absolute (norm 1) or squared (norm 2) error of normal weights."""
    distribution = BlockDistribution(block_size, power=norm)
    step = distribution.medians if norm == 1 else distribution.means
    return torch.tensor(lloyd(step, nf(bits).double().numpy()), dtype=torch.float32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes < 2**bits -> bytes (ceil(n * bits / 8),), without gaps between the codes.

    >>> pack(torch.tensor([1, 2, 3, 4, 5, 6, 7, 0]), 3).tolist()
    [41, 203, 184]
    """
    places = torch.arange(bits - 1, -1, -1)
    each_bit = (codes.flatten()[:, None] >> places) & 1  # (n, bits)
    return torch.from_numpy(np.packbits(each_bit.to(torch.uint8).numpy()))


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The n codes that `pack` packed."""
    each_bit = torch.from_numpy(np.unpackbits(packed.numpy(), count=n * bits)).reshape(n, bits)
    return (each_bit.int() << torch.arange(bits - 1, -1, -1)).sum(1)
