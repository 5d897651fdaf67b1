"""LSH attention as loops over queries and keys in Python floats: what the reference itself is tested against."""

import math

import torch
from torch import Tensor

import reformer_kernels as rk


def chunks_of(order: list[list[int]], buckets: list[list[int]], chunk_length: int, alignment: str) -> list[list[tuple]]:
    """The ring as lists of (round, bucket, position), one list a chunk."""
    chunks = []
    for r, positions in enumerate(order):
        chunk: list[tuple] = []
        for p in positions:
            entry = (r, buckets[r][p], p)
            if len(chunk) == chunk_length or (alignment == "bucket" and chunk and chunk[-1][1] != entry[1]):
                chunks.append(chunk)
                chunk = []
            chunk.append(entry)
        chunks.append(chunk)
    return chunks


def window(chunks: list[list[tuple]], c: int, before: int, after: int, alignment: str) -> list[tuple]:
    keys = []
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
) -> Tensor:  # fmt: skip
    """float64 [B, H, num_queries, E] for the rules that need no sentinel."""
    rules = rules or rk.AttentionRules()
    batch, heads, length, head_dim = query.shape
    n_queries = length if num_queries is None else num_queries
    out = torch.zeros(batch, heads, n_queries, value.shape[3], dtype=torch.float64)
    scale = head_dim**-0.5 if rules.scale is None else rules.scale
    for b in range(batch):
        for h in range(heads):
            q = query[b, h].tolist()
            rows = buckets[b, h].tolist()
            single = alignment == "ring" and length <= chunk_length
            if single:
                chunks, before, after = [[(0, 0, p) for p in range(length)]], 0, 0
            else:
                order = [sorted(range(length), key=lambda p, row=row: (row[p], p)) for row in rows]
                chunks, before, after = chunks_of(order, rows, chunk_length, alignment), chunks_before, chunks_after
            met: dict[int, list[int]] = {p: [] for p in range(length)}  # the keys of a query, once for each meeting
            for c, chunk in enumerate(chunks):
                for r, bucket, i in chunk:
                    for key_round, key_bucket, j in window(chunks, c, before, after, alignment):
                        if rules.within_bucket and not single and (key_round, key_bucket) != (r, bucket):
                            continue
                        met[i].append(j)
            for i in range(n_queries):

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
                    out[b, h, i] += w / sum(weights) * value[b, h, j].double()
    return out
