"""Functions, modules and models through dispatch and the cuda backend, on emulated kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reformer_kernels as rk

from ...ptx_emulator.testing import needs_nvcc
from .kernels import EmulatedCuda

pytestmark = needs_nvcc()

L, E = 150, 64
Run = Callable[[torch.dtype], list[Tensor]]


def assert_like_the_reference(run: Run) -> None:
    """Results on emulated kernels are as near to float64 ones as the reference's in the same dtype are."""
    with rk.use_backend("reference"):
        exact, expected = run(torch.float64), run(torch.float32)
    with EmulatedCuda().serving(), rk.use_backend("cuda"):
        actual = run(torch.float32)
    for a, e, x in zip(actual, expected, exact, strict=True):
        # Sums in another order: a rounding for each of as many terms as the largest sum has.
        allowed = 2 * (e - x).abs().max() + torch.finfo(torch.float32).eps * x.abs().max() * L**0.5
        assert (a - x).abs().max() <= allowed


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor, **options: Any) -> Run:
    def run(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.float().to(dtype).requires_grad_() for x in inputs]
        out = function(*leaves, **options)
        grads = torch.autograd.grad(out, leaves, random(*out.shape, seed=9).float().to(dtype))
        return [x.detach().double() for x in (out, *grads)]

    return run


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"rules": rk.AttentionRules.paper(), "alignment": "bucket", "n_buckets": 4},
        {"cu_seqlens": torch.tensor([0, 50, L], dtype=torch.int32)},
        {"dropout_p": 0.2, "dropout_seed": torch.tensor([7])},
    ],
    ids=str,
)
def test_lsh_attention(options: dict[str, Any]) -> None:
    buckets = torch.arange(2 * 2 * L, dtype=torch.int32).mul(7).remainder(4).view(1, 2, 2, L)
    options = {"n_buckets": 4, "buckets": buckets, "n_hashes": 2, **options}
    assert_like_the_reference(
        with_gradients(rk.lsh_attention, random(1, 2, L, 32), random(1, 2, L, 32, seed=1), **options)
    )


def test_local_attention() -> None:
    rows = [random(1, heads, L, 32, seed=heads) for heads in (4, 2, 2)]
    assert_like_the_reference(with_gradients(rk.local_attention, *rows, causal=True, chunk_length=32))


@pytest.mark.parametrize(
    "options", [{"causal": True}, {"grouping": "hash", "dropout_p": 0.2, "dropout_seed": torch.tensor([7])}], ids=str
)
def test_clustered_attention(options: dict[str, Any]) -> None:
    """Keys are chosen by kernels, too."""
    rows = [random(1, heads, L, 32, seed=heads) for heads in (4, 2, 2)]
    options = {"budget": 40, "chunk_length": 16, **options}
    assert_like_the_reference(with_gradients(rk.clustered_attention, *rows, **options))


def test_multihead_attention() -> None:
    """A stack that was written for nn.MultiheadAttention, over other keys, some of which are padding."""
    torch.manual_seed(0)
    attention = rk.LSHMultiheadAttention(E, 2, batch_first=True, budget=40)
    padded = torch.arange(L) >= L - 20

    def run(dtype: torch.dtype) -> list[Tensor]:
        own = attention.to(dtype)
        query, other = (random(1, n, E, seed=n).float().to(dtype) for n in (60, L))
        out, _ = own(query, other, other, key_padding_mask=padded[None], need_weights=False)
        grads = torch.autograd.grad(out.square().sum(), list(own.parameters()))
        return [x.detach().double() for x in (out, *grads)]

    assert_like_the_reference(run)


class Model(nn.Module):
    """Reversible layers of both kinds of attention, whose queries are hashed by the kernels, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        options: dict[str, Any] = {
            "vocab_size": 30, "embed_dim": E, "num_layers": 2, "num_heads": 2, "attention": ("lsh", "local"),
            "n_hashes": 2, "n_buckets": 4, "max_length": 256, "lsh_chunk_length": 32, "local_chunk_length": 32,
        }  # fmt: skip
        self.lm = rk.ReformerLM(rk.ReformerConfig(**options))


def test_a_model() -> None:
    model = Model().lm.train()
    ids = torch.randint(30, (1, L), generator=torch.Generator().manual_seed(1))

    def run(dtype: torch.dtype) -> list[Tensor]:
        own = model.to(dtype)
        torch.manual_seed(2)
        loss = own(ids, labels=ids).loss
        return [x.double() for x in (loss.detach(), *torch.autograd.grad(loss, list(own.parameters())))]

    assert_like_the_reference(run)


def test_a_module_in_half_precision() -> None:
    """Rows of heads that lie in one projection, without a copy."""
    torch.manual_seed(0)
    attention = rk.LSHSelfAttention(E, 2, causal=True, hash_seed=0, n_buckets=4, chunk_length=32).bfloat16().eval()
    x = random(2, L, E).bfloat16()
    with torch.no_grad():
        expected = attention(x)
        with EmulatedCuda().serving(), rk.use_backend("cuda"):
            actual = attention(x)
    assert (actual - expected).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * expected.abs().max()


def test_a_named_backend_says_why_it_refuses() -> None:
    q = random(1, 1, L, 32)
    with EmulatedCuda().serving(), pytest.raises(NotImplementedError, match="the dtype is float64"):
        rk.lsh_attention(q, q, backend="cuda")
