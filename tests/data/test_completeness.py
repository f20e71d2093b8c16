"""Tools, thoughts and calls of a row are in its tokens, or the row is refused by the key's name."""

import copy
import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from data import dataset
from helpers import models

TOOL = {"type": "function", "function": {"name": "weather", "description": "Of a city."}}
CALL = {"name": "weather", "arguments": {"city": 'O"s\nlö', "days": [{"n": 3, "of": "May"}]}}
QUESTION = {"role": "user", "content": "Is it warm?"}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
FOUND = {"role": "tool", "content": "21 degrees"}
ANSWER = {"role": "assistant", "content": "Yes.", "reasoning_content": "21 is\nwarm"}

# Like Qwen 3's: thoughts are written with the last answer alone.
FULL_TEMPLATE = """
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content and loop.last %}<think>  {{ m.reasoning_content }}</think>{% endif %}
{{- m.content }}
{%- for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return copy.deepcopy(models.tokenizer())


def load(
    folder: Path, turns: list[dict], tokenizer: PreTrainedTokenizerBase, template: str | None
) -> list[str]:
    """The texts in the loss of a row with tools."""
    path = folder / "rows.jsonl"
    path.write_text(2 * (json.dumps({"messages": turns, "tools": [TOOL]}) + "\n"))
    tokenizer.chat_template = template
    task = dataset.load_task(str(path), tokenizer, 512)
    for example in task.train:
        assert '"name": "weather"' in tokenizer.decode(example.ids[: example.n_prompt])
    labels = [[n for n in e.labels if n != dataset.IGNORE_INDEX] for e in task.train]
    return [tokenizer.decode(each) for each in labels]


def test_a_template_that_knows_tools_writes_them_before_the_answer_and_calls_in_the_loss(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    [in_loss] = load(tmp_path, [QUESTION, CALLING, FOUND, ANSWER], tokenizer, FULL_TEMPLATE)
    call = f"<call>{json.dumps(CALL, ensure_ascii=False)}</call><|im_end|>"
    assert in_loss == call + "<think>  21 is\nwarm</think>Yes.<|im_end|>"


def test_each_answer_has_its_thoughts_where_the_template_writes_the_last_alone(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    turns = [QUESTION, ANSWER, QUESTION, ANSWER | {"content": "No."}]
    answers = load(tmp_path, turns, tokenizer, FULL_TEMPLATE)
    assert answers == [f"<think>  21 is\nwarm</think>{text}.<|im_end|>" for text in ("Yes", "No")]


def test_thoughts_that_are_not_in_the_loss_may_be_dropped(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    turns = [QUESTION, ANSWER | {"weight": 0}, QUESTION, ANSWER]
    [answer] = load(tmp_path, turns, tokenizer, FULL_TEMPLATE)
    assert answer == "<think>  21 is\nwarm</think>Yes.<|im_end|>"


@pytest.mark.parametrize(
    "old, new, complaint",
    [
        ("tool | tojson", "''", "tools ('weather')"),
        ("call.function | tojson", "''", "tool_calls ('weather')"),
        (
            "call.function | tojson",
            "call.function.name ~ (call.function.arguments.values() | list | tojson)",
            "tool_calls ('city')",
        ),
        (
            "call.function | tojson",
            "call.function | tojson | replace('May', '')",
            "tool_calls ('May')",
        ),
        ("m.reasoning_content }}", "'' }}", "reasoning_content ('21 is\\nwarm')"),
    ],
)
def test_a_key_that_the_template_does_not_write_is_refused_by_name(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, old: str, new: str, complaint: str
) -> None:
    assert FULL_TEMPLATE.count(old) == 1
    with pytest.raises(ValueError) as error:
        load(
            tmp_path,
            [QUESTION, CALLING, FOUND, ANSWER],
            tokenizer,
            FULL_TEMPLATE.replace(old, new),
        )
    assert f"does not write {complaint}: remove the key, or use a model" in str(error.value)


def test_a_model_without_a_template_has_no_tools(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ValueError, match="does not write tools"):
        load(tmp_path, [QUESTION, ANSWER], tokenizer, None)
