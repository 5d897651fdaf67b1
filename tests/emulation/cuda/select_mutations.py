"""Ways in which the CUDA kernels that choose keys could be wrong, as in ``mutations``."""

from __future__ import annotations

from typing import Any

import torch

from ..select import MANY, Select


def _problem(name: str, length: int, head_dim: int, kind: str = "float", **options: Any) -> dict[str, Any]:
    two_steps = "true" if options.get("keys") == MANY else "false"
    instances = {
        f"select_means_kernel<{kind}>", f"select_weigh_kernel<{kind}, 4, {two_steps}>", f"select_blocks_kernel<{kind}>",
        "select_weigh_kernel<float, 4, false>",  # of blocks
    }  # fmt: skip
    dtype = torch.float32 if kind == "float" else torch.bfloat16
    return {f"select, {name}": (tuple(sorted(instances)), Select(length, head_dim, dtype, **options))}


PROBLEMS: dict[str, tuple[tuple[str, ...], Select]] = {
    **_problem(
        "causal", 150, 30, heads=4, key_heads=2, batch=2, causal=True, padded=0.3, padded_queries=0.6, context=3,
        trailing=40,
    ),
    **_problem("hash", 300, 30, grouping="hash", causal=True, padded=0.3, context=3, heads=2),
    **_problem("plain", 150, 64, "rk::cuda::bf16"),
    **_problem("fewer keys", 160, 30, keys=60, budget=30),
    **_problem("few distinct keys", 300, 30, distinct=40, budget=110, local=0.0),
    **_problem("all queries are padded", 100, 30, padded_queries=1.0),
    **_problem("two steps", 20, 40, keys=MANY, padded=0.2, heads=2, key_heads=2, spread=4),
    **_problem("small weights", 150, 30, spread=100, budget=140),
    **_problem("not finite", 100, 30, causal=True, budget=30, not_finite=True),
    **_problem("equal weights", 100, 30, spread=0, keys=900, budget=300),
}  # fmt: skip

