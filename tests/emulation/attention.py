"""Problems for the emulated kernels of chunk attention: a forward and a backward against the float64 oracle."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

import reformer_kernels as rk
from reformer_kernels import testing
from reformer_kernels._calls import AttentionCall

from ..test_random import LAYOUTS
from .kernels import Emulator


@dataclass(frozen=True)
class Attention:
    length: int
    head_dim: int = 64
    dtype: torch.dtype = torch.bfloat16
    value_dim: int | None = None  # None: that of the query
    batch: int = 1
    heads: int = 1
    key_heads: int | None = None  # None: rows are shared, by LSH; else separate and local
    rounds: int = 2
    n_buckets: int = 8
    chunk_length: int = 64
    before: int = 1
    after: int = 0
    causal: bool = False
    padded: float = 0.0  # of all tokens
    dropout: float = 0.0
    bounds: tuple[int, ...] | None = None  # of packed sequences
    num_queries: int | None = None
    rules: rk.AttentionRules = rk.AttentionRules()  # noqa: RUF009  (frozen, too)
    layout: str = "contiguous"
    device: str = "H100"

    def __str__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return f"Attention({', '.join(f'{name}={value}' for name, value in given.items())})"

    def call(self) -> AttentionCall:
        generator = torch.Generator().manual_seed(self.length)
        width, own, heads = self.value_dim or self.head_dim, self.heads, self.key_heads or self.heads
        normal = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
        rows = lambda heads, width: LAYOUTS[self.layout](normal(self.batch, heads, self.length, width))  # noqa: E731
        options: dict[str, Any] = {
            "chunk_length": self.chunk_length, "chunks_before": self.before, "chunks_after": self.after,
            "causal": self.causal, "dropout_p": self.dropout, "dropout_seed": torch.tensor([2**33 + 5]),
        }  # fmt: skip
        if self.padded:
            options["key_padding_mask"] = torch.rand(self.batch, self.length, generator=generator) < self.padded
        cu_seqlens = None if self.bounds is None else torch.tensor(self.bounds, dtype=torch.int32)
        if self.key_heads:
            call = testing.capture(
                rk.local_attention, rows(own, self.head_dim), rows(heads, self.head_dim), rows(heads, width), **options
            )
            return call._replace(cu_seqlens=cu_seqlens)
        options |= {"n_hashes": self.rounds, "n_buckets": self.n_buckets, "rules": self.rules, "hash_seed": 3}
        options |= {"num_queries": self.num_queries, "cu_seqlens": cu_seqlens}
        return testing.capture(rk.lsh_attention, rows(own, self.head_dim), rows(own, width), **options)

    def check(self, emulator: Emulator) -> Tensor:
        """All results in one tensor."""
        with emulator.serving():
            found = testing.assert_matches_oracle(self.call(), self.dtype, "cuda")
        return torch.cat([x.flatten().double() for x in found.values()])

    def check_crossed(self, emulator: Emulator) -> None:
        """Residuals of either pass serve the other one of the CPU."""
        with emulator.serving():
            for forward, backward in (("cpu", "cuda"), ("cuda", "cpu")):
                testing.assert_matches_oracle(self.call(), self.dtype, forward, backward)
