// setp: comparisons into predicates, combined with another predicate.
#include "registry.h"

namespace emulation {
namespace {

// What to do with a comparison and the predicate after it: immediate 0 of the instruction.
enum class Combine { none, conjunction, disjunction, difference };

bool combined(Combine how, bool result, bool other) {
  switch (how) {
    case Combine::none:
      return result;
    case Combine::conjunction:
      return result && other;
    case Combine::disjunction:
      return result || other;
    case Combine::difference:
      return result != other;
  }
  return false;
}

// Destinations: p, and q for the opposite result. Sources: a, b, and the predicate to combine with; immediate 1 negates
// that. View: the number that a register's value means.
template <class T, auto F, auto View = [](T x) { return x; }>
void compare(Context& c) {
  const auto a = c.source<T>(0), b = c.source<T>(1);
  const auto how = static_cast<Combine>(c.immediate(0));
  const bool negated = c.immediate(1) != 0;
  const auto p = c.destination<uint32_t>(0);
  const bool has_opposite = c.instruction.destinations.size() > 1;
  each_lane(c.lanes, [&](int lane) {
    const bool result = F(View(a[lane]), View(b[lane]));
    const bool other = how != Combine::none && (c.source<uint32_t>(2)[lane] != 0) != negated;
    if (has_opposite) c.destination<uint32_t>(1).set(lane, combined(how, !result, other));
    p.set(lane, combined(how, result, other));
  });
}

template <class T>
void add_equality(Registry& r, const std::string& type) {
  r.add("setp.eq." + type, compare<T, [](T a, T b) { return a == b; }>);
  r.add("setp.ne." + type, compare<T, [](T a, T b) { return a != b; }>);
}

template <class T>
void add_order(Registry& r, const std::string& type) {
  r.add("setp.lt." + type, compare<T, [](T a, T b) { return a < b; }>);
  r.add("setp.le." + type, compare<T, [](T a, T b) { return a <= b; }>);
  r.add("setp.gt." + type, compare<T, [](T a, T b) { return b < a; }>);
  r.add("setp.ge." + type, compare<T, [](T a, T b) { return b <= a; }>);
}

// lo, ls, hi, hs: unsigned order.
template <class T>
void add_unsigned_order(Registry& r, const std::string& type) {
  r.add("setp.lo." + type, compare<T, [](T a, T b) { return a < b; }>);
  r.add("setp.ls." + type, compare<T, [](T a, T b) { return a <= b; }>);
  r.add("setp.hi." + type, compare<T, [](T a, T b) { return b < a; }>);
  r.add("setp.hs." + type, compare<T, [](T a, T b) { return b <= a; }>);
}

// View gives a float or double.
template <class T, auto View>
void add_float(Registry& r, const std::string& type) {
  using F = decltype(View(T{}));
  r.add("setp.eq." + type, compare<T, [](F a, F b) { return a == b; }, View>);
  r.add("setp.ne." + type, compare<T, [](F a, F b) { return a < b || b < a; }, View>);  // unlike !=, false for NaN
  r.add("setp.lt." + type, compare<T, [](F a, F b) { return a < b; }, View>);
  r.add("setp.le." + type, compare<T, [](F a, F b) { return a <= b; }, View>);
  r.add("setp.gt." + type, compare<T, [](F a, F b) { return b < a; }, View>);
  r.add("setp.ge." + type, compare<T, [](F a, F b) { return b <= a; }, View>);
  // The unordered ones are true for NaN.
  r.add("setp.equ." + type, compare<T, [](F a, F b) { return !(a < b || b < a); }, View>);
  r.add("setp.neu." + type, compare<T, [](F a, F b) { return !(a == b); }, View>);
  r.add("setp.ltu." + type, compare<T, [](F a, F b) { return !(b <= a); }, View>);
  r.add("setp.leu." + type, compare<T, [](F a, F b) { return !(b < a); }, View>);
  r.add("setp.gtu." + type, compare<T, [](F a, F b) { return !(a <= b); }, View>);
  r.add("setp.geu." + type, compare<T, [](F a, F b) { return !(a < b); }, View>);
  r.add("setp.num." + type, compare<T, [](F a, F b) { return a == a && b == b; }, View>);
  r.add("setp.nan." + type, compare<T, [](F a, F b) { return a != a || b != b; }, View>);
}

template <class T>
void add_unsigned(Registry& r, const std::string& type) {
  add_equality<T>(r, type);
  add_order<T>(r, type);
  add_unsigned_order<T>(r, type);
}

template <class T>
void add_signed(Registry& r, const std::string& type) {
  add_equality<T>(r, type);
  add_order<T>(r, type);
}

}  // namespace

void add_comparisons(Registry& r) {
  add_unsigned<uint16_t>(r, "u16");
  add_unsigned<uint32_t>(r, "u32");
  add_unsigned<uint64_t>(r, "u64");
  add_signed<int16_t>(r, "s16");
  add_signed<int32_t>(r, "s32");
  add_signed<int64_t>(r, "s64");
  add_equality<uint16_t>(r, "b16");
  add_equality<uint32_t>(r, "b32");
  add_equality<uint64_t>(r, "b64");
  add_float<float, [](float x) { return x; }>(r, "f32");
  add_float<float, [](float x) { return flush(x); }>(r, "ftz.f32");
  add_float<double, [](double x) { return x; }>(r, "f64");
  add_float<Half, [](Half x) { return to_float(x); }>(r, "f16");
  add_float<BFloat16, [](BFloat16 x) { return to_float(x); }>(r, "bf16");
}

}  // namespace emulation
