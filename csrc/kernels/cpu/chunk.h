// The gathered rows of a chunk, and which of them a query may see.
//
// Rows are sorted: context keys first, then by position, padding last. So the keys that a causal query sees are the
// first ones of every chunk, and the queries that see a key are the last ones of their block. Causal attention then
// computes little more than half of the pairs.
#pragma once
#include "kernels/cpu/simd.h"

namespace rk::cpu::RK_ISA {

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

// The most keys of a chunk.
inline int64_t max_keys(const AttentionParams& p) { return p.lists() ? p.list_length : std::min(p.chunk_length, p.L); }

// Gathers the rows at the positions into rows [padded rows][row_stride], with zeros beyond the real rows and columns.
template <class T>
void gather(const Rows& source, const HeadSequence& seq, int64_t head, const int* position, int count, int limit,
            int64_t width, T* rows, int64_t row_stride) {
  const T* base = source.at<T>(seq.b, head, seq.offset);
  for (int i = 0; i < count; ++i) {
    T* to = rows + i * row_stride;
    int64_t d = 0;
    if (position[i] < limit) {
      const T* from = base + position[i] * source.stride_l;
      for (; d + kLanes<T> <= width; d += kLanes<T>) store<T>(to + d, load<T>(from + d));
      for (; d < width; ++d) to[d] = from[d];
    }
    for (; d < row_stride; ++d) to[d] = 0;
  }
  std::fill(rows + count * row_stride, rows + round_up(count, kRowPad) * row_stride, T(0));
}

// Transposes at most 64 rows into t [width][64].
template <class T>
void transpose_rows(const T* rows, int64_t row_stride, int count, int64_t width, T* t) {
  for (int64_t i = 0; i < count; i += kLanes<T>)
    for (int64_t d = 0; d < round_up(width, kLanes<T>); d += kLanes<T>)
      transpose<T>(rows + i * row_stride + d, row_stride, t + d * kQueries + i, kQueries);
}

template <class T>
void squares(const T* rows, int64_t row_stride, int count, T* square) {
  for (int i = 0; i < count; ++i) {
    Vec<T> s{};
    for (const T* x = rows + i * row_stride; x < rows + (i + 1) * row_stride; x += kLanes<T>)
      s += load<T>(x) * load<T>(x);
    square[i] = sum<T>(s);
  }
}

// rank[i] = how many keys are smaller than key[i]; all keys differ. This is quadratic but has no branches, and costs a
// small part of what the pairs of the chunk cost. Both arrays are padded to whole vectors.
inline void rank_keys(const int32_t* key, int count, int32_t* rank) {
  for (int i = 0; i < count; i += kLanes<float>) {
    const IVec<float> x = load_int<float>(key + i);
    IVec<float> smaller{};
    for (int j = 0; j < count; ++j) smaller -= splat_int<float>(key[j]) < x;
    *reinterpret_cast<IVec<float>*>(rank + i) = smaller;
  }
}

// With bounds up to this the sum of weights cannot underflow: weights are at least 2^-80.
template <class T>
constexpr T kSafeBound = 40;

template <class T>
constexpr Int<T> kMaskedKey = std::numeric_limits<int32_t>::max();  // as a position: no query sees the key
template <class T>
constexpr Int<T> kContextKey = -1;  // as a position: every query sees the key, since it is below any position

// The gathered keys of a chunk and, in backward, their gradients.
template <class T>
struct ChunkRows {
  int64_t index = std::numeric_limits<int64_t>::min();  // index of the chunk in the unrolled ring
  int count = 0;
  std::vector<int> position;                // of each row
  std::vector<int32_t> slot_in_chunk, row;  // row i is slot slot_in_chunk[i] of the chunk; slot s is row row[s]
  std::vector<int32_t> sort_key;            // of each slot
  Buffer<T> K, V;                           // [C][Dp], [C][Ep]
  Buffer<T> factor, factor_log2;            // score = factor q . K
  Buffer<T> square;                         // first |q|^2, then a^2, where K holds q but the key is a q
  Buffer<T> bound;                          // upper bound of the scores of this row as a query, base 2
  Buffer<Int<T>> key_position;              // position, kMaskedKey or kContextKey; rising
  Buffer<T> dQ, dK, dV;
  bool fresh = true;  // dK and dV are not written yet

  void resize(int64_t C, int64_t Dp, int64_t Ep, bool backward) {
    const int64_t rows = round_up(C, kRowPad);
    position.resize(rows), slot_in_chunk.resize(rows), row.resize(rows), sort_key.resize(rows);
    K.resize(rows * Dp), V.resize(rows * Ep);
    factor.resize(rows), factor_log2.resize(rows), square.resize(rows), bound.resize(rows), key_position.resize(rows);
    if (backward) dQ.resize(rows * Dp), dK.resize(rows * Dp), dV.resize(rows * Ep);
  }

