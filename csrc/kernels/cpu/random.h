// Philox4x32-10 (Salmon et al. 2011): dropout factors as a function of seed, head, round, query slot and window slot.
#pragma once

namespace rk::cpu::RK_ISA {

// words[w][lane]: the four words of the counter (group, query_slot[lane], round, head).
inline void philox(uint64_t seed, uint32_t group, const uint32_t* query_slot, uint32_t round, uint32_t head,
                   uint32_t (&words)[4][kQueries]) {
  for (int l = 0; l < kQueries; ++l) {
    uint32_t c0 = group, c1 = query_slot[l], c2 = round, c3 = head;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int i = 0; i < 10; ++i) {
      const uint64_t p0 = uint64_t{0xD2511F53} * c0, p1 = uint64_t{0xCD9E8D57} * c2;
      c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
      c1 = static_cast<uint32_t>(p1);
      c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
      c3 = static_cast<uint32_t>(p0);
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    words[0][l] = c0, words[1][l] = c1, words[2][l] = c2, words[3][l] = c3;
  }
}

// drop [keys][64]: the factor of every pair of a block whose first key has place `first` in the window.
template <class T>
RK_NOINLINE void dropout_block(const AttentionParams& p, const Unit& u, int64_t query_start, int64_t first, int keys,
                               T* drop) {
  uint32_t slot[kQueries], words[4][kQueries];
  for (int l = 0; l < kQueries; ++l) slot[l] = static_cast<uint32_t>(query_start % u.L + l);
  const T keep = static_cast<T>(p.keep_factor);
  for (int64_t group = first / 4; group * 4 < first + keys; ++group) {
    philox(p.dropout_seed, static_cast<uint32_t>(group), slot, u.round(query_start), static_cast<uint32_t>(u.index),
           words);
    for (int w = 0; w < 4; ++w) {
      const int64_t i = group * 4 + w - first;
      if (i < 0 || i >= keys) continue;
      for (int l = 0; l < kQueries; ++l) drop[i * kQueries + l] = words[w][l] >= p.drop_threshold ? keep : T(0);
    }
  }
}

}  // namespace rk::cpu::RK_ISA
