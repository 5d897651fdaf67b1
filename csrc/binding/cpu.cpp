// The CPU kernels as torch ops, on torch's stable ABI. Outputs are allocated by the caller.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <string>
#include <vector>

#include "binding/attention.h"
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

void check_bounds(const int32_t* bounds, int64_t count, int64_t L) {
  require(!bounds || (bounds[0] == 0 && bounds[count] == L && std::is_sorted(bounds, bounds + count + 1)),
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

void hash_buckets(Tensor x, Tensor rotations, OptionalTensor padding, std::vector<int64_t> factors, Tensor buckets) {
  const rk::HashParams p = hash_params(x, rotations, padding, factors, buckets);
  with_kernels(compute_type(x), [&](const auto& k) { k.hash(p, threads()); });
}

// Returns how many rows have a bucket out of range; then the order is not to be used.
int64_t bucket_order(Tensor buckets, OptionalTensor cu_seqlens, int64_t n_buckets, Tensor order) {
  rk::OrderParams p = order_params(buckets, n_buckets, order);
  p.cu_seqlens = sequence_bounds(cu_seqlens, p.n_sequences);
  check_bounds(p.cu_seqlens, p.n_sequences, p.L);
  int64_t invalid = 0;
  with_kernels(ScalarType::Float, [&](const auto&) { invalid = rk::cpu::bucket_order(p, threads()); });
  return invalid;
}

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
  check_bounds(p.cu_seqlens, p.n_sequences, p.L);
  if (!p.order) return;
  for (int64_t i = 0; i < p.B * p.H; ++i)
    for (int64_t s = 0; s < p.n_sequences; ++s) {
      const int64_t begin = p.cu_seqlens ? p.cu_seqlens[s] : 0, end = p.cu_seqlens ? p.cu_seqlens[s + 1] : p.L;
      check_index("order", p.order + p.R * (i * p.L + begin), p.R * (end - begin), end - begin);
    }
}

// Attention to lists of keys, or (without value and lists) the choice of the lists.
Attention list_attention(const Tensor& query, const Tensor& key, const Tensor* value, const OptionalTensor& order,
                         const OptionalTensor& padding, const OptionalTensor& mask, int64_t chunk_length,
                         int64_t list_length, int64_t context_keys, double scale, int64_t flags) {
  Attention a;
  a.type = compute_type(query), a.rows_type = query.scalar_type();
  require(query.dim() == 4 && key.dim() == 4, "query and key must have 4 dimensions");
  rk::AttentionParams& p = a.p;
  p.element = element_of(query);
  p.B = query.size(0), p.H = query.size(1), p.L = query.size(2), p.D = query.size(3), p.E = 1;
  p.S = key.size(2), p.key_heads = key.size(1), p.R = order ? order->size(2) : 1;
  p.n_queries = p.L, p.n_sequences = 1, p.flags = flags, p.scale = scale, p.keep_factor = 1;
  p.chunk_length = std::min(chunk_length, std::max<int64_t>(1, p.L));
  p.list_length = list_length, p.context_keys = context_keys;
  require(p.key_heads >= 1 && p.H % p.key_heads == 0, "the heads of key must divide those of query");
  require(chunk_length >= 1, "chunk_length must be positive");
  require(list_length >= 1 && list_length <= INT32_MAX, "lists must have a length of at least 1");
  require(context_keys >= 0 && context_keys <= p.S, "context_keys must be between 0 and ", p.S);
  require(p.R >= 1 && p.R <= 2 && p.R * p.L <= INT32_MAX && p.S < INT32_MAX,
          "order must have 1 or 2 rounds, and lengths must be below 2**31");
  p.query = rows("query", query, a.rows_type, p.B, p.H, p.L, p.D);
  p.key = rows("key", key, a.rows_type, p.B, p.key_heads, p.S, p.D);
  if (!p.key.data) p.key.data = const_cast<char*>(&kNoRows);
  if (value) {
    p.E = value->size(3);
    p.value = rows("value", *value, a.rows_type, p.B, p.key_heads, p.S, p.E);
  }
  p.order = contiguous<int32_t>("order", order, ScalarType::Int, {p.B, p.H, p.R, p.L});
  if (p.order) check_index("order", p.order, p.B * p.H * p.R * p.L, p.L);
  p.padding = contiguous<bool>("key_padding_mask", padding, ScalarType::Bool, {p.B, p.S});
  set_mask(a, mask);
  return a;
}

int64_t list_rows(const rk::AttentionParams& p) { return p.R * ((p.L + p.chunk_length - 1) / p.chunk_length); }

Attention chunk_attention(OptionalTensor mask, RK_ATTENTION_PARAMETERS) {
  Attention a = attention(RK_ATTENTION_ARGUMENTS);
  check_order(a.p);
  set_mask(a, mask);
  return a;
}

void chunk_attention_forward(OptionalTensor mask, RK_ATTENTION_PARAMETERS, Tensor out, Tensor lse, Tensor self_only) {
  Attention a = chunk_attention(mask, RK_ATTENTION_ARGUMENTS);
  set_residuals(a, out, lse, self_only);
  use_large_pages(out);
  with_kernels(a.type, [&](const auto& k) { k.forward(a.p, threads()); });
}

void chunk_attention_backward(OptionalTensor mask, RK_ATTENTION_PARAMETERS, Tensor grad_out, Tensor out, Tensor lse,
                              Tensor self_only, Tensor grad_query, Tensor grad_key, Tensor grad_value) {
  Attention a = chunk_attention(mask, RK_ATTENTION_ARGUMENTS);
  set_residuals(a, out, lse, self_only);
  set_gradients(a, grad_out, grad_query, grad_key, grad_value);
  for (const Tensor* t : {&grad_query, &grad_key, &grad_value}) use_large_pages(*t);
  with_kernels(a.type, [&](const auto& k) { k.backward(a.p, threads()); });
}

void select_keys(Tensor query, Tensor key, OptionalTensor order, OptionalTensor query_padding, OptionalTensor padding,
                 OptionalTensor mask, int64_t chunk_length, int64_t budget, int64_t local, int64_t context_keys,
                 double scale, int64_t flags, Tensor lists) {
  require(lists.dim() == 4, "lists must have 4 dimensions");
  const Attention a = list_attention(query, key, nullptr, order, padding, mask, chunk_length, lists.size(3),
                                     context_keys, scale, flags);
  const rk::AttentionParams& p = a.p;
  require(local >= 0 && local <= budget, "the local window must be between 0 and the budget");
  const int64_t keys = p.S - context_keys, most = std::min(p.R == 1 ? budget : budget - local, keys);
  const int64_t longest = p.R == 1 ? context_keys + most : std::max(context_keys + std::min(local, keys), most);
  require(p.list_length >= longest, "lists must have room for ", longest, " keys, got ", p.list_length);
  rk::SelectParams s{p, std::min<int64_t>(budget, INT32_MAX), std::min<int64_t>(local, INT32_MAX), nullptr, nullptr};
  s.query_padding = contiguous<bool>("query_padding_mask", query_padding, ScalarType::Bool, {p.B, p.L});
  s.lists = const_cast<int32_t*>(
      contiguous<int32_t>("lists", lists, ScalarType::Int, {p.B, p.H, list_rows(p), p.list_length}));
  with_kernels(a.type, [&](const auto& k) { k.select(s, threads()); });
}

#define RK_LIST_PARAMETERS                                                                                        \
  Tensor query, Tensor key, Tensor value, OptionalTensor order, Tensor lists, OptionalTensor padding,             \
      OptionalTensor mask, OptionalTensor dropout_seed, int64_t chunk_length, int64_t context_keys, double scale, \
      int64_t drop_threshold, double keep_factor, int64_t flags, Tensor out, Tensor lse
#define RK_LIST_ARGUMENTS                                                                                          \
  query, key, value, order, lists, padding, mask, dropout_seed, chunk_length, context_keys, scale, drop_threshold, \
      keep_factor, flags, out, lse

Attention with_lists(RK_LIST_PARAMETERS) {
  require(lists.dim() == 4 && value.dim() == 4, "key_lists and value must have 4 dimensions");
  Attention a =
      list_attention(query, key, &value, order, padding, mask, chunk_length, lists.size(3), context_keys, scale, flags);
  rk::AttentionParams& p = a.p;
  p.key_lists = contiguous<int32_t>("key_lists", lists, ScalarType::Int, {p.B, p.H, list_rows(p), p.list_length});
  check_index("key_lists", p.key_lists, lists.numel(), p.S, -1);
  require(!mask || !p.has(rk::kRest), "the rest term does not go with attn_mask");
  set_dropout(p, dropout_seed, drop_threshold, keep_factor);
  p.out = rows("out", out, a.rows_type, p.B, p.H, p.L, p.E);
  p.lse = const_cast<char*>(contiguous<char>("lse", lse, a.type, {p.B, p.H, p.L}));
  return a;
}

void list_attention_forward(RK_LIST_PARAMETERS) {
  const Attention a = with_lists(RK_LIST_ARGUMENTS);
  use_large_pages(out);
  with_kernels(a.type, [&](const auto& k) { k.list_forward(a.p, threads()); });
}

void list_attention_backward(RK_LIST_PARAMETERS, Tensor grad_out, Tensor grad_query, Tensor grad_key,
                             Tensor grad_value) {
  Attention a = with_lists(RK_LIST_ARGUMENTS);
  set_gradients(a, grad_out, grad_query, grad_key, grad_value);
  for (const Tensor* t : {&grad_query, &grad_key, &grad_value}) use_large_pages(*t);
  with_kernels(a.type, [&](const auto& k) { k.list_backward(a.p, threads()); });
}

std::string select_isa(std::string name) {
  const std::string previous = rk::cpu::kernels().isa;
  require(rk::cpu::select(name.c_str()), "isa must be one that this processor and build have, got ", name);
  return previous;
}

std::string build_info() {
  std::string isas;
  for (const rk::cpu::Kernels* k : {rk::cpu::kernels_baseline(), rk::cpu::kernels_avx2(), rk::cpu::kernels_avx512()})
    if (k) isas += std::string(isas.empty() ? "" : ", ") + '"' + k->isa + '"';
  return "{\"torch\": \"" RK_BUILD_TORCH "\", \"no_cuda_because\": \"" RK_REASON_AGAINST_CUDA "\", \"isa\": [" + isas +
         "], \"isa_in_use\": \"" + rk::cpu::kernels().isa + "\"}";
}

constexpr char kListSchema[] =
    "Tensor query, Tensor key, Tensor value, Tensor? order, Tensor key_lists, Tensor? key_padding_mask, Tensor? "
    "attn_mask, Tensor? dropout_seed, int chunk_length, int context_keys, float scale, int drop_threshold, float "
    "keep_factor, int flags, ";

}  // namespace

