"""Rows of data files: six formats give the same turns; a bad row is reported with its line."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data import rows
from helpers.mutants import mutated

LETTERS = st.characters(exclude_categories=["Cs"])  # half of a surrogate pair is not text
TEXTS = st.text(LETTERS, max_size=20)
ANSWERS = TEXTS.filter(str.strip)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
KEYS = """
    messages conversations prompt completion question answer instruction input output text system
    role content from value weight
""".split()
LIKELY = st.recursive(
    JSON | st.sampled_from(["user", "assistant", "gpt", "human", "system"]),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(KEYS), inner),
    max_leaves=12,
)


def row_of(content: object, module: ModuleType = rows) -> rows.Row:
    return module.parse_row(content, "here")


def chat(*turns: str, weights: dict[int, int] | None = None) -> list[dict]:
    """Alternating turns of a user and an assistant in OpenAI's format."""
    found = [
        {"role": role, "content": content}
        for role, content in zip(["user", "assistant"] * len(turns), turns)
    ]
    return [
        turn | {"weight": weights[place]} if weights and place in weights else turn
        for place, turn in enumerate(found)
    ]


@given(TEXTS, ANSWERS, TEXTS)
def test_every_format_gives_the_same_turns(question: str, answer: str, more: str) -> None:
    asked = [rows.BRIEF_SYSTEM_MESSAGE, *chat(question, answer)]
    assert row_of({"prompt": question, "completion": answer}).turns == asked
    assert row_of({"question": question, "answer": answer, "text": "other"}).turns == asked
    assert row_of({"instruction": question, "output": answer}).turns == asked
    assert row_of({"instruction": question, "input": "", "output": answer}).turns == asked
    whole = f"{question}\n\n{more}" if more else question
    row = row_of({"instruction": question, "input": more, "output": answer})
    assert row.turns[1]["content"] == whole
    assert row_of({"messages": chat(question, answer)}).turns == chat(question, answer)
    sharegpt = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    assert row_of({"conversations": sharegpt, "id": 7}).turns == chat(question, answer)
    assert row_of({"conversations": sharegpt, "system": "Be kind."}).turns[0] == {
        "role": "system",
        "content": "Be kind.",
    }
    assert row_of({"text": answer}) == rows.Row("here", text=answer)


def test_a_message_of_weight_0_is_not_in_the_loss() -> None:
    turns = row_of({"messages": chat("a", "b", "c", "d", weights={1: 0, 3: 1})}).turns
    assert [rows.is_in_loss(turn) for turn in turns] == [False, False, False, True]
    assert "weight 0" in row_of({"messages": chat("a", "b", weights={1: 0})}).fault


def check_lines(
    folder: Path, contents: list[dict], blank: list[str], module: ModuleType = rows, **style: object
) -> None:
    """The same rows, each with its line, from JSON lines, from a list and from an indented list.

    blank: the whitespace of a blank line before each of the first rows of the JSON lines.
    """
    path = folder / "rows.jsonl"
    blank = blank[: len(contents)]
    texts = [json.dumps(row, **style) for row in contents]
    turns = [chat(*row.values()) for row in contents]

    def read(text: str) -> list[rows.Row]:
        path.write_text(text, encoding="utf-8", newline="")
        return module.read_file(path)

    before = [space + "\n" for space in blank] + [""] * (len(texts) - len(blank))
    found = read("".join(space + text + "\n" for space, text in zip(before, texts)))
    lines = [1 + i + min(i + 1, len(blank)) for i in range(len(texts))]
    assert [row.where for row in found] == [f"{path}:{line}" for line in lines]
    assert [row.turns[1:] for row in found] == turns
    for layout in ("[%s]", "\ufeff [\n%s\n]\n", "[%s,]"):
        assert [row.turns[1:] for row in read(layout % ",".join(texts))] == turns
    found = read(json.dumps(contents, indent=2, **style))
    assert [row.where for row in found] == [f"{path}:{2 + 4 * i}" for i in range(len(texts))]


ROWS = st.lists(st.tuples(TEXTS, ANSWERS), min_size=1, max_size=4)
BLANK = st.lists(st.text(" \t", max_size=2), max_size=3)


