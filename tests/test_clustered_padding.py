"""Clustered attention of a sequence does not depend on what it is padded to, nor on what padding holds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import reformer_kernels as rk
from reformer_kernels.backends import reference
from reformer_kernels.testing import capture

from .rounding import assert_equal_to_rounding

BACKENDS = ("cpu", "reference")
LENGTHS = {"self": ((61, 61), (40, 40), (9, 9)), "cross": ((61, 33), (20, 61), (40, 40))}  # of queries and keys
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "hash": {"grouping": "hash"},
    "hash, causal": {"grouping": "hash", "causal": True},
    "all local": {"local_fraction": 1.0},
    "budget of the shortest": {"budget": 45, "grouping": "hash", "rest_term": False},
    "long chunks": {"chunk_length": 70},
    "float mask": {"attn_mask": True},
}


def problem(kind: str, padded: int, dtype: torch.dtype) -> tuple[list[tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """Query, key and value of sequences of different lengths, alone; and a batch of all, with its two masks."""
    alone = [
        tuple(torch.randn(1, heads, n, 8).to(dtype) for heads, n in ((2, length), (1, size), (1, size)))
        for length, size in LENGTHS[kind]
    ]
    rows, masks = [], []
    for tensors in zip(*alone, strict=True):
        longest = max(x.shape[2] for x in tensors) + padded
        row = torch.full((len(tensors), tensors[0].shape[1], longest, 8), torch.nan, dtype=dtype)
        mask = torch.ones(len(tensors), longest, dtype=torch.bool)
        for i, x in enumerate(tensors):
            row[i, :, : x.shape[2]], mask[i, : x.shape[2]] = x[0], False
        rows.append(row)
        masks.append(mask)
    return alone, (*rows, masks[0], masks[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("kind", "padded"), list(itertools.product(LENGTHS, (0, 19))))
def test_a_result_does_not_depend_on_its_batch(kind: str, padded: int, mode: str, backend: str) -> None:
    alone, (query, key, value, query_mask, key_mask) = problem(kind, padded, torch.float64)
    query, key, value = (x.nan_to_num(7.0).requires_grad_() for x in (query, key, value))
    options: dict[str, Any] = {"budget": 12, "chunk_length": 8, "backend": backend, **MODES[mode]}
    mask = None
    if options.pop("attn_mask", None):
        mask = torch.randn(1, 1, query.shape[2], key.shape[2], dtype=torch.float64)
    masks: dict[str, Any] = {"key_padding_mask": key_mask}
    if kind == "cross":
        masks["query_padding_mask"] = query_mask  # otherwise it is that of the keys
    out = rk.clustered_attention(query, key, value, attn_mask=mask, **masks, **options)
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, (query, key, value), upstream.masked_fill(query_mask[:, None, :, None], 0.0))
    for i, tensors in enumerate(alone):
        q, k, v = (x.clone().requires_grad_() for x in tensors)
        length, size = q.shape[2], k.shape[2]
        own = None if mask is None else mask[..., :length, :size]
        expected = rk.clustered_attention(q, k, v, attn_mask=own, **options)
        # A score has a product of 8 terms, its exponential as many as it is large; the keys are summed, for the rest
        # once more, in a gradient the queries, too.
        roundings = 8 + math.ceil(float((q @ k.mT).detach().abs().max())) + 2 * size + length
        assert_equal_to_rounding(out[i : i + 1, :, :length], expected, roundings)
        own_grads = torch.autograd.grad(expected, (q, k, v), upstream[i : i + 1, :, :length])
        for x, grad, own_grad in zip((q, k, v), grads, own_grads, strict=True):
            assert_equal_to_rounding(grad[i : i + 1, :, : x.shape[2]], own_grad, roundings)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"rest_term": False}], ids=str)
@pytest.mark.parametrize("grouping", ["position", "hash"])
def test_what_padding_holds_has_no_effect(grouping: str, options: dict[str, Any], side: str, backend: str) -> None:
    _, (query, key, value, _, mask) = problem("self", 19, torch.float32)
    if side == "left":
        query, key, value, mask = (x.flip(1 if x.dim() == 2 else 2) for x in (query, key, value, mask))
    attend: Callable[..., Tensor] = partial(
        rk.clustered_attention, budget=12, chunk_length=8, grouping=grouping, key_padding_mask=mask, backend=backend,
        **options,
    )  # fmt: skip
    padded = mask[:, None, :, None]
    results = []
    for garbage in (0.0, 1e4, torch.inf, torch.nan):
        q, k, v = (x.masked_fill(padded, garbage) for x in (query, key, value))
        weights = reference.dense_weights(capture(attend, q, k, v, op="list_attention"))
        found = [x.masked_fill(padded, 0.0) for x in (attend(q, k, v), weights)]
        # A padded query attends keys as others do: its gradient reaches them.
        q, k, v = (x.requires_grad_() for x in (q.masked_fill(padded, 0.0), k, v))
        found += torch.autograd.grad(attend(q, k, v).masked_fill(padded, 0.0).sum(), (q, k, v))
        results.append(found)
        assert all(map(torch.equal, results[0], found))


@pytest.mark.parametrize("mean", [0.0, 5.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_hashed_groups_are_those_of_the_sequence_alone(dtype: torch.dtype, mean: float) -> None:
    """Also where the mean is larger than what it is subtracted from differs, and sums of float16 overflow."""

    def order(query: Tensor, mask: Tensor | None) -> Tensor:
        key, options = query[:, :, :1], {"grouping": "hash", "query_padding_mask": mask}
        call = capture(rk.clustered_attention, query, key, key, op="select_keys", **options)
        hashed: Tensor = call.order[:, :, 1]
        return hashed

    for length, longest in ((1000, 1024), (700, 1100), (4096, 4096)):
        query = (torch.randn(1, 2, longest, 16, dtype=torch.float64) + mean).to(dtype)
        alone = order(query[:, :, :length], None)
        mask = torch.arange(longest)[None] >= length
        assert torch.equal(order(query, mask)[:, :, :length], alone)
        assert not torch.equal(alone, torch.arange(length).expand_as(alone))


def test_fewer_keys_than_the_budget_are_all_attended() -> None:
    """However long the batch is: exact for the short sequence, and by all its keys."""
    query, key, value = (torch.randn(1, 1, 300, 8) for _ in range(3))
    mask = torch.arange(300)[None] >= 100
    for grouping in ("position", "hash"):
        out = rk.clustered_attention(query, key, value, budget=100, grouping=grouping, key_padding_mask=mask)
        exact = torch.nn.functional.scaled_dot_product_attention(query[:, :, :100], key[:, :, :100], value[:, :, :100])
        torch.testing.assert_close(out[:, :, :100], exact)


def test_a_given_query_mask_goes_first() -> None:
    query, key, value = (torch.randn(1, 1, 40, 8) for _ in range(3))
    mask, none = torch.arange(40)[None] >= 30, torch.zeros(1, 40, dtype=torch.bool)
    for given, expected in ((None, mask), (none, none)):
        call = capture(
            rk.clustered_attention, query, key, value, op="select_keys", budget=8, key_padding_mask=mask,
            query_padding_mask=given,
        )  # fmt: skip
        assert torch.equal(call.query_padding_mask, expected)
