"""The ops in plain PyTorch, written for reading: the oracle, and the backend of last resort. Any device and dtype.

Notation of the shape comments: N chunks of at most C queries, each with a window of W keys; the R rounds of L sorted
tokens form one ring of R * L slots. A slot of -1 is padding of the arrays and stands for nothing.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .._calls import AttentionCall, Call, HashCall, OrderCall, compute_dtype, out_of_range
from .._checks import check_bounds
from ._sentinels import has_sentinels
from .philox import drop_threshold, keep_factor, philox
from .reference_lists import (
    MASKED,
    dense_weights,
    finite,
    like,
    list_attention,
    list_attention_backward,
    per_key_head,
    per_query_head,
    select_keys,
    without_padding,
)

__all__ = [  # a backend, what only it has, and what ``testing`` is made of
    "add_rows_at", "attend", "bucket_order", "chunk_attention", "chunk_attention_backward", "dense_weights", "describe",
    "hash_buckets", "list_attention", "list_attention_backward", "not_supported_reasons", "of_query", "order_of",
    "parts_of", "per_query_sum", "rows_at", "score", "select_keys", "tensors", "unit_key",
]  # fmt: skip


def not_supported_reasons(call: Call) -> list[str]:
    return []


def describe(call: Call) -> str:
    return ""


# ---- hashing and sorting


def hash_buckets(call: HashCall) -> Tensor:
    """int32 [B, H, R, L]: per factor ``argmax([x @ rot, -x @ rot])``, the factors combined as digits."""
    rotations, factors = call.resolve()
    dtype = compute_dtype(call.x)
    x, rotations = call.x.to(dtype), rotations.to(dtype)
    bucket: Tensor | int = 0
    radix, start = 1, 0
    for factor in factors:
        rotation = rotations[..., start : start + factor // 2]  # [B|1, H|1, D, R, f/2]
        projected = torch.einsum("bhld,bhdrf->bhrlf", x, rotation.expand(x.shape[0], x.shape[1], -1, -1, -1))
        bucket = bucket + radix * torch.cat([projected, -projected], dim=-1).argmax(dim=-1)
        radix, start = radix * factor, start + factor // 2
    assert isinstance(bucket, Tensor)
    if call.key_padding_mask is not None:
        bucket = bucket.masked_fill(call.key_padding_mask[:, None, None, :], radix)
    return bucket.to(torch.int32)


def bucket_order(call: OrderCall) -> Tensor:
    """int32 [B, H, R, L]: positions sorted by (bucket, position).

    Packed sequences are sorted one by one; the slots of a sequence (all its rounds) are contiguous in the flattened
    result, and its positions count from its start.
    """
    if call.buckets.numel() and (call.buckets.min() < 0 or call.buckets.max() >= call.n_buckets):
        raise out_of_range(call)
    if call.cu_seqlens is None:
        return torch.sort(call.buckets, dim=-1, stable=True).indices.to(torch.int32)
    order = torch.empty_like(call.buckets)
    for batch, sequences in _sequences(call.cu_seqlens, len(order), order.shape[3]):
        parts = [
            torch.sort(call.buckets[batch, ..., start:end], dim=-1, stable=True).indices.flatten(2)
            for start, end in sequences
        ]
        order[batch] = torch.cat(parts, dim=-1).view(order[batch].shape).to(torch.int32)
    return order


def _sequences(cu_seqlens: Tensor, batch: int, length: int) -> list[tuple[slice, list[tuple[int, int]]]]:
    """Where the sequences of these batch rows begin and end."""
    if cu_seqlens.dim() == 1:
        check_bounds(cu_seqlens, length)
        return [(slice(0, batch), list(pairwise(cu_seqlens.tolist())))]
    return [(slice(b, b + 1), list(pairwise(bounds))) for b, bounds in enumerate(cu_seqlens.tolist())]


# ---- windows


class _Windows(NamedTuple):
    query_slots: Tensor  # [B|1, H|1, N, C]
    key_slots: Tensor  # [B|1, H|1, N, W]
    window_slots: Tensor  # [B|1, H|1, N, W] place of each key among the keys of its window, in the order of positions


def _ring_chunks(rounds: int, length: int, chunk_length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Slots [1, 1, N, C] of the chunks of every round, the last one maybe partial, and their segment."""
    within = torch.arange(-(-length // chunk_length) * chunk_length, device=device).view(-1, chunk_length)
    starts = length * torch.arange(rounds, device=device).view(-1, 1, 1)
    slots = torch.where(within < length, within + starts, -1).flatten(0, 1)
    return slots[None, None], torch.zeros_like(slots[None, None, :, 0])


def _bucket_chunks(sorted_buckets: Tensor, chunk_length: int) -> tuple[Tensor, Tensor]:
    """The same [B, H, N, C] for chunks that start anew in every bucket; a segment is a bucket of a round."""
    batch, heads, rounds, length = sorted_buckets.shape
    size = rounds * length
    slot = torch.arange(size, device=sorted_buckets.device)
    flat = sorted_buckets.reshape(batch, heads, size)
    new_segment = (flat != flat.roll(1, dims=-1)) | (slot % length == 0)
    segment = new_segment.cumsum(-1) - 1
    in_segment = slot - torch.where(new_segment, slot, -1).cummax(-1).values
    chunk = (in_segment % chunk_length == 0).cumsum(-1) - 1
    count = int(chunk.max()) + 1 if chunk.numel() else 0
    slots = slot.new_full((batch, heads, count * chunk_length), -1)
    slots = slots.scatter(-1, chunk * chunk_length + in_segment % chunk_length, slot.expand_as(chunk))
    segments = slot.new_full((batch, heads, count), -1).scatter(-1, chunk, segment)
    return slots.view(batch, heads, count, chunk_length), segments


def _windows(call: AttentionCall, order: Tensor) -> _Windows:
    rounds, length = order.shape[2:]
    ring, single = call.is_ring, call.is_single_window(length)
    before, after = (0, 0) if single else (call.chunks_before, call.chunks_after)
    if ring:
        slots, segments = _ring_chunks(1 if single else rounds, length, call.chunk_length, order.device)
    else:
        assert call.buckets is not None
        slots, segments = _bucket_chunks(call.buckets.long().gather(-1, order), call.chunk_length)
    count = slots.shape[2]
    parts = []
    for offset in range(-before, after + 1):
        index = torch.arange(count, device=order.device) + offset
        inside = (index >= 0) & (index < count) | ring
        index = index % count
        seen = inside & (segments[..., index] == segments)
        parts.append(torch.where(seen[..., None], slots[..., index, :], -1))
    places = list((torch.cat(parts, dim=-1).ge(0).cumsum(-1) - 1).split(slots.shape[3], dim=-1))
    if call.rules.window_order == "self_first":
        for of_chunks in (parts, places):
            of_chunks.insert(0, of_chunks.pop(before))
    return _Windows(slots, torch.cat(parts, dim=-1), torch.cat(places, dim=-1))


# ---- attention over the windows of one sequence


class Scores(NamedTuple):
    query_position: Tensor  # [B, H, N, C], also the slots below clamped to valid indices
    key_position: Tensor  # [B, H, N, W]
    query_slot: Tensor  # [B, H, N, C]
    scores: Tensor  # [B, H, N, C, W]
    included: Tensor  # bool [B, H, N, C, W]: takes part in the softmax
    live: Tensor  # bool: the score depends on query and key (it is no sentinel)
    dropout: Tensor | None  # factor 0 or 1 / (1 - p)
    self_only: Tensor  # bool [B, H, L]


def unit_key(query: Tensor, norm: str) -> Tensor:
    key: Tensor
    if norm == "l2":
        key = query / query.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    else:
        key = query * torch.rsqrt((query * query).mean(dim=-1, keepdim=True) + 1e-6) / query.shape[-1] ** 0.5
    return key


def _unit_key_backward(query: Tensor, norm: str, grad_key: Tensor) -> Tensor:
    if norm == "l2":
        length = query.norm(dim=-1, keepdim=True)
        a = 1 / length.clamp(min=1e-12)
        along = (length > 1e-12) * a**3
    else:
        a = torch.rsqrt((query * query).sum(dim=-1, keepdim=True) + 1e-6 * query.shape[-1])
        along = a**3
    grad_query: Tensor = a * grad_key - along * query * (grad_key * query).sum(dim=-1, keepdim=True)
    return grad_query


def rows_at(x: Tensor, position: Tensor) -> Tensor:
    """x [B, H, L, D] at position [B, H, N, K] -> [B, H, N, K, D]."""
    batch, heads, _, width = x.shape
    index = position.reshape(batch, heads, -1, 1).expand(-1, -1, -1, width)
    return x.gather(2, index).view(*position.shape, width)


def add_rows_at(target: Tensor, position: Tensor, valid: Tensor, rows: Tensor) -> None:
    """target [B, H, L, D] += rows [B, H, N, K, D] at position [B, H, N, K] where valid."""
    batch, heads, _, width = target.shape
    index = position.reshape(batch, heads, -1, 1).expand(-1, -1, -1, width)
    target.scatter_add_(2, index, (rows * valid[..., None]).reshape(batch, heads, -1, width))


def _any_per_query(call: AttentionCall, position: Tensor, flags: Tensor) -> Tensor:
    """bool [B, H, L]: whether any of the flags [B, H, N, C] of a query is set, over all rounds."""
    batch, heads, length = call.query.shape[:3]
    counts = torch.zeros(batch, heads, length, dtype=torch.int64, device=flags.device)
    return counts.scatter_add(2, position.flatten(2), flags.flatten(2).long()) > 0


def score(call: AttentionCall, order: Tensor, query: Tensor, key: Tensor, number: Tensor) -> Scores:
    """Scores of every (query, key) pair of every window, and what the rules say of it."""
    rules, shared = call.rules, call.key is None
    batch, heads, length = call.query.shape[:3]
    rounds = order.shape[2]
    windows = _windows(call, order)
    expand = lambda x: x.expand(batch, heads, -1, -1)  # noqa: E731
    query_slots, key_slots, window_slots = map(expand, windows)
    flat_order = order.reshape(batch, heads, -1)
    q_slot, k_slot = query_slots.clamp(min=0), key_slots.clamp(min=0)
    q_pos = flat_order.gather(2, q_slot.flatten(2)).view(q_slot.shape)
    k_pos = flat_order.gather(2, k_slot.flatten(2)).view(k_slot.shape)
    q_pair, k_pair = q_pos[..., :, None], k_pos[..., None, :]

    scores = call.scale * (rows_at(query, q_pos) @ rows_at(key, k_pos).mT)  # [B, H, N, C, W]
    exists = (query_slots >= 0)[..., :, None] & (key_slots >= 0)[..., None, :]
    exists = exists & (q_pair < call.n_queries)
    allowed = exists
    if call.causal:
        allowed = allowed & ((k_pair <= q_pair) | (k_pair >= call.n_queries))
    if call.key_padding_mask is not None:
        padded = call.key_padding_mask[:, None, :].expand(batch, heads, length)
        allowed = allowed & ~padded.gather(2, k_pos.flatten(2)).view(k_pos.shape)[..., None, :]
        if rules.mask_padded_queries:
            allowed = allowed & ~padded.gather(2, q_pos.flatten(2)).view(q_pos.shape)[..., :, None]
    if call.attn_mask is not None:
        mask = call.attn_mask.expand(batch, heads, -1, -1)
        pair = (q_pair.clamp(max=call.n_queries - 1) * length + k_pair).flatten(2)
        mask = mask.reshape(batch, heads, -1).gather(2, pair).view(scores.shape)
        if mask.dtype == torch.bool:
            allowed = allowed & ~mask
        else:
            mask = mask.to(scores.dtype)
            allowed = allowed & ~(mask <= MASKED)  # NaN is not masked
            scores = scores + mask.clamp(min=MASKED)
    same_bucket = torch.ones_like(exists)
    if call.masks_other_buckets and not call.is_single_window(length):
        assert call.buckets is not None
        bucket = call.buckets.reshape(batch, heads, -1)

        def bucket_of(slot: Tensor, position: Tensor) -> Tensor:
            index = slot // length * length + position
            value = bucket.gather(2, index.flatten(2)).view(slot.shape)
            return value * rounds + slot // length  # the buckets of another round are other buckets

        same_bucket = bucket_of(q_slot, q_pos)[..., :, None] == bucket_of(k_slot, k_pos)[..., None, :]

    own = q_pair == k_pair if shared else torch.zeros_like(exists)
    live, included = exists, exists
    self_only = torch.zeros(batch, heads, length, dtype=torch.bool, device=scores.device)
    if has_sentinels(call):
        mask_value = -torch.finfo(scores.dtype).max if rules.mask_value is None else rules.mask_value
        scores = torch.where(allowed, scores, mask_value)
        scores = torch.where(own, rules.own_value, scores)
        scores = torch.where(same_bucket, scores, mask_value)
        live = allowed & ~own & same_bucket
        self_only = ~_any_per_query(call, q_pos, live.any(-1))
    else:
        allowed = allowed & same_bucket
        has_other = _any_per_query(call, q_pos, (allowed & ~own).any(-1))
        self_only = _any_per_query(call, q_pos, (allowed & own).any(-1)) & ~has_other
        lone = self_only.gather(2, q_pos.flatten(2)).view(q_pos.shape)[..., :, None]
        live = included = allowed & (~own | lone)
    if call.counts_meetings and not call.is_single_window(length):
        met = torch.zeros(batch, heads, length * length, dtype=scores.dtype, device=scores.device)
        pair = (q_pair * length + k_pair).flatten(2)
        met = met.scatter_add(2, pair, (exists & same_bucket).flatten(2).to(scores.dtype))
        scores = scores - met.gather(2, pair).view(scores.shape).clamp(min=1).log()
    scores = scores.masked_fill(~included, float("-inf"))

    dropout = None
    if call.dropout_p > 0:
        assert call.dropout_seed is not None
        group, word = window_slots.clamp(min=0)[..., None, :] // 4, window_slots.clamp(min=0)[..., None, :] % 4
        slot = q_slot[..., :, None]
        words = philox(
            call.dropout_seed.to(scores.device), group, slot % length, slot // length, number[..., None, None, None]
        )
        words = words.gather(-1, word.expand(scores.shape)[..., None])[..., 0]
        kept = words >= drop_threshold(call.dropout_p)
        dropout = kept.to(scores.dtype) * keep_factor(call.dropout_p)
    return Scores(q_pos, k_pos, q_slot, scores, included, live, dropout, self_only)


def per_query_sum(call: AttentionCall, s: Scores, rows: Tensor) -> Tensor:
    """Sums rows [B, H, N, C, K] of the same query over the rounds: [B, H, L, K]."""
    batch, heads, length = call.query.shape[:3]
    total = torch.zeros(batch, heads, length, rows.shape[-1], dtype=rows.dtype, device=rows.device)
    index = s.query_position.flatten(2)[..., None].expand(-1, -1, -1, rows.shape[-1])
    return total.scatter_add(2, index, rows.flatten(2, 3))


def _per_query_max(call: AttentionCall, s: Scores, values: Tensor) -> Tensor:
    """The maximum of values [B, H, N, C] of the same query over the rounds: [B, H, L]."""
    batch, heads, length = call.query.shape[:3]
    least = torch.full((batch, heads, length), float("-inf"), dtype=values.dtype, device=values.device)
    return least.scatter_reduce(2, s.query_position.flatten(2), values.flatten(2), "amax")


def of_query(s: Scores, x: Tensor) -> Tensor:
    """x [B, H, L] at the queries of every window: [B, H, N, C, 1]."""
    return x.gather(2, s.query_position.flatten(2)).view(s.query_position.shape)[..., None]


def attend(call: AttentionCall, s: Scores, value: Tensor) -> tuple[Tensor, Tensor]:
    """out [B, H, L, E] and lse [B, H, L]; zero and -inf where a query sees no key."""
    value_rows = rows_at(value, s.key_position)
    drop = 1.0 if s.dropout is None else s.dropout
    if call.rules.combine_rounds == "exp_lse":
        probability, round_lse = _round_softmax(s)
        lse = _log_add(call, s, round_lse)
        weight = torch.exp(round_lse - finite(of_query(s, lse)))
        return per_query_sum(call, s, (probability * drop) @ value_rows * weight), lse
    # The softmax over the rounds' logsumexp of each round's softmax is one softmax over all (round, key) pairs.
    maximum = _per_query_max(call, s, s.scores.detach().amax(dim=-1))
    weight = torch.exp(s.scores - finite(of_query(s, maximum)))
    weight_sum = per_query_sum(call, s, weight.sum(dim=-1, keepdim=True))[..., 0]
    out = per_query_sum(call, s, (weight * drop) @ value_rows)
    some = weight_sum > 0
    total = torch.where(some, weight_sum, 1.0)
    lse = torch.where(some, finite(maximum) + total.log(), float("-inf"))
    # 0 also where a value that nobody sees is not finite.
    return (out / total[..., None]).masked_fill((weight_sum == 0)[..., None], 0.0), lse


def _round_softmax(s: Scores) -> tuple[Tensor, Tensor]:
    """Probabilities [B, H, N, C, W] within each round and their lse [.., 1]; 0 and -inf for rows that see nothing."""
    some = s.included.any(dim=-1, keepdim=True)
    scores = torch.where(some, s.scores, 0.0)
    lse = torch.logsumexp(scores, dim=-1, keepdim=True)
    return torch.where(some, torch.exp(scores - lse), 0.0), torch.where(some, lse, float("-inf"))


def _log_add(call: AttentionCall, s: Scores, round_lse: Tensor) -> Tensor:
    maximum = finite(_per_query_max(call, s, round_lse.detach()[..., 0]))
    total = per_query_sum(call, s, torch.exp(round_lse - of_query(s, maximum)))[..., 0]
    return torch.where(total > 0, maximum + torch.where(total > 0, total, 1.0).log(), float("-inf"))


def tensors(call: AttentionCall, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, these for every query head."""
    query, heads = call.query.to(dtype), call.query.shape[1]
    key = unit_key(query, call.rules.key_norm) if call.key is None else per_query_head(call.key.to(dtype), heads)
    value = per_query_head(call.value.to(dtype), heads)
    if has_sentinels(call):  # padding has a weight, however small
        return query, key, value
    return query, without_padding(key, call.key_padding_mask), without_padding(value, call.key_padding_mask)


def _one_sequence(call: AttentionCall, order: Tensor, number: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(call.query)
    query, key, value = tensors(call, dtype)
    s = score(call, order, query, key, number)
    out, lse = attend(call, s, value)
    n = call.n_queries
    return out[:, :, :n].to(call.value.dtype), lse[:, :, :n], s.self_only[:, :, :n]


def _one_sequence_backward(
    call: AttentionCall, order: Tensor, number: Tensor, grad_out: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """P = exp(s - lse), dV = (P drop)^T dO, dS = P (drop dO V^T - rowsum(dO O)): no state of a round is needed."""
    dtype = compute_dtype(call.query)
    query, key, value = tensors(call, dtype)
    s = score(call, order, query, key, number)
    rest = call.query.shape[2] - call.n_queries
    grad_out, out = (torch.nn.functional.pad(x.to(dtype), (0, 0, 0, rest)) for x in (grad_out, out))
    lse = torch.nn.functional.pad(lse.to(dtype), (0, rest))
    if call.rules.combine_rounds == "exp_lse":  # in two steps, as exp(s - lse) is inexact next to sentinels
        probability, round_lse = _round_softmax(s)
        weight = probability * torch.exp(round_lse - finite(of_query(s, lse)))
    else:
        weight = torch.exp(s.scores - finite(of_query(s, lse)))
    drop = 1.0 if s.dropout is None else s.dropout
    grad_rows, query_rows = rows_at(grad_out, s.query_position), rows_at(query, s.query_position)
    delta = of_query(s, (grad_out * out).sum(-1))
    grad_weight = drop * (grad_rows @ rows_at(value, s.key_position).mT)
    grad_scores = torch.where(s.live, weight * (grad_weight - delta) * call.scale, 0.0)
    everywhere = torch.ones_like(s.query_position), torch.ones_like(s.key_position)
    grad_query, grad_key, grad_value = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    add_rows_at(grad_query, s.query_position, everywhere[0], grad_scores @ rows_at(key, s.key_position))
    add_rows_at(grad_key, s.key_position, everywhere[1], grad_scores.mT @ query_rows)
    add_rows_at(grad_value, s.key_position, everywhere[1], (weight * drop).mT @ grad_rows)
    if call.key is None:
        grad_query = grad_query + _unit_key_backward(query, call.rules.key_norm, grad_key)
        grad_key = grad_key.new_empty(0)
    else:
        grad_key, grad_value = per_key_head(grad_key, call.key), per_key_head(grad_value, call.value)
    dtype = call.query.dtype
    return grad_query.to(dtype), grad_key.to(dtype), grad_value.to(dtype)


# ---- the ops: one sequence, or those of each batch row after each other


class Part(NamedTuple):
    """A sequence of some batch rows."""

    call: AttentionCall  # restricted to it
    order: Tensor  # int64 [B, H, R, L] of its slots
    number: Tensor  # int64 [B, H] among the sequences of all heads, for dropout
    rows: slice

    @property
    def empty(self) -> bool:
        return 0 in (*self.call.query.shape[:3], self.call.n_queries)


def order_of(call: AttentionCall) -> Tensor:
    if call.order is not None:
        return call.order.long()
    batch, heads, length = call.query.shape[:3]
    return torch.arange(length, device=call.query.device).expand(batch, heads, 1, length)


def parts_of(call: AttentionCall) -> list[tuple[slice, list[Part]]]:
    """Batch rows, and their sequences."""
    order, (batch, heads) = order_of(call), call.query.shape[:2]
    numbers = torch.arange(batch * heads, device=call.query.device).view(batch, heads)
    if call.cu_seqlens is None or batch == 0:
        return [(slice(None), [Part(call, order, numbers, slice(None))])]
    rounds, split = order.shape[2], []
    for of, sequences in _sequences(call.cu_seqlens, batch, call.query.shape[2]):
        parts = []
        for number, (start, end) in enumerate(sequences):
            rows = slice(start, end)
            mask = call.attn_mask
            part = call._replace(
                query=call.query[of, :, rows],
                key=None if call.key is None else call.key[of, :, rows],
                value=call.value[of, :, rows],
                buckets=None if call.buckets is None else call.buckets[of, ..., rows],
                key_padding_mask=None if call.key_padding_mask is None else call.key_padding_mask[of, rows],
                attn_mask=None if mask is None else (mask if len(mask) == 1 else mask[of])[:, :, rows, rows],
                num_queries=max(0, min(call.n_queries, end) - start),
            )
            # Positions in identity order count over all sequences.
            slots = order[of, ..., rows] - start
            if call.order is not None:
                slots = order[of].flatten(2)[..., rounds * start : rounds * end]
            slots = slots.reshape(*part.query.shape[:2], rounds, end - start)
            parts.append(Part(part, slots, number * batch * heads + numbers[of], rows))
        split.append((of, parts))
    return split


def _nothing(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """The results of a call without a query or a key."""
    rows = (*call.query.shape[:2], call.n_queries)
    lse = call.query.new_zeros(rows, dtype=compute_dtype(call.query))
    return call.value.new_zeros((*rows, call.value.shape[3])), lse, lse > 0


def _no_gradients(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    key = call.query.new_empty(0) if call.key is None else torch.zeros_like(call.key)
    return torch.zeros_like(call.query), key, torch.zeros_like(call.value)


def _joined(results: list[list[tuple[Tensor, ...]]]) -> list[Tensor]:
    """Results of the sequences of batch rows, of all rows."""
    rows = [[torch.cat(x, dim=2) if x[0].dim() > 1 else x[0] for x in zip(*row, strict=True)] for row in results]
    return [torch.cat(x) for x in zip(*rows, strict=True)]


def chunk_attention(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """See ``functional.lsh_attention``. Differentiable by autograd when called directly."""
    out, lse, self_only = _joined(
        [
            [_nothing(x.call) if x.empty else _one_sequence(x.call, x.order, x.number) for x in parts]
            for _, parts in parts_of(call)
        ]
    )
    return like(call.query, out), lse, self_only


def chunk_attention_backward(
    call: AttentionCall, grad_out: Tensor, out: Tensor, lse: Tensor, self_only: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key (empty when shared) and value, from the residuals alone."""

    def of_part(batch: slice, x: Part) -> tuple[Tensor, Tensor, Tensor]:
        residuals = (y[batch, :, x.rows] for y in (grad_out, out, lse))
        return _no_gradients(x.call) if x.empty else _one_sequence_backward(x.call, x.order, x.number, *residuals)

    grads = _joined([[of_part(batch, x) for x in parts] for batch, parts in parts_of(call)])
    query, value = like(call.query, grads[0]), like(call.value, grads[2])
    return query, call.query.new_empty(0) if call.key is None else like(call.key, grads[1]), value
