"""Causal attention in blocks of queries, for short sequences on a CPU.

With queries Q, keys K and values V (T, D) of a head, and s = 1 / sqrt(D), row i of the output is a
mean of the values up to i:

    P = softmax(s Q K^T), with P_ij = 0 for j > i        Y = P V

With G = dL/dY, the chain rule gives the backward pass:

    dL/dV = P^T G        dP = G V^T        dS = P * (dP - rowsum(P * dP))
    dL/dQ = s dS K       dL/dK = s dS^T Q

Both passes take BLOCK queries at a time, and only the keys that these may see. P is computed again
in the backward pass, so nothing of size T * T is ever stored: Q, K and V are saved, and heads that
share a key are computed together, without copies of it. S is computed in float32, P and the other
products in the dtype of the queries, as torch does.

torch's kernel computes the same, but its backward pass multiplies small matrices of 16-bit numbers
slowly on a CPU. So sequences of up to LONGEST tokens are computed here, and longer ones by torch.

`use` makes a model call `causal_attention`, which transformers knows by NAME.
"""

from __future__ import annotations  # type hints must not load the classes of transformers

import torch
import transformers
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "causal_blocks"
BLOCK = 64  # queries
LONGEST = 1024  # tokens
UNUSUAL = ("softcap", "position_bias", "cache", "s_aux")  # options that change the result


class CausalAttention(torch.autograd.Function):
    """Y (B, H, T, D) of queries (B, H, T, D), keys and values (B, H / n, T, D) for n heads each."""

    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        batch, heads, length, _ = q.shape
        y = v.new_empty(batch, length, heads, v.shape[-1]).transpose(1, 2)  # as a layer reads it
        for start in range(0, length, BLOCK):
            block = slice(start, start + BLOCK)
            p, _, _, v_seen = probabilities(q, k, v, start, scale)
            y[:, :, block] = torch.bmm(p, v_seen).view(y[:, :, block].shape)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, g: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        dq = torch.empty_like(q)
        # Sums over blocks, in float32 or float64
        dtype = torch.promote_types(q.dtype, torch.float32)
        dk = torch.zeros_like(k, dtype=dtype, memory_format=torch.contiguous_format)
        dv = torch.zeros_like(v, dtype=dtype, memory_format=torch.contiguous_format)
        for start in range(0, q.shape[2], BLOCK):
            block = slice(start, start + BLOCK)
            p, q_block, k_seen, v_seen = probabilities(q, k, v, start, ctx.scale)
            g_block = g[:, :, block].reshape(len(p), -1, g.shape[-1])
            dp = torch.bmm(g_block, v_seen.transpose(1, 2))
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
            dq[:, :, block] = torch.bmm(ds, k_seen).mul_(ctx.scale).view(dq[:, :, block].shape)
            seen = slice(0, k_seen.shape[1])
            dk[:, :, seen] += torch.bmm(ds.transpose(1, 2), q_block).view(dk[:, :, seen].shape)
            dv[:, :, seen] += torch.bmm(p.transpose(1, 2), g_block).view(dv[:, :, seen].shape)
        return dq, dk.mul_(ctx.scale).to(k.dtype), dv.to(v.dtype), None


def probabilities(
    q: Tensor, k: Tensor, v: Tensor, start: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P of the queries from `start` on, and these queries, and the keys and values that they see.

    Returns: (B * H / n, n * BLOCK, seen), (B * H / n, n * BLOCK, D) and (B * H / n, seen, D) twice.
    """
    groups = k.shape[0] * k.shape[1]  # B * H / n
    stop = min(start + BLOCK, q.shape[2])
    q_block = q[:, :, start:stop].reshape(groups, -1, q.shape[-1])
    k_seen = k[:, :, :stop].reshape(groups, stop, k.shape[-1])
    v_seen = v[:, :, :stop].reshape(groups, stop, v.shape[-1])
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = torch.bmm(q_block.to(dtype), k_seen.to(dtype).transpose(1, 2)).mul_(scale)
    size = stop - start
    is_later = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    scores.view(groups, -1, size, stop)[..., start:].masked_fill_(is_later, -torch.inf)
    return scores.softmax(-1).to(q.dtype), q_block, k_seen, v_seen


def causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: object,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: y (B, T, H, D), by torch wherever it is not plain."""
    length = query.shape[2]
    is_causal = options.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    is_plain = is_causal and attention_mask is None and dropout == 0
    is_plain = is_plain and not any(options.get(name) is not None for name in UNUSUAL)
    if not is_plain or not 1 < length == key.shape[2] <= LONGEST:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return CausalAttention.apply(query, key, value, scale).transpose(1, 2), None


def use(model: transformers.PreTrainedModel) -> None:
    """Let a model that runs on a CPU compute its attention here, if it uses torch's."""
    if model.config._attn_implementation != "sdpa":
        return
    transformers.AttentionInterface.register(NAME, causal_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
