"""Rows of people's files: six formats, one meaning; and whatever is wrong with a row is said with its line."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from helpers.mutants import mutated

LETTERS = st.characters(exclude_categories=["Cs"])  # no half of a surrogate pair, which is no text
TEXTS = st.text(LETTERS, max_size=20)
ANSWERS = TEXTS.filter(str.strip)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
KEYS = [
    "messages",
    "conversations",
    "prompt",
    "completion",
    "question",
    "answer",
    "instruction",
    "input",
    "output",
    "text",
    "system",
    "role",
    "content",
    "from",
    "value",
    "weight",
]
LIKELY = st.recursive(
    JSON | st.sampled_from(["user", "assistant", "gpt", "human", "system"]),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(KEYS), inner),
    max_leaves=12,
)


def row_of(content: object, module: ModuleType = rows) -> rows.Row:
    return module._row_or_fault(content, "here")


def chat(*turns: str, weights: dict[int, int] | None = None) -> list[dict]:
    """Turns of a user and an assistant, one after the other, as OpenAI writes them."""
    found = [
        {"role": role, "content": content}
        for role, content in zip(["user", "assistant"] * len(turns), turns)
    ]
    return [
        turn | {"weight": weights[place]} if weights and place in weights else turn
        for place, turn in enumerate(found)
    ]


@given(TEXTS, ANSWERS, TEXTS)
def test_every_format_says_the_same(question: str, answer: str, more: str) -> None:
    asked = [rows.BRIEF_SYSTEM_MESSAGE, *chat(question, answer)]
    assert row_of({"prompt": question, "completion": answer}).turns == asked
    assert row_of({"question": question, "answer": answer, "text": "other"}).turns == asked
    assert row_of({"instruction": question, "output": answer}).turns == asked
    assert row_of({"instruction": question, "input": "", "output": answer}).turns == asked
    whole = f"{question}\n\n{more}" if more else question
    assert (
        row_of({"instruction": question, "input": more, "output": answer}).turns[1]["content"]
        == whole
    )
    assert row_of({"messages": chat(question, answer)}).turns == chat(question, answer)
    sharegpt = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    assert row_of({"conversations": sharegpt, "id": 7}).turns == chat(question, answer)
    assert row_of({"conversations": sharegpt, "system": "Be kind."}).turns[0] == {
        "role": "system",
        "content": "Be kind.",
    }
    assert row_of({"text": answer}) == rows.Row("here", text=answer)


def test_a_message_of_weight_0_is_not_learnt() -> None:
    turns = row_of({"messages": chat("a", "b", "c", "d", weights={1: 0, 3: 1})}).turns
    assert [rows.is_in_loss(turn) for turn in turns] == [False, False, False, True]
    assert "weight 0" in row_of({"messages": chat("a", "b", weights={1: 0})}).fault


def check_lines(
    folder: Path, rows: list[dict], blank: list[str], module: ModuleType = rows, **style: object
) -> None:
    """As JSON lines with blank ones between, as a list, as a list over many lines: the same rows, each at its line."""
    path, texts = folder / "rows.jsonl", [json.dumps(row, **style) for row in rows]
    between = [space + "\n" for space in blank[: len(rows)]] + [""] * (len(rows) - len(blank))
    path.write_text(
        "".join(space + text + "\n" for space, text in zip(between, texts)),
        encoding="utf-8",
        newline="",
    )
    lines = [2 + 2 * i if i < len(blank) else 1 + len(blank) + i for i in range(len(rows))]
    assert [(row.where, row.turns[1:]) for row in module.read(path)] == [
        (f"{path}:{line}", chat(*row.values())) for line, row in zip(lines, rows)
    ]
    for layout in ("[%s]", "\ufeff [\n%s\n]\n", "[%s,]"):
        path.write_text(layout % ",".join(texts), encoding="utf-8", newline="")
        assert [row.turns[1:] for row in module.read(path)] == [chat(*row.values()) for row in rows]
    path.write_text(json.dumps(rows, indent=2, **style), encoding="utf-8", newline="")
    assert [row.where for row in module.read(path)] == [
        f"{path}:{2 + 4 * i}" for i in range(len(rows))
    ]


ROWS, BLANK = (
    st.lists(st.tuples(TEXTS, ANSWERS), min_size=1, max_size=4),
    st.lists(st.text(" \t", max_size=2), max_size=3),
)


@given(ROWS, BLANK, st.booleans())
@example([("a\u2028b\x85c\x1dd", "e\u2029f")], [], False)
def test_rows_are_read_with_their_lines(
    tmp_path_factory: pytest.TempPathFactory, rows: list, blank: list, ascii: bool
) -> None:
    rows = [{"prompt": question, "completion": answer} for question, answer in rows]
    check_lines(tmp_path_factory.mktemp("rows"), rows, blank, ensure_ascii=ascii)


def check_faults(folder: Path, module: ModuleType = rows) -> None:
    """Good and bad rows in one file: each bad one has its line and its reason, and the good ones are there."""
    good = '{"prompt": "a", "completion": "b"}'
    bad = {
        "not json": "not JSON (Expecting value at column 1)",
        '{"prompt": "a", ': "not JSON (Expecting property name enclosed in double quotes at column 17)",
        "7": "it is no object, but a int",
        "[" * 99999: "not JSON",
        "{}": "its keys are none; a row has those of one format",
        '{"prompt": "a"}': "its keys are 'prompt'; a row has those of one format",
        '{"prompt": 1, "completion": "b"}': "prompt is a string, not 1",
        '{"prompt": "a", "completion": null}': "completion is a string, not null",
        '{"prompt": "a", "completion": " \\n"}': "completion is empty",
        '{"prompt": "a", "completion": "\\ud800"}': "completion has half of a surrogate pair at character 0",
        '{"instruction": "a", "input": 3, "output": "b"}': "input is a string, not 3",
        '{"text": ""}': "text is empty",
        '{"messages": []}': "messages is a list of turns that is not empty, not an empty list",
        '{"messages": {"role": "user"}}': "messages is a list of turns that is not empty, not an object",
        '{"messages": ["hi"]}': "turn 1 of messages: it is an object, not 'hi'",
        '{"messages": [{"role": "user"}]}': "turn 1 of messages: its keys are 'role'; needed are role, content",
        '{"messages": [{"role": "robot", "content": "b"}]}': "role is one of system, human, user, gpt, assistant, not 'robot'",
        '{"messages": [{"role": "user", "content": [{"type": "text"}]}]}': "content is a string, not a list",
        '{"messages": [{"role": "user", "content": "a"}]}': "has no answer to learn",
        '{"messages": [{"role": "assistant", "content": "a"}]}': "or one before any question: its roles are assistant",
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}': "the answer (content) is empty",
        '{"messages": [{"role": "user", "content": "a", "weight": 2}]}': "weight is 0 or 1, not 2",
        '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "system", "value": "c"}]}': "a system message comes first or not at all",
    }
    path = folder / "bad.jsonl"
    path.write_text("".join(f"{good}\n{text}\n" for text in bad))
    rows = module.read(path)
    assert [row.where for row in rows] == [f"{path}:{line}" for line in range(1, 2 * len(bad) + 1)]
    assert not any(row.fault for row in rows[::2]) and all(
        row.turns[1:] == chat("a", "b") for row in rows[::2]
    )
    for row, reason in zip(rows[1::2], bad.values()):
        assert reason in row.fault or reason == "not JSON" and "recursion" in row.fault, row.fault


def test_each_bad_row_is_named_and_no_good_one(tmp_path: Path) -> None:
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
def test_a_list_that_is_none_is_a_bad_row_where_it_breaks(
    tmp_path: Path, text: str, where: int, reason: str
) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    [*good, bad] = rows.read_file(path)
    assert (
        not any(row.fault for row in good)
        and bad.where == f"{path}:{where}"
        and re.search(reason, bad.fault)
    ), bad


@given(JSON | LIKELY)
def test_whatever_a_row_holds_it_is_turns_or_a_text_or_a_fault_in_one_line(content: object) -> None:
    row = row_of(content if isinstance(content, dict) else {"messages": content})
    assert [bool(row.turns), bool(row.text), bool(row.fault)].count(True) == 1
    assert "\n" not in row.fault and len(row.fault) < 2000 + len(str(content))
    assert not row.turns or any(map(rows.is_in_loss, row.turns))


@given(st.text(LETTERS) | st.text('[]{},:" \n\\1a'))
def test_whatever_a_file_holds_it_is_read_or_its_faults_are(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.mktemp("any") / "rows.json"
    path.write_text(text, encoding="utf-8")
    rows = rows.read_file(path)
    if not re.fullmatch(r"\s*(\[\s*\]\s*)?", text.removeprefix("\ufeff")):
        assert rows and all(row.fault for row in rows)


def test_all_faults_are_counted_and_the_first_twenty_shown() -> None:
    rows.raise_if_any([], 9, "my.jsonl")
    with pytest.raises(
        ValueError, match="2 of 9 rows of my.jsonl cannot be used: mend or remove them\n  a\n  b$"
    ):
        rows.raise_if_any(["a", "b"], 9, "my.jsonl")
    faults = [f"my.jsonl:{line}: bad" for line in range(1, 31)]
    with pytest.raises(ValueError) as error:
        rows.raise_if_any(faults, 99, "my.jsonl")
    assert str(error.value).split("\n  ")[1:] == [*faults[:20], "..."] and "30 of 99 rows" in str(
        error.value
    )


def test_a_hub_data_set_is_read_where_the_library_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, rows = [], [{"question": "a", "answer": "b"}, {"question": "a"}]
    library = SimpleNamespace(load_dataset=lambda name, split: asked.append((name, split)) or rows)
    monkeypatch.setitem(sys.modules, "datasets", library)
    first, second = rows.read_hub("some/set")
    assert asked == [("some/set", "train")] and first == rows.Row(
        "some/set, row 1", rows.pair_turns("a", "b")
    )
    assert second.where == "some/set, row 2" and "its keys are 'question'" in second.fault
    monkeypatch.setattr(library, "load_dataset", lambda name, split: 1 / 0)
    with pytest.raises(ValueError, match=r"nor a hub data set within reach \(division by zero\)$"):
        rows.read_hub("some/set")


def test_without_the_library_a_hub_data_set_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ValueError, match="^--data some/set is no file, and as a hub .* pip install datasets$"
    ):
        rows.read_hub("some/set")


def check_rows(folder: Path, module: ModuleType) -> None:
    """What the properties above say, for one example each."""
    rows = [{"prompt": "a\u2028b", "completion": "c"}, {"prompt": "d", "completion": "e\x85"}]
    check_lines(folder, rows, [""], module, ensure_ascii=False)
    sharegpt = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert row_of({"conversations": sharegpt, "system": "s"}, module).turns[0]["content"] == "s"
    assert row_of({"conversations": sharegpt}, module).turns == chat("a", "b")
    assert (
        row_of({"instruction": "a", "input": "b", "output": "c"}, module).turns[1]["content"]
        == "a\n\nb"
    )
    assert row_of({"instruction": "a", "output": "c", "text": "d"}, module).turns
    assert not module.is_learnt(
        row_of({"messages": chat("a", "b", "c", "d", weights={1: 0})}, module).turns[1]
    )


@pytest.mark.parametrize(
    "old, new, check",
    [
        ('text.split("\\n")', "text.splitlines()", check_rows),
        ("if line.strip())", "if True)", check_rows),
        ('text.split("\\n"), 1)', 'text.split("\\n"))', check_rows),
        ('line + text.count("\\n", seen, place), place', "line + 1, place", check_rows),
        ('"gpt": "assistant"', '"gpt": "user"', check_rows),
        (', row.get("system")', ", None", check_rows),
        ('"\\n\\n" + more', "more", check_rows),
        ('({"weight": weight} if weight == 0 else {})', "{}", check_rows),
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
