"""The C++ kernels for the CPU: loads the library, checks what it serves, allocates what it writes."""

from __future__ import annotations

import json
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
    empty_gradients,
    empty_results,
    out_of_range,
)  # fmt: skip
from .philox import drop_threshold, keep_factor


def load(library: Path) -> str | None:
    """Registers the ops of a library; the reason why it cannot be loaded, if it cannot."""
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        has = f"which has CUDA {torch.version.cuda}" if torch.version.cuda else "which has no CUDA"
        # torch hides what the loader said.
        return f"{library.name} cannot be loaded beside torch {torch.__version__}, {has}: {error.__cause__ or error}"
    return None


def _load(folder: Path) -> str | None:
    libraries = sorted(folder.glob("_cpu*.so")) + sorted(folder.glob("_cpu*.pyd"))
    return load(libraries[0]) if libraries else f"{folder}/_cpu*.so is not built"


_load_error = _load(Path(__file__).resolve().parent.parent)
_ops = torch.ops.reformer_kernels_cpu


def build_info() -> dict[str, Any]:
    """Versions and instruction sets of the library; ``{"error": why}`` without one."""
    return {"error": _load_error} if _load_error else json.loads(_ops.build_info())


class use_isa:  # noqa: N801
    """Runs the kernels of one instruction set ("baseline", "avx2", "avx512") until the ``with`` block ends.

    Raises:
        RuntimeError: it is not in the library, or the processor lacks it.
    """

    def __init__(self, name: str) -> None:
        self._previous = _ops.select_isa(name)

    def __enter__(self) -> use_isa:
        return self

    def __exit__(self, *exc: object) -> None:
        _ops.select_isa(self._previous)


def not_supported_reasons(call: Call) -> list[str]:
    reasons = [f"the CPU library: {_load_error}"] if _load_error else []
    if call.device.type != "cpu":
        reasons.append(f"tensors are on {call.device}, not on the CPU")
    return [*reasons, *kernel_reasons(call)]


def kernel_reasons(call: Call) -> list[str]:
    """Why the kernels do not serve a call, wherever its tensors are."""
    reasons = []
    if isinstance(call, AttentionCall):
        rules = call.rules
        if call.key is None and rules.own_position == "sentinel":
            reasons.append('rules.own_position="sentinel" is served by the reference only')
        if rules.combine_rounds == "exp_lse":
            reasons.append('rules.combine_rounds="exp_lse" is served by the reference only')
        if rules.window_order != "position" and call.chunks_before:
            reasons.append('rules.window_order="self_first" is served by the reference only')
    return reasons


def rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.clone(memory_format=torch.contiguous_format)


def hash_buckets(call: HashCall) -> Tensor:
    rotations, factors = call.resolve()
    x = rows(call.x)
    batch, heads, length, _ = x.shape
    buckets = torch.empty((batch, heads, rotations.shape[3], length), dtype=torch.int32, device=x.device)
    _ops.hash_buckets(
        x, rotations.to(compute_dtype(x)).contiguous(), contiguous(call.key_padding_mask), factors, buckets
    )
    return buckets


def bucket_order(call: OrderCall) -> Tensor:
    order = torch.empty_like(call.buckets, memory_format=torch.contiguous_format)
    if _ops.bucket_order(call.buckets.contiguous(), contiguous(call.cu_seqlens), call.n_buckets, order):
        raise out_of_range(call)
    return order


_FLAGS = ("causal", "l2_norm", "mask_padded_queries", "within_bucket", "dedup", "bucket_aligned", "rest")  # rk::Flag


def _flags(**flags: bool) -> int:
    return sum(value << _FLAGS.index(name) for name, value in flags.items())


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _mask(call: AttentionCall | SelectCall | ListCall) -> Tensor | None:
    mask = call.attn_mask
    return mask if mask is None or mask.dtype == torch.bool else mask.to(compute_dtype(call.query))


def chunk_arguments(call: AttentionCall) -> tuple[Any, ...]:
    """What forward and backward of this library and the CUDA one take first."""
    return (
        rows(call.query),
        None if call.key is None else rows(call.key),
        rows(call.value),
        contiguous(call.order),
        contiguous(call.buckets),
        contiguous(call.key_padding_mask),
        contiguous(call.cu_seqlens),
        call.dropout_seed,
        call.chunk_length,
        call.chunks_before,
        call.chunks_after,
        call.n_queries,
        call.scale,
        *_dropout(call),
        chunk_flags(call),
    )


def chunk_flags(call: AttentionCall) -> int:
    rules = call.rules
    return _flags(
        causal=call.causal,
        l2_norm=rules.key_norm == "l2",
        mask_padded_queries=rules.mask_padded_queries,
        within_bucket=rules.within_bucket and call.key is None,
        dedup=rules.dedup == "log_count",
        bucket_aligned=call.alignment == "bucket",
    )


def list_flags(call: ListCall) -> int:
    return _flags(causal=call.causal, rest=call.rest_term)


def _dropout(call: AttentionCall | ListCall) -> tuple[int, float]:
    return drop_threshold(call.dropout_p) if call.dropout_p > 0 else 0, keep_factor(call.dropout_p)


def new_gradients(call: AttentionCall | ListCall) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for a backward to write; zero where there is no unit of work, which would write them."""
    grads = empty_gradients(call)
    if 0 in call.query.shape[:3]:
        for grad in grads:
            grad.zero_()
    return grads


def chunk_attention(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = empty_results(call)
    self_only = torch.empty_like(lse, dtype=torch.bool)
    _ops.chunk_attention_forward(_mask(call), *chunk_arguments(call), out, lse, self_only)
    return out, lse, self_only


def chunk_attention_backward(
    call: AttentionCall, grad_out: Tensor, out: Tensor, lse: Tensor, self_only: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grads = new_gradients(call)
    _ops.chunk_attention_backward(
        _mask(call), *chunk_arguments(call), rows(grad_out), rows(out), lse.contiguous(), self_only.contiguous(), *grads
    )
    return grads


def select_arguments(call: SelectCall) -> tuple[Any, ...]:
    """What this library and the CUDA one take."""
    return (
        rows(call.query), rows(call.key), contiguous(call.order), contiguous(call.query_padding_mask),
        contiguous(call.key_padding_mask), call.windows, call.chunk_length, call.budget,
        call.context_keys, call.scale, _flags(causal=call.causal),
    )  # fmt: skip


def select_keys(call: SelectCall) -> Tensor:
    lists = torch.empty(call.lists_shape, dtype=torch.int32, device=call.query.device)
    _ops.select_keys(_mask(call), *select_arguments(call), lists)
    return lists


def list_arguments(call: ListCall) -> tuple[Any, ...]:
    """What forward and backward of this library and the CUDA one take first."""
    return (
        rows(call.query), rows(call.key), rows(call.value), contiguous(call.order), call.key_indices.contiguous(),
        contiguous(call.key_padding_mask), call.dropout_seed, call.chunk_length, call.context_keys, call.scale,
        *_dropout(call), list_flags(call),
    )  # fmt: skip


def list_attention(call: ListCall) -> tuple[Tensor, Tensor]:
    out, lse = empty_results(call)
    _ops.list_attention_forward(_mask(call), *list_arguments(call), out, lse)
    return out, lse


def list_attention_backward(
    call: ListCall, grad_out: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grads = new_gradients(call)
    _ops.list_attention_backward(
        _mask(call), *list_arguments(call), rows(out), lse.contiguous(), rows(grad_out), *grads
    )
    return grads
