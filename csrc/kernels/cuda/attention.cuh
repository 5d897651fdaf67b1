// What the kernels of chunk attention share: how a block walks over windows. A block owns tiles of 64 queries (or keys)
// of one round, of whole chunks or of a part of one, and visits for each the tiles of 64 slots, [64 i, 64 i + 64)
// unrolled, whose keys (or queries) they see (or are seen by). Rows are gathered into shared memory, where a visited
// tile stays until its place is needed; the next one comes while one is computed with.
#pragma once
#include <type_traits>

#include "kernels/cuda/attention_rules.cuh"
#include "kernels/cuda/random.cuh"
#include "kernels/cuda/tiles.cuh"

namespace rk::cuda {

// By which a row, of a squared length, is divided to be a key.
__device__ __forceinline__ float key_length(const AttentionArguments& p, float square) {
  return !p.shared ? 1.f : p.l2 ? fmaxf(sqrtf(square), 1e-12f) : sqrtf(square + 1e-6f * p.D);
}

// Facts of the rows of a tile, in shared memory.
struct KeyFacts {
  int row[kAttentionRows];       // in the sequence
  int position[kAttentionRows];  // or kHidden or kEveryone
  float factor[kAttentionRows];  // of scores in base 2
};
struct __align__(16) Query {
  int limit;                     // it sees keys of positions below,
  int excluded, excluded_count;  // less so many from this one on,
  int self_only;
  float lse, delta;  // see QueryResidual
  int first, seen;   // of the slots, so many from the first on
  int row, slot;     // in the sequence, or kNobody for none; wrapped
  int unused[2];

  __device__ bool allows(int key) const {
    const uint32_t at = static_cast<uint32_t>(key) - static_cast<uint32_t>(excluded);
    return (key < limit) & (at >= static_cast<uint32_t>(excluded_count));
  }
  __device__ Range slots() const { return {first, first + seen}; }
  // Of the weight, base 2: one that sees only itself has exactly the weight 1 / times.
  __device__ float exponent(float score, float factor, bool sees) const {
    const float x = self_only ? -lse : fmaf(score, factor, -lse);
    return sees ? x : -INFINITY;
  }
};
struct QueryFacts {
  Query query[kAttentionRows];
};
static_assert(sizeof(KeyFacts) == kKeyFactsBytes && sizeof(QueryFacts) == kQueryFactsBytes);

// A tile that a block owns, and the tiles that it sees, or is seen by. In shared memory, written by one thread.
struct Visits {
  int own;                        // its number
  bool some;                      // or it is behind the last one
  int slot, count;                // its slots
  int first, tiles;               // that are visited
  int lead;                       // the one that is visited first, or none
  int inner_first, inner_behind;  // slots that every slot of the tile sees

  // The block's first one from `own` on that has slots.
  template <bool OWNS_KEYS>
  __device__ void take(const AttentionArguments& p, const AttentionSequence& sequence, int from) {
    const bool of_lists = OWNS_KEYS && p.lists;
    const AttentionTiles all(p.tile_chunk, of_lists ? sequence.list_rows() * p.list_slots : sequence.length);
    const int begins = static_cast<int>(blockIdx.x % p.blocks_per_sequence) * p.tiles_per_block;
    const int behind = min(begins + p.tiles_per_block, all.of_round);
    for (own = max(from, begins); own < behind && all.count(own) <= 0;) ++own;
    some = own < behind;
    if (!some) return;
    slot = p.round * sequence.length + all.start(own), count = all.count(own);
    const auto visited = [&](int at) { return OWNS_KEYS ? sequence.queries_of(p, at) : sequence.keys_of(p, at); };
    const Range of_first = visited(slot), of_last = visited(slot + count - 1);
    first = floor_div(of_first.first, kAttentionRows);
    tiles = floor_div(of_last.behind - 1, kAttentionRows) + 1 - first;
    inner_first = of_last.first, inner_behind = of_first.behind;
    lead = p.lead ? slot / kAttentionRows : kNobody;
  }
  __device__ int tile(int i) const {
    if (lead == kNobody) return first + i;
    const int tile = first + i - 1;
    return i == 0 ? lead : tile + (tile >= lead);
  }
  // Whether every slot of it sees all of the visited tile from `slot` on.
  __device__ bool all_see(int slot) const { return slot >= inner_first && slot + kAttentionRows <= inner_behind; }
};

// What a block knows beside its rows, in shared memory.
struct AttentionState {
  AttentionSequence sequence;
  Visits visits[2];  // of a tile that it owns, and of the next
  uint64_t seed;     // of dropout

