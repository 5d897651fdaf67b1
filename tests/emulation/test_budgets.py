"""The kernels keep to benchmarks/budgets.json, and to what no budget may allow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from ..ptx_emulator.testing import needs_nvcc
from .budgets import FILE, Problem, Resources, occupancy
from .cuda import budgets as cuda
from .cuda.kernels import DEVICES, SOURCES, entries
from .emulator import ARCHITECTURES
from .triton import budgets as triton
from .triton.kernels import needs_triton


@pytest.mark.full
@needs_nvcc()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_costs(architecture: str) -> None:
    now = cuda.measure(architecture)
    compiled = {cuda.readable(name) for source in cuda.COMPILED for name in entries(SOURCES[source], architecture)}
    assert set(now["kernels"]) == compiled
    assert_kept("cuda", architecture, now, cuda.PROBLEMS, cuda.release())


@pytest.mark.full
@needs_triton()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_costs_of_triton_kernels(architecture: str) -> None:
    now = triton.measure(architecture)
    assert_kept("triton", architecture, now, triton.PROBLEMS, triton.release())


def assert_kept(
    backend: str, architecture: str, costs: dict[str, Any], problems: Sequence[Problem], compiler: str
) -> None:
    assert_limits(costs, problems)
    budget = json.loads(FILE.read_text())[backend]
    if budget["compiler"] != compiler:
        pytest.skip(f"within the limits; the budgets are those of {budget['compiler']}")
    excess = over_budget(costs, budget[architecture])
    assert not excess, f"python -m tests.emulation.budgets --write, if that is as it should be: {excess}"


def assert_limits(costs: dict[str, Any], problems: Sequence[Problem]) -> None:
    for name, kernel in costs["kernels"].items():
        assert kernel["spilled_bytes"] == 0, name
        assert kernel["blocks"] >= 1, name
    for problem in problems:
        found = costs["problems"][problem.name]
        assert found["sectors_by_ideal"] <= problem.sectors, problem.name
        assert found["wavefronts_by_ideal"] <= problem.wavefronts, problem.name
        assert found["bytes"] <= problem.bytes, problem.name


def over_budget(costs: dict[str, Any], budget: dict[str, Any]) -> list[str]:
    excess = []
    for part in ("kernels", "problems"):
        for name in costs[part].keys() | budget[part].keys():
            found, allowed = costs[part].get(name, {}), budget[part].get(name, {})
            for what in (found.keys() | allowed.keys()) - {"unit"}:
                # More blocks are better, less of anything else.
                worst, least = (allowed, found) if what == "blocks" else (found, allowed)
                if what not in worst or what not in least or worst[what] > least[what]:
                    excess.append(f"{name}: {what} {found.get(what)}, budget {allowed.get(what)}")
    return excess


@pytest.mark.parametrize("change", [-1, 1, None])
@pytest.mark.parametrize("what", ["registers", "blocks", "bytes"])
def test_what_is_over_budget(what: str, change: int | None) -> None:
    budget: dict[str, Any] = {"kernels": {"k": {"registers": 32, "blocks": 2}}, "problems": {"p": {"bytes": 12.0}}}
    costs: dict[str, Any] = {part: {name: dict(row) for name, row in rows.items()} for part, rows in budget.items()}
    assert over_budget(costs, budget) == []
    row = costs["problems"]["p"] if what == "bytes" else costs["kernels"]["k"]
    if change is None:
        del row[what]
    else:
        row[what] += change
    worse = change is None or (change < 0) == (what == "blocks")
    assert len(over_budget(costs, budget)) == worse


@pytest.mark.parametrize(
    ("registers", "threads", "shared_bytes", "blocks"),
    [
        (32, 1024, 0, 2),  # threads
        (33, 1024, 0, 1),  # registers: 40 for each
        (128, 256, 0, 2),
        (168, 128, 0, 3),
        (16, 32, 0, 32),  # as many as there may be
        (16, 128, 232448, 1),  # shared memory
        (16, 128, 233472 // 2 - 1024, 2),
        (16, 128, 233472 // 2 - 1023, 1),
    ],
)
def test_occupancy(registers: int, threads: int, shared_bytes: int, blocks: int) -> None:
    assert occupancy(Resources(registers, 0, 0), threads, shared_bytes, DEVICES["H100"]) == blocks
