"""Reversible blocks: values and gradients against stored activations, random states, memory, dtypes, errors."""

import re
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from reformer_kernels.modules.attention import LSHSelfAttention
from reformer_kernels.modules.feed_forward import ChunkedFeedForward, TokenChunks
from reformer_kernels.modules.reversible import ReversibleBlock, ReversibleSequence

from .rounding import assert_equal_to_rounding

E, L = 4, 6
Streams = Tensor | tuple[Tensor, Tensor]
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "y1": lambda y1, y2: y1.square().sum(),
    "y2": lambda y1, y2: y2.square().sum(),
    "both": lambda y1, y2: y1.square().sum() + 3 * y2.square().sum(),
}


def rounded(halves: int) -> int:
    """A half rounds a stream forward and backward, and f and g, of slopes below 1/2, pass on earlier roundings."""
    return round(sum(2 * 1.5**k for k in range(halves)))


class Layer(nn.Module):
    """Small integers in, small integers out: nothing rounds, so what equals the stored version does so to the bit."""

    def __init__(self, width: int = E, out: int = E, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(width, out, dtype=dtype), nn.Dropout(0.5)
        for parameter in self.parameters():
            parameter.data = torch.randint(-1, 2, parameter.shape).to(dtype)

    def forward(self, u: Tensor, **more: Any) -> Tensor:
        """Also of tensors in any structure: masks and what is added; and of numbers, which multiply."""
        h = self.linear(u)
        for a in pytree.tree_leaves(more):
            if isinstance(a, Tensor):
                h = h.masked_fill(a, 0) if a.dtype == torch.bool else h + a
            elif a is not None:
                h = h * a
        out: Tensor = self.dropout(F.relu6(h))
        return out


class First(nn.Module):
    """The first stream of a sequence inside of a function."""

    def __init__(self, blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, u: Tensor) -> Tensor:
        out: Tensor = self.blocks(u)[0]
        return out


class Checkpointed(First):
    def forward(self, u: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.blocks, u, use_reentrant=False)
        return out


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        first, second = Layer(), Layer()
        second.linear.weight = first.linear.weight
        self.layers = nn.ModuleList([first, second])

    def forward(self, u: Tensor) -> Tensor:
        out: Tensor = self.layers[1](self.layers[0](u))
        return out


class Constant(nn.Module):
    """A function that is its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(integers().detach())

    def forward(self, u: Tensor) -> Tensor:
        return self.value


def integers(width: int = E, dtype: torch.dtype = torch.float64, length: int = L) -> Tensor:
    return torch.randint(-3, 4, (2, length, width)).to(dtype).requires_grad_()


def block(f: Any = None, g: Any = None) -> ReversibleBlock:
    return ReversibleBlock(Layer() if f is None else f, Layer() if g is None else g)


def make(n: int = 3, **options: Any) -> ReversibleSequence:
    return ReversibleSequence([block() for _ in range(n)], **options)


def attention(**options: Any) -> LSHSelfAttention:
    return LSHSelfAttention(8, 2, n_hashes=2, n_buckets=4, chunk_length=4, dropout=0.1, **options)


def frozen(blocks: list[ReversibleBlock], which: Callable[[str], bool]) -> list[ReversibleBlock]:
    for name, parameter in nn.ModuleList(blocks).named_parameters():
        parameter.requires_grad_(not which(name))
    return blocks


def shared(layer: nn.Module) -> list[ReversibleBlock]:
    return [block(layer, layer), block(g=layer)]


CASES: dict[str, Callable[[], Sequence[ReversibleBlock]]] = {
    "three blocks": lambda: [block() for _ in range(3)],
    "some without g": lambda: [ReversibleBlock(Layer()), block(), ReversibleBlock(Layer())],
    "all without g": lambda: [ReversibleBlock(Layer()), ReversibleBlock(Layer())],
    "a block at two places": lambda: [block()] * 2,
    "a layer in two blocks": lambda: shared(Layer()),
    "a layer of two names": lambda: [block(nn.Sequential(layer, layer)) for layer in (Layer(),)] * 2,
    "tied weights": lambda: [block(Tied()), block(g=Tied())],
    "functions": lambda: [block(torch.relu), block(lambda u: 2 * u, F.relu6)],
    "no parameters": lambda: [block(nn.ReLU(), F.relu6), block(F.relu6)],
    "identities": lambda: [ReversibleBlock(nn.Identity(), nn.Sequential()), ReversibleBlock(nn.Sequential(), Layer())],
    "a parameter": lambda: [block(Constant()), block(g=Constant())],
    "chunks": lambda: [block(TokenChunks(Layer(), 5), TokenChunks(Layer(), 4)) for _ in range(2)],
    "checkpoints": lambda: [block(Checkpointed(Layer()), Checkpointed(Layer())) for _ in range(2)],
    "sequences inside": lambda: [block(First(make(2)), First(make(1))) for _ in range(2)],
    "first block frozen": lambda: frozen([block() for _ in range(3)], lambda name: name.startswith("0.")),
    "last block frozen": lambda: frozen([block() for _ in range(3)], lambda name: name.startswith("2.")),
    "weights frozen": lambda: frozen([block() for _ in range(2)], lambda name: name.endswith("weight")),
    "functions frozen": lambda: frozen([block() for _ in range(3)], lambda name: name.split(".")[:2] in (
        ["0", "f"], ["1", "g"], ["2", "f"],
    )),
}  # fmt: skip


def outcome(seq: nn.Module, x: Streams, *kwargs: Any, leaves: Sequence[Tensor] = (), loss: str = "both") -> Any:
    """Both streams, the gradients of a loss, and the random state after forward, which backward leaves alone."""
    given = [*pytree.tree_leaves(x), *leaves, *seq.parameters()]
    leaves = [t for t in dict.fromkeys(given) if t.requires_grad]
    torch.manual_seed(1)
    y1, y2 = seq(x, *kwargs)
    random, value = torch.get_rng_state(), LOSSES[loss](y1, y2)
    torch.manual_seed(2)
    torch.rand(3)
    before, grads = torch.get_rng_state(), [torch.zeros_like(t) for t in leaves]
    if value.requires_grad:
        grads = list(torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True))
    assert torch.equal(torch.get_rng_state(), before)
    return (y1.detach(), y2.detach(), *grads), random


def assert_as_stored(seq: ReversibleSequence, *args: Any, roundings: int = 0, **options: Any) -> None:
    seq.reversible = True
    results, random = outcome(seq, *args, **options)
    seq.reversible = False
    expected, expected_random = outcome(seq, *args, **options)
    assert torch.equal(random, expected_random)
    assert_equal_to_rounding(results, expected, roundings)


# ---- values


def test_functions_of_no_length() -> None:
    """A module may be false, as an empty nn.Sequential is; no function is None only."""
    x1, x2 = integers(), integers()
    for result in (ReversibleBlock(nn.Sequential(), nn.Sequential())(x1, x2), CASES["identities"]()[0](x1, x2)):
        assert torch.equal(result[0], x1 + x2) and torch.equal(result[1], x2 + (x1 + x2))


@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize("with_g", [(True, True), (False, True), (True, False), (False, False), ()])
@pytest.mark.parametrize("widths", [(E, E), (E, 3)])
def test_formula_and_inverse(widths: tuple[int, int], with_g: tuple[bool, ...], reversible: bool) -> None:
    x1, x2 = x = integers(widths[0]), integers(widths[1])
    blocks = [ReversibleBlock(Layer(widths[1], E), Layer(E, widths[1]) if g else None) for g in with_g]
    seq = ReversibleSequence(blocks, reversible=reversible).eval()
    for b in blocks:
        before = x1, x2
        x1 = x1 + b.f(x2)
        x2 = x2 if b.g is None else x2 + b.g(x1)
        for result, expected in ((b(*before), (x1, x2)), (b.inverse(x1, x2), before)):
            assert torch.equal(result[0], expected[0]) and torch.equal(result[1], expected[1])
    for given in (x, list(x)):
        y1, y2 = seq(given)
        assert torch.equal(y1, x1) and torch.equal(y2, x2)
    with torch.no_grad():
        assert all(map(torch.equal, seq(x), (x1, x2)))


def test_both_streams_start_from_one_tensor() -> None:
    seq, x = make().eval(), integers()
    assert all(map(torch.equal, seq(x), seq((x, x))))
    assert_as_stored(seq, x)
    assert all(y is not x and torch.equal(y, x) for y in make(0)(x))
    assert_as_stored(make(0), x)


def test_block_takes_keyword_arguments_of_either_function() -> None:
    b, x1, x2, shift = block().eval(), integers(), integers(), integers()
    assert b.g is not None
    y1, y2 = b(x1, x2, {"shift": shift}, {"factor": 2})
    assert torch.equal(y1, x1 + b.f(x2, shift=shift)) and torch.equal(y2, x2 + b.g(y1, factor=2))
    assert all(map(torch.equal, b.inverse(y1, y2, {"shift": shift}, {"factor": 2}), (x1, x2)))


def test_names_in_the_state_dict_and_in_repr() -> None:
    names = ["0.f.linear.weight", "0.f.linear.bias", "0.g.linear.weight", "0.g.linear.bias"]
    assert list(make(1).state_dict()) == [f"blocks.{name}" for name in names]
    text = repr(make(1, min_length=7, stream_dtype=torch.float32))
    assert "reversible=True, min_length=7, stream_dtype=torch.float32" in text
    assert list(ReversibleBlock(torch.relu).state_dict()) == []


# ---- gradients


@pytest.mark.parametrize("needed", ["x1 and x2", "x1", "x2", "nothing"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_stored_activations(case: str, loss: str, needed: str) -> None:
    seq, x = ReversibleSequence(CASES[case]()), (integers(), integers())
    for name, t in zip(("x1", "x2"), x, strict=True):
        t.requires_grad_(name in needed)
    before = dict(seq.named_parameters())
    assert_as_stored(seq, x, loss=loss)
    assert all(p is before[name] and p.grad is None for name, p in seq.named_parameters())
    assert_as_stored(seq.eval(), x, loss=loss)


def test_widths_that_differ() -> None:
    assert_as_stored(ReversibleSequence([block(Layer(3, E), Layer(E, 3)) for _ in range(3)]), (integers(), integers(3)))


def test_gradcheck() -> None:
    def smooth() -> nn.Module:
        return nn.Sequential(nn.Linear(E, E), nn.Tanh()).double()

    seq = ReversibleSequence([block(smooth(), smooth()) for _ in range(2)])
    x = [torch.randn(2, E, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda *x: seq(x), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("depth", [1, 3])
def test_gradients_of_a_reformer(depth: int, dtype: torch.dtype) -> None:
    """Hash seeds drawn anew, dropout of attention weights and of hidden activations, chunks."""
    blocks = [
        block(nn.Sequential(nn.LayerNorm(8), attention()), ChunkedFeedForward(8, 12, dropout=0.2, chunk_length=7))
        for _ in range(depth)
    ]
    x = torch.randn(2, 16, 8, dtype=dtype, requires_grad=True)
    assert_as_stored(ReversibleSequence(blocks).to(dtype), x, roundings=rounded(2 * depth))


# ---- keyword arguments

KWARGS: dict[str, Callable[..., tuple[Any, Any]]] = {  # of two tensors with gradients and two masks
    "a mapping for all": lambda a, b, m, n: ({"a": a}, {"b": b}),
    "any mapping": lambda a, b, m, n: (types.MappingProxyType({"a": a}), None),
    "of g": lambda a, b, m, n: (None, {"a": a, "m": m}),
    "one for each block": lambda a, b, m, n: ([{"a": a}, None, {"b": b, "m": m}], (None, {}, {"n": n})),
    "the same for several": lambda a, b, m, n: ([{"a": a}, {"a": a}, None], [{"a": a}] * 3),
    "twice for one": lambda a, b, m, n: ({"a": a, "again": a, "b": b}, None),
    "masks": lambda a, b, m, n: ({"m": m}, {"m": m, "n": n}),
    "nested": lambda a, b, m, n: ({"k": {"a": [a, (m, None)], "scale": 2}, "b": b}, {"k": ([n], {"b": b}), "f": 3}),
    "an encoder's": lambda a, b, m, n: ({"context": a + b}, {"context": (b - a).mT.mT}),
    "views": lambda a, b, m, n: ({"a": a[:1], "b": b[:, :, :1]}, {"a": a.mT.mT}),
    "numbers": lambda a, b, m, n: ({"scale": 2}, {"scale": -1}),
}


@pytest.mark.parametrize("needs_x", [False, True])
@pytest.mark.parametrize("functions", ["plain", "chunks"])
@pytest.mark.parametrize("case", KWARGS)
def test_keyword_arguments(case: str, functions: str, needs_x: bool) -> None:
    seq, x, leaves = make(), integers().requires_grad_(needs_x), (integers(), integers())
    if functions == "chunks":  # a TokenChunks that takes keyword arguments cannot be cut

        class Chunks(TokenChunks):  # fmt: skip
            def forward(self, x: Tensor, **more: Any) -> Tensor:
                out: Tensor = self.module(x, **more)
                return out

        seq = ReversibleSequence([block(Chunks(Layer(), 5), Chunks(Layer(), 5)) for _ in range(3)])
    kwargs = KWARGS[case](*leaves, *(torch.rand(2, L, 1) < 0.3 for _ in range(2)))
    assert_as_stored(seq, x, *kwargs, leaves=leaves)
    for parameter in seq.parameters():
        parameter.requires_grad_(False)
    assert_as_stored(seq, x, *kwargs, leaves=leaves)  # gradients of these alone


def test_an_input_is_also_a_keyword_argument() -> None:
    x = integers()
    assert_as_stored(make(), x, {"context": x})
    weight = nn.Parameter(integers().detach())
    constant = Constant()
    constant.value = weight
    seq = ReversibleSequence([block(constant), block(Constant())])
    assert_as_stored(seq, x, None, {"weight": weight})


def test_backward_uses_the_keyword_arguments_of_forward() -> None:
    seq, x = make(), integers()
    kwargs: dict[str, Any] = {"k": [integers()]}
    expected = outcome(seq, x, kwargs)[0]
    torch.manual_seed(1)
    y1, y2 = seq(x, kwargs)
    kwargs["k"].append(integers())
    kwargs["more"] = integers()
    assert torch.equal(torch.autograd.grad(LOSSES["both"](y1, y2), x)[0], expected[2])


# ---- memory


def saved_bytes(seq: ReversibleSequence, x: Tensor) -> int:
    """For backward, without parameters, which exist anyway."""
    parameters, saved = {p.data_ptr() for p in seq.parameters()}, [0]

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in parameters:
            saved[0] += t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        seq(x)
    return saved[0]


def test_saved_bytes_do_not_grow_with_depth() -> None:
    x = integers()
    assert [saved_bytes(make(n), x) for n in (0, 1, 2, 7)] == [2 * x.nbytes] * 4
    assert saved_bytes(make(2, reversible=False), x) > 3 * 2 * x.nbytes
    x = torch.randn(2, 16, 8, requires_grad=True)
    for depth in (1, 3):  # attention of two heads and two rounds, in int32
        seq = ReversibleSequence([block(attention(), ChunkedFeedForward(8, chunk_length=5)) for _ in range(depth)])
        assert saved_bytes(seq, x) == 2 * x.nbytes + depth * 4 * (2 * 2 * 2 * 16)


@pytest.mark.parametrize("depth", [2, 6])
def test_streams_that_are_alive(depth: int) -> None:
    """Whatever keeps them: a context, a closure, a list of keyword arguments."""
    seq, x, inputs = make(depth), integers(), []
    for module in seq.modules():
        if isinstance(module, Layer):
            module.register_forward_pre_hook(lambda _, args: inputs.append(StorageWeakRef(args[0].untyped_storage())))
            module.register_forward_pre_hook(lambda *_: counts.append(alive()))

    def alive() -> int:
        return sum(not storage.expired() for storage in {storage.cdata: storage for storage in inputs}.values())

    counts: list[int] = []
    y1, y2 = seq((x * 1, x * 1))
    assert len(inputs) == 2 * depth and alive() == 1  # the first of the final streams; no function sees the second
    loss, finals = LOSSES["both"](y1, y2), [weakref.ref(y) for y in (y1, y2)]
    inputs += [StorageWeakRef(y.untyped_storage()) for y in (y1, y2)]
    del y1, y2
    counts.clear()
    loss.backward()
    assert len(counts) == 2 * depth and max(counts) <= 4  # the final streams and the present ones
    assert alive() == 0 and all(final() is None for final in finals) and loss.grad_fn is not None


# ---- when activations are stored, and dtypes


def is_reversible(seq: ReversibleSequence, x: Streams) -> bool:
    """By what it saves: nothing of a function."""
    calls: list[int] = []
    handle = seq.get_submodule("blocks.0.f").register_forward_hook(lambda *_: calls.append(1))
    y1, _ = seq(x)
    y1.sum().backward()
    handle.remove()
    assert len(calls) in (1, 2)
    return len(calls) == 2


def test_when_activations_are_stored() -> None:
    x = integers()
    assert is_reversible(make(), x) and not is_reversible(make(reversible=False), x)
    for min_length in (0, 1, L - 1, L, L + 1):
        seq = make(min_length=min_length)
        assert is_reversible(seq, x) == (min_length <= L)
        assert is_reversible(seq, integers(length=1)) == (min_length <= 1)
    for lengths in ((1, L), (L, 1)):  # the second counts
        seq = ReversibleSequence([ReversibleBlock(nn.AdaptiveAvgPool2d((lengths[0], E)))], min_length=2)
        assert is_reversible(seq, (integers(length=lengths[0]), integers(length=lengths[1]))) == (lengths[1] == L)
    rows = torch.randn(E, requires_grad=True)  # of no length
    assert is_reversible(ReversibleSequence([block(nn.Tanh(), nn.Tanh())], min_length=9), rows)
    seq = make()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not seq(x)[0].requires_grad
    seq.requires_grad_(False)
    assert not seq(x.detach())[0].requires_grad


@pytest.mark.parametrize("reversible", [False, True])
def test_stream_dtype(reversible: bool) -> None:
    seq = make(stream_dtype=torch.float32, reversible=reversible).bfloat16()
    x, seen = integers(dtype=torch.bfloat16), []
    for module in seq.modules():
        if isinstance(module, Layer):
            module.register_forward_hook(lambda _, args, out: seen.append((args[0].dtype, out.dtype)))
    y1, y2 = seq(x)
    assert y1.dtype == y2.dtype == torch.float32
    (y1 + y2).sum().backward()
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)} and len(seen) == (12 if reversible else 6)
    grads: list[Any] = [leaf.grad for leaf in (x, *seq.parameters())]
    assert {grad.dtype for grad in grads} == {torch.bfloat16}


def test_streams_are_not_made_narrower() -> None:
    y1, y2 = make(stream_dtype=torch.float32).double()(integers(dtype=torch.float64))
    assert y1.dtype == y2.dtype == torch.float64


@pytest.mark.parametrize(("dtype", "stream_dtype"), [
    (torch.bfloat16, torch.float32), (torch.float32, torch.float64), (torch.float64, torch.float64),
])  # fmt: skip
def test_gradients_with_stream_dtype(dtype: torch.dtype, stream_dtype: torch.dtype) -> None:
    """Integers to the bit: of up to 256 also bfloat16 rounds none."""
    seq = ReversibleSequence([block(Layer(dtype=dtype), Layer(dtype=dtype))], stream_dtype=stream_dtype)
    assert_as_stored(seq, integers(dtype=dtype))
    assert_as_stored(seq, (integers(dtype=dtype), integers(dtype=dtype)), {"shift": integers(dtype=dtype)})


def test_reals_with_stream_dtype() -> None:
    """A function's input in bfloat16 comes from a stream off by a few units of float32, and is off by one of its own
    where that crosses a tie: one rounding of bfloat16 a half, which the others pass on."""
    blocks = [block(*(nn.Sequential(nn.Linear(E, E), nn.Tanh()) for _ in "fg")) for _ in range(3)]
    seq = ReversibleSequence(blocks, stream_dtype=torch.float32).bfloat16()
    assert_as_stored(seq, torch.randn(2, L, E, dtype=torch.bfloat16, requires_grad=True), roundings=rounded(6) // 2)


def test_meta_tensors() -> None:
    """Shapes without values, as in estimates of memory."""
    seq = ReversibleSequence([block(nn.Linear(E, E), nn.Linear(E, E))]).to("meta")
    y1, y2 = seq(torch.empty(2, L, E, device="meta"))
    (y1 + y2).sum().backward()
    assert y1.shape == (2, L, E)
    for p in seq.parameters():
        assert p.grad is not None and p.grad.shape == p.shape and p.grad.is_meta


# ---- errors


X = torch.zeros(2, L, E, dtype=torch.float64)
PAIR = "x must be a tensor or a pair of tensors (x1, x2), got "
MAPPING = "must be a mapping, or a sequence of one for each block, got "


@pytest.mark.parametrize(("call", "kind", "message"), [
    (lambda: ReversibleBlock(None), TypeError,  # type: ignore[arg-type]
     "f must be a module or a function, got NoneType"),
    (lambda: ReversibleBlock(3), TypeError, "f must be a module or a function, got int"),  # type: ignore[arg-type]
    (lambda: ReversibleBlock(torch.relu, "g"), TypeError,  # type: ignore[arg-type]
     "g must be a module or a function, got str"),
    (lambda: ReversibleSequence([block(), nn.ReLU()]), TypeError,  # type: ignore[list-item]
     "blocks must be ReversibleBlock modules, got ReLU at 1"),
    (lambda: make(reversible=1), TypeError, "reversible must be a bool, got 1"),
    (lambda: make(min_length=2.0), TypeError, "min_length must be an int, got 2.0"),
    (lambda: make(min_length=-1), ValueError, "min_length must be at least 0, got -1"),
    (lambda: make(stream_dtype=torch.int32), ValueError, "stream_dtype must be None or one of "
     "(torch.float32, torch.float64, torch.bfloat16, torch.float16), got torch.int32"),
    (lambda: make()(None), TypeError, PAIR + "NoneType"),
    (lambda: make()((X,)), TypeError, PAIR + "tuple"),
    (lambda: make()([X, X, X]), TypeError, PAIR + "list"),
    (lambda: make()((X, 3)), TypeError, PAIR + "tuple"),
    (lambda: make()(X, 3), TypeError, f"f_kwargs {MAPPING}3"),
    (lambda: make()(X, None, [{}, 3, None]), TypeError, f"g_kwargs {MAPPING}[{{}}, 3, None]"),
    (lambda: make()(X, "abc"), TypeError, f"f_kwargs {MAPPING}'abc'"),
    (lambda: make()(X, [{}]), ValueError, "f_kwargs must have an entry for each of the 3 blocks, got 1"),
    (lambda: make()(X, None, [None] * 4), ValueError, "g_kwargs must have an entry for each of the 3 blocks, got 4"),
])  # fmt: skip
def test_arguments_are_checked(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        call()
