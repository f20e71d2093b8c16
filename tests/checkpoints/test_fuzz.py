"""An untrusted folder is loaded bit for bit, or refused by a ValueError that names the file.

Nothing else happens: no other exception, no code runs, no long wait, no memory beyond the files'
own, no new file, no half-changed model.
"""

import copy
import functools
import json
import math
import os
import pickle
import re
import shutil
import signal
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import checkpoints
import lora
from checkpoints import bnb_4bit, peft_adapter
from helpers import models
from helpers.strategies import bits
from lora import QLoRALinear
from memory import measured
from paged_optim import PagedAdamW
from training import state

Contents = dict[str, bytes]
COUNTS: Counter = Counter()
SECONDS = 10
GROWTH = 2**28
SEAL = "a" * 64
INDEX = "model.safetensors.index.json"
MODELS = ["nested", "plain", "shards"]  # with double quantization, without, in two files
ADAPTERS = ["adapter for a dense model", "adapter for an adapted model"]


@functools.cache
def dense() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@functools.cache
def adapted() -> nn.Module:
    return models.trained(lora.attach(copy.deepcopy(dense()), r=2, lora_alpha=5))


@functools.cache
def undamaged(kind: str) -> Contents:
    """The contents of an undamaged folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if kind == "state":
            (folder / "state.safetensors").write_bytes(saved_state())
        elif kind in ADAPTERS:
            checkpoints.save_adapter(models.trained(copy.deepcopy(adapted())), folder)
        else:
            model = lora.attach(copy.deepcopy(dense()), double_quant=kind != "plain")
            checkpoints.save_4bit(model, folder)
        contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    if kind == "shards":
        tensors = load(contents.pop("model.safetensors"))
        places = {
            key: f"model-0000{1 + (index % 2)}-of-00002.safetensors"
            for index, key in enumerate(sorted(tensors))
        }
        contents[INDEX] = json.dumps({"metadata": {}, "weight_map": places}).encode()
        for place in set(places.values()):
            shard = {key: tensor for key, tensor in tensors.items() if places[key] == place}
            contents[place] = save(shard, {"format": "pt"})
    return contents


def stepped(model: nn.Module, optimizer: PagedAdamW | None = None) -> PagedAdamW:
    """Returns an optimizer of the model's adapters after a step."""
    optimizer = optimizer or PagedAdamW(peft_adapter.adapter_tensors(model).values())
    for parameter in peft_adapter.adapter_tensors(model).values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


class Waited(BaseException):
    """A load took longer than SECONDS."""


@contextmanager
def in_time() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Waited

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def snapshot(model: nn.Module) -> tuple:
    """Everything that a refused load must not change."""
    modules = [
        (
            name,
            id(each),
            each.training,
            {key: value for key, value in vars(each).items() if key[0] != "_"},
        )
        for name, each in model.named_modules()
    ]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return modules, [
        (name, id(each), each.requires_grad, bits(each).tolist()) for name, each in tensors
    ]


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def raw(tensor: Tensor) -> tuple[list[int], bytes]:
    return [*tensor.shape], bits(tensor).flatten().view(torch.uint8).numpy().tobytes()


def parsed(data: bytes) -> dict[str, tuple[list[int], bytes]]:
    """Reads the shape and bytes of each tensor of a safetensors file without the library."""
    header, rest = split(data)
    entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
    for entry in entries.values():
        assert entry["dtype"] in ("F64", "F32", "F16", "BF16", "U8", "I8"), entry
    return {
        name: (entry["shape"], rest[slice(*entry["data_offsets"])])
        for name, entry in entries.items()
    }


