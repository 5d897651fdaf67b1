"""Full attention against torch's and a naive softmax; rotation and memory in the attention layers."""

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reformer_kernels as rk
from reformer_kernels import FullAttention, LocalSelfAttention, LSHSelfAttention, RotaryPositionEmbedding
from reformer_kernels._exact import scaled_dot_product_attention
from reformer_kernels.modules import full_attention

from .rounding import assert_equal_to_rounding

B, L, E, H, D, M = 2, 9, 8, 2, 6, 3  # E / H is not D
S, C = 7, 5  # a context
PADDING = F.one_hot(torch.tensor([L - 1, 4]), L).bool()  # a row of each sequence
# Sums of the projections, the scores, the weights and the output, and in gradients of the rows; angles up to 20 are
# known to 20 units.
ROUNDINGS = 2 * E + D + 2 * H * D + (L + M) + B * L + 20
LAYERS: dict[str, Callable[..., Any]] = {
    "lsh": lambda **o: LSHSelfAttention(E, H, head_dim=D, chunk_length=4, **o),
    "local": lambda **o: LocalSelfAttention(E, H, head_dim=D, chunk_length=4, **o),
    "full": lambda **o: FullAttention(E, H, head_dim=D, **o),
}


def rows(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def heads(x: Tensor) -> Tensor:
    out: Tensor = x.unflatten(-1, (-1, x.shape[-1] // H)).transpose(1, 2)
    return out


def merged(layer: Any, out: Tensor) -> Tensor:
    result: Tensor = layer.output(out.transpose(1, 2).flatten(2))
    return result


def with_gradients(function: Callable[[], Tensor], leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A value, and the gradients of a weighted sum of it."""
    out = function()
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return out, *torch.autograd.grad(out, leaves, weight)


def naive(layer: FullAttention, x: Tensor, masked: Any, context: Tensor | None, positions: Any) -> Tensor:
    """By exponentials and their sums. The memory comes last: the order of keys does not matter."""
    source = x if context is None else context
    q, k, v = heads(layer.query(x)), heads(layer.key(source)), heads(layer.value(source))
    if layer.rotary is not None:
        q, k = (RotaryPositionEmbedding(D, 500.0)(y, positions) for y in (q, k))
    seen = torch.ones(B, 1, L, source.shape[1], dtype=torch.bool)
    if masked is not None:
        seen = seen & ~masked[:, None, None]
    if layer.causal:
        seen = seen & torch.tensor([[j <= i for j in range(L)] for i in range(L)])
    if layer.memory is not None:
        memory = layer.memory.expand(B, -1, -1)
        k, v = torch.cat([k, heads(layer.key(memory))], 2), torch.cat([v, heads(layer.value(memory))], 2)
        seen = F.pad(seen, (0, M), value=True)
    weights = (q @ k.mT / math.sqrt(D)).exp() * seen
    return merged(layer, weights @ v / weights.sum(-1, keepdim=True).clamp(min=1e-30))  # 0 if nothing is seen


# ---- full attention


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["self", "causal", "context"])
def test_full_equals_multihead_attention(kind: str, masked: bool, bias: bool) -> None:
    """With its weights, so that the gradients are of the same leaves."""
    width, causal = C if kind == "context" else None, kind == "causal"
    layer = FullAttention(E, H, context_dim=width, causal=causal, bias=bias, dtype=torch.float64)
    published = nn.MultiheadAttention(E, H, bias=bias, batch_first=True, kdim=width, vdim=width, dtype=torch.float64)
    projections = [layer.query, layer.key, layer.value]
    weights = {f"{n}_proj_weight": p.weight for n, p in zip("qkv", projections, strict=True)}
    if width is None:
        weights = {"in_proj_weight": torch.cat(list(weights.values()))}
    if bias:
        weights["in_proj_bias"] = torch.cat([p.bias for p in projections])
    weights |= {f"out_proj.{name}": w for name, w in layer.output.named_parameters()}
    x, context = rows(B, L, E), None if width is None else rows(B, S, C)
    source = x if context is None else context
    mask = PADDING[:, -source.shape[1] :] if masked else None
    order = torch.ones(L, L, dtype=torch.bool).triu(1) if causal else None
    arguments, options = (x, source, source, mask), {"need_weights": False, "attn_mask": order}
    leaves = [x, source, *layer.parameters()]
    theirs = with_gradients(lambda: torch.func.functional_call(published, weights, arguments, options)[0], leaves)
    assert_equal_to_rounding(with_gradients(lambda: layer(x, mask, context=context), leaves), theirs, ROUNDINGS)


@pytest.mark.parametrize("memory_keys", [0, M])
@pytest.mark.parametrize("masked", [None, "some", "first"])
@pytest.mark.parametrize(("kind", "positions"), [
    ("context", None), *((kind, p) for kind in ("self", "causal") for p in (None, "from 0", "[L]", "[B, L]")),
])  # fmt: skip
def test_full_by_a_naive_softmax(kind: str, masked: str | None, memory_keys: int, positions: str | None) -> None:
    """Masks are about the rows, memory is always seen and not rotated, and what sees nothing gives the bias."""
    options: Any = {"causal": kind == "causal", "context_dim": C if kind == "context" else None}
    options |= {"rotary_base": None if positions is None else 500.0, "memory_keys": memory_keys}
    layer, x = LAYERS["full"](**options, bias=True).double(), rows(B, L, E)
    context = rows(B, S, C) if kind == "context" else None
    choices: dict[str | None, Tensor] = {"[L]": torch.arange(L) + 3, "[B, L]": torch.randint(20, (B, L)).int()}
    where = choices.get(positions)
    mask = None if masked is None else PADDING[:, -S:].clone() if kind == "context" else PADDING.clone()
    if mask is not None and masked == "first":  # and all of the second sequence
        mask[0, :2], mask[1] = True, True
    leaves = [x, *layer.parameters(), *([] if context is None else [context])]
    assert_equal_to_rounding(
        with_gradients(lambda: layer(x, mask, context=context, positions=where), leaves),
        with_gradients(lambda: naive(layer, x, mask, context, torch.arange(L) if where is None else where), leaves),
        ROUNDINGS,
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_of_queries_that_see_nothing(causal: bool, dropout: float, dtype: torch.dtype) -> None:
    layer, x = LAYERS["full"](causal=causal, dropout=dropout, bias=True, dtype=dtype), rows(B, L, E, dtype=dtype)
    out = layer(x, PADDING | torch.tensor([[False], [True]]))
    assert torch.equal(out[1], layer.output.bias.expand(L, E))
    grads = torch.autograd.grad(out[1].sum(), [x, *layer.parameters()])
    for grad, name in zip(grads, ["x", *dict(layer.named_parameters())], strict=True):
        assert torch.equal(grad, torch.full_like(grad, L if name == "output.bias" else 0)), name


@pytest.mark.parametrize("memory_keys", [0, M])
def test_full_of_empty_sequences(memory_keys: int) -> None:
    assert LAYERS["full"](causal=True, memory_keys=memory_keys)(torch.randn(B, 0, E)).shape == (B, 0, E)
    assert LAYERS["full"](memory_keys=memory_keys)(torch.randn(0, L, E)).shape == (0, L, E)
    layer = LAYERS["full"](context_dim=C, memory_keys=memory_keys)
    out = layer(torch.randn(B, L, E), context=torch.randn(B, 0, C))
    assert bool(out.any()) == bool(memory_keys) and out.isfinite().all()


@pytest.mark.parametrize("memory_keys", [0, M])
@pytest.mark.parametrize("causal", [False, True])
def test_what_full_asks_of_torch(causal: bool, memory_keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask of queries and keys with causal and padding only, none that hides all keys; no dropout in evaluation."""
    calls: list[tuple[Any, ...]] = []

    def record(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
        calls.append(options)
        return scaled_dot_product_attention(q, k, v, *options)

    monkeypatch.setattr(full_attention, "scaled_dot_product_attention", record)
    layer, x = LAYERS["full"](causal=causal, memory_keys=memory_keys, dropout=0.3), torch.randn(B, L, E)
    layer(x)
    layer.eval()(x, PADDING | torch.tensor([[False], [True]]))
    (mask, dropout_p, is_causal), (padded, evaluated, with_mask) = calls
    assert mask is None and (is_causal, with_mask) == (causal, False) and (dropout_p, evaluated) == (0.3, 0.0)
    assert padded.any(-1).all() and padded.shape == (B, 1, L if causal else 1, L + memory_keys)


def test_dropout_of_full_comes_from_torch() -> None:
    layer, x = LAYERS["full"](dropout=0.5, memory_keys=M), torch.randn(B, L, E)
    torch.manual_seed(3)
    first, second = layer(x), layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first) and not torch.equal(first, second)
    assert torch.equal(layer.eval()(x), layer(x))


# ---- rotation


@pytest.mark.parametrize("name", ["lsh", "local"])
@pytest.mark.parametrize("shape", [None, (L,), (B, L)])
@pytest.mark.parametrize("causal", [False, True])
def test_rotation_of_the_projected_rows(name: str, shape: tuple[int, ...] | None, causal: bool) -> None:
    layer, x = LAYERS[name](rotary_base=500.0, causal=causal, bias=True).eval(), torch.randn(B, L, E)
    positions = torch.arange(L) if shape is None else torch.randint(1000, shape)
    turn = RotaryPositionEmbedding(D, 500.0)
    options: dict[str, Any] = {"chunk_length": 4, "causal": causal}
    value = heads(layer.value(x))
    if name == "lsh":
        expected = rk.lsh_attention(turn(heads(layer.query_key(x)), positions), value, **options)
    else:
        q, k = (turn(heads(projection(x)), positions) for projection in (layer.query, layer.key))
        expected = rk.local_attention(q, k, value, **options)
    out = layer(x) if shape is None else layer(x, positions=positions)
    assert torch.equal(out, merged(layer, expected))
    assert torch.equal(layer(x, positions=positions.int()), out)
    for plain in (LAYERS[name]().eval(), LAYERS["full"]()):
        assert torch.equal(plain(x, positions=positions), plain(x))


@pytest.mark.parametrize("name", ["one window", "local", "full"])
def test_only_distances_matter(name: str) -> None:
    """Of LSH attention in one window: buckets depend on where a row is."""
    make: Callable[..., Any] = LAYERS.get(name, lambda **o: LSHSelfAttention(E, H, head_dim=D, **o))
    layer, x = make(rotary_base=500.0, causal=True).double(), rows(B, L, E)
    leaves = [x, *layer.parameters()]
    near = with_gradients(lambda: layer(x), leaves)
    for positions in (torch.arange(L) + 11, torch.arange(L) + torch.tensor([[7], [2]])):
        shifted = with_gradients(partial(layer, x, PADDING & False, positions=positions), leaves)
        assert_equal_to_rounding(shifted, near, ROUNDINGS)
    assert not torch.allclose(layer(x, positions=2 * torch.arange(L)), near[0])


# ---- memory of LSH attention


@pytest.mark.parametrize("rotary_base", [None, 500.0])
@pytest.mark.parametrize("mask", [None, "padding", "bool", "float"])
@pytest.mark.parametrize("num_queries", [None, 0, 5])
@pytest.mark.parametrize("causal", [False, True])
def test_lsh_memory_by_hand(causal: bool, num_queries: int | None, mask: str | None, rotary_base: float | None) -> None:
    """Rows before x, which are not masked and not rotated, and whose own outputs are left out."""
    layer = LAYERS["lsh"](memory_keys=M, rotary_base=rotary_base, causal=causal, bias=True).eval()
    x, n = torch.randn(B, L, E), L if num_queries is None else num_queries
    masks: dict[str, Any] = {}
    if mask == "padding":
        masks["key_padding_mask"] = PADDING
    elif mask is not None:
        masks["attn_mask"] = torch.rand(1, H, n, L) < 0.3 if mask == "bool" else torch.randn(B, 1, n, L)
    longer: dict[str, Any] = {name: torch.cat([m.new_zeros(*m.shape[:-1], M), m], -1) for name, m in masks.items()}
    if "attn_mask" in longer:
        rows = longer["attn_mask"]
        longer["attn_mask"] = torch.cat([rows.new_zeros(*rows.shape[:2], M, L + M), rows], 2)
    both = torch.cat([layer.memory.expand(B, -1, -1), x], 1)
    shared, value = heads(layer.query_key(both)), heads(layer.value(both))
    if rotary_base is not None:
        turned = RotaryPositionEmbedding(D, rotary_base)(shared[:, :, M:], torch.arange(L))
        shared = torch.cat([shared[:, :, :M], turned], 2)
    options: Any = {"n_hashes": 2, "return_buckets": True}
    out, buckets = rk.lsh_attention(
        shared, value, chunk_length=4, causal=causal, num_queries=M + n, **longer, **options
    )
    result = layer(x, **masks, num_queries=num_queries, **options)
    assert torch.equal(result[0], merged(layer, out[:, :, M:])) and torch.equal(result[1], buckets)
    assert torch.equal(layer(x, **masks, num_queries=num_queries, n_hashes=2, buckets=result[1]), result[0])


@pytest.mark.parametrize("causal", [False, True])
def test_every_query_sees_the_memory(causal: bool) -> None:
    layer, x = LSHSelfAttention(E, H, causal=causal, memory_keys=M), torch.randn(B, L, E)
    assert layer.memory is not None
    everything = torch.ones(B, 1, L, L, dtype=torch.bool)
    all_but_last = torch.arange(L).expand(B, -1) < L - 1  # behind the last one that counts nothing is seen
    for masks in ({}, {"key_padding_mask": all_but_last}, {"attn_mask": everything}):
        for row in layer(x, **masks).flatten(0, 1):
            (grad,) = torch.autograd.grad(row.sum(), layer.memory, retain_graph=True)
            assert grad.abs().sum(-1).min() > 0
    later = torch.cat([x[:, :4], torch.randn(B, L - 4, E)], 1)
    assert torch.equal(layer(x)[:, :4], layer(later)[:, :4]) is causal


# ---- parameters, autocast, torch.compile

WITH_MEMORY: dict[str, Callable[..., Any]] = {
    "lsh": lambda **o: LAYERS["lsh"](memory_keys=M, rotary_base=500.0, causal=True, **o),
    "local": lambda **o: LAYERS["local"](rotary_base=500.0, causal=True, **o),
    "full": lambda **o: LAYERS["full"](memory_keys=M, rotary_base=500.0, causal=True, **o),
    "context": lambda **o: LAYERS["full"](memory_keys=M, context_dim=C, **o),
}


def call(name: str, layer: Callable[..., Tensor], x: Tensor, context: Tensor, **options: Any) -> Tensor:
    if name == "context":
        return layer(x, PADDING[:, -S:], context=context)
    return layer(x, PADDING, positions=torch.arange(L) + 2, **options)


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_parameters(name: str) -> None:
    layer = WITH_MEMORY[name](bias=True, device="meta", dtype=torch.bfloat16)
    projections = ["output", "value", *(["query_key"] if name == "lsh" else ["query", "key"])]
    memory = {} if name == "local" else {"memory": (M, C if name == "context" else E)}
    shapes = {parameter: tuple(w.shape) for parameter, w in layer.state_dict().items()}
    assert set(shapes) == {*memory, *(f"{p}.{kind}" for p in projections for kind in ("weight", "bias"))}
    assert memory.items() <= shapes.items() and all(p.is_meta and p.dtype == torch.bfloat16 for p in layer.parameters())
    assert ("memory_keys=3" in repr(layer)) == bool(memory)
    assert ("RotaryPositionEmbedding(6, base=500.0)" in repr(layer)) == (name != "context")
    assert ("context_dim=5, causal=False" in repr(layer)) == (name == "context")
    plain = LAYERS.get(name, LAYERS["full"])()
    assert plain.memory is None and "memory" not in plain.state_dict() and "memory" not in repr(plain)


def test_memory_is_initialised() -> None:
    makers: list[Callable[..., Any]] = [
        lambda **o: LSHSelfAttention(64, 2, memory_keys=256, **o),
        lambda **o: FullAttention(8, 2, context_dim=64, memory_keys=256, **o),
    ]
    for make in makers:
        fresh = make(device="meta").to_empty(device="cpu")
        fresh.reset_parameters()
        for memory in (make().memory.detach(), fresh.memory.detach()):
            # The estimate from n numbers has a standard error of std / sqrt(2 n), the mean's is std / sqrt(n).
            assert abs(float(memory.std()) * 8 - 1) < 6 / math.sqrt(2 * memory.numel())
            assert abs(float(memory.mean())) < 6 / 8 / math.sqrt(memory.numel())


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_autocast(name: str) -> None:
    layer, x, context = WITH_MEMORY[name]().eval(), torch.randn(B, L, E), torch.randn(B, S, C)
    given = {"buckets": layer(x, return_buckets=True)[1]} if name == "lsh" else {}  # near a border they could differ
    expected = call(name, layer, x, context, **given)
    with torch.autocast("cpu", torch.bfloat16):
        out = call(name, layer, x, context.bfloat16(), **given)  # as another layer left it
    assert out.dtype == torch.bfloat16
    # x, weights and product of a projection, a turn, the weights, the weighted sum, and those of the output.
    assert_equal_to_rounding(out, expected.bfloat16(), 3 + 1 + 1 + 1 + 3)


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_compiles_whole(name: str) -> None:
    torch._dynamo.reset()
    layer, x, context = WITH_MEMORY[name](dropout=0.2), rows(B, L, E, dtype=torch.float32), torch.randn(B, S, C)
    dense = {"attn_mask": torch.rand(1, H, 6, L) < 0.1, "num_queries": 6} if name == "lsh" else {}
    results = []
    for function in (torch.compile(layer, fullgraph=True, backend="aot_eager"), layer):
        torch.manual_seed(3)
        leaves = [x, *layer.parameters()]
        results.append(with_gradients(partial(call, name, function, x, context, **dense), leaves))
    assert_equal_to_rounding(results[0], results[1], ROUNDINGS)


# ---- errors

X, Y, LONG = torch.zeros(B, L, E), torch.zeros(B, S, C), torch.arange(L + M)


def run(name: str, *rows: Tensor, **given: Any) -> Tensor:
    out: Tensor = WITH_MEMORY[name]()(*rows, **given)
    return out


@pytest.mark.parametrize(("make", "kind", "message"), [
    (lambda: FullAttention(E, H, causal=1), TypeError, "causal must be a bool, got 1"),  # type: ignore[arg-type]
    (lambda: FullAttention(E, H, context_dim=C, causal=True), ValueError,
     "causal must be False with context_dim (a context has no order of its own), got True"),
    (lambda: FullAttention(E, H, context_dim=C, rotary_base=9.0), ValueError,
     "rotary_base must be None with context_dim (there is no distance to a context), got 9.0"),
    (lambda: FullAttention(E, H, memory_keys=-1), ValueError, "memory_keys must be at least 0, got -1"),
    (lambda: LSHSelfAttention(E, H, rotary_base="x"), TypeError,  # type: ignore[arg-type]
     "rotary_base must be a float, got 'x'"),
    (lambda: FullAttention(E, H, rotary_base=0), ValueError, "rotary_base must be positive and finite, got 0"),
    (lambda: LocalSelfAttention(E, H, head_dim=3, rotary_base=9.0), ValueError,
     "head_dim must be even (channels are rotated in pairs), got 3"),
    (lambda: run("full", X[0]), ValueError, "x must have shape [B, L, 8], got [9, 8]"),
    (lambda: run("full", X, context=Y), ValueError, "context must be None without context_dim, got shape [2, 7, 5]"),
    (lambda: run("context", X), ValueError, "context must be given with context_dim, [B, S, 5], got None"),
    (lambda: run("context", X, context=Y[0]), ValueError, "context must have 3 dimensions [B, S, C], got shape (7, 5)"),
    (lambda: run("context", X, context=Y[:1]), ValueError, "context must have shape [2, 7, 5], got [1, 7, 5]"),
    (lambda: run("context", X, context=X), ValueError, "context must have shape [2, 9, 5], got [2, 9, 8]"),
    (lambda: run("context", X, context=Y.to("meta")), ValueError, "context must be on the device of x, cpu, got meta"),
    (lambda: run("context", X, PADDING, context=Y), ValueError, "key_padding_mask must have shape [2, 7], got [2, 9]"),
    (lambda: run("full", X, X[..., 0]), TypeError, "key_padding_mask must have dtype torch.bool, got torch.float32"),
    (lambda: run("full", X, positions=LONG), ValueError, "positions must have shape [9] or [2, 9], got [12]"),
    (lambda: run("local", X, positions=[0]), TypeError, "positions must be a torch.Tensor, got list"),
    (lambda: run("lsh", X, num_queries=10), ValueError, "num_queries must be between 0 and 9, got 10"),
    (lambda: run("lsh", X, LONG.expand(B, -1) > 0), ValueError, "key_padding_mask must have shape [2, 9], got [2, 12]"),
    (lambda: run("lsh", X, attn_mask=torch.zeros(1, 1, L, L + M)), ValueError,
     "attn_mask must have shape [2 or 1, 2 or 1, 9, 9], got [1, 1, 9, 12]"),
])  # fmt: skip
def test_arguments_are_checked(make: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        make()
