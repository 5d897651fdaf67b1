// The names of kernels/cuda/device.cuh on a CPU: a kernel includes it instead, is compiled by g++, and runs on fibers.
//
// Asynchronous copies and matrix rows must lie in dynamic shared memory, which begins as NaN. x86-64 only.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

// After CUDA's headers, for it takes back some of their macros.
#include "language.h"
//
#include "block.h"
#include "copies.h"
#include "kernels/cuda/launch.h"
#include "launch.h"
#include "matrix.h"
#include "warp.h"

#define RK_DYNAMIC_SHARED(name) unsigned char* const name = ::rk::host::block().shared()

namespace rk::cuda {

using bf16 = __nv_bfloat16;
using fp16 = __half;

inline void copy_async(void* shared, const void* global, int bytes = host::kCopyBytes) {
  host::Block& block = host::block();
  block.check_shared(shared, host::kCopyBytes, "copy_async");
  if (reinterpret_cast<uintptr_t>(global) % host::kCopyBytes != 0)
    block.fail("copy_async: the global address is no multiple of 16");
  if (bytes < 0 || bytes > host::kCopyBytes) block.fail("copy_async: bytes must be between 0 and 16");
  const host::Copy copy{shared, global, bytes};
  if (block.late_copies())
    block.current().copies.add(copy);
  else
    copy.happen();
}

inline void commit_copies() { host::block().current().copies.commit(); }

template <int N>
void wait_for_copies() {
  static_assert(N >= 0);
  host::block().current().copies.wait(N);
}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  const host::MatrixFragments fragments = host::load_four_matrices<false>(row);
  std::memcpy(r, fragments.of_matrix, sizeof r);
}

inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  const host::MatrixFragments fragments = host::load_four_matrices<true>(row);
  std::memcpy(r, fragments.of_matrix, sizeof r);
}

template <class T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>);
  const host::ProductOperand operand{{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  const char* name = std::is_same_v<T, bf16> ? "multiply_add<bf16>" : "multiply_add<fp16>";
  const auto product = host::exchange<host::Product>({name}, ~0u, operand, host::multiply_fragments<T>);
  std::memcpy(d, product.d, sizeof d);
}

inline float exp2_approximate(float x) { return std::exp2(x); }

template <class T>
T from_float(float x) {
  if constexpr (std::is_same_v<T, bf16>)
    return __float2bfloat16_rn(x);
  else if constexpr (std::is_same_v<T, fp16>)
    return __float2half_rn(x);
  else
    return x;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return __bfloat162float(x); }
inline float to_float(fp16 x) { return __half2float(x); }

template <class T>
uint32_t pack(float low, float high) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>);
  const T pair[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t bits;
  std::memcpy(&bits, pair, sizeof bits);
  return bits;
}

template <class Params>
int launch(void (*kernel)(Params), const Launch& shape, const Params& params, void* /*stream*/) {
  static_assert(std::is_trivially_copyable_v<Params>);
  return host::launch(reinterpret_cast<const void*>(kernel), shape, &params, sizeof params,
                      [kernel, &params] { kernel(params); });
}

}  // namespace rk::cuda
