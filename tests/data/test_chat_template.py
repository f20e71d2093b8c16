"""The loss covers each answer with its end and no other token, for any template and text."""

import copy
import re
from itertools import groupby
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from data import answers, chat_template, rows
from helpers import models
from helpers.mutants import mutated

HEADER = "{{ '<|im_start|>' + message['role'] + '\n' }}"
# ChatML as SmolLM2 has it, with the markers of transformers around what the model generates.
MARKED = (
    "{% for message in messages %}"
    + HEADER
    + "{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Like Gemma's: no system messages, strictly alternating turns, surrounding spaces removed.
STRICT = (
    "{% for message in messages %}"
    "{% if message['role'] != ['user', 'assistant'][loop.index0 % 2] %}"
    "{{ raise_exception('turns alternate, and the first is the user\\'s') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Like Qwen 3's: writes a thought before the last answer, but not before earlier ones.
FORGETFUL = (
    "{% for message in messages %}"
    + HEADER
    + "{% if loop.last and message['role'] == 'assistant' %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Writes the thought of an answer while it is the last turn.
SHORTENING = MARKED.replace(
    "{{ message['content'] + '<|im_end|>' }}{% endgen",
    "{{ (message['content'] if loop.last else message['content'].split('</think>')[-1])"
    " + '<|im_end|>' }}{% endgen",
)
# Ends an answer with two special tokens, of which the first is not its end.
TWICE = MARKED.replace("'<|im_end|>' }}{% endgen", "'<file_sep><|im_end|>' }}{% endgen")
# What these write depends on the length of a content, so marks in it would change it.
COUNTING = MARKED.replace(HEADER, "{{ messages[0]['content'] | length }}" + HEADER).replace(
    "{% if add_generation_prompt %}",
    "{% if add_generation_prompt %}{{ messages[0]['content'] | length }}",
)
LIMITED = MARKED.replace(
    HEADER,
    "{% if message['content'] | length > 2 %}{{ raise_exception('too long') }}{% endif %}" + HEADER,
)
# Writes nothing between a question and its answer.
TIGHT = (
    "{% for message in messages %}{{ message['content'] }}{% if message['role'] == 'assistant' %}"
    "{{ '<|im_end|>' }}{% endif %}{% endfor %}"
)
# Like the first one of DeepSeek R1: cuts an answer up to the end of its thought.
CUTTING = MARKED.replace(
    "{{ message['content'] + '<|im_end|>' }}{% endgen",
    "{{ message['content'].split('</think>')[-1] + '<|im_end|>' }}{% endgen",
)
# Like the second one: the header of an answer begins a thought, too.
THINKING = CUTTING.replace("assistant\n' }}", "assistant\n<think>\n' }}")
# Like Qwen 3.5's for answers without thoughts.
CLOSED = MARKED.replace("assistant\n' }}", "assistant\n<think></think>' }}").replace(
    "{% generation %}",
    "{% if '</think>' not in message['content'] %}<think></think>{% endif %}{% generation %}",
)
# Writes a thought before each answer, in the header or after it.
OWN_HEADER = MARKED.replace("assistant\n' }}", "assistant\n<think></think>' }}").replace(
    "{% generation %}", "<think></think>{% generation %}"
)
OWN_THOUGHT = MARKED.replace("{% generation %}", "{% generation %}<think></think>")
# Other words are in the header of an answer, but a given answer lacks them.
REPLYING = CUTTING.replace("assistant\n' }}", "assistant\n<reply>\n' }}")
# A line break is one token, and two are one token, except before a letter.
DOUBLE = MARKED.replace("assistant\n' }}", "assistant\n\n' }}").replace(
    "message['role'] + '\n' }}", "message['role'] + '\n\n' }}"
)
# Like the first one of Llama 3: writes the header of an answer at the end in any case.
ALWAYS = MARKED.replace("{% if add_generation_prompt %}", "{% if true %}")
# Like Mistral's: the system message goes into the last question.
MOVED = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n' %}"
    "{% set messages = messages[1:] %}{% endif %}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|im_start|>' }}"
    "{% if loop.index0 >= messages | length - 2 %}{{ system }}{% endif %}"
    "{{ message['content'] + '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
)
ENDLESS = MARKED.replace("+ '<|im_end|>' }}{% endgen", "}}{% endgen")

# SmolLM2's tokenizer has no token for some bytes: those of control characters, and F1, the first
# byte of the highest code points.
LETTERS = st.characters(max_codepoint=0x1FFFF, exclude_categories=["Cs", "Cc"])
SPECIAL = st.sampled_from(["\n", " ", "\n\n", "assistant", "user", "4", "The same."])
TEXTS = st.lists(st.text(LETTERS, max_size=6) | SPECIAL, max_size=4).map("".join)
ANSWERS = TEXTS.filter(str.strip)
TALKS = st.lists(st.tuples(TEXTS, ANSWERS, st.booleans()), min_size=1, max_size=3).filter(
    lambda talk: any(t[2] for t in talk)
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return models.tokenizer()


def with_template(tokenizer: PreTrainedTokenizerBase, text: str | None) -> PreTrainedTokenizerBase:
    other = copy.deepcopy(tokenizer)
    other.chat_template = text
    return other


@pytest.fixture(scope="module")
def tight(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    return with_template(tokenizer, TIGHT)


@pytest.fixture(scope="module")
def plain(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    return with_template(tokenizer, None)


def turns_of(talk: list[tuple[str, str, bool]], system: str | None = None) -> list[rows.Turn]:
    """Questions and answers; those that are not in the loss have weight 0."""
    turns = [] if system is None else [{"role": "system", "content": system}]
    for question, answer, in_loss in talk:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if not in_loss:
            turns[-1]["weight"] = 0
    return turns


def runs_in_loss(found: chat_template.Example) -> list[list[int]]:
    runs = groupby(
        zip(found.ids, found.labels, strict=True),
        key=lambda pair: pair[1] != chat_template.IGNORE_INDEX,
    )
    return [[token for token, _ in run] for in_loss, run in runs if in_loss]


def check(
    tokenizer: PreTrainedTokenizerBase, turns: list[rows.Turn], module: ModuleType = chat_template
) -> None:
    """The ids are what the template writes up to the last answer's end; the labels, the answers."""
    [found] = module.Template(tokenizer).encode_conversation(turns)
    assert all(
        label in (token, chat_template.IGNORE_INDEX)
        for token, label in zip(found.ids, found.labels, strict=True)
    )
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    wanted = [turn["content"] + "<|im_end|>" for turn in turns if rows.is_in_loss(turn)]
    text = tokenizer.decode(found.ids)
    assert whole.startswith(text) and text.endswith(wanted[-1])
    assert [tokenizer.decode(run) for run in runs_in_loss(found)] == wanted
    first = next(place for place, turn in enumerate(turns) if rows.is_in_loss(turn))
    asked = tokenizer.apply_chat_template(turns[:first], add_generation_prompt=True, tokenize=False)
    assert found.ids[: found.n_prompt] == tokenizer(asked, add_special_tokens=False).input_ids, (
        "these are the ids that generation starts from"
    )
    assert (found.prompt, found.answer) == (turns[first - 1]["content"], turns[first]["content"])


@given(TALKS, st.none() | TEXTS)
@example([("The same.", "The same.", True), ("a", "The same.", True)], None)
@example([("a", "\nb", True)], None)  # the header's line break and the answer's would be one token
@example([("user", "assistant", True), ("assistant", "user", True)], "system")
@example([("a", "b", True)] * 3, "a")
def test_every_answer_and_its_end_are_in_the_loss_and_nothing_else(
    tokenizer: PreTrainedTokenizerBase, talk: list, system: str | None
) -> None:
    check(tokenizer, turns_of(talk, system))


@pytest.mark.parametrize("template", [ALWAYS, DOUBLE])
@given(talk=TALKS)
@example(talk=[("a", "b", True), ("c", "d", False), ("e", "f", True)])
@example(talk=[("a", "\nb", True)])
def test_an_answer_ends_before_the_next_header_and_starts_where_generation_does(
    tokenizer: PreTrainedTokenizerBase, template: str, talk: list
) -> None:
    check(with_template(tokenizer, template), turns_of(talk))


@given(TALKS)
def test_the_ids_are_those_of_the_whole_rendering_where_no_token_spans_a_border(
    tokenizer: PreTrainedTokenizerBase, talk: list
) -> None:
    turns = turns_of([(question, "x" + answer, in_loss) for question, answer, in_loss in talk])
    [found] = chat_template.Template(tokenizer).encode_conversation(turns)
    whole = tokenizer.apply_chat_template(turns, return_dict=False)
    assert found.ids == whole[: len(found.ids)]


@given(TALKS)
@example([("12", "34", True), ("5", "6", True)])
@example([("on", "ion", True)])
def test_a_question_has_the_same_ids_with_and_without_its_answer_even_without_a_header_between(
    tight: PreTrainedTokenizerBase, talk: list
) -> None:
    check(
        tight, turns_of([(question + "x", answer, in_loss) for question, answer, in_loss in talk])
    )


@pytest.mark.parametrize(
    "talk",
    [
        [("2 + 2?", "4", True)],
        [("a b", "c d", True), ("e", "f", True), ("g", "h i\nj", True)],
        [("über", "日本語 🙂", True)],
    ],
)
def test_the_tokens_in_the_loss_are_those_that_a_template_with_markers_marks(
    tokenizer: PreTrainedTokenizerBase, talk: list
) -> None:
    marked = with_template(tokenizer, MARKED)
    theirs = marked.apply_chat_template(
        turns_of(talk), return_dict=True, return_assistant_tokens_mask=True
    )
    [ours] = chat_template.Template(marked).encode_conversation(turns_of(talk))
    n = len(ours.ids)
    assert ours.ids == theirs["input_ids"][:n] and not any(theirs["assistant_masks"][n:])
    assert [label != chat_template.IGNORE_INDEX for label in ours.labels] == [
        bool(mask) for mask in theirs["assistant_masks"][:n]
    ]


def test_a_template_that_rewrites_earlier_turns_gives_each_answer_its_own_sequence(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    forgetful = with_template(tokenizer, FORGETFUL)
    turns = turns_of([("a", "b", True), ("c", "d", False), ("e", "f", True), ("g", "h", False)])
    first, second = chat_template.Template(forgetful).encode_conversation(turns)
    for found, place, answer in ((first, 2, "b"), (second, 6, "f")):
        text = forgetful.apply_chat_template(turns[:place], tokenize=False)
        assert forgetful.decode(found.ids) == text.removesuffix("\n")
        assert [forgetful.decode(run) for run in runs_in_loss(found)] == [
            f"<think>\n\n</think>\n\n{answer}<|im_end|>"
        ]
    assert (second.prompt, second.answer) == ("e", "f")


def test_a_template_that_moves_the_system_message_to_the_last_question_may_do_so(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    moved = with_template(tokenizer, MOVED)
    turns = turns_of([("a", "b", True), ("c", "d", True)], system="Be kind.")
    found = chat_template.Template(moved).encode_conversation(turns)
    assert [moved.decode(each.ids) for each in found] == [
        "<|im_start|>Be kind.\na\nb<|im_end|>",
        "<|im_start|>a\nb<|im_end|><|im_start|>Be kind.\nc\nd<|im_end|>",
    ]


def test_a_template_that_shortens_earlier_answers_trains_on_each_answer_in_full(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Also where the first answer has no thought and is not rewritten."""
    turns = turns_of([("a", "b", True), ("c", "<think>d</think>e", True), ("f", "g", True)])
    found = chat_template.Template(with_template(tokenizer, SHORTENING)).encode_conversation(turns)
    assert [tokenizer.decode(run) for each in found for run in runs_in_loss(each)] == [
        "b<|im_end|>",
        "<think>d</think>e<|im_end|>",
        "g<|im_end|>",
    ]
    assert "<think>" not in tokenizer.decode(found[2].ids)


def test_an_answer_ends_at_its_last_special_token(tokenizer: PreTrainedTokenizerBase) -> None:
    made = chat_template.Template(with_template(tokenizer, TWICE))
    [found] = made.encode_conversation(turns_of([("a", "b", True), ("c", "d", True)]))
    runs = [tokenizer.decode(run) for run in runs_in_loss(found)]
    assert runs == ["b<file_sep><|im_end|>", "d<file_sep><|im_end|>"]
    assert made.ends == {tokenizer.eos_token_id}


@pytest.mark.parametrize("template", [COUNTING, LIMITED])
def test_answers_are_also_found_where_the_template_looks_at_the_contents(
    tokenizer: PreTrainedTokenizerBase, template: str
) -> None:
    turns = turns_of([("a", "b", True), ("c", "d", True)])
    [found] = chat_template.Template(with_template(tokenizer, template)).encode_conversation(turns)
    assert [tokenizer.decode(run) for run in runs_in_loss(found)] == ["b<|im_end|>", "d<|im_end|>"]


def test_the_work_for_a_chat_grows_with_its_length_not_with_its_square(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = chat_template.Template(tokenizer)
    rendered = []
    render = made.renderer.render

    def counting_render(turns: list[rows.Turn], *args: object, **settings: bool) -> str:
        rendered.append(len(turns))
        return render(turns, *args, **settings)

    monkeypatch.setattr(made.renderer, "render", counting_render)
    for n in (20, 160):
        rendered.clear()
        turns = turns_of([(f"{i} + {i}?", f"{2 * i}", True) for i in range(n)])
        [found] = made.encode_conversation(turns)
        assert len(runs_in_loss(found)) == n
        # The text, the marked text, the first and the last answer.
        assert sum(rendered) <= 2 * len(turns) + 2 * len(turns) + 3
    assert made.tokenize_header.cache_info().misses == 1, "all answers have one header"


def test_a_tokenizer_that_writes_a_space_before_each_text_writes_none_into_a_chat() -> None:
    """Like Llama 2's, whose ids of a piece differ from those of the piece in its text."""
    vocabulary = ["<unk>", "<s>", "</s>", "▁", *"abcdQA:\n"]
    backend = Tokenizer(
        BPE({token: i for i, token in enumerate(vocabulary)}, [], unk_token="<unk>")
    )
    backend.pre_tokenizer = Metaspace(prepend_scheme="first")
    backend.add_special_tokens(["<s>", "</s>"])
    spaced = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    spaced.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ 'Q:' + message['content'] + 'A:' }}"
        "{% else %}{{ message['content'] + '</s>' }}{% endif %}{% endfor %}"
    )
    made = chat_template.Template(spaced)
    [found] = made.encode_conversation(turns_of([("a", "b", True), ("c", "d", True)]))
    assert spaced.convert_ids_to_tokens(found.ids) == ["▁", *"Q:aA:b", "</s>", *"Q:cA:d", "</s>"]
    runs = [spaced.convert_ids_to_tokens(run) for run in runs_in_loss(found)]
    assert runs == [["b", "</s>"], ["d", "</s>"]]


@pytest.mark.parametrize("answer, shown", [("b c", "b c"), ("\n b", "b")])
def test_a_special_token_may_swallow_the_space_after_it(
    tokenizer: PreTrainedTokenizerBase, answer: str, shown: str
) -> None:
    """Like Phi 3's."""
    swallowing = copy.deepcopy(tokenizer)
    names = ["<|user|>", "<|assistant|>", "<|end|>"]
    swallowing.add_tokens([AddedToken(name, rstrip=True, special=True) for name in names], True)
    swallowing.chat_template = (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}"
        "{{ message['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    turns = turns_of([("a", answer, True), ("c", answer, True)])
    [found] = chat_template.Template(swallowing).encode_conversation(turns)
    whole = swallowing.apply_chat_template(turns, return_dict=False)
    assert found.ids == whole
    assert [swallowing.decode(run) for run in runs_in_loss(found)] == [f"{shown}<|end|>"] * 2


def test_a_tokenizer_without_the_places_of_its_tokens_is_refused(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(ValueError, match="does not tell which characters .* a tokenizer.json"):
        chat_template.Template(tokenizer).encode_conversation(turns_of([("a", "b", True)]))


def test_a_template_without_system_messages_drops_ours_but_no_other_turn(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    strict = chat_template.Template(with_template(tokenizer, STRICT))
    [found] = strict.encode_conversation(rows.pair_turns("a", " b "))
    text = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>"
    assert tokenizer.decode(found.ids) == text
    assert found.ids[: found.n_prompt] == strict.encode_prompt("a")
    with pytest.raises(
        rows.BadRow, match="^the chat template of .*SmolLM2.* refuses it .turns alternate"
    ):
        strict.encode_conversation(turns_of([("a", "b", True)], system="Be kind."))


@pytest.mark.parametrize(
    "text, complaint",
    [
        (
            REPLYING,
            r"ends a prompt with '.*<reply>\\n', but does not write a given answer after these "
            "characters, so the tokens of the answer cannot be found: give the tokenizer a",
        ),
        (
            ENDLESS,
            "writes no special token after an answer, so the model would not be trained to end its "
            "answers: give it a template that writes eos_token",
        ),
    ],
)
def test_a_template_in_which_answers_cannot_be_found_is_refused_by_name(
    tokenizer: PreTrainedTokenizerBase, text: str, complaint: str
) -> None:
    with pytest.raises(
        ValueError, match=f"^the chat template of .*SmolLM2-135M-Instruct {complaint}"
    ) as error:
        chat_template.Template(with_template(tokenizer, text)).encode_conversation(
            turns_of([("a", "<think>b</think>c", True)])
        )
    assert not isinstance(error.value, rows.BadRow), "the error is in no row"


@pytest.mark.parametrize(
    "template, answer, prompt, in_loss",
    [
        (CUTTING, "<think>\nb\n</think>\nc", "", "<think>\nb\n</think>\nc"),
        (CUTTING, "c", "", "c"),
        (THINKING, "<think>\nb\n</think>\nc", "<think>\n", "b\n</think>\nc"),
        (THINKING, "b\n</think>\nc", "<think>\n", "b\n</think>\nc"),
        (THINKING, "<think></think>c", "<think>\n", "</think>c"),
    ],
)
def test_where_a_template_cuts_thoughts_an_answer_is_what_the_model_generates(
    tokenizer: PreTrainedTokenizerBase, template: str, answer: str, prompt: str, in_loss: str
) -> None:
    made = chat_template.Template(with_template(tokenizer, template))
    [found] = made.encode_conversation(rows.pair_turns("a", answer))
    assert found.ids[: found.n_prompt] == made.encode_prompt("a")
    assert tokenizer.decode(found.ids[: found.n_prompt]).endswith("assistant\n" + prompt)
    assert [tokenizer.decode(run) for run in runs_in_loss(found)] == [in_loss + "<|im_end|>"]


@pytest.mark.parametrize("template", [CUTTING, THINKING])
@pytest.mark.parametrize("first_in_loss", [True, False])
def test_where_a_template_cuts_thoughts_earlier_ones_are_not_in_a_prompt(
    tokenizer: PreTrainedTokenizerBase, template: str, first_in_loss: bool
) -> None:
    answers = [f"<think>\n{thought}\n</think>\n{text}" for thought, text in ("bc", "ef")]
    talk = [("a", answers[0], first_in_loss), ("d", answers[1], True)]
    made = chat_template.Template(with_template(tokenizer, template))
    [*before, last] = made.encode_conversation(turns_of(talk))
    text = tokenizer.decode(last.ids)
    assert len(before) == first_in_loss
    assert text.startswith("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n\nc<|im_end|>")
    assert text.endswith("<|im_start|>assistant\n" + answers[1] + "<|im_end|>")


def test_an_answer_outside_the_loss_may_lose_its_thought_but_not_its_text(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    turns = turns_of([("a", "<think>b</think>c", False), ("d", "e", True)])
    [found] = chat_template.Template(with_template(tokenizer, CUTTING)).encode_conversation(turns)
    assert "assistant\nc<|im_end|>" in tokenizer.decode(found.ids)
    halved = CUTTING.replace("'</think>')[-1]", "'</think>')[-1][1:]")
    with pytest.raises(rows.BadRow, match=r"turn 2 \(assistant\)"):
        chat_template.Template(with_template(tokenizer, halved)).encode_conversation(turns)


def test_an_answer_without_the_thought_that_a_template_begins_is_refused(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    thinking = chat_template.Template(with_template(tokenizer, THINKING))
    complaint = (
        r"^turn 2 \(assistant\): .* begins each answer with a thought, which this answer lac"
    )
    with pytest.raises(rows.BadRow, match=complaint):
        thinking.encode_conversation(turns_of([("a", "b", True)]))


def test_an_answer_with_a_thought_where_the_template_begins_answers_without_one_is_refused(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    closed = chat_template.Template(with_template(tokenizer, CLOSED))
    [found] = closed.encode_conversation(turns_of([("a", "b", True)]))
    assert [tokenizer.decode(run) for run in runs_in_loss(found)] == ["b<|im_end|>"]
    complaint = r"^turn 2 \(assistant\): .* writes this answer otherwise: remove its thoughts"
    with pytest.raises(rows.BadRow, match=complaint):
        closed.encode_conversation(turns_of([("a", "<think>b</think>c", True)]))


@pytest.mark.parametrize("template", [OWN_HEADER, OWN_THOUGHT])
@pytest.mark.parametrize("talk", [[], [("a", "b", True)], [("a", "b", True)] * 2])
def test_a_thought_in_a_content_beside_one_of_the_template_is_refused(
    tokenizer: PreTrainedTokenizerBase, template: str, talk: list
) -> None:
    made = chat_template.Template(with_template(tokenizer, template))
    assert made.encode_conversation(turns_of([*talk, ("c", "d", True)]))
    complaint = rf"^turn {2 * len(talk) + 2} \(assistant\): .* writes a thought of its own before"
    with pytest.raises(rows.BadRow, match=complaint):
        made.encode_conversation(turns_of([*talk, ("c", "<think>d</think>e", True)]))


@given(TALKS)
def test_without_a_template_turns_are_lines_and_answers_end(
    plain: PreTrainedTokenizerBase, talk: list
) -> None:
    made = chat_template.Template(plain)
    [found] = made.encode_conversation(turns_of(talk, "Be kind."))
    lines = "".join(f"{question}\n{answer}<|im_end|>" for question, answer, _ in talk)
    assert f"Be kind.\n{lines}".startswith(plain.decode(found.ids))
    answers = [answer + "<|im_end|>" for _, answer, in_loss in talk if in_loss]
    assert [plain.decode(run) for run in runs_in_loss(found)] == answers
    assert plain.decode(made.encode_prompt("Who?")) == "Who?\n"


def test_without_a_template_a_tokenizer_that_adds_bos_adds_it_once(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    from tokenizers.processors import TemplateProcessing

    plain = with_template(tokenizer, None)
    begin = ("<|endoftext|>", 0)
    plain.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[begin]
    )
    plain.bos_token = "<|endoftext|>"
    made = chat_template.Template(plain)
    [found] = made.encode_conversation(turns_of([("a", "b", True), ("c", "d", True)]))
    assert plain.decode(found.ids) == "<|endoftext|>a\nb<|im_end|>c\nd<|im_end|>"
    assert made.encode_prompt("a") == found.ids[: found.n_prompt]
    document = made.encode_document("e")
    assert plain.decode(document.ids) == "<|endoftext|>e<|im_end|>"
    assert document.labels == document.ids
    for text in ("<|endoftext|>e", "e<|im_end|>", "<|endoftext|>e<|im_end|>"):
        assert made.encode_document(text) == document, "neither token is written twice"
    spaced = made.encode_document("\n<|endoftext|>e<|im_end|> \n")
    assert plain.decode(spaced.ids) == "\n<|endoftext|>e<|im_end|> \n", "and no space is lost"
    plain.chat_template = MARKED
    assert chat_template.Template(plain).encode_prompt("a")[0] != 0, "a template writes BOS itself"


def test_a_sequence_is_shown_with_its_loss_marked_and_without_control_characters(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    turns = turns_of([("a\x1b[2J\n", "日b", True), ("c", "d", True)])
    [found] = chat_template.Template(with_template(tokenizer, TIGHT)).encode_conversation(turns)
    shown = chat_template.show_example(found, tokenizer, colour=False)
    assert shown == "a\\x1b[2J\n⟦日b<|im_end|>⟧c⟦d<|im_end|>⟧"
    coloured = chat_template.show_example(found, tokenizer, colour=True)
    assert re.findall("\033\\[32m(.*?)\033\\[0m", coloured) == ["日b<|im_end|>", "d<|im_end|>"]
    assert re.findall("\033\\[2m(.*?)\033\\[0m", coloured, re.DOTALL) == ["a\\x1b[2J\n", "c"]


CASES = [
    [("2 + 2?", "4", True)],
    [("a", "b", True), ("c", "d", False), ("e", "f", True)],
    [("a", "b", True), ("c", "d", True), ("e", "f", True), ("g", "h", True)],
    [("on", "\nb", True)],
    [("The same.", "The same.", True)],
]
INDICES = "[index for index, turn in enumerate(turns) if is_in_loss(turn)]"
LAST_END = "return answered[: ends[-1]], len(prompt)"


@pytest.mark.parametrize(
    "module, old, new",
    [
        # The end is not in the loss, or a line break is.
        (chat_template, "bisect_right(ends, span.end - 1) + 1", "bisect_right(ends, span.end - 1)"),
        (answers, LAST_END, "return answered, len(prompt)"),
        (answers, "spans.append(Span(start, len(", "spans.append(Span(start, -2 + len("),
        (answers, "content.end + n_after", "content.end"),
        (answers, "content.start - n_before", "content.start - 1"),
        (answers, "content.start - n_before", "content.start + 1"),
        (chat_template, INDICES, "[len(turns) - 1]"),  # only the last answer is
        # Answers of weight 0 are, and questions.
        (chat_template, "if is_in_loss(turn)]", "if turn['role'] == 'assistant']"),
        (chat_template, "if is_in_loss(turn)]", "]"),
        (answers, "self.extras, add_generation_prompt=True)", "self.extras)"),  # the header is
        # Where one token spans question and answer, part of the answer is lost.
        (chat_template, "return last if ids[first:last] == alone else None", "return last"),
        (chat_template, "Rendered(text[: spans[-1].end],", "Rendered(text,"),
    ],
)
def test_a_mutant_of_the_masking_is_noticed(
    tokenizer: PreTrainedTokenizerBase,
    tight: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    old: str,
    new: str,
) -> None:
    def all_cases(module: ModuleType) -> None:
        for talk in CASES:
            check(tokenizer, turns_of(talk), module)
            check(tight, turns_of(talk), module)
            [found] = module.Template(tokenizer).encode_conversation(turns_of(talk))
            assert found.labels[-1] == found.ids[-1], (
                "tokens after the last label cost time and teach nothing"
            )

    all_cases(chat_template)
    mutant = mutated(module, old, new, tmp_path)
    if module is answers:
        monkeypatch.setattr(chat_template, "Conversation", mutant.Conversation)
        mutant = chat_template
    with pytest.raises((AssertionError, ValueError)):
        all_cases(mutant)


def test_a_sequence_without_labels_is_all_prompt() -> None:
    assert chat_template.Example([1, 2, 3], [chat_template.IGNORE_INDEX] * 3).n_prompt == 3