def assert_is_the_file(model: nn.Module, paths: list[Path]) -> None:
    """The model has the tensors of the files and no others, bit for bit."""
    theirs = {key: each for path in paths for key, each in parsed(path.read_bytes()).items()}
    ours = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name not in model.all_tied_weights_keys
    }
    for name, layer in model.named_modules():
        if isinstance(layer, QLoRALinear):
            ours = {
                key: tensor
                for key, tensor in ours.items()
                if not key.startswith((f"{name}.base.", f"{name}.lora_"))
            }
            if layer.base.codebook is None:
                ours[f"{name}.weight"] = layer.base.weight
            else:
                ours |= bnb_4bit.pack(layer.base, f"{name}.weight")
    assert ours.keys() == theirs.keys() - model.all_tied_weights_keys.keys()
    for name, tensor in ours.items():
        shape, data = raw(tensor)
        its_shape, its_data = theirs[name]
        if bnb_4bit.STATE in name:
            mine, its = json.loads(data), json.loads(its_data)
            if "nested_offset" in its:
                its["nested_offset"] = torch.tensor(float(its["nested_offset"])).item()
            assert mine == its, name
        else:
            assert data == its_data and (shape == its_shape or f"{name}.absmax" in ours), name


def load_one(kind: str, folder: Path) -> None:
    """Loads a folder and checks the law if that succeeds."""
    if kind in MODELS:
        model = checkpoints.load_4bit(folder)
        assert not any(
            parameter.is_meta or parameter.requires_grad for parameter in model.parameters()
        )
        parts = [path for path in sorted(folder.glob("*.safetensors")) if path.is_file()]
        one = folder / "model.safetensors"
        assert_is_the_file(model, [one] if one.is_file() else parts)
        return
    model = copy.deepcopy(adapted() if kind == ADAPTERS[1] else dense())
    before = snapshot(model)
    try:
        checkpoints.load_adapter(model, folder)
    except ValueError:
        assert snapshot(model) == before, "a refused adapter has changed the model"
        raise
    data = (folder / "adapter_model.safetensors").read_bytes()
    ours = peft_adapter.adapter_tensors(model)
    theirs = load(data)
    assert ours and ours.keys() == parsed(data).keys()
    for name, tensor in ours.items():
        assert raw(tensor) == raw(theirs[name].to(tensor.dtype)) and tensor.isfinite().all(), name
    assert model(input_ids=torch.arange(5)[None]).logits.shape == (1, 5, 64)


def outcome(
    kind: str,
    contents: Contents,
    damage: str,
    prepare: Callable[[Path], object] = lambda folder: None,
) -> str:
    """Returns the error message, or "" if the folder was loaded; else fails."""
    said = ""
    peak = measured.peak_rss_bytes()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "stranger"
        folder.mkdir()
        for file, data in contents.items():
            (folder / file).write_bytes(data)
        prepare(folder)
        before = listing(Path(name))
        try:
            with in_time():
                load_one(kind, folder)
        except ValueError as error:
            assert type(error) is ValueError, repr(error)
            said = str(error)
            assert str(folder) in said, said
        assert listing(Path(name)) == before, "a file was made"
    assert torch.get_default_dtype() == torch.float32
    assert measured.peak_rss_bytes() - peak < GROWTH, "too much memory"
    COUNTS[damage, "refused" if said else "loaded"] += 1
    return said


# Replacements for any value in JSON. GONE removes it; json.dumps could not write the others.
RAW = {
    "GONE": "",
    "DIGITS": "9" * 5000,
    "DEEP": "[" * 950 + "]" * 950,
    "DEEPER": '{"a":' * 10**5,
    "NOT UTF-8": "\udcff",
}
WEIRD = [
    *RAW,
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    48,
    64,
    2**31,
    10**9,
    10**12,
    2**63,
    10**400,
    -(10**30),
    0.5,
    1e308,
    math.nan,
    math.inf,
    "",
    "x",
    "0",
    "a/b",
    "../x",
    "/etc/passwd",
    "\0",
    "\ud800",
    "float16",
    "fp4",
    "gpt2",
    "mamba",
    "a" * 300,
    [],
    [1],
    [[]],
    {},
    {"": 0},
    {"a": {"b": [1]}},
    {"[[a]": 2},
    {"a{99999999999}": 2},
    {".*.*.*x": 2},
    {"a": 10**400},
]
NEW_KEYS = """
    auto_map attn_implementation _attn_implementation num_blocks layer_types head_dim rope_scaling
    rope_parameters pruned_heads torch_dtype quantization_config dtype use_cache return_dict
    num_labels id2label transformers_version experts_implementation rank_pattern alpha_pattern
    use_dora modules_to_save init_lora_weights use_rslora fan_in_fan_out layers_to_transform
    target_parameters max_new_tokens cache_implementation num_beams weight_map
""".split()


