"""Clustered attention: the choice of keys, attention to lists of keys, the rest term; kernels against the oracle."""

import functools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import reformer_kernels as rk
from reformer_kernels import clustered, testing
from reformer_kernels._calls import SelectCall
from reformer_kernels.backends import cpu, reference, reference_lists

from .kernel_oracles import assert_best
from .layouts import LAYOUTS
from .naive import clustered_attention as naive_clustered_attention
from .rounding import assert_equal_to_rounding

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DROPOUT = {"dropout_p": 0.3, "dropout_seed": torch.tensor([2**40 + 5])}


ATTEND: dict[str, Any] = {
    "budget": 12, "local_fraction": 0.4, "chunk_length": 8, "grouping": "position", "rest_term": True,
    "causal": False, "key_padding_mask": None, "attn_mask": None, "scale": None, "dropout_p": 0.0,
    "dropout_seed": None, "hash_seed": 0, "backend": None,
}  # fmt: skip


def qkv(length: int, size: int | None = None, heads: int = 4, key_heads: int = 2, width: int = 9) -> tuple[Tensor, ...]:
    size = length if size is None else size
    return (
        torch.randn(2, heads, length, width),
        torch.randn(2, key_heads, size, width),
        torch.randn(2, key_heads, size, width + 2),
    )


def modes(length: int, size: int) -> dict[str, dict[str, Any]]:
    return {
        "plain": {},
        "causal": {"causal": True},
        "no rest": {"rest_term": False, "causal": True},
        "padding": {"key_padding_mask": torch.rand(2, size) < 0.4},
        "all padded": {"key_padding_mask": torch.ones(2, size, dtype=torch.bool)},
        "bool mask": {"attn_mask": torch.rand(2, 1, length, size) < 0.5},
        "float mask": {"attn_mask": torch.randn(1, 4, length, size), "causal": True},
        "dropout": {"causal": True, **DROPOUT},
        "padded queries": {"query_padding_mask": torch.rand(2, length) < 0.6},
        "hash, padded queries": {"query_padding_mask": torch.rand(2, length) < 0.6, "grouping": "hash", "causal": True},
        "hash": {"grouping": "hash"},
        "hash, causal": {"grouping": "hash", "causal": True, **DROPOUT},
        "hash, padding": {"grouping": "hash", "causal": True, "key_padding_mask": torch.rand(2, size) < 0.4},
        "hash, mask": {"grouping": "hash", "attn_mask": torch.rand(1, 1, length, size) < 0.3, "causal": True},
        "all local": {"local_fraction": 1.0, "causal": True},
        "none local": {"local_fraction": 0.0},
        "one key": {"budget": 1, "causal": True},
        "long chunks": {"chunk_length": 70, "budget": 40},
    }


def list_call(length: int, size: int, dtype: torch.dtype, options: dict[str, Any], context_keys: int = 0) -> Any:
    """The call of list_attention; its lists are those that the oracle chooses."""
    return attend_call("list_attention", length, size, dtype, options, context_keys)


def attend_call(
    op: str, length: int, size: int, dtype: torch.dtype, options: dict[str, Any], context_keys: int = 0, heads: int = 4,
    key_heads: int = 2,
) -> Any:  # fmt: skip
    options = {**ATTEND, **options}
    del options["backend"]
    if context_keys and options["key_padding_mask"] is not None:
        options["key_padding_mask"][:, size - context_keys :] = False
    return testing.capture(
        clustered.attend, *(x.to(dtype) for x in qkv(length, size, heads, key_heads)), op=op, context_keys=context_keys,
        **options,
    )  # fmt: skip


# ---- attention to lists


@pytest.mark.parametrize("mode", modes(9, 9))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_mode(dtype: torch.dtype, mode: str) -> None:
    testing.assert_matches_oracle(list_call(61, 61, torch.float64, modes(61, 61)[mode]), dtype, "cpu")


