// Launches the kernels of chunk attention, round by round.
#include "kernels/cuda/attention_backward.cuh"
#include "kernels/cuda/attention_forward.cuh"
#include "kernels/cuda/kernel_table.cuh"
#include "kernels/cuda/kernels.h"

namespace rk::cuda {
namespace {

AttentionArguments arguments(const AttentionParams& p, const AttentionPlan& plan, void* memory, bool backward) {
  AttentionArguments a{};
  const AttentionScratch scratch = plan_attention_scratch(p, backward);
  const auto at = [&](int64_t bytes) { return static_cast<char*>(memory) + bytes; };
  if (scratch.has_windows) {
    a.windows = reinterpret_cast<int4*>(at(scratch.windows)),
    a.slot_of_position = reinterpret_cast<int32_t*>(at(scratch.slot_of_position));
  }
  if (backward) a.residuals = reinterpret_cast<QueryResidual*>(at(scratch.residuals));
  a.query = p.query, a.key = p.shared_qk() ? p.query : p.key, a.value = p.value, a.out = p.out;
  a.order = p.order, a.buckets = p.buckets, a.padding = p.padding, a.cu_seqlens = p.cu_seqlens;
  a.lse = static_cast<float*>(p.lse), a.self_only = p.self_only;
  a.dropout_seed = p.dropout_seed;
  a.heads = p.B * p.H, a.n_sequences = p.n_sequences, a.bounds_stride = p.bounds_stride, a.element = p.element;
  a.L = static_cast<int>(p.L), a.S = static_cast<int>(p.S), a.n_queries = static_cast<int>(p.n_queries),
  a.R = static_cast<int>(p.R);
  a.H = static_cast<int>(p.H), a.group = static_cast<int>(p.group());
  a.D = static_cast<int>(p.D), a.E = static_cast<int>(p.E);
  a.chunk_length = static_cast<int>(p.chunk_length);
  a.before = static_cast<int>(p.chunks_before), a.after = static_cast<int>(p.chunks_after);
  a.tiles_per_block = plan.tiles_per_block, a.blocks_per_sequence = plan.blocks_per_sequence;
  a.tile_chunk = plan.tile_chunk, a.stages = plan.stages;
  a.scale = static_cast<float>(p.scale);
  a.dropout = p.dropout(), a.keep_factor = static_cast<float>(p.keep_factor), a.drop_threshold = p.drop_threshold;
  a.flags = static_cast<uint32_t>(p.flags), a.shared_qk = p.shared_qk(), a.diagonal_first = plan.diagonal_first;
  if (p.lists()) {
    a.lists = p.key_indices, a.list_length = static_cast<int>(p.list_length),
    a.n_context = static_cast<int>(p.context_keys);
    a.list_stride = static_cast<int>(list_stride(p));
  }
  const int64_t bytes = p.element == Element::kSame ? 4 : 2;
  a.aligned_rows = is_aligned(a.query, p.D, bytes) && is_aligned(a.key, p.D, bytes) && is_aligned(a.value, p.E, bytes);
  a.aligned_out = is_aligned(a.out, p.E, bytes);
  return a;
}

AttentionArguments backward_arguments(const AttentionParams& p, const AttentionPlan& plan, void* scratch) {
  AttentionArguments a = arguments(p, plan, scratch, true);
  a.grad_out = p.grad_out;
  a.grad_query = p.grad_query, a.grad_key = p.grad_key, a.grad_value = p.grad_value;
  const int64_t bytes = p.element == Element::kSame ? 4 : 2;
  a.aligned_rows = a.aligned_rows && is_aligned(a.grad_out, p.E, bytes);
  a.aligned_out = is_aligned(a.grad_query, p.D, bytes) && is_aligned(a.grad_value, p.E, bytes) &&
                  (p.shared_qk() || is_aligned(a.grad_key, p.D, bytes));
  return a;
}

using Kernel = void(AttentionArguments);

Kernel* kernel_of(AttentionPart part, Element element, int k_steps) {
  return kernel_for<Kernel>(element, k_steps, [&]<class T, int K_STEPS>(Instance<T, K_STEPS>) -> Kernel* {
    if constexpr (sizeof(T) == 4 && K_STEPS < kAttentionFloatSteps)
      return nullptr;
    else
      return part == AttentionPart::kForward     ? attention_forward_kernel<T, K_STEPS>
             : part == AttentionPart::kGradQuery ? attention_grad_query_kernel<T, K_STEPS>
                                                 : attention_grad_keys_kernel<T, K_STEPS>;
  });
}

// A token stands once in each round, so a round may add to what the last one wrote.
int launch_rounds(AttentionPart part, AttentionArguments a, const AttentionPlan& plan, void* stream) {
  Kernel* kernel = kernel_of(part, a.element, plan.k_steps);
  for (int round = 0; round < plan.rounds; ++round) {
    a.round = round;
    if (const int error = launch(kernel, plan.launch, a, stream)) return error;
  }
  return cudaSuccess;
}

Launch one_dimension(int64_t items, int items_per_block) {
  return {{static_cast<uint32_t>(ceil_div(items, items_per_block)), 1, 1}, kAttentionThreads, 0};
}

int find_windows(const AttentionParams& p, const AttentionArguments& a, void* stream) {
  if (!a.windows) return cudaSuccess;
  return launch(attention_windows_kernel, one_dimension(a.heads * p.R * p.L, kAttentionThreads), a, stream);
}

}  // namespace

int attention_forward(const AttentionParams& p, int64_t longest, const Device& device, void* scratch, void* stream) {
  if (p.B * p.H * longest == 0) return cudaSuccess;
  const AttentionPlan plan = plan_attention(p, AttentionPart::kForward, longest, device);
  const AttentionArguments a = arguments(p, plan, scratch, false);
  if (const int error = find_windows(p, a, stream)) return error;
  return launch_rounds(AttentionPart::kForward, a, plan, stream);
}

int attention_backward(const AttentionParams& p, int64_t longest, const Device& device, void* scratch, void* stream) {
  if (p.B * p.H * longest == 0) return cudaSuccess;
  AttentionPlan plan = plan_attention(p, AttentionPart::kGradQuery, longest, device);
  const AttentionArguments a = backward_arguments(p, plan, scratch);
  if (const int error = find_windows(p, a, stream)) return error;
  if (const int64_t queries = p.B * p.H * p.n_queries) {
    int error = launch(attention_residual_kernel, one_dimension(queries, kAttentionThreads / kWarp), a, stream);
    if (!error) error = launch_rounds(AttentionPart::kGradQuery, a, plan, stream);
    if (error) return error;
  }
  plan = plan_attention(p, AttentionPart::kGradKeys, longest, device);
  return launch_rounds(AttentionPart::kGradKeys, backward_arguments(p, plan, scratch), plan, stream);
}

}  // namespace rk::cuda
