"""Every test starts from the same seed, on one thread per process, with poisoned allocations."""

from collections.abc import Iterator

import pytest
import torch

import reformer_kernels as rk
from reformer_kernels.backends import native


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


@pytest.fixture(params=native.build_info().get("isa", []))
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of the library in turn."""
    try:
        forced = native.use_isa(request.param)
    except RuntimeError:
        pytest.skip(f"this processor does not run {request.param}")
    with forced:
        yield request.param
