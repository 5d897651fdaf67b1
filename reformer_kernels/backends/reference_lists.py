"""Attention of chunks of queries to lists of keys, and the choice of the lists: in plain PyTorch, written for reading.

Shape comments as in ``reference``: N rows of lists (over all rounds), C queries of each, W keys; S keys in all, of
which the last ``context_keys`` are seen by every query. A slot of -1 is padding of the arrays and stands for nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._calls import ListCall, SelectCall, compute_dtype, empty_rows
from .philox import drop_threshold, keep_factor, philox

MASKED = -1e30  # a float mask at or below this masks, as -inf does

SUBGROUPS = 4  # of a chunk; one mean query stands for each
EXACT_KEYS = 16384  # up to so many keys each is looked at; above, blocks of keys are chosen first
KEY_BLOCK = 64
CHOSEN_BLOCKS = 64  # or twice what the budget fills
LEAST = 1e-30  # a weight too small for a float still beats a key that is not to be taken


# ---- what both ops share


def per_query_head(x: Tensor, heads: int) -> Tensor:
    """x [B, Hk, S, D] for every query head: [B, H, S, D]."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def without_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """x [B, H, L, D], 0 where the mask [B, L] is True: a weight of 0 does not remove what is not finite."""
    return x if mask is None else x.masked_fill(mask[:, None, :, None], 0.0)


def _positions(call: SelectCall | ListCall) -> Tensor:
    """int64 [B, H, N, C]: the positions of the queries of every row of lists."""
    batch, heads, length = call.query.shape[:3]
    device = call.query.device
    order = call.order
    if order is None:
        order = torch.arange(length, device=device).expand(batch, heads, 1, length)
    chunk = min(call.chunk_length, max(1, length))
    padded = torch.nn.functional.pad(order.long(), (0, -length % chunk), value=-1)
    return padded.reshape(batch, heads, -1, chunk)


def _allowed(call: SelectCall | ListCall, position: Tensor, key: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Whether queries may see keys, and what the mask adds, for index arrays that broadcast to [B, H, ...]."""
    position, key = torch.broadcast_tensors(position, key)
    batch, heads, length = call.query.shape[:3]
    size = call.key.shape[2]
    at, k = position.clamp(min=0), key.clamp(min=0)
    context = key >= size - call.context_keys
    allowed = (position >= 0) & (key >= 0)
    if call.causal:
        allowed = allowed & ((key <= position) | context)
    if call.key_padding_mask is not None:
        padded = call.key_padding_mask[:, None].expand(batch, heads, size)
        allowed = allowed & ~padded.gather(2, k.flatten(2)).view(k.shape)
    bias = torch.zeros((), dtype=dtype, device=key.device)
    if call.attn_mask is not None:
        mask = call.attn_mask.expand(batch, heads, length, size).reshape(batch, heads, -1)
        mask = mask.gather(2, (at * size + k).flatten(2)).view(k.shape)
        if mask.dtype == torch.bool:
            allowed = allowed & ~mask
        else:
            mask = mask.to(dtype)
            allowed, bias = allowed & ~(mask <= MASKED), mask.clamp(min=MASKED)
    return allowed, bias


# ---- the choice of keys


def _in_windows(call: SelectCall, windows: Tensor) -> Tensor:
    """bool [B, chunks, S']: whether keys are in the local window of a chunk in the order of positions."""
    keys = torch.arange(call.key.shape[2] - call.context_keys, device=call.query.device)
    return (keys >= windows[..., :1]) & (keys < windows[..., 1:2])


def _rows_of_flags(flags: Tensor, context: range, width: int) -> Tensor:
    """int32 [B, H, N, width]: the context and the flagged keys [B, H, N, S'], rising, then -1."""
    keys = torch.arange(flags.shape[-1], device=flags.device)
    last = torch.iinfo(torch.int32).max
    rising = torch.where(flags, keys, last).sort(dim=-1).values
    rising = torch.nn.functional.pad(rising, (0, width), value=last)
    rows = torch.cat([torch.tensor(list(context), dtype=rising.dtype, device=flags.device).expand(*flags.shape[:3], -1),
                      rising], dim=-1)[..., :width]  # fmt: skip
    return torch.where(rows == last, -1, rows).to(torch.int32)


def _best(score: Tensor, count: Tensor | int) -> Tensor:
    """Flags of the ``count`` largest positive scores along the last dimension; of equal ones the first."""
    order = score.sort(dim=-1, descending=True, stable=True).indices
    rank = order.argsort(dim=-1)
    return (rank < count) & (score > 0)


