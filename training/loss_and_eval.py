"""Computes the loss at the labels, perplexity, and the exact match of greedy answers.

In a small model the logits are the largest tensor: tokens * vocabulary numbers. Only positions
whose next token has a label need logits, so the output head gets the hidden states of these
positions alone. What the architecture does to the logits afterwards still applies.

F.cross_entropy would allocate four more tensors of the size of the logits, in float32. CrossEntropy
allocates one, its gradient, in the dtype of the logits; `label_loss` needs not even that one:

    loss = sum_i (log sum_j exp l_ij - l_i,label)        dloss/dl = softmax(l) - onehot(label)

The term i of the loss and row i of the gradient depend only on row i of the logits. So both are
computed a few rows at a time, the float32 temporaries have only that many rows, and the gradient of
a row may overwrite its logits.
"""

from __future__ import annotations  # type hints must not load the classes of transformers

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
import transformers
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from data.chat_template import IGNORE_INDEX, Example
from data.dataset import Batch, Task, collate
from training import distributed, sharding
from training.dtypes import autocast


class CrossEntropy(torch.autograd.Function):
    """The sum of the cross entropies of logits (n, vocabulary) and labels (n,): a scalar.

    The logits may have any float dtype; the sum is float64 for float64 logits, else float32.
    overwrite: backward writes the gradient over the logits, which nothing else may use.
    """

    ROWS = 16  # with 49,152 float32 numbers per row they take 3 MB and stay in the cache

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, labels: Tensor, overwrite: bool) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        losses = logits.new_empty(len(logits), 1, dtype=dtype)
        scratch = logits.new_empty(CrossEntropy.ROWS, logits.shape[1], dtype=dtype)
        for loss, some, label in _some_rows(losses, logits, labels[:, None]):
            rows = scratch[: len(some)].copy_(some)
            log_softmax = torch.log_softmax(rows, 1, out=rows)
            loss.copy_(log_softmax.gather(1, label).neg_())
        ctx.save_for_backward(logits, labels)
        ctx.overwrite = overwrite
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, g: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels = ctx.saved_tensors
        gradient = logits if ctx.overwrite else torch.empty_like(logits)
        scratch = g.new_empty(CrossEntropy.ROWS, logits.shape[1])
        minus_one = g.new_full((CrossEntropy.ROWS, 1), -1.0)
        for result, some, label in _some_rows(gradient, logits, labels[:, None]):
            rows = scratch[: len(some)].copy_(some)
            softmax = torch.softmax(rows, 1, out=rows)
            softmax.scatter_add_(1, label, minus_one[: len(some)])
            result.copy_(softmax.mul_(g))  # rounded once
        return gradient, None, None


def _some_rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """ROWS rows of each tensor at a time, in order."""
    return zip(*(tensor.split(CrossEntropy.ROWS) for tensor in tensors))


