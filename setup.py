"""The native libraries. All other metadata is in pyproject.toml.

They are not Python modules: they register their ops with torch when torch.ops.load_library loads them, and use torch
only through its stable ABI, so one build runs on every torch >= 2.11.
"""

import copy
import json
import os
import re
import subprocess
import sysconfig
from glob import glob
from pathlib import Path

import torch
from setuptools import Extension, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, include_paths, library_paths

NVCC = Path(CUDA_HOME or "", "bin", "nvcc")
SWITCH = "REFORMER_KERNELS_BUILD_CUDA"  # 0: no CUDA library; 1: fail without one; unset: one if possible
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]
# Instruction sets are chosen by pragmas inside the sources, so that one list of flags serves all.
CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-Wall", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler=-Wall,-fvisibility=hidden", "--threads=2"]  # two architectures at once
# Kept between builds, where pip would give a new temporary directory each time: ninja recompiles only what changed.
OBJECTS = Path("build", "objects").absolute()


def version_pair(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def target_torch_cuda() -> str | None:
    """The CUDA version of the torch in the environment that is installed into; "" for a CPU build, None without torch.

    A build in isolation imports another torch than the one that will run, so this one is read, not imported.
    """
    for directory in dict.fromkeys((sysconfig.get_path("platlib"), sysconfig.get_path("purelib"))):
        file = Path(directory, "torch", "version.py")
        if file.exists():
            found = re.search(r"^cuda\b.*=\s*['\"](.*)['\"]", file.read_text(), re.MULTILINE)
            return found.group(1) if found else ""
    return None


def nvcc_says(*arguments: str) -> str:
    return subprocess.run([NVCC, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout


def cuda_library_dirs() -> list[str]:
    # nvcc knows; $CUDA_HOME/lib64 does not exist where the nvcc on PATH is a script that calls another one.
    return list(dict.fromkeys(re.findall(r"-L([^\"\s]+)", nvcc_says("--dryrun", "any.cu"))))


def reason_against_cuda() -> str | None:
    switch = os.environ.get(SWITCH, "")
    if switch not in ("", "0", "1"):
        raise SystemExit(f"{SWITCH} must be 0, 1 or unset, got {switch!r}")
    if switch == "0":
        return f"the build was told {SWITCH}=0"
    reason = obstacle_to_cuda()
    if reason and switch == "1":
        raise SystemExit(f"{SWITCH}=1, but {reason}")
    return reason


def obstacle_to_cuda() -> str | None:
    if not torch.version.cuda:
        return f"torch {torch.__version__} is not a CUDA build"
    if not CUDA_HOME or not NVCC.exists():
        return "found no nvcc (looked at CUDA_HOME, PATH and /usr/local/cuda)"
    found = re.search(r"release (\d+\.\d+)", nvcc_says("--version"))
    if not found:
        return f"{NVCC} --version names no release"
    have, want = version_pair(found.group(1)), version_pair(torch.version.cuda)
    # Within a major version an older compiler fits a newer runtime, not the other way round.
    if have[0] != want[0] or have > want:
        return f"nvcc {found.group(1)} does not fit torch {torch.__version__}, built with CUDA {torch.version.cuda}"
    target = target_torch_cuda()
    if target is not None and target != torch.version.cuda:
        return (
            f"this build uses a torch with CUDA {torch.version.cuda}, but the installed torch has "
            f"{'CUDA ' + target if target else 'no CUDA'} (pip install --no-build-isolation builds against that one)"
        )
    return None


def extension(device: str, sources: list[str], libraries: list[str], flags: list[str]) -> Extension:
    flags = [*STABLE_ABI, *flags]
    return Extension(
        f"reformer_kernels._{device}",
        [f"csrc/binding/{device}.cpp", *sorted(sources)],
        include_dirs=[os.path.abspath("csrc"), str(OBJECTS), *include_paths(device)],
        library_dirs=[*library_paths(device), *(cuda_library_dirs() if device == "cuda" else [])],
        libraries=libraries,
        extra_compile_args={"cxx": [*CXX_FLAGS, *flags], "nvcc": [*NVCC_FLAGS, *flags]},
        depends=[
            str(FACTS),
            *sorted(glob("csrc/**/*.h", recursive=True)),
            *sorted(glob("csrc/**/*.cuh", recursive=True)),
        ],
        py_limited_api=True,
    )


class BuildLibraries(BuildExtension):
    """Compiles both libraries at once."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = True

    def run(self) -> None:
        # A CUDA library of an earlier build must not outlive a build that decides against one.
        if REASON_AGAINST_CUDA:
            for stale in Path("" if self.inplace else self.build_lib, "reformer_kernels").glob("_cuda.*so"):
                stale.unlink()
        write_facts()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        # torch writes a ninja file into the folder of the objects, so each library needs one of its own.
        of_its_own = copy.copy(self)
        of_its_own.build_temp = str(OBJECTS / ext.name)
        super(BuildLibraries, of_its_own).build_extension(ext)


def write_facts() -> None:
    """What build_info tells, in a header: as flags, they would recompile every kernel when they change."""
    facts = {
        "BUILD_TORCH": torch.__version__,
        "BUILD_CUDA": torch.version.cuda or "",
        "CUDA_ARCHITECTURES": ARCHITECTURES.replace(".", "").replace(" ", ";"),
        "REASON_AGAINST_CUDA": REASON_AGAINST_CUDA or "",  # pip hides what a build prints
    }
    # Twice: as a literal of C++ within JSON.
    text = "".join(f"#define RK_{name} {json.dumps(json.dumps(str(value))[1:-1])}\n" for name, value in facts.items())
    if not FACTS.exists() or FACTS.read_text() != text:
        FACTS.parent.mkdir(parents=True, exist_ok=True)
        FACTS.write_text(text)


FACTS = OBJECTS / "build_facts.h"
ARCHITECTURES = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")  # torch reads it, too
REASON_AGAINST_CUDA = reason_against_cuda()
extensions = [extension("cpu", glob("csrc/kernels/cpu/*.cpp"), ["torch_cpu"], [])]
if REASON_AGAINST_CUDA:
    print(f"reformer_kernels: building without CUDA kernels: {REASON_AGAINST_CUDA}", flush=True)
else:
    kernels = glob("csrc/kernels/cuda/*.cu")
    extensions.append(extension("cuda", kernels, ["torch_cpu", "torch_cuda", "cudart"], ["-DUSE_CUDA"]))

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildLibraries},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
