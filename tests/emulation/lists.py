"""Problems for the emulated kernels of attention to lists of keys, against the float64 oracle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reformer_kernels import testing
from reformer_kernels._calls import ListCall
from reformer_kernels.clustered import attend

from ..layouts import LAYOUTS
from .attention import DTYPES, OracleCase


@dataclass(frozen=True)
class Clustered:
    """A problem of clustered attention."""

    length: int
    head_dim: int = 64
    dtype: torch.dtype = torch.bfloat16
    keys: int | None = None  # None: as many as queries
    batch: int = 1
    heads: int = 1
    key_heads: int = 1
    budget: int = 40
    local: float = 0.25  # of the budget
    chunk_length: int = 16
    grouping: str = "position"
    context: int = 0
    causal: bool = False
    padded: float = 0.0  # of all keys
    trailing: int = 0  # keys at the end of the first sequence are padding
    layout: str = "contiguous"
    device: str = "H100"

    def capture(self, op: str, value_dim: int, spread: float = 1.0, distinct: int | None = None, **others: Any) -> Any:
        """The call of an op.

        Args:
            spread: of the queries.
            distinct: so many keys, which then repeat. None: all.
        """
        generator = torch.Generator().manual_seed(self.length)
        size = (self.length if self.keys is None else self.keys) + self.context

        def rows(heads: int, length: int, width: int) -> Tensor:
            normal = torch.randn(self.batch, heads, length, width, generator=generator)
            return LAYOUTS[self.layout](normal.to(self.dtype))

        padding = torch.rand(self.batch, size, generator=generator) < self.padded if self.padded else None
        if self.trailing:
            padding = torch.zeros(self.batch, size, dtype=torch.bool) if padding is None else padding
            padding[0, size - self.context - self.trailing : size - self.context] = True
        query = rows(self.heads, self.length, self.head_dim).mul_(spread)
        key, value = (rows(self.key_heads, size, width) for width in (self.head_dim, value_dim))
        if distinct:
            key = key[:, :, torch.arange(size) % distinct]
        options: dict[str, Any] = {
            "budget": self.budget, "local_fraction": self.local, "chunk_length": self.chunk_length,
            "grouping": self.grouping, "rest_term": False, "causal": self.causal, "query_padding_mask": None,
            "key_padding_mask": padding, "attn_mask": None, "scale": None, "dropout_p": 0.0, "dropout_seed": None,
            "hash_seed": 3, "context_keys": self.context,
        }  # fmt: skip
        return testing.capture(attend, query, key, value, op=op, **(options | others))


@dataclass(frozen=True)
class Lists(Clustered, OracleCase):
    value_dim: int | None = None  # None: that of the query
    rest: bool = True
    dropout: float = 0.0
    backends: tuple[str, str] | None = None  # of the forward and the backward; None: the emulated one

    def call(self) -> ListCall:
        call: ListCall = self.capture(
            "list_attention", self.value_dim or self.head_dim, rest_term=self.rest, dropout_p=self.dropout,
            dropout_seed=torch.tensor([2**33 + 5]),
        )  # fmt: skip
        return call


CASES = [
    *(Lists(100, dim, dtype, causal=True) for dtype in DTYPES for dim in (32, 128)),
    Lists(1),
    Lists(1, causal=True, dtype=torch.float32, budget=1),
    Lists(150, grouping="hash", causal=True, dropout=0.3),
    Lists(150, dtype=torch.float32, grouping="hash", dropout=0.3, padded=0.3),
    Lists(150, dtype=torch.float32, heads=4, key_heads=2, batch=2, padded=0.3, causal=True),
    Lists(150, rest=False, budget=100, chunk_length=64),
    Lists(150, dtype=torch.float32, chunk_length=20, context=5, causal=True, padded=0.2),
    Lists(150, grouping="hash", context=70, value_dim=20, heads=2),
    Lists(90, dtype=torch.float32, keys=130, causal=True),
    Lists(130, dtype=torch.float32, keys=90, causal=True, budget=30),
    Lists(130, keys=60, budget=100, chunk_length=100),
    Lists(40, keys=0, context=3),
    Lists(150, padded=1.0),
    Lists(100, 48, layout="wider rows", heads=2, key_heads=2),
    Lists(100, 48, torch.float16, layout="heads inside", batch=2),
    Lists(100, 47, value_dim=33, causal=True),
    Lists(200, 128, torch.float32, device="RTX"),
]
