// Exchanges between the lanes of a warp. The scheduler has brought together the lanes of the member mask.
#include <algorithm>

#include "fault.h"
#include "registry.h"

namespace emulation {
namespace {

enum class Shuffle { up, down, butterfly, index };

// The lane that `lane` reads, and whether it lies within bounds. `clamp`: its low 5 bits bound the lane, bits 8 to 12
// say which bits of a lane name its segment.
template <Shuffle Mode>
bool shuffle_source(int lane, uint32_t b, uint32_t clamp, int& from) {
  const int step = b & 31, bound = clamp & 31, segment = clamp >> 8 & 31;
  const int last = (lane & segment) | (bound & ~segment);
  switch (Mode) {
    case Shuffle::up:
      from = lane - step;
      return from >= last;
    case Shuffle::down:
      from = lane + step;
      return from <= last;
    case Shuffle::butterfly:
      from = lane ^ step;
      return from <= last;
    case Shuffle::index:
      from = (lane & segment) | (step & ~segment);
      return from <= last;
  }
  return false;
}

// Sources: a, b, clamp, member mask. Destinations: the value, and whether the source lane was within bounds.
template <Shuffle Mode>
void shuffle(Context& c) {
  uint32_t values[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) values[lane] = c.source<uint32_t>(0)[lane];
  const bool wants_inside = c.instruction.destinations.size() > 1;
  // Destinations are written after all sources are read: b may be the same register.
  uint32_t results[kLanes];
  bool inside[kLanes];
  each_lane_in_order(c.lanes, [&](int lane) {
    int from = lane;
    inside[lane] = shuffle_source<Mode>(lane, c.source<uint32_t>(1)[lane], c.source<uint32_t>(2)[lane], from);
    if (!inside[lane]) from = lane;
    if ((c.lanes >> from & 1) == 0) {
      throw Fault("divergent collective", "shfl reads lane " + std::to_string(from) + ", which takes no part",
                  c.warp.thread(lane));
    }
    results[lane] = values[from];
  });
  each_lane_in_order(c.lanes, [&](int lane) {
    c.destination<uint32_t>(0).set(lane, results[lane]);
    if (wants_inside) c.destination<uint32_t>(1).set(lane, inside[lane]);
  });
}

uint32_t ballot(const Context& c) {
  const bool negated = c.immediate(0) != 0;
  uint32_t votes = 0;
  each_lane_in_order(c.lanes, [&](int lane) {
    votes |= static_cast<uint32_t>((c.source<uint32_t>(0)[lane] != 0) != negated) << lane;
  });
  return votes;
}

// Sources: predicate, member mask. Immediate 0 negates the predicate.
template <auto F>
void vote(Context& c) {
  const uint32_t result = F(ballot(c), c.lanes);
  each_lane(c.lanes, [&](int lane) { c.destination<uint32_t>(0).set(lane, result); });
}

template <class T>
void match_any(Context& c) {
  T values[kLanes];
  each_lane_in_order(c.lanes, [&](int lane) { values[lane] = c.source<T>(0)[lane]; });
  each_lane_in_order(c.lanes, [&](int lane) {
    uint32_t equal = 0;
    each_lane_in_order(c.lanes,
                       [&](int other) { equal |= static_cast<uint32_t>(values[other] == values[lane]) << other; });
    c.destination<uint32_t>(0).set(lane, equal);
  });
}

// Destinations: the member mask or 0, and whether all values are equal.
template <class T>
void match_all(Context& c) {
  const T first = c.source<T>(0)[std::countr_zero(c.lanes)];
  bool equal = true;
  each_lane_in_order(c.lanes, [&](int lane) { equal = equal && c.source<T>(0)[lane] == first; });
  each_lane_in_order(c.lanes, [&](int lane) {
    c.destination<uint32_t>(0).set(lane, equal ? c.lanes : 0);
    if (c.instruction.destinations.size() > 1) c.destination<uint32_t>(1).set(lane, equal);
  });
}

template <class T, auto F>
void reduce(Context& c) {
  T result = c.source<T>(0)[std::countr_zero(c.lanes)];
  each_lane_in_order(c.lanes & (c.lanes - 1), [&](int lane) { result = F(result, c.source<T>(0)[lane]); });
  each_lane(c.lanes, [&](int lane) { c.destination<T>(0).set(lane, result); });
}

// One lane of the members, the lowest. Destinations: its number, and whether this is the lane.
void elect(Context& c) {
  const uint32_t leader = std::countr_zero(c.lanes);
  each_lane_in_order(c.lanes, [&](int lane) {
    c.destination<uint32_t>(0).set(lane, leader);
    c.destination<uint32_t>(1).set(lane, lane == static_cast<int>(leader));
  });
}

}  // namespace

void add_collectives(Registry& r) {
  const auto add = [&](const std::string& name, Handler handler) { r.add(name, handler, Control::collective); };
  add("shfl.up", shuffle<Shuffle::up>);
  add("shfl.down", shuffle<Shuffle::down>);
  add("shfl.bfly", shuffle<Shuffle::butterfly>);
  add("shfl.idx", shuffle<Shuffle::index>);
  add("vote.ballot", vote<[](uint32_t votes, uint32_t) { return votes; }>);
  add("vote.any", vote<[](uint32_t votes, uint32_t) { return uint32_t{votes != 0}; }>);
  add("vote.all", vote<[](uint32_t votes, uint32_t lanes) { return uint32_t{votes == lanes}; }>);
  add("vote.uni", vote<[](uint32_t votes, uint32_t lanes) { return uint32_t{votes == 0 || votes == lanes}; }>);
  add("match.any.b32", match_any<uint32_t>);
  add("match.any.b64", match_any<uint64_t>);
  add("match.all.b32", match_all<uint32_t>);
  add("match.all.b64", match_all<uint64_t>);
  add("redux.add.u32", reduce<uint32_t, [](uint32_t a, uint32_t b) { return a + b; }>);
  add("redux.add.s32", reduce<uint32_t, [](uint32_t a, uint32_t b) { return a + b; }>);
  add("redux.min.u32", reduce<uint32_t, [](uint32_t a, uint32_t b) { return std::min(a, b); }>);
  add("redux.max.u32", reduce<uint32_t, [](uint32_t a, uint32_t b) { return std::max(a, b); }>);
  add("redux.min.s32", reduce<int32_t, [](int32_t a, int32_t b) { return std::min(a, b); }>);
  add("redux.max.s32", reduce<int32_t, [](int32_t a, int32_t b) { return std::max(a, b); }>);
  add("redux.and.b32", reduce<uint32_t, [](uint32_t a, uint32_t b) { return a & b; }>);
  add("redux.or.b32", reduce<uint32_t, [](uint32_t a, uint32_t b) { return a | b; }>);
  add("redux.xor.b32", reduce<uint32_t, [](uint32_t a, uint32_t b) { return a ^ b; }>);
  add("elect", elect);
}

}  // namespace emulation
