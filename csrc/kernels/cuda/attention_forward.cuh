// Chunk attention, forward: one round, merged in place into the result of earlier rounds.
//
// A query attends its own key only if it sees no other key in any round. As long as it has seen no other, its lse holds
// how often it met its own key, and how often dropout kept that (SelfOnlyState).
#pragma once
#include "kernels/cuda/attention.cuh"

namespace rk::cuda {

// A value of lse: the query has met only its own key so far, `times` times, of which dropout kept `kept`. It is encoded
// as a NaN with a sign and bits that no arithmetic gives.
struct SelfOnlyState {
  static constexpr uint32_t kTag = 0xffe00000u;
  uint32_t times, kept;

  __device__ static float nothing() { return __uint_as_float(kTag); }
  __device__ float encode() const { return __uint_as_float(kTag | times << 10 | kept); }
  __device__ static bool is(float state) { return (__float_as_uint(state) & kTag) == kTag; }
  __device__ static SelfOnlyState decode(float state) {
    const uint32_t bits = __float_as_uint(state);
    return {bits >> 10 & 1023, bits & 1023};
  }
};

// One of a lane's two rows, and the state of its softmax.
struct QueryRow {
  const Query* query;  // in shared memory
  float highest, total;
};

template <class T, int K_STEPS>
struct AttentionForward : AttentionBlock<T, K_STEPS, 1, QueryFacts, KeyFacts> {
  using Block = AttentionBlock<T, K_STEPS, 1, QueryFacts, KeyFacts>;
  using Block::lane, Block::p, Block::sequence, Block::warp;
  static constexpr int kColumns = 2 * K_STEPS, kKeys = kAttentionRows / 8;  // tiles of 8

  OwnedRows<T, K_STEPS, true> queries;
  QueryRow rows[2];
  float out[kColumns][4];
  bool last_round;

  __device__ void run() {
    last_round = p.round == sequence.rounds - 1;
    Block::walk_queries(
        nullptr, [&](int stage) { begin(stage); },
        [&](int slot, int stage, const TileRange& range) { attend(slot, stage, range); }, [&] { finish(); });
  }

  __device__ void begin(int stage) {
    queries.take(p.diagonal_first ? Block::tile(stage, 0) : Block::owned_tile(0), warp, lane);
#pragma unroll
    for (int h = 0; h < 2; ++h) rows[h] = {Block::owned_facts().query + warp * 16 + h * 8 + lane / 4, -INFINITY, 0.f};
#pragma unroll
    for (int m = 0; m < kColumns; ++m)
#pragma unroll
      for (int j = 0; j < 4; ++j) out[m][j] = 0.f;
  }

