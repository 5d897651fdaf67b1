"""``python -m tests.wheels``: tries wheels in new environments with nothing but torch, and no compiler on PATH.

Needs no torch itself. An environment is made once for each version of torch and keeps it; wheels come and go in it.
"""

import argparse
import os
import re
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CHECK = Path(__file__).with_name("wheel_check.py")


def run(*command: str | Path, **options: Any) -> None:
    print("$", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True, **options)


def environment(folder: Path, torch: str, index: list[str]) -> Path:
    """The Python of an environment that holds a version of torch, and what it needs."""
    python = folder / f"torch-{torch}" / "bin" / "python"
    if not python.exists():
        venv.create(python.parents[1], with_pip=True)
    run(python, "-m", "pip", "install", "--quiet", f"torch=={torch}", *index)
    return python


def check(python: Path, wheel: Path) -> None:
    """Installs a wheel and runs wheel_check.py with it: outside of the checkout, and without a compiler."""
    run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "reformer_kernels")
    run(python, "-m", "pip", "install", "--quiet", "--only-binary", ":all:", wheel)
    bin_ = python.parent
    # The environment's own programs, of which none is a compiler; no PYTHONPATH.
    variables = {"PATH": str(bin_), "HOME": str(bin_.parent), "OMP_NUM_THREADS": "2"}
    has_cuda = bool(re.search(r"\+cu\d", wheel.name))
    run(python, "-W", "error", "-I", CHECK, "cuda" if has_cuda else "cpu", env=variables, cwd=bin_.parent)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.wheels", description=__doc__.partition("\n")[0])
    parser.add_argument("wheels", nargs="*", type=Path, help="default: those in dist/")
    parser.add_argument("--torch", action="append", metavar="VERSION", help="may be given again (2.14.1)")
    parser.add_argument("--index-url", metavar="URL", help="where torch comes from; default: pip's own index")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "wheel-test", help="of the environments")
    arguments = parser.parse_args()
    wheels = arguments.wheels or sorted((ROOT / "dist").glob("*.whl"))
    if not wheels:
        sys.exit("no wheels in dist/: run make wheel")
    os.environ.pop("PYTHONPATH", None)  # pip would count what lies there as installed
    index = ["--index-url", arguments.index_url] if arguments.index_url else []
    versions = arguments.torch or ["2.14.1"]
    for torch in versions:
        python = environment(arguments.folder, torch, index)
        for wheel in wheels:
            check(python, wheel.resolve())
    print(f"passed: {', '.join(wheel.name for wheel in wheels)} with torch {', '.join(versions)}")


if __name__ == "__main__":
    main()
