"""What only a GPU can say, in one command: ``make gpu-check OUT=dir`` (``STAGE=name`` runs one stage again).

A stage is a function that returns rows to print, or raises. Each runs in its own process, so a crash or a corrupted
CUDA context ends that stage only. Results are merged into OUT/gpu_check.json, from which OUT/gpu_check.md is written.
Without a GPU the stages that need none run, unless OUT has what a machine with a GPU said.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .gpu.timing import Row
from .machine import ROOT, git


class Stage(NamedTuple):
    function: str  # of benchmarks.gpu
    seconds: int  # that it may take
    needs_gpu: bool = True


# In the order in which they run.
STAGES = {
    "versions": Stage("machine.versions", 60, needs_gpu=False),
    "build": Stage("machine.build", 600, needs_gpu=False),
    "tests": Stage("machine.gpu_tests", 600),
    "ceilings": Stage("machine.ceilings", 120),
    "sdpa": Stage("machine.sdpa", 300),
    "reference": Stage("kernels.reference", 120),
    "kernels": Stage("kernels.kernels", 240),
    "attention": Stage("attention.attention", 300),
    "determinism": Stage("attention.determinism", 60),
    "cuda_graph": Stage("attention.cuda_graph", 60),
    "compile": Stage("attention.compiled", 120),
    "models": Stage("models.models", 300),
}
NO_GPU = "no GPU"


def stage_function(name: str) -> Callable[[], list[Row]]:
    """Imported when it runs: what it needs may be built by an earlier stage."""
    module, function = STAGES[name].function.split(".")
    found: Callable[[], list[Row]] = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)
    return found


# --- Running and reporting


def run_stage(name: str) -> Row:
    started = time.perf_counter()
    try:
        rows = stage_function(name)()
        result: Row = {"status": "ok", "rows": rows}
    except Exception as error:  # a stage may fail in any way, and the report says how
        result = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else NO_GPU
    return result | _origin() | {"device": device, "seconds": round(time.perf_counter() - started, 1)}


def _origin() -> Row:
    try:
        revision = git("describe", "--always", "--dirty")
    except (RuntimeError, OSError) as error:  # the GPU machine may have a copy without history, or no git
        revision = str(error)
    return {"when": datetime.datetime.now().astimezone().isoformat(timespec="seconds"), "revision": revision}


def run_stage_in_process(name: str, out: Path) -> Row:
    before = load(out).get(name)
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--out", str(out), "--stage", name, "--in-this-process"]
    try:
        ended = f"it ended with exit code {subprocess.run(command, cwd=ROOT, timeout=STAGES[name].seconds).returncode}"
    except subprocess.TimeoutExpired:
        ended = f"it took more than {STAGES[name].seconds} s"
    result = load(out).get(name)
    if result is None or result == before:  # it died before it could write
        result = {"status": "failed", "error": ended, **_origin()}
        save(out, name, result)
    return result


def load(out: Path) -> dict[str, Row]:
    file = out / "gpu_check.json"
    return json.loads(file.read_text()) if file.exists() else {}


def save(out: Path, name: str, result: Row) -> None:
    results = load(out) | {name: result}
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu_check.json").write_text(json.dumps(results, indent=1) + "\n")
    report = [markdown(name, results[name]) for name in STAGES if name in results]
    (out / "gpu_check.md").write_text("# GPU check\n\n" + "\n".join(report))


def markdown(name: str, result: Row) -> str:
    lines = [f"## {name}: {result['status']}", ""]
    origin = [f"{key} {result[key]}" for key in ("device", "when", "revision", "seconds") if key in result]
    if origin:
        lines += [", ".join(origin), ""]
    if "error" in result:
        lines += ["```", result["error"], "```", ""]
    rows = result.get("rows", [])
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if rows:
        lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        lines += ["| " + " | ".join(_cell(row.get(column, "")) for column in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1 else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("gpu_check_out"), help="folder of the results, made if missing"
    )
    parser.add_argument("--stage", choices=STAGES, help="run this stage only")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    stages = [options.stage] if options.stage else list(STAGES)
    left_out = [] if torch.cuda.is_available() else [name for name in stages if is_for_a_gpu(name, out)]
    if left_out:
        print(f"Left out, since torch sees no GPU: {', '.join(left_out)}. Results in {out} stay.", flush=True)
        if options.stage:
            return 1
    failed = False
    for name in stages:
        if name in left_out:
            continue
        if options.in_this_process:
            save(out, name, run_stage(name))
            continue
        result = run_stage_in_process(name, out)
        failed |= result["status"] == "failed"
        print(markdown(name, result), flush=True)
    return int(failed)


def is_for_a_gpu(name: str, out: Path) -> bool:
    """The stage needs one, or what a machine with one said would be lost."""
    return STAGES[name].needs_gpu or load(out).get(name, {}).get("device", NO_GPU) != NO_GPU


if __name__ == "__main__":
    sys.exit(main())
