// Which keys a chunk of queries sees: the table of chunks of one sequence of one head. Not compiled per instruction
// set.
//
// The R rounds of the L sorted tokens form a ring of R * L slots. A chunk is a range of slots. Its queries see the keys
// of its window, which is the chunks from `before` chunks before it to `after` chunks after it. Windows wrap around the
// ring, or (bucket-aligned) stay within one bucket of one round.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/params.h"

namespace rk::cpu {

struct Chunk {
  int32_t start, count;  // slots
  int32_t bucket_begin;  // first slot of its bucket, 0 in a ring; all chunks of a window have the same
};

// Positions [begin, end).
struct Range {
  int32_t begin, end;
};

// One sequence of one head. It shares nothing with others.
struct HeadSequence {
  int64_t b, h, key_head, dropout_index;  // dropout_index: part of the counter of random words
  int64_t offset, L, n_queries;  // first row in the batch row; rows; how many of them, from the first, are queries
  int R, before, after;
  bool wraps, single_window;  // wraps: windows go around the ring
  const int32_t* order;       // [R * L] positions in the sequence, or null
  std::vector<Chunk> chunks;
  std::vector<int32_t> round_begin;  // [R + 1] first chunk of every round
  std::vector<Range> excluded;       // with lists: keys that a chunk of the first round saw, and later rounds leave out

  int position(int64_t slot) const { return order ? order[slot] : static_cast<int>(slot % L); }
  int round(int64_t slot) const { return static_cast<int>(slot / L); }
  int n_chunks() const { return static_cast<int>(chunks.size()); }

  // The chunk at `index` of the unrolled ring; -1 if it does not exist, or is of another bucket than the chunk `query`.
  int chunk_at(int64_t index, int64_t query) const {
    const int n = n_chunks();
    if (wraps) return static_cast<int>(((index % n) + n) % n);
    if (index < 0 || index >= n || query < 0 || query >= n) return -1;
    return chunks[index].bucket_begin == chunks[query].bucket_begin ? static_cast<int>(index) : -1;
  }
};

inline int64_t n_head_sequences(const AttentionParams& p) { return p.B * p.H * p.n_sequences; }

inline void add_round(HeadSequence& seq, int round, const int32_t* bucket, int64_t chunk_length) {
  seq.round_begin.push_back(seq.n_chunks());
  int64_t begin = 0;
  while (begin < seq.L) {
    int64_t end = seq.L;
    if (!seq.wraps) {  // up to the end of the bucket
      const int32_t* of_round = bucket + round * seq.L;
      const int32_t* slots = seq.order + round * seq.L;
      end = begin + 1;
      while (end < seq.L && of_round[slots[end]] == of_round[slots[begin]]) ++end;
    }
    const int32_t bucket_begin = seq.wraps ? 0 : static_cast<int32_t>(round * seq.L + begin);
    for (int64_t s = begin; s < end; s += chunk_length)
      seq.chunks.push_back({static_cast<int32_t>(round * seq.L + s),
                            static_cast<int32_t>(std::min(chunk_length, end - s)), bucket_begin});
    begin = end;
  }
}

// The key indices of a chunk.
inline const int32_t* key_list(const AttentionParams& p, const HeadSequence& seq, int64_t chunk) {
  return p.key_indices + ((seq.b * p.H + seq.h) * seq.n_chunks() + chunk) * p.list_length;
}

// The range of positions that a list's keys span, without context keys.
inline Range list_range(const AttentionParams& p, const int32_t* list) {
  int64_t n = 0;
  while (n < p.list_length && list[n] >= 0) ++n;
  const int64_t first = std::min(p.context_keys, n);
  return first == n ? Range{0, 0} : Range{list[first], list[n - 1] + 1};
}

// Fills in the sequence of this number, and in bucket_scratch its buckets [R, L] if there are any.
inline void make_head_sequence(const AttentionParams& p, int64_t number, HeadSequence& seq,
                               std::vector<int32_t>& bucket_scratch) {
  const int64_t head = number / p.n_sequences, s = number % p.n_sequences;
  seq.b = head / p.H, seq.h = head % p.H, seq.key_head = seq.h / p.group(), seq.dropout_index = s * p.B * p.H + head;
  const int32_t* bounds = p.cu_seqlens ? p.cu_seqlens + seq.b * p.bounds_stride : nullptr;
  seq.offset = bounds ? bounds[s] : 0;
  seq.L = (bounds ? bounds[s + 1] : p.L) - seq.offset;
  seq.n_queries = std::clamp<int64_t>(p.n_queries - seq.offset, 0, seq.L);
  seq.wraps = !p.has(kBucketAligned);
  const bool single = seq.single_window = is_single_window(seq.L, p.chunk_length, p.ring());
  seq.R = single ? 1 : static_cast<int>(p.R);
  seq.before = single ? 0 : static_cast<int>(p.chunks_before);
  seq.after = single ? 0 : static_cast<int>(p.chunks_after);
  seq.order = p.order ? p.order + head * p.R * p.L + p.R * seq.offset : nullptr;
  bucket_scratch.clear();
  if (p.buckets && !single)
    for (int r = 0; r < seq.R; ++r) {
      const int32_t* row = p.buckets + (head * p.R + r) * p.L + seq.offset;
      bucket_scratch.insert(bucket_scratch.end(), row, row + seq.L);
    }
  seq.chunks.clear();
  seq.round_begin.clear();
  for (int r = 0; r < seq.R; ++r) add_round(seq, r, bucket_scratch.data(), p.chunk_length);
  seq.round_begin.push_back(seq.n_chunks());
  seq.excluded.clear();
  if (p.key_indices && seq.R > 1)
    for (int c = 0; c < seq.round_begin[1]; ++c) seq.excluded.push_back(list_range(p, key_list(p, seq, c)));
}

}  // namespace rk::cpu
