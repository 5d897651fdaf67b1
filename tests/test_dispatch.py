"""Who a forced backend is forced for, and what ``explain`` says, also with threads, tasks and autograd's threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

import reformer_kernels as rk
from reformer_kernels import _dispatch

Q = torch.randn(1, 1, 30, 4)


def forced() -> str | None:
    return _dispatch._state()[1][-1][1]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends that served ops since the test began."""
    names: list[str] = []
    select = _dispatch.select

    def noted(call: Any) -> Any:
        backend = select(call)
        names.extend(name for name, b in _dispatch.BACKENDS.items() if b is backend)
        return backend

    monkeypatch.setattr(_dispatch, "select", noted)
    return names


# ---- use_backend


def test_a_named_backend_serves_or_refuses() -> None:
    sentinel: dict[str, Any] = {"rules": rk.AttentionRules(own_position="sentinel"), "chunk_length": 8}
    rk.lsh_attention(Q, Q, **sentinel)  # served by the reference
    with pytest.raises(NotImplementedError, match=r'cpu: rules\.own_position="sentinel" with combine_rounds="softmax"'):
        rk.lsh_attention(Q, Q, backend="cpu", **sentinel)
    with rk.use_backend("cpu"):
        with pytest.raises(NotImplementedError, match="is not supported by the backend asked for"):
            rk.lsh_attention(Q, Q, **sentinel)
        rk.lsh_attention(Q, Q, backend="reference", **sentinel)  # the argument goes first
    for name in ("cuda", "triton"):
        with pytest.raises(NotImplementedError, match=f"{name}: tensors are on cpu, not on a GPU"):
            rk.lsh_attention(Q, Q, backend=name)
    with pytest.raises(ValueError, match="name must be one of 'cpu', 'cuda', 'triton', 'reference' or None, got 'gpu'"):
        rk.use_backend("gpu")
    assert forced() is None


def test_blocks_nest_and_end_with_exceptions() -> None:
    with rk.use_backend("cpu") as outer:
        with pytest.raises(KeyError), rk.use_backend("reference"):
            assert forced() == "reference"
            raise KeyError
        with rk.use_backend(None):
            assert forced() is None
        with outer, outer:
            assert forced() == "cpu"
        assert forced() == "cpu"
    assert forced() is None


def test_without_with_it_holds_until_the_block_around_it_ends() -> None:
    rk.use_backend("reference")
    assert forced() == "reference"
    with rk.use_backend("cpu"):
        rk.use_backend("triton")
        rk.use_backend("cuda")
        assert forced() == "cuda"
    assert forced() == "reference"
    rk.use_backend(None)
    assert forced() is None


def test_an_object_may_be_used_again() -> None:
    chosen = rk.use_backend("reference")
    assert forced() == "reference"
    for _ in range(2):
        with chosen:
            assert forced() == "reference"
        assert forced() is None
    rk.use_backend("cpu")
    with chosen:
        assert forced() == "reference"
    assert forced() == "cpu"


def test_threads_do_not_see_each_other() -> None:
    """Blocks that overlap in time, of one object and of several, in threads that began before, inside and after."""
    names = ["reference", "cpu", None, "triton"]
    shared, barrier = rk.use_backend("reference"), threading.Barrier(len(names) + 1)
    rk.use_backend(None)

    def work(name: str | None) -> list[str | None]:
        seen = [forced()]
        barrier.wait()  # 1: the main thread is about to enter its block
        barrier.wait()  # 2: it has
        seen.append(forced())
        with rk.use_backend(name), shared:
            barrier.wait()  # 3: all are inside
            with rk.use_backend(name):
                seen.append(forced())
                barrier.wait()  # 4
            seen.append(forced())
        seen.append(forced())
        return seen

    with ThreadPoolExecutor(len(names)) as pool:
        results = [pool.submit(work, name) for name in names]
        barrier.wait()
        with rk.use_backend("cuda"):
            barrier.wait()
            barrier.wait()
            assert forced() == "cuda"
            barrier.wait()
            assert ThreadPoolExecutor(1).submit(forced).result() is None
        assert [r.result() for r in results] == [[None, None, name, "reference", None] for name in names]
        rk.use_backend("cpu")
        assert pool.submit(forced).result() is None and ThreadPoolExecutor(1).submit(forced).result() is None
    assert forced() == "cpu"


def test_the_first_block_of_an_object_may_be_in_another_thread() -> None:
    chosen = rk.use_backend("reference")

    def work() -> list[str | None]:
        with chosen:
            inside = forced()
        return [inside, forced()]

    assert ThreadPoolExecutor(1).submit(work).result() == ["reference", None]
    assert forced() == "reference"


