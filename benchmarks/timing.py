"""Timers, and medians of their interleaved runs.

A timer runs one measured thing once and says how many seconds its parts took. It is described by a spec, a dictionary
that can be sent to a process with another revision of the library.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, autograd

from .cases import Case
from .kernel_cases import Variant, kernel_timer
from .providers import PROVIDERS, inputs

Timer = Callable[[], dict[str, float]]
Times = dict[str, Any]
SLOW_SECONDS = 20.0  # of a single run: then one must do


def provider_spec(provider: str, target: str, case: Case) -> dict[str, Any]:
    return {"kind": "provider", "provider": provider, "target": target, "case": vars(case)}


def kernel_spec(variant: Variant, threads: int) -> dict[str, Any]:
    return {"kind": "kernel", "variant": vars(variant), "threads": threads}


def build(spec: Mapping[str, Any]) -> Timer:
    """The timer of a spec, in this process."""
    if spec["kind"] == "kernel":
        return kernel_timer(Variant(**spec["variant"]), spec["threads"])
    case = Case(**spec["case"])
    function = PROVIDERS[spec["provider"]].make(spec["target"], case)
    if function is None:
        raise ValueError(f"{spec['provider']} has no {spec['target']}")
    return step_timer(function, *inputs(spec["target"], case))


def step_timer(function: Callable[..., Tensor], tensors: list[Tensor], grad_out: Tensor) -> Timer:
    """Forward (in training mode) and backward of one step."""

    def run() -> dict[str, float]:
        start = time.perf_counter()
        out = function(*tensors)
        middle = time.perf_counter()
        autograd.grad(out, tensors, grad_out)
        end = time.perf_counter()
        return {"forward": middle - start, "both": end - start}

    return run


def interleaved(timers: Mapping[str, Timer], repeats: int, slow_seconds: float = SLOW_SECONDS) -> dict[str, Times]:
    """Medians per timer of ``repeats`` rounds over all of them, after one warm-up run each.

    A timer whose warm-up took more than ``slow_seconds`` is not run again: that run is its result.
    """
    runs: dict[str, list[dict[str, float]]] = {}
    slow = {}
    for name, timer in timers.items():
        first = timer()
        slow[name] = max(first.values()) > slow_seconds
        runs[name] = [first] if slow[name] else []
    for _ in range(repeats):
        for name, timer in timers.items():
            if not slow[name]:
                runs[name].append(timer())
    return {name: _medians(all_runs) for name, all_runs in runs.items()}


def _medians(runs: list[dict[str, float]]) -> Times:
    medians: Times = {part: statistics.median(run[part] for run in runs) for part in runs[0]}
    return medians | {"repeats": len(runs), "runs": runs}
