// ld and st.
#include <cstring>

#include "access.h"
#include "registry.h"

namespace emulation {
namespace {

// The places of the lanes of one access, and their cost.
struct Places {
  uint64_t addresses[kLanes];
  uint32_t shared = 0, global = 0;

  void add(int lane, Place place) {
    addresses[lane] = place.address;
    if (place.space == Space::shared) shared |= 1u << lane;
    if (place.space == Space::global) global |= 1u << lane;
  }
  void count(Counters& counters, int bytes) const {
    if (shared != 0) counters.count_shared(addresses, shared, bytes);
    if (global != 0) counters.count_global(addresses, global, bytes);
  }
};

// Source 0: the address, to which immediate 0 is added. A vector is one access. A destination register wider than T
// holds the number extended.
template <class T, Space S>
void load(Context& c) {
  const int elements = static_cast<int>(c.instruction.destinations.size());
  const int bytes = elements * static_cast<int>(sizeof(T));
  Places places;
  each_lane_in_order(c.lanes, [&](int lane) {
    const Place place = locate(S, c.source_bits(0, lane) + c.immediate(0));
    const std::byte* from = reach(c, place, bytes, Access::load, lane);
    T values[16 / sizeof(T)];
    std::memcpy(values, from, bytes);
    for (int i = 0; i < elements; ++i) c.set_bits(i, lane, to_bits(values[i]));
    places.add(lane, place);
  });
  places.count(c.machine.counters, bytes);
}

// Sources: the address, then the elements.
template <class T, Space S>
void store(Context& c) {
  const int elements = static_cast<int>(c.instruction.sources.size()) - 1;
  const int bytes = elements * static_cast<int>(sizeof(T));
  Places places;
  each_lane_in_order(c.lanes, [&](int lane) {
    const Place place = locate(S, c.source_bits(0, lane) + c.immediate(0));
    T values[16 / sizeof(T)];
    for (int i = 0; i < elements; ++i) values[i] = from_bits<T>(c.source_bits(1 + i, lane));
    std::byte* to = reach(c, place, bytes, Access::store, lane, values);
    std::memcpy(to, values, bytes);
    places.add(lane, place);
  });
  places.count(c.machine.counters, bytes);
}

template <class T>
void add_type(Registry& r, const std::string& type) {
  r.add("ld." + type, load<T, Space::generic>);
  r.add("ld.global." + type, load<T, Space::global>);
  r.add("ld.shared." + type, load<T, Space::shared>);
  r.add("ld.param." + type, load<T, Space::parameter>);
  r.add("st." + type, store<T, Space::generic>);
  r.add("st.global." + type, store<T, Space::global>);
  r.add("st.shared." + type, store<T, Space::shared>);
}

}  // namespace

void add_memory(Registry& r) {
  add_type<uint8_t>(r, "u8");
  add_type<int8_t>(r, "s8");
  add_type<uint16_t>(r, "u16");
  add_type<int16_t>(r, "s16");
  add_type<uint32_t>(r, "u32");
  add_type<int32_t>(r, "s32");
  add_type<uint64_t>(r, "u64");
}

}  // namespace emulation
