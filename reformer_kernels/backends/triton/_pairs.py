"""Pairs of a query and a key: whether one sees the other, and what rules and dropout make of it.

Tiles have queries along one axis and keys along the other; facts come expanded, so that they broadcast.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._windows import Keys, Queries, Range, is_kept, same_bucket, times_met


@triton.jit
def across(x, AXIS: tl.constexpr):
    """A row of facts along AXIS of a tile."""
    return tl.expand_dims(x, 1 - AXIS)


@triton.jit
def queries_along(q, AXIS: tl.constexpr):
    return Queries(
        across(q.position, AXIS), across(q.some, AXIS), across(q.slot, AXIS), across(q.limit, AXIS),
        Range(across(q.excluded.first, AXIS), across(q.excluded.behind, AXIS)),
        Range(across(q.seen.first, AXIS), across(q.seen.behind, AXIS)),
    )  # fmt: skip


@triton.jit
def keys_along(k, AXIS: tl.constexpr):
    return Keys(across(k.position, AXIS), across(k.some, AXIS), across(k.slot, AXIS), across(k.code, AXIS))


@triton.jit
def sees(q, k):
    within = (k.slot >= q.seen.first) & (k.slot < q.seen.behind) & (k.code < q.limit)
    return within & ~((k.code >= q.excluded.first) & (k.code < q.excluded.behind))


@triton.jit
def apply_rules(p, s, q, k, score):
    """Scores in base 2 by the rules of pairs."""
    if p.within_bucket or p.dedup:
        if s.single == 0:
            if p.within_bucket:
                score = tl.where(same_bucket(p, s, q.slot, k.slot), score, float("-inf"))
            if p.dedup:
                score -= tl.log2(tl.maximum(times_met(p, s, q.position, k.position), 1).to(tl.float32))
    return score


@triton.jit
def kept_factor(p, s, q, k):
    """What dropout multiplies probabilities by."""
    return tl.where(is_kept(p, s, q.slot, k.slot - q.seen.first), p.keep_factor, 0.0)
