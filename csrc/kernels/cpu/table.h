// The kernels of one instruction set, and the table of them. Included once by each isa_*.cpp.
#pragma once
// clang-format off
#include "kernels/cpu/simd.h"
#include "kernels/cpu/chunk.h"
#include "kernels/cpu/blocks.h"
#include "kernels/cpu/random.h"
#include "kernels/cpu/half.h"
#include "kernels/cpu/work.h"
#include "kernels/cpu/forward.h"
#include "kernels/cpu/backward.h"
#include "kernels/cpu/hash.h"
#include "kernels/cpu/rest.h"
#include "kernels/cpu/lists.h"
#include "kernels/cpu/select.h"
// clang-format on

namespace rk::cpu::RK_ISA {

template <class T>
constexpr TypedKernels<T> kTyped = {attention_forward<T>, attention_backward<T>, hash<T>,
                                    select_keys<T>,       list_forward<T>,       list_backward<T>};

inline const Kernels* table(const char* isa) {
  static const Kernels kernels = {isa, kTyped<float>, kTyped<double>};
  return &kernels;
}

}  // namespace rk::cpu::RK_ISA
