// Global memory: the arrays that a launch may touch, each real or sparse, and which block touched what.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "shared_memory.h"

namespace emulation {

constexpr uint64_t kPageBytes = 1 << 16;

// A range of addresses with no memory of its own: pages appear, filled with a pattern, when they are first touched.
class SparseMemory {
 public:
  SparseMemory(uint64_t base, uint64_t size, std::string fill);

  uint64_t base() const { return base_; }
  uint64_t size() const { return size_; }
  std::byte* at(uint64_t offset);  // valid up to the end of its page
  std::string read(uint64_t offset, uint64_t bytes);
  void write(uint64_t offset, const std::string& bytes);
  uint64_t touched_bytes() const { return pages_.size() * kPageBytes; }

 private:
  uint64_t base_, size_;
  std::string fill_;
  std::unordered_map<uint64_t, std::unique_ptr<std::byte[]>> pages_;  // those that were touched
};

struct Region {
  uint64_t base = 0, size = 0;
  bool writable = true;
  SparseMemory* sparse = nullptr;  // not owned; null where base is a real address
};

class GlobalMemory {
 public:
  // `granule`: as for shared memory. `check_races`: between blocks.
  GlobalMemory(std::vector<Region> regions, int granule, bool check_races);

  // Checks an access and gives its bytes. `block`: the number of the block.
  std::byte* access(uint64_t address, int bytes, Access access, int block, int thread);

 private:
  // Blocks that touched a granule: 0 for none, else number + 1, or kSeveral.
  struct Touches {
    int32_t writer = 0, reader = 0, atomic = 0;
  };
  struct Tracked : Region {
    std::unordered_map<uint64_t, std::vector<Touches>> pages;  // those that were touched
    uint64_t last_number = ~0ull;                              // of a page
    Touches* last_page = nullptr;
  };

  Touches* touches(Tracked& region, uint64_t page) const;

  Tracked& find(uint64_t address, int bytes, int thread);
  void check_race(Touches& touches, Access access, int block, int thread) const;

  std::vector<Tracked> regions_;
  Tracked* last_ = nullptr;
  int granule_, granule_bits_;
  bool check_races_;
};

}  // namespace emulation
