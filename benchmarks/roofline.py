"""``python -m benchmarks.roofline``: how long each op should take on a GPU, and why. Predictions, not measurements.

A time at least is the longest of: bytes by bandwidth of memory and of L2, tensor-core FLOP, exponentials, and
instructions by the issue slots of the multiprocessors that have a block. Instructions (of PTX) and bytes of L2 are what
the emulator counted, in ``benchmarks/budgets.json``. The predicted time is that over the share of this limit that the
CUDA kernels reached on an H200 (``benchmarks/results``); that Triton kernels reach as much is assumed.
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

BUDGETS = {
    backend: of["sm_90"]["problems"]
    for backend, of in json.loads((Path(__file__).parent / "budgets.json").read_text()).items()
}
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


def hash_cost(s: Shape, gpu: Gpu, backend: str) -> Cost:
    tokens, name = s.length * s.heads, f"hash, bfloat16, D {s.head_dim}, R {s.rounds}, factors {s.factors}"
    work = BUDGETS[backend][name]
    columns, blocks = s.rounds * sum(s.factors) // 2, tokens // 128
    if backend == "cuda":
        blocks, _, _, _, round_tiles, *_ = torch.ops.reformer_kernels_cuda.hash_plan(
            [1, s.heads, s.length, s.head_dim], s.rounds, ELEMENT, s.factors, gpu.plan
        )
        columns = s.rounds * round_tiles * 8
    return Cost(
        tokens * (s.head_dim * ELEMENT + 4 * s.rounds), 0.6, blocks=blocks,
        flop=2 * 2 * tokens * columns * s.head_dim,  # by two terms of each rotation
        instructions=tokens / 32 * work["warp_instructions"], cached_bytes=tokens * work["bytes"],
    )  # fmt: skip


def sort_cost(s: Shape, gpu: Gpu, backend: str) -> Cost:
    n_buckets, blocks = math.prod(s.factors), s.rows // 1024
    passes, like = (1, "L 16384, 512") if n_buckets <= 1024 else (2, "L 98304, 8192")
    if backend == "cuda":
        blocks, _, _, passes, _, _, parts, _ = torch.ops.reformer_kernels_cuda.order_plan(
            [1, s.heads, s.rounds, s.length], 1, s.length, n_buckets, gpu.plan
        )
        like = "L 65536, 2048" if parts == 1 else "L 98304, 512" if passes == 1 else "L 98304, 8192"
    work = BUDGETS[backend][f"order, {like} buckets"]
    return Cost(
        s.rows * 8, 0.6, blocks=blocks, instructions=s.rows * passes * work["warp_instructions"],
        cached_bytes=s.rows * work["bytes"],
    )  # fmt: skip


def attention_cost(s: Shape, backward: bool, backend: str) -> Cost:
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
    work = _emulated("backward" if backward else "forward", s, backend)
    return Cost(
        s.rows * moved, 0.56 if backward else 0.63, gathered=True, exponentials=s.rows * pairs * (2 if backward else 1),
        flop=s.rows * pairs * s.head_dim * (14 if backward else 4), cached_bytes=s.rows * work["bytes"],
        instructions=s.rows / 64 * work["warp_instructions"],
    )  # fmt: skip


def _emulated(part: str, s: Shape, backend: str) -> dict[str, float]:
    begins, ends = f"attention {part}, bfloat16", f"D {s.head_dim}, C {s.chunk_length}, R 4"
    return next(work for name, work in BUDGETS[backend].items() if name.startswith(begins) and name.endswith(ends))


OPS: dict[str, Callable[[Shape, Gpu, str], Cost]] = {
    "hash": hash_cost,
    "sort": sort_cost,
    "attention, forward": lambda shape, _, backend: attention_cost(shape, False, backend),
    "attention, backward": lambda shape, _, backend: attention_cost(shape, True, backend),
}


@dataclass(frozen=True)
class Prediction:
    seconds: float
    least: float
    limit: str
    bytes: float


def predict(op: str, shape: Shape, gpu: Gpu, backend: str = "cuda") -> Prediction:
    cost = OPS[op](shape, gpu, backend)
    limits = cost.limits(gpu)
    limit = max(limits, key=lambda name: limits[name])
    return Prediction(limits[limit] / cost.reached, limits[limit], limit, cost.bytes)


def rows(gpu: Gpu) -> Iterator[list[str]]:
    for shape in SHAPES:
        for op in OPS:
            both = [predict(op, shape, gpu, backend) for backend in BUDGETS]
            row = [shape.name, op, f"{both[0].bytes / shape.rows:.0f}"]
            for p in both:
                row += [p.limit, *(f"{1e6 * seconds:.0f}" for seconds in (p.least, p.seconds))]
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roofline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", choices=GPUS, default="H200", help="to predict for (default H200, which was measured)")
    gpu = parser.parse_args().gpu
    if error := cuda.library().get("error"):
        raise SystemExit(f"The launch plans are in the CUDA library, which is missing: {error}")
    print(f"Predicted for one {gpu}, bfloat16, batch 1, causal, one chunk back.\n")
    header = ["shape", "op", "bytes per token, head and round"]
    for backend in BUDGETS:
        header += [f"limit of {backend}", "at least us", "predicted us"]
    print(table(header, rows(GPUS[gpu])))


if __name__ == "__main__":
    main()
