"""The C++ kernels for the CPU: loads the library, checks what it serves, allocates what it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._calls import (
    AttentionCall,
    Call,
    HashCall,
    ListCall,
    OrderCall,
    SelectCall,
    compute_dtype,
    empty_results,
    out_of_range,
)
from . import _native, _sentinels
from ._common import new_gradients, wrong_device


def _load(folder: Path) -> str | None:
    libraries = sorted(folder.glob("_cpu*.so")) + sorted(folder.glob("_cpu*.pyd"))
    return _native.load(libraries[0]) if libraries else f"{folder}/_cpu*.so is not built"


_load_error = _load(Path(__file__).resolve().parent.parent)
_ops = _native.CPU_OPS


def build_info() -> dict[str, Any]:
    """Versions and instruction sets of the library; ``{"error": why}`` without one."""
    return {"error": _load_error} if _load_error else _ops.facts()


class use_isa:  # noqa: N801
    """Runs the kernels of one instruction set ("baseline", "avx2", "avx512") until the ``with`` block ends.

    Raises:
        RuntimeError: it is not in the library, or the processor lacks it.
    """

    def __init__(self, name: str) -> None:
        self._previous = _ops.select_isa({"name": name})

    def __enter__(self) -> use_isa:
        return self

    def __exit__(self, *exc: object) -> None:
        _ops.select_isa({"name": self._previous})


def not_supported_reasons(call: Call) -> list[str]:
    reasons = [f"the CPU library: {_load_error}"] if _load_error else []
    return reasons + wrong_device(call, "cpu") + kernel_reasons(call)


def kernel_reasons(call: Call) -> list[str]:
    """Why the kernels do not serve a call, wherever its tensors are."""
    return _sentinels.reasons_against(call) if isinstance(call, AttentionCall) else []


def describe(call: Call) -> str:
    return ""


def hash_buckets(call: HashCall) -> Tensor:
    arguments = _native.hash_arguments(call)
    _ops.hash_buckets(arguments)
    buckets: Tensor = arguments["buckets"]
    return buckets


def bucket_order(call: OrderCall) -> Tensor:
    arguments = _native.order_arguments(call)
    if _ops.bucket_order(arguments):
        raise out_of_range(call)
    order: Tensor = arguments["order"]
    return order


def _mask(call: AttentionCall | SelectCall | ListCall) -> Tensor | None:
    mask = call.attn_mask
    return mask if mask is None or mask.dtype == torch.bool else mask.to(compute_dtype(call.query))


@_sentinels.forward
def chunk_attention(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = empty_results(call)
    self_only = torch.empty_like(lse, dtype=torch.bool)
    _ops.chunk_attention_forward(
        {
            **_native.chunk_arguments(call),
            "attn_mask": _mask(call),
            "out": out,
            "lse": lse,
            "self_only": self_only,
        }
    )
    return out, lse, self_only


@_sentinels.backward
def chunk_attention_backward(
    call: AttentionCall, grad_out: Tensor, out: Tensor, lse: Tensor, self_only: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grads = new_gradients(call)
    _ops.chunk_attention_backward(
        {
            **_native.chunk_arguments(call),
            **_native.residuals(out, lse),
            **_native.gradients(grad_out, grads),
            "attn_mask": _mask(call),
            "self_only": self_only.contiguous(),
        }
    )
    return grads


def select_keys(call: SelectCall) -> Tensor:
    lists = torch.empty(call.lists_shape, dtype=torch.int32, device=call.device)
    _ops.select_keys({**_native.select_arguments(call), "attn_mask": _mask(call), "lists": lists})
    return lists


def list_attention(call: ListCall) -> tuple[Tensor, Tensor]:
    out, lse = empty_results(call)
    _ops.list_attention_forward({**_native.list_arguments(call), "attn_mask": _mask(call), "out": out, "lse": lse})
    return out, lse


def list_attention_backward(
    call: ListCall, grad_out: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grads = new_gradients(call)
    _ops.list_attention_backward(
        {
            **_native.list_arguments(call),
            **_native.residuals(out, lse),
            **_native.gradients(grad_out, grads),
            "attn_mask": _mask(call),
        }
    )
    return grads
