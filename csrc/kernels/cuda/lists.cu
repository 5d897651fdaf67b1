// Launches the kernels of attention to lists of keys, around those of chunk attention.
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/lists.cuh"

namespace rk::cuda {
namespace {

ListArguments arguments(const AttentionParams& p, const RestParams& rest) {
  ListArguments a{};
  AttentionArguments& x = a.attention;
  x.query = p.query, x.out = p.out, x.grad_out = p.grad_out;
  x.grad_query = p.grad_query, x.grad_key = p.grad_key, x.grad_value = p.grad_value;
  x.order = p.order, x.lists = p.key_indices, x.padding = p.padding, x.lse = static_cast<float*>(p.lse);
  x.heads = p.B * p.H, x.L = static_cast<int>(p.L), x.S = static_cast<int>(p.S), x.R = static_cast<int>(p.R);
  x.H = static_cast<int>(p.H), x.group = static_cast<int>(p.group());
  x.D = static_cast<int>(p.D), x.E = static_cast<int>(p.E), x.chunk_length = static_cast<int>(p.chunk_length);
  x.list_length = static_cast<int>(p.list_length), x.list_stride = static_cast<int>(list_stride(p));
  x.n_context = static_cast<int>(p.context_keys), x.scale = static_cast<float>(p.scale),
  x.flags = static_cast<uint32_t>(p.flags);
  a.entries = list_entries(p);
  a.key_sums = rest.key_sums, a.value_sums = rest.value_sums, a.counts = rest.counts;
  a.query_terms = rest.query_terms, a.value_terms = rest.value_terms;
  a.key_grads = rest.key_grads, a.value_grads = rest.value_grads;
  a.sum_rows = static_cast<int>(rest.sum_rows), a.grad_rows = static_cast<int>(rest.grad_rows);
  return a;
}

using Kernel = void(ListArguments);

// Chooses the kernel for the type of rows.
Kernel* of_element(Element element, Kernel* bfloat16, Kernel* float16, Kernel* float32) {
  return element == Element::kBFloat16 ? bfloat16 : element == Element::kFloat16 ? float16 : float32;
}

int launch_items(Kernel* kernel, const ListArguments& a, int64_t items, int items_per_block, void* stream) {
  const Launch shape{{static_cast<uint32_t>(ceil_div(items, items_per_block)), 1, 1}, kAttentionThreads, 0};
  return items > 0 ? launch(kernel, shape, a, stream) : cudaSuccess;
}

constexpr int kWarps = kAttentionThreads / kWarp;

}  // namespace

int list_attention_forward(const AttentionParams& p, const RestParams& rest, const Device& device, void* stream) {
  const int error = attention_forward(p, p.L, device, nullptr, stream);
  if (error || !p.has(kRestKey)) return error;
  Kernel* kernel =
      of_element(p.element, rest_forward_kernel<bf16>, rest_forward_kernel<fp16>, rest_forward_kernel<float>);
  return launch_items(kernel, arguments(p, rest), p.B * p.H * p.L, kWarps, stream);
}

int list_rest_backward(const AttentionParams& p, const RestParams& rest, void* stream) {
  Kernel* kernel =
      of_element(p.element, rest_backward_kernel<bf16>, rest_backward_kernel<fp16>, rest_backward_kernel<float>);
  return launch_items(kernel, arguments(p, rest), p.B * p.H * p.L, kWarps, stream);
}

int list_attention_backward(const AttentionParams& p, const RestParams& rest, const Device& device, void* memory,
                            void* stream) {
  const ListScratch scratch = plan_list_scratch(p, device);
  const auto at = [&](int64_t bytes) { return static_cast<char*>(memory) + bytes; };
  const auto numbers = [&](int64_t bytes) { return reinterpret_cast<int32_t*>(at(bytes)); };
  ListArguments a = arguments(p, rest);
  const auto entry_rows = [&](int64_t bytes) {
    return Rows{at(bytes), p.H * a.entries * scratch.row, a.entries * scratch.row, scratch.row};
  };
  a.entry_grad_keys = entry_rows(scratch.entry_grad_keys), a.entry_grad_values = entry_rows(scratch.entry_grad_values);
  a.keys = numbers(scratch.keys), a.order = numbers(scratch.order), a.starts = numbers(scratch.starts);

  AttentionParams of_entries = p;
  of_entries.grad_key = a.entry_grad_keys, of_entries.grad_value = a.entry_grad_values;
  int error = attention_backward(of_entries, p.L, device, memory, stream);
  const int64_t heads = p.B * p.H;
  if (!error) error = launch_items(list_keys_kernel, a, heads * a.entries, kAttentionThreads, stream);
  OrderParams sort = list_order(p);
  sort.buckets = a.keys, sort.order = numbers(scratch.order);
  if (!error) error = bucket_order(sort, device, numbers(scratch.other_order), numbers(scratch.counts), stream);
  if (!error) error = launch_items(list_starts_kernel, a, heads * (a.entries + 1), kAttentionThreads, stream);
  Kernel* kernel = of_element(p.element, list_sum_kernel<bf16>, list_sum_kernel<fp16>, list_sum_kernel<float>);
  return error ? error : launch_items(kernel, a, p.B * p.key_heads * p.S, kWarps, stream);
}

}  // namespace rk::cuda
