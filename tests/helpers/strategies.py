"""Every input of the property tests: a recipe is drawn, and the tensor is made from it at once, not number by number.

A failing recipe prints as a line that can be pasted into @example.
"""

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
HALF_AND_SINGLE = DTYPES[:3]
BLOCK_SIZES = [2**k for k in range(1, 13)]
LAYOUTS = ["contiguous", "transposed", "every other", "inner"]
PATTERNS = ["normal", "uniform", "outliers", "constant", "one-hot", "zeros", "zero blocks", "ties"]
PATTERNS += ["largest", "blocks of all sizes"]
TIES = [
    -0.75,
    -0.25,
    0.25,
    0.75,
]  # exact midpoints of the uniform code below: no rounding, so a tie is a tie


def uniform_code() -> Tensor:
    """Five levels whose midpoints are exact: -1, -1/2, 0, 1/2, 1."""
    return torch.linspace(-1, 1, 5)


def bits(tensor: Tensor) -> Tensor:
    """The bit patterns, which tell -0.0 from 0.0 and one NaN from another."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(integers[tensor.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in shape, dtype and every bit."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values in other strides."""
    if values.dim() == 0 or layout == "contiguous":
        return values
    if layout == "transposed":
        reverse = tuple(reversed(range(values.dim())))
        return values.permute(reverse).contiguous().permute(reverse)
    if layout == "every other":
        return torch.zeros(*values.shape[:-1], 2 * values.shape[-1], dtype=values.dtype)[
            ..., ::2
        ].copy_(values)
    return torch.zeros(*values.shape[:-1], values.shape[-1] + 3, dtype=values.dtype)[
        ..., 1:-2
    ].copy_(values)


