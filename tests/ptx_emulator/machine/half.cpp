// float16 and bfloat16 arithmetic, alone and in pairs, rounded once.
#include "registry.h"

namespace emulation {
namespace {

// F of a register's one or two values.
template <class T, auto F>
void unary_pair(Context& c) {
  const auto d = c.destination<Pair<T>>(0);
  const auto a = c.source<Pair<T>>(0);
  each_lane(c.lanes, [&](int lane) { d.set(lane, {F(a[lane].low), F(a[lane].high)}); });
}
template <class T, auto F>
void binary_pair(Context& c) {
  const auto d = c.destination<Pair<T>>(0);
  const auto a = c.source<Pair<T>>(0), b = c.source<Pair<T>>(1);
  each_lane(c.lanes, [&](int lane) {
    const Pair<T> x = a[lane], y = b[lane];
    d.set(lane, {F(x.low, y.low), F(x.high, y.high)});
  });
}
template <class T, auto F>
void ternary_pair(Context& c) {
  const auto d = c.destination<Pair<T>>(0);
  const auto a = c.source<Pair<T>>(0), b = c.source<Pair<T>>(1), e = c.source<Pair<T>>(2);
  each_lane(c.lanes, [&](int lane) {
    const Pair<T> x = a[lane], y = b[lane], z = e[lane];
    d.set(lane, {F(x.low, y.low, z.low), F(x.high, y.high, z.high)});
  });
}

template <class T, auto F>
void add1(Registry& r, const std::string& op, const std::string& type) {
  r.add(op + "." + type, unary<T, T, F>);
  r.add(op + "." + type + "x2", unary_pair<T, F>);
}
template <class T, auto F>
void add2(Registry& r, const std::string& op, const std::string& type) {
  r.add(op + "." + type, binary<T, T, F>);
  r.add(op + "." + type + "x2", binary_pair<T, F>);
}

// The float operations round to at least twice the bits and two more, so that rounding again is harmless.
template <class T, auto F>
T rounded(T a, T b) {
  return round_to<T>(F(to_float(a), to_float(b)));
}
template <class T>
T multiply_add(T a, T b, T c) {
  return round_to<T>(round_to_odd(exact_sum(static_cast<double>(to_float(a)) * to_float(b), to_float(c))));
}

template <bool Smaller, bool KeepNan>
float extreme(float a, float b) {
  if (KeepNan && (a != a || b != b)) return std::numeric_limits<float>::quiet_NaN();
  if (a != a) return b;
  if (b != b) return a;
  if (a == b) return std::signbit(a) == Smaller ? a : b;
  return (a < b) == Smaller ? a : b;
}

template <class T>
void add_type(Registry& r, const std::string& type) {
  add2<T, rounded<T, [](float a, float b) { return a + b; }>>(r, "add", type);
  add2<T, rounded<T, [](float a, float b) { return a - b; }>>(r, "sub", type);
  add2<T, rounded<T, [](float a, float b) { return a * b; }>>(r, "mul", type);
  add2<T, rounded<T, extreme<true, false>>>(r, "min", type);
  add2<T, rounded<T, extreme<false, false>>>(r, "max", type);
  add2<T, rounded<T, extreme<true, true>>>(r, "min.NaN", type);
  add2<T, rounded<T, extreme<false, true>>>(r, "max.NaN", type);
  add1<T, [](T a) { return T{static_cast<uint16_t>(a.bits ^ 0x8000)}; }>(r, "neg", type);
  add1<T, [](T a) { return T{static_cast<uint16_t>(a.bits & 0x7fff)}; }>(r, "abs", type);
  add1<T, [](T a) { return round_to<T>(std::exp2(to_float(a))); }>(r, "ex2", type);
  add1<T, [](T a) { return round_to<T>(std::tanh(to_float(a))); }>(r, "tanh", type);
  r.add("fma." + type, ternary<T, T, multiply_add<T>>);
  r.add("fma." + type + "x2", ternary_pair<T, multiply_add<T>>);
}

}  // namespace

void add_half(Registry& r) {
  add_type<Half>(r, "f16");
  add_type<BFloat16>(r, "bf16");
}

}  // namespace emulation
