"""What the CUDA kernels cost: as ptxas compiles them, and as emulated."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ...ptx_emulator.build import nvcc
from .. import attention, lists, select
from ..budgets import (
    DEVICES,
    Resources,
    attention_problems,
    compiled_costs,
    executed_costs,
    hash_problem,
    order_problem,
    select_problem,
)
from ..build import CSRC, ptxas_report
from ..cases import Case
from ..emulator import Launched
from .cases import launches_of_all
from .kernels import SOURCES, EmulatedCuda

COMPILED = ("hash", "order", "attention", "lists", "select")  # sources of kernels with budgets
PROBLEMS = [
    *(hash_problem(dtype, dim) for dtype in (torch.bfloat16, torch.float16, torch.float32) for dim in (32, 64, 128)),
    # Those of the shapes for which times are predicted.
    hash_problem(torch.bfloat16, 64, (32, 16)),
    hash_problem(torch.bfloat16, 64, (16, 12)),
    hash_problem(torch.bfloat16, 128, (32, 16)),
    hash_problem(torch.bfloat16, 64, (64, 128), rounds=1),
    hash_problem(torch.bfloat16, 64, (256, 128), length=1024),
    # Keys are read twice, once from memory and once from a cache, and positions written.
    order_problem(16384, 512, bytes=12),
    order_problem(65536, 2048, bytes=12),
    # In parts: keys are read to be counted and to be ranked; counts of a part are written and read 5 times; and each
    # part writes runs of 32 keys, which begin and end within a sector.
    order_problem(98304, 512, bytes=12 + 5 * 4 * 512 / 16384 + 4 * 8 / 32),
    # Keys of the second digit are wherever the first one put them: each of the two readings takes a sector.
    order_problem(98304, 8192, bytes=12 + 4 * (2 + 2) + 2 * 32 + 3, passes=2, sectors=2.2),
    # 1.2 times what the stages of a pass would move if each were one kernel: 599 and 1,549 bytes.
    *attention_problems(8192, 64, 64, torch.bfloat16, forward=719, backward=1859),
    *attention_problems(4096, 128, 256, torch.bfloat16),
    *attention_problems(2048, 64, 128, torch.bfloat16),
    *attention_problems(2048, 64, 64, torch.float32),
    select_problem(2048, 2048, torch.bfloat16),
    select_problem(1024, 2048, torch.float32),
    select_problem(1024, 20000, torch.bfloat16),
]


def release() -> str:
    said = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([\d.]+)", said)
    assert found, f"nvcc --version names no release: {said}"
    return f"nvcc {found[1]}"


def resources(source: str, architecture: str) -> dict[str, Resources]:
    """Of each kernel, by mangled name."""
    report = ptxas_report(SOURCES[source], architecture, [CSRC])
    found = {}
    for part in report.split("Compiling entry function '")[1:]:
        spilled = _number(r"(\d+) bytes spill stores", part) + _number(r"(\d+) bytes spill loads", part)
        registers, shared = _number(r"Used (\d+) registers", part), _number(r"(\d+) bytes smem", part)
        found[part.split("'")[0]] = Resources(registers, spilled, shared)
    return found


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def readable(mangled: str) -> str:
    """hash_kernel<__nv_bfloat16, 4>."""
    full = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = full.removeprefix("void ").rpartition("(")[0].replace("rk::cuda::", "")
    return re.sub(r"\(\w+\)(?=\d)", "", name)


def _compiled(source: str, architecture: str, launched: dict[str, Launched]) -> Iterator[tuple[str, dict[str, int]]]:
    for mangled, uses in resources(source, architecture).items():
        yield readable(mangled), compiled_costs(uses, launched[mangled], architecture)


def measure(architecture: str) -> dict[str, dict[str, Any]]:
    """{"kernels": {kernel: costs}, "problems": {problem: costs}}; of a problem per unit, but bytes per token or key."""
    launched: dict[str, Launched] = {}
    problems = {}
    emulators: dict[Case, EmulatedCuda] = {}  # both passes of a case are run at once
    for problem in PROBLEMS:
        if problem.case not in emulators:
            emulators[problem.case] = EmulatedCuda(architecture, device=DEVICES[architecture])
            problem.case.check(emulators[problem.case])
        problems[problem.name] = executed_costs(problem, emulators[problem.case])
    # Of kernels that no problem has, what a case launches.
    cases: dict[str, Sequence[Case]] = {"attention": attention.CASES, "lists": lists.CASES, "select": select.CASES}
    for source, of_source in cases.items():
        others = launches_of_all(source, of_source, architecture, DEVICES[architecture])
        launched |= {launch.name: launch for launch in others}
    for emulator in emulators.values():
        launched |= {launch.name: launch for launch in emulator.launched}
    kernels = dict(sorted(item for source in COMPILED for item in _compiled(source, architecture, launched)))
    return {"kernels": kernels, "problems": problems}
