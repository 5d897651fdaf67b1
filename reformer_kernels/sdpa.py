"""torch's scaled_dot_product_attention with time and memory that grow linearly with the length."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import clustered
from ._checks import check_like, check_shape, check_tensor
from .modules.attention import draw_seed
from .modules.multihead import check_clustered_options


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    key_padding_mask: Tensor | None = None,
    budget: int = 128,
    local_fraction: float = 0.25,
    grouping: str = "position",
    rest_term: bool = True,
    chunk_length: int | None = None,
    exact_below: int | None = None,
    hash_seed: int = 0,
    backend: str | None = None,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``, and for long sequences ``clustered_attention``.

    Args:
        query: [..., H, L, D], floating.
        key: [..., H, S, D]; leading dimensions broadcast, as torch's do.
        value: [..., H, S, E].
        attn_mask: broadcasts to [..., H, L, S]; bool (**True: seen**, as torch has it here) or floating (added).
        dropout_p: probability of dropping an attention weight, whatever the mode; drawn from torch's random state.
        is_causal: query i sees the keys 0 ... i.
        scale: of ``query @ key``; None: ``D ** -0.5``.
        enable_gqa: key and value may have fewer heads; each serves as many consecutive query heads.
        key_padding_mask: bool [..., S] with the leading dimensions of the query without heads (of a query of three
            dimensions, with its first), **True: ignored**, as in the other functions.
        exact_below: with at most this number of keys torch's function is called; None: ``budget``.
        budget, local_fraction, grouping, rest_term, chunk_length, hash_seed, backend: as in
            ``functional.clustered_attention``.

    Returns:
        [..., H, L, E]. A query that sees no key gives 0.

    Raises:
        TypeError, ValueError: an option has a wrong type, shape or value.
        RuntimeError: what torch's function raises for its own arguments.
    """
    check_clustered_options(budget, local_fraction, chunk_length, grouping, rest_term, hash_seed, backend, exact_below)
    has_heads = query.dim() > 3 or (query.dim() == 3 and enable_gqa)
    if key_padding_mask is not None:
        lead = tuple(query.shape[: -3 if has_heads else -2])
        check_tensor("key_padding_mask", key_padding_mask, " ".join(["N"] * len(lead) + ["S"]), (torch.bool,))
        check_like("key_padding_mask", key_padding_mask, "query", query)
        check_shape("key_padding_mask", key_padding_mask, (*lead, key.shape[-2]))
    if key.shape[-2:-1] != value.shape[-2:-1]:  # torch's CPU kernel does not look
        raise ValueError(f"value must have the length of key, {list(key.shape)}, got shape {list(value.shape)}")
    exact = key.dim() < 2 or key.shape[-2] <= (budget if exact_below is None else exact_below)
    if exact or (is_causal and attn_mask is not None):  # torch raises for both
        if key_padding_mask is not None and not (is_causal and attn_mask is not None):
            attn_mask = _with_padding(query, key, attn_mask, key_padding_mask, is_causal, has_heads)
            is_causal = False
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    if not has_heads:
        query, key, value = (x.unsqueeze(-3) for x in (query, key, value))
        if attn_mask is not None and attn_mask.dim() > 2:
            attn_mask = attn_mask.unsqueeze(-3)
    same = -3 if enable_gqa else -2  # the dimensions before it broadcast
    shared = torch.broadcast_shapes(query.shape[:same], key.shape[:same], value.shape[:same])
    query, key, value = (x.expand(*shared, *x.shape[same:]) for x in (query, key, value))
    lead = query.shape[:-3]
    batch = math.prod(lead)
    q, k, v = (x.reshape(batch, *x.shape[-3:]) for x in (query, key, value))
    out = clustered.attend(
        q,
        k,
        v,
        budget=budget,
        local_fraction=local_fraction,
        chunk_length=chunk_length,
        grouping=grouping,
        rest_term=rest_term,
        causal=is_causal,
        key_padding_mask=None if key_padding_mask is None else key_padding_mask.reshape(batch, -1),
        attn_mask=None if attn_mask is None else _four_dimensional(attn_mask, lead, q.shape[2], k.shape[2]),
        scale=scale,
        dropout_p=dropout_p,
        dropout_seed=draw_seed(q.device) if dropout_p > 0 else None,
        hash_seed=hash_seed,
        backend=backend,
        context_keys=0,
        need_weights=False,
    )[0]
    out = out.reshape(*lead, *out.shape[1:])
    return out if has_heads else out.squeeze(-3)


def _with_padding(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor, is_causal: bool, has_heads: bool
) -> Tensor:
    """One mask for torch's function, True: seen."""
    seen = ~key_padding_mask[..., None, :]
    if has_heads:
        seen = seen.unsqueeze(-3)
    if is_causal:
        seen = seen & torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if attn_mask is None:
        return seen
    return attn_mask & seen if attn_mask.dtype == torch.bool else torch.where(seen, attn_mask, float("-inf"))


def _four_dimensional(attn_mask: Tensor, lead: tuple[int, ...], length: int, n_keys: int) -> Tensor:
    """A mask that broadcasts to [*lead, H, L, S], True: seen, as [B or 1, H or 1, L, S], True: ignored."""
    mask = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask
    mask = mask[(None,) * max(0, len(lead) + 3 - mask.dim())]
    mask = mask.expand(*mask.shape[:-2], length, n_keys)
    if len(lead) != 1 and any(size != 1 for size in mask.shape[:-3]):
        mask = mask.expand(*lead, *mask.shape[-3:])
    return mask.reshape(math.prod(mask.shape[:-3]), *mask.shape[-3:])
