// The CPU kernels for AVX-512.
#include "kernels/cpu/standard.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#endif
#define RK_ISA avx512
#define RK_VECTOR_BYTES 64
#define RK_TILE_VECTORS 4
#define RK_MULTIPLY_LOW(a, b) _mm512_mul_epu32((__m512i)(a), (__m512i)(b))
#include "kernels/cpu/table.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif

const rk::cpu::Kernels* rk::cpu::kernels_avx512() { return avx512::table("avx512"); }
#else
const rk::cpu::Kernels* rk::cpu::kernels_avx512() { return nullptr; }
#endif
