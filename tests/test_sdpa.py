"""scaled_dot_product_attention against torch's."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reformer_kernels.sdpa import scaled_dot_product_attention

from .rounding import assert_equal_to_rounding

PATHS: dict[str, dict[str, Any]] = {"exact": {}, "long": {"exact_below": 0}}  # budget 128: both see every key
paths = pytest.mark.parametrize("path", PATHS)
L, S, D = 7, 9, 8


def r(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def check(path: str, q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> None:
    """Equal to torch's function, gradients too."""
    outs = [
        scaled_dot_product_attention(q, k, v, **arguments, **PATHS[path]),
        F.scaled_dot_product_attention(q, k, v, **arguments),
    ]
    results = [(out, *torch.autograd.grad(out.square().sum(), [q, k, v])) for out in outs]
    assert_equal_to_rounding(results[0], results[1], 2 * (q.shape[-1] + k.shape[-2]))


def test_signature_begins_as_torchs() -> None:
    names = list(inspect.signature(scaled_dot_product_attention).parameters)
    assert names[:8] == ["query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"]


@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (2, 3, 2), (1, 2, 3, 2)])
@pytest.mark.parametrize("arguments", [{}, {"is_causal": True}, {"scale": 0.3}, {"is_causal": True, "scale": -1}])
@paths
def test_leading_dimensions(path: str, arguments: dict[str, Any], lead: tuple[int, ...]) -> None:
    check(path, r(*lead, L, D), r(*lead, S, D), r(*lead, S, 5), **arguments)


@paths
def test_broadcasting(path: str) -> None:
    check(path, r(2, 4, L, D), r(1, 4, S, D), r(2, 1, S, D))
    check(path, r(2, 3, 4, L, D), r(3, 4, S, D), r(1, 1, 4, S, D))


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize(
    "shape", [(L, S), (1, S), (L, 1), (4, L, S), (2, 4, L, S), (2, 1, 1, S), (1, 4, L, S), (3, 2, 1, L, S)]
)
@paths
def test_masks(path: str, shape: tuple[int, ...], kind: str) -> None:
    mask = torch.rand(shape) < 0.7
    mask[..., 0] = True
    if kind == "float":
        mask = torch.randn(shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    lead = (3, 2, 4) if len(shape) == 5 else (2, 4)
    check(path, r(*lead, L, D), r(*lead, S, D), r(*lead, S, D), attn_mask=mask)
    if len(shape) < 4:
        check(path, r(4, L, D), r(4, S, D), r(4, S, D), attn_mask=mask)


@pytest.mark.parametrize("lead", [(), (2,), (3, 2)])
@paths
def test_grouped_heads(path: str, lead: tuple[int, ...]) -> None:
    check(path, r(*lead, 6, L, D), r(*lead, 2, S, D), r(*lead, 2, S, D), enable_gqa=True)


@pytest.mark.parametrize("lead", [(), (2,), (2, 4), (3, 2, 4)])
@pytest.mark.parametrize("extra", ["none", "causal", "bool", "float"])
@paths
def test_key_padding_mask(path: str, extra: str, lead: tuple[int, ...]) -> None:
    q, k, v = (r(*lead, n, D) for n in (L, S, S))
    batch = lead if len(lead) == 1 else lead[:-1]
    padding = torch.arange(S).expand(*batch, S) >= torch.randint(1, S, (*batch, 1))
    padding[..., 0] = False
    seen = torch.rand(L, S) < 0.7
    seen[:, 0] = True
    choices: dict[str, dict[str, Any]] = {
        "none": {},
        "causal": {"is_causal": True},
        "bool": {"attn_mask": seen},
        "float": {"attn_mask": torch.randn(L, S, dtype=torch.float64).masked_fill(~seen, -torch.inf)},
    }
    arguments = choices[extra]
    out = scaled_dot_product_attention(q, k, v, **arguments, key_padding_mask=padding, **PATHS[path])
    mask = torch.zeros(L, S, dtype=torch.float64)
    if extra == "causal":
        mask = mask.masked_fill(torch.ones(L, S, dtype=torch.bool).triu(1), -torch.inf)
    elif extra == "bool":
        mask = mask.masked_fill(~seen, -torch.inf)
    elif extra == "float":
        mask = arguments["attn_mask"]
    rows = padding[..., None, :] if len(lead) < 2 else padding[..., None, None, :]
    expected = F.scaled_dot_product_attention(q, k, v, mask.masked_fill(rows, -torch.inf))
    assert_equal_to_rounding(out, expected, D + S)


@paths
def test_a_query_without_keys_gives_zero(path: str) -> None:
    q, k, v = r(2, 4, L, D), r(2, 4, S, D), r(2, 4, S, D)
    mask = torch.ones(L, S, dtype=torch.bool)
    mask[3] = False
    out = scaled_dot_product_attention(q, k, v, mask, **PATHS[path])
    assert (out[:, :, 3] == 0).all() and (out[:, :, 4] != 0).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), [q, k, v]))
    out = scaled_dot_product_attention(q, k, v, key_padding_mask=torch.tensor([[True], [False]]).expand(2, S))
    assert (out[0] == 0).all() and (out[1] != 0).all()


