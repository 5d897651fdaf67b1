"""Every backend against the float64 oracle: rules, odd shapes, dtypes, instruction sets, crossed pairs, threads."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import reformer_kernels as rk
from reformer_kernels import testing
from reformer_kernels.backends import _sentinels, cpu

R = rk.AttentionRules
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
RULES = {
    "default": R(),
    "trax": R.trax(),
    "paper": R.paper(),
    "dedup only": R(dedup="log_count"),
    "within bucket only": R(within_bucket=True),
    "l2": R(key_norm="l2", scale=None),
    "padded queries": R(mask_padded_queries=True, padding_bucket=False),
    "scale": R(scale=3.0),
    "hugging face": R.huggingface(),
    "hugging face, half": R.huggingface(half=True),
    "lucidrains": R.lucidrains(),
    "lucidrains, paper": replace(R.lucidrains(), within_bucket=True, dedup="log_count"),
    "rounds by logsumexp": R(combine_rounds="exp_lse", window_order="self_first"),
}


def modes(length: int) -> dict[str, dict[str, Any]]:
    dropout = {"dropout_p": 0.3, "dropout_seed": torch.tensor([2**40 + 5])}
    bounds = [0, length // 3, length // 3, length - length // 5, length]
    return {
        "plain": {},
        "causal": {"causal": True},
        "dropout": {"causal": True, **dropout},
        "padding": {"key_padding_mask": torch.rand(2, length) < 0.4},
        "all padded": {"key_padding_mask": torch.ones(2, length, dtype=torch.bool), **dropout},
        "bool mask": {"attn_mask": torch.rand(2, 1, length, length) < 0.5},
        "float mask": {"attn_mask": torch.randn(1, 2, length, length), "causal": True},
        "bucket": {"alignment": "bucket", "n_buckets": 6, "causal": True, **dropout},
        "packed": {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32), "n_buckets": 4, **dropout},
        "packed, bucket": {
            "cu_seqlens": torch.tensor(bounds, dtype=torch.int32),
            "n_buckets": 4,
            "alignment": "bucket",
            "chunks_after": 1,
        },
        "context": {"num_queries": length // 2 + 1, "causal": True, **dropout},
        "wide": {"chunks_before": 2, "chunks_after": 2},
        "narrow": {"chunks_before": 0, "chunk_length": 7, "causal": True},
        "long chunks": {"chunk_length": 150},
        "one bucket": {"buckets": torch.zeros(2, 2, 2, length, dtype=torch.int32), "n_hashes": 2, "n_buckets": 2},
        "more buckets than tokens": {"n_buckets": [64, 64], "n_hashes": 1},
        "many rounds": {"n_hashes": 8, "causal": True},
    }


def qv(length: int, head_dim: int, value_dim: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 2, length, head_dim), torch.randn(2, 2, length, value_dim or head_dim)


def check(length: int, head_dim: int, dtype: torch.dtype, rules: rk.AttentionRules, options: dict[str, Any]) -> None:
    options = {"chunk_length": 16, **options}
    call = testing.capture(rk.lsh_attention, *qv(length, head_dim), rules=rules, **options)
    floats = call.attn_mask is not None and call.attn_mask.dtype != torch.bool
    if rules.own_position == "sentinel" and (floats or call.cu_seqlens is not None or not call.is_ring):
        reasons = cpu.not_supported_reasons(call)
        assert reasons and all('own_position="sentinel" with' in reason for reason in reasons)
        return
    assert not cpu.not_supported_reasons(call)
    testing.assert_matches_oracle(call, dtype, "cpu")


@pytest.mark.parametrize("mode", modes(9))
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_rule_and_mode(dtype: torch.dtype, rules: rk.AttentionRules, mode: str) -> None:
    check(65, 17, dtype, rules, modes(65)[mode])


@pytest.mark.parametrize("mode", modes(9))
def test_sentinels_where_the_host_does_not_wait(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: all rows are computed, and lone ones taken."""
    monkeypatch.setattr(_sentinels, "_lone_rows", _sentinels._all_rows)
    check(65, 17, torch.float32, R.huggingface(), modes(65)[mode])


