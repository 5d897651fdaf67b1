// A row gather: what the random-access ceiling of a device is measured with. Free of any framework.
#pragma once

#include <cstdint>

namespace reformer_kernels::cuda {

// out[i, :] = input[index[i], :]. Pointers are 16-byte aligned; an index outside the input gives a row of zeros.
struct GatherRows {
  const void* input;     // [input_rows, vectors] of 16 bytes
  const int32_t* index;  // [rows]
  void* out;             // [rows, vectors] of 16 bytes
  int64_t input_rows;
  int64_t rows;
  int64_t vectors;
};

// `stream` is a cudaStream_t; returns a cudaError_t.
int gather_rows(const GatherRows& p, void* stream);

const char* error_string(int error);

}  // namespace reformer_kernels::cuda
