"""Clustered attention: groups of queries attend the keys that they would give most weight, and one for all the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _checks as check
from . import _ops
from ._calls import HashCall, ListCall, OrderCall, SelectCall, at_least_one, compute_dtype
from ._dispatch import check_backend
from .backends import reference
from .functional import seed_tensor

GROUPINGS = ("position", "hash")
BUCKETS = 16  # of a segment
SEGMENT = 256  # hashing groups queries within so many positions: their groups' keys depend on no query further away


def clustered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    budget: int = 128,
    local_fraction: float = 0.25,
    chunk_length: int | None = None,
    grouping: str = "position",
    rest_term: bool = True,
    causal: bool = False,
    query_padding_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    hash_seed: int | Tensor = 0,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention with separate queries and keys, over ``budget`` keys a query: for pretrained attention.

    Queries are grouped in chunks. Each chunk attends a local window and the keys that its queries would give most
    weight, found with the mean queries of its four quarters; a key counts once. One rest key stands for all keys
    that a query may see but did not: their mean key and value (of all keys that it may see), with the logarithm of
    their number added to the score. With a budget of at least S keys the result is exact. After improved clustered
    attention (Vyas, Katharopoulos, Fleuret, arXiv 2007.04825). Selecting costs L * S * 4 / chunk_length
    products of rows a head up to 16,384 keys; beyond, blocks of 64 keys are chosen first by their means.

    The result of a sequence does not depend on its batch: windows and groups are those of the sequence without its
    trailing padding, and what padding holds has no effect. By the padded length go only the default ``chunk_length``
    and whether blocks of keys are chosen first (and ``exact_below`` of the drop-ins), by the place in the batch only
    dropout.

    Which keys a chunk takes depends on all its queries, so ``causal`` masks values and keys of later positions exactly,
    but an earlier query of the same chunk can see other (earlier) keys when a later one changes.

    Args:
        query: [B, H, L, D], float32, bfloat16, float16 or float64, any strides.
        key: [B, Hk, S, D], same dtype; Hk divides H, and query head h reads key head h // (H / Hk).
        value: [B, Hk, S, E], same dtype.
        budget: keys that a query attends, at least 1.
        local_fraction: share of the budget, 0 to 1, that is a window around the query's chunk of positions (with
            ``causal`` one that ends with it). Unused if L and S differ and nothing is causal: then positions of queries
            and keys have nothing to do with each other.
        chunk_length: queries that share their keys. Shorter is more accurate and slower. None: 16, with more than 4,096
            keys 32, and with more than 32,768 keys 64.
        grouping: "position": chunks are neighbouring queries; "hash": they share a bucket of centred queries, within
            segments of 256 positions, and the local window is attended apart from that.
        rest_term: use the rest key. It is off with an ``attn_mask``.
        causal: keys at later positions are masked (position i of the queries is position i of the keys).
        query_padding_mask: bool [B, L], True: the query has no say in the choice of keys, so that what it holds has no
            effect on other rows of the output. None: ``key_padding_mask``, if there are as many queries as keys.
        key_padding_mask: bool [B, S], True: ignored.
        attn_mask: [B or 1, H or 1, L, S], bool (True: ignored) or floating (added to the score; -1e30 and below:
            ignored).
        scale: of ``query @ key``; None: ``D ** -0.5``.
        dropout_p: probability in [0, 1] of dropping an attention weight (the rest key's is never dropped).
        dropout_seed: int64 tensor of one element; needed when ``dropout_p`` is positive.
        hash_seed: an int, or an int64 tensor of one element on the CPU, for ``grouping="hash"``.
        backend: the name of a backend, or None.

    Returns:
        [B, H, L, E]. A query that sees no key gives 0.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or value.
        NotImplementedError: the named backend does not support the call.
    """
    return attend(
        query,
        key,
        value,
        budget=budget,
        local_fraction=local_fraction,
        chunk_length=chunk_length,
        grouping=grouping,
        rest_term=rest_term,
        causal=causal,
        query_padding_mask=query_padding_mask,
        key_padding_mask=key_padding_mask,
        attn_mask=attn_mask,
        scale=scale,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        hash_seed=hash_seed,
        backend=backend,
    )[0]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    budget: int,
    local_fraction: float,
    chunk_length: int | None,
    grouping: str,
    rest_term: bool,
    causal: bool,
    query_padding_mask: Tensor | None = None,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    scale: float | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    hash_seed: int | Tensor,
    backend: str | None,
    context_keys: int = 0,
    need_weights: bool = False,
    hash_width: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``clustered_attention`` for modules: with keys that every query sees, and with the attention weights.

    Args:
        context_keys: the last keys, beside the budget; never masked, also if ``causal``.
        hash_width: hash by so many columns of the queries; None: all.
        need_weights: also return the probabilities that were used, [B, H, L, S]: O(L * S) memory. The rest key's is
            spread evenly over the keys whose mean it is, so that ``weights @ value`` is the output.
    """
    _check(query, key, value, budget, local_fraction, chunk_length, grouping, rest_term, context_keys)
    check.check_bool("causal", causal)
    check.check_scale(scale)
    check.check_dropout(dropout_p, dropout_seed, query.device)
    check_backend(backend)
    length, head_dim = query.shape[2:]
    size = key.shape[2]
    check.check_padding_mask(query_padding_mask, "query", query, "query_padding_mask")
    check.check_padding_mask(key_padding_mask, "key", key)
    check.check_attn_mask(attn_mask, "query", query, length, size)
    keys = size - context_keys
    if query_padding_mask is None and key_padding_mask is not None and length == keys:
        query_padding_mask = key_padding_mask[:, :length]
    chunk = _default_chunk_length(size) if chunk_length is None else chunk_length
    padded = query_padding_mask is not None or key_padding_mask is not None
    local = round(budget * local_fraction)
    if not padded and ((not causal and length != keys) or (grouping == "hash" and budget >= keys)):
        local = 0  # as SelectCall.windows says where there is padding
    seed = seed_tensor(hash_seed)
    factor = float(head_dim**-0.5 if scale is None else scale)
    order = None
    if grouping == "hash":
        order = _hash_order(query[..., :hash_width], query_padding_mask, seed, backend)
    key_indices = _ops.select_keys(
        SelectCall(
            query=query.detach(),
            key=key.detach(),
            order=order,
            query_padding_mask=query_padding_mask,
            key_padding_mask=key_padding_mask,
            attn_mask=attn_mask,
            chunk_length=chunk,
            budget=budget,
            local=local,
            context_keys=context_keys,
            causal=causal,
            scale=factor,
            backend=backend or "",
        )
    )
    call = ListCall(
        query=query,
        key=key,
        value=value,
        order=order,
        key_indices=key_indices,
        key_padding_mask=key_padding_mask,
        attn_mask=attn_mask,
        dropout_seed=dropout_seed,
        chunk_length=chunk,
        context_keys=context_keys,
        causal=causal,
        rest_term=rest_term and attn_mask is None,
        scale=factor,
        dropout_p=float(dropout_p),
        backend=backend or "",
    )
    out, _ = _ops.list_attention(call)
    return out, reference.dense_weights(call) if need_weights else None


def _default_chunk_length(size: int) -> int:
    """16, with more than 4,096 keys 32, with more than 32,768 keys 64. Without branches: a size may be symbolic."""
    short, medium = 1 // (1 + size // 4097), 1 // (1 + size // 32769)
    return 16 * (4 - short - 2 * medium)


def _check(
    query: Any, key: Any, value: Any, budget: Any, local_fraction: Any, chunk_length: Any, grouping: Any,
    rest_term: Any, context_keys: Any,
) -> None:  # fmt: skip
    check.check_separate(query, key, value)
    check.check_int("budget", budget, 1)
    if chunk_length is not None:
        check.check_int("chunk_length", chunk_length, 1)
    check.check_int("context_keys", context_keys, 0, key.shape[2])
    check.check_fraction("local_fraction", local_fraction)
    check.check_choice("grouping", grouping, GROUPINGS)
    check.check_bool("rest_term", rest_term)


def _hash_order(query: Tensor, padding: Tensor | None, seed: Tensor, backend: str | None) -> Tensor:
    """int32 [B, H, 2, L]: the order of positions, and that by segment and bucket of the centred queries.

    In every segment padding comes last.
    """
    batch, heads, length, _ = query.shape
    query = query.detach()
    padded = None if padding is None else padding[:, None, :, None]
    kept = query if padded is None else query.masked_fill(padded, 0.0)
    # Half types are added up in float32: rounded, the mean would depend on padding, and long sums overflow.
    total = kept.sum(dim=2, keepdim=True, dtype=compute_dtype(query))
    # A tensor, as GPUs multiply by the inverse of a number.
    count = total.new_full((), length) if padded is None else (~padded).sum(dim=2, keepdim=True).clamp(min=1)
    centred = (query - total / count).to(query.dtype)
    buckets = _ops.hash_buckets(
        HashCall(
            x=centred,
            rotations=None,
            key_padding_mask=padding,
            hash_seed=seed,
            n_buckets=[BUCKETS],
            n_hashes=1,
            chunk_length=SEGMENT,
            backend=backend or "",
        )
    )
    positions = torch.ones_like(buckets).cumsum(-1, dtype=torch.int32) - 1  # not by arange: buckets may be sharded
    segments = -(-length // SEGMENT)
    order = _ops.bucket_order(
        OrderCall(
            buckets=buckets + positions // SEGMENT * (BUCKETS + 1),
            cu_seqlens=None,
            n_buckets=(BUCKETS + 1) * at_least_one(segments),
            backend=backend or "",
        )
    )
    return torch.cat([positions.expand(batch, heads, 1, length), order], dim=2)
