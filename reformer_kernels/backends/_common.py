"""What backends with kernels have in common: the tensors that kernels take, and the refusals of calls."""

from __future__ import annotations

import torch
from torch import Tensor

from .._calls import AttentionCall, Call, ListCall, OrderCall, SelectCall, empty_gradients
from .._checks import check_bounds
from . import _sentinels

MAX_SLOTS = 2**30  # which kernels of GPUs count in 32 bits, with windows beyond both ends


# ---- tensors


def rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.clone(memory_format=torch.contiguous_format)


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def device_bounds(call: OrderCall | AttentionCall) -> Tensor | None:
    """cu_seqlens where the tensors are, checked on the CPU, as compiled code has not looked at them.

    Those of each batch row, which are ours, are there already; looking at them would wait for the GPU.
    """
    bounds = call.cu_seqlens
    if bounds is None:
        return None
    if bounds.dim() == 1:
        check_bounds(bounds, call.buckets.shape[3] if isinstance(call, OrderCall) else call.query.shape[2])
    return bounds.to(call.device, non_blocking=True).contiguous()


def new_gradients(call: AttentionCall | ListCall) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for a backward to write; zero where there is no sequence of a head, whose work would write them."""
    grads = empty_gradients(call)
    if 0 in call.query.shape[:3]:
        for grad in grads:
            grad.zero_()
    return grads


def rest_sums(call: ListCall) -> tuple[Tensor, Tensor, Tensor] | None:
    """Sums of key and value [B, Hk, n, D] and how many they are [B, n]: at each position, or of all keys.

    None: the call has no rest term, or no keys for it.
    """
    batch, keys = call.key.shape[0], call.key.shape[2] - call.context_keys
    if not call.rest_term or keys <= 0:
        return None
    counted = torch.ones(batch, keys, dtype=torch.int32, device=call.device)
    if call.key_padding_mask is not None:
        counted = counted.masked_fill(call.key_padding_mask[:, :keys], 0)
    rows = [x[:, :, :keys].float().masked_fill((counted == 0)[:, None, :, None], 0.0) for x in (call.key, call.value)]
    if call.causal:
        return rows[0].cumsum(2), rows[1].cumsum(2), counted.cumsum(1, dtype=torch.int32)
    return rows[0].sum(2, keepdim=True), rows[1].sum(2, keepdim=True), counted.sum(1, keepdim=True, dtype=torch.int32)


def per_key(call: ListCall, terms: Tensor) -> Tensor:
    """[B, Hk, n, D] of terms [B, H, L, D]: the sum of those of all queries that may see a key, or any key."""
    terms = terms.unflatten(1, (call.key.shape[1], -1)).sum(2)
    if not call.causal:
        return terms.sum(2, keepdim=True)
    # Keys after the last query get nothing.
    missing = max(0, call.key.shape[2] - call.context_keys - terms.shape[2])
    return torch.nn.functional.pad(terms.flip(2).cumsum(2).flip(2), (0, 0, 0, missing))


# ---- refusals: why kernels do not serve a call


def wrong_device(call: Call, wanted: str) -> list[str]:
    """Of a backend for "cpu" or "cuda"."""
    place = "the CPU" if wanted == "cpu" else "a GPU"
    return [] if call.device.type == wanted else [f"tensors are on {call.device}, not on {place}"]


def row_reasons(max_head_dim: int, *rows: Tensor) -> list[str]:
    """Of kernels of a GPU, for rows of up to a head size."""
    reasons, head_dim = [], max(x.shape[3] for x in rows)
    if rows[0].dtype == torch.float64:
        reasons.append("the dtype is float64; the kernels take float32, bfloat16 and float16")
    if head_dim > max_head_dim:
        reasons.append(f"the head size is {head_dim}; the kernels take up to {max_head_dim}")
    return reasons


def slot_reasons(name: str, slots: int) -> list[str]:
    if slots <= MAX_SLOTS:
        return []
    return [f"a head has {slots} {name}; the kernels take up to {MAX_SLOTS}"]


def mask_reasons(call: AttentionCall | SelectCall | ListCall) -> list[str]:
    return [] if call.attn_mask is None else ["the kernels take no attn_mask"]


def chunk_reasons(max_head_dim: int, max_chunks: int, call: AttentionCall) -> list[str]:
    """Of kernels of a GPU, for rows of up to a head size and windows of up to so many chunks in all rounds."""
    rounds = 1 if call.order is None else call.order.shape[2]
    reasons = row_reasons(max_head_dim, call.query, call.value)
    reasons += slot_reasons("tokens in all rounds", rounds * call.query.shape[2])
    chunks = rounds * (call.chunks_before + 1 + call.chunks_after)
    if chunks > max_chunks:
        reasons.append(f"the windows of all rounds have {chunks} chunks; the kernels take up to {max_chunks}")
    reasons += mask_reasons(call)
    if call.order is not None and call.key is not None and call.key.shape[1] != call.query.shape[1]:
        reasons.append("queries are sorted, and share key heads")
    return [*reasons, *_sentinels.reasons_against(call)]


def clustered_reasons(max_head_dim: int, call: SelectCall | ListCall, tile: int = 1) -> list[str]:
    """Of kernels of a GPU, for rows of up to a head size, whose lists have whole tiles of entries."""
    reasons = row_reasons(max_head_dim, call.query, call.value if isinstance(call, ListCall) else call.key)
    reasons += mask_reasons(call)
    if isinstance(call, ListCall):
        chunks, width = call.key_indices.shape[2:]
        reasons += slot_reasons("entries in its lists", chunks * (-(-width // tile) * tile))
    return reasons
