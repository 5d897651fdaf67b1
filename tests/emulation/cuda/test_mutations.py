"""Mutations of the CUDA kernels: each must be reported or give a wrong result on some schedule of the emulator."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ...ptx_emulator.testing import failure, needs_nvcc
from ..build import CSRC
from ..mutation import Mutation
from .kernels import DEVICES, EmulatedCuda
from .mutations import MUTATIONS, PROBLEMS

pytestmark = [needs_nvcc(), pytest.mark.full]

# An instance that is asked for is compiled like one that a launcher takes, but nvcc has less to do.
INSTANCE = "template __global__ void rk::cuda::{}(const __grid_constant__ rk::cuda::{}Arguments);\n"
# Of each source with templates: the first words of their names, and the headers that have them.
TEMPLATES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "hash": (("hash",), ("hash",)),
    "order": (("order",), ("order",)),
    "attention": (("attention",), ("attention_forward", "attention_backward")),
    "lists": (("list", "rest"), ("lists",)),
    "select": (("select",), ("select_take",)),
}


def copy_of_csrc(folder: Path, instances: tuple[str, ...]) -> Path:
    """Sources of the kernels, where those of a template have only these instances."""
    shutil.copytree(CSRC, folder)
    for name, (words, headers) in TEMPLATES.items():
        arguments = name.capitalize().removesuffix("s")
        lines = [f'#include "kernels/cuda/{header}.cuh"\n' for header in headers]
        lines += [INSTANCE.format(i, arguments) for i in instances if i.startswith(words)]
        (folder / "kernels" / "cuda" / f"{name}.cu").write_text("".join(lines))
    return folder


def failure_of(problem: str, csrc: Path) -> str | None:
    case = PROBLEMS[problem][1]
    return failure(lambda schedule: case.check(EmulatedCuda("sm_90", schedule, device=DEVICES[case.device], csrc=csrc)))


@pytest.mark.parametrize("problem", PROBLEMS)
def test_without_a_mutation(tmp_path: Path, problem: str) -> None:
    assert failure_of(problem, copy_of_csrc(tmp_path / "csrc", PROBLEMS[problem][0])) is None


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_mutation_is_noticed(tmp_path: Path, mutation: Mutation) -> None:
    csrc = copy_of_csrc(tmp_path / "csrc", PROBLEMS[mutation.problem][0])
    mutation.apply(csrc / "kernels" / "cuda")
    assert failure_of(mutation.problem, csrc) == mutation.shown_as, "not noticed, or not as what it is"
