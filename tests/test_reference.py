"""The oracle: against loops, against tiny cases worked out by hand, and its backward against autograd."""

import math
from typing import Any

import pytest
import torch

import reformer_kernels as rk
from reformer_kernels import testing
from reformer_kernels._calls import AttentionCall
from reformer_kernels.backends import reference

from . import naive

R = rk.AttentionRules
RULES = [R(), R.paper(), R(dedup="log_count"), R(key_norm="l2", scale=None), R(mask_padded_queries=True)]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "before and after": {"chunks_before": 2, "chunks_after": 1},
    "own chunk only": {"chunks_before": 0, "causal": True},
    "bucket": {"alignment": "bucket", "causal": True},
    "bucket, after": {"alignment": "bucket", "chunks_after": 1},
    "context": {"num_queries": 9, "causal": True},
}


def case(length: int, options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
    query = torch.randn(2, 2, length, 5, dtype=torch.float64)
    value = torch.randn(2, 2, length, 3, dtype=torch.float64)
    buckets = torch.randint(0, 4, (2, 2, 3, length), dtype=torch.int32)
    options = dict(options)
    if "num_queries" in options:
        options["num_queries"] = min(length, options["num_queries"])
    return query, value, buckets, options


@pytest.mark.parametrize("length", [1, 2, 8, 13, 16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("rules", RULES, ids=lambda r: str(r.differences()))
def test_equals_loops(rules: rk.AttentionRules, options: dict[str, Any], length: int) -> None:
    query, value, buckets, options = case(length, options)
    masks: dict[str, Any] = {
        "key_padding_mask": torch.rand(2, length) < 0.3,
        "attn_mask": torch.randn(2, 1, options.get("num_queries", length), length, dtype=torch.float64),
    }
    extras: list[dict[str, Any]] = [{}, masks, {"attn_mask": masks["attn_mask"] > 0.5}]
    for extra in extras:
        expected = naive.lsh_attention(query, value, buckets, chunk_length=4, rules=rules, **options, **extra)
        actual = rk.lsh_attention(
            query, value, buckets=buckets, n_hashes=3, n_buckets=4, chunk_length=4, rules=rules, backend="reference",
            **options, **extra,
        )  # fmt: skip
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("length", [0, 1, 2, 4, 13, 16])
@pytest.mark.parametrize("alignment", ["ring", "bucket"])
@pytest.mark.parametrize("rules", RULES, ids=lambda r: str(r.differences()))
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_shifted_keys_equal_loops(backend: str, rules: rk.AttentionRules, alignment: str, length: int) -> None:
    query, value, buckets, _ = case(length, {})
    extras: list[dict[str, Any]] = [{}, {"key_padding_mask": torch.rand(2, length) < 0.4}]
    for extra in extras:
        options: dict[str, Any] = {"causal": True, "alignment": alignment, "shift_keys": True, "rules": rules, **extra}
        expected = naive.lsh_attention(query, value, buckets, chunk_length=4, **options)
        actual = rk.lsh_attention(
            query, value, buckets=buckets, n_hashes=3, n_buckets=4, chunk_length=4, backend=backend, **options
        )
        torch.testing.assert_close(actual, expected)


def test_shifted_keys_find_what_came_after() -> None:
    """By hand: each of a, b, a, c, a, b sees what followed its like, or if it has none before it, what followed any."""
    a, b, c = ([1000.0 if i == j else 0.0 for j in range(3)] for i in range(3))
    query = torch.tensor([[[a, b, a, c, a, b]]], dtype=torch.float64)
    value = torch.arange(6.0, dtype=torch.float64).view(1, 1, 6, 1)
    options: dict[str, Any] = {"causal": True, "shift_keys": True, "chunk_length": 8}
    out = rk.lsh_attention(query, value, **options).flatten()
    # a at 2: after a came 1; at 4: 1 and 3; b at 5: after b came 2. New ones see all: 1; 1, 2, 3.
    expected = torch.tensor([0, 1, 1, 2, 2, 2], dtype=torch.float64)
    torch.testing.assert_close(out, expected)
    assert torch.equal(rk.lsh_attention(query[:, :, :3], value[:, :, :3], **options).flatten(), out[:3])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradients_of_shifted_keys(backend: str) -> None:
    query, value, buckets, _ = case(11, {})
    query, value = query.requires_grad_(), value.requires_grad_()
    padding = torch.rand(2, 11) < 0.3

    def attend(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return rk.lsh_attention(
            query, value, buckets=buckets, n_hashes=3, n_buckets=4, chunk_length=4, causal=True, shift_keys=True,
            key_padding_mask=padding, backend=backend,
        )  # fmt: skip

    assert torch.autograd.gradcheck(attend, (query, value))


def test_two_tokens_by_hand() -> None:
    query = torch.tensor([[[[3.0, 4.0], [0.0, 2.0]]]], dtype=torch.float64)
    value = torch.tensor([[[[1.0], [10.0]]]], dtype=torch.float64)
    # Each token sees only the other one, whatever the scores; alone, or causally first, it sees itself.
    assert rk.lsh_attention(query, value, backend="reference").flatten().tolist() == [10.0, 1.0]
    assert rk.lsh_attention(query, value, causal=True, backend="reference").flatten().tolist() == [1.0, 1.0]
    assert rk.lsh_attention(query[:, :, :1], value[:, :, :1], backend="reference").item() == 1.0


def test_three_tokens_by_hand() -> None:
    query = torch.tensor([[[[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]]]], dtype=torch.float64)
    value = torch.tensor([[[[1.0], [2.0], [4.0]]]], dtype=torch.float64)
    out = rk.lsh_attention(query, value, causal=True, backend="reference").flatten()
    # Token 2 scores 2 with the unit key of token 0 and 0 with token 1; the norm's 1e-6 is below 1e-5 here.
    expected = (math.exp(2) * 1 + 1 * 2) / (math.exp(2) + 1)
    assert out[0] == 1.0 and out[1] == 1.0
    assert out[2].item() == pytest.approx(expected, rel=1e-5)


def test_hash_by_hand() -> None:
    x = torch.tensor([[[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0], [0.0, 0.0]]]])
    rotations = torch.eye(2).view(1, 1, 2, 1, 2)
    for backend in ("reference", "cpu"):
        assert rk.hash_buckets(x, rotations, 4, backend=backend).flatten().tolist() == [0, 1, 2, 3, 0]
        # Two factors of two: digit one is the sign of x0, digit two that of x1.
        assert rk.hash_buckets(x, rotations, [2, 2], backend=backend).flatten().tolist() == [0, 0, 1, 2, 0]


def test_order_by_hand() -> None:
    buckets = torch.tensor([2, 0, 2, 1, 0], dtype=torch.int32).view(1, 1, 1, 5)
    for backend in ("reference", "cpu"):
        assert rk.bucket_order(buckets, 3, backend=backend).flatten().tolist() == [1, 4, 3, 0, 2]


@pytest.mark.parametrize("length", [1, 2, 16, 41])
@pytest.mark.parametrize("options", [*OPTIONS.values(), {"dropout_p": 0.4, "dropout_seed": torch.tensor([3])}])
@pytest.mark.parametrize("rules", [*RULES, R.lucidrains(), R.huggingface()], ids=lambda r: str(r.differences()))
def test_backward_equals_autograd(rules: rk.AttentionRules, options: dict[str, Any], length: int) -> None:
    query, value, buckets, options = case(length, options)
    extras: list[dict[str, Any]] = [{}, {"key_padding_mask": torch.rand(2, length) < 0.4}]
    for extra in extras:
        call = testing.capture(
            rk.lsh_attention, query, value, buckets=buckets, n_hashes=3, n_buckets=4, chunk_length=8, rules=rules,
            **options, **extra,
        )  # fmt: skip
        _compare_with_autograd(call)


@pytest.mark.parametrize("causal", [False, True])
def test_local_backward_equals_autograd(causal: bool) -> None:
    query, key = torch.randn(2, 1, 2, 21, 4, dtype=torch.float64)
    value = torch.randn(1, 2, 21, 3, dtype=torch.float64)
    _compare_with_autograd(testing.capture(rk.local_attention, query, key, value, chunk_length=4, causal=causal))


def _compare_with_autograd(call: AttentionCall) -> None:
    inputs = [x.detach().requires_grad_() for x in (call.query, call.value, call.key) if x is not None]
    call = call._replace(query=inputs[0], value=inputs[1], key=inputs[2] if call.key is not None else None)
    out, lse, self_only = reference.chunk_attention(call)
    grad_out = torch.randn_like(out)
    expected = torch.autograd.grad(out, inputs, grad_out)
    with torch.no_grad():
        query, key, value = reference.chunk_attention_backward(call, grad_out, out, lse, self_only)
    for actual, wanted in zip((query, value, key), expected, strict=False):
        torch.testing.assert_close(actual, wanted)


def test_local_equals_plain_attention_in_one_window() -> None:
    q, k, v = torch.randn(3, 2, 2, 30, 8, dtype=torch.float64)
    for causal in (False, True):
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        for backend in ("reference", "cpu"):
            actual = rk.local_attention(q, k, v, chunk_length=64, causal=causal, backend=backend)
            torch.testing.assert_close(actual, expected)
