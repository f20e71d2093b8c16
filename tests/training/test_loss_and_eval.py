"""The loss at the labels, perplexity and greedy answers, against the plain way of computing each."""

import math

import pytest
import torch
import torch.nn.functional as F

from data import dataset as data
from helpers import models
from helpers.bounds import gamma
from training import loss_and_eval as evaluate


def batch_of_two() -> data.Batch:
    return data.collate(
        [
            data.Example([5, 6, 7, 8, 9], [-100, -100, 7, 8, 9]),
            data.Example([9, 8, 7], [-100, 8, 7]),
        ],
        pad_id=2,
    )


def test_the_head_sees_the_labelled_positions_alone_and_the_loss_is_theirs() -> None:
    model, batch = models.tiny_llama(), batch_of_two()
    sizes = []
    watch = model.lm_head.register_forward_hook(
        lambda head, inputs, output: sizes.append(output.shape)
    )
    with torch.no_grad(), watch:
        loss = evaluate.label_loss(model, batch, torch.float32)
        hidden = model.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask
        ).last_hidden_state
    wanted, where = [7, 8, 9, 8, 7], [(0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]
    logits = F.linear(
        torch.stack([hidden[row, place] for row, place in where]), model.lm_head.weight
    )
    assert torch.equal(loss, F.cross_entropy(logits, torch.tensor(wanted), reduction="sum"))
    assert sizes == [(5, 49152)]
    assert not model.lm_head._forward_pre_hooks, "the hook is gone afterwards"


@pytest.mark.parametrize("n", [0, 1, 16, 37])
def test_the_cross_entropy_has_the_gradient_of_its_own_sum(n: int) -> None:
    """Central differences: of a third derivative p (1 - p) (1 - 2 p) <= 1/10 they are h^2 / 60 off, and of rounding u f / h."""
    torch.manual_seed(0)
    logits, labels = (
        torch.randn(n, 7, dtype=torch.float64, requires_grad=True),
        torch.randint(7, (n,)),
    )
    loss, h = evaluate.CrossEntropy.apply(logits, labels), 2.0**-17
    (gradient,) = torch.autograd.grad(loss, logits)
    with torch.no_grad():
        around = [
            [evaluate.CrossEntropy.apply(logits + sign * h * unit, labels) for sign in (1, -1)]
            for unit in torch.eye(7 * n, dtype=torch.float64).view(7 * n, n, 7)
        ]
    differences = torch.tensor(
        [(above - below) / (2 * h) for above, below in around], dtype=torch.float64
    ).view(n, 7)
    off = h**2 / 60 + gamma(7 + n + 8, torch.float64) * (loss.item() + 1) / h
    assert ((differences - gradient).abs() <= off).all()


def test_the_gradient_of_the_cross_entropy_is_made_once() -> None:
    """It is scaled where it lies: a second pass would scale it again, and is refused."""
    logits = torch.randn(3, 7, requires_grad=True)
    loss = evaluate.CrossEntropy.apply(logits, torch.zeros(3, dtype=torch.int64)) / 2
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_cross_entropy_and_its_gradient_are_those_of_float64(dtype: torch.dtype) -> None:
    """exp and log err by a few units (4 are granted), the sum over classes by gamma of their number, p - 1 by a unit of 1."""
    torch.manual_seed(0)
    n, classes = 37, 300
    logits, labels = (
        (3 * torch.randn(n, classes)).to(dtype).requires_grad_(),
        torch.randint(classes, (n,)),
    )
    loss = evaluate.CrossEntropy.apply(logits, labels)
    (gradient,) = torch.autograd.grad(loss / 2, logits)
    exact = logits.detach().double().requires_grad_()
    each = F.cross_entropy(exact, labels, reduction="none")
    (wanted,) = torch.autograd.grad(each.sum() / 2, exact)
    largest = exact.detach().abs().amax(1) + math.log(
        classes
    )  # of a row: no term of its loss is larger
    of_log = gamma(classes + 8) + 2 * gamma(1) * largest
    assert abs(loss.double() - each.sum()) <= (of_log.sum() + gamma(n) * each.sum())
    probability = 2 * (wanted + F.one_hot(labels, classes) / 2)
    of_exp = torch.expm1(of_log + gamma(1) * largest)[:, None] + gamma(8)
    of_gradient = probability * of_exp / 2 + gamma(2, dtype) * wanted.abs()
    tiny = torch.finfo(dtype).smallest_normal
    assert ((gradient.double() - wanted).abs() <= of_gradient + gamma(2) + tiny).all()


def test_the_cross_entropy_keeps_one_tensor_as_large_as_the_logits_and_leaves_them_alone() -> None:
    logits, kept = torch.randn(40, 50).bfloat16().requires_grad_(), []
    before = logits.detach().clone()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    ):
        evaluate.CrossEntropy.apply(logits, torch.zeros(40, dtype=torch.int64)).backward()
    assert [(tensor.shape, tensor.dtype) for tensor in kept] == [(logits.shape, logits.dtype)]
    assert torch.equal(logits, before)


