"""The three bases: the same function after a rotation, and weights that come back."""

import pytest
import torch

from checkpoints import sources
from helpers.bounds import A_TENTH, OF_A_ROTATED_MODEL
from helpers.models import tiny_llama, tokenizer
from paper import bases
from paper.experiment import Setting

IDS = torch.arange(64).reshape(2, 32) * 7


def with_gains() -> torch.nn.Module:
    """A tiny model in float64 whose norms have gains, as after training."""
    model = tiny_llama(torch.float64, vocab_size=512).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.5, 2, generator=generator)
    return model


@torch.no_grad()
def test_a_rotation_changes_the_weights_and_not_the_function() -> None:
    model = with_gains()
    expected = model(IDS).logits
    before = {name: layer.weight.clone() for name, layer in bases.linear_layers(model).items()}
    for seed in (0, 1):  # the second one rotates again
        bases.rotate(model, seed)
        error = (model(IDS).logits - expected).abs()
        assert (error <= OF_A_ROTATED_MODEL * (1 + expected.abs())).all()
        for name, layer in bases.linear_layers(model).items():
            difference = (layer.weight - before[name]).norm()
            assert difference > A_TENTH * before[name].norm()


def test_a_rotation_unties_the_head_whose_gains_it_takes() -> None:
    model = bases.rotate(with_gains(), seed=0)
    assert not model.config.tie_word_embeddings
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_a_model_that_a_rotation_would_change_is_refused() -> None:
    model = tiny_llama(vocab_size=512)
    layer = model.model.layers[0].self_attn.o_proj
    layer.bias = torch.nn.Parameter(torch.ones(64))
    with pytest.raises(ValueError, match="without biases can be rotated, got llama with biases"):
        bases.rotate(model, seed=0)


def test_changed_weights_come_back_also_after_an_error() -> None:
    model = tiny_llama(vocab_size=512).requires_grad_(False)
    before = bases.losses(model, IDS)
    try:
        with bases.changed(model, torch.zeros_like):
            assert bases.losses(model, IDS) != before
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert bases.losses(model, IDS) == before
    assert len(bases.linear_layers(model)) == 14  # all but the head


def test_the_loss_of_a_window_is_that_of_transformers() -> None:
    model = tiny_llama(vocab_size=512)
    for ids, loss in zip(IDS, bases.losses(model, IDS)):
        expected = model(ids[None], labels=ids[None]).loss.item()
        assert abs(loss - expected) < 2**-20 * expected  # float32, summed in another order


def test_no_document_is_both_learned_and_held_out() -> None:
    learned, held_out = bases.documents()
    assert not {*learned} & {*held_out}
    assert len(learned) // len(held_out) in (8, 9)


def test_windows_are_spread_over_the_text() -> None:
    text = ["word " * 3000, "end " * 1000]
    every = bases.windows_of(text, tokenizer(), None)
    some = bases.windows_of(text, tokenizer(), 2)
    assert every.shape[1] == some.shape[1] == bases.LENGTH
    assert torch.equal(some, every[[0, -1]])


def test_each_rotation_is_measured_on_its_own_windows() -> None:
    setting = Setting(sources.default_folder(), torch.device("cpu"), seeds=range(7, 9), quick=True)
    found = list(bases.bases(setting, n_windows=4))
    names = [base.name for base in found]
    assert names == [bases.AS_GIVEN, bases.ROTATED, bases.ROTATED, bases.TRAINED_HERE]
    whole, first, second = (base.windows for base in found[:3])
    assert torch.equal(whole[0::2], first) and torch.equal(whole[1::2], second)