  // Attends the tile of keys that begins at `slot`.
  __device__ void attend(int slot, int stage, const TileRange& range) {
    if (sequence.has_score_mod) Block::fill_score_mods(slot, range.slot, stage);
    const bool all_see = range.all_see(slot);
    if (!all_see && !Block::any_sees(rows[0].query->slots(), rows[1].query->slots(), slot)) return;
    const KeyFacts& facts = Block::facts(stage);
    // The limit of a causal query already leaves out its own key.
    const bool excludes = p.shared_qk ? !p.has(kCausal) : p.lists && p.round > 0;
    float s[kKeys][4] = {};
    multiply_rows(s, queries, Block::tile(stage, 0), 0, warp, lane);
#pragma unroll
    for (int n = 0; n < kKeys; ++n) {
      const int column = n * 8 + lane % 4 * 2;
      const int2 key = *reinterpret_cast<const int2*>(facts.key_position + column);
      const float2 factor = *reinterpret_cast<const float2*>(facts.factor + column);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        s[n][2 * h] = key.x < rows[h].query->limit ? s[n][2 * h] * factor.x : -INFINITY;
        s[n][2 * h + 1] = key.y < rows[h].query->limit ? s[n][2 * h + 1] * factor.y : -INFINITY;
      }
      if (excludes) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          if (!rows[h].query->allows(key.x)) s[n][2 * h] = -INFINITY;
          if (!rows[h].query->allows(key.y)) s[n][2 * h + 1] = -INFINITY;
        }
      }
    }
    if (sequence.has_score_mod) {
      Block::add_score_mods(s, [&](int n, int j) {
        return Block::score_mods(warp * 16 + j / 2 * 8 + lane / 4)[n * 8 + lane % 4 * 2 + j % 2];
      });
    }
    if (!all_see) {
#pragma unroll
      for (int n = 0; n < kKeys; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const Query& query = *rows[j / 2].query;
          const uint32_t at = slot + n * 8 + lane % 4 * 2 + j % 2 - query.first_slot;
          if (at >= static_cast<uint32_t>(query.n_slots)) s[n][j] = -INFINITY;
        }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      QueryRow& row = rows[h];
      float highest = row.highest;
#pragma unroll
      for (int n = 0; n < kKeys; ++n) highest = fmaxf(highest, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
      highest = quad_max(highest);
      // A row that has seen nothing yet keeps exponentials of 0.
      const float above = highest == -INFINITY ? 0.f : highest, before = exp2_approximate(row.highest - above);
      row.highest = highest, row.total *= before;
#pragma unroll
      for (int m = 0; m < kColumns; ++m) out[m][2 * h] *= before, out[m][2 * h + 1] *= before;
#pragma unroll
      for (int n = 0; n < kKeys; ++n)
#pragma unroll
        for (int j = 2 * h; j < 2 * h + 2; ++j) s[n][j] = exp2_approximate(s[n][j] - above), row.total += s[n][j];
    }
    if (p.dropout) {
      const uint32_t kept =
          Block::template kept_bits<4 * kKeys>([&](int i) { return i & 2 ? rows[1].query->slot : rows[0].query->slot; },
                                               [&](int i) {
                                                 return slot + i / 4 * 8 + lane % 4 * 2 + i % 2 -
                                                        (i & 2 ? rows[1].query->first_slot : rows[0].query->first_slot);
                                               });
      Block::drop(s, kept);
    }
    multiply_columns<T, K_STEPS>(out, s, Block::tile(stage, 1), 0, lane);
  }

  // Merges the lane's two rows of this round into the result of earlier rounds.
  __device__ void finish() {
    float states[2];  // what earlier rounds left
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool has_earlier = p.round > 0 && rows[h].query->row != kNone;
      states[h] = has_earlier ? p.lse[sequence.head_row + rows[h].query->row] : SelfOnlyState::nothing();
    }
    __syncwarp();  // all lanes of a row have read it
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      QueryRow& row = rows[h];
      row.total = quad_sum(row.total);
      const bool is_query = row.query->row != kNone, saw_any = !(row.total <= 0.f);  // true for NaN
      const bool more = !SelfOnlyState::is(states[h]);
      const float lse = saw_any ? row.highest + log2f(row.total) : -INFINITY;
      const float above = more && !(lse > states[h]) ? states[h] : lse;
      const float earlier = more ? exp2f(states[h] - above) : 0.f, sum = earlier + (saw_any ? exp2f(lse - above) : 0.f);
      const float before = earlier / sum, now = saw_any ? exp2f(lse - above) / (sum * row.total) : 0.f;
      const float merged = above + log2f(sum);
      if (is_query && (saw_any || more) && lane % 4 == 0) {
        p.lse[sequence.head_row + row.query->row] = last_round ? merged * kLn2 : merged;
        if (last_round && p.self_only) p.self_only[sequence.head_row + row.query->row] = false;
      }
      T* to = row_of<T>(p.out, sequence.b, sequence.h, sequence.offset + max(row.query->row, 0));
      Block::write_row(to, p.E, is_query && saw_any, more, before,
                       [&](int m, int j) { return out[m][2 * h + j] * now; });
    }
    count_self(states);
  }

  // For the warp's rows that saw no other key in this round or an earlier one: counts how often they met their own key.
  __device__ void count_self(const float (&states)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool is_query = rows[h].query->row != kNone;
      const uint32_t wanted = __ballot_sync(~0u, is_query && rows[h].total <= 0.f && SelfOnlyState::is(states[h]));
      if (wanted == 0) continue;
      for (int owner = 0; owner < kWarp; owner += 4) {
        if ((wanted >> owner & 1) == 0) continue;
        const int position = __shfl_sync(~0u, rows[h].query->row, owner),
                  slot = __shfl_sync(~0u, rows[h].query->slot, owner);
        const int first = __shfl_sync(~0u, rows[h].query->first_slot, owner),
                  seen = __shfl_sync(~0u, rows[h].query->n_slots, owner);
        SelfOnlyState state = SelfOnlyState::decode(__shfl_sync(~0u, states[h], owner));
        const bool padded = Block::is_padded(position);
        uint32_t times = 0, kept = 0;
        for (int at = lane; p.shared_qk && !padded && at < seen; at += kWarp) {
          if (sequence.position(first + at) != position) continue;
          if (sequence.has_score_mod && p.has(kWithinBucket) &&
              sequence.wrapped(first + at) / sequence.length != p.round)
            continue;
          times += 1, kept += !p.dropout || Block::is_kept(slot, at);
        }
        state.times += __reduce_add_sync(~0u, times), state.kept += __reduce_add_sync(~0u, kept);
        if (last_round)
          write_self(position, state);
        else if (lane == 0)
          p.lse[sequence.head_row + position] = state.encode();
      }
    }
  }

  // Writes the result of a query that saw no other key: its own value, or zeros if it may not see its own key either.
  __device__ void write_self(int position, const SelfOnlyState& state) const {
    const int row = sequence.offset + position;
    const T* query = row_of<T>(p.query, sequence.b, sequence.h, row);
    const T* value = row_of<T>(p.value, sequence.b, sequence.key_head, row);
    T* to = row_of<T>(p.out, sequence.b, sequence.h, row);
    float square = 0.f;
    for (int d = lane; d < p.D; d += kWarp) square = fmaf(to_float(query[d]), to_float(query[d]), square);
    square = warp_sum(square);
    const float score = p.scale * square / key_length(p, square);
    const float weight = state.times ? p.keep_factor * state.kept / state.times : 0.f;
    for (int e = lane; e < p.E; e += kWarp) to[e] = from_float<T>(state.times ? weight * to_float(value[e]) : 0.f);
    if (lane != 0) return;
    const float times = sequence.has_score_mod && p.has(kDedup) ? 1.f : static_cast<float>(state.times);
    p.lse[sequence.head_row + position] = state.times ? score + logf(times) : -INFINITY;
    if (p.self_only) p.self_only[sequence.head_row + position] = state.times > 0;
  }
};

template <class T, int K_STEPS>
__global__ void __launch_bounds__(kAttentionThreads, K_STEPS > 4 ? 2 : 3)
    attention_forward_kernel(const __grid_constant__ AttentionArguments p) {
  run<AttentionForward<T, K_STEPS>>(p, p.H);
}

}  // namespace rk::cuda