def test_tasks_do_not_see_each_other() -> None:
    async def task(name: str | None, mine: asyncio.Event, other: asyncio.Event) -> list[str | None]:
        with rk.use_backend(name):
            mine.set()
            await other.wait()
            inside = [forced(), await asyncio.to_thread(forced), await asyncio.create_task(child())]
        rk.use_backend("triton")
        return [*inside, forced()]

    async def child() -> str | None:
        return forced()

    async def both() -> list[list[str | None]]:
        a, b = asyncio.Event(), asyncio.Event()
        return list(await asyncio.gather(task("reference", a, b), task("cpu", b, a)))

    assert asyncio.run(both()) == [["reference"] * 3 + ["triton"], ["cpu"] * 3 + ["triton"]]
    assert forced() is None


def test_generators_end_their_blocks_in_any_order() -> None:
    def block(name: str) -> Generator[str | None]:
        with rk.use_backend(name):
            yield forced()

    first, second = block("reference"), block("cpu")
    assert [next(first), next(second)] == ["reference", "cpu"]
    first.close()
    assert forced() == "cpu"
    second.close()
    assert forced() is None
    third = block("reference")
    next(third)
    with rk.use_backend("cpu"):
        ThreadPoolExecutor(1).submit(third.close).result()  # in a thread that never entered it: changes nothing
        assert forced() == "cpu"


# ---- the backward


@pytest.mark.parametrize("function", [rk.lsh_attention, rk.clustered_attention])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_backward_is_served_where_it_is_called(
    function: Callable[..., Any], compiled: bool, served: list[str]
) -> None:
    """So a block around both holds for both; a named forward's backward is its own."""
    torch._dynamo.reset()
    n = 2 if function is rk.lsh_attention else 3

    def step(x: torch.Tensor, backend: str | None = None) -> torch.Tensor:
        out: torch.Tensor = function(*[x] * n, chunk_length=8, backend=backend).sum()
        return out

    run = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
    for forward in ("reference", None):
        for backward in ("reference", "cpu", None):
            x = Q.clone().requires_grad_()
            with rk.use_backend(forward):
                loss = run(x)
            assert set(served) == {forward or "cpu"}
            served.clear()
            with rk.use_backend(backward):
                loss.backward()
            assert set(served) == {backward or "cpu"}
            served.clear()
    run(Q.clone().requires_grad_(), backend="reference").backward()
    assert set(served) == {"reference"}


