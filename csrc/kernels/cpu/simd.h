// Vectors, exp2, transposition and the register-blocked product. The kernels are compiled once per instruction set, in
// the namespace RK_ISA. RK_VECTOR_BYTES: bytes of a vector. RK_TILE_VECTORS: vectors in a row of a register tile.
#pragma once
#include "kernels/cpu/standard.h"

#ifndef RK_ISA  // the header is read on its own, as by an editor
#define RK_ISA baseline
#define RK_VECTOR_BYTES 16
#define RK_TILE_VECTORS 2
#endif
#define RK_INLINE inline __attribute__((always_inline))
#define RK_NOINLINE __attribute__((noinline))
#define RK_LAMBDA __attribute__((always_inline))  // after the parameters of a lambda that must not become a call

namespace rk::cpu::RK_ISA {

template <class T>
struct Types;
template <>
struct Types<float> {
  typedef float V __attribute__((vector_size(RK_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t I __attribute__((vector_size(RK_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t Int;
};
template <>
struct Types<double> {
  typedef double V __attribute__((vector_size(RK_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t I __attribute__((vector_size(RK_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t Int;
};
template <class T>
using Vec = typename Types<T>::V;
template <class T>
using IVec = typename Types<T>::I;
template <class T>
using Int = typename Types<T>::Int;  // an integer of the width of T, for positions next to scores

template <class T>
constexpr int kLanes = RK_VECTOR_BYTES / sizeof(T);
constexpr int kTileVectors = RK_TILE_VECTORS;
constexpr int kTileRows = 6;  // 6 x 4 accumulators + 4 + 1 of 32 registers, or 6 x 2 + 2 + 1 of 16
constexpr int kQueries = 64;  // queries per block: the row length of transposed operands and of score blocks
constexpr int kRowPad = 16;   // buffers of rows are padded to a multiple of this

template <class T>
constexpr T kMasked = T(-3e30);  // the score of a masked pair base 2; far below any real one
template <class T>
constexpr T kLowest = T(-2e30);  // the maximum over no score: exp2(kMasked - kLowest) is 0

template <class T>
RK_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const Vec<T>*>(p);
}
template <class T>
RK_INLINE IVec<T> load_int(const Int<T>* p) {
  return *reinterpret_cast<const IVec<T>*>(p);
}
template <class T>
RK_INLINE void store(T* p, Vec<T> x) {
  *reinterpret_cast<Vec<T>*>(p) = x;
}
// x - 0 folds into a load that broadcasts; 0 + x does not, as it changes -0.
template <class T>
RK_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};
}
template <class T>
RK_INLINE IVec<T> splat_int(Int<T> x) {
  return x - IVec<T>{};
}
template <class T>
RK_INLINE Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}
// 2^x for x <= 0, and 0 below 2^-126; relative error 1.7e-7 in float (a degree 5 polynomial on [-1/2, 1/2]).
RK_INLINE Vec<float> exp2(Vec<float> x) {
  const auto underflows = x < splat(-126.0f);
  const Vec<float> magic = splat(12583039.0f);  // 1.5 * 2^23 + 127: the low bits of x + magic are round(x) + 127
  const Vec<float> rounded = x + magic;
  x -= rounded - magic;
  Vec<float> p = splat(1.3264727197e-03f) * x + splat(9.6715126396e-03f);
  p = p * x + splat(5.5507337433e-02f);
  p = p * x + splat(2.4022242085e-01f);
  p = p * x + splat(6.9314697760e-01f);
  p = p * x + splat(1.0f);
  p *= (Vec<float>)((IVec<float>)rounded << 23);  // NaN stays NaN
  return underflows ? Vec<float>{} : p;
}
RK_INLINE Vec<double> exp2(Vec<double> x) {
  Vec<double> y = x;
  for (int i = 0; i < kLanes<double>; ++i) y[i] = std::exp2(x[i]);
  return y;
}

template <int N>
struct Const {
  static constexpr int value = N;
};

// acc[i][j] += sum_k A(i, k) B(k, j); A(i, k) = a[i * a_stride + k], or a[k * a_stride + i] where A is transposed. The
// sum over k runs in order, one fused multiply-add at a time, so a result does not depend on the tile that it was
// computed in. between() is called once in every four steps.
template <class T, bool kTransposed, int M, int N, class F>
RK_INLINE void multiply(Vec<T> (&acc)[M][N], const T* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t K,
                        F&& between) {
  auto step = [&](int64_t k) RK_LAMBDA {
    Vec<T> row[N];
    for (int j = 0; j < N; ++j) row[j] = load<T>(b + k * b_stride + j * kLanes<T>);
    for (int i = 0; i < M; ++i) {
      const Vec<T> x = splat<T>(kTransposed ? a[k * a_stride + i] : a[i * a_stride + k]);
      for (int j = 0; j < N; ++j) acc[i][j] += x * row[j];
    }
  };
  int64_t k = 0;
  for (; k + 4 <= K; k += 4) {
    between();
    for (int i = 0; i < 4; ++i) step(k + i);
  }
  for (; k < K; ++k) step(k);
}

// Element by element: `= {}` of a whole tile becomes a slow string instruction.
template <class T, int M, int N>
RK_INLINE void zero(Vec<T> (&acc)[M][N]) {
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) acc[i][j] = Vec<T>{};
}

template <class F>
RK_INLINE void row_tiles(int64_t rows, F&& f) {
  int64_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows) f(Const<kTileRows>{}, i);
  for (; i + 4 <= rows; i += 4) f(Const<4>{}, i);
  for (; i + 2 <= rows; i += 2) f(Const<2>{}, i);
  if (i < rows) f(Const<1>{}, i);
}
// f(vectors, first column) over strips of the columns [begin, end), a multiple of the lanes.
template <class T, class F>
RK_INLINE void column_tiles(int64_t begin, int64_t end, F&& f) {
  int64_t j = begin;
  for (; j + kTileVectors * kLanes<T> <= end; j += kTileVectors * kLanes<T>) f(Const<kTileVectors>{}, j);
  const int64_t rest = (end - j) / kLanes<T>;
  if constexpr (kTileVectors > 3)
    if (rest == 3) f(Const<3>{}, j);
  if constexpr (kTileVectors > 2)
    if (rest == 2) f(Const<2>{}, j);
  if (rest == 1) f(Const<1>{}, j);
}

template <class T, int S, int... I>
RK_INLINE void swap_halves(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, I...>) {
  // In blocks of S lanes, the second blocks of a are exchanged with the first blocks of b.
  constexpr int n = sizeof...(I);
  const auto low = __builtin_shufflevector(a, b, (I / S % 2 == 0 ? I : n + I - S)...);
  const auto high = __builtin_shufflevector(a, b, (I / S % 2 == 0 ? I + S : n + I)...);
  a = low, b = high;
}
// t[d][i] = rows[i][d] for kLanes x kLanes elements, in log2(kLanes) steps in registers.
template <class T>
RK_INLINE void transpose(const T* rows, int64_t row_stride, T* t, int64_t t_stride) {
  constexpr int n = kLanes<T>;
  Vec<T> r[n];
  for (int i = 0; i < n; ++i) r[i] = load<T>(rows + i * row_stride);
  auto step = [&](auto s) {
    constexpr int S = s.value;
    if constexpr (S < n)
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i)
        if (i / S % 2 == 0) swap_halves<T, S>(r[i], r[i + S], std::make_integer_sequence<int, n>{});
  };
  step(Const<1>{}), step(Const<2>{}), step(Const<4>{}), step(Const<8>{});
  for (int i = 0; i < n; ++i) store<T>(t + i * t_stride, r[i]);
}

// By halves, so that few additions wait for each other.
template <class T>
RK_INLINE T sum(Vec<T> x) {
  auto fold = [&](auto s) RK_LAMBDA {
    if constexpr (s.value < kLanes<T>) {
      Vec<T> a = x, b = x;
      swap_halves<T, s.value>(a, b, std::make_integer_sequence<int, kLanes<T>>{});
      x = a + b;
    }
  };
  fold(Const<1>{}), fold(Const<2>{}), fold(Const<4>{}), fold(Const<8>{});
  return x[0];
}

template <class T>
RK_INLINE T dot(const T* a, const T* b, int64_t width) {
  Vec<T> products{};
  int64_t d = 0;
  for (; d + kLanes<T> <= width; d += kLanes<T>) products += load<T>(a + d) * load<T>(b + d);
  T total = sum<T>(products);
  for (; d < width; ++d) total += a[d] * b[d];
  return total;
}

// to = to * multiplier + from * factor.
template <class T>
RK_INLINE void add_row(T* to, const T* from, int64_t width, T factor = 1, T multiplier = 1) {
  const Vec<T> f = splat(factor), m = splat(multiplier);
  int64_t d = 0;
  for (; d + kLanes<T> <= width; d += kLanes<T>) store<T>(to + d, load<T>(to + d) * m + load<T>(from + d) * f);
  for (; d < width; ++d) to[d] = to[d] * multiplier + from[d] * factor;
}

RK_INLINE int64_t round_up(int64_t x, int64_t n) { return (x + n - 1) / n * n; }

// Memory aligned to cache lines, not initialised.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) { resize(size); }
  void resize(int64_t size) {
    data_.reset(static_cast<T*>(::operator new(size * sizeof(T) + 64, std::align_val_t(64))));
    size_ = size;
  }
  void grow(int64_t size) {
    if (size > size_) resize(size);
  }
  operator T*() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t size_ = 0;
};

}  // namespace rk::cpu::RK_ISA
