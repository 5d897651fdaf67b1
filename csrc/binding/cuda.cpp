// The CUDA kernels as torch ops, on torch's stable ABI. Outputs are allocated by the caller.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <vector>

#include "binding/attention.h"
#include "binding/hashing.h"
#include "build_facts.h"  // by setup.py
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/plan.h"

namespace {

using namespace rk::binding;

constexpr int64_t kVectorBytes = 16;

void check(const char* name, int error) {
  require(error == 0, name, ": the launch failed: ", rk::cuda::error_string(error));
}

// Calls f(device, stream) with the tensor's device as the current one.
template <class F>
void on_device_of(const char* name, const Tensor& tensor, F&& f) {
  const int index = tensor.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  rk::cuda::Device device;
  check(name, rk::cuda::current_device(device));
  check(name, f(device, stream));
}

void hash_buckets(const HashInputs& in) {
  const rk::HashParams p = hash_params(in);
  require(p.D <= rk::cuda::kHashMaxDim && p.n_factors <= rk::cuda::kHashMaxFactors, "hash_buckets: at most ",
          rk::cuda::kHashMaxDim, " dimensions and ", rk::cuda::kHashMaxFactors, " factors, got ", p.D, " and ",
          p.n_factors);
  on_device_of("hash_buckets", in.x,
               [&](const rk::cuda::Device& device, void* stream) { return rk::cuda::hash_buckets(p, device, stream); });
}

// Tokens of the longest sequence, at most, as the caller has seen: the bounds are on the GPU.
struct Longest {
  Arguments& next;
  int64_t longest = next.integer("longest");
};

int64_t checked(const Longest& given, int64_t L) {
  require(given.longest >= 0 && given.longest <= L, "longest must be between 0 and ", L, ", got ", given.longest);
  return given.longest;
}

void bucket_order(const OrderInputs& in, const Longest& longest) {
  rk::OrderParams p = order_params(in);
  p.longest = checked(longest, p.L);
  on_device_of("bucket_order", in.buckets, [&](const rk::cuda::Device& device, void* stream) {
    const rk::cuda::OrderPlan plan = rk::cuda::plan_order(p, device);
    const int64_t sizes[] = {plan.passes > 1 ? in.order.numel() : 0, plan.counts()};
    // Freed when this returns, and used again in the order of the stream.
    Tensor scratch[] = {torch::stable::new_empty(in.buckets, {sizes[0]}),
                        torch::stable::new_empty(in.buckets, {sizes[1]})};
    return rk::cuda::bucket_order(p, device, scratch[0].mutable_data_ptr<int32_t>(),
                                  scratch[1].mutable_data_ptr<int32_t>(), stream);
  });
}

void check_rows(const char* name, const Attention& a) {
  require(a.type == ScalarType::Float, name, ": rows must be float32, bfloat16 or float16");
  require(std::max(a.p.D, a.p.E) <= rk::cuda::kAttentionMaxDim, name, ": rows of at most ", rk::cuda::kAttentionMaxDim,
          " elements, got ", a.p.D, " and ", a.p.E);
}

Attention chunk_attention(const char* name, const AttentionInputs& in) {
  const Attention a = attention(in);
  const rk::AttentionParams& p = a.p;
  check_rows(name, a);
  require(p.R * (p.chunks_before + 1 + p.chunks_after) <= rk::cuda::kAttentionMaxChunks, name, ": windows of all ", p.R,
          " rounds must have at most ", rk::cuda::kAttentionMaxChunks, " chunks");
  return a;
}

// Scratch memory: freed when the op returns, and used again in the order of the stream.
Tensor bytes_like(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

void chunk_attention_forward(const AttentionInputs& in, const Longest& longest, const AttentionResults<true>& results) {
  constexpr char kName[] = "chunk_attention_forward";
  Attention a = chunk_attention(kName, in);
  set_results(a, results);
  const int64_t most = checked(longest, a.p.L);
  on_device_of(kName, in.query, [&](const rk::cuda::Device& device, void* stream) {
    const Tensor scratch = bytes_like(in.query, rk::cuda::plan_attention_scratch(a.p, false).bytes);
    return rk::cuda::attention_forward(a.p, most, device, scratch.mutable_data_ptr(), stream);
  });
}

void chunk_attention_backward(const AttentionInputs& in, const Longest& longest,
                              const AttentionResults<false>& residuals, const Gradients& grads) {
  constexpr char kName[] = "chunk_attention_backward";
  Attention a = chunk_attention(kName, in);
  set_results(a, residuals);
  set_gradients(a, grads);
  const int64_t most = checked(longest, a.p.L);
  on_device_of(kName, in.query, [&](const rk::cuda::Device& device, void* stream) {
    const Tensor scratch = bytes_like(in.query, rk::cuda::plan_attention_scratch(a.p, true).bytes);
    return rk::cuda::attention_backward(a.p, most, device, scratch.mutable_data_ptr(), stream);
  });
}

template <bool kWritten>
Attention list_attention(const char* name, const ListInputs& in, const ListResults<kWritten>& results) {
  const Attention a = with_lists(in, results);
  check_rows(name, a);
  require(rk::cuda::list_entries(a.p) < INT32_MAX, name, ": lists must have fewer than 2**31 entries a head, got ",
          rk::cuda::list_entries(a.p));
  return a;
}

// Float rows [B, heads, n, width].
const float* float_rows(const char* name, const OptionalTensor& t, int64_t B, int64_t heads, int64_t n, int64_t width) {
  return contiguous<float>(name, t, ScalarType::Float, {B, heads, n, width});
}

// Of the keys behind the rest key; none without it.
struct RestSums {
  Arguments& next;
  OptionalTensor key_sums = next.optional_tensor("key_sums");      // [B, Hk, n, D]
  OptionalTensor value_sums = next.optional_tensor("value_sums");  // [B, Hk, n, E]
  OptionalTensor counts = next.optional_tensor("counts");          // [B, n]
};

rk::cuda::RestParams rest_params(const char* name, const rk::AttentionParams& p, const RestSums& sums) {
  rk::cuda::RestParams rest{};
  if (!p.has(rk::kRestKey)) return rest;
  const OptionalTensor& counts = sums.counts;
  require(sums.key_sums && sums.value_sums && counts && counts->dim() == 2 && counts->size(1) >= 1, name,
          ": the rest key needs sums of keys and values, and their counts");
  rest.sum_rows = counts->size(1);
  rest.key_sums = float_rows("key_sums", sums.key_sums, p.B, p.key_heads, rest.sum_rows, p.D);
  rest.value_sums = float_rows("value_sums", sums.value_sums, p.B, p.key_heads, rest.sum_rows, p.E);
  rest.counts = contiguous<int32_t>("counts", counts, ScalarType::Int, {p.B, rest.sum_rows});
  return rest;
}

void list_attention_forward(const ListInputs& in, const RestSums& sums, const ListResults<true>& results) {
  constexpr char kName[] = "list_attention_forward";
  const Attention a = list_attention(kName, in, results);
  const rk::cuda::RestParams rest = rest_params(kName, a.p, sums);
  on_device_of(kName, in.query, [&](const rk::cuda::Device& device, void* stream) {
    return rk::cuda::list_attention_forward(a.p, rest, device, stream);
  });
}

struct RestGradients {
  Arguments& next;
  Tensor grad_out = next.tensor("grad_out");
  Tensor grad_query = next.tensor("grad_query", true);
  Tensor query_terms = next.tensor("query_terms", true);
  Tensor value_terms = next.tensor("value_terms", true);
};

void list_rest_backward(const ListInputs& in, const RestSums& sums, const ListResults<false>& residuals,
                        const RestGradients& grads) {
  constexpr char kName[] = "list_rest_backward";
  Attention a = list_attention(kName, in, residuals);
  rk::AttentionParams& p = a.p;
  rk::cuda::RestParams rest = rest_params(kName, p, sums);
  p.grad_out = rows("grad_out", grads.grad_out, a.rows_type, p.B, p.H, p.L, p.E);
  p.grad_query = rows("grad_query", grads.grad_query, a.rows_type, p.B, p.H, p.L, p.D);
  rest.query_terms = const_cast<float*>(float_rows("query_terms", grads.query_terms, p.B, p.H, p.L, p.D));
  rest.value_terms = const_cast<float*>(float_rows("value_terms", grads.value_terms, p.B, p.H, p.L, p.E));
  on_device_of(kName, in.query,
               [&](const rk::cuda::Device&, void* stream) { return rk::cuda::list_rest_backward(p, rest, stream); });
}

// What each key, or all, gets from the rest key; none without it.
struct KeyGradients {
  Arguments& next;
  OptionalTensor key_grads = next.optional_tensor("key_grads");      // [B, Hk, n, D]
  OptionalTensor value_grads = next.optional_tensor("value_grads");  // [B, Hk, n, E]
};

void list_attention_backward(const ListInputs& in, const ListResults<false>& residuals, const KeyGradients& of_rest,
                             const Gradients& grads) {
  constexpr char kName[] = "list_attention_backward";
  Attention a = list_attention(kName, in, residuals);
  const rk::AttentionParams& p = a.p;
  set_gradients(a, grads);
  rk::cuda::RestParams rest{};
  if (p.has(rk::kRestKey)) {
    const OptionalTensor& key_grads = of_rest.key_grads;
    require(key_grads && of_rest.value_grads && key_grads->dim() == 4 && key_grads->size(2) >= 1, kName,
            ": the rest key needs the gradients of its keys and values");
    rest.grad_rows = key_grads->size(2);
    rest.key_grads = float_rows("key_grads", key_grads, p.B, p.key_heads, rest.grad_rows, p.D);
    rest.value_grads = float_rows("value_grads", of_rest.value_grads, p.B, p.key_heads, rest.grad_rows, p.E);
  }
  on_device_of(kName, in.query, [&](const rk::cuda::Device& device, void* stream) {
    const Tensor scratch = bytes_like(in.query, rk::cuda::plan_list_scratch(p, device).bytes);
    return rk::cuda::list_attention_backward(p, rest, device, scratch.mutable_data_ptr(), stream);
  });
}

void select_keys(const SelectInputs& in) {
  constexpr char kName[] = "select_keys";
  const Selection s = selection(in);
  check_rows(kName, s.a);
  on_device_of(kName, in.query, [&](const rk::cuda::Device&, void* stream) {
    const Tensor scratch = bytes_like(in.query, rk::cuda::plan_select(s.p).bytes);
    return rk::cuda::select_keys(s.p, scratch.mutable_data_ptr(), stream);
  });
}

rk::cuda::Device device_of(const std::vector<int64_t>& device) {
  require(device.size() == 3, "device must have 3 numbers, got ", device.size());
  return {static_cast<int>(device[0]), static_cast<int>(device[1]), static_cast<int>(device[2])};
}

void check_shape(const std::vector<int64_t>& shape) {
  require(shape.size() == 4, "shape must have 4 numbers, got ", shape.size());
}

rk::Element element_of_size(int64_t bytes) { return bytes == 2 ? rk::Element::kBFloat16 : rk::Element::kSame; }

struct HashProblem {
  Arguments& next;
  std::vector<int64_t> shape = next.integers("shape");  // of x [B, H, L, D]
  int64_t rounds = next.integer("rounds");
  int64_t element_size = next.integer("element_size");
  std::vector<int64_t> factors = next.integers("factors");
  // Multiprocessors, bytes of shared memory of a block and of a multiprocessor.
  std::vector<int64_t> device = next.integers("device");
};

// What plan_hash chooses: grid, threads, shared bytes, steps, column tiles of a round, rounds of a block, resident
// tiles, tokens of a block.
std::vector<int64_t> hash_plan(const HashProblem& of) {
  check_shape(of.shape);
  rk::HashParams p{};
  p.B = of.shape[0], p.H = of.shape[1], p.L = of.shape[2], p.D = of.shape[3], p.R = of.rounds;
  p.element = element_of_size(of.element_size);
  p.n_factors = static_cast<int64_t>(of.factors.size()), p.factors = of.factors.data();
  const rk::cuda::HashPlan plan = rk::cuda::plan_hash(p, device_of(of.device));
  return {plan.launch.grid[0], plan.launch.threads, plan.launch.shared_bytes, plan.k_steps,
          plan.round_tiles,    plan.rounds,         plan.resident_tiles,      plan.tokens_per_block};
}

struct OrderProblem {
  Arguments& next;
  std::vector<int64_t> shape = next.integers("shape");  // of buckets [B, H, R, L]
  int64_t n_sequences = next.integer("n_sequences");
  int64_t longest = next.integer("longest");
  int64_t n_buckets = next.integer("n_buckets");
  std::vector<int64_t> device = next.integers("device");  // as in HashProblem
};

// What plan_order chooses: grid, threads, shared bytes, passes, base of a digit, keys of a block, blocks of a sequence,
// warps that sort.
std::vector<int64_t> order_plan(const OrderProblem& of) {
  check_shape(of.shape);
  rk::OrderParams p{};
  p.rows = of.shape[0] * of.shape[1], p.rounds = of.shape[2], p.L = of.shape[3];
  p.n_buckets = of.n_buckets, p.n_sequences = of.n_sequences, p.longest = of.longest;
  const rk::cuda::OrderPlan plan = rk::cuda::plan_order(p, device_of(of.device));
  return {plan.launch.grid[0], plan.launch.threads, plan.launch.shared_bytes, plan.passes, plan.base, plan.tile,
          plan.tiles,          plan.sorters};
}

struct AttentionProblem {
  Arguments& next;
  std::vector<int64_t> shape = next.integers("shape");  // of the query [B, H, L, D]
  int64_t width = next.integer("width");                // of values
  int64_t key_heads = next.integer("key_heads");        // 0: shared keys
  int64_t rounds = next.integer("rounds");
  int64_t element_size = next.integer("element_size");
  std::vector<int64_t> window = next.integers("window");  // chunk length, chunks before, chunks after
  int64_t list_length = next.integer("list_length");      // 0: windows
  int64_t flags = next.integer("flags");
  int64_t n_sequences = next.integer("n_sequences");
  int64_t longest = next.integer("longest");
  int64_t part = next.integer("part");  // 0 the forward pass, 1 and 2 the gradients of queries and of keys
  std::vector<int64_t> device = next.integers("device");  // as in HashProblem
};

// What plan_attention chooses: grid, threads, shared bytes, head steps, stages, whether an owned tile is
// visited, tiles of a block, launches.
std::vector<int64_t> attention_plan(const AttentionProblem& of) {
  check_shape(of.shape);
  require(of.window.size() == 3 && of.window[0] >= 1, "window must have 3 numbers, the first a chunk length");
  require(of.part >= 0 && of.part <= 2, "part must be between 0 and 2, got ", of.part);
  rk::AttentionParams p{};
  p.B = of.shape[0], p.H = of.shape[1], p.L = of.shape[2], p.D = of.shape[3], p.E = of.width;
  p.R = of.rounds, p.n_sequences = of.n_sequences;
  p.key_heads = of.key_heads ? of.key_heads : p.H, p.key.data = of.key_heads ? const_cast<char*>(&kNoRows) : nullptr;
  p.element = element_of_size(of.element_size);
  p.chunk_length = std::min(of.window[0], std::max<int64_t>(1, p.L));
  p.chunks_before = of.window[1], p.chunks_after = of.window[2], p.list_length = of.list_length, p.flags = of.flags;
  const rk::cuda::AttentionPlan plan =
      rk::cuda::plan_attention(p, static_cast<rk::cuda::AttentionPart>(of.part), of.longest, device_of(of.device));
  return {plan.launch.grid[0], plan.launch.threads, plan.launch.shared_bytes, plan.k_steps,
          plan.stages,         plan.diagonal_first, plan.tiles_per_block,     plan.rounds};
}

struct SelectProblem {
  Arguments& next;
  std::vector<int64_t> shape = next.integers("shape");  // of the query [B, H, L, D]
  int64_t keys = next.integer("keys");
  int64_t key_heads = next.integer("key_heads");
  int64_t context_keys = next.integer("context_keys");
  int64_t element_size = next.integer("element_size");
  int64_t chunk_length = next.integer("chunk_length");
  int64_t budget = next.integer("budget");
};

// What plan_select chooses: head steps, blocks of keys and how many of them a chunk chooses; then, for the pass over
// blocks and for that over keys, CTAs, CTAs of a launch, candidates and shared bytes; and scratch bytes in all.
std::vector<int64_t> select_plan(const SelectProblem& of) {
  check_shape(of.shape);
  require(of.chunk_length >= 1, "chunk_length must be positive, got ", of.chunk_length);
  rk::SelectParams select{};
  rk::AttentionParams& p = select.attention;
  p.B = of.shape[0], p.H = of.shape[1], p.L = of.shape[2], p.D = of.shape[3], p.S = of.keys, p.key_heads = of.key_heads;
  p.context_keys = of.context_keys, select.budget = of.budget;
  p.element = element_of_size(of.element_size);
  p.chunk_length = of.chunk_length;
  const rk::cuda::SelectPlan plan = rk::cuda::plan_select(select);
  std::vector<int64_t> numbers{plan.k_steps, plan.blocks, plan.chosen};
  for (const rk::cuda::SelectPass& pass : {plan.of_blocks, plan.of_keys})
    for (const int64_t x : {pass.ctas, pass.slice, pass.candidates, int64_t{pass.shared_bytes}}) numbers.push_back(x);
  numbers.push_back(plan.bytes);
  return numbers;
}

bool is_aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kVectorBytes == 0;
}

struct GatherInputs {
  Arguments& next;
  Tensor input = next.tensor("input");    // [N, n]
  Tensor index = next.tensor("index");    // int32 [M]
  Tensor out = next.tensor("out", true);  // [M, n]
};

// out[i] = input[index[i]]; an index outside the input gives a row of zeros.
void gather_rows(const GatherInputs& in) {
  const Tensor &input = in.input, &index = in.index, &out = in.out;
  require(input.dim() == 2 && input.is_contiguous() && is_aligned(input), "gather_rows: input has ", input.dim(),
          " dimensions; it must have 2, be contiguous and aligned to 16 bytes");
  require(out.dim() == 2 && out.is_contiguous() && is_aligned(out), "gather_rows: out has ", out.dim(),
          " dimensions; it must have 2, be contiguous and aligned to 16 bytes");
  require(index.dim() == 1 && index.is_contiguous() && index.scalar_type() == ScalarType::Int,
          "gather_rows: index has ", index.dim(), " dimensions and scalar type ", int(index.scalar_type()),
          "; it must be contiguous int32 (", int(ScalarType::Int), ") of 1 dimension");
  require(out.scalar_type() == input.scalar_type(), "gather_rows: out has scalar type ", int(out.scalar_type()),
          "; it must have input's, ", int(input.scalar_type()));
  require(out.size(0) == index.size(0) && out.size(1) == input.size(1), "gather_rows: out has shape [", out.size(0),
          ", ", out.size(1), "]; it must be [", index.size(0), ", ", input.size(1), "]");
  const int64_t row_bytes = input.size(1) * static_cast<int64_t>(input.element_size());
  require(row_bytes % kVectorBytes == 0, "gather_rows: input has rows of ", row_bytes,
          " bytes; they must be a multiple of ", kVectorBytes);
  on_device_of("gather_rows", input, [&](const rk::cuda::Device&, void* stream) {
    return rk::cuda::gather_rows({.input = input.const_data_ptr(),
                                  .index = index.const_data_ptr<int32_t>(),
                                  .out = out.mutable_data_ptr(),
                                  .input_rows = input.size(0),
                                  .rows = index.size(0),
                                  .vectors = row_bytes / kVectorBytes},
                                 stream);
  });
}

std::string build_info() {
  return "{\"torch\": \"" RK_BUILD_TORCH "\", \"cuda\": \"" RK_BUILD_CUDA
         "\", \"architectures\": \"" RK_CUDA_ARCHITECTURES "\"}";
}

const Op kOps[] = {
    op<hash_buckets>("hash_buckets"),
    op<bucket_order>("bucket_order"),
    op<chunk_attention_forward>("chunk_attention_forward"),
    op<chunk_attention_backward>("chunk_attention_backward"),
    op<select_keys>("select_keys"),
    op<list_attention_forward>("list_attention_forward"),
    op<list_rest_backward>("list_rest_backward"),
    op<list_attention_backward>("list_attention_backward"),
    op<gather_rows>("gather_rows"),
};

// Without a tensor argument there is no device to dispatch on.
const Op kFacts[] = {
    op<hash_plan>("hash_plan"),     op<order_plan>("order_plan"), op<attention_plan>("attention_plan"),
    op<select_plan>("select_plan"), op<build_info>("build_info"),
};

}  // namespace

STABLE_TORCH_LIBRARY(reformer_kernels_cuda, m) { define(m, kOps), define(m, kFacts); }
STABLE_TORCH_LIBRARY_IMPL(reformer_kernels_cuda, CUDA, m) { implement(m, kOps); }
STABLE_TORCH_LIBRARY_IMPL(reformer_kernels_cuda, CompositeExplicitAutograd, m) { implement(m, kFacts); }
