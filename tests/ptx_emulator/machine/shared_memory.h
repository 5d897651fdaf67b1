// A block's shared memory, with a shadow that knows who touched what when.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "clocks.h"

namespace emulation {

enum class Access { load, store, atomic };

class SharedMemory {
 public:
  // `granule`: bytes, a power of two that divides the size of every access.
  SharedMemory(int bytes, int granule, int warps, bool check_uninitialised);

  int size() const { return size_; }
  Clocks& clocks() { return clocks_; }
  void start_block();

  // Checks an access and gives its bytes. `value`: what a store is about to write, since equal values do not race.
  std::byte* load(uint32_t address, int bytes, int thread);
  std::byte* store(uint32_t address, int bytes, int thread, const void* value);
  std::byte* atomic(uint32_t address, int bytes, int thread);

  // The target of a cp.async belongs to the copy until its thread has waited for it.
  void start_copy(uint32_t address, int bytes, int thread);
  void finish_copy(uint32_t address, int bytes, int thread);

  // Without checks: the copy itself.
  std::byte* raw(uint32_t address) { return data_.data() + address; }

 private:
  struct Granule {
    int16_t writer = -1;  // a thread
    bool initialised = false;
    bool by_atomic = false;
    bool in_flight = false;
    uint32_t clock = 0;  // of the writer's warp, then
  };

  void check_bounds(uint32_t address, int bytes, int thread) const;
  void check_not_in_flight(const Granule& granule, const char* what, uint32_t address, int thread) const;
  // Apart from the checks, which run often and are to be short.
  [[noreturn]] void refuse_bounds(const char* kind, uint32_t address, int bytes, int thread) const;
  [[noreturn]] void refuse_in_flight(const Granule& granule, const char* what, uint32_t address, int thread) const;
  [[noreturn]] void refuse_read(const Granule& granule, uint32_t address, int thread) const;
  [[noreturn]] void refuse_uninitialised(const char* what, uint32_t address, int thread) const;
  uint32_t number(uint32_t address) const { return address >> granule_bits_; }  // of a granule
  void check_writable(uint32_t address, int bytes, int thread, Access access, const std::byte* value);
  void note_write(uint32_t address, int bytes, int thread, bool by_atomic);
  bool read_before(int granule, int thread) const;

  int size_, granule_, granule_bits_, warps_;
  bool check_uninitialised_;
  Clocks clocks_;
  std::vector<std::byte> data_;
  std::vector<Granule> granules_;
  std::vector<uint32_t> reads_;  // [granules, warps]: clock of the warp's last read << 6 | lane, or kSeveralLanes
};

}  // namespace emulation
