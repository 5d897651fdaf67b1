"""What .ci/run chooses to run, what pre-commit runs, and that slices of the tests are all of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from . import conftest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / ".ci" / "run"
DAY = 24 * 3600
ALL, SLICE = "test-kernels", "test-kernels SLICE="


class Repository:
    """One with .ci/run, where ``make`` only notes its arguments."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now = folder, 10**9
        (folder / ".ci").mkdir(parents=True)
        shutil.copy(SCRIPT, folder / ".ci" / "run")
        tools = folder / ".git" / "tools"
        self.git("init", "--quiet", "--initial-branch=main")
        tools.mkdir()
        (tools / "make").write_text(f'#!/bin/sh\necho "$@" >> {tools}/log\n')
        (tools / "make").chmod(0o755)

    def git(self, *arguments: str) -> str:
        date = f"{self.now} +0000"
        names = {f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        environment = os.environ | names | {"GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date}
        command = ["git", "-C", str(self.folder), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()

    def commit(self, path: str, later: int = 0) -> None:
        self.now += later
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(str(self.now) + path)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", path)

    def run(self, *arguments: str) -> list[str]:
        """What was made."""
        tools = self.folder / ".git" / "tools"
        (tools / "log").unlink(missing_ok=True)
        environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}
        subprocess.run([self.folder / ".ci" / "run", *arguments], check=True, env=environment)
        return (tools / "log").read_text().splitlines()


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    if shutil.which("git") is None:
        pytest.skip("needs git")
    repository = Repository(tmp_path / "repository")
    repository.commit("csrc/kernels/cuda/hash.cu")
    repository.commit("README.md", later=2 * DAY)
    return repository


def test_a_part_where_no_kernel_changed(repository: Repository) -> None:
    made = repository.run()
    assert made[:3] == ["lint", "sanitize ARGS=60", "test"] and made[3].startswith(SLICE) and len(made) == 4
    part, parts = map(int, made[3].removeprefix(SLICE).split("/"))
    assert parts > 1
    repository.commit("csrc/kernels/cpu/hash.cpp")
    other = repository.run()[3]
    assert other.startswith(SLICE) and other != f"{SLICE}{part}/{parts}"


@pytest.mark.parametrize(
    "path",
    [
        "csrc/kernels/plan.h",
        "reformer_kernels/backends/triton/hash.py",
        "tests/emulation/cases.py",
        "tests/ptx_emulator/kernel.py",
    ],
)
def test_all_where_kernels_changed(repository: Repository, path: str) -> None:
    """By one of the commits of a day."""
    repository.commit(path)
    repository.commit("README.md", later=DAY // 2)
    assert repository.run()[3:] == [ALL]
    assert repository.run("HEAD~2")[3:] == [ALL]
    assert repository.run("HEAD~1")[3].startswith(SLICE)


@pytest.mark.parametrize(("path", "expected"), [("tests/emulation/build.py", ALL), ("README.md", SLICE)])
def test_a_merge_is_compared_with_its_first_parent(repository: Repository, path: str, expected: str) -> None:
    repository.commit("csrc/kernels/cuda/order.cu")
    repository.git("checkout", "--quiet", "-b", "other", "HEAD~1")
    repository.commit(path, later=1)
    repository.git("checkout", "--quiet", "main")
    repository.git("merge", "--quiet", "--no-edit", "other")
    assert repository.run()[3].startswith(expected)


def test_a_part_where_the_history_is_cut_off(repository: Repository, tmp_path: Path) -> None:
    repository.commit("csrc/kernels/cuda/order.cu", later=DAY)
    shallow = Repository(tmp_path / "shallow")
    shallow.git("fetch", "--quiet", "--depth", "1", f"file://{repository.folder}", "main")
    shallow.git("checkout", "--quiet", "--force", "FETCH_HEAD")
    assert shallow.run()[3].startswith(SLICE)


def test_slices_are_all_tests_each_once() -> None:
    items: list[Any] = [SimpleNamespace(nodeid=f"tests/test_x.py::test[{i}]") for i in range(200)]

    def part(of: str) -> list[Any]:
        chosen, left = items.copy(), []
        hook = SimpleNamespace(pytest_deselected=lambda items: left.extend(items))
        option: Callable[[str], str] = lambda name: of  # noqa: E731
        conftest.pytest_collection_modifyitems(SimpleNamespace(getoption=option, hook=hook), chosen)  # type: ignore[arg-type]
        assert len(chosen) + len(left) == len(items)
        return chosen

    parts = [part(f"{k}/4") for k in range(1, 5)]
    assert sorted(item.nodeid for chosen in parts for item in chosen) == sorted(item.nodeid for item in items)
    assert all(25 < len(chosen) < 75 for chosen in parts)
    assert part("11/4") == parts[2]
    for wrong in ("3", "1/0", "a/4"):
        with pytest.raises(pytest.UsageError, match=f"--slice must be K/N with N from 1, got {wrong}"):
            part(wrong)


def test_pre_commit_runs_what_make_lint_does() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of make test
    command = ["make", "--no-print-directory", "-n", "-o", "build", "lint"]
    ran = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, env=environment)
    *commands, last = ran.stdout.splitlines()
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    *entries, clang_format = re.findall(r"^ *entry: (.+)$", text, re.MULTILINE)
    assert entries == commands
    files = last.removeprefix(f"{clang_format} ").split()
    pattern = re.findall(r"^ *files: (.+)$", text, re.MULTILINE)[-1]
    paths = (path.relative_to(ROOT).as_posix() for folder in ("csrc", "tests") for path in (ROOT / folder).rglob("*"))
    assert files and sorted(files) == sorted(path for path in paths if re.search(pattern, path))