def _choosing(position: Tensor, padding: Tensor) -> Tensor:
    """Of every chunk [B, H, n, C] the queries that are no padding, then -1; all of them where there are no others."""
    batch, heads = position.shape[:2]
    at = position.clamp(min=0).flatten(2)
    padded = padding[:, None].expand(batch, heads, -1).gather(2, at).view(position.shape) | (position < 0)
    order = padded.to(torch.int8).argsort(dim=-1, stable=True)
    kept = torch.where(padded, -1, position).gather(-1, order)
    return torch.where(padded.all(dim=-1, keepdim=True), position, kept)


def selection_scores(call: SelectCall) -> Tensor:
    """[B, H, n, S']: what the keys are chosen by, for the n rows of the last round; 0: not to be taken.

    Every sub-group of a chunk gives each key its mean query's softmax weight, times the share of its queries to which
    the key is new: visible, and not in their local window.
    """
    dtype = compute_dtype(call.query)
    batch, heads = call.query.shape[:2]
    rounds = 1 if call.order is None else call.order.shape[2]
    keys = call.key.shape[2] - call.context_keys
    position = _positions(call)
    position = position.unflatten(2, (rounds, -1))[:, :, -1]  # [B, H, n, C]
    if call.query_padding_mask is not None:
        position = _choosing(position, call.query_padding_mask)
    chunk = position.shape[3]
    size = min(-(-call.chunk_length // SUBGROUPS), chunk)
    groups = torch.nn.functional.pad(position, (0, -chunk % size), value=-1)
    groups = groups.unflatten(-1, (-1, size))  # [B, H, n, M, size]
    rows = gather_rows(call.query.to(dtype), groups)  # [B, H, n, M, size, D]
    members = (groups >= 0).sum(dim=-1, keepdim=True).to(dtype)  # [B, H, n, M, 1]
    mean = rows.sum(dim=-2) / members.clamp(min=1)
    key = per_query_head(call.key.to(dtype), heads)[:, :, :keys]
    score = call.scale * torch.einsum("bhnmd,bhsd->bhnms", mean, key)
    allowed, bias = _allowed(call, groups[..., None], torch.arange(keys, device=key.device), dtype)
    seeing = allowed.sum(dim=-2).to(dtype)  # [B, H, n, M, S']
    if call.attn_mask is not None:
        mean_bias = torch.where(allowed, bias, 0.0).sum(dim=-2) / seeing.clamp(min=1)
        unmasked = call._replace(attn_mask=None)
        visible = _allowed(unmasked, groups[..., None], torch.arange(keys, device=key.device), dtype)[0]
        score = score + mean_bias + (seeing / members.clamp(min=1)).log()
        new = visible & (seeing > 0)[..., None, :]
    else:
        new = allowed
    candidate = seeing > 0
    if keys > EXACT_KEYS and call.attn_mask is None:
        candidate = candidate & _candidates(call, mean, key, groups)
    weight = _softmax(score, candidate)
    inside = _in_windows(call, call.windows)  # [B, chunks, S']
    if rounds == 1:
        share = new.sum(dim=-2) / members.clamp(min=1) * ~inside[:, None, :, None]
    else:
        own = inside[torch.arange(batch)[:, None, None, None, None], groups.clamp(min=0) // call.chunk_length]
        share = (new & ~own).sum(dim=-2) / members.clamp(min=1)  # own [B, H, n, M, size, S']
    scores: Tensor = (share * (weight + LEAST) * candidate).sum(dim=-2)
    return scores


def _softmax(score: Tensor, where: Tensor) -> Tensor:
    """Over the last dimension; 0 elsewhere."""
    score = score.masked_fill(~where, float("-inf"))
    return torch.where(where, score.softmax(dim=-1), 0.0)


def _candidates(call: SelectCall, mean: Tensor, key: Tensor, groups: Tensor) -> Tensor:
    """bool [B, H, n, 1, S']: keys of the blocks to which the sub-groups give most weight, by the blocks' mean keys."""
    size = key.shape[2]
    count = -(-size // KEY_BLOCK)
    batch = key.shape[0]
    there = torch.ones(batch, size, dtype=key.dtype, device=key.device)
    if call.key_padding_mask is not None:
        padded = call.key_padding_mask[:, :size]
        key, there = without_padding(key, padded), there.masked_fill(padded, 0.0)
    pad = -size % KEY_BLOCK
    blocks = torch.nn.functional.pad(key, (0, 0, 0, pad)).unflatten(2, (count, KEY_BLOCK)).sum(dim=3)
    sizes = (
        torch.nn.functional.pad(there, (0, pad)).unflatten(1, (count, KEY_BLOCK)).sum(dim=2)[:, None]
    )  # [B, 1, count]
    score = call.scale * torch.einsum("bhnmd,bhkd->bhnmk", mean, blocks / sizes.clamp(min=1)[..., None])
    score = score + sizes.log()[:, :, None, None]
    # A block can be seen if its first key comes no later than the sub-group's last query.
    last = groups.amax(dim=-1)[..., None]  # [B, H, n, M, 1]
    first = torch.arange(count, device=key.device) * KEY_BLOCK
    seen = (last >= first if call.causal else last >= 0) & (sizes > 0)[:, :, None, None]
    weight = _softmax(score, seen)
    chosen = _best(((weight + LEAST) * seen).sum(dim=3), max(CHOSEN_BLOCKS, 2 * -(-call.budget // KEY_BLOCK)))
    return chosen.repeat_interleave(KEY_BLOCK, dim=-1)[..., None, :size]


def select_keys(call: SelectCall) -> Tensor:
    """int32 [B, H, N, W], see ``_calls.ListCall.key_indices``."""
    shape = call.lists_shape
    if 0 in shape[:3]:
        return torch.full(shape, -1, dtype=torch.int32, device=call.query.device)
    size = call.key.shape[2]
    keys = size - call.context_keys
    context = range(keys, size)
    score = selection_scores(call)
    windows = call.windows
    local = _in_windows(call, windows)
    if call.key_padding_mask is not None:
        local = local & ~call.key_padding_mask[:, None, :keys]
    local = local[:, None].expand(-1, shape[1], -1, -1)
    most = windows[:, None, :, 2:]
    if call.order is None or call.order.shape[2] == 1:
        best = _best(score, most - local.sum(dim=-1, keepdim=True))
        return _rows_of_flags(local | best, context, shape[3])
    best = _best(score, most)
    rows = [_rows_of_flags(local, context, shape[3]), _rows_of_flags(best, range(0), shape[3])]
    return torch.cat(rows, dim=2)


# ---- attention


class ListScores(NamedTuple):
    position: Tensor  # int64 [B, H, N, C], -1: none
    key: Tensor  # int64 [B, H, N, W], -1: none
    scores: Tensor  # [B, H, N, C, W], -inf where not included
    included: Tensor  # bool
    dropout: Tensor | float  # factors


def list_scores(call: ListCall) -> ListScores:
    """The scores of every pair of a query and a key of its lists."""
    all_queries, all_keys, _ = call_tensors(call)
    dtype = all_queries.dtype
    batch, heads = call.query.shape[:2]
    position, key = _positions(call), call.key_indices.long()
    rounds = 1 if call.order is None else call.order.shape[2]
    query_rows, key_rows = gather_rows(all_queries, position), gather_rows(all_keys, key)
    included, bias = _allowed(call, position[..., :, None], key[..., None, :], dtype)
    if rounds == 2:  # the second leaves out what the first has shown: from the first to the last key of the query's row
        chunks = key.shape[2] // 2
        first = key[:, :, :chunks]
        window = (first >= 0) & (first < call.key.shape[2] - call.context_keys)
        low = torch.where(window, first, first.new_tensor(2**31 - 1)).amin(dim=-1)  # [B, H, chunks]
        high = torch.where(window, first, -1).amax(dim=-1)
        chunk = (position[:, :, chunks:].clamp(min=0) // call.chunk_length).flatten(2)
        low, high = (x.gather(2, chunk).view(batch, heads, chunks, -1, 1) for x in (low, high))
        other = key[:, :, chunks:, None]
        hidden = torch.cat([torch.zeros_like(included[:, :, :chunks]), (other >= low) & (other <= high)], dim=2)
        included = included & ~hidden
    scores = (call.scale * (query_rows @ key_rows.mT) + bias).masked_fill(~included, float("-inf"))
    dropout: Tensor | float = 1.0
    if call.dropout_p > 0:
        assert call.dropout_seed is not None
        device = scores.device
        head = torch.arange(batch * heads, device=device).view(batch, heads, 1, 1, 1)
        slot = torch.arange(position[0, 0].numel() // rounds, device=device).repeat(rounds)
        slot = slot.view(*position.shape[2:], 1)
        round_ = (torch.arange(position.shape[2], device=device) * rounds // position.shape[2])[:, None, None]
        place = torch.arange(key.shape[-1], device=device)
        words = philox(call.dropout_seed.to(device), place // 4, slot, round_, head)
        words = words.gather(-1, (place % 4).expand(scores.shape)[..., None])[..., 0]
        dropout = (words >= drop_threshold(call.dropout_p)).to(dtype) * keep_factor(call.dropout_p)
    return ListScores(position, key, scores, included, dropout)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """x [B, H, L, D] at index [B, H, ...] -> [B, H, ..., D]; zero where the index is -1."""
    batch, heads, _, width = x.shape
    if x.shape[2] == 0:
        return x.new_zeros((*index.shape, width))
    at = index.clamp(min=0).reshape(batch, heads, -1, 1).expand(-1, -1, -1, width)
    return x.gather(2, at).view(*index.shape, width).masked_fill((index < 0)[..., None], 0.0)


def add_rows(length: int, index: Tensor, rows: Tensor) -> Tensor:
    """[B, H, length, D]: the sums of rows [B, H, N, K, D] by index [B, H, N, K]; -1: nowhere."""
    batch, heads = index.shape[:2]
    width = rows.shape[-1]
    at = torch.where(index < 0, length, index).reshape(batch, heads, -1, 1).expand(-1, -1, -1, width)
    total = torch.zeros(batch, heads, length + 1, width, dtype=rows.dtype, device=rows.device)
    return total.scatter_add(2, at, rows.reshape(batch, heads, -1, width))[:, :, :length]


class RestTerm(NamedTuple):
    share: Tensor  # [B, 1, L, S]: 1 / number of keys that the query may see, at those keys
    score: Tensor  # [B, H, L], -inf where nothing is unseen


def rest_term(call: ListCall, s: ListScores, query: Tensor, key: Tensor) -> RestTerm:
    """The rest key: the mean of the keys that a query may see, with the log of the number of those it did not see."""
    batch, _, length = call.query.shape[:3]
    size = key.shape[2]
    device, dtype = key.device, key.dtype
    keys = torch.arange(size, device=device)
    visible = torch.ones(length, size, dtype=torch.bool, device=device) & (keys < size - call.context_keys)
    if call.causal:
        visible = visible & (keys <= torch.arange(length, device=device)[:, None])
    visible = visible.expand(batch, 1, -1, -1)
    if call.key_padding_mask is not None:
        visible = visible & ~call.key_padding_mask[:, None, None, :]
    seen = (s.included & (s.key < size - call.context_keys)[..., None, :]).sum(dim=-1, keepdim=True).to(dtype)
    seen = add_rows(length, s.position, seen)[..., 0]
    count = visible.sum(dim=-1).to(dtype)
    share = visible.to(dtype) / count.clamp(min=1)[..., None]
    unseen = count - seen
    mean = share @ key if call.causal else (share[:, :, :1] @ key).expand(-1, -1, length, -1)
    score = call.scale * (query * mean).sum(-1) + unseen.clamp(min=1).log()
    return RestTerm(share, torch.where(unseen > 0, score, float("-inf")))


def call_tensors(call: ListCall) -> tuple[Tensor, Tensor, Tensor]:
    """Query, and key and value for every query head, in the dtype that is computed in."""
    dtype, heads = compute_dtype(call.query), call.query.shape[1]
    key, value = (
        without_padding(per_query_head(x.to(dtype), heads), call.key_padding_mask) for x in (call.key, call.value)
    )
    return call.query.to(dtype), key, value


def like(model: Tensor, x: Tensor) -> Tensor:
    """x, laid out in memory as the kernels' results and the fake ones are."""
    return empty_rows(model, x.shape[2], x.shape[3]).to(x.dtype).copy_(x)


def finite(x: Tensor) -> Tensor:
    return x.masked_fill(x == float("-inf"), 0.0)


def probabilities(s: ListScores, lse: Tensor) -> Tensor:
    """[B, H, N, C, W] of lse [B, H, L]."""
    return torch.exp(s.scores - gather_rows(finite(lse)[..., None], s.position))


def logsumexp(s: ListScores, rest: RestTerm | None, length: int) -> Tensor:
    """[B, H, L], over the keys of all rounds and the rest key; -inf where a query sees nothing."""
    batch, heads = s.position.shape[:2]
    index = torch.where(s.position < 0, length, s.position).flatten(2)
    top = s.scores.new_full((batch, heads, length + 1), float("-inf"))
    top = top.scatter_reduce(2, index, s.scores.detach().amax(dim=-1).flatten(2), "amax")[..., :length]
    if rest is not None:
        top = torch.maximum(top, rest.score.detach())
    total = add_rows(length, s.position, probabilities(s, top).sum(dim=-1, keepdim=True))[..., 0]
    if rest is not None:
        total = total + torch.exp(rest.score - finite(top))
    some = total > 0
    return torch.where(some, finite(top) + torch.where(some, total, 1.0).log(), float("-inf"))


def list_attention(call: ListCall) -> tuple[Tensor, Tensor]:
    """out [B, H, L, E] and lse [B, H, L]. Differentiable by autograd when called directly."""
    length = call.query.shape[2]
    query, key, value = call_tensors(call)
    if 0 in query.shape[:3] or call.key_indices.shape[3] == 0:
        out = query.new_zeros((*query.shape[:3], value.shape[3])).to(call.value.dtype)
        return like(call.query, out), query.new_full(query.shape[:3], float("-inf"))
    s = list_scores(call)
    rest = rest_term(call, s, query, key) if call.rest_term else None
    lse = logsumexp(s, rest, length)
    out = add_rows(length, s.position, (probabilities(s, lse) * s.dropout) @ gather_rows(value, s.key))
    if rest is not None:
        out = out + torch.exp(rest.score - finite(lse))[..., None] * (rest.share @ value)
    return like(call.query, out.to(call.value.dtype)), lse.contiguous()


def per_key_head(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient [B, H, S, D] of ``per_query_head(x)`` as that of x."""
    return grad if grad.shape[1] == x.shape[1] else grad.unflatten(1, (x.shape[1], -1)).sum(dim=2)


def list_attention_backward(
    call: ListCall, grad_out: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value. P = exp(s - lse), dV = P^T dO, dS = P (dO V^T - rowsum(dO O)), for the
    rest key, too, whose gradients go to all keys that it is the mean of."""
    length, size = call.query.shape[2], call.key.shape[2]
    query, key, value = call_tensors(call)
    if 0 in query.shape[:3] or call.key_indices.shape[3] == 0:
        query, key, value = (like(x, torch.zeros_like(x)) for x in (call.query, call.key, call.value))
        return query, key, value
    grad_out, lse = grad_out.to(query.dtype), lse.to(query.dtype)
    delta = (grad_out * out.to(query.dtype)).sum(dim=-1, keepdim=True)
    s = list_scores(call)
    weight = probabilities(s, lse)
    grad_rows, value_rows = gather_rows(grad_out, s.position), gather_rows(value, s.key)
    grad_scores = weight * (s.dropout * (grad_rows @ value_rows.mT) - gather_rows(delta, s.position)) * call.scale
    grad_query = add_rows(length, s.position, grad_scores @ gather_rows(key, s.key))
    grad_key = add_rows(size, s.key, grad_scores.mT @ gather_rows(query, s.position))
    grad_value = add_rows(size, s.key, (weight * s.dropout).mT @ grad_rows)
    if call.rest_term:
        rest = rest_term(call, s, query, key)
        rest_weight = torch.exp(rest.score - finite(lse))[..., None]
        mean_key, mean_value = rest.share @ key, rest.share @ value
        slope = rest_weight * ((grad_out * mean_value).sum(-1, keepdim=True) - delta) * call.scale
        grad_query = grad_query + slope * mean_key
        grad_key = grad_key + rest.share.mT @ (slope * query)
        grad_value = grad_value + rest.share.mT @ (rest_weight * grad_out)
    dtype = call.query.dtype
    grad_key, grad_value = per_key_head(grad_key, call.key).to(dtype), per_key_head(grad_value, call.value).to(dtype)
    return like(call.query, grad_query.to(dtype)), like(call.key, grad_key), like(call.value, grad_value)


def dense_weights(call: ListCall) -> Tensor:
    """[B, H, L, S] the probabilities after dropout, differentiable; the rest key's lies evenly on its mean's keys."""
    length, size = call.query.shape[2], call.key.shape[2]
    query, key, _ = call_tensors(call)
    if 0 in query.shape[:3] or call.key_indices.shape[3] == 0:
        return query.new_zeros((*query.shape[:3], size)).to(call.value.dtype)
    s = list_scores(call)
    rest = rest_term(call, s, query, key) if call.rest_term else None
    lse = logsumexp(s, rest, length)
    weights = _scatter(s, probabilities(s, lse) * s.dropout, length, size)
    if rest is not None:
        weights = weights + torch.exp(rest.score - finite(lse))[..., None] * rest.share
    return weights.to(call.value.dtype)


def _scatter(s: ListScores, x: Tensor, length: int, size: int) -> Tensor:
    """[B, H, L, S]: the sums of x [B, H, N, C, W] by query and key."""
    pair = s.position[..., :, None] * size + s.key[..., None, :]
    none = (s.position < 0)[..., :, None] | (s.key < 0)[..., None, :]
    dense = x.new_zeros((*x.shape[:2], length * size + 1))
    dense = dense.scatter_add(2, torch.where(none, length * size, pair).flatten(2), x.flatten(2))
    pairs: Tensor = dense[..., :-1].unflatten(-1, (length, size))
    return pairs
