// How kernels are launched, where there is a choice: pure functions of the problem and the device. Nothing else decides
// it.
#pragma once
#include <algorithm>
#include <cstdint>
#include <iterator>

#include "kernels/cuda/launch.h"
#include "kernels/params.h"

namespace rk::cuda {

constexpr int kWarp = 32;
constexpr int kReservedShared = 4096;  // bytes for the shared memory of a block that is not dynamic

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Kernels are compiled for head sizes of 16 * K_STEPS; other sizes are padded to the next of these. kernel_table.cuh
// has the instances.
constexpr int kHeadSteps[] = {2, 4, 8};
constexpr int kMaxHeadDim = 16 * kHeadSteps[std::size(kHeadSteps) - 1];

// The number of steps for a head size: the smallest that holds it and is at least `least`. 0 if none does.
constexpr int head_steps(int64_t head_dim, int least = 2) {
  for (const int steps : kHeadSteps)
    if (steps >= least && head_dim <= 16 * steps) return steps;
  return 0;
}
static_assert(head_steps(kMaxHeadDim) && !head_steps(kMaxHeadDim + 1));

inline int64_t bytes_of(Element element) { return element == Element::kSame ? 4 : 2; }

// Whether rows can be moved 16 bytes at a time.
inline bool is_aligned(const Rows& rows, int64_t width, int64_t bytes) {
  const auto fits = [&](int64_t elements) { return elements * bytes % 16 == 0; };
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && fits(rows.stride_b) && fits(rows.stride_h) &&
         fits(rows.stride_l) && fits(width);
}

// ---- hash

constexpr int kHashMaxWarps = 8;    // warps of a block; each has 32 rows
constexpr int kHashWarps = 16;      // warps that the registers of a multiprocessor allow
constexpr int kHashColumns = 8;     // columns of a column tile, all of one factor of one round
constexpr int kHashMaxTiles = 128;  // column tiles in shared memory at a time
constexpr int kHashMaxDim = kMaxHeadDim, kHashMaxFactors = 8;

struct HashPlan {
  Launch launch;
  int k_steps = 0;          // template argument: the head size is padded to 16 * k_steps
  int round_tiles = 0;      // column tiles of a round
  int rounds = 0;           // that a block computes
  int resident_tiles = 0;   // column tiles in shared memory at a time, an even number
  int blocks_per_head = 0;  // each takes an equal share of a head's tokens
  int tokens_per_block = 0;
};

// Terms into which a float32 rotation is split for rows of 2-byte elements: what two bfloat16 leave out is 2^-18 of it,
// less than a sum of 64 products in float32 may lose.
constexpr int hash_terms(int element_bytes) { return element_bytes == 2 ? 2 : 1; }

// Bytes of a row of x in shared memory: 16 more, so that rows one after another begin in different banks.
constexpr int hash_row_bytes(int element_bytes, int k_steps) { return element_bytes * 16 * k_steps + 16; }

// Bytes of a column tile: each term is [16 * k_steps][8 columns]; and 16 more, for the same reason.
constexpr int hash_column_tile_bytes(int element_bytes, int k_steps) {
  return element_bytes * hash_terms(element_bytes) * 16 * k_steps * kHashColumns + 16;
}

inline HashPlan plan_hash(const HashParams& p, const Device& device) {
  HashPlan plan;
  const int bytes = bytes_of(p.element);
  plan.k_steps = head_steps(p.D);
  for (int64_t f = 0; f < p.n_factors; ++f)
    plan.round_tiles += static_cast<int>(ceil_div(p.factors[f] / 2, kHashColumns));
  const int column_tile = hash_column_tile_bytes(bytes, plan.k_steps);
  const auto tiles_of = [&](int64_t rounds) {  // that are to be in shared memory
    const int64_t tiles = ceil_div(rounds * plan.round_tiles, 2) * 2;
    return static_cast<int>(std::min<int64_t>(tiles, kHashMaxTiles));
  };
  // All warps of a block use its rotations. Choose rounds and warps of a block so that the most warps are resident on a
  // multiprocessor; of equals, more rounds, then fewer warps.
  int most = -1, blocks = 0;
  for (int64_t rounds = p.R; rounds >= 1; rounds /= 2) {
    for (const int warps : {4, kHashMaxWarps}) {
      const int rows = warps * kWarp, row_bytes = rows * hash_row_bytes(bytes, plan.k_steps);
      const int room = device.shared_bytes_per_block - kReservedShared - row_bytes;
      const int resident = std::clamp(room / column_tile / 2 * 2, 2, tiles_of(rounds));
      const int shared = row_bytes + resident * column_tile;
      const int fit = std::min(device.shared_bytes_per_multiprocessor / (shared + kReservedShared), kHashWarps / warps);
      const int resident_warps = resident == tiles_of(rounds) ? fit * warps : 0;
      if (resident_warps <= most) continue;
      most = resident_warps, blocks = std::max(fit, 1);
      plan.rounds = static_cast<int>(rounds), plan.resident_tiles = resident;
      plan.launch.threads = rows, plan.launch.shared_bytes = shared;
    }
  }
  // A block loads its rotations once and takes its share of the tokens in one wave of blocks.
  const int64_t heads = p.B * p.H * ceil_div(p.R, plan.rounds), tiles = ceil_div(p.L, plan.launch.threads);
  const int64_t share = ceil_div(tiles * heads, int64_t{device.multiprocessors} * blocks);
  plan.tokens_per_block = static_cast<int>(std::min(share, tiles) * plan.launch.threads);
  plan.blocks_per_head = static_cast<int>(ceil_div(p.L, plan.tokens_per_block));
  plan.launch.grid[0] = static_cast<uint32_t>(heads * plan.blocks_per_head);
  return plan;
}

// ---- bucket order

constexpr int kOrderWholeTile = 1 << 16;  // keys of a block that sorts a whole segment; their ranks have 16 bits
constexpr int kOrderPartTile = 1 << 14;   // keys of one of several blocks
constexpr int kOrderWholeBase = (1 << 11) + 1, kOrderPartBase = (1 << 9) + 1;  // more buckets are sorted digit by digit
constexpr int kOrderMaxThreads = 1024, kOrderKeysOfWarp = 256, kOrderFewSorters = 4;

struct OrderPlan {
  Launch launch;            // of the kernels that count and rank
  int passes = 1;           // digits, the least significant first
  int base = 0;             // of a digit
  int tile = 0, tiles = 1;  // keys of a block, blocks of a segment
  int sorters = 0;          // warps with counters of their own
  int64_t segments = 0;

