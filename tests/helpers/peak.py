"""How much memory it takes to load a model: a checkpoint of any size, made on the spot, loaded in a process of its own.

    python tests/peak.py                          a Llama of 1.1B parameters in bfloat16: 2.2 GB on disk
    python tests/peak.py --layers 12 --hidden 1024 --dtype float32

The numbers are random and are written tensor by tensor, so that making the checkpoint takes no memory either.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

ROOT = Path(__file__).parent.parent.parent
SHARD = 10**9  # bytes
ALLOWED = 300 * 10**6  # bytes, besides the model in 4 bits and its largest tensor
LOAD = """
import json, sys
from pathlib import Path
import torch
from checkpoints import base_model as streaming
from memory import measured as memory
from variants import init as variants

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

before = resident("VmRSS:")
model = streaming.load_quantized(Path(sys.argv[1]), torch.bfloat16, "cpu", variants.maker("default", {}, {}))
rows = memory.ledger(model).values()
print(json.dumps({"before": before, "peak": resident("VmHWM:"), "parameters": sum(row.elements for row in rows),
                  "kept": sum(row.bytes_now for row in rows)}))
"""


def shape(hidden: int, layers: int, vocabulary: int) -> LlamaConfig:
    """TinyLlama's proportions."""
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
    """Random safetensors shards of at most SHARD bytes, and their index. -> bytes of the largest tensor"""
    with torch.device("meta"):
        tensors = AutoModelForCausalLM.from_config(config, dtype=dtype).state_dict()
    shards, total = [[]], 0
    for name, tensor in tensors.items():
        if total and total + tensor.nbytes > SHARD:
            shards, total = [*shards, []], 0
        shards[-1].append(name)
        total += tensor.nbytes
    places = {}
    for number, names in enumerate(shards):
        path = folder / f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        places |= dict.fromkeys(names, path.name)
        header, end = {}, 0
        for name in names:
            begin, end = end, end + tensors[name].nbytes
            kind = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
            header[name] = {
                "dtype": kind,
                "shape": list(tensors[name].shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                numbers = torch.randn(tensors[name].shape, dtype=dtype).mul_(0.02)
                file.write(numbers.view(torch.uint8).numpy().tobytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return max(tensor.nbytes for tensor in tensors.values())


def measure(folder: Path) -> dict:
    """Load a folder in a new process. -> parameters, bytes kept, and bytes resident before loading and at the peak

    Read from /proc: ru_maxrss would start at what the parent had.
    """
    command = [sys.executable, "-c", LOAD, str(folder)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (("hidden", 2048), ("layers", 22), ("vocabulary", 32000)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        config = shape(args.hidden, args.layers, args.vocabulary)
        largest = write_checkpoint(config, getattr(torch, args.dtype), Path(name))
        on_disk = sum(path.stat().st_size for path in Path(name).iterdir())
        got = measure(Path(name))
    bound, taken = got["kept"] + largest + ALLOWED, got["peak"] - got["before"]
    mb = "{:.0f} MB".format
    print(
        f"{got['parameters'] / 1e9:.2f}B parameters, {mb(on_disk / 1e6)} on disk, {mb(got['kept'] / 1e6)} with linear layers "
        f"in 4 bits; the largest tensor {mb(largest / 1e6)}\nat its peak, loading took {mb(taken / 1e6)} more than the "
        f"{mb(got['before'] / 1e6)} of Python and its libraries; the bound is {mb(bound / 1e6)}"
    )
    return int(taken > bound)


if __name__ == "__main__":
    sys.exit(main())
