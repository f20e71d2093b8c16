"""What a state_dict says about a weight besides its tensors: a few settings, written as a tensor.

The tensors of a quantized weight do not say how to decode them. A state of another code or block
size would load without an error and decode to other numbers. So these settings are saved with the
tensors, and compared when they are loaded. They are JSON as uint8: safetensors holds tensors only.
"""

import hashlib
import json

import torch
from torch import Tensor

from double_quant import DoubleQuantized
from nf4 import Quantized


def describe(q: Quantized, constants: DoubleQuantized | None) -> dict:
    """How a quantized weight is decoded."""
    fields = {
        "shape": list(q.shape),
        "dtype": str(q.dtype),
        "block_size": q.block_size,
        "codebook": name_of(q.codebook),
    }
    if constants is not None:
        fields["nested_block_size"] = constants.block_size
        fields["nested_codebook"] = name_of(constants.codebook)
    return fields


def name_of(codebook: Tensor) -> str:
    """A short text that is equal for equal levels only."""
    digest = hashlib.sha256(codebook.cpu().numpy().tobytes()).hexdigest()
    return f"{codebook.numel()} levels {digest[:16]}"


def encode(fields: dict) -> Tensor:
    """A description as a uint8 tensor."""
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


def decode(state: Tensor) -> dict:
    """Raises: ValueError if the tensor is no description, such as the weight of a dense model."""
    if state.dtype != torch.uint8 or state.dim() != 1:
        raise ValueError(
            f"the state has a dense weight {tuple(state.shape)} for a layer with an adapter: "
            "load it into the model before attach"
        )
    return json.loads(bytes(state.tolist()))


def check_same(saved: dict, own: dict) -> None:
    """Raise a ValueError for the first field of a saved description that differs from `own`."""
    for name in own | saved:
        if saved.get(name) != own.get(name):
            raise ValueError(
                f"{name} must be {own.get(name)}, as in this model, "
                f"got {saved.get(name)} in the state; "
                "quantize and attach with the settings of the model that was saved"
            )
