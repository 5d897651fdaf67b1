// What the kernels of chunk attention share: how a thread block walks over windows.
//
// A block owns tiles of 64 queries of one round (in the pass for gradients of keys, 64 keys). A tile has whole chunks
// or a part of one. For each owned tile the block visits the tiles of 64 slots, [64 i, 64 i + 64) unrolled, which have
// the keys that those queries see (or the queries that see those keys). Rows are gathered into shared memory. There a
// visited tile stays in its stage until the stage is needed, and the next tile is loaded while one is computed with.
#pragma once
#include <type_traits>

#include "kernels/cuda/random.cuh"
#include "kernels/cuda/score_mod.cuh"
#include "kernels/cuda/tiles.cuh"

namespace rk::cuda {

// What a shared row is divided by to become a key. square: its squared length.
__device__ __forceinline__ float key_length(const AttentionArguments& p, float square) {
  return !p.shared_qk ? 1.f : p.has(kL2Norm) ? fmaxf(sqrtf(square), 1e-12f) : sqrtf(square + 1e-6f * p.D);
}

// Facts about the rows of a tile, in shared memory.
struct KeyFacts {
  int row[kAttentionRows];           // in the sequence
  int key_position[kAttentionRows];  // position, kMaskedKey or kContextKey
  float factor[kAttentionRows];      // of scores in base 2
};
struct __align__(16) Query {
  int limit;                 // keys at this position and later are masked
  int excluded, n_excluded;  // the first excluded key position, and how many follow it
  int self_only;
  float lse, delta;         // see QueryResidual
  int first_slot, n_slots;  // unrolled slots of its window
  int row, slot;            // row in the sequence or kNone; wrapped slot
  int unused[2];

  __device__ bool allows(int key) const {
    const uint32_t at = static_cast<uint32_t>(key) - static_cast<uint32_t>(excluded);
    return (key < limit) & (at >= static_cast<uint32_t>(n_excluded));
  }
  __device__ Range slots() const { return {first_slot, first_slot + n_slots}; }
  // The exponent of the weight, base 2. A self_only query weighs each of its own keys with exactly 1 / times.
  __device__ float exponent(float score, float factor, bool sees) const {
    const float x = self_only ? -lse : fmaf(score, factor, -lse);
    return sees ? x : -INFINITY;
  }
};
struct QueryFacts {
  Query query[kAttentionRows];
};
static_assert(sizeof(KeyFacts) == kKeyFactsBytes && sizeof(QueryFacts) == kQueryFactsBytes);

// A tile that a block owns, and the range of tiles that it visits for it. In shared memory, written by one thread.
struct TileRange {
  int owned;                   // number of the owned tile
  bool valid;                  // false beyond the block's last tile
  int slot, count;             // slots of the owned tile
  int first, tiles;            // visited tiles
  int diagonal;                // number of the owned tile if it is among the visited ones, else kNone
  int inner_begin, inner_end;  // slots that every slot of the owned tile sees

  // The block's first tile from `from` on that has slots.
  template <bool OWNS_KEYS>
  __device__ void take(const AttentionArguments& p, const HeadSequence& sequence, int from) {
    const bool of_lists = OWNS_KEYS && p.lists;
    const AttentionTiles all(p.tile_chunk, of_lists ? sequence.list_rows() * p.list_stride : sequence.length);
    const int begins = static_cast<int>(blockIdx.x % p.blocks_per_sequence) * p.tiles_per_block;
    const int end = min(begins + p.tiles_per_block, all.of_round);
    for (owned = max(from, begins); owned < end && all.count(owned) <= 0;) ++owned;
    valid = owned < end;
    if (!valid) return;
    slot = p.round * sequence.length + all.start(owned), count = all.count(owned);
    const auto visited = [&](int at) { return OWNS_KEYS ? sequence.queries_of(p, at) : sequence.keys_of(p, at); };
    const Range of_first = visited(slot), of_last = visited(slot + count - 1);
    first = floor_div(of_first.begin, kAttentionRows);
    tiles = floor_div(of_last.end - 1, kAttentionRows) + 1 - first;
    inner_begin = of_last.begin, inner_end = of_first.end;
    diagonal = p.diagonal_first ? slot / kAttentionRows : kNone;
  }
  __device__ int tile(int i) const {
    if (diagonal == kNone) return first + i;
    const int tile = first + i - 1;
    return i == 0 ? diagonal : tile + (tile >= diagonal);
  }
  // Whether every slot of the owned tile sees all of the visited tile that begins at `slot`.
  __device__ bool all_see(int slot) const { return slot >= inner_begin && slot + kAttentionRows <= inner_end; }
};

// What a block knows besides its rows, in shared memory.
struct AttentionState {
  HeadSequence sequence;
  TileRange ranges[2];  // of the current owned tile and of the next
  uint64_t seed;        // of dropout

