"""The three bases on which codes are compared, and the text that measures them.

as given       the model of --model. SmolLM2 comes from a file of 4-bit weights, so each 32 weights
               of a row lie on 16 equally spaced points: a lattice that suits some codes by chance.
rotated        the same function without the lattice. With an orthogonal matrix R, the vectors x
               between the layers become x R. RMSNorm commutes with R once its gains g are part of
               the next matrix, so a matrix that reads x becomes W diag(g) R, one that adds to x
               becomes R^T W, and embedding and head are rotated too (and no longer equal). It also
               mixes the weights of a row, which makes them more nearly normal. And it mixes large
               channels with small ones, so an error of the same size costs more loss than as given:
               compare codes on one base, not bases.
trained here   a small Llama that learns the documentation of Python in float32, and was never
               quantized. It is cached in models/.

The text is the documentation that comes with Python: the topics of help() and the docstrings of
the standard library. Every tenth document is held out, and all three bases are measured on those.
Differs from the paper, which measures perplexity of larger models on Common Crawl.
"""

import ast
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from memory.formula import KNOWN_MODELS
from paper.experiment import Setting
from paper.small_llama import cached, small_llama

AS_GIVEN = "as given"
ROTATED = "rotated"
TRAINED_HERE = "trained here"
VOCABULARY = 1024
LENGTH = 256  # tokens of a window
BATCH = 2
LR = 3e-3


class Base(NamedTuple):
    name: str
    model: PreTrainedModel  # in float32, not trained further
    windows: Tensor  # token ids (n, LENGTH) of held-out text


@cache
def documents(quick: bool = False) -> tuple[list[str], list[str]]:
    """Python's documentation: documents to train on, and every tenth one held out.

    quick: without the docstrings.
    """
    found = list(topics.values())
    library = Path("nowhere") if quick else Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.glob("*.py")) + sorted(library.glob("[a-z]*/*.py")):
        folder = path.relative_to(library).parts[0]
        if folder not in ("site-packages", "dist-packages", "test", "idlelib"):
            found.append("\n\n".join(docstrings(path)))
    found = [text for text in found if len(text) > 500]
    return [text for i, text in enumerate(found) if i % 10], found[::10]


def docstrings(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:  # a file for another version of Python
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return [text for text in texts if text]


def windows_of(texts: list[str], tokenizer: PreTrainedTokenizerBase, count: int | None) -> Tensor:
    """Token ids (n, LENGTH) of the joined texts: all windows, or `count` spread over them."""
    ids = torch.tensor(tokenizer("\n\n".join(texts), verbose=False).input_ids)
    windows = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
    if count is None:
        return windows
    return windows[torch.linspace(0, len(windows) - 1, min(count, len(windows))).long()]


def bases(setting: Setting, n_windows: int) -> Iterator[Base]:
    """The three bases, one at a time; the second as `seeds` rotations, which share the windows.

    The rotations are made in place. The last base is small, so it gets eight times as many windows.
    A quick run takes the model's first four layers alone, and the beginning of each window.
    """
    text = documents(setting.quick)[1]
    model, tokenizer = load(setting.model, setting.device)
    if setting.quick:
        model.model.layers = model.model.layers[:4]
    length = LENGTH // 4 if setting.quick else LENGTH
    n_windows = max(n_windows, len(setting.seeds))  # at least one for each rotation
    windows = windows_of(text, tokenizer, n_windows)[:, :length].to(setting.device)
    yield Base(AS_GIVEN, model, windows)
    for turn, seed in enumerate(setting.seeds):
        yield Base(ROTATED, rotate(model, seed), windows[turn :: len(setting.seeds)])
    model, tokenizer = load(trained_here(setting), setting.device)
    windows = windows_of(text, tokenizer, 8 * n_windows)[:, :length].to(setting.device)
    yield Base(TRAINED_HERE, model, windows)


def load(folder: Path, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in float32 with its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    return model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def rotate(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Rotate the residual stream of a Llama in place by a random orthogonal matrix.

    Raises: ValueError for another architecture, and for linear layers with a bias.
    """
    biased = [name for name, layer in linear_layers(model).items() if layer.bias is not None]
    if model.config.model_type not in KNOWN_MODELS or biased:
        raise ValueError(
            f"only a model of type {' or '.join(KNOWN_MODELS)} without biases can be rotated, got "
            f"{model.config.model_type}{' with biases' if biased else ''}: give another --model"
        )
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
    generator = torch.Generator().manual_seed(seed)
    hidden = embedding.weight.shape[1]
    rotation = torch.linalg.qr(torch.randn(hidden, hidden, generator=generator).double())[0]
    rotation = rotation.to(embedding.weight)

    def rotate_reader(linear: nn.Linear, norm: nn.Module) -> None:
        linear.weight.copy_((linear.weight * norm.weight) @ rotation)

    embedding.weight.copy_(embedding.weight @ rotation)
    for layer in model.model.layers:
        attention = layer.self_attn
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            rotate_reader(linear, layer.input_layernorm)
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            rotate_reader(linear, layer.post_attention_layernorm)
        for linear in (attention.o_proj, layer.mlp.down_proj):
            linear.weight.copy_(rotation.T @ linear.weight)
        layer.input_layernorm.weight.fill_(1)
        layer.post_attention_layernorm.weight.fill_(1)
    rotate_reader(head, model.model.norm)
    model.model.norm.weight.fill_(1)
    return model


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The layers that QLoRA quantizes: every nn.Linear but the output head."""
    head = model.get_output_embeddings()
    modules = model.named_modules()
    return {name: m for name, m in modules if isinstance(m, nn.Linear) and m is not head}


@contextmanager
def changed(model: PreTrainedModel, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replaces each weight of a linear layer by change(weight), until the block ends."""
    layers = linear_layers(model).values()
    before = [layer.weight for layer in layers]
    for layer in layers:
        layer.weight = nn.Parameter(change(layer.weight.detach()), requires_grad=False)
    try:
        yield
    finally:
        for layer, weight in zip(layers, before):
            layer.weight = weight


@torch.no_grad()
def losses(model: PreTrainedModel, windows: Tensor) -> list[float]:
    """The cross entropy of each window: nats per token."""
    result = []
    for ids in windows.split(4):
        logits = model(ids, use_cache=False).logits[:, :-1].float()  # (B, T - 1, V)
        labels = ids[:, 1:].flatten()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="none")
        result += loss.view(len(ids), -1).mean(1).tolist()
    return result


def trained_here(setting: Setting) -> Path:
    """The folder of the small Llama; the first call trains it."""
    steps = 5 if setting.quick else 1600
    version = f"{sys.version_info.major}.{sys.version_info.minor}"

    def make() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        text = documents(setting.quick)[0]
        tokenizer = learn_tokenizer(text)
        return train(windows_of(text, tokenizer, None), steps, setting.device), tokenizer

    return cached(f"trained-here-{steps}-python-{version}", make)


def learn_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, and of pairs that are frequent in the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", bos_token="<end>"
    )


def train(windows: Tensor, steps: int, device: torch.device) -> PreTrainedModel:
    """Train a Llama of three million weights in its linear layers, in float32.

    AdamW, with a warm-up and then a linear decay to zero.
    """
    torch.manual_seed(0)
    model = small_llama(VOCABULARY, 256, mlp_width=704, layers=4, key_value_heads=2)
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (steps / 20), (steps - step) / steps)
    )
    for _ in range(steps):
        ids = windows[torch.randint(len(windows), (BATCH,))].to(device)
        model(ids, labels=ids).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()
