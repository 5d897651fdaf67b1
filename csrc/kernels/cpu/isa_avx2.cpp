// The CPU kernels for AVX2 with FMA.
#include "kernels/cpu/standard.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define RK_ISA avx2
#define RK_VECTOR_BYTES 32
#define RK_TILE_VECTORS 2
#define RK_MULTIPLY_LOW(a, b) _mm256_mul_epu32((__m256i)(a), (__m256i)(b))
#include "kernels/cpu/table.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif

const rk::cpu::Kernels* rk::cpu::kernels_avx2() { return avx2::table("avx2"); }
#else
const rk::cpu::Kernels* rk::cpu::kernels_avx2() { return nullptr; }
#endif
