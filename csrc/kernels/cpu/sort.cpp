// Stable counting sort of bucket numbers: scalar code, the same for every instruction set.
#include <algorithm>
#include <atomic>
#include <numeric>
#include <vector>

#include "kernels/cpu/kernels.h"

namespace rk::cpu {
namespace {

// A histogram far larger than the row costs more than comparing.
bool histogram_pays(int64_t n_buckets, int64_t length) { return n_buckets <= 4096 || n_buckets <= 8 * length; }

int64_t count_invalid(const int32_t* bucket, int64_t length, int64_t n_buckets) {
  int64_t invalid = 0;
  for (int64_t i = 0; i < length; ++i) invalid += bucket[i] < 0 || bucket[i] >= n_buckets;
  return invalid;
}

void counting_sort(const int32_t* bucket, int64_t length, int64_t n_buckets, int32_t* order,
                   std::vector<int32_t>& scratch) {
  // Four histograms, so that equal neighbours do not wait for each other's store.
  scratch.assign(4 * n_buckets, 0);
  int32_t* h = scratch.data();
  int64_t i = 0;
  for (; i + 4 <= length; i += 4)
    for (int u = 0; u < 4; ++u) ++h[u * n_buckets + bucket[i + u]];
  for (; i < length; ++i) ++h[bucket[i]];
  int32_t start = 0;
  for (int64_t k = 0; k < n_buckets; ++k) {
    const int32_t count = h[k] + h[n_buckets + k] + h[2 * n_buckets + k] + h[3 * n_buckets + k];
    h[k] = start;
    start += count;
  }
  for (i = 0; i < length; ++i) order[h[bucket[i]]++] = static_cast<int32_t>(i);
}

void comparison_sort(const int32_t* bucket, int64_t length, int32_t* order) {
  std::iota(order, order + length, 0);
  std::stable_sort(order, order + length, [&](int32_t a, int32_t b) { return bucket[a] < bucket[b]; });
}

}  // namespace

int64_t bucket_order(const OrderParams& p, const Threads& threads) {
  const int32_t whole[2] = {0, static_cast<int32_t>(p.L)};
  const int32_t* bounds = p.cu_seqlens ? p.cu_seqlens : whole;
  const int64_t segments = p.rows * p.rounds;
  std::atomic<int64_t> invalid{0};
  std::vector<std::vector<int32_t>> scratch(threads.count);
  if (histogram_pays(p.n_buckets, p.L))  // reserved here, where running out of memory can be reported
    for (auto& s : scratch) s.reserve(4 * p.n_buckets);
  threads.for_each_worker([&](int worker) {
    for (int64_t i = segments * worker / threads.count; i < segments * (worker + 1) / threads.count; ++i) {
      const int64_t row = i / p.rounds, round = i % p.rounds;
      for (int64_t s = 0; s < p.n_sequences; ++s) {
        const int64_t begin = bounds[s], length = bounds[s + 1] - begin;
        const int32_t* bucket = p.buckets + i * p.L + begin;
        int32_t* order = p.order + row * p.rounds * p.L + p.rounds * begin + round * length;
        if (const int64_t bad = count_invalid(bucket, length, p.n_buckets)) {
          invalid += bad;
        } else if (histogram_pays(p.n_buckets, length)) {
          counting_sort(bucket, length, p.n_buckets, order, scratch[worker]);
        } else {
          comparison_sort(bucket, length, order);
        }
      }
    }
  });
  return invalid;
}

}  // namespace rk::cpu