def test_perplexity_of_a_model_that_knows_nothing_is_the_size_of_its_vocabulary() -> None:
    model = models.tiny_llama(vocab_size=1024)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    examples = [data.Example([5, 6, 7, 8], [-100, 6, 7, 8])] * 3
    # Each loss is log 1024, rounded; their sum and its mean round a few times more; exp turns that into a relative error.
    rounding = math.expm1(math.log(1024) * gamma(len(examples) * 3 + 2))
    assert abs(evaluate.perplexity(model, examples, 2, 2, torch.float32) - 1024) <= 1024 * rounding


def test_answers_do_not_depend_on_their_neighbours() -> None:
    model, tokenizer = models.tiny_llama(torch.float64), models.tokenizer()
    prompts = [
        tokenizer(text).input_ids
        for text in ("one", "a longer prompt than the others", "three words here")
    ]
    together = evaluate.answers(model, tokenizer, prompts, 6, torch.float32)
    alone = [
        evaluate.answers(model, tokenizer, [prompt], 6, torch.float32)[0] for prompt in prompts
    ]
    assert (
        together
        == alone
        == evaluate.answers(model, tokenizer, prompts, 6, torch.float32, batch_size=2)
    )


def test_exact_match_counts_answers_that_are_right_to_the_letter(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    examples = [
        data.Example([1, 2], [-100, 2], "q", answer) for answer in ("yes", "no", "Yes", "yes")
    ]
    monkeypatch.setattr(evaluate, "answers", lambda *args, **kwargs: ["yes"] * 4)
    assert evaluate.exact_match(models.tiny_llama(), None, examples, torch.float32, show=1) == 2 / 4
    assert capsys.readouterr().out.count("asked") == 1
    assert evaluate.exact_match(models.tiny_llama(), None, [], torch.float32) is None
    task = data.Task("exact match", examples, examples, [])
    assert evaluate.measure(models.tiny_llama(), None, task, 2, torch.float32) == [2 / 4, None]
    assert capsys.readouterr().out == "", "on the way nothing is shown"


def test_generation_from_a_batch_takes_no_copy_of_the_head_for_each_sequence() -> None:
    """torch multiplies the sliced hidden states of a prompt by copying the head's weight once a sequence."""
    model, tokenizer, layouts = models.tiny_llama(), models.tokenizer(), []
    real = F.linear
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.nn.functional,
            "linear",
            lambda x, w, b=None: (layouts.append(x.is_contiguous()), real(x, w, b))[1],
        )
        evaluate.answers(model, tokenizer, [[5, 6, 7], [8, 9]], 2, torch.float32)
    assert layouts and all(layouts)


def test_perplexity_is_exp_of_the_mean_loss() -> None:
    model, batch = models.tiny_llama(), batch_of_two()
    examples = [
        data.Example([5, 6, 7, 8, 9], [-100, -100, 7, 8, 9]),
        data.Example([9, 8, 7], [-100, 8, 7]),
    ]
    with torch.no_grad():
        loss = evaluate.label_loss(model, batch, torch.float32).item()
    assert evaluate.perplexity(model, examples, 2, 2, torch.float32) == math.exp(loss / 5)
