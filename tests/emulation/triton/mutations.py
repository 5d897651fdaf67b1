"""Ways in which the Triton kernels could be wrong, and problems that must show each of them."""

from __future__ import annotations

import torch

from ..attention import BLIND, BUCKET, DTYPES, PAPER, WITHIN, Attention
from ..cases import Case, Close, Hash, NotFinite, Order, OutOfRange, Ties
from ..lists import Lists
from ..mutation import Mutation
from ..select import MANY, Select

# In float32, whose tolerances show more.
F = torch.float32
PROBLEMS: dict[str, Case] = {
    "causal": Attention(100, 32, F, chunk_length=32, causal=True),
    "two rounds": Attention(100, 32, F, chunk_length=32, n_buckets=4, batch=2, heads=2, layout="heads inside"),
    "local": Attention(100, 32, F, key_heads=1, heads=2, batch=2, causal=True, chunk_length=32),
    "packed": Attention(100, 32, F, bounds=(0, 1, 30, 100), chunk_length=16, n_buckets=4, batch=2),
    "padded": Attention(100, 32, F, padded=0.4, rules=BLIND, chunk_length=16, batch=2),
    "padding": Attention(60, 32, F, ends=(20, 50), heads=2, chunk_length=16, n_buckets=4),
    "self_only": Attention(100, 32, F, chunk_length=4, before=0, causal=True, dropout=0.3),
    "dropout": Attention(100, 32, F, dropout=0.3, chunk_length=32, n_buckets=4, heads=2),
    "wide windows": Attention(90, 32, F, before=4, after=3, chunk_length=32),
    "score_mod": Attention(90, 32, F, rules=PAPER, chunk_length=32, n_buckets=4, before=3),
    "score_mod, self_only": Attention(
        40, 32, F, rules=WITHIN, chunk_length=8, before=5, after=5, causal=True, n_buckets=30
    ),
    "buckets": Attention(100, 32, F, chunk_length=16, after=1, **BUCKET),
    "few queries": Attention(100, 32, F, num_queries=60, chunk_length=32),
    "odd width": Attention(70, 20, F, chunk_length=32, layout="wider rows"),
    "lists": Lists(100, 32, F, grouping="hash", causal=True, heads=2, key_heads=1, batch=2, padded=0.2, context=3),
    "lists of all": Lists(100, 32, F, heads=2, key_heads=2, budget=100, dropout=0.2),
    "rest": Lists(100, 32, F, padded=0.2, context=3),
    "choice": Select(
        150, 16, F, grouping="hash", causal=True, padded=0.3, padded_queries=0.3, heads=2, batch=2, trailing=40
    ),
    "half choice": Select(150, 16, grouping="hash", causal=True, padded=0.3, padded_queries=0.3, heads=2, batch=2),
    "choice of causal": Select(150, 16, F, causal=True, chunk_length=40, budget=60),
    "many keys": Select(20, 8, F, keys=MANY, padded=0.2),
    "equal weights": Select(100, 16, F, spread=0, keys=300, budget=100, context=5),
    "sums": Select(150, 16, F, spread=4, heads=2, budget=30),
    "small weights": Select(150, 16, F, spread=100, budget=140),
    "hash": Hash(70, 20, (6, 10, 4), padded=True, rounds=3, batch=2, heads=2),
    "hash of many": Hash(70, 64, (200,)),
    "ties": Ties(),
    "ties of tiles": Ties(repeats=20),
    "close": Close(DTYPES[0]),
    "not finite": NotFinite(),
    "order": Order(5000, 2049, heads=2),
    "order of few": Order(1000, 65, heads=2, rounds=2),
    "order of many": Order(20000, 600),
    "packed order": Order(2500, 30, batch=2, rounds=3, bounds=(0, 1, 1, 900, 2500)),
    "padding order": Order(300, 30, batch=2, heads=2, bounds=((0, 200, 300), (0, 90, 300))),
    "out of range": OutOfRange(),
}

