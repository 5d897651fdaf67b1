"""Problems for the emulated kernels that choose keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_kernels import testing
from reformer_kernels._calls import SelectCall
from reformer_kernels.backends import cuda, reference
from reformer_kernels.backends.reference_lists import EXACT_KEYS
from reformer_kernels.clustered import attend

from ..kernel_oracles import assert_best
from ..test_random import LAYOUTS
from .attention import DTYPES, describe
from .kernels import Emulator


@dataclass(frozen=True)
class Select:
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
    padded_queries: float = 0.0
    spread: float = 1.0  # of scores
    distinct: int | None = None  # keys, which then repeat
    layout: str = "contiguous"
    device: str = "H100"

    def __str__(self) -> str:
        return describe(self)

    def call(self) -> SelectCall:
        generator = torch.Generator().manual_seed(self.length)
        keys = self.length if self.keys is None else self.keys

        def rows(heads: int, length: int) -> Tensor:
            normal = torch.randn(self.batch, heads, length, self.head_dim, generator=generator)
            return LAYOUTS[self.layout](normal).to(self.dtype)

        def padding(length: int, share: float) -> Tensor | None:
            return torch.rand(self.batch, length, generator=generator) < share if share else None

        query = rows(self.heads, self.length) * self.spread
        key = rows(self.key_heads, keys + self.context)
        if self.distinct:
            key = key[:, :, torch.arange(keys + self.context) % self.distinct]
        key_padding = padding(keys + self.context, self.padded)
        if key_padding is not None and self.padded < 1:
            key_padding[:, keys:] = False
        return testing.capture(
            attend, query, key, key[..., :4], op="select_keys", budget=self.budget, local_fraction=self.local,
            chunk_length=self.chunk_length, grouping=self.grouping, rest_term=False, causal=self.causal,
            query_padding_mask=padding(self.length, self.padded_queries), key_padding_mask=key_padding, attn_mask=None,
            scale=None, dropout_p=0.0, dropout_seed=None, hash_seed=3, context_keys=self.context,
        )  # fmt: skip

    def check(self, emulator: Emulator) -> Tensor:
        call = self.call()
        with emulator.serving():
            assert not cuda.kernel_reasons(call)
            lists = cuda.select_keys(call)
        assert_best(call, lists)
        if self.spread == 0:  # of equal weights the first keys
            assert torch.equal(lists, reference.select_keys(call))
        return lists


MANY = EXACT_KEYS + 700
CASES = [
    *(Select(150, dim, dtype, causal=True) for dtype in DTYPES for dim in (64, 128)),
    *(Select(20, dim, dtype, keys=MANY, padded=0.2) for dtype in DTYPES for dim in (40, 72)),  # in two steps
    Select(1),
    Select(1, dtype=torch.float32, causal=True, budget=1),
    Select(300, dtype=torch.float32, grouping="hash", padded_queries=0.3),
    Select(300, grouping="hash", causal=True, padded=0.3, heads=2, batch=2),
    Select(150, dtype=torch.float32, heads=4, key_heads=2, batch=2, padded=0.3, causal=True, padded_queries=0.6),
    Select(150, local=0.0, budget=100, chunk_length=64),
    Select(150, dtype=torch.float32, local=1.0, causal=True),
    Select(150, 30, torch.float32, chunk_length=20, context=5, causal=True, padded=0.2, layout="wider rows"),
    Select(150, grouping="hash", context=70, causal=True, chunk_length=150),
    Select(70, dtype=torch.float32, keys=130, causal=True, chunk_length=7),
    Select(130, dtype=torch.float32, keys=60, causal=True, budget=30, chunk_length=3),
    Select(130, keys=60, budget=1000, chunk_length=100),
    Select(40, keys=0, context=3),
    Select(150, padded=1.0),
    Select(700, 20, torch.float16, chunk_length=256, causal=True, layout="heads inside", batch=2),
    Select(40, 8, keys=MANY, grouping="hash", heads=2, budget=3000),
    Select(150, 30, torch.float32, spread=100, budget=140),  # weights that are too small for a float
    Select(100, 30, torch.float32, spread=0, causal=True),
    Select(100, 30, spread=0, keys=900, budget=300),
    Select(300, 30, distinct=40, budget=110),
]
