"""Compares a backend with the float64 oracle, under tolerances that are derived and not chosen.

A result may be off by twice the error of the reference in the same dtype (both against the oracle), plus one
rounding of the terms that it sums: their absolute values are summed in float64 here. A score's own rounding counts
too: the exponential turns it into a relative error of |score| roundings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from . import _dispatch
from ._calls import AttentionCall, ListCall
from .backends import reference, reference_lists
from .backends._sentinels import has_sentinels
from .backends.philox import keep_factor

AnyCall = TypeVar("AnyCall", bound=AttentionCall | ListCall)
NAMES = ("out", "lse", "grad_query", "grad_key", "grad_value")


def capture(function: Callable[..., Any], *args: Any, op: str = "chunk_attention", **kwargs: Any) -> Any:
    """The arguments with which ``function`` calls the op, by the reference backend."""
    calls: list[Any] = []
    original = getattr(reference, op)

    def spy(call: Any) -> Any:
        calls.append(call)
        return original(call)

    setattr(reference, op, spy)
    try:
        function(*args, backend="reference", **kwargs)
    finally:
        setattr(reference, op, original)
    return calls[0]


def convert(call: AnyCall, dtype: torch.dtype) -> AnyCall:
    """The call with query, key, value and a float mask in another dtype."""
    tensors = {name: getattr(call, name) for name in ("query", "key", "value", "attn_mask")}
    floating = {name: x.to(dtype) for name, x in tensors.items() if x is not None and x.is_floating_point()}
    return cast(AnyCall, call._replace(**floating))


def results(call: AttentionCall | ListCall, forward: str, backward: str, grad_out: Tensor) -> dict[str, Tensor]:
    """out, lse, all gradients and other residuals (self_only), forward and backward by the named backends."""
    forward_backend, backward_backend = _dispatch.BACKENDS[forward], _dispatch.BACKENDS[backward]
    residuals = getattr(forward_backend, call.op)(call)
    out, lse, *others = residuals
    grads = getattr(backward_backend, f"{call.op}_backward")(call, grad_out.to(out.dtype), *residuals)
    return dict(zip(NAMES, (out, lse, *grads), strict=True)) | dict(zip(("self_only",), others, strict=False))


def rounding_terms(call: AttentionCall | ListCall, grad_out: Tensor) -> dict[str, float]:
    """The largest sum of absolute terms behind each result of a float64 call, times one plus the largest score."""
    return _list_terms(call, grad_out) if isinstance(call, ListCall) else _chunk_terms(call, grad_out)


def _list_terms(call: ListCall, grad_out: Tensor) -> dict[str, float]:
    query, key, value = reference_lists.call_tensors(call)
    length, size = query.shape[2], key.shape[2]
    if 0 in query.shape or size == 0:
        return dict.fromkeys(NAMES, 0.0)
    s = reference_lists.list_scores(call)
    rest = reference_lists.rest_term(call, s, query, key) if call.rest_term else None
    lse = reference_lists.logsumexp(s, rest, length)
    weight = reference_lists.probabilities(s, lse)
    dropped = weight * s.dropout
    score_rounding = 1 + float(s.scores.masked_fill(~s.included, 0.0).abs().max())
    query, key, value, grad = query.abs(), key.abs(), value.abs(), grad_out.abs()
    rows, add = reference_lists.gather_rows, reference_lists.add_rows
    out = add(length, s.position, dropped @ rows(value, s.key))
    if rest is not None:
        rest_weight = torch.exp(rest.score - reference_lists.finite(lse))[..., None]
        finite = rest.score.masked_fill(rest.score == float("-inf"), 0.0)
        score_rounding = max(score_rounding, 1 + float(finite.abs().max()))
        mean_key, mean_value = rest.share @ key, rest.share @ value
        out = out + rest_weight * mean_value
    delta = (grad * out).sum(-1, keepdim=True)
    grad_weight = rows(grad, s.position) @ rows(value, s.key).mT
    grad_scores = (dropped * grad_weight + weight * rows(delta, s.position)) * abs(call.scale)
    grads = [
        add(length, s.position, grad_scores @ rows(key, s.key)),
        add(size, s.key, grad_scores.mT @ rows(query, s.position)),
        add(size, s.key, dropped.mT @ rows(grad, s.position)),
    ]
    if rest is not None:
        slope = rest_weight * ((grad * mean_value).sum(-1, keepdim=True) + delta) * abs(call.scale)
        grads[0] = grads[0] + slope * mean_key
        grads[1] = grads[1] + rest.share.mT @ (slope * query)
        grads[2] = grads[2] + rest.share.mT @ (rest_weight * grad)
    grads[1:] = [reference_lists.per_key_head(g, x) for g, x in zip(grads[1:], (call.key, call.value), strict=True)]
    terms = {name: float(x.max()) * score_rounding for name, x in zip(("out", *NAMES[2:]), (out, *grads), strict=True)}
    return terms | {"lse": score_rounding + float(reference_lists.finite(lse).abs().max())}


def _chunk_terms(call: AttentionCall, grad_out: Tensor) -> dict[str, float]:
    largest = dict.fromkeys(NAMES, 0.0)
    parts = [(batch, x) for batch, sequences in reference.parts_of(call) for x in sequences if not x.empty]
    for batch, (part, order, number, rows) in parts:
        query, key, value = reference.tensors(part, torch.float64)
        s = reference.score(part, order, query, key, number)
        _, lse = reference.attend(part, s, value)
        weight = torch.exp(s.scores - reference_lists.finite(reference.of_query(s, lse)))
        dropped = weight * (1.0 if s.dropout is None else s.dropout)
        scores = s.scores.masked_fill(~s.included, 0.0).abs()
        score_rounding = 1 + float(scores.max())
        query, key, value = query.abs(), key.abs(), value.abs()
        rest = part.query.shape[2] - part.n_queries
        grad = torch.nn.functional.pad(grad_out[batch, :, rows].abs(), (0, 0, 0, rest))
        value_rows, grad_rows = reference.rows_at(value, s.key_position), reference.rows_at(grad, s.query_position)
        out = reference.per_query_sum(part, s, dropped @ value_rows)
        delta = reference.of_query(s, (grad * out).sum(-1))
        grad_scores = (dropped * (grad_rows @ value_rows.mT) + weight * delta) * s.live * abs(part.scale)
        everything = torch.ones_like(s.query_position), torch.ones_like(s.key_position)
        grads = [torch.zeros_like(x) for x in (query, key, value)]
        reference.add_rows_at(
            grads[0], s.query_position, everything[0], grad_scores @ reference.rows_at(key, s.key_position)
        )
        reference.add_rows_at(
            grads[1], s.key_position, everything[1], grad_scores.mT @ reference.rows_at(query, s.query_position)
        )
        reference.add_rows_at(grads[2], s.key_position, everything[1], dropped.mT @ grad_rows)
        if part.key is None:  # the Jacobian of the unit key, in absolute values
            norm = part.query.norm(dim=-1, keepdim=True).clamp(min=1e-12)
            grads[0] = grads[0] + (grads[1] + query * (grads[1] * query).sum(-1, keepdim=True) / norm**2) / norm
        else:
            grads[1:] = [
                reference_lists.per_key_head(g, x) for g, x in zip(grads[1:], (part.key, part.value), strict=True)
            ]
        sums = {"out": out, "grad_query": grads[0], "grad_key": grads[1], "grad_value": grads[2]}
        for name, x in sums.items():
            largest[name] = max(largest[name], float(x.max()) * score_rounding)
        largest["lse"] = max(largest["lse"], score_rounding + float(reference_lists.finite(lse).abs().max()))
    return largest


def _own_terms(call: AttentionCall, grad_out: Tensor) -> dict[str, float]:
    """As ``rounding_terms``, of queries that sentinels give their own value."""
    rounds = 1 if call.order is None else call.order.shape[2]
    roundings = (rounds + 4) * keep_factor(call.dropout_p)  # a sum over rounds, of two exponentials and a product
    value, grad = (float(x.abs().max()) if x.numel() else 0.0 for x in (call.value, grad_out))
    return {
        "out": roundings * value, "lse": abs(call.rules.own_value), "grad_value": roundings * grad,
        "grad_query": 0.0, "grad_key": 0.0,
    }  # fmt: skip


def _without_sentinels(call: AnyCall) -> AnyCall:
    """The call by rules that are the same, except for queries that see no other key."""
    if not (isinstance(call, AttentionCall) and has_sentinels(call)):
        return call
    return cast(AnyCall, call._replace(rules_key=replace(call.rules, own_position="last_resort").key))


def _error(x: Tensor, oracle: Tensor) -> float:
    """The largest difference; infinities (lse of a query without keys) must agree, and there may be no NaN."""
    x = x.to(torch.float64)
    same = (x == oracle) | ((x - oracle).abs() < float("inf"))
    if not bool(same.all()):
        return float("inf")
    return float(torch.where(x == oracle, 0.0, x - oracle).abs().max()) if x.numel() else 0.0


def assert_matches_oracle(
    call: AttentionCall | ListCall,
    dtype: torch.dtype,
    forward: str,
    backward: str | None = None,
    grad_out: Tensor | None = None,
) -> dict[str, Tensor]:
    """Checks outputs and all gradients of backends in ``dtype`` against the reference in float64.

    With sentinels, whose results are roundings in part, against the reference in the same dtype; what it may be off by
    is what it would be by the same rules without them.

    Args:
        call: its tensors are rounded to ``dtype`` first, so that all compute with the same numbers.
        forward, backward: names of backends; the same if only one is given.
        grad_out: [B, H, num_queries, E]; None: random normal values from a fixed seed.

    Returns:
        What the backends computed, by name.

    Raises:
        AssertionError: a result is outside its tolerance, or not finite where the oracle's is.
    """
    call = convert(call, dtype)
    plain = _without_sentinels(call)
    exact = convert(plain, torch.float64)
    if grad_out is None:
        n_queries = call.n_queries if isinstance(call, AttentionCall) else call.query.shape[2]
        shape = (*call.query.shape[:2], n_queries, call.value.shape[3])
        grad_out = torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    grad_out = grad_out.to(call.device, dtype).double()
    oracle = results(exact, "reference", "reference", grad_out)
    same_dtype = results(plain, "reference", "reference", grad_out)
    errors = {name: _error(same_dtype[name], oracle[name]) for name in NAMES}
    actual = results(call, forward, backward or forward, grad_out)
    terms = rounding_terms(exact, grad_out)
    if isinstance(call, AttentionCall) and plain is not call:
        oracle = {
            name: x.double() if x.is_floating_point() else x
            for name, x in results(call, "reference", "reference", grad_out).items()
        }
        terms = {name: max(terms[name], own) for name, own in _own_terms(call, grad_out).items()}
    if "self_only" in oracle:
        assert torch.equal(actual["self_only"], oracle["self_only"]), "self_only differs from the oracle's"
    for name in NAMES:
        rounded = torch.float32 if name == "lse" and dtype != torch.float64 else dtype
        rounding = (
            torch.finfo(rounded).eps * terms[name] * (2 if dtype == torch.float64 else 1)
        )  # the oracle rounds, too
        tolerance = 2 * errors[name] + rounding
        error = _error(actual[name], oracle[name])
        assert error <= tolerance, (
            f"{name} of {forward}/{backward or forward} in {dtype} is off by {error:.3g}, allowed {tolerance:.3g} "
            f"(query {list(call.query.shape)}, chunk_length {call.chunk_length}"
            f"{'' if isinstance(call, ListCall) else f', {call.rules.differences()}'})"
        )
    return actual
