// Number formats of a GPU, and correct rounding into them.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace emulation {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
// Two of them in a register, the first in the low bits.
template <class T>
struct Pair {
  T low, high;
};

template <class T>
constexpr T from_bits(uint64_t bits) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(bits);
  } else if constexpr (sizeof(T) == 2) {
    return T{static_cast<uint16_t>(bits)};
  } else if constexpr (sizeof(T) == 4) {
    return std::bit_cast<T>(static_cast<uint32_t>(bits));
  } else {
    return std::bit_cast<T>(bits);
  }
}

// Signed values are extended, so that a wider register holds the same number.
template <class T>
constexpr uint64_t to_bits(T value) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<uint64_t>(value);
  } else if constexpr (sizeof(T) == 2) {
    return value.bits;
  } else if constexpr (sizeof(T) == 4) {
    return std::bit_cast<uint32_t>(value);
  } else {
    return std::bit_cast<uint64_t>(value);
  }
}

inline float to_float(float x) { return x; }
inline float to_float(Half x) { return static_cast<float>(std::bit_cast<_Float16>(x.bits)); }
inline float to_float(BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

inline float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

// Round to nearest even; NaN becomes the GPU's canonical NaN.
template <class T>
T round_to(float x);

template <>
inline float round_to<float>(float x) {
  return x;
}

template <>
inline Half round_to<Half>(float x) {
  if (x != x) return Half{0x7fff};
  return Half{std::bit_cast<uint16_t>(static_cast<_Float16>(x))};
}

template <>
inline BFloat16 round_to<BFloat16>(float x) {
  if (x != x) return BFloat16{0x7fff};
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t half_less_tie = 0x7fff + (bits >> 16 & 1);
  return BFloat16{static_cast<uint16_t>((bits + half_less_tie) >> 16)};
}

// high + low exactly, |low| at most half a unit in the last place of high.
struct Exact {
  double high, low;
};

// Knuth's two-sum.
inline Exact exact_sum(double a, double b) {
  const double sum = a + b;
  if (!std::isfinite(sum)) return {sum, 0};
  const double b_part = sum - a;
  return {sum, (a - (sum - b_part)) + (b - b_part)};
}

// The float at or next to x in the direction; the error of x tells on which side the exact value lies.
inline float round_down(Exact x) {
  const float nearest = static_cast<float>(x.high);
  if (!std::isfinite(x.high)) return nearest;
  const bool above = nearest > x.high || (nearest == x.high && x.low < 0);
  return above ? std::nextafter(nearest, -std::numeric_limits<float>::infinity()) : nearest;
}
inline float round_up(Exact x) { return -round_down({-x.high, -x.low}); }
inline float round_to_zero(Exact x) { return x.high < 0 ? round_up(x) : round_down(x); }

// A float whose last bit is set when inexact: rounding it to 13 bits or fewer rounds the exact value once.
inline float round_to_odd(Exact x) {
  const float toward_zero = round_to_zero(x);
  if (!std::isfinite(x.high) || (toward_zero == x.high && x.low == 0)) return toward_zero;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(toward_zero) | 1u);
}

// TF32 keeps 10 bits of the fraction; multiplication ignores the rest.
inline float truncate_to_tf32(uint32_t bits) { return std::bit_cast<float>(bits & 0xffffe000u); }

// Round to nearest, ties away from zero.
inline uint32_t round_to_tf32(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (!std::isfinite(x)) return x != x ? 0x7fffffffu : bits;
  return (bits + 0x1000u) & 0xffffe000u;
}

}  // namespace emulation
