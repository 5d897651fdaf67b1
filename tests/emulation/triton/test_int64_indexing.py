"""Triton kernels on tensors of more than 2^31 elements, which exist only where they are touched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reformer_kernels import testing
from reformer_kernels._dispatch import BACKENDS

from ...ptx_emulator import VirtualRegion
from ..attention import Attention
from ..cases import Hash
from ..emulator import ARCHITECTURES, as_array
from ..lists import Lists
from ..select import MANY, Select
from .kernels import EmulatedTriton, needs_triton

pytestmark = [needs_triton(), pytest.mark.full]

BASE = 2**44
STRIDES = (2**32 + 64, 2**31 + 128, 2**27 + 192)  # elements


class FarRows(EmulatedTriton):
    """All rows lie far apart, in nothing."""

    strides: tuple[int, int, int] = STRIDES

    def launch(self, kernel: Any, programs: int, device: torch.device, args: tuple[Any, ...], options: Any) -> None:
        self._regions: dict[int, tuple[Tensor, VirtualRegion]] = {}
        super().launch(kernel, programs, device, tuple(map(self._apart, args)), options)
        for x, region in self._regions.values():
            for offset, row in self._rows(x):
                row[:] = region.read(offset, np.uint8, row.nbytes).view(row.dtype)

    def _apart(self, argument: Any) -> Any:
        if not hasattr(argument, "stride_l"):
            return argument._replace(rows=self._apart(argument.rows)) if hasattr(argument, "rows") and isinstance(
                argument.rows, tuple) else argument  # fmt: skip
        x = argument.data
        size = x.element_size() * (sum(s * n for s, n in zip(self.strides, x.shape, strict=False)) + x.shape[3])
        region = VirtualRegion(BASE + len(self._regions) * 2**40, size)
        for offset, row in self._rows(x):
            region.write(offset, row)
        self._regions.setdefault(x.data_ptr(), (x, region))
        return argument._replace(stride_b=self.strides[0], stride_h=self.strides[1], stride_l=self.strides[2])

    def _rows(self, x: Tensor) -> Any:
        """Offsets in bytes, and rows, of a tensor [B, H, L, D]."""
        for index in np.ndindex(*x.shape[:3]):
            yield x.element_size() * sum(i * s for i, s in zip(index, self.strides, strict=True)), as_array(x[index])

    def place(self, x: Tensor) -> tuple[int, np.ndarray | VirtualRegion]:
        if x.data_ptr() in self._regions:
            region = self._regions[x.data_ptr()][1]
            return region.base, region
        return super().place(x)


@pytest.mark.parametrize(
    "case",
    [
        Attention(40, 32, batch=2, heads=2, chunk_length=16, causal=True),
        Attention(40, 32, torch.float32, batch=2, heads=2, key_heads=1, causal=True),
        Lists(40, 32, batch=2, heads=2, causal=True, grouping="hash"),
    ],
    ids=str,
)
def test_attention_of_rows_that_are_far_apart(case: Attention | Lists) -> None:
    """The same bits as of rows that lie together."""
    assert torch.equal(case.check(FarRows()), case.check(EmulatedTriton()))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hash_of_rows_that_are_far_apart(architecture: str) -> None:
    Hash(40, 64, batch=2, heads=2).check(FarRows(architecture))


# Of many keys, which are chosen in two steps, the heads are far from each other.
@pytest.mark.parametrize(("keys", "strides"), [(40, STRIDES), (MANY, (2**34, 2**32, 64))])
def test_keys_of_rows_that_are_far_apart(keys: int, strides: tuple[int, int, int]) -> None:
    """The same choice as of rows that lie together."""
    case = Select(40, 16, heads=2, key_heads=2, chunk_length=40, keys=keys)
    machine = FarRows()
    machine.strides = strides
    assert torch.equal(case.check(machine), case.check(EmulatedTriton()))


class LastHead(EmulatedTriton):
    """Runs the last head's programs alone; of large tensors the last bytes are there."""

    programs_of_head = 2
    kept = 2**16  # bytes

    def launch(self, kernel: Any, programs: int, device: torch.device, args: tuple[Any, ...], options: Any) -> None:
        self._large: list[tuple[Tensor, VirtualRegion]] = []
        self.schedule = {"blocks": list(range(programs - self.programs_of_head, programs))}
        super().launch(kernel, programs, device, args, options)
        for x, region in self._large:
            size = x.untyped_storage().nbytes()
            last = torch.from_numpy(region.read(size - self.kept, np.uint8, self.kept).copy())
            _bytes(x)[-self.kept :] = last

    def place(self, x: Tensor) -> tuple[int, np.ndarray | VirtualRegion]:
        size = x.untyped_storage().nbytes()
        if size < 2**28:
            return super().place(x)
        region = VirtualRegion(BASE + len(self._large) * 2**40, size)
        region.write(size - self.kept, _bytes(x)[-self.kept :].numpy())
        self._large.append((x, region))
        return region.base, region


def _bytes(x: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_of_more_than_2_to_the_31_tokens(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of 2^24 + 1 heads, which share their rows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # or all memory is touched
    heads, length = 2**24 + 1, 128
    call = testing.convert(Attention(length, 32, rounds=1, causal=True).call(), torch.bfloat16)
    backend = BACKENDS["triton"]
    with EmulatedTriton(architecture).serving():
        expected = backend.chunk_attention(call)
    assert call.order is not None
    order = torch.empty(1, heads, 1, length, dtype=torch.int32)  # memory that nothing touches does not exist
    order[:, -1] = call.order[:, 0]
    wide = call._replace(
        query=call.query.expand(1, heads, -1, -1), value=call.value.expand(1, heads, -1, -1), order=order, buckets=None
    )
    machine = LastHead(architecture)
    with machine.serving():
        from reformer_kernels.backends.triton import attention

        lse = torch.empty(1, heads, length)
        self_only = torch.empty(1, heads, length, dtype=torch.bool)
        out = torch.empty_like(expected[0])
        attention.forward(attention.window_problem(wide), wide, length, self_only, out.expand(1, heads, -1, -1), lse)
    assert torch.equal(out, expected[0]) and torch.equal(lse[:, -1:], expected[1])
    assert torch.equal(self_only[:, -1:], expected[2])
