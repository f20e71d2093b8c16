"""Every input of the property tests.

Hypothesis draws a recipe, and the recipe makes the whole tensor, which is faster than drawing each
number. A failing recipe prints as a line that can be pasted into @example.
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
TIES = [-0.75, -0.25, 0.25, 0.75]  # the midpoints of uniform_code, exact in every dtype


def uniform_code() -> Tensor:
    """Five levels whose midpoints are exact: -1, -1/2, 0, 1/2, 1."""
    return torch.linspace(-1, 1, 5)


def bits(tensor: Tensor) -> Tensor:
    """The bit patterns: they distinguish -0.0 from 0.0, and one NaN from another."""
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
    *rows, columns = values.shape
    if layout == "every other":
        wide = torch.zeros(*rows, 2 * columns, dtype=values.dtype)
        return wide[..., ::2].copy_(values)
    padded = torch.zeros(*rows, columns + 3, dtype=values.dtype)  # "inner"
    return padded[..., 1:-2].copy_(values)


@dataclass(frozen=True)
class Recipe:
    """A tensor to quantize, of magnitudes around 2**exponent.

    With the pattern "blocks of all sizes", each block of 64 has a magnitude of its own.
    """

    shape: tuple[int, ...] = (6, 50)
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    block_size: int = 64
    pattern: str = "normal"
    exponent: int = 0
    seed: int = 0

    def tensor(self) -> Tensor:
        """The tensor, clamped to the numbers that are finite in its dtype and in float32."""
        values = self._pattern(math.prod(self.shape)) * 2.0**self.exponent
        largest = min(torch.finfo(self.dtype).max, torch.finfo(torch.float32).max)
        values = values.clamp(-largest, largest).to(self.dtype)
        return laid_out(values.reshape(self.shape), self.layout)

    def _pattern(self, n: int) -> Tensor:
        """n numbers in float64, of magnitudes around 1."""
        make = torch.Generator().manual_seed(self.seed)
        normal = torch.randn(n, generator=make, dtype=torch.float64)
        chance = torch.rand(n, generator=make, dtype=torch.float64)
        index = torch.arange(n)
        match self.pattern:
            case "normal":
                return normal
            case "uniform":
                return 2 * chance - 1
            case "outliers":
                return normal * torch.where(chance < 0.02, 1e4, 1.0)
            case "constant":
                return torch.full_like(normal, 0.7 if self.seed % 2 else -0.7)
            case "one-hot":
                return (index == self.seed % max(n, 1)).double()
            case "zeros":
                return torch.zeros_like(normal)
            case "zero blocks":
                return normal * (index // self.block_size % 2)
            case "ties":
                ties = torch.tensor(TIES).double()[(4 * chance).long()]
                return torch.where(index % self.block_size == 0, 1.0, ties)
            case "largest":
                return normal.sign() * 2.0**1000  # tensor() clamps it to the largest finite number
            case "blocks of all sizes":
                exponents = (index // 64 * 37 + self.seed) % 250 - 125
                return normal * 2.0 ** exponents.double()


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
    """A codebook of so many different levels between -1 and 1, in ascending order."""
    steps = torch.rand(levels + 1, generator=torch.Generator().manual_seed(seed)) + 0.01
    return (steps.cumsum(0) / steps.sum())[:-1] * 2 - 1


codes_of_2_to_16_levels = st.builds(ascending, st.integers(2, 16), seeds)
codes_of_17_to_256_levels = st.builds(ascending, st.integers(17, 256), seeds)


@dataclass(frozen=True)
class Cut:
    """A window of a tensor in 4 bits: `rows` runs of `cols` elements each, `stride` apart.

    The first run starts at element `start`.
    """

    recipe: Recipe = Recipe((70, 33), block_size=64)
    double_quant: bool = True
    start: int = 0
    stride: int = 33
    rows: int = 70
    cols: int = 33

    def index(self) -> Tensor:
        """The index of each element of the window in the flattened tensor: (rows * cols,)."""
        starts = self.start + torch.arange(self.rows) * self.stride
        return (starts[:, None] + torch.arange(self.cols)).flatten()


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    """Any window inside a tensor with elements; rows may overlap, and sizes may be odd."""
    recipe = draw(recipes.filter(lambda recipe: math.prod(recipe.shape) > 0))
    n = math.prod(recipe.shape)
    start = draw(st.integers(0, n - 1))
    cols = draw(st.one_of(st.integers(0, min(n - start, 100)), st.just(n - start)))
    stride = draw(st.one_of(st.integers(0, 100), st.integers(0, n)))
    most = (n - start - cols) // stride + 1 if stride else 40
    rows = draw(st.integers(0, min(most, 40, 1 + 2 * n // max(cols, 1))))
    return Cut(recipe, draw(st.booleans()), start, stride, rows, cols)


# What bitsandbytes supports: at least one element, float32 or less, and 1/absmax in float32's
# normal range. Rows of whole blocks, or of a number of elements that 16 does not divide, avoid its
# wrong AVX-512 path.
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
    """Quantization constants: float32, never negative, of magnitudes around 2**exponent."""

    shape: tuple[int, ...] = (300,)
    pattern: str = "weights"
    exponent: int = 0
    seed: int = 0

    def tensor(self) -> Tensor:
        make = torch.Generator().manual_seed(self.seed)
        chance = torch.rand(self.shape, generator=make, dtype=torch.float64)
        values = {
            "weights": 2 + chance,  # the absmax of blocks of normal numbers vary little
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
    """A linear layer to adapt, its adapter and its inputs.

    The adapter is random, not zero, so that a test notices an error in any product.
    """

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
        make = torch.Generator().manual_seed(self.seed + offset)
        return torch.randn(shape, generator=make, dtype=torch.float64)

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
        """The layer with an adapter as training might leave it; always the same."""
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
    """A small language model with the structure of Hugging Face's: embedding, blocks, head.

    One linear layer is used twice.
    """

    def __init__(self, width: int = 16, vocabulary: int = 11, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        up = [nn.Linear(width, 2 * width) for _ in range(2)]
        down = [nn.Linear(2 * width, width, bias=bias) for bias in (True, True, False)]
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": up[i % 2], "down": down[i]}) for i in range(3)
        )
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block["down"](torch.tanh(block["up"](x)))
        return self.lm_head(self.norm(x))


class TowerWithHead(Tower):
    """A Tower with get_output_embeddings, which returns its head."""

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head