  __device__ void take(const AttentionArguments& p, int heads) {
    if (threadIdx.x == 0) {
      sequence.take(p, blockIdx.x / p.blocks_per_sequence, heads);
      seed = p.dropout ? static_cast<uint64_t>(*p.dropout_seed) : 0;
    }
    __syncthreads();
  }
};

// Shared memory: the tiles that a block owns, two for each place, and the facts of all. `OwnFacts`, `Facts`: of rows
// that it owns and visits.
template <class T, int STEPS, int OWN_TILES, class OwnFacts, class Facts>
struct AttentionBlock {
  using Layout = TileLayout<T, STEPS>;
  static constexpr int kPerUnit = 16 / sizeof(T);
  static constexpr bool kOwnsKeys = std::is_same_v<OwnFacts, KeyFacts>;

  const AttentionArguments& p;
  AttentionState& state;
  AttentionSequence& sequence;
  unsigned char* memory;
  int warp, lane;

  __device__ unsigned char* own_tile(int i) const { return memory + i * Layout::kBytes; }
  __device__ unsigned char* tile(int place, int i) const {
    return memory + (OWN_TILES + 2 * place + i) * Layout::kBytes;
  }
  __device__ unsigned char* facts_memory() const {
    return memory + (OWN_TILES + 2 * p.places_of_tiles) * Layout::kBytes;
  }
  __device__ OwnFacts& own_facts() const { return *reinterpret_cast<OwnFacts*>(facts_memory()); }
  __device__ Facts& facts(int place) const {
    return reinterpret_cast<Facts*>(facts_memory() + sizeof(OwnFacts))[place];
  }
  // [64][kBiasRow]: of an owned row and a visited one, what rules of the pair add to its score in base 2.
  __device__ float* bias(int own_row) const {
    return reinterpret_cast<float*>(facts_memory() + sizeof(OwnFacts) + p.places_of_tiles * sizeof(Facts)) +
           own_row * kBiasRow;
  }
  __device__ int place_of(int tile) const { return tile - floor_div(tile, p.places_of_tiles) * p.places_of_tiles; }

  __device__ bool is_padded(int row) const {
    return p.padding && p.padding[int64_t{sequence.b} * p.S + sequence.offset + row];
  }

  // Starts to load the keys and values of `count` slots, beyond which there are none.
  __device__ void load_keys(unsigned char* keys, unsigned char* values, KeyFacts& facts, int slot, int count) const {
    const int list_row = p.lists ? slot / p.list_slots : 0, place = slot - list_row * p.list_slots;
    const int32_t* list = sequence.lists + int64_t{list_row} * p.list_length;
    const int begin = sequence.wrapped(slot);
    const auto row_at = [&](int row) {  // or -1
      if (p.lists) return place + row < p.list_length ? list[place + row] : -1;
      return sequence.position(begin + min(row, count - 1));
    };
    load_tiles<STEPS, T>(
        p.aligned_rows,
        {keys, row_of<T>(p.key, sequence.b, sequence.key_head, sequence.offset), p.key.stride_l, p.D, INT32_MAX},
        {values, row_of<T>(p.value, sequence.b, sequence.key_head, sequence.offset), p.value.stride_l, p.E, INT32_MAX},
        row_at);
    const int row = threadIdx.x;
    if (row >= kAttentionRows) return;
    const int at = row_at(row);
    const bool hidden = row >= count || at < 0 || is_padded(at);
    facts.row[row] = at;
    facts.position[row] = hidden ? kHidden : at >= sequence.everyone ? kEveryone : at;
  }

  // The same of queries, and of their incoming gradients where `grads` is one.
  __device__ void load_queries(unsigned char* queries, unsigned char* grads, QueryFacts& facts, int slot,
                               int count) const {
    const int begin = sequence.wrapped(slot);
    const auto row_at = [&](int row) { return row < count ? sequence.position(begin + row) : -1; };
    // Rows that are no queries may be keys.
    load_tiles<STEPS, T>(
        p.aligned_rows,
        {queries, row_of<T>(p.query, sequence.b, sequence.h, sequence.offset), p.query.stride_l, p.D, INT32_MAX},
        {grads, row_of<T>(p.grad_out, sequence.b, sequence.h, sequence.offset), p.grad_out.stride_l, p.E,
         sequence.n_queries},
        row_at);
    const int row = threadIdx.x;
    if (row >= kAttentionRows) return;
    const int at = row_at(row);
    const int wrapped = sequence.wrapped(slot + row);
    const bool some = at >= 0 && at < sequence.n_queries;
    QueryResidual residual{INFINITY, 0.f, 0};
    if (grads && some) residual = p.residuals[sequence.head_row + at];
    const bool self_only = residual.self_only;
    Query fact{.self_only = residual.self_only, .lse = residual.lse, .delta = residual.delta};
    fact.row = some ? at : kNobody, fact.slot = wrapped;
    // A query that sees nothing else sees itself.
    const int limit = p.causal ? at + (!p.shared || self_only) : kHidden;
    const bool blind = !some || (p.mask_padded_queries && is_padded(at));
    fact.limit = blind ? kNobody : limit;
    fact.excluded = at, fact.excluded_count = p.shared && !self_only;
    if (p.lists && some && wrapped >= sequence.length) {  // what the first round has shown
      const Range shown = sequence.list_range(p, at / p.chunk_length);
      fact.excluded = shown.first, fact.excluded_count = shown.behind - shown.first;
    }
    const bool there = row < count && (p.ring() || wrapped == slot + row);
    const Range seen = there ? sequence.keys_of(p, slot + row) : Range{0, 0};
    fact.first = seen.first, fact.seen = seen.behind - seen.first;
    facts.query[row] = fact;
  }

