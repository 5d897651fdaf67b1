"""The functional API: LSH attention, local attention and the steps of LSH attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from . import _checks as check
from . import _ops
from ._calls import AttentionCall, HashCall, OrderCall, at_least_one, is_single_window, length_without_padding
from ._dispatch import check_backend
from .hashing import bucket_factors
from .rules import AttentionRules

_DEFAULT_RULES = AttentionRules()
_CPU = torch.device("cpu")
MAX_NEIGHBOURS = 1024  # chunks before or after; a longer window is a longer chunk


def hash_buckets(x: Tensor, rotations: Tensor, n_buckets: int | Sequence[int], *, backend: str | None = None) -> Tensor:
    """Angular LSH buckets: ``argmax([x @ rot, -x @ rot])`` for each factor (paper section 2; trax ``hash_vectors``).

    Args:
        x: [B, H, L, D], floating.
        rotations: float32 [B or 1, H or 1, D, R, sum(n_buckets) / 2], for example of ``random_rotations``.
        n_buckets: an even integer or even factors; ``bucket = a0 + f0 * a1 + f0 * f1 * a2 ...``.
        backend: the name of a backend, or None.

    Returns:
        int32 [B, H, R, L], between 0 and prod(n_buckets) - 1.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or value.
        NotImplementedError: the named backend does not support the call.
    """
    check.check_tensor("x", x, "B H L D")
    check.check_width("x", x)
    check_backend(backend)
    if n_buckets is None:
        raise TypeError("n_buckets must be a positive even integer or a sequence of them, got None")
    factors = bucket_factors(n_buckets, 1, 1)
    _check_rotations(rotations, "x", x, sum(factors) // 2)
    return _ops.hash_buckets(
        HashCall(
            x=x,
            rotations=rotations,
            key_padding_mask=None,
            hash_seed=None,
            n_buckets=list(factors),
            n_hashes=rotations.shape[3],
            chunk_length=1,
            backend=backend or "",
        )
    )


def bucket_order(buckets: Tensor, n_buckets: int | Sequence[int], *, backend: str | None = None) -> Tensor:
    """Positions in the order of (bucket, position): a stable sort of every row.

    Args:
        buckets: int32 [B, H, R, L], each at least 0 and below prod(n_buckets).
        n_buckets: their number, or its factors (a larger number only costs time).
        backend: the name of a backend, or None.

    Returns:
        int32 [B, H, R, L], a permutation of 0 ... L - 1 in every row.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or value, or a bucket is out of range.
    """
    check.check_tensor("buckets", buckets, "B H R L", (torch.int32,))
    check_backend(backend)
    sizes = tuple(n_buckets) if isinstance(n_buckets, (tuple, list)) else (n_buckets,)
    for size in sizes:
        check.check_int("n_buckets", size, 1)
    call = OrderCall(buckets=buckets, cu_seqlens=None, n_buckets=math.prod(sizes), backend=backend or "")
    return _ops.bucket_order(call)


if TYPE_CHECKING:
    from typing_extensions import TypedDict, Unpack

    class _LSHOptions(TypedDict, total=False):
        n_hashes: int
        n_buckets: int | Sequence[int] | None
        chunk_length: int
        chunks_before: int
        chunks_after: int
        causal: bool
        key_padding_mask: Tensor | None
        attn_mask: Tensor | None
        num_queries: int | None
        dropout_p: float
        dropout_seed: Tensor | None
        rules: AttentionRules
        rotations: Tensor | None
        hash_seed: int | Tensor
        buckets: Tensor | None
        alignment: str
        cu_seqlens: Tensor | None
        shift_keys: bool
        backend: str | None


@overload
def lsh_attention(
    query_key: Tensor, value: Tensor, *, return_buckets: Literal[False] = False, **options: Unpack[_LSHOptions]
) -> Tensor: ...
@overload
def lsh_attention(
    query_key: Tensor, value: Tensor, *, return_buckets: Literal[True], **options: Unpack[_LSHOptions]
) -> tuple[Tensor, Tensor]: ...
@overload
def lsh_attention(
    query_key: Tensor, value: Tensor, *, return_buckets: bool, **options: Unpack[_LSHOptions]
) -> Tensor | tuple[Tensor, Tensor]: ...
def lsh_attention(
    query_key: Tensor,
    value: Tensor,
    *,
    n_hashes: int = 4,
    n_buckets: int | Sequence[int] | None = None,
    chunk_length: int = 64,
    chunks_before: int = 1,
    chunks_after: int = 0,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    num_queries: int | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    rules: AttentionRules = _DEFAULT_RULES,
    rotations: Tensor | None = None,
    hash_seed: int | Tensor = 0,
    buckets: Tensor | None = None,
    alignment: str = "ring",
    cu_seqlens: Tensor | None = None,
    shift_keys: bool = False,
    backend: str | None = None,
    return_buckets: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The Reformer's attention with shared queries and keys (arXiv 2001.04451, section 2).

    Tokens are hashed ``n_hashes`` times and sorted by bucket; the sorted rounds form one ring of chunks, and each query
    attends the keys of its own chunk and its neighbours. The rounds are combined by their logsumexp. Memory is linear
    in L; the same arguments give the same bits, whatever the number of threads.

    What a row gets does not depend on the batch that it comes in: padding at its end (by ``key_padding_mask``) is cut
    off before windows are placed, and gives 0. Three things do depend on it: the default ``n_buckets``, which follows
    from the padded length, and the rotations for it; what ``dropout_p`` drops, by the number of the row; and windows
    where ``rules.cut_padding`` is off, or where padding is not at the end (as in front of context keys).

    Args:
        query_key: [B, H, L, D], float32, bfloat16, float16 or float64, any strides; B, H and L may be 0. A row is both
            query and, scaled to unit length, key.
        value: [B, H, L, E], same dtype.
        n_hashes: R, hash rounds.
        n_buckets: an even integer or even factors; None: ``2 * max(1, L // chunk_length)``, factorised above 128.
        chunk_length: C. If L <= C, everything is one window and nothing is hashed (except with alignment "bucket").
        chunks_before, chunks_after: neighbour chunks a query sees, at most 1024 on each side.
        causal: keys at later positions are masked.
        key_padding_mask: bool [B, L], True: ignored as key, and at the end of a row as query, too.
        attn_mask: [B or 1, H or 1, num_queries, L], bool (True: ignored) or floating (added to the
            score; -1e30 and below: ignored).
        num_queries: the first rows are queries, the rest context keys that every query may see; None: all rows.
        dropout_p: probability in [0, 1] of dropping an attention weight.
        dropout_seed: int64 tensor of one element; needed when ``dropout_p`` is positive.
        rules: where the published Reformers differ, see ``AttentionRules``.
        rotations: float32 [B or 1, H or 1, D, n_hashes, sum(n_buckets) / 2]; None: from ``hash_seed``.
        hash_seed: an int, or an int64 tensor of one element on the CPU.
        buckets: int32 [B, H, n_hashes, L] without an offset per round, to reuse those of an earlier call.
        alignment: "ring" as published; "bucket": chunks start anew in every bucket and windows do not leave it, which
            with ``causal`` is strictly causal: no output depends on later tokens in any way. Needs ``n_buckets``.
        cu_seqlens: int32 [n + 1] on the CPU, rising from 0 to L: the rows are n packed sequences, each attended as if
            alone, with its padding. Needs ``n_buckets``.
        shift_keys: the key of a token is that of the token before it (padding does not count), and the first has none.
            So a query finds what came after its like, which shared rows cannot express: what matches the token before
            matches that token itself better still. Needs ``causal``, and goes with no ``attn_mask``. A query that sees
            no other row gets its own value, without dropout; padding between tokens may get something of later ones.
        backend: "cpu", "cuda", "triton" or "reference", or None for the best that supports the call.
        return_buckets: also return the buckets.

    Returns:
        [B, H, num_queries, E], or that and int32 buckets [B, H, R, L]. A query that sees no key gives 0.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or value.
        NotImplementedError: the named backend does not support the call.
    """
    check.check_tensor("query_key", query_key, "B H L D")
    check.check_tensor("value", value, "B H L E", check.dtypes_with(query_key))
    check.check_like("value", value, "query_key", query_key)
    check.check_width("query_key", query_key)
    check.check_width("value", value)
    batch, heads, length, head_dim = query_key.shape
    check.check_shape("value", value, (batch, heads, length, value.shape[3]))
    _check_common(chunk_length, chunks_before, chunks_after, causal, dropout_p, dropout_seed, backend, query_key.device)
    check.check_int("n_hashes", n_hashes, 1)
    check.check_bool("return_buckets", return_buckets)
    check.check_choice("alignment", alignment, ("ring", "bucket"))
    if not isinstance(rules, AttentionRules):
        raise TypeError(f"rules must be an AttentionRules, got {rules!r}")
    if num_queries is not None:
        check.check_int("num_queries", num_queries, 0, length)
        if cu_seqlens is not None:
            raise ValueError(f"num_queries must be None with cu_seqlens, got {num_queries}")
    n_queries = length if num_queries is None else num_queries
    check.check_padding_mask(key_padding_mask, "query_key", query_key)
    check.check_attn_mask(attn_mask, "query_key", query_key, n_queries)
    check.check_cu_seqlens(cu_seqlens, query_key)
    _check_shift(shift_keys, causal, attn_mask, n_queries, length)

    factors = None
    total: int
    if n_buckets is not None:
        factors = bucket_factors(n_buckets, length, chunk_length)
        total = math.prod(factors)
    elif alignment == "bucket" or cu_seqlens is not None:
        needed_by = 'alignment="bucket"' if alignment == "bucket" else "cu_seqlens"
        raise ValueError(f"n_buckets must be given with {needed_by} (the default depends on the length), got None")
    else:
        total = 2 * at_least_one(length // chunk_length)
    if rotations is not None:
        columns = sum(bucket_factors(n_buckets, length, chunk_length)) // 2
        _check_rotations(rotations, "query_key", query_key, columns, n_hashes)
    if buckets is not None:
        check.check_tensor("buckets", buckets, "B H R L", (torch.int32,))
        check.check_like("buckets", buckets, "query_key", query_key)
        check.check_shape("buckets", buckets, (batch, heads, n_hashes, length))

    order = None
    single_window = cu_seqlens is None and is_single_window(length, chunk_length, alignment == "ring")
    bounds = cu_seqlens
    if key_padding_mask is not None and rules.cut_padding and cu_seqlens is None:
        bounds = _cut_padding(key_padding_mask)
    if single_window and buckets is None:
        if return_buckets:
            buckets = query_key.new_zeros((batch, heads, n_hashes, length), dtype=torch.int32)
    elif not single_window:
        if buckets is None:
            pad_bucket = key_padding_mask if rules.padding_bucket else None
            seed = seed_tensor(hash_seed) if rotations is None else None
            buckets = _ops.hash_buckets(
                HashCall(
                    x=query_key.detach(),
                    rotations=rotations,
                    key_padding_mask=pad_bucket,
                    hash_seed=seed,
                    n_buckets=None if factors is None else list(factors),
                    n_hashes=n_hashes,
                    chunk_length=chunk_length,
                    backend=backend or "",
                )
            )
        order = _ops.bucket_order(
            OrderCall(buckets=buckets, cu_seqlens=bounds, n_buckets=total + 1, backend=backend or "")
        )
    needs_buckets = order is not None and (alignment == "bucket" or rules.within_bucket)
    scale = head_dim**-0.5 if rules.scale is None else rules.scale
    out, _, self_only = _ops.chunk_attention(
        AttentionCall(
            query=query_key,
            key=None,
            value=_of_next(value, key_padding_mask) if shift_keys else value,
            order=order,
            buckets=buckets if needs_buckets else None,
            key_padding_mask=key_padding_mask,
            attn_mask=attn_mask,
            cu_seqlens=bounds,
            dropout_seed=dropout_seed,
            chunk_length=chunk_length,
            chunks_before=chunks_before,
            chunks_after=chunks_after,
            causal=causal,
            num_queries=num_queries,
            scale=float(scale),
            dropout_p=float(dropout_p),
            alignment=alignment,
            rules_key=rules.key,
            backend=backend or "",
        )
    )
    if shift_keys:  # a query that sees no other row gets its own value, not the next one
        out = torch.where(self_only[..., None], value.to(out.dtype), out)
    if not return_buckets:
        return out
    assert buckets is not None
    return out, buckets


def _check_shift(shift_keys: Any, causal: bool, attn_mask: Tensor | None, n_queries: int, length: int) -> None:
    check.check_shift_keys(shift_keys, causal)
    if not shift_keys:
        return
    if attn_mask is not None:
        raise ValueError("attn_mask must be None with shift_keys (its columns are those of other tokens), got a tensor")
    if n_queries != length:
        raise ValueError(f"num_queries must be None with shift_keys (all rows are queries), got {n_queries}")


def _of_next(x: Tensor, padding: Tensor | None) -> Tensor:
    """Rows [B, H, L, E] of the next token that is no padding [B, L]; the last row stays."""
    if padding is None or x.shape[2] == 0:
        return torch.cat([x[:, :, 1:], x[:, :, -1:]], 2)
    position = torch.ones_like(padding, dtype=torch.int64).cumsum(1) - 1
    none = 2**62
    following = position.masked_fill(padding, none).flip(1).cummin(1).values.flip(1)  # from each position on
    following = torch.cat([following[:, 1:], torch.full_like(following[:, -1:], none)], 1)
    following = torch.where(following == none, position, following)  # what has no next one keeps its own
    return x.gather(2, following[:, None, :, None].expand(x.shape))


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    chunk_length: int = 64,
    chunks_before: int = 1,
    chunks_after: int = 0,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention of each chunk to itself and its neighbours, as the local layers of trax and Hugging Face.

    The chunks form a ring: without ``causal`` the first chunk also sees the last. If L <= chunk_length this is plain
    attention. Padding at the end of a row is cut off, as in ``lsh_attention``, so that a row does not depend on its
    batch.

    Args:
        query: [B, H, L, D], floating, any strides.
        key: [B, Hk, L, D], same dtype; Hk divides H, and query head h reads key head h // (H / Hk).
        value: [B, Hk, L, E], same dtype.
        scale: of ``query @ key``; None: ``D ** -0.5``.
        chunk_length, chunks_before, chunks_after, causal, key_padding_mask, attn_mask, dropout_p, dropout_seed,
            backend: as in ``lsh_attention``.

    Returns:
        [B, H, L, E]. A query that sees no key gives 0.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or value.
        NotImplementedError: the named backend does not support the call.
    """
    check.check_tensor("query", query, "B H L D")
    check.check_separate(query, key, value, query.shape[2])
    _check_common(chunk_length, chunks_before, chunks_after, causal, dropout_p, dropout_seed, backend, query.device)
    check.check_scale(scale)
    check.check_padding_mask(key_padding_mask, "query", query)
    check.check_attn_mask(attn_mask, "query", query, query.shape[2])
    scale = query.shape[3] ** -0.5 if scale is None else scale
    out, _, _ = _ops.chunk_attention(
        AttentionCall(
            query=query,
            key=key,
            value=value,
            order=None,
            buckets=None,
            key_padding_mask=key_padding_mask,
            attn_mask=attn_mask,
            cu_seqlens=None if key_padding_mask is None else _cut_padding(key_padding_mask),
            dropout_seed=dropout_seed,
            chunk_length=chunk_length,
            chunks_before=chunks_before,
            chunks_after=chunks_after,
            causal=causal,
            num_queries=None,
            scale=float(scale),
            dropout_p=float(dropout_p),
            alignment="ring",
            rules_key=_DEFAULT_RULES.key,
            backend=backend or "",
        )
    )
    return out


def _cut_padding(mask: Tensor) -> Tensor:
    """int32 [B, 3]: where two sequences of each row begin and end, up to its last token that counts and behind it."""
    end = length_without_padding(mask)
    return torch.cat([torch.zeros_like(end), end, torch.full_like(end, mask.shape[1])], 1).to(torch.int32)


def _check_common(
    chunk_length: Any,
    chunks_before: Any,
    chunks_after: Any,
    causal: Any,
    dropout_p: Any,
    dropout_seed: Any,
    backend: str | None,
    device: torch.device,
) -> None:
    check.check_int("chunk_length", chunk_length, 1)
    check.check_int("chunks_before", chunks_before, 0, MAX_NEIGHBOURS)
    check.check_int("chunks_after", chunks_after, 0, MAX_NEIGHBOURS)
    check.check_bool("causal", causal)
    check.check_dropout(dropout_p, dropout_seed, device)
    check_backend(backend)


def _check_rotations(rotations: Any, x_name: str, x: Tensor, columns: int, n_hashes: int | None = None) -> None:
    check.check_tensor("rotations", rotations, "B|1 H|1 D R sum(n_buckets)/2", (torch.float32,))
    check.check_like("rotations", rotations, x_name, x)
    rounds = rotations.shape[3] if n_hashes is None else n_hashes
    batch, heads, _, head_dim = x.shape
    check.check_shape("rotations", rotations, ((batch, 1), (heads, 1), head_dim, rounds, columns))


def seed_tensor(hash_seed: int | Tensor) -> Tensor:
    """A hash seed as an int64 tensor of one element on the CPU."""
    if isinstance(hash_seed, Tensor):
        check.check_kind("hash_seed", hash_seed)
        if hash_seed.dtype != torch.int64 or hash_seed.numel() != 1 or hash_seed.device.type != "cpu":
            raise ValueError(
                "hash_seed must be an int or an int64 tensor of one element on the CPU, got "
                f"{hash_seed.dtype} {list(hash_seed.shape)} on {hash_seed.device}"
            )
        return hash_seed
    if isinstance(hash_seed, bool) or not isinstance(hash_seed, (int, torch.SymInt)):
        raise TypeError(f"hash_seed must be an int, got {hash_seed!r}")
    check.check_int("hash_seed", hash_seed, -(2**63), 2**63 - 1)
    return torch.tensor([hash_seed], dtype=torch.int64, device=_CPU)
