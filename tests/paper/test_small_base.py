"""The small model of the scripts: its answers, its grade, its adapters."""

import random
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from data.chat_template import IGNORE_INDEX
from helpers.models import save_tiny_llama
from lora import QLoRALinear, names_of
from paper import dataset_quality, orders, small_base, small_llama
from paper.experiment import Setting
from training.loss_and_eval import generate_answers


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> small_base.Base:
    folder = save_tiny_llama(tmp_path_factory.mktemp("tiny"))
    return small_base.Base(Setting(folder, torch.device("cpu"), range(2), True))


def pairs(count: int) -> list[tuple[str, str]]:
    rng = random.Random(0)
    return [orders.extraction(rng, "German") for _ in range(count)]


def test_a_model_is_made_once_and_a_half_written_one_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_llama, "MODELS", tmp_path)
    made = []

    def make() -> tuple[torch.nn.Module, PreTrainedTokenizerFast]:
        made.append(1)
        return small_llama.small_llama(64, 32, 32, layers=1, key_value_heads=2), own

    own = small_base.tokenizer()
    (tmp_path / "tiny").mkdir()  # as an interrupted run would leave it
    assert small_llama.cached("tiny", make) == small_llama.cached("tiny", make)
    assert made == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_no_word_of_the_orders_is_unknown_to_the_small_tokenizer() -> None:
    rng = random.Random(1)
    own = small_base.tokenizer()
    for language in orders.LANGUAGES:
        for phrasings in ("phrasings", "unseen"):
            found = [orders.extraction(rng, language, phrasings) for _ in range(100)]
            for example in small_base.encode(own, found):
                assert own.unk_token_id not in example.ids


def test_only_the_answer_and_its_end_are_in_the_loss() -> None:
    [example] = small_base.encode(small_base.tokenizer(), [("Sam wants wine", "name Sam")])
    words = small_base.tokenizer().convert_ids_to_tokens(example.ids)
    in_loss = [word for word, label in zip(words, example.labels) if label != IGNORE_INDEX]
    assert in_loss == ["name", "Sam", "<|end|>"]


def test_exact_match_counts_the_answers_that_greedy_generation_gives(
    base: small_base.Base,
) -> None:
    model = base.dense()
    examples = base.encode(pairs(4))
    small_base.train(model, examples[:2], 60, lr=1e-2, seed=0, batch_size=2)  # two of the four
    prompts = [example.ids[: example.n_prompt] for example in examples]
    texts = generate_answers(model, base.tokenizer, prompts, 60, torch.float32)
    right = [text == example.answer for text, example in zip(texts, examples)]
    assert small_base.exact_match(model, examples) == 100 * sum(right) / 4
    assert any(right) and not all(right)


@pytest.mark.parametrize("start", ["default", "pissa", "loftq"])
def test_every_layer_is_quantized_and_adapters_alone_are_trained(
    base: small_base.Base, start: str
) -> None:
    model = base.adapted(0, start=start, r=2)
    layers = names_of(model, QLoRALinear)
    assert len(layers) == 14 and all(layer.base.codebook is not None for layer in layers)
    assert len(small_base.trainable(model)) == 2 * len(layers)


def test_layers_that_are_not_targets_are_quantized_without_an_adapter(
    base: small_base.Base,
) -> None:
    layers = names_of(base.adapted(0, targets=["q_proj", "v_proj"], r=2), QLoRALinear)
    assert sorted(layer.r for layer in layers) == [0] * 10 + [2] * 4


def test_copies_do_not_share_weights(base: small_base.Base) -> None:
    small_base.train(base.dense(), base.encode(pairs(2)), 1, lr=1.0, seed=0, batch_size=2)
    before, after = base.weights.state_dict(), base.dense().state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", dataset_quality.KINDS)
def test_as_many_answers_are_wrong_as_asked_for(kind: str) -> None:
    rng = random.Random(0)
    found = [orders.random_order(rng, "English", "phrasings") for _ in range(40)]
    right = dataset_quality.spoil(found, kind, 0.0, rng)
    spoiled = dataset_quality.spoil(found, kind, 0.25, rng)
    assert sum(a != b for a, b in zip(right, spoiled)) == 10
