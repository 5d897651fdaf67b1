"""What the cuda backend says of calls, on fake tensors of a machine that need not have a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import reformer_kernels as rk
from benchmarks import roofline
from reformer_kernels._calls import AttentionCall, HashCall, ListCall, OrderCall, SelectCall
from reformer_kernels.backends import _common, cuda

RULES = rk.AttentionRules()
H100 = (132, 232448, 233472)
BUILT = bool(list(Path(cuda.__file__).parent.parent.glob("_cuda*.so")))
needs_library = pytest.mark.skipif(not BUILT, reason="built without CUDA kernels")


@pytest.fixture(autouse=True)
def fake_mode() -> Iterator[None]:
    with FakeTensorMode():
        yield


def hash_call(
    length: int = 1000, head_dim: int = 64, factors: tuple[int, ...] = (64, 32), dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
) -> HashCall:  # fmt: skip
    x = torch.empty(2, 8, length, head_dim, dtype=dtype, device=device)
    return HashCall(x, None, None, None, list(factors), 4, 64, "")


def order_call(length: int, n_buckets: int) -> OrderCall:
    return OrderCall(torch.empty(2, 8, 4, length, dtype=torch.int32, device="cuda"), None, n_buckets, "")


def test_it_needs_tensors_on_a_gpu() -> None:
    assert cuda.not_supported_reasons(hash_call(device="cpu")) == ["tensors are on cpu, not on a GPU"]


@needs_library
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": torch.float64}, "the dtype is float64; the kernels take float32, bfloat16 and float16"),
        ({"head_dim": 129}, "the head size is 129; the kernels take up to 128"),
        ({"factors": (2,) * 9}, "n_buckets has 9 factors; the kernels take up to 8"),
    ],
)
def test_it_refuses_with_reasons(options: dict[str, Any], reason: str) -> None:
    assert cuda.not_supported_reasons(hash_call()) == []
    assert cuda.not_supported_reasons(hash_call(**options)) == [reason]


def test_bounds_on_the_gpu_are_not_looked_at() -> None:
    """They are ours, and the host would have to wait; a fake tensor refuses it."""
    bounds = torch.empty(2, 3, dtype=torch.int32, device="cuda")
    assert _common.device_bounds(order_call(1000, 2)._replace(cu_seqlens=bounds)) is bounds


def attention_call(
    head_dim: int = 64, dtype: torch.dtype = torch.bfloat16, key_heads: int | None = None, rounds: int = 4,
    mask: bool = False, rules: rk.AttentionRules = RULES, length: int = 1000, **options: Any,
) -> AttentionCall:  # fmt: skip
    def rows(heads: int) -> torch.Tensor:
        return torch.empty(2, heads, length, head_dim, dtype=dtype, device="cuda")

    call = AttentionCall(
        query=rows(8), key=rows(key_heads) if key_heads else None, value=rows(key_heads or 8),
        order=torch.empty(2, 8, rounds, length, dtype=torch.int32, device="cuda") if rounds else None, buckets=None,
        key_padding_mask=None, attn_mask=torch.empty(1, 1, length, length, device="cuda") if mask else None,
        cu_seqlens=None, dropout_seed=None, chunk_length=64, chunks_before=1, chunks_after=0, causal=True,
        num_queries=None, scale=1.0, dropout_p=0.0, alignment="ring", rules_key=rules.key, backend="",
    )  # fmt: skip
    return call._replace(**options)


@needs_library
@pytest.mark.parametrize(
    ("options", "reasons"),
    [
        ({}, []),
        ({"key_heads": 2, "rounds": 0}, []),
        ({"key_heads": 8}, []),
        ({"rules": rk.AttentionRules.paper()}, []),
        ({"alignment": "bucket"}, []),
        ({"dtype": torch.float64}, ["the dtype is float64; the kernels take float32, bfloat16 and float16"]),
        ({"head_dim": 129}, ["the head size is 129; the kernels take up to 128"]),
        ({"mask": True}, ["the kernels take no attn_mask"]),
        ({"chunks_before": 255}, ["the windows of all rounds have 1024 chunks; the kernels take up to 1023"]),
        ({"chunks_before": 254, "rounds": 4}, []),
        ({"length": 2**28}, []),
        ({"length": 2**29}, ["a head has 2147483648 tokens in all rounds; the kernels take up to 1073741824"]),
        ({"key_heads": 2}, ["queries are sorted, and share key heads"]),
        ({"rules": rk.AttentionRules.lucidrains()}, []),
        (
            {"rules": rk.AttentionRules(own_position="sentinel", mask_value=-1e5), "alignment": "bucket"},
            [
                'rules.own_position="sentinel" with alignment="bucket" is served by the reference only',
                'rules.own_position="sentinel" with combine_rounds="softmax" is served by the reference only',
                "rules.mask_value=-100000 (above own_value - 1000) is served by the reference only",
            ],
        ),
        (
            {"rules": rk.AttentionRules(own_position="sentinel", own_value=-10.0, combine_rounds="exp_lse")},
            ["rules.own_value=-10 (not between -1e+06 and -1000) is served by the reference only"],
        ),
    ],
)  # fmt: skip
def test_it_refuses_attention_with_reasons(options: dict[str, Any], reasons: list[str]) -> None:
    assert cuda.not_supported_reasons(attention_call(**options)) == reasons


def test_without_a_library_the_reason_is_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "library", lambda: {"error": "not built"})
    assert cuda.not_supported_reasons(order_call(9, 2)) == ["the CUDA library: not built"]


@needs_library
def test_plans_are_described() -> None:
    assert not cuda.library().get("error")
    assert cuda.describe(hash_call(2048), H100) == (
        "blocks 128, threads 256, shared bytes 86400, head steps 4, column tiles of a round 6, rounds of a block 4, "
        "column tiles in shared memory 24, tokens of a block 256"
    )
    whole = cuda.describe(order_call(16384, 512), H100)
    assert whole.startswith("blocks 64, threads 1024") and "passes 1" in whole
    parts = cuda.describe(order_call(2**20, 8192), H100)
    assert "passes 2" in parts and "blocks of a sequence 64" in parts


def list_call(head_dim: int = 64, dtype: torch.dtype = torch.bfloat16, **options: Any) -> ListCall:
    def rows(heads: int) -> torch.Tensor:
        return torch.empty(2, heads, 1000, head_dim, dtype=dtype, device="cuda")

    key_indices = torch.empty(2, 8, 63, 96, dtype=torch.int32, device="cuda")
    call = ListCall(rows(8), rows(2), rows(2), None, key_indices, None, None, None, 16, 0, True, True, 0.125, 0.0, "")
    return call._replace(**options)


@needs_library
def test_it_refuses_lists_with_reasons() -> None:
    assert cuda.not_supported_reasons(list_call()) == []
    assert cuda.not_supported_reasons(list_call(head_dim=129, attn_mask=torch.empty(1, device="cuda"))) == [
        "the head size is 129; the kernels take up to 128", "the kernels take no attn_mask",
    ]  # fmt: skip
    described = cuda.describe(list_call(), H100)
    assert "forward: blocks 256, threads 128" in described and "gradients of keys: blocks" in described


def test_entries_of_lists_are_counted_in_whole_tiles() -> None:
    """As the kernels keep them, and the binding counts."""
    for width, entries in ((1, 2**31), (64, 2**31), (65, 2**32)):
        key_indices = torch.empty(1, 1, 2**25, width, dtype=torch.int32, device="cuda")
        reason = f"a head has {entries} entries in its lists; the kernels take up to {2**30}"
        assert cuda.kernel_reasons(list_call(key_indices=key_indices)) == [reason]
    key_indices = torch.empty(1, 1, 2**24, 1, dtype=torch.int32, device="cuda")
    assert cuda.kernel_reasons(list_call(key_indices=key_indices)) == []


def select_call(head_dim: int = 64, dtype: torch.dtype = torch.bfloat16, **options: Any) -> SelectCall:
    def rows(heads: int) -> torch.Tensor:
        return torch.empty(2, heads, 1000, head_dim, dtype=dtype, device="cuda")

    call = SelectCall(rows(8), rows(2), None, None, None, None, 16, 96, 24, 0, True, 0.125, "")
    return call._replace(**options)


@needs_library
def test_it_refuses_selections_with_reasons() -> None:
    assert cuda.not_supported_reasons(select_call()) == []
    assert cuda.not_supported_reasons(select_call(head_dim=129, dtype=torch.float64)) == [
        "the dtype is float64; the kernels take float32, bfloat16 and float16",
        "the head size is 129; the kernels take up to 128",
    ]
    assert cuda.describe(select_call(), H100) == (
        "head steps 4, blocks of keys 0, chosen ones 0, bytes of scratch memory 5322752; "
        "weights of keys: CTAs 64, CTAs at a time 64, candidates 1024, shared bytes 33280"
    )
    long = cuda.describe(select_call(key=torch.empty(2, 2, 2**20, 64, device="cuda")), H100)
    assert long == (
        "head steps 4, blocks of keys 16384, chosen ones 64, bytes of scratch memory 85534720; "
        "weights of blocks of keys: CTAs 64, CTAs at a time 64, candidates 16384, shared bytes 49664; "
        "weights of keys: CTAs 1008, CTAs at a time 1008, candidates 4096, shared bytes 20992"
    )


@needs_library
def test_a_device_whose_shared_memory_is_too_small_is_refused() -> None:
    rtx = (82, 101376, 102400)
    wide = attention_call(head_dim=128, dtype=torch.float32)
    assert cuda.memory_reasons(wide, H100) == []
    (reason,) = cuda.memory_reasons(wide, rtx)
    assert reason == "the kernels need 134912 bytes of shared memory for these rows, and the GPU has 101376"
    assert cuda.memory_reasons(attention_call(head_dim=128), rtx) == []
    assert cuda.memory_reasons(list_call(head_dim=64, dtype=torch.float32), rtx) == []
    assert cuda.memory_reasons(hash_call(), rtx) == []


@needs_library
def test_launches_of_attention_are_described() -> None:
    forward, queries, keys = cuda.describe(attention_call(length=32768), H100).split("; ")
    assert forward == (
        "forward: blocks 2736, threads 128, shared bytes 62720, head steps 4, stages 3, diagonal first 1, "
        "tiles of a block 3, rounds 4"
    )
    assert queries.startswith("gradients of queries: blocks 2736,")
    assert keys.startswith("gradients of keys: blocks 2736,")
    separate = cuda.describe(attention_call(length=32768, key_heads=2, rounds=0), H100).split("; ")
    assert "diagonal first 0" in separate[0] and "rounds 1" in separate[0]
    assert separate[2].startswith("gradients of keys: blocks 2048,")


@needs_library
def test_a_device_without_room_is_refused() -> None:
    with pytest.raises(RuntimeError, match="device"):
        cuda.describe(hash_call(), (132, 232448))  # type: ignore[arg-type]


@needs_library
@pytest.mark.parametrize("gpu", roofline.GPUS)
def test_roofline(gpu: str) -> None:
    assert not cuda.library().get("error")
    rows = list(roofline.rows(roofline.GPUS[gpu]))
    assert len({(shape, op) for shape, op, *_ in rows}) == len(rows) == len(roofline.SHAPES) * len(roofline.OPS)
    for _, _, _, *both in rows:
        assert len(both) == 3 * len(roofline.BUDGETS)
        assert all(0 < int(least) <= int(predicted) for least, predicted in zip(both[1::3], both[2::3], strict=True))


@needs_library
def test_predictions_are_near_what_an_h200_took() -> None:
    """benchmarks/results/h200-2026-11-26.md, microseconds."""
    took = {"hash": (115.6, 112.3, 112.2, 1144.8), "sort": (102.7, 80.1, 102.3, 429.5), "attention, forward": (420,)}
    shapes = [shape for shape in roofline.SHAPES if shape.length >= 2**16]
    for op, measured in took.items():
        for shape, microseconds in zip(shapes, measured, strict=False):
            predicted = 1e6 * roofline.predict(op, shape, roofline.GPUS["H200"]).seconds
            assert 1 / 2.1 < predicted / microseconds < 2.1, (op, shape.name)


def test_bytes_of_attention() -> None:
    """Per token, head and round, all of which are added to in place."""
    default = roofline.SHAPES[0]
    assert roofline.attention_cost(default, False, "cuda").bytes / default.rows == pytest.approx(491, abs=1)
    assert roofline.attention_cost(default, True, "cuda").bytes / default.rows == pytest.approx(1581, abs=1)
