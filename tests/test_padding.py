"""A row does not depend on the length to which its batch is padded: outputs and gradients, bit for bit on the CPU."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import reformer_kernels as rk

from .rounding import assert_equal_to_rounding

BACKENDS = ["cpu", "reference"]
ENDS = (40, 17, 0, 33, 8)  # of the rows of a batch; behind them is padding
RULES = [
    rk.AttentionRules(),
    rk.AttentionRules.paper(),
    rk.AttentionRules(padding_bucket=False, mask_padded_queries=True),
]
WINDOWS: list[dict[str, Any]] = [
    {"chunk_length": 5, "chunks_before": 2, "chunks_after": 1},
    {"chunk_length": 24, "chunks_after": 1},  # longer than some rows, not than the batch
]
MODES: list[dict[str, bool]] = [{}, {"causal": True}, {"causal": True, "shift_keys": True}]
LAST = torch.tensor(ENDS)[:, None]
PADDING = torch.arange(40) >= LAST
GAPS = PADDING.clone()
GAPS[0, 4:7] = GAPS[3, :2] = True  # these stay


def tensors(*heads: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Rows [B, H, L, 8]; nothing may come of what is in the padding."""
    rows = [torch.randn(len(ENDS), h, 40, 8, dtype=dtype) for h in heads]
    for x in rows:
        x.masked_fill_(PADDING[:, None, :, None], torch.nan)
    return rows


def check(attend: Callable[..., Tensor], rows: list[Tensor], exact: bool, queries: int = 40) -> None:
    """attend(*rows, key_padding_mask) of the batch gives each row what it has alone, without its padding."""

    def results(select: slice, length: int) -> list[Tensor]:
        given = [x[select, :, :length].clone().requires_grad_() for x in rows]
        out = attend(*given, key_padding_mask=GAPS[select, :length])
        grad_out = torch.randn(len(ENDS), 4, 40, 8, generator=torch.Generator().manual_seed(1)).to(out.dtype)
        grad_out = grad_out[select, : out.shape[1], : out.shape[2]]
        return [out.detach(), *torch.autograd.grad(out, given, grad_out)]

    together = results(slice(None), 40)
    # Of float64: a score has a product of 8 terms, its exponential as many as it is large, and at most all keys of both
    # rounds are summed, in a gradient all queries, too.
    largest = max(float(x.nan_to_num(0).detach().square().sum(-1).max()) for x in rows)
    roundings = 8 + math.ceil(largest) + 2 * 40 + 2 * 40
    for b, end in enumerate(ENDS):
        assert (together[0][b, :, end:] == 0).all()
        for x, alone in zip(together, results(slice(b, b + 1), end), strict=True):
            length = min(end, queries) if x is together[0] else end
            assert alone.shape[2] == length
            if exact:
                assert torch.equal(x[b, :, :length], alone[0])
            elif length:
                assert_equal_to_rounding(x[b, :, :length], alone[0], roundings)


