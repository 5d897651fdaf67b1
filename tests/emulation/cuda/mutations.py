"""Ways in which the CUDA kernels of hash, sort and gather could be wrong, and problems that must show each of them."""

from __future__ import annotations

import torch

from ..cases import Case, Close, EachItsOwn, Hash, NotFinite, Order, OutOfRange, Ties
from ..mutation import Mutation
from . import attention_mutations, select_mutations
from .cases import Gather

BFLOAT16, FLOAT16, FLOAT32 = (f"hash_kernel<{t}, 4>" for t in ("rk::cuda::bf16", "rk::cuda::fp16", "float"))
WHOLE, COUNT, RANK = (f"order_kernel<rk::cuda::OrderPart::{part}>" for part in ("kAll", "kCount", "kRank"))

# By name: the instances of a template that it needs, and the case.
PROBLEMS: dict[str, tuple[tuple[str, ...], Case]] = {
    "hash": (
        (BFLOAT16,),
        Hash(300, 64, (6, 10, 34), batch=2, heads=2, rounds=3, padded=True, layout="B L H D", device="one"),
    ),
    "float": ((FLOAT32,), Hash(300, 40, (6, 10, 34), torch.float32, batch=2, heads=2, rounds=3, device="one")),
    "aligned": ((BFLOAT16,), Hash(70, 40, (6,))),
    "unaligned": ((BFLOAT16,), Hash(70, 40, (6,), skip=3)),
    "chunks": ((BFLOAT16,), Hash(300, 64, (400,), rounds=1, device="one")),  # more rotations than fit
    "rounds": ((BFLOAT16,), Hash(70, 64, (6, 10), rounds=3)),  # in a block
    "rotations of the batch": ((BFLOAT16,), EachItsOwn()),
    "many tokens": ((BFLOAT16,), Hash(700, 64, (32,), rounds=1)),  # of a head, for several blocks
    # Two rounds a block, and one in the last.
    "uneven": (("hash_kernel<rk::cuda::bf16, 2>",), Hash(300, 32, (200,), rounds=5, device="A100")),
    "ties": ((BFLOAT16,), Ties()),
    "close bfloat16": ((BFLOAT16,), Close(torch.bfloat16)),
    "close float16": ((FLOAT16,), Close(torch.float16)),
    "not finite": ((BFLOAT16,), NotFinite()),
    "order": ((WHOLE,), Order(1000, 65, heads=2, rounds=2)),
    "17 buckets": ((WHOLE,), Order(300, 17)),  # the last one has a bit of its own
    "many buckets": ((WHOLE,), Order(5000, 2049)),  # more pairs of counters than threads
    "many keys": ((WHOLE,), Order(40000, 5)),  # in a block
    "digits": ((WHOLE,), Order(3000, 20000)),
    "packed": ((WHOLE,), Order(1500, 30, batch=2, rounds=3, bounds=(0, 1, 1, 900, 1500))),
    "padding": ((WHOLE,), Order(300, 30, batch=2, heads=2, bounds=((0, 200, 300), (0, 90, 300)))),
    "parts": ((COUNT, RANK), Order(38500, 300, device="little")),
    "packed parts": ((COUNT, RANK), Order(33000, 2049, rounds=2, bounds=(0, 100, 33000), device="little")),
    "out of range": ((WHOLE,), OutOfRange()),
    "gather": ((), Gather()),
    **attention_mutations.PROBLEMS,
    **select_mutations.PROBLEMS,
}  # fmt: skip


