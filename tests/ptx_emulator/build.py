"""Compiles C++ extension modules and PTX on first use, into build/emulation/, cached by content."""

import contextlib
import fcntl
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "emulation"
COMPILER = os.environ.get("CXX", "g++")
# Device code looks at memory as several types.
BASE_FLAGS = ("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing")


class CompileError(RuntimeError):
    """A compiler refused; the message holds its command line and its output."""


def extension(
    name: str,
    sources: Sequence[str | Path],
    flags: Sequence[str] = (),
    include_dirs: Sequence[str | Path] = (),
) -> ModuleType:
    """The pybind11 module `name` (as in PYBIND11_MODULE) made of C++ sources, built when they or the flags change."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    library = linked(name, suffix, ["-shared"], sources, flags, include_dirs)
    # pybind11 gives a module again for its name, so each build has its own; after the last dot is the name inside.
    unique = f"{library.name.partition('.')[0]}.{name}"
    loader = importlib.machinery.ExtensionFileLoader(unique, str(library))
    spec = importlib.util.spec_from_file_location(unique, library, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def linked(
    name: str,
    suffix: str,
    link_flags: Sequence[str],
    sources: Sequence[str | Path],
    flags: Sequence[str],
    include_dirs: Sequence[str | Path],
) -> Path:
    """What g++ links of C++ sources, built when they or the flags change.

    Each source is an object file of its own in the cache, so that a change rebuilds only what includes it.
    """
    all_flags = (*BASE_FLAGS, *flags)
    own_dirs = [Path(d).resolve() for d in include_dirs]
    foreign_dirs = [Path(sysconfig.get_path("include")), _pybind11_include()]
    # Their own headers by path in the cache key would tie an object to a copy of the tree, so the key has none.
    include_flags = [f"-I{d}" for d in own_dirs] + [f"-isystem{d}" for d in foreign_dirs]
    identity = _compiler_identity(all_flags)

    def compile_one(source: Path) -> Path:
        key = _digest(identity, *all_flags, *_contents(source, own_dirs))
        command = [COMPILER, *all_flags, *include_flags, "-c", str(source)]
        return cached(f"{source.stem}-{key}.o", lambda out: run([*command, "-o", str(out)]))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [Path(s).resolve() for s in sources]))
    link_flags = [*link_flags, *(f for f in all_flags if f.startswith(("-fsanitize", "-fopenmp", "-pthread")))]
    key = _digest(identity, *link_flags, *(o.name for o in objects))
    link = [COMPILER, *link_flags, *map(str, objects)]
    return cached(f"{name}-{key}{suffix}", lambda out: run([*link, "-o", str(out)]))


def ptx(
    source_path: str | Path,
    architecture: str = "sm_80",
    defines: Mapping[str, object] | None = None,
    include_dirs: Sequence[str | Path] = (),
) -> str:
    """The PTX that nvcc makes of a CUDA source.

    Raises:
        CompileError: there is no nvcc, or it refused the source.
    """
    return ptx_path(source_path, architecture, defines, include_dirs).read_text()


def ptx_path(
    source_path: str | Path, architecture: str, defines: Mapping[str, object] | None, include_dirs: Sequence[str | Path]
) -> Path:
    """The file of what ``ptx`` gives."""
    compiler = nvcc()
    if compiler is None:
        raise CompileError("nvcc is neither on PATH nor in /usr/local/cuda/bin")
    source = Path(source_path).resolve()
    dirs = [Path(d).resolve() for d in include_dirs]
    options = ["-ptx", "-std=c++20", "-O3", f"-arch={architecture}"]
    options += [f"-D{name}={value}" for name, value in (defines or {}).items()]
    key = _digest(_version(compiler), *options, *_contents(source, dirs))
    command = [compiler, *options, *(f"-I{d}" for d in dirs), str(source)]
    return cached(f"{source.stem}-{key}.ptx", lambda out: run([*command, "-o", str(out)]))


@functools.cache
def nvcc() -> str | None:
    """The path of nvcc, or None without a CUDA toolkit."""
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def _pybind11_include() -> Path:
    """pybind11's own headers, or else the copy that torch carries."""
    for package, folder in (("pybind11", "include"), ("torch", "include")):
        spec = importlib.util.find_spec(package)
        if spec and spec.submodule_search_locations:
            path = Path(spec.submodule_search_locations[0]) / folder
            if (path / "pybind11").is_dir():
                return path
    raise CompileError("no pybind11 headers: install torch or pybind11")


@functools.cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout


@functools.cache
def _compiler_identity(flags: tuple[str, ...]) -> str:
    """What makes equal sources and flags compile differently: the compiler, and what "native" means here."""
    identity = _version(COMPILER) + str(_pybind11_include()) + sysconfig.get_python_version()
    if "-march=native" in flags:
        target = [COMPILER, "-march=native", "-Q", "--help=target"]
        identity += subprocess.run(target, check=False, capture_output=True, text=True).stdout
    return identity


def _contents(source: Path, include_dirs: Sequence[Path]) -> Iterator[bytes]:
    """The text of a source and of every file that it includes with quotes, directly or not."""
    pending, seen = [source], {source}
    while pending:
        path = pending.pop(0)
        text = path.read_bytes()
        yield text
        for included in re.findall(rb'^\s*#\s*include\s*"([^"]+)"', text, re.M):
            candidates = [folder / included.decode() for folder in (path.parent, *include_dirs)]
            found = next((c.resolve() for c in candidates if c.is_file()), None)
            if found and found not in seen:
                seen.add(found)
                pending.append(found)


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:20]


def cached(file_name: str, make: Callable[[Path], object]) -> Path:
    """CACHE/file_name, made by one process at a time and visible only when whole."""
    path = CACHE / file_name
    if path.exists():
        return path
    CACHE.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_name(f".{file_name}.lock")):
        if not path.exists():
            partial = path.with_name(f".{file_name}")
            make(partial)
            partial.rename(path)
    return path


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(command: Sequence[str]) -> str:
    """What the command printed."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise CompileError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr
