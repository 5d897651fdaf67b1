"""Problems for the emulated kernels: inputs, and what must come out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

import reformer_kernels as rk

from ..kernel_oracles import assert_hashes, stable_order
from .emulator import Emulator


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
        rotations = rk.random_rotations(
            1, heads, self.head_dim, self.rounds, self.factors
        ).clone()  # aligned as on a GPU
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
    bounds: tuple[Any, ...] | None = None  # of packed sequences, or of those of each batch row
    device: str = "H100"

    def check(self, emulator: Emulator) -> Tensor:
        generator = torch.Generator().manual_seed(self.length)
        shape = (self.batch, self.heads, self.rounds, self.length)
        buckets = torch.randint(0, self.n_buckets, shape, dtype=torch.int32, generator=generator)
        buckets[:, :, 0, self.length // 2 :] = self.n_buckets - 1  # one bucket has most
        order = emulator.bucket_order(buckets, self.n_buckets, self.bounds)
        assert torch.equal(order, stable_order(buckets, self.bounds))
        return order


@dataclass(frozen=True)
class Ties:
    """Each column of the rotations is there several times, and some rows are zero: the first of equals is the best."""

    repeats: int = 4
    device: str = "H100"

    def check(self, emulator: Emulator) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 1, 40, 64, generator=generator).bfloat16()
        x[:, :, ::3] = 0
        rotations = torch.randn(1, 1, 64, 2, 5, generator=generator).repeat(1, 1, 1, 1, self.repeats)
        y = torch.einsum("bhld,bhdrf->bhrlf", x.double(), rotations[..., :5].double())
        best = y.abs().argmax(-1, keepdim=True)
        expected = best + 5 * self.repeats * (y.gather(-1, best) < 0)
        assert torch.equal(emulator.hash_buckets(x, rotations, (10 * self.repeats,)).long(), expected.squeeze(-1))


@dataclass(frozen=True)
class Close:
    """Of two columns the second is larger by 1 / 4096: more than float32 sums lose, less than a half type rounds."""

    dtype: torch.dtype
    device: str = "H100"

    def check(self, emulator: Emulator) -> None:
        signs = torch.randint(0, 2, (1, 1, 40, 64), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
        column = signs[:, :, 7, :, None, None]
        rotations = torch.cat([column, column * (1 + 2**-12)], dim=-1)
        x = signs.to(self.dtype)
        buckets = emulator.hash_buckets(x, rotations, (4,))
        assert_hashes(buckets, x, rotations, (4,))
        assert buckets[0, 0, 0, 7] == 1


@dataclass(frozen=True)
class NotFinite:
    """Rows of NaN, whose buckets are anything: the other ones have their own, though memory beside them is NaN."""

    device: str = "H100"

    def check(self, emulator: Emulator) -> None:
        x, rotations, _ = Hash(50, 40).inputs()
        x[:, :, ::5] = torch.nan
        finite = [i for i in range(50) if i % 5]
        buckets = emulator.hash_buckets(x, rotations, (32, 16))
        assert_hashes(buckets[..., finite], x[:, :, finite], rotations, (32, 16))


@dataclass(frozen=True)
class EachItsOwn:
    """Rotations of each head of each element of the batch."""

    device: str = "H100"

    def check(self, emulator: Emulator) -> None:
        x, _, _ = Hash(40, 64, batch=2, heads=2).inputs()
        rotations = torch.cat([rk.random_rotations(seed, 2, 64, 2, (6, 10)) for seed in (1, 2)])
        assert_hashes(emulator.hash_buckets(x, rotations, (6, 10)), x, rotations, (6, 10))


@dataclass(frozen=True)
class OutOfRange:
    device: str = "H100"

    def check(self, emulator: Emulator) -> None:
        buckets = torch.tensor([[[[3, -1, 2, 7, 2**31 - 1, 0]]]], dtype=torch.int32)
        assert emulator.bucket_order(buckets, 4).flatten().tolist() == [5, 2, 0, 1, 3, 4]


class Case(Protocol):
    """A problem; ``check`` raises what is wrong, or returns the result if it has one."""

    @property
    def device(self) -> str: ...

    def check(self, emulator: Emulator) -> Tensor | None: ...


def assert_all_the_same(results: Sequence[Tensor | None]) -> None:
    """What a case gave on several schedules: nothing each time, or the same bits."""
    found = [x for x in results if x is not None]
    assert len(found) in (0, len(results)) and all(torch.equal(x, found[0]) for x in found)
