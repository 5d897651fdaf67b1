// The launchers of the CUDA kernels on numpy arrays: they run on fibers, or are recorded for the emulator.
#include "kernels/cuda/kernels.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "module.h"

namespace py = pybind11;

namespace {

using rk::cuda::Device;

Device device_of(const std::vector<int>& numbers) { return {numbers.at(0), numbers.at(1), numbers.at(2)}; }

rk::Element element_of(const std::string& name) {
  if (name == "float32") return rk::Element::kSame;
  if (name == "bfloat16") return rk::Element::kBFloat16;
  if (name == "float16") return rk::Element::kFloat16;
  throw std::invalid_argument("element must be float32, bfloat16 or float16, got " + name);
}

// Half types come as arrays of uint16.
rk::Rows rows(const py::array& a) {
  const auto stride = [&](int i) { return a.strides(i) / a.itemsize(); };
  return {const_cast<void*>(a.data()), stride(0), stride(1), stride(2)};
}

template <class T>
const T* data(const std::optional<py::array>& a) {
  return a ? static_cast<const T*>(a->data()) : nullptr;
}

void check(int error) {
  if (error) throw std::runtime_error("the launch failed with error " + std::to_string(error));
}

void hash_buckets(const py::array& x, const std::string& element, const py::array& rotations,
                  const std::optional<py::array>& padding, const std::vector<int64_t>& factors, py::array& buckets,
                  const std::vector<int>& device) {
  rk::HashParams p{};
  p.element = element_of(element);
  p.B = x.shape(0), p.H = x.shape(1), p.L = x.shape(2), p.D = x.shape(3), p.R = rotations.shape(3);
  p.x = rows(x);
  p.rotations = rotations.data();
  const auto stride = [&](int i) { return rotations.shape(i) == 1 ? 0 : rotations.strides(i) / rotations.itemsize(); };
  p.rotations_stride_b = stride(0), p.rotations_stride_h = stride(1);
  p.factors = factors.data(), p.n_factors = static_cast<int64_t>(factors.size());
  p.padding = data<bool>(padding);
  p.buckets = static_cast<int32_t*>(buckets.mutable_data());
  check(rk::cuda::hash_buckets(p, device_of(device), nullptr));
}

// The bounds of sequences [n + 1] or [B, n + 1].
template <class Params>
void set_sequences(Params& p, const std::optional<py::array>& bounds) {
  p.n_sequences = 1;
  if (!bounds) return;
  const py::ssize_t last = bounds->ndim() - 1, size = bounds->shape(last);
  p.cu_seqlens = data<int32_t>(bounds), p.n_sequences = size - 1, p.bounds_stride = last ? size : 0;
}

// scratch_order and counts: as long as the plan asks for, or absent.
void bucket_order(const py::array& buckets, const std::optional<py::array>& cu_seqlens, int64_t longest,
                  int64_t n_buckets, py::array& order, std::optional<py::array> scratch_order,
                  std::optional<py::array> counts, const std::vector<int>& device) {
  rk::OrderParams p{};
  p.rows = buckets.shape(0) * buckets.shape(1), p.heads = buckets.shape(1), p.rounds = buckets.shape(2),
  p.L = buckets.shape(3);
  p.n_buckets = n_buckets, p.longest = longest;
  p.buckets = static_cast<const int32_t*>(buckets.data());
  set_sequences(p, cu_seqlens);
  p.order = static_cast<int32_t*>(order.mutable_data());
  const auto scratch = [](std::optional<py::array>& a) {
    return a ? static_cast<int32_t*>(a->mutable_data()) : nullptr;
  };
  check(rk::cuda::bucket_order(p, device_of(device), scratch(scratch_order), scratch(counts), nullptr));
}

// The fields of AttentionParams that `given` has, by their names: arrays, numbers, and strings for `element`.
rk::AttentionParams attention_params(const py::dict& given) {
  rk::AttentionParams p{};
  const auto number = [&]<class T>(const char* name, T& field) {
    if (given.contains(name)) field = given[name].cast<T>();
  };
  const auto pointer = [&]<class T>(const char* name, T*& field) {
    if (given.contains(name) && !given[name].is_none())
      field = static_cast<T*>(const_cast<void*>(given[name].cast<py::array>().data()));
  };
  const auto rows_of = [&](const char* name, rk::Rows& field) {
    if (given.contains(name) && !given[name].is_none()) field = rows(given[name].cast<py::array>());
  };
  p.element = element_of(given["element"].cast<std::string>());
  const py::array query = given["query"], key_or_query = given[given["key"].is_none() ? "query" : "key"];
  const py::array value_or_key = given.contains("value") ? py::array(given["value"]) : key_or_query;
  p.B = query.shape(0), p.H = query.shape(1), p.L = query.shape(2), p.D = query.shape(3), p.E = value_or_key.shape(3);
  p.S = key_or_query.shape(2), p.key_heads = value_or_key.shape(1), p.n_queries = p.L;
  p.R = given["order"].is_none() ? 1 : given["order"].cast<py::array>().shape(2);
  if (given.contains("key_indices")) p.list_length = given["key_indices"].cast<py::array>().shape(3);
  set_sequences(p, given.contains("cu_seqlens") ? given["cu_seqlens"].cast<std::optional<py::array>>() : std::nullopt);
  p.chunk_length = std::min(given["chunk_length"].cast<int64_t>(), std::max<int64_t>(1, p.L));  // as the op does
  number("n_queries", p.n_queries);
  number("chunks_before", p.chunks_before), number("chunks_after", p.chunks_after), number("flags", p.flags);
  number("scale", p.scale), number("keep_factor", p.keep_factor), number("drop_threshold", p.drop_threshold);
  number("context_keys", p.context_keys);
  pointer("dropout_seed", p.dropout_seed), pointer("order", p.order), pointer("buckets", p.buckets);
  pointer("padding", p.padding), pointer("self_only", p.self_only);
  pointer("key_indices", p.key_indices);
  if (given.contains("lse")) p.lse = given["lse"].cast<py::array>().mutable_data();
  rows_of("query", p.query), rows_of("key", p.key), rows_of("value", p.value), rows_of("out", p.out);
  rows_of("grad_out", p.grad_out), rows_of("grad_query", p.grad_query), rows_of("grad_key", p.grad_key);
  rows_of("grad_value", p.grad_value);
  return p;
}

int64_t attention_scratch(const py::dict& given, bool backward) {
  return rk::cuda::plan_attention_scratch(attention_params(given), backward).bytes;
}

void attention(const py::dict& given, bool backward, int64_t longest, py::array& scratch,
               const std::vector<int>& device) {
  const auto run = backward ? rk::cuda::attention_backward : rk::cuda::attention_forward;
  check(run(attention_params(given), longest, device_of(device), scratch.mutable_data(), nullptr));
}

rk::cuda::RestParams rest_params(const py::dict& given) {
  rk::cuda::RestParams rest{};
  const auto pointer = [&]<class T>(const char* name, T*& field, int64_t* count, int dimension) {
    if (!given.contains(name) || given[name].is_none()) return;
    const py::array array = given[name];
    field = static_cast<T*>(const_cast<void*>(array.data()));
    if (count) *count = array.shape(dimension);
  };
  pointer("key_sums", rest.key_sums, &rest.sum_rows, 2), pointer("value_sums", rest.value_sums, nullptr, 0);
  pointer("counts", rest.counts, nullptr, 0), pointer("query_terms", rest.query_terms, nullptr, 0);
  pointer("value_terms", rest.value_terms, nullptr, 0), pointer("key_grads", rest.key_grads, &rest.grad_rows, 2);
  pointer("value_grads", rest.value_grads, nullptr, 0);
  return rest;
}

int64_t list_scratch(const py::dict& given, const std::vector<int>& device) {
  return rk::cuda::plan_list_scratch(attention_params(given), device_of(device)).bytes;
}

void list_attention_forward(const py::dict& given, const std::vector<int>& device) {
  check(rk::cuda::list_attention_forward(attention_params(given), rest_params(given), device_of(device), nullptr));
}

void list_rest_backward(const py::dict& given) {
  check(rk::cuda::list_rest_backward(attention_params(given), rest_params(given), nullptr));
}

void list_attention_backward(const py::dict& given, py::array& scratch, const std::vector<int>& device) {
  check(rk::cuda::list_attention_backward(attention_params(given), rest_params(given), device_of(device),
                                          scratch.mutable_data(), nullptr));
}

rk::SelectParams select_params(const py::dict& given) {
  rk::SelectParams select{};
  select.attention = attention_params(given);
  select.budget = std::min<int64_t>(given["budget"].cast<int64_t>(), INT32_MAX);
  select.windows = static_cast<const rk::LocalWindow*>(given["windows"].cast<py::array>().data());
  select.attention.chunk_length = given["chunk_length"].cast<int64_t>();
  if (!given["query_padding"].is_none())
    select.query_padding = static_cast<const bool*>(given["query_padding"].cast<py::array>().data());
  py::array lists = given["lists"];
  select.lists = static_cast<int32_t*>(lists.mutable_data());
  select.attention.list_length = lists.shape(3);
  return select;
}

int64_t select_scratch(const py::dict& given) { return rk::cuda::plan_select(select_params(given)).bytes; }

void select_keys(const py::dict& given, py::array& scratch) {
  check(rk::cuda::select_keys(select_params(given), scratch.mutable_data(), nullptr));
}

void gather_rows(const py::array& input, const py::array& index, py::array& out) {
  rk::cuda::GatherRows p{};
  p.input = input.data(), p.index = static_cast<const int32_t*>(index.data()), p.out = out.mutable_data();
  p.input_rows = input.shape(0), p.rows = index.shape(0), p.vectors = input.shape(1) * input.itemsize() / 16;
  check(rk::cuda::gather_rows(p, nullptr));
}

// What the plans choose, under the names of their fields.

py::dict hash_plan(const std::vector<int64_t>& shape, int64_t rounds, const std::string& element,
                   const std::vector<int64_t>& factors, const std::vector<int>& device) {
  rk::HashParams p{};
  p.B = shape.at(0), p.H = shape.at(1), p.L = shape.at(2), p.D = shape.at(3), p.R = rounds;
  p.element = element_of(element);
  p.factors = factors.data(), p.n_factors = static_cast<int64_t>(factors.size());
  const rk::cuda::HashPlan plan = rk::cuda::plan_hash(p, device_of(device));
  using namespace py::literals;
  return py::dict("k_steps"_a = plan.k_steps, "round_tiles"_a = plan.round_tiles, "rounds"_a = plan.rounds,
                  "resident_tiles"_a = plan.resident_tiles, "tokens_per_block"_a = plan.tokens_per_block,
                  "threads"_a = plan.launch.threads, "shared_bytes"_a = plan.launch.shared_bytes);
}

py::dict order_plan(const std::vector<int64_t>& shape, int64_t n_sequences, int64_t longest, int64_t n_buckets,
                    const std::vector<int>& device) {
  rk::OrderParams p{};
  p.rows = shape.at(0) * shape.at(1), p.rounds = shape.at(2), p.L = shape.at(3);
  p.n_buckets = n_buckets, p.n_sequences = n_sequences, p.longest = longest;
  const rk::cuda::OrderPlan plan = rk::cuda::plan_order(p, device_of(device));
  using namespace py::literals;
  return py::dict("passes"_a = plan.passes, "base"_a = plan.base, "tile"_a = plan.tile, "tiles"_a = plan.tiles,
                  "sorters"_a = plan.sorters, "counts"_a = plan.counts());
}

}  // namespace

void bind_kernels(py::module_& m) {
  m.def("hash_buckets", &hash_buckets);
  m.def("bucket_order", &bucket_order);
  m.def("attention_scratch", &attention_scratch);
  m.def("attention", &attention);
  m.def("list_scratch", &list_scratch);
  m.def("list_attention_forward", &list_attention_forward);
  m.def("list_rest_backward", &list_rest_backward);
  m.def("list_attention_backward", &list_attention_backward);
  m.def("select_scratch", &select_scratch);
  m.def("select_keys", &select_keys);
  m.def("gather_rows", &gather_rows);
  m.def("hash_plan", &hash_plan);
  m.def("order_plan", &order_plan);
}
