// The CPU kernels for any processor of the architecture: 16-byte vectors (SSE2, NEON).
#include "kernels/cpu/standard.h"

#define RK_ISA baseline
#define RK_VECTOR_BYTES 16
#if defined(__aarch64__)
#define RK_TILE_VECTORS 4
#else
#define RK_TILE_VECTORS 2
#endif
#if defined(__x86_64__)
#define RK_MULTIPLY_LOW(a, b) _mm_mul_epu32((__m128i)(a), (__m128i)(b))
#endif
#include "kernels/cpu/table.h"

const rk::cpu::Kernels* rk::cpu::kernels_baseline() { return baseline::table("baseline"); }
