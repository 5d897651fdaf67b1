// Chunk attention's tensors, checked, as the plain arguments of its kernels.
#pragma once
#include "binding/ops.h"

namespace rk::binding {

struct AttentionInputs {
  Arguments& next;
  Tensor query = next.tensor("query");
  OptionalTensor key = next.optional_tensor("key");
  Tensor value = next.tensor("value");
  OptionalTensor order = next.optional_tensor("order");
  OptionalTensor buckets = next.optional_tensor("buckets");
  OptionalTensor key_padding_mask = next.optional_tensor("key_padding_mask");
  OptionalTensor cu_seqlens = next.optional_tensor("cu_seqlens");
  OptionalTensor dropout_seed = next.optional_tensor("dropout_seed");
  int64_t chunk_length = next.integer("chunk_length");
  int64_t chunks_before = next.integer("chunks_before");
  int64_t chunks_after = next.integer("chunks_after");
  int64_t n_queries = next.integer("n_queries");
  double scale = next.number("scale");
  int64_t drop_threshold = next.integer("drop_threshold");
  double keep_factor = next.number("keep_factor");
  int64_t flags = next.integer("flags");
};

struct ListInputs {
  Arguments& next;
  Tensor query = next.tensor("query");
  Tensor key = next.tensor("key");
  Tensor value = next.tensor("value");
  OptionalTensor order = next.optional_tensor("order");
  Tensor key_indices = next.tensor("key_indices");
  OptionalTensor key_padding_mask = next.optional_tensor("key_padding_mask");
  OptionalTensor dropout_seed = next.optional_tensor("dropout_seed");
  int64_t chunk_length = next.integer("chunk_length");
  int64_t context_keys = next.integer("context_keys");
  double scale = next.number("scale");
  int64_t drop_threshold = next.integer("drop_threshold");
  double keep_factor = next.number("keep_factor");
  int64_t flags = next.integer("flags");
};

struct SelectInputs {
  Arguments& next;
  Tensor query = next.tensor("query");
  Tensor key = next.tensor("key");
  OptionalTensor order = next.optional_tensor("order");
  OptionalTensor query_padding_mask = next.optional_tensor("query_padding_mask");
  OptionalTensor key_padding_mask = next.optional_tensor("key_padding_mask");
  Tensor windows = next.tensor("windows");
  int64_t chunk_length = next.integer("chunk_length");
  int64_t budget = next.integer("budget");
  int64_t context_keys = next.integer("context_keys");
  double scale = next.number("scale");
  int64_t flags = next.integer("flags");
  Tensor lists = next.tensor("lists", true);
};

// What forward writes, and backward reads.
template <bool kWritten>
struct AttentionResults {
  Arguments& next;
  Tensor out = next.tensor("out", kWritten);
  Tensor lse = next.tensor("lse", kWritten);
  Tensor self_only = next.tensor("self_only", kWritten);
};

template <bool kWritten>
struct ListResults {
  Arguments& next;
  Tensor out = next.tensor("out", kWritten);
  Tensor lse = next.tensor("lse", kWritten);
};

struct Gradients {
  Arguments& next;
  Tensor grad_out = next.tensor("grad_out");
  Tensor grad_query = next.tensor("grad_query", true);
  Tensor grad_key = next.tensor("grad_key", true);  // not used where the key is shared
  Tensor grad_value = next.tensor("grad_value", true);
};

struct Attention {
  AttentionParams p{};
  ScalarType type, rows_type;  // of the arithmetic, and of the rows
};

constexpr char kNoRows = 0;  // the address of a key without elements; null would mean shared rows

template <class Inputs>
void set_dropout(AttentionParams& p, const Inputs& in) {
  p.keep_factor = in.keep_factor, p.drop_threshold = static_cast<uint32_t>(in.drop_threshold);
  if (!p.dropout()) return;
  require(in.dropout_seed && in.dropout_seed->numel() == 1, "dropout_seed must have one element");
  check_type("dropout_seed", *in.dropout_seed, ScalarType::Long);
  p.dropout_seed = static_cast<const int64_t*>(in.dropout_seed->const_data_ptr());
}

inline Attention attention(const AttentionInputs& in) {
  const Tensor &query = in.query, &value = in.value;
  const OptionalTensor& key = in.key;
  Attention a;
  a.type = compute_type(query), a.rows_type = query.scalar_type();
  require(query.dim() == 4 && value.dim() == 4, "query and value must have 4 dimensions");
  AttentionParams& p = a.p;
  p.element = element_of(query);
  p.B = query.size(0), p.H = query.size(1), p.L = query.size(2), p.D = query.size(3), p.E = value.size(3);
  p.S = p.L, p.key_heads = p.H, p.R = in.order ? in.order->size(2) : 1;
  if (key) {
    require(key->dim() == 4 && key->size(1) >= 1 && p.H % key->size(1) == 0,
            "key must have 4 dimensions, and a number of heads that divides the query's");
    p.key_heads = key->size(1);
  }
  require(in.chunk_length >= 1 && in.chunks_before >= 0 && in.chunks_after >= 0,
          "chunk_length must be positive, its neighbours at least 0");
  require(in.n_queries >= 0 && in.n_queries <= p.L, "num_queries must be between 0 and ", p.L, ", got ", in.n_queries);
  require(p.R >= 1 && p.R * p.L <= INT32_MAX, "n_hashes * L must be below 2**31, got ", p.R, " * ", p.L);
  // No chunk is longer than the rows, and no window longer than it can get: buffers are sized by these.
  p.chunk_length = std::min(in.chunk_length, std::max<int64_t>(1, p.L));
  constexpr int64_t kMaxNeighbours = 1024;
  require(in.chunks_before <= kMaxNeighbours && in.chunks_after <= kMaxNeighbours,
          "chunks_before and chunks_after must be at most ", kMaxNeighbours);
  p.n_queries = in.n_queries, p.flags = in.flags, p.scale = in.scale;
  int64_t widest = kMaxNeighbours;
  if (!p.ring()) widest = (p.L + p.chunk_length - 1) / p.chunk_length;
  if (is_single_window(p.L, p.chunk_length, p.ring())) widest = 0;
  p.chunks_before = std::min(in.chunks_before, widest), p.chunks_after = std::min(in.chunks_after, widest);
  p.query = rows("query", query, a.rows_type, p.B, p.H, p.L, p.D);
  if (key) p.key = rows("key", *key, a.rows_type, p.B, p.key_heads, p.L, p.D);
  if (key && !p.key.data) p.key.data = const_cast<char*>(&kNoRows);
  p.value = rows("value", value, a.rows_type, p.B, p.key_heads, p.L, p.E);
  p.order = contiguous<int32_t>("order", in.order, ScalarType::Int, {p.B, p.H, p.R, p.L});
  p.buckets = contiguous<int32_t>("buckets", in.buckets, ScalarType::Int, {p.B, p.H, p.R, p.L});
  require((in.order && in.buckets) || p.ring(), "bucket alignment needs order and buckets");
  p.padding = contiguous<bool>("key_padding_mask", in.key_padding_mask, ScalarType::Bool, {p.B, p.L});
  set_sequences(p, in.cu_seqlens, p.B);
  set_dropout(p, in);
  return a;
}

template <bool kWritten>
void set_results(Attention& a, const AttentionResults<kWritten>& results) {
  AttentionParams& p = a.p;
  p.out = rows("out", results.out, a.rows_type, p.B, p.H, p.n_queries, p.E);
  p.lse = const_cast<char*>(contiguous<char>("lse", results.lse, a.type, {p.B, p.H, p.n_queries}));
  p.self_only =
      const_cast<bool*>(contiguous<bool>("self_only", results.self_only, ScalarType::Bool, {p.B, p.H, p.n_queries}));
}

inline void set_gradients(Attention& a, const Gradients& grads) {
  AttentionParams& p = a.p;
  p.grad_out = rows("grad_out", grads.grad_out, a.rows_type, p.B, p.H, p.n_queries, p.E);
  p.grad_query = rows("grad_query", grads.grad_query, a.rows_type, p.B, p.H, p.L, p.D);
  if (!p.shared_qk()) p.grad_key = rows("grad_key", grads.grad_key, a.rows_type, p.B, p.key_heads, p.S, p.D);
  p.grad_value = rows("grad_value", grads.grad_value, a.rows_type, p.B, p.key_heads, p.S, p.E);
}

// ---- lists of keys

// What attention to lists of keys and the choice of the lists, which has no value, have in common.
template <class Inputs>
Attention list_params(const Inputs& in, const Tensor* value, const char* lists_name, const Tensor& lists) {
  const Tensor &query = in.query, &key = in.key;
  Attention a;
  a.type = compute_type(query), a.rows_type = query.scalar_type();
  require(query.dim() == 4 && key.dim() == 4 && lists.dim() == 4 && (!value || value->dim() == 4),
          "query, key, value and lists must have 4 dimensions");
  AttentionParams& p = a.p;
  p.element = element_of(query);
  p.B = query.size(0), p.H = query.size(1), p.L = query.size(2), p.D = query.size(3), p.E = 1;
  p.S = key.size(2), p.key_heads = key.size(1), p.R = in.order ? in.order->size(2) : 1;
  p.n_queries = p.L, p.n_sequences = 1, p.flags = in.flags, p.scale = in.scale, p.keep_factor = 1;
  p.chunk_length = std::min(in.chunk_length, std::max<int64_t>(1, p.L));
  p.list_length = lists.size(3), p.context_keys = in.context_keys;
  require(p.key_heads >= 1 && p.H % p.key_heads == 0, "the heads of key must divide those of query");
  require(in.chunk_length >= 1, "chunk_length must be positive");
  require(p.list_length >= 1 && p.list_length <= INT32_MAX, "lists must have a length of at least 1");
  require(in.context_keys >= 0 && in.context_keys <= p.S, "context_keys must be between 0 and ", p.S);
  require(p.R >= 1 && p.R <= 2 && p.R * p.L <= INT32_MAX && p.S < INT32_MAX,
          "order must have 1 or 2 rounds, and lengths must be below 2**31");
  p.query = rows("query", query, a.rows_type, p.B, p.H, p.L, p.D);
  p.key = rows("key", key, a.rows_type, p.B, p.key_heads, p.S, p.D);
  if (!p.key.data) p.key.data = const_cast<char*>(&kNoRows);
  if (value) {
    p.E = value->size(3);
    p.value = rows("value", *value, a.rows_type, p.B, p.key_heads, p.S, p.E);
  }
  p.order = contiguous<int32_t>("order", in.order, ScalarType::Int, {p.B, p.H, p.R, p.L});
  p.padding = contiguous<bool>("key_padding_mask", in.key_padding_mask, ScalarType::Bool, {p.B, p.S});
  p.key_indices = contiguous<int32_t>(lists_name, lists, ScalarType::Int,
                                      {p.B, p.H, p.R * ((p.L + p.chunk_length - 1) / p.chunk_length), p.list_length});
  return a;
}

template <bool kWritten>
Attention with_lists(const ListInputs& in, const ListResults<kWritten>& results) {
  Attention a = list_params(in, &in.value, "key_indices", in.key_indices);
  set_dropout(a.p, in);
  a.p.out = rows("out", results.out, a.rows_type, a.p.B, a.p.H, a.p.L, a.p.E);
  a.p.lse = const_cast<char*>(contiguous<char>("lse", results.lse, a.type, {a.p.B, a.p.H, a.p.L}));
  return a;
}

struct Selection {
  Attention a;
  SelectParams p;
};

inline Selection selection(const SelectInputs& in) {
  Selection s{list_params(in, nullptr, "lists", in.lists), {}};
  AttentionParams& p = s.a.p;
  // Not cut at the rows: quarters of a chunk do not depend on how many rows there are.
  p.chunk_length = std::min<int64_t>(in.chunk_length, INT32_MAX);
  require(in.budget >= 1, "budget must be positive, got ", in.budget);
  require(p.list_length >= in.context_keys, "lists must have room for ", in.context_keys, " keys, got ", p.list_length);
  s.p.budget = std::min<int64_t>(in.budget, INT32_MAX);
  s.p.windows = contiguous<LocalWindow>("windows", in.windows, ScalarType::Int,
                                        {p.B, (p.L + p.chunk_length - 1) / p.chunk_length, 3});
  s.p.query_padding = contiguous<bool>("query_padding_mask", in.query_padding_mask, ScalarType::Bool, {p.B, p.L});
  s.p.lists = const_cast<int32_t*>(p.key_indices), p.key_indices = nullptr;
  s.p.attention = p;
  return s;
}

}  // namespace rk::binding
