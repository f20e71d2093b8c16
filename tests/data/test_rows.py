"""Rows: each format gives the same turns; each key is used, reported, or refused by name."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data import rows
from data.files import Record
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
    role content from value weight train history tools functions tool_calls function function_call
    name arguments reasoning_content documents type
""".split()
LIKELY = st.recursive(
    JSON | st.sampled_from(["user", "assistant", "gpt", "human", "system", "tool", "text", "[]"]),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(KEYS), inner),
    max_leaves=12,
)


def row_of(content: object, module: ModuleType = rows) -> rows.Row:
    return module.parse_row(Record("here", content))


def turns_of(content: object, module: ModuleType = rows) -> list[rows.Turn]:
    row = row_of(content, module)
    assert not row.fault, row
    return row.turns


def fault_of(content: object, module: ModuleType = rows) -> str:
    row = row_of(content, module)
    assert row == module.Row("here", fault=row.fault)
    return row.fault


def user(content: object, **more: object) -> dict:
    return {"role": "user", "content": content} | more


def assistant(content: object, **more: object) -> dict:
    return {"role": "assistant", "content": content} | more


CHAT = [user("a"), assistant("b"), user("c"), assistant("d")]


@given(TEXTS, ANSWERS, TEXTS)
@example("", "a", "b")
@example("a", "b", "")
def test_every_format_gives_the_same_turns(question: str, answer: str, more: str) -> None:
    chat = [user(question), assistant(answer)]
    asked = [rows.BRIEF_SYSTEM_MESSAGE, *chat]
    assert turns_of({"prompt": question, "completion": answer}) == asked
    assert turns_of({"question": question, "answer": answer, "text": "other"}) == asked
    assert turns_of({"instruction": question, "output": answer}) == asked
    assert turns_of({"instruction": question, "input": "", "output": answer}) == asked
    assert row_of({"text": answer}) == rows.Row("here", text=answer)
    row = {"instruction": question, "input": more, "output": answer}
    both = f"{question}\n\n{more}" if question and more else question + more
    assert turns_of(row)[1]["content"] == both

    assert turns_of({"messages": chat}) == turns_of(chat) == chat
    assert turns_of({"messages": json.dumps(chat)}) == chat, "as a table holds it"
    sharegpt = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    assert turns_of({"conversations": sharegpt}) == chat
    parts = [user([{"type": "text", "text": text} for text in question]), assistant(answer)]
    assert turns_of({"messages": parts}) == chat


def test_an_answer_of_weight_0_or_train_false_is_not_in_the_loss_in_any_format() -> None:
    weighted = [user("a"), assistant("b", weight=0), user("c", weight=0), assistant("d", weight=1)]
    flagged = [
        [user("a"), assistant("b", **{key: False}), user("c"), assistant("d", **{key: True})]
        for key in ("train", "training", "loss")
    ]
    for turns in (weighted, *flagged):
        from_value = [
            {"from": turn.pop("role"), "value": turn.pop("content")} | turn
            for turn in [dict(turn) for turn in turns]
        ]
        for row in ({"messages": turns}, {"conversations": from_value}):
            found = turns_of(row)
            assert [rows.is_in_loss(turn) for turn in found] == [False, False, False, True]
    assert "no answer to train on" in fault_of([user("a"), assistant("b", weight=0)])


@pytest.mark.parametrize("more", [{"weight": 1}, {"train": True}])
def test_an_answer_that_is_never_in_the_loss_is_refused_if_it_says_that_it_is(more: dict) -> None:
    """Its header stands where no prompt ends, or its row says that only the completion counts."""
    complaint = "an answer has weight 1 or train true, but an answer in a prompt or before the fir"
    assert complaint in fault_of([assistant("Hello!", **more), *CHAT])
    prompt = [user("a"), assistant("b", **more), user("c")]
    assert complaint in fault_of({"prompt": prompt, "completion": CHAT[3:]})


def test_a_weight_of_0_contradicts_training_on_prompts_but_an_answer_in_a_prompt_does_not() -> None:
    for turns in (
        [user("a", train=False), *CHAT[1:]],
        [user("a"), assistant("b", weight=0), *CHAT],
    ):
        fault = rows.refuse_weights(row_of(turns)).fault
        assert re.match(
            r"turn [12] \(.*\) has weight 0 or train false, but --train-on-prompt", fault
        )
    row = row_of({"prompt": CHAT[:3], "completion": CHAT[3:]})
    assert rows.refuse_weights(row) == row


