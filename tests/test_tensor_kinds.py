"""Every kind of tensor is served by what it means, or refused by name."""

from __future__ import annotations

import runpy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.testing._internal.two_tensor import TwoTensor

import reformer_kernels as rk
from reformer_kernels import _exact

from .rounding import assert_equal_to_rounding

E, H, D = 16, 4, 8
PATHS: dict[str, dict[str, Any]] = {"exact": {}, "long": {"exact_below": 0}}  # budget 128: both see every key
paths = pytest.mark.parametrize("path", PATHS)
nested_warnings = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")


def r(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def close(a: Any, b: Any) -> None:
    assert_equal_to_rounding(a, b, 2 * (2 * E + E + 200))


# CausalBias


@pytest.mark.parametrize("sizes", [(7, 7), (7, 9), (9, 7), (1, 9), (9, 1)])
@pytest.mark.parametrize("form", ["[L, D]", "[H, L, D]", "[B, H, L, D]", "grouped"])
@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])
@pytest.mark.filterwarnings("ignore:Lower right causal bias will produce NaNs:UserWarning")
@paths
def test_causal_bias(path: str, make: Any, form: str, sizes: tuple[int, int]) -> None:
    L, S = sizes
    lead = {"[L, D]": (), "[H, L, D]": (H,), "[B, H, L, D]": (2, H), "grouped": (2, H)}[form]
    key_lead, grouped = ((2, 2), True) if form == "grouped" else (lead, False)
    query, key, value = r(*lead, L, D), r(*key_lead, S, D), r(*key_lead, S, D)
    mask = torch.ones(L, S, dtype=torch.bool).tril(S - L if make is causal_lower_right else 0)
    ours = rk.scaled_dot_product_attention(query, key, value, make(L, S), enable_gqa=grouped, **PATHS[path])
    theirs = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=grouped)
    close(*((out, *torch.autograd.grad(out.square().sum(), (query, key, value))) for out in (ours, theirs)))


@pytest.mark.parametrize("L", [200, 117, 210, 1])
@pytest.mark.filterwarnings("ignore:Lower right causal bias will produce NaNs:UserWarning")
def test_causal_bias_of_long_sequences(L: int) -> None:
    S = 200
    options: dict[str, Any] = {"budget": 32, "chunk_length": 8}
    q, k, v = r(2, H, L, D), r(2, H, S, D), r(2, H, S, D)
    out = rk.scaled_dot_product_attention(q, k, v, causal_upper_left(L, S), **options)
    assert torch.equal(out, rk.scaled_dot_product_attention(q, k, v, is_causal=True, **options))
    lower_right = rk.scaled_dot_product_attention(q, k, v, causal_lower_right(L, S), **options)
    if L == S:
        assert torch.equal(lower_right, out)
    for cut in (150, 199):  # later keys have no part in it
        noisy = torch.cat([v[:, :, :cut], 1e9 * v[:, :, cut:]], 2)
        other = rk.scaled_dot_product_attention(q, k, noisy, causal_lower_right(L, S), **options)
        seen = torch.arange(L) + S - L < cut
        assert torch.equal(other[:, :, seen], lower_right[:, :, seen])
    if L < S:  # as the end of a longer sequence whose other queries choose nothing
        whole = torch.cat([r(2, H, S - L, D), q], 2)
        mine = torch.arange(S).expand(2, -1) < S - L
        if L > 1:
            options["query_padding_mask"] = mine
            expected = rk.scaled_dot_product_attention(whole, k, v, is_causal=True, **options)
        else:  # one query sees all keys
            expected = rk.scaled_dot_product_attention(q, k, v, **options)
        assert torch.equal(lower_right, expected[:, :, -L:])


def test_causal_bias_compiled() -> None:
    torch._dynamo.reset()

    def step(q: Tensor, k: Tensor, bias: Any) -> Tensor:
        return rk.scaled_dot_product_attention(q, k, k, bias, budget=16)

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for make in (causal_upper_left, causal_lower_right):
        given = (torch.randn(1, 2, 20, D), torch.randn(1, 2, 40, D), make(20, 40))
        assert torch.equal(compiled(*given), step(*given))


