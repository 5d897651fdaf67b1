// The CUDA kernels' interface: free of any framework. A function returns a cudaError_t; `stream` is a cudaStream_t.
#pragma once
#include "kernels/cuda/plan.h"
#include "kernels/params.h"

namespace rk::cuda {

// Of the calling thread's current device.
int current_device(Device& device);

int hash_buckets(const HashParams& p, const Device& device, void* stream);

// scratch_order: like p.order, where the plan has several passes; counts: where it asks for them.
int bucket_order(const OrderParams& p, const Device& device, int32_t* scratch_order, int32_t* counts, void* stream);

// Where cu_seqlens are, `longest` tokens has the longest sequence. scratch: see plan_attention_scratch.
int attention_forward(const AttentionParams& p, int64_t longest, const Device& device, void* scratch, void* stream);
int attention_backward(const AttentionParams& p, int64_t longest, const Device& device, void* scratch, void* stream);

// out[i, :] = input[index[i], :]. Pointers are 16-byte aligned; an index outside the input gives a row of zeros.
struct GatherRows {
  const void* input;     // [input_rows, vectors] of 16 bytes
  const int32_t* index;  // [rows]
  void* out;             // [rows, vectors] of 16 bytes
  int64_t input_rows, rows, vectors;
};

int gather_rows(const GatherRows& p, void* stream);

const char* error_string(int error);

}  // namespace rk::cuda
