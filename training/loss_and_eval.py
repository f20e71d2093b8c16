"""What is measured: the loss at the learnt positions, perplexity from it, and the exact match of greedy answers.

In a small model the logits are the largest tensor of all, tokens * vocabulary numbers. Only positions whose next token is a
label need any, so the output head is shown only those; whatever the architecture does to its logits afterwards still happens.
Their cross entropy, by F.cross_entropy, would hold four tensors more of that size, in float32. Ours holds its gradient alone:

    loss = sum_i (log sum_j exp l_ij - l_i,label)        dloss/dl = softmax(l) - onehot(label)

are both known as soon as a few rows of logits are, and what is float32 among them stays as few rows long.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from data import dataset as data
from training import distributed as processes
from training import sharding as parallel
from training.dtypes import autocast


class CrossEntropy(torch.autograd.Function):
    """The sum of cross entropies of logits (n, vocabulary), any float dtype, and labels (n,): a scalar, float32 or float64."""

    ROWS = 16  # of 49,152 numbers make 3 MB, which stay in the cache

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, labels: Tensor) -> Tensor:
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        kind = torch.promote_types(logits.dtype, torch.float32)
        losses = logits.new_empty(len(logits), dtype=kind)
        for start in range(0, len(logits), CrossEntropy.ROWS):
            rows = slice(start, start + CrossEntropy.ROWS)
            few, label = logits[rows].to(kind, copy=True), labels[rows, None]
            normalizer = few.logsumexp(1, keepdim=True)
            losses[rows] = (normalizer - few.gather(1, label)).squeeze(1)
            if gradient is not None:
                gradient[rows] = (
                    few.sub_(normalizer)
                    .exp_()
                    .scatter_add_(1, label, few.new_full(label.shape, -1.0))
                )
        ctx.save_for_backward(gradient)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, g: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(
            g.to(gradient.dtype)
        ), None  # in place: it is the largest tensor of all, and nobody's but ours


def label_loss(model: PreTrainedModel, batch: data.Batch, dtype: torch.dtype) -> Tensor:
    """Cross entropy, summed over the labels of a batch: a float32 scalar."""
    labels = batch.labels[:, 1:]  # the token at t + 1 is what t predicts
    learnt = labels != data.IGNORE  # (B, T - 1)
    only_learnt = model.get_output_embeddings().register_forward_pre_hook(
        lambda head, inputs: inputs[0][:, :-1][learnt]
    )
    with only_learnt, autocast(learnt.device, dtype):
        output = model(**batch.inputs, use_cache=False)
    return CrossEntropy.apply(output.logits, labels[learnt])  # logits (labels, vocabulary)


class LabelLoss(nn.Module):
    """`label_loss` of a model as a module, which is what DistributedDataParallel takes."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, batch: data.Batch) -> Tensor:
        return label_loss(self.model, batch, self.dtype)


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    examples: list[data.Example],
    batch_size: int,
    pad_id: int,
    dtype: torch.dtype,
) -> float:
    """exp of the mean loss a label over all examples, of which each process looks at its part."""
    model.eval()
    mine, counted = processes.split_among_ranks(examples)
    mine[counted:] = [
        replace(example, labels=[data.IGNORE] * len(example.ids)) for example in mine[counted:]
    ]
    batches = [
        data.collate(mine[i : i + batch_size], pad_id).to(model.device)
        for i in range(0, len(mine), batch_size)
    ]
    loss, labels = processes.all_reduce_sum(
        sum(label_loss(model, batch, dtype).item() for batch in batches),
        sum(batch.n_labels for batch in batches),
    )
    return math.exp(loss / labels)


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    length: int,
    dtype: torch.dtype,
    batch_size: int = 100,
    streamer: TextStreamer | None = None,
) -> list[str]:
    """Greedy answers of at most `length` tokens to prompts of token ids, which are padded on the left to end together.

    A streamer shows the answer to a single prompt while it comes.
    """
    model.eval()
    end, texts = tokenizer.eos_token_id, []
    greedy = {
        "max_new_tokens": length,
        "do_sample": False,
        "pad_token_id": end,
        "streamer": streamer,
        "synced_gpus": parallel.is_sharded(model),
    }  # then all go on until the last one has its answers
    # Torch multiplies a sliced (B, 1, hidden) tensor by copying the head's weight B times; a contiguous one it does not.
    contiguous = model.get_output_embeddings().register_forward_pre_hook(
        lambda head, inputs: inputs[0].contiguous()
    )
    with contiguous, autocast(model.device, dtype):
        for i in range(0, len(prompts), batch_size):
            batch = prompts[i : i + batch_size]
            width = max(map(len, batch))
            ids = torch.tensor(
                [[end] * (width - len(p)) + p for p in batch], device=model.device
            )  # (B, width)
            mask = torch.tensor(
                [[0] * (width - len(p)) + [1] * len(p) for p in batch], device=model.device
            )
            output = model.generate(
                input_ids=ids, attention_mask=mask, **greedy
            )  # (B, width + new)
            texts += tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    return [text.strip() for text in texts]


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[data.Example],
    dtype: torch.dtype,
    show: int = 0,
) -> float | None:
    """The share of answers that are right to the letter (None without examples); `show` of them are printed.

    Each process asks its part of the questions.
    """
    if not examples:
        return None
    mine, counted = processes.split_among_ranks(examples)
    length = max(len(e.ids) - e.n_prompt for e in examples)
    got = answers(model, tokenizer, [e.ids[: e.n_prompt] for e in mine], length, dtype)
    pairs = list(zip(mine, got))[:counted]
    for example, text in pairs[:show]:
        print(
            f"  asked   {example.prompt}\n  wanted  {example.answer}\n  got     {' '.join(text.split())[:100]}"
        )
    (right,) = processes.all_reduce_sum(sum(text == example.answer for example, text in pairs))
    return right / len(examples)


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: data.Task,
    batch_size: int,
    dtype: torch.dtype,
    when: str | None = None,
) -> list[float | None]:
    """The task's metric on what was held out, and on phrasings never trained on; with `when`, three answers are shown, too."""
    if task.metric == "perplexity":
        return [perplexity(model, task.test, batch_size, tokenizer.eos_token_id, dtype), None]
    if when:
        print(
            f"{when} training, {len(task.test) + len(task.unseen)} held-out questions:", flush=True
        )
    known = exact_match(model, tokenizer, task.test, dtype, show=3 if when else 0)
    return [known, exact_match(model, tokenizer, task.unseen, dtype)]
