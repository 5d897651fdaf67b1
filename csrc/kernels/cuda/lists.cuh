// Attention to lists of keys, around the kernels of chunk attention: gradients of list entries become those of keys,
// and the rest key stands for all keys that a query may see but did not.
#pragma once
#include "kernels/cuda/attention_sequence.cuh"

namespace rk::cuda {

// The lists of a head have `entries` entries, each list padded to whole tiles.
struct ListArguments {
  AttentionArguments attention;             // its gradients are those of the whole tensors
  Rows entry_grad_keys, entry_grad_values;  // [B, H, entries, D] and [B, H, entries, E]
  int32_t* keys;                            // [B, H, entries], the key of each entry; S: none
  const int32_t* order;                     // [B, H, entries], entries sorted by key
  int32_t* starts;                          // [B, H, S + 2], where each key begins in the order
  int64_t entries;
  // The rest key, if there is one. sum_rows: positions with sums of their own (causal; the last row is also that of
  // later positions), or 1.
  const float* key_sums;     // [B, key heads, sum_rows, D], sums of visible keys
  const float* value_sums;   // [B, key heads, sum_rows, E]
  const int32_t* counts;     // [B, sum_rows], how many keys a sum has
  float* query_terms;        // [B, H, L, D], what each query adds to the gradient of every key that it may see
  float* value_terms;        // [B, H, L, E]
  const float* key_grads;    // [B, key heads, grad_rows, D], the sums of the terms for each key, or for all
  const float* value_grads;  // [B, key heads, grad_rows, E]
  int sum_rows, grad_rows;
};

// Fills `keys`. One thread for each entry.
__global__ void __launch_bounds__(kAttentionThreads) list_keys_kernel(const __grid_constant__ ListArguments p) {
  const int64_t number = int64_t{blockIdx.x} * kAttentionThreads + threadIdx.x;
  if (number >= p.attention.heads * p.entries) return;
  const int slots = p.attention.list_stride, length = p.attention.list_length;
  const int64_t row = number / slots;
  const int entry = static_cast<int>(number % slots);
  const int key = entry < length ? p.attention.lists[row * length + entry] : -1;
  p.keys[number] = key < 0 ? p.attention.S : key;
}

// Fills `starts`. One thread for each entry in sorted order, and one for the end.
__global__ void __launch_bounds__(kAttentionThreads) list_starts_kernel(const __grid_constant__ ListArguments p) {
  const int64_t number = int64_t{blockIdx.x} * kAttentionThreads + threadIdx.x;
  const int64_t head = number / (p.entries + 1), i = number % (p.entries + 1);
  if (head >= p.attention.heads) return;
  const int32_t *keys = p.keys + head * p.entries, *order = p.order + head * p.entries;
  const int before = i == 0 ? -1 : keys[order[i - 1]], key = i == p.entries ? p.attention.S + 1 : keys[order[i]];
  int32_t* starts = p.starts + head * (p.attention.S + 2);
  for (int k = before + 1; k <= key; ++k) starts[k] = static_cast<int32_t>(i);
}

// Sums the gradients of the entries of each key, in a fixed order. One warp for each key.
template <class T>
__global__ void __launch_bounds__(kAttentionThreads, 8) list_sum_kernel(const __grid_constant__ ListArguments p) {
  const AttentionArguments& a = p.attention;
  const int key_heads = a.H / a.group;
  const int64_t number = int64_t{blockIdx.x} * (kAttentionThreads / kWarp) + threadIdx.x / kWarp;
  const int64_t head = number / a.S, b = head / key_heads, key_head = head % key_heads;
  const int key = static_cast<int>(number % a.S);
  if (head >= a.heads / a.group) return;
  const auto add_up = [&](const Rows& entries, const float* grads, const Rows& to, int width) {
    LaneRow sum{};
    if (grads && key < a.S - a.n_context && !(a.padding && a.padding[b * a.S + key])) {
      const float* row = grads + (head * p.grad_rows + min(key, p.grad_rows - 1)) * width;
      LaneRow::each(width, [&](int i, int d) { sum.x[i] = row[d]; });
    }
    for (int64_t h = key_head * a.group; h < (key_head + 1) * a.group; ++h) {
      const int64_t query_head = b * a.H + h;
      const int32_t* starts = p.starts + query_head * (a.S + 2) + key;
      const int32_t* order = p.order + query_head * p.entries;
      for (int i = starts[0]; i < starts[1]; ++i) {
        const T* row = row_of<T>(entries, b, h, order[i]);
        LaneRow::each(width, [&](int j, int d) { sum.x[j] += to_float(row[d]); });
      }
    }
    T* row = row_of<T>(to, b, key_head, key);
    LaneRow::each(width, [&](int i, int d) { row[d] = from_float<T>(sum.x[i]); });
  };
  add_up(p.entry_grad_keys, p.key_grads, a.grad_key, a.D);
  add_up(p.entry_grad_values, p.value_grads, a.grad_value, a.E);
}

// The rest key of a query, computed by one warp. Its score is natural, and -infinity if the query saw every key.
struct RestKey {
  int64_t head, row, sum_row;  // b * H + h; row of [B, H, L]; row of the sums
  int b, h, position, visible;
  float score;

