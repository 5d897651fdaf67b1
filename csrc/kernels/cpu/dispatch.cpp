// Chooses the instruction set at run time.
#include <atomic>
#include <cstring>

#include "kernels/cpu/kernels.h"

namespace rk::cpu {
namespace {

bool runs_here(const Kernels* k) {
  if (!k) return false;
#if defined(__x86_64__)
  if (!std::strcmp(k->isa, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!std::strcmp(k->isa, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return true;
}

const Kernels* best() {
  for (const Kernels* k : {kernels_avx512(), kernels_avx2()})
    if (runs_here(k)) return k;
  return kernels_baseline();
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* k = chosen.load(std::memory_order_relaxed);
  if (!k) chosen.store(k = best(), std::memory_order_relaxed);
  return *k;
}

bool select(const char* isa) {
  for (const Kernels* k : {kernels_baseline(), kernels_avx2(), kernels_avx512()})
    if (runs_here(k) && !std::strcmp(k->isa, isa)) {
      chosen.store(k, std::memory_order_relaxed);
      return true;
    }
  return false;
}

}  // namespace rk::cpu
