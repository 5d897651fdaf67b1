"""What padding holds never matters to the drop-ins, and what a float mask learns does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import reformer_kernels as rk
from reformer_kernels.modules.multihead import LSHMultiheadAttention

from .rounding import assert_equal_to_rounding

E, H, N, L = 16, 4, 2, 100
groupings = pytest.mark.parametrize("grouping", ["position", "hash"])


def close(a: Any, b: Any) -> None:
    assert_equal_to_rounding(a, b, 2 * (2 * E + E + 200))


def long(**options: Any) -> LSHMultiheadAttention:
    options = {"batch_first": True, "budget": 16, "chunk_length": 8, "dtype": torch.float64, **options}
    return LSHMultiheadAttention(E, H, **options)


def r(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def padding() -> Tensor:
    return torch.arange(L) >= torch.tensor([[L], [60]])


# Self-attention


@groupings
def test_self_attention_by_value(grouping: str) -> None:
    m, x, pad = long(grouping=grouping), r(N, L, E), padding()
    norm = nn.LayerNorm(E, dtype=torch.float64)
    noise = torch.where(pad[..., None], 1e3 * r(N, L, E), x)
    with torch.no_grad():
        expected = m(norm(x), norm(x), norm(x), pad)[0][~pad]
        y = norm(x)
        for given in ((y, y, y), (y, y.clone(), y), (y.clone(), y, y.clone())):
            close(m(*given, pad)[0][~pad], expected)
        close(m(norm(noise), norm(noise), norm(noise), pad)[0][~pad], expected)
        rows = torch.func.vmap(lambda z, p: m(z[None], z[None], z[None], p[None])[0][0])(y, pad)
        close(rows[~pad], expected)
        blind = torch.zeros(N, L, dtype=torch.bool)
        assert not torch.allclose(m(y, y, y, pad, query_padding_mask=blind)[0][~pad], expected)  # padding has a say


def test_reentrant_checkpointing_gives_the_same_gradients() -> None:
    m, x, pad = long(), r(N, L, E).requires_grad_(), padding()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = m(q, k, v, pad, need_weights=False)[0]
        return out

    gradients = []
    for out in (attend(x, x, x), checkpoint(attend, x, x, x, use_reentrant=True)):
        for tensor in (x, *m.parameters()):
            tensor.grad = None
        out[~pad].square().sum().backward()
        grads: list[Any] = [tensor.grad for tensor in (x, *m.parameters())]
        gradients.append([grad.clone() for grad in grads])
    close(*gradients)


@groupings
def test_function(grouping: str) -> None:
    pad = padding()
    options: dict[str, Any] = {"budget": 16, "chunk_length": 8, "grouping": grouping}
    x = [r(N, H, L, 8) for _ in range(3)]
    noisy = [torch.where(pad[:, None, :, None], 1e3 * r(N, H, L, 8), y) for y in x]
    real = ~pad[:, None, :, None]
    a, b = (rk.scaled_dot_product_attention(q, k, v, key_padding_mask=pad, **options) * real for q, k, v in (x, noisy))
    assert torch.equal(a, b)
    # Of another length than the keys, its padding has to be said.
    q, k, v = x[0][:, :, :90], x[1], x[2]
    noisy_q = noisy[0][:, :, :90]
    of_query: dict[str, Any] = {"query_padding_mask": pad[:, :90]}
    a, b = (rk.scaled_dot_product_attention(y, k, v, **of_query, **options) * real[:, :, :90] for y in (q, noisy_q))
    assert torch.equal(a, b)
    a, b = (rk.scaled_dot_product_attention(y, k, v, **options) * real[:, :, :90] for y in (q, noisy_q))
    assert not torch.equal(a, b)
    # Leading dimensions, and a query without heads.
    split = [y.unflatten(0, (N, 1)) for y in (q, k, v)]
    out = rk.scaled_dot_product_attention(*split, query_padding_mask=pad[:, None, :90], **options)
    assert torch.equal(out[:, 0], rk.scaled_dot_product_attention(q, k, v, **of_query, **options))
    q, k, v = (y[:, 0] for y in (q, k, v))
    out = rk.scaled_dot_product_attention(q, k, v, **of_query, **options)
    q, k, v = (y[:, None] for y in (q, k, v))
    assert torch.equal(out, rk.scaled_dot_product_attention(q, k, v, **of_query, **options)[:, 0])


# Cross-attention


@pytest.mark.parametrize("layout", ["batch_first", "length_first", "unbatched"])
@groupings
def test_query_padding_mask(grouping: str, layout: str) -> None:
    m, pad = long(grouping=grouping, batch_first=layout == "batch_first"), padding()
    q, kv = r(N, L, E), r(N, 120, E)
    noisy = torch.where(pad[..., None], 1e3 * r(N, L, E), q)

    def run(query: Tensor, mask: Tensor | None) -> Tensor:
        if layout == "unbatched":
            rows = [
                m(a, b, b, query_padding_mask=None if mask is None else mask[i])[0]
                for i, (a, b) in enumerate(zip(query, kv, strict=True))
            ]
            return torch.stack(rows)[~pad]
        if layout == "length_first":
            out = m(query.transpose(0, 1), kv.transpose(0, 1), kv.transpose(0, 1), query_padding_mask=mask)[0]
            out = out.transpose(0, 1)
        else:
            out = m(query, kv, kv, query_padding_mask=mask)[0]
        real: Tensor = out[~pad]
        return real

    assert torch.equal(run(q, pad), run(noisy, pad))
    assert not torch.equal(run(q, None), run(noisy, None))


def test_exact_attention_needs_no_query_padding_mask() -> None:
    m, x, pad = long(exact_below=L), r(N, L, E), padding()
    assert torch.equal(m(x, x, x, pad, query_padding_mask=pad)[0], m(x, x, x, pad)[0])
    out = rk.scaled_dot_product_attention(x, x, x, query_padding_mask=pad, exact_below=L)
    assert torch.equal(out, F.scaled_dot_product_attention(x, x, x))


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.zeros(N, L + 1, dtype=torch.bool), ValueError, r"query_padding_mask must have shape \[2, 100\]"),
        (torch.zeros(L, dtype=torch.bool), ValueError, "query_padding_mask must have 2 dimensions"),
        (torch.zeros(N, L), TypeError, r"query_padding_mask must have dtype torch.bool, got torch.float32"),
        ("mask", TypeError, "query_padding_mask must be a torch.Tensor, got str"),
    ],
)
def test_errors_of_the_query_padding_mask(mask: Any, error: type[Exception], message: str) -> None:
    x = r(N, L, E)
    for exact_below in (0, L):
        with pytest.raises(error, match=message):
            long(exact_below=exact_below)(x, x, x, query_padding_mask=mask)
        with pytest.raises(error, match=message):
            rk.scaled_dot_product_attention(x, x, x, query_padding_mask=mask, exact_below=exact_below)


def test_shared_qk_takes_copies() -> None:
    m, x, pad = long(shared_qk=True, budget=128), r(N, L, E), padding()
    x[0, 0, 0] = torch.nan  # is equal to nothing, and no reason to take the key for another sequence
    expected = m(x, x, x, pad, need_weights=False)[0]
    assert torch.equal(m(x, x.clone(), x.clone(), pad, need_weights=False)[0].nan_to_num(), expected.nan_to_num())
    for other in (x + 1, x[:, 1:]):
        with pytest.raises(ValueError, match="key must be query with shared_qk=True"):
            m(x, other, other, need_weights=False)
    with pytest.raises(ValueError, match="query_padding_mask must be None with shared_qk=True"):
        m(x, x, x, need_weights=False, query_padding_mask=pad)


# Masks that learn


@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_a_bias_that_starts_at_zero_learns(need_weights: bool, leaf: bool) -> None:
    stock = nn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64)
    x, gradients = r(N, L, E), []
    for exact_below in (None, L, 0):
        m = stock
        if exact_below is not None:  # a budget of all keys, so that all three are the same function
            m = long(budget=128, exact_below=exact_below)
            m.load_state_dict(stock.state_dict())
        source = torch.zeros(N, L, dtype=torch.float64, requires_grad=True)
        bias = source if leaf else 2 * source
        m(x, x, x, key_padding_mask=bias, need_weights=need_weights)[0].square().sum().backward()
        gradients.append(source.grad)
        assert source.grad is not None and source.grad.abs().sum() > 0
        by_func = torch.func.grad(lambda b, m=m: m(x, x, x, b, need_weights=need_weights)[0].square().sum())(
            source.detach()
        )
        close(by_func, source.grad / (1 if leaf else 2))
    close(gradients[1], gradients[0])
    close(gradients[2], gradients[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # torch's own
def test_a_zero_bias_is_dropped_where_nothing_depends_on_it() -> None:
    m, x = long(), r(N, L, E)
    bias = torch.zeros(N, L, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        without = m(x, x, x)[0]
        assert torch.equal(m(x, x, x, bias)[0], without) and torch.equal(m(x, x, x, bias.detach())[0], without)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        m(x, x, x, torch.autograd.forward_ad.make_dual(bias.detach(), bias.detach()))


def test_a_learned_mask_is_not_dropped_by_the_causal_hint() -> None:
    m, x = long(), r(N, L, E)
    mask = torch.zeros(L, L, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="attn_mask must not require a gradient"):
        m(x, x, x, padding(), need_weights=False, attn_mask=mask, is_causal=True)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # torch's own
def test_no_transform_hides_that_a_mask_learns() -> None:
    x, masks = torch.randn(1, 2, 20, 8), torch.zeros(3, 1, 1, 20, 20)
    for function in (
        lambda mask: rk.lsh_attention(x, x, attn_mask=mask),
        lambda mask: rk.local_attention(x, x, x, attn_mask=mask),
        lambda mask: rk.clustered_attention(x, x, x, attn_mask=mask),
    ):
        with pytest.raises(ValueError, match="attn_mask must not require a gradient"):
            torch.func.grad(lambda m, f=function: torch.func.vmap(f)(m).sum())(masks)
        with pytest.raises(RuntimeError, match="forward-mode derivatives of"):
            torch.func.jvp(function, (masks[0],), (masks[0],))
