"""The loss at the labels, perplexity and greedy answers against the direct computation of each."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.chat_template import Example
from data.dataset import Batch, Task, collate
from helpers import models
from helpers.bounds import gamma
from training import distributed, loss_and_eval
from training.loss_and_eval import (
    CrossEntropy,
    evaluate,
    exact_match,
    generate_answers,
    label_loss,
    perplexity,
)

TWO_EXAMPLES = [
    Example([5, 6, 7, 8, 9], [-100, -100, 7, 8, 9]),
    Example([9, 8, 7], [-100, 8, 7]),
]


def batch_of_two() -> Batch:
    return collate(TWO_EXAMPLES, pad_id=2)


def test_the_head_sees_only_the_positions_with_a_label_and_the_loss_is_theirs() -> None:
    model = models.tiny_llama()
    batch = batch_of_two()
    shapes = []
    watch = model.lm_head.register_forward_hook(
        lambda head, inputs, output: shapes.append(output.shape)
    )
    with torch.no_grad(), watch:
        loss = label_loss(model, batch, torch.float32)
        output = model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    positions = [(0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]
    hidden = torch.stack([output.last_hidden_state[row, column] for row, column in positions])
    logits = F.linear(hidden, model.lm_head.weight)
    labels = torch.tensor([7, 8, 9, 8, 7])
    assert torch.equal(loss, F.cross_entropy(logits, labels, reduction="none").sum())
    assert shapes == [(5, 49152)]
    assert not model.lm_head._forward_pre_hooks, "the hook is removed afterwards"


@pytest.mark.parametrize("n", [0, 1, 16, 37])
def test_the_cross_entropy_has_the_gradient_of_its_own_sum(n: int) -> None:
    """Central differences: the third derivative is p (1 - p) (1 - 2 p) <= 1/10, so they are off by
    h^2 / 60; rounding adds u f / h."""
    torch.manual_seed(0)
    logits = torch.randn(n, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(7, (n,))
    loss = CrossEntropy.apply(logits, labels, False)
    (gradient,) = torch.autograd.grad(loss, logits)
    h = 2.0**-17
    differences = torch.zeros_like(gradient)
    with torch.no_grad():
        for row in range(n):
            for column in range(7):
                step = torch.zeros_like(logits)
                step[row, column] = h
                above = CrossEntropy.apply(logits + step, labels, False)
                below = CrossEntropy.apply(logits - step, labels, False)
                differences[row, column] = (above - below) / (2 * h)
    bound = h**2 / 60 + gamma(7 + n + 8, torch.float64) * (loss.item() + 1) / h
    assert ((differences - gradient).abs() <= bound).all()


def test_a_gradient_that_overwrites_the_logits_is_the_same_and_computed_once() -> None:
    torch.manual_seed(0)
    logits = torch.randn(37, 7, requires_grad=True)
    labels = torch.randint(7, (37,))
    loss = CrossEntropy.apply(logits, labels, False)
    (expected,) = torch.autograd.grad(loss / 2, logits, retain_graph=True)
    (again,) = torch.autograd.grad(loss / 2, logits)
    assert torch.equal(again, expected)

    copy = logits * 1
    loss = CrossEntropy.apply(copy, labels, True)
    (gradient,) = torch.autograd.grad(loss / 2, logits, retain_graph=True)
    assert torch.equal(gradient, expected) and torch.equal(copy, expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("after", ["nothing", "tanh", "tanh in place", "a head with a function"])
def test_logits_that_the_model_needs_for_its_gradient_are_not_overwritten(after: str) -> None:
    """Gemma's tanh saves its output, which is the logits."""
    model = models.tiny_llama()
    forward = model.forward
    if after == "a head with a function":

        class Head(nn.Linear):
            def forward(self, hidden: Tensor) -> Tensor:
                return super().forward(hidden).tanh()

        model.lm_head.__class__ = Head

    def changed(*arguments: object, **options: object) -> object:
        output = forward(*arguments, **options)
        if after == "tanh":
            output.logits = output.logits.tanh()
        if after == "tanh in place":
            output.logits.tanh_()
        return output

    model.forward = changed
    hidden = model.model.norm.weight
    batch = batch_of_two()
    (gradient,) = torch.autograd.grad(label_loss(model, batch, torch.float32), hidden)
    logits = model(**batch.inputs).logits
    loss = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum"
    )
    (expected,) = torch.autograd.grad(loss, hidden)
    # Both are sums of the same products, in another order over 5 positions and the vocabulary.
    assert (gradient - expected).norm() <= gamma(5) * 16 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_cross_entropy_and_its_gradient_are_those_of_float64(dtype: torch.dtype) -> None:
    """The bound: exp and log have an error of a few units (4 are allowed), the sum over the classes
    has gamma of their number, and p - 1 has a unit of 1. The factor 1/n is rounded to float32, and
    the gradient to the dtype of the logits twice: before and after it is scaled."""
    torch.manual_seed(0)
    n, classes = 120, 300  # 1/120 is far from a number in bfloat16
    logits = (3 * torch.randn(n, classes)).to(dtype).requires_grad_()
    labels = torch.randint(classes, (n,))
    loss = CrossEntropy.apply(logits, labels, False)
    (gradient,) = torch.autograd.grad(loss / n, logits)
    exact = logits.detach().double().requires_grad_()
    each = F.cross_entropy(exact, labels, reduction="none")
    (expected,) = torch.autograd.grad(each.sum() / n, exact)
    # No term of the loss of a row is larger.
    largest = exact.detach().abs().amax(1) + math.log(classes)
    of_log = gamma(classes + 8) + 2 * gamma(1) * largest
    assert abs(loss.double() - each.sum()) <= (of_log.sum() + gamma(n) * each.sum())
    probability = n * expected + F.one_hot(labels, classes)
    of_exp = torch.expm1(of_log + gamma(1) * largest)[:, None] + gamma(8)
    of_gradient = probability * of_exp / n + gamma(2, dtype) * expected.abs()
    tiny = torch.finfo(dtype).smallest_normal
    assert ((gradient.double() - expected).abs() <= of_gradient + gamma(4) / n + tiny).all()


