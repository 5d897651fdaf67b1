"""What the Triton kernels compute on a GPU; everything here needs one, and ``make gpu-check`` runs it."""

from __future__ import annotations

import pytest
import torch

import reformer_kernels as rk
from reformer_kernels import testing
from reformer_kernels.backends import triton

from .emulation import attention, select
from .emulation.lists import Lists
from .emulation.triton.cases import CHOSEN, LISTS, SELECTIONS, WIDE
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
    key_indices = triton.select_keys(on_gpu(call))
    assert_best(call, key_indices.cpu())
    assert torch.equal(key_indices, triton.select_keys(on_gpu(call)))
