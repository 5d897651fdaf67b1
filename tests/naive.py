"""LSH attention as loops over queries and keys in Python floats: what the reference itself is tested against."""

import math

import torch
from torch import Tensor

import reformer_kernels as rk

Slot = tuple[int, int, int]  # the (round, bucket, position) in it


def chunks_of(order: list[list[int]], buckets: list[list[int]], chunk_length: int, alignment: str) -> list[list[Slot]]:
    """The ring as lists of slots, one list a chunk."""
    chunks = []
    for r, positions in enumerate(order):
        chunk: list[Slot] = []
        for p in positions:
            slot = (r, buckets[r][p], p)
            if len(chunk) == chunk_length or (alignment == "bucket" and chunk and chunk[-1][1] != slot[1]):
                chunks.append(chunk)
                chunk = []
            chunk.append(slot)
        chunks.append(chunk)
    return chunks


def window(chunks: list[list[Slot]], c: int, before: int, after: int, alignment: str) -> list[Slot]:
    keys: list[Slot] = []
    for i in range(c - before, c + after + 1):
        if alignment == "ring":
            keys += chunks[i % len(chunks)]
        elif 0 <= i < len(chunks) and chunks[i][0][:2] == chunks[c][0][:2]:
            keys += chunks[i]
    return keys


def lsh_attention(
    query: Tensor, value: Tensor, buckets: Tensor, *, chunk_length: int, chunks_before: int = 1, chunks_after: int = 0,
    causal: bool = False, key_padding_mask: Tensor | None = None, attn_mask: Tensor | None = None,
    num_queries: int | None = None, rules: rk.AttentionRules | None = None, alignment: str = "ring",
    shift_keys: bool = False,
) -> Tensor:  # fmt: skip
    """float64 [B, H, num_queries, E] for the rules that need no sentinel."""
    rules = rules or rk.AttentionRules()
    batch, heads, rows, head_dim = query.shape
    n_queries = rows if num_queries is None else num_queries
    out = torch.zeros(batch, heads, n_queries, value.shape[3], dtype=torch.float64)
    scale = head_dim**-0.5 if rules.scale is None else rules.scale
    for b in range(batch):
        length = rows
        if key_padding_mask is not None and rules.cut_padding:
            length = max((j + 1 for j in range(rows) if not key_padding_mask[b, j]), default=0)
        for h in range(heads if length else 0):
            q = query[b, h].tolist()
            hashed = buckets[b, h].tolist()
            single = alignment == "ring" and length <= chunk_length
            if single:
                chunks, before, after = [[(0, 0, p) for p in range(length)]], 0, 0
            else:
                order = [sorted(range(length), key=row.__getitem__) for row in hashed]
                chunks, before, after = chunks_of(order, hashed, chunk_length, alignment), chunks_before, chunks_after
            met: dict[int, list[int]] = {p: [] for p in range(length)}  # the keys of a query, once for each meeting
            for c, chunk in enumerate(chunks):
                for r, bucket, i in chunk:
                    for key_round, key_bucket, j in window(chunks, c, before, after, alignment):
                        if rules.within_bucket and not single and (key_round, key_bucket) != (r, bucket):
                            continue
                        met[i].append(j)
            for i in range(min(n_queries, length)):

                def allowed(j: int, i: int = i, b: int = b, h: int = h) -> bool:
                    if causal and j > i and j < n_queries:
                        return False
                    if key_padding_mask is not None:
                        if key_padding_mask[b, j] or (rules.mask_padded_queries and key_padding_mask[b, i]):
                            return False
                    if attn_mask is not None and attn_mask.dtype == torch.bool:
                        return not attn_mask.expand(batch, heads, -1, -1)[b, h, i, j]
                    return True

                keys = [j for j in met[i] if allowed(j)]
                others = [j for j in keys if j != i]
                keys = others or keys
                weights = []
                for j in keys:
                    square = sum(x * x for x in q[j])
                    norm = math.sqrt(square + 1e-6 * head_dim) if rules.key_norm == "rms" else math.sqrt(square)
                    score = scale * sum(x * y for x, y in zip(q[i], q[j], strict=True)) / norm
                    if attn_mask is not None and attn_mask.dtype != torch.bool:
                        score += float(attn_mask.expand(batch, heads, -1, -1)[b, h, i, j])
                    if rules.dedup == "log_count":
                        score -= math.log(met[i].count(j))
                    weights.append(score)
                top = max(weights, default=0.0)
                weights = [math.exp(w - top) for w in weights]
                for w, j in zip(weights, keys, strict=True):
                    if shift_keys and j != i:  # it is the key of the next token
                        later = [
                            k for k in range(j + 1, rows) if key_padding_mask is None or not key_padding_mask[b, k]
                        ]
                        j = later[0] if later else rows - 1
                    out[b, h, i] += w / sum(weights) * value[b, h, j].double()
    return out


