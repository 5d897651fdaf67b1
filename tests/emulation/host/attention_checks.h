// Problems of attention for the sanitizers: all values are one row, so each output is that row, and the gradients of
// the values add up to those of the outputs. That the numbers are right otherwise is seen in Python.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "drivers.h"
#include "kernels/cuda/device.cuh"
#include "kernels/cuda/kernels.h"

namespace rk::host {

struct AttentionProblem {
  int64_t L, D, C, R = 2, H = 2, key_heads = 0, before = 1, after = 0, n_queries = -1, flags = kCausal, n_buckets = 4;
  std::vector<int32_t> cu_seqlens = {};
  int64_t list_length = 0;  // of lists of keys, instead of windows
};

template <class T>
struct AttentionTensors {
  int64_t L, H, key_heads, D;
  std::vector<T> query, key, value, out, grad_out, grad_query, grad_key, grad_value;

  AttentionTensors(const AttentionProblem& problem, std::minstd_rand& random)
      : L(problem.L), H(problem.H), key_heads(problem.key_heads ? problem.key_heads : problem.H), D(problem.D) {
    const int64_t rows = H * L, key_rows = key_heads * L;
    query = numbers(rows, random), key = numbers(key_rows, random), grad_out = numbers(rows, random);
    const std::vector<T> row = numbers(1, random);
    for (int64_t i = 0; i < key_rows; ++i) value.insert(value.end(), row.begin(), row.end());
    const T nan = cuda::from_float<T>(std::numeric_limits<float>::quiet_NaN());
    out.assign(rows * D, nan), grad_query = out;
    grad_key.assign(key_rows * D, nan), grad_value = grad_key;
  }
  std::vector<T> numbers(int64_t rows, std::minstd_rand& random) const {
    std::uniform_real_distribution<float> uniform(-1.f, 1.f);
    std::vector<T> x(rows * D);
    for (T& number : x) number = cuda::from_float<T>(uniform(random));
    return x;
  }
  Rows rows(std::vector<T>& x, int64_t heads) const { return {x.data(), heads * L * D, L * D, D}; }
};

template <class T>
bool attention_is_right(const AttentionProblem& problem, Element element) {
  std::minstd_rand random(problem.L + problem.D);
  AttentionTensors<T> x(problem, random);
  const int64_t L = x.L, H = x.H, D = x.D, R = problem.R, queries = problem.n_queries < 0 ? L : problem.n_queries;
  std::vector<int32_t> buckets(H * R * L), order;
  for (int32_t& bucket : buckets) bucket = random() % problem.n_buckets;
  const std::vector<int32_t> bounds =
      problem.cu_seqlens.empty() ? std::vector<int32_t>{0, static_cast<int32_t>(L)} : problem.cu_seqlens;
  for (int64_t h = 0; h < H; ++h)
    for (size_t s = 0; s + 1 < bounds.size(); ++s)
      for (int64_t r = 0; r < R; ++r) {
        const int32_t* bucket = buckets.data() + (h * R + r) * L + bounds[s];
        std::vector<int32_t> positions(bounds[s + 1] - bounds[s]);
        std::iota(positions.begin(), positions.end(), 0);
        const bool in_order = problem.list_length && r == 0;  // the first round of lists
        if (!in_order)
          std::stable_sort(positions.begin(), positions.end(), [&](int i, int j) { return bucket[i] < bucket[j]; });
        order.insert(order.end(), positions.begin(), positions.end());
      }
  std::vector<float> lse(H * queries, std::numeric_limits<float>::quiet_NaN());
  const auto self_only = std::make_unique<bool[]>(H * queries);

  AttentionParams p{};
  p.element = element, p.B = 1, p.H = H, p.key_heads = x.key_heads, p.L = p.S = L, p.D = p.E = D, p.R = R;
  p.chunk_length = std::min(problem.C, L), p.chunks_before = problem.before, p.chunks_after = problem.after;
  p.n_queries = queries, p.flags = problem.flags, p.scale = problem.key_heads ? 0.3 : 1, p.keep_factor = 1;
  p.query = x.rows(x.query, H), p.value = x.rows(x.value, x.key_heads);
  if (problem.key_heads) p.key = x.rows(x.key, x.key_heads);
  p.order = problem.key_heads && !problem.list_length ? nullptr : order.data(), p.buckets = buckets.data();
  p.cu_seqlens = problem.cu_seqlens.empty() ? nullptr : bounds.data();
  p.n_sequences = static_cast<int64_t>(bounds.size()) - 1;
  p.out = {x.out.data(), H * queries * D, queries * D, D}, p.lse = lse.data(), p.self_only = self_only.get();
  p.grad_out = {x.grad_out.data(), H * queries * D, queries * D, D};
  p.grad_query = x.rows(x.grad_query, H), p.grad_value = x.rows(x.grad_value, x.key_heads);
  if (problem.key_heads) p.grad_key = x.rows(x.grad_key, x.key_heads);
  int64_t longest = 0;
  for (size_t s = 0; s + 1 < bounds.size(); ++s) longest = std::max<int64_t>(longest, bounds[s + 1] - bounds[s]);

  const cuda::Device device{2, 232448, 233472};
  settings().shared_limit = device.shared_bytes_per_block - cuda::kReservedShared;
  std::vector<int32_t> lists;
  std::vector<float> key_sums(x.key_heads * D), value_sums(x.key_heads * D), query_terms(H * L * D),
      value_terms(H * L * D);
  std::vector<float> key_grads(x.key_heads * D), value_grads(x.key_heads * D);
  const std::vector<int32_t> counts = {static_cast<int32_t>(L)};
  cuda::RestParams rest{};
  int error = 0;
  if (problem.list_length) {
    p.list_length = problem.list_length, p.self_only = nullptr;
    const int64_t rows = H * R * ((L + p.chunk_length - 1) / p.chunk_length);
    for (int64_t row = 0; row < rows; ++row) {
      std::vector<int32_t> keys(L);
      std::iota(keys.begin(), keys.end(), 0);
      std::shuffle(keys.begin(), keys.end(), random);
      keys.resize(1 + random() % std::min(L, p.list_length));
      std::sort(keys.begin(), keys.end());
      keys.resize(p.list_length, -1);
      lists.insert(lists.end(), keys.begin(), keys.end());
    }
    p.key_indices = lists.data();
    for (int64_t i = 0; i < x.key_heads * L * D; ++i) {
      key_sums[i / L / D * D + i % D] += cuda::to_float(x.key[i]);
      value_sums[i / L / D * D + i % D] += cuda::to_float(x.value[i]);
    }
    rest.key_sums = key_sums.data(), rest.value_sums = value_sums.data(), rest.counts = counts.data();
    rest.sum_rows = rest.grad_rows = 1;
    rest.query_terms = query_terms.data(), rest.value_terms = value_terms.data();
    rest.key_grads = key_grads.data(), rest.value_grads = value_grads.data();
    error = cuda::list_attention_forward(p, rest, device, nullptr);
    if (!error) error = cuda::list_rest_backward(p, rest, nullptr);
    for (int64_t i = 0; i < H * L * D; ++i) {
      const int64_t to = i / L / D / p.group() * D + i % D;
      key_grads[to] += query_terms[i], value_grads[to] += value_terms[i];
    }
    const auto memory = scratch_memory(cuda::plan_list_scratch(p, device).bytes);
    if (!error) error = cuda::list_attention_backward(p, rest, device, memory.get(), nullptr);
  } else {
    const auto memory = scratch_memory(std::max<int64_t>(16, cuda::plan_attention_scratch(p, true).bytes));
    error = cuda::attention_forward(p, longest, device, memory.get(), nullptr);
    if (!error) error = cuda::attention_backward(p, longest, device, memory.get(), nullptr);
  }
  if (error) return false;

  // Roundings of a term: of what each round leaves, of a score, by which its weight is off, and of sums.
  const double unit = std::ldexp(1., sizeof(T) == 4 ? -23 : std::is_same_v<T, cuda::fp16> ? -10 : -7);
  const double largest_score = problem.key_heads ? p.scale * D : std::sqrt(D);
  const double allowed = (R + 2 + largest_score + std::log2(L)) * unit;
  bool right = true;
  std::vector<double> outgoing(D), incoming(D), size(D);
  for (int64_t i = 0; i < H * queries * D; ++i) {
    right = right && std::fabs(cuda::to_float(x.out[i]) - cuda::to_float(x.value[i % D])) <= allowed;
    outgoing[i % D] += cuda::to_float(x.grad_out[i]), size[i % D] += std::fabs(cuda::to_float(x.grad_out[i]));
  }
  for (int64_t i = 0; i < x.key_heads * L * D; ++i) incoming[i % D] += cuda::to_float(x.grad_value[i]);
  for (int64_t d = 0; d < D; ++d) right = right && std::fabs(incoming[d] - outgoing[d]) <= allowed * size[d];
  for (const T g : x.grad_query) right = right && std::isfinite(cuda::to_float(g));
  for (size_t i = 0; problem.key_heads && i < x.grad_key.size(); ++i)
    right = right && std::isfinite(cuda::to_float(x.grad_key[i]));
  return right;
}

template <class T>
void add_attention(std::vector<Check>& checks, const std::string& name, Element element,
                   const AttentionProblem& problem) {
  checks.push_back({name + " " + std::to_string(problem.L) + "x" + std::to_string(problem.D),
                    [problem, element] { return attention_is_right<T>(problem, element); }, true, true});
}

inline void add_attention(std::vector<Check>& checks) {
  add_attention<cuda::bf16>(checks, "attention bfloat16", Element::kBFloat16,
                            {.L = 66, .D = 32, .C = 32, .R = 1, .H = 1, .flags = kCausal | kWithinBucket});
  if (kFew) return;
  const AttentionProblem problems[] = {
      {.L = 100, .D = 32, .C = 32, .H = 1},
      {.L = 128, .D = 40, .C = 64, .H = 1},                                      // own tiles are visited, too
      {.L = 70, .D = 20, .C = 16, .after = 1, .flags = kWithinBucket | kDedup},  // rows at no multiple of 16 bytes
      {.L = 70, .D = 32, .C = 16, .H = 1, .flags = kCausal | kBucketAligned},
      {.L = 90, .D = 32, .C = 32, .R = 1, .key_heads = 1, .after = 1},
      {.L = 90, .D = 32, .C = 16, .H = 1, .cu_seqlens = {0, 1, 1, 50, 90}},
      {.L = 90, .D = 32, .C = 16, .H = 1, .n_queries = 40},
  };
  for (const AttentionProblem& problem : problems) {
    add_attention<cuda::bf16>(checks, "attention bfloat16", Element::kBFloat16, problem);
    add_attention<float>(checks, "attention float32", Element::kSame, problem);
  }
  add_attention<cuda::fp16>(checks, "attention float16", Element::kFloat16, {.L = 70, .D = 128, .C = 64, .H = 1});
}

inline void add_lists(std::vector<Check>& checks) {
  add_attention<cuda::bf16>(
      checks, "lists bfloat16", Element::kBFloat16,
      {.L = 32, .D = 32, .C = 32, .R = 1, .H = 1, .key_heads = 1, .flags = kRestKey, .list_length = 20});
  if (kFew) return;
  const AttentionProblem problems[] = {
      {.L = 70, .D = 32, .C = 16, .key_heads = 1, .flags = kRestKey, .list_length = 20},
      {.L = 70, .D = 20, .C = 20, .R = 1, .key_heads = 2, .flags = kRestKey, .list_length = 70},
  };
  for (const AttentionProblem& problem : problems) {
    add_attention<cuda::bf16>(checks, "lists bfloat16", Element::kBFloat16, problem);
    add_attention<float>(checks, "lists float32", Element::kSame, problem);
  }
}

}  // namespace rk::host