def test_a_lone_query_gets_its_value_as_rounded_beside_the_sentinel() -> None:
    """By hand: of two rounds, each has a logsumexp of -1e5; both have -1e5 + log 2, which float32 rounds."""
    q, v = qv(8, 4)
    options: dict[str, Any] = {
        "causal": True, "n_hashes": 2, "n_buckets": 2, "chunk_length": 4, "chunks_before": 0, "backend": "cpu"
    }  # fmt: skip
    out = rk.lsh_attention(q, v, rules=R.huggingface(), **options)
    both = torch.tensor(-1e5) + math.log(2)
    factor = 2 * torch.exp(torch.tensor(-1e5) - both)
    assert abs(float(factor) - 1) > 2**-10
    ratio = out[:, :, 0] / v[:, :, 0]
    torch.testing.assert_close(ratio, factor.expand_as(ratio))
    torch.testing.assert_close(rk.lsh_attention(q, v, **options)[:, :, 0], v[:, :, 0])


@pytest.mark.parametrize("length", [1, 2, 63, 65, 300])
@pytest.mark.parametrize("mode", modes(9))
def test_odd_lengths(length: int, mode: str) -> None:
    check(length, 8, torch.float32, R(), modes(length)[mode])


@pytest.mark.parametrize("mode", ["plain", "causal", "dropout", "padding"])
def test_length_1000_in_default_chunks(mode: str) -> None:
    check(1000, 16, torch.float32, R(), {"chunk_length": 64, **modes(1000)[mode]})


