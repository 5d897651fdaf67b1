// The arguments of the kernels: plain data, no torch, no Python. Letters in shapes are those of the Python layer: B
// batch, H query heads, L length of queries, S length of keys, D head size of query and key, E head size of value, R
// rounds, C chunk length.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define RK_HOST_DEVICE __host__ __device__
#else
#define RK_HOST_DEVICE
#endif

namespace rk {

enum Flag : int64_t {  // as in backends/_native.py
  kCausal = 1,
  kL2Norm = 2,
  kMaskPaddedQueries = 4,
  kWithinBucket = 8,
  kDedup = 16,
  kBucketAligned = 32,
  kRestKey = 64,
};
constexpr int64_t kScoreModFlags = kWithinBucket | kDedup;  // rules that add to the score of a pair

// The type of tensors: that of the computation, or a half type where that is float.
enum class Element { kSame, kBFloat16, kFloat16 };

// Rows of [B, H, L, width], the last dimension contiguous; strides in elements.
struct Rows {
  void* data = nullptr;
  int64_t stride_b = 0, stride_h = 0, stride_l = 0;
  template <class T>
  T* at(int64_t b, int64_t h, int64_t l) const {
    return static_cast<T*>(data) + b * stride_b + h * stride_h + l * stride_l;
  }
};

// Whether a sequence is one window: its only chunk. Then all rounds would compute the same, so there is one, in the
// order of positions, and no score_mod. ring: windows are those of the ring.
RK_HOST_DEVICE constexpr bool is_single_window(int64_t length, int64_t chunk_length, bool ring) {
  return ring && length <= chunk_length;
}

struct AttentionParams {
  Element element;  // type of all rows
  int64_t B, H, L, D, E, R, chunk_length, chunks_before, chunks_after, n_queries, flags;
  int64_t S, key_heads;         // L and H, except with lists or grouped heads; head h reads key head h / group()
  double scale;                 // of query . key; with shared rows, of query . unit key
  double keep_factor;           // 1 / (1 - dropout), or 1 without dropout
  uint32_t drop_threshold;      // a pair is dropped if its random word is below
  const int64_t* dropout_seed;  // one number, on the device of the tensors; only read with dropout
  Rows query, key, value;       // key.data null: rows are shared, each is query and key
  // With lists there are no windows: [B, H, R * chunks, list_length], the keys of each chunk. A row starts with its
  // context keys, then come others in rising order, then -1. The second round leaves out the range of keys that a
  // query's list in the first round spans.
  const int32_t* key_indices;
  int64_t list_length, context_keys;  // context_keys: the last keys, which every query sees
  const int32_t* order;               // [B, H, R * L] positions in sorted order; null: R is 1, unsorted
  const int32_t* buckets;             // [B, H, R, L], or null
  const bool* padding;                // [B, S], true: masked as key; or null
  const bool* bool_mask;              // [B|1, H|1, n_queries, S], true: masked; or null
  const void* float_mask;             // the same shape, added to scores; or null
  int64_t mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k;
  const int32_t* cu_seqlens;           // [n_sequences + 1] bounds of sequences, of each batch row or of all; or null
  int64_t n_sequences, bounds_stride;  // bounds_stride: between batch rows, 0 if all have the same bounds
  Rows out;                            // [B, H, n_queries, E]; written by forward, read by backward
  void* lse;                           // [B, H, n_queries] contiguous, natural logarithm
  bool* self_only;                     // [B, H, n_queries] contiguous
  Rows grad_out, grad_query, grad_key, grad_value;  // backward only

  bool has(Flag f) const { return flags & f; }
  bool shared_qk() const { return key.data == nullptr; }
  bool lists() const { return list_length > 0; }
  bool ring() const { return !has(kBucketAligned) && !lists(); }
  bool has_score_mod() const { return flags & kScoreModFlags; }
  bool dropout() const { return keep_factor != 1.0; }
  int64_t group() const { return key_heads ? H / key_heads : 1; }  // query heads that share a key head
};

struct HashParams {
  Element element;  // type of x
  int64_t B, H, L, D, R, n_factors;
  Rows x;
  const void* rotations;  // [B|1, H|1, D, R * sum(factors) / 2], in the type of the computation
  int64_t rotations_stride_b, rotations_stride_h;
  const int64_t* factors;  // [n_factors], even
  const bool* padding;     // [B, L], true: into bucket prod(factors); or null
  int32_t* buckets;        // [B, H, R, L]
};

struct OrderParams {
  int64_t rows, heads, rounds, L, n_buckets;    // rows = B * heads
  const int32_t* buckets;                       // [rows, rounds, L]
  const int32_t* cu_seqlens;                    // as in AttentionParams
  int64_t n_sequences, bounds_stride, longest;  // longest: no sequence has more tokens
  int32_t* order;                               // [rows, rounds * L]
};

// The local window of keys of a chunk in the order of positions. most: how many keys the chunk's list in the last round
// may have besides context keys; with one round this includes the window.
struct LocalWindow {
  int32_t begin, end, most;
};

// Chooses AttentionParams::key_indices. With one round a list has the context keys, the local window and the best of
// the other keys. With two rounds the first has the context keys and local windows, for chunks in the order of
// positions, and the second has the best keys.
struct SelectParams {
  AttentionParams attention;   // without value; its key_indices are null
  int64_t budget;              // keys of a query, without context keys
  const LocalWindow* windows;  // [B, chunks of a round]
  // [B, L] or null, true: the query has no say in the choice, unless all queries of its chunk are such.
  const bool* query_padding;
  int32_t* lists;  // [B, H, R * chunks, list_length]
};

}  // namespace rk
