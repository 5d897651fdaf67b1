"""Kernels on tensors of more than 2^31 elements, which exist only where they are touched."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

import reformer_kernels as rk
from reformer_kernels import testing
from reformer_kernels.backends import _native, cuda

from ...kernel_oracles import assert_hashes, stable_order
from ...ptx_emulator import VirtualRegion
from ...ptx_emulator.testing import needs_nvcc
from ..attention import Attention
from ..emulator import as_array, on_each_architecture, read_only
from ..select import MANY, Select
from .kernels import DEVICES, EmulatedCuda, arguments_of, host, memory_of

pytestmark = needs_nvcc()

BASE = 2**44


@on_each_architecture
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
    machine = EmulatedCuda(architecture)
    host().hash_buckets(far, "bfloat16", rotations.numpy(), None, list(factors), buckets, machine.device)
    machine.run("hash", [region, read_only(rotations.numpy()), buckets])
    assert_hashes(torch.from_numpy(buckets), x, rotations, factors)


@on_each_architecture
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
    machine = EmulatedCuda(architecture, {"blocks": [0, blocks - 1]}, device=device)
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


@on_each_architecture
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
    EmulatedCuda(architecture, {"blocks": [0, rows - 1]}, device=device).run("order", [buckets, order])
    for row, numbers in zip((0, rows - 1), ends, strict=True):
        found = torch.from_numpy(order.read(4 * row * length, np.int32, length))
        assert torch.equal(found, stable_order(numbers[None, None, None]).flatten())
    assert order.touched_bytes < 2**22


def spread(x: torch.Tensor, base: int, strides: tuple[int, ...], writeable: bool = False) -> _Far:
    """x [B, H, L, D] with rows that are that many elements apart; where nothing else is."""
    size = x.element_size()
    region = VirtualRegion(base, size * sum(s * n for s, n in zip(strides, x.shape, strict=False)))
    if not writeable:
        for index in np.ndindex(*x.shape[:3]):
            region.write(size * sum(i * s for i, s in zip(index, strides, strict=True)), as_array(x[index]))
    region.writeable = writeable
    kind = {2: "<u2", 4: "<f4"}[size]
    return _Far(region, array_at(base, kind, tuple(x.shape), [*(size * s for s in strides), size]))


def gathered(far: _Far, like: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """What was written there, as a tensor."""
    size, numbers = like.element_size(), like.shape[3]
    found = torch.empty(like.shape, dtype=like.dtype)
    for index in np.ndindex(*like.shape[:3]):
        row = far.region.read(size * sum(i * s for i, s in zip(index, strides, strict=True)), np.uint8, size * numbers)
        found[index] = torch.from_numpy(row.copy()).view(like.dtype)
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_of_rows_that_are_2_to_the_31_elements_apart(dtype: torch.dtype) -> None:
    """The same bits as of rows that lie together."""
    strides = (2**36 + 64, 2**34 + 128, 2**31 + 192)
    call = testing.convert(Attention(70, 32, batch=2, heads=2, chunk_length=16, causal=True).call(), dtype)
    machine = EmulatedCuda()
    grad_out = torch.randn(call.value.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    with machine.serving():
        results = cuda.chunk_attention(call)
        expected = results[0], *cuda.chunk_attention_backward(call, grad_out, *results)[::2]
        arguments = cuda.chunk_arguments(call)
    names = ("query", "value", "grad_out", "out", "grad_query", "grad_value")
    tensors = call.query, call.value, grad_out, *expected
    far = {
        name: spread(x, BASE << i, strides, writeable=i > 2)
        for i, (name, x) in enumerate(zip(names, tensors, strict=True))
    }
    residuals = {"lse": torch.empty_like(results[1]), "self_only": torch.empty_like(results[2])}
    given = arguments_of(arguments | residuals)
    given |= {name: x.array for name, x in far.items()}
    others = memory_of(*(x for name, x in arguments.items() if name not in far))
    for backward in (False, True):
        scratch = np.zeros(host().attention_scratch(given, backward), np.uint8)
        host().attention(given, backward, arguments["longest"], scratch, machine.device)
        memory = [*others, *(x.region for x in far.values()), given["lse"], given["self_only"], scratch]
        machine.run("attention", memory)
    for name, x in zip(names[3:], expected, strict=True):
        assert torch.equal(gathered(far[name], x, strides), x), name


# Of many keys, which are chosen in two steps, the heads are far from each other.
@pytest.mark.parametrize(
    ("keys", "strides"), [(70, (2**36 + 64, 2**34 + 128, 2**31 + 192)), (MANY, (2**34, 2**32, 64))]
)
def test_keys_of_rows_that_are_2_to_the_31_elements_apart(keys: int, strides: tuple[int, ...]) -> None:
    """The same choice as of rows that lie together."""
    call = Select(70, 32, batch=2, heads=2, key_heads=2, chunk_length=40, keys=keys).call()
    machine = EmulatedCuda()
    with machine.serving():
        expected = cuda.select_keys(call)
    far = {"query": spread(call.query, BASE, strides), "key": spread(call.key, BASE << 6, strides)}
    key_indices = torch.full_like(expected, -9)
    given = arguments_of(_native.select_arguments(call) | {"lists": key_indices})
    given |= {name: x.array for name, x in far.items()}
    scratch = np.zeros(host().select_scratch(given), np.uint8)
    host().select_keys(given, scratch)
    machine.run("select", [*(x.region for x in far.values()), given["windows"], given["lists"], scratch])
    assert torch.equal(key_indices, expected)


@on_each_architecture
def test_attention_of_more_than_2_to_the_31_tokens(architecture: str) -> None:
    """The first and the last of 2^24 + 1 heads, which share their rows."""
    heads, length, head_dim = 2**24 + 1, 128, 32
    call = testing.convert(Attention(length, head_dim, rounds=1, heads=2, causal=True).call(), torch.bfloat16)
    call = call._replace(
        query=call.query[:, :1].expand(call.query.shape), value=call.value[:, :1].expand(call.value.shape)
    )
    machine = EmulatedCuda(architecture)
    with machine.serving():
        expected = cuda.chunk_attention(call)
        arguments = cuda.chunk_arguments(call)
    shapes = {"order": ("<i4", 4), "out": ("<u2", 2 * head_dim), "lse": ("<f4", 4), "self_only": ("|b1", 1)}
    regions = {
        name: VirtualRegion(BASE << i, heads * length * size) for i, (name, (_, size)) in enumerate(shapes.items())
    }
    assert call.order is not None
    for head, at in ((0, 0), (1, heads - 1)):
        regions["order"].write(4 * at * length, call.order[0, head, 0].numpy())
    regions["order"].writeable = False
    wide = {
        name: x.expand(1, heads, length, head_dim)
        for name, x in (("query", call.query[:, :1]), ("value", call.value[:, :1]))
    }
    given = arguments_of(arguments) | {name: as_array(x[:, :1]) for name, x in wide.items()}
    for name, x in wide.items():
        given[name] = np.broadcast_to(given[name], x.shape)
    dims = {"order": (1, heads, 1, length), "out": (1, heads, length, head_dim)}
    for name, (kind, _) in shapes.items():
        given[name] = array_at(regions[name].base, kind, dims.get(name, (1, heads, length)))
    host().attention(given, False, arguments["longest"], np.zeros(0, np.uint8), machine.device)
    machine = EmulatedCuda(architecture, {"blocks": [0, heads - 1]})
    machine.run("attention", [*memory_of(call.query, call.value), *regions.values()])
    for head, at in ((0, 0), (1, heads - 1)):
        row = regions["out"].read(2 * head_dim * at * length, np.int16, head_dim * length)
        assert torch.equal(torch.from_numpy(row.copy()).view(torch.bfloat16).view(length, -1), expected[0][0, head])
        lse = regions["lse"].read(4 * at * length, np.float32, length)
        assert torch.equal(torch.from_numpy(lse.copy()), expected[1][0, head])


@dataclass(frozen=True)
class _Far:
    region: VirtualRegion
    array: np.ndarray


class _Array:
    def __init__(self, interface: dict[str, object]) -> None:
        self.__array_interface__ = interface


def array_at(address: int, typestr: str, shape: tuple[int, ...], strides: list[int] | None = None) -> np.ndarray:
    """What numpy takes for an array at an address where nothing is."""
    strides = strides or [int(np.prod(shape[i + 1 :])) * int(typestr[2]) for i in range(len(shape))]
    array: dict[str, object] = {"version": 3, "typestr": typestr, "data": (address, False)}
    return np.asarray(_Array(array | {"shape": tuple(shape), "strides": tuple(strides)}))
