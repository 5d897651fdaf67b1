// The kernels of one instruction set, and the table of them. Included once by each isa_*.cpp.
#pragma once
#include "kernels/cpu/hash.h"
#include "kernels/cpu/lists.h"
#include "kernels/cpu/select.h"

namespace rk::cpu::RK_ISA {

template <class T>
constexpr TypedKernels<T> kTyped = {attention_forward<T>, attention_backward<T>, hash<T>,
                                    select_keys<T>,       list_forward<T>,       list_backward<T>};

inline const Kernels* table(const char* isa) {
  static const Kernels kernels = {isa, kTyped<float>, kTyped<double>};
  return &kernels;
}

}  // namespace rk::cpu::RK_ISA
