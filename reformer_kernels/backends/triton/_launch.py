"""How Triton kernels are launched, and the shapes of launches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

MAX_PROGRAMS = 2**31 - 1


class Config(NamedTuple):
    """Rows of a block, columns that it visits at a time, and what Triton compiles for."""

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2
    max_registers: int | None = None  # of a thread; None: what the assembler finds best


class Rows(NamedTuple):
    """Rows of [B, H, L, width], the last dimension contiguous; strides in elements."""

    data: Tensor
    stride_b: int
    stride_h: int
    stride_l: int


def rows(x: Tensor) -> Rows:
    return Rows(x, *x.stride()[:3])


def block_width(width: int) -> int:
    """Columns of a tile that holds rows of a width: what tensor cores can multiply."""
    return max(16, int(triton.next_power_of_2(width)))


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, config: Config, **constants: Any) -> None:
    """Compiles (once for each kind of arguments) and starts a kernel, unless there is nothing to do."""
    if programs <= 0:
        return
    if programs > MAX_PROGRAMS:
        raise ValueError(f"{kernel.__name__} would need {programs} programs; a launch has up to {MAX_PROGRAMS}")
    options = {
        **constants, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }  # fmt: skip
    if config.max_registers and torch.version.hip is None:
        options["maxnreg"] = config.max_registers
    run(kernel, programs, device, args, options)


def run(kernel: Any, programs: int, device: torch.device, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    with torch.cuda.device(device):
        kernel[(programs,)](*args, **options)