  int64_t counts() const { return tiles > 1 ? segments * tiles * base : 0; }  // int32 of scratch memory
};

inline int order_pairs(int base) { return (base + 1) / 2; }  // counters are read two at a time

inline OrderPlan plan_order(const OrderParams& p, const Device& device) {
  OrderPlan plan;
  plan.segments = p.rows * p.rounds * p.n_sequences;
  const int64_t n_buckets = std::min<int64_t>(p.n_buckets, INT32_MAX);
  // Chooses the fewest digits whose base is at most `most`, and then the least power of two as the base.
  const auto choose_base = [&](int64_t most) {
    plan.passes = 0;
    const auto reach = [&](int64_t base) {
      int64_t numbers = 1;
      for (int i = 0; i < plan.passes; ++i) numbers *= base;
      return numbers;
    };
    do ++plan.passes;
    while (reach(most) < n_buckets);
    plan.base = static_cast<int>(n_buckets);
    if (plan.passes > 1)
      for (plan.base = 2; reach(plan.base) < n_buckets;) plan.base *= 2;
  };
  const int64_t room = device.shared_bytes_per_block - kReservedShared;
  const auto counter_bytes = [&] { return int64_t{4} * order_pairs(plan.base); };  // of a warp
  choose_base(kOrderWholeBase);
  const int64_t whole = ceil_div(p.longest, kWarp) * kWarp;
  plan.tile = static_cast<int>(std::min<int64_t>(whole, kOrderWholeTile));
  int64_t beside = 2 * plan.tile;  // bytes of the sorted keys
  if (whole > kOrderWholeTile || beside + kOrderFewSorters * counter_bytes() > room) {
    choose_base(kOrderPartBase);
    plan.tile = kOrderPartTile;
    beside = 4 * plan.tile + 4 * plan.base;  // and of their digits, and of a slot for each digit
  }
  plan.tiles = static_cast<int>(ceil_div(p.longest, plan.tile));
  const int64_t wanted = std::min<int64_t>(ceil_div(plan.tile, kOrderKeysOfWarp), kOrderMaxThreads / kWarp);
  plan.sorters = static_cast<int>(std::min((room - beside) / counter_bytes(), wanted));
  const int64_t scanners = std::min<int64_t>(ceil_div(order_pairs(plan.base), kWarp) * kWarp, kOrderMaxThreads);
  plan.launch.threads = static_cast<uint32_t>(std::max<int64_t>(plan.sorters * kWarp, scanners));
  plan.launch.shared_bytes = static_cast<int>(plan.sorters * counter_bytes() + beside);
  plan.launch.grid[0] = static_cast<uint32_t>(plan.segments * plan.tiles);
  return plan;
}

// ---- chunk attention

constexpr int kAttentionRows = 64;  // rows of a tile of queries or keys
constexpr int kAttentionThreads = 128, kAttentionStages = 3, kAttentionMaxDim = kMaxHeadDim, kAttentionMaxWalk = 8;
constexpr int kAttentionMaxChunks = 1023;  // chunks of a query's windows in all rounds; SelfOnlyState counts so far

constexpr int kKeyFactsBytes = 12 * kAttentionRows, kQueryFactsBytes = 48 * kAttentionRows;  // of a tile
constexpr int kResidualBytes = 16;                                                           // of a query
// Elements. With 8 more than a tile, 8 rows that are read together have few bank conflicts.
constexpr int kScoreModRow = kAttentionRows + 8;

constexpr int attention_row_bytes(int element_bytes, int k_steps) { return element_bytes * 16 * k_steps; }

// The tiles of queries of a round of a sequence. A tile has whole chunks, or a part of one.
struct AttentionTiles {
  int span, of_span;  // the tiling starts anew after so many slots; tiles of them
  int length, of_round;

