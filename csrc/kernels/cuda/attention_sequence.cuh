// The arguments of the kernels of chunk attention, and the windows of a sequence.
//
// Sorted slots of all rounds of a sequence form a ring. In "unrolled" numbers, of which the ring's length is a turn, a
// query sees a run of slots: its chunk and those before and after.
#pragma once
#include "kernels/cuda/rows.cuh"

namespace rk::cuda {

// Of a query, what the backward needs of the forward.
struct __align__(16) QueryResidual {
  float lse;    // base 2; infinity if it saw nothing; of self_only how often, as a logarithm
  float delta;  // outgoing row . incoming gradient
  int self_only;
};

struct AttentionArguments {
  Rows query, key, value, grad_out;            // key of shared rows: the query's
  Rows out, grad_query, grad_key, grad_value;  // written
  const int32_t* order;                        // [B, H, R * L] or null
  const int32_t* buckets;                      // [B, H, R, L], where windows are made of them
  const int32_t* lists;                        // [B, H, rows, list_length], instead of windows, or null
  const bool* padding;                         // [B, S] or null
  const int32_t* cu_seqlens;                   // as in AttentionParams
  int32_t* places;                             // [B, H, R, L] slots in a round
  int4* windows;                               // [B, H, R, L] see Window
  float* lse;                   // [B, H, n_queries]: in base 2 or OnlySelf until the last round, then natural
  bool* self_only;              // [B, H, n_queries]
  QueryResidual* residuals;     // [B, H, n_queries]
  const int64_t* dropout_seed;  // or null
  int64_t heads;                // B * H
  int64_t n_sequences, bounds_stride;
  int list_length, list_slots, context;  // list_slots: of a row; as many rows as chunks in all rounds
  int L, S, n_queries, R, H, group, D, E, chunk_length, before, after;
  int round, tile_chunk, tiles_per_block, blocks_per_sequence, places_of_tiles;
  Element element;
  float scale, keep_factor;
  uint32_t drop_threshold;
  bool causal, shared, l2, dropout, bucket_aligned, within_bucket, dedup, mask_padded_queries;
  bool grad_query_begun;           // by the pseudo-key of lists
  bool lead;                       // a tile that a block owns is one that it visits, too
  bool aligned_rows, aligned_out;  // 16 bytes at a time

  __device__ bool ring() const { return !bucket_aligned && !lists; }
};

__device__ __forceinline__ int floor_div(int a, int b) { return a / b - (a % b < 0); }

constexpr int kHidden = INT32_MAX;  // the position of a key that nobody may see
constexpr int kEveryone = -1;       // ... that everybody may see
constexpr int kNobody = INT32_MIN;  // of no key

// What a query sees in a round, and the slots, wrapped, of those in its bucket.
struct Window {
  Range seen, bucket;
};

// A sequence of a head.
struct AttentionSequence {
  int b, h, key_head;
  uint32_t index;    // among all sequences of all heads
  int64_t head_row;  // of its first row among those of [B, H, n_queries]
  int offset;        // of its rows
  int length, turn;  // rows, and slots of all rounds
  int n_queries;     // of its rows, the first ones; none where it is negative
  int chunks;        // of a round
  int everyone;      // the first of the keys that every query sees
  int rounds, before, after;
  bool rules;  // of pairs
  const int32_t *order, *places, *lists;
  const int4* windows;

  __device__ void take(const AttentionArguments& p, int64_t number, int heads) {
    const int64_t sequence = number % p.n_sequences;
    b = static_cast<int>(number / p.n_sequences / heads);
    const int32_t* bounds = p.cu_seqlens ? p.cu_seqlens + b * p.bounds_stride + sequence : nullptr;
    offset = bounds ? bounds[0] : 0;
    length = (bounds ? bounds[1] : p.L) - offset;
    n_queries = p.n_queries - offset;
    // One window: the rounds would only repeat it.
    const bool single = length <= p.chunk_length && p.ring();
    rounds = single ? 1 : p.R;
    before = single ? 0 : p.before, after = single ? 0 : p.after;
    rules = !single && (p.within_bucket || p.dedup);
    turn = rounds * length;
    chunks = (length + p.chunk_length - 1) / p.chunk_length;
    everyone = p.lists ? p.S - p.context : n_queries;
    take_head(p, static_cast<int>(number / p.n_sequences % heads) * (p.H / heads), sequence);
  }
  __device__ void take_head(const AttentionArguments& p, int head, int64_t sequence) {
    h = head, key_head = head / p.group;
    const int64_t number = int64_t{b} * p.H + h;
    index = static_cast<uint32_t>(sequence * p.heads + number);
    head_row = number * p.n_queries + offset;
    order = p.order ? p.order + (number * p.L + offset) * p.R : nullptr;
    lists = p.lists ? p.lists + number * list_rows() * p.list_length : nullptr;
    places = p.places ? p.places + number * p.R * p.L + offset : nullptr;
    windows = p.windows ? p.windows + number * p.R * p.L + offset : nullptr;
  }

  __device__ int wrapped(int slot) const {
    return slot >= 0 && slot < turn ? slot : slot - floor_div(slot, turn) * turn;
  }
  // The row in the sequence of a slot. Slots of a tile that begins with a wrapped one are seldom beyond the ring.
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

  // The slots of keys that a query sees, and of queries that see a key.
  __device__ Range keys_of(const AttentionArguments& p, int slot) const {
    if (!p.lists) return around(p, slot, before, after);
    const int first = chunk_of(slot, p.chunk_length) * p.list_slots;
    return {first, first + p.list_length};
  }
  __device__ Range queries_of(const AttentionArguments& p, int slot) const {
    if (!p.lists) return around(p, slot, after, before);
    const int row = slot / p.list_slots;
    return {begin_of(row, p.chunk_length), begin_of(row + 1, p.chunk_length)};
  }
  // The keys of a chunk's list, less the context, from the first to the last.
  __device__ Range list_range(const AttentionArguments& p, int chunk) const {
    const int32_t* list = lists + int64_t{chunk} * p.list_length;
    int count = 0;
    for (int high = p.list_length; count < high;) {  // a row ends with -1
      const int middle = (count + high) / 2;
      if (list[middle] >= 0)
        count = middle + 1;
      else
        high = middle;
    }
    return count > p.context ? Range{list[p.context], list[count - 1] + 1} : Range{0, 0};
  }

  // The slots of the chunk of `slot` and of those before and after it.
  __device__ Range around(const AttentionArguments& p, int slot, int back, int ahead) const {
    if (p.bucket_aligned) {
      const int at = wrapped(slot);
      const Range bucket = window_of(p, at / length, position(at)).bucket;
      return around_in(bucket, at, p.chunk_length, back, ahead);
    }
    const int chunk = chunk_of(slot, p.chunk_length);
    return {begin_of(chunk - back, p.chunk_length), begin_of(chunk + ahead + 1, p.chunk_length)};
  }
  // The same where chunks start anew in a bucket, which windows do not leave.
  __device__ static Range around_in(Range bucket, int slot, int chunk_length, int back, int ahead) {
    const int begin = slot - (slot - bucket.first) % chunk_length;
    return {max(bucket.first, begin - back * chunk_length), min(bucket.behind, begin + (ahead + 1) * chunk_length)};
  }
};

}  // namespace rk::cuda
