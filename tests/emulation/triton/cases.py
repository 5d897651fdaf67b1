"""Problems for the Triton kernels, fewer than for those of CUDA, since compiling takes seconds for each."""

from __future__ import annotations

from itertools import product

import torch

from .. import attention, lists, select
from ..attention import BUCKET, DTYPES, L2, ONCE, PAPER, Attention
from ..cases import Case, Close, EachItsOwn, Hash, NotFinite, Order, OutOfRange, Ties

HASHES: list[Case] = [
    *(Hash(70, head_dim, (6, 10, 4), dtype, padded=True, rounds=3) for dtype in DTYPES for head_dim in (20, 65)),
    Hash(1, 64),
    Hash(129, 64, (2,), heads=2, batch=2, shared=True, padded=True),
    Hash(300, 64, (64,), heads=2, layout="B L H D"),
    Hash(100, 40, dtype=torch.float32, skip=1),
    Hash(70, 200, (200,)),
    Ties(),
    *map(Close, DTYPES),
    NotFinite(),
    EachItsOwn(),
]
ORDERS: list[Case] = [
    Order(1, 1),
    Order(63, 2, rounds=2),
    Order(1000, 65, heads=2, rounds=2),
    Order(1025, 256),
    Order(5000, 2049, heads=2),  # two digits
    Order(300, 2**27, rounds=2),  # two of a whole tile
    Order(1500, 30, batch=2, rounds=3, bounds=(0, 1, 1, 900, 1500)),
    Order(5000, 300, rounds=2, bounds=(0, 100, 5000)),
    Order(1500, 30, batch=3, heads=2, rounds=2, bounds=((0, 1500, 1500), (0, 900, 1500), (0, 0, 1500))),
    OutOfRange(),
]
# Of each kind of window, rule and layout.
CHOSEN = [
    *(Attention(130, dim, dtype, causal=True, chunk_length=32) for dtype, dim in product(DTYPES, (32, 64))),
    Attention(100, 128, causal=True, chunk_length=32),
    Attention(1),
    Attention(150, padded=0.3, rounds=3, chunk_length=20, dropout=0.2),
    Attention(150, padded=1.0),
    Attention(150, dtype=torch.float32, rules=L2),
    Attention(150, dtype=torch.float32, before=5, after=5, chunk_length=32),
    Attention(130, dtype=torch.float32, key_heads=1, heads=3, causal=True, batch=2),
    Attention(130, key_heads=1, heads=2, bounds=(0, 30, 130), causal=True),
    Attention(150, dtype=torch.float32, num_queries=60, chunk_length=32),
    *attention.UNSEEN,
    Attention(90, dtype=torch.float32, ends=(90, 40, 0), num_queries=60, chunk_length=16, causal=True),
    Attention(90, dtype=torch.float32, rules=PAPER, chunk_length=32, n_buckets=2, before=4, after=3, rounds=1),
    Attention(150, dtype=torch.float32, rules=ONCE, chunk_length=16, n_buckets=4, causal=True, rounds=4, after=1),
    Attention(200, rules=PAPER, bounds=(0, 1, 1, 90, 200), after=1, chunk_length=16, **BUCKET),
    Attention(100, 48, layout="wider rows", heads=2, batch=2),
]
WIDE = [Attention(100, 200, dtype, value_dim=40, causal=True) for dtype in DTYPES]
LISTS, SELECTIONS = ([cases[i] for i in range(0, len(cases), 2)] for cases in (lists.CASES, select.CASES))
SAMPLED = [*HASHES, *ORDERS, *CHOSEN, *LISTS, *SELECTIONS]
OTHERS = [case for case in (*attention.CASES, *WIDE, *lists.CASES, *select.CASES) if case not in SAMPLED]
# Together they launch every kernel.
OF_EACH_KERNEL: list[Case] = [
    Attention(100, 32, rules=PAPER, dropout=0.1), Order(1500, 30), Hash(100, 64),
    lists.Lists(100, grouping="hash"), select.Select(100, 8, keys=select.MANY),
]  # fmt: skip
# What make test runs, too, since compiling takes seconds for each.
QUICK = SAMPLED[::4]
