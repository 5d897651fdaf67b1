"""The PTX emulator: what it computes, what it reports, what it refuses; and mutations of it, which must be noticed."""

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from . import build, checks
from .kernels import CSRC, needs_nvcc
from .ptx.kernel import MACHINE_SOURCES, SCHEDULES, EmulationError, Kernel, VirtualRegion, machine

PLANTED = Path(__file__).parent / "planted"
LOG2_E = 1.4426950408889634


@pytest.mark.parametrize("check", checks.ALL, ids=lambda check: check.__name__)
def test_instructions(check: Callable[[ModuleType], None]) -> None:
    check(machine())


@pytest.mark.parametrize("line", [
    "frobnicate.b32 %r1, %r2;", "ld.local.u32 %r1, [%rd1];", "call foo;", "add.u32.unknown %r1, %r2, %r3;",
    "griddepcontrol.wait;", "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%f0}, {%r1}, {%r2}, {%f0};",
])  # fmt: skip
def test_what_is_not_known_is_refused(line: str) -> None:
    with pytest.raises(EmulationError, match="refused") as error:
        Kernel(checks.snippets.kernel_text(line))
    assert error.value.kind == "refused"


def test_virtual_memory_beyond_2_to_the_31_elements() -> None:
    region = VirtualRegion(2**45, 2**36, fill=b"\x07\0\0\0")
    text = checks.snippets.kernel_text("add.u64 %rd1, %rd90, 34359738368; ld.global.u32 %r1, [%rd1]; "
                                       "add.u32 %r1, %r1, %r0; st.global.u32 [%rd1+128], %r1;")  # fmt: skip
    Kernel(text).launch((1, 1, 1), 1, [region], [region])
    assert region.read(2**35 + 128, np.uint32, 1)[0] == 7
    assert region.touched_bytes < 2**20


# ---- planted mistakes


class Problem:
    """A batch of sequences whose positions are sorted by bucket, and chunk attention to them in float64."""

    def __init__(self, batch: int = 2, length: int = 512) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batch, self.length = batch, length
        self.buckets = torch.randint(0, 64, (batch, length), dtype=torch.int32, generator=generator)
        self.sorted_buckets, order = torch.sort(self.buckets, dim=1, stable=True)
        self.order = order.int()
        self.qk, self.v = (torch.randn(batch, length, 64, generator=generator).bfloat16() for _ in range(2))
        self.scale = 0.125

    def expected(self) -> torch.Tensor:
        def rows(x: torch.Tensor) -> torch.Tensor:
            index = self.order.long()[..., None].expand(-1, -1, x.shape[-1])
            return x.double().gather(1, index).view(self.batch, -1, 64, x.shape[-1])

        def with_before(x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, x.roll(1, 1)], 2)

        q, v = rows(self.qk), with_before(rows(self.v))
        k = with_before(q * torch.rsqrt((q * q).sum(-1, keepdim=True) + 1e-6))
        positions, buckets = (x.view(self.batch, -1, 64) for x in (self.order, self.sorted_buckets))
        k_positions, k_buckets = with_before(positions), with_before(buckets)
        scores = q @ k.mT * self.scale
        other = (buckets[..., None] != k_buckets[:, :, None]) | (positions[..., None] < k_positions[:, :, None])
        scores = scores.masked_fill(other, -1e9 / LOG2_E)
        scores = scores.masked_fill(positions[..., None] == k_positions[:, :, None], -1e5 / LOG2_E)
        return (scores.softmax(-1) @ v).view(self.batch, self.length, 64)


def bits(x: torch.Tensor) -> np.ndarray:
    return x.contiguous().view(torch.int16).numpy() if x.dtype == torch.bfloat16 else x.contiguous().numpy()


def sorts_rightly(problem: Problem, bug: int, **schedule: object) -> bool:
    kernel = Kernel(build.ptx(PLANTED / "counting_sort.cu", defines={"BUG": bug}, include_dirs=[CSRC]))
    order, found = (np.full((problem.batch, problem.length), -1, np.int32) for _ in range(2))
    arrays = [problem.buckets.numpy(), order, found]
    pointers = b"".join(a.ctypes.data.to_bytes(8, "little") for a in arrays)
    params = pointers + np.array([problem.length, 0], np.int32).tobytes()
    kernel.launch((problem.batch, 1, 1), 256, params, arrays, **schedule)
    return np.array_equal(order, problem.order.numpy()) and np.array_equal(found, problem.sorted_buckets.numpy())


