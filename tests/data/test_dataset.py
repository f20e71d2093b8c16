"""Data sets: prompts, labels, held-out examples, batches, and refused input."""

import copy
import gzip
import hashlib
import json
import random
import re
import sys
from array import array
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from data import chat_template, dataset, toy_tasks
from helpers import models


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return models.tokenizer()


@pytest.mark.parametrize("name", ["orders", "roman"])
@pytest.mark.parametrize("seed", [0, 1])
def test_generated_tasks_follow_from_the_seed_and_train_on_no_prompt_that_is_held_out(
    name: str, seed: int
) -> None:
    parts = toy_tasks.TASKS[name](random.Random(seed))
    assert parts == toy_tasks.TASKS[name](random.Random(seed))
    assert parts != toy_tasks.TASKS[name](random.Random(seed + 1))
    prompts = [prompt for part in parts for prompt, _ in part]
    assert len(prompts) == len(set(prompts))
    assert len(parts[1]) == 100


ANSWER_OF_3 = {"role": "assistant", "content": "3!"}


def test_unseen_phrasings_do_not_occur_in_training() -> None:
    train, test, unseen = toy_tasks.orders(random.Random(0))
    assert len(toy_tasks.PHRASINGS) >= 12
    assert len(toy_tasks.UNSEEN_PHRASINGS) == 4
    assert len(unseen) == 50

    def phrasing_of(prompt: str) -> list[str]:
        sentence = prompt.removeprefix("Extract the order as JSON: ")
        patterns = {
            p: re.sub(r"\\\{\w+\\\}", "(.+)", re.escape(p))
            for p in toy_tasks.PHRASINGS + toy_tasks.UNSEEN_PHRASINGS
        }
        return [
            phrasing for phrasing, pattern in patterns.items() if re.fullmatch(pattern, sentence)
        ]

    assert all(
        set(phrasing_of(prompt)) & set(toy_tasks.PHRASINGS) for prompt, _ in train[:200] + test
    )
    assert not any(set(phrasing_of(prompt)) & set(toy_tasks.PHRASINGS) for prompt, _ in unseen)


def test_the_answer_to_an_order_is_json_with_words_of_the_sentence() -> None:
    for prompt, answer in toy_tasks.orders(random.Random(0))[1]:
        order = json.loads(answer)
        assert list(order) == ["name", "item", "quantity", "city", "day"]
        assert all(str(value) in prompt for value in order.values())


def test_roman_numerals_round_trip() -> None:
    value = {"M": 1000, "D": 500, "C": 100, "L": 50, "X": 10, "V": 5, "I": 1}
    for n in range(1, 2000):
        digits = [value[letter] for letter in toy_tasks.roman_numeral(n)]
        assert n == sum(-a if a < b else a for a, b in zip(digits, [*digits[1:], 0]))