def test_documents_are_objects_of_texts() -> None:
    documents = [{"title": "b", "text": "c"}]
    row = row_of({"messages": CHAT, "documents": documents})
    assert (row.documents, row.extras) == (documents, {"documents": documents})
    assert row_of({"messages": CHAT, "documents": "[]"}) == rows.Row("here", CHAT)
    with_null = [documents[0] | {"url": None}]
    assert row_of({"messages": CHAT, "documents": with_null}).documents == documents
    for wrong, complaint in (
        (["c"], "each of documents must be an object, not 'c'"),
        ([{"text": 5}], "text in documents must be a string, not 5"),
    ):
        assert complaint in fault_of({"messages": CHAT, "documents": wrong})


def test_json_that_is_no_list_of_turns_is_a_text_as_any_other() -> None:
    for text in ('[{"from": "Paris", "value": 3}]', '[{"role": "king"}]', '{"role": "user"}', "[]"):
        assert row_of({"text": text}) == rows.Row("here", text=text)
        assert turns_of({"prompt": text, "completion": "b"}) == rows.pair_turns(text, "b")


def test_a_row_of_preference_data_is_refused_with_what_to_keep() -> None:
    pair = {"prompt": "a", "completion": "b"}
    for more in ({"label": False}, {"label": True}, {"kto_tag": "False"}, {"rejected": "c"}):
        assert "must not be ignored: keep only good answers, and rem" in fault_of(pair | more)


def test_an_answer_before_the_first_question_is_not_in_the_loss() -> None:
    turns = [
        {"from": "gpt", "value": "Hello!"},
        {"from": "human", "value": "a"},
        {"from": "gpt", "value": "b"},
    ]
    found = turns_of({"conversations": turns, "system": "Be kind."})
    assert [turn["content"] for turn in found] == ["Be kind.", "Hello!", "a", "b"]
    assert [rows.is_in_loss(turn) for turn in found] == [False, False, False, True]


def test_the_roles_of_all_formats_are_read_in_any_case() -> None:
    turns = [
        {"role": "Developer", "content": "e"},
        {"role": "USER", "content": "a"},
        {"role": "Assistant", "content": "b"},
        {"role": "tool", "content": "f", "tool_call_id": "1", "name": "g"},
        {"role": "function", "content": "", "name": "g"},
        {"role": "GPT", "content": "c"},
    ]
    assert turns_of({"messages": turns}) == [
        {"role": "developer", "content": "e"},
        user("a"),
        assistant("b"),
        {"role": "tool", "content": "f", "tool_call_id": "1", "name": "g"},
        {"role": "tool", "content": "", "name": "g"},
        assistant("c"),
    ]


def test_a_system_message_of_its_own_key_comes_first_in_any_format() -> None:
    system = {"role": "system", "content": "Be kind."}
    assert turns_of({"messages": CHAT, "system": "Be kind."}) == [system, *CHAT]
    pair = {"question": "a", "answer": "b"}
    assert turns_of(pair | {"system": "Be kind."}) == [system, *CHAT[:2]]
    for key in rows.SYSTEM_KEYS:
        assert turns_of(pair | {key: "Be kind."}) == [system, *CHAT[:2]]
    empty = {"role": "system", "content": ""}
    assert turns_of(pair | {"system": ""}) == [empty, *CHAT[:2]], "not our default message"
    assert turns_of({"messages": CHAT, "system": ""}) == turns_of([empty, *CHAT]) == [empty, *CHAT]
    both = {"system": "a", "system_prompt": "b"}
    assert "system_prompt cannot be used here" in fault_of({"messages": CHAT} | both)
    lists = {"prompt": CHAT[:1], "completion": CHAT[1:2], "system": "Be kind."}
    assert turns_of(lists) == [system, *CHAT[:2]]


def test_the_history_of_a_question_becomes_turns_in_the_loss() -> None:
    row = {"instruction": "c", "output": "d", "history": [["a", "b"]]}
    assert turns_of(row) == [rows.BRIEF_SYSTEM_MESSAGE, *CHAT]
    assert turns_of(row | {"history": []}) == rows.pair_turns("c", "d")
    for history in ([["a"]], ["ab"], [["a", "b", "c"]]):
        assert "history must be a list of [question, answer]" in fault_of(
            row | {"history": history}
        )
    assert "an answer in history is empty" in fault_of(row | {"history": [["a", ""]]})


