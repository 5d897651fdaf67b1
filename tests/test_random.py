"""Random cases, drawn by hypothesis, against the float64 oracle."""

from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import reformer_kernels as rk
from reformer_kernels import testing

RULES = st.builds(
    rk.AttentionRules,
    key_norm=st.sampled_from(["rms", "l2"]),
    scale=st.sampled_from([None, 1.0, -2.0, 0.0]),
    padding_bucket=st.booleans(),
    mask_padded_queries=st.booleans(),
    within_bucket=st.booleans(),
    dedup=st.sampled_from(["none", "log_count"]),
)


@st.composite
def calls(draw: st.DrawFn) -> tuple[Any, torch.dtype]:
    integer = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    batch, heads, length = integer(1, 2), integer(1, 3), integer(1, 90)
    generator = torch.Generator().manual_seed(integer(0, 2**32))
    normal = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    q, v = normal(batch, heads, length, integer(1, 20)), normal(batch, heads, length, integer(1, 20))
    options: dict[str, Any] = {
        "n_hashes": integer(1, 4),
        "n_buckets": draw(st.sampled_from([2, 6, [4, 6], 300])),
        "chunk_length": integer(1, 40),
        "chunks_before": integer(0, 3),
        "chunks_after": integer(0, 3),
        "causal": draw(st.booleans()),
        "rules": draw(RULES),
        "alignment": draw(st.sampled_from(["ring", "bucket"])),
        "hash_seed": integer(0, 1000),
    }
    if draw(st.booleans()):
        options |= {
            "dropout_p": draw(st.sampled_from([0.1, 0.5, 1.0])),
            "dropout_seed": torch.tensor([integer(0, 2**62)]),
        }
    if draw(st.booleans()):
        options["key_padding_mask"] = torch.rand(batch, length, generator=generator) < draw(st.sampled_from([0.2, 1.0]))
    if draw(st.booleans()):
        cuts = sorted([integer(0, length), integer(0, length)])
        options["cu_seqlens"] = torch.tensor([0, *cuts, length], dtype=torch.int32)
    elif draw(st.booleans()):
        options["num_queries"] = integer(0, length)
    if draw(st.booleans()):
        mask = normal(batch, 1, options.get("num_queries", length), length)
        options["attn_mask"] = mask if draw(st.booleans()) else mask > 0
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    return testing.capture(rk.lsh_attention, q, v, **options), dtype


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(calls())
def test_random_calls(case: tuple[Any, torch.dtype]) -> None:
    call, dtype = case
    testing.assert_matches_oracle(call, dtype, "cpu")