@paths
def test_dropout_comes_from_torch(path: str) -> None:
    x = r(2, 4, S, D)
    state = torch.get_rng_state()
    scaled_dot_product_attention(x, x, x, **PATHS[path])
    assert torch.equal(torch.get_rng_state(), state)
    first, second = (scaled_dot_product_attention(x, x, x, None, 0.4, **PATHS[path]) for _ in range(2))
    torch.set_rng_state(state)
    assert torch.equal(scaled_dot_product_attention(x, x, x, None, 0.4, **PATHS[path]), first)
    assert not torch.equal(first, second)


def test_options_reach_the_attention() -> None:
    x = r(1, 2, 200, D)
    options: dict[str, Any] = {"budget": 32, "chunk_length": 16}
    out = scaled_dot_product_attention(x, x, x, **options)
    exact = F.scaled_dot_product_attention(x, x, x)
    assert not torch.allclose(out, exact)
    torch.testing.assert_close(scaled_dot_product_attention(x, x, x, exact_below=200, **options), exact)
    for name, value in {"budget": 64, "local_fraction": 0.75, "rest_term": False, "grouping": "hash"}.items():
        assert not torch.equal(scaled_dot_product_attention(x, x, x, **{**options, name: value}), out)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"budget": 0}, ValueError, "budget must be at least 1, got 0"),
        ({"exact_below": -1}, ValueError, "exact_below must be at least 0, got -1"),
        ({"grouping": "x"}, ValueError, "grouping must be one of"),
        ({"key_padding_mask": torch.zeros(S, dtype=torch.bool)}, ValueError, "key_padding_mask must have 2 dimensions"),
        ({"key_padding_mask": torch.zeros(2, S)}, TypeError, "key_padding_mask must have dtype torch.bool"),
        ({"key_padding_mask": torch.zeros(2, L, dtype=torch.bool)}, ValueError, "key_padding_mask must have shape"),
        ({"attn_mask": torch.ones(L, S) > 0, "is_causal": True}, RuntimeError, "Explicit attn_mask should not be set"),
        ({"key": torch.zeros(2, 2, S, D)}, RuntimeError, "."),
        ({"key": torch.zeros(2, 3, S, D), "enable_gqa": True}, (RuntimeError, ValueError), "."),
        ({"value": torch.zeros(2, 4, L, D)}, (RuntimeError, ValueError), "."),
        ({"key": torch.zeros(2, 4, S, 3)}, (RuntimeError, ValueError), "."),
    ],
)
@paths
def test_errors(path: str, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    x = {"query": torch.zeros(2, 4, L, D), "key": torch.zeros(2, 4, S, D), "value": torch.zeros(2, 4, S, D)}
    with pytest.raises(error, match=message):
        scaled_dot_product_attention(**{**x, **PATHS[path], **arguments})


def test_compile_with_dynamic_length() -> None:
    torch._dynamo.reset()

    def f(x: Tensor) -> Tensor:
        return scaled_dot_product_attention(x, x, x, is_causal=True, budget=32, chunk_length=16)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (20, 200, 300):
        x = torch.randn(2, 4, length, D)
        torch.testing.assert_close(compiled(x), f(x))
