// Launches the hash kernel.
#include "kernels/cuda/hash.cuh"
#include "kernels/cuda/kernel_table.cuh"
#include "kernels/cuda/kernels.h"

namespace rk::cuda {
namespace {

HashArguments arguments(const HashParams& p, const HashPlan& plan) {
  HashArguments a{};
  a.x = p.x.data;
  a.stride_b = p.x.stride_b, a.stride_h = p.x.stride_h, a.stride_l = p.x.stride_l;
  a.rotations = static_cast<const float*>(p.rotations);
  a.rotations_stride_b = p.rotations_stride_b, a.rotations_stride_h = p.rotations_stride_h;
  a.padding = p.padding;
  a.buckets = p.buckets;
  a.L = p.L;
  a.H = static_cast<int>(p.H), a.R = static_cast<int>(p.R), a.D = static_cast<int>(p.D);
  a.n_factors = static_cast<int>(p.n_factors);
  a.padding_bucket = 1;
  for (int f = 0; f < a.n_factors; ++f) {
    a.halves[f] = static_cast<int>(p.factors[f] / 2);
    a.padding_bucket *= static_cast<int>(p.factors[f]);
    a.columns += p.R * a.halves[f];
  }
  a.round_tiles = plan.round_tiles, a.rounds_per_block = plan.rounds, a.resident_tiles = plan.resident_tiles;
  a.blocks_per_head = plan.blocks_per_head, a.tokens_per_block = plan.tokens_per_block;
  const int64_t bytes = p.element == Element::kSame ? 4 : 2;
  const auto aligned = [&](int64_t stride) { return stride * bytes % 16 == 0; };
  a.aligned = reinterpret_cast<uintptr_t>(p.x.data) % 16 == 0 && aligned(p.x.stride_b) && aligned(p.x.stride_h) &&
              aligned(p.x.stride_l) && aligned(p.D);
  return a;
}

}  // namespace

int hash_buckets(const HashParams& p, const Device& device, void* stream) {
  if (p.B * p.H * p.L * p.R == 0) return cudaSuccess;
  const HashPlan plan = plan_hash(p, device);
  const HashArguments a = arguments(p, plan);
  const auto instance = []<class T, int K_STEPS>(Instance<T, K_STEPS>) { return &hash_kernel<T, K_STEPS>; };
  return launch(kernel_for<void(HashArguments)>(p.element, plan.k_steps, instance), plan.launch, a, stream);
}

}  // namespace rk::cuda