def spots(value: object, path: tuple = ()) -> list[tuple]:
    """Lists the path to each value in a JSON object."""
    children = []
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, list):
        children = enumerate(value)
    found = [path] if path else []
    for key, child in children:
        found += spots(child, (*path, key))
    return found


def replaced(text: bytes, path: tuple, value: object, twice: bool = False) -> bytes:
    """Replaces the value at a path. twice: adds the key again instead, after the old entry."""
    content = json.loads(text)
    *parents, last = path
    parent = functools.reduce(lambda inner, key: inner[key], parents, content)
    if value == "GONE":
        parent.pop(last) if isinstance(parent, list) else parent.pop(last, None)
    elif twice and isinstance(parent, dict):
        parent |= {f"{last}@AGAIN": value}
    else:
        parent[last] = f"@{value}@" if isinstance(value, str) and value in RAW else value
    text = json.dumps(content).replace("@AGAIN", "")
    for name, raw in RAW.items():
        text = text.replace(f'"@{name}@"', raw)
    return text.encode(errors="surrogateescape")


def split(data: bytes) -> tuple[bytes, bytes]:
    """Splits a safetensors file into its header and the rest."""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return data[8:end], data[end:]


def assemble(header: bytes, rest: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + rest


@st.composite
def raw_damage(draw: st.DrawFn, data: bytes) -> bytes:
    """Changes, removes or inserts bytes, or changes the length of the header."""
    start = 8 + len(split(data)[0]) if data[:1] != b"{" else len(data)
    kind = draw(st.sampled_from(["flip", "flip", "cut", "insert", "length", "zero"]))
    regions = [(0, 8), (8, start), (start, len(data))] if start < len(data) else [(0, len(data))]
    low, high = draw(st.sampled_from(regions))
    at = draw(st.integers(low, high - 1))
    if kind == "flip":
        flipped = data[at] ^ draw(st.sampled_from([1 << bit for bit in range(8)]))
        return data[:at] + bytes([flipped]) + data[at + 1 :]
    if kind == "cut":
        return data[:at]
    if kind == "insert":
        return data[:at] + draw(st.binary(max_size=20)) + data[at:]
    if kind == "zero":
        return data[:at] + bytes(min(64, len(data) - at)) + data[at + 64 :]
    length = draw(st.sampled_from([0, 1, 7, 10**8, 10**8 + 1, 2**31, 2**63, 2**64 - 1]))
    return struct.pack("<Q", length) + data[8:]


@st.composite
def json_damage(draw: st.DrawFn, text: bytes) -> bytes:
    if draw(st.integers(0, 19)) == 0:
        others = [
            b"",
            b"[]",
            b"null",
            b"{",
            b"\xff",
            b"[" * 10**6,
            b"9" * 5000,
            text.decode().encode("utf-16"),
        ]
        return draw(st.sampled_from(others))
    path = draw(st.sampled_from(spots(json.loads(text)) + [(key,) for key in NEW_KEYS]))
    return replaced(text, path, draw(st.sampled_from(WEIRD)), draw(st.booleans()))


DTYPES = """
    BOOL F4 F6_E2M3 F8_E4M3 F8_E5M2 F8_E8M0 I8 U8 I16 U16 F16 BF16 I32 U32 F32 C64 F64 I64 U64 XX
""".split()
TORCH_DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.float8_e5m2]
TORCH_DTYPES += [torch.int64, torch.int8, torch.bool, torch.complex64]
SHAPES = [[], [0], [1], [2**63, 0], [0, 2**62], [0, 2**64 - 1], [2**40], [2**32, 2**32]]
SHAPES += [[-1], [1.0], [1] * 100, ["1"], None]


