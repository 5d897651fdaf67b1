"""What the Triton kernels compute on a GPU; everything here needs one, and ``make gpu-check`` runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import reformer_kernels as rk
from reformer_kernels import testing
from reformer_kernels.backends import triton

from .emulation import attention, select
from .emulation.lists import Lists
from .emulation.triton_cases import CHOSEN, LISTS, SELECTIONS, WIDE
from .kernel_oracles import assert_best, assert_hashes, stable_order
from .test_cuda import on_gpu

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("dtype", attention.DTYPES)
@pytest.mark.parametrize("head_dim", [20, 64, 200])
@pytest.mark.parametrize("factors", [(64,), (6, 10, 4), (512,)])
def test_hash(dtype: torch.dtype, head_dim: int, factors: tuple[int, ...]) -> None:
    x = torch.randn(2, 1500, 3, head_dim, device="cuda").to(dtype).transpose(1, 2)
    padding = torch.rand(2, 1500, device="cuda") < 0.3
    rotations = rk.random_rotations(1, 3, head_dim, 3, factors).cuda()
    buckets = torch.ops.reformer_kernels.hash_buckets(x, rotations, padding, None, list(factors), 3, 64, "triton")
    assert_hashes(buckets, x, rotations, factors, padding)


@pytest.mark.parametrize("n_buckets", [1, 65, 1025, 2**27])
@pytest.mark.parametrize("length", [1, 5000, 200000])
def test_order(length: int, n_buckets: int) -> None:
    buckets = torch.randint(0, n_buckets, (2, 1, 3, length), dtype=torch.int32, device="cuda")
    buckets[:, :, 0, length // 3 :] = n_buckets - 1  # one bucket has most
    order = torch.ops.reformer_kernels.bucket_order(buckets, None, n_buckets, "triton")
    assert torch.equal(order.cpu(), stable_order(buckets))


@pytest.mark.parametrize("case", [*CHOSEN, *LISTS, *WIDE], ids=str)
def test_attention(case: attention.Attention | Lists) -> None:
    testing.assert_matches_oracle(on_gpu(case.call()), case.dtype, "triton")


@pytest.mark.parametrize("pair", [("triton", "cuda"), ("cuda", "triton")])
@pytest.mark.parametrize("case", [CHOSEN[0], LISTS[4]], ids=str)
def test_residuals_of_either_pass_serve_the_other_backend(
    case: attention.Attention | Lists, pair: tuple[str, str]
) -> None:
    testing.assert_matches_oracle(on_gpu(case.call()), case.dtype, *pair)


@pytest.mark.parametrize("case", SELECTIONS, ids=str)
def test_choice_of_keys(case: select.Select) -> None:
    call = case.call()
    lists = triton.select_keys(on_gpu(call))
    assert_best(call, lists.cpu())
    assert torch.equal(lists, triton.select_keys(on_gpu(call)))


@pytest.mark.parametrize("dtype", attention.DTYPES)
@pytest.mark.parametrize(("head_dim", "chunk_length"), [(64, 64), (128, 256), (32, 100)])
def test_many_blocks_repeat_to_the_bit(head_dim: int, chunk_length: int, dtype: torch.dtype) -> None:
    case = attention.Attention(4096, head_dim, dtype, heads=4, causal=True, chunk_length=chunk_length, n_buckets=64)
    call = on_gpu(case.call())
    first = testing.assert_matches_oracle(call, dtype, "triton")
    again = testing.assert_matches_oracle(call, dtype, "triton")
    assert all(torch.equal(x, again[name]) for name, x in first.items())


FUNCTIONS: list[Callable[[Tensor], Tensor]] = [
    lambda x: rk.lsh_attention(x, x, causal=True, backend="triton"),
    lambda x: rk.clustered_attention(x, x, x, causal=True, backend="triton"),
]


@pytest.mark.parametrize("run", FUNCTIONS, ids=["lsh_attention", "clustered_attention"])
def test_in_a_cuda_graph(run: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(1, 2, 3000, 64, device="cuda").bfloat16()
    run(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, run(x))


@pytest.mark.parametrize("run", FUNCTIONS, ids=["lsh_attention", "clustered_attention"])
def test_compiled(run: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(1, 2, 1000, 64, device="cuda", requires_grad=True)
    outcomes: list[Any] = []
    for function in (run, torch.compile(run, fullgraph=True)):
        out = function(x)
        outcomes.append((out, torch.autograd.grad(out.square().sum(), x)[0]))
    for eager, compiled in zip(*outcomes, strict=True):
        torch.testing.assert_close(compiled, eager)
