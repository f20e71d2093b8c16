"""Packed examples: each occurs once, and its logits do not depend on the others."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from data import dataset, packing
from helpers import bounds, models
from helpers.bounds import Bounded
from helpers.mutants import mutated
from training import loss_and_eval

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=30)
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
}


def examples_of(lengths: list[int]) -> list[dataset.Example]:
    """Examples of these lengths; no token occurs twice; the second half of each is in the loss."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    found = [list(range(start, start + n)) for start, n in zip(starts, lengths)]
    return [
        dataset.Example(ids, [dataset.IGNORE_INDEX] * (len(ids) // 2) + ids[len(ids) // 2 :])
        for ids in found
    ]


def documents(batch: dataset.Batch) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of each document, sorted, as the position ids separate them; no padding."""
    found = []
    for row in range(len(batch.input_ids)):
        n = int(batch.attention_mask[row].sum())
        places = [0] * n if batch.position_ids is None else batch.position_ids[row].tolist()[:n]
        for place, token, label in zip(
            places, batch.input_ids[row].tolist(), batch.labels[row].tolist()
        ):
            if place == 0 and (batch.position_ids is not None or not found or found[-1][2] != row):
                found.append(([], [], row))
            found[-1][0].append(token)
            found[-1][1].append(label)
            assert batch.position_ids is None or place == len(found[-1][0]) - 1
    return sorted((ids, labels) for ids, labels, _ in found)


def check_pack(lengths: list[int], module: ModuleType = packing) -> None:
    """Nothing is lost, nothing is too long, and no document's first token is a label."""
    examples = examples_of(lengths)
    packs = module.pack(examples, 12)
    assert max(len(pack.ids) for pack in packs) <= 12
    batch = dataset.collate(packs, pad_id=0)
    assert documents(batch) == sorted(
        (e.ids, [dataset.IGNORE_INDEX, *e.labels[1:]]) for e in examples
    )
    # Best fit opens a new pack only if no pack has room, so no two packs would fit into one.
    sizes = sorted(len(pack.ids) for pack in packs)
    assert len(packs) < 2 or sizes[0] + sizes[1] > 12


@given(LENGTHS)
def test_each_example_is_complete_in_one_sequence_and_no_two_sequences_fit_into_one(
    lengths: list[int],
) -> None:
    check_pack(lengths)


def test_the_longest_examples_are_packed_first_and_each_where_it_fits_best() -> None:
    packs = packing.pack(examples_of([4, 6, 8, 3, 3]), 12)
    assert [
        [b - a for a, b in zip(pack.starts, [*pack.starts[1:], len(pack.ids)])] for pack in packs
    ] == [[8, 4], [6, 3, 3]]
    with pytest.raises(
        ValueError, match="an example of 13 tokens does not fit into a sequence of 12"
    ):
        packing.pack(examples_of([13]), 12)


def small(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    more = {} if kind in ("bloom", "opt", "gpt2") else {"sliding_window": 5}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **more)).eval()


@pytest.mark.parametrize(
    "kind", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3"]
)
def test_no_bit_of_a_document_depends_on_its_neighbours(kind: str) -> None:
    packing.check(small(kind))


@pytest.mark.parametrize("kind", ["bloom", "opt"])
def test_a_model_that_mixes_documents_is_refused_by_name(kind: str) -> None:
    model = small(kind)
    with pytest.raises(
        ValueError,
        match=f"^--packing does not work with {type(model).__name__}: a document would see",
    ):
        packing.check(model)


class Rotations(torch.nn.Module):
    """Cosines and sines from a table, so that equal position ids give equal numbers."""

    def __init__(self, inv_freq: Tensor) -> None:
        super().__init__()
        angles = torch.arange(64)[:, None] * inv_freq.double().repeat(2)  # (places, head_dim)
        self.cos = angles.cos()
        self.sin = angles.sin()

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.cos[position_ids], self.sin[position_ids]


def llama(model: LlamaForCausalLM, ids: list[int]) -> Bounded:
    """The logits of one document, (T, vocabulary), by the formulas, with an error bound."""
    config = model.config
    weights = model.state_dict()
    dtype = torch.float64
    rotations = model.model.rotary_emb(None, torch.arange(len(ids)))
    heads = config.num_attention_heads
    per_group = config.num_attention_heads // config.num_key_value_heads
    width, eps = config.head_dim, config.rms_norm_eps
    unseen = torch.full((len(ids), len(ids)), -torch.inf, dtype=torch.float64).triu(1)

    def linear(x: Bounded, name: str) -> Bounded:
        return x.matmul(Bounded.exact(weights[name]).T, dtype)

    def head(x: Bounded, number: int) -> Bounded:
        part = slice(number * width, (number + 1) * width)
        return Bounded(x.value[:, part], x.error[:, part])

    def attention(q: Bounded, k: Bounded, v: Bounded) -> Bounded:
        q, k = (bounds.rotated(x, *rotations, dtype) for x in (q, k))
        scores = q.matmul(k.T, dtype).times(width**-0.5, dtype)
        return bounds.softmax(Bounded(scores.value + unseen, scores.error), dtype).matmul(v, dtype)

    x = Bounded.exact(weights["model.embed_tokens.weight"][ids])
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}."
        normed = bounds.rms_norm(x, weights[name + "input_layernorm.weight"], eps, dtype)
        q, k, v = (linear(normed, f"{name}self_attn.{letter}_proj.weight") for letter in "qkv")
        mixed = [
            attention(head(q, i), head(k, i // per_group), head(v, i // per_group))
            for i in range(heads)
        ]
        mixed = Bounded(
            torch.cat([m.value for m in mixed], 1), torch.cat([m.error for m in mixed], 1)
        )
        x = x.plus(linear(mixed, name + "self_attn.o_proj.weight"), dtype)
        normed = bounds.rms_norm(x, weights[name + "post_attention_layernorm.weight"], eps, dtype)
        gate = bounds.silu(linear(normed, name + "mlp.gate_proj.weight"), dtype)
        gated = bounds.product(gate, linear(normed, name + "mlp.up_proj.weight"), dtype)
        x = x.plus(linear(gated, name + "mlp.down_proj.weight"), dtype)
    logits = linear(bounds.rms_norm(x, weights["model.norm.weight"], eps, dtype), "lm_head.weight")
    return bounds.apart(logits, logits)  # twice: the formulas are computed in float64 too


def within(model: LlamaForCausalLM, logits: Tensor, documents: list[list[int]]) -> bool:
    """Whether the logits of a row, (T, vocabulary), are those of each of its documents alone."""
    starts = [sum(map(len, documents[:i])) for i in range(len(documents))]
    return all(
        llama(model, ids).allows(logits[start : start + len(ids)])
        for start, ids in zip(starts, documents)
    )


def exact_llama() -> LlamaForCausalLM:
    """A model in float64 with large weights, so that attention is far from uniform.

    Transformers computes norms and angles in float32, so they are replaced.
    """
    model = models.tiny_llama(torch.float64, vocab_size=256)
    model.model.rotary_emb = Rotations(model.model.rotary_emb.inv_freq)
    for name in [name for name, _ in model.named_modules()]:
        if name.endswith("norm"):
            model.set_submodule(
                name, torch.nn.RMSNorm(64, model.config.rms_norm_eps, dtype=torch.float64)
            )
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data *= 6
    return model


@torch.no_grad()
def test_the_logits_of_a_packed_document_are_those_of_the_document_alone() -> None:
    model = exact_llama()
    documents = [[5, 6, 7, 8, 9, 10, 11], [5, 90, 91], [92], [6, 7, 8, 93]]
    packs = packing.pack([dataset.Example(ids, ids) for ids in documents], 20)
    batch = dataset.collate([*packs, dataset.Example([1, 2], [1, 2])], pad_id=2)
    in_order = sorted(documents, key=len, reverse=True)
    logits = model(**batch.inputs, use_cache=False).logits
    assert within(model, logits[0], in_order)
    assert within(model, logits[1, :2], [[1, 2]])
    assert all(
        llama(model, ids).allows(model(torch.tensor([ids])).logits[0]) for ids in documents
    ), "and the logits of a document alone are right"
    leaking = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    assert not within(model, leaking[0], in_order), (
        "the bound detects a document that attends to its neighbours"
    )
    assert within(model, leaking[0, :7], in_order[:1]), (
        "the first document of a row has none before it"
    )


@torch.no_grad()
def test_the_loss_of_a_pack_is_the_sum_of_the_losses_of_its_documents() -> None:
    model = exact_llama()
    documents = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]]
    examples = [dataset.Example(ids, [dataset.IGNORE_INDEX, *ids[1:]]) for ids in documents]
    alone = [
        loss_and_eval.label_loss(model, dataset.collate([example], 2), torch.float32).item()
        for example in examples
    ]
    batch = dataset.collate(packing.pack(examples, 12), 2)
    assert len(batch.input_ids) == 1 and batch.n_labels == 4 - 1 + 3 - 1 + 5 - 1
    together = loss_and_eval.label_loss(model, batch, torch.float32).item()
    # A loss is log sum exp l - l. A logit has its error twice: once alone and once packed.
    logits = [2 * llama(model, ids).error.amax(1)[:-1] for ids in documents]
    rounding = bounds.gamma(256 + 8 + batch.n_labels, torch.float64) * 2 * sum(alone)
    assert abs(together - sum(alone)) <= sum(2 * error.sum().item() for error in logits) + rounding


