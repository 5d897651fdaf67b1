// Philox4x32-10 (Salmon et al. 2011): dropout factors as a function of seed, head, round, query slot and window slot.
#pragma once

namespace rk::cpu::RK_ISA {

// words[w][lane]: the four words of the counter (group, query_slot[lane], round, head). Low and high halves of the
// products are written apart, and the ten steps out, for the sake of the vectorizer.
inline void philox(uint64_t seed, uint32_t group, const uint32_t* query_slot, uint32_t round, uint32_t head,
                   uint32_t (&words)[4][kQueries]) {
  for (int l = 0; l < kQueries; ++l) {
    uint32_t c0 = group, c1 = query_slot[l], c2 = round, c3 = head;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    auto high = [](uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); };
    auto step = [&](int) RK_LAMBDA {
      const uint32_t m0 = 0xD2511F53u, m1 = 0xCD9E8D57u, h0 = high(c0, m0), h1 = high(c2, m1);
      const uint32_t l0 = c0 * m0, l1 = c2 * m1;
      c0 = h1 ^ c1 ^ k0, c1 = l1, c2 = h0 ^ c3 ^ k1, c3 = l0;
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    };
    [&]<int... I>(std::integer_sequence<int, I...>)
        RK_LAMBDA { (step(I), ...); }(std::make_integer_sequence<int, 10>{});
    words[0][l] = c0, words[1][l] = c1, words[2][l] = c2, words[3][l] = c3;
  }
}

// drop [keys][64]: the factor of every pair of queries and keys. Query l is slot place[l] of the chunk that starts at
// chunk_start; key i is at place first + i of the window and has row row_of[i].
template <class T>
RK_NOINLINE void dropout_block(const AttentionParams& p, const Unit& u, int64_t chunk_start, const int32_t* place,
                               int queries, int64_t first, const int32_t* row_of, int keys, T* drop) {
  uint32_t slot[kQueries], words[4][kQueries];
  for (int l = 0; l < kQueries; ++l) slot[l] = static_cast<uint32_t>(chunk_start % u.L + place[l < queries ? l : 0]);
  const T keep = static_cast<T>(p.keep_factor);
  for (int64_t group = first / 4; group * 4 < first + keys; ++group) {
    philox(p.dropout_seed, static_cast<uint32_t>(group), slot, u.round(chunk_start), static_cast<uint32_t>(u.index),
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
