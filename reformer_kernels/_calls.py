"""The arguments of each op as a record, of which its schema is made, and which backends receive."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .hashing import bucket_factors, cached_rotations
from .rules import AttentionRules


class HashCall(NamedTuple):
    x: Tensor  # [B, H, L, D]
    rotations: Tensor | None  # [B|1, H|1, D, R, sum(n_buckets) / 2]; None: from hash_seed
    key_padding_mask: Tensor | None  # bool [B, L]: into the extra last bucket
    hash_seed: Tensor | None  # int64 [1], on the CPU
    n_buckets: list[int] | None  # factors; None: from the length
    n_hashes: int
    chunk_length: int
    backend: str

    @property
    def op(self) -> str:
        return "hash_buckets"

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def factors(self) -> tuple[int, ...]:
        return bucket_factors(self.n_buckets, self.x.shape[2], self.chunk_length)

    def resolve(self) -> tuple[Tensor, tuple[int, ...]]:
        """Rotations and bucket factors of this call."""
        factors = self.factors
        if self.rotations is not None:
            return self.rotations, factors
        assert self.hash_seed is not None
        _, heads, _, head_dim = self.x.shape
        seed = int(self.hash_seed)
        return cached_rotations(seed, heads, head_dim, self.n_hashes, factors, self.x.device), factors


class OrderCall(NamedTuple):
    buckets: Tensor  # int32 [B, H, R, L]
    cu_seqlens: Tensor | None  # as in AttentionCall
    n_buckets: int  # more than any bucket
    backend: str

    @property
    def op(self) -> str:
        return "bucket_order"

    @property
    def device(self) -> torch.device:
        return self.buckets.device

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, at most."""
        return longest_sequence(self.buckets.shape[3], self.cu_seqlens)


