"""What only a GPU can say, in one command: ``make gpu-check OUT=dir`` (``STAGE=name`` runs one stage again).

A stage is a function that returns rows to print, or raises. Each runs in its own process, so a crash or a corrupted
CUDA context ends that stage only. Results are merged into OUT/gpu_check.json, from which OUT/gpu_check.md is written.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parent.parent
ROW_BYTES = 128  # a row of 64 bfloat16 values, what LSH attention gathers
Row = dict[str, Any]
# L, H, D, R and factors of the number of buckets; one sequence
HASH_SHAPES = {
    "L 16K, H 8, D 64, R 4": (16384, 8, 64, 4, (32, 16)),
    "L 64K, H 8, D 64, R 4": (65536, 8, 64, 4, (64, 32)),
    "L 64K, H 8, D 128, R 4, 512 buckets": (65536, 8, 128, 4, (32, 16)),
    "L 512K, H 2, D 64, R 1, 8192 buckets": (524288, 2, 64, 1, (64, 128)),
    "L 1M, H 2, D 64, R 4": (2**20, 2, 64, 4, (256, 128)),
}


# --- Measuring


def median_ms(function: Callable[[], Any], repetitions: int = 20, budget_ms: float = 500.0) -> float:
    """Median time of a call on the GPU; fewer repetitions (at least 3) where they would exceed the budget."""
    function()
    first = _event_ms(function)
    repetitions = max(3, min(repetitions, int(budget_ms / max(first, 1e-3))))
    return statistics.median(_event_ms(function) for _ in range(repetitions))


def _event_ms(function: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def median_ms_in_graph(function: Callable[[], Any], calls: int = 100) -> float:
    """Median time of a call that is too short to be timed by itself: many in one CUDA graph, launch gaps included."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return median_ms(graph.replay) / calls


def our_gather() -> Callable[..., None] | str:
    """Our gather_rows, or why there is none."""
    libraries = list((ROOT / "reformer_kernels").glob("_cuda.*so"))
    if not libraries:
        return "no CUDA library was built"
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:
        return str(error)
    return torch.ops.reformer_kernels_cuda.gather_rows


# --- Stages


