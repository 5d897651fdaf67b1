"""Kernels one by one: against float64, and against the times that the roofline predicts."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

import reformer_kernels as rk
from reformer_kernels._calls import AttentionCall, ListCall, SelectCall
from reformer_kernels._dispatch import BACKENDS

from .. import roofline
from .timing import Row, median_ms, median_ms_in_graph


def reference() -> list[Row]:
    """The reference backend on the GPU: its error against float64 may be at most twice the CPU's, plus one rounding."""
    torch.manual_seed(0)
    shape = (2, 4, 1000, 64)
    inputs = [torch.randn(shape, dtype=torch.float64) for _ in range(3)]
    _, buckets = rk.lsh_attention(*inputs[:2], causal=True, backend="reference", return_buckets=True)
    cases = {
        # Given the buckets, since a rounding may move a row to another one.
        "lsh_attention": lambda q, k, v: rk.lsh_attention(
            q, v, causal=True, buckets=buckets.to(q.device), backend="reference"
        ),
        "local_attention": lambda q, k, v: rk.local_attention(q, k, v, causal=True, backend="reference"),
    }
    rows: list[Row] = []
    for name, function in cases.items():
        oracle = _with_gradients(function, inputs, "cpu", torch.float64)
        cpu = _with_gradients(function, inputs, "cpu", torch.float32)
        gpu = _with_gradients(function, inputs, "cuda", torch.float32)
        for what, exact, on_cpu, on_gpu in zip(("out", "dq", "dk", "dv"), oracle, cpu, gpu, strict=True):
            if exact is None:  # shared query and key: no gradient of k
                continue
            cpu_error, gpu_error = ((x.double() - exact).abs().max().item() for x in (on_cpu, on_gpu))
            allowed = 2 * cpu_error + torch.finfo(torch.float32).eps * exact.abs().max().item()
            rows.append({"op": name, "of": what, "CPU error": cpu_error, "GPU error": gpu_error, "allowed": allowed})
    wrong = [row for row in rows if not row["GPU error"] <= row["allowed"]]
    if wrong:
        raise AssertionError(f"the GPU's error is too large: {wrong}")
    return rows


def _with_gradients(function: Callable[..., Any], inputs: list[Any], device: str, dtype: torch.dtype) -> list[Any]:
    leaves = [x.to(device, dtype).requires_grad_() for x in inputs]
    out = function(*leaves)
    grads = torch.autograd.grad(out.sin().sum(), leaves, allow_unused=True)
    return [None if x is None else x.detach().cpu() for x in (out, *grads)]