@pytest.mark.parametrize("rules", RULES, ids=["default", "paper", "padding by content"])
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("alignment", ["ring", "bucket"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_lsh_attention(backend: str, alignment: str, mode: dict[str, bool], rules: rk.AttentionRules) -> None:
    for window in WINDOWS:
        options: dict[str, Any] = {
            "n_hashes": 2, "n_buckets": 4, "rules": rules, "alignment": alignment, **mode, **window,
        }  # fmt: skip
        check(partial(rk.lsh_attention, backend=backend, **options), tensors(2, 2), backend == "cpu")


@pytest.mark.parametrize("rules", RULES, ids=["default", "paper", "padding by content"])
@pytest.mark.parametrize("alignment", ["ring", "bucket"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_padding_holds_has_no_effect(
    backend: str, mode: dict[str, bool], side: str, alignment: str, rules: rk.AttentionRules
) -> None:
    mask = PADDING.flip(1) if side == "left" else PADDING
    padded = mask[:, None, :, None]
    rows = torch.randn(2, len(ENDS), 2, 40, 8)
    outs = []
    for garbage in (0.0, 1e4, torch.inf, torch.nan):
        q, v = rows.masked_fill(padded, garbage)
        options: dict[str, Any] = {"n_buckets": 4, "chunk_length": 8, "alignment": alignment, "rules": rules, **mode}
        if not rules.padding_bucket:  # where padding is sorted decides who shares a window
            options["buckets"] = torch.randint(
                4, (len(ENDS), 2, 4, 40), generator=torch.Generator().manual_seed(1)
            ).int()
        out = rk.lsh_attention(q, v, key_padding_mask=mask, backend=backend, **options)
        outs.append(out.masked_fill(padded, 0.0))
        assert torch.equal(outs[0], outs[-1])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_local_attention(backend: str, causal: bool) -> None:
    for window in WINDOWS:
        attend = partial(rk.local_attention, causal=causal, backend=backend, **window)
        check(attend, tensors(4, 2, 2), backend == "cpu")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_context_keys(backend: str, causal: bool) -> None:
    """The first 20 rows are queries, but for a row that ends before."""

    def attend(q: Tensor, v: Tensor, **mask: Any) -> Tensor:
        queries = min(20, q.shape[2])
        out: Tensor = rk.lsh_attention(
            q, v, num_queries=queries, n_buckets=4, chunk_length=8, causal=causal, backend=backend, **mask
        )
        return out

    check(attend, tensors(2, 2), backend == "cpu", queries=20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_instruction_sets(isa: str, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"chunk_length": 8, "chunks_after": 1}
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for attend, heads in ((partial(rk.lsh_attention, n_buckets=4), (2, 2)), (rk.local_attention, (2, 1, 1))):
            check(partial(attend, **options), tensors(*heads, dtype=dtype), True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_without_padding_at_the_end_changes_nothing(backend: str) -> None:
    """Dropout included, which tells rows by their number in the batch, not by their length."""
    q, v = torch.randn(2, 3, 2, 40, 8)
    gaps = torch.zeros(3, 40, dtype=torch.bool)
    gaps[1, 3:5] = True
    options: dict[str, Any] = {
        "n_buckets": 4, "chunk_length": 8, "backend": backend, "dropout_p": 0.3, "dropout_seed": torch.tensor([7]),
    }  # fmt: skip
    none = rk.lsh_attention(q, v, **options)
    torch.testing.assert_close(rk.lsh_attention(q, v, key_padding_mask=torch.zeros_like(gaps), **options), none)
    cut, kept = (
        rk.lsh_attention(q, v, key_padding_mask=gaps, rules=rk.AttentionRules(cut_padding=cut), **options)
        for cut in (True, False)
    )
    torch.testing.assert_close(cut, kept)
    padded = [torch.cat([x, torch.full((3, 2, 9, 8), torch.nan)], 2) for x in (q, v)]
    mask = torch.arange(49).expand(3, -1) >= 40
    torch.testing.assert_close(rk.lsh_attention(*padded, key_padding_mask=mask, **options)[:, :, :40], none)


def test_published_rules_keep_their_padding() -> None:
    """As their originals do, whose windows go round to the padding."""
    assert rk.AttentionRules().cut_padding and rk.AttentionRules.paper().cut_padding
    q, v = (x.nan_to_num(0.0) for x in tensors(2, 2))
    options: dict[str, Any] = {"n_buckets": 4, "chunk_length": 8, "chunks_after": 1, "backend": "reference"}
    for rules in (rk.AttentionRules.lucidrains(), rk.AttentionRules.huggingface()):
        assert not rules.cut_padding
        changed: dict[str, Any] = {**rules.differences(), "cut_padding": True}
        outs = [
            rk.lsh_attention(q, v, rules=x, key_padding_mask=PADDING, **options)
            for x in (rules, rk.AttentionRules(**changed))
        ]
        assert not torch.equal(*(x[1, :, :17] for x in outs)) and torch.equal(*(x[0] for x in outs))


@pytest.mark.parametrize(
    "attend",
    [
        rk.lsh_attention,
        partial(rk.lsh_attention, causal=True, shift_keys=True),
        lambda q, v, **options: rk.local_attention(q, q, v, **options),
    ],
)
def test_compiles_for_all_lengths(attend: Callable[..., Tensor]) -> None:
    def step(q: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return attend(q, v, chunk_length=8, key_padding_mask=mask)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (40, 33, 47):
            q, v = torch.randn(2, 2, 2, length, 8)
            mask = torch.arange(length) >= torch.tensor([[length], [length - 9]])
            assert torch.equal(compiled(q, v, mask), step(q, v, mask))