  __device__ void take(const AttentionArguments& p, int heads) {
    if (threadIdx.x == 0) {
      sequence.take(p, blockIdx.x / p.blocks_per_sequence, heads);
      seed = p.dropout ? static_cast<uint64_t>(*p.dropout_seed) : 0;
    }
    __syncthreads();
  }
};

// Shared memory holds the owned tiles, two visited tiles for each stage, and the facts of all of them. OwnedFacts and
// Facts are those of owned and of visited rows.
template <class T, int K_STEPS, int OWNED_TILES, class OwnedFacts, class Facts>
struct AttentionBlock {
  using Layout = TileLayout<T, K_STEPS>;
  static constexpr int kPerVector = 16 / sizeof(T);
  static constexpr bool kOwnsKeys = std::is_same_v<OwnedFacts, KeyFacts>;

  const AttentionArguments& p;
  AttentionState& state;
  HeadSequence& sequence;
  unsigned char* memory;
  int warp, lane;

  __device__ unsigned char* owned_tile(int i) const { return memory + i * Layout::kBytes; }
  __device__ unsigned char* tile(int stage, int i) const {
    return memory + (OWNED_TILES + 2 * stage + i) * Layout::kBytes;
  }
  __device__ unsigned char* facts_memory() const { return memory + (OWNED_TILES + 2 * p.stages) * Layout::kBytes; }
  __device__ OwnedFacts& owned_facts() const { return *reinterpret_cast<OwnedFacts*>(facts_memory()); }
  __device__ Facts& facts(int stage) const {
    return reinterpret_cast<Facts*>(facts_memory() + sizeof(OwnedFacts))[stage];
  }
  // [64 owned rows][64 visited rows], in rows of kScoreModRow: what score_mod adds to the score of the pair, base 2.
  __device__ float* score_mods(int owned_row) const {
    return reinterpret_cast<float*>(facts_memory() + sizeof(OwnedFacts) + p.stages * sizeof(Facts)) +
           owned_row * kScoreModRow;
  }
  __device__ int stage_of(int tile) const { return tile - floor_div(tile, p.stages) * p.stages; }

  __device__ bool is_padded(int row) const {
    return p.padding && p.padding[int64_t{sequence.b} * p.S + sequence.offset + row];
  }

  // Starts to load the keys and values of `count` slots from `slot` on. The other rows of the tile are masked.
  __device__ void load_keys(unsigned char* keys, unsigned char* values, KeyFacts& facts, int slot, int count) const {
    const int list_row = p.lists ? slot / p.list_stride : 0, entry = slot - list_row * p.list_stride;
    const int32_t* list = sequence.lists + int64_t{list_row} * p.list_length;
    const int begin = sequence.wrapped(slot);
    const auto row_at = [&](int row) {  // or -1
      if (p.lists) return entry + row < p.list_length ? list[entry + row] : -1;
      return sequence.position(begin + min(row, count - 1));
    };
    load_tiles<K_STEPS, T>(
        p.aligned_rows,
        {keys, row_of<T>(p.key, sequence.b, sequence.key_head, sequence.offset), p.key.stride_l, p.D, INT32_MAX},
        {values, row_of<T>(p.value, sequence.b, sequence.key_head, sequence.offset), p.value.stride_l, p.E, INT32_MAX},
        row_at);
    const int row = threadIdx.x;
    if (row >= kAttentionRows) return;
    const int at = row_at(row);
    const bool masked = row >= count || at < 0 || is_padded(at);
    facts.row[row] = at;
    facts.key_position[row] = masked ? kMaskedKey : at >= sequence.first_context_key ? kContextKey : at;
  }