@paths
def test_causal_bias_with_padding(path: str) -> None:
    q, k, v = r(2, H, 7, D), r(2, H, 9, D), r(2, H, 9, D)
    padding = torch.arange(9) >= torch.tensor([[9], [4]])
    seen = torch.ones(7, 9, dtype=torch.bool).tril(2) & ~padding[:, None, None]
    given: dict[str, Any] = {"key_padding_mask": padding, "query_padding_mask": padding[:, 2:]}
    out = rk.scaled_dot_product_attention(q, k, v, causal_lower_right(7, 9), **given, **PATHS[path])
    close(out, F.scaled_dot_product_attention(q, k, v, seen))


@paths
def test_errors_of_causal_bias(path: str) -> None:
    x, options = r(1, H, 9, D), PATHS[path]
    with pytest.raises(ValueError, match="is_causal must be False with a CausalBias"):
        rk.scaled_dot_product_attention(x, x, x, causal_upper_left(9, 9), is_causal=True, **options)
    with pytest.raises(ValueError, match="lengths of query and key, 9 and 9, got one of 7 and 8"):
        rk.scaled_dot_product_attention(x, x, x, causal_lower_right(7, 8), **options)
    longer = causal_upper_left(20, 30)  # torch takes those, too: the corner is the same
    close(rk.scaled_dot_product_attention(x, x, x, longer, **options), F.scaled_dot_product_attention(x, x, x, longer))
    for given in ({"attn_mask": causal_upper_left(9, 9)}, {"key_padding_mask": causal_upper_left(1, 9)}):
        with pytest.raises(TypeError, match="_mask must be a tensor of values, got a CausalBias: give causality as an"):
            rk.LSHMultiheadAttention(H * D, H, **options)(*[r(9, H * D)] * 3, **given)


# Nested tensors


def nested(layout: torch.layout, lengths: tuple[int, ...], *shape: int) -> tuple[Tensor, list[Tensor]]:
    """[B, *shape[:-1], L_i, shape[-1]], and its parts."""
    rows = [r(*shape[:-1], n, shape[-1]) for n in lengths]
    whole = torch.nested.as_nested_tensor([row.transpose(0, -2) for row in rows], layout=layout)
    return (whole if len(shape) == 1 else whole.transpose(1, -2)), rows


layouts = pytest.mark.parametrize("layout", [torch.strided, torch.jagged])


@nested_warnings
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", [(D,), (H, D)])
@layouts
@paths
def test_nested_function(path: str, layout: torch.layout, shape: tuple[int, ...], is_causal: bool) -> None:
    options = {**PATHS[path], "is_causal": is_causal}
    queries, query_rows = nested(layout, (5, 9, 1), *shape)
    keys, key_rows = nested(layout, (4, 9, 30), *shape)
    values = keys * 2
    out = rk.scaled_dot_product_attention(queries, keys, values, **options)
    assert out.is_nested and out.layout == layout
    expected = [
        F.scaled_dot_product_attention(q, k, 2 * k, is_causal=is_causal)
        for q, k in zip(query_rows, key_rows, strict=True)
    ]
    close(list(out.unbind()), expected)
    gradients = [
        torch.autograd.grad([y.square().sum() for y in rows], [*query_rows, *key_rows], retain_graph=True)
        for rows in (out.unbind(), expected)
    ]
    close(*gradients)
    if layout == torch.jagged:
        assert (out + queries).shape == queries.shape  # ragged by the same lengths


@nested_warnings
@layouts
def test_nested_rows_are_what_they_are_alone(layout: torch.layout) -> None:
    options: dict[str, Any] = {"budget": 16, "chunk_length": 8}
    x, rows = nested(layout, (60, 60, 60), H, D)
    out = rk.scaled_dot_product_attention(x, x, x, **options)
    for part, row in zip(out.unbind(), rows, strict=True):
        close(part, rk.scaled_dot_product_attention(row, row, row, **options, enable_gqa=True))


@nested_warnings
@layouts
@paths
def test_nested_module(path: str, layout: torch.layout) -> None:
    m = rk.LSHMultiheadAttention(E, H, batch_first=True, dtype=torch.float64, **PATHS[path])
    x, rows = nested(layout, (5, 9, 1), E)
    for given in ((x, x, x), (x, x + 0, x + 0)):
        out, weights = m(*given)
        assert out.layout == layout
        close(list(out.unbind()), [m(row, row, row)[0] for row in rows])
        close(weights[0, :5, :5], m(rows[0], rows[0], rows[0])[1])
        assert (weights[0, :, 5:] == 0).all()
    other, other_rows = nested(layout, (3, 2, 8), E)
    out = m(x, other, other, need_weights=False)[0]
    close(list(out.unbind()), [m(a, b, b)[0] for a, b in zip(rows, other_rows, strict=True)])
    with pytest.raises(ValueError, match="value must have the lengths of key"):
        m(x, x, other)
    with pytest.raises(ValueError, match="query_padding_mask must be None with nested tensors"):
        m(x, x, x, query_padding_mask=torch.zeros(3, 9, dtype=torch.bool))


