"""``python -m benchmarks.roofline``: how long each CUDA op should take, and why. Predictions, not measurements.

A time at least is the longest of: bytes by bandwidth of memory and of L2, tensor-core FLOP, exponentials, and
instructions by the issue slots of the multiprocessors that have a block. Instructions (of PTX) and bytes of L2 are what
the emulator counted, in ``benchmarks/budgets.json``. The predicted time is that over the share of this limit that
kernels reached on an H200 (``benchmarks/results``).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from reformer_kernels.backends import cuda

from .report import table

BUDGETS = json.loads((Path(__file__).parent / "budgets.json").read_text())["cuda"]["sm_90"]["problems"]
ELEMENT = 2  # bytes of bfloat16


@dataclass(frozen=True)
class Gpu:
    copy: float  # bytes/s, read and written
    gather: float  # bytes/s, of rows of 128 bytes
    tensor: float  # FLOP/s of mma.sync
    exponentials: float  # 1/s
    cache: float  # bytes/s of L2
    clock: float  # Hz
    plan: tuple[int, int, int] = (132, 232448, 233472)  # multiprocessors, shared bytes of a block and of one of them


GPUS = {
    # Measured: benchmarks/results/h200-2026-11-26.md. Of L2: a kernel that moved 3.1 TB/s was at 61%.
    "H200": Gpu(copy=4.218e12, gather=3.876e12, tensor=633e12, exponentials=4.15e12, cache=5.1e12, clock=1.98e9),
    # The same chip with HBM3 of 3.35 TB/s where the H200 has 4.8: bandwidths in that proportion.
    "H100": Gpu(copy=2.944e12, gather=2.705e12, tensor=633e12, exponentials=4.15e12, cache=5.1e12, clock=1.98e9),
}


@dataclass(frozen=True)
class Shape:
    name: str
    length: int
    heads: int
    head_dim: int
    chunk_length: int
    factors: tuple[int, ...]
    rounds: int

    @property
    def rows(self) -> int:
        """Tokens in all heads and rounds."""
        return self.length * self.heads * self.rounds


SHAPES = [
    Shape("L 16K, H 8, D 64, R 4", 16384, 8, 64, 64, (32, 16), 4),  # the default
    Shape("L 64K, H 8, D 64, R 4", 65536, 8, 64, 64, (64, 32), 4),
    Shape("L 64K, H 8, D 128, R 4, 512 buckets", 65536, 8, 128, 256, (32, 16), 4),  # enwik8
    Shape("L 512K, H 2, D 64, R 1, 8192 buckets", 2**19, 2, 64, 64, (64, 128), 1),  # crime-and-punishment
    Shape("L 12K, H 8, D 64, R 4, 192 buckets", 12288, 8, 64, 128, (16, 12), 4),  # imagenet64
    Shape("L 1M, H 2, D 64, R 4", 2**20, 2, 64, 64, (256, 128), 4),
]


@dataclass(frozen=True)
class Cost:
    bytes: float
    reached: float  # of the limit that binds, on an H200
    gathered: bool = False
    flop: float = 0
    exponentials: float = 0
    instructions: float = 0  # of warps
    cached_bytes: float = 0  # between multiprocessors and L2
    blocks: int = 10**9

    def limits(self, gpu: Gpu) -> dict[str, float]:
        """Seconds that each would take alone."""
        issue = 4 * gpu.clock * min(self.blocks, gpu.plan[0])
        return {
            "gather" if self.gathered else "memory": self.bytes / (gpu.gather if self.gathered else gpu.copy),
            "tensor cores": self.flop / gpu.tensor,
            "L2": self.cached_bytes / gpu.cache,
            "exponentials": self.exponentials / gpu.exponentials,
            "instructions": self.instructions / issue,
        }


def hash_cost(s: Shape, gpu: Gpu) -> Cost:
    ops, tokens = torch.ops.reformer_kernels_cuda, s.length * s.heads
    blocks, _, _, steps, round_tiles, *_ = ops.hash_plan(
        [1, s.heads, s.length, s.head_dim], s.rounds, ELEMENT, s.factors, gpu.plan
    )
    work = BUDGETS[f"hash, bfloat16, D {16 * steps}, R {s.rounds}, factors {s.factors}"]
    flop = 2 * 2 * s.rows * round_tiles * 8 * 16 * steps  # by two terms of each rotation
    return Cost(
        tokens * (s.head_dim * ELEMENT + 4 * s.rounds), 0.6, flop=flop, blocks=blocks,
        instructions=tokens / 32 * work["warp_instructions"],
    )  # fmt: skip


def sort_cost(s: Shape, gpu: Gpu) -> Cost:
    blocks, _, _, passes, _, _, parts, _ = torch.ops.reformer_kernels_cuda.order_plan(
        [1, s.heads, s.rounds, s.length], 1, s.length, math.prod(s.factors), gpu.plan
    )
    like = "L 65536, 2048" if parts == 1 else "L 98304, 512" if passes == 1 else "L 98304, 8192"
    work = BUDGETS[f"order, {like} buckets"]
    return Cost(s.rows * 8, 0.6, blocks=blocks, instructions=s.rows * passes * work["warp_instructions"])


def attention_cost(s: Shape, backward: bool) -> Cost:
    """Causal, one chunk back. ``bytes``: what the kernels must move if a walk reads every row once."""
    row, residual, pairs = s.head_dim * ELEMENT, 16, 2 * s.chunk_length
    in_place = (2 * s.rounds - 1) / s.rounds  # the first round writes, others add
    if backward:
        residuals = (2 * row + 4 + 1 + residual) / s.rounds
        queries = 4 + 2 * row + row + residual + row * in_place  # query and value, incoming gradient, grad_query
        keys = 4 + 2 * row + row + residual + row * in_place + 2 * row  # the same, and grad_query is added to
        moved = residuals + queries + keys
    else:
        moved = 4 + 2 * row + (row + 4) * in_place
    work = _emulated("backward" if backward else "forward", s)
    return Cost(
        s.rows * moved, 0.56 if backward else 0.63, gathered=True, exponentials=s.rows * pairs * (2 if backward else 1),
        flop=s.rows * pairs * s.head_dim * (14 if backward else 4), cached_bytes=s.rows * work["bytes"],
        instructions=s.rows / 64 * work["warp_instructions"],
    )  # fmt: skip


def _emulated(part: str, s: Shape) -> dict[str, float]:
    begins, ends = f"attention {part}, bfloat16", f"D {s.head_dim}, C {s.chunk_length}, R 4"
    return next(work for name, work in BUDGETS.items() if name.startswith(begins) and name.endswith(ends))


OPS: dict[str, Callable[[Shape, Gpu], Cost]] = {
    "hash": hash_cost,
    "sort": sort_cost,
    "attention, forward": lambda shape, _: attention_cost(shape, backward=False),
    "attention, backward": lambda shape, _: attention_cost(shape, backward=True),
}


@dataclass(frozen=True)
class Prediction:
    seconds: float
    least: float
    limit: str
    bytes: float


def predict(op: str, shape: Shape, gpu: Gpu) -> Prediction:
    cost = OPS[op](shape, gpu)
    limits = cost.limits(gpu)
    limit = max(limits, key=lambda name: limits[name])
    return Prediction(limits[limit] / cost.reached, limits[limit], limit, cost.bytes)


def rows(gpu: Gpu) -> Iterator[list[str]]:
    for shape in SHAPES:
        for op in OPS:
            p = predict(op, shape, gpu)
            times = [f"{1e6 * seconds:.0f}" for seconds in (p.least, p.seconds)]
            yield [shape.name, op, f"{p.bytes / shape.rows:.0f}", p.limit, *times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=sorted(GPUS), default="H100")
    gpu = parser.parse_args().gpu
    if error := cuda.library().get("error"):
        raise SystemExit(f"The launch plans are in the CUDA library, which is missing: {error}")
    print(f"Predicted for one {gpu}, bfloat16, batch 1, causal, one chunk back.\n")
    header = ["shape", "op", "bytes per token, head and round", "limit", "at least us", "predicted us"]
    print(table(header, rows(GPUS[gpu])))


if __name__ == "__main__":
    main()
