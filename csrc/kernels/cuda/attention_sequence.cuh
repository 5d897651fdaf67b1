// The arguments of the kernels of chunk attention, and the windows of a sequence.
//
// The sorted slots of all rounds of a sequence form a ring. A slot number is "wrapped" if it is in [0, ring_length),
// and "unrolled" if it may be beyond either end. In unrolled slots a query sees one range: its chunk and those around
// it. With lists of keys the entries of all lists are numbered like slots, and a query sees the entries of one list.
#pragma once
#include "kernels/cuda/rows.cuh"

namespace rk::cuda {

// What the backward needs to know about a query.
struct __align__(16) QueryResidual {
  float lse;    // base 2; infinity if it saw nothing; of a self_only query log2 of how often it met its own key
  float delta;  // out . grad_out
  int self_only;
};

struct AttentionArguments {
  Rows query, key, value, grad_out;            // with shared rows key is query
  Rows out, grad_query, grad_key, grad_value;  // written
  const int32_t* order;                        // [B, H, R * L] or null
  const int32_t* buckets;                      // [B, H, R, L], where windows are made of them
  const int32_t* lists;                        // [B, H, list rows, list_length] or null; then there are no windows
  const bool* padding;                         // [B, S] or null
  const int32_t* cu_seqlens;                   // as in AttentionParams
  int32_t* slot_of_position;                   // [B, H, R, L], slots in a round
  int4* windows;                               // [B, H, R, L], see Window
  float* lse;                   // [B, H, n_queries]: in base 2 or SelfOnlyState until the last round, then natural
  bool* self_only;              // [B, H, n_queries]
  QueryResidual* residuals;     // [B, H, n_queries]
  const int64_t* dropout_seed;  // or null
  int64_t heads;                // B * H
  int64_t n_sequences, bounds_stride;
  int list_length, list_stride, n_context;  // list_stride: entries of a list in whole tiles
  int L, S, n_queries, R, H, group, D, E, chunk_length, before, after;
  int round, tile_chunk, tiles_per_block, blocks_per_sequence, stages;
  Element element;
  float scale, keep_factor;
  uint32_t drop_threshold;
  uint32_t flags;  // of Flag
  bool shared_qk, dropout;
  bool diagonal_first;             // the owned tile is among the tiles visited for it, and is visited first
  bool aligned_rows, aligned_out;  // 16 bytes at a time

  __device__ bool has(Flag flag) const { return flags & flag; }
  __device__ bool ring() const { return !has(kBucketAligned) && !lists; }
};

__device__ __forceinline__ int floor_div(int a, int b) { return a / b - (a % b < 0); }

constexpr int kMaskedKey = INT32_MAX;  // as the position of a key: no query sees it
constexpr int kContextKey = -1;        // as the position of a key: every query sees it
constexpr int kNone = INT32_MIN;       // no row, no tile, or the limit of a query that sees nothing

// The unrolled slots that a query sees in a round, and the wrapped slots of its bucket.
struct Window {
  Range seen, bucket;
};

// One sequence of one head.
struct HeadSequence {
  int b, h, key_head;
  uint32_t dropout_index;   // part of the counter of random words
  int64_t head_row;         // index of its first row in [B, H, n_queries]
  int offset;               // of its first row in the batch row
  int length, ring_length;  // rows; slots of all rounds
  int n_queries;            // its first rows are queries; it has none if this is negative
  int chunks;               // of a round
  int first_context_key;    // position from which on every query sees a key
  int rounds, before, after;
  bool has_score_mod;
  const int32_t *order, *slot_of_position, *lists;
  const int4* windows;

