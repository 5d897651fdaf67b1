"""Ways in which the CUDA kernels of attention could be wrong, as in ``mutations``."""

from __future__ import annotations

from typing import Any

import torch

from ..attention import BUCKET, L2, PAPER, WITHIN, Attention
from ..lists import Lists

BFLOAT16, FLOAT32 = ("rk::cuda::bf16", 2), ("float", 4)


def _instances(kind: tuple[str, int], *names: str) -> tuple[str, ...]:
    return tuple(f"attention_{name}_kernel<{kind[0]}, {kind[1]}>" for name in names)


def _passes(name: str, length: int, head_dim: int = 32, **options: Any) -> dict[str, Any]:
    """A problem for each pass, whose other one the CPU runs."""
    kind = FLOAT32 if options.get("dtype") == torch.float32 else BFLOAT16
    return {
        f"{part}, {name}": (_instances(kind, *kernels), Attention(length, head_dim, backends=backends, **options))
        for part, kernels, backends in (
            ("forward", ["forward"], ("cuda", "cpu")),
            ("backward", ["grad_query", "grad_keys"], ("cpu", "cuda")),
        )
    }


def _exact(name: str, length: int, **options: Any) -> dict[str, Any]:
    return _passes(name, length, dtype=torch.float32, **options)


def _lists(name: str, length: int, **options: Any) -> dict[str, Any]:
    others = [f"{kernel}_kernel<float>" for kernel in ("list_sum", "rest_forward", "rest_backward")]
    sort = "order_kernel<rk::cuda::OrderPart::kAll>"
    instances = (*_instances(FLOAT32, "forward", "grad_query", "grad_keys"), *others, sort)
    return {f"lists, {name}": (instances, Lists(length, 32, torch.float32, **options))}


SELF_ONLY: dict[str, Any] = {"n_buckets": 16, "chunk_length": 3, "before": 0, "rounds": 3}  # no query sees another key
WIDE: dict[str, Any] = {"chunk_length": 32, "before": 4, "after": 3}  # windows longer than the ring
MANY: dict[str, Any] = {"heads": 4, "rounds": 1, "before": 3, "device": "single"}  # a tile comes where three are held
PROBLEMS: dict[str, tuple[tuple[str, ...], Attention | Lists]] = {
    **_passes("bfloat16", 150, chunk_length=32, heads=2),
    **_passes("own tiles", 256, after=1),
    **_passes("many tiles", 600, **MANY),
    **_passes("many score_mods", 600, rules=WITHIN, n_buckets=2, **MANY),
    **_passes("24 columns", 70, 24, heads=2),
    **_passes("30 columns", 70, 30, heads=2),
    **_exact("causal", 150, causal=True, chunk_length=32, padded=0.3, heads=2, batch=2),
    **_exact("plain", 150, chunk_length=32, after=1),
    **_exact("padding", 90, ends=(40, 80), heads=2, rules=WITHIN, n_buckets=4, chunk_length=16, dropout=0.3),
    **_exact("self_only", 40, causal=True, padded=0.3, dropout=0.3, **SELF_ONLY),
    **_exact("dropout", 150, dropout=0.3, chunk_length=32),
    **_exact("groups", 130, key_heads=2, heads=4, after=1),
    **_exact("keys without queries", 150, num_queries=60, causal=True, chunk_length=32),
    **_exact("l2", 70, rules=L2),
    **_exact("within", 150, rules=WITHIN, chunk_length=32, n_buckets=4, padded=0.3),
    **_exact("self_only in a bucket", 40, rules=WITHIN, n_buckets=32, **(WIDE | {"chunk_length": 16})),
    **_exact("paper", 90, rules=PAPER, rounds=1, n_buckets=2, **WIDE),
    **_exact("once", 90, rules=PAPER, alignment="bucket", n_buckets=4, rounds=3, chunk_length=8),
    **_exact("self_only and once", 40, rules=PAPER, n_buckets=32, rounds=3, chunk_length=8),
    **_exact("buckets", 40, after=1, **BUCKET),
    "forward, one stage": (
        ("attention_forward_kernel<float, 8>",),
        Attention(256, 128, torch.float32, rounds=1, device="RTX", backends=("cuda", "cpu")),
    ),
    **_lists("hash", 150, grouping="hash", context=5, padded=0.3),
    **_lists("causal", 130, keys=90, causal=True, budget=30),
    **_lists("groups", 100, heads=4, key_heads=2),
}

