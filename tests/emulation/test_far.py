"""Kernels on tensors of more than 2^31 elements, which exist only where they are touched."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import reformer_kernels as rk

from ..kernel_oracles import assert_hashes, stable_order
from .kernels import ARCHITECTURES, DEVICES, Emulator, host, needs_nvcc, read_only
from .ptx.kernel import VirtualRegion

pytestmark = needs_nvcc()

BASE = 2**44


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hash_of_rows_that_are_2_to_the_31_elements_apart(architecture: str) -> None:
    """Strides are as wide as addresses: two batch elements, two heads and all rows lie gigabytes apart."""
    length, head_dim, factors = 40, 64, (32, 16)
    x = torch.randn(2, 2, length, head_dim, generator=torch.Generator().manual_seed(0)).bfloat16()
    strides = (2**34 + 64, 2**33 + 128, 2**31 + 192)  # elements
    region = VirtualRegion(BASE, 2 * (sum(s * n for s, n in zip(strides, (2, 2, length), strict=True))))
    for index in np.ndindex(2, 2, length):
        offset = 2 * sum(i * s for i, s in zip(index, strides, strict=True))
        region.write(offset, x[index].view(torch.int16).numpy())
    region.writeable = False
    far = array_at(BASE, "<u2", x.shape, [*(2 * s for s in strides), 2])
    rotations = rk.random_rotations(1, 2, head_dim, 2, factors)
    buckets = np.full((2, 2, 2, length), -9, np.int32)
    machine = Emulator(architecture)
    host().hash_buckets(far, "bfloat16", rotations.numpy(), None, list(factors), buckets, machine.device)
    machine.run("hash", [region, read_only(rotations.numpy()), buckets])
    assert_hashes(torch.from_numpy(buckets), x, rotations, factors)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hash_into_more_than_2_to_the_31_buckets(architecture: str) -> None:
    """The first and the last block of 16,400 heads, which share rows and rotations."""
    heads, rounds, length, head_dim, factors = 16400, 512, 256, 64, (6, 10)
    x = torch.randn(1, 1, length, head_dim, generator=torch.Generator().manual_seed(0))
    rotations = rk.random_rotations(1, 1, head_dim, rounds, factors)
    shape = (1, heads, rounds, length)
    region = VirtualRegion(BASE, 4 * int(np.prod(shape)), fill=np.int32(-9).tobytes())
    device = DEVICES["H100"]
    plan = host().hash_plan([1, heads, length, head_dim], rounds, "float32", list(factors), device)
    blocks = heads * -(-rounds // plan["rounds"])
    machine = Emulator(architecture, {"blocks": [0, blocks - 1]}, device)
    wide = x.expand(1, heads, length, head_dim)
    host().hash_buckets(
        wide.numpy(), "float32", rotations.numpy(), None, list(factors), array_at(BASE, "<i4", shape), device
    )
    machine.run("hash", [read_only(x.numpy()), read_only(rotations.numpy()), region])
    last = rounds - rounds % plan["rounds"] if rounds % plan["rounds"] else rounds - plan["rounds"]
    for head, first in ((0, 0), (heads - 1, last)):
        part = rotations[:, :, :, first : first + plan["rounds"]]
        found = region.read(4 * (head * rounds + first) * length, np.int32, part.shape[3] * length)
        assert_hashes(torch.from_numpy(found.reshape(1, 1, -1, length)), x, part, factors)
    assert region.touched_bytes < 2**22


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_order_of_more_than_2_to_the_31_buckets(architecture: str) -> None:
    """The first and the last block of 2^20 + 1 sequences."""
    rows, length, n_buckets = 2**20 + 1, 2048, 9
    shape, device = (1, rows, 1, length), DEVICES["H100"]
    size = 4 * rows * length
    buckets, order = VirtualRegion(BASE, size), VirtualRegion(2 * BASE, size, fill=np.int32(-9).tobytes())
    ends = torch.randint(0, n_buckets, (2, length), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    for row, numbers in zip((0, rows - 1), ends, strict=True):
        buckets.write(4 * row * length, numbers.numpy())
    buckets.writeable = False
    arrays = array_at(BASE, "<i4", shape), array_at(2 * BASE, "<i4", shape)
    host().bucket_order(arrays[0], None, length, n_buckets, arrays[1], None, None, device)
    Emulator(architecture, {"blocks": [0, rows - 1]}, device).run("order", [buckets, order])
    for row, numbers in zip((0, rows - 1), ends, strict=True):
        found = torch.from_numpy(order.read(4 * row * length, np.int32, length))
        assert torch.equal(found, stable_order(numbers[None, None, None]).flatten())
    assert order.touched_bytes < 2**22


class _Array:
    def __init__(self, interface: dict[str, object]) -> None:
        self.__array_interface__ = interface


def array_at(address: int, typestr: str, shape: tuple[int, ...], strides: list[int] | None = None) -> np.ndarray:
    """What numpy takes for an array at an address where nothing is."""
    strides = strides or [int(np.prod(shape[i + 1 :])) * int(typestr[2]) for i in range(len(shape))]
    array: dict[str, object] = {"version": 3, "typestr": typestr, "data": (address, False)}
    return np.asarray(_Array(array | {"shape": tuple(shape), "strides": tuple(strides)}))
