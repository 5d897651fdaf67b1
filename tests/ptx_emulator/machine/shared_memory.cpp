// Bounds, alignment, races and copies in flight of shared memory.
#include "shared_memory.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <string>

#include "fault.h"
#include "program.h"

namespace emulation {
namespace {

constexpr uint32_t kSeveralLanes = 32;
constexpr int kLaneBits = 6;
constexpr std::byte kPoison{0xff};  // NaN in every float format

std::string at(uint32_t address) { return "shared memory at byte " + std::to_string(address); }
std::string by(int thread) { return "thread " + std::to_string(thread); }

}  // namespace

SharedMemory::SharedMemory(int bytes, int granule, int warps, bool check_uninitialised)
    : size_(bytes),
      granule_(granule),
      granule_bits_(std::countr_zero(static_cast<uint32_t>(granule))),
      warps_(warps),
      check_uninitialised_(check_uninitialised),
      clocks_(warps),
      data_(bytes),
      granules_(bytes / granule + 1),
      reads_(granules_.size() * warps, 0) {}

void SharedMemory::start_block() {
  clocks_.start_block();
  std::fill(data_.begin(), data_.end(), kPoison);
  std::fill(granules_.begin(), granules_.end(), Granule{});
}

void SharedMemory::refuse_bounds(const char* kind, uint32_t address, int bytes, int thread) const {
  throw Fault(kind, std::to_string(bytes) + " bytes of " + at(address) + " of " + std::to_string(size_) + " bytes",
              thread);
}

// `bytes` is a power of two.
inline void SharedMemory::check_bounds(uint32_t address, int bytes, int thread) const {
  if ((address & (bytes - 1)) != 0) refuse_bounds("misaligned", address, bytes, thread);
  if (static_cast<uint64_t>(address) + bytes > static_cast<uint64_t>(size_)) {
    refuse_bounds("out of bounds", address, bytes, thread);
  }
}

inline void SharedMemory::check_not_in_flight(const Granule& granule, const char* what, uint32_t address,
                                              int thread) const {
  if (!granule.in_flight) return;
  refuse_in_flight(granule, what, address, thread);
}

void SharedMemory::refuse_in_flight(const Granule& granule, const char* what, uint32_t address, int thread) const {
  throw Fault(
      "copy in flight",
      std::string(what) + " " + at(address) + ", which a cp.async of " + by(granule.writer) + " may still be writing",
      thread);
}

void SharedMemory::refuse_read(const Granule& granule, uint32_t address, int thread) const {
  throw Fault("shared race",
              "reads " + at(address) + " which " + by(granule.writer) + " wrote, with no barrier in between", thread);
}

void SharedMemory::refuse_uninitialised(const char* what, uint32_t address, int thread) const {
  throw Fault("uninitialised", std::string(what) + " " + at(address) + ", which the block has not written", thread);
}

std::byte* SharedMemory::load(uint32_t address, int bytes, int thread) {
  check_bounds(address, bytes, thread);
  const int warp = thread / kLanes;
  const uint32_t now = clocks_.own(warp), lane = thread % kLanes;
  // Rounded outwards: a wgmma reads single elements, perhaps smaller than the granule.
  const uint32_t last = number(address + bytes - 1);
  for (uint32_t i = number(address); i <= last; ++i) {
    const Granule& granule = granules_[i];
    check_not_in_flight(granule, "reads", i * granule_, thread);
    if (granule.writer >= 0 && !clocks_.ordered(granule.writer, granule.clock, thread)) {
      refuse_read(granule, i * granule_, thread);
    }
    if (check_uninitialised_ && !granule.initialised) refuse_uninitialised("reads", i * granule_, thread);
    uint32_t& read = reads_[i * warps_ + warp];
    const bool again = read >> kLaneBits == now && (read & (kSeveralLanes * 2 - 1)) != lane;
    read = now << kLaneBits | (again ? kSeveralLanes : lane);
  }
  return raw(address);
}

std::byte* SharedMemory::store(uint32_t address, int bytes, int thread, const void* value) {
  check_bounds(address, bytes, thread);
  check_writable(address, bytes, thread, Access::store, static_cast<const std::byte*>(value));
  note_write(address, bytes, thread, false);
  return raw(address);
}

std::byte* SharedMemory::atomic(uint32_t address, int bytes, int thread) {
  check_bounds(address, bytes, thread);
  check_writable(address, bytes, thread, Access::atomic, nullptr);
  for (uint32_t i = number(address); i < number(address + bytes); ++i) {
    if (check_uninitialised_ && !granules_[i].initialised) {
      refuse_uninitialised("an atomic reads", i * granule_, thread);
    }
  }
  note_write(address, bytes, thread, true);
  return raw(address);
}

void SharedMemory::start_copy(uint32_t address, int bytes, int thread) {
  check_bounds(address, bytes, thread);
  check_writable(address, bytes, thread, Access::store, nullptr);
  for (uint32_t i = number(address); i < number(address + bytes); ++i) {
    granules_[i].in_flight = true;
    granules_[i].writer = static_cast<int16_t>(thread);
  }
}

void SharedMemory::finish_copy(uint32_t address, int bytes, int thread) {
  for (uint32_t i = number(address); i < number(address + bytes); ++i) granules_[i].in_flight = false;
  note_write(address, bytes, thread, false);
}

void SharedMemory::check_writable(uint32_t address, int bytes, int thread, Access access, const std::byte* value) {
  for (uint32_t i = number(address); i < number(address + bytes); ++i) {
    const Granule& granule = granules_[i];
    const uint32_t first = i * granule_;
    check_not_in_flight(granule, "writes", first, thread);
    const bool both_atomic = granule.by_atomic && access == Access::atomic;
    if (granule.writer >= 0 && !both_atomic && !clocks_.ordered(granule.writer, granule.clock, thread)) {
      const bool same_value = value != nullptr && std::memcmp(value + (first - address), raw(first), granule_) == 0;
      if (!same_value) {
        throw Fault("shared race",
                    "writes " + at(first) + " which " + by(granule.writer) + " wrote, with no barrier in between",
                    thread);
      }
    }
    if (read_before(i, thread)) continue;
    throw Fault("shared race", "writes " + at(first) + " which another thread read, with no barrier in between",
                thread);
  }
}

// Whether every read of a granule so far lies before what `thread` does now.
bool SharedMemory::read_before(int granule, int thread) const {
  const int own_warp = thread / kLanes;
  const uint32_t own_lane = thread % kLanes;
  for (int warp = 0; warp < warps_; ++warp) {
    const uint32_t read = reads_[granule * warps_ + warp];
    const uint32_t clock = read >> kLaneBits, lane = read & (kSeveralLanes * 2 - 1);
    const bool before =
        warp == own_warp ? lane == own_lane || clock < clocks_.own(warp) : clock <= clocks_.heard(own_warp, warp);
    if (!before) return false;
  }
  return true;
}

void SharedMemory::note_write(uint32_t address, int bytes, int thread, bool by_atomic) {
  const uint32_t clock = clocks_.own(thread / kLanes);
  for (uint32_t i = number(address); i < number(address + bytes); ++i) {
    granules_[i] = Granule{static_cast<int16_t>(thread), true, by_atomic, false, clock};
  }
}

}  // namespace emulation
