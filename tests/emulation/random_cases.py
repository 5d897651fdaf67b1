"""Random problems for the emulated kernels."""

from __future__ import annotations

from typing import Any

import numpy as np

import reformer_kernels as rk

from .attention import DTYPES, L2, ONCE, PAPER, PUBLISHED, WITHIN, Attention
from .cases import Hash, Order
from .lists import Lists
from .select import Select


class Random:
    """Draws problems of each kind."""

    def __init__(self, seed: int) -> None:
        self.numbers = np.random.default_rng(seed)

    def pick(self, *values: Any) -> Any:
        return values[self.numbers.integers(len(values))]

    def between(self, low: int, high: int) -> int:
        return int(self.numbers.integers(low, high + 1))

    def hash(self) -> Hash:
        return Hash(
            length=self.between(1, 1500), head_dim=self.between(1, 128),
            factors=self.pick((2,), (4,), (30, 14), (64, 32), (256,), (2, 4, 6, 8)), dtype=self.pick(*DTYPES),
            batch=self.pick(1, 2), heads=self.pick(1, 3), rounds=self.pick(1, 2, 5), padded=self.pick(False, True),
            shared=self.pick(False, True), layout=self.pick("B H L D", "B L H D"), skip=self.pick(0, 0, 1, 8),
            device=self.pick("A100", "H100", "RTX"),
        )  # fmt: skip

    def order(self) -> Order:
        return Order(
            length=self.pick(self.between(1, 5000), self.between(1, 80000)),
            n_buckets=int(2 ** self.numbers.uniform(0, 24)), heads=self.pick(1, 2), rounds=self.pick(1, 3),
            device=self.pick("A100", "H100", "RTX"),
        )  # fmt: skip

    def rows(self) -> dict[str, Any]:
        return {
            "length": self.between(1, 200), "head_dim": self.between(1, 128), "dtype": self.pick(*DTYPES),
            "batch": self.pick(1, 2), "chunk_length": self.between(1, 256), "causal": self.pick(False, True),
            "padded": self.pick(0.0, 0.0, 0.3, 0.9), "layout": self.pick("contiguous", "wider rows", "heads inside"),
        }  # fmt: skip

    def attention(self) -> Attention:
        options = self.rows() | {"before": self.between(0, 3), "after": self.between(0, 2)}
        options |= {"dropout": self.pick(0.0, 0.3), "value_dim": self.pick(None, self.between(1, 128))}
        if self.pick(False, True):
            key_heads = self.pick(1, 2)
            return Attention(**options, heads=self.pick(1, 2) * key_heads, key_heads=key_heads)
        rules = self.pick(rk.AttentionRules(), rk.AttentionRules(), PAPER, L2, WITHIN, ONCE, *PUBLISHED)
        alignment = "ring" if rules in PUBLISHED else self.pick("ring", "ring", "bucket")
        return Attention(
            **options, heads=self.pick(1, 2), rounds=self.between(1, 4), n_buckets=2 * self.between(1, 8), rules=rules,
            alignment=alignment,
        )  # fmt: skip

    def lists(self, kind: type[Lists] | type[Select] = Lists) -> Lists | Select:
        key_heads, grouping = self.pick(1, 2), self.pick("position", "hash")
        keys = self.pick(None, self.between(1, 300)) if grouping == "position" else None
        return kind(
            **self.rows(), keys=keys, heads=self.pick(1, 2) * key_heads, key_heads=key_heads,
            budget=self.between(1, 200), local=self.pick(0.0, 0.25, 1.0), grouping=grouping,
            context=self.pick(0, 0, 5, 70),
        )  # fmt: skip

    def select(self) -> Lists | Select:
        return self.lists(Select)