@given(ROWS, BLANK, st.booleans())
@example([("a\u2028b\x85c\x1dd", "e\u2029f")], [], False)
def test_rows_are_read_with_their_lines(
    tmp_path_factory: pytest.TempPathFactory, contents: list, blank: list, ascii: bool
) -> None:
    contents = [{"prompt": question, "completion": answer} for question, answer in contents]
    check_lines(tmp_path_factory.mktemp("rows"), contents, blank, ensure_ascii=ascii)


def messages(turns: object) -> str:
    return json.dumps({"messages": turns})


def check_faults(folder: Path, module: ModuleType = rows) -> None:
    """Each bad row of a file has its line and its reason, and the good rows are read."""
    good = '{"prompt": "a", "completion": "b"}'
    empty_answer = chat("a", "")
    ends_with_system = [
        {"from": "human", "value": "a"},
        {"from": "gpt", "value": "b"},
        {"from": "system", "value": "c"},
    ]
    content_list = {"role": "user", "content": [{"type": "text"}]}
    bad = {
        "not json": "not JSON (Expecting value at column 1)",
        '{"prompt": "a", ': "not JSON (Expecting property name enclosed in double quotes at colu",
        "7": "it is not an object, its type is int",
        "[" * 99999: "not JSON",
        "{}": "its keys are none; a row has those of one format",
        '{"prompt": "a"}': "its keys are 'prompt'; a row has those of one format",
        '{"prompt": 1, "completion": "b"}': "prompt must be a string, not 1",
        '{"prompt": "a", "completion": null}': "completion must be a string, not null",
        '{"prompt": "a", "completion": " \\n"}': "completion is empty",
        '{"prompt": "a", "completion": "\\ud800"}': "half of a surrogate pair at character 0",
        '{"instruction": "a", "input": 3, "output": "b"}': "input must be a string, not 3",
        '{"text": ""}': "text is empty",
        messages([]): "messages must be a list of at least one turn, not an empty list",
        messages({"role": "user"}): "messages must be a list of at least one turn, not an object",
        messages(["hi"]): "turn 1 of messages: it must be an object, not 'hi'",
        messages([{"role": "user"}]): "turn 1 of messages: its keys are 'role'; required are role",
        messages([{"role": "robot", "content": "b"}]): "role must be one of system, human, user,",
        messages([content_list]): "content must be a string, not a list",
        messages(chat("a")): "has no answer to train on",
        messages(chat("a", "b")[1:]): "or one before the first question: its roles are assistant",
        messages(empty_answer): "the answer (content) is empty",
        messages(chat("a", weights={0: 2})): "weight must be 0 or 1, not 2",
        json.dumps({"conversations": ends_with_system}): "a system message must come first",
    }
    path = folder / "bad.jsonl"
    path.write_text("".join(f"{good}\n{text}\n" for text in bad))
    found = module.read_file(path)
    assert [row.where for row in found] == [f"{path}:{line}" for line in range(1, 2 * len(bad) + 1)]
    assert not any(row.fault for row in found[::2])
    assert all(row.turns[1:] == chat("a", "b") for row in found[::2])
    for row, reason in zip(found[1::2], bad.values()):
        assert reason in row.fault or reason == "not JSON" and "recursion" in row.fault, row.fault


def test_each_bad_row_is_reported_and_no_good_one(tmp_path: Path) -> None:
    check_faults(tmp_path)


@pytest.mark.parametrize(
    "text, where, reason",
    [
        ('[{"text": "a"}\n {"text": "b"}]', 2, "Expecting ',' delimiter"),
        ('[{"text": "a"},\n {"text": "b"}', 2, "Expecting ',' delimiter"),  # a download cut short
        ('[{"text": "a"},\n\n', 3, "Expecting value"),
        (
            '[{"text": "a"},\n {"text": \n"b}]',
            3,
            "Invalid control character at|Unterminated string",
        ),
        ('[{"text": "a"}]\n{"text": "b"} x', 1, "Extra data"),
        ("[", 1, "Expecting value"),
    ],
)
def test_a_broken_list_is_a_bad_row_at_its_syntax_error(
    tmp_path: Path, text: str, where: int, reason: str
) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    [*good, bad] = rows.read_file(path)
    assert not any(row.fault for row in good), bad
    assert bad.where == f"{path}:{where}", bad
    assert re.search(reason, bad.fault), bad


@given(JSON | LIKELY)
def test_any_row_is_turns_or_a_text_or_a_fault_in_one_line(content: object) -> None:
    row = row_of(content if isinstance(content, dict) else {"messages": content})
    assert [bool(row.turns), bool(row.text), bool(row.fault)].count(True) == 1
    assert "\n" not in row.fault and len(row.fault) < 2000 + len(str(content))
    assert not row.turns or any(map(rows.is_in_loss, row.turns))