def test_the_answer_and_its_end_are_in_the_loss_and_nothing_else(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    examples = dataset.load_task("orders", tokenizer, 256).train[:5]
    batch = dataset.collate(examples, tokenizer.eos_token_id)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id, (
        "the case that masking by id gets wrong"
    )
    for row, example in enumerate(examples):
        in_loss = batch.labels[row] != dataset.IGNORE_INDEX
        labels = batch.labels[row][in_loss]
        assert tokenizer.decode(labels) == example.answer + tokenizer.eos_token
        assert torch.equal(labels, batch.input_ids[row][in_loss])
        assert batch.attention_mask[row].sum() == len(example.ids)
        assert not in_loss[len(example.ids) :].any() and not in_loss[: example.n_prompt].any()
    assert batch.n_labels == sum(len(example.ids) - example.n_prompt for example in examples)


def test_each_example_comes_once_an_epoch_and_steps_need_no_history(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    examples = [dataset.Example([i, i, i], [i, i, i]) for i in range(12)]

    def seen(step: int, seed: int = 0) -> list[int]:
        return [
            int(i)
            for batch in dataset.batches_of_step(examples, step, 2, 2, seed, 0)
            for i in batch.input_ids[:, 0]
        ]

    epoch = [i for step in range(3) for i in seen(step)]
    assert sorted(epoch) == list(range(12))
    assert [i for step in range(3, 6) for i in seen(step)] != epoch
    assert seen(1) == epoch[4:8]
    assert seen(0, seed=1) != seen(0)
    epochs = [
        [i for step in range(3 * epoch, 3 * epoch + 3) for i in seen(step, seed)]
        for epoch in range(4)
        for seed in range(4)
    ]
    assert len(set(map(tuple, epochs))) == 16, "seed 1 does not repeat the epochs of seed 0"


def test_text_is_cut_into_sequences_whose_tokens_are_all_in_the_loss(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = tmp_path / "book.txt"
    path.write_text("It was a dark and stormy night. " * 200)
    task = dataset.load_task(str(path), tokenizer, 64)
    assert task.metric == "perplexity" and len(task.test) == len(task.train + task.test) // 10
    first, *_ = task.train
    predicted = [token for example in task.train + task.test for token in example.labels[1:]]
    assert tokenizer.decode(first.ids[:1] + predicted) == path.read_text()
    batch = dataset.collate(task.train[:2], 0)
    assert torch.equal(batch.labels, batch.input_ids)
    assert batch.n_labels == 2 * 63, "the first token of each is not predicted"


def test_the_pages_of_help_are_a_data_set(tokenizer: PreTrainedTokenizerBase) -> None:
    task = dataset.load_task("text", tokenizer, 256)
    assert task.metric == "perplexity" and len(task.train) > 100
    assert not {tuple(e.ids) for e in task.train} & {tuple(e.ids) for e in task.test}


def test_jsonl_rows_are_questions_and_answers(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = tmp_path / "qa.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"{i}?", "completion": f"{i}!"}) + "\n\n" for i in range(20))
    )
    task = dataset.load_task(str(path), tokenizer, 256)
    assert sorted(e.answer for e in task.train + task.test) == sorted(f"{i}!" for i in range(20))
    assert len(task.test) == 2


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("", "bad.jsonl is empty"),
        ("[]", "0 sequences"),
        ('{"prompt": "a", "completion": "b"}\n', "1 sequences"),
        (
            '{"prompt": "a", "completion": "b"}\nnot json\n',
            ":2: not JSON (Expecting value at column 1)",
        ),
        ('{"prompt": "a"}\n', ":1: its keys are 'prompt'"),
        ('{"text": "<|im_end|>"}\n', ":1: text is a single token, so there is nothing to predict"),
        ("[1]\n", ":1, row 1: it is not an object, its type is int"),
        ('{"prompt": "a", "completion": ""}\n', "completion is empty"),
        ('{"prompt": 1, "completion": "b"}\n', "prompt must be a string, not 1"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, text: str, complaint: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(complaint)):
        dataset.load_task(str(path), tokenizer, 256)


def test_unknown_data_empty_text_and_long_examples_are_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match="no-such-data is not a file, nor one of orders, roman, text"
    ):
        dataset.load_task("no-such-data", tokenizer, 256)
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.txt is not UTF-8 text .* at byte 2"):
        dataset.load_task(str(tmp_path / "latin.txt"), tokenizer, 256)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="empty.txt is empty"):
        dataset.load_task(str(tmp_path / "empty.txt"), tokenizer, 256)
    with pytest.raises(ValueError, match="more than --max-seq-len 32"):
        dataset.load_task("orders", tokenizer, 32)


def write_rows(folder: Path, contents: list[dict], name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in contents))
    return str(path)


def in_loss(tokenizer: PreTrainedTokenizerBase, example: dataset.Example) -> str:
    return tokenizer.decode([label for label in example.labels if label != dataset.IGNORE_INDEX])


