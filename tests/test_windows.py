"""Windows as data: strict causality of bucket alignment, packed sequences, context keys, reuse of buckets, dropout."""

from itertools import pairwise
from typing import Any

import pytest
import torch

import reformer_kernels as rk
from reformer_kernels.backends.philox import philox

BACKENDS = ["cpu", "reference"]


def qv(length: int, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 2, length, 16), torch.randn(batch, 2, length, 16)


@pytest.mark.parametrize("rules", [rk.AttentionRules(), rk.AttentionRules.paper()], ids=["default", "paper"])
@pytest.mark.parametrize("length", [10, 200, 333])
@pytest.mark.parametrize("shift_keys", [False, True])
def test_bucket_alignment_is_strictly_causal(shift_keys: bool, length: int, rules: rk.AttentionRules) -> None:
    q, v = qv(length)
    options: dict[str, Any] = {
        "causal": True,
        "alignment": "bucket",
        "n_buckets": 6,
        "chunk_length": 16,
        "rules": rules,
        "shift_keys": shift_keys,
    }
    for threads in (1, 3):
        torch.set_num_threads(threads)
        out = rk.lsh_attention(q, v, backend="cpu", **options)
        for cut in (1, length // 3, length - 1):
            other_q, other_v = q.clone(), v.clone()
            other_q[:, :, cut:], other_v[:, :, cut:] = 50 * torch.randn(2, 1, 2, length - cut, 16)
            changed = rk.lsh_attention(other_q, other_v, backend="cpu", **options)
            assert torch.equal(changed[:, :, :cut], out[:, :, :cut])
            assert not torch.equal(changed[:, :, cut:], out[:, :, cut:])


def test_ring_alignment_is_not() -> None:
    """Why the other alignment exists: in the published windows a later token moves the borders of the chunks."""
    q, v = qv(200)
    other = q.clone()
    other[:, :, -1] = torch.randn(16)
    options: dict[str, Any] = {"causal": True, "chunk_length": 16, "backend": "cpu"}
    a, b = rk.lsh_attention(q, v, **options), rk.lsh_attention(other, v, **options)
    assert not torch.equal(a[:, :, :-1], b[:, :, :-1])


@pytest.mark.parametrize("alignment", ["ring", "bucket"])
@pytest.mark.parametrize("rules", [rk.AttentionRules(), rk.AttentionRules.paper()], ids=["default", "paper"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_equal_separate_ones(backend: str, rules: rk.AttentionRules, alignment: str) -> None:
    bounds = [0, 7, 7, 60, 61, 150]
    q, v = qv(150, batch=2)
    q.requires_grad_(), v.requires_grad_()
    options: dict[str, Any] = {
        "causal": True, "n_buckets": 4, "chunk_length": 8, "alignment": alignment, "rules": rules, "backend": backend
    }  # fmt: skip
    out = rk.lsh_attention(q, v, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), **options)
    grads = torch.autograd.grad(out.square().sum(), (q, v))
    alone = [rk.lsh_attention(q[:, :, a:b], v[:, :, a:b], **options) for a, b in pairwise(bounds)]
    expected = torch.cat(alone, dim=2)
    torch.testing.assert_close(out, expected)
    for actual, wanted in zip(grads, torch.autograd.grad(expected.square().sum(), (q, v)), strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shifted_keys_stay_in_their_packed_sequence(backend: str) -> None:
    q, v = qv(60)
    options: dict[str, Any] = {
        "causal": True,
        "n_buckets": 4,
        "chunk_length": 8,
        "shift_keys": True,
        "backend": backend,
    }
    together = rk.lsh_attention(q, v, cu_seqlens=torch.tensor([0, 1, 22, 60], dtype=torch.int32), **options)
    for begin, end in ((0, 1), (1, 22), (22, 60)):
        alone = rk.lsh_attention(q[:, :, begin:end], v[:, :, begin:end], **options)
        torch.testing.assert_close(together[:, :, begin:end], alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_query_may_see_context_keys(backend: str) -> None:
    q, v = qv(12)
    options: dict[str, Any] = {"causal": True, "chunk_length": 64, "backend": backend}
    out = rk.lsh_attention(q, v, num_queries=9, **options)
    assert out.shape == (1, 2, 9, 16)
    moved = v.clone()
    moved[:, :, 11] += 1
    assert (rk.lsh_attention(q, moved, num_queries=9, **options) != out).any(-1).all()  # even by the first query
    moved = v.clone()
    moved[:, :, 8] += 1
    changed = (rk.lsh_attention(q, moved, num_queries=9, **options) != out).any(-1)
    assert not changed[:, :, :8].any()  # a later query's key stays hidden


def test_given_buckets_and_rotations_reproduce() -> None:
    q, v = qv(300, batch=2)
    rotations = rk.random_rotations(5, 2, 16, 3, [4, 6])
    options: dict[str, Any] = {"n_hashes": 3, "n_buckets": [4, 6], "chunk_length": 16}
    out, buckets = rk.lsh_attention(q, v, hash_seed=5, return_buckets=True, **options)
    assert buckets.dtype == torch.int32 and buckets.shape == (2, 2, 3, 300)
    assert torch.equal(buckets, rk.hash_buckets(q, rotations, [4, 6]))
    assert torch.equal(out, rk.lsh_attention(q, v, rotations=rotations, **options))
    assert torch.equal(out, rk.lsh_attention(q, v, hash_seed=torch.tensor([5]), **options))
    assert torch.equal(out, rk.lsh_attention(q, v, buckets=buckets, hash_seed=77, **options))
    assert not torch.equal(out, rk.lsh_attention(q, v, hash_seed=77, **options))


def test_padded_tokens_go_to_the_extra_bucket() -> None:
    q, v = qv(100, batch=2)
    mask = torch.rand(2, 100) < 0.3
    options: dict[str, Any] = {"key_padding_mask": mask, "n_buckets": 8, "chunk_length": 16, "return_buckets": True}
    buckets = rk.lsh_attention(q, v, **options)[1]
    padded = mask[:, None, None, :].expand_as(buckets)
    assert (buckets[padded] == 8).all() and (buckets[~padded] < 8).all()
    by_content = rk.AttentionRules(padding_bucket=False)
    assert (rk.lsh_attention(q, v, rules=by_content, **options)[1] < 8).all()


def test_default_number_of_buckets_follows_trax() -> None:
    from reformer_kernels.hashing import bucket_factors

    expected = {1: (2,), 64: (2,), 127: (2,), 128: (4,), 4096: (128,), 4160: (16, 8), 16384: (32, 16), 65536: (64, 32)}
    assert {length: bucket_factors(None, length, 64) for length in expected} == expected


def test_rotations_are_a_fixed_function_of_the_seed() -> None:
    rotations = rk.random_rotations(0, 1, 2, 1, 4)
    assert rotations.dtype == torch.float32 and rotations.shape == (1, 1, 2, 1, 2)
    expected = [0.15853384137153625, 2.982879400253296, -1.9256919622421265, -0.8249255418777466]
    torch.testing.assert_close(rotations.flatten(), torch.tensor(expected))
    many = rk.random_rotations(3, 4, 64, 4, [64, 32]).double()
    assert abs(many.mean()) < 4 / many.numel() ** 0.5 and abs(many.var() - 1) < 6 / many.numel() ** 0.5
    assert not torch.equal(rk.random_rotations(-1, 1, 2, 1, 4), rotations)


def test_philox_known_answer() -> None:
    """The vectors of Random123's kat_vectors for philox4x32-10."""

    def word(*values: int) -> list[torch.Tensor]:
        return [torch.tensor(v, dtype=torch.int64) for v in values]

    zero = philox(torch.tensor([0]), *word(0, 0, 0, 0))
    assert zero.flatten().tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = philox(torch.tensor([-1]), *word(*[0xFFFFFFFF] * 4))
    assert ones.flatten().tolist() == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout(backend: str) -> None:
    q, v = torch.randn(1, 1, 400, 8), torch.ones(1, 1, 400, 4)
    options: dict[str, Any] = {"backend": backend, "chunk_length": 64, "causal": True}

    def run(p: float, seed: int) -> torch.Tensor:
        out: torch.Tensor = rk.lsh_attention(q, v, dropout_p=p, dropout_seed=torch.tensor([seed]), **options)
        return out

    assert torch.equal(run(0.3, 1), run(0.3, 1)) and not torch.equal(run(0.3, 1), run(0.3, 2))
    assert torch.equal(run(0.0, 1), rk.lsh_attention(q, v, **options))
    assert (run(1.0, 1) == 0).all()
    # The values are ones, so an output is the kept mass over the keep rate, one on average.
    outputs = torch.stack([run(0.3, seed)[..., 0] for seed in range(30)])
    assert abs(outputs.mean() - 1) < 5 * outputs.mean(-1).std() / 30**0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_without_keys_gives_zero(backend: str) -> None:
    q, v = qv(50)
    q.requires_grad_(), v.requires_grad_()
    mask = torch.ones(1, 50, dtype=torch.bool)
    out = rk.lsh_attention(q, v, key_padding_mask=mask, chunk_length=8, backend=backend)
    assert (out == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), (q, v)))
