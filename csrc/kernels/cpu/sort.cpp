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

// Whether all of bucket[0 ... length) are in [0, n_buckets): without branches, so that it is vectorized.
bool valid(const int32_t* bucket, int64_t length, int64_t n_buckets) {
  uint32_t bad = 0;
  for (int64_t i = 0; i < length; ++i) {
    const uint32_t b = static_cast<uint32_t>(bucket[i]);
    bad |= b | (static_cast<uint32_t>(n_buckets) - 1 - b);
  }
  return bad >> 31 == 0;
}

// False if a bucket is out of range. Two halves with counters of their own: a position depends on the last store to its
// counter, and two such chains overlap.
bool counting_sort(const int32_t* bucket, int64_t length, int64_t n_buckets, int32_t* order,
                   std::vector<int32_t>& scratch) {
  constexpr int64_t kBlock = 1024;  // stays in the first cache between checking and counting
  scratch.assign(2 * n_buckets, 0);
  int32_t *low = scratch.data(), *high = low + n_buckets;
  const int64_t half = length / 2;
  const int32_t* upper = bucket + half;
  for (int64_t begin = 0; begin < half; begin += kBlock) {
    const int64_t end = std::min(half, begin + kBlock);
    if (!valid(bucket + begin, end - begin, n_buckets) || !valid(upper + begin, end - begin, n_buckets)) return false;
    for (int64_t i = begin; i < end; ++i) ++low[bucket[i]], ++high[upper[i]];
  }
  const bool odd = length % 2;
  if (odd) {
    if (!valid(upper + half, 1, n_buckets)) return false;
    ++high[upper[half]];
  }
  int32_t start = 0;
  for (int64_t k = 0; k < n_buckets; ++k) {
    const int32_t in_low = low[k], in_high = high[k];
    low[k] = start, high[k] = start + in_low;
    start += in_low + in_high;
  }
  for (int64_t i = 0; i < half; ++i) {
    order[low[bucket[i]]++] = static_cast<int32_t>(i);
    order[high[upper[i]]++] = static_cast<int32_t>(half + i);
  }
  if (odd) order[high[upper[half]]++] = static_cast<int32_t>(length - 1);
  return true;
}

bool comparison_sort(const int32_t* bucket, int64_t length, int64_t n_buckets, int32_t* order) {
  if (!valid(bucket, length, n_buckets)) return false;
  std::iota(order, order + length, 0);
  std::stable_sort(order, order + length, [&](int32_t a, int32_t b) { return bucket[a] < bucket[b]; });
  return true;
}

}  // namespace

int64_t bucket_order(const OrderParams& p, const Threads& threads) {
  const int32_t whole[2] = {0, static_cast<int32_t>(p.L)};
  const int32_t* bounds = p.cu_seqlens ? p.cu_seqlens : whole;
  const int64_t segments = p.rows * p.rounds;
  std::atomic<int64_t> invalid{0};
  std::vector<std::vector<int32_t>> scratch(threads.count);
  if (histogram_pays(p.n_buckets, p.L))  // reserved here, where running out of memory can be reported
    for (auto& s : scratch) s.reserve(2 * p.n_buckets);
  threads.for_each_worker([&](int worker) {
    for (int64_t i = segments * worker / threads.count; i < segments * (worker + 1) / threads.count; ++i) {
      const int64_t row = i / p.rounds, round = i % p.rounds;
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
