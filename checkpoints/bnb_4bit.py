"""Packs one 4-bit weight into tensors in the format of bitsandbytes, and unpacks it.

transformers reads and writes this format. A weight `name` of n elements in blocks of 64 consists of
these tensors; the nested ones exist with double quantization only:

    name                      uint8 (ceil(n/2), 1)       two codes a byte, first in the high nibble
    name.absmax               uint8 (ceil(n/64),)        float32 without double quantization
    name.quant_map            float32 (16,)              the codebook, always that of quant_type
    name.nested_absmax        float32 (ceil(n/64/256),)
    name.nested_quant_map     float32 (256,)             the codebook of absmax
    name.quant_state.bitsandbytes__nf4                   uint8, a JSON object:
        quant_type, blocksize, dtype, shape, nested_blocksize, nested_dtype, nested_offset

The packed bytes may be stored as another dtype, bnb_4bit_quant_storage: FSDP prefers parameters
that all have one dtype.
"""

import json
import math
import re

import torch
from torch import Tensor

import nf4
from checkpoints import io
from checkpoints.quantization import CODEBOOKS, Quantization, code_of
from double_quant import DoubleQuantized
from lora import FrozenWeight

CODES = {code: CODEBOOKS[code] for code in ("nf4", "fp4")}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STORAGES = DTYPES | {"float64": torch.float64, "int8": torch.int8, "uint8": torch.uint8}
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # that bitsandbytes can read
STATE = ".quant_state.bitsandbytes__"
LARGEST_STATE = 2**12  # bytes; a usual state has about 200
# The quantization_config that transformers writes, but for the entries that depend on the layers.
CONFIG = {
    "_load_in_4bit": True,
    "_load_in_8bit": False,
    "bnb_4bit_quant_storage": "uint8",
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_skip_modules": None,
    "llm_int8_threshold": 6.0,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "quant_method": "bitsandbytes",
}


def quant_type(codebook: Tensor | None) -> str | None:
    """Names a codebook as bitsandbytes does; None if bitsandbytes does not have it."""
    code = None if codebook is None else code_of(codebook)
    return code if code in CODES else None


def pack(base: FrozenWeight, name: str, storage: torch.dtype = torch.uint8) -> dict[str, Tensor]:
    """Returns the tensors of one weight, with its packed bytes viewed as `storage`.

    Raises: ValueError for a code, block size or dtype that the format does not have.
    """
    kind = quant_type(base.codebook)
    if kind is None or base.block_size not in BLOCK_SIZES or base.dtype not in DTYPES.values():
        got = "dense"
        if base.codebook is not None:
            levels = base.codebook.numel()
            got = f"{levels} levels, blocks of {base.block_size}, {base.dtype}"
        raise ValueError(
            f"{name} cannot be saved in bitsandbytes' format: it is {got}; the format has nf4 and "
            f"fp4 in blocks of {', '.join(map(str, BLOCK_SIZES))} and dtypes of 16 or 32 bits"
        )
    q, constants = base.packed_state()
    state = {
        "quant_type": kind,
        "blocksize": q.block_size,
        "dtype": str(q.dtype).removeprefix("torch."),
        "shape": [*q.shape],
    }
    tensors = {
        name: q.packed.flatten().view(storage)[:, None],
        f"{name}.absmax": base.absmax,
        f"{name}.quant_map": q.codebook.clone(),
    }
    if constants is not None:
        state["nested_blocksize"] = constants.block_size
        state["nested_dtype"] = "float32"
        state["nested_offset"] = constants.offset.item()
        tensors[f"{name}.nested_absmax"] = constants.absmax
        tensors[f"{name}.nested_quant_map"] = constants.codebook.clone()
    text = bytearray(json.dumps(state).encode())
    tensors[name + STATE + kind] = torch.frombuffer(text, dtype=torch.uint8)
    return tensors


def packed_names(tensors: dict[str, Tensor]) -> list[str]:
    """Names the 4-bit weights among the tensors of a checkpoint."""
    return sorted(name.partition(STATE)[0] for name in tensors if STATE in name)


def split_name(name: str) -> tuple[str, str]:
    """Splits the name of a tensor into that of its weight, and what this format adds to it."""
    added = re.search(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)$", name)
    return (name[: added.start()], added[0]) if added else (name, "")


def unpack(tensors: dict[str, Tensor], name: str, shape: torch.Size) -> FrozenWeight:
    """Removes the tensors of one weight of this shape from `tensors` and assembles them.

    Raises: ValueError naming the tensor that does not fit.
    """
    state_name = next(key for key in tensors if key.startswith(name + STATE))
    state = _read_state(tensors.pop(state_name), state_name, shape)
    packed = _take_packed(tensors, name, shape)

    codebook = CODES[state["quant_type"]]
    if not torch.equal(_take(tensors, f"{name}.quant_map", torch.float32, 16), codebook):
        raise ValueError(
            f"{name}.quant_map is not {state['quant_type']}, which bitsandbytes would use instead"
        )

    n_blocks = math.ceil(math.prod(shape) / state["blocksize"])
    if "nested_offset" in state:
        absmax = _take(tensors, f"{name}.absmax", torch.uint8, n_blocks)
        constants = _take_constants(tensors, name, absmax, state)
    else:
        absmax = _take(tensors, f"{name}.absmax", torch.float32, n_blocks)
        constants = None
    dtype = DTYPES[state["dtype"]]
    q = nf4.Quantized(packed, absmax, codebook, shape, dtype, state["blocksize"])
    return FrozenWeight.from_quantized(q, constants)


