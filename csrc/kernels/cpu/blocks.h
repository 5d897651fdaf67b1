// The steps of forward and backward on blocks of at most 64 queries.
//
// Scores are transposed, [keys][64 queries]. So keys and values are used as gathered, only queries and output gradients
// are transposed, and the softmax needs no sum across lanes. Products leave out pairs that no query of a vector sees;
// their weights are zero. Each step is a function of its own, so that the register allocator sees one loop nest at a
// time.
#pragma once
#include "kernels/cpu/chunk.h"

namespace rk::cpu::RK_ISA {

// The product of one register tile, which prefetches lines meanwhile.
template <class T, bool kTransposed, int M, int N>
RK_INLINE void multiply(Vec<T> (&acc)[M][N], const T* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t K,
                        Prefetch& prefetch) {
  const char* const* line = prefetch.begin();
  multiply<T, kTransposed>(acc, a, a_stride, b, b_stride, K, [&]() RK_LAMBDA {
    __builtin_prefetch(*line++);
    if (kTransposed) __builtin_prefetch(*line++);  // transposed products always have whole tiles, which take longer
  });
  prefetch.end(line);
}

// Calls f(rows, vectors, first key, first query) for the tiles of keys x queries with pairs that are not masked. For
// the vector of queries at j these are the tiles with keys below keys_until(last query of the vector).
template <class T, class F>
RK_INLINE void seen_tiles(const BlockMask<T>& mask, int64_t queries, F&& f) {
  row_tiles(mask.n_keys, [&](auto m, int64_t i0) RK_LAMBDA {
    column_tiles<T>(mask.first_query(i0) / kLanes<T> * kLanes<T>, queries,
                    [&](auto n, int64_t j0) RK_LAMBDA { f(m, n, i0, j0); });
  });
}

// S = K Q^T or dP = V dO^T, for pairs that are not masked.
template <class T>
RK_NOINLINE void pair_block(const BlockMask<T>& mask, const T* rows, int64_t stride, const T* t, int64_t queries,
                            int64_t width, T* to, Prefetch& prefetch) {
  seen_tiles<T>(mask, queries, [&](auto m, auto n, int64_t i0, int64_t j0) RK_LAMBDA {
    constexpr int M = m.value, N = n.value;
    Vec<T> acc[M][N];
    zero<T>(acc);
    multiply<T, false>(acc, rows + i0 * stride, stride, t + j0, kQueries, width, prefetch);
    for (int i = 0; i < M; ++i)
      for (int j = 0; j < N; ++j) store<T>(to + (i0 + i) * kQueries + j0 + j * kLanes<T>, acc[i][j]);
  });
}

// Calls f(first query, n) for every vector of queries; n: how many keys seen_tiles covers for it. These passes are
// apart from the products: their registers would be spilled between the accumulators, and they would wait for each
// other.
template <class T, class F>
RK_INLINE void seen_vectors(const BlockMask<T>& mask, int64_t queries, F&& f) {
  for (int64_t j = 0; j < queries; j += kLanes<T>) f(j, mask.keys_until(j + kLanes<T> - 1));
}

// The masked score of a pair from its product, base 2.
template <class T>
RK_INLINE Vec<T> score(const BlockMask<T>& mask, const T* product, const T* factor, const T* bias, int64_t i,
                       int64_t j) {
  Vec<T> x = load<T>(product + i * kQueries + j) * splat(factor[i]);
  if (bias) x += load<T>(bias + i * kQueries + j);
  return mask.masked(x, i, j);
}

// Turns products S into scores, and raises `highest` to their maximum over the keys.
template <class T>
RK_NOINLINE void score_block(const BlockMask<T>& mask, T* S, int64_t queries, const T* factor, const T* bias,
                             T* highest) {
  seen_vectors(mask, queries, [&](int64_t j, int keys) RK_LAMBDA {
    Vec<T> top = load<T>(highest + j);
    for (int i = 0; i < keys; ++i) {
      const Vec<T> x = score(mask, S, factor, bias, i, j);
      top = maximum<T>(top, x);
      store<T>(S + i * kQueries + j, x);
    }
    store<T>(highest + j, top);
  });
}

// Turns S into exp2(score - highest), which is zero where a pair is masked, since highest is far above kMasked. S holds
// scores if kScores, else products. total += the sum over the keys. Then S is multiplied by drop, if there is dropout.
template <class T, bool kScores>
RK_NOINLINE void weight_block(const BlockMask<T>& mask, T* S, int64_t queries, const T* factor, const T* highest,
                              T* total, const T* drop) {
  seen_vectors(mask, queries, [&](int64_t j, int keys) RK_LAMBDA {
    const Vec<T> top = load<T>(highest + j);
    Vec<T> sum = load<T>(total + j);
    for (int i = 0; i < keys; ++i) {
      const int64_t at = i * kQueries + j;
      Vec<T> e = exp2((kScores ? load<T>(S + at) : score<T>(mask, S, factor, nullptr, i, j)) - top);
      sum += e;
      if (drop) e *= load<T>(drop + at);
      store<T>(S + at, e);
    }
    for (int i = keys; i < mask.n_keys; ++i) store<T>(S + i * kQueries + j, Vec<T>{});
    store<T>(total + j, sum);
  });
}

// Turns P = K Q^T and S = V dO^T into P^T = drop exp2(score - lse) and dS^T = P^T (drop V dO^T - delta) factor.
template <class T>
RK_NOINLINE void gradient_block(const BlockMask<T>& mask, T* P, T* S, int64_t queries, const T* factor_log2,
                                const T* factor, const T* bias, const T* drop, const T* lse, const T* delta) {
  seen_vectors(mask, queries, [&](int64_t j, int keys) RK_LAMBDA {
    const Vec<T> l = load<T>(lse + j), d = load<T>(delta + j);
    for (int i = 0; i < keys; ++i) {
      const int64_t at = i * kQueries + j;
      const Vec<T> p = exp2(score(mask, P, factor_log2, bias, i, j) - l);
      const Vec<T> k = drop ? load<T>(drop + at) : splat(T(1));
      store<T>(P + at, p * k);
      store<T>(S + at, p * (load<T>(S + at) * k - d) * splat(factor[i]));
    }
    for (int i = keys; i < mask.n_keys; ++i)
      store<T>(P + i * kQueries + j, Vec<T>{}), store<T>(S + i * kQueries + j, Vec<T>{});
  });
}

// Sets `to` [rows][width] to a sum of products, or adds it. sum(acc, first row, first column) computes that of a tile.
template <class T, class F>
RK_INLINE void product(int64_t rows, int64_t width, T* to, int64_t to_stride, bool add, F&& sum) {
  row_tiles(rows, [&](auto m, int64_t i0) RK_LAMBDA {
    column_tiles<T>(0, width, [&](auto n, int64_t j0) RK_LAMBDA {
      constexpr int M = m.value, N = n.value;
      T* out = to + i0 * to_stride + j0;
      Vec<T> acc[M][N];
      if (!add)
        zero<T>(acc);
      else
        for (int i = 0; i < M; ++i)
          for (int j = 0; j < N; ++j) acc[i][j] = load<T>(out + i * to_stride + j * kLanes<T>);
      sum(acc, i0, j0);
      for (int i = 0; i < M; ++i)
        for (int j = 0; j < N; ++j) store<T>(out + i * to_stride + j * kLanes<T>, acc[i][j]);
    });
  });
}

// The weights of a block of queries on one chunk of keys, and rows of these keys.
template <class T>
struct Weighted {
  BlockMask<T> mask;
  const T* P;     // [keys][64]
  const T* rows;  // [keys][width]
};

// Sums over the keys of all chunks; the rows of the result are queries: O = P V, dQ = dS K.
template <class T>
RK_NOINLINE void query_block(const Weighted<T>* chunks, int n_chunks, int count, int64_t width, T* to, bool add,
                             Prefetch& prefetch) {
  product<T>(count, width, to, width, add, [&]<int M, int N>(Vec<T>(&acc)[M][N], int64_t i0, int64_t j0) RK_LAMBDA {
    for (const Weighted<T>* c = chunks; c < chunks + n_chunks; ++c)
      multiply<T, true>(acc, c->P + i0, kQueries, c->rows + j0, width, c->mask.keys_until(i0 + M - 1), prefetch);
  });
}

// Sums over queries; the rows of the result are keys: dV = P^T dO, dK = dS^T Q.
template <class T>
RK_NOINLINE void key_block(const BlockMask<T>& mask, const T* P, int count, const T* rows, int64_t width, T* to,
                           bool add, Prefetch& prefetch) {
  product<T>(mask.n_keys, width, to, width, add,
             [&]<int M, int N>(Vec<T>(&acc)[M][N], int64_t i0, int64_t j0) RK_LAMBDA {
               const int64_t first = std::min(mask.first_query(i0), count);
               multiply<T, false>(acc, P + i0 * kQueries + first, kQueries, rows + first * width + j0, width,
                                  count - first, prefetch);
             });
}

}  // namespace rk::cpu::RK_ISA
