// The CPU kernels for any processor of the architecture: 16-byte vectors (SSE2, NEON).
#include "kernels/cpu/standard.h"

#define RK_ISA baseline
#define RK_VECTOR_BYTES 16
#if defined(__aarch64__)
#define RK_TILE_VECTORS 4
#else
#define RK_TILE_VECTORS 2
#endif
#include "kernels/cpu/table.h"

const rk::cpu::Kernels* rk::cpu::kernels_baseline() { return baseline::table("baseline"); }