  // chunk_length: of chunks, or of other runs of slots that tiles must not straddle.
  RK_HOST_DEVICE AttentionTiles(int chunk_length, int sequence_length) : length(sequence_length) {
    span = chunk_length >= kAttentionRows ? chunk_length : kAttentionRows / chunk_length * chunk_length;
    of_span = (span + kAttentionRows - 1) / kAttentionRows;
    of_round = (length + span - 1) / span * of_span;
  }
  RK_HOST_DEVICE int start(int tile) const { return tile / of_span * span + tile % of_span * kAttentionRows; }
  RK_HOST_DEVICE int count(int tile) const {  // 0 or less: it has none
    const int of_span_left = span - tile % of_span * kAttentionRows, left = length - start(tile);
    const int most = of_span_left < kAttentionRows ? of_span_left : kAttentionRows;
    return left < most ? left : most;
  }
};

constexpr int kAttentionFloatSteps = 4;  // the fewest that float kernels are compiled for

enum class AttentionPart { kForward, kGradQuery, kGradKeys };

struct AttentionPlan {
  Launch launch;                // the same for each round
  int k_steps = 0;              // template argument: head sizes are padded to 16 * k_steps
  int tile_chunk = 0;           // see AttentionTiles
  int stages = 0;               // of visited tiles in shared memory
  bool diagonal_first = false;  // the owned tile is among the tiles visited for it, and is visited first
  int tiles_per_block = 0, blocks_per_sequence = 0;
  int rounds = 0;  // launches
};

// Entries of a list in whole tiles, and entries of all lists of a head.
inline int64_t list_stride(const AttentionParams& p) {
  return ceil_div(p.list_length, kAttentionRows) * kAttentionRows;
}
inline int64_t list_entries(const AttentionParams& p) { return p.R * ceil_div(p.L, p.chunk_length) * list_stride(p); }

// longest: no sequence has more tokens.
inline AttentionPlan plan_attention(const AttentionParams& p, AttentionPart part, int64_t longest,
                                    const Device& device) {
  AttentionPlan plan;
  const bool forward = part == AttentionPart::kForward, keys = part == AttentionPart::kGradKeys;
  const int bytes = bytes_of(p.element), least = bytes == 4 ? kAttentionFloatSteps : 2;
  const int64_t width = std::max(p.D, p.E);
  plan.k_steps = head_steps(width, least);
  const int tile = kAttentionRows * attention_row_bytes(bytes, plan.k_steps);
  const int owned_facts = keys ? kKeyFactsBytes : kQueryFactsBytes, facts = keys ? kQueryFactsBytes : kKeyFactsBytes;
  const int score_mods = p.has_score_mod() ? 4 * kAttentionRows * kScoreModRow : 0;
  const auto shared_bytes = [&](int stages) {
    return (forward ? 1 : 2) * tile + owned_facts + stages * (2 * tile + facts) + score_mods;
  };
  // As many stages as let two blocks share a multiprocessor, or else as many as fit at all.
  const auto fits = [&](int stages, int blocks) {
    return shared_bytes(stages) <= device.shared_bytes_per_block - kReservedShared &&
           blocks * (shared_bytes(stages) + kReservedShared) <= device.shared_bytes_per_multiprocessor;
  };
  plan.stages = kAttentionStages;
  while (plan.stages > 2 && !fits(plan.stages, 2)) --plan.stages;
  while (plan.stages > 1 && !fits(plan.stages, 1)) --plan.stages;
  plan.launch.shared_bytes = shared_bytes(plan.stages);
  plan.launch.threads = kAttentionThreads;
  const bool of_lists = p.lists() && keys;  // one launch for the entries of all rounds
  plan.rounds = static_cast<int>(is_single_window(longest, p.chunk_length, p.ring()) || of_lists ? 1 : p.R);
  plan.tile_chunk = p.has(kBucketAligned) || of_lists ? kAttentionRows : static_cast<int>(p.chunk_length);
  const AttentionTiles tiles(plan.tile_chunk, static_cast<int>(of_lists ? list_entries(p) : longest));
  // All rounds must begin with a tile, and all tiles of a window must stay in their stages.
  const int64_t window = (p.chunks_before + 1 + p.chunks_after) * p.chunk_length;
  plan.diagonal_first = p.ring() && p.shared_qk() && !p.cu_seqlens && tiles.span % kAttentionRows == 0 &&
                        p.L % kAttentionRows == 0 &&
                        window + std::max<int64_t>(tiles.span - p.chunk_length, 0) <= plan.stages * kAttentionRows;
  // A block owns several tiles as long as every multiprocessor still gets several blocks.
  const int64_t sequences = p.B * (keys && !of_lists ? p.key_heads : p.H) * p.n_sequences;
  const int64_t wanted = int64_t{device.multiprocessors} * 16, most = std::min(kAttentionMaxWalk, tiles.of_round);
  plan.tiles_per_block = static_cast<int>(std::clamp<int64_t>(tiles.of_round * sequences / wanted, 1, most));
  plan.blocks_per_sequence = static_cast<int>(ceil_div(tiles.of_round, plan.tiles_per_block));
  plan.launch.grid[0] = static_cast<uint32_t>(sequences * plan.blocks_per_sequence);
  return plan;
}

// Offsets in the scratch memory of a pass, in bytes. The memory is aligned to 16 bytes.
struct AttentionScratch {
  int64_t windows = 0, residuals = 0, slot_of_position = 0, bytes = 0;
  bool has_windows = false;
};

inline AttentionScratch plan_attention_scratch(const AttentionParams& p, bool backward) {
  AttentionScratch scratch;
  scratch.has_windows = p.has(kBucketAligned) || p.has_score_mod();
  const int64_t tokens = scratch.has_windows ? p.B * p.H * p.R * p.L : 0;
  scratch.residuals = scratch.windows + 16 * tokens;
  scratch.slot_of_position = scratch.residuals + (backward ? kResidualBytes * p.B * p.H * p.n_queries : 0);
  scratch.bytes = scratch.slot_of_position + 4 * tokens;
  return scratch;
}

// The sort of list entries by key. Entries without a key are sorted behind, as key S.
inline OrderParams list_order(const AttentionParams& p) {
  OrderParams order{};
  order.rows = p.B * p.H, order.heads = p.H, order.rounds = 1, order.L = order.longest = list_entries(p);
  order.n_buckets = p.S + 1, order.n_sequences = 1;
  return order;
}

// Offsets in the scratch memory of the backward of lists. It begins with that of chunk attention.
struct ListScratch {
  int64_t entry_grad_keys = 0, entry_grad_values = 0, keys = 0, order = 0, other_order = 0, counts = 0, starts = 0,
          bytes = 0;
  int64_t row = 0;  // elements of a row of an entry's gradient
};

inline ListScratch plan_list_scratch(const AttentionParams& p, const Device& device) {
  ListScratch scratch;
  const int64_t entries = p.B * p.H * list_entries(p), bytes = bytes_of(p.element);
  const OrderPlan order = plan_order(list_order(p), device);
  const auto take = [&](int64_t size) {
    const int64_t begins = scratch.bytes;
    scratch.bytes += ceil_div(size, 16) * 16;
    return begins;
  };
  take(plan_attention_scratch(p, true).bytes);
  scratch.row = ceil_div(std::max(p.D, p.E), 8) * 8;  // so that rows are aligned to 16 bytes
  scratch.entry_grad_keys = take(entries * scratch.row * bytes),
  scratch.entry_grad_values = take(entries * scratch.row * bytes);
  scratch.keys = take(4 * entries), scratch.order = take(4 * entries);
  scratch.other_order = take(order.passes > 1 ? 4 * entries : 0), scratch.counts = take(4 * order.counts());
  scratch.starts = take(4 * p.B * p.H * (p.S + 2));
  return scratch;
}

// ---- the choice of keys

constexpr int kSelectSubgroups = 4;                // of a chunk; a mean query stands for each
constexpr int64_t kSelectExactKeys = 16384;        // with more keys, blocks of keys are chosen first
constexpr int kSelectBlock = kAttentionRows;       // keys of a block
constexpr int kSelectLeastSteps = 4;               // the fewest that kernels are compiled for
constexpr int64_t kSelectBlocks = 64;              // blocks to choose, or twice what the budget fills if that is more
constexpr int kSelectChunks = 16;                  // chunks of a CTA (thread block) whose candidates are the same
constexpr int64_t kSelectTotalsBytes = 256 << 20;  // most scratch memory for totals, but at least that of one CTA

// One weighing and choosing: of keys, or of blocks of keys.
struct SelectPass {
  int64_t candidates = 0;  // of a chunk, in whole tiles
  int chunks = 0;          // of a CTA
  int64_t ctas = 0;        // of all slices
  int64_t slice = 0;       // CTAs of a launch
  int shared_bytes = 0;
};

struct SelectPlan {
  int k_steps = 0;                  // template argument: the head size is padded to 16 * k_steps
  int64_t keys = 0, chunks = 0;     // keys that are no context; chunks of a head
  int64_t subgroup = 0, width = 0;  // queries of a sub-group; elements of a mean
  int64_t blocks = 0, chosen = 0;   // blocks of keys and how many of them a chunk chooses; 0: keys are chosen directly
  SelectPass of_blocks, of_keys;
  // Offsets in scratch memory, and its size, in bytes.
  int64_t members = 0, facts = 0, means = 0, block_means = 0, block_sizes = 0, chosen_blocks = 0, totals = 0, bytes = 0;
};

inline SelectPlan plan_select(const SelectParams& select) {
  const AttentionParams& p = select.attention;
  SelectPlan plan;
  const int64_t heads = p.B * p.H;
  plan.k_steps = head_steps(p.D, kSelectLeastSteps);
  plan.keys = p.S - p.context_keys, plan.chunks = ceil_div(p.L, p.chunk_length);
  plan.subgroup = std::min(ceil_div(p.chunk_length, kSelectSubgroups), std::max<int64_t>(p.L, 1));
  plan.width = ceil_div(p.D, 4) * 4;
  if (plan.keys > kSelectExactKeys) {
    plan.blocks = ceil_div(plan.keys, kSelectBlock);
    plan.chosen = std::min(plan.blocks, std::max(kSelectBlocks, 2 * ceil_div(select.budget, kSelectBlock)));
  }
  const auto pass = [&](int64_t candidates, int chunks, bool of_floats) {
    SelectPass pass;
    pass.candidates = ceil_div(candidates, kAttentionRows) * kAttentionRows, pass.chunks = chunks;
    pass.ctas = heads * ceil_div(plan.chunks, chunks);
    const int64_t bytes = 4 * pass.candidates * chunks;  // of totals
    pass.slice = std::max<int64_t>(bytes ? std::min(kSelectTotalsBytes / bytes, pass.ctas) : pass.ctas, 1);
    const int row = attention_row_bytes(of_floats ? 4 : 2, plan.k_steps);
    const int owned_rows = (chunks == 1 ? 16 : kAttentionRows) * (of_floats ? 1 : 2);
    pass.shared_bytes = (owned_rows + 2 * kAttentionRows) * row + 2 * 4 * kAttentionRows;
    return pass;
  };
  const bool of_floats = p.element == Element::kSame;
  if (plan.blocks) plan.of_blocks = pass(plan.blocks, kSelectChunks, true);
  plan.of_keys =
      plan.blocks ? pass(plan.chosen * kSelectBlock, 1, of_floats) : pass(plan.keys, kSelectChunks, of_floats);
  const auto take = [&](int64_t size) {
    const int64_t begins = plan.bytes;
    plan.bytes += ceil_div(size, 16) * 16;
    return begins;
  };
  const int64_t rows = heads * plan.chunks * kSelectSubgroups, block_rows = p.B * p.key_heads * plan.blocks;
  plan.members = take(4 * heads * p.L), plan.facts = take(8 * rows), plan.means = take(4 * rows * plan.width);
  plan.block_means = take(4 * block_rows * plan.width), plan.block_sizes = take(4 * block_rows);
  plan.chosen_blocks = take(4 * heads * plan.chunks * plan.chosen);
  const auto totals = [](const SelectPass& pass) { return 4 * pass.slice * pass.chunks * pass.candidates; };
  plan.totals = take(std::max(totals(plan.of_blocks), totals(plan.of_keys)));
  return plan;
}

}  // namespace rk::cuda
