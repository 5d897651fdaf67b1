"""The ops as torch sees them: opcheck, gradcheck, compile, autocast, torch.func, dispatch."""

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import reformer_kernels as rk

OPS = torch.ops.reformer_kernels
BACKENDS = ["cpu", "reference"]


def attention_arguments(**changes: Any) -> tuple[Any, ...]:
    arguments: dict[str, Any] = {
        "query": torch.randn(1, 2, 20, 4, requires_grad=True),
        "key": None,
        "value": torch.randn(1, 2, 20, 3, requires_grad=True),
        "order": torch.argsort(torch.rand(1, 2, 2, 20)).int(),
        "buckets": None,
        "key_padding_mask": None,
        "attn_mask": None,
        "cu_seqlens": None,
        "dropout_seed": None,
        "chunk_length": 8,
        "chunks_before": 1,
        "chunks_after": 0,
        "causal": True,
        "num_queries": None,
        "scale": 1.0,
        "dropout_p": 0.0,
        "alignment": "ring",
        "rules_key": rk.AttentionRules().key,
        "backend": "",
    }
    return tuple((arguments | changes).values())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks at it
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    torch.use_deterministic_algorithms(False)  # opcheck compares runs bit by bit, uninitialised parts of none
    x = torch.randn(1, 2, 20, 4)
    rotations = rk.random_rotations(0, 2, 4, 3, [4, 2])
    torch.library.opcheck(OPS.hash_buckets.default, (x, rotations, None, None, [4, 2], 3, 8, backend))
    torch.library.opcheck(OPS.hash_buckets.default, (x, None, None, torch.tensor([1]), None, 3, 8, backend))
    buckets = torch.randint(0, 5, (1, 2, 2, 20), dtype=torch.int32)
    torch.library.opcheck(OPS.bucket_order.default, (buckets, None, 5, backend))
    torch.library.opcheck(OPS.chunk_attention.default, attention_arguments(backend=backend))
    separate = attention_arguments(key=torch.randn(1, 2, 20, 4, requires_grad=True), order=None, backend=backend)
    torch.library.opcheck(OPS.chunk_attention.default, separate)
    context = attention_arguments(
        num_queries=9, dropout_p=0.5, dropout_seed=torch.tensor([4]), causal=False, backend=backend
    )
    torch.library.opcheck(OPS.chunk_attention.default, context)
    plain = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in attention_arguments(backend=backend))
    residuals = OPS.chunk_attention.default(*plain)
    torch.library.opcheck(OPS.chunk_attention_backward.default, (torch.ones_like(residuals[0]), *residuals, *plain))


MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "paper": {"rules": rk.AttentionRules.paper(), "causal": True},
    "l2": {"rules": rk.AttentionRules(key_norm="l2", scale=None)},
    "bucket": {"alignment": "bucket", "n_buckets": 4, "causal": True},
    "packed": {"cu_seqlens": torch.tensor([0, 5, 18], dtype=torch.int32), "n_buckets": 4},
    "dropout": {"dropout_p": 0.4, "dropout_seed": torch.tensor([1]), "causal": True},
    "context": {"num_queries": 10, "causal": True},
    "padding": {"key_padding_mask": torch.arange(18)[None] > 12},
    "mask": {"attn_mask": torch.linspace(-1, 1, 18 * 18, dtype=torch.float64).view(1, 1, 18, 18)},
    "one window": {"chunk_length": 32},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str, mode: str) -> None:
    q = torch.randn(1, 2, 18, 3, dtype=torch.float64, requires_grad=True)
    v = torch.randn(1, 2, 18, 2, dtype=torch.float64, requires_grad=True)
    options = {"chunk_length": 4, "n_hashes": 2, "backend": backend, **MODES[mode]}
    buckets = rk.lsh_attention(q, v, return_buckets=True, **options)[1]  # kept, as a step may cross a bucket's border
    assert torch.autograd.gradcheck(lambda q, v: rk.lsh_attention(q, v, buckets=buckets, **options), (q, v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_local(backend: str) -> None:
    q, k, v = (torch.randn(1, 2, 11, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    for options in ({}, {"causal": True}, {"chunks_after": 1}, {"dropout_p": 0.3, "dropout_seed": torch.tensor([2])}):
        function = lambda q, k, v, o=options: rk.local_attention(q, k, v, chunk_length=4, backend=backend, **o)  # noqa: E731
        assert torch.autograd.gradcheck(function, (q, k, v))


def test_compile_without_recompiling_for_a_new_length() -> None:
    torch._dynamo.reset()

    def step(q: torch.Tensor, v: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
        out = rk.lsh_attention(q, v, causal=True, chunk_length=8, dropout_p=0.1, dropout_seed=seed)
        result: torch.Tensor = out + rk.local_attention(q, q, v, causal=True, chunk_length=8)
        return result

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    compiled_once = 0  # torch may start over while it compiles the first time
    for length in (40, 2000, 77, 130):  # with one and with two factors of buckets
        q, v = (torch.randn(1, 2, length, 4, requires_grad=True) for _ in range(2))
        seed = torch.tensor([length])
        out, expected = compiled(q, v, seed), step(q, v, seed)
        assert torch.equal(out, expected)
        grads, wanted = (torch.autograd.grad(x.sum(), (q, v)) for x in (out, expected))
        for a, b in zip(grads, wanted, strict=True):
            torch.testing.assert_close(a, b)
        compiled_once = compiled_once or counter.frame_count
        assert counter.frame_count == compiled_once


def test_compile_modules_in_training() -> None:
    torch._dynamo.reset()
    layer = torch.nn.Sequential(
        rk.LSHSelfAttention(16, 2, chunk_length=8, causal=True, dropout=0.1),
        rk.LocalSelfAttention(16, 2, chunk_length=8, causal=True, dropout=0.1),
    )
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    compiled_once = 0
    for length in (20, 50, 33):
        compiled(torch.randn(2, length, 16)).sum().backward()
        compiled_once = compiled_once or counter.frame_count
        assert counter.frame_count == compiled_once


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_query_key_value_only(dtype: torch.dtype) -> None:
    q, v = (torch.randn(1, 2, 40, 8, requires_grad=True) for _ in range(2))
    mask = torch.randn(1, 1, 40, 40)
    with torch.autocast("cpu", dtype=dtype):
        out, buckets = rk.lsh_attention(q, v, chunk_length=8, attn_mask=mask, return_buckets=True)
        local = rk.local_attention(q, q, v, chunk_length=8)
    assert out.dtype == local.dtype == dtype
    assert torch.equal(buckets, rk.lsh_attention(q, v, chunk_length=8, return_buckets=True)[1])  # hashed as given
    expected = rk.lsh_attention(q.to(dtype), v.to(dtype), chunk_length=8, attn_mask=mask, buckets=buckets)
    assert torch.equal(out, expected)
    grads = torch.autograd.grad(out.float().sum(), (q, v))
    assert all(g.dtype == torch.float32 for g in grads)
    with torch.autocast("cpu", dtype=dtype):
        assert rk.lsh_attention(q.double(), v.double(), chunk_length=8).dtype == torch.float64
        assert rk.lsh_attention(q, v, chunk_length=8, causal=True, shift_keys=True).dtype == dtype


def test_torch_func_grad_and_vmap() -> None:
    q, v = torch.randn(3, 1, 2, 20, 4), torch.randn(3, 1, 2, 20, 4)

    def loss(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = rk.lsh_attention(q, v, causal=True, chunk_length=8).square().sum()
        return out

    def one(q: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, v = q.clone().requires_grad_(), v.clone().requires_grad_()
        return torch.autograd.grad(loss(q, v), (q, v))

    expected = [torch.stack(x) for x in zip(*(one(a, b) for a, b in zip(q, v, strict=True)), strict=True)]
    for actual, wanted in zip(torch.func.grad(loss, argnums=(0, 1))(q[0], v[0]), one(q[0], v[0]), strict=True):
        assert torch.equal(actual, wanted)
    values = torch.func.vmap(loss)(q, v)
    torch.testing.assert_close(values, torch.stack([loss(a, b) for a, b in zip(q, v, strict=True)]))
    for actual, wanted in zip(torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)))(q, v), expected, strict=True):
        torch.testing.assert_close(actual, wanted)

    def local(q: torch.Tensor) -> torch.Tensor:
        return rk.local_attention(q, q, q, chunk_length=8).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(local))(q)
    torch.testing.assert_close(per_sample[1], torch.func.grad(local)(q[1]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_raises(backend: str) -> None:
    q = torch.randn(1, 1, 10, 4, requires_grad=True)
    out = rk.lsh_attention(q, q, chunk_length=4, backend=backend)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not supported"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match="second derivatives are not supported"):
        loss = lambda q: rk.lsh_attention(q, q, chunk_length=4, backend=backend).square().sum()  # noqa: E731
        torch.func.grad(lambda q: torch.func.grad(loss)(q).sum())(q)


def test_global_random_state_is_untouched() -> None:
    q = torch.randn(1, 2, 100, 8)
    before = torch.get_rng_state()
    rk.lsh_attention(q, q, dropout_p=0.5, dropout_seed=torch.tensor([1]), hash_seed=3)
    rk.random_rotations(5, 2, 8, 4, 16)
    assert torch.equal(torch.get_rng_state(), before)


def test_vmap_over_any_argument() -> None:
    q, v = torch.randn(3, 1, 2, 20, 4), torch.randn(1, 2, 20, 4)
    seeds, masks = torch.arange(3)[:, None], torch.rand(3, 1, 20) < 0.3

    def attend(q: torch.Tensor, seed: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        options: dict[str, Any] = {"n_buckets": [2, 2], "chunk_length": 8, "dropout_p": 0.2, "key_padding_mask": mask}
        out: torch.Tensor = rk.lsh_attention(q, v, dropout_seed=seed, **options)
        return out

    expected = torch.stack([attend(*x) for x in zip(q, seeds, masks, strict=True)])
    assert torch.equal(torch.func.vmap(attend)(q, seeds, masks), expected)
    with pytest.raises(ValueError, match="size 0"):
        torch.func.vmap(attend)(q[:0], seeds[:0], masks[:0])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # torch's own
def test_forward_mode_raises() -> None:
    q = torch.randn(1, 1, 10, 4)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, q)
        with pytest.raises(RuntimeError, match="forward-mode derivatives"):
            rk.lsh_attention(dual, q)
        with pytest.raises(RuntimeError, match="forward-mode derivatives"):
            rk.local_attention(q, dual, q)
    loss = lambda x: rk.clustered_attention(x, x, x, budget=4).square().sum()  # noqa: E731
    with pytest.raises(RuntimeError, match="forward-mode derivatives of lsh_attention"):  # over reverse mode
        torch.func.hessian(loss)(q)
    with pytest.raises(RuntimeError, match="second derivatives are not supported"):
        torch.autograd.functional.hessian(loss, q)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_around_the_backward_and_mixed_dtypes(backend: str) -> None:
    q = torch.randn(1, 2, 40, 8, requires_grad=True)
    v = torch.randn(1, 2, 40, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = rk.lsh_attention(q, v.bfloat16(), chunk_length=8, backend=backend)
        out.sum().backward()
    assert out.dtype == torch.bfloat16 and q.grad is not None and q.grad.dtype == torch.float32


def test_compile_packed() -> None:
    torch._dynamo.reset()
    bounds = torch.tensor([0, 8, 20], dtype=torch.int32)

    def step(q: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = rk.lsh_attention(q, q, cu_seqlens=bounds, n_buckets=4, chunk_length=8)
        return out

    q = torch.randn(1, 2, 20, 4)
    assert torch.equal(torch.compile(step, fullgraph=True, backend="eager")(q), step(q))


def test_default_device_does_not_matter() -> None:
    q = torch.randn(1, 2, 40, 8)
    expected = rk.lsh_attention(q, q, chunk_length=8)
    torch.set_default_device("meta")
    try:
        assert torch.equal(rk.lsh_attention(q, q, chunk_length=8), expected)
    finally:
        torch.set_default_device(None)


# ---- clustered attention


def clustered_tensors(width: int = 4) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(1, heads, 20, width, requires_grad=True) for heads in (4, 2, 2))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_lists(backend: str) -> None:
    torch.use_deterministic_algorithms(False)
    q, k, v = clustered_tensors()
    order = torch.arange(20, dtype=torch.int32).expand(1, 4, 2, 20).contiguous()
    for o in (None, order):
        select = (q.detach(), k.detach(), o, None, None, None, 4, 8, 2, 1, True, 0.5, backend)
        torch.library.opcheck(OPS.select_keys.default, select)
        key_indices = OPS.select_keys.default(*select)
        arguments = (q, k, v, o, key_indices, None, None, None, 4, 1, True, True, 0.5, 0.0, backend)
        torch.library.opcheck(OPS.list_attention.default, arguments)
        plain = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)
        residuals = OPS.list_attention.default(*plain)
        backward = (torch.ones_like(residuals[0]), *residuals, *plain)
        torch.library.opcheck(OPS.list_attention_backward.default, backward)


@pytest.mark.parametrize("grouping", ["position", "hash"])
def test_clustered_attention_compiles_for_all_lengths(grouping: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(
        lambda q, k, v: rk.clustered_attention(q, k, v, budget=8, chunk_length=4, causal=True, grouping=grouping),
        backend=counter, fullgraph=True, dynamic=True,
    )  # fmt: skip
    compiled_once = 0
    for length in (20, 33, 47):
        q, k, v = (torch.randn(1, heads, length, 4, requires_grad=True) for heads in (4, 2, 2))
        out = function(q, k, v)
        expected = rk.clustered_attention(q, k, v, budget=8, chunk_length=4, causal=True, grouping=grouping)
        assert torch.equal(out, expected)
        for ours, theirs in zip(
            torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(expected.sum(), (q, k, v)), strict=True
        ):
            assert torch.equal(ours, theirs)
        compiled_once = compiled_once or counter.frame_count
        assert counter.frame_count == compiled_once


def test_clustered_attention_in_torch_func() -> None:
    q, k, v = (torch.stack([x.detach(), 2 * x.detach()]) for x in clustered_tensors())

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return rk.clustered_attention(q, k, v, budget=8, chunk_length=4, causal=True).square().sum()

    together = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    for i in range(2):
        alone = torch.func.grad(loss, argnums=(0, 1, 2))(q[i], k[i], v[i])
        assert all(torch.equal(a[i], b) for a, b in zip(together, alone, strict=True))
    x = clustered_tensors()
    (gradient,) = torch.autograd.grad(rk.clustered_attention(*x, budget=8).square().sum(), x[0], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not supported"):
        gradient.sum().backward()


def test_clustered_attention_under_autocast() -> None:
    q, k, v = clustered_tensors()
    with torch.autocast("cpu", torch.bfloat16):
        out = rk.clustered_attention(q, k, v, budget=8)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, rk.clustered_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), budget=8))


def test_lists_are_checked() -> None:
    q, k, v = (x.detach() for x in clustered_tensors())
    for key_indices, message in (
        (torch.full((1, 4, 5, 8), 20, dtype=torch.int32), "key_indices must be between -1 and 19, got -1 to 20"),
        (torch.full((1, 4, 5, 8), -2, dtype=torch.int32), "key_indices must be between -1 and 19, got -2 to -1"),
        (torch.full((1, 4, 4, 8), -1, dtype=torch.int32), "key_indices has a wrong shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            OPS.list_attention.default(q, k, v, None, key_indices, None, None, None, 4, 0, True, True, 0.5, 0.0, "cpu")
