"""How a frozen base is quantized, in words: for flags, messages and the header of an adapter.

A code is nf2 to nf8, fp4, or none for a dense weight. A codebook without a name is described by a
hash of its levels, which differs for other levels. It can be compared, but nothing can be quantized
with it.
"""

import re
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.weight_state import name_of
from lora import FrozenWeight
from nf4 import FP4, normal_float

CODEBOOKS = {f"nf{bits}": normal_float(bits) for bits in range(2, 9)} | {"fp4": FP4}
DENSE = "none"
CODE_OF_BITS = {0: DENSE, 2: "nf2", 3: "nf3", 4: "nf4"}  # in older files


class Quantization(NamedTuple):
    """How a weight is quantized; of a dense weight only the code has a meaning."""

    code: str
    block_size: int = 64
    double_quant: bool = True

    def __str__(self) -> str:
        if self.code == DENSE:
            return "dense"
        constants = "double quantization" if self.double_quant else "constants in float32"
        return f"{self.code} in blocks of {self.block_size}, {constants}"

    def settings(self) -> dict[str, int | bool | Tensor | None]:
        """Returns the arguments of FrozenWeight. Raises: ValueError if the codebook is unknown."""
        if self.code not in (*CODEBOOKS, DENSE):
            raise ValueError(
                f"a codebook must be known by name, got {self.code}; "
                "attach adapters with that codebook first"
            )
        return {
            "block_size": self.block_size,
            "double_quant": self.double_quant,
            "codebook": CODEBOOKS.get(self.code),
        }


def quantization_of(base: FrozenWeight) -> Quantization:
    """Finds how a weight is quantized."""
    if base.codebook is None:
        return Quantization(DENSE)
    return Quantization(code_of(base.codebook), base.block_size, base.double_quant)


def code_of(codebook: Tensor) -> str:
    """The name of a codebook, or the hash of its levels if it has none."""
    codebook = codebook.cpu()
    names = [name for name, known in CODEBOOKS.items() if torch.equal(codebook, known)]
    return names[0] if names else name_of(codebook)


def parse(entries: dict) -> Quantization:
    """Reads a Quantization from JSON; older files have the bits of a NormalFloat code, not a name.

    Raises: ValueError with the entry that is wrong.
    """
    bits = entries.get("bits", 4)
    code = entries.get("code", CODE_OF_BITS.get(bits) if type(bits) is int else None)
    block_size = entries.get("block_size", 64)
    double_quant = entries.get("double_quant", True)
    is_code = code in [*CODEBOOKS, DENSE] or re.fullmatch(r"\d+ levels [0-9a-f]{16}", str(code))
    is_block_size = type(block_size) is int and block_size in [2**k for k in range(1, 63)]
    if not is_code or not is_block_size or type(double_quant) is not bool:
        raise ValueError(f"no weight is quantized as {str(entries)[:200]}")
    return Quantization(DENSE) if code == DENSE else Quantization(code, block_size, double_quant)