@pytest.mark.parametrize("head_dim", [1, 8, 17, 64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_sizes(head_dim: int, dtype: torch.dtype) -> None:
    check(130, head_dim, dtype, R(), {"causal": True, "chunk_length": 32})
    call = testing.capture(rk.lsh_attention, *qv(70, head_dim, 5), chunk_length=16)
    testing.assert_matches_oracle(call, dtype, "cpu")


@pytest.mark.parametrize("n_hashes", [1, 2, 3, 5, 8])
def test_rounds(n_hashes: int) -> None:
    for rules in (R(), R.paper()):
        check(90, 16, torch.float32, rules, {"n_hashes": n_hashes, "causal": True})


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 16, 65, 200])
def test_local(length: int, dtype: torch.dtype, causal: bool) -> None:
    q, k = torch.randn(2, 2, 2, length, 24)
    v = torch.randn(2, 2, length, 9)
    for mode in ("plain", "dropout", "padding", "bool mask", "float mask", "wide", "narrow"):
        options = {"chunk_length": 16, "scale": 0.3, **modes(length)[mode], "causal": causal}
        call = testing.capture(rk.local_attention, q, k, v, **options)
        testing.assert_matches_oracle(call, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key_heads", [1, 2])
def test_grouped_query_heads(key_heads: int, dtype: torch.dtype) -> None:
    q, k, v = torch.randn(2, 4, 70, 12), torch.randn(2, key_heads, 70, 12), torch.randn(2, key_heads, 70, 9)
    for mode in ("plain", "causal", "dropout", "padding", "float mask"):
        options = {"chunk_length": 16, **modes(70)[mode]}
        if "attn_mask" in options:
            options["attn_mask"] = torch.randn(1, 4, 70, 70)
        call = testing.capture(rk.local_attention, q, k, v, **options)
        testing.assert_matches_oracle(call, dtype, "cpu")
        expanded = (x.repeat_interleave(4 // key_heads, dim=1) for x in (k, v))
        assert torch.equal(rk.local_attention(q, k, v, **options), rk.local_attention(q, *expanded, **options))


def test_gradients_of_grouped_heads_do_not_depend_on_the_threads() -> None:
    q, k, v = (torch.randn(1, heads, 300, 8, requires_grad=True) for heads in (6, 2, 2))
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out = rk.local_attention(q, k, v, chunk_length=16, causal=True)
        runs.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_instruction_sets(isa: str) -> None:
    assert cpu.build_info()["isa_in_use"] == isa
    for length, head_dim in ((65, 17), (200, 64)):
        for mode, options in modes(length).items():
            for dtype in (torch.float32, torch.float64):
                check(length, head_dim, dtype, R.paper() if mode == "plain" else R(), options)
    test_hash_equals_oracle(torch.float32)


@pytest.mark.parametrize("pair", [("cpu", "reference"), ("reference", "cpu")], ids="/".join)
@pytest.mark.parametrize("mode", modes(9))
def test_crossed_backends(mode: str, pair: tuple[str, str]) -> None:
    call = testing.capture(rk.lsh_attention, *qv(100, 12), **{"chunk_length": 16, **modes(100)[mode]})
    for dtype in (torch.float32, torch.bfloat16):
        testing.assert_matches_oracle(call, dtype, *pair)


def test_hash_margin_is_small() -> None:
    """The next test leaves out near ties; there must be few."""
    x, rotations = torch.randn(2, 3, 200, 24), rk.random_rotations(1, 3, 24, 4, [16, 8])
    assert _clear(x, rotations, [16, 8], 1e-5).float().mean() > 0.99


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hash_equals_oracle(dtype: torch.dtype) -> None:
    for length, head_dim, factors in (
        (1, 1, [2]),
        (65, 17, [6]),
        (200, 24, [16, 8]),
        (130, 64, [2, 4, 6]),
        (70, 8, [300]),
    ):
        x = torch.randn(2, 3, length, head_dim).to(dtype)
        for shape in ((1, 3), (2, 1), (1, 1), (2, 3)):
            rotations = torch.randn(*shape, head_dim, 4, sum(factors) // 2)
            actual = rk.hash_buckets(x, rotations, factors, backend="cpu")
            oracle = rk.hash_buckets(x.double(), rotations, factors, backend="reference")
            # float32 may decide a tie otherwise: a projection of D products is off by D roundings of |x| |r| at most.
            bound = torch.finfo(torch.float32).eps * head_dim * float(x.float().abs().max() * rotations.abs().max()) * 2
            clear = _clear(x.double(), rotations.double(), factors, bound)
            assert torch.equal(actual[clear], oracle[clear])


def _clear(x: torch.Tensor, rotations: torch.Tensor, factors: list[int], bound: float) -> torch.Tensor:
    """bool [B, H, R, L]: no projection comes within the bound of the largest one."""
    clear, start = torch.tensor(True), 0
    for f in factors:
        rotation = rotations[..., start : start + f // 2].expand(x.shape[0], x.shape[1], -1, -1, -1)
        y = torch.einsum("bhld,bhdrf->bhrlf", x, rotation)
        top = torch.cat([y, -y], -1).topk(2, -1).values
        clear, start = clear & (top[..., 0] - top[..., 1] > bound), start + f // 2
    return clear


@pytest.mark.parametrize("length", [1, 2, 65, 1000])
@pytest.mark.parametrize("n_buckets", [1, 2, 77, 512, 8192, 100_000, 2**30])
def test_order_equals_oracle(length: int, n_buckets: int) -> None:
    buckets = torch.randint(0, n_buckets, (2, 3, 2, length), dtype=torch.int32)
    expected = torch.sort(buckets, dim=-1, stable=True).indices.to(torch.int32)
    for backend in ("cpu", "reference"):
        assert torch.equal(rk.bucket_order(buckets, n_buckets, backend=backend), expected)


@pytest.mark.parametrize("mode", ["dropout", "bucket", "packed", "context", "wide", "float mask"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 8)])
def test_thread_counts_give_the_same_bits(mode: str, shape: tuple[int, int]) -> None:
    q, v = (torch.randn(*shape, 210, 20, requires_grad=True) for _ in range(2))
    options = {"chunk_length": 16, **modes(210)[mode]}
    for name in ("key_padding_mask", "attn_mask"):
        if name in options:
            options[name] = options[name][:1, :1]
    runs = []
    for threads in (1, 2, 7, 2):
        torch.set_num_threads(threads)
        out = rk.lsh_attention(q, v, backend="cpu", **options)
        runs.append((out, *torch.autograd.grad(out.square().sum(), (q, v))))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_strides() -> None:
    """Views of any strides, without a contiguous last dimension and expanded ones among them."""
    base = torch.randn(2, 40, 3, 48)
    views = {
        "heads of a projection": base[..., :24].transpose(1, 2),
        "reversed layout": torch.randn(24, 40, 3, 2).permute(3, 2, 1, 0),
        "every other": torch.randn(2, 3, 80, 48)[:, :, ::2, ::2],
        "expanded": torch.randn(1, 1, 40, 24).expand(2, 3, -1, -1),
        "offset": torch.randn(2 * 3 * 40 * 24 + 1)[1:].view(2, 3, 40, 24),
    }
    for q in views.values():
        for v in views.values():
            options: dict[str, Any] = {"chunk_length": 8, "causal": True, "backend": "cpu"}
            expected = rk.lsh_attention(q.contiguous(), v.contiguous(), **options)
            assert torch.equal(rk.lsh_attention(q, v, **options), expected)
            call = testing.capture(rk.lsh_attention, q, v, chunk_length=8, causal=True)
            testing.assert_matches_oracle(call, torch.float32, "cpu")


def test_output_lies_like_the_query() -> None:
    q = torch.randn(2, 40, 3, 8).transpose(1, 2)
    for backend in ("cpu", "reference"):
        assert rk.lsh_attention(q, q, backend=backend, chunk_length=8).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("shape", [(0, 2, 5, 4), (2, 0, 5, 4), (1, 1, 0, 4)])
def test_empty(shape: tuple[int, ...]) -> None:
    q = torch.randn(shape, requires_grad=True)
    v = torch.randn(*shape[:3], 3, requires_grad=True)
    for backend in ("cpu", "reference"):
        out = rk.lsh_attention(q, v, chunk_length=2, backend=backend)
        assert out.shape == v.shape
        grads = torch.autograd.grad(out.sum(), (q, v))
        assert [g.shape for g in grads] == [q.shape, v.shape]
        assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_length_zero_is_served_by_every_function(backend: str) -> None:
    x, some = (torch.randn(1, 2, length, 4, requires_grad=True) for length in (0, 5))
    options: dict[str, Any] = {"backend": backend}
    assert rk.local_attention(x, x, x, **options).shape == x.shape
    assert rk.hash_buckets(x, rk.random_rotations(0, 2, 4, 3, 4), 4, **options).shape == (1, 2, 3, 0)
    assert rk.bucket_order(torch.zeros(1, 2, 3, 0, dtype=torch.int32), 4, **options).shape == (1, 2, 3, 0)
    for alignment in ("ring", "bucket"):
        assert rk.lsh_attention(x, x, alignment=alignment, n_buckets=4, **options).shape == x.shape
    packed = torch.tensor([0, 0, 0], dtype=torch.int32)
    assert rk.lsh_attention(x, x, cu_seqlens=packed, n_buckets=4, **options).shape == x.shape
    for attend in (rk.clustered_attention, rk.scaled_dot_product_attention):
        more = {**options, "exact_below": 0} if attend is rk.scaled_dot_product_attention else options
        for grouping in ("position", "hash"):
            assert attend(x, x, x, grouping=grouping, **more).shape == x.shape
            assert attend(x, some, some, grouping=grouping, **more).shape == x.shape
            without_keys = attend(some, x, x, grouping=grouping, **more)
            assert torch.equal(without_keys, torch.zeros_like(some))
            assert [g.shape for g in torch.autograd.grad(without_keys.sum(), (some, x))] == [some.shape, x.shape]


@pytest.mark.parametrize("layer", [rk.LSHSelfAttention, rk.LocalSelfAttention, rk.FullAttention])
def test_length_zero_is_served_by_the_layers(layer: Any) -> None:
    assert layer(8, 2)(torch.randn(2, 0, 8)).shape == (2, 0, 8)


def test_extreme_scores() -> None:
    """Rows of any length: the softmax is shifted by the maximum, so nothing overflows."""
    q, v = qv(130, 16)
    for factor in (1e-20, 30.0, 1e4):
        call = testing.capture(rk.lsh_attention, q * factor, v, chunk_length=16, causal=True)
        testing.assert_matches_oracle(call, torch.float32, "cpu")
    call = testing.capture(rk.lsh_attention, torch.zeros_like(q), v, chunk_length=16)
    testing.assert_matches_oracle(call, torch.float32, "cpu")


def test_masked_values_do_not_leak() -> None:
    q, v = qv(100, 16)
    mask = torch.zeros(2, 100, dtype=torch.bool)
    mask[:, 60:] = True
    options: dict[str, Any] = {"key_padding_mask": mask, "chunk_length": 16, "backend": "cpu"}
    out = rk.lsh_attention(q, v, **options)
    huge = v.clone()
    huge[:, :, 60:] = 1e30
    assert torch.equal(rk.lsh_attention(q, huge, **options)[:, :, :60], out[:, :, :60])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("causal", [False, True])
def test_non_finite_inputs_show(bad: float, causal: bool) -> None:
    """They come out where the reference has them, and are not taken for rows without keys."""
    q, v = qv(60, 8)
    # With a causal mask 0 * NaN of a masked value may come out or not: that is not promised.
    for where in ("query", "mask") if causal else ("query", "value", "mask"):
        x, y, mask = q.clone(), v.clone(), torch.zeros(1, 1, 60, 60)
        {"query": x, "value": y}.get(where, mask)[0, 0, 5] = bad
        outputs = []
        buckets = torch.zeros(2, 2, 1, 60, dtype=torch.int32)  # hashing NaN is anybody's guess
        for backend in ("cpu", "reference"):
            out = rk.lsh_attention(
                x, y, attn_mask=mask, buckets=buckets, n_hashes=1, n_buckets=2, chunk_length=16, causal=causal,
                backend=backend,
            )  # fmt: skip
            outputs.append(out.isfinite().all(-1))
        assert torch.equal(*outputs)
        assert not outputs[0].all()


def test_float_masks_between_masked_and_not() -> None:
    q, v = qv(40, 8)
    for value in (-8e29, -1.1e30, -torch.inf, torch.finfo(torch.float32).min):
        mask = torch.full((1, 1, 40, 40), value)
        outputs = [rk.lsh_attention(q, v, attn_mask=mask, chunk_length=64, backend=b) for b in ("cpu", "reference")]
        assert bool((outputs[0] == 0).all()) == bool((outputs[1] == 0).all()) == (value < -1e30)


def test_windows_far_larger_than_the_rows() -> None:
    q, v = qv(50, 8)
    whole = rk.lsh_attention(q, v, chunk_length=64, backend="cpu")
    huge = 2**31 - 1
    assert torch.equal(rk.lsh_attention(q, v, chunk_length=huge, chunks_before=1024, backend="cpu"), whole)
    options: dict[str, Any] = {"alignment": "bucket", "n_buckets": 4, "backend": "cpu"}
    expected = rk.lsh_attention(q, v, chunk_length=50, **options)
    assert torch.equal(rk.lsh_attention(q, v, chunk_length=huge, chunks_after=1024, **options), expected)
    call = testing.capture(rk.lsh_attention, q, v, chunk_length=16, n_hashes=1, chunks_before=9, chunks_after=5)
    testing.assert_matches_oracle(call, torch.float32, "cpu")  # the ring goes round three times
