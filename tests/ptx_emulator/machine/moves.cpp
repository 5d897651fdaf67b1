// Moves, selections, packing, and addresses between windows.
#include "registry.h"

namespace emulation {
namespace {

void move(Context& c) {
  each_lane(c.lanes, [&](int lane) { c.set_bits(0, lane, c.source_bits(0, lane)); });
}

// Sources: a, b, predicate.
template <class T>
void select(Context& c) {
  const auto d = c.destination<T>(0);
  const auto a = c.source<T>(0), b = c.source<T>(1);
  const auto p = c.source<uint32_t>(2);
  each_lane(c.lanes, [&](int lane) { d.set(lane, p[lane] != 0 ? a[lane] : b[lane]); });
}

// Immediate 0: the bits of each part, the first of which is the lowest.
void pack(Context& c) {
  const int bits = static_cast<int>(c.immediate(0));
  const uint64_t part = ~0ull >> (64 - bits);
  each_lane(c.lanes, [&](int lane) {
    uint64_t whole = 0;
    for (size_t i = 0; i < c.instruction.sources.size(); ++i) whole |= (c.source_bits(i, lane) & part) << (bits * i);
    c.set_bits(0, lane, whole);
  });
}

void unpack(Context& c) {
  const int bits = static_cast<int>(c.immediate(0));
  const uint64_t part = ~0ull >> (64 - bits);
  each_lane(c.lanes, [&](int lane) {
    const uint64_t whole = c.source_bits(0, lane);
    for (size_t i = 0; i < c.instruction.destinations.size(); ++i) c.set_bits(i, lane, whole >> (bits * i) & part);
  });
}

template <int64_t Offset>
void shift_window(Context& c) {
  each_lane(c.lanes, [&](int lane) { c.set_bits(0, lane, c.source_bits(0, lane) + Offset); });
}

void active_mask(Context& c) {
  const auto d = c.destination<uint32_t>(0);
  const uint32_t lanes = c.lanes;
  each_lane(lanes, [&](int lane) { d.set(lane, lanes); });
}

}  // namespace

void add_moves(Registry& r) {
  r.add("mov", move);
  r.add("pack", pack);
  r.add("unpack", unpack);
  r.add("selp.b16", select<uint16_t>);
  r.add("selp.b32", select<uint32_t>);
  r.add("selp.b64", select<uint64_t>);
  r.add("cvta.global", move);
  r.add("cvta.to.global", move);
  r.add("cvta.shared", shift_window<static_cast<int64_t>(kSharedWindow)>);
  r.add("cvta.to.shared", shift_window<-static_cast<int64_t>(kSharedWindow)>);
  r.add("cvta.param", shift_window<static_cast<int64_t>(kParameterWindow)>);
  r.add("cvta.to.param", shift_window<-static_cast<int64_t>(kParameterWindow)>);
  r.add("activemask", active_mask);
}

}  // namespace emulation
