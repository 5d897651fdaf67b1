// The CUDA kernels' interface: free of any framework. A function returns a cudaError_t; `stream` is a cudaStream_t.
#pragma once
#include "kernels/cuda/plan.h"
#include "kernels/params.h"

namespace rk::cuda {

// Fills in the calling thread's current device.
int current_device(Device& device);

int hash_buckets(const HashParams& p, const Device& device, void* stream);

// scratch_order has the shape of p.order, and is used if the plan has several passes. counts has plan.counts()
// elements.
int bucket_order(const OrderParams& p, const Device& device, int32_t* scratch_order, int32_t* counts, void* stream);

// longest: no sequence has more tokens. scratch: see plan_attention_scratch.
int attention_forward(const AttentionParams& p, int64_t longest, const Device& device, void* scratch, void* stream);
int attention_backward(const AttentionParams& p, int64_t longest, const Device& device, void* scratch, void* stream);

// The rest key of attention to lists: it stands for the keys that a query may see but did not.
struct RestParams {
  // Sums of the keys and values that the query at a position may see (or, with one row, every query may see):
  // [B, key heads, sum_rows, D] and E. counts [B, sum_rows] is how many keys a sum has.
  const float *key_sums, *value_sums;
  const int32_t* counts;
  int64_t sum_rows;
  // Backward: what each query adds to the gradient of every key that it may see, [B, H, L, D] and E; and the sums of
  // these for each key (or, with one row, for all keys), [B, key heads, grad_rows, D] and E.
  float *query_terms, *value_terms;
  const float *key_grads, *value_grads;
  int64_t grad_rows;
};

int list_attention_forward(const AttentionParams& p, const RestParams& rest, const Device& device, void* stream);

// Writes the rest key's part of grad_query and the terms. list_attention_backward adds to grad_query.
int list_rest_backward(const AttentionParams& p, const RestParams& rest, void* stream);

// scratch: see plan_list_scratch.
int list_attention_backward(const AttentionParams& p, const RestParams& rest, const Device& device, void* scratch,
                            void* stream);

// scratch: see plan_select.
int select_keys(const SelectParams& p, void* scratch, void* stream);

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
