"""Every instance of the CUDA kernels, emulated, against float64 or exact oracles."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import reformer_kernels as rk

from ..kernel_oracles import assert_hashes, stable_order
from .kernels import ARCHITECTURES, DEVICES, SOURCES, Emulator, entries, host, needs_nvcc, read_only
from .ptx.kernel import SCHEDULES, VirtualRegion

pytestmark = needs_nvcc()

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Hash:
    length: int
    head_dim: int
    factors: tuple[int, ...] = (32, 16)
    dtype: torch.dtype = torch.bfloat16
    batch: int = 1
    heads: int = 1
    rounds: int = 2
    padded: bool = False
    shared: bool = False  # rotations of the heads
    layout: str = "B H L D"  # as it lies in memory
    skip: int = 0  # elements of each row that are not part of it
    device: str = "H100"

    def inputs(self) -> tuple[Tensor, Tensor, Tensor | None]:
        generator = torch.Generator().manual_seed(self.length + self.head_dim)
        width = self.head_dim + self.skip
        shape = {"B": self.batch, "H": self.heads, "L": self.length, "D": width}
        names = self.layout.split()
        x = torch.randn([shape[n] for n in names], generator=generator).to(self.dtype)
        x = x.permute([names.index(n) for n in "BHLD"])[..., self.skip :]
        heads = 1 if self.shared else self.heads
        rotations = rk.random_rotations(1, heads, self.head_dim, self.rounds, self.factors)
        padding = torch.rand(self.batch, self.length, generator=generator) < 0.4 if self.padded else None
        return x, rotations, padding

    def check(self, emulator: Emulator) -> Tensor:
        x, rotations, padding = self.inputs()
        buckets = emulator.hash_buckets(x, rotations, self.factors, padding)
        assert_hashes(buckets, x, rotations, self.factors, padding)
        return buckets


@dataclass(frozen=True)
class Order:
    length: int
    n_buckets: int
    batch: int = 1
    heads: int = 1
    rounds: int = 1
    bounds: tuple[int, ...] | None = None  # of packed sequences
    device: str = "H100"

    def check(self, emulator: Emulator) -> Tensor:
        generator = torch.Generator().manual_seed(self.length)
        shape = (self.batch, self.heads, self.rounds, self.length)
        buckets = torch.randint(0, self.n_buckets, shape, dtype=torch.int32, generator=generator)
        buckets[:, :, 0, self.length // 2 :] = self.n_buckets - 1  # one bucket has most
        order = emulator.bucket_order(buckets, self.n_buckets, self.bounds)
        assert torch.equal(order, stable_order(buckets, self.bounds))
        return order


Case = Hash | Order
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
]


def emulator(architecture: str, schedule: dict[str, Any], case: Case) -> Emulator:
    return Emulator(architecture, schedule, DEVICES[case.device])


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_on_every_schedule(architecture: str, case: Case) -> None:
    results = [case.check(emulator(architecture, schedule, case)) for schedule in SCHEDULES]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.full
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("seed", range(60))
def test_random_problems(seed: int, architecture: str) -> None:
    generator = np.random.default_rng(seed)
    pick = lambda *values: values[generator.integers(len(values))]  # noqa: E731
    if seed % 2:
        case: Case = Hash(
            length=int(generator.integers(1, 1500)), head_dim=int(generator.integers(1, 129)),
            factors=pick((2,), (4,), (30, 14), (64, 32), (256,), (2, 4, 6, 8)), dtype=pick(*DTYPES),
            batch=pick(1, 2), heads=pick(1, 3), rounds=pick(1, 2, 5), padded=pick(False, True),
            shared=pick(False, True), layout=pick("B H L D", "B L H D"), skip=pick(0, 0, 1, 8),
            device=pick("A100", "H100", "RTX"),
        )  # fmt: skip
    else:
        case = Order(
            length=int(pick(generator.integers(1, 5000), generator.integers(1, 200000))),
            n_buckets=int(2 ** generator.uniform(0, 24)), heads=pick(1, 2), rounds=pick(1, 3),
            device=pick("A100", "H100", "RTX"),
        )  # fmt: skip
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
    for case in CASES:
        if type(case).__name__.lower() == source:
            case.check(replace(machine, device=DEVICES[case.device]))
    assert {name for name, _ in machine.launched} == entries(SOURCES[source], architecture)


def test_order_of_buckets_out_of_range() -> None:
    buckets = torch.tensor([[[[3, -1, 2, 7, 2**31 - 1, 0]]]], dtype=torch.int32)
    assert Emulator().bucket_order(buckets, 4).flatten().tolist() == [5, 2, 0, 1, 3, 4]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hash_of_rows_that_are_2_to_the_31_elements_apart(architecture: str) -> None:
    """Strides are as wide as addresses: two batch elements, two heads and all rows lie gigabytes apart."""
    length, head_dim, factors = 40, 64, (32, 16)
    x = torch.randn(2, 2, length, head_dim, generator=torch.Generator().manual_seed(0)).bfloat16()
    strides = (2**34 + 64, 2**33 + 128, 2**31 + 192)  # elements
    base = 2**44
    region = VirtualRegion(base, 2 * (sum(s * n for s, n in zip(strides, (2, 2, length), strict=True))))
    for index in np.ndindex(2, 2, length):
        offset = 2 * sum(i * s for i, s in zip(index, strides, strict=True))
        region.write(offset, x[index].view(torch.int16).numpy())
    region.writeable = False
    far = _Far(base, x.shape, [*(2 * s for s in strides), 2])
    rotations = rk.random_rotations(1, 2, head_dim, 2, factors)
    buckets = np.full((2, 2, 2, length), -9, np.int32)
    machine = Emulator(architecture)
    host().hash_buckets(np.asarray(far), "bfloat16", rotations.numpy(), None, list(factors), buckets, machine.device)
    machine.run("hash", [region, read_only(rotations.numpy()), buckets])
    assert_hashes(torch.from_numpy(buckets), x, rotations, factors)


class _Far:
    """What numpy takes for an array of 2-byte elements at an address where nothing is."""

    def __init__(self, address: int, shape: tuple[int, ...], strides: list[int]) -> None:
        self.__array_interface__ = {
            "version": 3, "typestr": "<u2", "data": (address, False), "shape": tuple(shape), "strides": tuple(strides),
        }  # fmt: skip
