"""Chunk attention, forward: a launch for each round, which merges in place into the result of earlier rounds."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._calls import AttentionCall, ListCall, empty_results, n_sequences
from .. import _common
from ..philox import drop_threshold, keep_factor
from ._launch import Config, block_width, launch, rows
from ._pairs import across, kept_factor, keys_along, queries_along, score_mod, sees
from ._windows import (
    NO_KEYS,
    Problem,
    has_score_mod,
    keys_of_tile,
    position_of,
    row_stride,
    same_bucket,
    take_keys,
    take_queries,
    take_sequence,
)  # fmt: skip
from .configs import LONG_CHUNK, Kind, choose, seconds

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
KEPT_BITS = tl.constexpr(15)  # low bits of self_counts: how often kept; above them: how often met


@triton.jit
def key_length(p, square, D: tl.constexpr):
    """What a shared row is divided by to become a key. square: its squared length."""
    return tl.where(p.l2, tl.maximum(tl.sqrt(square), 1e-12), tl.sqrt(square + 1e-6 * D))


@triton.jit
def row_offsets(x, b, h, row):
    """Where rows of x begin, [N, 1]."""
    return b.to(tl.int64) * x.stride_b + h.to(tl.int64) * x.stride_h + row.to(tl.int64)[:, None] * x.stride_l


@triton.jit
def load_rows(x, b, h, row, mask, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)[None, :]
    return tl.load(x.data + row_offsets(x, b, h, row) + d, mask=mask[:, None] & (d < D), other=0.0)


@triton.jit
def store_rows(x, b, h, row, mask, value, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)[None, :]
    tl.store(x.data + row_offsets(x, b, h, row) + d, value.to(x.data.dtype.element_ty), mask=mask[:, None] & (d < D))


@triton.jit
def add_rows(x, b, h, row, mask, adds, before, value, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows become value, plus old * before where `adds`."""
    old = load_rows(x, b, h, row, mask & adds, D, BLOCK_D).to(tl.float32)
    store_rows(x, b, h, row, mask, old * before + value, D, BLOCK_D)


@triton.jit
def row_products(p, a, b, mask):
    """a . b of each row. What is selected cannot be fused with the sum, or lanes would differ in the last bit.

    Whatever the compiler finds out of `mask`, it cannot know that the scale is a number.
    """
    return tl.sum(tl.where(mask[:, None] & (p.scale == p.scale), a.to(tl.float32) * b.to(tl.float32), 0.0), 1)


