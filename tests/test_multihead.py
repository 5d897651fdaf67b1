"""LSHMultiheadAttention against nn.MultiheadAttention: everything that callers of the stock module rely on."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrize, prune

from reformer_kernels import clustered
from reformer_kernels.modules.multihead import LSHMultiheadAttention

from .rounding import assert_equal_to_rounding

E, H = 16, 4
PATHS: dict[str, dict[str, Any]] = {"exact": {}, "long": {"exact_below": 0}}  # budget 128: both see every key
CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "batch_first": {"batch_first": True},
    "no_bias": {"bias": False, "batch_first": True},
    "odd_heads": {"num_heads": 1},
    "kdim": {"kdim": 6, "vdim": 10},
    "bias_kv": {"add_bias_kv": True, "batch_first": True},
    "zero_attn": {"add_zero_attn": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 6, "batch_first": True},
}
paths = pytest.mark.parametrize("path", PATHS)


def pair(path: str = "exact", **arguments: Any) -> tuple[nn.MultiheadAttention, LSHMultiheadAttention]:
    """A stock module and ours with the same values, none of which is 0."""
    arguments = {"embed_dim": E, "num_heads": H, "dtype": torch.float64, **arguments}
    stock, ours = nn.MultiheadAttention(**arguments), LSHMultiheadAttention(**arguments, **PATHS[path])
    with torch.no_grad():
        for p in stock.parameters():
            p.normal_(std=0.5)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def inputs(m: nn.MultiheadAttention, N: int = 2, L: int = 7, S: int = 9) -> list[Tensor]:
    """Query, key and value in the layout of the module, in its dtype."""
    shapes = ((L, E), (S, m.kdim), (S, m.vdim))
    sizes = [(N, n, e) if m.batch_first else (n, N, e) for n, e in shapes]
    return [torch.randn(size, dtype=m.out_proj.weight.dtype, requires_grad=True) for size in sizes]


def close(a: Any, b: Any) -> None:
    # Forward and backward of two projections, scores of one head's width, and up to 200 keys.
    assert_equal_to_rounding(a, b, 2 * (2 * E + E + 200))


def masks(name: str, N: int, heads: int, L: int, S: int) -> dict[str, Tensor]:
    """No row of them sees no key."""
    padding = torch.arange(S) >= torch.randint(S // 2, S, (N, 1))
    hidden = torch.rand(N * heads, L, S) < 0.3
    hidden[:, :, 0] = False
    minus: Any = {"dtype": torch.float64}
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "float_padding": {"key_padding_mask": torch.zeros(N, S, **minus).masked_fill(padding, -torch.inf)},
        "finite_padding": {"key_padding_mask": torch.randn(N, S, **minus).masked_fill(padding, -torch.inf)},
        "2d": {"attn_mask": hidden[0]},
        "3d": {"attn_mask": hidden, "key_padding_mask": padding},
        "float_2d": {"attn_mask": torch.randn(L, S, **minus)},
        "float_3d": {
            "attn_mask": torch.randn(N * heads, L, S, **minus).masked_fill(hidden, -torch.inf),
            "key_padding_mask": torch.randn(N, S, **minus).masked_fill(padding, -torch.inf),
        },
    }[name]


MASKS = ("none", "padding", "float_padding", "finite_padding", "2d", "3d", "float_2d", "float_3d")


# Construction


def test_signatures_begin_as_the_stock_ones() -> None:
    stock = list(inspect.signature(nn.MultiheadAttention.__init__).parameters.values())
    ours = list(inspect.signature(LSHMultiheadAttention.__init__).parameters.values())
    assert [(p.name, p.default, p.kind) for p in stock] == [(p.name, p.default, p.kind) for p in ours[: len(stock)]]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in ours[len(stock) :])
    forward = (inspect.signature(c.forward).parameters.values() for c in (nn.MultiheadAttention, LSHMultiheadAttention))
    a, b = ([(p.name, p.default, p.kind) for p in parameters] for parameters in forward)
    assert b == [*a, ("query_padding_mask", None, inspect.Parameter.KEYWORD_ONLY)]


@pytest.mark.parametrize("config", CONFIGS)
def test_state_and_random_numbers_are_the_stock_ones(config: str) -> None:
    states, made = [], []
    for kind in (nn.MultiheadAttention, LSHMultiheadAttention):
        torch.manual_seed(5)
        made.append(kind(**{"embed_dim": E, "num_heads": H, **CONFIGS[config]}))
        states.append(torch.get_rng_state())
    stock, ours = made
    assert isinstance(ours, nn.MultiheadAttention)
    assert torch.equal(*states)
    assert list(stock.state_dict()) == list(ours.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(stock.parameters(), ours.parameters(), strict=True))
    assert not list(ours.buffers())
    for a, b in ((stock, ours), (ours, stock)):
        with torch.no_grad():
            a.out_proj.weight.normal_()
        b.load_state_dict(a.state_dict(), strict=True)
        assert torch.equal(a.out_proj.weight, b.out_proj.weight)


def test_copies_and_saves() -> None:
    _, m = pair("long", batch_first=True)
    x = torch.randn(2, 9, E, dtype=torch.float64)
    expected = m(x, x, x)[0]
    file = io.BytesIO()
    torch.save(m, file)
    file.seek(0)
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), torch.load(file, weights_only=False)):
        assert torch.equal(other(x, x, x)[0], expected)
        assert other.options == m.options and len(other._forward_pre_hooks) == 1
    meta = LSHMultiheadAttention(E, H, batch_first=True, device="meta", exact_below=0)
    assert meta(*[torch.randn(2, 9, E, device="meta")] * 3)[0].shape == (2, 9, E)
    skipped = nn.utils.skip_init(LSHMultiheadAttention, E, H, batch_first=True, exact_below=0, dtype=torch.float64)
    for empty in (meta.to_empty(device="cpu").double(), skipped):
        empty.load_state_dict(m.state_dict())
        assert torch.equal(empty(x, x, x)[0], expected)


# Errors


@pytest.mark.parametrize("arguments", [(0, 1), (4, 0), (-4, 2), (10, 3)])
def test_construction_errors_are_the_stock_ones(arguments: tuple[int, int]) -> None:
    raised = []
    for kind in (nn.MultiheadAttention, LSHMultiheadAttention):
        with pytest.raises((ValueError, AssertionError)) as info:
            kind(*arguments)
        raised.append((info.type, str(info.value)))
    assert raised[0] == raised[1]


def r(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


ERRORS: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "rank": lambda m: m(r(1, 2, 7, E), r(9, 2, E), r(9, 2, E)),
    "key_rank": lambda m: m(r(7, 2, E), r(9, E), r(9, E)),
    "width": lambda m: m(r(7, 2, E + 1), r(9, 2, E), r(9, 2, E)),
    "key_width": lambda m: m(r(7, 2, E), r(9, 2, E + 1), r(9, 2, E + 1)),
    "value": lambda m: m(r(7, 2, E), r(9, 2, E), r(8, 2, E)),
    "batch": lambda m: m(r(7, 2, E), r(9, 3, E), r(9, 3, E)),
    "dtype": lambda m: m(r(7, 2, E).float(), r(9, 2, E).float(), r(9, 2, E).float()),
    "hint": lambda m: m(r(7, 2, E), r(7, 2, E), r(7, 2, E), is_causal=True),
    "mask_2d": lambda m: m(r(7, 2, E), r(9, 2, E), r(9, 2, E), attn_mask=r(9, 7)),
    "mask_3d": lambda m: m(r(7, 2, E), r(9, 2, E), r(9, 2, E), attn_mask=r(H, 7, 9)),
    "mask_4d": lambda m: m(r(7, 2, E), r(9, 2, E), r(9, 2, E), attn_mask=r(1, 1, 7, 9)),
    "mask_dtype": lambda m: m(r(7, 2, E), r(9, 2, E), r(9, 2, E), attn_mask=r(7, 9).int()),
    "padding": lambda m: m(r(7, 2, E), r(9, 2, E), r(9, 2, E), key_padding_mask=r(9, 2) > 0),
    "padding_rank": lambda m: m(r(7, 2, E), r(9, 2, E), r(9, 2, E), key_padding_mask=r(9) > 0),
    "padding_dtype": lambda m: m(r(7, 2, E), r(9, 2, E), r(9, 2, E), key_padding_mask=r(2, 9).int()),
    "unbatched_mask": lambda m: m(r(7, E), r(9, E), r(9, E), attn_mask=r(2, 7, 9)),
    "nested": lambda m: m(*[torch.nested.nested_tensor([r(3, E), r(5, E)], layout=torch.jagged)] * 3),
}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("case", ERRORS)
@paths
def test_errors_are_the_stock_ones(path: str, case: str, need_weights: bool) -> None:
    raised = []
    for m in pair(path):
        with pytest.raises((AssertionError, RuntimeError, ValueError, TypeError)) as info:
            ERRORS[case](lambda *a, m=m, **k: m(*a, **k, need_weights=need_weights))
        raised.append((info.type, str(info.value)))
    assert raised[0] == raised[1]


# Values


@pytest.mark.filterwarnings("ignore:Support for mismatched:UserWarning")
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("config", CONFIGS)
@paths
def test_equals_the_stock_module(path: str, config: str, mask: str, need_weights: bool) -> None:
    stock, ours = pair(path, **CONFIGS[config])
    x = inputs(stock)
    given = masks(mask, 2, stock.num_heads, 7, 9)
    results = []
    for m in (stock, ours):
        out, weights = m(*x, **given, need_weights=need_weights)
        parameters = [p for p in m.parameters() if p.requires_grad]
        total = out.square().sum() + (0 if weights is None else weights.square().sum())
        results.append((out, weights, *torch.autograd.grad(total, [*x, *parameters])))
    close(results[1], results[0])
    assert all(p.abs().sum() > 0 for p in results[1][2:])  # DDP wants a gradient for every parameter
    for average in (True, False):
        close(*(m(*x, **given, average_attn_weights=average) for m in (ours, stock)))


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("case", ["self", "key_is_value", "unbatched", "one_query", "one_key", "no_key", "no_batch"])
@pytest.mark.parametrize("config", ["default", "batch_first", "both"])
@paths
def test_shapes_and_layouts(path: str, config: str, case: str, inference: bool) -> None:
    stock, ours = (m.train(not inference) for m in pair(path, **CONFIGS[config]))
    sizes = {"one_query": {"L": 1}, "one_key": {"S": 1}, "no_key": {"S": 0}, "no_batch": {"N": 0}}.get(case, {})
    q, k, v = inputs(stock, **sizes)
    if case == "self" and config != "both":
        k = v = q
    elif case == "key_is_value" and config != "both":
        v = k
    elif case == "unbatched":
        q, k, v = ((x[0] if stock.batch_first else x[:, 0]) for x in (q, k, v))
    kept = [x.clone() for x in (q, k, v)]
    state = torch.get_rng_state()
    with torch.set_grad_enabled(not inference):
        for need_weights in (True, False):
            close(*(m(q, k, v, need_weights=need_weights) for m in (ours, stock)))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(kept, (q, k, v), strict=True))


@paths
def test_strides_and_batch_rows(path: str) -> None:
    stock, ours = pair(path, batch_first=True)
    wide = r(3, 9, 2 * E)
    for x in (wide[..., ::2], r(1, 9, E).expand(3, -1, -1), r(9, 3, E).transpose(0, 1)):
        close(ours(x, x, x), stock(x, x, x))
    x = r(3, 9, E)
    changed = x.clone()
    changed[1:] = 1e6
    assert torch.equal(ours(changed, changed, changed)[0][0], ours(x, x, x)[0][0])


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("config", ["default", "batch_first", "bias_kv"])
@paths
def test_causal_is_the_causal_mask(path: str, config: str, kind: str, need_weights: bool) -> None:
    stock, ours = pair(path, **CONFIGS[config])
    ours.options["causal"] = True
    x = inputs(stock, L=9)
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)
    if kind == "float":
        hidden = torch.zeros(9, 9, dtype=torch.float64).masked_fill(hidden, -torch.inf)
    expected = stock(*x, attn_mask=hidden, need_weights=need_weights)
    close(ours(*x, need_weights=need_weights), expected)
    close(ours(*x, attn_mask=hidden, need_weights=need_weights), expected)
    close(ours(*x, attn_mask=hidden, is_causal=True, need_weights=need_weights), expected)
    padding = masks("padding", 2, H, 9, 9)["key_padding_mask"]
    if kind == "float":
        padding = torch.zeros(2, 9, dtype=torch.float64).masked_fill(padding, -torch.inf)
    expected = stock(*x, padding, need_weights, hidden)
    close(ours(*x, padding, need_weights), expected)
    ours.options["causal"] = False
    close(ours(*x, padding, need_weights, hidden, is_causal=True), expected)


@paths
def test_a_wrong_hint_is_followed_where_the_stock_module_does(path: str) -> None:
    stock, ours = pair(path)
    x = inputs(stock, L=9)
    given = masks("3d", 2, H, 9, 9)
    for need_weights in (True, False):
        for padding in (None, given["key_padding_mask"]):
            if padding is None or need_weights or path == "exact":
                results = (m(*x, padding, need_weights, given["attn_mask"], is_causal=True) for m in (ours, stock))
                close(*results)


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", ["padding", "rows", "one_head"])
@paths
def test_a_row_without_keys_gives_the_bias(path: str, kind: str, need_weights: bool, inference: bool) -> None:
    _, m = pair(path, batch_first=True)
    m.train(not inference)
    x = r(2, 9, E).requires_grad_()
    empty = torch.zeros(2, H, 9, dtype=torch.bool)
    if kind == "padding":
        empty[0] = True
        given: dict[str, Any] = {"key_padding_mask": empty[:, 0]}
    else:
        empty[:, : 1 if kind == "one_head" else H, 3] = True
        given = {"attn_mask": empty.flatten(0, 1)[..., None].expand(-1, -1, 9)}
    with torch.set_grad_enabled(not inference):
        out, weights = m(x, x, x, **given, need_weights=need_weights, average_attn_weights=False)
    assert out.isfinite().all()
    close(out[empty.all(1)], m.out_proj.bias.expand_as(out[empty.all(1)]))
    if need_weights:
        close(weights.sum(-1), (~empty).double())
    if not inference:
        gradients = torch.autograd.grad(out.square().sum(), [x, *m.parameters()])
        assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize(
    ("options", "limit"),
    [({"budget": 16}, 16), ({"budget": 16, "exact_below": 24}, 24), ({"budget": 16, "add_bias_kv": True}, 15)],
)
def test_is_exact_up_to_the_limit(options: dict[str, Any], limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = Mock(wraps=clustered.attend)
    monkeypatch.setattr(clustered, "attend", attend)
    m = LSHMultiheadAttention(E, H, batch_first=True, **options)
    for length in (limit - 1, limit, limit + 1):
        for padding in (None, torch.zeros(2, length, dtype=torch.bool)):
            m(torch.randn(2, 40, E), *[torch.randn(2, length, E)] * 2, padding)
    assert [call.args[1].shape[2] for call in attend.mock_calls] == [limit + 1 + (m.bias_k is not None)] * 2


# Long sequences with a small budget


def long(**options: Any) -> LSHMultiheadAttention:
    torch.manual_seed(1)
    return LSHMultiheadAttention(E, H, batch_first=True, budget=32, chunk_length=16, dtype=torch.float64, **options)


@pytest.mark.parametrize(
    "options", [{}, {"grouping": "hash"}, {"rest_term": False}, {"causal": True}, {"add_bias_kv": True}]
)
def test_long_weights_make_the_output(options: dict[str, Any]) -> None:
    m, x = long(**options), r(2, 200, E)
    padding = torch.arange(200).expand(2, -1) >= 150
    out, weights = m(x, x, x, padding, average_attn_weights=False)
    close(weights.sum(-1), torch.ones(2, H, 200, dtype=torch.float64))
    assert (weights >= 0).all() and (weights[..., 150:200] == 0).all()
    if m.options["causal"]:
        assert (weights.triu(1) == 0).all()
    v = nn.functional.linear(x, m.in_proj_weight[2 * E :], m.in_proj_bias[2 * E :]).unflatten(-1, (H, -1))
    if m.bias_v is not None:
        v = torch.cat([v, m.bias_v.view(1, 1, H, -1).expand(2, -1, -1, -1)], 1)
    close(m.out_proj((weights @ v.transpose(1, 2)).transpose(1, 2).flatten(2)), out)
    close(m(x, x, x, padding, need_weights=False)[0], out)
    dense = nn.MultiheadAttention.forward(m, x, x, x, padding)[0]
    assert m.options["causal"] or not torch.allclose(dense, out)  # or this tests the exact path


@pytest.mark.parametrize("grouping", ["position", "hash"])
@pytest.mark.parametrize("kind", ["bool", "float", "mask", "float_mask", "3d"])
def test_masked_keys_do_not_leak(kind: str, grouping: str) -> None:
    m, x = long(grouping=grouping), r(2, 200, E)
    hidden = torch.rand(2, 200) < 0.3
    minus = torch.zeros(2, 200, dtype=torch.float64).masked_fill(hidden, -torch.inf)
    given: dict[str, Any] = {
        "bool": {"key_padding_mask": hidden},
        "float": {"key_padding_mask": minus},
        "mask": {"attn_mask": hidden[0].expand(200, -1)},
        "float_mask": {"attn_mask": minus[0].expand(200, -1)},
        "3d": {"attn_mask": hidden[:, None, None].expand(-1, H, 200, -1).flatten(0, 1)},
    }[kind]
    where = hidden if kind in ("bool", "float", "3d") else hidden[:1].expand(2, -1)
    y = x.masked_fill(where[..., None], 1e9)
    other = x.clone()  # not the query itself, so that padding is of the keys alone
    assert torch.equal(m(x, other, other, **given)[0], m(x, y, y, **given)[0])
    if kind in ("bool", "float"):  # in self-attention what padded rows hold has no effect on other rows at all
        real = ~hidden[..., None]
        assert torch.equal(m(x, x, x, **given)[0] * real, m(y, y, y, **given)[0].where(real, 0.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_very_negative_padding_is_a_mask(dtype: torch.dtype) -> None:
    m, x = long().to(dtype), torch.randn(2, 200, E, dtype=dtype)
    padding = torch.arange(200).expand(2, -1) >= 150
    expected = m(x, x, x, padding)
    for least in (-1e4, torch.finfo(dtype).min):
        assert all(map(torch.equal, m(x, x, x, torch.zeros(2, 200, dtype=dtype).masked_fill(padding, least)), expected))
    finite = m(x, x, x, torch.zeros(2, 200, dtype=dtype).masked_fill(padding, -20.0))[0]
    assert finite.isfinite().all() and not torch.equal(finite, expected[0])


@pytest.mark.parametrize("hint", [True, False])
def test_later_keys_do_not_leak(hint: bool) -> None:
    m, x = long(causal=not hint), r(1, 256, E)
    given = {"attn_mask": torch.ones(256, 256, dtype=torch.bool).triu(1), "is_causal": True} if hint else {}
    y = torch.cat([x[:, :128], torch.full_like(x[:, 128:], 1e9)], 1)
    a, b = (m(x, k, k, **given, need_weights=False)[0] for k in (x, y))
    close(a[:, :128], b[:, :128])  # a BLAS may round a row by its neighbours; what leaks is of the size of 1e9
    assert not torch.equal(a[:, 128:], b[:, 128:])


def test_dropout_comes_from_torch() -> None:
    for path in PATHS:
        stock, m = pair(path, dropout=0.5, batch_first=True)
        x, state = r(2, 9, E), torch.get_rng_state()
        first, second = m(x, x, x)[0], m(x, x, x)[0]
        torch.set_rng_state(state)
        assert torch.equal(m(x, x, x)[0], first) and not torch.equal(first, second)
        for given in ({}, {"key_padding_mask": torch.arange(9).expand(2, 9) > 6}):
            for need_weights in (True, False):
                results = []
                for module in (stock, m):
                    torch.set_rng_state(state)
                    results.append(module(x, x, x, need_weights=need_weights, **given))
                if path == "exact":
                    close(*results)
        weights = m(x, x, x, average_attn_weights=False)[1]
        assert 0.3 < (weights == 0).double().mean() < 0.7  # they are those after dropout
        m.eval()
        state = torch.get_rng_state()
        assert torch.equal(m(x, x, x)[0], m(x, x, x)[0]) and torch.equal(torch.get_rng_state(), state)


# What people hang on modules


def test_double_backward_of_the_exact_path() -> None:
    results = []
    modules = pair(batch_first=True)
    x = r(2, 5, E).requires_grad_()
    for given in ({}, {"key_padding_mask": torch.arange(5).expand(2, 5) > 3}):
        for m in modules:
            (first,) = torch.autograd.grad(m(x, x, x, **given)[0].square().sum(), x, create_graph=True)
            results.append(torch.autograd.grad(first.square().sum(), [x, *m.parameters()]))
        close(results.pop(), results.pop())


@paths
def test_hooks_functional_call_and_vmap(path: str) -> None:
    _, m = pair(path, batch_first=True)
    x, seen = r(3, 9, E), []
    m.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    m.register_full_backward_hook(lambda _, __, grad_out: seen.append(grad_out[0]))  # type: ignore[index]
    m(x.requires_grad_(), x, x)[0].sum().backward()
    assert len(seen) == 2
    m, x = pair(path, batch_first=True)[1], x.detach()
    parameters = {name: p.detach() for name, p in m.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Any:
        return functional_call(m, parameters, (x, x, x))[0].square().sum()

    doubled = {name: 2 * p for name, p in parameters.items()}
    assert not torch.allclose(loss(doubled, x), loss(parameters, x))
    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, x[:, None])
    for i in range(3):
        close(grad(loss)(parameters, x[i : i + 1]), {name: g[i] for name, g in per_sample.items()})
    stacked = {name: torch.stack([p, 2 * p]) for name, p in parameters.items()}
    close(vmap(loss, in_dims=(0, None))(stacked, x)[1], loss(doubled, x))


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@paths
def test_parametrize_prune_and_quantize(path: str) -> None:
    stock, ours = pair(path, batch_first=True)
    x = r(2, 9, E)
    for m in (stock, ours):
        parametrize.register_parametrization(m, "in_proj_weight", Doubled())
        prune.l1_unstructured(m.out_proj, "weight", amount=0.5)
        prune.l1_unstructured(m, "in_proj_bias", amount=0.5)
    close(ours(x, x, x), stock(x, x, x))
    for m in (stock, ours):
        parametrize.remove_parametrizations(m, "in_proj_weight")
        prune.remove(m.out_proj, "weight")
    close(ours(x, x, x), stock(x, x, x))


@paths
def test_quantize_dynamic_leaves_it_alone(path: str) -> None:
    m = nn.Sequential(pair(path, batch_first=True, dtype=torch.float32)[1], nn.Linear(E, E))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated
        quantized = torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, dtype=torch.qint8)
    x = torch.randn(2, 9, E)
    close(quantized[0](x, x, x), m[0](x, x, x))
    assert type(quantized[1]) is not nn.Linear


@pytest.mark.parametrize("config", ["batch_first", "both"])
@pytest.mark.parametrize("mask", ["none", "padding"])
@paths
def test_autocast_and_half_types(path: str, mask: str, config: str) -> None:
    for dtype, autocast in ((torch.float32, True), (torch.bfloat16, False), (torch.float16, False)):
        stock, ours = pair(path, **{**CONFIGS[config], "dtype": dtype})
        oracle = copy.deepcopy(stock).double()
        x = inputs(stock)
        given = masks(mask, 2, H, 7, 9)
        for need_weights in (True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out, expected = (m(*x, **given, need_weights=need_weights)[0] for m in (ours, stock))
            assert out.dtype == expected.dtype
            exact = oracle(*(y.double() for y in x), **given, need_weights=need_weights)[0]
            errors = [(y.double() - exact).abs().max().item() for y in (out, expected)]
            assert errors[0] <= 2 * errors[1] + torch.finfo(out.dtype).eps * exact.abs().max().item()
            out.float().sum().backward()
