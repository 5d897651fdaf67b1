"""What the kernels of attention know of sequences and windows.

Sorted slots of all rounds of a sequence form a ring. In "unrolled" numbers, of which the ring's length is a turn, a
query sees a run of slots: its chunk and those before and after, or the places of its chunk's list of keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..._calls import AttentionCall, OrderCall

HIDDEN = tl.constexpr(2147483647)  # the position of a key that nobody may see
EVERYONE = tl.constexpr(-1)  # ... that every query sees
NOBODY = tl.constexpr(-2147483648)  # the limit of a query that sees nothing


class Problem(NamedTuple):
    """What all kernels of attention take first."""

    order: Tensor | None  # int32 [B, H, R * L]; None: positions in their own order
    padding: Tensor | None  # bool [B, S]
    cu_seqlens: Tensor | None  # int32 [sequences + 1], or of each batch row [B, sequences + 1]
    places: Tensor | None  # int32 [B, H, R, L]: the slot of a position in a round, where rules need it
    bucket_first: Tensor | None  # int32 [B, H, R * L]: the slots of the bucket of a slot, where windows need them
    bucket_behind: Tensor | None
    lists: Tensor | None  # int32 [B, H, rows, list_length], instead of windows
    shown_first: Tensor | None  # int32 [B, H, chunks]: of a chunk's first list, the keys that later rounds leave out
    shown_behind: Tensor | None
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
    context: int  # the last keys, which every query sees
    drop_threshold: int
    keep_factor: float
    scale: float
    causal: bool
    l2: bool
    mask_padded_queries: bool
    shared: Any  # constexpr, as the rest is
    bucket_aligned: Any
    within_bucket: Any
    dedup: Any


class Sequence(NamedTuple):
    """A sequence of a head."""

    b: Any
    h: Any
    key_head: Any
    offset: Any  # of its rows
    length: Any
    n_queries: Any  # of its rows, the first ones; none where it is negative
    everyone: Any  # the first of the keys that every query sees
    single: Any  # it is one window, which the rounds would only repeat
    rounds: Any
    before: Any
    after: Any
    index: Any  # among those of all heads, which come before the next ones of all
    row: Any  # of its first query among those of [B, H, n_queries]
    slots: Any  # where its slots are in [B, H, R * L]


class Range(NamedTuple):
    first: Any
    behind: Any


class Queries(NamedTuple):
    """Facts of the queries of a tile."""

    position: Any  # 0 where there is none
    some: Any
    slot: Any  # wrapped
    limit: Any  # it sees keys of positions below,
    excluded: Any  # less those of this range
    seen: Any  # and unrolled slots of this one


class Keys(NamedTuple):
    """Facts of the keys of a tile."""

    position: Any  # 0 where there is none
    some: Any
    slot: Any  # unrolled
    code: Any  # its position, or HIDDEN, or EVERYONE


def bounds_of(call: OrderCall | AttentionCall) -> Tensor | None:
    """cu_seqlens where the tensors are."""
    return None if call.cu_seqlens is None else call.cu_seqlens.to(call.device, non_blocking=True).contiguous()


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
def take_head(p, b, h, sequence, offset, length, single):
    ring_rounds = tl.where(single != 0, 1, p.rounds)
    index = (sequence * p.batch + b) * p.heads + h
    head = (b * p.heads + h).to(tl.int64)
    everyone = p.keys - p.context if p.lists is not None else p.n_queries - offset
    return Sequence(
        b, h, h // p.group, offset, length, p.n_queries - offset, everyone, single, ring_rounds,
        tl.where(single != 0, 0, p.before), tl.where(single != 0, 0, p.after), index, head * p.n_queries + offset,
        (head * p.length + offset) * p.rounds,
    )  # fmt: skip


@triton.jit
def take_sequence(p, number, HEADS_SHARE: tl.constexpr):
    """Sequence ``number`` of those of all heads; of key heads, the first of those that share it, if HEADS_SHARE."""
    sequence, head = number % p.sequences, number // p.sequences
    group = p.group if HEADS_SHARE else 1
    heads = p.heads // group
    b, offset, length = head // heads, 0, p.length
    if p.cu_seqlens is not None:
        bounds = p.cu_seqlens + b.to(tl.int64) * p.bounds_stride + sequence
        offset = tl.load(bounds)
        length = tl.load(bounds + 1) - offset
    single = 0
    if p.lists is None and not p.bucket_aligned:
        single = (length <= p.chunk_length).to(tl.int32)
    return take_head(p, b, head % heads * group, sequence, offset, length, single)


@triton.jit
def with_head(p, s, h):
    """The same sequence of another head."""
    return take_head(p, s.b, h, s.index // (p.batch * p.heads), s.offset, s.length, s.single)


@triton.jit
def wrapped(s, slot):
    return floor_mod(slot, s.rounds * s.length)


@triton.jit
def position_of(p, s, slot, there):
    """The row in the sequence of a wrapped slot."""
    if p.order is None:
        return tl.where(there, slot, 0)
    else:
        return tl.load(p.order + s.slots + slot, mask=there, other=0)


@triton.jit
def bucket_of(p, s, slot, there):
    """The slots of the bucket of a wrapped slot."""
    first = tl.load(p.bucket_first + s.slots + slot, mask=there, other=0)
    return Range(first, tl.load(p.bucket_behind + s.slots + slot, mask=there, other=0))


@triton.jit
def around(p, s, slot, there, before, after):
    """The slots of the chunk of `slot`, unrolled, and of those before and after it."""
    if p.bucket_aligned:  # chunks start anew in a bucket, which windows do not leave
        at = wrapped(s, slot)
        bucket = bucket_of(p, s, at, there)
        begin = at - (at - bucket.first) % p.chunk_length
        first = tl.maximum(bucket.first, begin - before * p.chunk_length)
        return Range(first, tl.minimum(bucket.behind, begin + (after + 1) * p.chunk_length))
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
def keys_of(p, s, slot, there):
    """The slots of keys that the query of a slot sees."""
    if p.lists is None:
        return around(p, s, slot, there, s.before, s.after)
    else:
        r = slot // s.length
        row = r * tl.cdiv(s.length, p.chunk_length) + (slot - r * s.length) // p.chunk_length
        return Range(row * p.list_length, (row + 1) * p.list_length)


@triton.jit
def queries_of(p, s, slot, there):
    """The slots of queries that see the key of a slot."""
    if p.lists is None:
        return around(p, s, slot, there, s.after, s.before)
    else:
        row, chunks = slot // p.list_length, tl.cdiv(s.length, p.chunk_length)
        return Range(chunk_begin(p, s, row, chunks), chunk_begin(p, s, row + 1, chunks))


@triton.jit
def keys_of_tile(p, s, r, first, BLOCK_M: tl.constexpr):
    """The slots of keys that the queries of a tile from `first` on in a round see."""
    begin, last = r * s.length + first, r * s.length + tl.minimum(first + BLOCK_M, s.length) - 1
    return Range(keys_of(p, s, begin, True).first, keys_of(p, s, last, True).behind)


@triton.jit
def key_slots(p, s, r):
    """The slots of all keys of a round, or the places of all lists."""
    if p.lists is None:
        return Range(r * s.length, (r + 1) * s.length)
    else:
        return Range(0, list_rows(p, s) * p.list_length)


@triton.jit
def list_rows(p, s):
    return s.rounds * tl.cdiv(s.length, p.chunk_length)


@triton.jit
def queries_of_tile(p, s, first, behind):
    """The slots of queries that see the keys of a tile."""
    return Range(queries_of(p, s, first, True).first, queries_of(p, s, behind - 1, True).behind)


@triton.jit
def is_padded(p, s, position, there):
    if p.padding is None:
        return there & ~there
    else:
        return tl.load(p.padding + s.b.to(tl.int64) * p.keys + s.offset + position, mask=there, other=0) != 0


@triton.jit
def take_queries(p, s, slot, there):
    """Of unrolled slots. A shared row does not see itself, unless it is ``self_only``."""
    at = wrapped(s, slot)
    if p.bucket_aligned or p.lists is not None:
        there &= at == slot
    position = position_of(p, s, at, there)
    some = there & (position < s.n_queries)
    position = tl.where(some, position, 0)
    blind = ~some
    if p.mask_padded_queries:
        blind |= is_padded(p, s, position, some)
    limit = tl.where(blind, NOBODY, tl.where(p.causal, position + 1, HIDDEN))
    excluded = Range(position, tl.where(p.shared, position + 1, position))
    if p.shown_first is not None:
        later = some & (at >= s.length)
        chunk = (s.b * p.heads + s.h).to(tl.int64) * tl.cdiv(s.length, p.chunk_length) + position // p.chunk_length
        first = tl.load(p.shown_first + chunk, mask=later, other=0)
        excluded = Range(first, tl.load(p.shown_behind + chunk, mask=later, other=0))
    seen = keys_of(p, s, slot, there)
    return Queries(position, some, at, limit, excluded, Range(seen.first, tl.where(there, seen.behind, seen.first)))


@triton.jit
def take_keys(p, s, slot, behind):
    """Of unrolled slots, or places of lists, less those from `behind` on."""
    there = slot < behind
    if p.lists is None:
        position = position_of(p, s, wrapped(s, slot), there)
    else:
        lists = p.lists + (s.b * p.heads + s.h).to(tl.int64) * list_rows(p, s) * p.list_length
        position = tl.load(lists + slot, mask=there, other=-1)
        there &= position >= 0
        position = tl.maximum(position, 0)
    hidden = ~there | is_padded(p, s, position, there)
    code = tl.where(position >= s.everyone, EVERYONE, position)
    return Keys(position, there, slot, tl.where(hidden, HIDDEN, code))


@triton.jit
def times_met(p, s, query, key):
    """How often queries meet keys in all rounds, by positions in the sequence that broadcast."""
    times = query * 0 + key * 0
    places = p.places + (s.b * p.heads + s.h).to(tl.int64) * p.rounds * p.length + s.offset
    for r in range(s.rounds):
        slot = r * s.length + tl.load(places + r * p.length + query)
        seen = keys_of(p, s, slot, slot >= 0)
        if p.within_bucket:
            bucket = bucket_of(p, s, slot, slot >= 0)
        # Of the unrolled rounds that windows touch each has the key once.
        first, behind = tl.min(floor_div(seen.first, s.length)), tl.max(floor_div(seen.behind - 1, s.length)) + 1
        for unrolled in range(first, behind):
            key_round = floor_mod(unrolled, s.rounds)
            place = tl.load(places + key_round * p.length + key)
            at = unrolled * s.length + place
            met = (at >= seen.first) & (at < seen.behind)
            if p.within_bucket:
                at = key_round * s.length + place
                met &= (at >= bucket.first) & (at < bucket.behind)
            times += met.to(tl.int32)
    return times


@triton.jit
def same_bucket(p, s, query_slot, key_slot):
    """Of a wrapped and an unrolled slot."""
    bucket = bucket_of(p, s, query_slot, query_slot >= 0)
    at = wrapped(s, key_slot)
    return (at >= bucket.first) & (at < bucket.behind)


@triton.jit
def is_kept(p, s, slot, at):
    """Whether dropout keeps pairs of the query of a wrapped slot and the key `at` slots from the first that it sees."""
    r = slot // s.length
    zero = at * 0
    a, b, c, d = tl.philox(tl.load(p.dropout_seed), at // 4, zero + (slot - r * s.length), zero + r, zero + s.index)
    word = tl.where(at % 2 == 0, tl.where(at % 4 == 0, a, c), tl.where(at % 4 == 1, b, d))
    return word.to(tl.int64) >= p.drop_threshold