def label_loss(model: transformers.PreTrainedModel, batch: Batch, dtype: torch.dtype) -> Tensor:
    """Cross entropy summed over the labels of a batch: a float32 scalar."""
    labels = batch.labels[:, 1:]  # (B, T - 1): position t predicts token t + 1
    in_loss = labels != IGNORE_INDEX  # (B, T - 1)
    seen = {}

    def select_positions(head: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        return inputs[0][:, :-1][in_loss]  # (labels, hidden)

    def remember_output(head: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[output] = output._version

    head = model.get_output_embeddings()
    before = head.register_forward_pre_hook(select_positions)
    after = head.register_forward_hook(remember_output)
    with before, after, autocast(in_loss.device, dtype):
        logits = model(**batch.inputs, use_cache=False).logits  # (labels, vocabulary)
    # A linear layer does not need its output for its backward pass. If the model has changed the
    # logits afterwards, also in place, that function may need them for its own.
    is_of_head = type(head) is nn.Linear and seen.get(logits) == logits._version
    return CrossEntropy.apply(logits, labels[in_loss], is_of_head)


class LabelLoss(nn.Module):
    """label_loss of a model as a module, because DistributedDataParallel wraps only modules."""

    def __init__(self, model: transformers.PreTrainedModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype

    def forward(self, batch: Batch) -> Tensor:
        return label_loss(self.model, batch, self.dtype)


@torch.no_grad()
def perplexity(
    model: transformers.PreTrainedModel,
    examples: list[Example],
    batch_size: int,
    pad_id: int,
    dtype: torch.dtype,
) -> float:
    """exp of the mean loss per label over all examples, without dropout.

    Each rank computes a share of the examples.
    """
    model.eval()
    share, n_own = distributed.split_among_ranks(examples)
    # All ranks get the same number of examples. Those that do not count here get no labels.
    for index in range(n_own, len(share)):
        no_labels = [IGNORE_INDEX] * len(share[index].ids)
        share[index] = replace(share[index], labels=no_labels)

    loss = 0.0
    n_labels = 0
    for start in range(0, len(share), batch_size):
        batch = collate(share[start : start + batch_size], pad_id).to(model.device)
        loss += label_loss(model, batch, dtype).item()
        n_labels += batch.n_labels
    loss, n_labels = distributed.all_reduce_sum(loss, n_labels)
    return math.exp(loss / n_labels)


@torch.no_grad()
def generate_answers(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    prompts: list[list[int]],
    length: int,
    dtype: torch.dtype,
    batch_size: int = 100,
    streamer: transformers.TextStreamer | None = None,
    wanted: list[str] | None = None,
) -> list[str]:
    """Greedy answers of at most `length` tokens to prompts, which are lists of token ids.

    streamer: prints the answer to a single prompt while it is generated.
    wanted: a text for each prompt; an answer that cannot become this text may end early.
    """
    model.eval()
    settings = {
        "max_new_tokens": length,
        "do_sample": False,
        "num_beams": 1,
        "num_return_sequences": 1,
        "return_dict_in_generate": False,
        "pad_token_id": tokenizer.eos_token_id,
        "streamer": streamer,
        "synced_gpus": sharding.is_sharded(model),  # all ranks stop together
    }

    def make_contiguous(head: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        # torch multiplies a sliced (B, 1, hidden) tensor by copying the head's weight B times.
        return inputs[0].contiguous()

    texts = []
    head = model.get_output_embeddings()
    with head.register_forward_pre_hook(make_contiguous), autocast(model.device, dtype):
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            ids, mask = _pad_left(batch, tokenizer.eos_token_id, model.device)
            if wanted:
                texts_of_batch = wanted[start : start + batch_size]
                settings["stopping_criteria"] = [Differs(tokenizer, texts_of_batch, ids.shape[1])]
            output = model.generate(input_ids=ids, attention_mask=mask, **settings)
            new_ids = output[:, ids.shape[1] :]
            texts += tokenizer.batch_decode(new_ids, skip_special_tokens=True)
    return [text.strip() for text in texts]


class Differs(transformers.StoppingCriteria):
    """Ends each answer of a batch that cannot become the wanted text any more."""

    def __init__(
        self,
        tokenizer: transformers.PreTrainedTokenizerBase,
        wanted: list[str],
        n_prompt: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.wanted = wanted
        self.n_prompt = n_prompt

    def __call__(self, ids: Tensor, scores: Tensor, **options: object) -> Tensor:
        """ids (B, T) -> bool (B,)."""
        texts = self.tokenizer.batch_decode(ids[:, self.n_prompt :], skip_special_tokens=True)
        differs = [self.differs(text.strip(), wanted) for text, wanted in zip(texts, self.wanted)]
        return torch.tensor(differs, device=ids.device)

    def differs(self, text: str, wanted: str) -> bool:
        """Whether no text that goes on from `text` can be the wanted one."""
        # The next token may complete a character, or take away the space before it.
        may_change = text.endswith("\N{REPLACEMENT CHARACTER}")
        may_change = may_change or self.tokenizer.clean_up_tokenization_spaces
        return not may_change and not wanted.startswith(text)


def _pad_left(prompts: list[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, int64 (B, T), with the padding at the left."""
    width = max(len(prompt) for prompt in prompts)
    ids = [[pad_id] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def exact_match(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    examples: list[Example],
    dtype: torch.dtype,
    show: int = 0,
) -> float | None:
    """The fraction of generated answers that equal the expected ones; None without examples.

    Each rank generates a share of the answers.
    show: how many of them are printed, each with its question and the expected answer.
    """
    if not examples:
        return None
    share, n_own = distributed.split_among_ranks(examples)
    prompts = [example.ids[: example.n_prompt] for example in share]
    length = max(len(example.ids) - example.n_prompt for example in examples)
    show = min(show, len(share))
    texts = generate_answers(model, tokenizer, prompts[:show], length, dtype)
    wanted = [example.answer for example in share[show:]]
    texts += generate_answers(model, tokenizer, prompts[show:], length, dtype, wanted=wanted)

    n_right = 0
    for index, (example, text) in enumerate(zip(share[:n_own], texts)):
        n_right += text == example.answer
        if index < show:
            print(f"  asked   {example.prompt}")
            print(f"  wanted  {example.answer}")
            print(f"  got     {' '.join(text.split())[:100]}")
    (n_right,) = distributed.all_reduce_sum(n_right)
    return n_right / len(examples)


def evaluate(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    task: Task,
    batch_size: int,
    dtype: torch.dtype,
    when: str | None = None,
) -> list[float | None]:
    """The task's metric on the held-out examples and on the unseen phrasings, if there are any.

    when: "before" or "after" prints a title and three answers; None prints nothing.
    """
    if task.metric == "perplexity":
        return [perplexity(model, task.test, batch_size, tokenizer.eos_token_id, dtype), None]
    if when:
        n_questions = len(task.test) + len(task.unseen)
        print(f"{when} training, {n_questions} held-out questions:", flush=True)
    known = exact_match(model, tokenizer, task.test, dtype, show=3 if when else 0)
    return [known, exact_match(model, tokenizer, task.unseen, dtype)]
