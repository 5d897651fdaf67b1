"""``python -m reformer_kernels.info``: versions, what was built, and which backend would serve what."""

from __future__ import annotations

import os
import platform

import numpy
import torch

from . import __version__
from ._dispatch import explain
from .backends import cpu, cuda
from .clustered import clustered_attention
from .functional import local_attention, lsh_attention


def report() -> str:
    """The text that this module prints."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    lines = [
        f"reformer_kernels {__version__}, torch {torch.__version__}, numpy {numpy.__version__}, "
        f"Python {platform.python_version()}, {platform.machine()}",
        f"cores {os.cpu_count()}, torch threads {torch.get_num_threads()}, GPU {gpu}",
    ]
    for name, library in (("CPU", cpu.build_info()), ("CUDA", cuda.library())):
        described = ", ".join(f"{key} {value}" for key, value in library.items() if value)
        lines.append(f"{name} library: {described}")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.empty(1, 2, 256, 16, dtype=dtype, device=device)
            lines += ["", f"lsh_attention, {dtype}", explain(lsh_attention, x, x)]
    x = torch.empty(1, 2, 256, 16)
    for function in (local_attention, clustered_attention):
        lines += ["", f"{function.__name__}, torch.float32", explain(function, x, x, x)]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
