// A stable counting sort, with a choice of mistakes: a block walks a row tile by tile.
#include "device.cuh"

namespace {

constexpr int kTile = 256, kMaxBuckets = kTile, kWarps = kTile / 32;

struct Params {
  const int* buckets;   // [B, L], below kMaxBuckets
  int* order;           // [B, L]
  int* sorted_buckets;  // [B, L]
  int length;
};

}  // namespace

// Grid (B).
__global__ void __launch_bounds__(kTile) counting_sort(const __grid_constant__ Params p) {
  __shared__ int next[kMaxBuckets];            // where the next element of each bucket goes
  __shared__ int counts[kWarps][kMaxBuckets];  // of a tile; then where a warp's first element goes
  __shared__ int warp_sums[kWarps];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int64_t row = int64_t(blockIdx.x) * p.length;

  next[thread] = 0;
  __syncthreads();
  for (int i = thread; i < p.length; i += kTile) atomicAdd(&next[p.buckets[row + i]], 1);
  __syncthreads();
  const int count = next[thread];
  int inclusive = count;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(0xffffffffu, inclusive, step);
    if (lane >= step) inclusive += before;
  }
  if (lane == 31) warp_sums[warp] = inclusive;
  __syncthreads();
  int before_warp = 0;
  for (int w = 0; w < warp; ++w) before_warp += warp_sums[w];
  next[thread] = inclusive - count + (kBug != 6 ? before_warp : 0);
  __syncthreads();

  for (int first = 0; first < p.length; first += kTile) {
    for (int w = 0; w < kWarps; ++w) counts[w][thread] = 0;
    __syncthreads();
    const int i = first + thread;
    const int bucket = i < p.length ? p.buckets[row + i] : -1;
    const unsigned peers = __match_any_sync(0xffffffffu, bucket);
    const int rank = __popc(peers & ((1u << lane) - 1));
    if (bucket >= 0 && rank == 0) counts[warp][bucket] = __popc(peers);
    if (kBug != 7) __syncthreads();
    int start = next[thread];
    for (int w = 0; w < kWarps; ++w) {
      const int of_warp = counts[w][thread];
      counts[w][thread] = start;
      start += of_warp;
    }
    next[thread] = start;
    __syncthreads();
    if (bucket >= 0) {
      const int to = counts[warp][bucket] + rank;
      p.order[row + to] = i;
      p.sorted_buckets[row + to] = bucket;
    }
    if (kBug != 8) __syncthreads();
  }
}
