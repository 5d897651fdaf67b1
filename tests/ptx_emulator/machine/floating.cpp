// float32 and float64 arithmetic. Approximate instructions give the rounded exact result.
#include "registry.h"

namespace emulation {
namespace {

template <bool Ftz>
float flushed(float x) {
  return Ftz ? flush(x) : x;
}

// A function of floats between flushes, with denormals kept or not.
template <auto F, bool Ftz>
float flushing1(float a) {
  return flushed<Ftz>(F(flushed<Ftz>(a)));
}
template <auto F, bool Ftz>
float flushing2(float a, float b) {
  return flushed<Ftz>(F(flushed<Ftz>(a), flushed<Ftz>(b)));
}
template <auto F, bool Ftz>
float flushing3(float a, float b, float c) {
  return flushed<Ftz>(F(flushed<Ftz>(a), flushed<Ftz>(b), flushed<Ftz>(c)));
}

template <auto F>
void add1(Registry& r, const std::string& op) {
  r.add(op + ".f32", unary<float, float, flushing1<F, false>>);
  r.add(op + ".ftz.f32", unary<float, float, flushing1<F, true>>);
}
template <auto F>
void add2(Registry& r, const std::string& op) {
  r.add(op + ".f32", binary<float, float, flushing2<F, false>>);
  r.add(op + ".ftz.f32", binary<float, float, flushing2<F, true>>);
}
template <auto F>
void add3(Registry& r, const std::string& op) {
  r.add(op + ".f32", ternary<float, float, flushing3<F, false>>);
  r.add(op + ".ftz.f32", ternary<float, float, flushing3<F, true>>);
}

// A number wins over NaN, and -0 is below +0.
template <class T>
T smaller(T a, T b) {
  if (a != a) return b;
  if (b != b) return a;
  if (a == b) return std::signbit(a) ? a : b;
  return a < b ? a : b;
}
template <class T>
T larger(T a, T b) {
  if (a != a) return b;
  if (b != b) return a;
  if (a == b) return std::signbit(a) ? b : a;
  return a > b ? a : b;
}
// The variants that hand NaN on.
float smaller_or_nan(float a, float b) { return a != a || b != b ? std::bit_cast<float>(0x7fffffffu) : smaller(a, b); }
float larger_or_nan(float a, float b) { return a != a || b != b ? std::bit_cast<float>(0x7fffffffu) : larger(a, b); }

float saturate(float x) { return x > 0 ? std::fmin(x, 1.0f) : 0.0f; }  // NaN becomes 0

float flip_sign(float a) { return std::bit_cast<float>(std::bit_cast<uint32_t>(a) ^ 0x80000000u); }
float clear_sign(float a) { return std::bit_cast<float>(std::bit_cast<uint32_t>(a) & 0x7fffffffu); }

// Directed rounding of the exact value; products of floats are exact as doubles.
template <auto Round>
void add_directed(Registry& r, const std::string& mode) {
  add2<[](float a, float b) { return Round(exact_sum(a, b)); }>(r, "add." + mode);
  add2<[](float a, float b) { return Round(exact_sum(a, -static_cast<double>(b))); }>(r, "sub." + mode);
  add2<[](float a, float b) { return Round(Exact{static_cast<double>(a) * b, 0}); }>(r, "mul." + mode);
  add3<[](float a, float b, float c) { return Round(exact_sum(static_cast<double>(a) * b, c)); }>(r, "fma." + mode);
}

void add_double(Registry& r) {
  r.add("add.f64", binary<double, double, [](double a, double b) { return a + b; }>);
  r.add("sub.f64", binary<double, double, [](double a, double b) { return a - b; }>);
  r.add("mul.f64", binary<double, double, [](double a, double b) { return a * b; }>);
  r.add("div.f64", binary<double, double, [](double a, double b) { return a / b; }>);
  r.add("min.f64", binary<double, double, smaller<double>>);
  r.add("max.f64", binary<double, double, larger<double>>);
  r.add("fma.f64", ternary<double, double, [](double a, double b, double c) { return std::fma(a, b, c); }>);
  r.add("neg.f64", unary<double, double, [](double a) { return -a; }>);
  r.add("abs.f64", unary<double, double, [](double a) { return std::fabs(a); }>);
  r.add("sqrt.f64", unary<double, double, [](double a) { return std::sqrt(a); }>);
  r.add("rcp.f64", unary<double, double, [](double a) { return 1 / a; }>);
}

}  // namespace

void add_floating(Registry& r) {
  add2<[](float a, float b) { return a + b; }>(r, "add");
  add2<[](float a, float b) { return a - b; }>(r, "sub");
  add2<[](float a, float b) { return a * b; }>(r, "mul");
  add2<[](float a, float b) { return saturate(a + b); }>(r, "add.sat");
  add2<[](float a, float b) { return saturate(a - b); }>(r, "sub.sat");
  add2<[](float a, float b) { return saturate(a * b); }>(r, "mul.sat");
  add2<[](float a, float b) { return a / b; }>(r, "div");
  add2<smaller<float>>(r, "min");
  add2<larger<float>>(r, "max");
  add2<smaller_or_nan>(r, "min.NaN");
  add2<larger_or_nan>(r, "max.NaN");
  add3<[](float a, float b, float c) { return std::fma(a, b, c); }>(r, "fma");
  add3<[](float a, float b, float c) { return saturate(std::fma(a, b, c)); }>(r, "fma.sat");
  add1<flip_sign>(r, "neg");
  add1<clear_sign>(r, "abs");
  add1<[](float a) { return 1 / a; }>(r, "rcp");
  add1<[](float a) { return std::sqrt(a); }>(r, "sqrt");
  add1<[](float a) { return static_cast<float>(1 / std::sqrt(static_cast<double>(a))); }>(r, "rsqrt");
  add1<[](float a) { return std::exp2(a); }>(r, "ex2");
  add1<[](float a) { return std::log2(a); }>(r, "lg2");
  add1<[](float a) { return std::tanh(a); }>(r, "tanh");
  add1<[](float a) { return std::sin(a); }>(r, "sin");
  add1<[](float a) { return std::cos(a); }>(r, "cos");
  r.add("copysign.f32", binary<float, float, [](float a, float b) { return std::copysign(b, a); }>);
  add_directed<round_to_zero>(r, "rz");
  add_directed<round_down>(r, "rm");
  add_directed<round_up>(r, "rp");
  add_double(r);
}

}  // namespace emulation
