"""What the machine computes, reports and refuses; and mutations of it, which must be noticed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from ..kernel import MACHINE_SOURCES, EmulationError, Kernel, VirtualRegion, machine
from . import checks


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
    (folder / file).write_text(source.replace(text, becomes))
    return machine(folder)


def test_texts_of_mutations_are_there_once() -> None:
    assert [text for file, text, _ in MUTATIONS if (MACHINE_SOURCES / file).read_text().count(text) != 1] == []


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
