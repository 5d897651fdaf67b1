// Chunk attention's tensors, checked, as the plain arguments of its kernels.
#pragma once
#include "binding/tensors.h"

namespace rk::binding {

#define RK_ATTENTION_PARAMETERS                                                                             \
  Tensor query, OptionalTensor key, Tensor value, OptionalTensor order, OptionalTensor buckets,             \
      OptionalTensor padding, OptionalTensor cu_seqlens, OptionalTensor dropout_seed, int64_t chunk_length, \
      int64_t chunks_before, int64_t chunks_after, int64_t n_queries, double scale, int64_t drop_threshold, \
      double keep_factor, int64_t flags
#define RK_ATTENTION_ARGUMENTS                                                                                     \
  query, key, value, order, buckets, padding, cu_seqlens, dropout_seed, chunk_length, chunks_before, chunks_after, \
      n_queries, scale, drop_threshold, keep_factor, flags
#define RK_ATTENTION_SCHEMA                                                                                 \
  "Tensor? order, Tensor? buckets, Tensor? key_padding_mask, Tensor? cu_seqlens, Tensor? dropout_seed, "    \
  "int chunk_length, int chunks_before, int chunks_after, int n_queries, float scale, int drop_threshold, " \
  "float keep_factor, int flags, "

struct Attention {
  AttentionParams p{};
  ScalarType type, rows_type;  // of the arithmetic, and of the rows
};

constexpr char kNoRows = 0;  // what a key without elements points to, which is not a shared one

inline void set_dropout(AttentionParams& p, const OptionalTensor& seed, int64_t drop_threshold, double keep_factor) {
  p.keep_factor = keep_factor, p.drop_threshold = static_cast<uint32_t>(drop_threshold);
  if (!p.dropout()) return;
  require(seed && seed->numel() == 1, "dropout_seed must have one element");
  check_type("dropout_seed", *seed, ScalarType::Long);
  p.dropout_seed = static_cast<const int64_t*>(seed->const_data_ptr());
}

inline Attention attention(RK_ATTENTION_PARAMETERS) {
  Attention a;
  a.type = compute_type(query), a.rows_type = query.scalar_type();
  require(query.dim() == 4 && value.dim() == 4, "query and value must have 4 dimensions");
  AttentionParams& p = a.p;
  p.element = element_of(query);
  p.B = query.size(0), p.H = query.size(1), p.L = query.size(2), p.D = query.size(3), p.E = value.size(3);
  p.S = p.L, p.key_heads = p.H, p.R = order ? order->size(2) : 1;
  if (key) {
    require(key->dim() == 4 && key->size(1) >= 1 && p.H % key->size(1) == 0,
            "key must have 4 dimensions, and a number of heads that divides the query's");
    p.key_heads = key->size(1);
  }
  require(chunk_length >= 1 && chunks_before >= 0 && chunks_after >= 0,
          "chunk_length must be positive, its neighbours at least 0");
  require(n_queries >= 0 && n_queries <= p.L, "num_queries must be between 0 and ", p.L, ", got ", n_queries);
  require(p.R >= 1 && p.R * p.L <= INT32_MAX, "n_hashes * L must be below 2**31, got ", p.R, " * ", p.L);
  // No chunk is longer than the rows, and no window longer than it can get: buffers are sized by these.
  p.chunk_length = std::min(chunk_length, std::max<int64_t>(1, p.L));
  const int64_t bucket_chunks = (p.L + p.chunk_length - 1) / p.chunk_length;
  const int64_t widest = flags & kBucketAligned ? bucket_chunks : p.L <= p.chunk_length ? 0 : 1024;
  require(chunks_before <= 1024 && chunks_after <= 1024, "chunks_before and chunks_after must be at most 1024");
  p.chunks_before = std::min(chunks_before, widest), p.chunks_after = std::min(chunks_after, widest);
  p.n_queries = n_queries, p.flags = flags, p.scale = scale;
  p.query = rows("query", query, a.rows_type, p.B, p.H, p.L, p.D);
  if (key) p.key = rows("key", *key, a.rows_type, p.B, p.key_heads, p.L, p.D);
  if (key && !p.key.data) p.key.data = const_cast<char*>(&kNoRows);
  p.value = rows("value", value, a.rows_type, p.B, p.key_heads, p.L, p.E);
  p.order = contiguous<int32_t>("order", order, ScalarType::Int, {p.B, p.H, p.R, p.L});
  p.buckets = contiguous<int32_t>("buckets", buckets, ScalarType::Int, {p.B, p.H, p.R, p.L});
  require((order && buckets) || !p.has(kBucketAligned), "bucket alignment needs order and buckets");
  p.padding = contiguous<bool>("key_padding_mask", padding, ScalarType::Bool, {p.B, p.L});
  set_sequences(p, cu_seqlens, p.B);
  set_dropout(p, dropout_seed, drop_threshold, keep_factor);
  return a;
}

// out, lse and self_only, which forward writes and backward reads.
inline void set_residuals(Attention& a, const Tensor& out, const Tensor& lse, const Tensor& self_only) {
  AttentionParams& p = a.p;
  p.out = rows("out", out, a.rows_type, p.B, p.H, p.n_queries, p.E);
  p.lse = const_cast<char*>(contiguous<char>("lse", lse, a.type, {p.B, p.H, p.n_queries}));
  p.self_only = const_cast<bool*>(contiguous<bool>("self_only", self_only, ScalarType::Bool, {p.B, p.H, p.n_queries}));
}

// grad_key is not read where the key is shared.
inline void set_gradients(Attention& a, const Tensor& grad_out, const Tensor& grad_query, const Tensor& grad_key,
                          const Tensor& grad_value) {
  AttentionParams& p = a.p;
  p.grad_out = rows("grad_out", grad_out, a.rows_type, p.B, p.H, p.n_queries, p.E);
  p.grad_query = rows("grad_query", grad_query, a.rows_type, p.B, p.H, p.L, p.D);
  if (!p.shared_qk()) p.grad_key = rows("grad_key", grad_key, a.rows_type, p.B, p.key_heads, p.S, p.D);
  p.grad_value = rows("grad_value", grad_value, a.rows_type, p.B, p.key_heads, p.S, p.E);
}

// ---- lists of keys

#define RK_LIST_PARAMETERS                                                                                           \
  Tensor query, Tensor key, Tensor value, OptionalTensor order, Tensor key_indices, OptionalTensor padding,          \
      OptionalTensor dropout_seed, int64_t chunk_length, int64_t context_keys, double scale, int64_t drop_threshold, \
      double keep_factor, int64_t flags, Tensor out, Tensor lse
#define RK_LIST_ARGUMENTS                                                                                          \
  query, key, value, order, key_indices, padding, dropout_seed, chunk_length, context_keys, scale, drop_threshold, \
      keep_factor, flags, out, lse
#define RK_LIST_SCHEMA                                                                                    \
  "Tensor query, Tensor key, Tensor value, Tensor? order, Tensor key_indices, Tensor? key_padding_mask, " \
  "Tensor? dropout_seed, int chunk_length, int context_keys, float scale, int drop_threshold, "           \
  "float keep_factor, int flags, "
#define RK_SELECT_PARAMETERS                                                                                   \
  Tensor query, Tensor key, OptionalTensor order, OptionalTensor query_padding, OptionalTensor padding,        \
      Tensor windows, int64_t chunk_length, int64_t budget, int64_t context_keys, double scale, int64_t flags, \
      Tensor lists
#define RK_SELECT_ARGUMENTS \
  query, key, order, query_padding, padding, windows, chunk_length, budget, context_keys, scale, flags, lists
#define RK_SELECT_SCHEMA                                                                            \
  "Tensor query, Tensor key, Tensor? order, Tensor? query_padding_mask, Tensor? key_padding_mask, " \
  "Tensor windows, int chunk_length, int budget, int context_keys, float scale, int flags, "

// Attention to lists of keys, or (without value and lists) the choice of the lists.
inline Attention list_params(const Tensor& query, const Tensor& key, const Tensor* value, const OptionalTensor& order,
                             const OptionalTensor& padding, int64_t chunk_length, const Tensor& lists,
                             int64_t context_keys, double scale, int64_t flags) {
  Attention a;
  a.type = compute_type(query), a.rows_type = query.scalar_type();
  require(query.dim() == 4 && key.dim() == 4 && lists.dim() == 4 && (!value || value->dim() == 4),
          "query, key, value and lists must have 4 dimensions");
  AttentionParams& p = a.p;
  p.element = element_of(query);
  p.B = query.size(0), p.H = query.size(1), p.L = query.size(2), p.D = query.size(3), p.E = 1;
  p.S = key.size(2), p.key_heads = key.size(1), p.R = order ? order->size(2) : 1;
  p.n_queries = p.L, p.n_sequences = 1, p.flags = flags, p.scale = scale, p.keep_factor = 1;
  p.chunk_length = std::min(chunk_length, std::max<int64_t>(1, p.L));
  p.list_length = lists.size(3), p.context_keys = context_keys;
  require(p.key_heads >= 1 && p.H % p.key_heads == 0, "the heads of key must divide those of query");
  require(chunk_length >= 1, "chunk_length must be positive");
  require(p.list_length >= 1 && p.list_length <= INT32_MAX, "lists must have a length of at least 1");
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
  p.padding = contiguous<bool>("key_padding_mask", padding, ScalarType::Bool, {p.B, p.S});
  p.key_indices = contiguous<int32_t>(value ? "key_indices" : "lists", lists, ScalarType::Int,
                                      {p.B, p.H, p.R * ((p.L + p.chunk_length - 1) / p.chunk_length), p.list_length});
  return a;
}

inline Attention with_lists(RK_LIST_PARAMETERS) {
  Attention a = list_params(query, key, &value, order, padding, chunk_length, key_indices, context_keys, scale, flags);
  set_dropout(a.p, dropout_seed, drop_threshold, keep_factor);
  a.p.out = rows("out", out, a.rows_type, a.p.B, a.p.H, a.p.L, a.p.E);
  a.p.lse = const_cast<char*>(contiguous<char>("lse", lse, a.type, {a.p.B, a.p.H, a.p.L}));
  return a;
}

struct Selection {
  Attention a;
  SelectParams p;
};

inline Selection selection(RK_SELECT_PARAMETERS) {
  Selection s{list_params(query, key, nullptr, order, padding, chunk_length, lists, context_keys, scale, flags), {}};
  AttentionParams& p = s.a.p;
  // Not cut at the rows: quarters of a chunk do not depend on how many rows there are.
  p.chunk_length = std::min<int64_t>(chunk_length, INT32_MAX);
  require(budget >= 1, "budget must be positive, got ", budget);
  require(p.list_length >= context_keys, "lists must have room for ", context_keys, " keys, got ", p.list_length);
  s.p.budget = std::min<int64_t>(budget, INT32_MAX);
  s.p.windows = contiguous<LocalWindow>("windows", windows, ScalarType::Int,
                                        {p.B, (p.L + p.chunk_length - 1) / p.chunk_length, 3});
  s.p.query_padding = contiguous<bool>("query_padding_mask", query_padding, ScalarType::Bool, {p.B, p.L});
  s.p.lists = const_cast<int32_t*>(p.key_indices), p.key_indices = nullptr;
  s.p.attention = p;
  return s;
}

}  // namespace rk::binding
