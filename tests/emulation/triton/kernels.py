"""The Triton kernels, compiled as for a GPU, with none there, and executed by the PTX emulator.

Triton asks its driver for the device; here a driver says that there is one of an architecture. So its own just-in-time
compiler makes of the backend's launches what it would make on such a GPU, with the same specialisation of arguments.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from reformer_kernels._dispatch import BACKENDS
from reformer_kernels.backends import triton as backend

from ...ptx_emulator import Kernel, VirtualRegion
from ...ptx_emulator.build import CACHE
from ..emulator import Emulator, Launched, storage

os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE / "triton"))


class Driver:
    """What Triton asks for when it compiles; the number of a device is that of its architecture."""

    architecture = "sm_90"

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        if self.architecture.startswith("gfx"):
            return GPUTarget("hip", self.architecture, 64)
        return GPUTarget("cuda", self.get_current_device(), 32)

    def get_current_device(self) -> int:
        return int(self.architecture.removeprefix("sm_").removeprefix("gfx"))

    def get_current_stream(self, device: int) -> int:
        return 0


DRIVER = Driver()
KEPT = 8  # compilations of a kernel


def without_binary(backend: Any = None, stages: Any = None, *others: Any) -> tuple[str, str] | None:
    """A hook of Triton's, which compiles to PTX alone; without arguments it is asked what tells it from others."""
    if stages is None:
        return "without binary", "'without binary'"
    stages["cubin"] = lambda ptx, metadata: b""
    return None


def needs_triton() -> pytest.MarkDecorator:
    """Skips tests where there is no Triton; in CI they fail instead."""
    missing = backend.missing() is not None and os.environ.get("CI") != "true"
    return pytest.mark.skipif(missing, reason="needs triton")


def kernel_names() -> set[str]:
    """Of all kernels of the backend."""
    modules = ("attention", "attention_backward", "hash", "lists", "order", "select")
    found = (vars(importlib.import_module(f"{backend.__name__}.{module}")) for module in modules)
    return {name for names in found for name in names if name.endswith("_kernel")}


@functools.lru_cache(maxsize=16)
def _parsed(ptx: str) -> Kernel:
    return Kernel(ptx)


@dataclass
class EmulatedTriton(Emulator):
    """Runs the launches of the backend "triton" on tensors of the CPU."""

    device_name: str = ""  # by which configurations are chosen
    package: str = backend.__name__  # of the kernels
    configs: list[tuple[str, tuple[int | None, ...]]] = field(default_factory=list)  # of what was launched
    backend: ClassVar[str] = "triton"
    binaries: ClassVar[bool] = False  # whether they are made, which takes a sixth of the time

    @contextmanager
    def serving(self) -> Iterator[None]:
        from triton.runtime.driver import driver

        driver.set_active(DRIVER)
        module = importlib.import_module(self.package)
        with (
            patch.dict(BACKENDS, {self.backend: module}),
            patch.object(module, "not_supported_reasons", module.kernel_reasons),
            patch(f"{self.package}._launch.run", self.launch),
            patch(f"{self.package}.configs._device_name", lambda device: self.device_name),
        ):
            yield

    def compile(self, kernel: Any, args: tuple[Any, ...], options: dict[str, Any], architecture: str = "") -> Any:
        """What Triton compiles for arguments."""
        DRIVER.architecture = architecture or self.architecture
        # Triton keeps all that it compiled in memory, too, a megabyte each, though files in the cache have it.
        if len(kernel.device_caches[DRIVER.get_current_device()][0]) > KEPT:
            kernel.device_caches.clear()
        with patch("triton.knobs.runtime.add_stages_inspection_hook", None if self.binaries else without_binary):
            return kernel.run(*args, grid=(1,), warmup=True, **options)

    def launch(self, kernel: Any, programs: int, device: torch.device, args: tuple[Any, ...], options: Any) -> None:
        compiled = self.compile(kernel, args, options)
        values: list[Any] = []
        memory: dict[int, np.ndarray | VirtualRegion] = {}
        for parameter, value in zip(kernel.params, args, strict=False):
            self._flatten(value, compiled.src.signature[parameter.name], values, memory)
        parsed = _parsed(compiled.asm["ptx"])
        values += [0] * (len(parsed.parameters) - len(values))  # Triton's own scratch memory, which is not used
        threads, shared = 32 * compiled.metadata.num_warps, compiled.metadata.shared
        counters = parsed.launch((programs, 1, 1), threads, values, [*memory.values()], shared, **self.schedule)
        self.launched.append(Launched(kernel.__name__, threads, shared, counters))
        names = "BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "maxnreg"
        self.configs.append((kernel.__name__, tuple(map(options.get, names))))

    def _flatten(self, value: Any, kind: Any, values: list[Any], memory: dict[int, np.ndarray | VirtualRegion]) -> None:
        """Adds what of an argument (of a kind, as in Triton's signatures) a kernel gets."""
        if kind == "constexpr":
            return
        if isinstance(value, tuple):
            for member, member_kind in zip(value, kind, strict=True):
                self._flatten(member, member_kind, values, memory)
        elif isinstance(value, Tensor):
            address, region = self.place(value)
            values.append(address)
            memory[value.untyped_storage().data_ptr()] = region
        else:
            values.append(value)

    def place(self, x: Tensor) -> tuple[int, np.ndarray | VirtualRegion]:
        """The address of a tensor, and the memory that is there."""
        return x.data_ptr(), storage(x, writeable=True)
