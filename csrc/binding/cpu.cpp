// The CPU kernels as torch ops, on torch's stable ABI. Outputs are allocated by the caller.
#include <torch/csrc/stable/ops.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <string>
#include <vector>

#include "binding/attention.h"
#include "binding/hashing.h"
#include "build_facts.h"  // by setup.py
#include "kernels/cpu/kernels.h"

namespace {

using namespace rk::binding;

rk::cpu::Threads threads() {
  return {static_cast<int>(std::max(1u, torch::stable::get_num_threads())),
          [](int count, void (*body)(void*, int), void* context) {
            torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) body(context, static_cast<int>(i));
            });
          }};
}

// Memory that a kernel will write: in large pages it costs fewer faults, and rows in bucket order fewer misses.
void use_large_pages(const Tensor& t) {
#ifdef __linux__
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const uintptr_t data = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
  const uintptr_t begin = (data + kPage - 1) / kPage * kPage;
  const uintptr_t end = (data + t.numel() * t.element_size()) / kPage * kPage;
  int64_t last = 0;
  for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
  const bool dense = t.numel() == last + 1;  // in whatever order: no memory of others lies between
  if (dense && begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

void check_bounds(const OptionalTensor& cu_seqlens, int64_t L) {
  if (!cu_seqlens) return;
  const int64_t size = cu_seqlens->size(cu_seqlens->dim() - 1);
  const int32_t* bounds = cu_seqlens->const_data_ptr<int32_t>();
  for (const int32_t* end = bounds + cu_seqlens->numel(); bounds < end; bounds += size)
    require(bounds[0] == 0 && bounds[size - 1] == L && std::is_sorted(bounds, bounds + size),
            "cu_seqlens must rise from 0 to ", L);
}

void check_index(const char* name, const int32_t* index, int64_t size, int64_t limit, int32_t least = 0) {
  int32_t low = least, high = least;
  for (int64_t i = 0; i < size; ++i) low = std::min(low, index[i]), high = std::max(high, index[i]);
  require(size == 0 || (low >= least && high < limit), name, " must be between ", least, " and ", limit - 1, ", got ",
          low, " to ", high);
}

// Calls f(kernels of the type); running out of memory becomes an error of torch's.
template <class F>
void with_kernels(ScalarType type, F&& f) {
  try {
    if (type == ScalarType::Float)
      f(rk::cpu::kernels().f32);
    else
      f(rk::cpu::kernels().f64);
  } catch (const std::exception&) {  // bad_alloc or length_error
    require(false, "reformer_kernels: out of memory");
  }
}

void hash_buckets(const HashInputs& in) {
  const rk::HashParams p = hash_params(in);
  with_kernels(compute_type(in.x), [&](const auto& k) { k.hash(p, threads()); });
}

// Returns how many rows have a bucket out of range; then the order is not to be used.
int64_t bucket_order(const OrderInputs& in) {
  const rk::OrderParams p = order_params(in);
  check_bounds(in.cu_seqlens, p.L);
  int64_t invalid = 0;
  with_kernels(ScalarType::Float, [&](const auto&) { invalid = rk::cpu::bucket_order(p, threads()); });
  return invalid;
}

// An argument that the CUDA library does not have.
struct Mask {
  Arguments& next;
  OptionalTensor attn_mask = next.optional_tensor("attn_mask");
};

void set_mask(Attention& a, const OptionalTensor& mask) {
  if (!mask) return;
  rk::AttentionParams& p = a.p;
  const bool boolean = mask->scalar_type() == ScalarType::Bool;
  check_type("attn_mask", *mask, boolean ? ScalarType::Bool : a.type);
  require(mask->dim() == 4 && (mask->size(0) == 1 || mask->size(0) == p.B) &&
              (mask->size(1) == 1 || mask->size(1) == p.H) && mask->size(2) == p.n_queries && mask->size(3) == p.S,
          "attn_mask must have shape [B|1, H|1, queries, keys]");
  (boolean ? reinterpret_cast<const void*&>(p.bool_mask) : p.float_mask) = mask->const_data_ptr();
  p.mask_stride_b = mask->size(0) == 1 ? 0 : mask->stride(0),
  p.mask_stride_h = mask->size(1) == 1 ? 0 : mask->stride(1);
  p.mask_stride_q = mask->stride(2), p.mask_stride_k = mask->stride(3);
}

// Indices are read without another check.
void check_order(const rk::AttentionParams& p) {
  if (!p.order) return;
  for (int64_t i = 0; i < p.B * p.H; ++i)
    for (int64_t s = 0; s < p.n_sequences; ++s) {
      const int32_t* bounds = p.cu_seqlens ? p.cu_seqlens + i / p.H * p.bounds_stride : nullptr;
      const int64_t begin = bounds ? bounds[s] : 0, end = bounds ? bounds[s + 1] : p.L;
      check_index("order", p.order + p.R * (i * p.L + begin), p.R * (end - begin), end - begin);
    }
}

Attention chunk_attention(const AttentionInputs& in, const Mask& mask) {
  Attention a = attention(in);
  check_bounds(in.cu_seqlens, a.p.L);
  check_order(a.p);
  set_mask(a, mask.attn_mask);
  return a;
}

void chunk_attention_forward(const AttentionInputs& in, const Mask& mask, const AttentionResults<true>& results) {
  Attention a = chunk_attention(in, mask);
  set_results(a, results);
  use_large_pages(results.out);
  with_kernels(a.type, [&](const auto& k) { k.forward(a.p, threads()); });
}

void set_new_gradients(Attention& a, const Gradients& grads) {
  set_gradients(a, grads);
  for (const Tensor* t : {&grads.grad_query, &grads.grad_key, &grads.grad_value}) use_large_pages(*t);
}

void chunk_attention_backward(const AttentionInputs& in, const Mask& mask, const AttentionResults<false>& residuals,
                              const Gradients& grads) {
  Attention a = chunk_attention(in, mask);
  set_results(a, residuals);
  set_new_gradients(a, grads);
  with_kernels(a.type, [&](const auto& k) { k.backward(a.p, threads()); });
}

void select_keys(const SelectInputs& in, const Mask& mask) {
  Selection s = selection(in);
  check_order(s.a.p);
  set_mask(s.a, mask.attn_mask);
  const int64_t keys = s.a.p.S - s.a.p.context_keys, room = s.a.p.list_length - s.a.p.context_keys;
  for (int64_t i = 0; i < in.windows.numel() / 3; ++i) {
    const rk::LocalWindow& w = s.p.windows[i];
    require(0 <= w.begin && w.begin <= w.end && w.end <= keys && w.end - w.begin <= room && w.most <= s.a.p.list_length,
            "windows must lie in the ", keys, " keys and fit into the lists, got ", w.begin, " to ", w.end, ", ",
            w.most);
    require(s.a.p.R > 1 || w.most <= room, "windows must leave room for the context, got ", w.most);
  }
  s.p.attention = s.a.p;
  with_kernels(s.a.type, [&](const auto& k) { k.select(s.p, threads()); });
}

template <bool kWritten>
Attention list_attention(const ListInputs& in, const Mask& mask, const ListResults<kWritten>& results) {
  Attention a = with_lists(in, results);
  check_order(a.p);
  check_index("key_indices", a.p.key_indices, in.key_indices.numel(), a.p.S, -1);
  require(!mask.attn_mask || !a.p.has(rk::kRestKey), "the rest key does not go with attn_mask");
  set_mask(a, mask.attn_mask);
  return a;
}

void list_attention_forward(const ListInputs& in, const Mask& mask, const ListResults<true>& results) {
  const Attention a = list_attention(in, mask, results);
  use_large_pages(results.out);
  with_kernels(a.type, [&](const auto& k) { k.list_forward(a.p, threads()); });
}

void list_attention_backward(const ListInputs& in, const Mask& mask, const ListResults<false>& residuals,
                             const Gradients& grads) {
  Attention a = list_attention(in, mask, residuals);
  set_new_gradients(a, grads);
  with_kernels(a.type, [&](const auto& k) { k.list_backward(a.p, threads()); });
}

struct Isa {
  Arguments& next;
  std::string name = next.word("name");
};

std::string select_isa(const Isa& isa) {
  const std::string previous = rk::cpu::kernels().isa;
  require(rk::cpu::select(isa.name.c_str()), "isa must be one that this processor and build have, got ", isa.name);
  return previous;
}

std::string build_info() {
  std::string isas;
  for (const rk::cpu::Kernels* k : {rk::cpu::kernels_baseline(), rk::cpu::kernels_avx2(), rk::cpu::kernels_avx512()})
    if (k) isas += std::string(isas.empty() ? "" : ", ") + '"' + k->isa + '"';
  return "{\"torch\": \"" RK_BUILD_TORCH "\", \"no_cuda_because\": \"" RK_REASON_AGAINST_CUDA "\", \"isa\": [" + isas +
         "], \"isa_in_use\": \"" + rk::cpu::kernels().isa + "\"}";
}

const Op kOps[] = {
    op<hash_buckets>("hash_buckets"),
    op<bucket_order>("bucket_order"),
    op<chunk_attention_forward>("chunk_attention_forward"),
    op<chunk_attention_backward>("chunk_attention_backward"),
    op<select_keys>("select_keys"),
    op<list_attention_forward>("list_attention_forward"),
    op<list_attention_backward>("list_attention_backward"),
    op<select_isa>("select_isa"),
    op<build_info>("build_info"),
};

}  // namespace

STABLE_TORCH_LIBRARY(reformer_kernels_cpu, m) { define(m, kOps); }
STABLE_TORCH_LIBRARY_IMPL(reformer_kernels_cpu, CompositeExplicitAutograd, m) { implement(m, kOps); }
