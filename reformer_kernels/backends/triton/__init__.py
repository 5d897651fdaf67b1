"""The Triton kernels: says what they serve, and imports Triton when a tensor on a GPU needs it."""

from __future__ import annotations

import functools
import os
import shutil

from torch import Tensor

from ..._calls import AttentionCall, Call, HashCall, ListCall, OrderCall, SelectCall
from .. import _sentinels
from .._common import chunk_reasons, clustered_reasons, row_reasons, wrong_device

MAX_HEAD_DIM, MAX_CHUNKS = 256, 2**15 - 1  # chunks of all windows of a query: see attention.KEPT_BITS
LEAST_VERSION = (3, 6)


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
    return wrong_device(call, "cuda") or [*filter(None, [missing()]), *kernel_reasons(call)]


def kernel_reasons(call: Call) -> list[str]:
    """Why the kernels do not serve a call, wherever its tensors are."""
    if isinstance(call, OrderCall):
        return []
    if isinstance(call, HashCall):
        return row_reasons(MAX_HEAD_DIM, call.x)
    if isinstance(call, AttentionCall):
        return chunk_reasons(MAX_HEAD_DIM, MAX_CHUNKS, call)
    return clustered_reasons(MAX_HEAD_DIM, call)


# ---- the ops, whose modules need Triton


def hash_buckets(call: HashCall) -> Tensor:
    from . import hash

    return hash.hash_buckets(call)


def bucket_order(call: OrderCall) -> Tensor:
    from . import order

    return order.bucket_order(call)


@_sentinels.forward
def chunk_attention(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    from . import attention

    return attention.chunk_attention(call)


@_sentinels.backward
def chunk_attention_backward(
    call: AttentionCall, grad_out: Tensor, out: Tensor, lse: Tensor, self_only: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from . import attention_backward

    return attention_backward.chunk_attention_backward(call, grad_out, out, lse, self_only)


def select_keys(call: SelectCall) -> Tensor:
    from . import select

    return select.select_keys(call)


def list_attention(call: ListCall) -> tuple[Tensor, Tensor]:
    from . import lists

    return lists.list_attention(call)


def list_attention_backward(
    call: ListCall, grad_out: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from . import lists

    return lists.list_attention_backward(call, grad_out, out, lse)


def describe(call: Call) -> str:
    from . import explain

    return explain.describe(call)
