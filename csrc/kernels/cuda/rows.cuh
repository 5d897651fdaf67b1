// Rows of tensors, and what a warp does with one.
#pragma once
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/plan.h"

namespace rk::cuda {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Slots, or positions of keys, [begin, end).
struct Range {
  int begin, end;
};

template <class T>
__device__ __forceinline__ T* row_of(const Rows& rows, int64_t b, int64_t h, int64_t l) {
  return static_cast<T*>(rows.data) + b * rows.stride_b + h * rows.stride_h + l * rows.stride_l;
}

// A lane's elements of a row of at most kAttentionMaxDim: pairs of neighbours.
struct LaneRow {
  static constexpr int kPairs = kAttentionMaxDim / (2 * kWarp);
  float x[2 * kPairs];

  // Calls f(index in x, column).
  template <class F>
  __device__ static void each(int width, F&& f) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < 2 * kPairs; ++i)
      if (const int d = i / 2 * 2 * kWarp + 2 * lane + i % 2; d < width) f(i, d);
  }
};

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

}  // namespace rk::cuda
