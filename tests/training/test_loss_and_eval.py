"""The loss at the labels, perplexity and greedy answers against the direct computation of each."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from data.chat_template import Example
from data.dataset import Batch, Task, collate
from helpers import models
from helpers.bounds import gamma
from training import loss_and_eval
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


UNEQUAL = [
    Example([5, 6, 7, 8, 9, 2], [-100, 6, 7, 8, 9, 2]),
    Example([9, 8, 2], [-100, -100, 2]),
    Example([4, 3, 2, 7], [-100, -100, 2, 7]),
]


def batch_of_two() -> Batch:
    return collate(TWO_EXAMPLES, pad_id=2)


def require_within(what: str, got: Tensor, wanted: Tensor, bound: Tensor | float) -> None:
    """Fails with the first number that is not within its bound. Each tensor has one shape."""
    within = (got.double() - wanted.double()).abs() <= bound
    for place in (~within).nonzero().tolist():
        index = tuple(place)
        raise AssertionError(
            f"{what}{place or ''}: wanted {wanted[index].item():.9g}, got {got[index].item():.9g}"
        )


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
    wanted = F.cross_entropy(logits, labels, reduction="none").sum()
    assert torch.equal(loss, wanted), f"the loss: wanted {wanted.item()}, got {loss.item()}"
    assert shapes == [(5, 49152)], f"logits: wanted [(5, 49152)], got {[*map(tuple, shapes)]}"
    assert not model.lm_head._forward_pre_hooks, "the hook is removed afterwards"


@torch.no_grad()
def test_each_token_in_the_loss_counts_once() -> None:
    """Also an end token, although the padding has its id. Each loss is log V."""
    model = models.tiny_llama(vocab_size=1024)
    model.lm_head.weight.zero_()
    loss = label_loss(model, collate(UNEQUAL, pad_id=2), torch.float32).item()
    assert round(loss / math.log(1024)) == 5 + 1 + 2
    documents = [Example(example.ids, example.ids) for example in UNEQUAL]
    loss = label_loss(model, collate(documents, pad_id=2), torch.float32).item()
    assert round(loss / math.log(1024)) == 5 + 2 + 3, "the first token of each is not predicted"


@torch.no_grad()
def test_the_loss_does_not_depend_on_the_padding_token() -> None:
    model = models.tiny_llama(vocab_size=256)
    losses = [label_loss(model, collate(UNEQUAL, pad_id), torch.float32) for pad_id in (2, 6)]
    assert torch.equal(*losses)


def test_losses_and_gradients_of_small_batches_add_up_to_those_of_the_large_one() -> None:
    """So accumulation changes nothing, if each is divided by the labels of the whole step.

    The sums are those of float64, in another order; a unit of float32 is far above their error.
    """
    model = models.tiny_llama(torch.float64, vocab_size=256)

    def loss_and_gradient(examples: list[Example]) -> tuple[Tensor, Tensor]:
        loss = label_loss(model, collate(examples, pad_id=2), torch.float32)
        (gradient,) = torch.autograd.grad(loss, model.model.norm.weight)
        return loss.detach(), gradient

    loss, gradient = loss_and_gradient(UNEQUAL)
    losses, gradients = zip(*(loss_and_gradient([example]) for example in UNEQUAL))
    require_within("the sum of the losses", sum(losses), loss, gamma(1) * loss)
    bound = gamma(1) * gradient.norm()
    require_within("the sum of the gradients", sum(gradients), gradient, bound)


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
    require_within("the gradient at ", gradient, differences, bound)


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
    assert torch.equal(gradient, expected)
    assert torch.equal(copy, expected), "the gradient is not in the memory of the logits"
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


@pytest.mark.parametrize("scale", [3, 300])  # exp of a logit overflows from 89 on
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_cross_entropy_and_its_gradient_are_those_of_float64(
    dtype: torch.dtype, scale: float
) -> None:
    """The bound: exp and log have an error of a few units (4 are allowed), the sum over the classes
    has gamma of their number, and p - 1 has a unit of 1. The factor 1/n is rounded to float32, and
    the gradient to the dtype of the logits twice: before and after it is scaled."""
    torch.manual_seed(0)
    n, classes = 120, 300  # 1/120 is far from a number in bfloat16
    logits = (scale * torch.randn(n, classes)).to(dtype).requires_grad_()
    labels = torch.randint(classes, (n,))
    loss = CrossEntropy.apply(logits, labels, False)
    (gradient,) = torch.autograd.grad(loss / n, logits)
    exact = logits.detach().double().requires_grad_()
    each = F.cross_entropy(exact, labels, reduction="none")
    (expected,) = torch.autograd.grad(each.sum() / n, exact)
    # No term of the loss of a row is larger.
    largest = exact.detach().abs().amax(1) + math.log(classes)
    of_log = gamma(classes + 8) + 2 * gamma(1) * largest
    of_sum = of_log.sum() + gamma(n) * each.sum()
    require_within("the loss", loss.detach(), each.sum().detach(), of_sum.detach())
    probability = n * expected + F.one_hot(labels, classes)
    of_exp = torch.expm1(of_log + gamma(1) * largest)[:, None] + gamma(8)
    of_gradient = probability * of_exp / n + gamma(2, dtype) * expected.abs()
    tiny = torch.finfo(dtype).smallest_normal
    bound = of_gradient + gamma(4) / n + tiny
    require_within("the gradient at ", gradient, expected, bound)


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
    shapes = [tuple(tensor.shape) for tensor in saved]
    assert shapes == [(40, 50), (40,)], "saved: the logits and the labels, and nothing else"
    assert saved[0] is logits and saved[1] is labels, "a copy is saved"
    assert torch.equal(logits, before), "the logits have changed"


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_perplexity_of_uniform_predictions_is_the_size_of_the_vocabulary(
    batch_size: int,
) -> None:
    model = models.tiny_llama(vocab_size=1024)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    examples = [Example([5, 6, 7, 8], [5, 6, 7, 8])] * 3  # the first token is not predicted
    # Each loss is log 1024, rounded; their sum and their mean round a few times more. exp turns
    # this into a relative error.
    rounding = math.expm1(math.log(1024) * gamma(len(examples) * 3 + 2))
    found = perplexity(model, examples, batch_size, 2, torch.float32)
    assert abs(found - 1024) <= 1024 * rounding, f"wanted 1024, got {found}"


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


class Answers:
    """Stands for generate_answers: knows the answers, and records what it is asked."""

    def __init__(self, known: dict[tuple[int, ...], str]) -> None:
        self.known = known
        self.asked: list[list[int]] = []
        self.rooms: list[int] = []

    def __call__(
        self,
        model: object,
        tokenizer: object,
        prompts: list[list[int]],
        length: int,
        *_: object,
        **options: object,
    ) -> list[str]:
        self.asked += prompts
        self.rooms += [length] * len(prompts)
        return [self.known[tuple(prompt)] for prompt in prompts]


ASKED = [
    Example([1, 2], [-100, 2], "first", "yes"),
    Example([5, 6, 7, 8, 2], [-100, -100, 7, 8, 2], "second", "no"),
    Example([7, 3, 2], [-100, 3, 2], "third", "perhaps"),
]


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


@pytest.mark.parametrize("answer", ["yes", "Yes", "yes.", "yes sir", "ye", ""])
def test_only_an_answer_of_the_same_characters_is_a_match(
    answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_and_eval, "generate_answers", Answers({(1,): answer}))
    share = exact_match(models.tiny_llama(vocab_size=256), None, [ASKED[0]], torch.float32)
    assert share == (answer == "yes"), f"{answer!r} for 'yes' counts {share}"


def test_the_model_is_asked_the_prompts_alone_and_has_room_for_the_longest_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = Answers({(1,): "yes", (5, 6): "no", (7,): "maybe"})
    monkeypatch.setattr(loss_and_eval, "generate_answers", answers)
    assert exact_match(models.tiny_llama(vocab_size=256), None, ASKED, torch.float32) == 2 / 3
    assert sorted(answers.asked) == [[1], [5, 6], [7]], f"asked: {answers.asked}"
    assert min(answers.rooms) >= 3, "the longest answer has 3 tokens"


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


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_perplexity_is_exp_of_the_mean_loss_whatever_the_batches_are(batch_size: int) -> None:
    """In float64: exp(loss / 8) has the relative error of loss / 8, and a few units more."""
    model = models.tiny_llama(torch.float64, vocab_size=256)
    with torch.no_grad():
        loss = label_loss(model, collate(UNEQUAL, pad_id=2), torch.float32).item()
    found = perplexity(model, UNEQUAL, batch_size, 2, torch.float32)
    wanted = math.exp(loss / 8)
    assert abs(found - wanted) <= gamma(1) * wanted, f"wanted {wanted}, got {found}"


def test_perplexity_is_measured_in_evaluation_mode() -> None:
    model = models.tiny_llama(vocab_size=256).train()
    modes = []
    with model.register_forward_pre_hook(lambda model, inputs: modes.append(model.training)):
        perplexity(model, UNEQUAL, 2, 2, torch.float32)
    assert modes and not any(modes), "dropout is on in training mode"


def be_the_second_process_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one adds 1 to every sum. Of three examples this one counts the second."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda sums: sums.add_(1))


def test_the_losses_of_all_processes_are_added_each_example_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = models.tiny_llama(vocab_size=256)
    with torch.no_grad():
        loss = label_loss(model, collate(UNEQUAL[1:2], pad_id=2), torch.float32).item()
    be_the_second_process_of_two(monkeypatch)
    found = perplexity(model, UNEQUAL, 1, 2, torch.float32)
    wanted = math.exp((loss + 1) / (1 + 1))  # of one label here, and of one of the other process
    assert found == wanted, f"wanted {wanted}, got {found}"


def test_the_right_answers_of_all_processes_are_added_each_example_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = Answers({(1,): "yes", (5, 6): "wrong", (7,): "maybe"})
    monkeypatch.setattr(loss_and_eval, "generate_answers", answers)
    be_the_second_process_of_two(monkeypatch)
    share = exact_match(models.tiny_llama(vocab_size=256), None, ASKED, torch.float32)
    assert share == 1 / 3, f"wanted 1/3: none here, one of the other process; got {share}"
