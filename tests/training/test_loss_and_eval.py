"""The loss at the labels, perplexity and greedy answers against the direct computation of each."""

import math
from dataclasses import dataclass
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
    """Fails with the first number that is not within its bound."""
    within = (got.double() - wanted.double()).abs() <= bound
    is_within = bool(within.all())  # a short message, which students read
    assert is_within, f"{what}{first_outside(within, wanted, got)}"


def first_outside(within: Tensor, wanted: Tensor, got: Tensor) -> str:
    place = (~within).nonzero()[0].tolist()
    numbers = [tensor[tuple(place)].item() for tensor in (wanted, got)]
    return f"{place or ''}: wanted {numbers[0]:.9g}, got {numbers[1]:.9g}"


def loss_by_torch(model: nn.Module, examples: list[Example]) -> Tensor:
    """The sum of the cross entropies, from the logits of each example alone."""
    total = torch.zeros((), dtype=torch.float64)
    for example in examples:
        logits = model(torch.tensor([example.ids]), use_cache=False).logits[0, :-1]
        labels = torch.tensor(example.labels[1:])
        total = total + F.cross_entropy(logits.double(), labels, reduction="sum")
    return total


def test_the_head_sees_only_the_positions_with_a_label_and_the_loss_is_theirs() -> None:
    """The model is in float64; a unit of float32 is far above its rounding."""
    model = models.tiny_llama(torch.float64)
    batch = batch_of_two()
    shapes = []
    watch = model.lm_head.register_forward_hook(
        lambda head, inputs, output: shapes.append(tuple(output.shape))
    )
    with torch.no_grad(), watch:
        loss = label_loss(model, batch, torch.float32)
    with torch.no_grad():
        wanted = loss_by_torch(model, TWO_EXAMPLES)
    require_within("the loss", loss, wanted, gamma(1) * wanted)
    assert shapes == [(5, 49152)], f"the logits: wanted [(5, 49152)], got {shapes}"
    assert not model.lm_head._forward_pre_hooks, "the hook is removed afterwards"


@torch.no_grad()
def test_each_token_in_the_loss_counts_once() -> None:
    """Also an end token, although the padding has its id. Each loss is log V."""
    model = models.tiny_llama(vocab_size=1024)
    model.lm_head.weight.zero_()

    def count(examples: list[Example]) -> int:
        loss = label_loss(model, collate(examples, pad_id=2), torch.float32).item()
        return round(loss / math.log(1024))

    n = count(UNEQUAL)
    assert n == 5 + 1 + 2, f"labels in the loss: wanted 8, got {n}"
    n = count([Example(example.ids, example.ids) for example in UNEQUAL])
    assert n == 5 + 2 + 3, f"wanted 10, as the first token of each is not predicted; got {n}"


@torch.no_grad()
def test_the_loss_does_not_depend_on_the_padding_token() -> None:
    model = models.tiny_llama(vocab_size=256)
    first, second = [
        label_loss(model, collate(UNEQUAL, pad_id), torch.float32).item() for pad_id in (2, 6)
    ]
    assert first == second, f"with another padding token: wanted {first}, got {second}"


def test_losses_and_gradients_of_small_batches_add_up_to_those_of_the_large_one() -> None:
    """So accumulation changes nothing, if each is divided by the labels of the whole step.

    The sums are those of float64, in another order; a unit of float32 is far above their error.
    """
    model = models.tiny_llama(torch.float64, vocab_size=256)
    weight = model.model.norm.weight
    wanted = loss_by_torch(model, UNEQUAL)
    (wanted_gradient,) = torch.autograd.grad(wanted, weight)
    wanted = wanted.detach()
    for size in (1, 2, 3):
        batches = [UNEQUAL[start : start + size] for start in range(0, 3, size)]
        losses = [label_loss(model, collate(batch, 2), torch.float32) for batch in batches]
        loss = sum(loss.detach() for loss in losses)
        require_within(f"the losses of batches of {size}, added", loss, wanted, gamma(1) * wanted)
        gradient = sum(torch.autograd.grad(loss, weight)[0] for loss in losses)
        bound = gamma(1) * wanted_gradient.norm()
        what = f"their gradients of the last norm, added, batches of {size}, at "
        require_within(what, gradient, wanted_gradient, bound)


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
    try:
        (gradient,) = torch.autograd.grad(label_loss(model, batch, torch.float32), hidden)
    except RuntimeError as error:
        pytest.fail(f"wanted a gradient, got: {error}")
    logits = model(**batch.inputs).logits
    loss = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum"
    )
    (expected,) = torch.autograd.grad(loss, hidden)
    # Both are sums of the same products, in another order over 5 positions and the vocabulary.
    off = (gradient - expected).norm() / expected.norm()
    assert off <= gamma(5) * 16, f"wanted the gradient of the logits after {after}, got {off} off"


