"""Chunk attention, backward. A round has a launch for gradients of queries and one for those of keys, added in place.

No sum is shared between programs, so results do not depend on the order in which they run.

  P = exp(S - lse)   dP = dO V^T   dS = P (dP - delta)   where S = factor q . k
  first launch, for each query: dQ = sum dS factor k
  second launch, for each key: dV = sum P dO, dK = sum dS q

With shared rows the gradient of a row is the sum of its gradient as a query and, through the Jacobian of the unit key,
its gradient as a key. With dropout, dV has the dropped P, and dP = drop * (dO V^T).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._calls import AttentionCall, ListCall
from .. import _common
from ._launch import Config, launch, rows
from ._pairs import across, kept_factor, keys_along, queries_along, score_mod, sees
from ._windows import (
    Problem,
    Queries,
    Range,
    key_slots,
    keys_of_tile,
    queries_of_tile,
    take_keys,
    take_queries,
    take_sequence,
    with_head,
)  # fmt: skip
from .attention import (
    LN2,
    LOG2E,
    add_rows,
    anew,
    inputs_of,
    key_length,
    kind_of,
    load_factors,
    load_rows,
    multiply,
    of_chunks,
    row_products,
    tiles_of,
    window_problem,
)  # fmt: skip
from .configs import choose, seconds

RESIDUALS = Config(32, 16, num_stages=1)


@triton.jit(do_not_specialize=["p", "n"])
def residual_kernel(
    p, query, out, grad_out, lse, self_only, divisors, deltas, n, D: tl.constexpr, E: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """deltas and divisors [B, H, n] of queries.

    A divisor is log2 of what the exponential of a score is divided by to be a weight: lse, base 2; infinity if the
    query saw nothing; of a self_only query how often it met its own key.
    """
    tiles = tl.cdiv(n, BLOCK_M)
    tile, head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, h, row = head // p.heads, head % p.heads, tile * BLOCK_M + tl.arange(0, BLOCK_M)
    mask, at = row < n, head.to(tl.int64) * n + row
    out_rows = load_rows(out, b, h, row, mask, E, BLOCK_E)
    grad_rows = load_rows(grad_out, b, h, row, mask, E, BLOCK_E)
    tl.store(deltas + at, row_products(p, out_rows, grad_rows, mask), mask=mask)
    log2_divisor = tl.load(lse + at, mask=mask, other=0.0) * LOG2E
    log2_divisor = tl.where(log2_divisor == float("-inf"), float("inf"), log2_divisor)
    if p.shared_qk:
        is_self_only = tl.load(self_only + at, mask=mask, other=0) != 0
        if tl.max(is_self_only.to(tl.int32)) > 0:
            # With dedup this is 0: the score_mod already divides by the number of times.
            x = load_rows(query, b, h, row, is_self_only, D, BLOCK_D)
            square = row_products(p, x, x, is_self_only)
            length = tl.where(is_self_only, key_length(p, square, D), 1.0)
            counted = tl.exp2(log2_divisor - p.scale * LOG2E * square / length)
            log2_divisor = tl.where(is_self_only, tl.log2(tl.floor(counted + 0.5)), log2_divisor)
    tl.store(divisors + at, log2_divisor, mask=mask)


@triton.jit
def take_residuals(p, s, q, divisors, deltas, self_only):
    """The queries, which see their own key if they are self_only; divisor and delta; and whether they are self_only."""
    at = s.first_query + q.position
    log2_divisor = tl.load(divisors + at, mask=q.valid, other=float("inf"))
    delta = tl.load(deltas + at, mask=q.valid, other=0.0)
    is_self_only = q.valid & ~q.valid
    if p.shared_qk:
        is_self_only = tl.load(self_only + at, mask=q.valid, other=0) != 0
    end = tl.where(is_self_only, q.excluded.begin, q.excluded.end)
    q = Queries(q.position, q.valid, q.slot, q.limit, Range(q.excluded.begin, end), q.seen)
    return q, log2_divisor, delta, is_self_only


@triton.jit
def weights(p, s, q, k, score, log2_divisor, is_self_only):
    """Probabilities of scores in base 2. A self_only query weighs each of its own keys with exactly 1 / times."""
    score = tl.where(is_self_only, -log2_divisor, score - log2_divisor)
    return tl.exp2(tl.where(sees(q, k), score_mod(p, s, q, k, score), float("-inf")))


@triton.jit(do_not_specialize=["p", "r", "tiles"])
def grad_query_kernel(
    p, query, key, value, factors, grad_out, divisors, deltas, self_only, grad_query, r, tiles, D: tl.constexpr,
    E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of queries of round r."""
    s = take_sequence(p, tl.program_id(0) // tiles, False)
    first = tl.program_id(0) % tiles * BLOCK_M
    if r >= s.rounds or first >= s.length:
        return
    i = first + tl.arange(0, BLOCK_M)
    q = take_queries(p, s, r * s.length + i, i < s.length)
    q, log2_divisor, delta, is_self_only = take_residuals(p, s, q, divisors, deltas, self_only)
    qs = queries_along(q, 0)
    query_rows = load_rows(query, s.b, s.h, s.offset + q.position, q.valid, D, BLOCK_D)
    grad_rows = load_rows(grad_out, s.b, s.h, s.offset + q.position, q.valid, E, BLOCK_E)
    grad = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    visited = keys_of_tile(p, s, r, first, BLOCK_M)
    for start in range(visited.begin, visited.end, BLOCK_N):
        k = take_keys(p, s, start + tl.arange(0, BLOCK_N), visited.end)
        ks = keys_along(k, 1)
        key_rows = load_rows(key, s.b, s.key_head, s.offset + k.position, k.valid, D, BLOCK_D)
        value_rows = load_rows(value, s.b, s.key_head, s.offset + k.position, k.valid, E, BLOCK_E)
        factor = across(load_factors(p, s, factors, k), 1)
        score = multiply(anew(query_rows, start), tl.trans(key_rows)) * factor
        weight = weights(p, s, qs, ks, score, across(log2_divisor, 0), across(is_self_only, 0))
        grad_weight = multiply(anew(grad_rows, start), tl.trans(value_rows))
        if p.dropout_seed is not None:
            grad_weight *= kept_factor(p, s, qs, ks)
        grad_score = weight * (grad_weight - across(delta, 0)) * (factor * LN2)
        grad += multiply(grad_score.to(key_rows.dtype), key_rows)
    add_rows(grad_query, s.b, s.h, s.offset + q.position, q.valid, r > 0, 1.0, grad, D, BLOCK_D)


@triton.jit(do_not_specialize=["p", "r", "tiles"])
def grad_keys_kernel(
    p, query, key, value, factors, grad_out, divisors, deltas, self_only, grad_key, grad_value, r, tiles,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of keys of round r, or of list entries, each of which has gradients of its own.

    With shared rows, gradients as keys are added to those as queries.
    """
    windows: tl.constexpr = p.lists is None
    s = take_sequence(p, tl.program_id(0) // tiles, windows)
    slots = key_slots(p, s, r)
    first = slots.begin + tl.program_id(0) % tiles * BLOCK_M
    if r >= s.rounds or first >= slots.end:
        return
    k = take_keys(p, s, first + tl.arange(0, BLOCK_M), slots.end)
    ks = keys_along(k, 0)
    key_rows = load_rows(key, s.b, s.key_head, s.offset + k.position, k.valid, D, BLOCK_D)
    value_rows = load_rows(value, s.b, s.key_head, s.offset + k.position, k.valid, E, BLOCK_E)
    factor = load_factors(p, s, factors, k)
    grad_k, grad_v = tl.zeros((BLOCK_M, BLOCK_D), tl.float32), tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    visited = queries_of_tile(p, s, first, tl.minimum(first + BLOCK_M, slots.end))
    for member in range(p.group if windows else 1):
        of = with_head(p, s, s.h + member)
        for start in range(visited.begin, visited.end, BLOCK_N):
            at = start + tl.arange(0, BLOCK_N)
            q = take_queries(p, of, at, at < visited.end)
            q, log2_divisor, delta, is_self_only = take_residuals(p, of, q, divisors, deltas, self_only)
            qs = queries_along(q, 1)
            query_rows = load_rows(query, of.b, of.h, of.offset + q.position, q.valid, D, BLOCK_D)
            grad_rows = load_rows(grad_out, of.b, of.h, of.offset + q.position, q.valid, E, BLOCK_E)
            score = multiply(anew(key_rows, start), tl.trans(query_rows)) * across(factor, 0)
            weight = weights(p, of, qs, ks, score, across(log2_divisor, 1), across(is_self_only, 1))
            grad_weight = multiply(anew(value_rows, start), tl.trans(grad_rows))
            dropped = weight
            if p.dropout_seed is not None:
                kept = kept_factor(p, of, qs, ks)
                dropped, grad_weight = weight * kept, grad_weight * kept
            grad_score = weight * (grad_weight - across(delta, 1))
            grad_v += multiply(dropped.to(grad_rows.dtype), grad_rows)
            grad_k += multiply(grad_score.to(query_rows.dtype), query_rows)
    if windows:
        head, row, adds = s.key_head, s.offset + k.position, k.valid & (r > 0)
    else:
        head, row, adds = s.h, k.slot, k.valid & ~k.valid
    add_rows(grad_value, s.b, head, row, k.valid, adds, 1.0, grad_v, E, BLOCK_E)
    if p.shared_qk:
        # With key = query / length the gradient is (g - query (g . query) / length^2) / length.
        x, square = key_rows.to(tl.float32), row_products(p, key_rows, key_rows, k.valid)
        inverse = 1.0 / key_length(p, square, D)
        along = row_products(p, x, grad_k, k.valid) * inverse * inverse
        along = tl.where(p.l2 & ~(square > 1e-24), 0.0, along)
        grad_k = (grad_k - x * along[:, None]) * (p.scale * inverse)[:, None]
        adds |= k.valid & (k.position < s.n_queries)  # their gradients as queries are written already
    else:
        grad_k *= p.scale
    add_rows(grad_key, s.b, head, row, k.valid, adds, 1.0, grad_k, D, BLOCK_D)


def residuals(
    inputs: tuple[Any, ...], widths: dict[str, int], grad_out: Tensor, out: Tensor, lse: Tensor,
    self_only: Tensor | None,
) -> tuple[Any, ...]:  # fmt: skip
    """What kernels of gradients take first."""
    p, query = inputs[:2]
    divisors, deltas = lse.new_empty(lse.shape), lse.new_empty(lse.shape)
    launch(
        residual_kernel, lse.shape[0] * p.heads * tiles_of(p.n_queries, RESIDUALS), lse.device, p, query,
        rows(_common.rows(out)), rows(grad_out), lse.contiguous(), self_only, divisors, deltas, p.n_queries,
        config=RESIDUALS, **widths,
    )  # fmt: skip
    return *inputs, rows(grad_out), divisors, deltas, self_only


def grad_queries(
    given: tuple[Any, ...], call: AttentionCall | ListCall, longest: int, widths: dict[str, int], grad: Tensor
) -> None:
    p: Problem = given[0]

    def start(r: int, plan: Config) -> None:
        plan = of_chunks(p, plan)
        tiles = tiles_of(longest, plan)
        launch(
            grad_query_kernel, len(grad) * p.heads * p.sequences * tiles, grad.device, *given, rows(grad), r, tiles,
            config=plan, **widths,
        )  # fmt: skip

    plan = choose(kind_of("grad_query", call), call.device, lambda plan: seconds(lambda: start(0, plan)))
    for r in range(p.rounds):
        start(r, plan)


def grad_keys(
    given: tuple[Any, ...], call: AttentionCall | ListCall, longest: int, rounds: int, widths: dict[str, int],
    grads: tuple[Tensor, Tensor],
) -> None:  # fmt: skip
    """
    Args:
        longest: keys of a sequence, or entries.
    """
    p: Problem = given[0]
    heads = p.heads // p.group if p.lists is None else p.heads

    def start(r: int, plan: Config, grads: tuple[Tensor, Tensor]) -> None:
        tiles = tiles_of(longest, plan)
        launch(
            grad_keys_kernel, len(call.query) * heads * p.sequences * tiles, call.device, *given, *map(rows, grads), r,
            tiles, config=plan, **widths,
        )  # fmt: skip

    def measure(plan: Config) -> float:
        others = torch.empty_like(grads[0]), torch.empty_like(grads[1])  # what is added to shall not be added twice
        return seconds(lambda: start(0, plan, others))

    plan = choose(kind_of("grad_keys", call), call.device, measure)
    for r in range(rounds):
        start(r, plan, grads)


def chunk_attention_backward(
    call: AttentionCall, grad_out: Tensor, out: Tensor, lse: Tensor, self_only: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _common.new_gradients(call)
    if 0 in call.query.shape[:3]:
        return grads
    inputs, widths = inputs_of(window_problem(call), call)
    is_self_only = self_only.contiguous() if call.key is None else None
    given = residuals(inputs, widths, _common.rows(grad_out), out, lse, is_self_only)
    grad_queries(given, call, call.longest, widths, grads[0])
    of_keys = grads[0] if call.key is None else grads[1]
    grad_keys(given, call, call.longest, inputs[0].rounds, widths, (of_keys, grads[2]))
    return grads