  // 1 over the length of shared rows, as keys, in `facts.factor`; two threads a row. Between barriers.
  __device__ void fill_factors(unsigned char* keys, KeyFacts& facts) const {
    const int row = threadIdx.x / 2, half = threadIdx.x % 2;
    float square = 0.f;
    if (p.shared) {
#pragma unroll
      for (int i = 0; i < Layout::kUnits / 2; ++i) {
        // The units of the two threads, of 4 rows, lie in different banks.
        const int part = Layout::kUnits < 8 ? half * Layout::kUnits / 2 + i : (i & 3) | half << 2 | (i & ~3) << 1;
        const uint4 bits = *reinterpret_cast<const uint4*>(Layout::unit(keys, row, part));
        const T* x = reinterpret_cast<const T*>(&bits);
#pragma unroll
        for (int j = 0; j < kPerUnit; ++j) square = fmaf(to_float(x[j]), to_float(x[j]), square);
      }
    }
    square += __shfl_xor_sync(~0u, square, 1);
    if (half == 0) facts.factor[row] = p.scale * kLog2e / key_length(p, square);
  }

  __device__ static int row_of_fact(const KeyFacts& facts, int i) { return facts.row[i]; }
  __device__ static int row_of_fact(const QueryFacts& facts, int i) { return facts.query[i].row; }

  // Fills `bias` for the visited tile from `slot` on; own keys or own queries are in it with the others.
  __device__ void fill_bias(int slot, int own_slot, int place) const {
    __syncthreads();  // all are done with the tile before
    const int column = threadIdx.x % kAttentionRows;
    for (int row = threadIdx.x / kAttentionRows; row < kAttentionRows; row += kAttentionThreads / kAttentionRows) {
      const int own = row_of_fact(own_facts(), row), other = row_of_fact(facts(place), column);
      const int own_at = own_slot + row, other_at = slot + column;
      bias(row)[column] = kOwnsKeys ? pair_bias(p, sequence, other, own, other_at, own_at)
                                    : pair_bias(p, sequence, own, other, own_at, other_at);
    }
    __syncthreads();
  }

  // Whether any row of the warp sees a slot of the visited tile from `slot` on. a, b: what the lane's two rows see.
  __device__ static bool any_sees(Range a, Range b, int slot) {
    const auto sees = [&](Range seen) { return slot < seen.behind && slot + kAttentionRows > seen.first; };
    return __any_sync(~0u, sees(a) || sees(b));
  }

  // Whether dropout keeps the pair of the query at a wrapped slot and the key `at` slots from the first that it sees.
  __device__ bool is_kept(int slot, int at) const {
    const uint32_t round = slot / sequence.length, in_round = slot - round * sequence.length;
    const Words words = philox(state.seed, at / 4, in_round, round, sequence.index);
    const uint32_t low = at & 1 ? words.word[1] : words.word[0], high = at & 1 ? words.word[3] : words.word[2];
    return (at & 2 ? high : low) >= p.drop_threshold;
  }

  // x += bias(n, j)
  template <int N, class Bias>
  __device__ static void add_bias(float (&x)[N][4], Bias&& bias) {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) x[n][j] += bias(n, j);
  }