@dataclass
class InFloat64:
    """Logits, their labels, the loss and the gradient of its mean by torch, and their bounds.

    The bounds: exp and log have an error of a few units (4 are allowed), the sum over the classes
    has gamma of their number, and p - 1 has a unit of 1. The factor 1/n is rounded to float32, and
    the gradient to the dtype of the logits twice: before and after it is scaled.
    """

    logits: Tensor
    labels: Tensor
    loss: Tensor
    gradient: Tensor
    of_loss: Tensor
    of_gradient: Tensor


def in_float64(dtype: torch.dtype, scale: float) -> InFloat64:
    torch.manual_seed(0)
    n, classes = 120, 300  # 1/120 is far from a number in bfloat16
    logits = (scale * torch.randn(n, classes)).to(dtype)
    labels = torch.randint(classes, (n,))
    exact = logits.double().requires_grad_()
    each = F.cross_entropy(exact, labels, reduction="none")
    (gradient,) = torch.autograd.grad(each.sum() / n, exact)
    each = each.detach()
    # No term of the loss of a row is larger.
    largest = exact.detach().abs().amax(1) + math.log(classes)
    of_log = gamma(classes + 8) + 2 * gamma(1) * largest
    probability = n * gradient + F.one_hot(labels, classes)
    of_exp = torch.expm1(of_log + gamma(1) * largest)[:, None] + gamma(8)
    of_gradient = probability * of_exp / n + gamma(2, dtype) * gradient.abs()
    of_gradient = of_gradient + gamma(4) / n + torch.finfo(dtype).smallest_normal
    of_loss = of_log.sum() + gamma(n) * each.sum()
    return InFloat64(logits, labels, each.sum(), gradient, of_loss, of_gradient)


each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
each_scale = pytest.mark.parametrize("scale", [3, 300])  # exp of a number overflows from 89 on


@each_scale
@each_dtype
def test_the_cross_entropy_is_that_of_float64(dtype: torch.dtype, scale: float) -> None:
    exact = in_float64(dtype, scale)
    loss = CrossEntropy.apply(exact.logits, exact.labels, False)
    require_within("the loss", loss, exact.loss, exact.of_loss)


@each_scale
@each_dtype
def test_the_gradient_of_the_cross_entropy_is_that_of_float64(
    dtype: torch.dtype, scale: float
) -> None:
    exact = in_float64(dtype, scale)
    logits = exact.logits.requires_grad_()
    loss = CrossEntropy.apply(logits, exact.labels, False)
    (gradient,) = torch.autograd.grad(loss / len(logits), logits)
    require_within("the gradient at ", gradient, exact.gradient, exact.of_gradient)


@each_dtype
def test_the_gradient_has_the_dtype_of_the_logits(dtype: torch.dtype) -> None:
    """torch would cast another dtype in silence, so backward is called by itself."""
    logits = torch.zeros(3, 4, dtype=dtype, requires_grad=True)
    loss = CrossEntropy.apply(logits, torch.tensor([0, 1, 3]), False)
    gradients = loss.grad_fn.apply(torch.ones_like(loss))
    assert gradients[0].dtype == dtype, f"wanted {dtype}, got {gradients[0].dtype}"


def test_a_factor_that_bfloat16_cannot_hold_scales_the_gradient_without_a_bias() -> None:
    """The least-squares factor between the gradients: its rounding errors have no common sign."""
    exact = in_float64(torch.bfloat16, 1)
    logits = exact.logits.requires_grad_()
    n = len(logits)
    (mean,) = torch.autograd.grad(CrossEntropy.apply(logits, exact.labels, False) / n, logits)
    factor = (mean.double() * exact.gradient).sum() / exact.gradient.square().sum()
    # One rounding of each number: independent errors of a unit at most, so their weighted mean has
    # a standard deviation of at most a unit times the root of the sum of squared weights.
    weights = exact.gradient.square() / exact.gradient.square().sum()
    spread = gamma(1, torch.bfloat16) * weights.square().sum().sqrt() + gamma(308)
    assert abs(factor - 1) <= 4 * spread, f"wanted the gradient times 1, got it times {factor}"
    assert abs((1 / torch.tensor(n)).bfloat16().item() * n - 1) > 4 * spread  # the wrong factor


def test_a_gradient_that_overwrites_the_logits_is_right_and_computed_once() -> None:
    exact = in_float64(torch.float32, 3)
    leaf = exact.logits.requires_grad_()
    logits = leaf * 1
    loss = CrossEntropy.apply(logits, exact.labels, True)
    (gradient,) = torch.autograd.grad(loss / len(logits), leaf, retain_graph=True)
    require_within("the gradient at ", gradient, exact.gradient, exact.of_gradient)
    assert torch.equal(logits, gradient), "the memory of the logits: wanted the gradient in it"
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


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
    assert len(saved) == 2, f"saved for backward: wanted logits and labels, got shapes {shapes}"
    kept = any(tensor is logits for tensor in saved) and any(tensor is labels for tensor in saved)
    assert kept, f"saved for backward: wanted logits and labels themselves, got {shapes}"
    assert torch.equal(logits, before), "the logits after backward: wanted those before it"


