"""The machine and the revision of a measurement, and the multiply-add peak that its numbers are fractions of."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import reformer_kernels as rk
from reformer_kernels.backends import cpu

ROOT = Path(__file__).resolve().parent.parent


def git(*arguments: str) -> str:
    """The output of a git command in this checkout.

    Raises:
        RuntimeError: git says no; the message is git's.
    """
    ran = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"git {arguments[0]}: {ran.stderr.strip()}")
    return ran.stdout.strip()


def revision() -> str:
    try:
        return git("describe", "--always", "--dirty")
    except (RuntimeError, OSError) as error:
        return f"unknown ({error})"


def environment() -> dict[str, Any]:
    built = cpu.build_info()
    compiler = {"compiler": built["compiler"]} if "compiler" in built else {}
    return {
        "revision": revision(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "reformer_kernels": rk.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "busy_cores": busy_cores(),
        "threads": torch.get_num_threads(),
        "isa": built.get("isa_in_use"),
        **compiler,
    }


def _cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())


def available_bytes() -> float:
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable")), float("inf"))


def busy_cores(seconds: float = 0.5) -> float:
    """How many cores other processes keep busy: this one sleeps meanwhile. 0 where /proc/stat does not exist."""
    if not Path("/proc/stat").exists():
        return 0.0
    before = _busy_ticks()
    time.sleep(seconds)
    return round((_busy_ticks() - before) / os.sysconf("SC_CLK_TCK") / seconds, 2)


def _busy_ticks() -> int:
    user, nice, system, *_ = (int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:])
    return user + nice + system


def fma_peak(*threads: int) -> dict[str, float]:
    """float32 GFLOP/s of that many threads that multiply and add in registers; empty without a C++ compiler."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if not compiler:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "fma_peak")
        source = Path(__file__).with_name("fma_peak.cpp")
        command = [compiler, "-O3", "-march=native", "-std=c++17", "-pthread", str(source), "-o", str(program)]
        if subprocess.run(command, capture_output=True).returncode:
            return {}
        arguments = [str(n) for n in dict.fromkeys(threads)]
        ran = subprocess.run([str(program), *arguments], capture_output=True, check=True)
        peaks: dict[str, float] = json.loads(ran.stdout)
        return peaks
