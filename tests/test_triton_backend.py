"""What the triton backend says of calls, on fake tensors of a machine that need not have a GPU."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import reformer_kernels as rk
from reformer_kernels.backends import triton

from .emulation.triton.kernels import needs_triton
from .test_cuda_backend import attention_call, hash_call, list_call, order_call, select_call

WIDE = "the head size is 257; the kernels take up to 256"
NO_DOUBLE = "the dtype is float64; the kernels take float32, bfloat16 and float16"
NO_MASK = "the kernels take no attn_mask"


@pytest.fixture(autouse=True)
def fake_mode() -> Iterator[None]:
    triton.missing.cache_clear()
    with FakeTensorMode():
        yield
    triton.missing.cache_clear()


@needs_triton()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_served(dtype: torch.dtype) -> None:
    makes = hash_call, attention_call, list_call, select_call
    for call in (order_call(1000, 512), *(make(head_dim=256, dtype=dtype) for make in makes)):
        assert triton.not_supported_reasons(call) == []


@needs_triton()
@pytest.mark.parametrize(
    ("make", "options", "reasons"),
    [
        (attention_call, {"head_dim": 257, "mask": True}, [WIDE, NO_MASK]),
        (attention_call, {"key_heads": 2}, ["queries are sorted, and share key heads"]),
        (attention_call, {"chunks_before": 10000}, [
            "the windows of all rounds have 40004 chunks; the kernels take up to 32767"]),
        (attention_call, {"rules": rk.AttentionRules.huggingface(half=True)}, []),
        (attention_call, {"rules": rk.AttentionRules.huggingface(), "alignment": "bucket"}, [
            'rules.own_position="sentinel" with alignment="bucket" is served by the reference only']),
        (attention_call, {"length": 2**29}, [
            "a head has 2147483648 tokens in all rounds; the kernels take up to 1073741824"]),
        (hash_call, {"head_dim": 257}, [WIDE]),
        (hash_call, {"device": "cpu"}, ["tensors are on cpu, not on a GPU"]),
        (list_call, {"dtype": torch.float64}, [NO_DOUBLE]),
        (select_call, {"head_dim": 257, "dtype": torch.float64}, [NO_DOUBLE, WIDE]),
    ],
)  # fmt: skip
def test_it_refuses_with_reasons(make: Any, options: dict[str, Any], reasons: list[str]) -> None:
    assert triton.not_supported_reasons(make(**options)) == reasons


@needs_triton()
def test_it_refuses_lists_of_too_many_places() -> None:
    key_indices = torch.empty(2, 8, 2**20, 2**11, dtype=torch.int32, device="cuda")
    reason = "a head has 2147483648 entries in its lists; the kernels take up to 1073741824"
    assert triton.not_supported_reasons(list_call(key_indices=key_indices)) == [reason]


@needs_triton()
@pytest.mark.parametrize("make", [list_call, select_call])
def test_it_refuses_masks_of_lists(make: Any) -> None:
    assert triton.not_supported_reasons(make(attn_mask=torch.empty(1, device="cuda"))) == [NO_MASK]


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    (reason,) = triton.not_supported_reasons(attention_call())
    assert reason.startswith("triton cannot be imported: ")


def test_with_an_old_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.5.1+git1234"))
    assert triton.not_supported_reasons(attention_call()) == ["triton is 3.5.1+git1234; the kernels need 3.6"]


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.8.0"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    reason = "triton needs a C compiler: neither gcc nor clang is on PATH, and CC is not set"
    assert triton.not_supported_reasons(attention_call()) == [reason]


@needs_triton()
def test_too_many_programs() -> None:
    launch = importlib.import_module(f"{triton.__name__}._launch")
    kernel = SimpleNamespace(__name__="order_kernel")
    with pytest.raises(ValueError, match="order_kernel would need 2147483648 programs; a launch has up to 2147483647"):
        launch.launch(kernel, 2**31, torch.device("cuda"), config=launch.Config(16, 16))


@needs_triton()
def test_explain(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = importlib.import_module(f"{triton.__name__}.configs")
    monkeypatch.setattr(configs, "_device_name", lambda device: "NVIDIA H100 PCIe")
    x = torch.empty(2, 8, 1000, 128, dtype=torch.bfloat16, device="cuda")
    text = rk.explain(rk.lsh_attention, x, x, chunk_length=256, backend="triton", n_buckets=8)
    assert (
        "triton     serves it: forward: tiles of 128 by 32, 8 warps, 2 stages; "
        "grad_query: tiles of 128 by 32, 8 warps, 2 stages; grad_keys: tiles of 32 by 32, 4 warps, 1 stages"
    ) in text
    assert "hash: tiles of 64 by 16, 4 warps, 1 stages" in text and "no: " not in text
    text = rk.explain(rk.clustered_attention, x, x, x, backend="triton", budget=256)
    assert "weigh: tiles of 64 by 64" in text and "forward: tiles of 64 by 32, 4 warps" in text
