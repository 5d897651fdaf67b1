// The steps of forward and backward on blocks of at most 64 queries.
//
// Scores lie transposed, [keys][64 queries]: keys and values are used as gathered, only queries and output gradients
// are transposed, and the softmax needs no sum across lanes. Pairs that no query of a vector sees are left out of every
// product; their weights are zero. Each block is a function of its own, so that the register allocator sees one loop
// nest at a time.
#pragma once

namespace rk::cpu::RK_ISA {

// One tile's product, while a few lines are prefetched.
template <class T, bool kTransposed, int M, int N>
RK_INLINE void multiply(Vec<T> (&acc)[M][N], const T* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t K,
                        Prefetch& prefetch) {
  const char* const* line = prefetch.begin();
  multiply<T, kTransposed>(acc, a, a_stride, b, b_stride, K, [&]() RK_LAMBDA { __builtin_prefetch(*line++); });
  prefetch.end(line);
}

// f(rows, vectors, first key, first query) over the tiles of keys x queries that hold pairs which are not masked. For
// the vector of queries at j these are all tiles with keys below keys_until(its last query).
template <class T, class F>
RK_INLINE void seen_tiles(const Sight<T>& sight, int64_t queries, F&& f) {
  row_tiles(sight.n_keys, [&](auto m, int64_t i0) RK_LAMBDA {
    column_tiles<T>(sight.first_query(i0) / kLanes<T> * kLanes<T>, queries,
                    [&](auto n, int64_t j0) RK_LAMBDA { f(m, n, i0, j0); });
  });
}

// Zero where seen_tiles did not come.
template <class T>
RK_INLINE void clear_unseen(const Sight<T>& sight, int64_t queries, T* P) {
  for (int64_t j = 0; j < queries; j += kLanes<T>)
    for (int i = sight.keys_until(j + kLanes<T> - 1); i < sight.n_keys; ++i) store<T>(P + i * kQueries + j, Vec<T>{});
}

// S^T = factor K Q^T (+ bias), masked; highest = max over the keys. Everything in units of log 2.
template <class T, bool kBias>
RK_NOINLINE void score_block(const Sight<T>& sight, const T* K, int64_t k_stride, const T* QT, int64_t queries,
                             int64_t D, const T* factor, const T* bias, T* S, T* highest, Prefetch& prefetch) {
  seen_tiles<T>(sight, queries, [&](auto m, auto n, int64_t i0, int64_t j0) RK_LAMBDA {
    constexpr int M = m.value, N = n.value;
    Vec<T> acc[M][N];
    zero<T>(acc);
    multiply<T, false>(acc, K + i0 * k_stride, k_stride, QT + j0, kQueries, D, prefetch);
    for (int jj = 0; jj < N; ++jj) {
      const int64_t j = j0 + jj * kLanes<T>;
      Vec<T> top = load<T>(highest + j);
      for (int i = 0; i < M; ++i) {
        Vec<T> x = acc[i][jj] * splat(factor[i0 + i]);
        if constexpr (kBias) x += load<T>(bias + (i0 + i) * kQueries + j);
        x = sight.masked(x, i0 + i, j);
        top = maximum<T>(top, x);
        store<T>(S + (i0 + i) * kQueries + j, x);
      }
      store<T>(highest + j, top);
    }
  });
}

// The two blocks around this one in one, where `highest` is a bound that is known before.
template <class T>
RK_NOINLINE void weight_block(const Sight<T>& sight, const T* K, int64_t k_stride, const T* QT, int64_t queries,
                              int64_t D, const T* factor, const T* highest, T* P, T* total, const T* drop,
                              Prefetch& prefetch) {
  seen_tiles<T>(sight, queries, [&](auto m, auto n, int64_t i0, int64_t j0) RK_LAMBDA {
    constexpr int M = m.value, N = n.value;
    Vec<T> acc[M][N];
    zero<T>(acc);
    multiply<T, false>(acc, K + i0 * k_stride, k_stride, QT + j0, kQueries, D, prefetch);
    for (int jj = 0; jj < N; ++jj) {
      const int64_t j = j0 + jj * kLanes<T>;
      const Vec<T> top = load<T>(highest + j);
      Vec<T> sum = load<T>(total + j);
      for (int i = 0; i < M; ++i) {
        const int64_t at = (i0 + i) * kQueries + j;
        // Masked before the subtraction, or both would become one operation that rounds differently from two.
        Vec<T> e = exp2(sight.masked(acc[i][jj] * splat(factor[i0 + i]), i0 + i, j) - top);
        sum += e;
        if (drop) e *= load<T>(drop + at);
        store<T>(P + at, e);
      }
      store<T>(total + j, sum);
    }
  });
  clear_unseen<T>(sight, queries, P);
}

// S^T -> exp2(S^T - highest), zero where masked (highest is far above kMasked); total += sum over the keys; then times
// drop, if there is dropout.
template <class T>
RK_NOINLINE void softmax_block(const Sight<T>& sight, T* S, int64_t queries, const T* highest, T* total,
                               const T* drop) {
  for (int64_t j = 0; j < queries; j += kLanes<T>) {
    const Vec<T> top = load<T>(highest + j);
    const int keys = sight.keys_until(j + kLanes<T> - 1);
    Vec<T> sum = load<T>(total + j);
    for (int i = 0; i < keys; ++i) {
      T* s = S + i * kQueries + j;
      Vec<T> e = exp2(load<T>(s) - top);
      sum += e;
      if (drop) e *= load<T>(drop + i * kQueries + j);
      store<T>(s, e);
    }
    store<T>(total + j, sum);
  }
  clear_unseen<T>(sight, queries, S);
}

// to [rows][width] = or += A B, A(i, k) = a[i * a_stride + k], or a[k * a_stride + i] where A is transposed, B
// [K][width]. part(i, m) gives the range of k in which the rows [i, i + m) of A are not zero.
template <class T, bool kTransposed, class F>
RK_INLINE void product(const T* a, int64_t a_stride, int64_t rows, const T* b, int64_t b_stride, int64_t width, T* to,
                       int64_t to_stride, bool add, Prefetch& prefetch, F&& part) {
  row_tiles(rows, [&](auto m, int64_t i0) RK_LAMBDA {
    constexpr int M = m.value;
    const auto [begin, end] = part(i0, M);
    if (add && begin >= end) return;
    const T* first = a + (kTransposed ? begin * a_stride + i0 : i0 * a_stride + begin);
    column_tiles<T>(0, width, [&](auto n, int64_t j0) RK_LAMBDA {
      constexpr int N = n.value;
      T* out = to + i0 * to_stride + j0;
      Vec<T> acc[M][N];
      if (!add)
        zero<T>(acc);
      else
        for (int i = 0; i < M; ++i)
          for (int j = 0; j < N; ++j) acc[i][j] = load<T>(out + i * to_stride + j * kLanes<T>);
      multiply<T, kTransposed>(acc, first, a_stride, b + begin * b_stride + j0, b_stride, end - begin, prefetch);
      for (int i = 0; i < M; ++i)
        for (int j = 0; j < N; ++j) store<T>(out + i * to_stride + j * kLanes<T>, acc[i][j]);
    });
  });
}

// S = K Q^T, dP = V dO^T, where a pair is seen.
template <class T>
RK_NOINLINE void pair_block(const Sight<T>& sight, const T* rows, int64_t stride, const T* t, int64_t queries,
                            int64_t width, T* to, Prefetch& prefetch) {
  seen_tiles<T>(sight, queries, [&](auto m, auto n, int64_t i0, int64_t j0) RK_LAMBDA {
    constexpr int M = m.value, N = n.value;
    Vec<T> acc[M][N];
    zero<T>(acc);
    multiply<T, false>(acc, rows + i0 * stride, stride, t + j0, kQueries, width, prefetch);
    for (int i = 0; i < M; ++i)
      for (int j = 0; j < N; ++j) store<T>(to + (i0 + i) * kQueries + j0 + j * kLanes<T>, acc[i][j]);
  });
}

// Sums over keys, rows are queries: O = P V, dQ = dS K.
template <class T>
RK_NOINLINE void query_block(const Sight<T>& sight, const T* P, int count, const T* rows, int64_t stride, T* to,
                             bool add, Prefetch& prefetch) {
  product<T, true>(P, kQueries, count, rows, stride, stride, to, stride, add, prefetch,
                   [&](int64_t i, int m) { return std::pair<int64_t, int64_t>(0, sight.keys_until(i + m - 1)); });
}

// Sums over queries, rows are keys: dV = P^T dO, dK = dS^T Q.
template <class T>
RK_NOINLINE void key_block(const Sight<T>& sight, const T* P, int count, const T* rows, int64_t stride, T* to, bool add,
                           Prefetch& prefetch) {
  product<T, false>(P, kQueries, sight.n_keys, rows, stride, stride, to, stride, add, prefetch, [&](int64_t i, int) {
    return std::pair<int64_t, int64_t>(std::min(sight.first_query(i), count), count);
  });
}

// P = K Q^T and S = V dO^T become P^T = drop exp2(score - lse) and dS^T = P^T (drop V dO^T - delta) factor. A pass of
// its own: among the accumulators of a product the exponentials would be spilled.
template <class T>
RK_NOINLINE void gradient_block(const Sight<T>& sight, T* P, T* S, int64_t queries, const T* factor_log2,
                                const T* factor, const T* bias, const T* drop, const T* lse, const T* delta) {
  for (int64_t j = 0; j < queries; j += kLanes<T>) {
    const Vec<T> l = load<T>(lse + j), d = load<T>(delta + j);
    const int keys = sight.keys_until(j + kLanes<T> - 1);
    for (int i = 0; i < keys; ++i) {
      const int64_t at = i * kQueries + j;
      Vec<T> x = load<T>(P + at) * splat(factor_log2[i]);
      if (bias) x += load<T>(bias + at);
      x = sight.masked(x, i, j);
      const Vec<T> p = exp2(x - l);
      const Vec<T> k = drop ? load<T>(drop + at) : splat(T(1));
      store<T>(P + at, p * k);
      store<T>(S + at, p * (load<T>(S + at) * k - d) * splat(factor[i]));
    }
  }
  clear_unseen<T>(sight, queries, P);
  clear_unseen<T>(sight, queries, S);
}

}  // namespace rk::cpu::RK_ISA