  // The same for queries, and for their incoming gradients if `grads` is not null.
  __device__ void load_queries(unsigned char* queries, unsigned char* grads, QueryFacts& facts, int slot,
                               int count) const {
    const int begin = sequence.wrapped(slot);
    const auto row_at = [&](int row) { return row < count ? sequence.position(begin + row) : -1; };
    // Rows that are no queries are loaded as well, since they may be keys.
    load_tiles<K_STEPS, T>(
        p.aligned_rows,
        {queries, row_of<T>(p.query, sequence.b, sequence.h, sequence.offset), p.query.stride_l, p.D, INT32_MAX},
        {grads, row_of<T>(p.grad_out, sequence.b, sequence.h, sequence.offset), p.grad_out.stride_l, p.E,
         sequence.n_queries},
        row_at);
    const int row = threadIdx.x;
    if (row >= kAttentionRows) return;
    const int at = row_at(row);
    const int wrapped = sequence.wrapped(slot + row);
    const bool is_query = at >= 0 && at < sequence.n_queries;
    QueryResidual residual{INFINITY, 0.f, 0};
    if (grads && is_query) residual = p.residuals[sequence.head_row + at];
    const bool self_only = residual.self_only;
    Query fact{.self_only = residual.self_only, .lse = residual.lse, .delta = residual.delta};
    fact.row = is_query ? at : kNone, fact.slot = wrapped;
    // A query that sees no other key sees its own.
    const int limit = p.has(kCausal) ? at + (!p.shared_qk || self_only) : kMaskedKey;
    const bool blind = !is_query || (p.has(kMaskPaddedQueries) && is_padded(at));
    fact.limit = blind ? kNone : limit;
    fact.excluded = at, fact.n_excluded = p.shared_qk && !self_only;
    if (p.lists && is_query && wrapped >= sequence.length) {  // a second round: it saw these keys in the first
      const Range excluded = sequence.list_range(p, at / p.chunk_length);
      fact.excluded = excluded.begin, fact.n_excluded = excluded.end - excluded.begin;
    }
    const bool has_window = row < count && (p.ring() || wrapped == slot + row);
    const Range seen = has_window ? sequence.keys_of(p, slot + row) : Range{0, 0};
    fact.first_slot = seen.begin, fact.n_slots = seen.end - seen.begin;
    facts.query[row] = fact;
  }

  // Fills facts.factor: the scale of scores, over the length of a shared row. Two threads share a row. The caller puts
  // barriers before and after.
  __device__ void fill_factors(unsigned char* keys, KeyFacts& facts) const {
    static_assert(kAttentionThreads == 2 * kAttentionRows && Layout::kVectors % 2 == 0);
    const int row = threadIdx.x / 2, half = threadIdx.x % 2;
    float square = 0.f;
    if (p.shared_qk) {
#pragma unroll
      for (int i = 0; i < Layout::kVectors / 2; ++i) {
        // So the vectors that the threads of 4 rows read together lie in different banks.
        const int part = Layout::kVectors < 8 ? half * Layout::kVectors / 2 + i : (i & 3) | half << 2 | (i & ~3) << 1;
        const uint4 bits = *reinterpret_cast<const uint4*>(Layout::vector(keys, row, part));
        const T* x = reinterpret_cast<const T*>(&bits);
#pragma unroll
        for (int j = 0; j < kPerVector; ++j) square = fmaf(to_float(x[j]), to_float(x[j]), square);
      }
    }
    square += __shfl_xor_sync(~0u, square, 1);
    if (half == 0) facts.factor[row] = p.scale * kLog2e / key_length(p, square);
  }

  __device__ static int row_of_fact(const KeyFacts& facts, int i) { return facts.row[i]; }
  __device__ static int row_of_fact(const QueryFacts& facts, int i) { return facts.query[i].row; }

  // Fills `score_mods` for the visited tile that begins at `slot`.
  __device__ void fill_score_mods(int slot, int owned_slot, int stage) const {
    __syncthreads();  // all threads are done with the previous tile
    const int column = threadIdx.x % kAttentionRows;
    for (int row = threadIdx.x / kAttentionRows; row < kAttentionRows; row += kAttentionThreads / kAttentionRows) {
      const int owned = row_of_fact(owned_facts(), row), other = row_of_fact(facts(stage), column);
      const int owned_at = owned_slot + row, other_at = slot + column;
      score_mods(row)[column] = kOwnsKeys ? score_mod(p, sequence, other, owned, other_at, owned_at)
                                          : score_mod(p, sequence, owned, other, owned_at, other_at);
    }
    __syncthreads();
  }

