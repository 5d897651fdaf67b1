// Philox4x32-10 (Salmon et al. 2011): dropout as a function of seed, head, round, query slot and window slot, like the
// CPU's.
#pragma once
#include "kernels/cuda/device.cuh"

namespace rk::cuda {

struct Words {
  uint32_t word[4];
};

__device__ __forceinline__ Words philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int i = 0; i < 10; ++i, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t p0 = uint64_t{c0} * 0xD2511F53u, p1 = uint64_t{c2} * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0, c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1, c3 = static_cast<uint32_t>(p0);
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace rk::cuda
