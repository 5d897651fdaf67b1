// Which keys a chunk of queries sees: the chunk table of one sequence of one head. The same for every instruction set.
//
// The R rounds of the L sorted tokens form a ring of R * L slots. A chunk is a range of slots; its queries see the keys
// of the chunks before ... after it: circularly over the ring, or (bucket-aligned) within one bucket of one round.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/params.h"

namespace rk::cpu {

struct Chunk {
  int32_t start, count;  // slots
  int32_t segment;       // windows do not leave it
};

// Positions [from, to).
struct Range {
  int32_t from, to;
};

// One sequence of one head: the unit of work between which nothing is shared.
struct Unit {
  int64_t b, h, key_head, index;  // index: among those of all heads, part of the dropout counter
  int64_t offset, L, n_queries;   // the sequence's rows, and how many of them, the first ones, are queries
  int R, before, after;
  bool ring;
  const int32_t* order;  // [R * L] positions in the sequence, or null
  std::vector<Chunk> chunks;
  std::vector<int32_t> round_begin;  // [R + 1] first chunk of every round
  std::vector<Range> local;          // what the later rounds of key lists leave out, of every chunk in the first round

  int position(int64_t slot) const { return order ? order[slot] : static_cast<int>(slot % L); }
  int round(int64_t slot) const { return static_cast<int>(slot / L); }
  int n_chunks() const { return static_cast<int>(chunks.size()); }

  // The chunk at `index` of the unrolled ring, or -1 if the window of `query` does not contain it.
  int chunk_at(int64_t index, int64_t query) const {
    const int n = n_chunks();
    if (ring) return static_cast<int>(((index % n) + n) % n);
    if (index < 0 || index >= n || query < 0 || query >= n) return -1;
    return chunks[index].segment == chunks[query].segment ? static_cast<int>(index) : -1;
  }
};

inline int64_t n_units(const AttentionParams& p) { return p.B * p.H * p.n_sequences; }

inline void add_round(Unit& u, int round, const int32_t* bucket, int64_t chunk_length) {
  u.round_begin.push_back(u.n_chunks());
  int64_t begin = 0;
  while (begin < u.L) {
    int64_t end = u.L;
    if (!u.ring) {  // up to the end of the bucket
      const int32_t* of_round = bucket + round * u.L;
      const int32_t* slots = u.order + round * u.L;
      end = begin + 1;
      while (end < u.L && of_round[slots[end]] == of_round[slots[begin]]) ++end;
    }
    const int32_t segment = u.ring ? 0 : static_cast<int32_t>(round * u.L + begin);
    for (int64_t s = begin; s < end; s += chunk_length)
      u.chunks.push_back(
          {static_cast<int32_t>(round * u.L + s), static_cast<int32_t>(std::min(chunk_length, end - s)), segment});
    begin = end;
  }
}

// The list of keys of a chunk.
inline const int32_t* key_list(const AttentionParams& p, const Unit& u, int64_t chunk) {
  return p.key_indices + ((u.b * p.H + u.h) * u.n_chunks() + chunk) * p.list_length;
}

// From the first to the last key of a list, less the context.
inline Range list_range(const AttentionParams& p, const int32_t* list) {
  int64_t n = 0;
  while (n < p.list_length && list[n] >= 0) ++n;
  const int64_t first = std::min(p.context_keys, n);
  return first == n ? Range{0, 0} : Range{list[first], list[n - 1] + 1};
}

// Fills u with the unit at `index`; bucket_scratch holds its buckets, [R, L] of the sequence, if the rules need them.
inline void make_unit(const AttentionParams& p, int64_t index, Unit& u, std::vector<int32_t>& bucket_scratch) {
  const int64_t head = index / p.n_sequences, s = index % p.n_sequences;
  u.b = head / p.H, u.h = head % p.H, u.key_head = u.h / p.group(), u.index = s * p.B * p.H + head;
  const int32_t* bounds = p.cu_seqlens ? p.cu_seqlens + u.b * p.bounds_stride : nullptr;
  u.offset = bounds ? bounds[s] : 0;
  u.L = (bounds ? bounds[s + 1] : p.L) - u.offset;
  u.n_queries = std::clamp<int64_t>(p.n_queries - u.offset, 0, u.L);
  u.ring = !p.has(kBucketAligned);
  // A ring sequence that fits one chunk is one window, not hashed: its rounds would only repeat it.
  const bool single = u.ring && u.L <= p.chunk_length && !p.lists();
  u.R = single ? 1 : static_cast<int>(p.R);
  u.before = single ? 0 : static_cast<int>(p.chunks_before);
  u.after = single ? 0 : static_cast<int>(p.chunks_after);
  u.order = p.order ? p.order + head * p.R * p.L + p.R * u.offset : nullptr;
  bucket_scratch.clear();
  if (p.buckets && !single)
    for (int r = 0; r < u.R; ++r) {
      const int32_t* row = p.buckets + (head * p.R + r) * p.L + u.offset;
      bucket_scratch.insert(bucket_scratch.end(), row, row + u.L);
    }
  u.chunks.clear();
  u.round_begin.clear();
  for (int r = 0; r < u.R; ++r) add_round(u, r, bucket_scratch.data(), p.chunk_length);
  u.round_begin.push_back(u.n_chunks());
  u.local.clear();
  if (p.key_indices && u.R > 1)
    for (int c = 0; c < u.round_begin[1]; ++c) u.local.push_back(list_range(p, key_list(p, u, c)));
}

}  // namespace rk::cpu
