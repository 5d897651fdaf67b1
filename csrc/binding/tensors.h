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
  require(is_here(t) && t.scalar_type() == type, name, ": wrong dtype or not on ", kPlace);
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

// hash_buckets of x [B, H, L, D], rotations [B|1, H|1, D, R, columns], padding [B, L] into buckets [B, H, R, L]. The
// result points to factors.
inline HashParams hash_params(const Tensor& x, const Tensor& rotations, const OptionalTensor& padding,
                              const std::vector<int64_t>& factors, const Tensor& buckets) {
  const ScalarType type = compute_type(x);
  require(rotations.dim() == 5 && x.dim() == 4, "x must have 4 and rotations 5 dimensions");
  HashParams p{};
  p.B = x.size(0), p.H = x.size(1), p.L = x.size(2), p.D = x.size(3), p.R = rotations.size(3);
  p.element = element_of(x);
  p.x = rows("x", x, x.scalar_type(), p.B, p.H, p.L, p.D);
  int64_t columns = 0, total = 1;
  for (int64_t f : factors) {
    require(f >= 2 && f % 2 == 0 && total <= INT32_MAX / f,
            "n_buckets must be even factors with a product below 2**31");
    columns += f / 2, total *= f;
  }
  const int64_t b = rotations.size(0), h = rotations.size(1);
  require((b == 1 || b == p.B) && (h == 1 || h == p.H) && p.R >= 1,
          "rotations must have shape [B|1, H|1, D, R, columns]");
  p.rotations = contiguous<char>("rotations", rotations, type, {b, h, p.D, p.R, columns});
  p.rotations_stride_h = h == 1 ? 0 : p.D * p.R * columns;
  p.rotations_stride_b = b == 1 ? 0 : h * p.D * p.R * columns;
  p.n_factors = static_cast<int64_t>(factors.size()), p.factors = factors.data();
  p.padding = contiguous<bool>("key_padding_mask", padding, ScalarType::Bool, {p.B, p.L});
  p.buckets = const_cast<int32_t*>(contiguous<int32_t>("buckets", buckets, ScalarType::Int, {p.B, p.H, p.R, p.L}));
  return p;
}

// bucket_order of buckets [B, H, R, L] into order, without sequences.
inline OrderParams order_params(const Tensor& buckets, int64_t n_buckets, const Tensor& order) {
  require(buckets.dim() == 4, "buckets must have 4 dimensions");
  require(n_buckets >= 1, "n_buckets must be at least 1, got ", n_buckets);
  OrderParams p{};
  const int64_t B = buckets.size(0), H = buckets.size(1), R = buckets.size(2), L = buckets.size(3);
  require(L <= INT32_MAX, "L must be below 2**31, got ", L);
  p.rows = B * H, p.heads = H, p.rounds = R, p.L = L, p.n_buckets = n_buckets, p.n_sequences = 1, p.longest = L;
  p.buckets = contiguous<int32_t>("buckets", buckets, ScalarType::Int, {B, H, R, L});
  p.order = const_cast<int32_t*>(contiguous<int32_t>("order", order, ScalarType::Int, {B, H, R, L}));
  return p;
}

}  // namespace rk::binding
