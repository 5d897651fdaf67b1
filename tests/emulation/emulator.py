"""Where emulated kernels run: a backend that serves tensors of the CPU, what it launched, and the memory of tensors."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, overload

import numpy as np
import pytest
import torch
from torch import Tensor

from reformer_kernels._calls import HashCall, OrderCall
from reformer_kernels._dispatch import BACKENDS

from ..ptx_emulator import Counters, Schedule, VirtualRegion

ARCHITECTURES = ("sm_80", "sm_90")
# make test has one of them.
on_each_architecture = pytest.mark.parametrize(
    "architecture", [pytest.param(a, marks=() if a == "sm_90" else pytest.mark.full) for a in ARCHITECTURES]
)

Memory = Sequence[np.ndarray | VirtualRegion]


@dataclass(frozen=True)
class Launched:
    name: str  # of CUDA kernels mangled
    threads: int
    shared_bytes: int  # dynamic
    counters: Counters | None  # None: it was not run


@dataclass
class Emulator(ABC):
    """Where launches of a backend run: the architecture and the schedule."""

    architecture: str = "sm_90"
    schedule: Schedule = field(default_factory=Schedule)
    launched: list[Launched] = field(default_factory=list)
    backend: ClassVar[str]

    @abstractmethod
    def serving(self) -> AbstractContextManager[None]:
        """The backend serves tensors of the CPU, by emulated kernels."""

    def hash_buckets(
        self, x: Tensor, rotations: Tensor, factors: Sequence[int], padding: Tensor | None = None
    ) -> Tensor:
        """Buckets int32 [B, H, R, L], like ``rk.hash_buckets``."""
        with self.serving():
            return BACKENDS[self.backend].hash_buckets(
                HashCall(x, rotations, padding, None, list(factors), 0, 1, self.backend)
            )

    def bucket_order(self, buckets: Tensor, n_buckets: int, bounds: Sequence[Any] | None = None) -> Tensor:
        """Order int32 [B, H, R, L], like ``rk.bucket_order``; ``bounds``: of sequences, or those of batch rows."""
        cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
        with self.serving():
            return BACKENDS[self.backend].bucket_order(OrderCall(buckets, cu_seqlens, n_buckets, self.backend))


@overload
def as_array(x: Tensor) -> np.ndarray: ...
@overload
def as_array(x: None) -> None: ...
@overload
def as_array(x: Tensor | None) -> np.ndarray | None: ...
def as_array(x: Tensor | None) -> np.ndarray | None:
    """A view of a tensor; half types as uint16."""
    if x is None:
        return None
    return x.view(torch.int16).numpy().view(np.uint16) if x.element_size() == 2 else x.numpy()


def read_only(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view


def storage(x: Tensor, writeable: bool = False) -> np.ndarray:
    """All memory that a tensor's storage has."""
    data = x.untyped_storage()
    array = np.ctypeslib.as_array((ctypes.c_ubyte * data.nbytes()).from_address(data.data_ptr()))
    return array if writeable else read_only(array)
