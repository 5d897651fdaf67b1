"""torch's scaled_dot_product_attention with time and memory that grow linearly with the length."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _exact, clustered
from ._checks import check_kind, check_like, check_shape, check_tensor
from ._nested import nested_like, padded
from .modules._options import check_clustered_options
from .modules.attention import draw_seed


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
    query_padding_mask: Tensor | None = None,
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
        query: [..., H, L, D], floating; or nested, strided or jagged [B, ..., L_i, D], as key and value then are:
            without masks, and the output is nested as the query is.
        key: [..., H, S, D]; leading dimensions broadcast, as torch's do.
        value: [..., H, S, E].
        attn_mask: broadcasts to [..., H, L, S]; bool (**True: seen**, as torch has it here) or floating (added). Or a
            ``torch.nn.attention.bias.CausalBias``: no mask is made of it where keys are more than ``exact_below``, but
            a lower right one of L < S costs as much as S queries.
        dropout_p: probability of dropping an attention weight, whatever the mode; drawn from torch's random state.
        is_causal: query i sees the keys 0 ... i.
        scale: of ``query @ key``; None: ``D ** -0.5``.
        enable_gqa: key and value may have fewer heads; each serves as many consecutive query heads.
        key_padding_mask: bool [..., S] with the leading dimensions of the query without heads (of a query of three
            dimensions, with its first), **True: ignored**, as in the other functions.
        query_padding_mask: bool [..., L] likewise, True: the query has no say in the choice of keys. None: with as many
            queries as keys it is the ``key_padding_mask``.
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
    options: dict[str, Any] = {
        "budget": budget, "local_fraction": local_fraction, "grouping": grouping, "rest_term": rest_term,
        "chunk_length": chunk_length, "hash_seed": hash_seed, "backend": backend,
    }  # fmt: skip
    given = {
        "query": query, "key": key, "value": value, "attn_mask": attn_mask,
        "key_padding_mask": key_padding_mask, "query_padding_mask": query_padding_mask,
    }  # fmt: skip
    if any(isinstance(x, Tensor) and x.is_nested for x in given.values()):
        return _of_nested(
            given, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
            exact_below=exact_below, **options,
        )  # fmt: skip
    for name, x in given.items():
        if x is not None and not _is_causal_bias(x):
            check_kind(name, x)
    has_heads = query.dim() > 3 or (query.dim() == 3 and enable_gqa)
    lead = tuple(query.shape[: -3 if has_heads else -2])
    for name, mask, length in (
        ("key_padding_mask", key_padding_mask, key.shape[-2:-1]),
        ("query_padding_mask", query_padding_mask, query.shape[-2:-1]),
    ):
        if mask is not None:
            check_tensor(name, mask, " ".join(["N"] * len(lead) + ["S" if name[0] == "k" else "L"]), (torch.bool,))
            check_like(name, mask, "query", query)
            check_shape(name, mask, (*lead, *length))
    if key.shape[-2:-1] != value.shape[-2:-1]:  # torch's CPU kernel does not look
        raise ValueError(f"value must have the length of key, {list(key.shape)}, got shape {list(value.shape)}")
    shift = 0  # position i of the queries is position i + shift of the keys
    if _is_causal_bias(attn_mask):
        is_causal, shift = _causality(attn_mask, query.shape[-2], key.shape[-2], is_causal)
        attn_mask = None
    exact = key.dim() < 2 or key.shape[-2] <= (budget if exact_below is None else exact_below)
    if exact or (is_causal and attn_mask is not None):  # torch raises for both
        if (key_padding_mask is not None or shift) and not (is_causal and attn_mask is not None):
            attn_mask = _one_mask(query, key, attn_mask, key_padding_mask, is_causal, shift, has_heads)
            is_causal = False
        return _exact.scaled_dot_product_attention(
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
    key_padding, query_padding = (
        None if mask is None else mask.expand(*lead, -1).reshape(batch, -1)
        for mask in (key_padding_mask, query_padding_mask)
    )
    if shift:  # queries before the first key are cut off, and those that are missing have no say
        if query_padding is None:
            query_padding = q.new_zeros((batch, q.shape[2]), dtype=torch.bool)
        query_padding = F.pad(query_padding, (shift, 0), value=True)
        q = F.pad(q, (0, 0, shift, 0))
    out = clustered.attend(
        q,
        k,
        v,
        **options,
        causal=is_causal,
        query_padding_mask=query_padding,
        key_padding_mask=key_padding,
        attn_mask=None if attn_mask is None else _four_dimensional(attn_mask, lead, q.shape[2], k.shape[2]),
        scale=scale,
        dropout_p=dropout_p,
        dropout_seed=draw_seed(q.device) if dropout_p > 0 else None,
    )[0]
    if shift:
        out = F.pad(out, (0, 0, -shift, 0))
    out = out.reshape(*lead, *out.shape[1:])
    return out if has_heads else out.squeeze(-3)


def _of_nested(given: dict[str, Any], **options: Any) -> Tensor:
    """Of nested tensors, as of padded ones."""
    query, padding, lengths = given["query"], {}, {}
    for name, x in given.items():
        if name not in ("query", "key", "value"):
            if x is not None:
                raise ValueError(f"{name} must be None with nested tensors (their lengths are known), got a tensor")
        elif not (isinstance(x, Tensor) and x.is_nested):
            raise TypeError(f"{name} must be nested if one of query, key and value is, got a dense tensor")
        else:
            given[name], behind, lengths[name] = padded(name, x)
            lead = given[name].shape[1:-3]  # between the batch and the heads
            padding[name] = behind[(slice(None), *[None] * len(lead))].expand(-1, *lead, -1)
    if lengths["value"] != lengths["key"]:
        raise ValueError(f"value must have the lengths of key, {lengths['key'][:8]}, got {lengths['value'][:8]}")
    given |= {"key_padding_mask": padding["key"], "query_padding_mask": padding["query"]}
    return nested_like(query, scaled_dot_product_attention(**given, **options), lengths["query"])


def _is_causal_bias(x: Any) -> bool:
    bias = sys.modules.get("torch.nn.attention.bias")  # who has not imported it has none, and it takes long
    return bias is not None and isinstance(x, bias.CausalBias)


def _causality(bias: Any, length: int, n_keys: int, is_causal: bool) -> tuple[bool, int]:
    """Whether a ``CausalBias`` hides anything, and by how much the keys are ahead of the queries."""
    if is_causal:
        raise ValueError("is_causal must be False with a CausalBias as attn_mask, got True")
    if bias.variant.name == "UPPER_LEFT" or bias.seq_len_q == bias.seq_len_kv:  # as torch decides, for any length
        return True, 0
    if (bias.seq_len_q, bias.seq_len_kv) != (length, n_keys):
        raise ValueError(
            f"attn_mask must be a CausalBias of the lengths of query and key, {length} and {n_keys}, got one of "
            f"{bias.seq_len_q} and {bias.seq_len_kv}"
        )
    return (False, 0) if length == 1 else (True, n_keys - length)


def _one_mask(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool, shift: int,
    has_heads: bool,
) -> Tensor:  # fmt: skip
    """One mask for torch's function, True: seen."""
    seen = torch.ones((), dtype=torch.bool, device=query.device)
    if key_padding_mask is not None:
        seen = ~key_padding_mask[..., None, :]
        if has_heads:
            seen = seen.unsqueeze(-3)
    if is_causal:
        ones = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device)
        seen = seen & ones.tril(shift)
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
