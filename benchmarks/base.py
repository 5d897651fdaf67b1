"""Another revision beside this one: built in a git worktree, measured by processes with this revision's benchmarks."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .machine import ROOT, git
from .timing import Timer


def resolve(rev: str) -> str:
    """The commit of a revision.

    Raises:
        RuntimeError: there is no such commit.
    """
    return git("rev-parse", "--verify", f"{rev}^{{commit}}")


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A built checkout of the commit, with the benchmarks of this one, until the ``with`` block ends.

    Raises:
        RuntimeError: it does not build.
    """
    with tempfile.TemporaryDirectory(prefix="rk-base-") as folder:
        tree = Path(folder, "tree")
        git("worktree", "add", "--detach", str(tree), commit)
        try:
            shutil.rmtree(tree / "benchmarks", ignore_errors=True)
            shutil.copytree(ROOT / "benchmarks", tree / "benchmarks")
            _build(tree)
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def _build(tree: Path) -> None:
    # Without a GPU its kernels would only take time to compile.
    environment = dict(os.environ) if torch.cuda.is_available() else {**os.environ, "CUDA_HOME": "/nonexistent"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    ran = subprocess.run(command, cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if ran.returncode:
        raise RuntimeError(f"the base does not build:\n{ran.stdout.decode()[-2000:]}")


class Worker:
    """A process that times specs with the library of a checkout."""

    def __init__(self, root: Path) -> None:
        command = [sys.executable, "-m", "benchmarks.worker"]
        self._process = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        package = Path(self._answer()["package"]).resolve()
        if package.parent != root.resolve():
            raise RuntimeError(f"the process in {root} imported the library from {package}")

    def timer(self, spec: Mapping[str, Any], threads: int) -> Timer:
        """A timer that runs there. It replaces the worker's previous one."""
        self._ask({"build": spec, "threads": threads})
        return lambda: self._ask({"run": True})

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a measuring process ended with exit code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer


class Pair:
    """Two processes of the same kind, one with this checkout's library and one with the base's."""

    def __init__(self, base_tree: Path) -> None:
        self.base_tree = base_tree
        self._workers = {"now": Worker(ROOT), "base": Worker(base_tree)}

    def timers(self, spec: Mapping[str, Any]) -> dict[str, Timer]:
        return {name: w.timer(spec, torch.get_num_threads()) for name, w in self._workers.items()}

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()
