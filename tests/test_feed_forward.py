"""Feed-forward layers and cross-entropy in chunks of tokens, against the whole at once: values, gradients, memory."""

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from reformer_kernels.modules.feed_forward import ACTIVATIONS, ChunkedFeedForward, TokenChunks, chunked_cross_entropy
from reformer_kernels.modules.reversible import ReversibleBlock, ReversibleSequence

from .rounding import assert_equal_to_rounding

SHAPES = [(12, 6), (3, 4, 6), (2, 2, 3, 6)]  # 12 tokens
CHUNK_LENGTHS = [1, 4, 5, 12, 100, None]  # that divide 12 and do not, all at once and more
FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: x * (x > 0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "tanh": lambda x: 1 - 2 / (1 + torch.exp(2 * x)),
    "identity": lambda x: x,
}
FORMULA_ROUNDINGS = 12  # of an activation and its derivative: at most a dozen operations


def random_input(shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
    """A leaf that is no view of [n, E]."""
    return torch.randn(*shape[:-2], shape[-1], shape[-2], dtype=dtype).mT.requires_grad_()


def with_gradients(function: Callable[[], Tensor], leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A value, and the gradients of a weighted sum of it."""
    out = function()
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return out, *torch.autograd.grad(out, leaves, weight)


def by_hand(module: Callable[[Tensor], Tensor], x: Tensor, chunk_length: int) -> Tensor:
    """One chunk after the other, with all activations stored."""
    rows = torch.cat([module(piece) for piece in x.flatten(0, -2).split(chunk_length)])
    return rows.view(*x.shape[:-1], rows.shape[1])


class Watch(TorchDispatchMode):
    """The size of the largest tensor made, and how much of wide activations, [n, 64], was alive at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = self.peak = 0
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in (leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)):
            self.largest = max(self.largest, t.numel())
            if t.dim() == 2 and t.shape[1] == 64 and len(t) > 2:  # [2, 64] is a weight
                storage = StorageWeakRef(t.untyped_storage())
                self.alive[storage.cdata] = (storage, t.numel())
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def watched(function: Callable[[Tensor], Tensor], tokens: int, width: int = 2) -> Watch:
    """Forward and backward for tokens of so many channels."""
    x = torch.randn(1, tokens, width, requires_grad=True)
    watch = Watch()
    with watch:
        function(x).sum().backward()
    return watch


# ---- chunks


@pytest.mark.parametrize("shape", [*SHAPES, (2, 0, 6), (0, 6)])
@pytest.mark.parametrize("chunk_length", CHUNK_LENGTHS)
def test_chunks_equal_the_module(shape: tuple[int, ...], chunk_length: int | None) -> None:
    module = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    chunked, x = TokenChunks(module, chunk_length), random_input(shape)
    leaves = [x, *module.parameters()]
    result = with_gradients(lambda: chunked(x), leaves)
    assert result[0].shape == (*shape[:-1], 4)
    # Sums of 6 channels, 9 channels and 12 tokens, and the norm's mean, variance and division.
    assert_equal_to_rounding(result, with_gradients(lambda: module(x), leaves), 6 + 9 + 12 + 10)


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("chunk_length", [1, 5, 12])
def test_dropout_is_drawn_chunk_by_chunk(glu: bool, chunk_length: int) -> None:
    chunked = ChunkedFeedForward(6, 9, glu=glu, activation="tanh", dropout=0.4, chunk_length=chunk_length).double()
    layers: Any = chunked.module
    up, gate, down = layers.up, layers.gate, layers.down

    def plain(x: Tensor) -> Tensor:
        out: Tensor = down(F.dropout(torch.tanh(gate(x)) * up(x) if glu else torch.tanh(up(x)), 0.4))
        return out

    x = random_input((3, 4, 6))
    leaves = [x, *chunked.parameters()]
    torch.manual_seed(3)
    result = with_gradients(lambda: chunked(x), leaves)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    expected = with_gradients(lambda: by_hand(plain, x, chunk_length), leaves)
    assert torch.equal(torch.get_rng_state(), after)  # what is computed again draws nothing anew
    assert torch.equal(result[0], expected[0])
    assert_equal_to_rounding(result, expected, 12)  # the sum over the tokens has an order
    assert not torch.equal(chunked(x), result[0])
    assert torch.equal(chunked.eval()(x), chunked(x))


@pytest.mark.parametrize("reversible", [False, True])
def test_every_chunk_is_computed_twice(reversible: bool) -> None:
    module, calls = nn.Linear(6, 6), []
    module.register_forward_pre_hook(lambda _, rows: calls.append(len(rows[0])))
    chunked, x = TokenChunks(module, 8), torch.randn(1, 20, 6, requires_grad=True)
    blocks = ReversibleSequence([ReversibleBlock(nn.Identity(), chunked)])
    function: Callable[[Tensor], Tensor] = (lambda x: blocks(x)[1]) if reversible else chunked
    with torch.no_grad():
        function(x)
    assert calls == [8, 8, 4]
    function(x).sum().backward()
    assert calls[3:6] == [8, 8, 4] and sorted(calls[6:]) == [4, 8, 8]
    calls.clear()
    function(x[:, :8]).sum().backward()
    assert calls == ([8, 8] if reversible else [8])  # one chunk may be stored


def test_dropout_in_a_reversible_sequence() -> None:
    layers = [ChunkedFeedForward(6, 9, dropout=0.4, chunk_length=5, dtype=torch.float64) for _ in range(4)]
    blocks = ReversibleSequence(map(ReversibleBlock, layers[::2], layers[1::2]))
    x, results = random_input((3, 4, 6)), []
    for blocks.reversible in (True, False):
        torch.manual_seed(3)
        results.append(with_gradients(lambda: blocks(x)[1], [x, *blocks.parameters()]))
    # Four layers' sums of 6 + 9 + 6 channels and 12 tokens, and the reconstruction of the streams.
    assert_equal_to_rounding(results[0], results[1], 4 * (6 + 9 + 6 + 12 + FORMULA_ROUNDINGS))


@pytest.mark.parametrize("name", ["plain", "glu", "dropout", "both", "reversible", "cross-entropy"])
def test_wide_activations_exist_for_one_chunk(name: str) -> None:
    glu, dropout = name in ("glu", "both"), 0.1 if name in ("dropout", "both") else 0.0
    layer, head = ChunkedFeedForward(2, 64, glu=glu, dropout=dropout, chunk_length=8), nn.Linear(2, 64)
    blocks = ReversibleSequence([ReversibleBlock(nn.Identity(), layer)])

    def loss(x: Tensor, chunk_length: int | None = 8) -> Tensor:
        return chunked_cross_entropy(x, head, torch.randint(64, x.shape[:-1]), chunk_length=chunk_length)

    function = {"reversible": lambda x: blocks(x)[1], "cross-entropy": loss}.get(name, layer)
    many, one = watched(function, 8 * 20 + 3), watched(loss if function is loss else layer, 8)
    assert many.largest <= 8 * 64
    assert 0 < many.peak <= one.peak
    layer.chunk_length = None  # the watch sees all of them where they exist
    whole = watched(lambda x: loss(x, None) if function is loss else layer(x), 8 * 20)
    assert whole.peak >= 20 * 8 * 64


# ---- the feed-forward layer


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [*FORMULAS, torch.sin])
def test_feed_forward_by_the_formula(activation: Any, bias: bool, glu: bool) -> None:
    layer = ChunkedFeedForward(6, 9, activation=activation, bias=bias, glu=glu, chunk_length=5).double()
    activate, x = FORMULAS.get(activation, activation), random_input((3, 4, 6))
    w = {name.removeprefix("module."): parameter for name, parameter in layer.named_parameters()}
    assert len(w) == (2 + glu) * (1 + bias)

    def linear(name: str, rows: Tensor) -> Tensor:
        return F.linear(rows, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def formula() -> Tensor:
        return linear("down", activate(linear("gate", x)) * linear("up", x) if glu else activate(linear("up", x)))

    leaves = [x, *w.values()]
    results = [with_gradients(function, leaves) for function in (lambda: layer(x), formula)]
    # Sums of 6 and 9 channels forward, 9 channels and 12 tokens backward.
    assert_equal_to_rounding(results[0], results[1], 6 + 9 + 9 + 12 + 2 * FORMULA_ROUNDINGS)


def test_feed_forward_options() -> None:
    assert set(ACTIVATIONS) == set(FORMULAS)
    for embed_dim, glu, hidden_dim in ((6, False, 24), (6, True, 16), (1, True, 2), (5, True, 13)):
        assert ChunkedFeedForward(embed_dim, glu=glu).get_parameter("module.up.weight").shape[0] == hidden_dim
    layer = ChunkedFeedForward(6, 9, glu=True, device="meta", dtype=torch.bfloat16)
    assert {name: list(w.shape) for name, w in layer.state_dict().items()} == {
        "module.up.weight": [9, 6], "module.up.bias": [9],
        "module.gate.weight": [9, 6], "module.gate.bias": [9],
        "module.down.weight": [6, 9], "module.down.bias": [6],
    }  # fmt: skip
    assert all(w.is_meta and w.dtype == torch.bfloat16 for w in layer.parameters())
    assert set(ChunkedFeedForward(6, bias=False).state_dict()) == {"module.up.weight", "module.down.weight"}
    assert layer.chunk_length == 1024 == TokenChunks(nn.Identity()).chunk_length
    text = repr(ChunkedFeedForward(6, 9, activation="silu", dropout=0.1, chunk_length=32))
    assert "(\n  chunk_length=32\n" in text and "activation='silu'" in text and "Dropout(p=0.1" in text
    assert "chunk_length=None" in repr(TokenChunks(nn.Identity(), None))


# ---- cross-entropy


def make_head(dtype: torch.dtype = torch.float64) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(6, dtype=dtype), nn.Linear(6, 11, dtype=dtype))