  void load(const AttentionParams& p, const HeadSequence& seq, int64_t unrolled, int chunk, int64_t Dp, int64_t Ep) {
    const Chunk c = seq.chunks[chunk];
    index = unrolled, count = c.count, fresh = true;
    const bool* padding = p.padding ? p.padding + seq.b * p.L + seq.offset : nullptr;
    arrange(p, seq, c, padding);
    fetch(p, seq, padding, seq.L, seq.n_queries, Dp, Ep);
  }

  // Loads the keys of a row of AttentionParams::key_indices.
  void load_list(const AttentionParams& p, const HeadSequence& seq, const int32_t* list, int64_t Dp, int64_t Ep) {
    for (count = 0; count < p.list_length && list[count] >= 0; ++count)
      position[count] = list[count], slot_in_chunk[count] = row[count] = count;
    fetch(p, seq, nullptr, p.S, p.S - p.context_keys, Dp, Ep);
  }

 private:
  // Gathers the rows at the positions. Positions are below `limit`; those from `first_context` on are context keys.
  void fetch(const AttentionParams& p, const HeadSequence& seq, const bool* padding, int64_t limit,
             int64_t first_context, int64_t Dp, int64_t Ep) {
    gather<T>(p.shared_qk() ? p.query : p.key, seq, seq.key_head, position.data(), count, limit, p.D, K, Dp);
    gather<T>(p.value, seq, seq.key_head, position.data(), count, limit, p.E, V, Ep);
    const T scale = static_cast<T>(p.scale), log2e = static_cast<T>(kLog2e), eps = T(1e-6) * p.D;
    const bool shared_qk = p.shared_qk(), l2 = p.has(kL2Norm);
    // A shared row becomes a key by dividing it by sqrt(|q|^2 + 1e-6 D), or with l2 by max(|q|, 1e-12).
    if (shared_qk) squares<T>(K, Dp, count, square);
    for (int i = 0; i < count; ++i) {
      const T length = shared_qk ? std::sqrt(square[i]) : T(0);
      const T divisor = !shared_qk ? T(1) : l2 ? std::max(length, T(1e-12)) : std::sqrt(square[i] + eps);
      const T a = 1 / divisor;
      factor[i] = a * scale, factor_log2[i] = a * scale * log2e;
      bound[i] = length * std::abs(scale) * log2e;
      square[i] = !shared_qk || (l2 && length <= T(1e-12)) ? T(0) : a * a;  // 0 if a does not depend on q
    }
    for (int i = 0; i < count; ++i) {
      const bool everyone = position[i] >= first_context;
      key_position[i] = padding && padding[position[i]] ? kMaskedKey<T> : everyone ? kContextKey<T> : position[i];
    }
  }

  void arrange(const AttentionParams& p, const HeadSequence& seq, Chunk c, const bool* padding) {
    // As signed numbers the sort keys are in the order context, other positions, padding. Positions are below 2^31.
    const uint32_t context = static_cast<uint32_t>(seq.n_queries);
    auto key = [&](int position) {
      const uint32_t at = static_cast<uint32_t>(position), length = static_cast<uint32_t>(seq.L);
      const uint32_t unpadded = at >= context ? at - context : at + (length - context);
      return static_cast<int32_t>((padding && padding[position] ? 0u : 0x80000000u) + unpadded);
    };
    bool sorted = true;
    for (int i = 0; i < count; ++i) {
      row[i] = i, slot_in_chunk[i] = i, position[i] = seq.position(c.start + i);
      sort_key[i] = key(position[i]);
      sorted &= i == 0 || sort_key[i - 1] < sort_key[i];
    }
    if (sorted || !(p.has(kCausal) || padding)) return;
    rank_keys(sort_key.data(), count, row.data());
    for (int i = 0; i < count; ++i) slot_in_chunk[row[i]] = i;
    for (int i = 0; i < count; ++i) position[i] = seq.position(c.start + slot_in_chunk[i]);
  }
};

// A chunk of keys in the window of a chunk of queries.
template <class T>
struct WindowChunk {
  ChunkRows<T>* keys;
  int chunk;
  int64_t window_index;  // index of its first key in the window
};

// A chunk of queries: its first slot, and for each row its position and its slot in the chunk.
struct QueryChunk {
  int64_t start;
  const int *position, *slot_in_chunk;
};

// What the queries of a block may see: keys with key_position <= last_visible that are not excluded. Excluded are the
// query's own key (with shared rows and not causal; a causal query does not see that anyway), or in the second round of
// lists the keys that it saw in the first.
template <class T>
struct QueryLimits {
  alignas(64) Int<T> last_visible[kQueries], excluded_begin[kQueries], excluded_end[kQueries];
  alignas(64) Int<T> max_last_visible[kQueries];  // running maximum of last_visible, so that it can be searched
  bool any_excluded;

