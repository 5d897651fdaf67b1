// The tensors of hashing and sorting, checked, as the plain arguments of their kernels.
#pragma once
#include "binding/ops.h"

namespace rk::binding {

struct HashInputs {
  Arguments& next;
  Tensor x = next.tensor("x");                                                 // [B, H, L, D]
  Tensor rotations = next.tensor("rotations");                                 // [B|1, H|1, D, R, columns]
  OptionalTensor key_padding_mask = next.optional_tensor("key_padding_mask");  // [B, L]
  std::vector<int64_t> n_buckets = next.integers("n_buckets");                 // factors
  Tensor buckets = next.tensor("buckets", true);                               // [B, H, R, L]
};

struct OrderInputs {
  Arguments& next;
  Tensor buckets = next.tensor("buckets");  // [B, H, R, L]
  OptionalTensor cu_seqlens = next.optional_tensor("cu_seqlens");
  int64_t n_buckets = next.integer("n_buckets");
  Tensor order = next.tensor("order", true);  // like buckets
};

// The result points to the inputs' factors.
inline HashParams hash_params(const HashInputs& in) {
  const Tensor &x = in.x, &rotations = in.rotations;
  const ScalarType type = compute_type(x);
  require(rotations.dim() == 5 && x.dim() == 4, "x must have 4 and rotations 5 dimensions");
  HashParams p{};
  p.B = x.size(0), p.H = x.size(1), p.L = x.size(2), p.D = x.size(3), p.R = rotations.size(3);
  p.element = element_of(x);
  p.x = rows("x", x, x.scalar_type(), p.B, p.H, p.L, p.D);
  int64_t columns = 0, total = 1;
  for (int64_t f : in.n_buckets) {
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
  p.n_factors = static_cast<int64_t>(in.n_buckets.size()), p.factors = in.n_buckets.data();
  p.padding = contiguous<bool>("key_padding_mask", in.key_padding_mask, ScalarType::Bool, {p.B, p.L});
  p.buckets = const_cast<int32_t*>(contiguous<int32_t>("buckets", in.buckets, ScalarType::Int, {p.B, p.H, p.R, p.L}));
  return p;
}

// longest is set to L; the CUDA op replaces it.
inline OrderParams order_params(const OrderInputs& in) {
  const Tensor& buckets = in.buckets;
  require(buckets.dim() == 4, "buckets must have 4 dimensions");
  require(in.n_buckets >= 1, "n_buckets must be at least 1, got ", in.n_buckets);
  OrderParams p{};
  const int64_t B = buckets.size(0), H = buckets.size(1), R = buckets.size(2), L = buckets.size(3);
  require(L <= INT32_MAX, "L must be below 2**31, got ", L);
  p.rows = B * H, p.heads = H, p.rounds = R, p.L = L, p.n_buckets = in.n_buckets, p.longest = L;
  p.buckets = contiguous<int32_t>("buckets", buckets, ScalarType::Int, {B, H, R, L});
  p.order = const_cast<int32_t*>(contiguous<int32_t>("order", in.order, ScalarType::Int, {B, H, R, L}));
  set_sequences(p, in.cu_seqlens, B);
  return p;
}

}  // namespace rk::binding