  // Whether any row of the warp sees a slot of the visited tile that begins at `slot`. a, b: the windows of the lane's
  // two rows.
  __device__ static bool any_sees(Range a, Range b, int slot) {
    const auto sees = [&](Range seen) { return slot < seen.end && slot + kAttentionRows > seen.begin; };
    return __any_sync(~0u, sees(a) || sees(b));
  }

  // Whether dropout keeps the pair of the query at a wrapped slot and the key at an index in its window.
  __device__ bool is_kept(int slot, int at) const {
    const uint32_t round = slot / sequence.length, in_round = slot - round * sequence.length;
    const Words words = philox(state.seed, at / 4, in_round, round, sequence.dropout_index);
    const uint32_t low = at & 1 ? words.word[1] : words.word[0], high = at & 1 ? words.word[3] : words.word[2];
    return (at & 2 ? high : low) >= p.drop_threshold;
  }

  // x += score_mods(n, j)
  template <int N, class ScoreMods>
  __device__ static void add_score_mods(float (&x)[N][4], ScoreMods&& score_mods) {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) x[n][j] += score_mods(n, j);
  }

  // Applies dropout: scales what is kept, and sets the rest to zero.
  template <int N>
  __device__ void drop(float (&x)[N][4], uint32_t kept) const {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) x[n][j] = kept >> (4 * n + j) & 1 ? x[n][j] * p.keep_factor : 0.f;
  }

  // Bit i is set if dropout keeps the lane's pair i, which is x[i / 4][i % 4]. slot_of(i) and at_of(i) are the
  // arguments of is_kept. The loop is not unrolled because registers are scarce here.
  template <int COUNT, class SlotOf, class AtOf>
  __device__ uint32_t kept_bits(SlotOf&& slot_of, AtOf&& at_of) const {
    uint32_t bits = 0;
#pragma unroll 1
    for (int i = 0; i < COUNT; ++i) bits |= uint32_t{is_kept(slot_of(i), at_of(i))} << i;
    return bits;
  }

  // Row `to` becomes to * before + value(m, j) if `add`, else value(m, j). The four lanes of a row call it together.
  template <class Value>
  __device__ void write_row(T* to, int width, bool write, bool add, float before, Value&& value) const {
    constexpr int kColumns = 2 * K_STEPS;
    if constexpr (sizeof(T) == 2) {
      if (p.aligned_out) {
        const bool any_adds = __any_sync(~0u, add);
#pragma unroll
        for (int m = 0; m < kColumns; m += 4) {
          const int d = m * 8 + lane % 4 * 8;  // first of 8 columns after transposing
          const bool mine = write && d < width;
          uint32_t words[4] = {0, 0, 0, 0};
          if (add && mine) {
            const uint4 old = *reinterpret_cast<const uint4*>(to + d);
            words[0] = old.x, words[1] = old.y, words[2] = old.z, words[3] = old.w;
          }
          if (any_adds) quad_transpose(words, lane);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const T* pair = reinterpret_cast<const T*>(&words[i]);
            words[i] = pack<T>(fmaf(to_float(pair[0]), before, value(m + i, 0)),
                               fmaf(to_float(pair[1]), before, value(m + i, 1)));
          }
          quad_transpose(words, lane);
          if (mine) *reinterpret_cast<uint4*>(to + d) = make_uint4(words[0], words[1], words[2], words[3]);
        }
        return;
      }
    }
