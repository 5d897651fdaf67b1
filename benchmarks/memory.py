"""Peak extra memory of one forward and backward, in a process of its own.

``python -m benchmarks.memory --provider ours --target attention --case '{"length": 4096}'`` is that process. It builds
the inputs and makes a tiny call first, so that libraries and thread pools are not counted; "extra" is the peak resident
memory during the step less the resident memory before it: the output, the gradients, and everything in between.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cases import Case
from .providers import PROVIDERS, TARGETS, inputs

ROOT = Path(__file__).resolve().parent.parent
WARM_UP_LENGTH = 256


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def peak_of(step: Callable[[], Any]) -> dict[str, Any]:
    """The memory that a call takes at its peak, beside what this process holds before."""
    gc.collect()
    before = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    start = time.perf_counter()
    result = step()
    seconds = time.perf_counter() - start
    peak = _status_bytes("VmHWM")
    del result
    return {"extra_bytes": peak - before, "before_bytes": before, "seconds": seconds}


def measure(provider: str, target: str, case: Case) -> dict[str, Any]:
    """Of this process; to be called once in it."""
    warm_up = case.shorter(max(WARM_UP_LENGTH, 2 * case.chunk_length))
    measured = {}
    for size in (warm_up, case):
        tensors, grad_out = inputs(target, size)
        function = PROVIDERS[provider].make(target, size)
        if function is None:
            raise ValueError(f"{provider} has no {target}")
        measured = peak_of(functools.partial(_step, function, tensors, grad_out))
        del tensors, grad_out, function
    return measured


def _step(function: Callable[..., Tensor], tensors: list[Tensor], grad_out: Tensor) -> Any:
    out = function(*tensors)
    return out, torch.autograd.grad(out, tensors, grad_out)


def measure_in_fresh_process(provider: str, target: str, case: Case, root: Path = ROOT) -> dict[str, Any]:
    """The measurement, or ``{"error": why}``; ``root`` is the checkout whose library is measured."""
    options = ["--provider", provider, "--target", target, "--case", json.dumps(vars(case))]
    return fresh_process("benchmarks.memory", options, root)


def fresh_process(module: str, arguments: list[str], root: Path = ROOT, **environment: str) -> dict[str, Any]:
    """The JSON that ``python -m module`` prints on its last line, or ``{"error": why}``."""
    command = [sys.executable, "-m", module, *arguments]
    ran = subprocess.run(command, cwd=root, env={**os.environ, **environment}, capture_output=True, text=True)
    if ran.returncode:
        last = ran.stderr.strip().splitlines()
        return {"error": f"exit code {ran.returncode}: {last[-1] if last else 'no message'}"}
    result: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--provider", choices=PROVIDERS, required=True)
    parser.add_argument("--target", choices=TARGETS, default="attention")
    parser.add_argument("--case", type=lambda text: Case(**json.loads(text)), required=True, help="fields as JSON")
    options = parser.parse_args()
    print(json.dumps(measure(options.provider, options.target, options.case)))


if __name__ == "__main__":
    main()