def test_only_the_completion_of_two_lists_of_turns_is_in_the_loss() -> None:
    found = turns_of({"prompt": CHAT[:3], "completion": CHAT[3:]})
    assert [turn["content"] for turn in found] == ["a", "b", "c", "d"]
    assert [rows.is_in_loss(turn) for turn in found] == [False, False, False, True]
    assert "completion must be JSON, not 'd'" in fault_of({"prompt": CHAT[:3], "completion": "d"})
    assert "completion must be a string" in fault_of({"prompt": "a", "completion": CHAT[1:]})


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def test_tools_are_read_in_both_forms_and_as_json_text() -> None:
    row = {"messages": CHAT}
    bare = TOOL["function"]
    flat = {"type": "function"} | bare
    for more in ({"tools": [TOOL]}, {"tools": [bare]}, {"tools": [flat]}, {"functions": [bare]}):
        assert row_of(row | more) == rows.Row("here", CHAT, [TOOL])
    assert row_of(row | {"tools": json.dumps([TOOL])}).tools == [TOOL]
    assert row_of({"prompt": "a", "completion": "b", "tools": [TOOL]}).tools == [TOOL]
    for empty in ([], "", "[]", None):
        assert row_of(row | {"tools": empty}) == rows.Row("here", CHAT)


def test_a_call_has_its_arguments_as_an_object_and_no_content() -> None:
    """A template would write arguments that are JSON text as a string in a string."""
    function = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    calls = [
        {"tool_calls": [CALL]},
        {"tool_calls": [{"type": "function", "function": function}]},
        {"tool_calls": json.dumps([function])},
        {"function_call": function, "tool_calls": []},
    ]
    expected = [CHAT[0], assistant("", tool_calls=[CALL])]
    for call in calls:
        assert turns_of([CHAT[0], {"role": "assistant"} | call]) == expected
        assert turns_of([CHAT[0], assistant(None, **call)]) == expected
    for nothing in ({}, {"arguments": None}, {"arguments": ""}):
        [_, turn] = turns_of([CHAT[0], assistant("", function_call={"name": "now"} | nothing)])
        assert turn["tool_calls"][0]["function"]["arguments"] == {}
    with_id = CALL | {"id": "call_1"}
    assert turns_of([CHAT[0], assistant("b", tool_calls=[with_id])])[1]["tool_calls"] == [with_id]


def test_thoughts_stay_in_their_turn() -> None:
    for key in rows.THOUGHT_KEYS:
        assert turns_of([user("a", **{key: ""}), assistant("b", **{key: "hm"})]) == [
            user("a"),
            assistant("b", **{key: "hm"}),
        ]
        assert turns_of([user("a"), assistant("b", **{key: ""})]) == CHAT[:2]


def test_a_null_counts_as_an_absent_key() -> None:
    nulls = dict.fromkeys([*rows.MEANINGFUL, "input", "text", "name"])
    assert row_of({"messages": CHAT} | nulls) == rows.Row("here", CHAT)
    turns = [turn | dict.fromkeys([*rows.MEANINGFUL, "name", "from"]) for turn in CHAT]
    assert row_of({"messages": turns}) == rows.Row("here", CHAT)
    row = {"messages": None, "instruction": "a", "input": None, "output": "b"}
    assert turns_of(row) == rows.pair_turns("a", "b")
    assert "'prompt', 'completion' (null); a row" in fault_of({"prompt": "a", "completion": None})


@pytest.mark.parametrize("value", [0, 5, 2.5, True, False, {}, {"a": 1}])
@pytest.mark.parametrize("key", ["instruction", "input", "output", "system", "text"])
def test_a_value_that_is_not_text_is_refused_by_name(key: str, value: object) -> None:
    """As text, a 5 could be "5" or "5.0": the file must decide."""
    if key == "text":
        row = {"text": value}
    else:
        row = {"instruction": "a", "output": "b", key: value}
    assert f"{key} must be a string, not {rows._describe(value)}" in fault_of(row)


