// Loads and stores of one lane, in whichever memory its address lies.
#pragma once
#include "context.h"
#include "fault.h"

namespace emulation {

enum class Space { generic, global, shared, parameter };

inline bool in_window(uint64_t address, uint64_t window) { return address - window < kWindowBytes; }

// Where an address lies: its space, and the address within it.
struct Place {
  Space space;
  uint64_t address;
};

inline Place locate(Space space, uint64_t address) {
  if (space == Space::shared) return {space, address & 0xffffffffu};
  if (space != Space::generic) return {space, address};
  if (in_window(address, kSharedWindow)) return {Space::shared, address - kSharedWindow};
  if (in_window(address, kParameterWindow)) return {Space::parameter, address - kParameterWindow};
  return {Space::global, address};
}

// The bytes behind an address, checked. `value`: what a store is about to write.
inline std::byte* reach(Context& c, Place place, int bytes, Access access, int lane, const void* value = nullptr) {
  Machine& machine = c.machine;
  const int thread = c.warp.thread(lane);
  switch (place.space) {
    case Space::shared: {
      const uint32_t address = static_cast<uint32_t>(place.address);
      if (access == Access::load) return machine.shared.load(address, bytes, thread);
      if (access == Access::store) return machine.shared.store(address, bytes, thread, value);
      return machine.shared.atomic(address, bytes, thread);
    }
    case Space::parameter:
      if (access != Access::load) throw Fault("read-only", "writes a kernel parameter", thread);
      if (place.address % bytes != 0) throw Fault("misaligned", "a kernel parameter", thread);
      if (place.address + bytes > machine.parameters.size()) throw Fault("out of bounds", "a kernel parameter", thread);
      return machine.parameters.data() + place.address;
    default:
      return machine.global.access(place.address, bytes, access, machine.block, thread);
  }
}

}  // namespace emulation