  template <class T>
  __device__ void take(const ListArguments& p, int64_t number) {
    const AttentionArguments& a = p.attention;
    const int lane = threadIdx.x % kWarp;
    head = number / a.L, b = static_cast<int>(head / a.H), h = static_cast<int>(head % a.H);
    const int slot = static_cast<int>(number % a.L) + (a.R - 1) * a.L;
    position = a.order ? a.order[head * a.R * a.L + slot] : slot;
    row = head * a.L + position;
    const int sum_index = min(position, p.sum_rows - 1);
    sum_row = (int64_t{b} * (a.H / a.group) + h / a.group) * p.sum_rows + sum_index;
    visible = p.counts[int64_t{b} * p.sum_rows + sum_index];
    const int chunks = (a.L + a.chunk_length - 1) / a.chunk_length, limit = a.has(kCausal) ? position : INT32_MAX;
    int seen = 0, low = INT32_MAX, high = -1;  // low, high: range of the first round's keys, without context keys
    for (int round = 0; round < a.R; ++round) {
      const bool last = round == a.R - 1;  // the first of two rounds has the order of positions
      const int chunk = (last ? slot - round * a.L : position) / a.chunk_length;
      const int32_t* list = a.lists + ((head * a.R + round) * chunks + chunk) * a.list_length;
      for (int i = lane; i < a.list_length; i += kWarp) {
        const int key = list[i];
        if (key < 0 || key >= a.S - a.n_context) continue;
        seen += key <= limit && !(round > 0 && key >= low && key <= high);
        if (round == 0) low = min(low, key), high = max(high, key);
      }
      low = __reduce_min_sync(~0u, low), high = __reduce_max_sync(~0u, high);
    }
    const int unseen = visible - __reduce_add_sync(~0u, seen);
    const T* query = row_of<T>(a.query, b, h, position);
    const float* sums = p.key_sums + sum_row * a.D;
    float product = 0.f;
    LaneRow::each(a.D, [&](int, int d) { product = fmaf(to_float(query[d]), sums[d], product); });
    score = unseen > 0 ? a.scale * (warp_sum(product) / visible) + logf(static_cast<float>(unseen)) : -INFINITY;
  }
};

// Merges the rest key of each query into the result of its lists. One warp for each query.
template <class T>
__global__ void __launch_bounds__(kAttentionThreads, 8) rest_forward_kernel(const __grid_constant__ ListArguments p) {
  const AttentionArguments& a = p.attention;
  const int64_t number = int64_t{blockIdx.x} * (kAttentionThreads / kWarp) + threadIdx.x / kWarp;
  if (number >= a.heads * a.L) return;
  RestKey q{};
  q.take<T>(p, number);
  if (q.score == -INFINITY) return;
  const float lse = a.lse[q.row], top = fmaxf(lse, q.score);
  const float both = top + logf(expf(lse - top) + expf(q.score - top));
  const float before = expf(lse - both), weight = expf(q.score - both) / q.visible;
  const float* sums = p.value_sums + q.sum_row * a.E;
  T* out = row_of<T>(a.out, q.b, q.h, q.position);
  LaneRow::each(a.E, [&](int, int d) { out[d] = from_float<T>(fmaf(to_float(out[d]), before, sums[d] * weight)); });
  __syncwarp();  // all lanes have read it
  if (threadIdx.x % kWarp == 0) a.lse[q.row] = both;
}

// Writes the rest key's part of the gradient of each query, to which the kernels of chunk attention add, and its terms.
template <class T>
__global__ void __launch_bounds__(kAttentionThreads, 8) rest_backward_kernel(const __grid_constant__ ListArguments p) {
  const AttentionArguments& a = p.attention;
  const int64_t number = int64_t{blockIdx.x} * (kAttentionThreads / kWarp) + threadIdx.x / kWarp;
  if (number >= a.heads * a.L) return;
  RestKey q{};
  q.take<T>(p, number);
  const float weight = q.score == -INFINITY ? 0.f : expf(q.score - a.lse[q.row]) / max(q.visible, 1);
  const T *query = row_of<T>(a.query, q.b, q.h, q.position), *out = row_of<T>(a.out, q.b, q.h, q.position);
  const T* grad_out = row_of<T>(a.grad_out, q.b, q.h, q.position);
  const float *keys = p.key_sums + q.sum_row * a.D, *values = p.value_sums + q.sum_row * a.E;
  float mean_product = 0.f, delta = 0.f;
  LaneRow::each(a.E, [&](int, int d) {
    const float grad = to_float(grad_out[d]);
    mean_product = fmaf(grad, values[d], mean_product), delta = fmaf(grad, to_float(out[d]), delta);
    p.value_terms[q.row * a.E + d] = weight * grad;
  });
  const float mean = warp_sum(mean_product) / max(q.visible, 1);
  const float slope = weight * (mean - warp_sum(delta)) * a.scale;
  T* grad_query = row_of<T>(a.grad_query, q.b, q.h, q.position);
  LaneRow::each(a.D, [&](int, int d) {
    grad_query[d] = from_float<T>(slope * keys[d]);
    p.query_terms[q.row * a.D + d] = slope * to_float(query[d]);
  });
}

}  // namespace rk::cuda
