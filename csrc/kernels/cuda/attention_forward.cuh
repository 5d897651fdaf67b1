// Chunk attention, forward: one round, merged in place into what earlier rounds left.
//
// A query that has met nothing but its own key so far has as lse how often it met it and kept it (`OnlySelf`), for it
// attends that key if it meets no other in any round.
#pragma once
#include "kernels/cuda/attention.cuh"

namespace rk::cuda {

// A state of lse: only own keys so far, which were met `times` times and of these kept by dropout. A NaN, of a sign and
// with bits that no arithmetic gives.
struct OnlySelf {
  static constexpr uint32_t kTag = 0xffe00000u;
  uint32_t times, kept;

  __device__ static float nothing() { return __uint_as_float(kTag); }
  __device__ float encode() const { return __uint_as_float(kTag | times << 10 | kept); }
  __device__ static bool is(float state) { return (__float_as_uint(state) & kTag) == kTag; }
  __device__ static OnlySelf decode(float state) {
    const uint32_t bits = __float_as_uint(state);
    return {bits >> 10 & 1023, bits & 1023};
  }
};

// One of a lane's two rows, and its softmax so far.
struct QueryRow {
  const Query* query;  // in shared memory
  float highest, total;
};

template <class T, int STEPS>
struct AttentionForward : AttentionBlock<T, STEPS, 1, QueryFacts, KeyFacts> {
  using Block = AttentionBlock<T, STEPS, 1, QueryFacts, KeyFacts>;
  using Block::lane, Block::p, Block::sequence, Block::warp;
  static constexpr int kColumns = 2 * STEPS, kKeys = kAttentionRows / 8;  // tiles of 8

  OwnRows<T, STEPS, true> queries;
  QueryRow rows[2];
  float out[kColumns][4];
  bool last_round;

  __device__ void run() {
    last_round = p.round == sequence.rounds - 1;
    Block::walk_queries(
        nullptr, [&](int place) { begin(place); },
        [&](int slot, int place, const Visits& visits) { attend(slot, place, visits); }, [&] { finish(); });
  }

  __device__ void begin(int place) {
    queries.take(p.lead ? Block::tile(place, 0) : Block::own_tile(0), warp, lane);
#pragma unroll
    for (int h = 0; h < 2; ++h) rows[h] = {Block::own_facts().query + warp * 16 + h * 8 + lane / 4, -INFINITY, 0.f};
#pragma unroll
    for (int m = 0; m < kColumns; ++m)
#pragma unroll
      for (int j = 0; j < 4; ++j) out[m][j] = 0.f;
  }

  // The keys from `slot` on.
  __device__ void attend(int slot, int place, const Visits& visits) {
    if (sequence.rules) Block::fill_bias(slot, visits.slot, place);
    const bool all_see = visits.all_see(slot);
    if (!all_see && !Block::any_sees(rows[0].query->slots(), rows[1].query->slots(), slot)) return;
    const KeyFacts& facts = Block::facts(place);
    // Of a causal query the limit leaves out its own key.
    const bool excludes = p.shared ? !p.causal : p.lists && p.round > 0;
    float s[kKeys][4] = {};
    multiply_rows(s, queries, Block::tile(place, 0), 0, warp, lane);
#pragma unroll
    for (int n = 0; n < kKeys; ++n) {
      const int column = n * 8 + lane % 4 * 2;
      const int2 key = *reinterpret_cast<const int2*>(facts.position + column);
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
    if (sequence.rules) {
      Block::add_bias(
          s, [&](int n, int j) { return Block::bias(warp * 16 + j / 2 * 8 + lane / 4)[n * 8 + lane % 4 * 2 + j % 2]; });
    }
    if (!all_see) {
#pragma unroll
      for (int n = 0; n < kKeys; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const Query& query = *rows[j / 2].query;
          const uint32_t at = slot + n * 8 + lane % 4 * 2 + j % 2 - query.first;
          if (at >= static_cast<uint32_t>(query.seen)) s[n][j] = -INFINITY;
        }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      QueryRow& row = rows[h];
      float highest = row.highest;
#pragma unroll
      for (int n = 0; n < kKeys; ++n) highest = fmaxf(highest, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
      highest = quad_max(highest);
      // Of a row that sees nothing yet all exponentials are to be 0.
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
      const uint32_t kept = Block::template kept_bits<4 * kKeys>(
          [&](int i) { return i & 2 ? rows[1].query->slot : rows[0].query->slot; },
          [&](int i) {
            return slot + i / 4 * 8 + lane % 4 * 2 + i % 2 - (i & 2 ? rows[1].query->first : rows[0].query->first);
          });
      Block::drop(s, kept);
    }
    multiply_columns<T, STEPS>(out, s, Block::tile(place, 1), 0, lane);
  }

  // Merges the lane's two rows of this round into those of earlier ones.
  __device__ void finish() {
    float states[2];  // what earlier rounds left
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool some = p.round > 0 && rows[h].query->row != kNobody;
      states[h] = some ? p.lse[sequence.head_row + rows[h].query->row] : OnlySelf::nothing();
    }
    __syncwarp();  // all lanes of a row have read it
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      QueryRow& row = rows[h];
      row.total = quad_sum(row.total);
      const bool is_query = row.query->row != kNobody, some = !(row.total <= 0.f);  // or NaN
      const bool more = !OnlySelf::is(states[h]);
      const float lse = some ? row.highest + log2f(row.total) : -INFINITY;
      const float above = more && !(lse > states[h]) ? states[h] : lse;
      const float earlier = more ? exp2f(states[h] - above) : 0.f, sum = earlier + (some ? exp2f(lse - above) : 0.f);
      const float before = earlier / sum, now = some ? exp2f(lse - above) / (sum * row.total) : 0.f;
      const float merged = above + log2f(sum);
      if (is_query && (some || more) && lane % 4 == 0) {
        p.lse[sequence.head_row + row.query->row] = last_round ? merged * kLn2 : merged;
        if (last_round && p.self_only) p.self_only[sequence.head_row + row.query->row] = false;
      }
      T* to = row_of<T>(p.out, sequence.b, sequence.h, sequence.offset + max(row.query->row, 0));
      Block::write_row(to, p.E, is_query && some, more, before, [&](int m, int j) { return out[m][2 * h + j] * now; });
    }
    count_own(states);
  }