class Deep(torch.autograd.Function):
    """The identity, whose backward calls a function within so many backwards that autograd takes another thread."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, depth: int, inside: Callable[[], None]) -> torch.Tensor:
        ctx.depth, ctx.inside = depth, inside
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        if ctx.depth:
            with torch.enable_grad():
                Deep.apply(torch.ones(1, requires_grad=True), ctx.depth - 1, ctx.inside).backward()
        else:
            ctx.inside()
        return *grads, None, None


def in_a_thread_of_autograd(inside: Callable[[], None]) -> None:
    seen: list[int] = []

    def deep_inside() -> None:
        seen.append(threading.get_ident())
        inside()

    Deep.apply(torch.ones(1, requires_grad=True), 70, deep_inside).backward()
    assert seen and seen[0] != threading.get_ident()


def test_autograds_threads_take_the_choice_of_the_caller(served: list[str]) -> None:
    """As backwards on a GPU do, which run in threads of their device, with what they recompute."""

    def step() -> None:
        with torch.enable_grad():
            x = Q.clone().requires_grad_()
            rk.local_attention(x, x, x).sum().backward()

    for _ in range(2):
        with rk.use_backend("reference"):
            in_a_thread_of_autograd(step)
        assert served == ["reference"] * 2
        served.clear()
        in_a_thread_of_autograd(step)
        assert served == ["cpu"] * 2
        served.clear()


def test_blocks_inside_autograds_threads_leave_nothing_there() -> None:
    seen: list[str | None] = []

    def inside() -> None:
        seen.append(forced())
        for name in ("reference", "triton", "reference"):
            with rk.use_backend(name):
                seen.append(forced())
                with rk.use_backend("cpu"):
                    seen.append(forced())
            seen.append(forced())

    for outer in ("reference", None, "cuda"):
        with rk.use_backend(outer):
            in_a_thread_of_autograd(inside)
            assert forced() == outer
        assert seen == [outer, "reference", "cpu", outer, "triton", "cpu", outer, "reference", "cpu", outer]
        seen.clear()


def test_a_thread_that_serves_one_backward_after_another_keeps_nothing() -> None:
    """Threads of a device do so; those that a CPU has forget their context variables anyway."""
    caller = threading.get_ident()

    def as_if_called_under(name: str) -> list[str | None]:
        torch._C._stash_obj_in_tls(_dispatch._CARRIED, (caller, ((None, None), (None, name))))
        seen = [forced()]
        with rk.use_backend("triton"):
            seen.append(forced())
        return [*seen, forced()]

    with ThreadPoolExecutor(1) as thread:
        for name in ("reference", "cpu"):
            assert thread.submit(as_if_called_under, name).result() == [name, "triton", name]


# ---- torch.compile


def test_a_compiled_function_follows_its_caller_without_another_graph(served: list[str]) -> None:
    torch._dynamo.reset()
    graphs: list[Any] = []

    def note(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    step = torch.compile(lambda x: rk.local_attention(x, x, x), fullgraph=True, backend=note)
    for name in ("reference", None, "cpu"):
        with rk.use_backend(name):
            step(Q)
    assert served == ["reference", "cpu", "cpu"] and len(graphs) == 1


def test_inside_a_compiled_function_it_is_refused_or_run_by_python(served: list[str]) -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        with rk.use_backend("reference"):
            y = rk.local_attention(x, x, x)
        return rk.local_attention(y, y, y)

    class Module(nn.Module):
        forward = staticmethod(step)

    torch._dynamo.reset()
    message = "use_backend has no effect inside a function that is compiled or exported: put it around the call"
    with pytest.raises(Exception, match=message):
        torch.compile(step, fullgraph=True, backend="eager")(Q)
    with pytest.raises(RuntimeError, match=message):
        torch.export.export(Module(), (Q,))
    assert forced() is None
    torch._dynamo.reset()
    run = torch.compile(step, backend="eager")
    for _ in range(2):
        run(Q)
        assert served == ["reference", "cpu"] and forced() is None
        served.clear()


# ---- explain


def test_explain_names_the_backend_and_computes_nothing() -> None:
    q = torch.full((1, 1, 100, 4), float("nan"))
    text = rk.explain(rk.lsh_attention, q, q, causal=True)
    assert text.count("serves it") == 3 and "hash_buckets on cpu" in text
    assert text.split("chunk_attention on cpu:")[1].splitlines()[1].split() == ["cpu", "serves", "it"]
    assert "not asked for (reference is)" in rk.explain(rk.lsh_attention, q, q, backend="reference")
    with rk.use_backend("reference"):
        assert "reference  serves it" in rk.explain(rk.lsh_attention, q, q)
    packed = torch.tensor([0, 40, 100], dtype=torch.int32)
    assert "serves it" in rk.explain(rk.lsh_attention, q, q, cu_seqlens=packed, n_buckets=4)
    assert "serves it" in rk.explain(rk.local_attention, q, q, q)


def test_explain_leaves_no_fake_tensors_behind() -> None:
    q = torch.randn(1, 2, 40, 8)

    def function(x: torch.Tensor) -> torch.Tensor:
        return rk.hash_buckets(x, rk.random_rotations(78, 2, 8, 4, 4), 4)

    rk.explain(function, q)
    assert function(q).shape == (1, 2, 4, 40)
    rk.lsh_attention(q, q, hash_seed=78, n_buckets=4, chunk_length=8)


def test_explain_sees_the_calls_of_its_own_thread() -> None:
    """Threads that explain, that fail inside and that only compute, at once."""
    functions: list[Callable[[], str]] = [
        lambda: rk.explain(rk.local_attention, Q, Q, Q),
        lambda: rk.explain(rk.lsh_attention, Q, Q, chunk_length=8),
        lambda: rk.explain(rk.clustered_attention, Q, Q, Q, backend="reference"),
    ]
    expected = [function() for function in functions]

    def fails(x: torch.Tensor) -> None:
        rk.local_attention(x, x, x)
        raise KeyError

    def failing() -> str:
        with pytest.raises(KeyError):
            rk.explain(fails, Q)
        return ""

    def computing() -> str:
        rk.local_attention(Q, Q, Q)
        return ""

    functions, expected = [*functions, failing, computing], [*expected, "", ""]
    with ThreadPoolExecutor(len(functions)) as pool:
        results = [[pool.submit(function) for function in functions] for _ in range(8)]
        assert all([r.result() for r in row] == expected for row in results)


def test_explain_inside_explain() -> None:
    said: list[str] = []

    def function(x: torch.Tensor) -> None:
        rk.local_attention(x, x, x)
        said.append(rk.explain(rk.bucket_order, torch.zeros(1, 1, 1, 4, dtype=torch.int32), 2))
        with rk.use_backend("reference"):
            rk.local_attention(x, x, x)

    said.append(rk.explain(function, Q))
    assert said[0].count(" on cpu:") == 1 and said[0].startswith("bucket_order")
    assert said[1].count(" on cpu:") == said[1].count("chunk_attention") == 2
    assert said[1].count("not asked for (reference is)") == 3  # the block inside counts


def test_explain_of_what_torch_computes() -> None:
    x = torch.randn(2, 20, 8)
    layer = rk.LSHMultiheadAttention(8, 2, batch_first=True)
    head = "no op of reformer_kernels is called: torch computes it"
    assert rk.explain(layer, x, x, x) == head + " by aten::_softmax"
    flash = head + " by aten::_scaled_dot_product_flash_attention_for_cpu"
    assert rk.explain(layer, x, x, x, need_weights=False) == flash
    assert rk.explain(rk.scaled_dot_product_attention, Q, Q, Q) == flash
    assert rk.explain(torch.add, x, x) == head
    assert "list_attention on cpu" in rk.explain(layer, *[torch.randn(2, 200, 8)] * 3)