@nested_warnings
@layouts
def test_errors_of_nested_tensors(layout: torch.layout) -> None:
    x, _ = nested(layout, (5, 9), H, D)
    dense = r(2, H, 9, D)
    for arguments, error, message in (
        ((x, dense, dense), TypeError, "key must be nested if one of query, key and value is, got a dense tensor"),
        ((dense, x, x), TypeError, "query must be nested if one of query, key and value is"),
        ((x, x, x, torch.ones(9, 9) > 0), ValueError, "attn_mask must be None with nested tensors"),
        ((x, x, nested(layout, (9, 5), H, D)[0]), ValueError, "value must have the lengths of key"),
        ((x.transpose(1, 2),) * 3, ValueError, "query must be nested in the last dimension but one only"),
    ):
        with pytest.raises(error, match=message):
            rk.scaled_dot_product_attention(*arguments)


# Others


class Named(Tensor):
    """As fastai and torchvision make them: memory that means what it holds."""


class Opaque(Tensor):
    """As quantized tensors are made: no memory of their own, and no op of ours."""

    @staticmethod
    def __new__(cls, x: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype, device=x.device)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return NotImplemented


FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "lsh": lambda x: rk.lsh_attention(x, x, chunk_length=8),
    "local": lambda x: rk.local_attention(x, x, x, chunk_length=8),
    "clustered": lambda x: rk.clustered_attention(x, x, x, budget=8),
    "hash": lambda x: rk.hash_buckets(x, rk.random_rotations(0, H, D, 2, 4), 4),
    "sdpa": lambda x: rk.scaled_dot_product_attention(x, x, x, budget=8),
    "exact": lambda x: rk.scaled_dot_product_attention(x, x, x),
    "drop_in": lambda x: rk.LSHMultiheadAttention(D, 2, budget=8, batch_first=True)(x[0], x[0], x[0])[0],
    "layer": lambda x: rk.LSHSelfAttention(D, 2, hash_seed=0)(x[0]),
}
functions = pytest.mark.parametrize("function", FUNCTIONS)


