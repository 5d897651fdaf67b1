"""Reversible blocks with what modules have: hooks, buffers, parametrizations, compilers of single blocks."""

import functools
import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from reformer_kernels.modules.attention import LSHSelfAttention
from reformer_kernels.modules.feed_forward import ChunkedFeedForward, TokenChunks, chunked_cross_entropy
from reformer_kernels.modules.reversible import ReversibleBlock, ReversibleSequence

from .rounding import assert_equal_to_rounding
from .test_choices import Attention
from .test_reversible import LOSSES, E, L, Layer, assert_as_stored, block, integers, make, outcome, rounded

# ---- hooks of blocks


@pytest.mark.parametrize("reversible", [False, True])
def test_hooks_of_a_block(reversible: bool) -> None:
    seq, x, seen = make(2, reversible=reversible), integers(), []
    seq.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(("before", len(args))))
    seq.blocks[1].register_forward_hook(lambda _, args, out: seen.append(("after", len(out))))
    seq.blocks[1].register_full_backward_hook(lambda _, into, out: seen.append(("backward", len(out))))
    sum(y.sum() for y in seq(x)).backward()
    assert seen == [("before", 4), ("after", 2), ("backward", 2)]
    with torch.no_grad():
        seq(x)
    assert seen[3:] == [("before", 4), ("after", 2)]


def test_hooks_take_part_as_in_stored_activations() -> None:
    seq = make(3)
    seq.get_submodule("blocks.1.f").register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    seq.get_submodule("blocks.1.g").register_forward_hook(lambda _, args, out: out * 2)
    seq.get_submodule("blocks.0.g").register_full_backward_hook(
        lambda _, into, out: tuple(2 * g for g in into)  # type: ignore[attr-defined]
    )
    assert_as_stored(seq, integers())
    chunks = ReversibleSequence([block(TokenChunks(Layer(), 5), TokenChunks(Layer(), 4))])
    seen: list[torch.Size] = []

    def doubled(_: nn.Module, arguments: Any, out: Tensor) -> Tensor:
        seen.append(out.shape)
        return out * 2

    chunks.get_submodule("blocks.0.f").register_forward_hook(doubled)
    assert_as_stored(chunks, integers())
    assert set(seen) == {(2, L, E)}  # of all tokens, not of a chunk


@pytest.mark.parametrize("hook", ["changes", "casts", "writes"])
def test_hooks_that_change_streams(hook: str) -> None:
    """Of a block: nothing could be reconstructed."""
    seq, x = make(2), integers()
    seq.blocks[1].register_forward_pre_hook({
        "changes": lambda _, args: (2 * args[0], *args[1:]),
        "casts": lambda _, args: (args[0], args[1].float(), *args[2:]),
        "writes": lambda _, args: (args[0].mul_(2), *args[1:]),
    }[hook])  # fmt: skip
    with pytest.raises(RuntimeError, match="changed between two functions"):
        seq(x)
    seq.reversible = False
    assert hook == "casts" or seq(x)[0].requires_grad


def test_a_function_that_writes_to_its_input() -> None:
    seq = ReversibleSequence([block(), block(nn.ReLU(inplace=True), None)])
    with pytest.raises(RuntimeError, match="changed its input in place"):
        seq(integers())


# ---- buffers


class Shifted(nn.Module):
    """Its result depends on a buffer that every forward changes."""

    def __init__(self, replaced: bool = False) -> None:
        super().__init__()
        self.shift: Tensor
        self.never: Tensor
        self.layer, self.replaced = Layer(), replaced
        self.register_buffer("shift", torch.zeros(E, dtype=torch.float64))
        self.register_buffer("never", torch.ones(E, dtype=torch.float64))

    def forward(self, u: Tensor) -> Tensor:
        out: Tensor = self.layer(u) + self.shift * self.never
        if self.replaced:
            self.shift = self.shift + 1
        else:
            self.shift += 1
        return out