  // Scales what is kept, and drops the others.
  template <int N>
  __device__ void drop(float (&x)[N][4], uint32_t kept) const {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) x[n][j] = kept >> (4 * n + j) & 1 ? x[n][j] * p.keep_factor : 0.f;
  }

  // A bit for each pair i of a lane that dropout keeps, x[i / 4][i % 4]; slot_of and at_of give of it what is_kept
  // takes. Rolled up, so that it takes few registers where they are scarce.
  template <int COUNT, class SlotOf, class AtOf>
  __device__ uint32_t kept_bits(SlotOf&& slot_of, AtOf&& at_of) const {
    uint32_t bits = 0;
#pragma unroll 1
    for (int i = 0; i < COUNT; ++i) bits |= uint32_t{is_kept(slot_of(i), at_of(i))} << i;
    return bits;
  }

  // to = to * before + x * now, for the lane's row h of the warp's 16.
  template <class Value>
  __device__ void write_row(T* to, int width, bool write, bool add, float before, Value&& value) const {
    constexpr int kColumns = 2 * STEPS;
    if constexpr (sizeof(T) == 2) {
      if (p.aligned_out) {
        const bool any_adds = __any_sync(~0u, add);
#pragma unroll
        for (int m = 0; m < kColumns; m += 4) {
          const int d = m * 8 + lane % 4 * 8;  // the lane's 8 columns after transposing
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

  // Owns the block's tiles one after another. For each it calls begin(slot, count), which starts to load what is owned;
  // for each of `heads` heads and each tile visited load(slot, place) if it isn't there, arrived(place, fresh, first),
  // which says whether it wrote to shared memory, and compute(slot, place, first, visits); and end(slot, count).
  template <class Begin, class Load, class Arrived, class Compute, class End>
  __device__ __forceinline__ void walk(int heads, Begin&& begin, Load&& load, Arrived&& arrived, Compute&& compute,
                                       End&& end) const {
    int held[kAttentionPlaces];  // the tiles in the places
#pragma unroll
    for (int i = 0; i < kAttentionPlaces; ++i) held[i] = kNobody;
    const auto take = [&](int place, int tile) {  // whether it isn't there
      bool missing = false;
#pragma unroll
      for (int i = 0; i < kAttentionPlaces; ++i)
        if (i == place && held[i] != tile) held[i] = tile, missing = true;
      return missing;
    };

    int awaited = kNobody;
    if (threadIdx.x == 0) state.visits[0].template take<kOwnsKeys>(p, sequence, 0);
    for (int turn = 0;; turn ^= 1) {
      __syncthreads();  // all are done with what was owned
      const Visits& visits = state.visits[turn];
      if (!visits.some) break;
      begin(visits.slot, visits.count);
      if (threadIdx.x == 0) state.visits[turn ^ 1].template take<kOwnsKeys>(p, sequence, visits.own + 1);
      bool pending = true;
      for (int head = 0; head < heads; ++head) {
        if (heads > 1) {
          __syncthreads();  // all are done with the head before
          if (threadIdx.x == 0) sequence.take_head(p, sequence.key_head * heads + head, sequence_number());
          __syncthreads();
#pragma unroll
          for (int i = 0; i < kAttentionPlaces; ++i) held[i] = kNobody;
        }
        for (int i = 0; i < visits.tiles; ++i) {
          const int tile = visits.tile(i), place = place_of(tile);
          const bool first = head == 0 && i == 0;
          bool fresh = awaited == tile, settled = false;
          if (take(place, tile)) {
            __syncthreads();  // nobody reads the place
            load(tile * kAttentionRows, place);
            commit_copies();
            pending = fresh = true;
          }
          if (pending) {
            wait_for_copies<0>();
            __syncthreads();
            if (arrived(place, fresh, first)) __syncthreads();
            pending = false, settled = true, awaited = kNobody;
          }
          const bool more = i + 1 < visits.tiles;
          if (more || (heads == 1 && state.visits[turn ^ 1].some)) {
            const int next = more ? visits.tile(i + 1) : state.visits[turn ^ 1].tile(0);
            const int to = place_of(next);
            const bool has_room = to != place && (visits.lead == kNobody || to != place_of(visits.lead));
            if (has_room && take(to, next)) {
              if (!settled) __syncthreads();  // nobody reads the place
              load(next * kAttentionRows, to);
              commit_copies();
              pending = true, awaited = next;
            }
          }
          compute(tile * kAttentionRows, place, first, visits);
        }
      }
      end(visits.slot, visits.count);
    }
  }

  // The same for a block that owns queries, and their incoming gradients where `grads` is a tile: begin(place of the
  // first tile), visit(slot, place, visits) and end().
  template <class Begin, class Visit, class End>
  __device__ __forceinline__ void walk_queries(unsigned char* grads, Begin&& begin, Visit&& visit, End&& end) const {
    walk(
        1,
        [&](int slot, int count) {
          load_queries(p.lead ? nullptr : own_tile(0), grads, own_facts(), slot, count);
          commit_copies();
        },
        [&](int slot, int place) { load_keys(tile(place, 0), tile(place, 1), facts(place), slot, kAttentionRows); },
        [&](int place, bool fresh, bool) {
          if (fresh) fill_factors(tile(place, 0), facts(place));
          return fresh;
        },
        [&](int slot, int place, bool first, const Visits& visits) {
          if (first) begin(place);
          visit(slot, place, visits);
        },
        [&](int, int) { end(); });
  }

  __device__ int64_t sequence_number() const { return blockIdx.x / p.blocks_per_sequence % p.n_sequences; }
};

// The body of a kernel; `heads` have sequences.
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
