// Launches the kernels of the counting sort.
#include <algorithm>
#include <utility>

#include "kernels/cuda/kernels.h"
#include "kernels/cuda/order.cuh"

namespace rk::cuda {

int bucket_order(const OrderParams& p, const Device& device, int32_t* scratch_order, int32_t* counts, void* stream) {
  if (p.rows * p.rounds * p.L == 0) return cudaSuccess;
  const OrderPlan plan = plan_order(p, device);
  OrderArguments a{};
  a.buckets = p.buckets, a.counts = counts, a.cu_seqlens = p.cu_seqlens;
  a.L = p.L, a.heads = p.heads, a.rounds = p.rounds;
  a.n_sequences = p.n_sequences, a.bounds_stride = p.bounds_stride;
  a.base = plan.base, a.pairs = order_pairs(plan.base), a.tile = plan.tile, a.tiles = plan.tiles,
  a.sorters = plan.sorters;
  // The passes write to the scratch memory and the result in turn, and to the result last.
  int32_t* to = plan.passes % 2 ? p.order : scratch_order;
  int32_t* other = plan.passes % 2 ? scratch_order : p.order;
  a.last = static_cast<uint32_t>(std::min<int64_t>(p.n_buckets, INT32_MAX) - 1);
  a.divisor = 1;
  for (int pass = 0; pass < plan.passes; ++pass, a.divisor *= plan.base) {
    a.order = to;
    int error = cudaSuccess;
    if (plan.tiles == 1) {
      error = launch(order_kernel<OrderPart::kAll>, plan.launch, a, stream);
    } else {
      const Launch per_segment{{static_cast<uint32_t>(plan.segments), 1, 1}, kOrderMaxThreads, 0};
      error = launch(order_kernel<OrderPart::kCount>, plan.launch, a, stream);
      if (!error) error = launch(order_counts_kernel, per_segment, a, stream);
      if (!error) error = launch(order_kernel<OrderPart::kRank>, plan.launch, a, stream);
    }
    if (error) return error;
    a.input_order = to;
    std::swap(to, other);
  }
  return cudaSuccess;
}

}  // namespace rk::cuda
