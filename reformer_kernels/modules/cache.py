"""What attention layers keep of earlier tokens, so that a causal model can go on with new ones.

A row of a batch is a sequence of its own: it has as many tokens as were fed to it, and new ones follow them. A step
feeds N tokens to each row, the first of which are valid; the others are ignored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _ops, functional
from .._calls import HashCall, ListCall, OrderCall
from ..backends.reference import unit_key
from ..rules import AttentionRules

NONE = torch.iinfo(torch.int32).max  # no row
BLOCK = 256  # tokens at a time, where each needs a mask or a list of keys of its own


class Step(NamedTuple):
    """The new tokens of a step."""

    position: Tensor  # int64 [B, N]: index of a token in its row
    valid: Tensor  # bool [B, N]: the first ones of each row
    longest: int  # no row has more tokens after the step, counting those that are not valid

    @property
    def start(self) -> Tensor:
        """int64 [B]: tokens of each row before the step."""
        return self.position[:, 0]

    def slice(self, begin: int, end: int) -> Step:
        return Step(self.position[:, begin:end], self.valid[:, begin:end], self.longest)


def _store(target: Tensor, index: Tensor, rows: Tensor) -> None:
    """target [B, H, P, D] gets rows [B, H, N, D] at index [B, N] or [B, H, N]."""
    if index.dim() == 2:
        index = index[:, None].expand(rows.shape[:3])
    target.scatter_(2, index[..., None].expand(rows.shape), rows.to(target.dtype))


def _with_room(kept: Tensor | None, rows: Tensor, room: int, memory: Tensor | None) -> Tensor:
    """[B, H, room or more, D], with what was kept; at first, with the memory [1, H, memory_keys, D]."""
    if kept is not None and kept.shape[2] >= room:
        return kept
    old = memory if kept is None else kept
    new = rows.new_zeros((*rows.shape[:2], room if kept is None else max(room, 2 * kept.shape[2]), rows.shape[3]))
    if old is not None:
        new[:, :, : old.shape[2]] = old
    return new


class LayerCache(ABC):
    """Of one layer. ``attend`` appends the rows of a step and returns its output [B, H, N, D]."""

    def tensors(self) -> dict[str, Tensor]:
        """What is kept, by attribute; the first dimension is the batch."""
        return {name: x for name, x in vars(self).items() if isinstance(x, Tensor) and not name.startswith("_")}

    def reorder(self, rows: Tensor) -> None:
        for name, x in self.tensors().items():
            setattr(self, name, x.index_select(0, rows))

    @abstractmethod
    def crop(self, lengths: Tensor, dropped: int) -> None:
        """Forgets the last ``dropped`` tokens, after which rows have these lengths."""


class _AllTokens(LayerCache):
    """Keys and values of all tokens.

    Args:
        memory: keys and values [1, H, memory_keys, D] before the first token, or None.
    """

    def __init__(self, memory: tuple[Tensor, Tensor] | None = None) -> None:
        self._memory = memory
        self._n_memory = 0 if memory is None else memory[0].shape[2]
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def _append(self, key: Tensor, value: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """The index [B, N] of new tokens among the keys and values of all, [B, H, S, D]."""
        end = step.longest + self._n_memory
        self.keys = _with_room(self.keys, key, end, self._memory and self._memory[0])
        self.values = _with_room(self.values, value, end, self._memory and self._memory[1])
        index = step.position + self._n_memory
        _store(self.keys, index, key)
        _store(self.values, index, value)
        return index, self.keys[:, :, :end], self.values[:, :, :end]

    def crop(self, lengths: Tensor, dropped: int) -> None:
        """Later tokens overwrite what is behind the end."""


class FullCache(_AllTokens):
    """Of softmax attention to all tokens."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, step: Step) -> Tensor:
        """query, key and value [B, H, N, D]."""
        index, keys, values = self._append(key, value, step)
        out = []
        for begin in range(0, query.shape[2], BLOCK):
            part = slice(begin, begin + BLOCK)
            sees = torch.arange(keys.shape[2], device=query.device) <= index[:, part, None]
            out.append(F.scaled_dot_product_attention(query[:, :, part], keys, values, sees[:, None]))
        return torch.cat(out, 2)


