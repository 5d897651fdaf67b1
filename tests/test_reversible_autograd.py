"""Reversible blocks with what autograd offers: autocast, hooks, torch.func, checkpoints, compilers, DDP."""

import copy
import os
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.utils.checkpoint import checkpoint

from reformer_kernels import _choices
from reformer_kernels.modules.feed_forward import ChunkedFeedForward
from reformer_kernels.modules.reversible import ReversibleBlock, ReversibleSequence

from .rounding import assert_equal_to_rounding
from .test_choices import Attention, compiled
from .test_reversible import (
    LOSSES,
    Checkpointed,
    E,
    L,
    Layer,
    assert_as_stored,
    block,
    integers,
    make,
    outcome,
    rounded,
)

# Of torch itself, once a process: its compiler looks at a stream's gradient, its forward derivatives at a script.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor", "ignore:.*torch.jit.script")


def loss(seq: nn.Module, x: Any, *kwargs: Any) -> Tensor:
    torch.manual_seed(1)
    return LOSSES["both"](*seq(x, *kwargs))


def gradients(seq: nn.Module, *leaves: Tensor) -> list[Any]:
    """What backward passes left, which is taken away."""
    grads = [t.grad for t in (*leaves, *seq.parameters())]
    for t in (*leaves, *seq.parameters()):
        t.grad = None
    return grads


def either_way(seq: ReversibleSequence, run: Callable[[], Any]) -> tuple[Any, Any]:
    results = []
    for seq.reversible in (True, False):
        torch.manual_seed(1)
        results.append(run())
    return results[0], results[1]


def assert_same(results: tuple[Any, Any]) -> None:
    assert_equal_to_rounding(*results, 0)


# ---- autocast


class Smooth(nn.Module):
    """In half precision under autocast, or in a region without it."""

    def __init__(self, full: bool = False) -> None:
        super().__init__()
        self.linear, self.dropout, self.full = nn.Linear(E, E), nn.Dropout(0.5), full

    def forward(self, u: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=torch.is_autocast_enabled("cpu") and not self.full):
            out: Tensor = self.dropout(torch.tanh(self.linear(u)))
            return out


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("forward", [False, True])
def test_autocast(forward: bool, backward: bool, full: bool) -> None:
    """What is computed again is cast as it was, and gradients are those of stored activations under either backward."""
    seq, x = ReversibleSequence([block(Smooth(full), Smooth(full))]), torch.randn(2, L, E, requires_grad=True)

    def run() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=forward):
            y = loss(seq, x)
        with torch.autocast("cpu", torch.bfloat16, enabled=backward):
            y.backward()
            assert torch.is_autocast_enabled("cpu") == backward
        return gradients(seq, x)

    # To float32: the roundings of bfloat16 repeat.
    assert_equal_to_rounding(*either_way(seq, run), rounded(2))


@pytest.mark.parametrize("where", ["before", "after", "both"])
def test_a_weight_inside_and_outside_under_one_autocast(where: str) -> None:
    """Autocast keeps a weight that it cast; one that was cast without a graph would lose the gradient outside."""
    layer = nn.Linear(E, E)
    seq, x = ReversibleSequence([block(layer, layer), block(layer, nn.Tanh())]), torch.randn(2, L, E)

    def run() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            y1, y2 = seq(x if where == "after" else layer(x).float())
            out = y1 + y2 if where == "before" else layer(y1) + layer(y2)
        out.float().sum().backward()
        return gradients(seq)

    grads, expected = either_way(seq, run)
    # The stored version adds the gradients of one cast weight in bfloat16, where it is used six times.
    assert_equal_to_rounding([g.bfloat16() for g in grads], [g.bfloat16() for g in expected], 6)


# ---- more than one backward, and parts of one


