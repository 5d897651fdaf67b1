// Checks of torch tensors, and the plain arguments that kernels take of them. USE_CUDA: of tensors on a GPU.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <climits>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels/params.h"

namespace rk::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class T>
std::string text(const T& part) {
  if constexpr (std::is_integral_v<T> || std::is_enum_v<T>)
    return std::to_string(static_cast<long long>(part));
  else
    return part;
}

// Not STD_TORCH_CHECK: its stream writes numbers by facets of a locale, which crashes in a library that some toolchains
// link with a C++ runtime of its own.
template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) throw std::runtime_error((text(parts) + ...));
}

#ifdef USE_CUDA
constexpr const char* kPlace = "a GPU";
inline bool is_here(const Tensor& t) { return t.is_cuda(); }
#else
constexpr const char* kPlace = "the CPU";
inline bool is_here(const Tensor& t) { return t.is_cpu(); }
#endif

inline void check_type(const char* name, const Tensor& t, ScalarType type) {
  require(t.scalar_type() == type, name, " has a wrong dtype");
}

// The kernels trust shapes, so each is checked; the strides are those of a torch tensor, inside its memory.
inline Rows rows(const char* name, const Tensor& t, ScalarType type, int64_t B, int64_t H, int64_t L, int64_t width) {
  check_type(name, t, type);
  require(t.dim() == 4 && t.size(0) == B && t.size(1) == H && t.size(2) == L && t.size(3) == width, name,
          " must have shape [", B, ", ", H, ", ", L, ", ", width, "]");
  require(width <= 1 || t.stride(3) == 1, name, " must have contiguous rows");
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

template <class T>
const T* contiguous(const char* name, const OptionalTensor& t, ScalarType type, std::initializer_list<int64_t> shape) {
  if (!t) return nullptr;
  check_type(name, *t, type);
  require(t->is_contiguous() && t->dim() == static_cast<int64_t>(shape.size()) &&
              std::equal(shape.begin(), shape.end(), t->sizes().begin()),
          name, " has a wrong shape or is not contiguous");
  return static_cast<const T*>(t->const_data_ptr());
}

inline Element element_of(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  if (type == ScalarType::BFloat16) return Element::kBFloat16;
  if (type == ScalarType::Half) return Element::kFloat16;
  require(type == ScalarType::Float || type == ScalarType::Double,
          "dtype must be float32, float64, bfloat16 or float16");
  return Element::kSame;
}

inline ScalarType compute_type(const Tensor& t) {
  return element_of(t) == rk::Element::kSame ? t.scalar_type() : ScalarType::Float;
}

// The bounds of p's sequences: [n + 1] for all batch rows, or [B, n + 1]; one sequence without them. They rise from 0
// to the length, as others see.
template <class Params>
void set_sequences(Params& p, const OptionalTensor& bounds, int64_t B) {
  p.n_sequences = 1, p.bounds_stride = 0, p.cu_seqlens = nullptr;
  if (!bounds) return;
  const int64_t dimensions = bounds->dim(), size = dimensions ? bounds->size(dimensions - 1) : 0;
  require((dimensions == 1 || dimensions == 2) && size >= 2, "cu_seqlens must have at least two elements");
  p.n_sequences = size - 1;
  if (dimensions == 1) {
    p.cu_seqlens = contiguous<int32_t>("cu_seqlens", bounds, ScalarType::Int, {size});
  } else {
    p.cu_seqlens = contiguous<int32_t>("cu_seqlens", bounds, ScalarType::Int, {B, size});
    p.bounds_stride = size;
  }
}

}  // namespace rk::binding
