"""Kernels with mistakes that were planted in them, which are noticed on some schedule, and without, which are right."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from .. import build
from ..kernel import SCHEDULES, Kernel, Schedule
from ..testing import failure, needs_nvcc

pytestmark = [needs_nvcc(), pytest.mark.full]

PLANTED = Path(__file__).parent / "planted"
LOG2_E = 1.4426950408889634
Run = Callable[["Problem", int, Schedule], None]


class Problem:
    """A batch of sequences whose positions are sorted by bucket, and chunk attention to them in float64."""

    def __init__(self, batch: int = 2, length: int = 512) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batch, self.length = batch, length
        self.buckets = torch.randint(0, 64, (batch, length), dtype=torch.int32, generator=generator)
        self.sorted_buckets, order = torch.sort(self.buckets, dim=1, stable=True)
        self.order = order.int()
        self.qk, self.v = (torch.randn(batch, length, 64, generator=generator).bfloat16() for _ in range(2))
        self.scale = 0.125

    def expected(self) -> torch.Tensor:
        def rows(x: torch.Tensor) -> torch.Tensor:
            index = self.order.long()[..., None].expand(-1, -1, x.shape[-1])
            return x.double().gather(1, index).view(self.batch, -1, 64, x.shape[-1])

        def with_before(x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, x.roll(1, 1)], 2)

        q, v = rows(self.qk), with_before(rows(self.v))
        k = with_before(q * torch.rsqrt((q * q).sum(-1, keepdim=True) + 1e-6))
        positions, buckets = (x.view(self.batch, -1, 64) for x in (self.order, self.sorted_buckets))
        k_positions, k_buckets = with_before(positions), with_before(buckets)
        scores = q @ k.mT * self.scale
        other = (buckets[..., None] != k_buckets[:, :, None]) | (positions[..., None] < k_positions[:, :, None])
        scores = scores.masked_fill(other, -1e9 / LOG2_E)
        scores = scores.masked_fill(positions[..., None] == k_positions[:, :, None], -1e5 / LOG2_E)
        return (scores.softmax(-1) @ v).view(self.batch, self.length, 64)


def bits(x: torch.Tensor) -> np.ndarray:
    return x.contiguous().view(torch.int16).numpy() if x.dtype == torch.bfloat16 else x.contiguous().numpy()


def sort(problem: Problem, bug: int, schedule: Schedule) -> None:
    kernel = Kernel(build.ptx(PLANTED / "counting_sort.cu", defines={"BUG": bug}))
    order, found = (np.full((problem.batch, problem.length), -1, np.int32) for _ in range(2))
    arrays = [problem.buckets.numpy(), order, found]
    pointers = b"".join(a.ctypes.data.to_bytes(8, "little") for a in arrays)
    params = pointers + np.array([problem.length, 0], np.int32).tobytes()
    kernel.launch((problem.batch, 1, 1), 256, params, arrays, **schedule)
    assert np.array_equal(order, problem.order.numpy()) and np.array_equal(found, problem.sorted_buckets.numpy())


def attend(problem: Problem, bug: int, schedule: Schedule) -> None:
    kernel = Kernel(build.ptx(PLANTED / "chunk_attention.cu", defines={"BUG": bug}))
    out = np.full((problem.batch, problem.length, 64), 0x7FFF, np.int16)
    lse = np.full((problem.batch, problem.length), np.nan, np.float32)
    inputs = [bits(x) for x in (problem.qk, problem.v, problem.order, problem.sorted_buckets)]
    pointers = b"".join(a.ctypes.data.to_bytes(8, "little") for a in [*inputs, out, lse])
    numbers = np.array([problem.length, problem.length // 64], np.int32).tobytes()
    scale = np.array([problem.scale * LOG2_E, 0], np.float32).tobytes()
    shared = 2 * 128 * 128 + 3 * 128 * 4
    kernel.launch((problem.length // 64, problem.batch, 1), 128, pointers + numbers + scale, [*inputs, out, lse],
                  shared, **schedule)  # fmt: skip
    result = torch.from_numpy(out).view(torch.bfloat16).double()
    # A probability and the result are each rounded to bfloat16, 2^-9, of values below 5.
    assert (result - problem.expected()).abs().max() <= 2 * 5 * 2**-9


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("run", [sort, attend])
def test_planted_kernels_without_a_mistake(run: Run, schedule: Schedule) -> None:
    run(Problem(), 0, schedule)


@pytest.mark.parametrize("bug", range(1, 16))
def test_planted_mistakes(bug: int) -> None:
    """Each shows, but for the 15th: equal values that are stored at once, which only a thread sanitizer reports."""
    problem = Problem()
    run = sort if bug in (6, 7, 8) else attend
    assert (failure(lambda schedule: run(problem, bug, schedule)) is None) == (bug == 15)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_product_by_a_warpgroup(schedule: Schedule) -> None:
    kernel = Kernel(build.ptx(PLANTED / "warpgroup.cu", "sm_90a"))
    a, b = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    arrays = [x.view(torch.int16).numpy() for x in (a, b)]
    out = np.zeros((64, 64), np.float32)
    kernel.launch(
        (1, 1, 1), 128, struct.pack("PPP", *(x.ctypes.data for x in (*arrays, out))), [*arrays, out], **schedule
    )
    exact = a.double() @ b.double().T
    # The products of halves are exact; each of 64 additions rounds.
    assert ((torch.from_numpy(out) - exact).abs() <= 64 * 2**-24 * (a.double().abs() @ b.double().abs().T)).all()