def test_the_bounds_of_the_parts_of_a_transformer_are_reached() -> None:
    """By errors of the inputs in the worst direction, far larger than the rounding."""

    def off(x: Tensor, error: float) -> Bounded:
        return Bounded(x, torch.full_like(x, error))

    one = torch.tensor(1.0, dtype=torch.float64)
    many = 10**4
    dtype = torch.float64
    worst = torch.where(torch.arange(many) == 0, one, -one)  # the first up, all others down
    e = 2.0**-20
    assert bounds.is_tight(
        ((e * worst).softmax(-1)[0] - 1 / many), bounds.softmax(off(0 * worst, e), dtype).error[0]
    )
    steepest = 2.4 * one
    rise = (steepest + e) * torch.sigmoid(steepest + e) - steepest * torch.sigmoid(steepest)
    assert bounds.is_tight(rise, bounds.silu(off(steepest, e), dtype).error)
    ones = torch.ones(1, many, dtype=dtype)
    moved = (ones + e * worst) / (ones + e * worst).square().mean().sqrt() - ones
    assert bounds.is_tight(
        moved[0, 0], bounds.rms_norm(off(ones, e), ones[0], 0.0, dtype).error[0, 0]
    )
    eighth = torch.full((1, 2), 0.5**0.5, dtype=dtype)  # cosine and sine of 45 degrees
    assert bounds.is_tight(
        2 * e * 0.5**0.5, bounds.rotated(off(ones[:, :2], e), eighth, eighth, dtype).error
    )


@pytest.mark.parametrize(
    "old, new",
    [
        # One example predicts the next.
        ("labels += [IGNORE_INDEX, *example.labels[1:]]", "labels += example.labels"),
        ("starts.append(len(ids))", "starts.append(0)"),
        ("(room - n, index)", "(room, index)"),
        ("packs[index].append(example)", "packs[-1].append(example)"),
        ("bisect_left(rooms, (n, 0))", "len(rooms)"),
        ("torch.arange(end - start)", "torch.arange(start, end)"),
    ],
)
def test_a_mutant_of_packing_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str
) -> None:
    cases = [[3, 4, 5], [8, 6, 4, 3, 3], [12, 1, 1, 11]]
    for lengths in cases:
        check_pack(lengths)
    mutant = mutated(packing, old, new, tmp_path)
    monkeypatch.setattr(dataset, "packing", mutant)
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        for lengths in cases:
            check_pack(lengths, mutant)
