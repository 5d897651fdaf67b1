"""What importing the package needs, and what a call says when a native library is missing."""

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import reformer_kernels as rk
from reformer_kernels import _requires
from reformer_kernels._calls import HashCall
from reformer_kernels.backends import _native, cpu, cuda, missing

ROOT = Path(__file__).resolve().parent.parent


def run_python(code: str, path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(path)}, cwd=path)


def test_import_loads_nothing_that_torch_has_not_loaded() -> None:
    """Dynamo, sympy and Triton would take seconds and hundreds of megabytes."""
    run = run_python(
        "import sys, torch; known = set(sys.modules); import reformer_kernels; print(*sorted({*sys.modules} - known))",
        ROOT,
    )
    assert run.returncode == 0, run.stderr
    modules = run.stdout.split()
    assert "reformer_kernels.modules.reversible" in modules
    foreign = [name for name in modules if name.split(".")[0] not in {"reformer_kernels", *sys.stdlib_module_names}]
    assert not foreign


def test_import_refuses_an_old_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text('__version__ = "2.10.1"')
    (tmp_path / "reformer_kernels").symlink_to(ROOT / "reformer_kernels")
    run = run_python("import reformer_kernels", tmp_path)
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last == "ImportError: reformer_kernels needs torch 2.11 or newer, and torch 2.10.1 is installed"


@pytest.mark.parametrize("version", ["2.11.0", "2.11.0a0+git1234", "2.14.1+cu130", "3.0"])
def test_newer_torch_is_taken(version: str) -> None:
    _requires.check_torch(version)


def test_least_torch_is_that_of_the_package_metadata() -> None:
    least = ".".join(map(str, _requires.LEAST_TORCH))
    assert f'"torch>={least}"' in (ROOT / "pyproject.toml").read_text()
    assert (
        f"-DTORCH_TARGET_VERSION=0x{_requires.LEAST_TORCH[0]:02x}{_requires.LEAST_TORCH[1]:02x}"
        in (ROOT / "setup.py").read_text()
    )


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU library is missing, and nobody was told yet."""
    monkeypatch.setattr(cpu, "_load_error", "here/_cpu*.so is not built")
    missing._warn.cache_clear()
    yield
    missing._warn.cache_clear()


def call_ours(**kwargs: Any) -> Tensor:
    out: Tensor = rk.lsh_attention(torch.randn(1, 2, 64, 8), torch.randn(1, 2, 64, 8), chunk_length=16, **kwargs)
    return out


def test_missing_library_is_told_once_and_why(without_library: None) -> None:
    with pytest.warns(RuntimeWarning, match=r"CPU kernels.*here/_cpu\*\.so is not built.*make build") as told:
        call_ours()
    assert len(told) == 1
    call_ours()  # where warnings are errors


def test_exact_call_does_not_need_the_library(without_library: None) -> None:
    layer = rk.LSHMultiheadAttention(16, 2, batch_first=True)
    layer(*[torch.randn(1, 8, 16)] * 3)


def test_chosen_reference_warns_of_nothing(without_library: None) -> None:
    call_ours(backend="reference")
    with rk.use_backend("reference"):
        call_ours()


def test_explain_gives_the_reason_without_a_warning(without_library: None) -> None:
    x = torch.randn(1, 2, 64, 8)
    assert "no: the CPU library: here/_cpu*.so is not built" in rk.explain(rk.lsh_attention, x, x)


def test_call_that_the_library_would_not_serve_warns_of_nothing(
    without_library: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "kernel_reasons", lambda call: ["its rules"])
    call_ours()


def test_asked_for_cpu_kernels_raise_without_a_warning(without_library: None) -> None:
    with pytest.raises(NotImplementedError, match="here/_cpu"):
        call_ours(backend="cpu")


def on(device: str, dtype: torch.dtype = torch.float32) -> HashCall:
    """A call whose tensors say that they are on a device."""
    x: Any = SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, 2, 64, 8))
    return HashCall(x, None, None, None, [4], 1, 16, "")


def test_missing_library_does_not_concern_other_devices(without_library: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "library", lambda: {"error": "not built"})
    for device in ("meta", "mps", "xpu"):
        missing.warn_of_missing_library(on(device))
    missing.warn_of_missing_library(on("cuda", torch.float64))  # which its kernels do not have
    with pytest.warns(RuntimeWarning, match="CUDA kernels.*not built"):
        missing.warn_of_missing_library(on("cuda"))


def test_missing_cuda_library_does_not_concern_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "library", lambda: {"error": "not built"})
    missing._warn.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call_ours()


def test_reasons_why_a_cpu_library_does_not_load(tmp_path: Path) -> None:
    assert cpu._load(tmp_path) == f"{tmp_path}/_cpu*.so is not built"
    file = tmp_path / "_cpu.abi3.so"
    file.write_bytes(b"no library")
    reason = cpu._load(tmp_path)
    assert reason is not None
    assert reason.startswith(f"{file.name} cannot be loaded beside torch {torch.__version__}, which has ")
    assert reason.endswith(f"{file}: file too short")  # the loader's own words


@pytest.fixture
def cuda_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A CUDA library that cannot be loaded is all that there is."""
    monkeypatch.setattr(cuda, "__file__", str(tmp_path / "backends" / "cuda.py"))
    file = tmp_path / "_cuda.abi3.so"
    file.write_bytes(b"no library")
    cuda.library.cache_clear()
    yield file
    cuda.library.cache_clear()


def test_cuda_library_beside_a_cpu_torch_says_so(cuda_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda.library() == {"error": f"torch {torch.__version__} is not a CUDA build"}


def test_cuda_library_that_does_not_load_names_both_versions(cuda_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    error = cuda.library()["error"]
    assert (
        f"cannot be loaded beside torch {torch.__version__}, which has CUDA 12.8: {cuda_file}: file too short" in error
    )


def test_no_cuda_library_tells_what_the_build_said(cuda_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_file.unlink()
    monkeypatch.setattr(_native, "reason_against_cuda", lambda: "the build was told so")
    assert cuda.library() == {"error": "the build was told so"}


@pytest.mark.parametrize(
    ("built", "runtime", "fits"),
    [("13.0", "13.0", True), ("13.0", "13.2", True), ("13.2", "13.0", False), ("12.0", "13.0", False)],
)
def test_cuda_of_the_build_and_of_torch(built: str, runtime: str, fits: bool) -> None:
    reason = cuda.misfit(built, runtime)
    assert reason is None if fits else reason == f"built for CUDA {built}, but this torch has {runtime}"