  // Rows of the warp that saw no other key in this round, nor in an earlier one: how often they met their own.
  __device__ void count_own(const float (&states)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool is_query = rows[h].query->row != kNobody;
      const uint32_t wanted = __ballot_sync(~0u, is_query && rows[h].total <= 0.f && OnlySelf::is(states[h]));
      if (wanted == 0) continue;
      for (int owner = 0; owner < kWarp; owner += 4) {
        if ((wanted >> owner & 1) == 0) continue;
        const int position = __shfl_sync(~0u, rows[h].query->row, owner),
                  slot = __shfl_sync(~0u, rows[h].query->slot, owner);
        const int first = __shfl_sync(~0u, rows[h].query->first, owner),
                  seen = __shfl_sync(~0u, rows[h].query->seen, owner);
        OnlySelf own = OnlySelf::decode(__shfl_sync(~0u, states[h], owner));
        const bool padded = Block::is_padded(position);
        uint32_t times = 0, kept = 0;
        for (int at = lane; p.shared && !padded && at < seen; at += kWarp) {
          if (sequence.position(first + at) != position) continue;
          if (sequence.rules && p.within_bucket && sequence.wrapped(first + at) / sequence.length != p.round) continue;
          times += 1, kept += !p.dropout || Block::is_kept(slot, at);
        }
        own.times += __reduce_add_sync(~0u, times), own.kept += __reduce_add_sync(~0u, kept);
        if (last_round)
          write_own(position, own);
        else if (lane == 0)
          p.lse[sequence.head_row + position] = own.encode();
      }
    }
  }

  // A query that saw nothing but itself attends itself, or nothing at all.
  __device__ void write_own(int position, const OnlySelf& own) const {
    const int row = sequence.offset + position;
    const T* query = row_of<T>(p.query, sequence.b, sequence.h, row);
    const T* value = row_of<T>(p.value, sequence.b, sequence.key_head, row);
    T* to = row_of<T>(p.out, sequence.b, sequence.h, row);
    float square = 0.f;
    for (int d = lane; d < p.D; d += kWarp) square = fmaf(to_float(query[d]), to_float(query[d]), square);
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) square += __shfl_xor_sync(~0u, square, step);
    const float score = p.scale * square / key_length(p, square);
    const float weight = own.times ? p.keep_factor * own.kept / own.times : 0.f;
    for (int e = lane; e < p.E; e += kWarp) to[e] = from_float<T>(own.times ? weight * to_float(value[e]) : 0.f);
    if (lane != 0) return;
    const float times = sequence.rules && p.dedup ? 1.f : static_cast<float>(own.times);
    p.lse[sequence.head_row + position] = own.times ? score + logf(times) : -INFINITY;
    if (p.self_only) p.self_only[sequence.head_row + position] = own.times > 0;
  }
};

template <class T, int STEPS>
__global__ void __launch_bounds__(kAttentionThreads, STEPS == 8 ? 2 : 3)
    attention_forward_kernel(const __grid_constant__ AttentionArguments p) {
  run<AttentionForward<T, STEPS>>(p, p.H);
}

}  // namespace rk::cuda