@pytest.mark.parametrize("key", sorted(rows.MEANINGFUL))
def test_a_key_with_a_meaning_is_used_or_refused_by_name(key: str) -> None:
    """A value of no key's type: a key that is read refuses it, too."""
    complaint = f"{key} (cannot be used here|must be)"
    for row in ({"messages": CHAT}, {"question": "a", "answer": "b"}, {"text": "a"}):
        assert re.match(complaint, fault_of(row | {key: 0.5}))
    for place, turn in enumerate(CHAT[:2]):
        turns = [*CHAT[:place], turn | {key: 0.5}, *CHAT[place + 1 :]]
        assert re.match(f"turn {place + 1} of messages: {complaint}", fault_of(turns))


def test_other_keys_are_not_read_and_their_names_are_kept() -> None:
    turns = [CHAT[0] | {"id": 3, "when": None}, CHAT[1] | {"model": "x"}]
    row = row_of({"messages": turns, "source": "web", "prompt": "a"})
    assert row.turns == CHAT[:2]
    assert row.unread == {"source", "prompt", "messages.id", "messages.model"}
    pair = row_of({"prompt": "a", "completion": "b", "id": "c", "text": "d"})
    assert (pair.turns, pair.unread) == (rows.pair_turns("a", "b"), {"id", "text"})
    assert row_of({"text": "a", "url": "b"}).unread == {"url"}


SYSTEM_LAST = [*CHAT, {"role": "system", "content": "e"}]
IMAGE = [{"type": "image_url", "image_url": {"url": "x"}}]
FAULTS = [
    (7, "it must be an object, not 7"),
    ({}, "its keys are none; a row has those of one format"),
    ({"prompt": "a"}, "its keys are 'prompt'; a row has those of one format"),
    ({"prompt": "a", "completion": " \n"}, "completion is empty"),
    (
        {"prompt": str(CHAT[:1]), "completion": "b"},
        "prompt is a list of turns that was turned into",
    ),
    ({"messages": '[{"role": "user", "role": "tool"}]'}, "an object has the key 'role' twice"),
    ({"prompt": "a", "completion": "\ud800"}, "half of a surrogate pair at character 0"),
    ({"text": ""}, "text is empty"),
    ({"text": json.dumps(CHAT)}, "text is a list of turns that was turned into text"),
    ([], "messages must be a list of at least one turn, not an empty list"),
    ({"messages": {"role": "user"}}, "messages must be a list, not an object"),
    ({"messages": "[{'role'"}, "messages must be JSON, not \"[{'role'\" (Expecting property"),
    ({"messages": "7"}, "messages must be JSON, not '7' (it is not an object, its type is int)"),
    ({"messages": '{"a": 1}'}, "messages must be a list, not an object"),
    (["hi"], "turn 1 of messages: it must be an object, not 'hi'"),
    ([None], "turn 1 of messages: it must be an object, not null"),
    (
        [user(None), *CHAT],
        "turn 1 of messages: content is null, which only an answer with tool_calls",
    ),
    ([user("a"), assistant(None)], "turn 2 of messages: content is null"),
    ([user(None) | {"tool_calls": []}], "turn 1 of messages: content is null"),
    ([{"from": "human", "value": None}], "turn 1 of messages: value is null"),
    ([{"role": None, "content": "a"}], "its keys are 'role' (null), 'content'; required are role"),
    ([{"role": "user"}], "turn 1 of messages: its keys are 'role'; required are role, content"),
    ([{"content": "a"}], "turn 1 of messages: its keys are 'content'; required are role"),
    ([{"role": "robot", "content": "b"}], "role must be one of system, developer, human, user,"),
    ([{"role": 7, "content": "b"}], "role must be one of system, developer, human, user,"),
    ([user(IMAGE)], "part 1 of content must have the type 'text', not 'image_url'"),
    ([user(["a"])], "part 1 of content must have the type 'text', not None"),
    ([user([{"type": "text"}])], "text in content must be a string, not null"),
    (CHAT[:1], "messages has no answer to train on"),
    (CHAT[1:2], "messages has no answer to train on: none with a weight other than 0 follows a"),
    ([user("a"), assistant("")], "the answer (content) is empty"),
    ([user("a"), assistant([])], "the answer (content) is empty"),
    ([user("a", weight=2)], "weight must be 0 or 1, not 2"),
    ([user("a"), assistant("b", weight=0.5)], "weight must be 0 or 1, not 0.5"),
    ([user("a"), assistant("b", train="no")], "train must be 0 or 1, not 'no'"),
    ([user("a", train=True)], "train is true, but only the answers of the assistant are in the l"),
    ({"conversations": SYSTEM_LAST}, "conversations: a system message must come first"),
    ({"messages": CHAT, "tools": [7]}, "each of tools must be a function with a name, not 7"),
    (
        {"messages": CHAT, "tools": [{"function": 7}]},
        "each of tools must be a function with a name",
    ),
    ({"messages": CHAT, "tools": [{"a": 7}]}, "each of tools must be a function with a name"),
    ({"messages": CHAT, "tools": [{"name": "\ud800"}]}, "tools has half of a surrogate pair"),
    ([user("a", tool_calls=[CALL])], "turn 1 of messages: tool_calls cannot be used here"),
    ([user("a"), assistant("", tool_calls=[])], "the answer (content) is empty"),
    (
        [user("a"), assistant("", function_call={"name": "f", "arguments": [1]})],
        "arguments must be",
    ),
    (
        [user("a"), assistant("", function_call={"name": "f", "arguments": "x"})],
        "arguments must be",
    ),
]


