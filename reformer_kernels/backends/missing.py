"""Says once that the slow reference serves a call only because a native library is missing."""

from __future__ import annotations

import functools
import warnings

from .._calls import Call
from . import cpu, cuda


def warn_of_missing_library(call: Call) -> None:
    """Of a call that the reference serves without having been asked for."""
    if call.device.type == "cpu" and not cpu.kernel_reasons(call):
        _warn("CPU", cpu.build_info().get("error"))
    elif call.device.type == "cuda" and not cuda.kernel_reasons(call):
        _warn("CUDA", cuda.library().get("error"))


@functools.cache
def _warn(name: str, reason: str | None) -> None:
    if reason:
        warnings.warn(
            f"reformer_kernels computes with the reference in plain PyTorch, which is many times slower than its "
            f"{name} kernels, because of their library: {reason}. Install a wheel that has it, or build it with the "
            'torch that is installed (pip install --no-build-isolation, or make build); rk.use_backend("reference") '
            "chooses the reference without this warning. python -m reformer_kernels.info shows what there is.",
            RuntimeWarning,
            stacklevel=2,
        )
