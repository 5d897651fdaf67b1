// The arguments of the kernels: plain data, no torch, no Python. Shapes as in the Python layer:
// B batch, H query heads, L length of queries, S of keys, D head size of query and key, E head size of value, R rounds,
// C chunk length.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define RK_HOST_DEVICE __host__ __device__
#else
#define RK_HOST_DEVICE
#endif

namespace rk {

enum Flag : int64_t {  // a test compares it with the Python backends
  kCausal = 1,
  kL2Norm = 2,
  kMaskPaddedQueries = 4,
  kWithinBucket = 8,
  kDedup = 16,
  kBucketAligned = 32,
  kRestKey = 64,
};

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
  Element element;  // of all rows
  int64_t B, H, L, D, E, R, chunk_length, chunks_before, chunks_after, n_queries, flags;
  int64_t S, key_heads;         // L and H, but with lists or grouped heads: head h reads key head h / (H / key_heads)
  double scale;                 // of query . key, where a shared row is scaled to a unit key
  double keep_factor;           // 1 / (1 - dropout), or 1 without dropout
  uint32_t drop_threshold;      // a random word below it is dropped
  const int64_t* dropout_seed;  // one number, where the tensors are; read with dropout
  Rows query, key, value;       // key.data null: shared with the query
  // Instead of windows: the keys of each chunk, [B, H, R * chunks, list_length]. A row starts with its context keys,
  // then rises, and -1 fills it up. Later rounds leave out what lies between the keys of a query's row in the first.
  const int32_t* key_indices;
  int64_t list_length, context_keys;  // the last keys, which every query sees
  const int32_t* order;               // [B, H, R * L], or null: positions in their own order (then R is 1)
  const int32_t* buckets;             // [B, H, R, L], or null
  const bool* padding;                // [B, S], true: ignored, or null
  const bool* bool_mask;              // [B|1, H|1, n_queries, S], true: ignored, or null
  const void* float_mask;             // the same, added to the scores
  int64_t mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k;
  const int32_t* cu_seqlens;                        // where the sequences of a batch row begin and end, or null
  int64_t n_sequences, bounds_stride;               // 1 without cu_seqlens; its n + 1 for each batch row, or 0 for all
  Rows out;                                         // [B, H, n_queries, E]; written by forward, read by backward
  void* lse;                                        // [B, H, n_queries] contiguous, natural logarithm, like out
  bool* self_only;                                  // [B, H, n_queries] contiguous, like out
  Rows grad_out, grad_query, grad_key, grad_value;  // backward only

  bool has(Flag f) const { return flags & f; }
  bool shared_qk() const { return key.data == nullptr; }
  bool lists() const { return list_length > 0; }
  bool ring() const { return !has(kBucketAligned) && !lists(); }
  bool has_score_mod() const { return has(kWithinBucket) || has(kDedup); }
  bool dropout() const { return keep_factor != 1.0; }
  int64_t group() const { return key_heads ? H / key_heads : 1; }  // query heads that share a key head
};

struct HashParams {
  Element element;  // of x
  int64_t B, H, L, D, R, n_factors;
  Rows x;
  const void* rotations;  // [B|1, H|1, D, R * sum(factors) / 2], of the type computed with
  int64_t rotations_stride_b, rotations_stride_h;
  const int64_t* factors;  // [n_factors], even
  const bool* padding;     // [B, L] or null: these go to bucket prod(factors)
  int32_t* buckets;        // [B, H, R, L]
};

struct OrderParams {
  int64_t rows, heads, rounds, L, n_buckets;    // rows = B * heads
  const int32_t* buckets;                       // [rows, rounds, L]
  const int32_t* cu_seqlens;                    // as in AttentionParams
  int64_t n_sequences, bounds_stride, longest;  // tokens of the longest sequence, at most
  int32_t* order;                               // [rows, rounds * L]
};

// Of a chunk in the order of positions, its local window of keys; and how many keys the list of that number has at most
// in the last round, beside the context, with the window where that round is the only one.
struct LocalWindow {
  int32_t begin, end, most;
};

// Chooses AttentionParams::key_indices. With one round a row is the context, the local window and the best of the other
// keys. With two the first round has the context and the local windows, for chunks in the order of positions, the
// second the best keys.
struct SelectParams {
  AttentionParams attention;   // without value; its key_indices are null
  int64_t budget;              // keys of a query without the context
  const LocalWindow* windows;  // [B, chunks of a round]
  const bool* query_padding;   // [B, L], true: chooses nothing (unless all of its chunk are such), or null
  int32_t* lists;              // [B, H, R * chunks, list_length]
};

}  // namespace rk
