"""The same work on a CPU, done by us and by the peers.

Each function prepares the work and returns one callable per peer that does it once: the same
numbers in, and results that the tests compare. The peers:

    ours            this project, with its kernels
    reference       this project in plain torch (QLORA_KERNELS=reference)
    bitsandbytes    its functions, and its Linear4bit as transformers and PEFT use it
    torchao         its NF4Tensor, on which QLoRA in torchtune is built
    dense           torch with an unquantized weight: no compression to pay for

A training step runs in a process of its own, `python -m bench.peers NAME`, so that its memory peak
is its own. It prints "ready", then does one step for each line it reads and answers with the
seconds and the memory: so peers can take turns.
"""

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.turns import Work
from checkpoints import base_model, sources
from data.dataset import Batch
from kernels import dispatch
from lora import FrozenWeight, QLoRALinear
from memory.measured import rss_bytes
from paged_optim import PagedAdamW
from training import attention
from training.dtypes import autocast
from training.loss_and_eval import label_loss

Product = Callable[[Tensor], Tensor]

# How bitsandbytes is called to store what we store.
BNB_NF4 = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": True}


def reference(work: Work) -> Work:
    """The same call without kernels."""

    def without_kernels() -> object:
        os.environ["QLORA_KERNELS"] = "reference"
        try:
            return work()
        finally:
            del os.environ["QLORA_KERNELS"]

    return without_kernels


def quantizing(weight: Tensor) -> dict[str, Work]:
    """float32 -> NF4 with double-quantized constants."""
    from bitsandbytes.functional import quantize_4bit
    from torchao.quantization import to_nf4

    ours = partial(FrozenWeight, weight)
    return {
        "ours": ours,
        "reference": reference(ours),
        "bitsandbytes": partial(quantize_4bit, weight, **BNB_NF4),
        "torchao": partial(to_nf4, weight),
    }


def dequantizing(weight: Tensor, dtype: torch.dtype) -> dict[str, Work]:
    """NF4 -> dense: ours into an existing buffer; the peers, which cannot on a CPU, allocate."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from torchao.quantization import to_nf4

    weight = weight.to(dtype)
    q, constants = FrozenWeight(weight).packed_state()
    allocating = partial(dispatch.dequantize, q, constants=constants)
    ours = partial(allocating, out=torch.empty_like(weight))
    packed, state = quantize_4bit(weight, **BNB_NF4)
    return {
        "ours": ours,
        "reference": reference(ours),
        "ours, allocating": allocating,
        "bitsandbytes": partial(dequantize_4bit, packed, state),
        "torchao": to_nf4(weight).get_original_weight,
    }


def linear_layers(weight: Tensor, dtype: torch.dtype) -> dict[str, Product]:
    """x -> x W^T, without adapter or bias."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from torchao.quantization import to_nf4
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import linear_nf4

    weight = weight.to(dtype)
    n_out, n_in = weight.shape
    layer = Linear4bit(n_in, n_out, bias=False, quant_type="nf4", compute_dtype=dtype)
    layer.weight = Params4bit(
        weight.clone(), False, quant_type="nf4", compress_statistics=True, module=layer
    )
    return {
        "ours": QLoRALinear(FrozenWeight(weight), None),
        "bitsandbytes": layer.to("cpu"),
        "torchao": partial(linear_nf4, weight=to_nf4(weight)),
        "dense": partial(F.linear, weight=weight),
    }


def multiplying(weight: Tensor, x: Tensor, g: Tensor | None = None) -> dict[str, Work]:
    """x W^T without gradients; with g, the gradient of the product, also the gradient of x."""
    layers = linear_layers(weight, x.dtype)
    if g is None:
        return {name: torch.no_grad()(partial(layer, x)) for name, layer in layers.items()}
    return {name: partial(product_and_gradient, layer, x, g) for name, layer in layers.items()}


def product_and_gradient(product: Product, x: Tensor, g: Tensor) -> Tensor:
    """Computes product(x) and returns the gradient of x, given the gradient g of the product."""
    leaf = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(product(leaf), leaf, g)
    return gradient


def updating(count: int) -> dict[str, Work]:
    """An AdamW step on `count` float32 parameters in tensors of 4096 x 4096; all pages resident."""

    def stepping(kind: type[torch.optim.Optimizer], **settings: object) -> Work:
        parameters = [nn.Parameter(torch.randn(2**24)) for _ in range(count // 2**24)]
        for parameter in parameters:
            parameter.grad = torch.randn(2**24)
        return kind(parameters, **settings).step

    return {
        "ours": stepping(PagedAdamW),
        "torch fused": stepping(torch.optim.AdamW, fused=True),
        "torch": stepping(torch.optim.AdamW, foreach=False),
    }


def reset_peak() -> None:
    """Starts a new peak of this process, without what the allocator keeps after frees."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The largest resident memory since `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def extra_bytes(work: Work) -> int:
    """The memory of a call at its peak, beyond what exists before and what it returns."""
    work()
    reset_peak()
    before = rss_bytes()
    result = work()
    return peak_bytes() - before - result.nbytes


def model_of(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """SmolLM2 with LoRA of rank 8 on all linear layers, and its optimizer.

    The base is in 4 bits, for "dense" in bfloat16. Names that end in "autocast" compute in bfloat16
    under autocast, as we do; the others as PEFT's documentation shows.
    """
    torch.manual_seed(0)
    folder = sources.default_folder()
    if name == "ours":
        adapter = {"r": 8, "lora_alpha": 16}
        model = base_model.load_with_adapters(
            folder, torch.bfloat16, "cpu", "default", 0, adapter, {}
        )
        attention.use(model)
        return model, PagedAdamW(trainable(model), lr=1e-4)
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four_bit = None
    if name.startswith("bitsandbytes"):
        four_bit = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map="cpu", quantization_config=four_bit
    )
    if four_bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    return model, torch.optim.AdamW(trainable(model), lr=1e-4)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def training_step(
    name: str, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch
) -> float:
    """One step with all tokens in the loss. Returns the loss."""
    if name == "ours":
        loss = label_loss(model, batch, torch.bfloat16) / batch.n_labels
    else:
        dtype = torch.bfloat16 if name.endswith("autocast") else torch.float32
        with autocast(batch.input_ids.device, dtype):
            loss = model(input_ids=batch.input_ids, labels=batch.labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def serve_steps(name: str) -> None:
    """Reads lines "batch length checkpointing" and answers each with the figures of a step."""
    model, optimizer = model_of(name)
    model.train()
    print("ready", flush=True)
    for line in sys.stdin:
        batch_size, length, checkpointing = map(int, line.split())
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(100, 40000, (batch_size, length), generator=generator)
        batch = Batch(ids, torch.ones_like(ids), ids)
        model.gradient_checkpointing_disable()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        reset_peak()
        began = time.perf_counter()
        loss = training_step(name, model, optimizer, batch)
        seconds = time.perf_counter() - began
        answer = {"seconds": seconds, "peak_bytes": peak_bytes(), "loss": loss}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve_steps(sys.argv[1])
