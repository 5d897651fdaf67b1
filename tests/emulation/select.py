"""Problems for the emulated kernels that choose keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reformer_kernels._calls import SelectCall
from reformer_kernels._dispatch import BACKENDS
from reformer_kernels.backends import reference
from reformer_kernels.backends.reference_lists import EXACT_KEYS

from ..kernel_oracles import assert_best
from .attention import DTYPES, describe
from .emulator import Emulator
from .lists import Clustered


@dataclass(frozen=True)
class Select(Clustered):
    padded_queries: float = 0.0
    spread: float = 1.0  # of scores
    distinct: int | None = None  # keys, which then repeat
    not_finite: bool = False  # some rows: no sub-group that has one of them chooses, as in the CPU's kernels

    def __str__(self) -> str:
        return describe(self)

    def call(self) -> SelectCall:
        padding = None
        if self.padded_queries:
            generator = torch.Generator().manual_seed(self.length)
            padding = torch.rand(self.batch, self.length, generator=generator) < self.padded_queries
        call: SelectCall = self.capture("select_keys", 4, self.spread, self.distinct, query_padding_mask=padding)
        if self.not_finite:
            call.query[:, :, 40:43] = torch.nan
            call.key[:, :, 70] = torch.inf
        return call

    def check(self, emulator: Emulator) -> Tensor:
        call = self.call()
        with emulator.serving():
            backend = BACKENDS[emulator.backend]
            assert not backend.not_supported_reasons(call)
            key_indices = backend.select_keys(call)
        if self.not_finite:
            assert torch.equal(key_indices, BACKENDS["cpu"].select_keys(call))
            return key_indices
        assert_best(call, key_indices)
        if self.spread == 0:  # of equal weights the first keys
            assert torch.equal(key_indices, reference.select_keys(call))
        return key_indices


MANY = EXACT_KEYS + 700
CASES = [
    *(Select(150, dim, dtype, causal=True) for dtype in DTYPES for dim in (64, 128)),
    *(Select(20, dim, dtype, keys=MANY, padded=0.2) for dtype in DTYPES for dim in (40, 72)),  # in two steps
    Select(1),
    Select(1, dtype=torch.float32, causal=True, budget=1),
    Select(300, dtype=torch.float32, grouping="hash", padded_queries=0.3),
    Select(300, grouping="hash", causal=True, padded=0.3, heads=2, batch=2, trailing=130),
    Select(150, dtype=torch.float32, batch=2, trailing=50),
    Select(150, dtype=torch.float32, heads=4, key_heads=2, batch=2, padded=0.3, causal=True, padded_queries=0.6),
    Select(150, local=0.0, budget=100, chunk_length=64),
    Select(150, dtype=torch.float32, local=1.0, causal=True),
    Select(150, 30, torch.float32, chunk_length=20, context=5, causal=True, padded=0.2, layout="wider rows"),
    Select(150, grouping="hash", context=70, causal=True, chunk_length=150),
    Select(70, dtype=torch.float32, keys=130, causal=True, chunk_length=7),
    Select(130, dtype=torch.float32, keys=60, causal=True, budget=30, chunk_length=3),
    Select(130, keys=60, budget=1000, chunk_length=100),
    Select(100, 30, torch.float32, chunk_length=120, grouping="hash"),  # a chunk is as long as the queries
    Select(40, keys=0, context=3),
    Select(150, padded=1.0),
    Select(700, 20, torch.float16, chunk_length=256, causal=True, layout="heads inside", batch=2),
    Select(40, 8, keys=MANY, grouping="hash", heads=2, budget=3000),
    Select(150, 30, torch.float32, spread=100, budget=140),  # weights that are too small for a float
    Select(100, 30, torch.float32, spread=0, causal=True),
    Select(100, 30, spread=0, keys=900, budget=300),
    Select(300, 30, distinct=40, budget=110),
    Select(100, 30, torch.float32, causal=True, budget=30, not_finite=True),
]
