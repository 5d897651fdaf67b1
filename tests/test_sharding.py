"""Our functions on DTensors: what each rank computes, put together, is what one device computes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore

import reformer_kernels as rk

B, H, L, D = 3, 4, 40, 8  # a batch that two ranks cannot halve
LSH: dict[str, Any] = {"chunk_length": 8, "n_hashes": 2}
SHARED_ROWS = ("lsh", "shifted keys", "buckets", "one window", "rotations", "packed")


def whole(x: Tensor, mesh: DeviceMesh) -> DTensor:
    return DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)


def everything() -> dict[str, Any]:
    """Functions of query, key, value [B, H, L, D] and a padding mask; key and value may have fewer heads."""
    mask = torch.randn(1, H, L, L, dtype=torch.float64)
    rotations = rk.random_rotations(1, H, D, 2, 4)
    bounds = torch.tensor([0, 11, L], dtype=torch.int32)
    clustered: dict[str, Any] = {"budget": 8, "chunk_length": 8}

    def like(x: Tensor, y: Tensor) -> Tensor:
        return whole(y, x.device_mesh) if isinstance(x, DTensor) else y

    return {
        "lsh": lambda q, k, v, pad: rk.lsh_attention(q, v, causal=True, key_padding_mask=pad, **LSH),
        "shifted keys": lambda q, k, v, pad: rk.lsh_attention(
            q, v, causal=True, key_padding_mask=pad, shift_keys=True, **LSH
        ),
        "buckets": lambda q, k, v, pad: rk.lsh_attention(q, v, return_buckets=True, **LSH),
        "one window": lambda q, k, v, pad: rk.lsh_attention(q, v, return_buckets=True, chunk_length=64),
        "rotations": lambda q, k, v, pad: rk.lsh_attention(q, v, n_buckets=4, rotations=like(q, rotations), **LSH),
        "packed": lambda q, k, v, pad: rk.lsh_attention(q, v, n_buckets=4, cu_seqlens=bounds, **LSH),
        "local": lambda q, k, v, pad: rk.local_attention(q, k, v, key_padding_mask=pad, chunk_length=8),
        "mask": lambda q, k, v, pad: rk.local_attention(q, k, v, attn_mask=like(q, mask), chunk_length=8),
        "clustered": lambda q, k, v, pad: rk.clustered_attention(q, k, v, key_padding_mask=pad, **clustered),
        "hash": lambda q, k, v, pad: rk.clustered_attention(q, k, v, grouping="hash", **clustered),
        "sdpa": lambda q, k, v, pad: rk.scaled_dot_product_attention(
            q, k, v, key_padding_mask=pad, enable_gqa=True, **clustered
        ),
    }


def check_everything(mesh: DeviceMesh) -> None:
    """The same on every rank of a mesh: run by one process here, and by two in test_convert."""
    torch.manual_seed(5)
    pad = torch.arange(L) >= torch.tensor([[L], [9], [30]])
    pad[:, 3] = True
    functions = everything()
    for key_heads in (H, 1):
        x = [torch.randn(B, h, L, D, dtype=torch.float64) for h in (H, key_heads, key_heads)]
        for placement in (Shard(0), Shard(1), Shard(2), Replicate()):
            by_heads = placement == Shard(1)
            for name, function in functions.items():
                if name in SHARED_ROWS and key_heads != H:
                    continue
                plain = [y.clone().requires_grad_() for y in x]
                sharded = [
                    distribute_tensor(y, mesh, [Replicate() if by_heads and y.shape[1] == 1 else placement]) for y in x
                ]
                for y in sharded:
                    y.requires_grad_()
                expected = function(*plain, pad)
                out = function(*sharded, whole(pad, mesh))
                if isinstance(out, tuple):
                    assert torch.equal(out[1].full_tensor(), expected[1])
                    out, expected = out[0], expected[0]
                alone = by_heads and key_heads == 1 and mesh.size() > 1  # one head of keys serves all ranks
                gathered = placement == Shard(2) and name != "shifted keys"  # there a torch.where comes last
                kept = [Replicate() if gathered or alone else placement]
                assert list(out.placements) == kept, (name, placement)
                assert out.shape == expected.shape and out.stride() == expected.stride()
                assert torch.equal(out.full_tensor(), expected), (name, placement)
                wanted = torch.autograd.grad(expected.square().sum(), plain, allow_unused=True)
                gradients: Any = torch.autograd.grad(out.square().sum(), sharded, allow_unused=True)
                for a, b in zip(gradients, wanted, strict=True):
                    assert a is None if b is None else torch.equal(a.full_tensor(), b), (name, placement)


def check_dropout(mesh: DeviceMesh) -> None:
    """Every shard drops something else, and the same again; the gradient drops what the output did."""
    x = torch.ones(2, 2, L, D, dtype=torch.float64)
    seed = torch.tensor([3])
    for placement in (Shard(0), Shard(1)):
        sharded = distribute_tensor(x, mesh, [placement]).requires_grad_()
        dropping: dict[str, Any] = {"dropout_p": 0.5, "dropout_seed": seed}
        outs: list[Any] = [rk.local_attention(sharded, sharded, sharded, **dropping) for _ in range(2)]
        parts = outs[0].full_tensor().chunk(mesh.size(), placement.dim)
        assert torch.equal(outs[1].full_tensor(), outs[0].full_tensor())
        if mesh.size() > 1:
            assert not torch.equal(*parts)
            first = rk.local_attention(*[parts[0].new_ones(parts[0].shape)] * 3, **dropping)
            assert torch.equal(parts[0], first)
        value = distribute_tensor(torch.zeros_like(x), mesh, [placement]).requires_grad_()
        rk.local_attention(sharded, sharded, value, **dropping).sum().backward()
        # The weights that were kept, summed over queries, and over the keys of values that are one.
        assert isinstance(value.grad, DTensor)
        torch.testing.assert_close(value.grad.full_tensor().sum(2), outs[0].full_tensor().sum(2))


@pytest.fixture(params=[1, 2])
def mesh(request: pytest.FixtureRequest) -> Iterator[DeviceMesh]:
    """Ranks whose messages go nowhere: what one of them computes is right if it needs none."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield init_device_mesh("cpu", (request.param,))
    dist.destroy_process_group()