BUFFERS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm1d(L, dtype=torch.float64),
    "batch norm in chunks": lambda: TokenChunks(nn.BatchNorm1d(E, dtype=torch.float64), 5),
    "without statistics": lambda: nn.BatchNorm1d(L, track_running_stats=False, dtype=torch.float64),
    "result depends on it": Shifted,
    "replaced": lambda: Shifted(True),
    "chunks depend on it": lambda: TokenChunks(Shifted(), 5),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(E, E, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_change_once(name: str) -> None:
    f, x = BUFFERS[name](), integers()
    seq = ReversibleSequence([block(f, nn.Tanh()), block(nn.Tanh(), f)])  # at two places
    start = {name: b.clone() for name, b in seq.named_buffers()}
    results, buffers = [], []
    for seq.reversible in (True, False):
        seq.load_state_dict(start, strict=False)
        results.append(outcome(seq, x)[0])
        buffers.append({name: b.clone() for name, b in seq.named_buffers()})
    assert all(torch.equal(b, buffers[1][name]) for name, b in buffers[0].items())
    assert not start or any(not torch.equal(b, start[name]) for name, b in buffers[0].items())
    # A norm of 8 or 12 values passes on what was rounded before it, and its gradient is a sum of as many.
    assert_equal_to_rounding(results[0], results[1], 12 * rounded(4))


def test_buffers_of_two_backward_passes() -> None:
    seq, x = ReversibleSequence([block(Shifted(), Shifted())]).eval(), integers()
    y = LOSSES["both"](*seq(x))
    grads = [torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*grads) and grads[0].any()
    assert all(b.eq(1).all() for b in seq.buffers())


@pytest.mark.parametrize("passes", [1, 2])
def test_buffers_change_once_in_chunks_alone(passes: int) -> None:
    """A checkpoint by itself changes them twice."""
    norm, x = nn.BatchNorm1d(E, dtype=torch.float64), integers()
    expected = nn.BatchNorm1d(E, dtype=torch.float64)
    for piece in x.flatten(0, 1).split(5):
        expected(piece)
    y = TokenChunks(norm, 5)(x).square().sum()
    for _ in range(passes):
        y.backward(retain_graph=True)
    assert all(map(torch.equal, norm.buffers(), expected.buffers()))
    head = nn.BatchNorm1d(E, dtype=torch.float64)
    labels = torch.zeros(x.shape[:2], dtype=torch.int64)
    chunked_cross_entropy(x, head, labels, chunk_length=5).backward()
    assert all(map(torch.equal, head.buffers(), expected.buffers()))


def test_buffers_of_a_functional_call() -> None:
    seq, x = ReversibleSequence([block(Shifted())]).eval(), integers()
    given = {name: torch.full_like(b, 3) for name, b in seq.named_buffers()}
    gradients = []
    for seq.reversible in (True, False):
        y = torch.func.functional_call(seq, {k: v.clone() for k, v in given.items()}, x)
        gradients.append(torch.autograd.grad(LOSSES["both"](*y), [x, *seq.parameters()]))
    assert all(map(torch.equal, *gradients))
    assert all(torch.equal(b, (torch.ones_like if "never" in name else torch.zeros_like)(b))
               for name, b in seq.named_buffers())  # fmt: skip


# ---- functions that do not do the same again


@pytest.mark.parametrize("second", [
    lambda u: u.exp(), lambda u: u.sin().cos().exp(), lambda u: u.sin().float().cos().double(),
])  # fmt: skip
def test_a_function_that_does_something_else_again(second: Callable[[Tensor], Tensor]) -> None:
    """Fewer, more, or other tensors."""
    calls: list[int] = []

    def f(u: Tensor) -> Tensor:
        calls.append(1)
        return u.sin().cos() if len(calls) == 1 else second(u)

    y1, _ = ReversibleSequence([ReversibleBlock(f)])(integers())
    with pytest.raises(RuntimeError, match="saved other tensors for backward when it was computed again"):
        y1.sum().backward()


# ---- parametrizations


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5


@pytest.mark.parametrize("kind", ["product", "weight norm"])
@pytest.mark.parametrize("backward", ["inside", "outside"])
def test_cached_parametrization(backward: str, kind: str) -> None:
    layer = nn.Linear(E, E, dtype=torch.float64)
    if kind == "product":
        parametrize.register_parametrization(layer, "weight", Half())
    else:
        parametrizations.weight_norm(layer)
    seq, x = ReversibleSequence([block(layer, Layer()), block(Layer(), layer)]).eval(), integers()
    results = []
    for seq.reversible in (True, False):
        with parametrize.cached():
            y = LOSSES["both"](*seq(x))
            if backward == "inside":
                y.backward()
        if backward == "outside":
            y.backward()
        assert not parametrize._cache_enabled and parametrize._cache == {}
        results.append([t.grad for t in (x, *seq.parameters())])
        seq.zero_grad()
        x.grad = None
    assert all(g is not None for g in results[0])
    assert_equal_to_rounding(results[0], results[1], 4 * rounded(4))


# ---- selective checkpoints


@pytest.mark.parametrize("kept", ["buckets", "products", "nothing"])
@pytest.mark.parametrize("hash_seed", [0, None])
@pytest.mark.parametrize("clustered", [False, True])
def test_selective_checkpoint_of_the_sequence(clustered: bool, hash_seed: int | None, kept: str) -> None:
    ops = torch.ops.reformer_kernels
    saved = {
        "buckets": [ops.hash_buckets.default, ops.select_keys.default],
        "products": [torch.ops.aten.addmm.default, torch.ops.aten.mm.default, torch.ops.aten.bmm.default],
        "nothing": [],
    }[kept]
    seq = ReversibleSequence([block(Attention(hash_seed, clustered), ChunkedFeedForward(8, chunk_length=5))]).double()
    x = torch.randn(2, 16, 8, dtype=torch.float64, requires_grad=True)
    context = functools.partial(create_selective_checkpoint_contexts, saved)

    def gradients(run: Callable[..., Any]) -> list[Tensor]:
        torch.manual_seed(1)
        return list(torch.autograd.grad(LOSSES["both"](*run(x)), [x, *seq.parameters()]))

    expected = gradients(seq)
    got = gradients(lambda x: checkpoint(seq, x, use_reentrant=False, context_fn=context))
    assert all(map(torch.equal, got, expected))


# ---- what is kept


def test_nothing_is_left_when_the_graph_is_gone() -> None:
    """At once: a garbage collector would come later."""
    gc.collect()
    gc.disable()
    try:
        for backward in (False, True):
            seq, mask = ReversibleSequence([block(g=TokenChunks(Layer(), 5)) for _ in range(2)]), torch.zeros(E) > 0
            y = LOSSES["both"](*seq(integers(), {"mask": mask}))
            kept = weakref.ref(mask)
            if backward:
                y.backward()
            del mask
            assert kept() is not None
            del y
            assert kept() is None
    finally:
        gc.enable()


def test_tensors_from_inside() -> None:
    """They have no streams to start from."""
    seq, inside = make(2), []
    seq.get_submodule("blocks.0.f").register_forward_hook(lambda _, args, out: inside.append(out))
    y = seq(integers())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not through the outputs of the sequence"):
            inside[0].sum().backward(retain_graph=True)
        y = None
    assert y is None


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_of_a_block(use_reentrant: bool) -> None:
    seq = make(2)
    seq.blocks[0] = checkpoint_wrapper(seq.blocks[0], CheckpointImpl.REENTRANT if use_reentrant else
                                       CheckpointImpl.NO_REENTRANT)  # fmt: skip
    y1, y2 = seq(integers())
    with pytest.raises(RuntimeError, match="by a checkpoint around it"):
        (y1 + y2).sum().backward()


@pytest.mark.parametrize("chunked", [False, True])
def test_how_often_functions_are_computed(chunked: bool) -> None:
    """Twice, also by chunks."""
    layers, calls = [Layer() for _ in range(6)], []
    for i, layer in enumerate(layers):
        layer.register_forward_hook(lambda _, args, out, i=i: calls.append((i, len(args[0].flatten(0, -2)))))
    functions = [TokenChunks(layer, 5) for layer in layers] if chunked else layers
    seq, x = ReversibleSequence([block(*functions[i : i + 2]) for i in (0, 2, 4)]), integers()
    y1, _ = seq(x)
    sizes = [5, 5, 2] if chunked else [12]
    assert calls == [(i, n) for i in range(6) for n in sizes]
    calls.clear()
    torch.autograd.grad(y1.sum(), x)
    assert calls == [(i, n) for i in (5, 4, 3, 2, 1, 0) for n in reversed(sizes)]


def test_functions_that_backward_does_not_visit() -> None:
    """They are taken off the streams all the same."""
    weight, calls = nn.Parameter(torch.randint(-2, 3, (E,)).double()), []

    def detached(u: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return u.detach() * weight

    seq, x = ReversibleSequence([block(), block(g=detached), block(detached), block()]), integers()
    grads = []
    for seq.reversible in (True, False):
        calls.clear()
        torch.manual_seed(1)
        grads.append(torch.autograd.grad(LOSSES["both"](*seq(x)), [x, *seq.blocks[0].parameters()]))
        assert calls == [True, True] + [False] * (2 * seq.reversible)
    assert all(map(torch.equal, *grads))


# ---- compilers of single blocks


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compiled_blocks() -> None:
    torch._dynamo.reset()
    seq = ReversibleSequence([block(Attention(), ChunkedFeedForward(8, dropout=0.2, chunk_length=5)) for _ in range(2)])
    x = torch.randn(2, 16, 8, dtype=torch.float64, requires_grad=True)
    expected = outcome(seq.double(), x)
    for b in seq.blocks:
        b.compile(backend="aot_eager")
    results = outcome(seq, x)
    assert torch.equal(results[1], expected[1])
    assert_equal_to_rounding(results[0], expected[0], rounded(4))


def test_import_leaves_compilers_alone() -> None:
    """torch's compiler takes longer to import than torch does."""
    code = "import sys, reformer_kernels; sys.exit(any(m in sys.modules for m in ('torch._dynamo', 'sympy', 'triton')))"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- checkpoints inside: whose choices they take


def test_choices_are_of_no_other_layer() -> None:
    """A checkpointed layer of the same seed and shape beside the sequence chooses for itself."""
    inside, beside = (LSHSelfAttention(8, 2, n_hashes=1, n_buckets=4, chunk_length=4, hash_seed=1) for _ in range(2))
    seq = ReversibleSequence([ReversibleBlock(inside, nn.Linear(8, 8))])
    x = torch.randn(2, 16, 8, requires_grad=True)

    def gradients(call: Callable[..., Tensor]) -> list[Tensor]:
        y1, y2 = seq(call(x))
        return list(torch.autograd.grad(y1.sum() + y2.square().sum(), [x, *seq.parameters(), *beside.parameters()]))

    again = gradients(lambda x: checkpoint(beside, x, use_reentrant=False))
    assert all(map(torch.equal, again, gradients(beside)))
