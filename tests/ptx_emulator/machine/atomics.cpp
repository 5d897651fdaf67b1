// atom and red: one lane after the other.
#include <algorithm>
#include <cstring>

#include "access.h"
#include "registry.h"

namespace emulation {
namespace {

// Sources: address, operand. Keeps the old value where there is a destination.
template <class T, Space S, auto F>
void update(Context& c) {
  uint64_t addresses[kLanes];
  uint32_t global = 0;
  each_lane_in_order(c.lanes, [&](int lane) {
    const Place place = locate(S, c.source_bits(0, lane) + c.immediate(0));
    std::byte* at = reach(c, place, sizeof(T), Access::atomic, lane);
    T old;
    std::memcpy(&old, at, sizeof(T));
    const T changed = F(c, lane, old, from_bits<T>(c.source_bits(1, lane)));
    std::memcpy(at, &changed, sizeof(T));
    if (!c.instruction.destinations.empty()) c.set_bits(0, lane, to_bits(old));
    addresses[lane] = place.address;
    if (place.space == Space::global) global |= 1u << lane;
  });
  if (global != 0) c.machine.counters.count_global(addresses, global, sizeof(T));
}

template <class T, auto F>
void add(Registry& r, const std::string& op, const std::string& type) {
  r.add("atom." + op + "." + type, update<T, Space::generic, F>);
  r.add("atom.global." + op + "." + type, update<T, Space::global, F>);
  r.add("atom.shared." + op + "." + type, update<T, Space::shared, F>);
}

template <class T>
void add_order(Registry& r, const std::string& type) {
  add<T, [](Context&, int, T old, T operand) { return std::min(old, operand); }>(r, "min", type);
  add<T, [](Context&, int, T old, T operand) { return std::max(old, operand); }>(r, "max", type);
}

template <class T>
void add_sum(Registry& r, const std::string& type) {
  add<T, [](Context&, int, T old, T operand) { return static_cast<T>(old + operand); }>(r, "add", type);
}

template <class T>
void add_bits(Registry& r, const std::string& type) {
  add<T, [](Context&, int, T old, T operand) { return old & operand; }>(r, "and", type);
  add<T, [](Context&, int, T old, T operand) { return old | operand; }>(r, "or", type);
  add<T, [](Context&, int, T old, T operand) { return old ^ operand; }>(r, "xor", type);
  add<T, [](Context&, int, T, T operand) { return operand; }>(r, "exch", type);
  add<T, [](Context& c, int lane, T old, T expected) {
    return old == expected ? from_bits<T>(c.source_bits(2, lane)) : old;
  }>(r, "cas", type);
}

template <class T>
void add_half_sum(Registry& r, const std::string& type) {
  add<T, [](Context&, int, T old, T operand) { return round_to<T>(to_float(old) + to_float(operand)); }>(r, "add",
                                                                                                         type);
  add<Pair<T>, [](Context&, int, Pair<T> old, Pair<T> operand) {
    return Pair<T>{round_to<T>(to_float(old.low) + to_float(operand.low)),
                   round_to<T>(to_float(old.high) + to_float(operand.high))};
  }>(r, "add", type + "x2");
}

}  // namespace

void add_atomics(Registry& r) {
  add_sum<uint32_t>(r, "u32");
  add_sum<uint32_t>(r, "s32");
  add_sum<uint64_t>(r, "u64");
  add_sum<float>(r, "f32");
  add_sum<double>(r, "f64");
  add_half_sum<Half>(r, "f16");
  add_half_sum<BFloat16>(r, "bf16");
  add_order<uint32_t>(r, "u32");
  add_order<int32_t>(r, "s32");
  add_order<uint64_t>(r, "u64");
  add_order<int64_t>(r, "s64");
  add_bits<uint32_t>(r, "b32");
  add_bits<uint64_t>(r, "b64");
}

}  // namespace emulation