def kernels() -> list[Row]:
    """Kernels of the shapes that matter, beside the time in which a copy moves what they must read and write."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda").random_()
    copied_bytes_per_ms = 2 * source.numel() / median_ms(source.clone)
    del source
    gpu = next((rates for name, rates in roofline.GPUS.items() if name in torch.cuda.get_device_name()), None)

    def timed(
        backend: str, kernel: str, shape: roofline.Shape, ms: float, moved: float, op: str | None = None, **rates: float
    ) -> Row:
        row: Row = {"kernel": kernel, "backend": backend, "shape": shape.name, "us": round(ms * 1e3, 1)}
        row["floor us"] = round(moved / copied_bytes_per_ms * 1e3, 1)
        if gpu and op:
            row["predicted us"] = round(1e6 * roofline.predict(op, shape, gpu, backend).seconds, 1)
        return row | {name: round(rate, 2) for name, rate in rates.items()}

    return [
        row
        for shape in roofline.SHAPES
        for part in (_sort, _attention, _clustered)
        for backend in roofline.BUDGETS
        for row in part(shape, backend, functools.partial(timed, backend))
    ]


def _sort(shape: roofline.Shape, backend: str, timed: Callable[..., Row]) -> Iterator[Row]:
    heads, head_dim, factors, rounds = shape.heads, shape.head_dim, shape.factors, shape.rounds
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(1, heads, shape.length, head_dim, device="cuda").to(dtype)
        rotations = rk.random_rotations(0, heads, head_dim, rounds, factors).cuda()
        hashed = functools.partial(rk.hash_buckets, x, rotations, factors, backend=backend)
        moved = x.numel() * x.element_size() + 4 * shape.rows
        flop = 2 * shape.rows * head_dim * (sum(factors) // 2)
        ms, op = median_ms_in_graph(hashed), "hash" if dtype == torch.bfloat16 else None
        yield timed(f"hash, {str(dtype)[6:]}", shape, ms, moved, op, **{"TFLOP/s": flop / ms / 1e9})
    buckets, total = hashed(), math.prod(factors)
    ms = median_ms_in_graph(functools.partial(rk.bucket_order, buckets, total, backend=backend))
    yield timed("order", shape, ms, 8 * shape.rows, "sort", **{"Gkey/s": shape.rows / ms / 1e6})
    ms = median_ms(functools.partial(torch.sort, buckets, dim=-1, stable=True))
    yield timed("torch.sort", shape, ms, 8 * shape.rows)


def _attention(shape: roofline.Shape, backend: str, timed: Callable[..., Row]) -> Iterator[Row]:
    """The kernels alone: rows are hashed and sorted before."""
    kernels = BACKENDS[backend]
    rows = [torch.randn(1, shape.heads, shape.length, shape.head_dim, device="cuda").bfloat16() for _ in range(3)]
    rotations = rk.random_rotations(0, shape.heads, shape.head_dim, shape.rounds, shape.factors).cuda()
    buckets = rk.hash_buckets(rows[0], rotations, shape.factors, backend=backend)
    order = rk.bucket_order(buckets, math.prod(shape.factors), backend=backend)
    call = AttentionCall(
        rows[0], None, rows[1], order, None, None, None, None, None, shape.chunk_length, 1, 0, True, None, 1.0, 0.0,
        "ring", rk.AttentionRules().key, backend,
    )  # fmt: skip
    results = kernels.chunk_attention(call)
    passes = {
        "forward": functools.partial(kernels.chunk_attention, call),
        "backward": functools.partial(kernels.chunk_attention_backward, call, rows[2], *results),
    }
    for name, run in passes.items():
        op = f"attention, {name}"
        cost = roofline.attention_cost(shape, name == "backward", backend)
        ms = median_ms_in_graph(run)
        yield timed(op, shape, ms, cost.bytes, op, **{"TFLOP/s": cost.flop / ms / 1e9})


def _clustered(shape: roofline.Shape, backend: str, timed: Callable[..., Row]) -> Iterator[Row]:
    """The choice of keys, and attention over them: causal, 128 keys a query, and the rest key."""
    kernels = BACKENDS[backend]
    rows = [torch.randn(1, shape.heads, shape.length, shape.head_dim, device="cuda").bfloat16() for _ in range(4)]
    query, key, value, grad_out = rows
    scale, chunk, bytes_of_row = shape.head_dim**-0.5, shape.chunk_length, 2 * shape.head_dim
    select = SelectCall(query, key, None, None, None, None, chunk, 128, 32, 0, True, scale, backend)
    key_indices = kernels.select_keys(select)
    tokens, entries = shape.heads * shape.length, shape.heads * (shape.length // chunk) * key_indices.shape[3]
    ms = median_ms_in_graph(functools.partial(kernels.select_keys, select))
    yield timed("select", shape, ms, 2 * tokens * bytes_of_row + 4 * entries)
    call = ListCall(query, key, value, None, key_indices, None, None, None, chunk, 0, True, True, scale, 0.0, backend)
    results = kernels.list_attention(call)
    passes: dict[str, tuple[Callable[[], Any], int]] = {
        "forward": (functools.partial(kernels.list_attention, call), 2 * tokens + 2 * entries),
        "backward": (
            functools.partial(kernels.list_attention_backward, call, grad_out, *results), 8 * tokens + 2 * entries,
        ),
    }  # fmt: skip
    for name, (run, moved_rows) in passes.items():
        yield timed(f"lists, {name}", shape, median_ms_in_graph(run), moved_rows * bytes_of_row)
