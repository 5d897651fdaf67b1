"""What each kernel may cost: registers and memory as compiled, instructions and traffic as emulated.

``python -m tests.emulation.budgets`` prints what they cost now beside ``benchmarks/budgets.json``; ``--write`` makes it
the budget.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..ptx_emulator.build import nvcc
from . import attention, lists, select
from .attention import Attention
from .build import CSRC, ROOT, ptxas_report
from .cases import Case, Hash, Order, launches_of_all
from .kernels import ARCHITECTURES, SOURCES, Emulator, Launched

COMPILED = ("hash", "order", "attention", "lists", "select")  # sources of kernels with budgets
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


def _hash(
    dtype: torch.dtype, head_dim: int, factors: tuple[int, ...] = (64, 32), rounds: int = 4, length: int = 4096
) -> Problem:
    name = f"hash, {str(dtype)[6:]}, D {head_dim}, R {rounds}, factors {factors}"
    return Problem(name, Hash(length, head_dim, factors, dtype, rounds=rounds), "32 tokens", length / 32, length)


def _order(length: int, n_buckets: int, bytes: float, passes: int = 1, sectors: float = SECTORS) -> Problem:
    # Counters and places are wherever the keys say, so banks conflict.
    return Problem(
        f"order, L {length}, {n_buckets} buckets", Order(length, n_buckets), "key and digit", length * passes, length,
        bytes, sectors, wavefronts=2,
    )  # fmt: skip


def _attention(
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


def _select(length: int, keys: int, dtype: torch.dtype, budget: int = 256) -> Problem:
    """Chunks of 64 queries, which see all keys."""
    case = select.Select(length, 64, dtype, keys=keys, budget=budget, chunk_length=64)
    name = f"select, {str(dtype)[6:]}, L {length}, S {keys}, D 64, C 64, budget {budget}"
    return Problem(name, case, "16 chunks by 64 keys", length / 64 / 16 * keys / 64, length)


PROBLEMS = [
    *(_hash(dtype, dim) for dtype in (torch.bfloat16, torch.float16, torch.float32) for dim in (32, 64, 128)),
    # Those of the shapes for which times are predicted.
    _hash(torch.bfloat16, 64, (32, 16)),
    _hash(torch.bfloat16, 64, (16, 12)),
    _hash(torch.bfloat16, 128, (32, 16)),
    _hash(torch.bfloat16, 64, (64, 128), rounds=1),
    _hash(torch.bfloat16, 64, (256, 128), length=1024),
    # Keys are read twice, once from memory and once from a cache, and positions written.
    _order(16384, 512, bytes=12),
    _order(65536, 2048, bytes=12),
    # In parts: keys are read to be counted and to be ranked; counts of a part are written and read 5 times; and each
    # part writes runs of 32 keys, which begin and end within a sector.
    _order(98304, 512, bytes=12 + 5 * 4 * 512 / 16384 + 4 * 8 / 32),
    # Keys of the second digit are wherever the first one put them: each of the two readings takes a sector.
    _order(98304, 8192, bytes=12 + 4 * (2 + 2) + 2 * 32 + 3, passes=2, sectors=2.2),
    # 1.2 times what the stages of a pass would move if each were one kernel: 599 and 1,549 bytes.
    *_attention(8192, 64, 64, torch.bfloat16, forward=719, backward=1859),
    *_attention(4096, 128, 256, torch.bfloat16),
    *_attention(2048, 64, 128, torch.bfloat16),
    *_attention(2048, 64, 64, torch.float32),
    _select(2048, 2048, torch.bfloat16),
    _select(1024, 2048, torch.float32),
    _select(1024, 20000, torch.bfloat16),
]


@dataclass(frozen=True)
class Resources:
    registers: int
    spilled_bytes: int
    static_shared_bytes: int


def resources(source: str, architecture: str) -> dict[str, Resources]:
    """Of each kernel, by mangled name."""
    report = ptxas_report(SOURCES[source], architecture, [CSRC])
    found = {}
    for part in report.split("Compiling entry function '")[1:]:
        number = lambda pattern, part=part: int(m[1]) if (m := re.search(pattern, part)) else 0  # noqa: E731
        spilled = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
        found[part.split("'")[0]] = Resources(number(r"Used (\d+) registers"), spilled, number(r"(\d+) bytes smem"))
    return found


def readable(mangled: str) -> str:
    """hash_kernel<__nv_bfloat16, 4>."""
    full = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = full.removeprefix("void ").rpartition("(")[0].replace("rk::cuda::", "")
    return re.sub(r"\(\w+\)(?=\d)", "", name)


def occupancy(uses: Resources, threads: int, dynamic_shared_bytes: int, device: tuple[int, int, int]) -> int:
    """Blocks that a multiprocessor holds at a time, of capability 8.0 or 9.0."""
    registers_of_warp = -(-uses.registers * 32 // 256) * 256
    warps = -(-threads // 32)
    shared = -(-(uses.static_shared_bytes + dynamic_shared_bytes + 1024) // 128) * 128
    return min(65536 // registers_of_warp // 4 * 4 // warps, 2048 // (32 * warps), 32, device[2] // shared)


def _compiled(source: str, architecture: str, launched: dict[str, Launched]) -> Iterator[tuple[str, dict[str, int]]]:
    for mangled, uses in resources(source, architecture).items():
        yield readable(mangled), compiled_costs(uses, launched[mangled], architecture)


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
    total = lambda name: sum(getattr(counters, name) for counters in counted)  # noqa: E731
    return {
        "unit": problem.unit,
        "warp_instructions": round(total("warp_instructions") / problem.units, 3),
        "mma": round(total("mma") / problem.units, 3),
        "wavefronts": round(total("shared_wavefronts") / problem.units, 3),
        "bytes": round(32 * total("global_sectors") / problem.tokens, 3),
        "sectors_by_ideal": round(total("global_sectors") / total("ideal_sectors"), 4),
        "wavefronts_by_ideal": round(total("shared_wavefronts") / total("ideal_wavefronts"), 4),
    }


def measure(architecture: str) -> dict[str, dict[str, Any]]:
    """{"kernels": {kernel: costs}, "problems": {problem: costs}}; of a problem per unit, but bytes per token or key."""
    launched: dict[str, Launched] = {}
    problems = {}
    emulators: dict[Case, Emulator] = {}  # both passes of a case are run at once
    for problem in PROBLEMS:
        if problem.case not in emulators:
            emulators[problem.case] = Emulator(architecture, device=DEVICES[architecture])
            problem.case.check(emulators[problem.case])
        problems[problem.name] = executed_costs(problem, emulators[problem.case])
    # Of kernels that no problem has, what a case launches.
    for source, cases in {"attention": attention.CASES, "lists": lists.CASES, "select": select.CASES}.items():
        others = launches_of_all(source, cases, architecture, DEVICES[architecture])
        launched |= {launch.name: launch for launch in others}
    for emulator in emulators.values():
        launched |= {launch.name: launch for launch in emulator.launched}
    kernels = dict(sorted(item for source in COMPILED for item in _compiled(source, architecture, launched)))
    return {"kernels": kernels, "problems": problems}


def nvcc_release() -> str:
    said = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([\d.]+)", said)
    assert found, f"nvcc --version names no release: {said}"
    return f"nvcc {found[1]}"


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
    from . import triton_budgets

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {FILE.relative_to(ROOT)}")
    parser.add_argument("--only", choices=("cuda", "triton"), help="of these kernels alone")
    arguments = parser.parse_args()
    budget = json.loads(FILE.read_text()) if FILE.exists() else {}
    for backend, compiler, measured in (
        ("cuda", nvcc_release, measure), ("triton", triton_budgets.release, triton_budgets.measure)
    ):  # fmt: skip
        if arguments.only in (None, backend):
            now = {"compiler": compiler()} | {architecture: measured(architecture) for architecture in ARCHITECTURES}
            report(now, budget.get(backend, {}))
            budget[backend] = now
    if arguments.write:
        FILE.write_text(json.dumps(budget, indent=1) + "\n")


if __name__ == "__main__":
    main()
