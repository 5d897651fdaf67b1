"""What the kernels of attention know of sequences and windows.

The sorted slots of all rounds of a sequence form a ring. A slot number is "wrapped" if it is in [0, length of the
ring), and "unrolled" if it may be beyond either end. In unrolled slots a query sees one range: its chunk and those
around it. With lists of keys the entries of all lists are numbered like slots, and a query sees those of one list.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

MASKED_KEY = tl.constexpr(2147483647)  # as the position of a key: no query sees it
CONTEXT_KEY = tl.constexpr(-1)  # as the position of a key: every query sees it
NO_KEYS = tl.constexpr(-2147483648)  # as the limit of a query: it sees nothing
OFF = tl.constexpr(False)


class Problem(NamedTuple):
    """What all kernels of attention take first."""

    order: Tensor | None  # int32 [B, H, R * L]; None: positions in their own order
    padding: Tensor | None  # bool [B, S]
    cu_seqlens: Tensor | None  # int32 [sequences + 1], or of each batch row [B, sequences + 1]
    slot_of_position: Tensor | None  # int32 [B, H, R, L], slots in a round, if the score_mod needs them
    bucket_begin: Tensor | None  # int32 [B, H, R * L], of each slot the slots of its bucket, if windows need them
    bucket_end: Tensor | None
    lists: Tensor | None  # int32 [B, H, rows, list_length], instead of windows
    excluded_begin: Tensor | None  # int32 [B, H, chunks], keys of first lists, which the second round leaves out
    excluded_end: Tensor | None
    dropout_seed: Tensor | None  # int64 [1]; None: no dropout
    sequences: int
    bounds_stride: int  # of cu_seqlens, between batch rows
    batch: int
    heads: int
    group: int  # query heads that share a key head
    length: int
    keys: int
    rounds: int
    n_queries: int
    chunk_length: int
    before: int
    after: int
    list_length: int
    context_keys: int  # the last keys, which every query sees
    drop_threshold: int
    keep_factor: float
    scale: float
    causal: bool
    l2: bool
    mask_padded_queries: bool
    shared_qk: Any  # constexpr, as the rest is
    bucket_aligned: Any = OFF
    within_bucket: Any = OFF
    dedup: Any = OFF


class HeadSequence(NamedTuple):
    """One sequence of one head."""

    b: Any
    h: Any
    key_head: Any
    offset: Any  # of its first row in the batch row
    length: Any
    n_queries: Any  # its first rows are queries; it has none if this is negative
    first_context_key: Any  # position from which on every query sees a key
    single: Any  # it is one window: see is_single_window
    rounds: Any
    before: Any
    after: Any
    dropout_index: Any  # part of the counter of random words
    first_query: Any  # index of its first query in [B, H, n_queries]
    first_slot: Any  # index of its first slot in [B, H, R * L]


class Range(NamedTuple):
    begin: Any
    end: Any


class Queries(NamedTuple):
    """Facts about the queries of a tile."""

    position: Any  # 0 if there is none
    valid: Any
    slot: Any  # wrapped
    limit: Any  # keys at this position and later are masked
    excluded: Any  # range of key positions that are masked
    seen: Any  # range of unrolled slots that are not masked


class Keys(NamedTuple):
    """Facts about the keys of a tile."""

    position: Any  # 0 if there is none
    valid: Any
    slot: Any  # unrolled
    key_position: Any  # position, MASKED_KEY or CONTEXT_KEY


def row_stride(bounds: Tensor | None) -> int:
    """Elements between the bounds of batch rows."""
    return 0 if bounds is None or bounds.dim() == 1 else bounds.shape[1]


@triton.jit
def floor_div(a, b):
    quotient = a // b
    return tl.where(a % b < 0, quotient - 1, quotient)


@triton.jit
def floor_mod(a, b):
    rest = a % b
    return tl.where(rest < 0, rest + b, rest)


@triton.jit
def is_single_window(p, length):
    """As in csrc/kernels/params.h."""
    single = 0
    if p.lists is None and not p.bucket_aligned:
        single = (length <= p.chunk_length).to(tl.int32)
    return single


@triton.jit
def has_score_mod(p, s):
    """Whether rules add to the score of a pair, as in csrc/kernels/params.h."""
    if p.within_bucket or p.dedup:
        return s.single == 0
    else:
        return False


@triton.jit
def take_head(p, b, h, sequence, offset, length, single):
    ring_rounds = tl.where(single != 0, 1, p.rounds)
    index = (sequence * p.batch + b) * p.heads + h
    head = (b * p.heads + h).to(tl.int64)
    first_context_key = p.keys - p.context_keys if p.lists is not None else p.n_queries - offset
    return HeadSequence(
        b, h, h // p.group, offset, length, p.n_queries - offset, first_context_key, single, ring_rounds,
        tl.where(single != 0, 0, p.before), tl.where(single != 0, 0, p.after), index, head * p.n_queries + offset,
        (head * p.length + offset) * p.rounds,
    )  # fmt: skip


@triton.jit
def take_sequence(p, number, HEADS_SHARE: tl.constexpr):
    """Sequence ``number`` of those of all heads; if HEADS_SHARE of all key heads, and then of its first query head."""
    sequence, head = number % p.sequences, number // p.sequences
    group = p.group if HEADS_SHARE else 1
    heads = p.heads // group
    b, offset, length = head // heads, 0, p.length
    if p.cu_seqlens is not None:
        bounds = p.cu_seqlens + b.to(tl.int64) * p.bounds_stride + sequence
        offset = tl.load(bounds)
        length = tl.load(bounds + 1) - offset
    return take_head(p, b, head % heads * group, sequence, offset, length, is_single_window(p, length))


@triton.jit
def with_head(p, s, h):
    """The same sequence of another head."""
    return take_head(p, s.b, h, s.dropout_index // (p.batch * p.heads), s.offset, s.length, s.single)


@triton.jit
def wrapped(s, slot):
    return floor_mod(slot, s.rounds * s.length)


@triton.jit
def position_of(p, s, slot, mask):
    """The row in the sequence of a wrapped slot."""
    if p.order is None:
        return tl.where(mask, slot, 0)
    else:
        return tl.load(p.order + s.first_slot + slot, mask=mask, other=0)


@triton.jit
def bucket_of(p, s, slot, mask):
    """The slots of the bucket of a wrapped slot."""
    first = tl.load(p.bucket_begin + s.first_slot + slot, mask=mask, other=0)
    return Range(first, tl.load(p.bucket_end + s.first_slot + slot, mask=mask, other=0))


@triton.jit
def around(p, s, slot, mask, before, after):
    """The slots of the chunk of `slot`, unrolled, and of those before and after it."""
    if p.bucket_aligned:  # chunks start anew in a bucket, which windows do not leave
        at = wrapped(s, slot)
        bucket = bucket_of(p, s, at, mask)
        begin = at - (at - bucket.begin) % p.chunk_length
        first = tl.maximum(bucket.begin, begin - before * p.chunk_length)
        return Range(first, tl.minimum(bucket.end, begin + (after + 1) * p.chunk_length))
    else:
        chunks = tl.cdiv(s.length, p.chunk_length)
        r = floor_div(slot, s.length)
        chunk = r * chunks + (slot - r * s.length) // p.chunk_length
        return Range(chunk_begin(p, s, chunk - before, chunks), chunk_begin(p, s, chunk + after + 1, chunks))


@triton.jit
def chunk_begin(p, s, chunk, chunks):
    r = floor_div(chunk, chunks)
    return r * s.length + (chunk - r * chunks) * p.chunk_length


@triton.jit
def keys_of(p, s, slot, mask):
    """The slots of the keys that the query at a slot sees."""
    if p.lists is None:
        return around(p, s, slot, mask, s.before, s.after)
    else:
        r = slot // s.length
        row = r * tl.cdiv(s.length, p.chunk_length) + (slot - r * s.length) // p.chunk_length
        return Range(row * p.list_length, (row + 1) * p.list_length)


@triton.jit
def queries_of(p, s, slot, mask):
    """The slots of the queries that see the key at a slot."""
    if p.lists is None:
        return around(p, s, slot, mask, s.after, s.before)
    else:
        row, chunks = slot // p.list_length, tl.cdiv(s.length, p.chunk_length)
        return Range(chunk_begin(p, s, row, chunks), chunk_begin(p, s, row + 1, chunks))


@triton.jit
def keys_of_tile(p, s, r, first, BLOCK_M: tl.constexpr):
    """The slots of the keys that a tile of queries sees, which begins at `first` in a round."""
    begin, last = r * s.length + first, r * s.length + tl.minimum(first + BLOCK_M, s.length) - 1
    return Range(keys_of(p, s, begin, True).begin, keys_of(p, s, last, True).end)


@triton.jit
def key_slots(p, s, r):
    """The slots of all keys of a round, or the entries of all lists."""
    if p.lists is None:
        return Range(r * s.length, (r + 1) * s.length)
    else:
        return Range(0, list_rows(p, s) * p.list_length)


@triton.jit
def list_rows(p, s):
    return s.rounds * tl.cdiv(s.length, p.chunk_length)


@triton.jit
def queries_of_tile(p, s, first, end):
    """The slots of the queries that see a tile of keys."""
    return Range(queries_of(p, s, first, True).begin, queries_of(p, s, end - 1, True).end)


@triton.jit
def is_padded(p, s, position, mask):
    if p.padding is None:
        return mask & ~mask
    else:
        return tl.load(p.padding + s.b.to(tl.int64) * p.keys + s.offset + position, mask=mask, other=0) != 0


@triton.jit
def take_queries(p, s, slot, mask):
    """The queries at unrolled slots. A shared row does not see itself, unless it is ``self_only``."""
    at = wrapped(s, slot)
    if p.bucket_aligned or p.lists is not None:
        mask &= at == slot
    position = position_of(p, s, at, mask)
    valid = mask & (position < s.n_queries)
    position = tl.where(valid, position, 0)
    blind = ~valid
    if p.mask_padded_queries:
        blind |= is_padded(p, s, position, valid)
    limit = tl.where(blind, NO_KEYS, tl.where(p.causal, position + 1, MASKED_KEY))
    excluded = Range(position, tl.where(p.shared_qk, position + 1, position))
    if p.excluded_begin is not None:
        later = valid & (at >= s.length)
        chunk = (s.b * p.heads + s.h).to(tl.int64) * tl.cdiv(s.length, p.chunk_length) + position // p.chunk_length
        first = tl.load(p.excluded_begin + chunk, mask=later, other=0)
        excluded = Range(first, tl.load(p.excluded_end + chunk, mask=later, other=0))
    seen = keys_of(p, s, slot, mask)
    return Queries(position, valid, at, limit, excluded, Range(seen.begin, tl.where(mask, seen.end, seen.begin)))


@triton.jit
def take_keys(p, s, slot, end):
    """The keys at unrolled slots, or at entries of lists. Those from `end` on are masked."""
    mask = slot < end
    if p.lists is None:
        position = position_of(p, s, wrapped(s, slot), mask)
    else:
        lists = p.lists + (s.b * p.heads + s.h).to(tl.int64) * list_rows(p, s) * p.list_length
        position = tl.load(lists + slot, mask=mask, other=-1)
        mask &= position >= 0
        position = tl.maximum(position, 0)
    masked = ~mask | is_padded(p, s, position, mask)
    key_position = tl.where(position >= s.first_context_key, CONTEXT_KEY, position)
    return Keys(position, mask, slot, tl.where(masked, MASKED_KEY, key_position))


@triton.jit
def times_met(p, s, query, key):
    """How often queries meet keys in all rounds. query, key: positions, which broadcast."""
    times = query * 0 + key * 0
    slot_of_position = p.slot_of_position + (s.b * p.heads + s.h).to(tl.int64) * p.rounds * p.length + s.offset
    for r in range(s.rounds):
        slot = r * s.length + tl.load(slot_of_position + r * p.length + query)
        seen = keys_of(p, s, slot, slot >= 0)
        if p.within_bucket:
            bucket = bucket_of(p, s, slot, slot >= 0)
        # Each unrolled round that a window touches has the key once.
        first, end = tl.min(floor_div(seen.begin, s.length)), tl.max(floor_div(seen.end - 1, s.length)) + 1
        for unrolled in range(first, end):
            key_round = floor_mod(unrolled, s.rounds)
            in_round = tl.load(slot_of_position + key_round * p.length + key)
            at = unrolled * s.length + in_round
            met = (at >= seen.begin) & (at < seen.end)
            if p.within_bucket:
                at = key_round * s.length + in_round
                met &= (at >= bucket.begin) & (at < bucket.end)
            times += met.to(tl.int32)
    return times


@triton.jit
def same_bucket(p, s, query_slot, key_slot):
    """Whether a wrapped and an unrolled slot have the same bucket."""
    bucket = bucket_of(p, s, query_slot, query_slot >= 0)
    at = wrapped(s, key_slot)
    return (at >= bucket.begin) & (at < bucket.end)


@triton.jit
def is_kept(p, s, slot, at):
    """Whether dropout keeps pairs of the query at a wrapped slot and the key at an index in its window."""
    r, zero = slot // s.length, at * 0
    in_round = zero + (slot - r * s.length)
    a, b, c, d = tl.philox(tl.load(p.dropout_seed), at // 4, in_round, zero + r, zero + s.dropout_index)
    word = tl.where(at % 2 == 0, tl.where(at % 4 == 0, a, c), tl.where(at % 4 == 1, b, d))
    return word.to(tl.int64) >= p.drop_threshold
