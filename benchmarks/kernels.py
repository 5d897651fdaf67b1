"""The "kernels" suite: attention kernels by variant, hashing, sorting, and what one small call costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import reformer_kernels as rk
from reformer_kernels import _dispatch
from reformer_kernels.backends import cpu

from .base import Pair
from .gate import check_call, recorded
from .kernel_cases import (
    BACKEND,
    VARIANTS,
    Variant,
    backward_flop,
    forward_flop,
    kernel_timer,
    make_call,
    seen_keys,
    window_keys,
)
from .timing import interleaved, kernel_spec

GATE_LENGTH = 1024
HASH_LENGTH = {"default": 16384, "small": 512}
Row = dict[str, Any]


def backends_available() -> list[str]:
    return [name for name, backend in _dispatch.BACKENDS.items() if backend is not None]


def measure_variant(v: Variant, threads: int, peak: float | None, repeats: int, pair: Pair | None) -> Row:
    """Times of one variant; ``peak``: the FMA peak of that many threads, in GFLOP/s."""
    row: Row = {"variant": vars(v), "threads": threads}
    checked = make_call(v.shorter(GATE_LENGTH))
    row["gate"] = check_call(checked, BACKEND)
    times = interleaved({"now": kernel_timer(v, threads)}, repeats)["now"]
    call = make_call(v)
    row |= {"window_keys": window_keys(call), "seen_keys": seen_keys(call)}
    for part, flop in (("forward", forward_flop(call)), ("backward", backward_flop(call))):
        ns = times[part] / v.token_head_rounds * 1e9
        row[part] = {"seconds": times[part], "ns": ns, "gflops": flop / ns}
        if peak:
            row[part]["of_peak"] = flop / ns / peak
    row["repeats"] = times["repeats"]
    if pair:
        row["base"] = interleaved(pair.timers(kernel_spec(v, threads)), repeats)
        for part in ("forward", "backward"):
            row["base"][f"ratio_{part}"] = row["base"]["now"][part] / row["base"]["base"][part]
    return row


def measure_variants(
    which: str, thread_counts: list[int], peaks: dict[str, float], repeats: int, pair: Pair | None
) -> Iterator[Row]:
    """Rows of measure_variant, and of the variants that the backend refuses, as they come."""
    for v in VARIANTS[which]:
        try:
            make_call(v.shorter(GATE_LENGTH))
        except (NotImplementedError, TypeError, ValueError) as error:
            yield {"variant": vars(v), "skipped": str(error).splitlines()[-1].strip()}
            continue
        for threads in thread_counts:
            yield measure_variant(v, threads, peaks.get(str(threads)), repeats, pair)


def seconds_per_call(function: Callable[[], Any], budget: float = 0.2) -> float:
    """Median over several batches of calls, each batch a tenth of the budget."""
    function()
    start = time.perf_counter()
    function()
    once = max(time.perf_counter() - start, 1e-7)
    calls = max(1, int(budget / 10 / once))
    times = []
    for _ in range(10 if calls > 1 else 3):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def hash_and_sort(length: int, threads: int) -> Row:
    """Hashing to 512 buckets in two factors, and sorting by them (8 heads of 64, 4 rounds)."""
    heads, head_dim, n_hashes, factors = 8, 64, 4, (32, 16)
    x = torch.randn(1, heads, length, head_dim, generator=torch.Generator().manual_seed(0))
    rotations = rk.random_rotations(0, heads, head_dim, n_hashes, factors)

    def hashed(backend: str) -> Tensor:
        return rk.hash_buckets(x, rotations, factors, backend=backend)

    def sort(backend: str) -> Tensor:
        return rk.bucket_order(buckets, factors, backend=backend)

    buckets = hashed(BACKEND)
    # Near-ties of a rounded product may fall to either bucket; sorting is exact.
    agree = float((buckets == hashed("reference")).float().mean())
    assert agree > 0.999, f"{agree:.2%} of the buckets are the reference's"
    assert torch.equal(sort(BACKEND), sort("reference")), "bucket_order differs from the reference"
    keys = heads * length * n_hashes
    previous = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        hash_seconds = seconds_per_call(lambda: hashed(BACKEND))
        sort_seconds = seconds_per_call(lambda: sort(BACKEND))
    finally:
        torch.set_num_threads(previous)
    return {
        "threads": threads, "length": length, "buckets": 512, "hash_ns": hash_seconds / keys * 1e9,
        "sort_gkeys_per_core": keys / sort_seconds / threads * 1e-9,
    }  # fmt: skip


def calls() -> list[Row]:
    """Microseconds of calls whose work is next to nothing, on one thread, and of a whole small lsh_attention."""
    generator = torch.Generator().manual_seed(0)
    rows: list[Row] = []

    def add(name: str, length: int, function: Callable[[], Any]) -> None:
        rows.append({"call": name, "length": length, "us": seconds_per_call(function, 0.1) * 1e6})

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for length in (1, 16):
            x, v = torch.randn(2, 1, 1, length, 16, generator=generator)
            rotations = rk.random_rotations(0, 1, 16, 1, 2)
            buckets = rk.hash_buckets(x, rotations, 2)
            attend = lambda: rk.lsh_attention(x, v, causal=True, backend=BACKEND)  # noqa: B023, E731
            call = recorded(attend)[0]
            results = cpu.chunk_attention(call)
            leaves = [x.clone().requires_grad_(), v.clone().requires_grad_()]
            add("hash_buckets", length, lambda: rk.hash_buckets(x, rotations, 2))  # noqa: B023
            add("bucket_order", length, lambda: rk.bucket_order(buckets, 2))  # noqa: B023
            add("lsh_attention, one window", length, attend)
            add(
                "lsh_attention, one window, forward and backward", length,
                lambda: rk.lsh_attention(*leaves, causal=True, backend=BACKEND).sum().backward(),  # noqa: B023
            )  # fmt: skip
            add("chunk_attention, backend alone", length, lambda: cpu.chunk_attention(call))  # noqa: B023
            add(
                "chunk_attention_backward, backend alone", length,
                lambda: cpu.chunk_attention_backward(call, v, *results),  # noqa: B023
            )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    for heads in (1, 8):
        x, v = torch.randn(2, 1, heads, 128, 64, generator=generator)
        with torch.no_grad():
            name = f"lsh_attention, H {heads} D 64, {threads} threads"
            add(name, 128, lambda: rk.lsh_attention(x, v, causal=True))  # noqa: B023
    return rows