def require_perplexity(found: float, loss: float, n_labels: int) -> None:
    """Allows for 8 float32 roundings of the mean loss, and 8 units of exp."""
    mean = loss / n_labels
    wanted = math.exp(mean)
    bound = wanted * (math.expm1(mean * gamma(8)) + gamma(8))
    assert abs(found - wanted) <= bound, f"perplexity: wanted {wanted}, got {found}"


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_perplexity_of_uniform_predictions_is_the_size_of_the_vocabulary(
    batch_size: int,
) -> None:
    model = models.tiny_llama(vocab_size=1024)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    examples = [Example([5, 6, 7, 8], [5, 6, 7, 8])] * 3  # the first token is not predicted
    found = perplexity(model, examples, batch_size, 2, torch.float32)
    require_perplexity(found, 9 * math.log(1024), 9)


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
        return [self.known.get(tuple(prompt), "") for prompt in prompts]


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
    examples = [Example([1, 2], [-100, 2], "which?", answer) for answer in expected]
    always_yes = lambda model, tokenizer, prompts, *_, **options: ["yes"] * len(prompts)  # noqa: E731
    monkeypatch.setattr(loss_and_eval, "generate_answers", always_yes)
    share = exact_match(model, None, examples, torch.float32, show=1)
    assert share == 2 / 4, f"wanted 0.5, as 2 of 4 are right; got {share}"
    shown = capsys.readouterr().out.count("which?")
    assert shown == 1, f"printed questions: wanted 1, got {shown}"
    share = exact_match(model, None, [], torch.float32)
    assert share is None, f"without examples: wanted None, got {share}"
    task = Task("exact match", examples, examples, [])
    assert evaluate(model, None, task, 2, torch.float32) == [2 / 4, None]
    assert capsys.readouterr().out == "", "during training no answer is printed"


@pytest.mark.parametrize("answer", ["yes", "Yes", "yes.", "yes sir", "ye", ""])
def test_only_an_answer_of_the_same_characters_is_a_match(
    answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_and_eval, "generate_answers", Answers({(1,): answer}))
    share = exact_match(models.tiny_llama(vocab_size=256), None, [ASKED[0]], torch.float32)
    wanted = float(answer == "yes")
    assert share == wanted, (
        f"the share for {answer!r} where 'yes' is right: wanted {wanted}, got {share}"
    )


def test_the_model_is_asked_the_prompts_alone_and_has_room_for_the_longest_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = Answers({(1,): "yes", (5, 6): "no", (7,): "maybe"})
    monkeypatch.setattr(loss_and_eval, "generate_answers", answers)
    share = exact_match(models.tiny_llama(vocab_size=256), None, ASKED, torch.float32)
    asked = sorted(answers.asked)
    assert asked == [[1], [5, 6], [7]], f"prompts: wanted [[1], [5, 6], [7]], got {asked}"
    room = min(answers.rooms)
    assert room >= 3, f"tokens of an answer: wanted 3, as the longest has; got {room}"
    assert share == 2 / 3, f"wanted 2/3, got {share}"


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
    model = models.tiny_llama(torch.float64, vocab_size=256)
    with torch.no_grad():
        loss = loss_by_torch(model, UNEQUAL).item()
    found = perplexity(model, UNEQUAL, batch_size, 2, torch.float32)
    require_perplexity(found, loss, 5 + 1 + 2)


def test_perplexity_is_measured_in_evaluation_mode() -> None:
    model = models.tiny_llama(vocab_size=256).train()
    modes = []
    with model.register_forward_pre_hook(lambda model, inputs: modes.append(model.training)):
        perplexity(model, UNEQUAL, 2, 2, torch.float32)
    assert modes and not any(modes), "wanted evaluation mode, got training mode: dropout is on"


def be_the_second_process_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one adds 1 to every sum. Of three examples this one counts the second."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda sums: sums.add_(1))


def test_the_losses_of_all_processes_are_added_each_example_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = models.tiny_llama(torch.float64, vocab_size=256)
    with torch.no_grad():
        loss = loss_by_torch(model, UNEQUAL[1:2]).item()
    be_the_second_process_of_two(monkeypatch)
    found = perplexity(model, UNEQUAL, 1, 2, torch.float32)
    require_perplexity(found, loss + 1, 1 + 1)  # one label here, one in the other process


def test_the_right_answers_of_all_processes_are_added_each_example_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = Answers({(1,): "yes", (5, 6): "wrong", (7,): "maybe"})
    monkeypatch.setattr(loss_and_eval, "generate_answers", answers)
    be_the_second_process_of_two(monkeypatch)
    share = exact_match(models.tiny_llama(vocab_size=256), None, ASKED, torch.float32)
    assert share == 1 / 3, f"wanted 1/3: none here, one of the other process; got {share}"
