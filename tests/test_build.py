"""What the native libraries link to, and what their sources include."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOADERS = {"ld-linux-x86-64.so", "ld-linux-aarch64.so"}
SYSTEM = {"libstdc++.so", "libgcc_s.so", "libm.so", "libc.so", "libpthread.so"} | LOADERS
ALLOWED = {
    "_cpu": SYSTEM | {"libtorch_cpu.so"},
    "_cuda": SYSTEM | {"libtorch_cpu.so", "libtorch_cuda.so", "libcudart.so"},
}
LIBRARIES = {name: list((ROOT / "reformer_kernels").glob(f"{name}.*so")) for name in ALLOWED}
FORBIDDEN_INCLUDE = re.compile(r'^\s*#\s*include\s*[<"](torch/|ATen/|c10/|pybind11/|Python\.h)', re.MULTILINE)


@pytest.fixture(params=ALLOWED)
def library(request):
    found = LIBRARIES[request.param]
    if not found and request.param == "_cuda":
        pytest.skip("built without CUDA kernels")
    assert len(found) == 1, f"expected one {request.param} library, got {found}; run make build"
    return found[0]


def output_of(tool, *arguments):
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not installed")
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout


def test_library_uses_only_the_stable_abi(library):
    undefined = output_of("nm", "-DC", "--undefined-only", library)
    assert "aoti_torch" in undefined  # it does use torch, so the next line tests something
    assert not re.findall(r"^.*\bU (?:_?Py\w+|.*\b(?:at|c10|torch)::.*)$", undefined, re.MULTILINE)


def test_library_is_no_python_module(library):
    assert "PyInit" not in output_of("nm", "-D", "--defined-only", library)
    assert library.name.endswith(".abi3.so")


def test_library_needs_only_allowed_libraries(library):
    needed = re.findall(r"\(NEEDED\).*\[(.+?\.so)", output_of("readelf", "-d", library))
    assert needed
    assert set(needed) <= ALLOWED[library.name.split(".")[0]]


def test_kernels_include_neither_torch_nor_python():
    sources = [file for file in (ROOT / "csrc" / "kernels").rglob("*") if file.is_file()]
    assert sources
    assert not [file for file in sources if FORBIDDEN_INCLUDE.search(file.read_text())]