@triton.jit
def multiply(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def anew(x, start):
    """Rows that do not change in a loop. As float32 a thread would keep all that it multiplies in registers."""
    return tl.where(start > NO_KEYS, x, 0.0) if x.dtype == tl.float32 else x


@triton.jit(do_not_specialize=["p", "heads", "length"])
def factor_kernel(p, x, factors, heads, length, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
                  BLOCK_N: tl.constexpr):  # fmt: skip
    """factors [B, H, L]: of shared rows as keys, of scores in base 2."""
    tiles = tl.cdiv(length, BLOCK_M)
    tile, head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    x = load_rows(x, head // heads, head % heads, row, row < length, D, BLOCK_D)
    factor = p.scale * LOG2E / key_length(p, row_products(p, x, x, row < length), D)
    tl.store(factors + head.to(tl.int64) * length + row, factor, mask=row < length)


@triton.jit(do_not_specialize=["p", "r", "tiles", "steps"])
def windows_kernel(p, buckets, slot_of_position, bucket_begin, bucket_end, tiles, steps, BLOCK_M: tl.constexpr,
                   BLOCK_N: tl.constexpr):  # fmt: skip
    """Finds the slot of every position in every round, and the slots of the bucket of every slot."""
    tile, number = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    r, s = number % p.rounds, take_sequence(p, number // p.rounds, False)
    if r >= s.rounds:
        return
    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    mask, slot = i < s.length, r * s.length + i
    position = position_of(p, s, slot, mask)
    of_round = ((s.b * p.heads + s.h).to(tl.int64) * p.rounds + r) * p.length + s.offset
    tl.store(slot_of_position + of_round + position, i, mask=mask)
    if buckets is not None:
        bucket = tl.load(buckets + of_round + position, mask=mask, other=0)
        for behind in tl.static_range(2):  # the first slot of this bucket, and of a later one: they are sorted
            low, high = i * 0, i * 0 + s.length
            for _ in range(steps):
                middle = (low + high) // 2
                searching = mask & (low < high)
                at = position_of(p, s, r * s.length + middle, searching)
                before = tl.load(buckets + of_round + at, mask=searching, other=0) < bucket + behind
                low = tl.where(searching & before, middle + 1, low)
                high = tl.where(searching & ~before, middle, high)
            to = bucket_end if behind else bucket_begin
            tl.store(to + s.first_slot + slot, r * s.length + low, mask=mask)


@triton.jit
def load_factors(p, s, factors, k):
    if p.shared_qk:
        head = (s.b * p.heads + s.h).to(tl.int64)
        return tl.load(factors + head * p.length + s.offset + k.position, mask=k.valid, other=0.0)
    else:
        return tl.full(k.slot.shape, p.scale * LOG2E, tl.float32)


@triton.jit(do_not_specialize=["p", "r", "tiles"])
def forward_kernel(
    p, query, key, value, factors, out, lse, self_counts, self_only, r, tiles, D: tl.constexpr, E: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of queries of round r. lse [B, H, n_queries] is base 2 until the last round, and then natural.

    A query attends its own key only if it sees no other key in any round: then it is self_only. As long as it has seen
    no other, self_counts, int32 [B, H, n_queries], has how often it met its own key and how often dropout kept that.
    """
    tile = tl.program_id(0) % tiles
    s = take_sequence(p, tl.program_id(0) // tiles, False)
    first = tile * BLOCK_M
    if r >= s.rounds or first >= s.length:
        return
    i = first + tl.arange(0, BLOCK_M)
    slot = r * s.length + i
    q = take_queries(p, s, slot, i < s.length)
    qs = queries_along(q, 0)
    query_rows = load_rows(query, s.b, s.h, s.offset + q.position, q.valid, D, BLOCK_D)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    result = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    visited = keys_of_tile(p, s, r, first, BLOCK_M)
    for start in range(visited.begin, visited.end, BLOCK_N):
        k = take_keys(p, s, start + tl.arange(0, BLOCK_N), visited.end)
        ks = keys_along(k, 1)
        key_rows = load_rows(key, s.b, s.key_head, s.offset + k.position, k.valid, D, BLOCK_D)
        score = multiply(anew(query_rows, start), tl.trans(key_rows)) * across(load_factors(p, s, factors, k), 1)
        score = tl.where(sees(qs, ks), score_mod(p, s, qs, ks, score), float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        # A row that has seen nothing yet keeps exponentials of 0.
        above = tl.where(higher == float("-inf"), 0.0, higher)
        before, weight = tl.exp2(top - above), tl.exp2(score - above[:, None])
        top, total = higher, total * before + tl.sum(weight, 1)
        if p.dropout_seed is not None:
            weight *= kept_factor(p, s, qs, ks)
        value_rows = load_rows(value, s.b, s.key_head, s.offset + k.position, k.valid, E, BLOCK_E)
        result = result * before[:, None] + multiply(weight.to(value_rows.dtype), value_rows)

    # Merge with earlier rounds.
    at = s.first_query + q.position
    earlier = tl.load(lse + at, mask=q.valid & (r > 0), other=float("-inf"))
    now = tl.where(total <= 0, float("-inf"), top + tl.log2(total))
    above = tl.maximum(earlier, now)
    above = tl.where(above == float("-inf"), 0.0, above)
    weight_before, weight_now = tl.exp2(earlier - above), tl.exp2(now - above)
    both = weight_before + weight_now
    merged = above + tl.log2(both)
    nothing = both <= 0
    ends = r == s.rounds - 1
    by = tl.where(nothing, 1.0, both)
    before, factor = weight_before / by, weight_now / (by * tl.where(total <= 0, 1.0, total))
    result *= factor[:, None]
    if p.shared_qk:
        saw_none = q.valid & nothing
        if tl.max(saw_none.to(tl.int32)) > 0:
            count = tl.load(self_counts + at, mask=saw_none & (r > 0), other=0)
            for start in range(visited.begin, visited.end, BLOCK_N):
                ks = keys_along(take_keys(p, s, start + tl.arange(0, BLOCK_N), visited.end), 1)
                met = (ks.slot >= qs.seen.begin) & (ks.slot < qs.seen.end) & (ks.key_position == qs.position)
                if p.within_bucket:
                    if has_score_mod(p, s):
                        met &= same_bucket(p, s, qs.slot, ks.slot)
                one = met.to(tl.int32) << KEPT_BITS
                if p.dropout_seed is not None:
                    one += (met & (kept_factor(p, s, qs, ks) > 0)).to(tl.int32)
                else:
                    one += met.to(tl.int32)
                count += tl.sum(one, 1)
            tl.debug_barrier()  # all have read it
            tl.store(self_counts + at, count, mask=saw_none)
            if ends:
                times, kept = count >> KEPT_BITS, count & ((1 << KEPT_BITS) - 1)
                is_self_only = saw_none & (times > 0)
                tl.store(self_only + at, is_self_only, mask=q.valid)
                self_rows = load_rows(value, s.b, s.key_head, s.offset + q.position, is_self_only, E, BLOCK_E)
                self_rows = self_rows.to(tl.float32)
                share = p.keep_factor * kept.to(tl.float32) / tl.maximum(times, 1).to(tl.float32)
                result = tl.where(is_self_only[:, None], self_rows * share[:, None], result)
                square = row_products(p, query_rows, query_rows, q.valid)
                counted = times.to(tl.float32)
                if p.dedup:
                    counted = tl.where(has_score_mod(p, s), 1.0, counted)
                score = p.scale * LOG2E * square / key_length(p, square, D) + tl.log2(counted)
                merged = tl.where(is_self_only, score, merged)
                nothing &= ~is_self_only
        elif ends:
            tl.store(self_only + at, q.valid & ~q.valid, mask=q.valid)
    merged = tl.where(nothing, float("-inf"), merged)
    tl.debug_barrier()  # all have read it
    tl.store(lse + at, tl.where(ends, merged * LN2, merged), mask=q.valid)
    adds = earlier > float("-inf")
    add_rows(out, s.b, s.h, s.offset + q.position, q.valid, adds, before[:, None], result, E, BLOCK_E)


def kind_of(kernel: str, call: AttentionCall | ListCall) -> Kind:
    kind = Kind(
        kernel, call.query.element_size(), block_width(max(call.query.shape[3], call.value.shape[3])),
        call.dropout_p > 0,
    )  # fmt: skip
    if isinstance(call, ListCall):
        return kind
    pairs = kind.pairs or call.has_score_mod or not call.is_ring
    return kind._replace(pairs=pairs, long=call.chunk_length >= LONG_CHUNK)


def of_chunks(p: Problem, plan: Config) -> Config:
    """The configuration, with no more queries in a tile than in a chunk if each chunk has its own list of keys."""
    if p.lists is None:
        return plan
    return plan._replace(block_m=min(plan.block_m, max(16, triton.next_power_of_2(p.chunk_length))))


def problem(call: AttentionCall | ListCall) -> Problem:
    """All but what windows of buckets and rules of pairs need, or lists."""
    seed = call.dropout_seed if call.dropout_p > 0 else None
    order = _common.contiguous(call.order)
    heads, length = call.query.shape[1:3]
    return Problem(
        order=order, padding=_common.contiguous(call.key_padding_mask), cu_seqlens=None, slot_of_position=None,
        bucket_begin=None, bucket_end=None, lists=None, excluded_begin=None, excluded_end=None,
        dropout_seed=None if seed is None else seed.to(call.device, non_blocking=True), sequences=1, bounds_stride=0,
        batch=len(call.query), heads=heads,
        group=heads // call.value.shape[1], length=length, keys=call.value.shape[2],
        rounds=1 if order is None else order.shape[2], n_queries=length, chunk_length=call.chunk_length, before=0,
        after=0, list_length=0, context_keys=0, drop_threshold=drop_threshold(call.dropout_p),
        keep_factor=keep_factor(call.dropout_p), scale=call.scale, causal=call.causal, l2=False,
        mask_padded_queries=False, shared_qk=tl.constexpr(call.key is None),
    )  # fmt: skip


def window_problem(call: AttentionCall) -> Problem:
    rules, buckets = call.rules, _common.contiguous(call.buckets)
    p = problem(call)._replace(
        n_queries=call.n_queries, before=call.chunks_before, after=call.chunks_after, l2=rules.key_norm == "l2",
        mask_padded_queries=rules.mask_padded_queries, bucket_aligned=tl.constexpr(not call.is_ring),
        within_bucket=tl.constexpr(call.masks_other_buckets), dedup=tl.constexpr(call.counts_meetings),
    )  # fmt: skip
    bounds = _common.device_bounds(call)
    if bounds is not None:
        p = p._replace(cu_seqlens=bounds, sequences=n_sequences(bounds), bounds_stride=row_stride(bounds))
    if not call.has_score_mod and call.is_ring:
        return p
    tables = [
        torch.empty((*call.query.shape[:2], p.rounds, p.length), dtype=torch.int32, device=call.device)
        for _ in range(1 if buckets is None else 3)
    ]
    plan = Config(256, 16, num_stages=1)
    tiles = tiles_of(call.longest, plan)
    first, behind = tables[1:] or (None, None)
    launch(
        windows_kernel, call.query.shape[0] * p.heads * p.sequences * p.rounds * tiles, call.device, p, buckets,
        tables[0], first, behind, tiles, call.longest.bit_length(), config=plan,
    )  # fmt: skip
    return p._replace(slot_of_position=tables[0], bucket_begin=first, bucket_end=behind)


def tiles_of(longest: int, plan: Config) -> int:
    return int(triton.cdiv(longest, plan.block_m))


def factors_of(p: Problem, query: Tensor, widths: dict[str, int]) -> Tensor | None:
    """Of shared rows the factor of each as a key."""
    if not p.shared_qk.value:
        return None
    batch, heads, length, _ = query.shape
    factors = query.new_empty((batch, heads, length), dtype=torch.float32)
    plan = Config(64, 16, num_stages=1)
    launch(
        factor_kernel, batch * heads * triton.cdiv(length, plan.block_m), query.device, p, rows(query), factors, heads,
        length, config=plan, D=widths["D"], BLOCK_D=widths["BLOCK_D"],
    )  # fmt: skip
    return factors


def inputs_of(p: Problem, call: AttentionCall | ListCall) -> tuple[tuple[Any, ...], dict[str, int]]:
    """What kernels of attention take first, and the widths of their rows."""
    query, value = _common.rows(call.query), _common.rows(call.value)
    key = query if call.key is None else _common.rows(call.key)
    widths = {"D": query.shape[3], "E": value.shape[3]}
    widths |= {"BLOCK_D": block_width(widths["D"]), "BLOCK_E": block_width(widths["E"])}
    return (p, rows(query), rows(key), rows(value), factors_of(p, query, widths)), widths


def forward(p: Problem, call: AttentionCall | ListCall, longest: int, self_only: Tensor | None, out: Tensor,
            lse: Tensor) -> None:  # fmt: skip
    inputs, widths = inputs_of(p, call)
    self_counts = torch.empty_like(lse, dtype=torch.int32) if call.key is None else None

    def start(r: int, plan: Config) -> None:
        plan = of_chunks(p, plan)
        tiles = tiles_of(longest, plan)
        launch(
            forward_kernel, len(call.query) * p.heads * p.sequences * tiles, call.device, *inputs, rows(out), lse,
            self_counts, self_only, r, tiles, config=plan, **widths,
        )  # fmt: skip

    plan = choose(kind_of("forward", call), call.device, lambda plan: seconds(lambda: start(0, plan)))
    for r in range(p.rounds):
        start(r, plan)


def chunk_attention(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = empty_results(call)
    self_only = lse.new_zeros(lse.shape, dtype=torch.bool)
    if 0 not in out.shape[:3]:
        forward(window_problem(call), call, call.longest, self_only if call.key is None else None, out, lse)
    return out, lse, self_only
