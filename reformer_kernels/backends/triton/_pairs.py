"""Pairs of a query and a key: whether the query sees the key, the score_mod and dropout.

A tile has queries along one axis and keys along the other. Facts are expanded, so that they broadcast.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._windows import Keys, Queries, Range, has_score_mod, is_kept, same_bucket, times_met


@triton.jit
def across(x, AXIS: tl.constexpr):
    """A row of facts along AXIS of a tile."""
    return tl.expand_dims(x, 1 - AXIS)


@triton.jit
def queries_along(q, AXIS: tl.constexpr):
    return Queries(
        across(q.position, AXIS), across(q.valid, AXIS), across(q.slot, AXIS), across(q.limit, AXIS),
        Range(across(q.excluded.begin, AXIS), across(q.excluded.end, AXIS)),
        Range(across(q.seen.begin, AXIS), across(q.seen.end, AXIS)),
    )  # fmt: skip


@triton.jit
def keys_along(k, AXIS: tl.constexpr):
    return Keys(across(k.position, AXIS), across(k.valid, AXIS), across(k.slot, AXIS), across(k.key_position, AXIS))


@triton.jit
def sees(q, k):
    within = (k.slot >= q.seen.begin) & (k.slot < q.seen.end) & (k.key_position < q.limit)
    return within & ~((k.key_position >= q.excluded.begin) & (k.key_position < q.excluded.end))


@triton.jit
def score_mod(p, s, q, k, score):
    """Scores, base 2, with what the rules within_bucket and dedup add to them."""
    if has_score_mod(p, s):
        if p.within_bucket:
            score = tl.where(same_bucket(p, s, q.slot, k.slot), score, float("-inf"))
        if p.dedup:
            score -= tl.log2(tl.maximum(times_met(p, s, q.position, k.position), 1).to(tl.float32))
    return score


@triton.jit
def kept_factor(p, s, q, k):
    """The factors of dropout."""
    return tl.where(is_kept(p, s, q.slot, k.slot - q.seen.begin), p.keep_factor, 0.0)
