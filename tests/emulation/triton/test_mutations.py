"""Mutations of the Triton kernels: each must be reported or give a wrong result on some schedule of the emulator."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from reformer_kernels import backends
from reformer_kernels.backends import triton

from ...ptx_emulator.testing import failure
from ..mutation import Mutation
from .kernels import EmulatedTriton, needs_triton
from .mutations import MUTATIONS, PROBLEMS

pytestmark = [needs_triton(), pytest.mark.full]

SOURCES = Path(triton.__file__).parent


def failure_of(problem: str, package: str = triton.__name__) -> str | None:
    return failure(lambda schedule: PROBLEMS[problem].check(EmulatedTriton("sm_80", schedule, package=package)))


@pytest.fixture
def mutated(tmp_path: Path) -> Iterator[Callable[[Mutation], str]]:
    """Makes a package of kernels with a mutation, beside the real one."""
    name = f"triton_{abs(hash(tmp_path))}"
    backends.__path__.append(str(tmp_path))

    def make(mutation: Mutation) -> str:
        shutil.copytree(SOURCES, tmp_path / name)
        mutation.apply(tmp_path / name)
        return f"{backends.__name__}.{name}"

    yield make
    backends.__path__.remove(str(tmp_path))


@pytest.mark.parametrize("problem", PROBLEMS)
def test_without_a_mutation(problem: str) -> None:
    assert failure_of(problem) is None


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_mutation_is_noticed(mutation: Mutation, mutated: Callable[[Mutation], str]) -> None:
    assert failure_of(mutation.problem, mutated(mutation)), "not noticed"
