"""Kernels one by one: against float64, and against the times that the roofline predicts."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

import reformer_kernels as rk

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
    """Hash and sort of the shapes that matter, against the time in which a copy moves what they must read and write."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda").random_()
    copied_bytes_per_ms = 2 * source.numel() / median_ms(source.clone)
    gpu = next((rates for name, rates in roofline.GPUS.items() if name in torch.cuda.get_device_name()), None)
    predicted = lambda op: {"predicted us": round(1e6 * roofline.predict(op, shape, gpu).seconds, 1)} if gpu else {}  # noqa: E731
    rows: list[Row] = []
    for shape in roofline.SHAPES:
        heads, head_dim, factors, rounds = shape.heads, shape.head_dim, shape.factors, shape.rounds
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.randn(1, heads, shape.length, head_dim, device="cuda").to(dtype)
            rotations = rk.random_rotations(0, heads, head_dim, rounds, factors).cuda()
            hashed = functools.partial(rk.hash_buckets, x, rotations, factors, backend="cuda")
            keys = shape.rows
            moved = x.numel() * x.element_size() + 4 * keys
            flop = 2 * keys * head_dim * (sum(factors) // 2)
            ms = median_ms_in_graph(hashed)
            row = {"kernel": f"hash, {dtype}".replace("torch.", ""), "shape": shape.name, "us": round(ms * 1e3, 1)}
            row |= {"floor us": round(moved / copied_bytes_per_ms * 1e3, 1), "TFLOP/s": round(flop / ms / 1e9, 1)}
            rows.append(row | (predicted("hash") if dtype == torch.bfloat16 else {}))
        buckets, total = hashed(), math.prod(factors)
        ms = median_ms_in_graph(functools.partial(rk.bucket_order, buckets, total, backend="cuda"))
        row = {"kernel": "order", "shape": shape.name, "us": round(ms * 1e3, 1), "Gkey/s": round(keys / ms / 1e6, 2)}
        rows.append(row | {"floor us": round(8 * keys / copied_bytes_per_ms * 1e3, 1)} | predicted("sort"))
        ms = median_ms(lambda buckets=buckets: torch.sort(buckets, dim=-1, stable=True))
        rows.append({"kernel": "torch.sort", "shape": shape.name, "us": round(ms * 1e3, 1)})
    return rows