@pytest.mark.parametrize(("length", "size"), [(1, 1), (2, 2), (3, 50), (50, 3), (64, 65), (130, 40)])
@pytest.mark.parametrize("mode", modes(9, 9))
def test_odd_and_different_lengths(length: int, size: int, mode: str) -> None:
    testing.assert_matches_oracle(
        list_call(length, size, torch.float64, modes(length, size)[mode]), torch.float32, "cpu"
    )


@pytest.mark.parametrize("mode", ["plain", "causal", "padding", "hash, causal", "hash, padding", "bool mask"])
def test_context_keys(mode: str) -> None:
    testing.assert_matches_oracle(list_call(40, 43, torch.float64, modes(40, 43)[mode], 3), torch.float32, "cpu")


@pytest.mark.parametrize("mode", ["plain", "dropout", "hash, causal", "bool mask"])
@pytest.mark.usefixtures("isa")
def test_instruction_sets(mode: str) -> None:
    testing.assert_matches_oracle(list_call(61, 61, torch.float64, modes(61, 61)[mode]), torch.float32, "cpu")


def test_long_sequences() -> None:
    """Several blocks of running means, and several parts of the entries in backward."""
    for options in ({"causal": True}, {"grouping": "hash", "causal": True}, {}):
        options = {"budget": 40, "chunk_length": 32, **options}
        call = attend_call("list_attention", 2100, 2100, torch.float64, options, heads=2, key_heads=1)
        call = call._replace(query=call.query[:1], key=call.key[:1], value=call.value[:1])
        testing.assert_matches_oracle(
            call._replace(key_indices=call.key_indices[:1], order=None if call.order is None else call.order[:1]),
            torch.float32,
            "cpu",
        )


@pytest.mark.parametrize("mode", ["plain", "causal", "hash, padding", "float mask"])
def test_crossed_backends(mode: str) -> None:
    call = list_call(61, 61, torch.float64, modes(61, 61)[mode])
    testing.assert_matches_oracle(call, torch.float32, "cpu", "reference")
    testing.assert_matches_oracle(call, torch.float32, "reference", "cpu")


@pytest.mark.parametrize("mode", ["plain", "hash, causal", "dropout"])
def test_the_same_bits_for_any_number_of_threads(mode: str) -> None:
    for heads, key_heads in ((4, 2), (3, 3)):
        q, k, v = (x[:1].clone().requires_grad_() for x in qkv(300, 300, heads, key_heads))
        options = {"budget": 40, "chunk_length": 16, **modes(300, 300)[mode]}
        runs = []
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            out = rk.clustered_attention(q, k, v, **options)
            runs.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
        for other in runs[1:]:
            assert all(map(torch.equal, runs[0], other))