  void fill(const AttentionParams& p, const HeadSequence& seq, int round, const int* position, int count) {
    const bool* padding = p.has(kMaskPaddedQueries) && p.padding ? p.padding + seq.b * p.L + seq.offset : nullptr;
    const bool later_round = p.lists() && round > 0;
    any_excluded = later_round || (p.shared_qk() && !p.has(kCausal));
    Int<T> highest = kContextKey<T> - 1;
    for (int l = 0; l < kQueries; ++l) {
      const bool dead = l >= count || position[l] >= seq.n_queries || (padding && padding[position[l]]);
      // A causal query sees keys up to its own position, with shared rows only before it.
      last_visible[l] = dead ? kContextKey<T> - 1 : p.has(kCausal) ? position[l] - p.shared_qk() : kMaskedKey<T> - 1;
      Range excluded{kContextKey<T> - 1, kContextKey<T> - 1};
      if (l < count)
        excluded = later_round ? seq.excluded[position[l] / p.chunk_length] : Range{position[l], position[l] + 1};
      excluded_begin[l] = excluded.begin, excluded_end[l] = excluded.end;
      max_last_visible[l] = highest = std::max(highest, last_visible[l]);
    }
  }
};

// Which pairs of a block of queries and a chunk of keys are not masked by positions.
template <class T>
struct BlockMask {
  const QueryLimits<T>& queries;
  const Int<T>* key_position;
  int n_keys;

  // The first query that may see this key or a later one.
  int first_query(int64_t key) const { return below(queries.max_last_visible, kQueries, key_position[key]); }
  // How many of the keys this query or an earlier one may see.
  int keys_until(int64_t query) const { return below(key_position, n_keys, queries.max_last_visible[query] + 1); }

  RK_INLINE Vec<T> masked(Vec<T> score, int64_t key, int64_t j) const {
    const IVec<T> at = splat_int<T>(key_position[key]);
    score = at <= load_int<T>(queries.last_visible + j) ? score : splat(kMasked<T>);
    if (!queries.any_excluded) return score;
    const auto excluded =
        (at >= load_int<T>(queries.excluded_begin + j)) & (at < load_int<T>(queries.excluded_end + j));
    return excluded ? splat(kMasked<T>) : score;
  }

 private:
  // How many of n rising numbers are below x: a binary search without branches.
  static int below(const Int<T>* rising, int n, Int<T> x) {
    const Int<T>* from = rising;
    for (; n > 0; n -= (n + 1) / 2) from += from[(n - 1) / 2] < x ? (n + 1) / 2 : 0;
    return static_cast<int>(from - rising);
  }
};

// The cache lines of rows that will be needed soon. The products prefetch one of them every few multiplications. Many
// at once would delay each other and the loads of the products.
class Prefetch {
 public:
  void clear() { lines_.clear(); }
  template <class T>
  void add(const Rows& source, const HeadSequence& seq, int64_t head, const int32_t* order, int64_t slot, int count,
           int limit, int64_t width) {
    const char* base = reinterpret_cast<const char*>(source.at<T>(seq.b, head, seq.offset));
    const int64_t stride = source.stride_l * static_cast<int64_t>(sizeof(T)), bytes = width * sizeof(T);
    const size_t most = count * ((bytes + 63) / 64), before = lines_.size();
    lines_.resize(before + most);
    const char** to = lines_.data() + before;
    for (int i = 0; i < count; ++i) {
      const int64_t position = order ? order[slot + i] : (slot + i) % seq.L;
      if (position >= limit) continue;
      for (int64_t b = 0; b < bytes; b += 64) *to++ = base + position * stride + b;
    }
    lines_.resize(to - lines_.data());
  }
  // Called after the last add(). No product asks for more than `most` lines.
  void ready(int64_t most) {
    next_ = 0, size_ = lines_.size();
    lines_.resize(size_ + most, reinterpret_cast<const char*>(this));  // so that the products need no test
  }
  const char* const* begin() const { return lines_.data() + next_; }
  void end(const char* const* line) { next_ = std::min<size_t>(line - lines_.data(), size_); }

 private:
  std::vector<const char*> lines_;
  size_t next_ = 0, size_ = 0;
};

}  // namespace rk::cpu::RK_ISA
