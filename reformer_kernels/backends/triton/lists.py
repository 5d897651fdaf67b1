"""Attention to lists of keys: chunk attention whose windows are lists, and the rest key for what they leave out.

In backward each list entry has gradients of its own, which are then summed by key.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._calls import ListCall, empty_results
from .. import _common
from . import attention, attention_backward
from ._launch import Config, Rows, launch, rows
from ._windows import Problem, Range, list_rows, position_of, take_sequence
from .attention import add_rows, load_rows, row_products, store_rows
from .order import sort

QUERIES = Config(16, 64, 4, 1, 168)  # queries of a program for rest keys, and list entries that it reads at a time
ENTRIES = Config(1, 16, num_warps=1, num_stages=1)  # entries whose gradients are added at a time


class RestKey(NamedTuple):
    """The sums of keys and values that a query at each position may see; one row if all queries may see the same."""

    key_sums: Rows  # [B, key heads, n, D]
    value_sums: Rows
    counts: Tensor  # int32 [B, n]
    n: int


@triton.jit
def take_rest_key(p, rest, query, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile of queries of the last round: sequence, positions, which are valid; and for their rest keys the rows of
    sums, how many keys each query may see, and the scores, which are -infinity if the query saw all of these."""
    tiles = tl.cdiv(p.length, BLOCK_M)
    s = take_sequence(p, tl.program_id(0) // tiles, False)
    last = s.rounds - 1
    i = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = i < s.length
    position = position_of(p, s, last * s.length + i, valid)
    head = (s.b * p.heads + s.h).to(tl.int64)
    lists = p.lists + head * list_rows(p, s) * p.list_length
    chunks = tl.cdiv(s.length, p.chunk_length)
    seen = i * 0
    for r in range(s.rounds):
        # The first of two rounds has the order of positions.
        chunk = r * chunks + tl.where(r == last, i, position) // p.chunk_length
        excluded = excluded_by_first_round(p, head * chunks + position // p.chunk_length, valid & (r > 0))
        for start in range(0, p.list_length, BLOCK_N):
            entry = start + tl.arange(0, BLOCK_N)[None, :]
            mask = valid[:, None] & (entry < p.list_length)
            key = tl.load(lists + chunk[:, None] * p.list_length + entry, mask=mask, other=-1)
            again = (key >= excluded.begin[:, None]) & (key < excluded.end[:, None])
            sees = (key >= 0) & (key < s.first_context_key) & ~again
            if p.causal:
                sees &= key <= position[:, None]
            seen += tl.sum(sees.to(tl.int32), 1)
    row = tl.minimum(position, rest.n - 1)
    visible = tl.load(rest.counts + s.b.to(tl.int64) * rest.n + row, mask=valid, other=0)
    unseen = visible - seen
    query_rows = load_rows(query, s.b, s.h, position, valid, D, BLOCK_D)
    sums = load_rows(rest.key_sums, s.b, s.key_head, row, valid, D, BLOCK_D)
    score = p.scale * (row_products(p, query_rows, sums, valid) / tl.maximum(visible, 1))
    score = tl.where(unseen > 0, score + tl.log(tl.maximum(unseen, 1).to(tl.float32)), float("-inf"))
    return s, position, valid, row, tl.maximum(visible, 1), score


@triton.jit
def excluded_by_first_round(p, chunk, mask):
    """The keys that chunks of queries saw in the first round."""
    if p.excluded_begin is None:
        return Range(chunk * 0, chunk * 0)
    else:
        first = tl.load(p.excluded_begin + chunk, mask=mask, other=0)
        return Range(first, tl.load(p.excluded_end + chunk, mask=mask, other=0))


@triton.jit(do_not_specialize=["p", "rest"])
def rest_forward_kernel(
    p, rest, query, out, lse, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Merges rest keys into the result of lists."""
    s, position, valid, row, visible, score = take_rest_key(p, rest, query, D, BLOCK_D, BLOCK_M, BLOCK_N)
    valid &= score > float("-inf")
    earlier = tl.load(lse + s.first_query + position, mask=valid, other=0.0)
    top = tl.where(valid, tl.maximum(earlier, score), 0.0)
    both = top + tl.log(tl.exp(earlier - top) + tl.exp(score - top))
    before, weight = tl.exp(earlier - both), tl.exp(score - both) / visible
    value = load_rows(rest.value_sums, s.b, s.key_head, row, valid, E, BLOCK_E) * weight[:, None]
    add_rows(out, s.b, s.h, position, valid, valid, before[:, None], value, E, BLOCK_E)
    tl.debug_barrier()  # all have read lse
    tl.store(lse + s.first_query + position, both, mask=valid)


@triton.jit(do_not_specialize=["p", "rest"])
def rest_backward_kernel(
    p, rest, query, out, grad_out, lse, grad_query, query_terms, value_terms, D: tl.constexpr, E: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds to the gradients of queries. Terms: what each query adds to the gradient of every key that it may see."""
    s, position, valid, row, visible, score = take_rest_key(p, rest, query, D, BLOCK_D, BLOCK_M, BLOCK_N)
    stands = valid & (score > float("-inf"))
    weight = (
        tl.where(stands, tl.exp(score - tl.load(lse + s.first_query + position, mask=stands, other=0.0)), 0.0) / visible
    )
    grad_rows = load_rows(grad_out, s.b, s.h, position, valid, E, BLOCK_E)
    out_rows = load_rows(out, s.b, s.h, position, valid, E, BLOCK_E)
    values = load_rows(rest.value_sums, s.b, s.key_head, row, valid, E, BLOCK_E)
    mean = row_products(p, grad_rows, values, valid) / visible
    slope = weight * (mean - row_products(p, grad_rows, out_rows, valid)) * p.scale
    store_rows(value_terms, s.b, s.h, position, valid, grad_rows.to(tl.float32) * weight[:, None], E, BLOCK_E)
    query_rows = load_rows(query, s.b, s.h, position, valid, D, BLOCK_D).to(tl.float32)
    store_rows(query_terms, s.b, s.h, position, valid, query_rows * slope[:, None], D, BLOCK_D)
    keys = load_rows(rest.key_sums, s.b, s.key_head, row, valid, D, BLOCK_D)
    add_rows(grad_query, s.b, s.h, position, valid, valid, 1.0, keys * slope[:, None], D, BLOCK_D)


@triton.jit(do_not_specialize=["p", "entries", "rest_rows"])
def sum_kernel(
    p, entry_grads, order, starts, rest_grads, rest_rows, grad, entries, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient of a key: the sum over its entries, in a fixed order, and over the rest keys that it is part of.

    order int32 [B, H, entries]: entries sorted by key. starts int32 [B, H, keys + 1]: where each key begins in it.
    """
    key_heads = p.heads // p.group
    key, head = tl.program_id(0) % p.keys, tl.program_id(0) // p.keys
    b, key_head = head // key_heads, head % key_heads
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    if rest_grads is not None:
        counts = key < p.keys - p.context_keys
        if p.padding is not None:
            counts &= tl.load(p.padding + b.to(tl.int64) * p.keys + key) == 0
        row = head.to(tl.int64) * rest_rows + tl.minimum(key, rest_rows - 1)
        total += tl.load(rest_grads + row * D + d, mask=counts & (d < D), other=0.0)
    for h in range(key_head * p.group, (key_head + 1) * p.group):
        query_head = (b * p.heads + h).to(tl.int64)
        at = starts + query_head * (p.keys + 1) + key
        begin, end = tl.load(at), tl.load(at + 1)
        for start in range(begin, end, BLOCK_N):
            i = start + tl.arange(0, BLOCK_N)
            entry = tl.load(order + query_head * entries + i, mask=i < end, other=0)
            total += tl.sum(load_rows(entry_grads, b, h, entry, i < end, D, BLOCK_D).to(tl.float32), 0)
    to = grad.data + b.to(tl.int64) * grad.stride_b + key_head.to(tl.int64) * grad.stride_h
    tl.store(to + key.to(tl.int64) * grad.stride_l + d, total.to(grad.data.dtype.element_ty), mask=d < D)


def list_problem(call: ListCall) -> Problem:
    lists, rounds = call.key_indices.contiguous(), 1 if call.order is None else call.order.shape[2]
    p = attention.problem(call)._replace(lists=lists, list_length=lists.shape[3], context_keys=call.context_keys)
    if rounds == 1:
        return p
    first = lists[:, :, : lists.shape[2] // 2]
    window = (first >= 0) & (first < p.keys - p.context_keys)
    none = torch.iinfo(torch.int32).max
    return p._replace(
        excluded_begin=first.masked_fill(~window, none).amin(-1),
        excluded_end=first.masked_fill(~window, -1).amax(-1) + 1,
    )


def _rest(call: ListCall) -> RestKey | None:
    sums = _common.rest_sums(call)
    return sums and RestKey(rows(sums[0]), rows(sums[1]), sums[2], sums[2].shape[1])


def list_attention(call: ListCall) -> tuple[Tensor, Tensor]:
    out, lse = empty_results(call)
    if 0 in out.shape[:3]:
        return out, lse
    p = list_problem(call)
    (_, query, *_), widths = attention.inputs_of(p, call)
    attention.forward(p, call, p.length, None, out, lse)
    if rest := _rest(call):
        programs = len(out) * p.heads * attention.tiles_of(p.length, QUERIES)
        launch(rest_forward_kernel, programs, call.device, p, rest, query, rows(out), lse, config=QUERIES, **widths)
    return out, lse


def list_attention_backward(
    call: ListCall, grad_out: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _common.new_gradients(call)
    if 0 in call.query.shape[:3]:
        return grads
    inputs, widths = attention.inputs_of(list_problem(call), call)
    p, query = inputs[:2]
    grad_out, out, lse = _common.rows(grad_out), _common.rows(out), lse.contiguous()
    given = attention_backward.residuals(inputs, widths, grad_out, out, lse, None)
    attention_backward.grad_queries(given, call, p.length, widths, grads[0])
    rest = _rest(call)
    rest_grads: list[Tensor | None] = [None, None]
    if rest:
        terms = [lse.new_empty((*lse.shape, x.shape[3])) for x in (call.query, call.value)]
        launch(
            rest_backward_kernel, len(out) * p.heads * attention.tiles_of(p.length, QUERIES), call.device, p, rest,
            query, rows(out), rows(grad_out), lse, rows(grads[0]), *map(rows, terms), config=QUERIES, **widths,
        )  # fmt: skip
        rest_grads = [_common.per_key(call, x).contiguous() for x in terms]

    lists = call.key_indices
    entries = lists.shape[2] * lists.shape[3]
    entry_grads = [x.new_empty((*lists.shape[:2], entries, x.shape[3])) for x in (call.key, call.value)]
    attention_backward.grad_keys(given, call, entries, 1, widths, (entry_grads[0], entry_grads[1]))
    keys = torch.where(lists < 0, p.keys, lists).flatten(2)
    order = sort(keys[:, :, None], None, entries, p.keys + 1).squeeze(2)
    bounds = torch.arange(p.keys + 1, dtype=torch.int32, device=call.device).expand(*keys.shape[:2], -1).contiguous()
    starts = torch.searchsorted(keys.gather(2, order.long()), bounds, out_int32=True)
    for entry_grad, grad, rest_grad, width in zip(entry_grads, grads[1:], rest_grads, ("D", "E"), strict=True):
        launch(
            sum_kernel, len(out) * (p.heads // p.group) * p.keys, call.device, p, rows(entry_grad), order, starts,
            rest_grad, 0 if rest_grad is None else rest_grad.shape[2], rows(grad), entries, config=ENTRIES,
            D=widths[width], BLOCK_D=widths[f"BLOCK_{width}"],
        )  # fmt: skip
    return grads
