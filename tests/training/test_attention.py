"""Attention in blocks is torch's attention for any shape; what is not plain is left to torch."""

import dataclasses

import pytest
import torch
import transformers
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from data.chat_template import Example
from data.dataset import collate
from helpers import bounds, models
from helpers.bounds import Bounded
from training import attention
from training.loss_and_eval import label_loss

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@dataclasses.dataclass(frozen=True)
class Case:
    """Queries (batch, shared * keys, length, size), keys, and values of another size."""

    length: int = 5
    batch: int = 2
    keys: int = 2
    shared: int = 3
    size: int = 4
    value_size: int = 6
    seed: int = 0

    def tensors(self, dtype: torch.dtype) -> list[Tensor]:
        """q, k and v, with heads between batch and length only in their strides, as in a model."""
        torch.manual_seed(self.seed)
        heads = self.keys * self.shared
        shapes = [(heads, self.size), (self.keys, self.size), (self.keys, self.value_size)]
        return [
            torch.randn(self.batch, self.length, *shape).to(dtype).transpose(1, 2)
            for shape in shapes
        ]


cases = st.builds(
    Case,
    length=st.integers(2, 150),
    batch=st.integers(1, 2),
    keys=st.integers(1, 2),
    shared=st.integers(1, 3),
    size=st.sampled_from([1, 4, 16]),
    seed=st.integers(0, 99),
)


def expected(case: Case, g: Tensor, q: Tensor, k: Tensor, v: Tensor) -> list[Bounded]:
    """What y, dL/dq, dL/dk and dL/dv may be: each of the equations, rounded as the file says."""
    dtype = q.dtype
    wide = torch.promote_types(dtype, torch.float32)
    scale = case.size**-0.5
    k, v = (each.repeat_interleave(case.shared, 1) for each in (k, v))
    q, k, v, g = (Bounded.exact(each) for each in (q, k, v, g))
    scores = q.matmul(transposed(k), wide).times(scale, wide)
    later = torch.ones(case.length, case.length, dtype=torch.bool).triu(1)
    scores = Bounded(scores.value.masked_fill(later, -torch.inf), scores.error)
    p = bounds.softmax(scores, wide).to(dtype)

    dp = g.matmul(transposed(v), dtype)
    weighted = bounds.product(p, dp, wide)
    ones = Bounded.exact(torch.ones(case.length, 1))
    mean = weighted.matmul(ones, wide)
    difference = dp.plus(Bounded(-mean.value, mean.error), wide)
    ds = bounds.product(p, difference, wide).to(dtype)
    dq = ds.matmul(k, dtype).times(scale, dtype)
    dk = product_by_key(case, ds, q, dtype).times(scale, wide).to(dtype)
    dv = product_by_key(case, p, g, dtype).to(dtype)
    return [p.matmul(v, dtype), dq, dk, dv]


def transposed(bounded: Bounded) -> Bounded:
    return Bounded(bounded.value.mT, bounded.error.mT)


def product_by_key(case: Case, left: Bounded, right: Bounded, dtype: torch.dtype) -> Bounded:
    """left^T right, summed over the heads that share a key and, in float32, over blocks."""
    products = []
    for start in range(0, case.length, attention.BLOCK):
        rows = slice(start, start + attention.BLOCK)
        a, b = (by_key(case, each, rows) for each in (left, right))
        products.append(transposed(a).matmul(b, dtype))
    total = products[0]
    for each in products[1:]:
        total = total.plus(each, torch.promote_types(dtype, torch.float32))
    return total


def by_key(case: Case, bounded: Bounded, rows: slice) -> Bounded:
    """Some rows of all heads that share a key, below each other."""
    shape = (case.batch, case.keys, -1, bounded.value.shape[-1])
    return Bounded(*(part[:, :, rows].reshape(shape) for part in (bounded.value, bounded.error)))


@pytest.mark.parametrize("dtype", DTYPES)
@given(case=cases)
@example(case=Case(length=attention.BLOCK))
@example(case=Case(length=attention.BLOCK + 1))
def test_output_and_gradients_are_within_the_bound_of_their_equations(
    dtype: torch.dtype, case: Case
) -> None:
    inputs = [tensor.requires_grad_() for tensor in case.tensors(dtype)]
    y = attention.CausalAttention.apply(*inputs, case.size**-0.5)
    g = torch.randn(y.shape).to(dtype)
    computed = [y, *torch.autograd.grad(y, inputs, g)]
    for tensor, bound in zip(computed, expected(case, g, *inputs)):
        assert tensor.dtype == dtype
        if dtype == torch.float64:  # the reference is rounded by as much as what is tested
            bound = bounds.apart(bound, bound)
        assert bound.allows(tensor)


