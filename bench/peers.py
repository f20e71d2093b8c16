"""The same work, done by us and by others: what bench.py puts side by side.

A contender is a function that prepares its work and returns a callable that does it once. The work of all in a race is the
same, seen from outside: the same numbers in, and results that the tests of the peers compare. Libraries:

    ours            this project, with its kernels
    reference       this project in plain torch (QLORA_KERNELS=reference)
    bitsandbytes    its functions, and its Linear4bit as transformers and PEFT use it
    torchao         its NF4Tensor, which QLoRA in torchtune stands on
    dense           torch with an unquantized weight: no compression to pay for

A training step runs in a process of its own, `python contenders.py NAME`, so that its peak of memory is its own. It says
"ready", then does one step for each line it reads, and answers with its seconds and memory: so they can take turns.
"""

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoints import base_model
from checkpoints import sources as pretrained
from data import dataset as data
from kernels import dispatch
from lora import FrozenWeight, QLoRALinear
from memory import measured as memory
from paged_optim import PagedAdamW
from training.dtypes import autocast
from training.loss_and_eval import label_loss

Work = Callable[[], object]


def reference(work: Work) -> Work:
    """The same call without kernels."""

    def slowly() -> object:
        os.environ["QLORA_KERNELS"] = "reference"
        try:
            return work()
        finally:
            del os.environ["QLORA_KERNELS"]

    return slowly


def quantizing(weight: Tensor) -> dict[str, Work]:
    """float32 -> NF4 with double-quantized constants."""
    import bitsandbytes.functional as bnb
    from torchao.quantization import to_nf4

    return {
        "ours": lambda: FrozenWeight(weight),
        "reference": reference(lambda: FrozenWeight(weight)),
        "bitsandbytes": lambda: bnb.quantize_4bit(
            weight, blocksize=64, quant_type="nf4", compress_statistics=True
        ),
        "torchao": lambda: to_nf4(weight),
    }


def dequantizing(weight: Tensor, dtype: torch.dtype) -> dict[str, Work]:
    """NF4 -> dense; ours into a buffer that is there already, the others, which on a CPU cannot, into new memory."""
    import bitsandbytes.functional as bnb
    from torchao.quantization import to_nf4

    weight = weight.to(dtype)
    (q, constants), out = FrozenWeight(weight).packed_state(), torch.empty_like(weight)
    packed, state = bnb.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    theirs = to_nf4(weight)
    return {
        "ours": lambda: dispatch.dequantize(q, constants=constants, out=out),
        "reference": reference(lambda: dispatch.dequantize(q, constants=constants, out=out)),
        "ours, allocating": lambda: dispatch.dequantize(q, constants=constants),
        "bitsandbytes": lambda: bnb.dequantize_4bit(packed, state),
        "torchao": lambda: theirs.get_original_weight(),
    }


def linear_layers(weight: Tensor, dtype: torch.dtype) -> dict[str, Callable[[Tensor], Tensor]]:
    """The frozen layer alone, without adapter or bias."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from torchao.quantization import to_nf4
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import linear_nf4

    weight = weight.to(dtype)
    layer = Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, quant_type="nf4", compute_dtype=dtype
    )
    layer.weight = Params4bit(
        weight.clone(), False, quant_type="nf4", compress_statistics=True, module=layer
    )
    layer, theirs, base = layer.to("cpu"), to_nf4(weight), FrozenWeight(weight)
    return {
        "ours": QLoRALinear(base, None),
        "bitsandbytes": layer,
        "torchao": lambda x: linear_nf4(x, theirs),
        "dense": lambda x: F.linear(x, weight),
    }


def multiplying(weight: Tensor, x: Tensor, g: Tensor | None = None) -> dict[str, Work]:
    """x W^T; given the gradient g of that, the gradient of x too. W is frozen and has none."""

    def forward(layer: Callable[[Tensor], Tensor]) -> Work:
        return torch.no_grad()(lambda: layer(x))

    def both(layer: Callable[[Tensor], Tensor]) -> Work:
        def once() -> Tensor:
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(layer(leaf), leaf, g)[0]

        return once

    return {
        name: (forward if g is None else both)(layer)
        for name, layer in linear_layers(weight, x.dtype).items()
    }


def updating(count: int) -> dict[str, Work]:
    """One AdamW step on `count` float32 parameters, in tensors as large as a layer of 4096 x 4096; all pages are resident."""

    def stepping(kind: type[torch.optim.Optimizer], **settings: object) -> Work:
        parameters = [nn.Parameter(torch.randn(2**24)) for _ in range(count >> 24)]
        for parameter in parameters:
            parameter.grad = torch.randn(2**24)
        return kind(parameters, **settings).step

    return {
        "ours": stepping(PagedAdamW),
        "torch fused": stepping(torch.optim.AdamW, fused=True),
        "torch": stepping(torch.optim.AdamW, foreach=False),
    }


def extra_bytes(work: Work) -> int:
    """How much more memory the process holds at the peak of one call than before it, beyond what the call returns."""
    work()
    ctypes.CDLL(None).malloc_trim(
        0
    )  # give back what the allocator keeps, or it would hide what is taken
    before = memory.rss_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # from here on the peak is counted anew
    result = work()
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    return peak - before - result.nbytes


# A training step


def model_of(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """SmolLM2 with LoRA of rank 8 on all linear layers of a base in 4 bits or, for "dense", in bfloat16; and its optimizer.

    Names that end in "autocast" compute in bfloat16 under autocast, as we do; the others as PEFT's documentation shows.
    """
    torch.manual_seed(0)
    if name == "ours":
        adapter = {"r": 8, "lora_alpha": 16}
        model = base_model.load_with_adapters(
            pretrained.default_folder(), torch.bfloat16, "cpu", "default", 0, adapter, {}
        )
        return model, PagedAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        pretrained.default_folder(),
        dtype=torch.bfloat16,
        device_map="cpu",
        quantization_config=four_bit if name.startswith("bitsandbytes") else None,
    )
    if name.startswith("bitsandbytes"):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = get_peft_model(
        model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    return model, torch.optim.AdamW(filter(lambda p: p.requires_grad, model.parameters()), lr=1e-4)


def serve_steps(name: str) -> None:
    """Do a step of batch x length tokens for each line "batch length checkpointing" that is read, all tokens labels."""
    model, optimizer = model_of(name)
    model.train()
    print("ready", flush=True)
    for line in sys.stdin:
        batch_size, length, checkpointing = map(int, line.split())
        ids = torch.randint(
            100, 40000, (batch_size, length), generator=torch.Generator().manual_seed(0)
        )
        batch = data.Batch(ids, torch.ones_like(ids), ids)
        model.gradient_checkpointing_disable()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        began = time.perf_counter()
        if name == "ours":
            loss = label_loss(model, batch, torch.bfloat16) / batch.n_labels
        else:
            with autocast(
                ids.device, torch.bfloat16 if name.endswith("autocast") else torch.float32
            ):
                loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - began
        peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
        print(json.dumps({"seconds": seconds, "peak_bytes": peak, "loss": loss.item()}), flush=True)


if __name__ == "__main__":
    serve_steps(sys.argv[1])