def _take_packed(tensors: dict[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    """Removes and checks the packed bytes of a weight: uint8 (ceil(n/2), 1)."""
    packed = tensors.pop(name, torch.empty(0))
    if packed.dtype not in STORAGES.values():
        raise ValueError(f"{name} must be one of {', '.join(STORAGES)}, and is {packed.dtype}")
    packed = packed.contiguous().flatten().view(torch.uint8)
    nbytes = math.ceil(math.prod(shape) / 2)
    if packed.numel() != nbytes:
        raise ValueError(
            f"{name} must have {nbytes} bytes for a weight {tuple(shape)}, and has {packed.numel()}"
        )
    return packed.reshape(-1, 1)  # (ceil(n/2), 1)


def _take_constants(
    tensors: dict[str, Tensor], name: str, codes: Tensor, state: dict
) -> DoubleQuantized:
    """Removes and checks the nested constants of a weight."""
    block_size = state["nested_blocksize"]
    n_blocks = math.ceil(codes.numel() / block_size)
    absmax = _take(tensors, f"{name}.nested_absmax", torch.float32, n_blocks)
    codebook = _take(tensors, f"{name}.nested_quant_map", torch.float32, 256)
    offset = torch.tensor([float(state["nested_offset"])], dtype=torch.float32)
    return DoubleQuantized(codes, absmax, offset, block_size, codebook)


def _take(tensors: dict[str, Tensor], key: str, dtype: torch.dtype, size: int) -> Tensor:
    """Removes and checks a tensor of one dimension: dtype, size, finite, no negative magnitudes."""
    tensor = tensors.pop(key, None)
    if tensor is None or tensor.dtype != dtype or tensor.shape != (size,):
        got = "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(f"{key} must be {dtype} ({size},), and is {got}")
    if dtype.is_floating_point and not tensor.isfinite().all():
        raise ValueError(f"{key} holds NaN or infinity")
    if key.endswith("absmax") and (tensor < 0).any():
        raise ValueError(f"{key} holds magnitudes, and {tensor.min().item()} is negative")
    return tensor


def read_quantization(tensor: Tensor, name: str) -> Quantization:
    """Reads how a weight is quantized from its state, a tensor of this name."""
    state = _parse_state(tensor, name)
    _check_state(state, name, state["shape"])
    return Quantization(state["quant_type"], state["blocksize"], "nested_offset" in state)


def _read_state(tensor: Tensor, name: str, shape: torch.Size) -> dict:
    """Reads the JSON object that says how a weight was quantized, and checks each entry."""
    state = _parse_state(tensor, name)
    _check_state(state, name, [*shape])
    return state


def _check_state(state: dict, name: str, shape: list[int]) -> None:
    kind = name.rpartition("__")[2]
    block_sizes = [state["blocksize"], state.get("nested_blocksize", 256)]
    offset = state.get("nested_offset", 0.0)
    largest = torch.finfo(torch.float32).max
    rules = {
        f"quant_type must be {kind}": state["quant_type"] == kind and kind in CODES,
        f"shape must be {shape}, that of the layer": state["shape"] == shape,
        f"dtype must be {', '.join(DTYPES)}": state["dtype"] in list(DTYPES),
        "block sizes must be powers of two from 2 to 65536": all(map(_is_block_size, block_sizes)),
        "nested_dtype must be float32": state.get("nested_dtype", "float32") == "float32",
        "nested_offset must be a number within float32": (
            type(offset) in (int, float) and abs(offset) <= largest
        ),
    }
    for rule, holds in rules.items():
        if not holds:
            raise ValueError(f"{name}: {rule}; got {str(state)[:300]}")


def _is_block_size(value: object) -> bool:
    return type(value) is int and value in [2**k for k in range(1, 17)]


def _parse_state(tensor: Tensor, name: str) -> dict:
    try:
        if tensor.dtype != torch.uint8 or tensor.dim() != 1 or len(tensor) > LARGEST_STATE:
            raise ValueError(f"it is {tensor.dtype} {tuple(tensor.shape)}")
        state = io.parse_json(bytes(tensor.tolist()))
        plain = {"quant_type", "blocksize", "dtype", "shape"}
        nested = {"nested_blocksize", "nested_dtype", "nested_offset"}
        if state.keys() not in (plain, plain | nested):
            raise ValueError(f"it has {', '.join(state)}")
    except ValueError as error:
        raise ValueError(f"{name} is not a quantization state in JSON ({error})") from None
    return state