@functions
def test_kinds_that_hold_what_they_mean(function: str) -> None:
    call, x = FUNCTIONS[function], torch.randn(2, H, 40, D)
    torch.manual_seed(1)
    expected = call(x)
    for same in (nn.Parameter(x), x.as_subclass(Named), nn.Buffer(x), TwoTensor(x, x.clone())):
        torch.manual_seed(1)
        out = call(same)
        assert torch.equal(out.a if isinstance(out, TwoTensor) else out.as_subclass(Tensor), expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors:UserWarning")
@nested_warnings
@functions
def test_kinds_that_are_refused_by_name(function: str) -> None:
    x = torch.randn(2, H, 40, D)
    jagged = torch.nested.as_nested_tensor([y.transpose(0, 1) for y in x], layout=torch.jagged).transpose(1, 2)
    cases: dict[str, Any] = {
        "got a MaskedTensor: give its data": lambda: torch.masked.masked_tensor(x, x > 0),
        "got layout torch.sparse_coo: make it one by to_dense": x.to_sparse,
        "got layout torch._mkldnn": x.to_mkldnn,
        "Opaque": lambda: Opaque(x),
    }
    if function not in ("sdpa", "exact", "drop_in", "layer"):
        cases["got a nested one"] = lambda: jagged
    for message, make in cases.items():
        if function in ("drop_in", "layer") and message == "got layout torch._mkldnn":
            continue  # has no rows to take
        with pytest.raises((TypeError, NotImplementedError), match=message):
            FUNCTIONS[function](make())


def test_kinds_of_masks_and_other_arguments() -> None:
    x, mask = torch.randn(1, H, 40, D), torch.zeros(1, 40, dtype=torch.bool)
    for name, value in (
        ("key_padding_mask", mask.to_sparse()),
        ("attn_mask", torch.zeros(1, 1, 40, 40).to_sparse()),
        ("attn_mask", causal_upper_left(40, 40)),
        ("dropout_seed", torch.tensor([1]).to_sparse()),
        ("hash_seed", torch.tensor([1]).to_sparse()),
        ("rotations", rk.random_rotations(0, H, D, 4, 10).to_sparse()),
        ("buckets", torch.zeros(1, H, 4, 40, dtype=torch.int32).to_sparse()),
    ):
        with pytest.raises(TypeError, match=f"{name} must be a (dense tensor|tensor of values)"):
            given: dict[str, Any] = {name: value}
            rk.lsh_attention(x, x, chunk_length=8, **given)
    for name in ("key_padding_mask", "query_padding_mask", "attn_mask"):
        for call in (
            lambda **given: rk.scaled_dot_product_attention(x, x, x, **given),
            lambda **given: rk.LSHMultiheadAttention(D, 2, batch_first=True)(x[0], x[0], x[0], **given),
            lambda **given: rk.clustered_attention(x, x, x, **given),
        ):
            with pytest.raises(TypeError, match=f"{name} must be a dense tensor, got layout torch.sparse_coo"):
                call(**{name: mask.to_sparse()})


# Torch's own function, and others in its place


@paths
def test_ours_in_the_place_of_torchs(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q = r(1, 2, 200, D)
    stock = nn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64)
    ours = rk.LSHMultiheadAttention(E, H, batch_first=True, dtype=torch.float64, exact_below=200)
    ours.load_state_dict(stock.state_dict())
    full = rk.FullAttention(E, H, dtype=torch.float64)
    x = r(1, 200, E)
    expected = F.scaled_dot_product_attention(q, q, q), stock(x, x, x)[0], full(x)

    def installed(*args: Any, **kwargs: Any) -> Tensor:
        options: dict[str, Any] = {"exact_below": 200, **PATHS[path], **kwargs}
        return rk.scaled_dot_product_attention(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", installed)
    if path == "exact":
        close(F.scaled_dot_product_attention(q, q, q), expected[0])
    F.scaled_dot_product_attention(q, q, q)
    for need_weights in (True, False):  # not what is installed, at any length
        close(ours(x, x, x, need_weights=need_weights)[0], expected[1])
    close(full(x), expected[2])
    anew = runpy.run_path(_exact.__file__)  # imported after it was put there
    assert anew["scaled_dot_product_attention"] is torch._C._nn.scaled_dot_product_attention


@paths
def test_other_functions_in_the_place_of_torchs_are_not_called(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    m = rk.LSHMultiheadAttention(E, H, batch_first=True, dtype=torch.float64, **PATHS[path])
    x, padding = r(2, 9, E), torch.zeros(2, 9, dtype=torch.bool)
    for given in ({}, {"key_padding_mask": padding}, {"attn_mask": torch.zeros(9, 9)}):
        m(x, x, x, need_weights=False, **given)
        m.eval()(x, x, x, **given)
    rk.scaled_dot_product_attention(x, x, x, **PATHS[path])


# Modules as frameworks take them


def test_reset_parameters() -> None:
    torch.manual_seed(3)
    m = rk.LSHMultiheadAttention(E, H, add_bias_kv=True)
    expected = {name: p.clone() for name, p in m.named_parameters() if not name.startswith("out_proj.weight")}
    with torch.no_grad():
        for p in m.parameters():
            p.fill_(7)
    torch.manual_seed(3)
    nn.Linear(E, E)  # drawn first by the constructor
    m.reset_parameters()
    for name, value in expected.items():
        assert torch.equal(m.get_parameter(name), value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch.ao is deprecated
@paths
def test_static_quantization_says_what_to_do(path: str) -> None:
    torch.use_deterministic_algorithms(False)
    x = torch.randn(2, 9, E)

    def quantized(leave_out: bool) -> Any:
        torch.manual_seed(0)
        attention: Any = rk.LSHMultiheadAttention(E, H, batch_first=True, **PATHS[path])
        model = nn.Sequential(attention, nn.Linear(E, E)).eval()
        model.qconfig = torch.ao.quantization.get_default_qconfig("x86")
        if leave_out:
            attention.qconfig = None
        prepared = torch.ao.quantization.prepare(model)
        prepared[0](x, x, x)
        prepared[1](x)
        return torch.ao.quantization.convert(prepared)

    with pytest.raises(TypeError, match=r"out_proj must be .*leave the attention out .*qconfig = None"):
        quantized(False)[0](x, x, x)
    with warnings.catch_warnings():
        assert quantized(True)[0](x, x, x)[0].shape == x.shape
