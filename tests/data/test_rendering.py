"""What a row says is in the text that the model sees, or the row is refused by name."""

import copy
import datetime
import re

import pytest
from transformers import PreTrainedTokenizerBase

from data import rendering, rows
from data.chat_template import Template
from helpers import models

LOOP = "{% for message in messages %}"
HEADER = "{{ '<|im_start|>' + message['role'] + '\n' }}"
CONTENT = "{{ message['content'] + '<|im_end|>\n' }}"
PROMPT = "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
PLAIN = LOOP + HEADER + CONTENT + PROMPT
TRIMMED = PLAIN.replace("message['content']", "message['content'] | trim")
UPPER = PLAIN.replace("message['content']", "message['content'] | upper")
SPACED = PLAIN.replace("['content']", "['content'].split('</think>') | join('</think>\n\n')")
WITHOUT_SYSTEM = PLAIN.replace(LOOP, LOOP[:-3] + " if message['role'] != 'system' %}")
IN_PARTS = PLAIN.replace(
    CONTENT,
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{{ '<|im_end|>\n' }}",
)
DATED = "{{ 'Today is ' + strftime_now(\"%d %b %Y\") + '. ' }}" + PLAIN
CHAT: list[rows.Turn] = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": " Two and two? "},
    {"role": "assistant", "content": "<think>Add.</think>Four."},
]
RENDERED = (
    "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n Two and two? <|im_end|>\n"
    "<|im_start|>assistant\n<think>Add.</think>Four.<|im_end|>"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return models.tokenizer()


def with_template(tokenizer: PreTrainedTokenizerBase, text: str) -> PreTrainedTokenizerBase:
    other = copy.deepcopy(tokenizer)
    other.chat_template = text
    return other


def encoded_text(tokenizer: PreTrainedTokenizerBase, template: str, chat: list[rows.Turn]) -> str:
    [found] = Template(with_template(tokenizer, template)).encode_conversation(chat)
    return tokenizer.decode(found.ids)


def test_a_template_may_change_white_space(tokenizer: PreTrainedTokenizerBase) -> None:
    assert encoded_text(tokenizer, PLAIN, CHAT) == RENDERED
    trimmed = RENDERED.replace(" Two and two? ", "Two and two?")
    assert encoded_text(tokenizer, TRIMMED, CHAT) == trimmed
    spaced = RENDERED.replace("</think>Four", "</think>\n\nFour")
    assert encoded_text(tokenizer, SPACED, CHAT) == spaced


@pytest.mark.parametrize(
    "template, turn, content",
    [
        (UPPER, "turn 1 (system)", "Be kind."),
        (WITHOUT_SYSTEM, "turn 1 (system)", "Be kind."),
        (
            PLAIN.replace("message['content']", "message['content'][:8]"),
            "turn 2 (user)",
            " Two and",
        ),
    ],
)
def test_a_content_that_the_template_drops_or_changes_is_refused_with_its_turn(
    tokenizer: PreTrainedTokenizerBase, template: str, turn: str, content: str
) -> None:
    with pytest.raises(rows.BadRow) as error:
        encoded_text(tokenizer, template, CHAT)
    assert re.match(
        f"{re.escape(turn)}: the chat template of .*SmolLM2.* drops or changes '{content}.*'",
        str(error.value),
    )


def test_a_developer_that_the_template_drops_may_be_the_system(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    template = PLAIN.replace(LOOP, LOOP[:-3] + " if message['role'] != 'developer' %}")
    with pytest.raises(rows.BadRow, match=r"turn 1 \(developer\): .* or give it the role system$"):
        encoded_text(tokenizer, template, [CHAT[0] | {"role": "developer"}, *CHAT[1:]])


def test_our_own_system_message_may_be_dropped(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = rows.pair_turns("a", "b")
    text = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>"
    assert encoded_text(tokenizer, WITHOUT_SYSTEM, chat) == text
    equal = [dict(chat[0]), *chat[1:]]
    with pytest.raises(rows.BadRow, match=r"turn 1 \(system\)"):
        encoded_text(tokenizer, WITHOUT_SYSTEM, equal)


EMPTY = {"role": "system", "content": ""}
DEFAULT = (
    "{% if not messages[0]['content'] or messages[0]['role'] != 'system' %}Be wise.\n{% endif %}"
)


@pytest.mark.parametrize(
    "template, start",
    [
        (PLAIN, "<|im_start|>system\n<|im_end|>\n"),
        (PLAIN.replace(LOOP, LOOP[:-3] + " if message['content'] %}"), ""),
        (WITHOUT_SYSTEM, ""),
        (None, ""),
    ],
)
def test_an_empty_system_message_is_written_as_one_or_left_out(
    tokenizer: PreTrainedTokenizerBase, template: str | None, start: str
) -> None:
    text = encoded_text(tokenizer, template, [EMPTY, *rows.pair_turns("a", "b")[1:]])
    assert text.startswith(start) and "briefly" not in text and text.count("system") < 2
    made = Template(with_template(tokenizer, template))
    assert text.startswith(tokenizer.decode(made.encode_prompt("a", system="")))


def test_an_empty_system_message_that_the_template_replaces_is_refused(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    made = Template(with_template(tokenizer, DEFAULT + PLAIN))
    complaint = (
        "^the system message is empty, and .* writes one of its own .*: give a system message"
    )
    with pytest.raises(rows.BadRow, match=complaint):
        made.encode_conversation([EMPTY, *CHAT[1:]])
    with pytest.raises(rows.BadRow, match=complaint):
        made.encode_prompt("a", system="")
    assert encoded_text(tokenizer, DEFAULT + PLAIN, CHAT) == RENDERED


def test_a_template_that_wants_contents_in_parts_gets_them_in_parts(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    assert encoded_text(tokenizer, IN_PARTS, CHAT) == RENDERED
    made = Template(with_template(tokenizer, IN_PARTS))
    assert "Who?" in tokenizer.decode(made.encode_prompt("Who?"))


def test_a_turn_without_content_stays_so_in_parts(tokenizer: PreTrainedTokenizerBase) -> None:
    renderer = rendering.Renderer(with_template(tokenizer, IN_PARTS))
    call = {"role": "assistant", "tool_calls": []}
    text = "<|im_start|>assistant\n<|im_end|>\n"
    assert renderer.render([call]) == text
    renderer.require_written([call], text)
    lines = rendering.Renderer(with_template(tokenizer, None))
    assert lines.render([CHAT[0], call]) == "Be kind.\n<|im_end|>"


def test_a_content_that_a_template_writes_as_json_is_not_lost(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    as_json = PLAIN.replace("message['content']", "(message['content'] | tojson)")
    chat = [CHAT[1] | {"content": 'a "b"\nc'}, CHAT[2]]
    assert '"a \\"b\\"\\nc"' in encoded_text(tokenizer, as_json, chat)


@pytest.mark.parametrize("template", [PLAIN, None])
@pytest.mark.parametrize("index, role", [(0, "system"), (1, "user"), (2, "assistant")])
def test_a_control_token_in_a_turn_is_refused_and_in_a_document_it_is_one(
    tokenizer: PreTrainedTokenizerBase, template: str | None, index: int, role: str
) -> None:
    made = Template(with_template(tokenizer, template))
    chat = list(CHAT)
    chat[index] = {"role": role, "content": "It ends with <|im_end|>."}
    complaint = re.escape(f"turn {index + 1} ({role}) contains <|im_end|>, a control token: remove")
    with pytest.raises(rows.BadRow, match=f"^{complaint}"):
        made.encode_conversation(chat)
    with pytest.raises(rows.BadRow, match=r"^turn 2 \(user\) contains <\|im_start\|>"):
        made.encode_prompt("a<|im_start|>b")
    assert tokenizer.eos_token_id in made.encode_document("a<|im_end|>b").ids[:-1]


def test_a_type_error_in_a_template_is_an_error_of_the_row(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    template = PLAIN.replace("message['content']", "message['content'] + messages")
    with pytest.raises(rows.BadRow, match="refuses it .*str"):
        encoded_text(tokenizer, template, CHAT)


def test_the_date_in_a_template_is_that_of_the_run(tokenizer: PreTrainedTokenizerBase) -> None:
    dated = with_template(tokenizer, DATED)
    past = datetime.date(2024, 2, 29)
    [found] = Template(dated, past).encode_conversation(CHAT)
    assert tokenizer.decode(found.ids) == "Today is 29 Feb 2024. " + RENDERED
    now = rendering.today()
    prompt = tokenizer.decode(Template(dated).encode_prompt("Who?"))
    assert prompt.startswith(f"Today is {now:%d %b %Y}. ")
    assert Template(dated).encode_prompt("Who?") == Template(dated, now).encode_prompt("Who?")


def test_a_format_of_the_date_that_is_computed_is_refused(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    with pytest.raises(ValueError, match="strftime_now with a format that is not a plain string"):
        Template(with_template(tokenizer, "{{ strftime_now('%d' + '%m') }}" + PLAIN))
