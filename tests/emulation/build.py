"""What is compiled beside the emulator and its PTX: programs, and ptxas's report; in the same cache."""

from __future__ import annotations

import functools
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ..ptx_emulator.build import cached, linked, nvcc, ptx_path, run

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
HOST = Path(__file__).parent / "host"  # what compiles kernels for a CPU


def program(
    name: str, sources: Sequence[str | Path], flags: Sequence[str] = (), include_dirs: Sequence[str | Path] = ()
) -> Path:
    """A program made of C++ sources, built when they or the flags change; its dynamic symbols are those it defines."""
    return linked(name, "", ["-rdynamic"], sources, flags, include_dirs)


def ptxas_report(source_path: str | Path, architecture: str, include_dirs: Sequence[str | Path] = ()) -> str:
    """What ptxas says of the registers and the memory of each kernel of a CUDA source."""
    source = ptx_path(source_path, architecture, None, include_dirs)
    command = [str(nvcc()), "-cubin", f"-arch={architecture}", "-Xptxas=-v", str(source), "-o", os.devnull]
    return cached(f"{source.stem}.ptxas", lambda out: out.write_text(run(command))).read_text()


@functools.cache
def cuda_include() -> Path:
    """Where CUDA's headers are: nvcc knows, also where the one on PATH is a script that calls another."""
    compiler = nvcc()
    assert compiler is not None, "no nvcc, whose headers the host module needs"
    said = subprocess.run([compiler, "--dryrun", "any.cu"], capture_output=True, text=True).stderr
    folders = [Path(folder) for folder in re.findall(r'-I"?([^"\s]+)', said)]
    return next(folder for folder in folders if (folder / "vector_types.h").exists())


@functools.cache
def host_include_dirs(csrc: Path = CSRC) -> tuple[Path, ...]:
    """Of kernels that are compiled for a CPU."""
    return csrc, HOST.parent, cuda_include()
