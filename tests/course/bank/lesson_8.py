"""Answers to lesson 8: the loss at the labels, perplexity and exact match."""

from bank.answers import Answer

LOSS = "The loss of logits"
GRADIENT = "Its gradient is softmax minus one-hot"
ROUNDED = "The gradient is computed in float32"
MEMORY = "Only logits and labels are saved"
POSITIONS = "Position t predicts token t + 1"
COUNTED = "A token with a label counts once"
SUMS = "Losses and gradients of small batches"
AFTER_HEAD = "What the model does to its logits"
PERPLEXITY = "Perplexity is exp"
MATCH = "Exact match is the share"
PROCESSES = "Several processes"

WRONG = [
    Answer(
        "exp of the logits without their maximum overflows",
        LOSS,
        {"torch.log_softmax(rows, 1, out=rows)": "rows - rows.exp().sum(1, keepdim=True).log()"},
    ),
    Answer(
        "the losses are added in the dtype of the logits",
        LOSS,
        {
            "dtype = torch.promote_types(logits.dtype, torch.float32)\n"
            "        losses": "dtype = logits.dtype\n        losses"
        },
    ),
    Answer(
        "the mean of the losses, as F.cross_entropy returns it",
        LOSS,
        {"return losses.sum()": "return losses.mean()"},
    ),
    Answer(
        "softmax without the one-hot",
        GRADIENT,
        {"            softmax.scatter_add_(1, label, minus_one[: len(some)])\n": ""},
        shows="gradient of logits[",
    ),
    Answer(
        "one-hot minus softmax",
        GRADIENT,
        {"softmax.mul_(g)": "softmax.mul_(-g)"},
    ),
    Answer(
        "the gradient that comes in is taken for 1",
        GRADIENT,
        {"softmax.mul_(g)": "softmax"},
    ),
    Answer(
        "the factor is rounded to bfloat16 before it multiplies",
        ROUNDED,
        {"softmax.mul_(g)": "softmax.to(logits.dtype) * g.to(logits.dtype)"},
    ),
    Answer(
        "a float32 gradient of 16-bit logits",
        ROUNDED,
        {"torch.empty_like(logits)": "torch.empty_like(logits, dtype=torch.float32)"},
        shows="float32 (3, 4)  <-",
    ),
    Answer(
        "softmax is saved, as F.cross_entropy does",
        MEMORY,
        functions={
            "CrossEntropy.forward": """
    def forward(ctx, logits, labels, overwrite):
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        log_softmax = torch.log_softmax(wide, 1)
        ctx.save_for_backward(log_softmax.exp(), labels)
        ctx.dtype = logits.dtype
        return -log_softmax.gather(1, labels[:, None]).sum()
""",
            "CrossEntropy.backward": """
    def backward(ctx, g):
        softmax, labels = ctx.saved_tensors
        one_hot = torch.zeros_like(softmax).scatter_(1, labels[:, None], 1)
        return ((softmax - one_hot) * g).to(ctx.dtype), None, None
""",
        },
    ),
    Answer(
        "the logits are overwritten without leave",
        MEMORY,
        {"logits if ctx.overwrite else torch.empty_like(logits)": "logits"},
        shows="the logits after backward",
    ),
    Answer(
        "the logits are never overwritten",
        MEMORY,
        {"logits if ctx.overwrite else torch.empty_like(logits)": "torch.empty_like(logits)"},
        shows="the memory of the logits",
    ),
    Answer(
        "the labels are not shifted",
        POSITIONS,
        {
            "labels = batch.labels[:, 1:]": "labels = batch.labels",
            "inputs[0][:, :-1][in_loss]": "inputs[0][in_loss]",
        },
    ),
    Answer(
        "the labels are shifted twice",
        POSITIONS,
        {
            "labels = batch.labels[:, 1:]": "labels = batch.labels[:, 2:]",
            "inputs[0][:, :-1][in_loss]": "inputs[0][:, :-2][in_loss]",
        },
    ),
    Answer(
        "logits at all positions, most of which are then dropped",
        POSITIONS,
        functions={
            "label_loss": """
def label_loss(model, batch, dtype):
    labels = batch.labels[:, 1:]
    in_loss = labels != IGNORE_INDEX
    with autocast(labels.device, dtype):
        logits = model(**batch.inputs, use_cache=False).logits
    return CrossEntropy.apply(logits[:, :-1][in_loss], labels[in_loss], False)
"""
        },
        shows="the logits: wanted [(5, 49152)], got [(2, 5, 49152)]",
    ),
    Answer(
        "an end token is masked by its id, which the padding has, too",
        COUNTED,
        {
            "in_loss = labels != IGNORE_INDEX": "in_loss = (labels != IGNORE_INDEX)"
            " & (labels != model.config.pad_token_id)"
        },
        shows="labels in the loss: wanted 8, got",
    ),
    Answer(
        "prompt and padding are in the loss",
        COUNTED,
        {"labels = batch.labels[:, 1:]": "labels = batch.input_ids[:, 1:]"},
    ),
    Answer(
        "each batch divides by its own number of labels",
        SUMS,
        {
            "CrossEntropy.apply(logits, labels[in_loss], is_of_head)": "CrossEntropy.apply(logits,"
            " labels[in_loss], is_of_head) / in_loss.sum()"
        },
        shows="the losses of batches of 1, added",
    ),
    Answer(
        "each batch divides by its number of tokens, with the padding",
        SUMS,
        {
            "CrossEntropy.apply(logits, labels[in_loss], is_of_head)": "CrossEntropy.apply(logits,"
            " labels[in_loss], is_of_head) / labels.numel()"
        },
    ),
    Answer(
        "logits that tanh has saved are overwritten",
        AFTER_HEAD,
        {
            "is_of_head = type(head) is nn.Linear and seen.get(logits) == logits._version": "is_of_"
            "head = True"
        },
        shows="modified by an inplace operation",
    ),
    Answer(
        "the head is called by hand, so what follows it is left out",
        AFTER_HEAD,
        functions={
            "label_loss": """
def label_loss(model, batch, dtype):
    labels = batch.labels[:, 1:]
    in_loss = labels != IGNORE_INDEX
    with autocast(labels.device, dtype):
        hidden = model.model(**batch.inputs, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, :-1][in_loss])
    return CrossEntropy.apply(logits, labels[in_loss], False)
"""
        },
    ),
    Answer(
        "the mean of the mean losses of the batches",
        PERPLEXITY,
        {
            "loss += label_loss(model, batch, dtype).item()\n        n_labels += batch.n_labels": ""
            "loss += label_loss(model, batch, dtype).item() / max(batch.n_labels, 1)\n"
            "        n_labels += 1"
        },
    ),
    Answer(
        "labels at first tokens, which nothing predicts, are counted",
        PERPLEXITY,
        {"n_labels += batch.n_labels": "n_labels += int((batch.labels != IGNORE_INDEX).sum())"},
    ),
    Answer(
        "2 to the power of a loss in nats",
        PERPLEXITY,
        {"return math.exp(loss / n_labels)": "return 2 ** (loss / n_labels)"},
    ),
    Answer(
        "dropout stays on",
        PERPLEXITY,
        {"    model.eval()\n    share, n_own": "    share, n_own"},
        shows="dropout is on",
    ),
    Answer(
        "upper and lower case are the same",
        MATCH,
        {"text == example.answer": "text.lower() == example.answer.lower()"},
    ),
    Answer(
        "an answer that contains the expected one is right",
        MATCH,
        {"text == example.answer": "example.answer in text"},
    ),
    Answer(
        "the prompt contains the answer",
        MATCH,
        {"example.ids[: example.n_prompt] for": "example.ids for"},
        shows="prompts: wanted [[1], [5, 6], [7]]",
    ),
    Answer(
        "every answer has the room of the first one",
        MATCH,
        {
            "max(len(example.ids) - example.n_prompt for example in examples)": "len("
            "examples[0].ids) - examples[0].n_prompt"
        },
        shows="wanted 3, as the longest has; got 1",
    ),
    Answer(
        "an example that only fills up a share counts twice",
        PROCESSES,
        {"zip(share[:n_own], texts)": "zip(share, texts)"},
    ),
    Answer(
        "the sum is divided by the share of one process",
        PROCESSES,
        {"return n_right / len(examples)": "return n_right / n_own"},
    ),
    Answer(
        "each process reports what it found alone",
        PROCESSES,
        {"    loss, n_labels = distributed.all_reduce_sum(loss, n_labels)\n": ""},
    ),
]

