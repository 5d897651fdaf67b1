"""Every instance of the CUDA kernels, emulated, against float64 or exact oracles."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

import reformer_kernels as rk

from . import attention, lists, select
from .attention import DTYPES, L2, ONCE, PAPER, WITHIN, Attention
from .cases import Case, Hash, Order, emulator, launch_all
from .kernels import ARCHITECTURES, SOURCES, Emulator, needs_nvcc
from .lists import Lists
from .mutations import PROBLEMS
from .ptx.kernel import SCHEDULES
from .select import Select

pytestmark = needs_nvcc()

# Each instance: by type and padded head size, whole sorts and sorts of parts.
CASES: list[Case] = [
    *(Hash(150, head_dim, dtype=dtype) for dtype, head_dim in product(DTYPES, (32, 64, 128))),
    *(Hash(70, head_dim, (6, 10, 4), dtype, padded=True, rounds=3) for dtype in DTYPES for head_dim in (8, 20, 65)),
    Hash(1, 64),
    Hash(129, 64, (2,), heads=2, batch=2, shared=True, padded=True),
    Hash(300, 64, (64,), heads=2, layout="B L H D"),
    Hash(100, 64, heads=2, batch=2, layout="L B H D"),
    Hash(100, 64, skip=3),
    Hash(100, 40, dtype=torch.float32, skip=1),
    Hash(200, 128, (512,), rounds=3),  # a round a block
    Hash(140, 128, (1024,), rounds=1, device="RTX"),  # more rotations than fit
    Hash(140, 128, (600,), dtype=torch.float32, rounds=2, device="RTX"),
    Hash(700, 64, rounds=4, device="A100"),
    Order(1, 1),
    Order(63, 2, rounds=2),
    Order(1000, 65, heads=2, rounds=2),
    Order(5000, 2049),
    Order(3000, 20000),  # two digits
    Order(300, 2**27, rounds=2),  # three
    Order(1500, 30, batch=2, rounds=3, bounds=(0, 1, 1, 900, 1500)),
    Order(66000, 300),  # in parts
    Order(50000, 3000, rounds=2, bounds=(0, 100, 50000), device="RTX"),  # a whole one does not fit
    *attention.CASES,
    *lists.CASES,
    *select.CASES,
    *(case for _, case in PROBLEMS.values()),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_on_every_schedule(architecture: str, case: Case) -> None:
    results = [case.check(emulator(architecture, schedule, case)) for schedule in SCHEDULES]
    assert all(result is None or torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_crossed_with_the_cpu(dtype: torch.dtype) -> None:
    for options in (
        {"causal": True, "dropout": 0.3}, {"padded": 0.4, "after": 1}, {"key_heads": 1, "heads": 2},
        {"rules": PAPER, "n_buckets": 4}, {"alignment": "bucket", "n_buckets": 4, "dropout": 0.3},
    ):  # fmt: skip
        Attention(100, 48, dtype, chunk_length=24, **options).check_crossed(Emulator())
    for options in ({"causal": True, "dropout": 0.3}, {"grouping": "hash", "padded": 0.4}):
        Lists(100, 48, dtype, **options).check_crossed(Emulator())


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
            length=self.pick(self.between(1, 5000), self.between(1, 200000)),
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
        rules = self.pick(rk.AttentionRules(), rk.AttentionRules(), PAPER, L2, WITHIN, ONCE)
        alignment = self.pick("ring", "ring", "bucket")
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


@pytest.mark.full
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind", ["hash", "order", "attention", "lists", "select"])
def test_random_problems(kind: str, seed: int, architecture: str) -> None:
    case = getattr(Random(seed), kind)()
    for schedule in SCHEDULES:
        case.check(emulator(architecture, schedule, case))


@pytest.mark.parametrize("row_bytes", [16, 48, 512, 1040])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gather(architecture: str, row_bytes: int) -> None:
    generator = np.random.default_rng(0)
    rows = generator.integers(0, 255, (50, row_bytes), np.uint8)
    index = generator.integers(-3, 60, 77).astype(np.int32)
    inside = (index >= 0) & (index < 50)
    expected = np.where(inside[:, None], rows[np.where(inside, index, 0)], 0)
    for schedule in SCHEDULES:
        assert np.array_equal(Emulator(architecture, schedule).gather_rows(rows, index), expected)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_instance_is_run(architecture: str, source: str) -> None:
    """The cases above run on each architecture; here it is seen that together they launch all that is compiled."""
    machine = Emulator(architecture)
    if source == "gather":
        machine.gather_rows(np.zeros((4, 16), np.uint8), np.zeros(3, np.int32))
    launch_all(source, (case for case in CASES if type(case).__name__.lower() == source), machine)