@st.composite
def header_damage(draw: st.DrawFn, data: bytes) -> bytes:
    """Changes what the header says about the tensors; their bytes stay."""
    header, rest = split(data)
    entries = json.loads(header)
    name = draw(st.sampled_from(sorted(entries)))
    kind = draw(st.sampled_from(["dtype", "shape", "offsets", "rename", "swap", "both", "any"]))
    entry = entries[name]
    if kind == "any" or name == "__metadata__":
        path = draw(st.sampled_from(spots(entries)))
        return assemble(replaced(header, path, draw(st.sampled_from(WEIRD))), rest)
    if kind == "dtype":
        entry["dtype"] = draw(st.sampled_from(DTYPES))
    elif kind == "shape":
        shape = entry["shape"]
        others = [*SHAPES, [*shape, 1], shape[::-1], [math.prod(shape)]]
        entry["shape"] = draw(st.sampled_from(others))
    elif kind == "offsets":
        ends = st.sampled_from([-1, 0, 1, 64, len(rest), len(rest) + 1, 2**44, 2**63])
        entry["data_offsets"] = draw(st.lists(ends, max_size=3))
    elif kind == "both":
        shape = draw(st.sampled_from(SHAPES))
        entries["empty"] = {"dtype": "U8", "shape": shape, "data_offsets": [0, 0]}
    else:
        other = draw(st.sampled_from([*sorted(entries), "x", "", "a\0b", "lm_head.weight", "../x"]))
        entries[name], entries[other] = entries.get(other, entry), entry
        if kind == "rename":
            del entries[name]
    return assemble(json.dumps(entries, separators=(",", ":")).encode(), rest)


@st.composite
def tensor_damage(draw: st.DrawFn, data: bytes) -> bytes:
    """Changes the dtype, shape or a number of a tensor, adds or removes one, or edits a state."""
    tensors = load(data)
    name = draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name].clone()
    kinds = ["state", "dtype", "shape", "number", "number", "missing", "extra", "zero"]
    kind = draw(st.sampled_from(kinds))
    states = [key for key in sorted(tensors) if bnb_4bit.STATE in key]
    if kind == "state" and states:
        name = draw(st.sampled_from(states))
        text = bytes(tensors[name].tolist())
        paths = [*spots(json.loads(text)), ("nested_offset",), ("more",)]
        value = draw(st.sampled_from([*WEIRD, 2**100, 128, "nf4"]))
        text = replaced(text, draw(st.sampled_from(paths)), value, draw(st.booleans()))
        tensor = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    elif kind == "dtype":
        tensor = tensor.to(draw(st.sampled_from(TORCH_DTYPES)))
    elif kind == "shape":
        flat = tensor.flatten()
        turned = tensor.mT if tensor.dim() > 1 else flat[:, None]
        tensor = draw(st.sampled_from([flat[:-1], flat[:0], flat, tensor[None], turned]))
    elif kind == "number" and tensor.is_floating_point():
        numbers = [math.nan, math.inf, -math.inf, -1.0, 3e38, 0.0, -0.0]
        tensor.flatten()[-1] = draw(st.sampled_from(numbers))
    elif kind == "zero":
        tensor.zero_()
    tensors[name] = tensor.contiguous()
    if kind == "missing":
        del tensors[name]
    elif kind == "extra":
        names = ["x", "lm_head.weight", name + ".absmax", name + bnb_4bit.STATE + "fp4"]
        tensors[draw(st.sampled_from(names))] = tensor.clone()
    return save(tensors, json.loads(split(data)[0])["__metadata__"])


@st.composite
def progress_damage(draw: st.DrawFn, data: bytes) -> bytes:
    """Changes the JSON in the header of a run's state."""
    header, rest = split(data)
    entries = json.loads(header)
    progress = entries["__metadata__"]["state"].encode()
    entries["__metadata__"]["state"] = draw(json_damage(progress)).decode(errors="replace")
    return assemble(json.dumps(entries).encode(), rest)