@pytest.mark.parametrize("parts", ["twice in one graph", "stream by stream"])
def test_one_graph_in_parts(parts: str) -> None:
    seq, x = make(2), integers()

    def run() -> list[Tensor]:
        y1, y2 = seq(x)
        if parts == "stream by stream":
            y1.square().sum().backward(retain_graph=True)
            y2.square().sum().backward()
        else:
            LOSSES["both"](*seq((y1, y2))).backward()
        return gradients(seq, x)

    assert_same(either_way(seq, run))


def test_two_backward_passes() -> None:
    seq, x = make(), integers()
    expected = outcome(seq, x)[0][2:]
    y = loss(seq, x)
    for retain_graph in (True, True, False):
        y.backward(retain_graph=retain_graph)
    assert all(torch.equal(g, 3 * e) for g, e in zip(gradients(seq, x), expected, strict=True))
    for _ in range(2):  # accumulates
        loss(seq, x).backward()
    assert all(torch.equal(g, 2 * e) for g, e in zip(gradients(seq, x), expected, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()
    assert_as_stored(seq, x)


def test_gradients_of_some() -> None:
    seq, x = make(), integers()
    names = ["x", *dict(seq.named_parameters())]
    expected = dict(zip(names, outcome(seq, x)[0][2:], strict=True))
    leaves, y = {"x": x, **dict(seq.named_parameters())}, loss(seq, x)
    for wanted in ("blocks.1.g", "blocks.0.f", "blocks.2.g", "x", "blocks.2.f.linear.bias", "weight"):
        some = [name for name in names if wanted in name]
        grads = torch.autograd.grad(y, [leaves[name] for name in some], retain_graph=True)
        assert all(map(torch.equal, grads, (expected[name] for name in some)))
        y.backward(inputs=[leaves[name] for name in some], retain_graph=True)
        assert [name for name in names if leaves[name].grad is not None] == some
        assert all(map(torch.equal, (t.grad for t in leaves.values() if t.grad is not None), grads))
        gradients(seq, x)


@pytest.mark.parametrize("changed", ["parameter", "mask", "output"])
def test_what_is_changed_before_backward(changed: str) -> None:
    """An optimizer's step, for example: torch's error, not the gradients of another function."""
    seq, x, mask = make(), integers(), torch.rand(2, L, 1) < 0.3
    y1, y2 = seq(x, {"mask": mask})
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|is being modified inplace"):
        if changed == "parameter":
            for parameter in seq.parameters():
                parameter.grad = torch.ones_like(parameter)
            torch.optim.SGD(seq.parameters(), 0.1).step()
        elif changed == "mask":
            mask.logical_not_()
        else:
            y1.mul_(2)
        LOSSES["both"](y1, y2).backward()


@pytest.mark.parametrize("power", [1, 2])
def test_second_derivatives(power: int) -> None:
    """An error also where the gradient of the streams is a constant, and autograd alone would see no dependence."""
    seq, x = ReversibleSequence([block(nn.Tanh(), nn.Tanh())]), torch.randn(2, L, E, requires_grad=True)
    y = seq(x)[0].pow(power).sum()
    with pytest.raises(RuntimeError, match=r"second derivatives|differentiate twice"):
        (y + torch.autograd.grad(y, x, create_graph=True)[0].square().sum()).backward()


def test_backward_in_another_thread() -> None:
    seq = ReversibleSequence([block(Attention(), Attention())]).double()
    x = torch.randn(2, 16, 8, dtype=torch.float64, requires_grad=True)
    expected = outcome(seq, x)[0][2:]
    thread = threading.Thread(target=loss(seq, x).backward)
    thread.start()
    thread.join()
    assert_equal_to_rounding(gradients(seq, x), list(expected), 0)


# ---- hooks


def test_forward_hooks_see_the_recomputation() -> None:
    seq, x = make(2), integers()
    seen: list[tuple[str, bool | None, Tensor]] = []
    f = seq.get_submodule("blocks.1.f")
    f.register_forward_pre_hook(
        lambda _, args: seen.append(("input", torch.is_grad_enabled(), args[0].detach().clone()))
    )
    f.register_forward_hook(lambda _, args, out: seen.append(("output", out.requires_grad, out.detach().clone())))
    f.register_forward_hook(lambda _, args, out: out * 2)  # takes part
    f.register_full_backward_hook(lambda *_: seen.append(("backward", None, torch.empty(0))))
    loss(seq, x).backward()
    assert [entry[:2] for entry in seen] == [("input", True), ("output", True)] * 2 + [("backward", None)]
    assert torch.equal(seen[0][2], seen[2][2]) and torch.equal(seen[1][2], seen[3][2])
    assert_as_stored(seq, x)


def test_hooks_of_parameters_and_streams() -> None:
    """Each is called once, with the whole gradient, and what it returns counts."""
    seq, x = ReversibleSequence([block()] * 2), integers()
    calls: list[tuple[str, Tensor]] = []
    for name, parameter in seq.named_parameters():
        parameter.register_hook(lambda grad, name=name: calls.append((name, grad)))
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: calls.append((f"{name} after", p.grad)))

    def run() -> Any:
        calls.clear()
        y1, y2 = seq(x)
        y2.register_hook(lambda grad: calls.append(("y2", grad)))
        y2.register_hook(lambda grad: 2 * grad)  # of y1, stored activations give what goes through the last g, too
        LOSSES["both"](y1, y2).backward()
        assert len(calls) == 2 * 4 + 1
        return sorted(calls, key=lambda call: call[0]), gradients(seq, x)

    assert_same(either_way(seq, run))


@pytest.mark.parametrize("context", [torch.autograd.graph.save_on_cpu, torch.autograd.set_detect_anomaly])
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_saved_tensors_hooks_and_anomaly_detection(context: Callable[..., Any]) -> None:
    with context(True) if context is torch.autograd.set_detect_anomaly else context():
        assert_as_stored(make(), integers())


# ---- torch.func


def test_functional_call() -> None:
    """Gradients of the tensors that are given for the parameters, also after the call is over."""
    seq, x = make(), integers()
    given = {name: torch.randint(-1, 2, p.shape).to(p.dtype).requires_grad_() for name, p in seq.named_parameters()}

    def run() -> Any:
        y = torch.func.functional_call(seq, given, x)
        return torch.autograd.grad(LOSSES["both"](*y), [x, *given.values()])

    results = either_way(seq, run)
    assert_same(results)
    seq.load_state_dict(given)
    seq.reversible = True
    assert_equal_to_rounding(list(results[0]), list(outcome(seq, x)[0][2:]), 0)


def test_func_grad() -> None:
    seq, x = make().eval(), integers().detach()
    parameters: dict[str, Tensor] = dict(seq.named_parameters())

    def value(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return LOSSES["both"](*torch.func.functional_call(seq, parameters, x[None]))

    per_sample = torch.func.vmap(torch.func.grad(value), in_dims=(None, 0))(parameters, x)
    for i in range(len(x)):
        expected = outcome(seq, x[i : i + 1])[0][2:]
        assert_equal_to_rounding([g[i] for g in per_sample.values()], list(expected), 0)
    tangent = torch.func.jvp(lambda x: seq(x)[0], (x,), (torch.ones_like(x),))[1]
    assert torch.equal(tangent.sum(), torch.func.grad(lambda x: seq(x)[0].sum())(x).sum())


# ---- exceptions


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_exceptions_leave_everything_as_it_was(where: str, autocast: bool) -> None:
    seq, x = make().float(), integers(dtype=torch.float32)
    fails = [where == "forward"]

    def fail(*_: Any) -> None:
        if fails[0]:
            raise ArithmeticError("on purpose")

    seq.get_submodule("blocks.1.f.dropout").register_forward_hook(fail)  # after numbers were drawn

    def state() -> tuple[Any, ...]:
        kinds = [torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()]
        return *kinds, torch.is_grad_enabled(), _choices._current()

    before = state()
    if where == "forward":
        with pytest.raises(ArithmeticError, match="on purpose"), torch.autocast("cpu", enabled=autocast):
            seq(x)
    else:
        with torch.autocast("cpu", enabled=autocast):
            y1, y2 = seq(x)
        fails[0], random = True, torch.get_rng_state()
        with pytest.raises(ArithmeticError, match="on purpose"):
            (y1 + y2).float().sum().backward()
        assert torch.equal(torch.get_rng_state(), random)
    assert state() == before and before[-1] is None
    fails[0] = False
    assert_as_stored(seq, x)


# ---- functions that use tensors which are neither parameters nor keyword arguments

HIDDEN = nn.Parameter(torch.full((E,), 2.0, dtype=torch.float64))
COMPUTED = HIDDEN.exp() * 2
ADDED = nn.Parameter(integers().detach())


class WithAttribute(Layer):
    """A tensor in a tuple is no parameter."""

    hidden = (HIDDEN,)

    def forward(self, u: Tensor, **more: Any) -> Tensor:
        return super().forward(u) * self.hidden[0]


LINEAR = Layer().linear
USES: dict[str, tuple[Callable[[], Any], Tensor]] = {
    "closure": (lambda: lambda u: u * HIDDEN, HIDDEN),
    "computed": (lambda: lambda u: u * COMPUTED, HIDDEN),
    "attribute": (WithAttribute, HIDDEN),
    "method": (lambda: LINEAR.forward, LINEAR.weight),
    "checkpoint": (lambda: lambda u: checkpoint(lambda v: v * HIDDEN, u, use_reentrant=False), HIDDEN),
    "compiled": (lambda: compiled(lambda u: u * HIDDEN), HIDDEN),
    "alone": (lambda: lambda u: HIDDEN.expand_as(u), HIDDEN),
    "as it is": (lambda: types.MethodType(lambda hidden, u: hidden, ADDED), ADDED),
}


@pytest.mark.parametrize("needs_x", [False, True])
@pytest.mark.parametrize("name", USES)
def test_hidden_tensors(name: str, needs_x: bool) -> None:
    build, hidden = USES[name]
    seq, x = ReversibleSequence([block(), block(g=build())]), integers().requires_grad_(needs_x)

    def run() -> list[Tensor]:
        y = LOSSES["both"](*seq(x))
        return list(torch.autograd.grad(y, [hidden, *seq.parameters()], retain_graph=name == "computed"))

    # The powers of e are rounded, once and in the product with what f gives.
    assert_equal_to_rounding(*either_way(seq, run), 4 if name == "computed" else 0)


def test_hidden_in_a_keyword_argument() -> None:
    """In an object that pytree does not look into."""
    seq, box = ReversibleSequence([ReversibleBlock(lambda u, box: u * box.tensor)]), types.SimpleNamespace()
    for box.tensor in (HIDDEN, HIDDEN.detach()):
        assert_as_stored(seq, integers(), {"box": box}, leaves=[HIDDEN])


def test_a_checkpoint_of_the_other_kind_inside() -> None:
    seq, x = ReversibleSequence([block(lambda u: checkpoint(torch.sin, u, use_reentrant=True))]), integers()

    def run() -> list[Tensor]:
        loss(seq, x).backward()
        return gradients(seq, x)

    assert_equal_to_rounding(*either_way(seq, run), rounded(2))


# ---- torch.utils.checkpoint


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_of_the_sequence(use_reentrant: bool) -> None:
    seq = ReversibleSequence([block(Attention(), ChunkedFeedForward(8, chunk_length=5))]).double()
    x = torch.randn(2, 16, 8, dtype=torch.float64, requires_grad=True)

    def run() -> list[Tensor]:
        LOSSES["both"](*checkpoint(seq, x, use_reentrant=use_reentrant)).backward()
        return gradients(seq, x)

    assert_equal_to_rounding(*either_way(seq, run), rounded(2))


# ---- compilers


@pytest.mark.parametrize("whole", [False, True])
def test_compiled_dropout_is_the_same_again(whole: bool) -> None:
    """A compiler's random numbers are not torch's: y1 tells what was dropped, and the gradient has to agree."""
    torch._dynamo.reset()
    f: nn.Module = nn.Sequential(nn.Dropout(0.5), nn.Threshold(-1.0, 0.0))
    seq: Callable[..., Any] = ReversibleSequence([block(f if whole else torch.compile(f), nn.Identity())])
    if whole:
        seq = torch.compile(seq)
    x1, x2 = torch.zeros(2, 50, E), torch.ones(2, 50, E, requires_grad=True)
    y1, _ = seq((x1, x2))
    assert set(y1.unique().tolist()) == {0.0, 2.0}
    y1.sum().backward()
    assert x2.grad is not None and torch.equal(x2.grad, y1)


@pytest.mark.parametrize("whole", [False, True])
def test_compiled(whole: bool) -> None:
    seq = ReversibleSequence([block(Attention(), ChunkedFeedForward(8, dropout=0.2, chunk_length=5)) for _ in range(2)])
    x = torch.randn(2, 16, 8, dtype=torch.float64, requires_grad=True)
    expected, random = outcome(seq.double(), x)
    if not whole:
        seq = ReversibleSequence([block(compiled(b.f), compiled(b.g)) for b in seq.blocks])
    results, random_too = outcome(compiled(seq) if whole else seq, x)
    assert torch.equal(random, random_too)
    assert_equal_to_rounding(results, expected, rounded(4))


def test_fullgraph() -> None:
    torch._dynamo.reset()
    seq, x = make(2), integers()
    whole: Any = torch.compile(seq, fullgraph=True, backend="aot_eager")
    expected = outcome(seq, x)[0]
    with torch.no_grad():
        torch.manual_seed(1)
        assert torch.equal(whole(x)[0], expected[0])
    with pytest.raises(torch._dynamo.exc.Unsupported, match="for fullgraph=True set reversible=False"):
        whole(x)
    seq.reversible = False
    assert_equal_to_rounding(outcome(whole, x)[0], expected, 0)


@pytest.mark.parametrize("strict", [False, True])
def test_exports(strict: bool) -> None:
    seq, x = make(2).eval(), integers().detach()
    exported = torch.export.export(seq, (x, {"context": integers().detach()}), strict=strict).module()
    context = integers().detach()
    assert all(map(torch.equal, exported(x, {"context": context}), seq(x, {"context": context})))


# ---- data-parallel training


def _train(rank: int, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(0)
    layers = [
        (Attention(3), ChunkedFeedForward(8, chunk_length=5)),
        (Attention(4), Checkpointed(nn.Linear(8, 8))),
    ]
    seq = ReversibleSequence([block(f, g) for f, g in layers]).double().eval()
    x = torch.randn(4, 16, 8, dtype=torch.float64)
    expected = [g / 2 for g in torch.autograd.grad(loss(seq, x), list(seq.parameters()))]  # the mean of two
    mine = x[2 * rank : 2 * rank + 2]
    ways: list[dict[str, Any]] = [{}, {"find_unused_parameters": True}, {"static_graph": True}]
    for options in ways:
        replica = nn.parallel.DistributedDataParallel(copy.deepcopy(seq), **options)
        for _ in range(2):
            replica.zero_grad()
            loss(replica, mine).backward()
        # Sums of 64 tokens in another order, and four halves.
        assert_equal_to_rounding([p.grad for p in replica.parameters()], expected, 64 + rounded(4))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # past torch's teardown, which now and then aborts on a thread of gloo that still runs


def test_two_processes(tmp_path: Path) -> None:
    spawn(_train, (str(tmp_path / "store"),), nprocs=2)
