// Conversions between number formats.
#include <algorithm>
#include <utility>

#include "registry.h"

namespace emulation {
namespace {

// How a conversion rounds a float to an integer.
enum class ToInteger { nearest, zero, down, up };

template <ToInteger Mode, class F>
F rounded_to_integer(F x) {
  switch (Mode) {
    case ToInteger::nearest:
      return std::nearbyint(x);
    case ToInteger::zero:
      return std::trunc(x);
    case ToInteger::down:
      return std::floor(x);
    case ToInteger::up:
      return std::ceil(x);
  }
}

// Values beyond the range become its ends; NaN becomes 0, or the lowest value where 64 bits are involved.
template <class T, class F>
T clamped(F x) {
  using Limits = std::numeric_limits<T>;
  if (x != x) return sizeof(T) == 8 || sizeof(F) == 8 ? static_cast<T>(uint64_t{1} << (8 * sizeof(T) - 1)) : T{0};
  if (x <= static_cast<F>(Limits::min())) return Limits::min();
  if (x >= static_cast<F>(Limits::max())) return Limits::max();
  return static_cast<T>(x);
}

template <class T, class F, ToInteger Mode, bool Ftz>
void float_to_integer(Context& c) {
  each_lane(c.lanes, [&](int lane) {
    const auto raw = from_bits<F>(c.source_bits(0, lane));
    if constexpr (sizeof(F) == 8) {
      c.set_bits(0, lane, to_bits(clamped<T>(rounded_to_integer<Mode>(raw))));
    } else {
      const float x = Ftz ? flush(to_float(raw)) : to_float(raw);
      c.set_bits(0, lane, to_bits(clamped<T>(rounded_to_integer<Mode>(x))));
    }
  });
}

template <class T, class F>
void add_float_to_integer(Registry& r, const std::string& types) {
  r.add("cvt.rni." + types, float_to_integer<T, F, ToInteger::nearest, false>);
  r.add("cvt.rzi." + types, float_to_integer<T, F, ToInteger::zero, false>);
  r.add("cvt.rmi." + types, float_to_integer<T, F, ToInteger::down, false>);
  r.add("cvt.rpi." + types, float_to_integer<T, F, ToInteger::up, false>);
  if constexpr (std::is_same_v<F, float>) {
    r.add("cvt.rni.ftz." + types, float_to_integer<T, F, ToInteger::nearest, true>);
    r.add("cvt.rzi.ftz." + types, float_to_integer<T, F, ToInteger::zero, true>);
    r.add("cvt.rmi.ftz." + types, float_to_integer<T, F, ToInteger::down, true>);
    r.add("cvt.rpi.ftz." + types, float_to_integer<T, F, ToInteger::up, true>);
  }
}

// Widths may differ from the registers' own: a destination register wider than its type holds the number extended.
template <class T, class S, auto F>
void convert(Context& c) {
  each_lane(c.lanes,
            [&](int lane) { c.set_bits(0, lane, to_bits(static_cast<T>(F(from_bits<S>(c.source_bits(0, lane)))))); });
}

template <class T, class S>
T saturated(S x) {
  using Limits = std::numeric_limits<T>;
  if (std::cmp_less(x, Limits::min())) return Limits::min();
  if (std::cmp_greater(x, Limits::max())) return Limits::max();
  return static_cast<T>(x);
}

// Integers of up to 32 bits are exact as doubles.
template <class T, class S>
T small_float_of(S x) {
  return round_to<T>(round_to_odd({static_cast<double>(x), 0}));
}

template <class S>
void add_from_integer(Registry& r, const std::string& source) {
  const auto add_to = [&]<class T>(const std::string& type) {
    r.add("cvt." + type + "." + source, convert<T, S, [](S x) { return static_cast<T>(x); }>);
    r.add("cvt.sat." + type + "." + source, convert<T, S, saturated<T, S>>);
  };
  add_to.template operator()<uint8_t>("u8");
  add_to.template operator()<int8_t>("s8");
  add_to.template operator()<uint16_t>("u16");
  add_to.template operator()<int16_t>("s16");
  add_to.template operator()<uint32_t>("u32");
  add_to.template operator()<int32_t>("s32");
  add_to.template operator()<uint64_t>("u64");
  add_to.template operator()<int64_t>("s64");
  r.add("cvt.rn.f32." + source, convert<float, S, [](S x) { return static_cast<float>(x); }>);
  r.add("cvt.rn.f64." + source, convert<double, S, [](S x) { return static_cast<double>(x); }>);
  if constexpr (sizeof(S) <= 4) {
    r.add("cvt.rn.f16." + source, convert<Half, S, small_float_of<Half, S>>);
    r.add("cvt.rn.bf16." + source, convert<BFloat16, S, small_float_of<BFloat16, S>>);
  }
}

template <class F>
void add_to_integers(Registry& r, const std::string& source) {
  add_float_to_integer<uint8_t, F>(r, "u8." + source);
  add_float_to_integer<int8_t, F>(r, "s8." + source);
  add_float_to_integer<uint16_t, F>(r, "u16." + source);
  add_float_to_integer<int16_t, F>(r, "s16." + source);
  add_float_to_integer<uint32_t, F>(r, "u32." + source);
  add_float_to_integer<int32_t, F>(r, "s32." + source);
  add_float_to_integer<uint64_t, F>(r, "u64." + source);
  add_float_to_integer<int64_t, F>(r, "s64." + source);
}

// Toward zero: cut off what the format does not hold. Larger values become the largest finite one.
template <class T>
T truncated(float x);

template <>
BFloat16 truncated<BFloat16>(float x) {
  if (x != x) return BFloat16{0x7fff};
  return BFloat16{static_cast<uint16_t>(std::bit_cast<uint32_t>(x) >> 16)};
}

template <>
Half truncated<Half>(float x) {
  const Half nearest = round_to<Half>(x);
  if (std::fabs(to_float(nearest)) <= std::fabs(x) || x != x) return nearest;
  return Half{static_cast<uint16_t>(nearest.bits - 1)};
}

float saturate(float x) { return x > 0 ? std::fmin(x, 1.0f) : 0.0f; }

template <class T, bool Relu, auto Round>
void convert_pair(Context& c) {
  const auto d = c.destination<Pair<T>>(0);
  const auto high = c.source<float>(0), low = c.source<float>(1);
  const auto clipped = [](float x) { return Relu && x < 0 ? 0.0f : x; };
  each_lane(c.lanes, [&](int lane) { d.set(lane, {Round(clipped(low[lane])), Round(clipped(high[lane]))}); });
}

template <class T>
void add_small_float(Registry& r, const std::string& type) {
  r.add("cvt.rn." + type + ".f32", convert<T, float, round_to<T>>);
  r.add("cvt.rz." + type + ".f32", convert<T, float, truncated<T>>);
  r.add("cvt.f32." + type, convert<float, T, [](T x) { return to_float(x); }>);
  r.add("cvt.rn." + type + "x2.f32", convert_pair<T, false, round_to<T>>);
  r.add("cvt.rz." + type + "x2.f32", convert_pair<T, false, truncated<T>>);
  r.add("cvt.rn.relu." + type + "x2.f32", convert_pair<T, true, round_to<T>>);
}

template <ToInteger Mode>
void add_rounding(Registry& r, const std::string& mode) {
  r.add("cvt." + mode + ".f32.f32", convert<float, float, rounded_to_integer<Mode, float>>);
  r.add("cvt." + mode + ".ftz.f32.f32",
        convert<float, float, [](float x) { return rounded_to_integer<Mode>(flush(x)); }>);
  r.add("cvt." + mode + ".f64.f64", convert<double, double, rounded_to_integer<Mode, double>>);
}

}  // namespace

void add_conversions(Registry& r) {
  add_from_integer<uint8_t>(r, "u8");
  add_from_integer<int8_t>(r, "s8");
  add_from_integer<uint16_t>(r, "u16");
  add_from_integer<int16_t>(r, "s16");
  add_from_integer<uint32_t>(r, "u32");
  add_from_integer<int32_t>(r, "s32");
  add_from_integer<uint64_t>(r, "u64");
  add_from_integer<int64_t>(r, "s64");
  add_to_integers<float>(r, "f32");
  add_to_integers<double>(r, "f64");
  add_to_integers<Half>(r, "f16");
  add_to_integers<BFloat16>(r, "bf16");
  add_small_float<Half>(r, "f16");
  add_small_float<BFloat16>(r, "bf16");
  add_rounding<ToInteger::nearest>(r, "rni");
  add_rounding<ToInteger::zero>(r, "rzi");
  add_rounding<ToInteger::down>(r, "rmi");
  add_rounding<ToInteger::up>(r, "rpi");
  r.add("cvt.sat.f32.f32", convert<float, float, saturate>);
  r.add("cvt.sat.ftz.f32.f32", convert<float, float, [](float x) { return saturate(flush(x)); }>);
  r.add("cvt.ftz.f32.f32", convert<float, float, flush>);
  r.add("cvt.f64.f32", convert<double, float, [](float x) { return static_cast<double>(x); }>);
  r.add("cvt.rn.f32.f64", convert<float, double, [](double x) { return static_cast<float>(x); }>);
  r.add("cvt.rna.tf32.f32", convert<uint32_t, float, round_to_tf32>);
}

}  // namespace emulation
