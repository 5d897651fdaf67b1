"""Running cases on the emulated CUDA kernels, and the problem that only these have."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from ...ptx_emulator import Schedule
from ..cases import Case
from ..emulator import Emulator, Launched
from .kernels import DEVICES, SOURCES, Device, EmulatedCuda, Recorder, entries


@dataclass(frozen=True)
class Gather:
    row_bytes: int = 1040
    device: str = "H100"

    def check(self, emulator: Emulator) -> None:
        assert isinstance(emulator, EmulatedCuda)
        generator = np.random.default_rng(0)
        rows = generator.integers(0, 255, (50, self.row_bytes), np.uint8)
        index = generator.integers(-3, 60, 77).astype(np.int32)
        index[:4] = -1, 0, 49, 50
        inside = (index >= 0) & (index < 50)
        expected = np.where(inside[:, None], rows[np.where(inside, index, 0)], 0)
        assert np.array_equal(emulator.gather_rows(rows, index), expected)


def emulator(architecture: str, schedule: Schedule, case: Case) -> EmulatedCuda:
    return EmulatedCuda(architecture, schedule, device=DEVICES[case.device])


def launches_of_all(
    source: str, cases: Iterable[Case], architecture: str, device: Device | None = None
) -> list[Launched]:
    """What cases launch, which are all kernels of a source; none is run.

    Args:
        device: of the plans. None: that of each case.

    Raises:
        AssertionError: some kernel is launched by no case.
    """
    recorder, rest = Recorder(architecture), iter(cases)
    while missing := entries(SOURCES[source], architecture) - {x.name for x in recorder.launched}:
        case = next(rest, None)
        assert case, f"no case launches {missing}"
        recorder.device = device or DEVICES[case.device]
        with suppress(AssertionError):  # of results, which are zeros
            case.check(recorder)
    return recorder.launched
