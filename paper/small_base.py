"""The small model that the scripts fine-tune, and how they fine-tune and grade it.

No claim stands on one seed, and a processor has minutes. So the scripts that train do it on a Llama
of 150,000 weights that is trained here once, and cached in models/. It learns to answer questions
about three fields of an order, in three languages (orders.py). Fine-tuning teaches it to list all
five without being asked. With --model, that model is fine-tuned instead, in the same way.

The measure is the exact match of whole answers. A greedy answer is right exactly if each token of
the right answer is the most probable one after those before it. So one forward pass over question
and answer grades all tokens, and nothing is generated.
"""

import random
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from checkpoints import sources
from checkpoints.base_model import load_with_adapters
from data.chat_template import IGNORE_INDEX, Example, Template, fingerprint
from data.dataset import batches_of_step, collate
from data.rows import pair_turns
from data.toy_tasks import Pair
from nf4 import NF4
from paper import orders
from paper.experiment import Setting
from paper.small_llama import cached, small_llama
from training.loss_and_eval import label_loss

SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|unknown|>"]
WORDS = r"[^\W\d_]+|\d|[^\w]+"  # a word, a digit, or what is between them
CHAT = (
    "{% for message in messages if message['role'] != 'system' %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
STEPS = 2500  # of pretraining
RANK = 16
FULL_LR = 3e-3
LORA_LR = 5e-3
BATCH = 16


def folder(setting: Setting) -> Path:
    """The model to fine-tune: that of --model, or the small one, trained at the first call."""
    if setting.model != sources.default_folder():
        return setting.model
    steps = 200 if setting.quick else STEPS
    name = f"orders-{steps}-{fingerprint(questions(100))}"
    return cached(name, lambda: (pretrain(steps), tokenizer()))


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of the orders, and one for each digit."""
    rng = random.Random("words")
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.Split(Regex(r"^ $"), "removed"),
        ]
    )
    words = set()
    for language in orders.LANGUAGES:
        for phrasings in ("phrasings", "unseen"):
            for _ in range(2000):
                prompt, answer = orders.extraction(rng, language, phrasings)
                texts = (prompt, answer, f", {', '.join(orders.FIELDS)}?")
                words |= {word for text in texts for word, _ in split.pre_tokenize_str(text)}
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *sorted(words)])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    inner.pre_tokenizer = split
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|end|>",
        unk_token="<|unknown|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=CHAT,
    )


def pretrain(steps: int) -> PreTrainedModel:
    """Train the small model in float32 on questions about fields."""
    torch.manual_seed(0)
    model = small_llama(len(tokenizer()), 64, mlp_width=128, layers=3, key_value_heads=4)
    return train(model, questions(12_000), steps, lr=4e-3, seed=0, batch_size=32)


def questions(count: int) -> list[Example]:
    """What the small model is pretrained on."""
    rng = random.Random("questions to pretrain on")
    languages = list(orders.LANGUAGES)
    pairs = [orders.field_question(rng, rng.choice(languages)) for _ in range(count)]
    return encode(tokenizer(), pairs)


def encode(own: PreTrainedTokenizerFast, pairs: Sequence[Pair]) -> list[Example]:
    """Questions and answers as token ids; the answers are in the loss."""
    template = Template(own)
    rendered = [template.render_conversation(pair_turns(*pair)) for pair in pairs]
    return template.encode_rendered([text for [text] in rendered])


class Base:
    """A pretrained model on disk: fresh copies of it, and its tokens."""

    def __init__(self, setting: Setting) -> None:
        self.folder = folder(setting)
        self.device = setting.device
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.weights = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)

    def encode(self, pairs: Sequence[Pair]) -> list[Example]:
        return encode(self.tokenizer, pairs)

    def dense(self) -> PreTrainedModel:
        """A copy in which every weight is trained: full fine-tuning."""
        model = AutoModelForCausalLM.from_config(self.weights.config, dtype=torch.float32)
        model.load_state_dict(self.weights.state_dict())
        return model.to(self.device)

    def adapted(
        self,
        seed: int,
        codebook: Tensor | None = NF4,
        start: str = "default",
        **adapter: int | str | list[str],
    ) -> PreTrainedModel:
        """A copy whose linear layers are all frozen and quantized, and adapted.

        codebook=None keeps the layers dense. start: of the adapters (variants/init.py). adapter:
        other settings than rank 16; with the default start also targets, as in lora.attach. A layer
        that is no target is quantized, too.
        """
        adapter = {"r": RANK} | adapter
        device = str(self.device)
        quantization = {"codebook": codebook}
        return load_with_adapters(
            self.folder, torch.float32, device, start, seed, adapter, quantization
        )

    def task(
        self, rng: random.Random, n_test: int, language: str = "English"
    ) -> tuple[list[Example], list[Example]]:
        """1000 orders to train on, and others to test on; half of these in unseen phrasings."""
        make = partial(orders.extraction, rng, language)
        pairs = orders.distinct(make, 1000 + n_test // 2)
        unseen = orders.distinct(partial(make, "unseen"), n_test // 2)
        return self.encode(pairs[:1000]), self.encode(pairs[1000:] + unseen)


def trainable(model: nn.Module) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(
    model: PreTrainedModel,
    examples: Sequence[Example],
    steps: int,
    lr: float,
    seed: int,
    batch_size: int = BATCH,
) -> PreTrainedModel:
    """AdamW, with a warm-up in the first tenth of the steps and then a linear decay to zero."""
    model.train()
    parameters = trainable(model)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
    )
    for step in range(steps):
        [batch] = batches_of_step(examples, step, batch_size, count=1, seed=seed, pad_id=0)
        batch = batch.to(model.device)
        loss = label_loss(model, batch, torch.float32) / batch.n_labels
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def exact_match(model: PreTrainedModel, examples: Sequence[Example]) -> float:
    """The percentage of answers that greedy generation would give word for word."""
    model.eval()
    right = 0
    for start in range(0, len(examples), 100):
        batch = collate(examples[start : start + 100], pad_id=0).to(model.device)
        logits = model(**batch.inputs, use_cache=False).logits[:, :-1]  # (B, T - 1, V)
        labels = batch.labels[:, 1:]  # (B, T - 1)
        agrees = (logits.argmax(-1) == labels) | (labels == IGNORE_INDEX)
        right += int(agrees.all(1).sum())
    return 100 * right / len(examples)