FILES: dict[str, list[tuple[str, str, str, str, str]]] = {
    "attention.cuh": [
        ("copies are not waited for", "forward, causal", "copy in flight",
         "            wait_for_copies<0>();\n            __syncthreads();", "            __syncthreads();"),
        ("no barrier after the copies", "forward, causal", "uninitialised",
         "            wait_for_copies<0>();\n            __syncthreads();", "            wait_for_copies<0>();"),
        ("a stage is filled while others read it", "forward, one stage", "shared race",
         "            __syncthreads();  // no thread reads the stage any more\n", ""),
        ("the next stage is filled while others read it", "forward, many tiles", "shared race",
         "              if (!settled) __syncthreads();  // no thread reads the stage any more\n", ""),
        ("factors are used before they are there", "forward, causal", "shared race",
         "if (arrived(stage, fresh, first)) __syncthreads();", "arrived(stage, fresh, first);"),
        ("what is owned is overwritten while others use it", "forward, causal", "uninitialised",
         "      __syncthreads();  // all threads are done with the previous owned tile\n", ""),
        ("heads follow each other without a barrier", "backward, groups", "shared race",
         "          __syncthreads();  // all threads are done with the previous head\n", ""),
        ("tiles of another head are taken for this one's", "backward, groups", "wrong",
         "          for (int i = 0; i < kAttentionStages; ++i) held[i] = kNone;\n        }", "        }"),
        ("padding is seen", "forward, causal", "wrong",
         "row >= count || at < 0 || is_padded(at)", "row >= count || at < 0"),
        ("keys without a query are not seen by all", "forward, keys without queries", "wrong",
         "at >= sequence.first_context_key ? kContextKey : at", "at"),
        ("a causal query sees its own key", "forward, causal", "wrong",
         "p.has(kCausal) ? at + (!p.shared_qk || self_only)", "p.has(kCausal) ? at + 1"),
        ("a self_only query does not see its own key", "backward, causal", "wrong",
         "p.has(kCausal) ? at + (!p.shared_qk || self_only)", "p.has(kCausal) ? at + !p.shared_qk"),
        ("a query sees its own key", "forward, plain", "wrong",
         "fact.n_excluded = p.shared_qk && !self_only;", "fact.n_excluded = 0;"),
        ("a self_only query leaves out its own key", "backward, self_only", "wrong",
         "fact.n_excluded = p.shared_qk && !self_only;", "fact.n_excluded = p.shared_qk;"),
        ("a tile is taken for one that all see", "forward, plain", "wrong",
         "slot + kAttentionRows <= inner_end", "slot <= inner_end"),
        ("the last tile is not visited", "forward, plain", "wrong",
         "floor_div(of_last.end - 1, kAttentionRows) + 1 - first",
         "floor_div(of_last.end - 1, kAttentionRows) - first"),
        ("rows beyond the ring are queries", "backward, buckets", "wrong",
         "(p.ring() || wrapped == slot + row)", "(p.ring() || true)"),
        ("the first tile is visited again", "forward, own tiles", "wrong", "tile + (tile >= diagonal)", "tile"),
        ("scores are not in base 2", "forward, plain", "wrong",
         "p.scale * kLog2e / key_length", "p.scale / key_length"),
        ("dropout counts rounds for slots", "forward, dropout", "wrong",
         "philox(state.seed, at / 4, in_round, round, sequence.dropout_index)",
         "philox(state.seed, at / 4, round, in_round, sequence.dropout_index)"),
        ("dropout takes the wrong word", "backward, dropout", "wrong",
         "(at & 2 ? high : low)", "(at & 2 ? low : high)"),
        ("what is kept is not scaled", "forward, dropout", "wrong", "x[n][j] * p.keep_factor : 0.f", "x[n][j] : 0.f"),
        ("a round overwrites the one before", "forward, bfloat16", "wrong",
         "fmaf(to_float(pair[0]), before, value(m + i, 0))", "value(m + i, 0)"),
        ("what no round has written is added to", "forward, bfloat16", "wrong", "if (add && mine)", "if (mine)"),
        ("columns beyond the row are written", "forward, 24 columns", "global race",
         "const bool mine = write && d < width;", "const bool mine = write;"),
        ("a self_only query has the weight of its score", "backward, self_only", "wrong",
         "self_only ? -lse : fmaf(score, factor, -lse)", "fmaf(score, factor, -lse)"),
        ("a query sees what its window has not", "backward, plain", "wrong",
         "return sees ? x : -INFINITY;", "return x;"),
        ("the limit is seen", "backward, causal", "wrong", "(key < limit) &", "(key <= limit) &"),
        ("score_mods are overwritten while others read them", "forward, many score_mods", "shared race",
         "    __syncthreads();  // all threads are done with the previous tile\n", ""),
        ("score_mods are used before they are there", "backward, within", "shared race",
         "    }\n    __syncthreads();\n  }\n\n  // Whether any row", "    }\n  }\n\n  // Whether any row"),
        ("a warp skips a tile that one of its rows sees", "forward, self_only", "wrong",
         "__any_sync(~0u, sees(a) || sees(b))", "__all_sync(~0u, sees(a) && sees(b))"),
    ],
    "tiles.cuh": [
        ("columns beyond the row are loaded", "forward, 24 columns", "out of bounds",
         "is_there(x, at) && column < x.width ? 16 : 0", "is_there(x, at) ? 16 : 0"),
        ("elements beyond the row are loaded", "forward, 30 columns", "out of bounds",
         "is_there(x, at) && column + i < x.width;", "is_there(x, at);"),
    ],
    "attention_sequence.cuh": [
        ("a chunk less before", "forward, plain", "wrong",
         "begin_of(chunk - back, p.chunk_length)", "begin_of(chunk - back + 1, p.chunk_length)"),
        ("a chunk more after", "backward, plain", "wrong",
         "begin_of(chunk + ahead + 1, p.chunk_length)", "begin_of(chunk + ahead + 2, p.chunk_length)"),
        ("windows leave their bucket", "forward, buckets", "wrong",
         "max(bucket.begin, begin - back * chunk_length)", "begin - back * chunk_length"),
        ("queries of keys are those of their window", "backward, causal", "wrong",
         "return around(p, slot, after, before);", "return around(p, slot, before, after);"),
        ("a list is one key shorter", "lists, causal", "wrong",
         "return {first, first + p.list_length};", "return {first, first + p.list_length - 1};"),
        ("what a list excludes ends too early", "lists, hash", "wrong", "list[count - 1] + 1}", "list[count - 1]}"),
        ("slots before the ring are not its last ones", "forward, plain", "out of bounds",
         "slot - floor_div(slot, ring_length) * ring_length", "slot - slot / ring_length * ring_length"),
        ("bounds of the first batch row", "forward, padding", "global race", "b * p.bounds_stride", "0"),
        ("grouped heads read other keys", "forward, groups", "wrong",
         "key_head = head / p.group;", "key_head = 0 * head;"),
    ],
    "attention_forward.cuh": [
        ("the sum is not rescaled", "forward, plain", "wrong",
         "row.highest = highest, row.total *= before;", "row.highest = highest;"),
        ("half of the output is not rescaled", "forward, plain", "wrong",
         "out[m][2 * h] *= before, out[m][2 * h + 1] *= before;", "out[m][2 * h] *= before;"),
        ("lanes of a row have their own maximum", "forward, plain", "wrong",
         "      highest = quad_max(highest);\n", ""),
        ("lanes of a row have their own sum", "forward, plain", "wrong",
         "      row.total = quad_sum(row.total);\n", ""),
        ("a round forgets the one before", "forward, plain", "wrong",
         "const bool has_earlier = p.round > 0 &&", "const bool has_earlier = p.round > 1 &&"),
        ("lse is in base 2", "forward, plain", "wrong", "last_round ? merged * kLn2 : merged", "merged"),
        ("a window has a slot more", "forward, plain", "wrong",
         "if (at >= static_cast<uint32_t>(query.n_slots))", "if (at > static_cast<uint32_t>(query.n_slots))"),
        ("a self_only query's dropout is another", "forward, self_only", "wrong",
         "kept += !p.dropout || Block::is_kept(slot, at);", "kept += 1;"),
        ("a self_only query's lse counts one meeting", "forward, self_only", "wrong",
         "state.times ? score + logf(times) : -INFINITY", "state.times ? score : -INFINITY"),
        ("a self_only query sees its padding", "forward, self_only", "wrong",
         "p.shared_qk && !padded && at < seen", "p.shared_qk && at < seen"),
        ("a self_only query forgets earlier rounds", "forward, self_only", "wrong",
         "state.times += __reduce_add_sync(~0u, times)", "state.times = __reduce_add_sync(~0u, times)"),
        ("a key that counts once counts in lse", "forward, self_only and once", "wrong",
         "sequence.has_score_mod && p.has(kDedup) ? 1.f", "false ? 1.f"),
        ("own keys of other buckets count", "forward, self_only in a bucket", "wrong",
         "sequence.wrapped(first + at) / sequence.length != p.round", "false"),
        ("later lists do not exclude what the first shows", "lists, hash", "wrong",
         "p.shared_qk ? !p.has(kCausal) : p.lists && p.round > 0", "p.shared_qk && !p.has(kCausal)"),
        ("score_mods are not added", "forward, within", "wrong",
         "if (sequence.has_score_mod) {\n      Block::add", "if (false) {\n      Block::add"),
    ],
    "attention_backward.cuh": [
        ("delta is not subtracted from queries", "backward, plain", "wrong",
         "(grad_weight[n][j] - rows[j / 2].delta)", "grad_weight[n][j]"),
        ("delta is not subtracted from keys", "backward, groups", "wrong",
         "(grad_weight[n][j] - query_of(n, j).delta)", "grad_weight[n][j]"),
        ("gradients of queries are in base 2", "backward, plain", "wrong",
         "grad[m][2 * h + j] * kLn2", "grad[m][2 * h + j]"),
        ("dropout is not in the gradient of values", "backward, dropout", "wrong",
         "      if (p.dropout) Block::drop(s, kept);\n", ""),
        ("the Jacobian is the identity", "backward, plain", "wrong",
         "scale * (grad_key[m][2 * h + j] - x * along)", "scale * grad_key[m][2 * h + j]"),
        ("the Jacobian's term has a wrong length", "backward, l2", "wrong", "dot * inverse * inverse", "dot * inverse"),
        ("rows without a query add to nothing", "backward, keys without queries", "wrong",
         "later || (p.shared_qk && at < sequence.n_queries)", "later || p.shared_qk"),
        ("the rest key's gradient is overwritten", "lists, hash", "wrong",
         "p.round > 0 || p.has(kRestKey)", "p.round > 0"),
        ("a query that saw nothing has a weight", "backward, within", "wrong",
         "  if (lse == -INFINITY) lse = INFINITY;\n", ""),
        ("heads of a group share entries", "lists, groups", "global race",
         "p.lists ? sequence.h : sequence.key_head", "sequence.key_head"),
        ("the second head of a group is forgotten", "backward, groups", "wrong",
         "        p.lists ? 1 : p.group,", "        1,"),
        ("score_mods are not added to queries", "backward, within", "wrong",
         "[columns + n * 8 + lane % 4 * 2 + j % 2];\n        });\n      if (p.dropout) {\n        const",
         "[0] * 0.f;\n        });\n      if (p.dropout) {\n        const"),
        ("keys have the factor of another row", "backward, plain", "wrong",
         "factor[h] = Block::owned_facts().factor[i];", "factor[h] = Block::owned_facts().factor[i ^ 1];"),
    ],
    "score_mod.cuh": [
        ("bounds of the first batch row", "forward, padding", "wrong", "head / p.H * p.bounds_stride", "0 * head"),
        ("a meeting before the window counts", "forward, once", "wrong",
         "at >= window.seen.begin && at < window.seen.end", "at < window.seen.end"),
        ("the bucket ends a slot later", "forward, within", "wrong", "slot >= bucket.end", "slot > bucket.end"),
        ("a bucket has its successor's tokens", "forward, within", "wrong",
         "return x > bucket;", "return x > bucket + 1;"),
        ("rounds of the unrolled ring are not wrapped", "forward, paper", "out of bounds",
         "unrolled - floor_div(unrolled, sequence.rounds) * sequence.rounds", "unrolled"),
        ("meetings are not counted", "forward, paper", "wrong", "max(times_met(p, sequence, query, key), 1)", "1"),
        ("a query's bucket is that of the block's round", "backward, self_only in a bucket", "wrong",
         "sequence.window_of(p, sequence.wrapped(query_slot) / sequence.length, query)",
         "sequence.window_of(p, p.round, query)"),
    ],
    "lists.cuh": [
        ("the last entry of a key is forgotten", "lists, causal", "wrong",
         "i < starts[1]; ++i", "i + 1 < starts[1]; ++i"),
        ("keys that were seen twice count twice", "lists, hash", "wrong",
         "key <= limit && !(round > 0 && key >= low && key <= high)", "key <= limit"),
        ("the context counts as seen", "lists, hash", "wrong",
         "if (key < 0 || key >= a.S - a.n_context) continue;", "if (key < 0) continue;"),
        ("later keys count as seen", "lists, causal", "wrong", "seen += key <= limit &&", "seen += true &&"),
        ("the rest key's gradient has no delta", "lists, hash", "wrong", "(mean - warp_sum(delta))", "mean"),
        ("the rest key does not take from the others", "lists, hash", "wrong",
         "before = expf(lse - both)", "before = 1.f"),
        ("queries after the last key have sums of their own", "lists, causal", "out of bounds",
         "min(position, p.sum_rows - 1)", "position"),
        ("padding gets the rest key's gradient", "lists, hash", "wrong",
         "key < a.S - a.n_context && !(a.padding && a.padding[b * a.S + key])", "key < a.S - a.n_context"),
        ("the rest key stands for one key", "lists, hash", "wrong",
         " + logf(static_cast<float>(unseen)) : -INFINITY", " : -INFINITY"),
        ("a key starts where the one before does", "lists, causal", "wrong",
         "for (int k = before + 1; k <= key; ++k)", "for (int k = before + 1; k < key; ++k)"),
        ("the second head of a group has no entries", "lists, groups", "wrong",
         "h < (key_head + 1) * a.group", "h < key_head * a.group + 1"),
    ],
}  # fmt: skip