@dataclass(repr=False)
class Case:
    """A folder with one damaged file: `new` replaces its bytes from `start` to `end`."""

    kind: str
    file: str
    damage: str
    start: int
    end: int
    new: bytes

    def __repr__(self) -> str:
        where = f"{self.kind!r}, {self.file!r}, {self.damage!r}, {self.start}, {self.end}"
        return f"Case({where}, {self.new[:300]!r})"

    def _repr_pretty_(self, printer: object, cycle: bool) -> None:
        printer.text(repr(self))

    def contents(self) -> Contents:
        old = undamaged(self.kind)[self.file]
        return undamaged(self.kind) | {self.file: old[: self.start] + self.new + old[self.end :]}


@st.composite
def cases(draw: st.DrawFn, kinds: list[str]) -> Case:
    kind = draw(st.sampled_from(kinds))
    file = draw(st.sampled_from(sorted(undamaged(kind))))
    old = undamaged(kind)[file]
    damages = (
        {"raw": raw_damage, "JSON": json_damage}
        if file.endswith("json")
        else {"raw": raw_damage, "header": header_damage, "tensor": tensor_damage}
    )
    damages |= {"progress": progress_damage} if kind == "state" else {}
    damage = draw(st.sampled_from(sorted(damages)))
    new = draw(damages[damage](old))
    start = len(os.path.commonprefix([old, new]))
    tail = len(os.path.commonprefix([old[start:][::-1], new[start:][::-1]]))
    return Case(kind, file, damage, start, len(old) - tail, new[start : len(new) - tail])


@given(cases(MODELS))
def test_a_damaged_model_is_loaded_bit_for_bit_or_refused_by_name(case: Case) -> None:
    outcome(case.kind, case.contents(), case.damage)


@given(cases(ADAPTERS))
def test_a_damaged_adapter_is_loaded_bit_for_bit_or_refused_by_name_and_changes_nothing(
    case: Case,
) -> None:
    outcome(case.kind, case.contents(), case.damage)


class Trap:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


