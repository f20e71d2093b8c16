"""Training steps in a process of their own, so that the memory peak is that of one peer.

    python -m bench.step_process NAME           SmolLM2-135M
    python -m bench.step_process NAME SIZE      a Llama of a size of random_llama.SIZES, in 4 bits

NAME is "ours" or, of PEFT, "bitsandbytes" or "dense". Names that end in "autocast" compute in
bfloat16 under autocast, as we do; the others as PEFT's documentation shows. Names that end in
"float32" load the model and compute in float32.

The process prints "ready", then does one step for each line it reads and answers with the seconds
and the memory: so peers can take turns. It may allocate LIMIT bytes. If it needs more, or the
system kills it because memory is full, Stepper raises OutOfMemory.
"""

import contextlib
import json
import resource
import signal
import subprocess
import sys
import time

import torch
from torch import nn

from bench import peers_cuda, random_llama
from bench.peers import peak_bytes, reset_peak, trainable
from checkpoints import base_model, sources
from data.dataset import Batch
from paged_optim import PagedAdamW
from training import attention
from training.dtypes import autocast
from training.loss_and_eval import label_loss

LIMIT = 22 * 10**9  # bytes
RANK = 8
READY = "ready\n"
NO_MEMORY = "out of memory\n"


class OutOfMemory(Exception):
    """A step needs more memory than the process may have."""


class Stepper:
    """A peer in its own process, which does one training step per request."""

    program = (sys.executable, "-m", "bench.step_process")

    def __init__(self, name: str, *size: str) -> None:
        """Starts the process. Raises: OutOfMemory if the model does not fit."""
        self.command = [*self.program, name, *size]
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        while self._line() != READY:
            pass

    def step(self, batch: int, length: int, checkpointing: bool = False) -> dict:
        """Returns "seconds", "peak_bytes" and "loss" of a step on random tokens.

        Raises: OutOfMemory if it does not fit; the process has ended then.
        """
        with contextlib.suppress(BrokenPipeError):  # _line says why the process has ended
            self.process.stdin.write(f"{batch} {length} {int(checkpointing)}\n")
            self.process.stdin.flush()
        return json.loads(self._line())

    def _line(self) -> str:
        """The next line. Raises: OutOfMemory or RuntimeError if the process has ended."""
        line = self.process.stdout.readline()
        if line and line != NO_MEMORY:
            return line
        self.close()
        if line or self.process.returncode == -signal.SIGKILL:
            raise OutOfMemory
        status = self.process.returncode
        raise RuntimeError(f"the process ended with {status}: run {' '.join(self.command)}")

    def close(self) -> None:
        self.process.communicate()


def model_of(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """SmolLM2 with LoRA on all linear layers, and its optimizer.

    The base is in 4 bits, for "dense" in bfloat16 or float32.
    """
    torch.manual_seed(0)
    folder = sources.default_folder()
    dtype = torch.float32 if name.endswith("float32") else torch.bfloat16
    if name.startswith("ours"):
        adapter = {"r": RANK, "lora_alpha": 16}
        model = base_model.load_with_adapters(folder, dtype, "cpu", "default", 0, adapter, {})
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
            bnb_4bit_compute_dtype=dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map="cpu", quantization_config=four_bit
    )
    if four_bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    return model, torch.optim.AdamW(trainable(model), lr=1e-4)


def random_model_of(name: str, size: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A random Llama in 4 bits with LoRA on all linear layers, and its optimizer."""
    if name != "ours" and not name.startswith("bitsandbytes"):
        raise ValueError(f"with a SIZE, NAME must be ours or bitsandbytes, got {name}")
    torch.manual_seed(0)
    shape = random_llama.SIZES[size]
    cpu = torch.device("cpu")
    if name == "ours":
        model = random_llama.build(shape, RANK, cpu)
        attention.use(model)
        return model, PagedAdamW(trainable(model), lr=1e-4)
    model = peers_cuda.peft_model(shape, RANK, cpu)
    return model, torch.optim.AdamW(trainable(model), lr=1e-4)


def training_step(
    name: str, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch
) -> float:
    """One step with all tokens in the loss. Returns the loss."""
    if name.startswith("ours"):
        dtype = torch.float32 if name.endswith("float32") else torch.bfloat16
        loss = label_loss(model, batch, dtype) / batch.n_labels
    else:
        dtype = torch.bfloat16 if name.endswith("autocast") else torch.float32
        with autocast(batch.input_ids.device, dtype):
            loss = model(input_ids=batch.input_ids, labels=batch.labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def serve_steps(name: str, *size: str) -> None:
    """Reads lines "batch length checkpointing" and answers each with the figures of a step."""
    model, optimizer = random_model_of(name, *size) if size else model_of(name)
    model.train()
    print(READY, end="", flush=True)
    for line in sys.stdin:
        batch_size, length, checkpointing = map(int, line.split())
        generator = torch.Generator().manual_seed(0)
        vocabulary = model.config.vocab_size
        ids = torch.randint(100, vocabulary, (batch_size, length), generator=generator)
        batch = Batch(ids, torch.ones_like(ids), ids)
        model.activation_checkpointing_disable()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        reset_peak()
        began = time.perf_counter()
        loss = training_step(name, model, optimizer, batch)
        seconds = time.perf_counter() - began
        answer = {"seconds": seconds, "peak_bytes": peak_bytes(), "loss": loss}
        print(json.dumps(answer), flush=True)


def lacks_memory(error: Exception) -> bool:
    """Whether Python or torch, which has no class for it on a CPU, could not allocate memory."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def main() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    try:
        serve_steps(*sys.argv[1:])
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        print(NO_MEMORY, end="", flush=True)


if __name__ == "__main__":
    main()
