// A row gather: what the random-access ceiling of a device is measured with.
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/kernels.h"

namespace rk::cuda {

constexpr int kGatherThreads = 256;
constexpr int kRowsInFlight = 4;  // loads that one thread issues before it stores: hides the latency of the gather

struct GatherArguments {
  GatherRows rows;
  int columns;  // threads of a row
};

// A thread copies one 16-byte vector of kRowsInFlight rows; a block is (threads of a row, rows).
__global__ void __launch_bounds__(kGatherThreads) gather_rows_kernel(const __grid_constant__ GatherArguments p) {
  const GatherRows& g = p.rows;
  const uint4* input = static_cast<const uint4*>(g.input);
  uint4* out = static_cast<uint4*>(g.out);
  const int rows_of_block = kGatherThreads / p.columns;
  const int64_t first = int64_t(blockIdx.x) * rows_of_block * kRowsInFlight + threadIdx.x / p.columns;
  for (int64_t column = threadIdx.x % p.columns; column < g.vectors; column += p.columns) {
    uint4 vector[kRowsInFlight];
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      const int64_t row = first + i * rows_of_block;
      const int64_t source = row < g.rows ? g.index[row] : -1;
      const bool inside = source >= 0 && source < g.input_rows;
      vector[i] = inside ? __ldg(input + source * g.vectors + column) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      const int64_t row = first + i * rows_of_block;
      if (row < g.rows) out[row * g.vectors + column] = vector[i];
    }
  }
}

int gather_rows(const GatherRows& p, void* stream) {
  if (p.rows == 0 || p.vectors == 0) return cudaSuccess;
  GatherArguments a{p, 1};
  while (a.columns < p.vectors && a.columns < kWarp) a.columns *= 2;
  const int64_t rows_of_block = int64_t{kGatherThreads / a.columns} * kRowsInFlight;
  Launch shape;
  shape.grid[0] = static_cast<uint32_t>(ceil_div(p.rows, rows_of_block));
  shape.threads = kGatherThreads;
  return launch(gather_rows_kernel, shape, a, stream);
}

}  // namespace rk::cuda
