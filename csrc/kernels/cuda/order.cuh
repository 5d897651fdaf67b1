// Stable counting sort of bucket numbers.
//
// A warp counts a contiguous run of keys in 16-bit counters of its own; a scan over buckets, and within a bucket over
// warps, turns counts into positions; then each warp goes through its run again and hands them out in order. The lanes
// with equal keys are found bit by bit: on an H200 `match.any` alone took 74 clocks of a multiprocessor. One block
// sorts a segment (a sequence in a round of a head) of up to 64K keys. Of longer ones several blocks count a part each,
// one block a segment adds up, and the first ones hand out. More buckets than fit are sorted digit by digit.
#pragma once
#include "kernels/cuda/scan.cuh"

namespace rk::cuda {

struct OrderArguments {
  const int32_t* buckets;      // [segments of all rows and rounds: rows * rounds, L]
  const int32_t* input_order;  // where keys of a later digit are taken from, like order; or null
  int32_t* order;              // a row's slots, sequence by sequence, in each its rounds
  int32_t* counts;             // [segments, tiles, base] where a segment has several tiles
  const int32_t* cu_seqlens;   // as in OrderParams
  int64_t L, heads, rounds, n_sequences, bounds_stride;
  uint32_t last;                          // bucket; a larger number, as of a negative one, counts as it
  uint32_t divisor;                       // digit = bucket / divisor % base
  int base, pairs, tile, tiles, sorters;  // pairs of counters
};

// A sequence in a round of a head: where its keys and its slots begin.
struct OrderSegment {
  int64_t keys, slots;
  int length;
};

__device__ __forceinline__ OrderSegment order_segment(const OrderArguments& p, int64_t number) {
  const int64_t row_round = number / p.n_sequences, sequence = number % p.n_sequences;
  const int64_t row = row_round / p.rounds, round = row_round % p.rounds;
  const int32_t* bounds = p.cu_seqlens ? p.cu_seqlens + row / p.heads * p.bounds_stride + sequence : nullptr;
  const int64_t begin = bounds ? bounds[0] : 0, length = bounds ? bounds[1] - begin : p.L;
  return {row_round * p.L + begin, row * p.rounds * p.L + p.rounds * begin + round * length, static_cast<int>(length)};
}

enum class OrderPart { kAll, kCount, kRank };  // of the work on a tile

// A block's share of a segment, and what is in shared memory.
struct OrderTile {
  const OrderArguments& p;
  OrderSegment segment;
  int first, count;    // keys of the segment
  uint16_t* counters;  // [sorters][2 * pairs]
  int pairs;

