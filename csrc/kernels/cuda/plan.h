// How each kernel is launched: pure functions of the problem and the device, the only place where that is decided.
#pragma once
#include <algorithm>
#include <cstdint>

#include "kernels/cuda/launch.h"
#include "kernels/params.h"

namespace rk::cuda {

constexpr int kWarp = 32;
constexpr int kReservedShared = 4096;  // at least what a block holds beside its dynamic shared memory

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether rows can be moved 16 bytes at a time.
inline bool is_aligned(const Rows& rows, int64_t width, int64_t bytes) {
  const auto fits = [&](int64_t elements) { return elements * bytes % 16 == 0; };
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && fits(rows.stride_b) && fits(rows.stride_h) &&
         fits(rows.stride_l) && fits(width);
}

// ---- hash

constexpr int kHashMaxWarps = 8;  // of a block; each has 32 rows
constexpr int kHashWarps = 16;    // of a multiprocessor, for their registers
constexpr int kHashColumns = 8;   // of rotations in a column tile, of one factor each
constexpr int kHashMaxDim = 128, kHashMaxFactors = 8, kHashMaxTiles = 128;  // column tiles in shared memory at a time

struct HashPlan {
  Launch launch;
  int steps = 0;            // template argument: the head size is padded to 16 * steps
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
constexpr int hash_row_bytes(int element_bytes, int steps) { return element_bytes * 16 * steps + 16; }

// Bytes of a column tile: each term is [16 * steps][8 columns]; and 16 more, for the same reason.
constexpr int hash_column_tile_bytes(int element_bytes, int steps) {
  return element_bytes * hash_terms(element_bytes) * 16 * steps * kHashColumns + 16;
}

inline HashPlan plan_hash(const HashParams& p, const Device& device) {
  HashPlan plan;
  const int bytes = p.element == Element::kSame ? 4 : 2;
  plan.steps = p.D <= 32 ? 2 : p.D <= 64 ? 4 : 8;
  for (int64_t f = 0; f < p.n_factors; ++f)
    plan.round_tiles += static_cast<int>(ceil_div(p.factors[f] / 2, kHashColumns));
  const int column_tile = hash_column_tile_bytes(bytes, plan.steps);
  const auto tiles_of = [&](int64_t rounds) {  // that are to be in shared memory
    const int64_t tiles = ceil_div(rounds * plan.round_tiles, 2) * 2;
    return static_cast<int>(std::min<int64_t>(tiles, kHashMaxTiles));
  };
  // All warps of a block use its rotations. A block computes as many rounds, and then has as few warps, as let the most
  // warps be in a multiprocessor, of those for which there are registers.
  int most = -1, blocks = 0;
  for (int64_t rounds = p.R; rounds >= 1; rounds /= 2) {
    for (const int warps : {4, kHashMaxWarps}) {
      const int rows = warps * kWarp, row_bytes = rows * hash_row_bytes(bytes, plan.steps);
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

constexpr int kOrderWholeTile = 1 << 16;  // keys of a block that sorts a whole segment: places in it have 16 bits
constexpr int kOrderPartTile = 1 << 14;   // of one of several blocks
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
  // The fewest digits of at most `most`, and for these the least power of two as a base.
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
  int64_t beside = 2 * plan.tile;  // the places of the sorted keys in the tile
  if (whole > kOrderWholeTile || beside + kOrderFewSorters * counter_bytes() > room) {
    choose_base(kOrderPartBase);
    plan.tile = kOrderPartTile;
    beside = 4 * plan.tile + 4 * plan.base;  // and their digits, and a slot for each digit
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

constexpr int kAttentionRows = 64;  // of a tile of queries or keys
constexpr int kAttentionThreads = 128, kAttentionPlaces = 3, kAttentionMaxDim = 128, kAttentionMaxWalk = 8;
constexpr int kAttentionMaxChunks = 1023;  // of a query's windows in all rounds: so often it may meet its own key

constexpr int kKeyFactsBytes = 12 * kAttentionRows, kQueryFactsBytes = 48 * kAttentionRows;  // of a tile
constexpr int kResidualBytes = 16;                                                           // of a query
constexpr int kBiasRow = kAttentionRows + 8;  // so that 8 rows, read 8 bytes at a time, meet few banks twice

constexpr int attention_row_bytes(int element_bytes, int steps) { return element_bytes * 16 * steps; }

// The tiles of queries of a round of a sequence: of whole chunks, or of a part of one.
struct AttentionTiles {
  int span, of_span;  // slots after which it starts anew, and the tiles of them
  int length, of_round;

  // chunk_length: or what else tiles are not to end in.
  RK_HOST_DEVICE AttentionTiles(int chunk_length, int sequence_length) : length(sequence_length) {
    span = chunk_length >= kAttentionRows ? chunk_length : kAttentionRows / chunk_length * chunk_length;
    of_span = (span + kAttentionRows - 1) / kAttentionRows;
    of_round = (length + span - 1) / span * of_span;
  }
  RK_HOST_DEVICE int start(int tile) const { return tile / of_span * span + tile % of_span * kAttentionRows; }
  RK_HOST_DEVICE int count(int tile) const {  // may be none
    const int of_span_left = span - tile % of_span * kAttentionRows, left = length - start(tile);
    const int most = of_span_left < kAttentionRows ? of_span_left : kAttentionRows;
    return left < most ? left : most;
  }
};

enum class AttentionPart { kForward, kGradQuery, kGradKeys };

struct AttentionPlan {
  Launch launch;       // of each round
  int steps = 0;       // template argument: head sizes are padded to 16 * steps
  int tile_chunk = 0;  // see AttentionTiles
  int places = 0;      // for tiles of rows that are visited, in shared memory
  bool lead = false;   // rows that a block owns are those of a tile that it visits
  int tiles_per_block = 0, blocks_per_sequence = 0;
  int rounds = 0;  // launches
};

// Slots of a list of keys, and of all lists of a head.
inline int64_t list_slots(const AttentionParams& p) { return ceil_div(p.list_length, kAttentionRows) * kAttentionRows; }
inline int64_t list_places(const AttentionParams& p) { return p.R * ceil_div(p.L, p.chunk_length) * list_slots(p); }

// longest: tokens of the longest sequence, at most.
inline AttentionPlan plan_attention(const AttentionParams& p, AttentionPart part, int64_t longest,
                                    const Device& device) {
  AttentionPlan plan;
  const bool forward = part == AttentionPart::kForward, keys = part == AttentionPart::kGradKeys;
  const int bytes = p.element == Element::kSame ? 4 : 2, least = bytes == 4 ? 4 : 2;
  const int64_t width = std::max(p.D, p.E);
  plan.steps = std::max(width <= 32 ? 2 : width <= 64 ? 4 : 8, least);
  const int tile = kAttentionRows * attention_row_bytes(bytes, plan.steps);
  const int own_facts = keys ? kKeyFactsBytes : kQueryFactsBytes, facts = keys ? kQueryFactsBytes : kKeyFactsBytes;
  const int bias = p.has(kWithinBucket) || p.has(kDedup) ? 4 * kAttentionRows * kBiasRow : 0;
  const auto shared_bytes = [&](int places) {
    return (forward ? 1 : 2) * tile + own_facts + places * (2 * tile + facts) + bias;
  };
  // As many places as fit, or as many as let two blocks be in a multiprocessor.
  const auto fits = [&](int places, int blocks) {
    return shared_bytes(places) <= device.shared_bytes_per_block - kReservedShared &&
           blocks * (shared_bytes(places) + kReservedShared) <= device.shared_bytes_per_multiprocessor;
  };
  plan.places = kAttentionPlaces;
  while (plan.places > 2 && !fits(plan.places, 2)) --plan.places;
  while (plan.places > 1 && !fits(plan.places, 1)) --plan.places;
  plan.launch.shared_bytes = shared_bytes(plan.places);
  plan.launch.threads = kAttentionThreads;
  const bool ring = !p.has(kBucketAligned) && !p.lists(), of_lists = p.lists() && keys;  // all rounds at once
  plan.rounds = static_cast<int>((ring && longest <= p.chunk_length) || of_lists ? 1 : p.R);
  plan.tile_chunk = p.has(kBucketAligned) || of_lists ? kAttentionRows : static_cast<int>(p.chunk_length);
  const AttentionTiles tiles(plan.tile_chunk, static_cast<int>(of_lists ? list_places(p) : longest));
  // Where all rounds begin with a tile, and the tiles of a window stay.
  const int64_t window = (p.chunks_before + 1 + p.chunks_after) * p.chunk_length;
  plan.lead = ring && p.shared() && !p.cu_seqlens && tiles.span % kAttentionRows == 0 && p.L % kAttentionRows == 0 &&
              window + std::max<int64_t>(tiles.span - p.chunk_length, 0) <= plan.places * kAttentionRows;
  // Blocks walk as far as leaves several of them to every multiprocessor.
  const int64_t sequences = p.B * (keys && !of_lists ? p.key_heads : p.H) * p.n_sequences;
  const int64_t wanted = int64_t{device.multiprocessors} * 16, most = std::min(kAttentionMaxWalk, tiles.of_round);
  plan.tiles_per_block = static_cast<int>(std::clamp<int64_t>(tiles.of_round * sequences / wanted, 1, most));
  plan.blocks_per_sequence = static_cast<int>(ceil_div(tiles.of_round, plan.tiles_per_block));
  plan.launch.grid[0] = static_cast<uint32_t>(sequences * plan.blocks_per_sequence);
  return plan;
}

// Of a pass, in bytes: where its parts begin in scratch memory that is aligned to 16 bytes.
struct AttentionScratch {
  int64_t windows = 0, residuals = 0, places = 0, bytes = 0;
  bool has_windows = false;
};

inline AttentionScratch plan_attention_scratch(const AttentionParams& p, bool backward) {
  AttentionScratch scratch;
  scratch.has_windows = p.has(kBucketAligned) || p.has(kWithinBucket) || p.has(kDedup);
  const int64_t tokens = scratch.has_windows ? p.B * p.H * p.R * p.L : 0;
  scratch.residuals = scratch.windows + 16 * tokens;
  scratch.places = scratch.residuals + (backward ? kResidualBytes * p.B * p.H * p.n_queries : 0);
  scratch.bytes = scratch.places + 4 * tokens;
  return scratch;
}

// The sort of the places of lists by key; S: no key.
inline OrderParams list_order(const AttentionParams& p) {
  OrderParams order{};
  order.rows = p.B * p.H, order.heads = p.H, order.rounds = 1, order.L = order.longest = list_places(p);
  order.n_buckets = p.S + 1, order.n_sequences = 1;
  return order;
}

// The same for the backward of lists, which begins with the memory of the other.
struct ListScratch {
  int64_t place_keys = 0, place_values = 0, keys = 0, order = 0, other_order = 0, counts = 0, starts = 0, bytes = 0;
  int64_t row = 0;  // elements of a row of a place
};

inline ListScratch plan_list_scratch(const AttentionParams& p, const Device& device) {
  ListScratch scratch;
  const int64_t places = p.B * p.H * list_places(p), bytes = p.element == Element::kSame ? 4 : 2;
  const OrderPlan order = plan_order(list_order(p), device);
  const auto take = [&](int64_t size) {
    const int64_t begins = scratch.bytes;
    scratch.bytes += ceil_div(size, 16) * 16;
    return begins;
  };
  take(plan_attention_scratch(p, true).bytes);
  scratch.row = ceil_div(std::max(p.D, p.E), 8) * 8;  // so that rows are aligned to 16 bytes
  scratch.place_keys = take(places * scratch.row * bytes), scratch.place_values = take(places * scratch.row * bytes);
  scratch.keys = take(4 * places), scratch.order = take(4 * places);
  scratch.other_order = take(order.passes > 1 ? 4 * places : 0), scratch.counts = take(4 * order.counts());
  scratch.starts = take(4 * p.B * p.H * (p.S + 2));
  return scratch;
}

// ---- the choice of keys

constexpr int kSelectSubgroups = 4;                // of a chunk; one mean query stands for each
constexpr int64_t kSelectExactKeys = 16384;        // up to so many keys each is looked at; else blocks of them first,
constexpr int kSelectBlock = kAttentionRows;       // of so many keys,
constexpr int64_t kSelectBlocks = 64;              // of which so many are chosen, or twice what the budget fills
constexpr int kSelectChunks = 16;                  // of a block of threads, whose keys are the same
constexpr int64_t kSelectTotalsBytes = 256 << 20;  // of scratch memory, at most, if it is enough for a block

// What is weighed and chosen from: keys, or blocks of them.
struct SelectPass {
  int64_t candidates = 0;  // of a chunk, whole tiles
  int chunks = 0;          // of a block of threads
  int64_t units = 0;       // blocks of threads
  int64_t slice = 0;       // units at a time
  int shared_bytes = 0;
};

struct SelectPlan {
  int steps = 0;                    // template argument: the head size is padded to 16 * steps
  int64_t keys = 0, chunks = 0;     // without the context; of a head
  int64_t subgroup = 0, width = 0;  // queries of a sub-group; of a row of means
  int64_t blocks = 0, chosen = 0;   // blocks of keys and how many a chunk chooses, where it is done in two steps
  SelectPass of_blocks, of_keys;
  // Where the parts of scratch memory begin, in bytes, and what there is of it in all.
  int64_t members = 0, facts = 0, means = 0, block_means = 0, block_sizes = 0, chosen_blocks = 0, totals = 0, bytes = 0;
};

inline SelectPlan plan_select(const SelectParams& select) {
  const AttentionParams& p = select.attention;
  SelectPlan plan;
  const int64_t heads = p.B * p.H;
  plan.steps = p.D <= 64 ? 4 : 8;
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
    pass.units = heads * ceil_div(plan.chunks, chunks);
    const int64_t bytes = 4 * pass.candidates * chunks;  // of totals
    pass.slice = std::max<int64_t>(bytes ? std::min(kSelectTotalsBytes / bytes, pass.units) : pass.units, 1);
    const int row = attention_row_bytes(of_floats ? 4 : 2, plan.steps);
    const int own_rows = (chunks == 1 ? 16 : kAttentionRows) * (of_floats ? 1 : 2);
    pass.shared_bytes = (own_rows + 2 * kAttentionRows) * row + 2 * 4 * kAttentionRows;
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
