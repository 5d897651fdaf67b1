// bfloat16 and float16: the rows of a sequence are widened to float before the kernels run, and results are rounded
// once.
#pragma once
#include "kernels/cpu/chunk.h"

namespace rk::cpu::RK_ISA {

// Only integer arithmetic and selections, so that loops over it are vectorized for every instruction set.
template <Element kElement>
RK_INLINE float widened(uint16_t x) {
  if constexpr (kElement == Element::kBFloat16) return std::bit_cast<float>(uint32_t{x} << 16);
  const uint32_t magnitude = (x & 0x7fffu) << 13;
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;  // exact, also for subnormal numbers
  const uint32_t special = magnitude >= 0x7c00u << 13 ? 0x7f800000u : 0;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | special | (x & 0x8000u) << 16);
}

// Rounds to nearest, ties to even. NaN stays NaN.
template <Element kElement>
RK_INLINE uint16_t rounded(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  const bool nan = magnitude > 0x7f800000u;
  if constexpr (kElement == Element::kBFloat16) {
    const uint32_t nearest = (magnitude + 0x7fffu + (magnitude >> 16 & 1)) >> 16;
    return static_cast<uint16_t>(sign | (nan ? 0x7fc0u : nearest));
  }
  // Below 2^-14, adding 1/2 leaves the subnormal result in the low bits.
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  const uint32_t large = nan ? 0x7e00u : 0x7c00u;  // used from 65520 on, which would round to 2^16
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  return static_cast<uint16_t>(sign | (magnitude >= 0x477ff000u ? large : finite));
}

template <Element kElement>
RK_NOINLINE void widen_row(const uint16_t* from, int64_t width, float* to) {
  for (int64_t d = 0; d < width; ++d) to[d] = widened<kElement>(from[d]);
}
template <Element kElement>
RK_NOINLINE void round_row(const float* from, int64_t width, uint16_t* to) {
  for (int64_t d = 0; d < width; ++d) to[d] = rounded<kElement>(from[d]);
}

// Copies the row at (b, h, l) of x, widened to T.
template <class T>
void copy_row(const Rows& x, Element element, int64_t b, int64_t h, int64_t l, int64_t width, T* to) {
  if constexpr (std::is_same_v<T, float>) {
    if (element == Element::kBFloat16) return widen_row<Element::kBFloat16>(x.at<uint16_t>(b, h, l), width, to);
    if (element == Element::kFloat16) return widen_row<Element::kFloat16>(x.at<uint16_t>(b, h, l), width, to);
  }
  std::memcpy(to, x.at<T>(b, h, l), width * sizeof(T));
}

struct RowField {
  Rows AttentionParams::* rows;
  bool values;                               // width E instead of D
  enum Of { kAll, kQueriesOnly, kKeys } of;  // L, n_queries, or S rows of the key head
};
constexpr RowField kQueryRows{&AttentionParams::query, false, RowField::kAll},
    kKeyRows{&AttentionParams::key, false, RowField::kKeys}, kValueRows{&AttentionParams::value, true, RowField::kKeys},
    kOutRows{&AttentionParams::out, true, RowField::kQueriesOnly},
    kGradOut{&AttentionParams::grad_out, true, RowField::kQueriesOnly},
    kGradQuery{&AttentionParams::grad_query, false, RowField::kAll},
    kGradKey{&AttentionParams::grad_key, false, RowField::kKeys},
    kGradValue{&AttentionParams::grad_value, true, RowField::kKeys};

// The rows of a sequence in T, where the tensors hold half types.
template <class T>
class HalfRows {
 public:
  // The parameters with rows in T for the kernels. Rows in `read` have the given values.
  template <class P>
  AttentionParams widen(const AttentionParams& given, const HeadSequence& seq, std::initializer_list<RowField> read,
                        std::initializer_list<RowField> write, P&& parallel) {
    AttentionParams p = given;
    if (given.element == Element::kSame) return p;
    size_t used = 0;
    auto redirect = [&](RowField f) {
      if (!(given.*f.rows).data) return;
      const int64_t width = f.values ? given.E : given.D;
      const int64_t length = f.of == RowField::kAll ? given.L : f.of == RowField::kKeys ? given.S : given.n_queries;
      if (used == buffers_.size()) buffers_.emplace_back(length * width);
      p.*f.rows = {buffers_[used++], 0, 0, width};
    };
    for (RowField f : read) {
      redirect(f);
      each_row(p, seq, f, parallel, [&](int64_t l, T* row, int64_t width) {
        copy_row<T>(given.*f.rows, given.element, seq.b, head(seq, f), l, width, row);
      });
    }
    for (RowField f : write) redirect(f);
    return p;
  }

  // Rounds what the kernels wrote into the given tensors.
  template <class P>
  void narrow(const AttentionParams& given, const AttentionParams& p, const HeadSequence& seq,
              std::initializer_list<RowField> written, P&& parallel) {
    if constexpr (std::is_same_v<T, float>) {
      if (given.element == Element::kSame) return;
      for (RowField f : written) {
        if (f.of == RowField::kKeys && (seq.h + 1) % p.group()) continue;  // other query heads still add to it
        each_row(p, seq, f, parallel, [&](int64_t l, T* row, int64_t width) {
          uint16_t* to = (given.*f.rows).template at<uint16_t>(seq.b, head(seq, f), l);
          given.element == Element::kBFloat16 ? round_row<Element::kBFloat16>(row, width, to)
                                              : round_row<Element::kFloat16>(row, width, to);
        });
      }
    }
  }

 private:
  static int64_t head(const HeadSequence& seq, RowField f) { return f.of == RowField::kKeys ? seq.key_head : seq.h; }

  template <class P, class F>
  void each_row(const AttentionParams& p, const HeadSequence& seq, RowField f, P&& parallel, F&& body) {
    const Rows& rows = p.*f.rows;
    if (!rows.data) return;
    const int64_t length = f.of == RowField::kQueriesOnly         ? seq.n_queries
                           : f.of == RowField::kKeys && p.lists() ? p.S
                                                                  : seq.L;
    parallel(0, length, [&](auto&, int64_t begin, int64_t end) {
      for (int64_t l = seq.offset + begin; l < seq.offset + end; ++l)
        body(l, rows.template at<T>(0, 0, l), f.values ? p.E : p.D);
    });
  }

  std::vector<Buffer<T>> buffers_;  // in the order of the fields, with room for the longest sequence
};

}  // namespace rk::cpu::RK_ISA
