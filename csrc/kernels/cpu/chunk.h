// The rows of a chunk, gathered, and what its queries may see of it.
//
// Rows lie in the order of what decides whether a query may see them: context keys, positions, padding. Then the keys
// that a query sees are the first ones of every chunk, the queries that see a key are the last ones of their block,
// and causal attention computes little more than half of the pairs.
#pragma once

namespace rk::cpu::RK_ISA {

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

// The most keys of a chunk.
inline int64_t max_keys(const AttentionParams& p) { return p.lists() ? p.list_length : std::min(p.chunk_length, p.L); }

// The rows at the positions: [padded rows][padded width], zero beyond the real rows and columns.
template <class T>
void gather(const Rows& source, const Unit& u, int64_t head, const int* position, int count, int limit, int64_t width,
            T* rows, int64_t row_stride) {
  const T* base = source.at<T>(u.b, head, u.offset);
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

// t [width][64] of at most 64 rows.
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

// rank[i]: how many of the keys, all different, are smaller than key[i]. Quadratic but without branches: a small part
// of what the pairs of a chunk cost anyway. Both arrays are padded to whole vectors.
inline void rank_keys(const int32_t* key, int count, int32_t* rank) {
  for (int i = 0; i < count; i += kLanes<float>) {
    const IVec<float> x = load_int<float>(key + i);
    IVec<float> smaller{};
    for (int j = 0; j < count; ++j) smaller -= splat_int<float>(key[j]) < x;
    *reinterpret_cast<IVec<float>*>(rank + i) = smaller;
  }
}

// Bounds up to this leave weights that add up without underflow: 2^-80 and above.
template <class T>
constexpr T kSafeBound = 40;

template <class T>
constexpr Int<T> kNoKey = std::numeric_limits<int32_t>::max();  // the position of a key that nobody may see
template <class T>
constexpr Int<T> kEveryone = -1;  // ... that everybody may see, below any limit

// The keys of a chunk, gathered, and (in backward) the gradients that they collect.
template <class T>
struct ChunkRows {
  int64_t index = std::numeric_limits<int64_t>::min();  // in the unrolled ring
  int count = 0;
  std::vector<int> position;        // of every row
  std::vector<int32_t> place, row;  // row i was slot place[i] of the chunk; slot s became row[s]
  std::vector<int32_t> sort_key;    // of every slot
  Buffer<T> K, V;                   // [C][Dp], [C][Ep]
  Buffer<T> factor, factor_log2;    // score = factor q . K
  Buffer<T> square;                 // a^2, where K = q but the key is a q
  Buffer<T> bound;                  // no score of this row as a query is above it, in units of log 2
  Buffer<Int<T>> key_position;      // as QueryRules wants it, rising
  Buffer<T> dQ, dK, dV;
  bool fresh = true;  // dK and dV hold nothing yet

  void resize(int64_t C, int64_t Dp, int64_t Ep, bool backward) {
    const int64_t rows = round_up(C, kRowPad);
    position.resize(rows), place.resize(rows), row.resize(rows), sort_key.resize(rows);
    K.resize(rows * Dp), V.resize(rows * Ep);
    factor.resize(rows), factor_log2.resize(rows), square.resize(rows), bound.resize(rows), key_position.resize(rows);
    if (backward) dQ.resize(rows * Dp), dK.resize(rows * Dp), dV.resize(rows * Ep);
  }

  void load(const AttentionParams& p, const Unit& u, int64_t unrolled, int chunk, int64_t Dp, int64_t Ep) {
    const Chunk c = u.chunks[chunk];
    index = unrolled, count = c.count, fresh = true;
    const bool* padding = p.padding ? p.padding + u.b * p.L + u.offset : nullptr;
    arrange(p, u, c, padding);
    fetch(p, u, padding, u.L, u.n_queries, Dp, Ep);
  }

  // A row of AttentionParams::key_indices.
  void load_list(const AttentionParams& p, const Unit& u, const int32_t* list, int64_t Dp, int64_t Ep) {
    for (count = 0; count < p.list_length && list[count] >= 0; ++count)
      position[count] = list[count], place[count] = row[count] = count;
    fetch(p, u, nullptr, p.S, p.S - p.context_keys, Dp, Ep);
  }

 private:
  // The rows at the positions, below `limit`; from `context` on everybody may see them.
  void fetch(const AttentionParams& p, const Unit& u, const bool* padding, int64_t limit, int64_t context, int64_t Dp,
             int64_t Ep) {
    gather<T>(p.shared() ? p.query : p.key, u, u.key_head, position.data(), count, limit, p.D, K, Dp);
    gather<T>(p.value, u, u.key_head, position.data(), count, limit, p.E, V, Ep);
    const T scale = static_cast<T>(p.scale), log2e = static_cast<T>(kLog2e), eps = T(1e-6) * p.D;
    const bool shared = p.shared(), l2 = p.has(kL2Norm);
    // The key is a row over its length: over sqrt(|q|^2 + 1e-6 D), or over max(|q|, 1e-12).
    if (shared) squares<T>(K, Dp, count, square);
    for (int i = 0; i < count; ++i) {
      const T length = shared ? std::sqrt(square[i]) : T(0);
      const T divisor = !shared ? T(1) : l2 ? std::max(length, T(1e-12)) : std::sqrt(square[i] + eps);
      const T a = 1 / divisor;
      factor[i] = a * scale, factor_log2[i] = a * scale * log2e;
      bound[i] = length * std::abs(scale) * log2e;
      square[i] = !shared || (l2 && length <= T(1e-12)) ? T(0) : a * a;  // where it depends on q
    }
    for (int i = 0; i < count; ++i) {
      const bool everyone = position[i] >= context;
      key_position[i] = padding && padding[position[i]] ? kNoKey<T> : everyone ? kEveryone<T> : position[i];
    }
  }

  void arrange(const AttentionParams& p, const Unit& u, Chunk c, const bool* padding) {
    // The signed order of the keys is: context, the others, padding; a position and u.L are below 2^31.
    const uint32_t context = static_cast<uint32_t>(u.n_queries);
    auto key = [&](int position) {
      const uint32_t at = static_cast<uint32_t>(position), length = static_cast<uint32_t>(u.L);
      const uint32_t unpadded = at >= context ? at - context : at + (length - context);
      return static_cast<int32_t>((padding && padding[position] ? 0u : 0x80000000u) + unpadded);
    };
    bool sorted = true;
    for (int i = 0; i < count; ++i) {
      row[i] = i, place[i] = i, position[i] = u.position(c.start + i);
      sort_key[i] = key(position[i]);
      sorted &= i == 0 || sort_key[i - 1] < sort_key[i];
    }
    if (sorted || !(p.has(kCausal) || padding)) return;
    rank_keys(sort_key.data(), count, row.data());
    for (int i = 0; i < count; ++i) place[row[i]] = i;
    for (int i = 0; i < count; ++i) position[i] = u.position(c.start + place[i]);
  }
};

// A chunk of the window of a chunk of queries.
template <class T>
struct WindowChunk {
  ChunkRows<T>* keys;
  int chunk;
  int64_t place;  // of its first key in the window
};

// A chunk as queries: its first slot, and for every row its position and which slot of the chunk it was.
struct QueryChunk {
  int64_t start;
  const int *position, *place;
};

// What the queries of a block may see: keys with key_position <= limit and, if any are hidden, none of those: its own
// where nothing is causal, or its local window where that was seen in the first round.
template <class T>
struct QueryRules {
  alignas(64) Int<T> limit[kQueries], hidden_from[kQueries], hidden_to[kQueries];
  alignas(64) Int<T> reach[kQueries];  // the largest limit up to here: rising, so it can be searched
  bool any_hidden;

  void fill(const AttentionParams& p, const Unit& u, int round, const int* position, int count) {
    const bool* padding = p.has(kMaskPaddedQueries) && p.padding ? p.padding + u.b * p.L + u.offset : nullptr;
    const bool windows = p.lists() && round > 0;
    any_hidden = windows || (p.shared() && !p.has(kCausal));
    Int<T> highest = kEveryone<T> - 1;
    for (int l = 0; l < kQueries; ++l) {
      const bool dead = l >= count || position[l] >= u.n_queries || (padding && padding[position[l]]);
      // Causal: up to the own position, and with shared rows without it.
      limit[l] = dead ? kEveryone<T> - 1 : p.has(kCausal) ? position[l] - p.shared() : kNoKey<T> - 1;
      Range hidden{kEveryone<T> - 1, kEveryone<T> - 1};
      if (l < count) hidden = windows ? u.local[position[l] / p.chunk_length] : Range{position[l], position[l] + 1};
      hidden_from[l] = hidden.from, hidden_to[l] = hidden.to;
      reach[l] = highest = std::max(highest, limit[l]);
    }
  }
};

// Which part of a block of queries and a chunk of keys is not masked by positions.
template <class T>
struct Sight {
  const QueryRules<T>& queries;
  const Int<T>* key_position;
  int n_keys;

  // The first query that may see this key or a later one.
  int first_query(int64_t key) const { return below(queries.reach, kQueries, key_position[key]); }
  // How many of the keys this query or an earlier one may see.
  int keys_until(int64_t query) const { return below(key_position, n_keys, queries.reach[query] + 1); }

  RK_INLINE Vec<T> masked(Vec<T> score, int64_t key, int64_t j) const {
    const IVec<T> at = splat_int<T>(key_position[key]);
    score = at <= load_int<T>(queries.limit + j) ? score : splat(kMasked<T>);
    if (!queries.any_hidden) return score;
    const auto hidden = (at >= load_int<T>(queries.hidden_from + j)) & (at < load_int<T>(queries.hidden_to + j));
    return hidden ? splat(kMasked<T>) : score;
  }

 private:
  // How many of n rising numbers are below x.
  static int below(const Int<T>* rising, int n, Int<T> x) {
    const Int<T>* from = rising;
    for (; n > 0; n -= (n + 1) / 2) from += from[(n - 1) / 2] < x ? (n + 1) / 2 : 0;
    return static_cast<int>(from - rising);
  }
};

// The cache lines of rows that will be needed soon. The products ask for one every few multiplications: many at once
// would wait for each other and for the products' own loads.
class Prefetch {
 public:
  void clear() { lines_.clear(); }
  template <class T>
  void add(const Rows& source, const Unit& u, int64_t head, const int32_t* order, int64_t slot, int count, int limit,
           int64_t width) {
    const char* base = reinterpret_cast<const char*>(source.at<T>(u.b, head, u.offset));
    const int64_t stride = source.stride_l * static_cast<int64_t>(sizeof(T)), bytes = width * sizeof(T);
    const size_t most = count * ((bytes + 63) / 64), before = lines_.size();
    lines_.resize(before + most);
    const char** to = lines_.data() + before;
    for (int i = 0; i < count; ++i) {
      const int64_t position = order ? order[slot + i] : (slot + i) % u.L;
      if (position >= limit) continue;
      for (int64_t b = 0; b < bytes; b += 64) *to++ = base + position * stride + b;
    }
    lines_.resize(to - lines_.data());
  }
  // After the last row; no product asks for more than `most` lines.
  void ready(int64_t most) {
    next_ = 0, size_ = lines_.size();
    lines_.resize(size_ + most, reinterpret_cast<const char*>(this));  // so that asking needs no test
  }
  const char* const* begin() const { return lines_.data() + next_; }
  void end(const char* const* line) { next_ = std::min<size_t>(line - lines_.data(), size_); }

 private:
  std::vector<const char*> lines_;
  size_t next_ = 0, size_ = 0;
};

}  // namespace rk::cpu::RK_ISA
