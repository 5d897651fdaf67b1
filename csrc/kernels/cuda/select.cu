// Launches the kernels that choose the keys of chunks: first means, then for each slice of chunks weights and choice.
// The last two are done for blocks of keys, if there are many keys, and for keys.
#include "kernels/cuda/kernel_table.cuh"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/select_take.cuh"

namespace rk::cuda {
namespace {

using Kernel = void(SelectArguments);

template <class T>
Kernel* weigh_kernel(bool chosen, int k_steps) {
  return kernel_for_steps<Kernel, T>(k_steps, [&]<int K_STEPS>(Instance<T, K_STEPS>) -> Kernel* {
    if constexpr (K_STEPS < kSelectLeastSteps)
      return nullptr;
    else
      return chosen ? select_weigh_kernel<T, K_STEPS, true> : select_weigh_kernel<T, K_STEPS, false>;
  });
}

// The kernels for the type of rows.
struct Kernels {
  Kernel *means, *blocks, *weigh;
};

template <class T>
Kernels kernels_of(const SelectPlan& plan) {
  return {select_means_kernel<T>, select_blocks_kernel<T>, weigh_kernel<T>(plan.blocks > 0, plan.k_steps)};
}

Kernels kernels_of(Element element, const SelectPlan& plan) {
  return element == Element::kBFloat16  ? kernels_of<bf16>(plan)
         : element == Element::kFloat16 ? kernels_of<fp16>(plan)
                                        : kernels_of<float>(plan);
}

int launch_blocks(Kernel* kernel, const SelectArguments& a, int64_t blocks, int shared_bytes, void* stream) {
  const Launch shape{{static_cast<uint32_t>(blocks), 1, 1}, kAttentionThreads, shared_bytes};
  return blocks > 0 ? launch(kernel, shape, a, stream) : cudaSuccess;
}

int launch_warps(Kernel* kernel, const SelectArguments& a, int64_t warps, void* stream) {
  return launch_blocks(kernel, a, ceil_div(warps, kAttentionThreads / kWarp), 0, stream);
}

// Weighs the candidates, if there are any, and takes the best ones. It does so for all chunks, a slice at a time.
int run_pass(Kernel* weigh, SelectArguments a, const SelectPass& pass, void* stream) {
  a.stride = pass.candidates, a.chunks_per_cta = pass.chunks;
  int error = cudaSuccess;
  for (a.first_cta = 0; !error && a.first_cta < pass.ctas; a.first_cta += pass.slice) {
    const int64_t ctas = std::min(pass.slice, pass.ctas - a.first_cta);
    if (pass.candidates > 0) error = launch_blocks(weigh, a, ctas, pass.shared_bytes, stream);
    if (!error) error = launch_blocks(select_take_kernel, a, ctas * pass.chunks, 0, stream);
  }
  return error;
}

}  // namespace

int select_keys(const SelectParams& select, void* memory, void* stream) {
  const AttentionParams& p = select.attention;
  const SelectPlan plan = plan_select(select);
  const auto at = [&](int64_t bytes) { return static_cast<char*>(memory) + bytes; };
  const auto numbers = [&](int64_t bytes) { return reinterpret_cast<int32_t*>(at(bytes)); };
  SelectArguments a{};
  a.query = p.query, a.key = p.key, a.order = p.order;
  a.query_padding = select.query_padding, a.padding = p.padding, a.windows = select.windows;
  a.members = numbers(plan.members), a.facts = reinterpret_cast<SelectFacts*>(at(plan.facts));
  a.means = reinterpret_cast<float*>(at(plan.means));
  a.block_means = reinterpret_cast<float*>(at(plan.block_means)), a.block_sizes = numbers(plan.block_sizes);
  a.heads = p.B * p.H, a.L = static_cast<int>(p.L), a.S = static_cast<int>(p.S), a.R = static_cast<int>(p.R);
  a.H = static_cast<int>(p.H), a.group = static_cast<int>(p.group()), a.D = static_cast<int>(p.D);
  a.chunk_length = static_cast<int>(p.chunk_length), a.chunks = static_cast<int>(plan.chunks);
  a.subgroup = static_cast<int>(plan.subgroup), a.keys = static_cast<int>(plan.keys);
  a.blocks = static_cast<int>(plan.blocks), a.width = static_cast<int>(plan.width);
  a.scale = static_cast<float>(p.scale), a.causal = p.has(kCausal);

  const Kernels kernels = kernels_of(p.element, plan);
  int error = launch_warps(kernels.means, a, a.heads * plan.chunks, stream);
  if (!error) error = launch_warps(kernels.blocks, a, p.B * p.key_heads * plan.blocks, stream);
  a.totals = reinterpret_cast<float*>(at(plan.totals));
  if (!error && plan.blocks) {
    SelectArguments of_blocks = a;
    const int64_t row = plan.width, head = plan.blocks * row;
    of_blocks.candidates = {a.block_means, p.key_heads * head, head, row}, of_blocks.row_width = a.width;
    of_blocks.n = a.blocks, of_blocks.keys_per_candidate = kSelectBlock, of_blocks.sizes = a.block_sizes,
    of_blocks.aligned = true;
    of_blocks.wanted = static_cast<int>(plan.chosen);
    of_blocks.lists = numbers(plan.chosen_blocks), of_blocks.list_rows = plan.chunks;
    of_blocks.list_length = static_cast<int>(plan.chosen);
    error = run_pass(weigh_kernel<float>(false, plan.k_steps), of_blocks, plan.of_blocks, stream);
    a.chosen = numbers(plan.chosen_blocks), a.n_chosen = static_cast<int>(plan.chosen);
  }
  a.candidates = p.key, a.row_width = a.D, a.n = a.keys, a.keys_per_candidate = 1, a.wanted = -1;
  a.aligned = is_aligned(p.key, p.D, p.element == Element::kSame ? 4 : 2);
  a.lists = select.lists, a.list_rows = p.R * plan.chunks, a.list_length = static_cast<int>(p.list_length);
  const int context = static_cast<int>(p.context_keys);
  if (p.R == 1) {
    a.n_context = context, a.with_window = true;
    return error ? error : run_pass(kernels.weigh, a, plan.of_keys, stream);
  }
  if (!error) {
    SelectArguments of_first = a;
    of_first.n_context = context, of_first.with_window = true, of_first.n = 0, of_first.chosen = nullptr;
    of_first.wanted = 0;
    SelectPass pass;
    pass.chunks = 1, pass.ctas = pass.slice = a.heads * plan.chunks;
    error = run_pass(nullptr, of_first, pass, stream);
  }
  a.lists += plan.chunks * p.list_length;
  return error ? error : run_pass(kernels.weigh, a, plan.of_keys, stream);
}

}  // namespace rk::cuda