def versions() -> list[Row]:
    device = torch.cuda.get_device_properties(0)
    found: Row = {
        "device": device.name,
        "capability": f"{device.major}.{device.minor}",
        "memory GiB": round(device.total_memory / 2**30, 1),
        "multiprocessors": device.multi_processor_count,
        "L2 MiB": device.L2_cache_size / 2**20,
        "shared memory per block KiB": device.shared_memory_per_block_optin / 1024,
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
        return __import__(module).__version__
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
    """Builds in place for this GPU, with this python and nothing from the network."""
    # Without pyproject.toml beside it setup.py runs under any setuptools; older ones reject its licence expression.
    stage = ROOT / "build" / "gpu_check"
    stage.mkdir(parents=True, exist_ok=True)
    for name in ("setup.py", "csrc", "reformer_kernels"):
        if not (stage / name).is_symlink():
            (stage / name).symlink_to(ROOT / name)
    architecture = "{}.{}".format(*torch.cuda.get_device_capability())
    started = time.perf_counter()
    ran = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=stage,
        env={"TORCH_CUDA_ARCH_LIST": architecture, **os.environ},
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

    gathers = {"index_select": lambda input, index, out: torch.index_select(input, 0, index, out=out)}
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


def reference() -> list[Row]:
    """The reference backend on the GPU: its error against float64 may be at most twice the CPU's, plus one rounding."""
    import reformer_kernels as rk

    torch.manual_seed(0)
    shape = (2, 4, 1000, 64)
    inputs = [torch.randn(shape, dtype=torch.float64) for _ in range(3)]
    _, buckets = rk.lsh_attention(*inputs[:2], causal=True, backend="reference", return_buckets=True)
    cases = {
        # Given the buckets, since a rounding may move a row to another one.
        "lsh_attention": lambda q, k, v: rk.lsh_attention(
            q, v, causal=True, buckets=buckets.to(q.device), backend="reference"
        ),
        "local_attention": lambda q, k, v: rk.local_attention(q, k, v, causal=True, backend="reference"),
    }
    rows: list[Row] = []
    for name, function in cases.items():
        oracle = _with_gradients(function, inputs, "cpu", torch.float64)
        cpu = _with_gradients(function, inputs, "cpu", torch.float32)
        gpu = _with_gradients(function, inputs, "cuda", torch.float32)
        for what, exact, on_cpu, on_gpu in zip(("out", "dq", "dk", "dv"), oracle, cpu, gpu, strict=True):
            if exact is None:  # shared query and key: no gradient of k
                continue
            cpu_error, gpu_error = ((x.double() - exact).abs().max().item() for x in (on_cpu, on_gpu))
            allowed = 2 * cpu_error + torch.finfo(torch.float32).eps * exact.abs().max().item()
            rows.append({"op": name, "of": what, "CPU error": cpu_error, "GPU error": gpu_error, "allowed": allowed})
    wrong = [row for row in rows if not row["GPU error"] <= row["allowed"]]
    if wrong:
        raise AssertionError(f"the GPU's error is too large: {wrong}")
    return rows


def _with_gradients(function: Callable[..., Any], inputs: list[Any], device: str, dtype: torch.dtype) -> list[Any]:
    leaves = [x.to(device, dtype).requires_grad_() for x in inputs]
    out = function(*leaves)
    grads = torch.autograd.grad(out.sin().sum(), leaves, allow_unused=True)
    return [None if x is None else x.detach().cpu() for x in (out, *grads)]


def kernels() -> list[Row]:
    """Hash and sort of the shapes that matter, against the time in which a copy moves what they must read and write."""
    import reformer_kernels as rk

    source = torch.empty(2**30, dtype=torch.uint8, device="cuda").random_()
    copied_bytes_per_ms = 2 * source.numel() / median_ms(source.clone)
    rows: list[Row] = []
    for name, (length, heads, head_dim, rounds, factors) in HASH_SHAPES.items():
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.randn(1, heads, length, head_dim, device="cuda").to(dtype)
            rotations = rk.random_rotations(0, heads, head_dim, rounds, factors).cuda()
            hashed = functools.partial(rk.hash_buckets, x, rotations, factors, backend="cuda")
            keys = heads * length * rounds
            moved = x.numel() * x.element_size() + 4 * keys
            flop = 2 * keys * head_dim * (sum(factors) // 2)
            ms = median_ms_in_graph(hashed)
            row = {"kernel": f"hash, {dtype}".replace("torch.", ""), "shape": name, "us": round(ms * 1e3, 1)}
            row |= {"floor us": round(moved / copied_bytes_per_ms * 1e3, 1), "TFLOP/s": round(flop / ms / 1e9, 1)}
            rows.append(row)
        buckets, total = hashed(), math.prod(factors)
        ms = median_ms_in_graph(functools.partial(rk.bucket_order, buckets, total, backend="cuda"))
        row = {"kernel": "order", "shape": name, "us": round(ms * 1e3, 1), "Gkey/s": round(keys / ms / 1e6, 2)}
        rows.append(row | {"floor us": round(8 * keys / copied_bytes_per_ms * 1e3, 1)})
        ms = median_ms(lambda buckets=buckets: torch.sort(buckets, dim=-1, stable=True))
        rows.append({"kernel": "torch.sort", "shape": name, "us": round(ms * 1e3, 1)})
    return rows


def gpu_tests() -> list[Row]:
    """The tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "tests/test_cuda.py"]
    ran = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if ran.returncode:
        raise RuntimeError(f"pytest ended with exit code {ran.returncode}:\n{ran.stdout[-6000:]}")
    return [{"tests": ran.stdout.splitlines()[-1]}]


def models() -> list[Row]:
    """Training steps of whole models: memory by depth, and time and memory beside Hugging Face."""
    from . import models as whole

    deep = [dataclasses.replace(whole.DEPTH, layers=n) for n in whole.DEPTHS]
    wide = [dataclasses.replace(whole.PEER, length=n) for n in (whole.PEER.length, 2**15)]
    pairs = [(name, case) for case in deep for name in ("ours", "ours, activations stored")]
    pairs += [(name, case) for case in wide for name in ("ours", "ours, activations stored", "Hugging Face")]
    return [_model_row(name, case, whole.Step(whole.MODELS[name](case), case, "cuda")) for name, case in pairs]


def _model_row(name: str, case: Any, step: Callable[[], Any]) -> Row:
    row: Row = {"model": name, "case": str(case)}
    try:
        row["step ms"] = round(median_ms(step, 5), 2)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        row["peak MB"] = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    except (RuntimeError, ImportError) as error:  # a peer that fails does not hide the others
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return row


# name: (function, seconds it may take), in the order in which they run
STAGES: dict[str, tuple[Callable[[], list[Row]], int]] = {
    "versions": (versions, 60),
    "build": (build, 600),
    "tests": (gpu_tests, 300),
    "ceilings": (ceilings, 120),
    "sdpa": (sdpa, 300),
    "reference": (reference, 120),
    "kernels": (kernels, 120),
    "models": (models, 300),
}


# --- Running and reporting


def run_stage(name: str) -> Row:
    started = time.perf_counter()
    try:
        rows = STAGES[name][0]()
        result: Row = {"status": "ok", "rows": rows}
    except Exception as error:  # a stage may fail in any way, and the report says how
        result = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
    device = torch.cuda.get_device_name()
    return result | _origin() | {"device": device, "seconds": round(time.perf_counter() - started, 1)}


def _origin() -> Row:
    revision = _output("git", "-C", str(ROOT), "describe", "--always", "--dirty")
    return {"when": datetime.datetime.now().astimezone().isoformat(timespec="seconds"), "revision": revision}


def run_stage_in_process(name: str, out: Path) -> Row:
    before = load(out).get(name)
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--out", str(out), "--stage", name, "--in-this-process"]
    try:
        ended = f"it ended with exit code {subprocess.run(command, cwd=ROOT, timeout=STAGES[name][1]).returncode}"
    except subprocess.TimeoutExpired:
        ended = f"it took more than {STAGES[name][1]} s"
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


def main() -> int:
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu_check_out"), help="directory of the results")
    parser.add_argument("--stage", choices=STAGES, help="run this stage only")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    failed = False
    for name in [arguments.stage] if arguments.stage else STAGES:
        if not torch.cuda.is_available():
            result: Row = {"status": "no GPU"}
            if name not in load(out):  # results of a machine with a GPU are worth more
                save(out, name, result)
        elif arguments.in_this_process:
            result = run_stage(name)
            save(out, name, result)
            continue
        else:
            result = run_stage_in_process(name, out)
        failed |= result["status"] == "failed"
        print(markdown(name, result), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