@pytest.mark.parametrize("mode", ["plain", "causal", "padding", "hash", "hash, causal", "float mask", "no rest"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradcheck(backend: str, mode: str) -> None:
    q, k, v = (x[:, :, :18, :4].double().requires_grad_() for x in qkv(18, 18, 2, 1))
    options = modes(18, 18)[mode] | {"budget": 6, "chunk_length": 4, "backend": backend}
    if "attn_mask" in options:
        options["attn_mask"] = options["attn_mask"][:, :2]  # of as many heads
    torch.autograd.gradcheck(lambda q, k, v: rk.clustered_attention(q, k, v, **options), (q, k, v))


# ---- the whole function


@pytest.mark.parametrize("mode", ["plain", "causal", "padding", "bool mask", "no rest", "hash", "none local"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_against_loops_in_python(backend: str, mode: str) -> None:
    q, k, v = (x[:1].double() for x in qkv(21))
    options = {"budget": 7, "local_fraction": 0.4, "chunk_length": 5, **modes(21, 21)[mode]}
    for name in ("key_padding_mask", "attn_mask"):
        if name in options:
            options[name] = options[name][:1]
    seen: Any = None
    if options.pop("grouping", None) == "hash":
        seen = clustered._hash_order(q, None, torch.tensor([0]), None)[:, :, 1]
    expected = naive_clustered_attention(q, k, v, seen, **options)
    actual = rk.clustered_attention(
        q, k, v, grouping="position" if seen is None else "hash", backend=backend, **options
    )
    # Scores, their exponentials (as many roundings as a score is large), and sums over the keys.
    largest = float((q @ k.repeat_interleave(2, 1).mT).abs().max())
    assert_equal_to_rounding(actual, expected, 9 + math.ceil(largest) + 21)


@pytest.mark.parametrize("size", [1, 30, 47])
@pytest.mark.parametrize("grouping", clustered.GROUPINGS)
def test_a_budget_of_all_keys_is_exact(grouping: str, size: int) -> None:
    q, k, v = (x.double() for x in qkv(30, size))
    expanded = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    options: dict[str, Any] = {"budget": size, "grouping": grouping, "chunk_length": 7}
    padding = torch.rand(2, size) < 0.3
    padding[:, 0] = False
    mask = torch.rand(2, 4, 30, size) < 0.3
    mask[..., 0] = False
    bias = torch.randn(30, size)
    keep = ~padding[:, None, None, :]
    for ours, theirs in (
        ({}, {}),
        ({"causal": True}, {"is_causal": True}),
        ({"scale": 0.3}, {"scale": 0.3}),
        ({"key_padding_mask": padding}, {"attn_mask": keep}),
        ({"attn_mask": mask}, {"attn_mask": ~mask}),
        ({"attn_mask": bias[None, None], "key_padding_mask": padding},
         {"attn_mask": bias.double().masked_fill(~keep, float("-inf"))}),
    ):  # fmt: skip
        expected = F.scaled_dot_product_attention(q, *expanded, **theirs)
        torch.testing.assert_close(rk.clustered_attention(q, k, v, **options, **ours), expected)


def test_weights_are_what_was_used() -> None:
    for mode, options in modes(40, 40).items():
        if "dropout_p" in options or mode == "all padded":
            continue
        q, k, v = (x.double().requires_grad_() for x in qkv(40))
        defaults = ATTEND
        out, weights = clustered.attend(q, k, v, need_weights=True, **(defaults | options))
        assert weights is not None
        some = weights.sum(-1) > 0  # a query whose keys are all masked has none
        torch.testing.assert_close(weights.sum(-1), some.double())
        torch.testing.assert_close(out, weights @ v.repeat_interleave(2, 1))
        torch.autograd.grad(weights.square().sum(), (q, k))


def test_every_key_counts_once() -> None:
    """Equal scores: each of the seen keys then has the same weight, also those in window and selection."""
    q, k = torch.zeros(1, 1, 64, 4, dtype=torch.float64), torch.zeros(1, 1, 64, 4, dtype=torch.float64)
    v = torch.eye(64, dtype=torch.float64)[None, None]
    for options in ({}, {"causal": True}, {"grouping": "hash", "causal": True}, {"grouping": "hash"}):
        out = rk.clustered_attention(q, k, v, budget=16, chunk_length=8, rest_term=False, **options)
        for i, row in enumerate(out[0, 0]):
            used = row[row > 0]
            torch.testing.assert_close(used, torch.full_like(used, 1 / len(used)))
            assert len(used) <= 16 and (options.get("causal", False) or len(used) == 16) and (i < 15 or len(used) > 1)
        mean = rk.clustered_attention(q, k, v, budget=16, chunk_length=8, **options)
        rows = torch.arange(64)
        count = rows + 1 if "causal" in options else torch.full_like(rows, 64)
        torch.testing.assert_close(mean.sum(-1)[0, 0], torch.ones(64, dtype=torch.float64))
        seen = (out[0, 0] > 0).sum(-1)
        unseen_weight = (count - seen) / count  # on v̄ = 1 / count each
        torch.testing.assert_close(
            mean[0, 0, 63, 63], out[0, 0, 63, 63] * seen[63] / count[63] + unseen_weight[63] / count[63]
        )


@pytest.mark.parametrize("grouping", clustered.GROUPINGS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nothing_leaks(backend: str, grouping: str) -> None:
    q, k, v = qkv(64)
    options: dict[str, Any] = {"budget": 12, "chunk_length": 8, "grouping": grouping, "backend": backend}
    padding = torch.zeros(2, 64, dtype=torch.bool)
    padding[:, 40:50] = True
    k2, v2 = k.clone(), v.clone()
    k2[:, :, 40:50], v2[:, :, 40:50] = 1e15, -1e30
    before = rk.clustered_attention(q, k, v, key_padding_mask=padding, **options)
    assert torch.equal(before, rk.clustered_attention(q, k2, v2, key_padding_mask=padding, **options))
    for mask in (padding[0].expand(1, 1, 64, 64), torch.zeros(1, 1, 64, 64).masked_fill(padding[0], float("-inf"))):
        before = rk.clustered_attention(q, k, v, attn_mask=mask, **options)
        assert torch.equal(before, rk.clustered_attention(q, k2, v2, attn_mask=mask, **options))
    k2, v2 = k.clone(), v.clone()
    k2[:, :, 32:], v2[:, :, 17:] = 1e15, -1e30  # keys after the chunk (or segment) of 17, values after 17
    before = rk.clustered_attention(q, k, v, causal=True, **options)
    after = rk.clustered_attention(q, k2 if grouping == "position" else k, v2, causal=True, **options)
    assert torch.equal(before[:, :, :17], after[:, :, :17])


@pytest.mark.parametrize("grouping", clustered.GROUPINGS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_padded_queries_have_no_effect(backend: str, grouping: str) -> None:
    q, k, v = qkv(300)
    padding = torch.zeros(2, 300, dtype=torch.bool)
    padding[0, 270:], padding[1, 33:47] = True, True
    q2 = torch.where(padding[:, None, :, None], 50.0, q)
    options: dict[str, Any] = {"budget": 24, "chunk_length": 16, "grouping": grouping, "backend": backend}
    before, after = (rk.clustered_attention(x, k, v, query_padding_mask=padding, **options) for x in (q, q2))
    real = ~padding[:, None, :, None]
    assert torch.equal(before * real, after * real)
    assert not torch.equal(*(rk.clustered_attention(x, k, v, **options) * real for x in (q, q2)))


def test_batch_rows_and_heads_are_independent() -> None:
    q, k, v = qkv(50)
    for grouping in clustered.GROUPINGS:
        whole = rk.clustered_attention(q, k, v, budget=12, chunk_length=8, grouping=grouping)
        for b in range(2):
            alone = rk.clustered_attention(
                q[b : b + 1], k[b : b + 1], v[b : b + 1], budget=12, chunk_length=8, grouping=grouping
            )
            assert torch.equal(whole[b : b + 1], alone)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout: str) -> None:
    q, k, v = (x.contiguous() for x in qkv(40))
    expected = rk.clustered_attention(q, k, v, budget=12)
    if layout == "one head expanded":
        q, k, v = (x[:, :1].expand(x.shape).contiguous() for x in (q, k, v))
        expected = rk.clustered_attention(q, k, v, budget=12)
    assert torch.equal(expected, rk.clustered_attention(*map(LAYOUTS[layout], (q, k, v)), budget=12))


@pytest.mark.parametrize(("length", "size", "batch"), [(0, 5, 2), (5, 0, 2), (5, 5, 0), (0, 0, 1)])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_empty(backend: str, length: int, size: int, batch: int) -> None:
    q, k, v = (torch.randn(batch, 2, n, 4, requires_grad=True) for n in (length, size, size))
    for grouping in clustered.GROUPINGS:
        out = rk.clustered_attention(q, k, v, grouping=grouping, backend=backend)
        assert out.shape == (batch, 2, length, 4) and not out.any()
        assert not any(g.any() for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_no_query_heads() -> None:
    q, k = torch.randn(1, 0, 9, 4, requires_grad=True), torch.randn(1, 2, 9, 4, requires_grad=True)
    for function in (rk.clustered_attention, rk.local_attention):
        out = function(q, k, k)
        assert out.shape == q.shape and not torch.autograd.grad(out.sum(), k)[0].any()


def test_the_reference_lays_out_its_results_as_the_fake_does() -> None:
    q, k, v = (torch.randn(1, 20, 2, 4).transpose(1, 2).requires_grad_() for _ in range(3))
    for rest_term in (False, True):
        attend = functools.partial(rk.clustered_attention, budget=8, rest_term=rest_term, backend="reference")
        function = torch.compile(lambda q, k, v, f=attend: f(q, k, v), backend="aot_eager", fullgraph=True)
        out = function(q, k, v)
        torch.testing.assert_close(out, rk.clustered_attention(q, k, v, budget=8, rest_term=rest_term))
        torch.autograd.grad(out.sum(), (q, k, v))


def test_extreme_scores_stay_finite() -> None:
    q, k, v = (1e4 * x for x in qkv(64))
    out = rk.clustered_attention(q, k, v, budget=8, chunk_length=8, causal=True)
    assert out.isfinite().all()


# ---- the choice of keys


def select_call(
    length: int, size: int, dtype: torch.dtype, options: dict[str, Any], context_keys: int = 0
) -> SelectCall:
    result: SelectCall = attend_call("select_keys", length, size, dtype, options, context_keys)
    return result


@pytest.mark.parametrize(("length", "size", "context"), [(61, 61, 0), (50, 53, 3), (20, 90, 0), (90, 20, 0), (1, 1, 0)])
@pytest.mark.parametrize("mode", modes(9, 9))
def test_the_kernel_chooses_what_the_oracle_chooses(mode: str, length: int, size: int, context: int) -> None:
    call = select_call(length, size, torch.float64, modes(length, size)[mode], context)
    assert torch.equal(cpu.select_keys(call), reference.select_keys(call))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("mode", ["plain", "causal", "hash, causal", "padding", "float mask"])
def test_the_choice_in_float32(mode: str) -> None:
    call = select_call(300, 300, torch.float32, modes(300, 300)[mode])
    assert_best(call, cpu.select_keys(call))


@pytest.mark.parametrize("causal", [False, True])
def test_two_steps_for_many_keys(causal: bool) -> None:
    size = reference_lists.EXACT_KEYS + 700
    options = {"budget": 40, "chunk_length": 16, "causal": causal, "key_padding_mask": torch.rand(2, size) < 0.2}
    call = select_call(48, size, torch.float64, options)
    assert torch.equal(cpu.select_keys(call), reference.select_keys(call))
    # The best keys are still found where their blocks stand out.
    q, k = torch.randn(1, 1, 32, 16), torch.randn(1, 1, size, 16)
    k[0, 0, 9000:9064] += 3 * q[0, 0].mean(dim=0) / q[0, 0].mean(dim=0).norm() ** 2
    key_indices = cpu.select_keys(SelectCall(q, k, None, None, None, None, 32, 32, 0, 0, False, 1.0, ""))
    found = ((key_indices >= 9000) & (key_indices < 9064)).float().mean()
    assert found > 0.9, found


def test_a_large_budget_of_many_keys_is_exact() -> None:
    size = reference_lists.EXACT_KEYS + 100
    q, k, v = (torch.randn(1, 1, n, 8) for n in (20, size, size))
    out = rk.clustered_attention(q, k, v, budget=10**9, chunk_length=8)  # also one far larger than the keys
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("size", [100, 1000])
def test_of_equal_keys_the_first_are_chosen(size: int) -> None:
    q, k = torch.randn(1, 2, 20, 4, dtype=torch.float64), torch.randn(1, 2, 1, 4, dtype=torch.float64)
    k = k.repeat(1, 1, size, 1)
    k[:, :, ::3] = -k[:, :, ::3]
    call = SelectCall(q, k, None, None, None, None, 10, 8, 0, 0, False, 0.5, "")
    # Not the reference: a BLAS may round the scores of equal keys differently.
    for row in cpu.select_keys(call).flatten(0, 2).tolist():
        assert row in ([0, 3, 6, 9, 12, 15, 18, 21], [1, 2, 4, 5, 7, 8, 10, 11])


@pytest.mark.parametrize("size", [200, reference_lists.EXACT_KEYS + 64])
def test_sub_groups_that_see_nothing(size: int) -> None:
    """Causal queries before the first key that is no padding; whole rows of padding; keys that are not finite."""
    q, k, v = torch.randn(2, 1, 100, 4), torch.randn(2, 1, size, 4), torch.randn(2, 1, size, 4)
    padding = torch.zeros(2, size, dtype=torch.bool)
    padding[0, :64], padding[1] = True, True
    options: dict[str, Any] = {"budget": 8, "chunk_length": 100, "local_fraction": 0.0}
    for causal in (False, True):
        call = testing.capture(
            rk.clustered_attention, q.double(), k.double(), v.double(), op="select_keys", causal=causal,
            key_padding_mask=padding, **options,
        )  # fmt: skip
        assert torch.equal(cpu.select_keys(call), reference.select_keys(call))
        assert (cpu.select_keys(call)[0] >= 0).sum() == 8
        out = rk.clustered_attention(q, k, v, causal=causal, key_padding_mask=padding, **options)
        assert out.isfinite().all() and not out[1].any()
        for bad in (float("inf"), float("nan")):
            k2 = k.masked_fill(padding[:, None, :, None], bad)  # what is ignored may hold anything
            v2 = v.masked_fill(padding[:, None, :, None], bad)
            assert torch.equal(
                out, rk.clustered_attention(q, k2, v2, causal=causal, key_padding_mask=padding, **options)
            )
        rk.clustered_attention(q, k.clone().fill_(float("inf")), v, causal=causal, **options)  # garbage, but no crash


def test_lists_end_at_their_first_gap() -> None:
    q, k, v = (x[:1, :2, :8].contiguous().requires_grad_() for x in qkv(20, key_heads=4))
    key_indices = torch.tensor([3, -1, 7, 5], dtype=torch.int32).expand(1, 2, 2, 4).contiguous()
    arguments = (q, k, v, None, key_indices, None, None, None, 4, 0, False, False, 0.5, 0.0, "cpu")
    out, _ = torch.ops.reformer_kernels.list_attention.default(*arguments)
    torch.testing.assert_close(out, v[:, :, 3:4].expand_as(out))
    _, grad_key, grad_value = torch.autograd.grad(out.sum(), (q, k, v))
    assert grad_value[:, :, 3].eq(8).all() and not grad_value[:, :, 4:].any()
    # A single key's score has no gradient: two sums of D products cancel, in whatever order each is added up.
    dim, value = v.shape[3], v[:, :, 3].detach()
    rounding = 2 * dim * torch.finfo(torch.float32).eps * value.abs().sum(-1, keepdim=True)
    assert (grad_key[:, :, 3].abs() <= 0.5 * q.detach().abs().sum(2) * rounding).all()
    assert not torch.cat([grad_key[:, :, :3], grad_key[:, :, 4:]], 2).any()


def test_selection_finds_far_keys() -> None:
    """Far keys to which a group gives nearly all weight: the window alone misses them."""
    q, k, v = (torch.randn(1, 1, 256, 16) for _ in range(3))
    direction = torch.randn(16)
    k[0, 0, 200:204] = 8 * direction / direction.norm()
    q[0, 0, :32] += 8 * direction / direction.norm()
    exact = F.scaled_dot_product_attention(q, k, v)[0, 0, :32]

    def error(**options: Any) -> float:
        out = rk.clustered_attention(q, k, v, budget=32, chunk_length=16, rest_term=False, **options)[0, 0, :32]
        return float((out - exact).norm() / exact.norm())

    assert error(local_fraction=0.5) < 0.01 < 0.5 < error(local_fraction=1.0)
