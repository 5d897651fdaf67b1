// A row gather: what the random-access ceiling of a device is measured with.
#include <cuda_runtime.h>

#include "kernels/cuda/probe.h"

namespace reformer_kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsInFlight = 4;  // loads that one thread issues before it stores: hides the latency of the gather

// A thread copies one 16-byte vector of kRowsInFlight rows; blockDim is (vectors of a row, rows).
__global__ void __launch_bounds__(kThreads) gather_rows_kernel(GatherRows p) {
  const uint4* input = static_cast<const uint4*>(p.input);
  uint4* out = static_cast<uint4*>(p.out);
  const int64_t first = int64_t(blockIdx.x) * blockDim.y * kRowsInFlight + threadIdx.y;
  for (int64_t column = threadIdx.x; column < p.vectors; column += blockDim.x) {
    uint4 vector[kRowsInFlight];
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      const int64_t row = first + i * blockDim.y;
      const int64_t source = row < p.rows ? p.index[row] : -1;
      const bool inside = source >= 0 && source < p.input_rows;
      vector[i] = inside ? __ldg(input + source * p.vectors + column) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      const int64_t row = first + i * blockDim.y;
      if (row < p.rows) out[row * p.vectors + column] = vector[i];
    }
  }
}

}  // namespace

int gather_rows(const GatherRows& p, void* stream) {
  if (p.rows == 0 || p.vectors == 0) return cudaSuccess;
  int columns = 1;
  while (columns < p.vectors && columns < 32) columns *= 2;
  const dim3 block(columns, kThreads / columns);
  const int64_t rows_per_block = int64_t(block.y) * kRowsInFlight;
  const int64_t blocks = (p.rows + rows_per_block - 1) / rows_per_block;
  gather_rows_kernel<<<blocks, block, 0, static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace reformer_kernels::cuda
