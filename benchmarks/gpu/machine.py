"""What the machine is and can do: versions, build, tests, ceilings, and the dense attention that it comes with."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..machine import ROOT
from .timing import Row, median_ms, median_ms_in_graph

ROW_BYTES = 128  # a row of 64 bfloat16 values, what LSH attention gathers


def our_gather() -> Callable[..., Any] | str:
    """Our gather_rows, or why there is none."""
    libraries = list((ROOT / "reformer_kernels").glob("_cuda.*so"))
    if not libraries:
        return "no CUDA library was built"
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:
        return str(error)
    return torch.ops.reformer_kernels_cuda.gather_rows


def versions() -> list[Row]:
    found: Row = {"device": "none that torch sees"}
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        found = {
            "device": device.name,
            "capability": f"{device.major}.{device.minor}",
            "memory GiB": round(device.total_memory / 2**30, 1),
            "multiprocessors": device.multi_processor_count,
            "L2 MiB": device.L2_cache_size / 2**20,
            "shared memory per block KiB": device.shared_memory_per_block_optin / 1024,  # type: ignore[attr-defined]
        }
    found |= {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
        "triton": _version_of("triton"),
        "setuptools": _version_of("setuptools"),
        "driver": _smi("driver_version"),
        "clocks and power limit": _smi("clocks.max.sm,clocks.max.mem,power.limit"),
        "nvcc": _output("nvcc", "--version").splitlines()[-1],
        "ncu": shutil.which("ncu") or "not found",
        "compute-sanitizer": shutil.which("compute-sanitizer") or "not found",
    }
    return [{"what": what, "value": value} for what, value in found.items()]


def _version_of(module: str) -> str:
    try:
        return str(__import__(module).__version__)
    except ImportError:
        return "not found"


def _smi(query: str) -> str:
    return _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "said nothing"
    except OSError:
        return "not found"


def build() -> list[Row]:
    """Builds in place for this GPU (without one, as setup.py does), with this python and nothing from the network."""
    # Without pyproject.toml beside it setup.py runs under any setuptools; older ones reject its licence expression.
    stage = ROOT / "build" / "gpu_check"
    stage.mkdir(parents=True, exist_ok=True)
    for name in ("setup.py", "csrc", "reformer_kernels"):
        if not (stage / name).is_symlink():
            (stage / name).symlink_to(ROOT / name)
    environment = dict(os.environ)
    if torch.cuda.is_available():
        environment.setdefault("TORCH_CUDA_ARCH_LIST", "{}.{}".format(*torch.cuda.get_device_capability()))
    started = time.perf_counter()
    ran = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=stage,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    (stage / "build.log").write_text(ran.stdout)
    if ran.returncode:
        raise RuntimeError(f"setup.py failed, see {stage / 'build.log'}:\n{ran.stdout[-3000:]}")
    seconds = round(time.perf_counter() - started, 1)
    gather = our_gather()
    if not callable(gather):
        said = [line for line in ran.stdout.splitlines() if line.startswith("reformer_kernels:")]
        raise RuntimeError(" ".join([gather, *said]))
    return [{"build s": seconds, "CUDA library": torch.ops.reformer_kernels_cuda.build_info()}]


def ceilings() -> list[Row]:
    rows: list[Row] = []

    def add(what: str, rate: float, unit: str, ms: float) -> None:
        rows.append({"what": what, "rate": round(rate, 1), "unit": unit, "us": round(ms * 1e3, 2)})

    source = torch.empty(2**30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    ms = median_ms(lambda: target.copy_(source))
    add("device copy of 1 GiB, read + written", 2 * source.numel() / ms / 1e6, "GB/s", ms)

    gathers: dict[str, Callable[..., Any]] = {
        "index_select": lambda input, index, out: torch.index_select(input, 0, index, out=out)
    }
    ours = our_gather()
    if callable(ours):
        gathers["gather_rows"] = ours
    else:
        rows.append({"what": f"gather_rows: {ours}"})
    # Counts rows read and written and the index read. The small case fits the L2 cache with its output.
    sizes: dict[str, tuple[int, Callable[[Callable[[], Any]], float]]] = {
        "1 GiB": (2**30, median_ms),
        "8 MiB, L2-resident": (2**23, median_ms_in_graph),
    }
    for size, (table_bytes, timer) in sizes.items():
        table = source[:table_bytes].view(torch.bfloat16).view(-1, ROW_BYTES // 2)
        out = target[:table_bytes].view(torch.bfloat16).view(-1, ROW_BYTES // 2)
        index = torch.randperm(len(table), device="cuda").int()
        for name, gather in gathers.items():
            call = functools.partial(gather, table, index, out)
            out.zero_()
            call()
            assert torch.equal(out.view(torch.int16), table[index].view(torch.int16)), f"{name} gathers wrong rows"
            ms = timer(call)
            moved = 2 * table_bytes + 4 * len(index)
            add(f"{name}, random {ROW_BYTES}-byte rows of {size}", moved / ms / 1e6, "GB/s", ms)

    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    ms = median_ms(lambda: a @ b)
    add(f"bfloat16 matmul of {n} x {n} x {n}", 2 * n**3 / ms / 1e9, "TFLOP/s", ms)
    return rows


def sdpa() -> list[Row]:
    """Causal bfloat16 attention, 64K tokens in all. FLOP/s count the lower triangle: 2 matmuls forward, 5 backward."""
    heads, tokens = 8, 2**16
    rows: list[Row] = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        for head_dim in (64, 128):
            for length in (2**n for n in range(10, 17)):
                shape = (tokens // length, heads, length, head_dim)
                row: Row = {"backend": backend.name, "D": head_dim, "L": length, "B": shape[0], "H": heads}
                rows.append(row)
                try:
                    row |= _sdpa_row(backend, shape)
                except RuntimeError as error:  # a backend that refuses a shape does not hide the others
                    row["error"] = str(error).splitlines()[0]
    if all("error" in row for row in rows):
        raise RuntimeError(rows[0]["error"])
    return rows


def _sdpa_row(backend: SDPBackend, shape: tuple[int, int, int, int]) -> Row:
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    grad = torch.randn_like(q)
    matmul_flop = shape[0] * shape[1] * shape[2] ** 2 * shape[3]  # 2 L^2 D, of which causal attention needs half
    with sdpa_kernel(backend):
        with torch.no_grad():
            fwd = median_ms(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        bwd = median_ms(lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True))
    return {
        "forward ms": round(fwd, 4),
        "backward ms": round(bwd, 4),
        "forward TFLOP/s": round(2 * matmul_flop / fwd / 1e9, 1),
        "backward TFLOP/s": round(5 * matmul_flop / bwd / 1e9, 1),
    }


def gpu_tests() -> list[Row]:
    """The tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    command += ["tests/test_cuda.py", "tests/test_triton.py"]
    ran = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if ran.returncode:
        raise RuntimeError(f"pytest ended with exit code {ran.returncode}:\n{ran.stdout[-6000:]}")
    return [{"tests": ran.stdout.splitlines()[-1]}]
