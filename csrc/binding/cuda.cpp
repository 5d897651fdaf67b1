// The CUDA kernels as torch ops, on torch's stable ABI. Outputs are allocated by the caller.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <vector>

#include "binding/attention.h"
#include "build_facts.h"  // by setup.py
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/plan.h"

namespace {

using namespace rk::binding;

constexpr int64_t kVectorBytes = 16;

void check(const char* name, int error) {
  require(error == 0, name, ": the launch failed: ", rk::cuda::error_string(error));
}

void check_one_device(const char* name, std::initializer_list<const Tensor*> tensors) {
  const Tensor& first = **tensors.begin();
  for (const Tensor* t : tensors)
    require(!t || (t->is_cuda() && t->get_device_index() == first.get_device_index()), name,
            ": all tensors must be on one CUDA device");
}

const Tensor* pointer(const OptionalTensor& t) { return t ? &*t : nullptr; }

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

void hash_buckets(Tensor x, Tensor rotations, OptionalTensor padding, std::vector<int64_t> factors, Tensor buckets) {
  check_one_device("hash_buckets", {&x, &rotations, pointer(padding), &buckets});
  const rk::HashParams p = hash_params(x, rotations, padding, factors, buckets);
  require(p.D <= rk::cuda::kHashMaxDim && p.n_factors <= rk::cuda::kHashMaxFactors, "hash_buckets: at most ",
          rk::cuda::kHashMaxDim, " dimensions and ", rk::cuda::kHashMaxFactors, " factors, got ", p.D, " and ",
          p.n_factors);
  on_device_of("hash_buckets", x,
               [&](const rk::cuda::Device& device, void* stream) { return rk::cuda::hash_buckets(p, device, stream); });
}

// The longest sequence has up to `longest` of L tokens, as the caller has seen: the bounds are on the GPU.
void check_longest(int64_t longest, int64_t L) {
  require(longest >= 0 && longest <= L, "longest must be between 0 and ", L, ", got ", longest);
}

rk::OrderParams packed_order_params(const Tensor& buckets, const OptionalTensor& cu_seqlens, int64_t longest,
                                    int64_t n_buckets, const Tensor& order) {
  rk::OrderParams p = order_params(buckets, n_buckets, order);
  check_longest(longest, p.L);
  p.longest = longest;
  set_sequences(p, cu_seqlens, buckets.size(0));
  return p;
}

void bucket_order(Tensor buckets, OptionalTensor cu_seqlens, int64_t longest, int64_t n_buckets, Tensor order) {
  check_one_device("bucket_order", {&buckets, pointer(cu_seqlens), &order});
  const rk::OrderParams p = packed_order_params(buckets, cu_seqlens, longest, n_buckets, order);
  on_device_of("bucket_order", buckets, [&](const rk::cuda::Device& device, void* stream) {
    const rk::cuda::OrderPlan plan = rk::cuda::plan_order(p, device);
    const int64_t sizes[] = {plan.passes > 1 ? order.numel() : 0, plan.counts()};
    // Freed when this returns, and used again in the order of the stream.
    Tensor scratch[] = {torch::stable::new_empty(buckets, {sizes[0]}), torch::stable::new_empty(buckets, {sizes[1]})};
    return rk::cuda::bucket_order(p, device, scratch[0].mutable_data_ptr<int32_t>(),
                                  scratch[1].mutable_data_ptr<int32_t>(), stream);
  });
}

void check_rows(const char* name, const Attention& a) {
  require(a.type == ScalarType::Float, name, ": rows must be float32, bfloat16 or float16");
  require(std::max(a.p.D, a.p.E) <= rk::cuda::kAttentionMaxDim, name, ": rows of at most ", rk::cuda::kAttentionMaxDim,
          " elements, got ", a.p.D, " and ", a.p.E);
}

Attention chunk_attention(const char* name, RK_ATTENTION_PARAMETERS, int64_t longest,
                          std::initializer_list<const Tensor*> others) {
  check_one_device(name, {&query, pointer(key), &value, pointer(order), pointer(buckets), pointer(padding),
                          pointer(cu_seqlens), pointer(dropout_seed)});
  for (const Tensor* other : others) check_one_device(name, {&query, other});
  const Attention a = attention(RK_ATTENTION_ARGUMENTS);
  const rk::AttentionParams& p = a.p;
  check_rows(name, a);
  require(p.R * (p.chunks_before + 1 + p.chunks_after) <= rk::cuda::kAttentionMaxChunks, name, ": windows of all ", p.R,
          " rounds must have at most ", rk::cuda::kAttentionMaxChunks, " chunks");
  check_longest(longest, p.L);
  return a;
}

// Scratch memory: freed when the op returns, and used again in the order of the stream.
Tensor bytes_like(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

void chunk_attention_forward(RK_ATTENTION_PARAMETERS, int64_t longest, Tensor out, Tensor lse, Tensor self_only) {
  constexpr char kName[] = "chunk_attention_forward";
  Attention a = chunk_attention(kName, RK_ATTENTION_ARGUMENTS, longest, {&out, &lse, &self_only});
  set_residuals(a, out, lse, self_only);
  on_device_of(kName, query, [&](const rk::cuda::Device& device, void* stream) {
    const Tensor scratch = bytes_like(query, rk::cuda::plan_attention_scratch(a.p, false).bytes);
    return rk::cuda::attention_forward(a.p, longest, device, scratch.mutable_data_ptr(), stream);
  });
}

void chunk_attention_backward(RK_ATTENTION_PARAMETERS, int64_t longest, Tensor grad_out, Tensor out, Tensor lse,
                              Tensor self_only, Tensor grad_query, Tensor grad_key, Tensor grad_value) {
  constexpr char kName[] = "chunk_attention_backward";
  Attention a = chunk_attention(kName, RK_ATTENTION_ARGUMENTS, longest,
                                {&grad_out, &out, &lse, &self_only, &grad_query, &grad_key, &grad_value});
  set_residuals(a, out, lse, self_only);
  set_gradients(a, grad_out, grad_query, grad_key, grad_value);
  on_device_of(kName, query, [&](const rk::cuda::Device& device, void* stream) {
    const Tensor scratch = bytes_like(query, rk::cuda::plan_attention_scratch(a.p, true).bytes);
    return rk::cuda::attention_backward(a.p, longest, device, scratch.mutable_data_ptr(), stream);
  });
}

Attention list_attention(const char* name, RK_LIST_PARAMETERS, std::initializer_list<const Tensor*> others) {
  check_one_device(
      name, {&query, &key, &value, pointer(order), &key_indices, pointer(padding), pointer(dropout_seed), &out, &lse});
  for (const Tensor* other : others) check_one_device(name, {&query, other});
  const Attention a = with_lists(RK_LIST_ARGUMENTS);
  check_rows(name, a);
  require(rk::cuda::list_entries(a.p) < INT32_MAX, name, ": lists must have fewer than 2**31 places a head, got ",
          rk::cuda::list_entries(a.p));
  return a;
}

// Float rows [B, heads, n, width].
const float* float_rows(const char* name, const OptionalTensor& t, int64_t B, int64_t heads, int64_t n, int64_t width) {
  return contiguous<float>(name, t, ScalarType::Float, {B, heads, n, width});
}

rk::cuda::RestParams rest_params(const char* name, const rk::AttentionParams& p, const OptionalTensor& key_sums,
                                 const OptionalTensor& value_sums, const OptionalTensor& counts) {
  rk::cuda::RestParams rest{};
  if (!p.has(rk::kRestKey)) return rest;
  require(key_sums && value_sums && counts && counts->dim() == 2 && counts->size(1) >= 1, name,
          ": the rest term needs sums of keys and values, and their counts");
  rest.sum_rows = counts->size(1);
  rest.key_sums = float_rows("key_sums", key_sums, p.B, p.key_heads, rest.sum_rows, p.D);
  rest.value_sums = float_rows("value_sums", value_sums, p.B, p.key_heads, rest.sum_rows, p.E);
  rest.counts = contiguous<int32_t>("counts", counts, ScalarType::Int, {p.B, rest.sum_rows});
  return rest;
}

#define RK_REST_PARAMETERS OptionalTensor key_sums, OptionalTensor value_sums, OptionalTensor counts

void list_attention_forward(RK_LIST_PARAMETERS, RK_REST_PARAMETERS) {
  constexpr char kName[] = "list_attention_forward";
  const Attention a =
      list_attention(kName, RK_LIST_ARGUMENTS, {pointer(key_sums), pointer(value_sums), pointer(counts)});
  const rk::cuda::RestParams rest = rest_params(kName, a.p, key_sums, value_sums, counts);
  on_device_of(kName, query, [&](const rk::cuda::Device& device, void* stream) {
    return rk::cuda::list_attention_forward(a.p, rest, device, stream);
  });
}

void list_rest_backward(RK_LIST_PARAMETERS, RK_REST_PARAMETERS, Tensor grad_out, Tensor grad_query, Tensor query_terms,
                        Tensor value_terms) {
  constexpr char kName[] = "list_rest_backward";
  Attention a = list_attention(
      kName, RK_LIST_ARGUMENTS,
      {pointer(key_sums), pointer(value_sums), pointer(counts), &grad_out, &grad_query, &query_terms, &value_terms});
  rk::AttentionParams& p = a.p;
  rk::cuda::RestParams rest = rest_params(kName, p, key_sums, value_sums, counts);
  p.grad_out = rows("grad_out", grad_out, a.rows_type, p.B, p.H, p.L, p.E);
  p.grad_query = rows("grad_query", grad_query, a.rows_type, p.B, p.H, p.L, p.D);
  rest.query_terms = const_cast<float*>(float_rows("query_terms", query_terms, p.B, p.H, p.L, p.D));
  rest.value_terms = const_cast<float*>(float_rows("value_terms", value_terms, p.B, p.H, p.L, p.E));
  on_device_of(kName, query,
               [&](const rk::cuda::Device&, void* stream) { return rk::cuda::list_rest_backward(p, rest, stream); });
}

void list_attention_backward(RK_LIST_PARAMETERS, Tensor grad_out, OptionalTensor key_grads, OptionalTensor value_grads,
                             Tensor grad_query, Tensor grad_key, Tensor grad_value) {
  constexpr char kName[] = "list_attention_backward";
  Attention a =
      list_attention(kName, RK_LIST_ARGUMENTS,
                     {&grad_out, pointer(key_grads), pointer(value_grads), &grad_query, &grad_key, &grad_value});
  const rk::AttentionParams& p = a.p;
  set_gradients(a, grad_out, grad_query, grad_key, grad_value);
  rk::cuda::RestParams rest{};
  if (p.has(rk::kRestKey)) {
    require(key_grads && value_grads && key_grads->dim() == 4 && key_grads->size(2) >= 1, kName,
            ": the rest term needs the gradients of its keys and values");
    rest.grad_rows = key_grads->size(2);
    rest.key_grads = float_rows("key_grads", key_grads, p.B, p.key_heads, rest.grad_rows, p.D);
    rest.value_grads = float_rows("value_grads", value_grads, p.B, p.key_heads, rest.grad_rows, p.E);
  }
  on_device_of(kName, query, [&](const rk::cuda::Device& device, void* stream) {
    const Tensor scratch = bytes_like(query, rk::cuda::plan_list_scratch(p, device).bytes);
    return rk::cuda::list_attention_backward(p, rest, device, scratch.mutable_data_ptr(), stream);
  });
}

void select_keys(RK_SELECT_PARAMETERS) {
  constexpr char kName[] = "select_keys";
  check_one_device(kName, {&query, &key, pointer(order), pointer(query_padding), pointer(padding), &windows, &lists});
  const Selection s = selection(RK_SELECT_ARGUMENTS);
  check_rows(kName, s.a);
  on_device_of(kName, query, [&](const rk::cuda::Device&, void* stream) {
    const Tensor scratch = bytes_like(query, rk::cuda::plan_select(s.p).bytes);
    return rk::cuda::select_keys(s.p, scratch.mutable_data_ptr(), stream);
  });
}

rk::cuda::Device device_of(const std::vector<int64_t>& device) {
  require(device.size() == 3, "device must have 3 numbers, got ", device.size());
  return {static_cast<int>(device[0]), static_cast<int>(device[1]), static_cast<int>(device[2])};
}

// What plan_hash chooses for x of shape [B, H, L, D], R rounds, and a device: multiprocessors, bytes of shared memory
// of a block and of a multiprocessor. Grid, threads, shared bytes, steps, column tiles of a round, rounds of a block,
// resident tiles, tokens of a block.
std::vector<int64_t> hash_plan(std::vector<int64_t> shape, int64_t R, int64_t element_size,
                               std::vector<int64_t> factors, std::vector<int64_t> device) {
  require(shape.size() == 4, "shape must have 4 numbers, got ", shape.size());
  rk::HashParams p{};
  p.B = shape[0], p.H = shape[1], p.L = shape[2], p.D = shape[3], p.R = R;
  p.element = element_size == 2 ? rk::Element::kBFloat16 : rk::Element::kSame;
  p.n_factors = static_cast<int64_t>(factors.size()), p.factors = factors.data();
  const rk::cuda::HashPlan plan = rk::cuda::plan_hash(p, device_of(device));
  return {plan.launch.grid[0], plan.launch.threads, plan.launch.shared_bytes, plan.k_steps,
          plan.round_tiles,    plan.rounds,         plan.resident_tiles,      plan.tokens_per_block};
}

// The same of plan_order, for buckets of shape [B, H, R, L]: grid, threads, shared bytes, passes, base of a digit, keys
// of a block, blocks of a sequence, warps that sort.
std::vector<int64_t> order_plan(std::vector<int64_t> shape, int64_t n_sequences, int64_t longest, int64_t n_buckets,
                                std::vector<int64_t> device) {
  require(shape.size() == 4, "shape must have 4 numbers, got ", shape.size());
  rk::OrderParams p{};
  p.rows = shape[0] * shape[1], p.rounds = shape[2], p.L = shape[3];
  p.n_buckets = n_buckets, p.n_sequences = n_sequences, p.longest = longest;
  const rk::cuda::OrderPlan plan = rk::cuda::plan_order(p, device_of(device));
  return {plan.launch.grid[0], plan.launch.threads, plan.launch.shared_bytes, plan.passes, plan.base, plan.tile,
          plan.tiles,          plan.sorters};
}

// The same of plan_attention, for rows of query [B, H, L, D] with a width E of values, key heads (0: shared keys), a
// window [chunk length, chunks before, chunks after] or lists of a length (else 0), flags, and a part: 0 the forward
// pass, 1 and 2 the gradients of queries and of keys. Grid, threads, shared bytes, steps, places for tiles, whether a
// tile that is owned is visited, tiles of a block, launches.
std::vector<int64_t> attention_plan(std::vector<int64_t> shape, int64_t E, int64_t key_heads, int64_t R,
                                    int64_t element_size, std::vector<int64_t> window, int64_t list_length,
                                    int64_t flags, int64_t n_sequences, int64_t longest, int64_t part,
                                    std::vector<int64_t> device) {
  require(shape.size() == 4, "shape must have 4 numbers, got ", shape.size());
  require(window.size() == 3 && window[0] >= 1, "window must have 3 numbers, the first a chunk length");
  require(part >= 0 && part <= 2, "part must be between 0 and 2, got ", part);
  rk::AttentionParams p{};
  p.B = shape[0], p.H = shape[1], p.L = shape[2], p.D = shape[3], p.E = E, p.R = R, p.n_sequences = n_sequences;
  p.key_heads = key_heads ? key_heads : p.H, p.key.data = key_heads ? const_cast<char*>(&kNoRows) : nullptr;
  p.element = element_size == 2 ? rk::Element::kBFloat16 : rk::Element::kSame;
  p.chunk_length = std::min(window[0], std::max<int64_t>(1, p.L));
  p.chunks_before = window[1], p.chunks_after = window[2], p.list_length = list_length, p.flags = flags;
  const rk::cuda::AttentionPlan plan =
      rk::cuda::plan_attention(p, static_cast<rk::cuda::AttentionPart>(part), longest, device_of(device));
  return {plan.launch.grid[0], plan.launch.threads, plan.launch.shared_bytes, plan.k_steps,
          plan.stages,         plan.diagonal_first, plan.tiles_per_block,     plan.rounds};
}

// The same of plan_select, for queries [B, H, L, D] and S keys of other heads, of which some are context: steps, blocks
// of keys and those that a chunk chooses, then of the passes (over blocks, over keys) blocks of threads, those at a
// time, candidates and shared bytes, and scratch bytes in all.
std::vector<int64_t> select_plan(std::vector<int64_t> shape, int64_t S, int64_t key_heads, int64_t context_keys,
                                 int64_t element_size, int64_t chunk_length, int64_t budget) {
  require(shape.size() == 4, "shape must have 4 numbers, got ", shape.size());
  require(chunk_length >= 1, "chunk_length must be positive, got ", chunk_length);
  rk::SelectParams select{};
  rk::AttentionParams& p = select.attention;
  p.B = shape[0], p.H = shape[1], p.L = shape[2], p.D = shape[3], p.S = S, p.key_heads = key_heads;
  p.context_keys = context_keys, select.budget = budget;
  p.element = element_size == 2 ? rk::Element::kBFloat16 : rk::Element::kSame;
  p.chunk_length = chunk_length;
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

// input [N, n], index int32 [M], out [M, n]: out[i] = input[index[i]]; an index outside the input gives a row of zeros.
void gather_rows(Tensor input, Tensor index, Tensor out) {
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
  check_one_device("gather_rows", {&input, &index, &out});
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

}  // namespace

STABLE_TORCH_LIBRARY(reformer_kernels_cuda, m) {
  m.def("hash_buckets(Tensor x, Tensor rotations, Tensor? padding, int[] factors, Tensor(a!) buckets) -> ()");
  m.def("bucket_order(Tensor buckets, Tensor? cu_seqlens, int longest, int n_buckets, Tensor(a!) order) -> ()");
  const std::string attention = "Tensor query, Tensor? key, Tensor value, " RK_ATTENTION_SCHEMA "int longest, ";
  m.def(
      ("chunk_attention_forward(" + attention + "Tensor(a!) out, Tensor(b!) lse, Tensor(c!) self_only) -> ()").c_str());
  m.def(("chunk_attention_backward(" + attention +
         "Tensor grad_out, Tensor out, Tensor lse, Tensor self_only, Tensor(a!) grad_query, Tensor(b!) grad_key, "
         "Tensor(c!) grad_value) -> ()")
            .c_str());
  const std::string lists = RK_LIST_SCHEMA, rest = "Tensor? key_sums, Tensor? value_sums, Tensor? counts";
  m.def(("list_attention_forward(" + lists + "Tensor(a!) out, Tensor(b!) lse, " + rest + ") -> ()").c_str());
  m.def(("list_rest_backward(" + lists + "Tensor out, Tensor lse, " + rest +
         ", Tensor grad_out, Tensor(a!) grad_query, Tensor(b!) query_terms, Tensor(c!) value_terms) -> ()")
            .c_str());
  m.def(("list_attention_backward(" + lists +
         "Tensor out, Tensor lse, Tensor grad_out, Tensor? key_grads, Tensor? value_grads, Tensor(a!) grad_query, "
         "Tensor(b!) grad_key, Tensor(c!) grad_value) -> ()")
            .c_str());
  m.def("select_keys(" RK_SELECT_SCHEMA "Tensor(a!) lists) -> ()");
  m.def("gather_rows(Tensor input, Tensor index, Tensor(a!) out) -> ()");
  m.def("hash_plan(int[] shape, int rounds, int element_size, int[] factors, int[] device) -> int[]");
  m.def("order_plan(int[] shape, int n_sequences, int longest, int n_buckets, int[] device) -> int[]");
  m.def(
      "attention_plan(int[] shape, int width, int key_heads, int rounds, int element_size, int[] window, "
      "int list_length, int flags, int n_sequences, int longest, int part, int[] device) -> int[]");
  m.def(
      "select_plan(int[] shape, int keys, int key_heads, int context_keys, int element_size, int chunk_length, "
      "int budget) -> int[]");
  m.def("build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(reformer_kernels_cuda, CUDA, m) {
  m.impl("hash_buckets", TORCH_BOX(&hash_buckets));
  m.impl("bucket_order", TORCH_BOX(&bucket_order));
  m.impl("chunk_attention_forward", TORCH_BOX(&chunk_attention_forward));
  m.impl("chunk_attention_backward", TORCH_BOX(&chunk_attention_backward));
  m.impl("list_attention_forward", TORCH_BOX(&list_attention_forward));
  m.impl("list_rest_backward", TORCH_BOX(&list_rest_backward));
  m.impl("list_attention_backward", TORCH_BOX(&list_attention_backward));
  m.impl("select_keys", TORCH_BOX(&select_keys));
  m.impl("gather_rows", TORCH_BOX(&gather_rows));
}

// Without a tensor argument there is no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(reformer_kernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("hash_plan", TORCH_BOX(&hash_plan));
  m.impl("order_plan", TORCH_BOX(&order_plan));
  m.impl("attention_plan", TORCH_BOX(&attention_plan));
  m.impl("select_plan", TORCH_BOX(&select_plan));
  m.impl("build_info", TORCH_BOX(&build_info));
}
