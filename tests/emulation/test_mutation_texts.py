"""Every text that a mutation replaces is in its file once, which takes no compiler to see."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from reformer_kernels.backends import triton as backend

from .build import CSRC
from .cuda import mutations as cuda
from .host import mutations as host
from .mutation import Mutation
from .triton import mutations as triton

KERNELS = CSRC / "kernels" / "cuda"
FOLDERS: dict[str, tuple[Path, list[Mutation]]] = {
    "cuda": (KERNELS, cuda.MUTATIONS),
    "host": (KERNELS, [*host.MUTATIONS, host.LITTLE_ROOM]),
    "triton": (Path(backend.__file__).parent, triton.MUTATIONS),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_texts_are_there_once(kind: str) -> None:
    folder, mutations = FOLDERS[kind]
    sources = {file: (folder / file).read_text() for file in {mutation.file for mutation in mutations}}
    counts = {str(x): sources[x.file].count(x.text) for x in mutations}
    assert {name: count for name, count in counts.items() if count != 1} == {}


@pytest.mark.parametrize("mutations", [cuda, triton], ids=["cuda", "triton"])
def test_problems_are_there(mutations: ModuleType) -> None:
    assert {mutation.problem for mutation in mutations.MUTATIONS} <= mutations.PROBLEMS.keys()
