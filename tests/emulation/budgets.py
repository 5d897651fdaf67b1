"""What each kernel may cost: registers and memory as compiled, instructions and traffic as emulated.

``python -m tests.emulation.budgets`` prints what they cost now beside ``benchmarks/budgets.json``; ``--write`` makes it
the budget.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .attention import Attention
from .build import ROOT
from .cases import Case, Hash, Order
from .emulator import ARCHITECTURES, Emulator, Launched
from .select import Select

FILE = ROOT / "benchmarks" / "budgets.json"
SECTORS, WAVEFRONTS = 1.15, 1.05  # of the ideal, at most
# Two multiprocessors, so that few tokens give blocks as much to do as many tokens give those of a whole GPU.
DEVICES = {"sm_80": (2, 166912, 167936), "sm_90": (2, 232448, 233472)}


@dataclass(frozen=True)
class Problem:
    name: str
    case: Case
    unit: str  # what costs are given for,
    units: float  # and how many there are
    tokens: int  # what bytes are given for
    bytes: float = float("inf")  # of global memory, at most, per token
    sectors: float = SECTORS
    wavefronts: float = WAVEFRONTS
    kernels: str = ""  # that are counted, a regular expression


def hash_problem(
    dtype: torch.dtype, head_dim: int, factors: tuple[int, ...] = (64, 32), rounds: int = 4, length: int = 4096
) -> Problem:
    name = f"hash, {str(dtype)[6:]}, D {head_dim}, R {rounds}, factors {factors}"
    return Problem(name, Hash(length, head_dim, factors, dtype, rounds=rounds), "32 tokens", length / 32, length)


def order_problem(length: int, n_buckets: int, bytes: float, passes: int = 1, sectors: float = SECTORS) -> Problem:
    # Counters and slots are wherever the keys say, so banks conflict.
    return Problem(
        f"order, L {length}, {n_buckets} buckets", Order(length, n_buckets), "key and digit", length * passes, length,
        bytes, sectors, wavefronts=2,
    )  # fmt: skip


def attention_problems(
    length: int, head_dim: int, chunk_length: int, dtype: torch.dtype, forward: float = float("inf"),
    backward: float = float("inf"),
) -> Iterator[Problem]:  # fmt: skip
    """Causal, 4 rounds, one chunk back; both passes are run for the costs of each."""
    rounds = 4
    case = Attention(
        length, head_dim, dtype, rounds=rounds, n_buckets=length // chunk_length, chunk_length=chunk_length, causal=True
    )
    name = f"{str(dtype)[6:]}, L {length}, D {head_dim}, C {chunk_length}, R {rounds}"
    tokens = length * rounds
    for part, kernels, bytes in (("forward", "forward|factor", forward), ("backward", "residual|grad", backward)):
        yield Problem(
            f"attention {part}, {name}", case, "64 tokens of a round", tokens / 64, tokens, bytes, kernels=kernels
        )


def select_problem(length: int, keys: int, dtype: torch.dtype, budget: int = 256) -> Problem:
    """Chunks of 64 queries, which see all keys."""
    case = Select(length, 64, dtype, keys=keys, budget=budget, chunk_length=64)
    name = f"select, {str(dtype)[6:]}, L {length}, S {keys}, D 64, C 64, budget {budget}"
    return Problem(name, case, "16 chunks by 64 keys", length / 64 / 16 * keys / 64, length)


@dataclass(frozen=True)
class Resources:
    registers: int
    spilled_bytes: int
    static_shared_bytes: int


def occupancy(uses: Resources, threads: int, dynamic_shared_bytes: int, device: tuple[int, int, int]) -> int:
    """Blocks that a multiprocessor holds at a time, of capability 8.0 or 9.0."""
    registers_of_warp = -(-uses.registers * 32 // 256) * 256
    warps = -(-threads // 32)
    shared = -(-(uses.static_shared_bytes + dynamic_shared_bytes + 1024) // 128) * 128
    return min(65536 // registers_of_warp // 4 * 4 // warps, 2048 // (32 * warps), 32, device[2] // shared)


def compiled_costs(uses: Resources, launch: Launched, architecture: str) -> dict[str, int]:
    return {
        "registers": uses.registers,
        "spilled_bytes": uses.spilled_bytes,
        "threads": launch.threads,
        "shared_bytes": uses.static_shared_bytes + launch.shared_bytes,
        "blocks": occupancy(uses, launch.threads, launch.shared_bytes, DEVICES[architecture]),
    }


def executed_costs(problem: Problem, emulator: Emulator) -> dict[str, Any]:
    counted = [launch.counters for launch in emulator.launched if re.search(problem.kernels, launch.name)]

    def total(name: str) -> int:
        return sum(getattr(counters, name) for counters in counted)

    return {
        "unit": problem.unit,
        "warp_instructions": round(total("warp_instructions") / problem.units, 3),
        "mma": round(total("mma") / problem.units, 3),
        "wavefronts": round(total("shared_wavefronts") / problem.units, 3),
        "bytes": round(32 * total("global_sectors") / problem.tokens, 3),
        "sectors_by_ideal": round(total("global_sectors") / total("ideal_sectors"), 4),
        "wavefronts_by_ideal": round(total("shared_wavefronts") / total("ideal_wavefronts"), 4),
    }


def report(now: dict[str, Any], budget: dict[str, Any]) -> None:
    """Prints costs of architectures beside their budgets."""
    for architecture in ARCHITECTURES:
        for part, rows in now[architecture].items():
            for name, costs in rows.items():
                before = budget.get(architecture, {}).get(part, {}).get(name, {})
                told = [
                    f"{k} {v}" + (f" (budget {before.get(k)})" if before.get(k) != v else "") for k, v in costs.items()
                ]
                print(f"{architecture} {name}: {', '.join(told)}")


def main() -> None:
    from .cuda import budgets as cuda
    from .triton import budgets as triton

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {FILE.relative_to(ROOT)}")
    parser.add_argument("--only", choices=("cuda", "triton"), help="of these kernels alone")
    arguments = parser.parse_args()
    budget = json.loads(FILE.read_text()) if FILE.exists() else {}
    for backend, release, measure in (
        ("cuda", cuda.release, cuda.measure),
        ("triton", triton.release, triton.measure),
    ):
        if arguments.only in (None, backend):
            now = {"compiler": release()} | {architecture: measure(architecture) for architecture in ARCHITECTURES}
            report(now, budget.get(backend, {}))
            budget[backend] = now
    if arguments.write:
        FILE.write_text(json.dumps(budget, indent=1) + "\n")


if __name__ == "__main__":
    main()