def attends_rightly(problem: Problem, bug: int, **schedule: object) -> bool:
    kernel = Kernel(build.ptx(PLANTED / "chunk_attention.cu", defines={"BUG": bug}, include_dirs=[CSRC]))
    out = np.full((problem.batch, problem.length, 64), 0x7FFF, np.int16)
    lse = np.full((problem.batch, problem.length), np.nan, np.float32)
    inputs = [bits(x) for x in (problem.qk, problem.v, problem.order, problem.sorted_buckets)]
    pointers = b"".join(a.ctypes.data.to_bytes(8, "little") for a in [*inputs, out, lse])
    numbers = np.array([problem.length, problem.length // 64], np.int32).tobytes()
    scale = np.array([problem.scale * LOG2_E, 0], np.float32).tobytes()
    shared = 2 * 128 * 128 + 3 * 128 * 4
    kernel.launch((problem.length // 64, problem.batch, 1), 128, pointers + numbers + scale, [*inputs, out, lse],
                  shared, **schedule)  # fmt: skip
    result = torch.from_numpy(out).view(torch.bfloat16).double()
    # A probability and the result are each rounded to bfloat16, 2^-9, of values below 5.
    return bool((result - problem.expected()).abs().max() <= 2 * 5 * 2**-9)


@pytest.mark.full
@needs_nvcc()
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_planted_kernels_without_a_mistake(schedule: dict[str, object]) -> None:
    problem = Problem()
    assert sorts_rightly(problem, 0, **schedule) and attends_rightly(problem, 0, **schedule)


@pytest.mark.full
@needs_nvcc()
@pytest.mark.parametrize("bug", range(1, 16))
def test_planted_mistakes(bug: int) -> None:
    """Each is reported or gives a wrong result on some schedule, but for the 15th, which only TSan sees (test_host)."""
    problem = Problem()
    run = sorts_rightly if bug in (6, 7, 8) else attends_rightly

    def passes(schedule: dict[str, object]) -> bool:
        try:
            return run(problem, bug, **schedule)
        except EmulationError:
            return False

    assert all(map(passes, SCHEDULES)) == (bug == 15)


@pytest.mark.full
@needs_nvcc()
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_product_by_a_warpgroup(schedule: dict[str, object]) -> None:
    kernel = Kernel(build.ptx(PLANTED / "warpgroup.cu", "sm_90a", include_dirs=[CSRC]))
    a, b = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    arrays = [x.view(torch.int16).numpy() for x in (a, b)]
    out = np.zeros((64, 64), np.float32)
    kernel.launch(
        (1, 1, 1), 128, struct.pack("PPP", *(x.ctypes.data for x in (*arrays, out))), [*arrays, out], **schedule
    )
    exact = a.double() @ b.double().T
    # The products of halves are exact; each of 64 additions rounds.
    assert ((torch.from_numpy(out) - exact).abs() <= 64 * 2**-24 * (a.double().abs() @ b.double().abs().T)).all()


# ---- mutations of the emulator: (file, text, what it becomes)

MUTATIONS = [
    ("collectives.cpp", "return from >= last;", "return true;"),
    ("global_memory.cpp", "if (id == 0 || id == self) return;", "return;"),
    ("global_memory.cpp", "region.size - (address - region.base) >= static_cast<uint64_t>(bytes)", "bytes > 0"),
    ("shared_memory.cpp", "if (!granule.in_flight) return;", "return;"),
    (
        "shared_memory.cpp",
        "if (granule.writer >= 0 && !clocks_.ordered(",
        "if (granule.writer >= 1000 && !clocks_.ordered(",
    ),
    ("shared_memory.cpp", "if ((address & (bytes - 1)) != 0) refuse", "if ((address & (bytes - 1)) > 99) refuse"),
    (
        "shared_memory.cpp",
        "if (check_uninitialised_ && !granule.initialised)",
        "if (check_uninitialised_ && granule.writer > 1000)",
    ),
    ("fragments.h", "{lane / 4 + i % 2 * 8, i / 2 * 4", "{lane % 8 + i % 2 * 8, i / 2 * 4"),
    ("fragments.h", "lane % 4 * kPerRegister + part, lane / 4}", "lane % 4 * kPerRegister + part, lane % 8}"),
    ("fragments.h", "{lane / 4 + i / 2 % 2 * 8, i / 4 * 8", "{lane / 4 + i % 2 * 8, i / 4 * 8"),
    ("copies.cpp", "if (!c.machine.early_copies) move_bytes", "if (false) move_bytes"),
    ("copies.cpp", "std::memset(to + copy.source_bytes, 0, copy.bytes - copy.source_bytes);", ""),
]


def mutated(folder: Path, file: str, text: str, becomes: str) -> ModuleType:
    shutil.copytree(MACHINE_SOURCES, folder, dirs_exist_ok=True)
    source = (folder / file).read_text()
    assert source.count(text) >= 1, f"{file} has no {text!r}"
    (folder / file).write_text(source.replace(text, becomes, 1))
    return machine(folder)


@pytest.mark.full
@pytest.mark.parametrize(("file", "text", "becomes"), MUTATIONS)
def test_a_mutation_of_the_emulator_is_noticed(tmp_path: Path, file: str, text: str, becomes: str) -> None:
    assert not survives(mutated(tmp_path, file, text, becomes))


def test_the_emulator_itself_passes_all_checks() -> None:
    assert survives(machine())


def survives(mutant: ModuleType) -> bool:
    for check in checks.ALL:
        try:
            check(mutant)
        except Exception:  # an assertion, or an error that should not be
            return False
    return True
