// Philox4x32-10 (Salmon et al. 2011): dropout factors as a function of seed, head, round, query slot and window index.
#pragma once
#include "kernels/cpu/chunk.h"

namespace rk::cpu::RK_ISA {

typedef uint64_t Wide __attribute__((vector_size(RK_VECTOR_BYTES), aligned(4), may_alias));

// The products of the low halves of the lanes. Vector extensions have only the whole product, of which compilers make
// several instructions.
RK_INLINE Wide multiply_low(Wide a, Wide b) {
#ifdef RK_MULTIPLY_LOW
  return reinterpret_cast<Wide>(RK_MULTIPLY_LOW(a, b));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// Words 0 to 3, in the low halves of the lanes. The high halves are not used.
struct PhiloxState {
  Wide c0, c1, c2, c3;
  RK_INLINE void step(uint32_t k0, uint32_t k1) {
    const Wide p0 = multiply_low(c0, Wide{} + 0xD2511F53u), p1 = multiply_low(c2, Wide{} + 0xCD9E8D57u);
    c0 = (p1 >> 32) ^ c1 ^ k0, c1 = p1;
    c2 = (p0 >> 32) ^ c3 ^ k1, c3 = p0;
  }
};

// words[w][lane]: word w of the counter (group, query_slot[lane], round, head).
inline void philox(uint64_t seed, uint32_t group, const uint32_t* query_slot, uint32_t round, uint32_t head,
                   uint32_t (&words)[4][kQueries]) {
  for (int l = 0; l < kQueries; l += kLanes<float>) {
    const Wide slots = *reinterpret_cast<const Wide*>(query_slot + l), zero{};
    PhiloxState even{zero + group, slots, zero + round, zero + head}, odd = even;
    odd.c1 = slots >> 32;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int i = 0; i < 10; ++i, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) even.step(k0, k1), odd.step(k0, k1);
    const Wide low_of[] = {even.c0, even.c1, even.c2, even.c3}, high_of[] = {odd.c0, odd.c1, odd.c2, odd.c3};
    for (int w = 0; w < 4; ++w) *reinterpret_cast<Wide*>(words[w] + l) = (low_of[w] & 0xffffffffu) | (high_of[w] << 32);
  }
}

// Writes drop [keys][64], the dropout factor of every pair. Query l is slot slot_in_chunk[l] of the chunk that starts
// at chunk_start. Key i has the window index first + i and the row row_of[i].
template <class T>
RK_NOINLINE void dropout_block(const AttentionParams& p, const HeadSequence& seq, int64_t chunk_start,
                               const int32_t* slot_in_chunk, int queries, int64_t first, const int32_t* row_of,
                               int keys, T* drop) {
  uint32_t slot[kQueries], words[4][kQueries];
  for (int l = 0; l < kQueries; ++l)
    slot[l] = static_cast<uint32_t>(chunk_start % seq.L + slot_in_chunk[l < queries ? l : 0]);
  const T keep = static_cast<T>(p.keep_factor);
  const uint64_t seed = static_cast<uint64_t>(*p.dropout_seed);
  for (int64_t group = first / 4; group * 4 < first + keys; ++group) {
    philox(seed, static_cast<uint32_t>(group), slot, seq.round(chunk_start), static_cast<uint32_t>(seq.dropout_index),
           words);
    for (int w = 0; w < 4; ++w) {
      const int64_t i = group * 4 + w - first;
      if (i < 0 || i >= keys) continue;
      T* row = drop + row_of[i] * kQueries;
      for (int l = 0; l < kQueries; ++l) row[l] = words[w][l] >= p.drop_threshold ? keep : T(0);
    }
  }
}

}  // namespace rk::cpu::RK_ISA
