"""The kernels by themselves: variants of the attention op as data, their timer and their useful work."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import reformer_kernels as rk
from reformer_kernels._calls import AttentionCall
from reformer_kernels.backends import cpu, reference

from .gate import recorded

BACKEND = "cpu"


@dataclass(frozen=True)
class Variant:
    """One call of chunk_attention, causal. ``key``: "shared", "separate" (sorted by the queries' hashes) or "local"."""

    name: str
    length: int = 4096
    heads: int = 8
    head_dim: int = 64
    chunk_length: int = 64
    n_hashes: int = 4
    chunks_after: int = 0
    key: str = "shared"
    alignment: str = "ring"
    chunks_a_bucket: int = 1  # on average, where they are aligned
    padded: bool = False  # an eighth of the keys
    query_scale: float = 1.0  # of the rows' length, which is 8 on average otherwise
    dropout_p: float = 0.0
    rules: str = "trax"
    dtype: str = "float32"

    @property
    def rounds(self) -> int:
        return 1 if self.key == "local" else self.n_hashes

    @property
    def token_head_rounds(self) -> int:
        return self.heads * self.length * self.rounds

    def shorter(self, length: int) -> Variant:
        """The variant that the gate checks: fewer heads, and no longer than the length plus the ragged rest."""
        rest = self.length % self.chunk_length
        return replace(self, heads=min(self.heads, 2), length=min(self.length, length + rest))


def window_keys(call: AttentionCall) -> float:
    """The mean number of keys in a query's window. Masked pairs count: hashing scatters them over the window."""
    length, chunk = call.query.shape[2], call.chunk_length

    def pairs(rows: int, rounds: int, ring: bool) -> int:
        counts = torch.tensor([min(chunk, rows - start) for start in range(0, rows, chunk)] * rounds)
        slots = torch.arange(len(counts))
        total = 0
        for offset in range(-call.chunks_before, call.chunks_after + 1):
            other = slots + offset
            there = torch.ones_like(other, dtype=torch.bool) if ring else (other >= 0) & (other < len(counts))
            total += int((counts * counts[other % len(counts)] * there).sum())
        return total

    if call.alignment == "ring":
        rounds = 1 if call.order is None else call.order.shape[2]
        return pairs(length, rounds, True) / (rounds * length)
    assert call.buckets is not None
    sizes, times = torch.cat([row.bincount() for row in call.buckets.flatten(0, 2)]).unique(return_counts=True)
    counted: list[tuple[int, int]] = list(zip(sizes.tolist(), times.tolist(), strict=True))
    return sum(n * pairs(size, 1, False) for size, n in counted if size) / call.buckets.numel()


def seen_keys(call: AttentionCall) -> float:
    """The mean number of keys that a query uses, those that the rules leave of its window: by the oracle, of one head.

    Kernels may leave the others out, so that the rate by whole windows can exceed what the processor computes.
    """
    first: dict[str, Any] = {
        name: x[:, :1] for name, x in call._asdict().items() if isinstance(x, Tensor) and x.dim() == 4
    }
    one = call._replace(**first, dropout_p=0.0)
    order = reference.order_of(one)
    key = reference.unit_key(one.query, one.rules.key_norm) if one.key is None else one.key
    live = reference.score(one, order, one.query, key, torch.zeros(1, 1)).live
    return float(live.sum()) / order.numel()


def forward_flop(call: AttentionCall) -> float:
    """Of a token, head and round: a product with each key and one with each value of the window."""
    return 2 * (call.query.shape[3] + call.value.shape[3]) * window_keys(call)


def backward_flop(call: AttentionCall) -> float:
    """Five products: the scores again, the gradients of query and key (D wide), of value and of the weights (E)."""
    return 2 * (3 * call.query.shape[3] + 2 * call.value.shape[3]) * window_keys(call)


def make_call(v: Variant) -> AttentionCall:
    """The attention call, as the public function makes it."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, v.dtype)
    shape = (1, v.heads, v.length, v.head_dim)
    query, key, value = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    query = query * v.query_scale
    options: dict[str, Any] = {
        "causal": True, "chunk_length": v.chunk_length, "chunks_after": v.chunks_after, "backend": BACKEND,
        "dropout_p": v.dropout_p, "dropout_seed": torch.tensor([3]) if v.dropout_p else None,
    }  # fmt: skip
    if v.padded:
        options["key_padding_mask"] = torch.rand(1, v.length, generator=generator) < 0.125
    if v.key == "local":
        local: AttentionCall = recorded(lambda: rk.local_attention(query, key, value, **options))[0]
        return local
    if v.alignment != "ring":
        options["n_buckets"] = 2 * max(1, v.length // (v.chunk_length * v.chunks_a_bucket) // 2)
    options |= {"n_hashes": v.n_hashes, "alignment": v.alignment, "rules": getattr(rk.AttentionRules, v.rules)()}
    call: AttentionCall = recorded(lambda: rk.lsh_attention(query, value, **options))[0]
    return call._replace(key=key, scale=v.head_dim**-0.5) if v.key == "separate" else call


def kernel_timer(variant: Variant, threads: int) -> Callable[[], dict[str, float]]:
    """Seconds of the forward and of the backward op, called below torch's dispatcher."""
    call = make_call(variant)
    grad_out = torch.randn(call.value.shape, generator=torch.Generator().manual_seed(1)).to(call.value.dtype)

    def run() -> dict[str, float]:
        previous = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            start = time.perf_counter()
            results = cpu.chunk_attention(call)
            middle = time.perf_counter()
            cpu.chunk_attention_backward(call, grad_out, *results)
            end = time.perf_counter()
        finally:
            torch.set_num_threads(previous)
        return {"forward": middle - start, "backward": end - middle}

    return run


VARIANTS: dict[str, list[Variant]] = {
    "default": [
        Variant("plain"),
        Variant("16K", length=16384),
        Variant("16K, one hash", length=16384, n_hashes=1),
        Variant("D 128, C 256, H 2", heads=2, head_dim=128, chunk_length=256),
        Variant("bucket alignment", alignment="bucket"),
        Variant("bucket alignment, 4 chunks", alignment="bucket", chunks_a_bucket=4),
        Variant("ragged", length=4096 + 37),
        Variant("key padding", padded=True),
        Variant("long rows (maximum, no bound)", query_scale=5.0),
        Variant("local, separate key", key="local"),
        Variant("LSH, separate key", key="separate"),
        Variant("chunks_after=1", chunks_after=1),
        Variant("dropout 0.1", dropout_p=0.1),
        Variant("bfloat16", dtype="bfloat16"),
        Variant("float16", dtype="float16"),
        Variant("paper rules", rules="paper"),
    ],
    "small": [
        Variant("plain", length=256, heads=2, head_dim=16, n_hashes=2),
        Variant("ragged local", length=300, heads=2, head_dim=16, key="local"),
    ],
}