FILES: dict[str, list[tuple[str, str, str, str, str]]] = {
    "select.cuh": [
        # the local window, and what can be chosen
        ("windows of the first of the batch", "causal", "wrong", "windows[b * chunks + chunk]", "windows[chunk]"),
        ("the window of the first chunk", "plain", "wrong", "windows[b * chunks + chunk]", "windows[b * chunks]"),
        ("the last key that is seen is left out", "fewer keys", "wrong",
         "min(position / keys_per_candidate, n - 1) + 1", "min(position / keys_per_candidate, n - 1)"),
        ("a list is one shorter", "two steps", "global race", "if (list[middle] >= 0)", "if (list[middle + 1] >= 0)"),
        ("padding is chosen", "causal", "wrong", "candidate < p.n && !p.is_padded(first.b, candidate)",
         "candidate < p.n"),
        ("padding of the first of the batch", "causal", "wrong", "padding && padding[b * S + key]",
         "padding && padding[key]"),
        # queries that choose, and their means
        ("padded queries choose", "causal", "wrong", "at >= 0 && !(padding && padding[b * p.L + at])", "at >= 0"),
        ("a chunk of padded queries chooses nothing", "all queries are padded", "wrong",
         "  if (count == 0) count = find_members(nullptr);\n", ""),
        ("members of the first order", "hash", "wrong", "(head * p.R + p.R - 1) * p.L", "head * p.R * p.L"),
        ("members of all lanes are written to one element", "causal", "out of bounds",
         "members[count + __popc(votes & ((1u << lane) - 1))] = at", "members[count] = at"),
        ("the last member is the furthest", "hash", "wrong",
         "max(facts.largest, members[j])", "members[j]"),
        ("a mean is a sum", "causal", "wrong", "sum.x[i] / max(count, 1)", "sum.x[i]"),
        ("sub-groups begin with the same query", "causal", "wrong",
         "members += p.subgroup, count -= p.subgroup", "count -= p.subgroup"),
        ("mean keys have padding", "two steps", "wrong", "    if (p.is_padded(b, key)) continue;\n", ""),
        ("blocks are as large as their padding", "two steps", "wrong",
         "p.block_sizes[number] = n;", "p.block_sizes[number] = kSelectBlock - n;"),
        ("a block is weighed as one key", "two steps", "wrong",
         "extra = log2f(static_cast<float>(size))", "extra = 0.f"),
        ("blocks of the first head", "two steps", "wrong",
         "p.key, b, head % key_heads, key)", "p.key, b, 0, key)"),
        # weights
        ("rows of chunks", "causal", "wrong", "row / 16 * 4) + row % 8 / 2", "row / 16 * 4) + row % 4"),
        ("both parts of a mean are the first", "plain", "wrong",
         "        mean.x -= to_float(to[0]), mean.y -= to_float(to[1]);\n", ""),
        ("columns beyond the means are loaded", "fewer keys", "wrong", "has(chunk) && d < p.width",
         "has(chunk)"),
        ("chunks beyond the last are loaded", "causal", "global race",
         "chunk < kChunks && first.chunk + chunk < p.chunks", "chunk < kChunks"),
        ("means are used before they are there", "plain", "shared race",
         "subgroup * p.subgroup;\n    }\n    __syncthreads();", "subgroup * p.subgroup;\n    }"),
        ("all warps have the first rows", "plain", "wrong",
         "means[part].take(owned_tile(part), CHOSEN ? 0 : warp, lane)", "means[part].take(owned_tile(part), 0, lane)"),
        ("the furthest are read before they are there", "causal", "uninitialised",
         "furthest[warp] = largest;\n    __syncthreads();", "furthest[warp] = largest;"),
        ("keys of the first head", "causal", "wrong", "first.b, first.key_head, from)", "first.b, 0, from)"),
        ("copies are not waited for", "plain", "copy in flight",
         "      wait_for_copies<0>();\n      __syncthreads();  // the tile has arrived",
         "      __syncthreads();  // the tile has arrived"),
        ("no barrier after the copies", "plain", "uninitialised",
         "      __syncthreads();  // the tile has arrived, and all threads are done with the previous one\n", ""),
        ("the next walk begins while others read", "plain", "shared race",
         "    __syncthreads();  // all threads are done with the last tile\n", ""),
        ("a candidate sees itself left out", "causal", "wrong", "position <= rows[h].facts.largest",
         "position < rows[h].facts.largest"),
        ("scores are not in base 2", "causal", "wrong", "score = sees ? fmaf(score, p.scale * kLog2e, extra)",
         "score = sees ? fmaf(score, p.scale, extra)"),
        ("a sum is not rescaled", "plain", "wrong", "fmaf(row.sum, exp2_approximate(row.top - top), sum)",
         "row.sum + sum"),
        ("lanes of a row have their own maximum", "plain", "wrong", "top = quad_max(row.top)", "top = row.top"),
        ("lanes of a row have their own sum", "plain", "wrong",
         "quad_sum(row.sum * exp2_approximate(row.top - top))", "row.sum * exp2_approximate(row.top - top)"),
        ("sums of warps are read before they are there", "two steps", "uninitialised",
         "make_float2(top, sum);\n        __syncthreads();", "make_float2(top, sum);"),
        ("warps have their own sum", "two steps", "wrong",
         "sum += merged[i][subgroup].y", "sum = merged[warp][subgroup].y"),
        ("a sub-group without a sum chooses", "not finite", "wrong",
         "      if (!(sum > 0.f)) row.facts.count = 0;  // it sees nothing, or its scores are NaN\n", ""),
        ("weights that are too small are none", "small weights", "wrong",
         "exp2_approximate(score - rows[h].top) + kSelectLeast", "exp2_approximate(score - rows[h].top)"),
        ("what is not seen has the least weight", "causal", "wrong", "if (score > -INFINITY) totals", "totals"),
        ("lanes of a chunk write the same half", "plain", "wrong",
         "upper ? totals[n][j] : totals[n + kHalf][j]", "upper ? totals[n + kHalf][j] : totals[n][j]"),
        ("half of the sub-groups choose", "plain", "wrong", "totals[n][j]) + other;", "totals[n][j]);"),
        ("chunks of others are written", "two steps", "global race", "if (has(chunk)) *reinterpret_cast<float2*>",
         "*reinterpret_cast<float2*>"),
        ("later keys have a share", "causal", "wrong",
         "key <= last && !(key >= excluded.begin", "!(key >= excluded.begin"),
        ("a tile is new to those that see a part of it", "causal", "wrong", "last >= to - 1 &&", "last >= from &&"),
        ("what the window excludes is new", "hash", "wrong",
         "p.R > 1 ? p.window(first.b, position / p.chunk_length) : LocalWindow{}", "LocalWindow{}"),
        ("the window of another chunk excludes it", "hash", "wrong",
         "p.window(first.b, position / p.chunk_length)", "p.window(first.b, first.chunk)"),
        ("shares are numbers of queries", "causal", "wrong", "(shares[n][j] + all) / count", "(shares[n][j] + all)"),
    ],
    "select_take.cuh": [
        ("chunks beyond the last take keys", "causal", "global race",
         "    if (at.head >= p.heads || at.chunk >= p.chunks) return;\n", ""),
        ("the last candidates are in no run", "plain", "wrong",
         "(candidates + kAttentionThreads - 1) / kAttentionThreads * kWarp", "candidates / kAttentionThreads * kWarp"),
        ("runs overlap", "plain", "wrong", "min(begin + run, candidates)", "min(begin + run + kWarp, candidates)"),
        ("the context has the first keys", "causal", "wrong", "list[i] = p.keys + i;", "list[i] = i;"),
        ("the window is not counted", "plain", "global race", "window.most - local, local", "window.most, local"),
        ("a list is not filled up", "causal", "wrong",
         "i < p.list_length; i += kAttentionThreads) list[i] = -1", "i < 0; i += kAttentionThreads) list[i] = -1"),
        ("keys of the window are taken again", "plain", "wrong",
         "key >= window.begin && key < window.end ? 0.f : totals[i]", "totals[i]"),
        ("candidates of blocks", "two steps", "wrong", "* kSelectBlock + i % kSelectBlock : i",
         "* kSelectBlock + i / kSelectBlock : i"),
        ("padding of the window is taken", "causal", "wrong",
         "key < window.end && !p.is_padded(at.b, key)", "key < window.end"),
        ("counts are used before they are zero", "plain", "uninitialised",
         "state.counts[i] = 0;\n      __syncthreads();", "state.counts[i] = 0;"),
        ("counts are used before they are complete", "plain", "shared race",
         "      });\n      __syncthreads();\n      // Each", "      });\n      // From"),
        ("a digit is used before it is known", "plain", "uninitialised",
         "      __syncthreads();\n      found |=", "      found |="),
        ("counts are added to without an atomic", "plain", "shared race",
         "atomicAdd(&state.counts[x >> shift & (kDigits - 1)], 1)", "++state.counts[x >> shift & (kDigits - 1)]"),
        ("all candidates count for later digits", "plain", "wrong",
         "x >> (shift + 8) == found >> (shift + 8)", "true"),
        ("the smallest are taken", "plain", "out of bounds", "kDigits - 1 - 2 * threadIdx.x", "2 * threadIdx.x + 1"),
        ("the higher digit of a thread", "plain", "wrong",
         "equal > scan.before + high;", "equal > scan.before + both;"),
        ("those of the higher digit are not counted", "plain", "global race", "(lower ? high : 0)", "0"),
        ("digits before are not counted", "plain", "global race",
         "state.left = equal - scan.before", "state.left = equal"),
        ("all that are equal are taken", "equal weights", "global race",
         "(x == least && tied + before(same) < ties)", "x == least"),
        ("one of those that are equal is not taken", "equal weights", "wrong",
         "tied + before(same) < ties", "tied + before(same) + 1 < ties"),
        ("all that are equal come before a warp", "few distinct keys", "global race",
         "written += min(tied, ties);", "written += tied;"),
        ("the window has no room", "plain", "wrong", "(key >= window.end ? local : 0)", "0"),
        ("all that are taken come before the window", "plain", "wrong", "taken && key < window.begin", "taken"),
        ("counts of warps are read before they are there", "plain", "shared race",
         "state.equal[warp] = equal;\n    __syncthreads();", "state.equal[warp] = equal;"),
        ("the window is written before its place is known", "plain", "shared race",
         "state.left = written;\n    __syncthreads();", "state.left = written;"),
    ],
}  # fmt: skip
FILES = {
    file: [(name, f"select, {problem}", *rest) for name, problem, *rest in rows]  # type: ignore[misc]
    for file, rows in FILES.items()
}