def make_labels(shape: Sequence[int], ignore_index: int = -100) -> Tensor:
    labels = torch.randint(11, tuple(shape))
    return labels.masked_fill(torch.rand(labels.shape) < 0.3, ignore_index)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk_length", CHUNK_LENGTHS)
@pytest.mark.parametrize("ignore_index", [-100, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy_equals_that_of_all_logits(
    shape: tuple[int, ...], chunk_length: int | None, ignore_index: int, smoothing: float, reduction: str
) -> None:
    options: Any = {"ignore_index": ignore_index, "label_smoothing": smoothing, "reduction": reduction}
    head, hidden, labels = make_head(), random_input(shape), make_labels(shape[:-1], ignore_index)
    leaves = [hidden, *head.parameters()]
    functions = (
        lambda: chunked_cross_entropy(hidden, head, labels, chunk_length=chunk_length, **options),
        lambda: F.cross_entropy(head(hidden).flatten(0, -2), labels.flatten(), **options),
    )
    result, whole = (with_gradients(function, leaves) for function in functions)
    assert result[0].shape == () and result[0].dtype == torch.float64
    # Sums of 6 channels, 11 classes and 12 tokens, the softmax, its logarithm, the smoothing and the norm.
    assert_equal_to_rounding(result, whole, 6 + 2 * 11 + 12 + 20)


def test_cross_entropy_defaults() -> None:
    head, hidden, labels = nn.Linear(6, 11), torch.randn(3, 4, 6), make_labels((3, 4))
    for x, y in ((hidden, labels), (hidden[0, 0], torch.tensor(4))):  # [..., E] may be [E]
        expected = F.cross_entropy(head(x.view(-1, 6)), y.flatten())
        assert_equal_to_rounding(chunked_cross_entropy(x, head, y), expected, 6 + 11 + 12 + 5)


@pytest.mark.parametrize("chunk_length", [5, 12, None])
def test_cross_entropy_of_parts_is_that_of_their_concatenation(chunk_length: int | None) -> None:
    head, parts, labels = make_head(), (random_input((3, 4, 2)), random_input((3, 4, 4))), make_labels((3, 4))
    leaves, loss = [*parts, *head.parameters()], partial(chunked_cross_entropy, head=head, labels=labels)
    results = [
        with_gradients(function, leaves)
        for function in (
            lambda: loss(parts, chunk_length=chunk_length),
            lambda: loss(torch.cat(parts, -1), chunk_length=chunk_length),
        )
    ]
    for of_parts, whole in zip(*results, strict=True):
        assert torch.equal(of_parts, whole)


def test_parts_are_concatenated_one_chunk_at_a_time() -> None:
    tokens, head, labels = 8 * 20 + 3, nn.Linear(64, 2), torch.zeros(1, 8 * 20 + 3, dtype=torch.int64)
    seen = watched(lambda x: chunked_cross_entropy((x, x), head, labels, chunk_length=8), tokens, width=32)
    assert seen.largest == tokens * 32  # the gradient of a part


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("chunk_length", [5, None])
@pytest.mark.parametrize("shape", [(3, 4, 6), (2, 0, 6)])
def test_no_token_counts(shape: tuple[int, ...], chunk_length: int | None, reduction: str) -> None:
    head, hidden, labels = make_head(), random_input(shape), torch.full(shape[:-1], -100)
    options: Any = {"chunk_length": chunk_length, "reduction": reduction, "label_smoothing": 0.1}
    loss = lambda: chunked_cross_entropy(hidden, head, labels, **options)  # noqa: E731
    for x in with_gradients(loss, [hidden, *head.parameters()]):
        assert torch.equal(x, torch.zeros_like(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_logits_give_a_float32_loss(dtype: torch.dtype, autocast: bool) -> None:
    """Of the chunks' logits: a half dtype's sums depend on the number of rows. Backward runs outside of autocast."""
    width = torch.float32 if autocast else dtype
    head, hidden, labels = make_head(width), random_input((3, 4, 6), width), make_labels((3, 4))
    results = []
    functions: list[Callable[[], Tensor]] = [
        lambda: chunked_cross_entropy(hidden, head, labels, chunk_length=5),
        lambda: F.cross_entropy(by_hand(head, hidden, 5).float().flatten(0, 1), labels.flatten()),
    ]
    for function in functions:
        # without the cache each chunk casts the weight, as it does when it is computed again
        with torch.autocast("cpu", dtype, enabled=autocast, cache_enabled=False):
            out = function()
        results.append((out, *torch.autograd.grad(out, [hidden, *head.parameters()])))
    assert results[0][0].dtype == torch.float32
    assert_equal_to_rounding(results[0][0], results[1][0], 12 + 5)
    assert_equal_to_rounding(results[0][1:], results[1][1:], 3)  # chunks


def test_cross_entropy_gradcheck() -> None:
    labels = torch.tensor([3, -100, 0, 10, 1])
    leaves = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((5, 3), (11, 3), (11,))]

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        head: Any = lambda tokens: F.linear(tokens, weight, bias)  # noqa: E731
        return chunked_cross_entropy(hidden, head, labels, chunk_length=2, label_smoothing=0.1)

    assert torch.autograd.gradcheck(loss, leaves)


# ---- torch.compile, torch.func, torch.export


def make_loss() -> tuple[nn.ModuleList, Callable[[Tensor, Tensor], Tensor]]:
    layer, head = modules = nn.ModuleList([ChunkedFeedForward(6, 9, glu=True, chunk_length=5).double(), make_head()])
    return modules, lambda x, labels: chunked_cross_entropy(layer(x), head, labels, chunk_length=7)


def test_compiles_whole() -> None:
    modules, loss = make_loss()
    x, labels = random_input((3, 4, 6)), make_labels((3, 4))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = [with_gradients(partial(f, x, labels), [x, *modules.parameters()]) for f in (compiled, loss)]
    assert_equal_to_rounding(results[0], results[1], 6 + 9 + 6 + 2 * 11 + 12)


def test_torch_func() -> None:
    """Gradients of each sample, of more than one chunk each."""
    x, labels, loss = random_input((3, 12, 6)), make_labels((3, 12)), make_loss()[1]
    grads = torch.func.vmap(torch.func.grad(loss))(x.detach(), labels)
    expected = [torch.autograd.grad(loss(*sample), sample[0])[0] for sample in zip(x, labels, strict=True)]
    assert_equal_to_rounding(grads, torch.stack(expected), 6 + 9 + 6 + 2 * 11 + 12)


@pytest.mark.parametrize("strict", [False, True])
def test_exports(strict: bool) -> None:
    layer, x = ChunkedFeedForward(6, 9, chunk_length=5, dtype=torch.float64), random_input((3, 4, 6)).detach()
    exported = torch.export.export(layer, (x,), strict=strict).module()(x)
    layer.chunk_length = None  # there all tokens are one chunk
    assert torch.equal(exported, layer(x))


# ---- errors

X, Y = torch.zeros(2, 5, 4), torch.zeros(2, 5, dtype=torch.int64)


def entropy(hidden: Any = X, labels: Any = Y, **options: Any) -> Tensor:
    return chunked_cross_entropy(hidden, nn.Linear(4, 3), labels, **options)


@pytest.mark.parametrize(("make", "kind", "message"), [
    (lambda: TokenChunks(nn.Identity(), 0), ValueError, "chunk_length must be at least 1, got 0"),
    (lambda: TokenChunks(nn.Identity())(X[0, 0]), ValueError,
     "x must have at least two dimensions [..., L, E], got shape [4]"),
    (lambda: ChunkedFeedForward(0), ValueError, "embed_dim must be at least 1, got 0"),
    (lambda: ChunkedFeedForward(4, 0), ValueError, "hidden_dim must be at least 1, got 0"),
    (lambda: ChunkedFeedForward(4, glu=1), TypeError, "glu must be a bool, got 1"),  # type: ignore[arg-type]
    (lambda: ChunkedFeedForward(4, dropout=1.5), ValueError, "dropout must be between 0 and 1, got 1.5"),
    (lambda: ChunkedFeedForward(4, dropout="x"), TypeError, "dropout must be a float, got 'x'"),  # type: ignore[arg-type]
    (lambda: ChunkedFeedForward(4, activation=3), ValueError,  # type: ignore[arg-type]
     f"activation must be one of {tuple(FORMULAS)}, got 3"),
    (lambda: entropy(hidden=[1.0]), TypeError, "hidden must be a floating tensor, got list"),
    (lambda: entropy(hidden=X.long()), TypeError, "hidden must be a floating tensor, got torch.int64"),
    (lambda: entropy(hidden=()), TypeError, "hidden must be a floating tensor, got tuple"),
    (lambda: entropy(hidden=(X, X.long())), TypeError, "hidden must be a floating tensor, got torch.int64"),
    (lambda: entropy(hidden=(X, X[:, :4])), ValueError, "labels must have shape [2, 4], got [2, 5]"),
    (lambda: entropy(labels=3), TypeError, "labels must be an int64 tensor, got int"),
    (lambda: entropy(labels=Y.int()), TypeError, "labels must be an int64 tensor, got torch.int32"),
    (lambda: entropy(labels=Y[:, :4]), ValueError, "labels must have shape [2, 5], got [2, 4]"),
    (lambda: entropy(labels=Y[:, 0]), ValueError, "labels must have shape [2, 5], got [2]"),
    (lambda: entropy(labels=Y[..., None]), ValueError, "labels must have shape [2, 5], got [2, 5, 1]"),
    (lambda: entropy(labels=Y.to("meta")), ValueError, "labels must be on the device of hidden, cpu, got meta"),
    (lambda: entropy(reduction="none"), ValueError, "reduction must be one of ('mean', 'sum'), got 'none'"),
    (lambda: entropy(label_smoothing=-0.1), ValueError, "label_smoothing must be between 0 and 1, got -0.1"),
    (lambda: entropy(chunk_length=2.0), TypeError, "chunk_length must be an int, got 2.0"),
])  # fmt: skip
def test_arguments_are_checked(make: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        make()
