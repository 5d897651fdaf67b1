"""The Triton kernels, emulated, against float64 or exact oracles."""

from __future__ import annotations

import subprocess
import sys
from itertools import cycle
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import reformer_kernels as rk
from reformer_kernels import testing
from reformer_kernels._calls import HashCall, OrderCall
from reformer_kernels._dispatch import BACKENDS
from reformer_kernels.backends import triton as backend

from ...ptx_emulator import SCHEDULES, Schedule
from ...ptx_emulator.testing import needs_nvcc
from .. import attention, lists, select
from ..attention import BUCKET, PAPER, Attention
from ..cases import Case, assert_all_the_same
from ..cuda.kernels import EmulatedCuda
from ..emulator import ARCHITECTURES
from ..random_cases import Random
from .budgets import resources
from .cases import OF_EACH_KERNEL, OTHERS, QUICK, SAMPLED
from .kernels import EmulatedTriton, kernel_names, needs_triton

pytestmark = needs_triton()


def check(architecture: str, case: Case, schedules: tuple[Schedule, ...] = SCHEDULES) -> None:
    results = [case.check(EmulatedTriton(architecture, schedule)) for schedule in schedules]
    assert_all_the_same(results)


@pytest.mark.parametrize(("case", "schedule"), list(zip(QUICK, cycle(SCHEDULES))), ids=str)
def test_on_one_schedule(case: Case, schedule: Schedule) -> None:
    case.check(EmulatedTriton("sm_90", schedule))


def test_every_kernel_is_run() -> None:
    machine = EmulatedTriton()
    for case in OF_EACH_KERNEL:
        case.check(machine)
    assert {launch.name for launch in machine.launched} == kernel_names()


# Compiling takes seconds for each, so every other case is of another architecture.
@pytest.mark.full
@pytest.mark.parametrize(("case", "architecture"), list(zip([*SAMPLED, *OTHERS], cycle(ARCHITECTURES))), ids=str)
def test_on_every_schedule(case: Case, architecture: str) -> None:
    check(architecture, case)


# Not with dropout: copies of a NaN may differ in bits, which the emulator takes for a race.
@pytest.mark.parametrize("case", [x for x in attention.UNSEEN if not x.dropout], ids=str)
def test_nothing_comes_of_padding(case: Attention) -> None:
    case.check_padding_is_unseen(EmulatedTriton())


@pytest.mark.full
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["hash", "order", "attention", "lists", "select"])
def test_random_problems(kind: str, seed: int) -> None:
    check(ARCHITECTURES[seed % 2], getattr(Random(seed), kind)())


CROSSED = [
    Attention(100, 48, causal=True, dropout=0.3, chunk_length=24),
    Attention(100, 48, torch.float32, padded=0.3, chunk_length=24),
    Attention(100, 32, torch.float32, rules=PAPER, n_buckets=4, chunk_length=24),
    Attention(100, 32, torch.float16, chunk_length=24, **BUCKET),
    Attention(100, 32, key_heads=1, heads=2, after=1, chunk_length=24, bounds=(0, 30, 100)),
    Attention(100, 32, torch.float32, chunk_length=4, before=0, causal=True),  # self_only queries
    lists.Lists(100, 32, torch.float32, causal=True, grouping="hash", heads=2, key_heads=1),
]


@pytest.mark.full
@needs_nvcc()
@pytest.mark.parametrize("other", ["cpu", "cuda", "reference"])
@pytest.mark.parametrize("case", CROSSED, ids=str)
def test_residuals_of_either_pass_serve_another_backend(case: Attention | lists.Lists, other: str) -> None:
    call = case.call()
    with EmulatedTriton().serving(), EmulatedCuda().serving():
        for pair in (("triton", other), (other, "triton")):
            testing.assert_matches_oracle(call, case.dtype, *pair)


class AheadOfTime(EmulatedTriton):
    """Also compiles all that it launches for another architecture."""

    binaries = True

    def __init__(self, other: str) -> None:
        super().__init__()
        self.other = other
        self.made: dict[str, bytes] = {}

    def launch(self, kernel: Any, programs: int, device: torch.device, args: tuple[Any, ...], options: Any) -> None:
        compiled = self.compile(kernel, args, options, self.other)
        self.made[kernel.__name__] = compiled.asm["hsaco" if self.other.startswith("gfx") else "cubin"]
        super().launch(kernel, programs, device, args, options)


@pytest.mark.full
@pytest.mark.parametrize("architecture", ["sm_100", "gfx942"])
def test_compiles_for_architectures_that_are_not_emulated(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if architecture.startswith("gfx"):
        monkeypatch.setattr(torch.version, "hip", "7")
    machine = AheadOfTime(architecture)
    for case in OF_EACH_KERNEL:
        case.check(machine)
    kernels = kernel_names()
    assert set(machine.made) == kernels and all(machine.made.values())
    if architecture == "sm_100":
        assert {name: resources(x).spilled_bytes for name, x in machine.made.items()} == dict.fromkeys(kernels, 0)


class NoWaiting(TorchDispatchMode):
    """A number of a tensor is not to be asked for: of one on a GPU the host would wait."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "case", [Attention(50, 32, rules=PAPER, dropout=0.1), lists.Lists(50, 32, causal=True, grouping="hash")], ids=str
)
def test_the_host_waits_for_nothing(case: Attention | lists.Lists) -> None:
    call = testing.convert(case.call(), case.dtype)
    results = getattr(BACKENDS["reference"], call.op)(call)
    with EmulatedTriton().serving(), NoWaiting():
        getattr(backend, call.op)(call)
        getattr(backend, f"{call.op}_backward")(call, results[0], *results)
    choice = select.Select(50, 32, causal=True).call()
    keys = torch.zeros(1, 1, 1, 50, dtype=torch.int32)
    rotations = torch.ones(1, 1, 32, 1, 2)
    with EmulatedTriton().serving(), NoWaiting():
        backend.select_keys(choice)
        backend.bucket_order(OrderCall(keys, None, 4, "triton"))
        backend.hash_buckets(HashCall(choice.query, rotations, None, None, [4], 1, 4, "triton"))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_function_from_end_to_end(compiled: bool) -> None:
    x = torch.randn(1, 2, 150, 64, requires_grad=True)
    options: dict[str, Any] = {"causal": True, "n_buckets": 4, "n_hashes": 2}
    function = torch.compile(rk.lsh_attention, fullgraph=True, backend="aot_eager") if compiled else rk.lsh_attention
    with EmulatedTriton().serving():
        out = function(x, x, backend="triton", **options)
        grad = torch.autograd.grad(out.square().sum(), x)[0]
    expected = rk.lsh_attention(x, x, **options)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.square().sum(), x)[0])


def test_without_triton() -> None:
    program = """
import sys
import torch
sys.modules["triton"] = None
import reformer_kernels
from reformer_kernels.backends import triton
assert not any(name.startswith("reformer_kernels.backends.triton.") for name in sys.modules)
print(triton.missing())
"""
    said = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert "triton cannot be imported" in said
