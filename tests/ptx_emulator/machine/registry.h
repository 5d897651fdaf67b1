// Canonical instruction names and what executes them: an instruction with no entry is refused.
#pragma once
#include <string>
#include <unordered_map>

#include "context.h"

namespace emulation {

struct Entry {
  Handler handler = nullptr;
  Control control = Control::plain;
};

class Registry {
 public:
  void add(const std::string& name, Handler handler, Control control = Control::plain);
  const Entry* find(const std::string& name) const;

 private:
  std::unordered_map<std::string, Entry> entries_;
};

// All instructions there are.
const Registry& registry();

// One topic each.
void add_integer(Registry& r);
void add_bits(Registry& r);
void add_floating(Registry& r);
void add_half(Registry& r);
void add_conversions(Registry& r);
void add_comparisons(Registry& r);
void add_moves(Registry& r);
void add_memory(Registry& r);
void add_atomics(Registry& r);
void add_copies(Registry& r);
void add_collectives(Registry& r);
void add_matrices(Registry& r);
void add_warpgroup_matrices(Registry& r);
void add_control(Registry& r);

// f(a), f(a, b), f(a, b, c) of every lane.
template <class Result, class T, auto F>
void unary(Context& c) {
  const auto d = c.destination<Result>(0);
  const auto a = c.source<T>(0);
  each_lane(c.lanes, [&](int lane) { d.set(lane, F(a[lane])); });
}

template <class Result, class T, auto F>
void binary(Context& c) {
  const auto d = c.destination<Result>(0);
  const auto a = c.source<T>(0), b = c.source<T>(1);
  each_lane(c.lanes, [&](int lane) { d.set(lane, F(a[lane], b[lane])); });
}

template <class Result, class T, auto F>
void ternary(Context& c) {
  const auto d = c.destination<Result>(0);
  const auto a = c.source<T>(0), b = c.source<T>(1), e = c.source<T>(2);
  each_lane(c.lanes, [&](int lane) { d.set(lane, F(a[lane], b[lane], e[lane])); });
}

}  // namespace emulation