def test_a_factor_that_bfloat16_cannot_hold_scales_the_gradient_without_a_bias() -> None:
    """The least-squares factor between the gradients: its rounding errors have no common sign."""
    torch.manual_seed(0)
    n = 120
    logits = torch.randn(n, 300).bfloat16().requires_grad_()
    labels = torch.randint(300, (n,))
    (summed,) = torch.autograd.grad(CrossEntropy.apply(logits, labels, False), logits)
    (mean,) = torch.autograd.grad(CrossEntropy.apply(logits, labels, False) / n, logits)
    factor = (mean.double() * summed.double()).sum() / summed.double().square().sum()
    # One rounding of each mean: independent errors of a unit at most, so their weighted mean has a
    # standard deviation of at most a unit times the root of the sum of squared weights.
    weights = summed.double().square() / summed.double().square().sum()
    spread = gamma(1, torch.bfloat16) * weights.square().sum().sqrt()
    assert abs(factor * n - 1) <= 4 * spread
    assert abs((1 / torch.tensor(n)).bfloat16().item() * n - 1) > 4 * spread  # the wrong factor


def test_the_cross_entropy_saves_the_logits_and_keeps_them() -> None:
    logits = torch.randn(40, 50).bfloat16().requires_grad_()
    before = logits.detach().clone()
    saved = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    labels = torch.zeros(40, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        CrossEntropy.apply(logits, labels, False).backward()
    assert saved[0] is logits and saved[1] is labels and len(saved) == 2
    assert torch.equal(logits, before)


def test_the_perplexity_of_uniform_predictions_is_the_size_of_the_vocabulary() -> None:
    model = models.tiny_llama(vocab_size=1024)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    examples = [Example([5, 6, 7, 8], [-100, 6, 7, 8])] * 3
    # Each loss is log 1024, rounded; their sum and their mean round a few times more. exp turns
    # this into a relative error.
    rounding = math.expm1(math.log(1024) * gamma(len(examples) * 3 + 2))
    found = perplexity(model, examples, 2, 2, torch.float32)
    assert abs(found - 1024) <= 1024 * rounding


def test_answers_do_not_depend_on_their_neighbours() -> None:
    model = models.tiny_llama(torch.float64)
    tokenizer = models.tokenizer()
    texts = ("one", "a longer prompt than the others", "three words here")
    prompts = [tokenizer(text).input_ids for text in texts]

    def answers(prompts: list[list[int]], batch_size: int) -> list[str]:
        return generate_answers(model, tokenizer, prompts, 6, torch.float32, batch_size)

    alone = [answers([prompt], 1)[0] for prompt in prompts]
    assert alone == answers(prompts, 100) == answers(prompts, 2)


def test_answers_that_end_early_are_right_and_wrong_as_whole_ones_are() -> None:
    model = models.tiny_llama(torch.float64)
    tokenizer = models.tokenizer()
    texts = [f"question {n} of many" for n in range(12)]
    prompts = [tokenizer(text).input_ids for text in texts]
    whole = generate_answers(model, tokenizer, prompts, 6, torch.float32)
    changes = [lambda text: text, lambda text: text + "x", lambda text: "x" + text, lambda text: ""]
    wanted = [changes[row % 4](text) for row, text in enumerate(whole)]
    early = generate_answers(model, tokenizer, prompts, 6, torch.float32, 5, wanted=wanted)
    rights = [text == want for text, want in zip(early, wanted)]
    assert rights == [text == want for text, want in zip(whole, wanted)]
    assert rights[::4] == [True] * 3 and not any(rights[1::4])
    ended = [len(a) < len(b) for a, b in zip(early[2::4], whole[2::4])]
    assert all(ended), "they differ from the first character on"


@pytest.mark.parametrize(
    ("text", "wanted", "cleans_up", "differs"),
    [
        ("", "yes", False, False),
        ("ye", "yes", False, False),
        ("yes", "yes", False, False),
        ("yes no", "yes", False, True),
        ("no", "yes", False, True),
        ("caf\N{REPLACEMENT CHARACTER}", "caf\N{LATIN SMALL LETTER E WITH ACUTE}", False, False),
        ("no \N{REPLACEMENT CHARACTER}", "yes", False, False),
        ("do n", "don't", True, False),  # decoded with the next token, the space is taken away
        ("do n", "don't", False, True),
    ],
)
def test_an_answer_differs_once_no_further_token_can_make_it_the_wanted_one(
    text: str, wanted: str, cleans_up: bool, differs: bool
) -> None:
    tokenizer = SimpleNamespace(clean_up_tokenization_spaces=cleans_up)
    assert loss_and_eval.Differs(tokenizer, [wanted], 0).differs(text, wanted) == differs


def test_exact_match_counts_answers_that_equal_the_expected_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model = models.tiny_llama()
    expected = ("yes", "no", "Yes", "yes")
    examples = [Example([1, 2], [-100, 2], "q", answer) for answer in expected]
    always_yes = lambda model, tokenizer, prompts, *_, **options: ["yes"] * len(prompts)  # noqa: E731
    monkeypatch.setattr(loss_and_eval, "generate_answers", always_yes)
    assert exact_match(model, None, examples, torch.float32, show=1) == 2 / 4
    assert capsys.readouterr().out.count("asked") == 1
    assert exact_match(model, None, [], torch.float32) is None
    task = Task("exact match", examples, examples, [])
    assert evaluate(model, None, task, 2, torch.float32) == [2 / 4, None]
    assert capsys.readouterr().out == "", "during training no answer is printed"


def test_generation_from_a_batch_takes_no_copy_of_the_head_for_each_sequence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch multiplies a sliced tensor of hidden states by one copy of the weight per sequence."""
    model = models.tiny_llama()
    linear = F.linear
    contiguous = []

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        contiguous.append(x.is_contiguous())
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", watched)
    generate_answers(model, models.tokenizer(), [[5, 6, 7], [8, 9]], 2, torch.float32)
    assert contiguous and all(contiguous)


def test_perplexity_is_exp_of_the_mean_loss() -> None:
    model = models.tiny_llama()
    with torch.no_grad():
        loss = label_loss(model, batch_of_two(), torch.float32).item()
    assert perplexity(model, TWO_EXAMPLES, 2, 2, torch.float32) == math.exp(loss / 5)


def test_an_example_that_another_rank_counts_does_not_count_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = models.tiny_llama(vocab_size=256)
    examples = [Example(ids, ids) for ids in ([5, 6, 7, 8], [9, 10, 11])]
    alone = loss_and_eval.perplexity(model, examples, 2, 2, torch.float32)
    padded = [*examples, examples[0]]
    monkeypatch.setattr(distributed, "split_among_ranks", lambda items: (list(padded), 2))
    assert loss_and_eval.perplexity(model, examples, 3, 2, torch.float32) == alone