class LocalCache(LayerCache):
    """Keys and values of the last windows.

    Args:
        chunk_length, chunks_before: of the layer.
        max_crop: tokens that ``crop`` may forget.
        backend: of the layer.
    """

    def __init__(
        self, chunk_length: int, chunks_before: int, scale: float | None, max_crop: int, backend: str | None
    ) -> None:
        self._backend = backend
        self._chunk_length, self._chunks_before, self._scale = chunk_length, chunks_before, scale
        self._size = (chunks_before + 1) * chunk_length + max_crop
        self.keys: Tensor | None = None  # [B, H, size + 1, D]: token p is at p % size, and what is not kept at size
        self.values: Tensor | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, step: Step) -> Tensor:
        """query, key and value [B, H, N, D]."""
        if self.keys is None or self.values is None:
            self.keys, self.values = (x.new_zeros((*x.shape[:2], self._size + 1, x.shape[3])) for x in (key, value))
            if query.shape[2] > BLOCK:  # nothing came before: the whole at once
                self._keep(key, value, step)
                return functional.local_attention(
                    query, key, value, chunk_length=self._chunk_length, chunks_before=self._chunks_before, causal=True,
                    key_padding_mask=~step.valid, scale=self._scale, backend=self._backend,
                )  # fmt: skip
        out = []
        for begin in range(0, query.shape[2], BLOCK):
            part = slice(begin, begin + BLOCK)
            new = step.slice(begin, begin + BLOCK)
            out.append(self._attend(query[:, :, part], key[:, :, part], value[:, :, part], new))
        return torch.cat(out, 2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, step: Step) -> Tensor:
        assert self.keys is not None and self.values is not None
        size, position = self._size, step.position
        slot = torch.arange(size, device=query.device)
        last = step.start[:, None] - 1
        kept = last - (last - slot) % size  # the position at each slot; negative: none
        keys, values = torch.cat([self.keys[:, :, :size], key], 2), torch.cat([self.values[:, :, :size], value], 2)
        key_position = torch.cat([kept, position], 1)[:, None]
        first = (position // self._chunk_length - self._chunks_before) * self._chunk_length
        sees = (key_position >= first.clamp(min=0)[..., None]) & (key_position <= position[..., None])
        out = F.scaled_dot_product_attention(query, keys, values, sees[:, None], scale=self._scale)
        self._keep(key, value, step)
        return out

    def _keep(self, key: Tensor, value: Tensor, step: Step) -> None:
        assert self.keys is not None and self.values is not None
        end = step.start + step.valid.sum(1)
        keeps = step.valid & (step.position >= end[:, None] - self._size)
        index = torch.where(keeps, step.position % self._size, self._size)
        _store(self.keys, index, key)
        _store(self.values, index, value)

    def crop(self, lengths: Tensor, dropped: int) -> None:
        """The rows before are still there: the window is longer by ``max_crop``."""


class BucketCache(LayerCache):
    """Of an LSH layer with ``alignment="bucket"``: the open and the previous chunks of every bucket of every round.

    Rows are kept once for all rounds, and forgotten when no bucket has them any more. So memory is bounded by the
    number of buckets, however long the sequences get.

    Args:
        n_hashes, n_buckets, chunk_length, chunks_before, rules, hash_seed, shift_keys, backend: of the layer.
        max_crop: tokens that ``crop`` may forget.
        memory: rows and values [1, H, memory_keys, D] before the first token, or None.
    """

    def __init__(
        self, *, n_hashes: int, n_buckets: list[int], chunk_length: int, chunks_before: int, rules: AttentionRules,
        hash_seed: int | Tensor, max_crop: int, shift_keys: bool, backend: str | None,
        memory: tuple[Tensor, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self._n_hashes, self._factors, self._rules, self._backend = n_hashes, n_buckets, rules, backend or ""
        self._seed = functional.seed_tensor(hash_seed)
        self._total = 1
        for factor in n_buckets:
            self._total *= factor
        self._chunk_length, self._chunks_before = chunk_length, chunks_before
        self._window = (chunks_before + 1) * chunk_length
        self._size = self._window + max_crop
        self._max_crop, self._recent = max_crop, max_crop + 1
        self._shift_keys, self._memory = shift_keys, memory
        self._filled = 0  # no head has more rows
        self.keys: Tensor | None = None  # [B, H, room, D], unit keys
        self.values: Tensor | None = None
        self.used: Tensor | None = None  # int64 [B, H], rows of each head
        self.table: Tensor | None = None  # int32 [B, H, R, n_buckets * size + 1]: the row of entry i at i % size; or -1
        self.counts: Tensor | None = None  # int64 [B, H, R, n_buckets + 1]: entries of each bucket so far
        # int64 [B, H, R, max_crop + 1]: the buckets of token p at p % (max_crop + 1)
        self.recent: Tensor | None = None
        self.last: Tensor | None = None  # int64 [B, H], with shift_keys: the row of the last token, or if none any

    def attend(self, query_key: Tensor, value: Tensor, step: Step) -> Tensor:
        """query_key and value [B, H, N, D]."""
        batch, heads = query_key.shape[:2]
        if self.keys is None:
            new = query_key.new_zeros
            self.keys, self.values = new((batch, heads, 0, query_key.shape[3])), new((batch, heads, 0, value.shape[3]))
            self.used = new((batch, heads), dtype=torch.int64)
            tables = (batch, heads, self._n_hashes)
            self.table = torch.full((*tables, self._total * self._size + 1), -1, dtype=torch.int32, device=value.device)
            self.counts = new((*tables, self._total + 1), dtype=torch.int64)
            self.recent = new((*tables, self._recent), dtype=torch.int64)
            self.last = new((batch, heads), dtype=torch.int64) if self._shift_keys else None
            if self._memory is not None:
                keys, values = (x.expand(batch, -1, -1, -1) for x in self._memory)
                position = torch.arange(-keys.shape[2], 0, device=value.device).expand(batch, -1)
                memory = Step(position, torch.ones_like(position, dtype=torch.bool), 0)
                self._attend(keys, values, self._shifted(values), self._buckets(keys, memory.valid), memory, False)
        if self.last is not None and self._filled:  # what comes now has its key
            assert self.values is not None
            _store(self.values, self.last[..., None], value[:, :, :1])
        kept = self._shifted(value)
        buckets = self._buckets(query_key, step.valid)
        length = query_key.shape[2]
        if self._filled == 0 and length > BLOCK:  # nothing came before: the whole at once
            out = functional.lsh_attention(
                query_key, value, buckets=buckets, key_padding_mask=~step.valid, n_hashes=self._n_hashes,
                n_buckets=self._factors, chunk_length=self._chunk_length, chunks_before=self._chunks_before,
                causal=True, rules=self._rules, alignment="bucket", shift_keys=self._shift_keys,
                backend=self._backend or None,
            )  # fmt: skip
            assert isinstance(out, Tensor)
            self._attend(query_key, value, kept, buckets, step, False)
            self._compact(0)  # which has just got all rows
            return out
        parts = [(slice(begin, begin + BLOCK), begin) for begin in range(0, length, BLOCK)]
        outs = []
        for part, begin in parts:
            rows = query_key[:, :, part], value[:, :, part], kept[:, :, part]
            outs.append(self._attend(*rows, buckets[..., part], step.slice(begin, begin + BLOCK)))
        return torch.cat(outs, 2)

    def _shifted(self, value: Tensor) -> Tensor:
        """Values for the rows of new tokens. That of the last comes with the next token."""
        return torch.cat([value[:, :, 1:], value[:, :, -1:]], 2) if self._shift_keys else value

    def _buckets(self, rows: Tensor, valid: Tensor) -> Tensor:
        return _ops.hash_buckets(
            HashCall(
                x=rows, rotations=None, key_padding_mask=~valid, hash_seed=self._seed, n_buckets=self._factors,
                n_hashes=self._n_hashes, chunk_length=self._chunk_length, backend=self._backend,
            )
        )  # fmt: skip

    def _attend(
        self, query_key: Tensor, value: Tensor, kept_value: Tensor, buckets: Tensor, step: Step, wants_out: bool = True
    ) -> Tensor:
        """The output of tokens whose own values are ``value``, where those of their rows are ``kept_value``."""
        assert self.keys is not None and self.values is not None and self.used is not None
        assert self.table is not None and self.counts is not None and self.recent is not None
        length = query_key.shape[2]
        self._make_room(length)
        new = self.used[..., None] + torch.arange(length, device=value.device)  # [B, H, N]: the rows of the tokens
        _store(self.keys, new, unit_key(query_key, self._rules.key_norm))
        _store(self.values, new, kept_value)

        order = _ops.bucket_order(OrderCall(buckets, None, self._total + 1, self._backend)).long()
        bucket = buckets.long()
        sorted_bucket = bucket.gather(3, order)
        place = torch.arange(length, device=value.device)
        first = torch.searchsorted(sorted_bucket, bucket)  # [B, H, R, N]: where the token's bucket begins in the order
        rank = torch.empty_like(order).scatter_(3, order, place.expand_as(order)) - first
        before = self.counts.gather(3, bucket)
        entry = before + rank  # of the token in its bucket
        out = value
        if wants_out:
            out = self._attend_rows(query_key, value, self._visible(bucket, order, first, before, entry, new, step))
        counts = self.counts.scatter_add(3, bucket, torch.ones_like(bucket))  # the last one is of what is not valid
        kept = step.valid[:, None, None] & (entry >= counts.gather(3, bucket) - self._size)
        index = torch.where(kept, bucket * self._size + entry % self._size, self.table.shape[3] - 1)
        self.table = self.table.scatter(3, index, new[:, :, None].expand_as(order).to(torch.int32))
        if self._max_crop:
            end = step.start + step.valid.sum(1)
            recent = step.valid & (step.position >= end[:, None] - self._recent)
            at = torch.where(recent, step.position % self._recent, self._recent)
            wide = F.pad(self.recent, (0, 1)).scatter(3, at[:, None, None].expand_as(bucket), bucket)
            self.recent = wide[..., :-1].contiguous()
        self.counts = counts
        self.used = self.used + step.valid.sum(1)[:, None]
        if self.last is not None:
            self.last = torch.where(step.valid[:, :1], self.used - 1, self.last)
        return out

    def _visible(
        self, bucket: Tensor, order: Tensor, first: Tensor, before: Tensor, entry: Tensor, new: Tensor, step: Step
    ) -> Tensor:
        """int64 [B, H, N, R * window]: rows that tokens see; the largest int32 is none."""
        assert self.table is not None
        length = bucket.shape[3]
        begin = (entry // self._chunk_length - self._chunks_before) * self._chunk_length
        seen = begin[..., None] + torch.arange(self._window, device=bucket.device)  # [B, H, R, N, window]
        old = (bucket[..., None] * self._size + seen % self._size).clamp(max=self.table.shape[3] - 1)
        fresh = (first[..., None] + seen - before[..., None]).clamp(0, length - 1)
        rows = torch.where(
            seen < before[..., None],
            self.table.gather(3, old.flatten(3)).view(old.shape).long(),
            new[:, :, None].expand_as(order).gather(3, order).gather(3, fresh.flatten(3)).view(fresh.shape),
        )
        visible = (seen >= 0) & (seen < entry[..., None]) & step.valid[:, None, None, :, None]
        return torch.where(visible, rows, NONE).transpose(2, 3).flatten(3)

    def _attend_rows(self, query: Tensor, value: Tensor, rows: Tensor) -> Tensor:
        """Attention of each query to the rows of its list, int64 [B, H, N, W], where the largest int32 is none."""
        assert self.keys is not None and self.values is not None
        rows = rows.sort(3).values
        if self._rules.dedup == "log_count":  # a key that is met several times counts once
            again = F.pad(rows[..., 1:] == rows[..., :-1], (1, 0))
            rows = rows.masked_fill(again, NONE).sort(3).values
        lists = rows.masked_fill(rows == NONE, -1).to(torch.int32)
        scale = query.shape[3] ** -0.5 if self._rules.scale is None else self._rules.scale
        out, lse = _ops.list_attention(
            ListCall(
                query=query.to(self.keys.dtype), key=self.keys, value=self.values, order=None, key_indices=lists,
                key_padding_mask=None, attn_mask=None, dropout_seed=None, chunk_length=1, context_keys=0, causal=False,
                rest_term=False, scale=float(scale), dropout_p=0.0, backend=self._backend,
            )
        )  # fmt: skip
        # A query that sees no other key attends its own.
        return torch.where((lse == float("-inf"))[..., None], value, out.to(value.dtype))

    def _make_room(self, length: int) -> None:
        assert self.keys is not None
        if self._filled + length > self.keys.shape[2]:
            self._compact(length)
        self._filled += length

    def _compact(self, length: int) -> None:
        """Forgets rows that no bucket has, and leaves room for so many new ones, or a quarter if that is more."""
        assert self.keys is not None and self.values is not None and self.used is not None and self.table is not None
        room = self.keys.shape[2]
        table = self.table[..., :-1].flatten(2).long()
        live = torch.zeros((*self.keys.shape[:2], room + 1), dtype=torch.bool, device=table.device)
        live.scatter_(2, torch.where(table < 0, room, table), True)
        live[..., room] = False
        renumbered = live.long().cumsum(2) - 1
        self.used = live.sum(2)
        most = int(self.used.max()) if self.used.numel() else 0
        order = (~live[..., :room]).to(torch.int8).argsort(dim=2, stable=True)[..., :most]
        room = most + max(length, most // 4, 64)
        for name in ("keys", "values"):
            x = getattr(self, name)
            grown = x.new_zeros((*x.shape[:2], room, x.shape[3]))
            grown[:, :, :most] = x.gather(2, order[..., None].expand(-1, -1, -1, x.shape[3]))
            setattr(self, name, grown)
        moved = torch.where(table < 0, -1, renumbered.gather(2, table.clamp(min=0)))
        self.table = F.pad(moved.to(torch.int32).view(*self.table.shape[:3], -1), (0, 1), value=-1)
        if self.last is not None:
            self.last = renumbered.gather(2, self.last[..., None])[..., 0].clamp(min=0)
        self._filled = most

    def crop(self, lengths: Tensor, dropped: int) -> None:
        assert self.counts is not None and self.recent is not None
        position = lengths[:, None] + torch.arange(dropped, device=lengths.device)  # [B, dropped]
        bucket = self._recent_buckets(position)
        self.counts = self.counts.scatter_add(3, bucket, -torch.ones_like(bucket))
        if self.last is not None:
            assert self.table is not None
            # The last token is the last entry of its bucket, in any round.
            bucket = self._recent_buckets(lengths[:, None] - 1)[:, :, :1]
            entry = self.counts.gather(3, bucket) - 1
            row = self.table.gather(3, bucket * self._size + entry % self._size)[:, :, 0, 0]
            self.last = row.long().clamp(min=0)

    def _recent_buckets(self, position: Tensor) -> Tensor:
        """int64 [B, H, R, n] of positions [B, n]."""
        assert self.recent is not None
        index = (position % self._recent)[:, None, None]
        return self.recent.gather(3, index.expand(*self.recent.shape[:3], -1))


class ContextCache(LayerCache):
    """Keys and values of another sequence, which all tokens attend: made in the first step."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None  # [B, H, S, D]
        self.values: Tensor | None = None
        self.sees: Tensor | None = None  # bool [B, 1, 1, S]
        self.sees_none: Tensor | None = None  # bool [B, 1, 1, 1]

    def crop(self, lengths: Tensor, dropped: int) -> None:
        """The other sequence stays."""


class RingCache(_AllTokens):
    """Of an LSH layer with ``alignment="ring"``, whose every step sorts and attends all tokens again.

    The window of the ring moves with every token, so earlier outputs would be others if they were computed again.

    Args:
        options: of ``lsh_attention``.
        memory: rows and values [1, H, memory_keys, D] before the first token, or None.
    """

    def __init__(self, options: dict[str, Any], memory: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__(memory)
        self._options = options

    def attend(self, query_key: Tensor, value: Tensor, step: Step) -> Tensor:
        """query_key and value [B, H, N, D]."""
        index, query_keys, values = self._append(query_key, value, step)
        ends = (index[:, 0] + step.valid.sum(1)).tolist()
        # The ring of a row is as long as the row, so rows of other lengths are called by themselves.
        alike = len(set(ends)) == 1
        calls = [(slice(None), ends[0])] if alike else [(slice(i, i + 1), end) for i, end in enumerate(ends)]
        outs = []
        for rows, end in calls:
            if end == 0:  # no tokens yet
                outs.append(torch.zeros_like(value[rows]))
                continue
            out = functional.lsh_attention(query_keys[rows, :, :end], values[rows, :, :end], **self._options)
            assert isinstance(out, Tensor)
            at = index[rows, None, :, None].clamp(max=end - 1)
            outs.append(out.gather(2, at.expand(value[rows].shape)))
        return torch.cat(outs)
