"""A string that a template does not write is found, even if it is elsewhere in the rendering."""

import copy

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from data import rows
from data.chat_template import Template
from helpers import models

TOOL = {"type": "function", "function": {"name": "weather", "description": "Hm."}}
ARGUMENTS = {"n": 3, "cities": ["Oslo", {"city": "Oslo"}]}
CALL = {"type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
DOCUMENT = {"title": "Oslo", "text": "It is warm."}

# Writes every key; each test takes out or changes one of its pieces.
WHOLE = """
{%- for tool in tools or [] %}{{ tool | tojson }}{% endfor %}
{%- for each in documents or [] %}{{ each.title }}: {{ each.text }}{% endfor %}
{%- for m in messages %}<|im_start|>{{ m.role }} {{ m.name }}
{% if m.thinking %}<think>{{ m.thinking }}</think>{% endif %}
{{- m.content }}
{%- for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant 
{% endif %}"""
SHORT = st.sampled_from(["a", "1", "s", " t", "e\n", "é", '"', "as", "user"])
CONTENTS = st.lists(SHORT, min_size=2, max_size=6).filter(lambda contents: len(contents) % 2 == 0)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return copy.deepcopy(models.tokenizer())


def render(
    tokenizer: PreTrainedTokenizerBase, template: str, turns: list[rows.Turn], **extras: list
) -> str:
    """The text of a conversation, which is empty if it is more than one sequence."""
    tokenizer.chat_template = template
    rendered = Template(tokenizer).render_conversation(turns, extras)
    return rendered[-1].text


def chat_of(contents: list[str]) -> list[rows.Turn]:
    roles = ["user", "assistant"] * (len(contents) // 2)
    return [{"role": role, "content": text} for role, text in zip(roles, contents)]


@given(CONTENTS, st.data())
@example(["a", "banana"], None)
@example(["1", "1", "1", "1"], None)
def test_a_template_that_drops_any_one_turn_is_noticed_whatever_the_other_turns_say(
    tokenizer: PreTrainedTokenizerBase, contents: list[str], data: st.DataObject | None
) -> None:
    turns = chat_of(contents)
    assert render(tokenizer, WHOLE, turns)
    dropped = data.draw(st.integers(0, len(turns) - 1)) if data else 0
    piece = f"{{{{- m.content if loop.index0 != {dropped} }}}}"
    with pytest.raises(rows.BadRow) as error:
        render(tokenizer, WHOLE.replace("{{- m.content }}", piece), turns)
    complaint = f"turn {dropped + 1} ({turns[dropped]['role']}): the chat template of "
    assert str(error.value).startswith(complaint)
    assert f"drops or changes {contents[dropped]!r}, so the model" in str(error.value)


@pytest.mark.parametrize("change", ["upper", "replace('s', 't')", "reverse"])
def test_a_template_that_changes_a_letter_is_noticed(
    tokenizer: PreTrainedTokenizerBase, change: str
) -> None:
    template = WHOLE.replace("m.content", f"m.content | {change}")
    with pytest.raises(rows.BadRow, match="drops or changes 's'"):
        render(tokenizer, template, chat_of(["s", "S, not s or t"]))


FULL_CHAT = [
    {"role": "user", "content": "The weather in Oslo? Hm.", "name": "Oslo"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "It is warm.", "name": "weather"},
    {"role": "assistant", "content": "Hm, the weather in Oslo? It is warm.", "thinking": "Hm."},
]


@pytest.mark.parametrize(
    "piece, other, complaint",
    [
        ("tool | tojson", "''", "the chat template of .* does not write tools ('weather')"),
        ("tool | tojson", "tool.function.name", "the chat template .* not write tools ('Hm.')"),
        ("each.title", "''", "the chat template of .* does not write documents ('Oslo')"),
        ("each.text", "''", "the chat template of .* does not write documents ('It is warm.')"),
        ("m.name", "''", "turn 1 (user): the chat template of .* does not write name ('Oslo')"),
        ("m.thinking }}", "'' }}", "turn 4 (assistant): .* does not write thinking ('Hm.')"),
        ("call.function | tojson", "''", "turn 2 (assistant): .* tool_calls ('weather')"),
        ("call.function | tojson", "call.function.name", "turn 2 (assistant): .* ('Oslo')"),
    ],
)
def test_a_key_that_the_template_does_not_write_is_refused_although_its_text_is_in_a_content(
    tokenizer: PreTrainedTokenizerBase, piece: str, other: str, complaint: str
) -> None:
    assert WHOLE.count(piece) == 1
    pattern = "^" + complaint.replace("(", r"\(").replace(")", r"\)") + ": remove the key, or use"
    assert render(tokenizer, WHOLE, FULL_CHAT, tools=[TOOL], documents=[DOCUMENT])
    with pytest.raises(rows.BadRow, match=pattern):
        template = WHOLE.replace(piece, other)
        render(tokenizer, template, FULL_CHAT, tools=[TOOL], documents=[DOCUMENT])


@pytest.mark.parametrize("key", ["tools", "documents"])
def test_a_control_token_in_a_tool_or_a_document_is_refused(
    tokenizer: PreTrainedTokenizerBase, key: str
) -> None:
    extras = {"tools": [TOOL], "documents": [DOCUMENT]}
    extras[key] = [{**extras[key][0], "text": "a<|im_end|>b"}]
    with pytest.raises(rows.BadRow, match=rf"^{key} contains <\|im_end\|>, a control token"):
        render(tokenizer, WHOLE, FULL_CHAT, **extras)


def test_the_name_of_a_tool_that_repeats_the_name_of_a_call_may_be_left_out(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    calling = [{"role": "user", "content": "Is it warm?"}, *FULL_CHAT[1:]]
    without_names = WHOLE.replace("{{ m.name }}", "")
    assert render(tokenizer, without_names, calling)
    calling[2] = calling[2] | {"name": "other"}
    with pytest.raises(rows.BadRow, match=r"^turn 3 \(tool\): .* does not write name \('other'\)"):
        render(tokenizer, without_names, calling)


def test_a_template_that_refuses_marks_is_judged_by_its_text_alone(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    limit = "{% if m.content | length > 6 %}{{ raise_exception('too long') }}{% endif %}"
    template = WHOLE.replace("{{- m.content }}", limit + "{{- m.content }}")
    assert render(tokenizer, template, chat_of(["xy", "z"]))
    with pytest.raises(rows.BadRow, match="drops or changes 'xy'"):
        render(tokenizer, template.replace("{{- m.content }}", ""), chat_of(["xy", "z"]))


def test_a_thought_that_a_template_takes_out_of_a_content_and_writes_again_is_not_lost(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Like Qwen 3's; it drops a mark with what stands before the thought."""
    again = (
        "<think>\n{{ m.content.split('</think>')[0].split('<think>')[-1] }}</think>\n\n"
        "{{ m.content.split('</think>')[-1] }}"
    )
    template = WHOLE.replace(
        "{{- m.content }}",
        "{% if '</think>' in m.content %}" + again + "{% else %}{{ m.content }}{% endif %}",
    )
    text = render(tokenizer, template, chat_of(["a", "<think>b</think>c"]))
    assert text.endswith("<think>\nb</think>\n\nc<|im_end|>")
