// The CPU kernels as a table of functions, one table per instruction set, and how they get their threads.
#pragma once
#include <vector>

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
  void (*select)(const SelectParams&, const Threads&);
  void (*list_forward)(const AttentionParams&, const Threads&);
  void (*list_backward)(const AttentionParams&, const Threads&);
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

// Stable counting sort of one row; false if a bucket is not in [0, n_buckets).
bool counting_sort(const int32_t* bucket, int64_t length, int64_t n_buckets, int32_t* order,
                   std::vector<int32_t>& scratch);

// Stable counting sort of every row; returns how many rows have a bucket that is not in [0, n_buckets).
int64_t bucket_order(const OrderParams&, const Threads&);

}  // namespace rk::cpu
