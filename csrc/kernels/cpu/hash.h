// Angular LSH: projections of 64 tokens at a time and their argmax, tokens in the lanes.
#pragma once
#include "kernels/cpu/half.h"

namespace rk::cpu::RK_ISA {

template <class T>
RK_NOINLINE void project(const T* rotations, int64_t columns, int64_t stride, const T* XT, int64_t D, T* y) {
  row_tiles(columns, [&](auto m, int64_t i0) RK_LAMBDA {
    column_tiles<T>(0, kQueries, [&](auto n, int64_t j0) RK_LAMBDA {
      Vec<T> acc[m.value][n.value];
      zero<T>(acc);
      multiply<T, true>(acc, rotations + i0, stride, XT + j0, kQueries, D, []() RK_LAMBDA {});
      for (int i = 0; i < m.value; ++i)
        for (int j = 0; j < n.value; ++j) store<T>(y + (i0 + i) * kQueries + j0 + j * kLanes<T>, acc[i][j]);
    });
  });
}

// bucket [64] += radix * argmax([y, -y]) over the `half` rows of y; the first of equal ones.
template <class T>
RK_NOINLINE void add_digit(const T* y, int64_t half, int64_t radix, Int<T>* bucket) {
  for (int j = 0; j < kQueries; j += kLanes<T>) {
    Vec<T> high = load<T>(y + j), low = high;
    IVec<T> at_high{}, at_low{};
    for (int64_t i = 1; i < half; ++i) {
      const Vec<T> x = load<T>(y + i * kQueries + j);
      at_high = x > high ? splat_int<T>(i) : at_high;
      at_low = x < low ? splat_int<T>(i) : at_low;
      high = x > high ? x : high;
      low = x < low ? x : low;
    }
    IVec<T>& b = *reinterpret_cast<IVec<T>*>(bucket + j);
    b += (high >= -low ? at_high : at_low + splat_int<T>(half)) * splat_int<T>(radix);
  }
}

template <class T>
void hash(const HashParams& p, const Threads& threads) {
  int64_t columns = 0, total = 1;
  for (int64_t f = 0; f < p.n_factors; ++f) columns += p.factors[f] / 2, total *= p.factors[f];
  const int64_t stride = p.R * columns, Dp = round_up(p.D, kRowPad);
  const int64_t blocks = (p.L + kQueries - 1) / kQueries, tasks = p.B * p.H * blocks;
  struct Scratch {
    Buffer<T> X, XT, y;
  };
  std::vector<Scratch> scratch(threads.count);
  for (auto& s : scratch) s.X.resize(kQueries * Dp), s.XT.resize(Dp * kQueries), s.y.resize(columns * kQueries);
  threads.for_each_worker([&](int w) {
    Scratch& s = scratch[w];
    for (int64_t task = tasks * w / threads.count; task < tasks * (w + 1) / threads.count; ++task) {
      const int64_t head = task / blocks, b = head / p.H, h = head % p.H, first = task % blocks * kQueries;
      const int count = static_cast<int>(std::min<int64_t>(kQueries, p.L - first));
      for (int i = 0; i < kQueries; ++i) {
        T* to = s.X + i * Dp;
        const int64_t d = i < count ? p.D : 0;
        if (d) copy_row<T>(p.x, p.element, b, h, first + i, d, to);
        std::fill(to + d, to + Dp, T(0));
      }
      transpose_rows<T>(s.X, Dp, kQueries, p.D, s.XT);
      const T* rotations = static_cast<const T*>(p.rotations) + b * p.rotations_stride_b + h * p.rotations_stride_h;
      for (int64_t r = 0; r < p.R; ++r) {
        alignas(64) Int<T> bucket[kQueries] = {};
        project<T>(rotations + r * columns, columns, stride, s.XT, p.D, s.y);
        int64_t column = 0, radix = 1;
        for (int64_t f = 0; f < p.n_factors; ++f) {
          add_digit<T>(s.y + column * kQueries, p.factors[f] / 2, radix, bucket);
          column += p.factors[f] / 2, radix *= p.factors[f];
        }
        int32_t* to = p.buckets + (head * p.R + r) * p.L + first;
        for (int i = 0; i < count; ++i) {
          const bool padded = p.padding && p.padding[b * p.L + first + i];
          to[i] = static_cast<int32_t>(padded ? total : bucket[i]);
        }
      }
    }
  });
}

}  // namespace rk::cpu::RK_ISA