  __device__ int32_t position(int i) const {  // in the segment, of key i of the tile
    return p.input_order ? p.input_order[segment.slots + first + i] : first + i;
  }
  __device__ uint32_t digit(int i) const {
    const uint32_t bucket = min(static_cast<uint32_t>(p.buckets[segment.keys + position(i)]), p.last);
    return p.last < p.base ? bucket : bucket / p.divisor % p.base;
  }
  __device__ uint32_t& pair(int sorter, int pair) const {
    return reinterpret_cast<uint32_t*>(counters)[sorter * pairs + pair];
  }
  __device__ uint16_t* key_of_rank() const { return counters + p.sorters * 2 * pairs; }  // [tile], of the sorted keys
  __device__ uint16_t* digits() const { return key_of_rank() + p.tile; }                 // [tile], of a part's keys
  __device__ int32_t* slots() const { return reinterpret_cast<int32_t*>(digits() + p.tile); }  // [base], of a part
};

// The lanes of the warp that have this lane's digit.
__device__ __forceinline__ uint32_t lanes_with(uint32_t digit, bool inside, int bits) {
  constexpr int kUnrolled = 4;
  uint32_t peers = __ballot_sync(~0u, inside);
  for (int bit = 0; bit < bits; bit += kUnrolled, digit >>= kUnrolled) {
#pragma unroll
    for (int i = 0; i < kUnrolled; ++i) {
      const bool set = digit >> i & 1;
      const uint32_t others = __ballot_sync(~0u, set);
      peers &= set ? others : ~others;
    }
  }
  return peers;
}

// Calls use(i, inside, digit_of(i)) for the warp's keys in their order, 32 at a time; AHEAD loads are on the way
// together.
template <int AHEAD, class Digit, class Use>
__device__ __forceinline__ void for_keys(const OrderTile& tile, int warp, int lane, Digit&& digit_of, Use&& use) {
  const int sorters = tile.p.sorters, run = (tile.count + sorters * kWarp - 1) / (sorters * kWarp) * kWarp;
  const int end = min((warp + 1) * run, tile.count);
  for (int start = warp * run; start < end; start += AHEAD * kWarp) {
    uint32_t digits[AHEAD];
#pragma unroll
    for (int a = 0; a < AHEAD; ++a) {
      const int i = start + a * kWarp + lane;
      digits[a] = i < end ? digit_of(i) : 0;
    }
#pragma unroll
    for (int a = 0; a < AHEAD; ++a) {
      const int i = start + a * kWarp + lane;
      if (i - lane < end) use(i, i < end, digits[a]);
    }
  }
}

// Counters of all warps become the first rank of each: after smaller digits, and after the same one of earlier warps.
__device__ __forceinline__ void counts_to_ranks(const OrderTile& tile, int* sums) {
  int carry = 0;
  for (int first = 0; first < tile.pairs; first += blockDim.x) {
    const int pair = first + threadIdx.x;
    const bool inside = pair < tile.pairs;
    int low = 0, high = 0;
    for (int w = 0; inside && w < tile.p.sorters; ++w) {
      const uint32_t counts = tile.pair(w, pair);
      low += counts & 0xffff, high += counts >> 16;
    }
    const Scan scan = scan_block(low + high, sums);
    high = carry + scan.before + low;
    low = carry + scan.before;
    carry += scan.total;
    for (int w = 0; inside && w < tile.p.sorters; ++w) {
      uint32_t& counters = tile.pair(w, pair);
      const uint32_t counts = counters;
      counters = (low & 0xffff) | static_cast<uint32_t>(high) << 16;
      low += counts & 0xffff, high += counts >> 16;
    }
  }
}

// Of a part two blocks fit into a multiprocessor.
template <OrderPart PART>
__global__ void __launch_bounds__(kOrderMaxThreads, PART == OrderPart::kAll ? 1 : 2)
    order_kernel(const __grid_constant__ OrderArguments p) {
  RK_DYNAMIC_SHARED(memory);
  __shared__ int sums[kOrderMaxThreads / kWarp];
  constexpr int kAhead = PART == OrderPart::kAll ? 8 : 4;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  OrderTile tile{p, order_segment(p, blockIdx.x / p.tiles)};
  tile.first = static_cast<int>(blockIdx.x % p.tiles) * p.tile;
  tile.count = min(tile.segment.length - tile.first, p.tile);  // below 0 in a sequence that has fewer parts
  tile.counters = reinterpret_cast<uint16_t*>(memory);
  tile.pairs = p.pairs;

  const auto load_digit = [&](int i) { return tile.digit(i); };
  for (int i = threadIdx.x; i < p.sorters * tile.pairs; i += blockDim.x) tile.pair(0, i) = 0;
  __syncthreads();
  if (warp < p.sorters)
    for_keys<kAhead>(tile, warp, lane, load_digit, [&](int i, bool inside, uint32_t digit) {
      if (!inside) return;
      atomicAdd(&tile.pair(warp, digit / 2), digit % 2 ? 1u << 16 : 1u);
      if constexpr (PART == OrderPart::kRank) tile.digits()[i] = static_cast<uint16_t>(digit);
    });
  __syncthreads();

  int32_t* of_tile = p.counts + static_cast<int64_t>(blockIdx.x) * p.base;  // counts of a part, then its first slots
  if constexpr (PART == OrderPart::kCount) {
    for (int i = threadIdx.x; i < p.base; i += blockDim.x) {
      int sum = 0;
      for (int w = 0; w < p.sorters; ++w) sum += tile.counters[w * 2 * tile.pairs + i];
      of_tile[i] = sum;
    }
    return;
  }
  counts_to_ranks(tile, sums);
  __syncthreads();
  if constexpr (PART == OrderPart::kRank) {  // what to add to a key's rank in the tile for its slot
    for (int i = threadIdx.x; i < p.base; i += blockDim.x) tile.slots()[i] = of_tile[i] - tile.counters[i];
    __syncthreads();
  }
  if (warp < p.sorters) {
    uint16_t* counters = tile.counters + warp * 2 * tile.pairs;
    const int bits = 32 - __clz(p.base - 1);
    const auto digit_again = [&](int i) -> uint32_t {
      if constexpr (PART == OrderPart::kRank) return tile.digits()[i];
      return tile.digit(i);
    };
    for_keys<kAhead>(tile, warp, lane, digit_again, [&](int i, bool inside, uint32_t digit) {
      const uint32_t peers = lanes_with(digit, inside, bits);
      const int rank = counters[digit] + __popc(peers & ((1u << lane) - 1));
      __syncwarp();
      if (inside) {
        if (peers >> lane == 1) counters[digit] = static_cast<uint16_t>(rank + 1);  // the last of them
        tile.key_of_rank()[rank] = static_cast<uint16_t>(i);
      }
      __syncwarp();
    });
  }
  __syncthreads();
  for (int i = threadIdx.x; i < tile.count; i += blockDim.x) {
    const int key = tile.key_of_rank()[i];
    const int slot = PART == OrderPart::kRank ? tile.slots()[tile.digits()[key]] + i : i;
    p.order[tile.segment.slots + slot] = tile.position(key);
  }
}

// counts [tiles, base] of a segment become the first slots: one block a segment, one thread a bucket.
static_assert(kOrderPartBase <= kOrderMaxThreads);
__global__ void __launch_bounds__(kOrderMaxThreads, 1) order_counts_kernel(const __grid_constant__ OrderArguments p) {
  __shared__ int sums[kOrderMaxThreads / kWarp];
  int32_t* counts = p.counts + static_cast<int64_t>(blockIdx.x) * p.tiles * p.base;
  const int bucket = threadIdx.x, tiles = bucket < p.base ? p.tiles : 0;
  int sum = 0;
  for (int t = 0; t < tiles; ++t) sum += counts[t * p.base + bucket];
  int slot = scan_block(sum, sums).before;
  for (int t = 0; t < tiles; ++t) {
    const int count = counts[t * p.base + bucket];
    counts[t * p.base + bucket] = slot;
    slot += count;
  }
}

}  // namespace rk::cuda