def test_the_backward_passes_gradcheck_over_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK", 2)
    inputs = [tensor.requires_grad_() for tensor in Case().tensors(torch.float64)]
    assert torch.autograd.gradcheck(attention.CausalAttention.apply, (*inputs, 0.7))


def test_only_queries_keys_and_values_are_saved() -> None:
    """No probabilities, and no copy of a key for each head that shares it."""
    saved = []
    inputs = [tensor.requires_grad_() for tensor in Case().tensors(torch.float32)]
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.data_ptr()), lambda _: None
    ):
        attention.CausalAttention.apply(*inputs, 1.0)
    assert saved == [tensor.data_ptr() for tensor in inputs]


class Layer(nn.Module):
    """What transformers passes of a layer whose keys are shared by three heads."""

    num_key_value_groups = 3


@pytest.mark.parametrize(
    ("case", "options", "is_ours"),
    [
        (Case(), {}, True),
        (Case(), {"is_causal": True}, True),
        (Case(), {"is_causal": False}, False),
        (Case(), {"dropout": 0.5}, False),
        (Case(), {"attention_mask": torch.ones(2, 1, 5, 5).bool()}, False),
        (Case(), {"position_bias": torch.zeros(1, 6, 5, 5)}, False),
        (Case(), {"softcap": 30.0}, False),
        (Case(), {"cache": object()}, False),
        (Case(), {"s_aux": torch.zeros(6)}, False),
        (Case(length=1), {}, False),
        (Case(length=attention.LONGEST + 1, batch=1), {}, False),
    ],
)
def test_what_is_not_plain_is_left_to_torch(
    case: Case, options: dict, is_ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(
        attention, "sdpa_attention_forward", lambda *_, **options: calls.append(options)
    )
    q, k, v = case.tensors(torch.float32)
    options = {"attention_mask": None} | options
    result = attention.causal_attention(Layer(), q, k, v, scaling=0.3, **options)
    assert bool(calls) != is_ours
    if is_ours:
        y, weights = result
        expected = attention.CausalAttention.apply(q, k, v, 0.3).transpose(1, 2)
        assert torch.equal(y, expected) and weights is None
    else:
        del options["attention_mask"]
        assert calls == [{"dropout": 0.0, "scaling": 0.3} | options]


def test_fewer_queries_than_keys_are_left_to_torch() -> None:
    """As in generation with a cache."""
    q, k, v = Case().tensors(torch.float32)
    y, _ = attention.causal_attention(Layer(), q[:, :, -2:], k, v, None)
    assert y.shape == (2, 2, 6, 6)


def test_each_layer_of_a_model_on_a_cpu_computes_its_attention_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    plain = attention.CausalAttention.apply
    monkeypatch.setattr(
        attention.CausalAttention, "apply", lambda *args: calls.append(args) or plain(*args)
    )
    model = models.tiny_llama(vocab_size=256)
    attention.use(model)
    ids = torch.randint(0, 256, (2, 70))
    model(input_ids=ids, labels=ids).loss.backward()
    assert len(calls) == model.config.num_hidden_layers
    assert attention.NAME not in model.config.to_json_string()


def test_a_model_that_does_not_use_torchs_attention_keeps_its_own() -> None:
    model = models.tiny_llama(vocab_size=256)
    model.set_attn_implementation("eager")
    attention.use(model)
    assert model.config._attn_implementation == "eager"


SMALL = {"vocab_size": 64, "hidden_size": 16, "pad_token_id": 1}
ARCHITECTURES = {
    "opt": transformers.OPTConfig(
        **SMALL, word_embed_proj_dim=16, ffn_dim=8, num_hidden_layers=2, num_attention_heads=2
    ),
    "bloom": transformers.BloomConfig(**SMALL, n_layer=2, n_head=2),
    "gemma2": transformers.Gemma2Config(
        **SMALL,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=4,
    ),
}


def padded() -> list[Example]:
    return [Example(list(range(2, 2 + n)), list(range(2, 2 + n))) for n in (9, 3, 6)]


def small(name: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[name]).eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_token_sees_the_padding_although_no_mask_hides_it(name: str) -> None:
    """In models with learned positions, with a slope for each distance, and with a window."""
    model = small(name)
    attention.use(model)
    losses = [label_loss(model, collate(padded(), pad), torch.float32) for pad in (1, 63)]
    assert torch.equal(*losses)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_without_a_mask_a_token_has_the_logits_that_it_has_with_one(name: str) -> None:
    """By an implementation that computes the same sums with and without a mask."""
    model = small(name)
    model.set_attn_implementation("eager")
    batch = collate(padded(), 1)
    with torch.no_grad():
        masked = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        plain = model(**batch.inputs).logits
    real = batch.attention_mask.bool()
    assert torch.equal(masked[real], plain[real])