class AttentionCall(NamedTuple):
    query: Tensor  # [B, H, L, D]
    key: Tensor | None  # [B, H, L, D]; None: shared with the query
    value: Tensor  # [B, H, L, E]
    order: Tensor | None  # int32 [B, H, R, L]: positions in sorted order; None: one round in the order of positions
    buckets: Tensor | None  # int32 [B, H, R, L], where alignment or the rules need them
    key_padding_mask: Tensor | None  # bool [B, L]
    attn_mask: Tensor | None  # bool (True: ignored) or float (added) [B|1, H|1, num_queries, L]
    cu_seqlens: Tensor | None  # int32 [n + 1] on the CPU, or of each batch row [B, n + 1], where the tensors are
    dropout_seed: Tensor | None  # int64 [1]
    chunk_length: int
    chunks_before: int
    chunks_after: int
    causal: bool
    num_queries: int | None
    scale: float  # of query @ (unit) key
    dropout_p: float
    alignment: str  # "ring" or "bucket"
    rules_key: str
    backend: str

    @property
    def op(self) -> str:
        return "chunk_attention"

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def rules(self) -> AttentionRules:
        return AttentionRules.from_key(self.rules_key)

    @property
    def is_ring(self) -> bool:
        return self.alignment == "ring"

    def is_single_window(self, length: int) -> bool:
        """Whether a sequence of this length is one window, in which each query sees each key once."""
        return is_single_window(length, self.chunk_length, self.is_ring)

    # What the rules add to the score of a query and a key, except in a single window.

    @property
    def masks_other_buckets(self) -> bool:
        return self.rules.within_bucket and self.key is None and self.buckets is not None

    @property
    def counts_meetings(self) -> bool:
        """Whether a key that a query meets several times, over all rounds, counts once."""
        return self.rules.dedup == "log_count"

    @property
    def has_score_mod(self) -> bool:
        return self.masks_other_buckets or self.counts_meetings

    @property
    def n_queries(self) -> int:
        return self.query.shape[2] if self.num_queries is None else self.num_queries

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, at most."""
        return longest_sequence(self.query.shape[2], self.cu_seqlens)


class SelectCall(NamedTuple):
    query: Tensor  # [B, H, L, D]
    key: Tensor  # [B, Hk, S, D], Hk divides H
    order: Tensor | None  # int32 [B, H, R, L]; with two rounds the first is that of positions; None: one, of positions
    query_padding_mask: Tensor | None  # bool [B, L], True: the query chooses nothing, unless all of its chunk are such
    key_padding_mask: Tensor | None  # bool [B, S]
    attn_mask: Tensor | None  # bool (True: ignored) or float (added) [B|1, H|1, L, S]
    chunk_length: int
    budget: int  # keys a query attends, without the context
    local: int  # how many of them are its local window, at most
    context_keys: int  # the last keys, which every query attends
    causal: bool
    scale: float
    backend: str

    @property
    def op(self) -> str:
        return "select_keys"

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def lists_shape(self) -> tuple[Any, ...]:
        """[B, H, R * chunks, list length]"""
        batch, heads, length = self.query.shape[:3]
        rounds = 1 if self.order is None else self.order.shape[2]
        context, keys = self.context_keys, self.key.shape[2] - self.context_keys
        padded = self.query_padding_mask is not None or self.key_padding_mask is not None
        # With padding, a shorter sequence of the batch may have no local window, and need the whole budget.
        most = torch.sym_min(self.budget if rounds == 1 or padded else self.budget - self.local, keys)
        width = context + most
        if rounds == 2:
            width = torch.sym_max(context + torch.sym_min(self.local, keys), most)
        width = torch.sym_max(1, width)  # a list without keys has its -1
        return batch, heads, rounds * (-(-length // self.chunk_length)), width

    @property
    def windows(self) -> Tensor:
        """int32 [B, chunks, 3], for each chunk in the order of positions: begin and end of its local window, and how
        many keys the list of this number may have in the last round. With one round that includes the window.

        They are those of sequences without their trailing padding.
        """
        length, keys = self.query.shape[2], self.key.shape[2] - self.context_keys
        whole = torch.full((self.query.shape[0], 1), length, device=self.device)
        last_query = whole if self.query_padding_mask is None else length_without_padding(self.query_padding_mask)
        last_key = torch.full_like(whole, keys)  # [B, 1]
        if self.key_padding_mask is not None:
            last_key = length_without_padding(self.key_padding_mask[:, :keys])
        # There is no local window if positions of queries and keys are unrelated, or if the budget of a hashed call
        # holds all keys.
        used = torch.ones_like(last_key, dtype=torch.bool) if self.causal else last_query == last_key
        hashed = self.order is not None
        if hashed:
            used = used & (last_key > self.budget)
        share = used * self.local
        width = torch.minimum(share, last_key)
        start = torch.arange(0, length, self.chunk_length, device=self.device)
        end = torch.minimum(start + self.chunk_length, last_query)
        if self.causal:
            end = torch.minimum(end, last_key)
            first = (end - width).clamp(min=0)
        else:
            first = ((start + end - width) // 2).clamp(min=0).minimum(last_key - width)
            end = first + width
        most = self.budget - share if hashed else torch.full_like(share, self.budget)
        return torch.stack([first, end, most.minimum(last_key).expand_as(end)], dim=2).to(torch.int32)


class ListCall(NamedTuple):
    """Lists hold keys that every query of the chunk may see or that are masked by position; no padding."""

    query: Tensor  # [B, H, L, D]
    key: Tensor  # [B, Hk, S, D]
    value: Tensor  # [B, Hk, S, E]
    order: Tensor | None  # as in SelectCall
    key_indices: Tensor  # int32 [B, H, R * chunks, W]: context keys, then rising, then -1
    key_padding_mask: Tensor | None  # bool [B, S]
    attn_mask: Tensor | None  # as in SelectCall
    dropout_seed: Tensor | None  # int64 [1]
    chunk_length: int
    context_keys: int
    causal: bool
    rest_term: bool
    scale: float
    dropout_p: float
    backend: str

    @property
    def op(self) -> str:
        return "list_attention"

    @property
    def device(self) -> torch.device:
        return self.query.device


Call = HashCall | OrderCall | AttentionCall | SelectCall | ListCall


def is_single_window(length: int, chunk_length: int, ring: bool) -> bool:
    """As in csrc/kernels/params.h: all rounds of a sequence that fits one chunk of a ring would only repeat it."""
    return ring and length <= chunk_length


def at_least_one(size: int) -> int:
    """max(1, size) of a size that may be symbolic: without a branch."""
    return size + 1 // (1 + size)


def length_without_padding(mask: Tensor) -> Tensor:
    """int64 [B, 1] of a mask [B, L] (True: padding): up to the last token that is none."""
    return ((~mask).flip(1).cumsum(1) > 0).sum(1, keepdim=True)


def longest_sequence(length: int, cu_seqlens: Tensor | None) -> int:
    if cu_seqlens is None or cu_seqlens.dim() == 2:  # of each row: the host does not wait for what a GPU knows
        return length
    return int(cu_seqlens.diff().max())


def n_sequences(cu_seqlens: Tensor | None) -> int:
    return 1 if cu_seqlens is None else cu_seqlens.shape[-1] - 1


def empty_rows(model: Tensor, length: int | torch.SymInt, width: int | torch.SymInt) -> Tensor:
    """Uninitialised [B, H, length, width], laid out like the model: as [B, L, H, D] if that is how it lies in memory.

    So the heads of a projection, a view, give an output that merges into the next projection without a copy.
    """
    batch, heads = model.shape[:2]
    if model.is_contiguous() or not model.transpose(1, 2).is_contiguous():
        return model.new_empty((batch, heads, length, width))
    return model.new_empty((batch, length, heads, width)).transpose(1, 2)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What kernels compute in: half types are widened and rounded inside them."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def empty_results(call: AttentionCall | ListCall) -> tuple[Tensor, Tensor]:
    """Uninitialised out [B, H, queries, E] and lse [B, H, queries]."""
    length = call.n_queries if isinstance(call, AttentionCall) else call.query.shape[2]
    lse = call.query.new_empty((*call.query.shape[:2], length), dtype=compute_dtype(call.query))
    return empty_rows(call.query, length, call.value.shape[3]), lse


def empty_gradients(call: AttentionCall | ListCall) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised gradients of query, key (no elements when it is shared) and value."""
    grad_key = call.query.new_empty(0) if call.key is None else empty_rows(call.key, *call.key.shape[2:])
    return empty_rows(call.query, *call.query.shape[2:]), grad_key, empty_rows(call.value, *call.value.shape[2:])


def out_of_range(call: OrderCall) -> ValueError:
    low, high = call.buckets.min().item(), call.buckets.max().item()
    return ValueError(f"buckets must be between 0 and {call.n_buckets - 1}, got {low} to {high}")
