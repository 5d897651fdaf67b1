// Stable counting sort of bucket numbers: scalar code, the same for every instruction set.
#include <algorithm>
#include <atomic>
#include <bit>
#include <numeric>
#include <vector>

#include "kernels/cpu/kernels.h"

namespace rk::cpu {
namespace {

// A histogram far larger than the row costs more than comparing.
bool histogram_pays(int64_t n_buckets, int64_t length) { return n_buckets <= 4096 || n_buckets <= 8 * length; }

// Whether all of bucket[0 ... length) are in [0, n_buckets): without branches, so that it is vectorized.
bool valid(const int32_t* bucket, int64_t length, int64_t n_buckets) {
  uint32_t bad = 0;
  for (int64_t i = 0; i < length; ++i) {
    const uint32_t b = static_cast<uint32_t>(bucket[i]);
    bad |= b | (static_cast<uint32_t>(n_buckets) - 1 - b);
  }
  return bad >> 31 == 0;
}

}  // namespace

bool counting_sort(const int32_t* bucket, int64_t length, int64_t n_buckets, int32_t* order,
                   std::vector<int32_t>& scratch) {
  // Counters for a power of two of buckets, so that whatever comes finds one; what came is judged afterwards. Two of
  // them a bucket: of equal neighbours the second would wait for the first.
  const int64_t size = std::bit_ceil(static_cast<uint64_t>(n_buckets));
  const uint32_t mask = static_cast<uint32_t>(size - 1);
  scratch.assign(2 * size, 0);
  int32_t *start = scratch.data(), *odd = start + size;
  uint32_t seen = 0;
  auto count = [&](int32_t* counter, int64_t i) {
    const uint32_t b = static_cast<uint32_t>(bucket[i]);
    seen |= b;
    ++counter[b & mask];
  };
  constexpr int64_t kLine = 16;  // of order, which is cold: counting is quick enough to fetch it meanwhile
  int64_t i = 0;
  for (; i + kLine <= length; i += kLine) {
    __builtin_prefetch(order + i, 1);
    __builtin_prefetch(bucket + i + 16 * kLine);
    for (int64_t k = i; k < i + kLine; k += 2) count(start, k), count(odd, k + 1);
  }
  for (; i < length; ++i) count(start, i);
  int32_t sum = 0;
  for (int64_t k = 0; k < n_buckets; ++k) {
    const int32_t n = start[k] + odd[k];
    start[k] = sum;
    sum += n;
  }
  if (seen & ~mask || sum != length) return false;
  for (i = 0; i < length; ++i) order[start[bucket[i]]++] = static_cast<int32_t>(i);
  return true;
}

namespace {

bool comparison_sort(const int32_t* bucket, int64_t length, int64_t n_buckets, int32_t* order) {
  if (!valid(bucket, length, n_buckets)) return false;
  std::iota(order, order + length, 0);
  std::stable_sort(order, order + length, [&](int32_t a, int32_t b) { return bucket[a] < bucket[b]; });
  return true;
}

}  // namespace

int64_t bucket_order(const OrderParams& p, const Threads& threads) {
  const int32_t whole[2] = {0, static_cast<int32_t>(p.L)};
  const int64_t segments = p.rows * p.rounds;
  std::atomic<int64_t> invalid{0};
  std::vector<std::vector<int32_t>> scratch(threads.count);
  if (histogram_pays(p.n_buckets, p.L))  // reserved here, where running out of memory can be reported
    for (auto& s : scratch) s.reserve(2 * std::bit_ceil(static_cast<uint64_t>(p.n_buckets)));
  threads.for_each_worker([&](int worker) {
    for (int64_t i = segments * worker / threads.count; i < segments * (worker + 1) / threads.count; ++i) {
      const int64_t row = i / p.rounds, round = i % p.rounds;
      const int32_t* bounds = p.cu_seqlens ? p.cu_seqlens + row / p.heads * p.bounds_stride : whole;
      for (int64_t s = 0; s < p.n_sequences; ++s) {
        const int64_t begin = bounds[s], length = bounds[s + 1] - begin;
        const int32_t* bucket = p.buckets + i * p.L + begin;
        int32_t* order = p.order + row * p.rounds * p.L + p.rounds * begin + round * length;
        const bool sorted = histogram_pays(p.n_buckets, length)
                                ? counting_sort(bucket, length, p.n_buckets, order, scratch[worker])
                                : comparison_sort(bucket, length, p.n_buckets, order);
        if (!sorted) ++invalid;
      }
    }
  });
  return invalid;
}

}  // namespace rk::cpu
