// The sample kernels on numpy arrays.
#include "samples.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "module.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using namespace rk::samples;

template <class T>
using Array = py::array_t<T, py::array::c_style>;

Fault fault_of(const std::string& name) {
  for (const auto& known : kFaults)
    if (name == known.name) return known.fault;
  throw std::invalid_argument("no fault named " + name);
}

void check(int error) {
  if (error) throw std::runtime_error("the launch failed with error " + std::to_string(error));
}

Array<int32_t> unwritten(const std::vector<py::ssize_t>& shape) {
  Array<int32_t> array(shape);
  std::fill_n(array.mutable_data(), array.size(), -1);
  return array;
}

Array<float> unwritten_floats(const std::vector<py::ssize_t>& shape) {
  Array<float> array(shape);
  std::fill_n(array.mutable_data(), array.size(), std::numeric_limits<float>::quiet_NaN());
  return array;
}

Array<int32_t> bound_block_sums(const Array<int32_t>& x, const std::string& fault) {
  Array<int32_t> sums = unwritten({x.shape(0)});
  check(block_sums({x.data(), sums.mutable_data(), static_cast<int>(x.shape(0)), fault_of(fault)}));
  return sums;
}

py::tuple bound_warp_ranks(const Array<int32_t>& keys, const std::string& fault) {
  Array<int32_t> results[4];
  for (auto& result : results) result = unwritten({kRankThreads});
  check(warp_ranks({keys.data(), results[0].mutable_data(), results[1].mutable_data(), results[2].mutable_data(),
                    results[3].mutable_data(), fault_of(fault)}));
  return py::make_tuple(results[0], results[1], results[2], results[3]);
}

py::tuple bound_warp_words(const Array<int32_t>& x, int amount, int width) {
  Array<int32_t> shuffled = unwritten({kShuffles, 32}), words = unwritten({kWords, 32});
  Array<int32_t> counters({kCounters});
  const int32_t first[kCounters] = {0, INT32_MAX, INT32_MIN, -1, 0, 0};
  std::copy_n(first, kCounters, counters.mutable_data());
  check(warp_words({x.data(), shuffled.mutable_data(), words.mutable_data(), counters.mutable_data(), amount, width}));
  return py::make_tuple(shuffled, words, counters);
}

Array<float> bound_doubled(const Array<float>& x, const std::string& fault) {
  Array<float> y = unwritten_floats({x.shape(0)});
  check(doubled({x.data(), y.mutable_data(), static_cast<int>(x.shape(0)), fault_of(fault)}));
  return y;
}

Array<float> bound_product(const Array<uint16_t>& a, const Array<uint16_t>& b, bool bfloat16,
                           const std::string& fault) {
  const int M = static_cast<int>(a.shape(0)), K = static_cast<int>(a.shape(1)), N = static_cast<int>(b.shape(1));
  Array<float> c = unwritten_floats({M, N});
  check(product({a.data(), b.data(), c.mutable_data(), M, N, K, bfloat16, fault_of(fault)}));
  return c;
}

}  // namespace

void bind_samples(py::module_& m) {
  m.def("block_sums", &bound_block_sums, "x"_a, "fault"_a = "none");
  m.def("warp_ranks", &bound_warp_ranks, "keys"_a, "fault"_a = "none");
  m.def("warp_words", &bound_warp_words, "x"_a, "amount"_a, "width"_a);
  m.def("doubled", &bound_doubled, "x"_a, "fault"_a = "none");
  m.def("product", &bound_product, "a"_a, "b"_a, "bfloat16"_a, "fault"_a = "none");
}
