"""Problems for the emulated kernels of chunk attention: a forward and a backward against the float64 oracle."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from itertools import product
from typing import Any

import torch
from torch import Tensor

import reformer_kernels as rk
from reformer_kernels import testing
from reformer_kernels._calls import AttentionCall

from ..layouts import LAYOUTS
from .emulator import Emulator

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def describe(case: Any) -> str:
    """The fields of a dataclass that are not the default ones."""
    given = {f.name: getattr(case, f.name) for f in fields(case) if getattr(case, f.name) != f.default}
    return f"{type(case).__name__}({', '.join(f'{name}={value}' for name, value in given.items())})"


class OracleCase(ABC):
    """A dataclass with a dtype and backends, whose call is checked against the float64 oracle."""

    dtype: torch.dtype
    backends: tuple[str, str] | None

    def __str__(self) -> str:
        return describe(self)

    @abstractmethod
    def call(self) -> Any:
        """Of the op that is checked."""

    def check(self, emulator: Emulator) -> Tensor:
        """All results in one tensor."""
        with emulator.serving():
            found = testing.assert_matches_oracle(
                self.call(), self.dtype, *(self.backends or (emulator.backend, emulator.backend))
            )
        return torch.cat([x.flatten().double() for x in found.values()])

    def check_crossed(self, emulator: Emulator) -> None:
        """Residuals of either pass serve the other one of the CPU."""
        with emulator.serving():
            for forward, backward in (("cpu", emulator.backend), (emulator.backend, "cpu")):
                testing.assert_matches_oracle(self.call(), self.dtype, forward, backward)


@dataclass(frozen=True)
class Attention(OracleCase):
    length: int
    head_dim: int = 64
    dtype: torch.dtype = torch.bfloat16
    value_dim: int | None = None  # None: that of the query
    batch: int = 1  # or as many as there are ends
    heads: int = 1
    key_heads: int | None = None  # None: rows are shared, by LSH; else separate and local
    rounds: int = 2
    n_buckets: int = 8
    chunk_length: int = 64
    before: int = 1
    after: int = 0
    causal: bool = False
    padded: float = 0.0  # of all tokens
    ends: tuple[int, ...] | None = None  # where the padding of each batch row begins
    dropout: float = 0.0
    bounds: tuple[int, ...] | None = None  # of packed sequences
    num_queries: int | None = None
    alignment: str = "ring"
    rules: rk.AttentionRules = rk.AttentionRules()  # noqa: RUF009  (frozen, too)
    layout: str = "contiguous"
    device: str = "H100"
    backends: tuple[str, str] | None = None  # of the forward and the backward; None: the emulated one

    def call(self) -> AttentionCall:
        generator = torch.Generator().manual_seed(self.length)
        width, own, heads = self.value_dim or self.head_dim, self.heads, self.key_heads or self.heads
        batch = len(self.ends) if self.ends else self.batch

        def rows(heads: int, width: int) -> Tensor:
            return LAYOUTS[self.layout](torch.randn(batch, heads, self.length, width, generator=generator))

        options: dict[str, Any] = {
            "chunk_length": self.chunk_length, "chunks_before": self.before, "chunks_after": self.after,
            "causal": self.causal, "dropout_p": self.dropout, "dropout_seed": torch.tensor([2**33 + 5]),
        }  # fmt: skip
        if self.padded:
            options["key_padding_mask"] = torch.rand(batch, self.length, generator=generator) < self.padded
        if self.ends:
            padding = torch.arange(self.length) >= torch.tensor(self.ends)[:, None]
            options["key_padding_mask"] = padding | options.get("key_padding_mask", False)
        cu_seqlens = None if self.bounds is None else torch.tensor(self.bounds, dtype=torch.int32)
        call: AttentionCall
        if self.key_heads:  # its function has no rules, which may hold all the same
            call = testing.capture(
                rk.local_attention, rows(own, self.head_dim), rows(heads, self.head_dim), rows(heads, width), **options
            )
            call = call._replace(rules_key=self.rules.key)
            return call if cu_seqlens is None else call._replace(cu_seqlens=cu_seqlens)
        options |= {
            "n_hashes": self.rounds, "n_buckets": self.n_buckets, "hash_seed": 3, "rules": self.rules,
            "alignment": self.alignment, "num_queries": self.num_queries, "cu_seqlens": cu_seqlens,
        }  # fmt: skip
        call = testing.capture(rk.lsh_attention, rows(own, self.head_dim), rows(own, width), **options)
        return call

    def check_padding_is_unseen(self, emulator: Emulator) -> None:
        """What padding from the ``ends`` on holds, NaN even, comes to no other row."""
        call, name = testing.convert(self.call(), self.dtype), emulator.backend
        assert call.key_padding_mask is not None
        padding = call.key_padding_mask[:, None, :, None]
        tensors = {x: getattr(call, x) for x in ("query", "key", "value") if getattr(call, x) is not None}
        poisoned = call._replace(**{x: rows.masked_fill(padding, torch.nan) for x, rows in tensors.items()})
        grad_out = torch.randn(*call.query.shape[:2], call.n_queries, call.value.shape[3])
        with emulator.serving():
            clean, other = (testing.results(x, name, name, grad_out) for x in (call, poisoned))
        for result, x in clean.items():
            if x.numel():  # the gradient of a shared key has no elements
                seen = ~call.key_padding_mask[:, None].expand(x.shape[:3])
                assert torch.equal(x[seen], other[result][seen]), result


L2 = rk.AttentionRules(key_norm="l2", scale=None)
PAPER, WITHIN = rk.AttentionRules.paper(), rk.AttentionRules(within_bucket=True)
ONCE, BLIND = rk.AttentionRules(dedup="log_count"), rk.AttentionRules(mask_padded_queries=True)
PUBLISHED = rk.AttentionRules.huggingface(), rk.AttentionRules.lucidrains()
BUCKET: dict[str, Any] = {"alignment": "bucket", "n_buckets": 4}
UNSEEN = [
    Attention(150, ends=(150, 70, 0), chunk_length=32, after=1, dropout=0.2),
    Attention(90, dtype=torch.float32, heads=2, ends=(5, 90, 41), rules=PAPER, chunk_length=16, n_buckets=4),
    Attention(130, key_heads=1, heads=2, ends=(130, 40), after=1, chunk_length=50),
]
# Together they run every instance.
CASES = [
    *(Attention(130, dim, dtype, causal=True, chunk_length=32) for dtype, dim in product(DTYPES, (32, 64, 128))),
    Attention(1),
    Attention(1, dtype=torch.float32),
    Attention(40, causal=True),
    Attention(150, padded=0.3, rounds=3, chunk_length=20, dropout=0.2),
    Attention(150, dtype=torch.float32, padded=0.3, causal=True, chunk_length=32),
    Attention(150, padded=1.0),
    Attention(150, dtype=torch.float32, padded=1.0, causal=True),
    Attention(200, 128, causal=True, chunk_length=128),
    Attention(300, 100, torch.float16, value_dim=64, chunk_length=100, causal=True),
    Attention(150, 128, torch.float32, value_dim=20, chunk_length=256),
    Attention(150, dtype=torch.float32, rules=L2),
    # windows: wrapped around more than once, or only of the chunk itself
    Attention(150, before=3, after=2, chunk_length=32),
    Attention(150, dtype=torch.float32, before=5, after=5, chunk_length=32),
    Attention(150, dtype=torch.float32, before=0, chunk_length=32),
    Attention(70, before=1, after=1),
    Attention(65, dtype=torch.float32, before=1, after=1, causal=True),
    # keys of their own
    Attention(130, key_heads=1, heads=2, after=1),
    Attention(130, dtype=torch.float32, key_heads=1, heads=3, causal=True, batch=2),
    Attention(130, 40, key_heads=2, heads=2, after=1, padded=1.0),
    Attention(130, key_heads=1, heads=2, bounds=(0, 30, 130), causal=True),
    # packed
    Attention(200, bounds=(0, 1, 1, 90, 200), causal=True, chunk_length=32),
    Attention(200, dtype=torch.float32, bounds=(0, 1, 1, 90, 200), after=1, chunk_length=16, dropout=0.3),
    # rows with padding at their end, which is cut off
    *UNSEEN,
    Attention(90, dtype=torch.float32, ends=(90, 40, 0), num_queries=60, chunk_length=16, causal=True),
    Attention(90, ends=(70, 10), padded=0.2, chunk_length=16, causal=True, **BUCKET),
    # keys without a query
    Attention(150, num_queries=60, causal=True, chunk_length=32),
    Attention(150, dtype=torch.float32, num_queries=60, chunk_length=32),
    Attention(150, num_queries=0),
    # with a score_mod, in windows that hold a key more than once, too
    Attention(150, rules=WITHIN, chunk_length=32, n_buckets=4),
    Attention(150, rules=ONCE, chunk_length=32),
    Attention(150, dtype=torch.float32, rules=ONCE, chunk_length=16, n_buckets=4, causal=True, rounds=4, after=1),
    Attention(150, dtype=torch.float32, rules=PAPER, chunk_length=32, n_buckets=30, causal=True, rounds=3),
    Attention(90, dtype=torch.float32, rules=PAPER, chunk_length=32, n_buckets=2, before=4, after=3, rounds=1),
    Attention(90, rules=ONCE, chunk_length=32, before=4, after=3),
    Attention(20, rules=PAPER, chunk_length=32),
    Attention(200, rules=PAPER, bounds=(0, 1, 1, 90, 200), causal=True, chunk_length=16, n_buckets=4),
    Attention(150, num_queries=60, rules=PAPER, chunk_length=32, n_buckets=4, dropout=0.2),
    Attention(256, 128, torch.float32, rules=PAPER, n_buckets=4, device="RTX"),
    Attention(130, key_heads=1, heads=2, rules=ONCE, after=1),
    Attention(150, dtype=torch.float32, rules=BLIND, padded=0.4, causal=True),
    # with sentinels
    *(Attention(150, rules=x, padded=0.5, causal=True, chunk_length=16, rounds=3, dropout=0.2) for x in PUBLISHED),
    *(Attention(150, dtype=torch.float32, rules=x, padded=1.0, chunk_length=16, after=1) for x in PUBLISHED),
    # windows in buckets
    Attention(150, chunk_length=16, **BUCKET),
    Attention(300, causal=True, after=1, **BUCKET),
    Attention(40, dtype=torch.float32, after=1, dropout=0.3, **BUCKET),
    Attention(150, 128, num_queries=60, chunk_length=32, **BUCKET),
    Attention(150, dtype=torch.float32, chunk_length=16, rules=PAPER, dropout=0.2, padded=0.2, after=1, **BUCKET),
    Attention(200, rules=PAPER, bounds=(0, 1, 1, 90, 200), after=1, chunk_length=16, **BUCKET),
    # in memory
    *(Attention(100, 48, layout=layout, heads=2, batch=2) for layout in LAYOUTS if layout != "one head expanded"),
    Attention(100, 48, layout="one head expanded", heads=2, batch=2, key_heads=2),
    Attention(100, 48, torch.float32, layout="wider rows", heads=2),
    # owned tiles among those visited; few and long walks; few stages
    *(Attention(256, causal=True, device=device) for device in ("A100", "H100", "one")),
    Attention(256, 128, torch.float32, causal=True, device="RTX"),
]
