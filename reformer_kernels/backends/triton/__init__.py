"""The Triton kernels: says what they serve, and imports Triton when a tensor on a GPU needs it."""

from __future__ import annotations

import functools
import importlib
import os
import shutil
from typing import Any

from ..._calls import AttentionCall, Call, HashCall, OrderCall
from .. import cuda

MAX_HEAD_DIM, MAX_CHUNKS = 256, 2**15 - 1  # chunks of all windows of a query: see attention.KEPT_BITS
LEAST_VERSION = (3, 6)
_MODULES = {
    "hash_buckets": "hash",
    "bucket_order": "order",
    "chunk_attention": "attention",
    "chunk_attention_backward": "attention_backward",
    "select_keys": "select",
    "describe": "explain",
    "list_attention": "lists",
    "list_attention_backward": "lists",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


@functools.cache
def missing() -> str | None:
    """Why Triton cannot be used, if it cannot."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < LEAST_VERSION:
        return f"triton is {triton.__version__}; the kernels need {'.'.join(map(str, LEAST_VERSION))}"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "triton needs a C compiler: neither gcc nor clang is on PATH, and CC is not set"
    return None


def not_supported_reasons(call: Call) -> list[str]:
    if call.device.type != "cuda":
        return [f"tensors are on {call.device}, not on a GPU"]
    return [*filter(None, [missing()]), *kernel_reasons(call)]


def kernel_reasons(call: Call) -> list[str]:
    """Why the kernels do not serve a call, wherever its tensors are."""
    if isinstance(call, OrderCall):
        return []
    if isinstance(call, HashCall):
        return cuda.row_reasons(MAX_HEAD_DIM, call.x)
    if isinstance(call, AttentionCall):
        return [
            *cuda.row_reasons(MAX_HEAD_DIM, call.query, call.value), *cuda.chunk_reasons(MAX_CHUNKS, call),
            *cuda.rule_reasons(call),
        ]  # fmt: skip
    return cuda.clustered_reasons(MAX_HEAD_DIM, call)
