// The CPU kernels as a table of functions, one table per instruction set, and how they get their threads.
#pragma once
#include "kernels/params.h"

namespace rk::cpu {

// Runs body(context, worker) for every worker in [0, count), in parallel or not. Results never depend on count.
struct Threads {
  int count;
  void (*run)(int count, void (*body)(void* context, int worker), void* context);

  template <class F>
  void for_each_worker(F&& f) const {
    run(count, [](void* context, int worker) { (*static_cast<F*>(context))(worker); }, &f);
  }
};

template <class T>
struct TypedKernels {
  void (*forward)(const AttentionParams&, const Threads&);
  void (*backward)(const AttentionParams&, const Threads&);
  void (*hash)(const HashParams&, const Threads&);
};

struct Kernels {
  const char* isa;
  TypedKernels<float> f32;
  TypedKernels<double> f64;
};

const Kernels* kernels_baseline();
const Kernels* kernels_avx2();  // null where it was not compiled
const Kernels* kernels_avx512();

// The table in use: the best that the processor runs, or the one chosen by name. select returns false if it cannot.
const Kernels& kernels();
bool select(const char* isa);

// Stable counting sort of every row; returns how many rows have a bucket that is not in [0, n_buckets).
int64_t bucket_order(const OrderParams&, const Threads&);

}  // namespace rk::cpu
