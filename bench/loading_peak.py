"""Measures the memory that loading a model takes, for a checkpoint of any size made on the spot.

    python -m bench.loading_peak          a Llama of 1.1B parameters in bfloat16: 2.2 GB on disk
    python -m bench.loading_peak --layers 12 --hidden 1024 --dtype float32

The weights are random and written tensor by tensor, so making the checkpoint takes no memory
either. The model is loaded in a process of its own.

Fails (exit status 1) if loading takes more than the 4-bit model, its largest tensor and 300 MB.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from checkpoints import base_model
from memory.measured import ledger
from variants import init

ROOT = Path(__file__).parent.parent
SHARD = 10**9  # bytes
ALLOWED = 300 * 10**6  # bytes, besides the model in 4 bits and its largest tensor
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}  # as safetensors names them


def shape(hidden: int, layers: int, vocabulary: int) -> LlamaConfig:
    """A config with TinyLlama's proportions."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )


def write_checkpoint(config: LlamaConfig, dtype: torch.dtype, folder: Path) -> int:
    """Writes a checkpoint of random weights. Returns the bytes of its largest tensor."""
    with torch.device("meta"):
        tensors = AutoModelForCausalLM.from_config(config, dtype=dtype).state_dict()
    shards = split(tensors)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        path = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_shard(path, {name: tensors[name] for name in names})
        weight_map |= dict.fromkeys(names, path.name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return max(tensor.nbytes for tensor in tensors.values())


def split(tensors: dict[str, Tensor]) -> list[list[str]]:
    """The names of the tensors in shards of at most SHARD bytes, or of one tensor."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes random values of the shapes and dtypes of meta tensors as one safetensors file."""
    header = {}
    end = 0
    for name, tensor in tensors.items():
        begin = end
        end = begin + tensor.nbytes
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            values = torch.randn(tensor.shape, dtype=tensor.dtype).mul_(0.02)
            file.write(values.view(torch.uint8).numpy().tobytes())


def measure(folder: Path) -> dict:
    """Loads a folder in a new process.

    Returns parameters, bytes kept, and resident bytes before loading and at the peak.
    """
    command = [sys.executable, "-m", "bench.loading_peak", "--load", str(folder)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def load(folder: Path) -> dict:
    """Loads a folder in this process; the figures of `measure`."""
    before = resident("VmRSS:")
    make = init.maker("default", {}, {})
    model = base_model.load_quantized(folder, torch.bfloat16, "cpu", make)
    rows = ledger(model).values()
    return {
        "before": before,
        "peak": resident("VmHWM:"),
        "parameters": sum(row.elements for row in rows),
        "kept": sum(row.bytes_now for row in rows),
    }


def resident(key: str) -> int:
    """Bytes from /proc/self/status; ru_maxrss would start at the peak of the parent process."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(key)[2].split()[0])


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.loading_peak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--load", type=Path, help="load this folder and print the bytes as JSON")
    args = parser.parse_args()
    if args.load:
        print(json.dumps(load(args.load)))
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = shape(args.hidden, args.layers, args.vocabulary)
        largest = write_checkpoint(config, getattr(torch, args.dtype), folder)
        on_disk = sum(path.stat().st_size for path in folder.iterdir())
        result = measure(folder)
    bound = result["kept"] + largest + ALLOWED
    taken = result["peak"] - result["before"]
    print(
        f"{result['parameters'] / 1e9:.2f}B parameters, {megabytes(on_disk)} on disk, "
        f"{megabytes(result['kept'])} with linear layers in 4 bits; "
        f"the largest tensor {megabytes(largest)}\n"
        f"at its peak, loading took {megabytes(taken)} more than the "
        f"{megabytes(result['before'])} of Python and its libraries; "
        f"the bound is {megabytes(bound)}"
    )
    return int(taken > bound)


def megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.0f} MB"


if __name__ == "__main__":
    sys.exit(main())