  __device__ void take(const AttentionArguments& p, int64_t number, int heads) {
    const int64_t sequence = number % p.n_sequences;
    b = static_cast<int>(number / p.n_sequences / heads);
    const int32_t* bounds = p.cu_seqlens ? p.cu_seqlens + b * p.bounds_stride + sequence : nullptr;
    offset = bounds ? bounds[0] : 0;
    length = (bounds ? bounds[1] : p.L) - offset;
    n_queries = p.n_queries - offset;
    const bool single = is_single_window(length, p.chunk_length, p.ring());
    rounds = single ? 1 : p.R;
    before = single ? 0 : p.before, after = single ? 0 : p.after;
    has_score_mod = !single && (p.flags & kScoreModFlags);
    ring_length = rounds * length;
    chunks = (length + p.chunk_length - 1) / p.chunk_length;
    first_context_key = p.lists ? p.S - p.n_context : n_queries;
    take_head(p, static_cast<int>(number / p.n_sequences % heads) * (p.H / heads), sequence);
  }
  __device__ void take_head(const AttentionArguments& p, int head, int64_t sequence) {
    h = head, key_head = head / p.group;
    const int64_t number = int64_t{b} * p.H + h;
    dropout_index = static_cast<uint32_t>(sequence * p.heads + number);
    head_row = number * p.n_queries + offset;
    order = p.order ? p.order + (number * p.L + offset) * p.R : nullptr;
    lists = p.lists ? p.lists + number * list_rows() * p.list_length : nullptr;
    slot_of_position = p.slot_of_position ? p.slot_of_position + number * p.R * p.L + offset : nullptr;
    windows = p.windows ? p.windows + number * p.R * p.L + offset : nullptr;
  }

  __device__ int wrapped(int slot) const {
    return slot >= 0 && slot < ring_length ? slot : slot - floor_div(slot, ring_length) * ring_length;
  }
  // The row of a slot in the sequence.
  __device__ int position(int slot) const { return order ? order[wrapped(slot)] : wrapped(slot); }
  __device__ int chunk_of(int slot, int chunk_length) const {
    const int round = floor_div(slot, length);
    return round * chunks + (slot - round * length) / chunk_length;
  }
  // The first slot of a chunk.
  __device__ int begin_of(int chunk, int chunk_length) const {
    const int round = floor_div(chunk, chunks);
    return round * length + (chunk - round * chunks) * chunk_length;
  }
  __device__ Window window_of(const AttentionArguments& p, int round, int position) const {
    const int4 bits = windows[int64_t{round} * p.L + position];
    return {{bits.x, bits.y}, {bits.z, bits.w}};
  }
  __device__ int64_t list_rows() const { return rounds * chunks; }

  // The slots of the keys that the query at a slot sees.
  __device__ Range keys_of(const AttentionArguments& p, int slot) const {
    if (!p.lists) return around(p, slot, before, after);
    const int first = chunk_of(slot, p.chunk_length) * p.list_stride;
    return {first, first + p.list_length};
  }
  // The slots of the queries that see the key at a slot.
  __device__ Range queries_of(const AttentionArguments& p, int slot) const {
    if (!p.lists) return around(p, slot, after, before);
    const int row = slot / p.list_stride;
    return {begin_of(row, p.chunk_length), begin_of(row + 1, p.chunk_length)};
  }
  // The range of positions that a list's keys span, without context keys.
  __device__ Range list_range(const AttentionArguments& p, int chunk) const {
    const int32_t* list = lists + int64_t{chunk} * p.list_length;
    int count = 0;
    for (int high = p.list_length; count < high;) {  // -1 fills the end of a row
      const int middle = (count + high) / 2;
      if (list[middle] >= 0)
        count = middle + 1;
      else
        high = middle;
    }
    return count > p.n_context ? Range{list[p.n_context], list[count - 1] + 1} : Range{0, 0};
  }

  // The slots of the chunk of `slot` and of those before and after it.
  __device__ Range around(const AttentionArguments& p, int slot, int back, int ahead) const {
    if (p.has(kBucketAligned)) {
      const int at = wrapped(slot);
      const Range bucket = window_of(p, at / length, position(at)).bucket;
      return around_in(bucket, at, p.chunk_length, back, ahead);
    }
    const int chunk = chunk_of(slot, p.chunk_length);
    return {begin_of(chunk - back, p.chunk_length), begin_of(chunk + ahead + 1, p.chunk_length)};
  }
  // The same where chunks start anew in every bucket, and windows do not leave it.
  __device__ static Range around_in(Range bucket, int slot, int chunk_length, int back, int ahead) {
    const int begin = slot - (slot - bucket.begin) % chunk_length;
    return {max(bucket.begin, begin - back * chunk_length), min(bucket.end, begin + (ahead + 1) * chunk_length)};
  }
};

}  // namespace rk::cuda
