"""For tests with pytest of kernels that are emulated."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import pytest

from .build import nvcc
from .kernel import SCHEDULES, EmulationError, Schedule


def needs_nvcc() -> pytest.MarkDecorator:
    """Skips tests where there is no nvcc; in CI they fail instead."""
    missing = nvcc() is None and os.environ.get("CI") != "true"
    return pytest.mark.skipif(missing, reason="needs nvcc")


def failure(check: Callable[[Schedule], object], schedules: Iterable[Schedule] = SCHEDULES) -> str | None:
    """How a check fails on the first schedule where it does: the kind of an EmulationError, or "wrong" if it asserts.

    None: it fails on none.
    """
    for schedule in schedules:
        try:
            check(schedule)
        except AssertionError:
            return "wrong"
        except EmulationError as error:
            return error.kind
    return None