def test_a_file_may_mix_formats_and_a_tenth_of_its_rows_is_held_out(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    contents = [{"messages": chat}, {"text": "e"}, {"question": "f", "answer": "g"}] * 10
    task = dataset.load_task(write_rows(tmp_path, contents), tokenizer, 256)
    found = [in_loss(tokenizer, example) for example in task.train + task.test]
    assert (len(task.train), len(task.test), task.metric) == (27, 3, "perplexity")
    assert sorted(found) == sorted(["b<|im_end|>d<|im_end|>", "e<|im_end|>", "g<|im_end|>"] * 10)
    again = dataset.load_task(str(tmp_path / "rows.jsonl"), tokenizer, 256)
    assert task == again


def test_which_rows_are_held_out_depends_on_the_rows_alone(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    contents = [{"prompt": f"{i}?", "completion": f"{i}!"} for i in range(20)]
    contents[3] = {"messages": [{"role": "user", "content": "3?"}, ANSWER_OF_3]}
    task = dataset.load_task(write_rows(tmp_path, contents), tokenizer, 256)
    path = write_rows(tmp_path, contents[::-1], "reversed.JSON")
    assert dataset.load_task(path, tokenizer, 256) == task
    (tmp_path / "rows.csv").write_text(
        "prompt,completion\n" + "".join(f"{i}?,{i}!\n" for i in range(20))
    )
    again = dataset.load_task(str(tmp_path / "rows.csv"), tokenizer, 256)
    held_out = {example.answer for example in task.test + again.test}
    assert len(held_out) <= 3, "at most the one row that differs"


def test_keys_that_are_not_read_are_named(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    contents = [{"prompt": key, "completion": "b", key: 7} for key in ("url", "id")]
    path = write_rows(tmp_path, contents)
    dataset.load_task(path, tokenizer, 256)
    assert capsys.readouterr().out == f"keys of {path} that are not read: id, url\n"
    dataset.load_task(write_rows(tmp_path, [{"text": "a b"}, {"text": "c"}]), tokenizer, 256)
    assert capsys.readouterr().out == ""


def test_held_out_rows_that_are_also_trained_on_are_counted(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = write_rows(tmp_path, [{"text": "a b"}] * 20)
    dataset.load_task(path, tokenizer, 256)
    said = f"2 of 2 held-out sequences of {path} are also trained on, so the perplexity is too low"
    assert said in capsys.readouterr().out


def test_control_tokens_of_another_model_are_named(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    contents = [
        {"text": "<s>[INST] a [/INST] b </s>"},
        {"prompt": "a<|eot_id|>", "completion": "b"},
        {"text": "<|im_start|>user\na<|im_end|> <s>c</s> <|not one|>"},
    ]
    path = write_rows(tmp_path, contents)
    dataset.load_task(path, tokenizer, 256)
    said = f"2 of 3 rows of {path} contain control tokens of another model, which are plain text"
    assert capsys.readouterr().out == f"{said} for this one: <|eot_id|>, [/INST], [INST]\n"


def test_control_tokens_that_the_template_writes_are_its_own(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Also those that are no single token, as in Llama 2."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template += "{# [INST] #}"
    path = write_rows(tmp_path, [{"text": "[INST] a"}, {"text": "b [INST]"}])
    dataset.load_task(path, tokenizer, 256)
    assert "another model" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "start",
    [
        '{"prompt": "a", "completion": "b"}\n',
        '\n{"text": "a"}\n',
        '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]\n',
    ],
)
def test_rows_in_a_text_file_are_refused_and_other_json_in_it_is_text(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, start: str
) -> None:
    (tmp_path / "rows.txt").write_text(start * 20)
    with pytest.raises(ValueError, match="its first line is a row: name it .jsonl"):
        dataset.load_task(str(tmp_path / "rows.txt"), tokenizer, 16)
    (tmp_path / "rows.txt").write_text('{"level": "info", "at": 3}\n' * 20)
    assert dataset.load_task(str(tmp_path / "rows.txt"), tokenizer, 16).train


def test_an_answer_of_weight_0_is_refused_when_training_on_prompts(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "a"}, ANSWER_OF_3]
    path = write_rows(tmp_path, [{"messages": [turns[0], ANSWER_OF_3 | {"weight": 0}, *turns]}] * 2)
    assert dataset.load_task(path, tokenizer, 256)
    with pytest.raises(ValueError, match=r"rows.jsonl:1: turn 2 \(assistant\) has weight 0"):
        dataset.load_task(path, tokenizer, 256, train_on_prompt=True)


def test_a_text_file_may_be_compressed(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    text = "It was a dark and stormy night. " * 20
    (tmp_path / "book.TXT").write_text(text)
    (tmp_path / "book.txt.gz").write_bytes(gzip.compress(text.encode()))
    plain, compressed = (
        dataset.load_task(str(tmp_path / name), tokenizer, 64)
        for name in ("book.TXT", "book.txt.gz")
    )
    assert plain == compressed


def test_training_on_prompts_changes_the_training_labels_and_not_the_held_out_ones(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = write_rows(tmp_path, [{"prompt": str(i), "completion": "b"} for i in range(20)])
    plain = dataset.load_task(path, tokenizer, 256, train_on_prompt=False)
    on_prompt = dataset.load_task(path, tokenizer, 256, train_on_prompt=True)
    assert on_prompt.test == plain.test
    assert [e.ids for e in on_prompt.train] == [e.ids for e in plain.train]
    assert all(example.labels == example.ids for example in on_prompt.train)
    assert not any(example.labels == example.ids for example in plain.train)


def test_packing_fills_the_training_sequences_and_leaves_the_held_out_ones(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = write_rows(tmp_path, [{"prompt": str(i), "completion": "b" * i} for i in range(1, 21)])
    plain, packed = (
        dataset.load_task(path, tokenizer, 128, False, packed) for packed in (False, True)
    )
    assert packed.test == plain.test and len(packed.train) < len(plain.train)
    assert sum(len(e.ids) for e in packed.train) == sum(len(e.ids) for e in plain.train)
    batch = dataset.collate(packed.train[:2], 0).to("cpu")
    assert batch.inputs.keys() == {"input_ids", "position_ids"}, (
        "an attention_mask would let documents see each other"
    )
    assert dataset.collate(plain.train[:2], 0).inputs.keys() == {"input_ids"}


def test_long_rows_are_counted_with_their_lines_and_cut_or_dropped(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    short = {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "one two three"},
        ]
    }
    turns = short["messages"]
    cut = {"messages": [*turns[:2], {"role": "assistant", "content": " ".join(["word"] * 50)}]}
    dropped = {
        "messages": [turns[0], {"role": "user", "content": " ".join(["word"] * 50)}, turns[2]]
    }
    document = {"text": " ".join(["tale"] * 50)}
    path = write_rows(tmp_path, [short, cut, dropped, document, short])
    task = dataset.load_task(path, tokenizer, 24)
    whole = {
        line: len(dataset.Template(tokenizer).encode_conversation(row["messages"])[0].ids)
        for line, row in ((2, cut), (3, dropped))
    }
    said = capsys.readouterr().out
    assert "3 of 5 rows of" in said
    assert "exceed --max-seq-len 24" in said
    assert "and 1 sequences with no answer left are dropped" in said
    assert said.endswith(
        f"dropped: {path}:2 has {whole[2]}, {path}:3 has {whole[3]}, {path}:4 has 51\n"
    )
    found = sorted(in_loss(tokenizer, example) for example in task.train + task.test)
    assert max(len(example.ids) for example in task.train + task.test) <= 24
    tales = [text for text in found if "tale" in text]
    assert "".join(tales).count("tale") == 50 + len(tales) - 1, (
        "all of a document is trained on; a piece starts with the last token of the one before"
    )
    assert [text for text in found if "word" in text] == [
        " ".join(["word"] * found[-1].count("word"))
    ]
    assert found.count("one two three<|im_end|>") == 2 and len(found) == len(tales) + 3


@pytest.mark.parametrize("n", range(2, 18))
def test_a_document_of_any_length_keeps_its_last_token(n: int) -> None:
    ids = list(range(n))
    pieces = dataset._cut_document(dataset.Example(ids, ids), 4)
    assert max(len(piece.ids) for piece in pieces) <= 4
    assert [label for piece in pieces for label in piece.labels[1:]] == ids[1:]


def test_all_bad_rows_of_a_file_are_reported_at_once_in_their_order(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = (
        "{% if messages[0]['content'] == 'no' %}{{ raise_exception('I will not') }}{% endif %}"
        "{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    )
    refused = {
        "messages": [{"role": "user", "content": "no"}, {"role": "assistant", "content": "b"}]
    }
    path = write_rows(tmp_path, [{"prompt": "a"}, refused, {"text": "fine"}, {"text": 3}])
    with pytest.raises(ValueError) as error:
        dataset.load_task(path, strict, 256)
    first, *lines = str(error.value).split("\n  ")
    assert first == f"3 of 4 rows of {path} cannot be used: fix or remove them"
    assert [line.partition(": ")[0] for line in lines] == [
        f"{path}:{number}" for number in (1, 2, 4)
    ]
    assert "refuses it (I will not)" in lines[1]


@pytest.mark.parametrize(
    "name, complaint",
    [
        ("table.xlsx", "must end in txt, jsonl, .* parquet, or one of these and .gz: rename it"),
        ("some/missing.jsonl", "is not a file"),
        ("some/missing.CSV.gz", "is not a file"),
        ("a/b/c", "is not a file"),
        ("some/set", "a hub data set needs a library"),
        (".", "is a folder: give a file in it"),
        ("some/folder", "is a folder: give a file in it"),
    ],
)
def test_a_name_that_is_no_file_and_no_data_set_is_refused(
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    name: str,
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "table.xlsx").write_text("a,b")
    (tmp_path / "some" / "folder").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"--data {re.escape(name)} .*{complaint}"):
        dataset.load_task(name, tokenizer, 256)


def test_a_preview_shows_the_first_sequences_and_the_borders_of_documents(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = write_rows(tmp_path, [{"text": f"{i}!"} for i in range(6)])
    task = dataset.load_task(path, tokenizer, 6, packed=True)
    first, second, third, *_ = dataset.preview(task, tokenizer, colour=False, count=1).split("\n")
    assert first == "3 sequences to train on, 1 held out; ⟦this⟧ is in the loss"
    assert second == "--- 1: 6 tokens, 4 in the loss"
    assert re.fullmatch(r"\d⟦!<\|im_end\|>⟧", third)
    assert dataset.preview(task, tokenizer, colour=False, count=1).split("\n")[3] == "- - -"


def test_a_model_without_a_chat_template_gets_the_bare_question(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    assert tokenizer.decode(dataset.encode_prompt(plain, "Who?")) == "Who?\n"
    assert tokenizer.decode(dataset.encode_prompt(tokenizer, "Who?")).count("<|im_start|>") == 3, (
        "system, user, and the answer to come"
    )


def rows_of(lengths: list[int]) -> list[dataset.Example]:
    return [
        dataset.Example([number, *[3] * (length - 1)], [number, *[3] * (length - 1)])
        for number, length in enumerate(lengths)
    ]


@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=300),
    batch_size=st.integers(1, 5),
    count=st.integers(1, 3),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 2),
)
def test_by_length_an_epoch_has_each_example_once_and_a_step_depends_on_no_other(
    lengths: list[int], batch_size: int, count: int, seed: int, epoch: int
) -> None:
    rows = rows_of(lengths)
    step_size = batch_size * count
    steps = range(epoch * len(rows) // step_size, -(-(epoch + 1) * len(rows) // step_size))

    def seen(by_length: bool) -> list[dataset.Batch]:
        return [
            batch
            for step in steps
            for batch in dataset.batches_of_step(rows, step, batch_size, count, seed, 2, by_length)
        ]

    # As a resumed run would.
    again = dataset.batches_of_step(rows, steps[-1], batch_size, count, seed, 2, True)
    assert all(
        torch.equal(one.input_ids, other.input_ids)
        for one, other in zip(again, seen(True)[-count:])
    )
    first = [int(ids[0]) for batch in seen(True) for ids in batch.input_ids]
    skipped = epoch * len(rows) - steps[0] * step_size
    assert sorted(first[skipped : skipped + len(rows)]) == list(range(len(rows)))


def mixed_rows() -> list[dict]:
    """Rows of four formats, some longer than 40 tokens, one answer of weight 0."""
    chat = [
        {"role": "user", "content": "a b"},
        {"role": "assistant", "content": "one\ntwo"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "weight": 0},
        {"role": "user", "content": "on"},
        {"role": "assistant", "content": "ion"},
    ]
    found = []
    for number in range(10):
        found.append({"messages": chat})
        found.append({"text": "It was a dark and stormy night. " * 9})
        found.append({"question": "f", "answer": "word " * (12 * number + 7)})
        found.append({"instruction": "Add.", "input": "2, 2", "output": str(4 * number + 3)})
    return found


def fingerprints(task: dataset.Task) -> list[str]:
    return [chat_template.fingerprint(part) for part in (task.train, task.test)]


def test_the_ids_and_labels_of_a_data_set_are_pinned(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """If they change, a state that an older version saved is refused."""
    orders = dataset.load_task("orders", tokenizer, 256)
    assert fingerprints(orders) == ["2d1959522ae48ea0", "4b4867cebac2cc7f"]
    assert chat_template.fingerprint(orders.unseen) == "f0e7e15b92cecc77"
    roman = dataset.load_task("roman", tokenizer, 256)
    assert fingerprints(roman) == ["5b58e4b4d5ec2d83", "28672dafd1c82d98"]
    path = write_rows(tmp_path, mixed_rows())
    plain = dataset.load_task(path, tokenizer, 40)
    assert fingerprints(plain) == ["2cdfdd1624803ab9", "4c3026f3aa3417c3"]
    packed = dataset.load_task(path, tokenizer, 40, packed=True)
    assert fingerprints(packed) == ["cb4c80bef8e61ec0", "4c3026f3aa3417c3"]


@pytest.mark.parametrize(
    "by_length, expected", [(False, "b3c7c44e75b2b9d5"), (True, "e71cf3d221bcf82b")]
)
def test_the_order_of_batches_is_pinned(by_length: bool, expected: str) -> None:
    """A resumed run continues bitwise only if each step has the batches that it had before."""
    lengths = [2 + number * 7 % 50 for number in range(700)]
    examples = [dataset.Example([n] * length, [n] * length) for n, length in enumerate(lengths)]
    digest = hashlib.sha256()
    for step in range(120):
        for batch in dataset.batches_of_step(examples, step, 4, 2, 1, 2, by_length):
            for tensor in (batch.input_ids, batch.attention_mask, batch.labels):
                numbers = [*tensor.shape, *tensor.flatten().tolist()]
                digest.update(array("q", numbers))
    assert digest.hexdigest()[:16] == expected


def test_by_length_batches_have_less_padding_and_come_in_another_order() -> None:
    draw = random.Random(0)
    rows = rows_of([2 + int(draw.expovariate(1 / 40)) for _ in range(1000)])

    def epoch(by_length: bool) -> list[dataset.Batch]:
        return [
            batch
            for step in range(125)
            for batch in dataset.batches_of_step(rows, step, 4, 2, 0, 2, by_length)
        ]

    padding = {
        kind: sum(int((1 - batch.attention_mask).sum()) for batch in epoch(kind))
        for kind in (True, False)
    }
    assert 5 * padding[True] < padding[False]
    widths = [batch.input_ids.shape[1] for batch in epoch(True)]
    ascents = sum(a < b for a, b in zip(widths, widths[1:]))
    assert len(widths) < 3 * ascents < 2 * len(widths), "neither sorted one way nor the other"
