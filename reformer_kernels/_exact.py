"""Exact attention by torch's own function, whatever stands in its place in ``torch.nn.functional``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Not by its name in torch.nn.functional, where people put other attentions, ours too, and also before they import us.
scaled_dot_product_attention = torch._C._nn.scaled_dot_product_attention


def attend_exactly(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    causal: bool,
    context_keys: int,
    dropout_p: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """``nn.MultiheadAttention``'s attention without its NaN: [B, H, L, D], and the weights [B, H, L, S].

    The stock module itself gives NaN for a query that sees no key, with weights and in its native inference path.
    """
    terms = [attn_mask, None if key_padding_mask is None else key_padding_mask[:, None, None]]
    L, S = q.shape[2], k.shape[2]
    if causal:
        if not need_weights and attn_mask is None and key_padding_mask is None and not context_keys:
            return scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True), None
        hidden = torch.ones(L, S - context_keys, dtype=torch.bool, device=q.device).triu(1)
        terms.append(F.pad(hidden, (0, context_keys)))
    mask = None
    for term in terms:
        if term is None:
            continue
        if term.dtype == torch.bool:
            term = torch.zeros_like(term, dtype=q.dtype).masked_fill(term, float("-inf"))
        mask = term if mask is None else mask + term
    if not need_weights:
        return scaled_dot_product_attention(q, k, v, mask, dropout_p), None
    scores = (q * q.shape[3] ** -0.5) @ k.transpose(-2, -1)
    if mask is None:
        weights = scores.softmax(-1)
    else:
        sees_none = (mask == float("-inf")).all(-1, keepdim=True)
        weights = (scores + mask).masked_fill(sees_none, 0.0).softmax(-1).masked_fill(sees_none, 0.0)
    weights = F.dropout(weights, dropout_p)
    return weights @ v, weights
