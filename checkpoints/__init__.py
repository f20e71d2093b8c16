"""Saves and loads adapters in PEFT's format, and 4-bit models in that of bitsandbytes.

Modules: io (atomic writes, files from strangers), quantization (how a base is quantized, in words),
bnb_4bit and peft_adapter (the two formats), skeleton (a model without weights), headers (checks
before weights are read), base_model (streaming load, 4-bit save and load), portable (what older
versions read), sources (a folder, a hub id or a package).
"""

import logging

# transformers imports torchao where it is installed. torchao then warns about its own libraries
# that do not load, and torch about a function that torchao should no longer call. Nothing here uses
# torchao, so neither warning concerns a run. Therefore import this package before any model class
# of transformers.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)

from checkpoints.base_model import load_4bit, save_4bit  # noqa: E402
from checkpoints.peft_adapter import load_adapter, save_adapter  # noqa: E402

__all__ = ["load_4bit", "load_adapter", "save_4bit", "save_adapter"]
