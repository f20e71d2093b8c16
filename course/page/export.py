"""The tables and numbers that the widgets use, computed by the code of the project.

Each function returns the table of one widget as JSON holds it: dicts, lists, numbers and strings.
"""

import random
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

import double_quant
import nf4
from memory.__main__ import CARDS
from memory.formula import OUTSIDE_TORCH, ROWS, SHAPES, Shape
from paged_optim import PagedAdamW
from paper.codebooks import BlockDistribution, integers

Json = dict[str, "Json"] | list["Json"] | str | float | int | bool

WEIGHTS = 1024  # of the sample: what one warp decodes
BITS = range(2, 9)
BLOCK_SIZES = [2**i for i in range(5, 13)]
POINTS = 80  # of the drawn density
MIB = 2**20

# The moments of these parameters have this many MiB. Pages of 2 MiB cut them.
PARAMETERS = {"q.lora_A": 4, "q.lora_B": 3, "up.lora_A": 5, "up.lora_B": 2}

# Shapes of models besides those of the paper, from their published configs.
OTHER_MODELS = {
    "SmolLM2-135M": Shape(30, 576, 1536, 9, 3, 64, 49152, tied=True),
    "TinyLlama-1.1B": Shape(22, 2048, 5632, 32, 4, 64, 32000),
    "Mistral-7B": Shape(32, 4096, 14336, 32, 8, 128, 32000),
    "Llama-3.1-8B": Shape(32, 4096, 14336, 32, 8, 128, 128256),
    "Llama-3.1-70B": Shape(80, 8192, 28672, 64, 8, 128, 128256),
}
MAPS = ["q", "k", "v", "o", "gate", "up", "down"]  # in the order of Shape.maps


def shortest(tensor: Tensor) -> list[float]:
    """Numbers with the fewest digits that still give the same float32.

    >>> torch.tensor([0.1]).tolist(), shortest(torch.tensor([0.1]))
    ([0.10000000149011612], [0.1])
    """
    return [float(str(number)) for number in tensor.flatten().numpy()]


def sample() -> list[float]:
    """Normal weights of standard deviation 1, to three decimals."""
    draw = random.Random(0)
    return [round(draw.gauss(0, 1), 3) for _ in range(WEIGHTS)]


def bins() -> dict[str, Json]:
    """Weights, and the levels of two 4-bit codes."""
    return {
        "weights": sample(),
        "codes": {"NF4": shortest(nf4.NF4), "Int4": shortest(integers(4))},
    }


def code() -> dict[str, Json]:
    """For each number of bits the levels, and for each block size the error on normal weights."""
    codes = {"nf": nf4.normal_float, "int": integers}
    return {
        "levels": {
            name: {bits: shortest(make(bits)) for bits in BITS} for name, make in codes.items()
        },
        "errors": {
            name: {
                bits: {size: root_mean_squared_error(make(bits), size) for size in BLOCK_SIZES}
                for bits in BITS
            }
            for name, make in codes.items()
        },
        "density": {size: density(size) for size in BLOCK_SIZES},
        "block sizes": BLOCK_SIZES,
    }


def root_mean_squared_error(codebook: Tensor, block_size: int) -> float:
    """The error of a normal weight, as a fraction of the weights' standard deviation."""
    return round(BlockDistribution(block_size, power=2).squared_error(codebook) ** 0.5, 6)


def density(block_size: int) -> list[float]:
    """The density of w / absmax in equal steps from -1 to 1, without the weights at -1 and 1."""
    edges = np.linspace(-1, 1, POINTS + 1)
    mass, _, _ = BlockDistribution(block_size, power=0).moments(edges)
    return [round(share, 4) for share in (np.diff(mass) * POINTS / 2).tolist()]


def pager() -> dict[str, Json]:
    """Parameters, and the bytes of the pages that PagedAdamW cuts their moments into."""
    elements = {name: size * MIB // 8 for name, size in PARAMETERS.items()}  # two float32 moments
    parameters = {name: nn.Parameter(torch.empty(n)) for name, n in elements.items()}
    optimizer = PagedAdamW(parameters.values(), page_bytes=2 * MIB)
    return {
        name: [page.nbytes for page in optimizer.pages[parameter]]
        for name, parameter in parameters.items()
    }


def memory() -> dict[str, Json]:
    """The shapes of models, the sizes of cards in GiB, and the constants of memory/formula.py."""
    shapes = SHAPES | OTHER_MODELS
    return {
        "shapes": {name: shape._asdict() for name, shape in shapes.items()},
        "cards": CARDS,
        "rows": ROWS,
        "outside": OUTSIDE_TORCH,
    }


def warp() -> dict[str, Json]:
    """What one warp reads of a weight in NF4 with double quantization."""
    q = nf4.quantize(torch.tensor(sample()))
    constants = double_quant.quantize(q.absmax)
    return {
        "packed": q.packed.flatten().tolist(),
        "levels": shortest(q.codebook),
        "block size": q.block_size,
        "codes": constants.codes.tolist(),
        "levels8": shortest(constants.codebook),
        "nested absmax": shortest(constants.absmax),
        "offset": shortest(constants.offset),
    }


def adapters() -> dict[str, Json]:
    """For each model its number of layers and of parameters, and (out, in) of each map."""
    shapes = SHAPES | OTHER_MODELS
    return {
        name: {
            "layers": shape.layers,
            "parameters": shape.parameters(),
            "maps": dict(zip(MAPS, shape.maps())),
        }
        for name, shape in shapes.items()
    }


# By the name of the widget
TABLES: dict[str, Callable[[], dict[str, Json]]] = {
    "bins": bins,
    "code": code,
    "pager": pager,
    "memory": memory,
    "warp": warp,
    "adapters": adapters,
}