def test_without_messages(mesh: DeviceMesh) -> None:
    if mesh.size() == 1:
        check_everything(mesh)
        check_dropout(mesh)
        return
    torch.manual_seed(5)
    x = [torch.randn(B, h, L, D, dtype=torch.float64) for h in (H, 2, 2)]
    pad = torch.arange(L).expand(B, L) > 30
    for placement in (Shard(0), Shard(1)):
        sharded = [
            DTensor.from_local(
                y.chunk(2, placement.dim)[0], mesh, [placement], run_check=False, shape=y.shape, stride=y.stride()
            ).requires_grad_()
            for y in x
        ]
        for name, function in everything().items():
            q, k, v = (sharded[0],) * 3 if name in SHARED_ROWS else sharded
            mask = whole(pad, mesh)
            with CommDebugMode() as messages:
                out = function(q, k, v, mask)
                out = out[0] if isinstance(out, tuple) else out
                out.to_local().square().sum().backward()
            assert out.placements == (placement,) and out.shape == (B, H, L, D)
            assert messages.get_total_counts() == 0, (name, messages.get_comm_counts())


def test_errors(mesh: DeviceMesh) -> None:
    x = whole(torch.randn(1, H, L, D), mesh)
    plain = torch.zeros(1, L, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"key_padding_mask must be a DTensor, .* by distribute_tensor, .*local_map"):
        rk.local_attention(x, x, x, key_padding_mask=plain)
    with pytest.raises(TypeError, match="query must be a DTensor"):
        rk.local_attention(x.to_local(), x, x)


def test_compiled(mesh: DeviceMesh) -> None:
    torch._dynamo.reset()
    x = DTensor.from_local(torch.randn(1, 2, L, D), mesh, [Shard(1)], run_check=False).requires_grad_()

    def step(x: Tensor) -> Any:
        return rk.lsh_attention(x, x, **LSH) + rk.clustered_attention(x, x, x, budget=8)

    out = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
    if mesh.size() == 1:
        assert torch.equal(out.to_local(), step(x).to_local())
        gradients: list[Any] = [torch.autograd.grad(y.square().sum(), x)[0] for y in (out, step(x))]
        torch.testing.assert_close(*(gradient.to_local() for gradient in gradients))


def test_two_mesh_dimensions() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=4)
    mesh = init_device_mesh("cpu", (2, 2))
    x = torch.randn(2, H, L, D, dtype=torch.float64)
    part = x[1:, H // 2 :]
    rotations = rk.random_rotations(0, H, D, 2, 10)
    sharded = DTensor.from_local(part, mesh, [Shard(0), Shard(1)], run_check=False)
    out = rk.lsh_attention(sharded, sharded, **LSH)  # hashes by the rotations of its own heads
    assert torch.equal(out.to_local(), rk.lsh_attention(part, part, rotations=rotations[:, H // 2 :], **LSH))
    dropping: dict[str, Any] = {"dropout_p": 0.5, "dropout_seed": torch.tensor([1])}
    outs: dict[str, Any] = {}
    for placements in ([Shard(0), Shard(1)], [Shard(1), Replicate()], [Replicate(), Replicate()]):
        y = DTensor.from_local(part, mesh, placements, run_check=False)
        outs[str(placements)] = rk.local_attention(y, y, y, **dropping)
    plain = rk.local_attention(part, part, part, **dropping)
    same = [torch.equal(y.to_local(), plain) for y in outs.values()]
    assert same == [False, False, True]  # shards 3 and 1 of their own
    dist.destroy_process_group()
