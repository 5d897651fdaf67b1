// Chooses the instance of a kernel for a type of rows and a head size.
#pragma once
#include <iterator>

#include "kernels/cuda/device.cuh"
#include "kernels/cuda/plan.h"

namespace rk::cuda {

template <class T, int K_STEPS>
struct Instance {};

// make(Instance<T, K_STEPS>{}), a pointer to a kernel; null, which launch() refuses, for a number of steps that is not
// in kHeadSteps.
template <class Kernel, class T, int INDEX = 0, class Make>
Kernel* kernel_for_steps(int k_steps, Make&& make) {
  if constexpr (INDEX == std::size(kHeadSteps))
    return nullptr;
  else if (k_steps == kHeadSteps[INDEX])
    return make(Instance<T, kHeadSteps[INDEX]>{});
  else
    return kernel_for_steps<Kernel, T, INDEX + 1>(k_steps, make);
}

template <class Kernel, class Make>
Kernel* kernel_for(Element element, int k_steps, Make&& make) {
  switch (element) {
    case Element::kBFloat16:
      return kernel_for_steps<Kernel, bf16>(k_steps, make);
    case Element::kFloat16:
      return kernel_for_steps<Kernel, fp16>(k_steps, make);
    case Element::kSame:
      return kernel_for_steps<Kernel, float>(k_steps, make);
  }
  return nullptr;
}

}  // namespace rk::cuda