@dataclass(frozen=True)
class Recipe:
    """A tensor to quantize. Its magnitude is about 2**exponent; per block of 64 it varies with the last pattern."""

    shape: tuple[int, ...] = (6, 50)
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    block_size: int = 64
    pattern: str = "normal"
    exponent: int = 0
    seed: int = 0

    def tensor(self) -> Tensor:
        """Finite in float32, and in the dtype; magnitudes beyond are cut off."""
        values = self._pattern(math.prod(self.shape)) * 2.0**self.exponent
        largest = min(torch.finfo(self.dtype).max, torch.finfo(torch.float32).max)
        return laid_out(
            values.clamp(-largest, largest).to(self.dtype).reshape(self.shape), self.layout
        )

    def _pattern(self, n: int) -> Tensor:
        """n numbers in float64, of magnitudes around 1."""
        make = torch.Generator().manual_seed(self.seed)
        normal = torch.randn(n, generator=make, dtype=torch.float64)
        signs, chance, index = (
            normal.sign(),
            torch.rand(n, generator=make, dtype=torch.float64),
            torch.arange(n),
        )
        ties = torch.tensor(TIES).double()[(4 * chance).long()]
        return {
            "normal": lambda: normal,
            "uniform": lambda: 2 * chance - 1,
            "outliers": lambda: normal * torch.where(chance < 0.02, 1e4, 1.0),
            "constant": lambda: (
                torch.full((n,), 0.7, dtype=torch.float64) * (1 if self.seed % 2 else -1)
            ),
            "one-hot": lambda: (index == self.seed % max(n, 1)).double(),
            "zeros": lambda: torch.zeros(n, dtype=torch.float64),
            "zero blocks": lambda: normal * (index // self.block_size % 2),
            "ties": lambda: torch.where(index % self.block_size == 0, 1.0, ties),
            "largest": lambda: signs * 2.0**1000,  # cut off to the largest finite number
            "blocks of all sizes": lambda: (
                normal * 2.0 ** ((index // 64 * 37 + self.seed) % 250 - 125).double()
            ),
        }[self.pattern]()


sizes = st.integers(0, 9)
shapes = st.one_of(
    st.just(()),
    st.just((0,)),
    st.tuples(st.integers(1, 9000)),
    st.tuples(st.integers(0, 70), st.integers(0, 70)),
    st.tuples(sizes, sizes, sizes),
    st.tuples(sizes, sizes, sizes, sizes),
)
exponents = st.one_of(st.just(0), st.integers(-152, 128))
seeds = st.integers(0, 2**31)
recipes = st.builds(
    Recipe,
    shapes,
    st.sampled_from(DTYPES),
    st.sampled_from(LAYOUTS),
    st.sampled_from(BLOCK_SIZES),
    st.sampled_from(PATTERNS),
    exponents,
    seeds,
)


def ascending(levels: int, seed: int) -> Tensor:
    """A code of so many different levels between -1 and 1, from the lowest to the highest."""
    steps = torch.rand(levels + 1, generator=torch.Generator().manual_seed(seed)) + 0.01
    return (steps.cumsum(0) / steps.sum())[:-1] * 2 - 1


codes_of_2_to_16_levels = st.builds(ascending, st.integers(2, 16), seeds)
codes_of_17_to_256_levels = st.builds(ascending, st.integers(17, 256), seeds)


@dataclass(frozen=True)
class Cut:
    """Windows of a tensor in 4 bits: `rows` runs of `cols` elements each, `stride` apart, the first from element `start` on."""

    recipe: Recipe = Recipe((70, 33), block_size=64)
    double_quant: bool = True
    start: int = 0
    stride: int = 33
    rows: int = 70
    cols: int = 33

    def index(self) -> Tensor:
        """The places of all elements of the window (rows * cols,) in the flattened tensor."""
        return (
            self.start + torch.arange(self.rows)[:, None] * self.stride + torch.arange(self.cols)
        ).flatten()


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    """Any window that lies inside a tensor that is not empty, odd ones and overlapping rows included."""
    recipe = draw(recipes.filter(lambda recipe: math.prod(recipe.shape) > 0))
    n = math.prod(recipe.shape)
    start = draw(st.integers(0, n - 1))
    cols = draw(st.one_of(st.integers(0, min(n - start, 100)), st.just(n - start)))
    stride = draw(st.one_of(st.integers(0, 100), st.integers(0, n)))
    most = (n - start - cols) // stride + 1 if stride else 40
    rows = draw(st.integers(0, min(most, 40, 1 + 2 * n // max(cols, 1))))
    return Cut(recipe, draw(st.booleans()), start, stride, rows, cols)


# What bitsandbytes can do at all: at least one element, float32 or less, and 1/absmax in float32's normal range (REFERENCE 7).
# Rows of whole blocks, or of a number of elements that 16 does not divide, keep clear of its wrong AVX-512 path (REFERENCE 1).
safe_shapes = st.one_of(
    st.tuples(st.integers(1, 5), st.sampled_from([8, 10, 24, 40, 56, 72, 130, 1000])),
    st.tuples(st.integers(1, 70), st.integers(0, 40).map(lambda k: 2 * k + 1)),
    st.tuples(st.integers(1, 3), st.sampled_from([4096, 8192])),
)
peer_recipes = st.builds(
    Recipe,
    safe_shapes,
    st.sampled_from(HALF_AND_SINGLE),
    st.just("contiguous"),
    st.sampled_from(BLOCK_SIZES[5:]),
    st.sampled_from(["normal", "uniform", "outliers", "constant", "one-hot"]),
    st.integers(-14, 10),
    seeds,
)


@dataclass(frozen=True)
class Constants:
    """Quantization constants: float32, never negative. `pattern` says how they differ, 2**exponent how large they are."""

    shape: tuple[int, ...] = (300,)
    pattern: str = "weights"
    exponent: int = 0
    seed: int = 0

    def tensor(self) -> Tensor:
        make = torch.Generator().manual_seed(self.seed)
        chance = torch.rand(self.shape, generator=make, dtype=torch.float64)
        values = {
            "weights": 2 + chance,  # the maxima of blocks of normal numbers are all of one size
            "zeros": torch.zeros_like(chance),
            "some zeros": torch.where(chance < 0.3, 0.0, 1 + chance),
            "equal": torch.full_like(chance, 0.7),
            "all sizes": 2.0 ** (250 * chance - 125),
            "largest": torch.full_like(chance, 2.0**1000),
        }[self.pattern] * 2.0**self.exponent
        return values.clamp(max=torch.finfo(torch.float32).max).to(torch.float32)


constants = st.builds(
    Constants,
    st.one_of(
        st.just(()),
        st.tuples(st.integers(0, 1500)),
        st.tuples(st.integers(0, 30), st.integers(0, 30)),
    ),
    st.sampled_from(["weights", "zeros", "some zeros", "equal", "all sizes", "largest"]),
    exponents,
    seeds,
)


@dataclass(frozen=True)
class Adapted:
    """A linear layer to adapt, with inputs for it. The adapter is random, not zero, so that every product counts."""

    in_features: int = 12
    out_features: int = 10
    r: int = 3
    lora_alpha: float = 7.0
    leading: tuple[int, ...] = (5,)
    bias: bool = True
    lora_dropout: float = 0.0
    double_quant: bool = True
    seed: int = 0

    def random(self, *shape: int, offset: int = 0) -> Tensor:
        return torch.randn(
            shape, generator=torch.Generator().manual_seed(self.seed + offset), dtype=torch.float64
        )

    def linear(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias, dtype=dtype)
        with torch.no_grad():
            layer.weight.copy_(self.random(self.out_features, self.in_features, offset=1) * 0.1)
            if layer.bias is not None:
                layer.bias.copy_(self.random(self.out_features, offset=2))
        return layer

    def settings(self) -> dict[str, float | bool | int]:
        names = "r", "lora_alpha", "lora_dropout", "double_quant"
        return {name: getattr(self, name) for name in names}

    def trained(self, layer: nn.Module) -> nn.Module:
        """The layer with an adapter as training might leave it, the same each time."""
        with torch.no_grad():
            layer.lora_A.copy_(self.random(self.r, self.in_features, offset=6) * 0.2)
            layer.lora_B.copy_(self.random(self.out_features, self.r, offset=3) * 0.1)
        return layer

    def x(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.random(*self.leading, self.in_features, offset=4).to(dtype)

    def g(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.random(*self.leading, self.out_features, offset=5).to(dtype)


adapted = st.builds(
    Adapted,
    st.integers(4, 80),
    st.integers(4, 40),
    st.integers(1, 4),
    st.sampled_from([0.5, 7.0, 16.0]),
    st.one_of(
        st.just(()),
        st.just((0,)),
        st.tuples(st.integers(1, 9)),
        st.lists(sizes, min_size=2, max_size=3).map(tuple),
    ),
    st.booleans(),
    st.sampled_from([0.0, 0.0, 0.3, 0.9]),
    st.booleans(),
    st.integers(0, 2**20),
)


class Tower(nn.Module):
    """A small language model as Hugging Face shapes them: embedding, blocks, head; one layer is used twice."""

    def __init__(self, width: int = 16, vocabulary: int = 11, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        up = [nn.Linear(width, 2 * width) for _ in range(2)]
        down = [nn.Linear(2 * width, width, bias=bias) for bias in (True, True, False)]
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": up[i % 2], "down": down[i]}) for i in range(3)
        )
        self.norm, self.lm_head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block["down"](torch.tanh(block["up"](x)))
        return self.lm_head(self.norm(x))


class TowerWithHead(Tower):
    """One that says which layer its head is."""

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head
