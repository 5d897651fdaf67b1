// Stable counting sort of bucket numbers.
//
// A warp counts the buckets of a contiguous run of keys in 16-bit counters. A scan over buckets, and within a bucket
// over warps, turns counts into ranks. Then each warp goes through its run again and gives the keys their ranks in
// order. Lanes with equal keys are found bit by bit: on an H200 `match.any` alone took 74 clocks of a multiprocessor.
//
// A segment is a sequence in a round of a head. One block sorts a segment of up to 64K keys. For longer segments
// several blocks count a part each, one block per segment adds the counts up, and the first blocks then rank. If there
// are more buckets than counters, keys are sorted digit by digit.
#pragma once
#include "kernels/cuda/scan.cuh"

namespace rk::cuda {

struct OrderArguments {
  const int32_t* buckets;      // [segments of all rows and rounds: rows * rounds, L]
  const int32_t* input_order;  // like order, the result for the digits before; null: keys are in their own order
  int32_t* order;              // [rows, rounds * L]: for each sequence its slots of all rounds
  int32_t* counts;             // [segments, tiles, base], used if a segment has several tiles
  const int32_t* cu_seqlens;   // as in OrderParams
  int64_t L, heads, rounds, n_sequences, bounds_stride;
  uint32_t last;                          // the last bucket; numbers out of range count as this bucket
  uint32_t divisor;                       // digit = bucket / divisor % base
  int base, pairs, tile, tiles, sorters;  // see OrderPlan; pairs: of counters
};

// Where the keys and the slots of a segment begin.
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

enum class OrderPart { kAll, kCount, kRank };  // which part of the work on a tile a kernel does

// The part of a segment that a block sorts, and its shared memory.
struct OrderTile {
  const OrderArguments& p;
  OrderSegment segment;
  int first, count;    // its keys in the segment
  uint16_t* counters;  // [sorters][2 * pairs]
  int pairs;

  __device__ int32_t position(int i) const {  // position of key i of the tile in the segment
    return p.input_order ? p.input_order[segment.slots + first + i] : first + i;
  }
  __device__ uint32_t digit(int i) const {
    const uint32_t bucket = min(static_cast<uint32_t>(p.buckets[segment.keys + position(i)]), p.last);
    return p.last < p.base ? bucket : bucket / p.divisor % p.base;
  }
  __device__ uint32_t& pair(int sorter, int pair) const {
    return reinterpret_cast<uint32_t*>(counters)[sorter * pairs + pair];
  }
  __device__ uint16_t* key_of_rank() const { return counters + p.sorters * 2 * pairs; }        // [tile]
  __device__ uint16_t* digits() const { return key_of_rank() + p.tile; }                       // [tile]
  __device__ int32_t* slots() const { return reinterpret_cast<int32_t*>(digits() + p.tile); }  // [base]
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

// Calls use(i, inside, digit_of(i)) for the warp's keys in order, 32 at a time. AHEAD loads are in flight together.
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

// Turns the counters of all warps into first ranks: after smaller digits, and after the same digit of earlier warps.
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

// Two blocks that sort a part fit into a multiprocessor.
template <OrderPart PART>
__global__ void __launch_bounds__(kOrderMaxThreads, PART == OrderPart::kAll ? 1 : 2)
    order_kernel(const __grid_constant__ OrderArguments p) {
  RK_DYNAMIC_SHARED(memory);
  __shared__ int sums[kOrderMaxThreads / kWarp];
  constexpr int kAhead = PART == OrderPart::kAll ? 8 : 4;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  OrderTile tile{p, order_segment(p, blockIdx.x / p.tiles)};
  tile.first = static_cast<int>(blockIdx.x % p.tiles) * p.tile;
  tile.count = min(tile.segment.length - tile.first, p.tile);  // negative if the sequence has fewer parts
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

  int32_t* of_tile = p.counts + static_cast<int64_t>(blockIdx.x) * p.base;  // counts of the part, later its first slots
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
  if constexpr (PART == OrderPart::kRank) {  // slots become what to add to a rank to get a slot
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
        if (peers >> lane == 1) counters[digit] = static_cast<uint16_t>(rank + 1);  // the last of these lanes
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

// Turns counts [tiles, base] of a segment into first slots. One block for each segment, one thread for each bucket.
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
