"""Every instance of the CUDA kernels, emulated, against float64 or exact oracles."""

from __future__ import annotations

from itertools import cycle, product

import pytest
import torch

from ...ptx_emulator import SCHEDULES, Schedule
from ...ptx_emulator.testing import needs_nvcc
from .. import attention, lists, select
from ..attention import DTYPES, PAPER, Attention
from ..cases import Case, Hash, Order, assert_all_the_same
from ..emulator import ARCHITECTURES, on_each_architecture
from ..lists import Lists
from ..random_cases import Random
from .cases import Gather, emulator, launches_of_all
from .kernels import SOURCES, EmulatedCuda
from .mutations import PROBLEMS

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
    Order(1500, 30, batch=3, heads=2, rounds=2, bounds=((0, 1500, 1500), (0, 900, 1500), (0, 0, 1500))),
    Order(66000, 300),  # in parts
    Order(50000, 3000, rounds=2, bounds=(0, 100, 50000), device="RTX"),  # a whole one does not fit
    *attention.CASES,
    *lists.CASES,
    *select.CASES,
    *(case for _, case in PROBLEMS.values()),
]


@pytest.mark.parametrize(("case", "schedule"), list(zip(CASES, cycle(SCHEDULES))), ids=str)
def test_on_one_schedule(case: Case, schedule: Schedule) -> None:
    case.check(emulator("sm_90", schedule, case))


@pytest.mark.full
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_on_every_schedule(architecture: str, case: Case) -> None:
    results = [case.check(emulator(architecture, schedule, case)) for schedule in SCHEDULES]
    assert_all_the_same(results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_crossed_with_the_cpu(dtype: torch.dtype) -> None:
    for options in (
        {"causal": True, "dropout": 0.3}, {"padded": 0.4, "after": 1}, {"key_heads": 1, "heads": 2},
        {"rules": PAPER, "n_buckets": 4}, {"alignment": "bucket", "n_buckets": 4, "dropout": 0.3},
    ):  # fmt: skip
        Attention(100, 48, dtype, chunk_length=24, **options).check_crossed(EmulatedCuda())
    for options in ({"causal": True, "dropout": 0.3}, {"grouping": "hash", "padded": 0.4}):
        Lists(100, 48, dtype, **options).check_crossed(EmulatedCuda())


@pytest.mark.parametrize("case", attention.UNSEEN, ids=str)
def test_nothing_comes_of_padding(case: Attention) -> None:
    case.check_padding_is_unseen(EmulatedCuda())


@pytest.mark.full
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kind", ["hash", "order", "attention", "lists", "select"])
def test_random_problems(kind: str, seed: int) -> None:
    case = getattr(Random(seed), kind)()
    for schedule in SCHEDULES:
        case.check(emulator(ARCHITECTURES[seed % 2], schedule, case))


@pytest.mark.parametrize("row_bytes", [16, 48, 512, 1040])
@on_each_architecture
def test_gather(architecture: str, row_bytes: int) -> None:
    for schedule in SCHEDULES:
        Gather(row_bytes).check(EmulatedCuda(architecture, schedule))


@pytest.mark.parametrize("source", SOURCES)
@on_each_architecture
def test_every_instance_is_run(architecture: str, source: str) -> None:
    """The cases above are run; here it is seen that together they launch all that is compiled."""
    launches_of_all(source, (case for case in CASES if type(case).__name__.lower() == source), architecture)


def test_an_instance_that_no_case_launches_is_noticed() -> None:
    with pytest.raises(AssertionError, match="no case launches"):
        launches_of_all("hash", [Hash(1, 64)], "sm_90")
