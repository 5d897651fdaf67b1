// The steps of forward and backward on blocks of at most 64 queries.
//
// Scores lie transposed, [keys][64 queries]: keys and values are used as gathered, only queries and output gradients
// are transposed, and the softmax needs no sum across lanes. Each block is a function of its own, so that the register
// allocator sees one loop nest at a time.
#pragma once

namespace rk::cpu::RK_ISA {

// The rows of a chunk, gathered: [padded rows][padded width], zero beyond the real rows and columns.
template <class T>
void gather(const Rows& source, const Unit& u, const int* position, int count, int limit, int64_t width, T* rows,
            int64_t row_stride) {
  const T* base = source.at<T>(u.b, u.h, u.offset);
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

// Rows that will be needed soon; run(n) asks for the next n while the arithmetic goes on.
template <class T>
class Prefetch {
 public:
  void clear() { next_ = 0, rows_.clear(); }
  void add(const Rows& source, const Unit& u, const int32_t* order, int64_t slot, int count, int limit, int64_t width) {
    const char* base = reinterpret_cast<const char*>(source.at<T>(u.b, u.h, u.offset));
    for (int i = 0; i < count; ++i) {
      const int64_t position = order ? order[slot + i] : (slot + i) % u.L;
      if (position < limit) rows_.push_back({base + position * source.stride_l * sizeof(T), width * sizeof(T)});
    }
  }
  RK_INLINE void run(int n) {
    for (; n && next_ < rows_.size(); --n, ++next_)
      for (size_t b = 0; b < rows_[next_].bytes; b += 64) __builtin_prefetch(rows_[next_].from + b);
  }

 private:
  struct Row {
    const char* from;
    size_t bytes;
  };
  std::vector<Row> rows_;
  size_t next_ = 0;
};
constexpr int kPrefetchRows = 3;  // per register tile: more at once wait for each other

// What the queries of a block may see: keys with key_position <= limit and, where nothing is causal, != own.
template <class T>
struct QueryRules {
  alignas(64) Int<T> limit[kQueries], own[kQueries];
  bool any_own;
};
template <class T>
constexpr Int<T> kNoKey = std::numeric_limits<int32_t>::max();  // the position of a key that nobody may see
template <class T>
constexpr Int<T> kEveryone = -1;  // ... that everybody may see, below any limit

template <class T>
RK_INLINE Vec<T> masked(Vec<T> score, Int<T> key_position, const QueryRules<T>& rules, int64_t j) {
  const IVec<T> key = splat_int<T>(key_position);
  score = key <= load_int<T>(rules.limit + j) ? score : splat(kMasked<T>);
  if (rules.any_own) score = key != load_int<T>(rules.own + j) ? score : splat(kMasked<T>);
  return score;
}

// S^T = factor K Q^T (+ bias), masked; highest = max over the keys. Everything in units of log 2.
template <class T, bool kBias>
RK_NOINLINE void score_block(const T* K, int64_t k_stride, int keys, const T* QT, int64_t queries, int64_t D,
                             const T* factor, const Int<T>* key_position, const T* bias, const QueryRules<T>& rules,
                             T* S, T* highest, Prefetch<T>& prefetch) {
  tiles<T>(keys, queries, [&](auto m, auto n, int64_t i0, int64_t j0) RK_LAMBDA {
    constexpr int M = m.value, N = n.value;
    prefetch.run(kPrefetchRows);
    Vec<T> acc[M][N];
    zero<T>(acc);
    multiply<T>(acc, K + i0 * k_stride, k_stride, 1, QT + j0, kQueries, D);
    for (int jj = 0; jj < N; ++jj) {
      const int64_t j = j0 + jj * kLanes<T>;
      Vec<T> top = load<T>(highest + j);
      for (int i = 0; i < M; ++i) {
        Vec<T> x = acc[i][jj] * splat(factor[i0 + i]);
        if constexpr (kBias) x += load<T>(bias + (i0 + i) * kQueries + j);
        x = masked<T>(x, key_position[i0 + i], rules, j);
        top = maximum<T>(top, x);
        store<T>(S + (i0 + i) * kQueries + j, x);
      }
      store<T>(highest + j, top);
    }
  });
}

// S^T -> exp2(S^T - highest), zero where masked (highest is far above kMasked); total += sum over the keys; then times
// drop, if there is dropout.
template <class T>
RK_NOINLINE void softmax_block(T* S, int keys, int64_t queries, const T* highest, T* total, const T* drop) {
  for (int64_t j = 0; j < queries; j += kLanes<T>) {
    const Vec<T> top = load<T>(highest + j);
    Vec<T> sum = load<T>(total + j);
    for (int i = 0; i < keys; ++i) {
      T* s = S + i * kQueries + j;
      const Vec<T> x = load<T>(s);
      Vec<T> e = exp2(x - top);
      sum += e;
      if (drop) e *= load<T>(drop + i * kQueries + j);
      store<T>(s, e);
    }
    store<T>(total + j, sum);
  }
}

// to [rows][width] (+)= A B, A(i, k) = a[i * a_row + k * a_k], B [K][width]: S, dP, dV, dK (rows are
// keys), O, dQ (rows are queries).
template <class T>
RK_NOINLINE void product_block(const T* a, int64_t a_row, int64_t a_k, int64_t rows, const T* b, int64_t b_stride,
                               int64_t K, int64_t width, T* to, int64_t to_stride, bool add,
                               Prefetch<T>* prefetch = nullptr) {
  tiles<T>(rows, width, [&](auto m, auto n, int64_t i0, int64_t j0) RK_LAMBDA {
    constexpr int M = m.value, N = n.value;
    if (prefetch) prefetch->run(kPrefetchRows);
    T* out = to + i0 * to_stride + j0;
    Vec<T> acc[M][N];
    if (!add)
      zero<T>(acc);
    else
      for (int i = 0; i < M; ++i)
        for (int j = 0; j < N; ++j) acc[i][j] = load<T>(out + i * to_stride + j * kLanes<T>);
    multiply<T>(acc, a + i0 * a_row, a_row, a_k, b + j0, b_stride, K);
    for (int i = 0; i < M; ++i)
      for (int j = 0; j < N; ++j) store<T>(out + i * to_stride + j * kLanes<T>, acc[i][j]);
  });
}

// P = K Q^T and S = V dO^T become P^T = drop exp2(score - lse) and dS^T = P^T (drop V dO^T - delta) factor. A pass of
// its own: among the accumulators of a product the exponentials would be spilled.
template <class T>
RK_NOINLINE void gradient_block(T* P, T* S, int keys, int64_t queries, const T* factor_log2, const T* factor,
                                const Int<T>* key_position, const T* bias, const T* drop, const QueryRules<T>& rules,
                                const T* lse, const T* delta) {
  for (int64_t j = 0; j < queries; j += kLanes<T>) {
    const Vec<T> l = load<T>(lse + j), d = load<T>(delta + j);
    for (int i = 0; i < keys; ++i) {
      const int64_t at = i * kQueries + j;
      Vec<T> x = load<T>(P + at) * splat(factor_log2[i]);
      if (bias) x += load<T>(bias + at);
      x = masked<T>(x, key_position[i], rules, j);
      const Vec<T> p = exp2(x - l);
      const Vec<T> k = drop ? load<T>(drop + at) : splat(T(1));
      store<T>(P + at, p * k);
      store<T>(S + at, p * (load<T>(S + at) * k - d) * splat(factor[i]));
    }
  }
}

// |row|^2 as a key scale: a = 1 / sqrt(|q|^2 + 1e-6 D), or 1 / max(|q|, 1e-12); returns a^2 where a depends on q.
template <class T>
RK_INLINE T unit_scale(const T* row, int64_t stride, int64_t D, bool l2, T& a) {
  Vec<T> squares{};
  for (int64_t d = 0; d < stride; d += kLanes<T>) squares += load<T>(row + d) * load<T>(row + d);
  const T square = sum<T>(squares);
  if (!l2) {
    a = 1 / std::sqrt(square + T(1e-6) * D);
    return a * a;
  }
  const T length = std::sqrt(square);
  a = 1 / std::max(length, T(1e-12));
  return length > T(1e-12) ? a * a : 0;
}

}  // namespace rk::cpu::RK_ISA