STABLE_TORCH_LIBRARY(reformer_kernels_cpu, m) {
  // The mask comes first, for all others go on to `attention`.
  const std::string attention = "Tensor? attn_mask, Tensor query, Tensor? key, Tensor value, " RK_ATTENTION_SCHEMA;
  m.def(
      "hash_buckets(Tensor x, Tensor rotations, Tensor? key_padding_mask, int[] n_buckets, Tensor(a!) buckets) -> ()");
  m.def("bucket_order(Tensor buckets, Tensor? cu_seqlens, int n_buckets, Tensor(a!) order) -> int");
  m.def(
      ("chunk_attention_forward(" + attention + "Tensor(a!) out, Tensor(b!) lse, Tensor(c!) self_only) -> ()").c_str());
  m.def(("chunk_attention_backward(" + attention +
         "Tensor grad_out, Tensor out, Tensor lse, Tensor self_only, Tensor(a!) grad_query, Tensor(b!) grad_key, "
         "Tensor(c!) grad_value) -> ()")
            .c_str());
  m.def(
      "select_keys(Tensor query, Tensor key, Tensor? order, Tensor? query_padding_mask, Tensor? key_padding_mask, "
      "Tensor? attn_mask, int "
      "chunk_length, int budget, int local, int context_keys, float scale, int flags, Tensor(a!) lists) -> ()");
  const std::string lists = kListSchema;
  m.def(("list_attention_forward(" + lists + "Tensor(a!) out, Tensor(b!) lse) -> ()").c_str());
  m.def(("list_attention_backward(" + lists +
         "Tensor out, Tensor lse, Tensor grad_out, Tensor(a!) grad_query, Tensor(b!) grad_key, Tensor(c!) grad_value) "
         "-> ()")
            .c_str());
  m.def("select_isa(str name) -> str");
  m.def("build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(reformer_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("hash_buckets", TORCH_BOX(&hash_buckets));
  m.impl("bucket_order", TORCH_BOX(&bucket_order));
  m.impl("chunk_attention_forward", TORCH_BOX(&chunk_attention_forward));
  m.impl("chunk_attention_backward", TORCH_BOX(&chunk_attention_backward));
  m.impl("select_keys", TORCH_BOX(&select_keys));
  m.impl("list_attention_forward", TORCH_BOX(&list_attention_forward));
  m.impl("list_attention_backward", TORCH_BOX(&list_attention_backward));
  m.impl("select_isa", TORCH_BOX(&select_isa));
  m.impl("build_info", TORCH_BOX(&build_info));
}
