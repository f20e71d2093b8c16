"""One 4-bit weight on disk, in the format of bitsandbytes, which transformers reads and writes.

A weight `name` of n elements in blocks of 64 is made of these tensors, the nested ones with double quantization only:

    name                                    uint8 (ceil(n/2), 1)      two codes a byte, the first in the high nibble
    name.absmax                             uint8 (ceil(n/64),)       float32 without double quantization
    name.quant_map                          float32 (16,)             the levels, always those of the quant_type
    name.nested_absmax                      float32 (ceil(n/64/256),)
    name.nested_quant_map                   float32 (256,)            the levels of absmax
    name.quant_state.bitsandbytes__nf4      uint8                     a JSON object: quant_type, blocksize, dtype, shape,
                                                                      nested_blocksize, nested_dtype, nested_offset

The packed bytes may pose as another dtype (bnb_4bit_quant_storage; FSDP likes its parameters all of one).
"""

import json
import math

import torch
from torch import Tensor

import nf4
from checkpoints import io as files
from double_quant import DoubleQuantized
from lora import FrozenWeight

CODES = {"nf4": nf4.NF4, "fp4": nf4.FP4}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STORAGES = DTYPES | {"float64": torch.float64, "int8": torch.int8, "uint8": torch.uint8}
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # what bitsandbytes can read
STATE = ".quant_state.bitsandbytes__"
LARGEST_STATE = 2**12  # bytes; it has about 200


def quant_type(codebook: Tensor | None) -> str | None:
    """The name of a code in a bitsandbytes checkpoint, if it has one."""
    names = [
        name
        for name, code in CODES.items()
        if codebook is not None and torch.equal(codebook.cpu(), code)
    ]
    return names[0] if names else None


def pack(base: FrozenWeight, name: str, storage: torch.dtype = torch.uint8) -> dict[str, Tensor]:
    """The tensors of one weight, its packed bytes posing as `storage`.

    Raises: ValueError for a code, block size or dtype that the format does not have.
    """
    kind = quant_type(base.codebook)
    if kind is None or base.block_size not in BLOCK_SIZES or base.dtype not in DTYPES.values():
        what = "dense"
        if base.codebook is not None:
            what = f"{base.codebook.numel()} levels, blocks of {base.block_size}, {base.dtype}"
        raise ValueError(
            f"{name} cannot be saved in bitsandbytes' format: it is {what}; nf4 or fp4 in blocks of "
            f"{', '.join(map(str, BLOCK_SIZES))}, of a dtype of 16 or 32 bits, can be"
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
        state |= {
            "nested_blocksize": constants.block_size,
            "nested_dtype": "float32",
            "nested_offset": constants.offset.item(),
        }
        tensors |= {
            f"{name}.nested_absmax": constants.absmax,
            f"{name}.nested_quant_map": constants.codebook.clone(),
        }
    text = json.dumps(state).encode()
    return tensors | {name + STATE + kind: torch.frombuffer(bytearray(text), dtype=torch.uint8)}


def packed_names(tensors: dict[str, Tensor]) -> list[str]:
    """The names of the weights in 4 bits among the tensors of a checkpoint."""
    return sorted(name.partition(STATE)[0] for name in tensors if STATE in name)


def unpack(tensors: dict[str, Tensor], name: str, shape: torch.Size) -> FrozenWeight:
    """Take the tensors of one weight of this shape out of `tensors`. Raises: ValueError naming the one that does not fit."""
    state_name = next(key for key in tensors if key.startswith(name + STATE))
    state = _read_state(tensors.pop(state_name), state_name, shape)
    n = math.prod(shape)
    n_blocks = -(-n // state["blocksize"])
    nested = "nested_offset" in state

    def take(suffix: str, dtype: torch.dtype, size: int) -> Tensor:
        tensor = tensors.pop(name + suffix, None)
        if tensor is None or tensor.dtype != dtype or tensor.shape != (size,):
            got = "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(
                f"{name}{suffix} must be {dtype} ({size},) for a weight {tuple(shape)}, and is {got}"
            )
        if dtype.is_floating_point and not tensor.isfinite().all():
            raise ValueError(f"{name}{suffix} holds NaN or infinity")
        if suffix.endswith("absmax") and (tensor < 0).any():
            raise ValueError(
                f"{name}{suffix} holds magnitudes, and {tensor.min().item()} is negative"
            )
        return tensor

    packed = tensors.pop(name, torch.empty(0))
    if packed.dtype not in STORAGES.values():
        raise ValueError(f"{name} must be one of {', '.join(STORAGES)}, and is {packed.dtype}")
    packed = packed.contiguous().flatten().view(torch.uint8)
    if packed.numel() != -(-n // 2):
        raise ValueError(
            f"{name} must have {-(-n // 2)} bytes for a weight {tuple(shape)}, and has {packed.numel()}"
        )
    code = CODES[state["quant_type"]]
    if not torch.equal(take(".quant_map", torch.float32, 16), code):
        raise ValueError(
            f"{name}.quant_map is not {state['quant_type']}, which bitsandbytes would use all the same"
        )
    absmax, constants = take(".absmax", torch.uint8 if nested else torch.float32, n_blocks), None
    if nested:
        nested_absmax = take(
            ".nested_absmax", torch.float32, -(-n_blocks // state["nested_blocksize"])
        )
        offset = torch.tensor([float(state["nested_offset"])], dtype=torch.float32)
        levels = take(".nested_quant_map", torch.float32, 256)
        constants = DoubleQuantized(
            absmax, nested_absmax, offset, state["nested_blocksize"], levels
        )
    dtype = DTYPES[state["dtype"]]
    return FrozenWeight.from_quantized(
        nf4.Quantized(packed.reshape(-1, 1), absmax, code, shape, dtype, state["blocksize"]),
        constants,
    )


def _read_state(tensor: Tensor, name: str, shape: torch.Size) -> dict:
    """The JSON object that says how a weight was quantized, every entry of it checked."""
    try:
        if tensor.dtype != torch.uint8 or tensor.dim() != 1 or len(tensor) > LARGEST_STATE:
            raise ValueError(f"it is {tensor.dtype} {tuple(tensor.shape)}")
        state = files.parse_json(bytes(tensor.tolist()))
        entries = {"quant_type", "blocksize", "dtype", "shape"}
        nested = {"nested_blocksize", "nested_dtype", "nested_offset"}
        if state.keys() not in (entries, entries | nested):
            raise ValueError(f"it has {', '.join(state)}")
    except ValueError as error:
        raise ValueError(f"{name} is not a quantization state in JSON ({error})") from None
    sizes, powers = (
        [state["blocksize"], state.get("nested_blocksize", 256)],
        [2**k for k in range(1, 17)],
    )
    offset, largest = state.get("nested_offset", 0.0), torch.finfo(torch.float32).max
    rules = {
        f"quant_type must be {name.rpartition('__')[2]}": state["quant_type"]
        == name.rpartition("__")[2]
        in CODES,
        f"shape must be {list(shape)}, that of the layer": state["shape"] == list(shape),
        f"dtype must be {', '.join(DTYPES)}": state["dtype"] in [*DTYPES],
        "block sizes must be powers of two from 2 to 65536": all(
            type(b) is int and b in powers for b in sizes
        ),
        "nested_dtype must be float32": state.get("nested_dtype", "float32") == "float32",
        "nested_offset must be a number within float32": type(offset) in (int, float)
        and abs(offset) <= largest,
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise ValueError(f"{name}: {broken[0]}; got {str(state)[:300]}")
    return state
