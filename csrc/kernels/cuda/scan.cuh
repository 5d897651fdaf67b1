// Sums over the threads of a block.
#pragma once
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/plan.h"

namespace rk::cuda {

// The sum over the threads before this one, and over all.
struct Scan {
  int before, total;
};

// Every thread of the block calls it. sums: shared memory, one element for each warp.
__device__ __forceinline__ Scan scan_block(int value, int* sums) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  int inclusive = value;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int other = __shfl_up_sync(~0u, inclusive, step);
    if (lane >= step) inclusive += other;
  }
  __syncthreads();  // all threads have read the sums of an earlier call
  if (lane == kWarp - 1) sums[warp] = inclusive;
  __syncthreads();
  int of_warps = lane < warps ? sums[lane] : 0;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int other = __shfl_up_sync(~0u, of_warps, step);
    if (lane >= step) of_warps += other;
  }
  const int before_warp = __shfl_sync(~0u, of_warps, (warp + kWarp - 1) % kWarp);
  return {inclusive - value + (warp ? before_warp : 0), __shfl_sync(~0u, of_warps, kWarp - 1)};
}

}  // namespace rk::cuda
