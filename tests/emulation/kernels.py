"""The CUDA kernels of this repository, launched by their own launchers and executed by the PTX emulator.

A launcher runs in the host module, which records what it would launch: the mangled name of the kernel, the shape, and
the bytes of its arguments, pointers into numpy arrays. The emulator then runs the entry of that name in nvcc's output.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from . import build
from .ptx.kernel import Counters, Kernel, VirtualRegion

CSRC = build.ROOT / "csrc"
HERE = Path(__file__).parent
SOURCES = {name: CSRC / "kernels" / "cuda" / f"{name}.cu" for name in ("hash", "order", "gather")}
ARCHITECTURES = ("sm_80", "sm_90")
# Multiprocessors, bytes of shared memory of a block and of a multiprocessor.
DEVICES = {
    "A100": (108, 166912, 167936),
    "H100": (132, 232448, 233472),
    "RTX": (82, 101376, 102400),
    # No GPU: little shared memory, and few blocks, so that each has several tiles of tokens.
    "one": (1, 61440, 61440),
    "little": (4, 80000, 81920),
}

Memory = Sequence[np.ndarray | VirtualRegion]


def needs_nvcc() -> pytest.MarkDecorator:
    """Skips tests where there is no nvcc; in CI they fail instead."""
    missing = build.nvcc() is None and os.environ.get("CI") != "true"
    return pytest.mark.skipif(missing, reason="needs nvcc")


@functools.cache
def cuda_include() -> Path:
    """Where CUDA's headers are: nvcc knows, also where the one on PATH is a script that calls another."""
    nvcc = build.nvcc()
    assert nvcc is not None, "no nvcc, whose headers the host module needs"
    said = subprocess.run([nvcc, "--dryrun", "any.cu"], capture_output=True, text=True).stderr
    folders = [Path(folder) for folder in re.findall(r'-I"?([^"\s]+)', said)]
    return next(folder for folder in folders if (folder / "vector_types.h").exists())


@functools.cache
def host() -> ModuleType:
    """The launchers, compiled for the CPU."""
    flags = ("-DRK_HOST", "-fvisibility=default", "-Wno-unknown-pragmas", "-x", "c++")
    parts = sorted(path for path in HERE.glob("host_*.cpp") if not path.stem.endswith("main"))
    module = build.extension("host", [*parts, *SOURCES.values()], flags, [CSRC, HERE, cuda_include()])
    module.set_mode("record")
    return module


def ptx(source: Path, architecture: str, csrc: Path = CSRC) -> str:
    return build.ptx(source, architecture, include_dirs=[csrc])


def entries(source: Path, architecture: str) -> set[str]:
    """The mangled names of all kernel instances that a source is compiled to."""
    return set(re.findall(r"\.entry\s+([\w$]+)", ptx(source, architecture)))


@functools.cache
def _kernel(text: str, name: str) -> Kernel:
    return Kernel(text, name)


@dataclass(frozen=True)
class Launched:
    name: str  # mangled
    threads: int
    shared_bytes: int  # dynamic
    counters: Counters


@dataclass
class Emulator:
    """Where launches run: the architecture, the schedule (of ``ptx.kernel.SCHEDULES``), the device of the plan."""

    architecture: str = "sm_90"
    schedule: dict[str, Any] = field(default_factory=dict)
    device: tuple[int, int, int] = DEVICES["H100"]
    csrc: Path = CSRC  # of the kernels, not of their launchers
    launched: list[Launched] = field(default_factory=list)

    def hash_buckets(
        self, x: Tensor, rotations: Tensor, factors: Sequence[int], padding: Tensor | None = None
    ) -> Tensor:
        """Buckets int32 [B, H, R, L], like ``rk.hash_buckets``."""
        buckets = unwritten(*x.shape[:2], rotations.shape[3], x.shape[2])
        arguments = (rotations.numpy(), None if padding is None else padding.numpy(), list(factors), buckets)
        host().hash_buckets(as_array(x), str(x.dtype)[6:], *arguments, self.device)
        inputs = [storage(x), storage(rotations)] + ([] if padding is None else [storage(padding)])
        self.run("hash", [*inputs, buckets])
        return torch.from_numpy(buckets)

    def bucket_order(self, buckets: Tensor, n_buckets: int, bounds: Sequence[int] | None = None) -> Tensor:
        """Order int32 [B, H, R, L], like ``rk.bucket_order``; ``bounds``: of packed sequences."""
        cu_seqlens = None if bounds is None else np.array(bounds, np.int32)
        longest = buckets.shape[3] if bounds is None else int(np.diff(bounds).max())
        plan = host().order_plan(
            list(buckets.shape), 1 if bounds is None else len(bounds) - 1, longest, n_buckets, self.device
        )
        order = unwritten(*buckets.shape)
        other = unwritten(buckets.numel() if plan["passes"] > 1 else 0)
        counts = unwritten(plan["counts"])
        host().bucket_order(buckets.numpy(), cu_seqlens, longest, n_buckets, order, other, counts, self.device)
        inputs = [storage(buckets)] + ([] if cu_seqlens is None else [read_only(cu_seqlens)])
        self.run("order", [*inputs, order, other, counts])
        return torch.from_numpy(order)

    def gather_rows(self, rows: np.ndarray, index: np.ndarray) -> np.ndarray:
        out = np.full((len(index), rows.shape[1]), 255, rows.dtype)
        host().gather_rows(rows, index, out)
        self.run("gather", [read_only(rows), read_only(index), out])
        return out

    def run(self, source: str, memory: Memory) -> None:
        """Executes the launches that were recorded."""
        path = self.csrc / SOURCES[source].relative_to(CSRC)
        text = ptx(path, self.architecture, self.csrc)
        for launch in host().take_recorded():
            kernel = _kernel(text, launch["name"])
            counters = kernel.launch(
                launch["grid"], launch["threads"], launch["params"], memory, launch["shared_bytes"], **self.schedule
            )
            self.launched.append(Launched(launch["name"], launch["threads"], launch["shared_bytes"], counters))


def unwritten(*shape: int) -> np.ndarray:
    """int32, aligned as on a GPU, of a number that no kernel writes."""
    return torch.full(shape, -9, dtype=torch.int32).numpy()


def as_array(x: Tensor) -> np.ndarray:
    """A view of a tensor; half types as uint16."""
    return x.view(torch.int16).numpy().view(np.uint16) if x.element_size() == 2 else x.numpy()


def read_only(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view


def storage(x: Tensor) -> np.ndarray:
    """All memory that a tensor's storage has, for reading."""
    data = x.untyped_storage()
    return read_only(np.ctypeslib.as_array((np.ctypeslib.ctypes.c_ubyte * data.nbytes()).from_address(data.data_ptr())))
