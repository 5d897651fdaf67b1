"""The emulator stands on its own, and its README is right."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..testing import needs_nvcc

PACKAGE = Path(__file__).parents[1]
NAME = __name__.rpartition(".tests.")[0]
README = (PACKAGE / "README.md").read_text()


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports, as absolute names."""
    package = [*NAME.split("."), *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            yield ".".join([*above, *filter(None, [node.module])])


def test_it_imports_nothing_of_this_repository() -> None:
    found = {(path.name, name) for path in PACKAGE.rglob("*.py") for name in imported(path)}
    assert ("test_planted.py", f"{NAME}.kernel") in found
    others = [x for x in found if x[1].partition(".")[0] in ("tests", "benchmarks", "reformer_kernels")]
    assert [x for x in others if not f"{x[1]}.".startswith(f"{NAME}.")] == []


def test_its_sources_include_nothing_from_elsewhere() -> None:
    sources = [path for path in PACKAGE.rglob("*.*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")]
    included = [(path, name) for path in sources for name in re.findall(r'#include "([^"]+)"', path.read_text())]
    assert included and all((path.parent / name).is_file() for path, name in included)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


@needs_nvcc()
@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_the_examples_of_the_readme(number: int) -> None:
    """What each prints is in the block that follows it."""
    said = subprocess.run(
        [sys.executable, "-c", blocks("python")[number]], capture_output=True, text=True, cwd=PACKAGE.parents[1]
    )
    assert (said.stdout, said.stderr) == (blocks("text")[number], "")