HASH = [
    # memory that others still use, or that is not there yet
    ("no warp barrier after the copies", "hash", "shared race",
     "wait_for_copies<0>();\n    __syncwarp();", "wait_for_copies<0>();"),
    ("one group of copies may be on the way", "hash", "copy in flight", "wait_for_copies<0>", "wait_for_copies<1>"),
    ("copies are not waited for", "hash", "copy in flight", "    wait_for_copies<0>();\n", ""),
    ("copies are not committed", "hash", "copy in flight", "  commit_copies();\n}", "}"),
    ("rows are overwritten while others take them", "hash", "shared race", "may come\n      __syncwarp();", "may come"),
    ("rows come that no one waits for", "hash", "copy in flight",
     "may come\n      __syncwarp();\n      if (first + rows < end) load", "may come\n      __syncwarp();\n      load"),
    ("rows are overwritten while others multiply them", "float", "shared race",
     "if constexpr (sizeof(T) == 4) {\n      __syncwarp();", "if constexpr (sizeof(T) == 4) {"),
    ("tiles are overwritten while others use them", "chunks", "shared race",
     "        __syncthreads();\n        for (int i = threadIdx.x; i < even;",
     "        for (int i = threadIdx.x; i < even;"),
    ("columns are loaded before the tiles are known", "hash", "uninitialised",
     "        __syncthreads();\n        load_columns(", "        load_columns("),
    ("columns are used before they are loaded", "hash", "uninitialised",
     "rotations, even);\n        __syncthreads();", "rotations, even);"),
    # bounds
    ("a row too many is copied", "aligned", "out of bounds",
     "const bool inside = token < p.L && d < p.D;\n      copy_async",
     "const bool inside = token <= p.L && d < p.D;\n      copy_async"),
    ("a row too many is loaded", "unaligned", "out of bounds",
     "const bool inside = token < p.L && d < p.D;\n      reinterpret_cast",
     "const bool inside = token <= p.L && d < p.D;\n      reinterpret_cast"),
    ("a copy too many of each row", "aligned", "out of bounds",
     "const bool inside = token < p.L && d < p.D;\n      copy_async",
     "const bool inside = token < p.L && d <= p.D;\n      copy_async"),
    ("an element too many of each row", "unaligned", "out of bounds",
     "const bool inside = token < p.L && d < p.D;\n      reinterpret_cast",
     "const bool inside = token < p.L && d <= p.D;\n      reinterpret_cast"),
    ("copies beyond the head size are not of zeros", "not finite", "wrong", "inside ? 16 : 0", "16"),
    ("a bucket too many is stored", "hash", "global race", "if (token < p.L)\n", "if (token <= p.L)\n"),
    ("a row of rotations too many", "aligned", "out of bounds", "k < p.D && column", "k <= p.D && column"),
    ("columns of the next factor", "hash", "out of bounds", "k < p.D && column < tiles[tile].count", "k < p.D"),
    ("tiles do not end with their factor", "hash", "out of bounds", "min(half - index, kHashColumns)", "kHashColumns"),
    ("the odd tile has no partner", "hash", "uninitialised", "count + count % 2", "count"),
    ("the partner of the odd tile has no columns", "hash", "uninitialised",
     "tiles, rotations, even)", "tiles, rotations, count)"),
    ("the partner of the odd tile is the next one", "hash", "out of bounds",
     "i < count ? column_tile(p, start + i) : ColumnTile{0, 0, 0, 0, 0, -1}", "column_tile(p, start + i)"),
    ("the last block has as many rounds as others", "uneven", "out of bounds",
     "min(first_tile + p.rounds_per_block * p.round_tiles, p.R * p.round_tiles)",
     "first_tile + p.rounds_per_block * p.round_tiles"),
    # which rows and columns
    ("strides of batch and head are mixed up", "hash", "wrong",
     "b * p.stride_b + h * p.stride_h", "b * p.stride_h + h * p.stride_b"),
    ("rotations of the first head", "hash", "wrong", " + h * p.rotations_stride_h", ""),
    ("rotations of the first of the batch", "rotations of the batch", "wrong", "b * p.rotations_stride_b + h", "h"),
    ("every block begins with the first rounds", "uneven", "global race",
     "group * p.rounds_per_block * p.round_tiles", "0"),
    ("every block begins with the first token", "many tokens", "global race",
     "int64_t(share) * p.tokens_per_block, end", "0, end"),
    ("a block takes its first rows again", "float", "wrong",
     "(sizeof(T) == 4) {\n      __syncwarp();\n      if (first + rows < end) load_rows(p, layout, x, first + rows,",
     "(sizeof(T) == 4) {\n      __syncwarp();\n      if (first + rows < end) load_rows(p, layout, x, first,"),
    ("every block goes to the last token", "many tokens", "global race", "min(begin + p.tokens_per_block, p.L)", "p.L"),
    ("columns of the first round", "hash", "wrong", "column = round * columns_of_round", "column = 0"),
    ("columns of the first factor", "hash", "wrong", "rest -= tiles, column += half,", "rest -= tiles,"),
    ("both terms are in one place", "hash", "wrong", "(term * kDepth + k)", "k"),
    ("only the first columns are loaded", "chunks", "wrong", "p.resident_tiles < end_tile - first_tile", "false"),
    ("rotations are loaded for no tokens", "hash", "uninitialised", "first == begin || ", ""),
    ("rows of the first warp are copied", "hash", "wrong",
     "first + warp * kWarp + row;\n      const bool inside = token < p.L && d < p.D;\n      copy_async",
     "first + row;\n      const bool inside = token < p.L && d < p.D;\n      copy_async"),
    ("rows of a fragment", "hash", "wrong", "warp * kWarp + m * 16 + lane % 16", "warp * kWarp + m * 8 + lane % 16"),
    ("columns of a fragment", "hash", "uninitialised", "(k * 2 + lane / 16) * 16", "(k * 2 + lane / 16 * 2) * 16"),
    ("the second step multiplies the first fragment", "hash", "wrong",
     "fragments[m][k + 1], columns[2]", "fragments[m][k], columns[2]"),
    ("rows of float32", "float", "wrong", "rows + r * 8 *", "rows + r * 4 *"),
    ("elements of float32", "float", "wrong", "d == 1 ? x[r].y", "d == 1 ? x[r].x"),
    ("both tiles of a pair have the same columns", "float", "wrong",
     "layout.column_row(tile + i, 0, 0)", "layout.column_row(tile, 0, 0)"),
    # float32 rotations in two terms
    ("one term of the rotations (bfloat16)", "close bfloat16", "wrong",
     "term < kHashTerms<T>; ++term)\n#pragma unroll\n      for (int k",
     "term < 1; ++term)\n#pragma unroll\n      for (int k"),
    ("one term of the rotations (float16)", "close float16", "wrong",
     "term < kHashTerms<T>; ++term)\n#pragma unroll\n      for (int k",
     "term < 1; ++term)\n#pragma unroll\n      for (int k"),
    ("both terms are the first", "close bfloat16", "wrong", "  rest -= to_float(term);\n", ""),
    # the largest projection, and buckets
    ("the last of equals in a lane", "ties", "wrong", "fabsf(other) > fabsf(y);", "fabsf(other) >= fabsf(y);"),
    ("any of equals of two lanes", "ties", "wrong", " || (fabsf(other) == fabsf(y) && at < column)", ""),
    ("the last of equals of two lanes", "ties", "wrong", "at < column)", "at > column)"),
    ("the largest instead of the largest in size", "hash", "wrong", "fabsf(other) > fabsf(y);", "other > y;"),
    ("signs of the projections are ignored", "hash", "wrong", "best[r].y < 0.f ? tile.half : 0", "0"),
    ("the half is that of the tile", "hash", "wrong", "best[r].y < 0.f ? tile.half", "best[r].y < 0.f ? tile.count"),
    ("digits are not multiplied by their radix", "hash", "wrong", "tile.radix * (best", "1 * (best"),
    ("radix of a factor", "hash", "wrong", "radix *= 2 * half", "radix *= half"),
    ("two of four lanes", "hash", "wrong", "step < 4; step *= 2", "step < 2; step *= 2"),
    ("the best of a factor is not forgotten", "hash", "wrong", "      best[r] = {};\n", ""),
    ("the bucket of a round is not forgotten", "rounds", "wrong",
     "    bucket[0] = bucket[1] = bucket[2] = bucket[3] = 0;\n", ""),
    ("column numbers of a lane", "hash", "wrong", "tile.index + lane % 4 * 2", "tile.index + lane % 4"),
    ("column numbers of a tile", "hash", "wrong", "mine.see(products[i], tile.index +", "mine.see(products[i],"),
    ("rows of a bucket", "hash", "wrong", "lane % 4 * 8 + lane / 4", "lane % 4 + lane / 4 * 4"),
    ("the bucket of a lane", "hash", "wrong", "r == 2 ? bucket[2] : bucket[3]", "bucket[2]"),
    ("round of a bucket", "rounds", "wrong", "(head * p.R + tile.round)", "(head * p.R + start / p.round_tiles)"),
    ("padding is ignored", "hash", "wrong", "p.padding && p.padding[b * p.L + token]", "false"),
    ("padding of the first of the batch", "hash", "wrong", "p.padding[b * p.L + token]", "p.padding[token]"),
]  # fmt: skip
ORDER = [
    # memory that others still use, or that is not there yet
    ("counters are used before they are zero", "order", "shared race",
     "tile.pair(0, i) = 0;\n  __syncthreads();", "tile.pair(0, i) = 0;"),
    ("counters are used before they are complete", "order", "shared race",
     "  __syncthreads();\n\n  int32_t* of_tile", "  int32_t* of_tile"),
    ("ranks are used before they are complete", "order", "shared race", "sums);\n  __syncthreads();", "sums);"),
    ("ranks change while slots are made of them", "parts", "shared race",
     "- tile.counters[i];\n    __syncthreads();", "- tile.counters[i];"),
    ("ranks are read before they are complete", "order", "uninitialised",
     "    });\n  }\n  __syncthreads();", "    });\n  }"),
    ("a counter changes while others read it", "order", "shared race", "- 1));\n      __syncwarp();", "- 1));"),
    ("a counter is read before it changed", "order", "shared race",
     "      }\n      __syncwarp();\n    });", "      }\n    });"),
    ("counters are added to without an atomic", "order", "shared race",
     "atomicAdd(&tile.pair(warp, digit / 2), digit % 2 ? 1u << 16 : 1u)",
     "tile.pair(warp, digit / 2) += digit % 2 ? 1u << 16 : 1u"),
    # counts and ranks
    ("the halves of a counter are mixed up", "order", "shared race",
     "digit % 2 ? 1u << 16 : 1u", "digit % 2 ? 1u : 1u << 16"),
    ("a rank in the high half without the low one", "order", "shared race", "scan.before + low;", "scan.before;"),
    ("ranks in both halves of a counter are the low one", "order", "shared race",
     "low += counts & 0xffff, high += counts >> 16;\n    }\n  }",
     "low += counts & 0xffff, high += counts & 0xffff;\n    }\n  }"),
    ("equal keys of later warps come first", "order", "wrong",
     "for (int w = 0; inside && w < tile.p.sorters; ++w) {\n      uint32_t& counters",
     "for (int w = tile.p.sorters - 1; inside && w >= 0; --w) {\n      uint32_t& counters"),
    ("ranks have a sign", "many keys", "out of bounds",
     "uint16_t* counters = tile.counters + warp * 2 * tile.pairs;",
     "int16_t* counters = reinterpret_cast<int16_t*>(tile.counters) + warp * 2 * tile.pairs;"),
    ("what went before is not carried", "many buckets", "shared race",
     "    low = carry + scan.before;\n    carry += scan.total;", "    low = carry + scan.before;"),
    ("keys beyond the last are counted", "order", "uninitialised",
     "if (!inside) return;\n      atomicAdd", "atomicAdd"),
    ("keys beyond the last are ranked", "order", "shared race",
     "      if (inside) {\n        if (peers", "      if (true) {\n        if (peers"),
    ("a lane counts itself", "order", "shared race", "peers & ((1u << lane) - 1)", "peers & ((2u << lane) - 1)"),
    ("equal keys of later lanes come first", "order", "wrong",
     "peers & ((1u << lane) - 1));\n      __syncwarp();\n      if (inside) {\n        if (peers >> lane == 1)",
     "peers >> lane >> 1);\n      __syncwarp();\n      if (inside) {\n        if ((peers & ((1u << lane) - 1)) == 0)"),
    ("the first of equal keys updates the counter", "order", "uninitialised",
     "peers >> lane == 1", "(peers & ((1u << lane) - 1)) == 0"),
    ("a bit of a digit is ignored", "17 buckets", "shared race", "32 - __clz(p.base - 1)", "31 - __clz(p.base - 1)"),
    ("lanes of one digit only by its set bits", "order", "shared race", "set ? others : ~others", "set ? others : ~0u"),
    ("keys that are loaded ahead are taken again", "order", "out of bounds",
     "start += AHEAD * kWarp", "start += kWarp"),
    ("keys of the last warp are left out", "order", "uninitialised",
     "(tile.count + sorters * kWarp - 1) / (sorters * kWarp) * kWarp", "tile.count / (sorters * kWarp) * kWarp"),
    # digits
    ("buckets out of range", "out of range", "uninitialised",
     "min(static_cast<uint32_t>(p.buckets[segment.keys + position(i)]), p.last)",
     "static_cast<uint32_t>(p.buckets[segment.keys + position(i)])"),
    ("buckets out of range are signed", "out of range", "uninitialised",
     "min(static_cast<uint32_t>(p.buckets[segment.keys + position(i)]), p.last)",
     "min(p.buckets[segment.keys + position(i)], static_cast<int32_t>(p.last))"),
    ("every digit is the first", "digits", "wrong", "bucket / p.divisor % p.base", "bucket % p.base"),
    ("later digits are of unsorted keys", "digits", "wrong",
     "p.input_order ? p.input_order[segment.slots + first + i] : first + i", "first + i"),
    ("positions are those of the digit before", "digits", "wrong", "tile.position(key);", "tile.first + key;"),
    # segments
    ("a key too many", "order", "global race",
     "min(tile.segment.length - tile.first, p.tile)", "min(tile.segment.length - tile.first + 1, p.tile)"),
    ("slots of packed sequences", "packed", "global race", "p.rounds * begin + round", "begin + round"),
    ("slots of rounds of packed sequences", "packed", "global race", "round * length, static", "round * p.L, static"),
    ("keys of packed sequences", "packed", "wrong", "row_round * p.L + begin,", "row_round * p.L,"),
    ("length of packed sequences", "packed", "global race", "bounds[1] - begin :", "p.L - begin :"),
    ("bounds of the first batch row", "padding", "wrong", "row / p.heads * p.bounds_stride", "0 * p.heads"),
    # parts
    ("parts overlap by a key", "packed parts", "global race",
     "static_cast<int>(blockIdx.x % p.tiles) * p.tile", "static_cast<int>(blockIdx.x % p.tiles) * (p.tile - 1)"),
    ("keys in a part", "parts", "wrong",
     "p.input_order[segment.slots + first + i] : first + i", "p.input_order[segment.slots + first + i] : i"),
    ("counts of the first warp", "parts", "global race", "w < p.sorters; ++w) sum += tile", "w < 1; ++w) sum += tile"),
    ("counts of the first part", "parts", "global race", "static_cast<int64_t>(blockIdx.x) * p.base", "0"),
    ("counts of the first segment", "packed parts", "global race",
     "static_cast<int64_t>(blockIdx.x) * p.tiles * p.base", "0"),
    ("slots without the ranks", "parts", "global race", "of_tile[i] - tile.counters[i]", "of_tile[i]"),
    ("the first slot is after the part", "parts", "global race",
     "    counts[t * p.base + bucket] = slot;\n    slot += count;",
     "    slot += count;\n    counts[t * p.base + bucket] = slot;"),
    ("later parts come first", "parts", "wrong",
     "for (int t = 0; t < tiles; ++t) {", "for (int t = tiles - 1; t >= 0; --t) {"),
    ("buckets of parts", "parts", "global race", "int slot = scan_block(sum, sums).before;", "int slot = 0;"),
    ("slots of the digit of a rank", "parts", "global race",
     "tile.slots()[tile.digits()[key]] + i : i", "tile.slots()[tile.digits()[i]] + i : i"),
]  # fmt: skip
SCAN = [
    ("sums of warps are overwritten while others read them", "many buckets", "shared race",
     "  __syncthreads();  // all threads have read the sums of an earlier call\n", ""),
    ("sums of warps are read before they are written", "order", "uninitialised",
     "sums[warp] = inclusive;\n  __syncthreads();", "sums[warp] = inclusive;"),
    ("sum before a warp", "order", "out of bounds", "(warp + kWarp - 1) % kWarp", "warp"),
    ("the first warp begins with the last sum", "order", "out of bounds", "warp ? before_warp : 0", "before_warp"),
    ("sums that no warp has", "order", "uninitialised", "lane < warps ? sums[lane] : 0", "sums[lane]"),
    ("a sum wraps around", "order", "out of bounds", "if (lane >= step) inclusive", "inclusive"),
]  # fmt: skip
GATHER = [
    ("negative rows", "gather", "out of bounds", "source >= 0 && source", "source"),
    ("rows beyond the input", "gather", "out of bounds", "source >= 0 && source < g.input_rows", "source >= 0"),
    ("a row of the input too many", "gather", "out of bounds", "source < g.input_rows", "source <= g.input_rows"),
    ("indices beyond the last", "gather", "out of bounds", "row < g.rows ? g.index[row] : -1", "g.index[row]"),
    ("rows beyond the last", "gather", "out of bounds", "if (row < g.rows) out", "out"),
    ("a row too many", "gather", "out of bounds", "if (row < g.rows) out", "if (row <= g.rows) out"),
    ("only the first columns", "gather", "wrong", "column < g.vectors; column", "column < p.columns; column"),
]  # fmt: skip

FILES = (
    {"hash.cuh": HASH, "order.cuh": ORDER, "scan.cuh": SCAN, "gather.cu": GATHER}
    | attention_mutations.FILES
    | select_mutations.FILES
)
MUTATIONS = [Mutation(file, *row) for file, rows in FILES.items() for row in rows]
