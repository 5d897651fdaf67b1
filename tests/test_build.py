"""What setup.py decides, what the native libraries link to, and what their sources include."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import setuptools
import torch

from reformer_kernels.backends import cpu, cuda

ROOT = Path(__file__).resolve().parent.parent
RunSetup = Callable[[str | None], tuple[ModuleType, list[str]]]
LOADERS = {"ld-linux-x86-64.so", "ld-linux-aarch64.so"}
SYSTEM = {"libstdc++.so", "libgcc_s.so", "libm.so", "libc.so", "libpthread.so"} | LOADERS
ALLOWED = {
    "_cpu": SYSTEM | {"libtorch_cpu.so"},
    "_cuda": SYSTEM | {"libtorch_cpu.so", "libtorch_cuda.so", "libcudart.so"},
}
LIBRARIES = {name: list((ROOT / "reformer_kernels").glob(f"{name}.*so")) for name in ALLOWED}
FORBIDDEN_INCLUDE = re.compile(r'^\s*#\s*include\s*[<"](torch/|ATen/|c10/|pybind11/|Python\.h)', re.MULTILINE)


@pytest.fixture(params=ALLOWED)
def library(request: pytest.FixtureRequest) -> Path:
    found = LIBRARIES[request.param]
    if not found and request.param == "_cuda":
        pytest.skip("built without CUDA kernels")
    assert len(found) == 1, f"expected one {request.param} library, got {found}; run make build"
    return found[0]


def output_of(tool: str, *arguments: str | Path) -> str:
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not installed")
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout


def test_library_uses_only_the_stable_abi(library: Path) -> None:
    undefined = output_of("nm", "-DC", "--undefined-only", library)
    assert "aoti_torch" in undefined  # it does use torch, so the next line tests something
    assert not re.findall(r"^.*\bU (?:_?Py\w+|.*\b(?:at|c10|torch)::.*)$", undefined, re.MULTILINE)


def test_library_is_no_python_module(library: Path) -> None:
    assert "PyInit" not in output_of("nm", "-D", "--defined-only", library)
    assert library.name.endswith(".abi3.so")


def test_library_needs_only_allowed_libraries(library: Path) -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.+?\.so)", output_of("readelf", "-d", library))
    assert needed
    assert set(needed) <= ALLOWED[library.name.split(".")[0]]


def test_kernels_include_neither_torch_nor_python() -> None:
    sources = [file for file in (ROOT / "csrc" / "kernels").rglob("*") if file.is_file()]
    assert sources
    assert not [file for file in sources if FORBIDDEN_INCLUDE.search(file.read_text())]


@pytest.fixture
def run_setup(monkeypatch: pytest.MonkeyPatch) -> RunSetup:
    """setup.py as a module, and what it would build, for a value of the switch."""

    def run(switch: str | None) -> tuple[ModuleType, list[str]]:
        monkeypatch.delenv("REFORMER_KERNELS_BUILD_CUDA", raising=False)
        if switch is not None:
            monkeypatch.setenv("REFORMER_KERNELS_BUILD_CUDA", switch)
        asked: dict[str, Any] = {}
        monkeypatch.setattr(setuptools, "setup", asked.update)
        monkeypatch.chdir(ROOT)
        spec = importlib.util.spec_from_file_location("reformer_kernels_setup", ROOT / "setup.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module, [extension.name for extension in asked["ext_modules"]]

    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX"))
    return run


def test_switch_leaves_out_cuda_and_is_the_reason(run_setup: RunSetup) -> None:
    module, built = run_setup("0")
    assert built == ["reformer_kernels._cpu"]
    assert module.REASON_AGAINST_CUDA == "the build was told REFORMER_KERNELS_BUILD_CUDA=0"


def test_switch_that_asks_for_cuda_fails_without(run_setup: RunSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    reason = f"torch {torch.__version__} is not a CUDA build"
    with pytest.raises(SystemExit, match=f"^REFORMER_KERNELS_BUILD_CUDA=1, but {re.escape(reason)}$"):
        run_setup("1")
    module, built = run_setup(None)
    assert built == ["reformer_kernels._cpu"] and module.REASON_AGAINST_CUDA == reason


def test_switch_refuses_other_values(run_setup: RunSetup) -> None:
    with pytest.raises(SystemExit, match=r"^REFORMER_KERNELS_BUILD_CUDA must be 0, 1 or unset, got 'no'$"):
        run_setup("no")


def test_facts_of_a_build_survive_any_text(
    run_setup: RunSetup, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module, _ = run_setup("0")
    monkeypatch.setattr(module, "FACTS", tmp_path / "facts.h")
    monkeypatch.setattr(module, "REASON_AGAINST_CUDA", 'C:\\nvcc says "no"')
    module.write_facts()
    found = re.search(r"#define RK_REASON_AGAINST_CUDA (.*)", module.FACTS.read_text())
    assert found is not None
    within_json = json.loads(found.group(1))  # as C++ reads this literal, too
    assert json.loads(f'{{"reason": "{within_json}"}}') == {"reason": 'C:\\nvcc says "no"'}
    before = module.FACTS.stat().st_mtime_ns
    module.write_facts()
    assert module.FACTS.stat().st_mtime_ns == before  # or everything that includes it would be compiled again


def test_libraries_know_what_they_were_built_with() -> None:
    assert cpu.build_info()["torch"]
    if LIBRARIES["_cuda"] and torch.version.cuda:
        assert cuda.library()["architectures"]
        assert not cpu.build_info()["no_cuda_because"]
    elif not LIBRARIES["_cuda"]:
        assert cpu.build_info()["no_cuda_because"]


HEADERS = sorted((ROOT / "csrc" / "kernels").rglob("*.h"))


@pytest.mark.full
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.parametrize("header", HEADERS, ids=lambda x: str(x.relative_to(ROOT / "csrc")))
def test_a_header_includes_what_it_uses(header: Path) -> None:
    """So an editor can read it by csrc/compile_flags.txt, too."""
    flags = (ROOT / "csrc" / "compile_flags.txt").read_text().split()
    command = ["g++", *flags, "-fsyntax-only", "-Wno-psabi", "-"]
    read = subprocess.run(command, input=f'#include "{header}"', cwd=ROOT / "csrc", capture_output=True, text=True)
    assert read.returncode == 0, read.stderr
