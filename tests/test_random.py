"""Random shapes, rules and strides, drawn by hypothesis, against the float64 oracle.

``python -m tests.test_random SECONDS`` goes on with new seeds for that long (``make fuzz``).
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

import reformer_kernels as rk
from reformer_kernels import testing
from reformer_kernels.clustered import GROUPINGS

from .layouts import LAYOUTS

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
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
def lsh_calls(draw: st.DrawFn) -> tuple[Any, torch.dtype]:
    integer: Callable[[int, int], int] = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    batch, heads, length = integer(1, 2), integer(1, 3), integer(1, 90)
    generator = torch.Generator().manual_seed(integer(0, 2**32))
    normal: Callable[..., Tensor] = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    layout: Callable[[Tensor], Tensor] = lambda x: LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))](x)  # noqa: E731
    q, v = (layout(normal(batch, heads, length, integer(1, 20))) for _ in range(2))
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
    return testing.capture(rk.lsh_attention, q, v, **options), draw(st.sampled_from(DTYPES))


@st.composite
def clustered_calls(draw: st.DrawFn) -> tuple[Any, torch.dtype]:
    integer: Callable[[int, int], int] = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    key_heads = integer(1, 2)
    batch, heads, length, size = integer(1, 2), key_heads * integer(1, 3), integer(1, 90), integer(1, 90)
    if draw(st.booleans()):
        size = length
    generator = torch.Generator().manual_seed(integer(0, 2**32))
    layout: Callable[[Tensor], Tensor] = lambda x: LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))](x)  # noqa: E731
    width, value_width = integer(1, 20), integer(1, 20)
    shapes = ((heads, length, width), (key_heads, size, width), (key_heads, size, value_width))
    q, k, v = (layout(torch.randn((batch, *shape), generator=generator)) for shape in shapes)
    options: dict[str, Any] = {
        "budget": integer(1, 60), "local_fraction": draw(st.sampled_from([0.0, 0.25, 0.7, 1.0])),
        "chunk_length": integer(1, 70), "grouping": draw(st.sampled_from(GROUPINGS)),
        "rest_term": draw(st.booleans()), "causal": draw(st.booleans()), "hash_seed": integer(0, 100),
    }  # fmt: skip
    if draw(st.booleans()):
        options |= {"dropout_p": draw(st.sampled_from([0.1, 1.0])), "dropout_seed": torch.tensor([integer(0, 2**62)])}
    if draw(st.booleans()):
        options["key_padding_mask"] = torch.rand(batch, size, generator=generator) < draw(st.sampled_from([0.2, 1.0]))
    if draw(st.booleans()):
        options["query_padding_mask"] = torch.rand(batch, length, generator=generator) < 0.5
    if draw(st.booleans()):
        mask = torch.randn(batch, 1, length, size, generator=generator)
        options["attn_mask"] = mask if draw(st.booleans()) else mask > 0
    call = testing.capture(rk.clustered_attention, q, k, v, op="list_attention", **options)
    return call, draw(st.sampled_from(DTYPES))


CALLS = lsh_calls() | clustered_calls()


def check(case: tuple[Any, torch.dtype]) -> None:
    call, dtype = case
    testing.assert_matches_oracle(call, dtype, "cpu")


HEALTHY = settings(deadline=None, suppress_health_check=list(HealthCheck))
test_random_calls = settings(HEALTHY, max_examples=250, derandomize=True)(given(CALLS)(check))


def fuzz(budget: float) -> int:
    """Runs new cases for ``budget`` seconds, hypothesis shrinking what fails; returns how many."""
    examples, round_number, start = 0, 0, time.monotonic()
    first_seed = time.time_ns()

    def counted(case: tuple[Any, torch.dtype]) -> None:
        nonlocal examples
        examples += 1
        check(case)

    while time.monotonic() - start < budget:
        # without the database, so that a round does not begin with the last one's examples
        run = settings(HEALTHY, max_examples=50, database=None)(given(CALLS)(counted))
        seed(first_seed + round_number)(run)()
        round_number += 1
    return examples


if __name__ == "__main__":
    torch.set_num_threads(1)  # the cases are small
    torch.use_deterministic_algorithms(True)  # torch.empty gives NaN, as in the tests
    print(f"{fuzz(float(sys.argv[1]))} cases passed, 0 failed")