WINDOWS = [
    ("the last chunk of a round is as long as others", "causal",
     "chunks = tl.cdiv(s.length, p.chunk_length)\n        r = floor", "chunks = s.length // p.chunk_length\n        r = floor"),
    ("windows end with the chunk before", "causal", "chunk + after + 1, chunks)", "chunk + after, chunks)"),
    ("windows begin a chunk later", "causal", "chunk_begin(p, s, chunk - before", "chunk_begin(p, s, chunk - before + 1"),
    ("queries after a key are those before it", "causal",
     "return around(p, s, slot, mask, s.after, s.before)", "return around(p, s, slot, mask, s.before, s.after)"),
    ("short sequences have windows", "packed", "single = (length <= p.chunk_length).to(tl.int32)", "single = length * 0"),
    ("bounds of the first batch row", "padding", "b.to(tl.int64) * p.bounds_stride", "b * 0"),
    ("slots of packed sequences", "packed", "(head * p.length + offset) * p.rounds", "head * p.length * p.rounds + offset"),
    ("rows of packed sequences", "packed", "head * p.n_queries + offset", "head * p.n_queries"),
    ("slots do not wrap around", "wide windows", "return floor_mod(slot, s.rounds * s.length)", "return slot % (s.rounds * s.length)"),
    ("a query sees itself", "causal", "tl.where(p.shared_qk, position + 1, position)", "position"),
    ("a query sees the next key", "causal", "tl.where(p.causal, position + 1, MASKED_KEY)", "tl.where(p.causal, position + 2, MASKED_KEY)"),
    ("key heads", "local", "h // p.group, offset", "h % p.group, offset"),
    ("keys after the queries see all", "few queries", "valid = mask & (position < s.n_queries)", "valid = mask"),
    ("padding of the first of the batch", "padded", "s.b.to(tl.int64) * p.keys + s.offset + position", "s.offset + position"),
    ("padded queries are not masked", "padded", "blind |= is_padded(p, s, position, valid)", "blind |= ~valid"),
    ("padding is seen", "padded", "masked = ~mask | is_padded(p, s, position, mask)", "masked = ~mask"),
    ("chunks of buckets", "buckets", "at - (at - bucket.begin) % p.chunk_length", "at - at % p.chunk_length"),
    ("windows leave buckets", "buckets", "tl.minimum(bucket.end, begin", "tl.maximum(bucket.end, begin"),
    ("keys that windows hold again", "score_mod", "tl.max(floor_div(seen.end - 1, s.length)) + 1", "tl.max(floor_div(seen.end - 1, s.length))"),
    ("rounds of a slot", "score_mod", "key_round = floor_mod(unrolled, s.rounds)", "key_round = unrolled * 0"),
    ("dropout by the key's half", "dropout", "tl.where(at % 4 == 1, b, d)", "tl.where(at % 4 == 1, d, b)"),
    ("dropout of all heads alike", "dropout", "zero + r, zero + s.dropout_index)", "zero + r, zero)"),
    ("dropout of all rounds alike", "dropout", "zero + r, zero + s.dropout_index)", "zero, zero + s.dropout_index)"),
    ("the context is not seen", "lists", "tl.where(position >= s.first_context_key, CONTEXT_KEY, position)", "position"),
    ("what the first round saw is seen again", "lists", "later = valid & (at >= s.length)", "later = valid & ~valid"),
    ("the list of a row", "lists", "row = r * tl.cdiv(s.length, p.chunk_length) + (slot", "row = (slot"),
]  # fmt: skip
ATTENTION = [
    ("rounds are not merged", "two rounds", "mask=q.valid & (r > 0), other=float(\"-inf\")", "mask=q.valid & (r < 0), other=float(\"-inf\")"),
    ("earlier maxima are not forgotten", "two rounds", "result = result * before[:, None] + multiply", "result = result + multiply"),
    ("lse is in base 2", "causal", "tl.where(ends, merged * LN2, merged)", "merged"),
    ("dropout drops from the sum", "dropout", "        top, total = higher, total * before + tl.sum(weight, 1)\n        if p.dropout_seed is not None:\n            weight *= kept_factor(p, s, qs, ks)\n",
     "        if p.dropout_seed is not None:\n            weight *= kept_factor(p, s, qs, ks)\n        top, total = higher, total * before + tl.sum(weight, 1)\n"),
    ("the length of a key", "causal", "tl.sqrt(square + 1e-6 * D)", "tl.sqrt(square + 1e-4 * D)"),
    ("one that sees nothing is self_only", "self_only", "is_self_only = saw_none & (times > 0)", "is_self_only = saw_none & (times > 1000)"),
    ("dropout of a self_only query", "self_only", "p.keep_factor * kept.to(tl.float32)", "kept.to(tl.float32)"),
    ("how often a self_only query meets itself", "self_only", "tl.load(self_counts + at, mask=saw_none & (r > 0), other=0)", "tl.load(self_counts + at, mask=saw_none & (r < 0), other=0)"),
    ("only its bucket counts", "score_mod, self_only", "                    if has_score_mod(p, s):\n                        met &= same_bucket", "                    if s.single == 7:\n                        met &= same_bucket"),
    ("rows end with the block", "odd width", "mask=mask[:, None] & (d < D), other=0.0)", "mask=mask[:, None], other=0.0)"),
    ("strides of batch and head", "two rounds", "b.to(tl.int64) * x.stride_b + h.to(tl.int64) * x.stride_h", "b.to(tl.int64) * x.stride_h + h.to(tl.int64) * x.stride_b"),
    ("the first slot of a later bucket", "buckets", "tl.where(searching & before, middle + 1, low)", "tl.where(searching & before, middle, low)"),
]  # fmt: skip
GRADIENTS = [
    ("delta", "causal", "grad_score = weight * (grad_weight - across(delta, 0)) * (factor * LN2)", "grad_score = weight * grad_weight * (factor * LN2)"),
    ("the scale of a query's gradient", "causal", "* (factor * LN2)", "* factor"),
    ("rounds of a query's gradient", "two rounds", "q.valid, r > 0, 1.0, grad", "q.valid, r < 0, 1.0, grad"),
    ("dropout of a value's gradient", "dropout", "dropped, grad_weight = weight * kept, grad_weight * kept", "dropped, grad_weight = weight, grad_weight * kept"),
    ("dropout of a weight's gradient", "dropout", "dropped, grad_weight = weight * kept, grad_weight * kept", "dropped, grad_weight = weight * kept, grad_weight"),
    ("the Jacobian of a unit key", "causal", "grad_k = (grad_k - x * along[:, None])", "grad_k = (grad_k)"),
    ("rows that are no queries", "few queries", "adds |= k.valid & (k.position < s.n_queries)", "adds |= k.valid"),
    ("queries that share a key head", "local", "range(p.group if windows else 1)", "range(1)"),
    ("rounds of a key's gradient", "two rounds", "s.offset + k.position, k.valid & (r > 0)", "s.offset + k.position, k.valid & (r > 1)"),
    ("the weight of a self_only query", "self_only", "tl.where(is_self_only, -log2_divisor, score - log2_divisor)", "score - log2_divisor"),
    ("a self_only query does not see its own key", "self_only", "end = tl.where(is_self_only, q.excluded.begin, q.excluded.end)", "end = q.excluded.end"),
    ("how often a self_only query met itself", "self_only", "tl.where(is_self_only, tl.log2(tl.floor(counted + 0.5)), log2_divisor)", "tl.where(is_self_only, 0.0, log2_divisor)"),
    ("entries have the row of their key", "lists", "head, row, adds = s.h, k.slot", "head, row, adds = s.h, k.position"),
    ("scale of a separate key's gradient", "local", "        grad_k *= p.scale\n", "        grad_k *= 1.0\n"),
]  # fmt: skip
LISTS = [
    ("the number of unseen keys", "rest", "unseen = visible - seen", "unseen = visible"),
    ("the context is no part of the rest", "rest", "(key >= 0) & (key < s.first_context_key) & ~", "(key >= 0) & ~"),
    ("keys after a query are seen", "lists", "sees &= key <= position[:, None]", "sees &= key <= position[:, None] + 1"),
    ("keys of the first round count twice", "lists", "valid & (r > 0))\n", "valid & (r > 1))\n"),
    ("lse without the rest", "rest", "both = top + tl.log(tl.exp(earlier - top) + tl.exp(score - top))", "both = earlier"),
    ("the gradient of a rest key's score", "rest", "mean - row_products(p, grad_rows, out_rows, valid)", "mean"),
    ("padding gets the rest's gradient", "rest", "counts &= tl.load(p.padding", "counts |= tl.load(p.padding"),
    ("the context gets the rest's gradient", "lists", "counts = key < p.keys - p.context_keys", "counts = key < p.keys"),
    ("heads that share a key", "lists", "range(key_head * p.group, (key_head + 1) * p.group)", "range(key_head * p.group, key_head * p.group + 1)"),
    ("an entry too few", "lists", "for start in range(begin, end, BLOCK_N)", "for start in range(begin, end - 1, BLOCK_N)"),
    ("gradients of lists' queries are lost", "rest", "position, valid, valid, 1.0, keys", "position, valid, valid, 0.0, keys"),
]  # fmt: skip
SELECT = [
    ("padded queries choose", "choice", "chooses &= tl.load(padding", "chooses |= tl.load(padding"),
    ("members of the first sub-group", "choice", "begin + i * p.subgroup\n", "begin\n"),
    ("queries of the first round", "choice", "(head.to(tl.int64) * p.rounds + p.rounds - 1)", "(head.to(tl.int64) * p.rounds)"),
    ("padding is chosen", "choice", "tl.where(is_no_key(p, b, key, mask), float(\"-inf\"), 0.0)", "tl.where(mask, 0.0, float(\"-inf\"))"),
    ("keys after a sub-group are chosen", "choice of causal", "(key * c.keys_per_candidate)[None, :] <= largest[:, None]", "(key * c.keys_per_candidate)[None, :] <= INT_MAX"),
    ("new to queries before a key", "choice of causal", "is_new &= key[None, :] <= position[:, None]", "is_new &= key[None, :] >= 0"),
    ("new to queries whose window has it", "choice", "is_new &= ~((key[None, :] >= window.begin", "is_new |= ~((key[None, :] >= window.begin"),
    ("tiles that are new to all", "choice of causal", "tl.min(smallest) < tl.max(key)", "tl.min(smallest) + 500 < tl.max(key)"),
    ("maxima are not forgotten", "sums", "exponentials = exponentials * tl.exp2(top - higher)", "exponentials = exponentials"),
    ("weights that are too small", "small weights", "tl.exp2(score - top[:, None]) + LEAST", "tl.exp2(score - top[:, None])"),
    ("one term of a mean", "half choice", "        score += multiply(low, key_rows)\n", "        score += 0\n"),
    ("sizes of blocks", "many keys", "tl.where(size > 0, tl.log2(tl.maximum(size, 1).to(tl.float32)), float(\"-inf\"))", "tl.where(size > 0, 0.0, float(\"-inf\"))"),
    ("keys of a block", "many keys", "* BLOCK + i % BLOCK", "* BLOCK"),
    ("the last of equals", "equal weights", "tied + tl.cumsum(same, 0) <= ties", "tied + tl.cumsum(same, 0) > ties"),
    ("totals of larger digits", "choice", "equal -= tl.sum(tl.where(digits == digit, so_many - counts, 0), 0)", "equal -= 0"),
    ("keys of the window are chosen again", "choice of causal", "~((key >= window.begin) & (key < window.end)), total", "(key >= 0), total"),
    ("room for the window", "choice of causal", "tl.where(key >= window.end, local, 0)", "local"),
    ("the context's keys", "equal weights", "p.keys + start + n, mask", "start + n, mask"),
    ("what is left of a list", "choice", "n * 0 - 1, mask", "n * 0, mask"),
    ("windows of the first of the batch", "choice", "(b.to(tl.int64) * p.chunks + chunk) * 3\n", "chunk * 3\n"),
]  # fmt: skip
HASH = [
    ("the last of equals", "ties of tiles", "tl.where(largest > best, start + at, index)", "tl.where(largest >= best, start + at, index)"),
    ("equals of opposite signs", "ties", "tl.where(best_negative > best, half", "tl.where(best_negative >= best, half"),
    ("one term of the rotations", "close", "tl.dot(x, high, acc=tl.dot(x, low))", "tl.dot(x, high)"),
    ("columns of the first factor", "hash", "            begin += half\n", ""),
    ("digits without their radix", "hash", "bucket += radix * tl", "bucket += tl"),
    ("columns of a later tile", "hash of many", "start + at, index)\n", "at, index)\n"),
    ("padding", "hash", "tl.where(ignored, padded_bucket, bucket)", "tl.where(ignored, padded_bucket - 1, bucket)"),
    ("padding of the first of the batch", "hash", "padding + b * length + token", "padding + token"),
    ("rows beyond the head size", "hash", "mask=mask[:, None] & (d[None, :] < D)", "mask=mask[:, None]"),
]  # fmt: skip
ORDER = [
    ("buckets out of range", "out of range", "(bucket < 0) | (bucket >= n_buckets)", "(bucket >= n_buckets)"),
    ("every digit is the first", "order", "(bucket >> shift) & MASK", "bucket & MASK"),
    ("later digits of unsorted keys", "order", "tl.load(before + target + at, mask=mask, other=0)", "at"),
    ("equal keys of later places first", "order of few", "digit * BLOCK_M + i, 2147483647)", "digit * BLOCK_M + BLOCK_M - 1 - i, 2147483647)"),
    ("sums of tiles before", "order of many", "        before += tl.sum(found, 0)\n", ""),
    ("a count counts itself", "order", "before + tl.cumsum(found, 0) - found, mask", "before + tl.cumsum(found, 0), mask"),
    ("slots of packed sequences", "packed order", "start * rounds + r * count", "start + r * length"),
    ("bounds of the first batch row", "padding order", "row // heads * bounds_stride", "row * 0"),
    ("keys of packed sequences", "packed order", "(row * rounds + r) * length + start,", "(row * rounds + r) * length,"),
    ("places in a tile", "order", "first + i - tl.gather", "first + tl.gather"),
    ("positions in a tile", "order", "position = tile * BLOCK_M + (ordered", "position = (ordered"),
]  # fmt: skip

FILES = {
    "_windows.py": WINDOWS, "attention.py": ATTENTION, "attention_backward.py": GRADIENTS, "lists.py": LISTS,
    "select.py": SELECT, "hash.py": HASH, "order.py": ORDER,
}  # fmt: skip
MUTATIONS = [
    Mutation(file, name, problem, "", text, becomes)
    for file, rows in FILES.items()
    for name, problem, text, becomes in rows
]