def with_code(folder: Path) -> None:
    """Requests code of the folder in every way that transformers knows."""
    config = json.loads((folder / "config.json").read_text())
    names = {
        "AutoConfig": "trap.Config",
        "AutoModelForCausalLM": "trap.Model",
        "AutoTokenizer": ["trap.Slow", "trap.Fast"],
    }
    config |= {
        "auto_map": names,
        "model_type": "trap",
        "custom_pipelines": {"x": {"impl": "trap.Pipe"}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name in (
        "trap",
        "modeling_llama",
        "configuration_llama",
        "custom_generate/generate",
        "__init__",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(f"open({str(folder / 'mark')!r}, 'w')")


def in_place_of(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return prepare


def shard_at(
    place: object, make: Callable[[Path], object] = lambda folder: None
) -> Callable[[Path], None]:
    """Makes the index place the first shard elsewhere; a copy of it is outside the folder."""

    def prepare(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        part = min(index["weight_map"].values())
        shutil.copy(folder / part, folder.parent / "outside.safetensors")
        make(folder)
        where = str(folder.parent / "outside.safetensors") if place == "absolute" else place
        index["weight_map"] = {
            key: where if its == part else its for key, its in index["weight_map"].items()
        }
        (folder / INDEX).write_text(json.dumps(index))

    return prepare


def sparse(path: Path) -> None:
    """Creates a file of a hundred gigabytes that takes no disk space."""
    path.write_bytes(b"{")
    os.truncate(path, 10**11)


W = "model.safetensors"
NORM = "model.norm.weight"
A = "adapter_model.safetensors"
# What takes the place of a file: the kind of folder, how to create it, the error message.
ODDITIES: dict[str, tuple] = {
    **{
        f"{name} is {what}": (
            "adapter for a dense model" if name.startswith("adapter") else "nested",
            in_place_of(name, make),
            "there is no .*" + re.escape(name),
        )
        for name in (W, "config.json", A, "adapter_config.json")
        for what, make in {
            "a pipe": os.mkfifo,
            "a folder": Path.mkdir,
            "endless": lambda path: path.symlink_to("/dev/zero"),
            "itself": lambda path: path.symlink_to(path.name),
            "gone": lambda path: None,
        }.items()
    },
    **{
        f"{name} is a hundred gigabytes": (
            kind,
            in_place_of(name, sparse),
            re.escape(name) + complaint,
        )
        for name, kind, complaint in (
            (W, "nested", " is damaged"),
            ("config.json", "nested", " has 100000000000 bytes"),
            ("generation_config.json", "nested", ".* has 100000000000 bytes"),
            (INDEX, "shards", " has 100000000000 bytes"),
            (A, "adapter for a dense model", " is damaged"),
        )
    },
    **{
        f"a part at {place!r:.30}": (
            "shards",
            shard_at(place),
            "index.json: .* is not a file of this folder|there is no|is damaged|weight_map",
        )
        for place in (
            "../outside.safetensors",
            "absolute",
            "x/../../outside.safetensors",
            "..",
            ".",
            "",
            "\0",
            "a" * 300,
            "\ud800",
            "/dev/zero",
            "config.json",
            "nowhere.safetensors",
            None,
            3,
            ["x"],
            "./config.json",
        )
    },
    "a pickle": (
        "nested",
        lambda folder: (
            (folder / W)
            .rename(folder / "pytorch_model.bin")
            .write_bytes(pickle.dumps(Trap(folder / "mark")))
        ),
        "pytorch_model.bin is a pickle",
    ),
    "a pickle named safetensors": (
        "nested",
        lambda folder: (folder / W).write_bytes(pickle.dumps(Trap(folder / "mark"))),
        "is damaged",
    ),
    "an adapter's pickle": (
        "adapter for a dense model",
        lambda folder: (
            (folder / A)
            .rename(folder / "adapter_model.bin")
            .write_bytes(pickle.dumps(Trap(folder / "mark")))
        ),
        "adapter_model.bin is a pickle",
    ),
    "code": ("nested", with_code, "describes no causal language model"),
}


@pytest.mark.parametrize("oddity", ODDITIES)
def test_anything_in_the_place_of_a_file_is_refused_by_name_and_never_run(oddity: str) -> None:
    kind, prepare, complaint = ODDITIES[oddity]
    assert re.search(complaint, outcome(kind, undamaged(kind), "oddity", prepare), re.DOTALL)


CONFIGS = {
    "num_hidden_layers": 10**9,
    "vocab_size": 10**12,
    "hidden_size": 10**12,
    "intermediate_size": 10**12,
    "head_dim": 10**12,
    "num_attention_heads": 10**12,
    "num_key_value_heads": 0,
    "attn_implementation": "kernels-community/flash-attn",
    "layer_types": ["full_attention"] * 10**5,
    "num_labels": 10**9,
    "quantization_config": [[[]]],
    "rope_parameters": {"rope_theta": []},
}
ENDLESS = {
    "xlstm": "num_blocks",
    "git": "num_image_with_embedding",
    "diffllama": "head_dim",
    "hrm_text": "H_cycles",
}


@pytest.mark.parametrize(
    "entries",
    [{key: value} for key, value in CONFIGS.items()]
    + [{"model_type": name, key: 3 * 10**7} for name, key in ENDLESS.items()],
    ids=lambda entries: str(entries)[:50],
)
def test_a_config_that_asks_for_endless_work_is_refused_at_once(entries: dict) -> None:
    contents = undamaged("nested")
    config = json.dumps(json.loads(contents["config.json"]) | entries).encode()
    assert outcome("nested", contents | {"config.json": config}, "config")


ADAPTER_CONFIGS = [
    ("r", 10**12),
    ("r", True),
    ("r", "DIGITS"),
    ("lora_alpha", 10**400),
    ("lora_alpha", 1e308),
    ("lora_alpha", math.nan),
    ("rank_pattern", {"a{99999999999}": 2}),
    ("rank_pattern", {"[[a]": 2}),
    ("rank_pattern", {"(a*)*": 2}),
    ("rank_pattern", {f"{i}": 2 for i in range(50_000)}),
    ("alpha_pattern", {f".*.*{i}.*$x": 2 for i in range(3000)}),
    ("alpha_pattern", "DEEP"),
    ("modules_to_save", "DEEP"),
    ("bias", "DEEPER"),
    ("base_model_name_or_path", ["x" * 2**20]),
]


@pytest.mark.parametrize("key, value", ADAPTER_CONFIGS, ids=lambda each: str(each)[:30])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_hostile_adapter_config_is_refused_at_once(kind: str, key: str, value: object) -> None:
    name = "adapter_config.json"
    config = replaced(undamaged(kind)[name], (key,), value)
    assert name in outcome(kind, undamaged(kind) | {name: config}, "config")


Q = "model.layers.0.self_attn.q_proj.weight"
STATE = Q + bnb_4bit.STATE + "nf4"
TENSORS = {  # the name of a tensor, its replacement, the error message
    "a number that says how long": (STATE, torch.tensor(10**12), r"it is torch.int64 \(\)"),
    "a state of 32 MB": (
        STATE,
        torch.zeros(2**25, dtype=torch.uint8),
        r"it is torch.uint8 \(33554432,\)",
    ),
    "bytes as truths, which a copy makes 0 or 1": (
        Q,
        torch.ones(512, 1, dtype=torch.bool),
        "must be one of .* torch.bool",
    ),
    "float8": (
        NORM,
        torch.ones(32).to(torch.float8_e5m2),
        r"norm.weight is \(32,\), torch.float8_e5m2, and must be",
    ),
    "a head of another dtype": (
        "lm_head.weight",
        torch.zeros(64, 32).to(torch.float8_e4m3fn),
        "lm_head.weight and .* differ",
    ),
    "a head in 4 bits": (
        "lm_head.weight",
        None,
        "lm_head.weight or .* is in 4 bits, and .* ties them",
    ),
    "nothing of 2**62": (NORM, torch.zeros(0, 2**62), r"norm.weight is \(0, 4611686018427387904\)"),
    "a stranger": ("\n" + "x" * 10**6, torch.zeros(1), "belongs to nothing"),
}


@pytest.mark.parametrize("what", TENSORS)
def test_a_tensor_that_is_something_else_is_refused_by_name(what: str) -> None:
    name, tensor, complaint = TENSORS[what]
    tensors = load(undamaged("nested")[W])
    if tensor is None:
        head = lora.FrozenWeight(dense().lm_head.weight.detach())
        tensors |= bnb_4bit.pack(head, "lm_head.weight")
    else:
        tensors[name] = tensor
    contents = undamaged("nested") | {W: save(tensors, {"format": "pt"})}
    assert re.search(complaint, outcome("nested", contents, "tensor"))


@pytest.mark.parametrize("shape", [[2**63, 0], [0, 2**64 - 1], [2**62, 4], [2**44]])
@pytest.mark.parametrize("kind, file", [("nested", W), ("adapter for a dense model", A)])
def test_a_header_that_promises_more_than_there_is_or_can_be_is_damaged(
    kind: str, file: str, shape: list[int]
) -> None:
    header, rest = split(undamaged(kind)[file])
    entries = json.loads(header)
    entries["x"] = {"dtype": "U8", "shape": shape, "data_offsets": [len(rest), len(rest)]}
    data = assemble(json.dumps(entries).encode(), rest)
    assert f"{file} is damaged" in outcome(kind, undamaged(kind) | {file: data}, "header")


def state_of(model: nn.Module, optimizer: PagedAdamW) -> dict[str, tuple[list[int], bytes]]:
    """The contents of a state, by the names in its file."""
    tensors = {
        f"adapter.{name}": parameter
        for name, parameter in peft_adapter.adapter_tensors(model).items()
    }
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": tensor for key, tensor in moments.items()}
    return {name: raw(tensor) for name, tensor in tensors.items()}


@contextmanager
def sealed() -> Iterator[None]:
    """Makes every checksum valid, as an attacker would (test_state.py tests damaged ones)."""
    checksum = state.checksum
    state.checksum = lambda tensors, progress: SEAL
    try:
        yield
    finally:
        state.checksum = checksum


def resumed(data: bytes, damage: str) -> str:
    """Returns the error message, or "" if a run can resume from these bytes; else fails."""
    said = ""
    model = copy.deepcopy(adapted())
    optimizer = stepped(model)
    before = snapshot(model)
    held = state_of(model, optimizer)
    with tempfile.TemporaryDirectory() as name, in_time(), sealed():
        path = Path(name) / "state"
        path.write_bytes(data)
        try:
            saved = state.read_state(path)
            state.require_same_settings(saved, {"lr": "1"}, anyway=False)
            state.load_state(model, optimizer, saved)
        except ValueError as error:
            said = str(error)
            assert type(error) is ValueError and str(path) in said, repr(error)
            assert snapshot(model) == before, "a refused state has changed something"
            assert state_of(model, optimizer) == held, "a refused state has changed something"
        else:
            assert type(saved.step) is int and saved.step >= 0
            ours = state_of(model, optimizer)
            theirs = load(data)
            theirs = {
                name: tensor.float() if tensor.is_floating_point() else tensor
                for name, tensor in theirs.items()
            }
            assert ours == {name: raw(tensor) for name, tensor in theirs.items()}
            assert all(tensor.isfinite().all() for tensor in theirs.values())
            stepped(model, optimizer)
    COUNTS[f"state, {damage}", "refused" if said else "loaded"] += 1
    return said


def saved_state(**entries: object) -> bytes:
    """The file of a run's state, with other entries than usual."""
    model = copy.deepcopy(adapted())
    usual = {"settings": {"lr": "1"}, "step": 1, "before": [0.5, None]}
    with tempfile.TemporaryDirectory() as name, sealed():
        path = Path(name) / "state"
        tensors = state.state_tensors(model, stepped(model))
        state.write_state(tensors, **(usual | entries), path=path)
        return path.read_bytes()


def state_with(**entries: object) -> Case:
    """The state of a run with an entry that cannot be."""
    return Case("state", "state.safetensors", "progress", 0, 10**9, saved_state(**entries))


@given(cases(["state"]))
@example(state_with(step=None))
@example(state_with(step=10**400))
@example(state_with(settings=["lr"]))
@example(state_with(before="no"))
def test_a_damaged_state_of_a_run_is_taken_or_refused_by_name_and_changes_nothing(
    case: Case,
) -> None:
    resumed(case.contents()["state.safetensors"], case.damage)


@pytest.mark.parametrize(
    "kind, number", [(ADAPTERS[0], None), (ADAPTERS[0], 1e300), (ADAPTERS[1], 1e300)]
)
def test_an_adapter_of_nothing_or_of_numbers_beyond_float32_is_refused(
    kind: str, number: float | None
) -> None:
    tensors = {}
    if number is not None:
        tensors = {name: tensor.double() for name, tensor in load(undamaged(kind)[A]).items()}
    for tensor in tensors.values():
        tensor[0, 0] = number
    assert outcome(kind, undamaged(kind) | {A: save(tensors, {"format": "pt"})}, "tensor")


@pytest.mark.parametrize("kind", ["nested", "plain", *ADAPTERS])
def test_a_bit_of_a_number_is_another_number_and_a_byte_less_is_refused(kind: str) -> None:
    """The laws above are not empty: some damage cannot be detected, and some must be."""
    name = A if kind in ADAPTERS else "model.safetensors"
    data = undamaged(kind)[name]
    first = 8 + int.from_bytes(data[:8], "little")  # the lowest byte of a float32
    flipped = data[:first] + bytes([data[first] ^ 1]) + data[first + 1 :]
    assert not outcome(kind, undamaged(kind) | {name: flipped}, "raw")
    assert outcome(kind, undamaged(kind) | {name: data[:-1]}, "raw")


@pytest.fixture(scope="module", autouse=True)
def counts() -> Iterator[None]:
    """Counts what became of the examples; pytest -s shows it."""
    adapted()(input_ids=torch.arange(5)[None])  # compiles the kernels outside any time limit
    yield
    for damage in sorted({damage for damage, _ in COUNTS}):
        print(f"{damage}: {COUNTS[damage, 'loaded']} loaded, {COUNTS[damage, 'refused']} refused")
