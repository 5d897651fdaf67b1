"""Rules with sentinel scores, by kernels that have none.

Beside a real score a sentinel has no weight: it lies so far below that its exponential is 0. So it decides the result
of lone queries alone, which see no key but their own in any round. Kernels compute the others. A lone query gets its
own value, times a factor that only the rounding of numbers as large as the sentinel keeps from being 1, and that
depends on nothing but how often the query meets its own key in each round.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import NamedTuple

import torch
from torch import Tensor

from .._calls import AttentionCall, compute_dtype
from .philox import drop_threshold, keep_factor, philox

_Results = tuple[Tensor, Tensor, Tensor]
_Forward = Callable[[AttentionCall], _Results]
_Backward = Callable[[AttentionCall, Tensor, Tensor, Tensor, Tensor], _Results]
LOWEST = -1e6  # float32 still tells sentinels apart that differ by less than 1
NEGLIGIBLE = 1e3  # a sentinel so far below a score has no weight beside it, in any dtype


def has_sentinels(call: AttentionCall) -> bool:
    return call.key is None and call.rules.own_position == "sentinel"


def reasons_against(call: AttentionCall) -> list[str]:
    """Why kernels, with what is done here, do not serve the sentinels of a call."""
    if not has_sentinels(call):
        return []
    rules = call.rules
    kind, refused = 'rules.own_position="sentinel" with', []
    if not call.is_ring:
        refused.append(f'{kind} alignment="{call.alignment}"')
    if call.attn_mask is not None and call.attn_mask.dtype != torch.bool:  # may lift scores below the sentinels
        refused.append(f"{kind} a float attn_mask")
    if call.cu_seqlens is not None:
        of_rows = call.cu_seqlens.dim() == 2  # where the padding of each row begins
        refused.append(f"{kind} {'padding and rules.cut_padding' if of_rows else 'cu_seqlens'}")
    if rules.combine_rounds != "exp_lse":
        refused.append(f'{kind} combine_rounds="{rules.combine_rounds}"')
    if not LOWEST <= rules.own_value <= -NEGLIGIBLE:
        refused.append(f"rules.own_value={rules.own_value:g} (not between {LOWEST:g} and {-NEGLIGIBLE:g})")
    elif rules.mask_value is not None and not rules.mask_value <= rules.own_value - NEGLIGIBLE:
        refused.append(f"rules.mask_value={rules.mask_value:g} (above own_value - {NEGLIGIBLE:g})")
    return [f"{what} is served by the reference only" for what in refused]


class _Rows(NamedTuple):
    """Some queries of a call: batch rows, heads and positions, each [n]."""

    batch: Tensor
    head: Tensor
    position: Tensor


def _lone_rows(lone: Tensor) -> _Rows:
    """Rows [B, H, n_queries] that may be lone: those that are; on a GPU, which the host does not wait for, all."""
    return _Rows(*lone.nonzero(as_tuple=True)) if lone.device.type == "cpu" else _all_rows(lone)


def _all_rows(lone: Tensor) -> _Rows:
    number = torch.arange(lone.numel(), device=lone.device)
    heads, queries = lone.shape[1:]
    return _Rows(number // (heads * queries), number // queries % heads, number % queries)


class _Own(NamedTuple):
    """What queries get if they are lone, each [n]."""

    weight: Tensor  # of the own value
    lse: Tensor


def _own(call: AttentionCall, at: _Rows) -> _Own:
    """As the reference computes it, rounding by rounding."""
    rules, (heads, length) = call.rules, call.query.shape[1:3]
    dtype, device = compute_dtype(call.query), call.device
    single = call.is_single_window(length)
    before, after = (0, 0) if single else (call.chunks_before, call.chunks_after)
    if call.order is None:
        slot = at.position[:, None]  # [n, R]
    else:
        order = call.order[:, :, : 1 if single else None].long()
        place = torch.arange(length, device=device).expand(order.shape)
        slot = torch.empty_like(order).scatter_(3, order, place)[at.batch, at.head, :, at.position]
    rounds = slot.shape[1]
    chunks = -(-length // call.chunk_length)  # of a round
    chunk = slot // call.chunk_length + chunks * torch.arange(rounds, device=device)
    offset = torch.arange(-before, after + 1, device=device)
    times, kept = [], []
    for r in range(rounds):
        window = (chunk[:, r, None] + offset) % (rounds * chunks)  # [n, chunks of the window]
        met = window[:, :, None] == chunk[:, None]  # [n, chunks of the window, R]: the query's own key is there
        if call.masks_other_buckets:
            met &= torch.arange(rounds, device=device) == r
        times.append(met.sum((1, 2)))
        kept.append(times[r].to(dtype))
        if call.dropout_p > 0:
            assert call.dropout_seed is not None
            size = (length - window % chunks * call.chunk_length).clamp(max=call.chunk_length)
            begin = size.cumsum(1) - size
            key = begin[:, :, None] + (slot % call.chunk_length)[:, None]  # its place in the window
            row = (
                slot[:, r, None, None],
                torch.full_like(slot[:1, :1, None], r),
                (at.batch * heads + at.head)[:, None, None],
            )
            words = philox(call.dropout_seed.to(device), key // 4, *row)
            word = words.gather(-1, (key % 4)[..., None])[..., 0]
            met &= word >= drop_threshold(call.dropout_p)
            kept[r] = met.sum((1, 2)).to(dtype) * keep_factor(call.dropout_p)
    n = torch.stack(times, 1).to(dtype)  # [n, R]
    own = torch.full_like(n[:, :1], rules.own_value)
    if call.counts_meetings and not single:
        own = own - n.sum(1, keepdim=True).log()
    of_round = own + n.log()
    highest = of_round.amax(1, keepdim=True)
    lse = highest + torch.exp(of_round - highest).sum(1, keepdim=True).log()
    weight = torch.stack(kept, 1) * torch.exp(own - of_round) * torch.exp(of_round - lse)
    return _Own(weight.sum(1), lse[:, 0])


def forward(chunk_attention: _Forward) -> _Forward:
    """The forward of kernels, with the rows that sentinels decide; self_only has those rows."""

    @wraps(chunk_attention)
    def served(call: AttentionCall) -> _Results:
        out, lse, self_only = chunk_attention(call)
        if not has_sentinels(call) or lse.numel() == 0:
            return out, lse, self_only
        lone = self_only | (lse == float("-inf"))  # the sentinel is also that of a key that is masked
        at = _lone_rows(lone)
        own, is_lone = _own(call, at), lone[at]
        value = (call.value[at].to(lse.dtype) * own.weight[:, None]).to(out.dtype)
        out[at] = torch.where(is_lone[:, None], value, out[at])
        lse[at] = torch.where(is_lone, own.lse, lse[at])
        return out, lse, lone

    return served


def backward(chunk_attention_backward: _Backward) -> _Backward:
    """The backward of kernels, for which lone rows see no key at all, and the gradient of their own values."""

    @wraps(chunk_attention_backward)
    def served(call: AttentionCall, grad_out: Tensor, out: Tensor, lse: Tensor, self_only: Tensor) -> _Results:
        if not has_sentinels(call) or lse.numel() == 0:
            return chunk_attention_backward(call, grad_out, out, lse, self_only)
        at = _lone_rows(self_only)
        own, is_lone = _own(call, at), self_only[at]
        grads = chunk_attention_backward(call, grad_out, out, lse, torch.zeros_like(self_only))
        grad_query, grad_key, grad_value = grads
        grad = torch.where(is_lone, own.weight, 0)[:, None] * grad_out[at].to(lse.dtype)
        grad_value[at] = (grad_value[at].to(lse.dtype) + grad).to(grad_value.dtype)
        return grad_query, grad_key, grad_value

    return served