def clustered_attention(
    query: Tensor, key: Tensor, value: Tensor, hashed: Tensor | None, *, budget: int, local_fraction: float,
    chunk_length: int, rest_term: bool = True, causal: bool = False, key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """float64 [B, H, L, E], with as many keys as queries and the same padding of both.

    ``hashed`` [B, H, L]: positions in the order of groups.
    """
    batch, heads, length, width = query.shape
    group = heads // key.shape[1]
    out = torch.zeros(batch, heads, length, value.shape[3], dtype=torch.float64)
    local = round(budget * local_fraction)

    for b in range(batch):
        real = [j for j in range(length) if key_padding_mask is None or not key_padding_mask[b, j]]
        last = max(real, default=-1) + 1

        def window(i: int, last: int = last) -> set[int]:
            start = i // chunk_length * chunk_length
            end = min(start + chunk_length, last)
            if causal:
                return set(range(max(0, end - local), end))
            first = min(max(0, (start + end - local) // 2), last - min(local, last))
            return set(range(first, first + min(local, last)))

        for h in range(heads):
            q, k, v = query[b, h].tolist(), key[b, h // group].tolist(), value[b, h // group]

            def dot(x: list[float], y: list[float]) -> float:
                return sum(a * c for a, c in zip(x, y, strict=True)) / math.sqrt(width)

            def sees(i: int, j: int, b: int = b, h: int = h) -> bool:
                if (causal and j > i) or (key_padding_mask is not None and key_padding_mask[b, j]):
                    return False
                return attn_mask is None or not attn_mask.expand(batch, heads, -1, -1)[b, h, i, j]

            order = list(range(length)) if hashed is None else hashed[b, h].tolist()
            taken: dict[int, set[int]] = {}
            for start in range(0, length, chunk_length):
                chunk = order[start : start + chunk_length]
                score = [0.0] * length
                size = -(-chunk_length // 4)
                choosing = [i for i in chunk if i in real] or chunk
                for first in range(0, len(choosing), size):
                    members = choosing[first : first + size]
                    mean = [sum(x) / len(members) for x in zip(*(q[i] for i in members), strict=True)]
                    weights = {}
                    for j in range(length):
                        seeing = sum(sees(i, j) for i in members)
                        if seeing:
                            share = seeing / len(members) if attn_mask is not None else 1.0
                            weights[j] = share * math.exp(dot(mean, k[j]))
                    for j, w in weights.items():
                        new = [i for i in members if (not causal or j <= i) and j not in window(i)]
                        score[j] += len(new) / len(members) * (w / sum(weights.values()) + 1e-30)
                local_keys = window(chunk[0]) & set(real)
                count = budget - len(local_keys) if hashed is None else budget - local
                best = sorted((j for j in range(length) if score[j] > 0), key=lambda j: (-score[j], j))[:count]
                for i in chunk:
                    taken[i] = set(best)
            for i in range(length):
                keys = sorted(j for j in taken[i] | window(i) if sees(i, j))
                visible = [j for j in range(length) if sees(i, j)]
                pairs = [(math.exp(dot(q[i], k[j])), v[j].double()) for j in keys]
                if rest_term and attn_mask is None and len(visible) > len(keys):
                    mean = [sum(x) / len(visible) for x in zip(*(k[j] for j in visible), strict=True)]
                    mean_value = torch.stack([v[j] for j in visible]).double().mean(dim=0)
                    pairs.append(((len(visible) - len(keys)) * math.exp(dot(q[i], mean)), mean_value))
                total = sum(w for w, _ in pairs)
                for w, row in pairs:
                    out[b, h, i] += w / total * row
    return out