RIGHT = [
    Answer(
        "all rows at once, by logsumexp",
        functions={
            "CrossEntropy.forward": """
    def forward(ctx, logits, labels, overwrite):
        ctx.save_for_backward(logits, labels)
        ctx.may_overwrite = overwrite
        wide = logits if logits.dtype == torch.float64 else logits.float()
        chosen = wide[torch.arange(len(labels)), labels]
        return (torch.logsumexp(wide, dim=1) - chosen).sum()
""",
            "CrossEntropy.backward": """
    def backward(ctx, g):
        logits, labels = ctx.saved_tensors
        wide = logits if logits.dtype == torch.float64 else logits.float()
        softmax = torch.exp(wide - torch.logsumexp(wide, dim=1, keepdim=True))
        softmax[torch.arange(len(labels)), labels] -= 1
        gradient = (softmax * g).to(logits.dtype)
        if ctx.may_overwrite:
            return logits.copy_(gradient), None, None
        return gradient, None, None
""",
        },
    ),
    Answer(
        "positions by their flat index, and logits that are never overwritten",
        functions={
            "label_loss": """
def label_loss(model, batch, dtype):
    labels = batch.labels[:, 1:].flatten()
    chosen = (labels != IGNORE_INDEX).nonzero().flatten()

    def keep_chosen(head, inputs):
        hidden = inputs[0][:, :-1]
        return (hidden.reshape(-1, hidden.shape[-1])[chosen],)

    hook = model.get_output_embeddings().register_forward_pre_hook(keep_chosen)
    try:
        with autocast(labels.device, dtype):
            logits = model(**batch.inputs, use_cache=False).logits
    finally:
        hook.remove()
    return CrossEntropy.apply(logits, labels[chosen], False)
"""
        },
    ),
    Answer(
        "example by example, the sums at the end",
        functions={
            "perplexity": """
def perplexity(model, examples, batch_size, pad_id, dtype):
    model.eval()
    share, n_own = distributed.split_among_ranks(examples)
    losses = []
    for example in share:
        batch = collate([example], pad_id).to(model.device)
        losses.append(label_loss(model, batch, dtype).item())
    labels = [label for example in share[:n_own] for label in example.labels[1:]]
    n_labels = len(labels) - labels.count(IGNORE_INDEX)
    sums = distributed.all_reduce_sum(math.fsum(losses[:n_own]), n_labels)
    return math.exp(sums[0] / sums[1])
""",
            "exact_match": """
def exact_match(model, tokenizer, examples, dtype, show=0):
    if len(examples) == 0:
        return None
    share, n_own = distributed.split_among_ranks(examples)
    prompts = [example.ids[: example.n_prompt] for example in share]
    room = max(len(example.ids) for example in examples)
    texts = generate_answers(model, tokenizer, prompts, room, dtype)
    for example, text in list(zip(share, texts))[:show]:
        print(f"{example.prompt}: {text}, wanted {example.answer}")
    rights = [text == example.answer for example, text in zip(share, texts)]
    [n_right] = distributed.all_reduce_sum(sum(rights[:n_own]))
    return n_right / len(examples)
""",
        },
    ),
]