def check_faults(folder: Path, module: ModuleType = rows) -> None:
    for content, reason in FAULTS:
        assert reason in fault_of(content, module)


def test_each_bad_row_has_its_reason(tmp_path: Path) -> None:
    check_faults(tmp_path)
    assert rows.parse_row(Record("here", None, "not JSON")) == rows.Row("here", fault="not JSON")


@given(JSON | LIKELY)
def test_any_row_is_turns_or_a_text_or_a_fault_in_one_line(content: object) -> None:
    row = row_of(content if isinstance(content, dict) else {"messages": content})
    assert [bool(row.turns), bool(row.text), bool(row.fault)].count(True) == 1
    assert "\n" not in row.fault and len(row.fault) < 2000 + len(str(content))
    assert not row.turns or any(map(rows.is_in_loss, row.turns))


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


def check_rows(folder: Path, module: ModuleType) -> None:
    """One example of each property above."""
    sharegpt = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert turns_of({"conversations": sharegpt, "system": "s"}, module)[0]["content"] == "s"
    assert turns_of({"conversations": sharegpt}, module) == CHAT[:2]
    row = {"instruction": "a", "input": "b", "output": "c"}
    assert turns_of(row, module)[1]["content"] == "a\n\nb"
    assert turns_of({"instruction": "", "input": "b", "output": "c"}, module)[1]["content"] == "b"
    assert row_of({"instruction": "a", "output": "c", "text": "d"}, module).turns
    turns = turns_of([user("a"), assistant("b", weight=0), *CHAT[2:]], module)
    assert not module.is_in_loss(turns[1])
    turns = turns_of([assistant("b"), *CHAT[2:]], module)
    assert not module.is_in_loss(turns[0])
    turns = turns_of({"prompt": CHAT[:3], "completion": CHAT[3:]}, module)
    assert not module.is_in_loss(turns[1])


@pytest.mark.parametrize(
    "old, new, check",
    [
        ('"gpt": "assistant"', '"gpt": "user"', check_rows),
        ("[*_pop_system(unread), *_pop_turn_list", "[*_pop_turn_list", check_rows),
        ('"\\n\\n".join(filter(None, [question, more]))', 'question + "\\n\\n" + more', check_rows),
        ('        turn["weight"] = 0\n', "        pass\n", check_rows),
        ("*map(_outside_loss, turns[:start])", "*turns[:start]", check_rows),
        ("asked = map(_outside_loss, ", "asked = (", check_rows),
        ("_string(value, key).strip()", "_string(value, key)", check_faults),
        ("        value.encode()\n", "        pass\n", check_faults),
        ("if flag not in (0, 1)", "if False", check_faults),
        ('if "system" in roles[1:]', "if False", check_faults),
        ("            _refuse_meaningful(unread_in_turn)\n", "", check_faults),
    ],
)
def test_a_mutant_of_the_formats_is_noticed(
    tmp_path: Path, old: str, new: str, check: Callable
) -> None:
    check(tmp_path, rows)
    with pytest.raises((AssertionError, ValueError, IndexError, KeyError)):
        check(tmp_path, mutated(rows, old, new, tmp_path))