@given(st.text(LETTERS) | st.text('[]{},:" \n\\1a'))
def test_any_file_is_read_or_its_faults_are_reported(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.mktemp("any") / "rows.json"
    path.write_text(text, encoding="utf-8")
    found = rows.read_file(path)
    if not re.fullmatch(r"\s*(\[\s*\]\s*)?", text.removeprefix("\ufeff")):
        assert found and all(row.fault for row in found)


def test_all_faults_are_counted_and_the_first_twenty_shown() -> None:
    rows.raise_if_any([], 9, "my.jsonl")
    with pytest.raises(
        ValueError, match="2 of 9 rows of my.jsonl cannot be used: fix or remove them\n  a\n  b$"
    ):
        rows.raise_if_any(["a", "b"], 9, "my.jsonl")
    faults = [f"my.jsonl:{line}: bad" for line in range(1, 31)]
    with pytest.raises(ValueError) as error:
        rows.raise_if_any(faults, 99, "my.jsonl")
    assert str(error.value).split("\n  ")[1:] == [*faults[:20], "..."]
    assert "30 of 99 rows" in str(error.value)


def test_a_hub_data_set_is_read_if_the_library_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load_dataset(name: str, split: str) -> list[dict]:
        assert (name, split) == ("some/set", "train")
        return [{"question": "a", "answer": "b"}, {"question": "a"}]

    library = SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", library)
    first, second = rows.read_hub("some/set")
    assert first == rows.Row("some/set, row 1", rows.pair_turns("a", "b"))
    assert second.where == "some/set, row 2" and "its keys are 'question'" in second.fault
    monkeypatch.setattr(library, "load_dataset", lambda name, split: 1 / 0)
    with pytest.raises(
        ValueError, match=r"cannot be loaded as a hub data set \(division by zero\)$"
    ):
        rows.read_hub("some/set")


def test_without_the_library_a_hub_data_set_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ValueError, match="^--data some/set is not a file, and a hub .* pip install datasets$"
    ):
        rows.read_hub("some/set")


def check_rows(folder: Path, module: ModuleType) -> None:
    """One example of each property above."""
    found = [{"prompt": "a\u2028b", "completion": "c"}, {"prompt": "d", "completion": "e\x85"}]
    check_lines(folder, found, [""], module, ensure_ascii=False)
    sharegpt = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert row_of({"conversations": sharegpt, "system": "s"}, module).turns[0]["content"] == "s"
    assert row_of({"conversations": sharegpt}, module).turns == chat("a", "b")
    row = row_of({"instruction": "a", "input": "b", "output": "c"}, module)
    assert row.turns[1]["content"] == "a\n\nb"
    assert row_of({"instruction": "a", "output": "c", "text": "d"}, module).turns
    assert not module.is_in_loss(
        row_of({"messages": chat("a", "b", "c", "d", weights={1: 0})}, module).turns[1]
    )


@pytest.mark.parametrize(
    "old, new, check",
    [
        ('text.split("\\n")', "text.splitlines()", check_rows),
        ("if line.strip()", "if True", check_rows),
        ('text.split("\\n"), 1)', 'text.split("\\n"))', check_rows),
        ('line += text.count("\\n", counted, position)', "line += 1", check_rows),
        ('"gpt": "assistant"', '"gpt": "user"', check_rows),
        (', row.get("system")', ", None", check_rows),
        ('"\\n\\n" + extra', "extra", check_rows),
        ('parsed["weight"] = weight', "pass", check_rows),
        ("_string(value, key).strip()", "_string(value, key)", check_faults),
        ("        value.encode()\n", "        pass\n", check_faults),
        ("if weight not in (None, 0, 1)", "if False", check_faults),
        ('or "user" not in roles[: roles.index("assistant")]', "", check_faults),
        ('if "system" in roles[1:]', "if False", check_faults),
    ],
)
def test_a_mutant_of_the_formats_is_noticed(
    tmp_path: Path, old: str, new: str, check: Callable
) -> None:
    check(tmp_path, rows)
    with pytest.raises((AssertionError, ValueError, IndexError, KeyError)):
        check(tmp_path, mutated(rows, old, new, tmp_path))
