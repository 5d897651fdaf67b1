"""Compares a backend with the float64 oracle, under tolerances that are derived and not chosen.

A result may be off by twice the error of the reference in the same dtype (both against the oracle), plus one
rounding of the terms that it sums: their absolute values are summed in float64 here. A score's own rounding counts
too: the exponential turns it into a relative error of |score| roundings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _dispatch
from ._calls import AttentionCall
from .backends import reference

NAMES = ("out", "lse", "grad_query", "grad_key", "grad_value")


def capture(function: Callable[..., Any], *args: Any, **kwargs: Any) -> AttentionCall:
    """The arguments with which ``function`` calls the chunk_attention op, by the reference backend."""
    calls: list[AttentionCall] = []
    original = reference.chunk_attention

    def spy(call: AttentionCall) -> Any:
        calls.append(call)
        return original(call)

    reference.chunk_attention = spy
    try:
        function(*args, backend="reference", **kwargs)
    finally:
        reference.chunk_attention = original
    return calls[0]


def convert(call: AttentionCall, dtype: torch.dtype) -> AttentionCall:
    """The call with query, key, value and a float mask in another dtype."""
    cast = lambda x: x if x is None or not x.is_floating_point() else x.to(dtype)  # noqa: E731
    fields = ("query", "key", "value", "attn_mask")
    return call._replace(**{name: cast(getattr(call, name)) for name in fields})


def results(call: AttentionCall, forward: str, backward: str, grad_out: Tensor) -> dict[str, Tensor]:
    """out, lse, self_only and all gradients, forward and backward by the named backends."""
    forward_backend, backward_backend = _dispatch.BACKENDS[forward], _dispatch.BACKENDS[backward]
    assert forward_backend is not None and backward_backend is not None
    out, lse, self_only = forward_backend.chunk_attention(call)
    grads = backward_backend.chunk_attention_backward(call, grad_out.to(out.dtype), out, lse, self_only)
    return dict(zip((*NAMES, "self_only"), (out, lse, *grads, self_only), strict=True))


def rounding_terms(call: AttentionCall, grad_out: Tensor) -> dict[str, float]:
    """The largest sum of absolute terms behind each result of a float64 call, times one plus the largest score."""
    largest = dict.fromkeys(NAMES, 0.0)
    parts = reference._split(call)
    for unit, (part, order, rows) in enumerate(parts):
        if reference._empty(part):
            continue
        key = reference._unit_key(part.query, part.rules.key_norm) if part.key is None else part.key
        s = reference._score(part, order, part.query, key, (unit, len(parts)))
        _, lse = reference._attend(part, s, part.value)
        weight = torch.exp(s.scores - reference._finite(reference._of_query(s, lse)))
        dropped = weight * (1.0 if s.dropout is None else s.dropout)
        scores = s.scores.masked_fill(~s.included, 0.0).abs()
        score_rounding = 1 + float(scores.max())
        query, key, value = part.query.abs(), key.abs(), part.value.abs()
        rest = part.query.shape[2] - part.n_queries
        grad = torch.nn.functional.pad(grad_out[:, :, rows].abs(), (0, 0, 0, rest))
        value_rows, grad_rows = reference._rows(value, s.key_position), reference._rows(grad, s.query_position)
        out = reference._per_query_sum(part, s, dropped @ value_rows)
        delta = reference._of_query(s, (grad * out).sum(-1))
        grad_scores = (dropped * (grad_rows @ value_rows.mT) + weight * delta) * s.live * abs(part.scale)
        everything = torch.ones_like(s.query_position), torch.ones_like(s.key_position)
        grads = [torch.zeros_like(x) for x in (query, key, value)]
        reference._add_rows(
            grads[0], s.query_position, everything[0], grad_scores @ reference._rows(key, s.key_position)
        )
        reference._add_rows(
            grads[1], s.key_position, everything[1], grad_scores.mT @ reference._rows(query, s.query_position)
        )
        reference._add_rows(grads[2], s.key_position, everything[1], dropped.mT @ grad_rows)
        if part.key is None:  # the Jacobian of the unit key, in absolute values
            norm = part.query.norm(dim=-1, keepdim=True).clamp(min=1e-12)
            grads[0] = grads[0] + (grads[1] + query * (grads[1] * query).sum(-1, keepdim=True) / norm**2) / norm
        sums = {"out": out, "grad_query": grads[0], "grad_key": grads[1], "grad_value": grads[2]}
        for name, x in sums.items():
            largest[name] = max(largest[name], float(x.max()) * score_rounding)
        largest["lse"] = max(largest["lse"], score_rounding + float(reference._finite(lse).abs().max()))
    return largest


def _error(x: Tensor, oracle: Tensor) -> float:
    """The largest difference; infinities (lse of a query without keys) must agree, and there may be no NaN."""
    x = x.to(torch.float64)
    same = (x == oracle) | ((x - oracle).abs() < float("inf"))
    if not bool(same.all()):
        return float("inf")
    return float(torch.where(x == oracle, 0.0, x - oracle).abs().max()) if x.numel() else 0.0


def assert_matches_oracle(
    call: AttentionCall, dtype: torch.dtype, forward: str, backward: str | None = None, grad_out: Tensor | None = None
) -> None:
    """Checks outputs and all gradients of backends in ``dtype`` against the reference in float64.

    Args:
        call: its tensors are rounded to ``dtype`` first, so that all compute with the same numbers.
        forward, backward: names of backends; the same if only one is given.
        grad_out: [B, H, num_queries, E]; None: random normal values from a fixed seed.

    Raises:
        AssertionError: a result is outside its tolerance, or not finite where the oracle's is.
    """
    call = convert(call, dtype)
    exact = convert(call, torch.float64)
    if grad_out is None:
        shape = (*call.query.shape[:2], call.n_queries, call.value.shape[3])
        grad_out = torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    grad_out = grad_out.to(dtype).double()
    oracle = results(exact, "reference", "reference", grad_out)
    same_dtype = results(call, "reference", "reference", grad_out)
    actual = results(call, forward, backward or forward, grad_out)
    terms = rounding_terms(exact, grad_out)
    assert torch.equal(actual["self_only"], oracle["self_only"]), "self_only differs from the oracle's"
    for name in NAMES:
        rounded = torch.float32 if name == "lse" and dtype != torch.float64 else dtype
        rounding = (
            torch.finfo(rounded).eps * terms[name] * (2 if dtype == torch.float64 else 1)
        )  # the oracle rounds, too
        tolerance = 2 * _error(same_dtype[name], oracle[name]) + rounding
        error = _error(actual[name], oracle[name])
        assert error <= tolerance, (
            f"{name} of {forward}/{backward or forward} in {dtype} is off by {error:.3g}, allowed {tolerance:.3g} "
            f"(query {list(call.query.shape)}, chunk_length {call.chunk_length}, {call.rules.differences()})"
        )