#pragma unroll
    for (int m = 0; m < kColumns; ++m) {
      const int d = m * 8 + lane % 4 * 2;
      if (sizeof(T) == 4 && p.aligned_out) {
        if (!write || d >= width) continue;
        float2* pair = reinterpret_cast<float2*>(to + d);
        const float2 old = add ? *pair : make_float2(0.f, 0.f);
        *pair = make_float2(fmaf(old.x, before, value(m, 0)), fmaf(old.y, before, value(m, 1)));
        continue;
      }
#pragma unroll
      for (int j = 0; j < 2; ++j)
        if (write && d + j < width)
          to[d + j] = from_float<T>(fmaf(add ? to_float(to[d + j]) : 0.f, before, value(m, j)));
    }
  }

  // Goes through the tiles that the block owns. For each of them it calls:
  // - begin(slot, count), which starts to load the owned rows;
  // - for each of `heads` heads and each visited tile: load(slot, stage) if no stage holds the tile yet; then
  //   arrived(stage, fresh, first), which returns whether it wrote to shared memory; then
  //   compute(slot, stage, first, range);
  // - end(slot, count).
  template <class Begin, class Load, class Arrived, class Compute, class End>
  __device__ __forceinline__ void walk(int heads, Begin&& begin, Load&& load, Arrived&& arrived, Compute&& compute,
                                       End&& end) const {
    int held[kAttentionStages];  // which tile each stage holds
#pragma unroll
    for (int i = 0; i < kAttentionStages; ++i) held[i] = kNone;
    const auto take = [&](int stage, int tile) {  // returns whether the tile must be loaded
      bool missing = false;
#pragma unroll
      for (int i = 0; i < kAttentionStages; ++i)
        if (i == stage && held[i] != tile) held[i] = tile, missing = true;
      return missing;
    };

    int awaited = kNone;
    if (threadIdx.x == 0) state.ranges[0].template take<kOwnsKeys>(p, sequence, 0);
    for (int current = 0;; current ^= 1) {
      __syncthreads();  // all threads are done with the previous owned tile
      const TileRange& range = state.ranges[current];
      if (!range.valid) break;
      begin(range.slot, range.count);
      if (threadIdx.x == 0) state.ranges[current ^ 1].template take<kOwnsKeys>(p, sequence, range.owned + 1);
      bool pending = true;
      for (int head = 0; head < heads; ++head) {
        if (heads > 1) {
          __syncthreads();  // all threads are done with the previous head
          if (threadIdx.x == 0) sequence.take_head(p, sequence.key_head * heads + head, sequence_number());
          __syncthreads();
#pragma unroll
          for (int i = 0; i < kAttentionStages; ++i) held[i] = kNone;
        }
        for (int i = 0; i < range.tiles; ++i) {
          const int tile = range.tile(i), stage = stage_of(tile);
          const bool first = head == 0 && i == 0;
          bool fresh = awaited == tile, settled = false;
          if (take(stage, tile)) {
            __syncthreads();  // no thread reads the stage any more
            load(tile * kAttentionRows, stage);
            commit_copies();
            pending = fresh = true;
          }
          if (pending) {
            wait_for_copies<0>();
            __syncthreads();
            if (arrived(stage, fresh, first)) __syncthreads();
            pending = false, settled = true, awaited = kNone;
          }
          const bool more = i + 1 < range.tiles;
          if (more || (heads == 1 && state.ranges[current ^ 1].valid)) {
            const int next = more ? range.tile(i + 1) : state.ranges[current ^ 1].tile(0);
            const int to = stage_of(next);
            const bool has_room = to != stage && (range.diagonal == kNone || to != stage_of(range.diagonal));
            if (has_room && take(to, next)) {
              if (!settled) __syncthreads();  // no thread reads the stage any more
              load(next * kAttentionRows, to);
              commit_copies();
              pending = true, awaited = next;
            }
          }
          compute(tile * kAttentionRows, stage, first, range);
        }
      }
      end(range.slot, range.count);
    }
  }

  // The same for a block that owns queries, and their incoming gradients if `grads` is not null. It calls begin(stage
  // of the first visited tile), visit(slot, stage, range) for each visited tile, and end().
  template <class Begin, class Visit, class End>
  __device__ __forceinline__ void walk_queries(unsigned char* grads, Begin&& begin, Visit&& visit, End&& end) const {
    walk(
        1,
        [&](int slot, int count) {
          load_queries(p.diagonal_first ? nullptr : owned_tile(0), grads, owned_facts(), slot, count);
          commit_copies();
        },
        [&](int slot, int stage) { load_keys(tile(stage, 0), tile(stage, 1), facts(stage), slot, kAttentionRows); },
        [&](int stage, bool fresh, bool) {
          if (fresh) fill_factors(tile(stage, 0), facts(stage));
          return fresh;
        },
        [&](int slot, int stage, bool first, const TileRange& range) {
          if (first) begin(stage);
          visit(slot, stage, range);
        },
        [&](int, int) { end(); });
  }

  __device__ int64_t sequence_number() const { return blockIdx.x / p.blocks_per_sequence % p.n_sequences; }
};

// The body of a kernel. heads: query heads, or key heads where a block serves all queries of one.
template <class Part>
__device__ __forceinline__ void run(const AttentionArguments& p, int heads) {
  RK_DYNAMIC_SHARED(memory);
  __shared__ AttentionState state;
  state.take(p, heads);
  if (p.round >= state.sequence.rounds) return;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  Part part{{p, state, state.sequence, memory, warp, lane}};
  part.run();
}

}  // namespace rk::cuda
