"""Data sets: what is asked, what is learnt, what is held out, and what is refused."""

import copy
import json
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

import data
import models
import tasks


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return models.tokenizer()


@pytest.mark.parametrize("name", ["orders", "roman"])
@pytest.mark.parametrize("seed", [0, 1])
def test_generated_tasks_are_seeded_and_hold_out_what_they_train_on_nowhere(name: str, seed: int) -> None:
    parts = getattr(tasks, name)(random.Random(seed))
    assert parts == getattr(tasks, name)(random.Random(seed))
    assert parts != getattr(tasks, name)(random.Random(seed + 1))
    prompts = [prompt for part in parts for prompt, _ in part]
    assert len(prompts) == len(set(prompts))
    assert len(parts[1]) == 100


def test_unseen_phrasings_are_no_part_of_training() -> None:
    train, test, unseen = tasks.orders(random.Random(0))
    assert len(tasks.PHRASINGS) >= 12 and len(tasks.UNSEEN_PHRASINGS) == 4 and len(unseen) == 50

    def phrasing_of(prompt: str) -> list[str]:
        sentence = prompt.removeprefix("Extract the order as JSON: ")
        patterns = {p: re.sub(r"\\\{\w+\\\}", "(.+)", re.escape(p)) for p in tasks.PHRASINGS + tasks.UNSEEN_PHRASINGS}
        return [phrasing for phrasing, pattern in patterns.items() if re.fullmatch(pattern, sentence)]

    assert all(set(phrasing_of(prompt)) & set(tasks.PHRASINGS) for prompt, _ in train[:200] + test)
    assert not any(set(phrasing_of(prompt)) & set(tasks.PHRASINGS) for prompt, _ in unseen)


def test_the_answer_to_an_order_is_json_made_of_words_of_the_sentence() -> None:
    for prompt, answer in tasks.orders(random.Random(0))[1]:
        order = json.loads(answer)
        assert list(order) == ["name", "item", "quantity", "city", "day"]
        assert all(str(value) in prompt for value in order.values())


def test_roman_numerals_round_trip() -> None:
    value = {"M": 1000, "D": 500, "C": 100, "L": 50, "X": 10, "V": 5, "I": 1}
    for n in range(1, 2000):
        digits = [value[letter] for letter in tasks.roman_numeral(n)]
        assert n == sum(-a if a < b else a for a, b in zip(digits, [*digits[1:], 0]))


def test_the_answer_and_its_end_are_learnt_and_nothing_else(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = data.load("orders", tokenizer, 256, 0).train[:5]
    batch = data.collate(examples, tokenizer.eos_token_id)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id, "the case that masking by id gets wrong"
    for row, example in enumerate(examples):
        learnt = batch.labels[row] != data.IGNORE
        assert tokenizer.decode(batch.labels[row][learnt]) == example.answer + tokenizer.eos_token
        assert torch.equal(batch.labels[row][learnt], batch.input_ids[row][learnt])
        assert batch.attention_mask[row].sum() == len(example.ids)
        assert not learnt[len(example.ids) :].any() and not learnt[: example.n_prompt].any()
    assert batch.n_labels == sum(len(example.ids) - example.n_prompt for example in examples)


def test_each_example_comes_once_an_epoch_and_steps_need_no_history(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = [data.Example([i, i, i], [i, i, i]) for i in range(12)]

    def seen(step: int, seed: int = 0) -> list[int]:
        return [int(i) for batch in data.batches_of_step(examples, step, 2, 2, seed, 0) for i in batch.input_ids[:, 0]]

    epoch = [i for step in range(3) for i in seen(step)]
    assert sorted(epoch) == list(range(12))
    assert [i for step in range(3, 6) for i in seen(step)] != epoch
    assert seen(1) == epoch[4:8]
    assert seen(0, seed=1) != seen(0)


def test_text_is_cut_into_sequences_that_are_learnt_whole(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("It was a dark and stormy night. " * 200)
    task = data.load(str(path), tokenizer, 64, 0)
    assert task.metric == "perplexity" and len(task.test) == len(task.train + task.test) // 10
    ids = [i for example in task.train + task.test for i in example.ids]
    assert tokenizer.decode(ids).strip() == path.read_text().strip(), "a single token left over would teach nothing"
    batch = data.collate(task.train[:2], 0)
    assert torch.equal(batch.labels, batch.input_ids) and batch.n_labels == 2 * 63, "the first token of each is not predicted"


def test_the_pages_of_help_are_a_data_set(tokenizer: PreTrainedTokenizerBase) -> None:
    task = data.load("text", tokenizer, 256, 0)
    assert task.metric == "perplexity" and len(task.train) > 100
    assert not {tuple(e.ids) for e in task.train} & {tuple(e.ids) for e in task.test}


def test_jsonl_rows_are_questions_and_answers(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "qa.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}?", "completion": f"{i}!"}) + "\n\n" for i in range(20)))
    task = data.load(str(path), tokenizer, 256, 0)
    assert sorted(e.answer for e in task.train + task.test) == sorted(f"{i}!" for i in range(20))
    assert len(task.test) == 2


@pytest.mark.parametrize("text, complaint", [
    ("", "0 sequences"),
    ('{"prompt": "a", "completion": "b"}\n', "1 sequences"),
    ('{"prompt": "a", "completion": "b"}\nnot json\n', ":2: not JSON (Expecting value at column 1)"),
    ('{"prompt": "a"}\n', ":1: its keys are 'prompt'"),
    ('[1]\n', ":1: it is no object, but a int"),
    ('{"prompt": "a", "completion": ""}\n', "completion is empty"),
    ('{"prompt": 1, "completion": "b"}\n', "prompt is a string, not 1"),
])
def test_a_bad_file_is_refused_with_its_line(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(complaint)):
        data.load(str(path), tokenizer, 256, 0)


def test_unknown_data_empty_text_and_long_examples_are_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no-such-data is not a file, nor one of orders, roman, text"):
        data.load("no-such-data", tokenizer, 256, 0)
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.txt is not UTF-8 text .* at byte 2"):
        data.load(str(tmp_path / "latin.txt"), tokenizer, 256, 0)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="0 sequences"):
        data.load(str(tmp_path / "empty.txt"), tokenizer, 256, 0)
    with pytest.raises(ValueError, match="more than --max-seq-len 32"):
        data.load("orders", tokenizer, 32, 0)


def test_a_model_without_a_chat_template_gets_the_bare_question(tokenizer: PreTrainedTokenizerBase) -> None:
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    assert tokenizer.decode(data.chat(plain, "Who?")) == "Who?\n"
    assert tokenizer.decode(data.chat(tokenizer, "Who?")).count("<|im_start|>") == 3, "system, user, and the answer to come"
