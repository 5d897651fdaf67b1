// Integer arithmetic.
#include <algorithm>
#include <limits>

#include "registry.h"

namespace emulation {
namespace {

template <class T>
using Unsigned = std::make_unsigned_t<T>;

// C++ leaves signed overflow and some quotients undefined; a GPU wraps, and gives all ones for a division by zero.
template <class T>
T divide(T a, T b) {
  if (b == 0) return static_cast<T>(~T{0});
  if (std::is_signed_v<T> && b == static_cast<T>(-1))
    return static_cast<T>(Unsigned<T>{0} - static_cast<Unsigned<T>>(a));
  return static_cast<T>(a / b);
}

template <class T>
T remainder(T a, T b) {
  if (b == 0) return a;
  if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
  return static_cast<T>(a % b);
}

// Through 64 unsigned bits, where products of 16-bit values do not overflow as int.
template <class T>
T wrapping_product(T a, T b) {
  return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
}

template <class T>
T high_product(T a, T b) {
  using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  return static_cast<T>((static_cast<Wide>(a) * static_cast<Wide>(b)) >> (8 * sizeof(T)));
}

template <class Wide, class T>
Wide wide_product(T a, T b) {
  return static_cast<Wide>(static_cast<Wide>(a) * static_cast<Wide>(b));
}

template <class T>
T wrapping_sum(T a, T b) {
  return static_cast<T>(static_cast<Unsigned<T>>(a) + static_cast<Unsigned<T>>(b));
}

template <class T>
T negative(T a) {
  return static_cast<T>(Unsigned<T>{0} - static_cast<Unsigned<T>>(a));
}

template <class T>
void add_all(Registry& r, const std::string& type) {
  r.add("add." + type, binary<T, T, [](T a, T b) { return wrapping_sum(a, b); }>);
  r.add("sub." + type, binary<T, T, [](T a, T b) { return wrapping_sum(a, negative(b)); }>);
  r.add("mul.lo." + type, binary<T, T, [](T a, T b) { return wrapping_product(a, b); }>);
  r.add("mul.hi." + type, binary<T, T, [](T a, T b) { return high_product(a, b); }>);
  r.add("mad.lo." + type, ternary<T, T, [](T a, T b, T c) { return wrapping_sum(wrapping_product(a, b), c); }>);
  r.add("mad.hi." + type, ternary<T, T, [](T a, T b, T c) { return wrapping_sum(high_product(a, b), c); }>);
  r.add("div." + type, binary<T, T, [](T a, T b) { return divide(a, b); }>);
  r.add("rem." + type, binary<T, T, [](T a, T b) { return remainder(a, b); }>);
  r.add("min." + type, binary<T, T, [](T a, T b) { return std::min(a, b); }>);
  r.add("max." + type, binary<T, T, [](T a, T b) { return std::max(a, b); }>);
}

template <class T>
void add_signed(Registry& r, const std::string& type) {
  r.add("neg." + type, unary<T, T, [](T a) { return negative(a); }>);
  r.add("abs." + type, unary<T, T, [](T a) { return a < 0 ? negative(a) : a; }>);
}

template <class Wide, class T>
void multiply_add_wide(Context& c) {
  const auto d = c.destination<Wide>(0);
  const auto a = c.source<T>(0), b = c.source<T>(1);
  const auto e = c.source<Wide>(2);
  each_lane(c.lanes, [&](int lane) { d.set(lane, wrapping_sum(wide_product<Wide>(a[lane], b[lane]), e[lane])); });
}

template <class Wide, class T>
void add_wide(Registry& r, const std::string& type) {
  r.add("mul.wide." + type, binary<Wide, T, [](T a, T b) { return wide_product<Wide>(a, b); }>);
  r.add("mad.wide." + type, multiply_add_wide<Wide, T>);
}

}  // namespace

void add_integer(Registry& r) {
  add_all<uint16_t>(r, "u16");
  add_all<int16_t>(r, "s16");
  add_all<uint32_t>(r, "u32");
  add_all<int32_t>(r, "s32");
  add_all<uint64_t>(r, "u64");
  add_all<int64_t>(r, "s64");
  add_signed<int16_t>(r, "s16");
  add_signed<int32_t>(r, "s32");
  add_signed<int64_t>(r, "s64");
  r.add("min.relu.s32", binary<int32_t, int32_t, [](int32_t a, int32_t b) { return std::max(std::min(a, b), 0); }>);
  r.add("max.relu.s32", binary<int32_t, int32_t, [](int32_t a, int32_t b) { return std::max({a, b, 0}); }>);
  add_wide<uint32_t, uint16_t>(r, "u16");
  add_wide<int32_t, int16_t>(r, "s16");
  add_wide<uint64_t, uint32_t>(r, "u32");
  add_wide<int64_t, int32_t>(r, "s32");
}

}  // namespace emulation
