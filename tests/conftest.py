"""Every test starts from the same seed, on one thread per process, with poisoned allocations."""

import gc
import re
import zlib
from collections.abc import Iterator

import pytest
import torch

import reformer_kernels as rk
from reformer_kernels.backends import cpu


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slice", metavar="K/N", help="the K-th of N parts of the tests; K may be larger than N")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test is in the same part as long as its name is the same."""
    given = config.getoption("slice")
    if given is None:
        return
    numbers = re.fullmatch(r"(\d+)/([1-9]\d*)", given)
    if numbers is None:
        raise pytest.UsageError(f"--slice must be K/N with N from 1, got {given}")
    part, parts = map(int, numbers.groups())
    kept: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        (kept if zlib.crc32(item.nodeid.encode()) % parts == part % parts else others).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=others)


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.freeze()  # the modules' objects remain: to go through them at each collection takes a tenth of the time


@pytest.fixture(autouse=True)
def _clean_state() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # pytest-xdist runs a process per core
    # torch.empty gives NaN (and the largest integers), so an element that a kernel forgets to write shows.
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    rk.use_backend(None)


@pytest.fixture(params=cpu.build_info().get("isa", []))
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of the library in turn."""
    try:
        forced = cpu.use_isa(request.param)
    except RuntimeError:
        pytest.skip(f"this processor does not run {request.param}")
    with forced:
        yield request.param
