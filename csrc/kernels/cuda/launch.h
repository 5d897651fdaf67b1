// The shape of a launch: what a plan chooses, and what a launcher and the emulated tests take from it.
#pragma once
#include <cstdint>

namespace rk::cuda {

struct Launch {
  uint32_t grid[3] = {1, 1, 1};
  uint32_t threads = 0;  // of a block
  int shared_bytes = 0;  // dynamic
};

// What a plan needs to know of a device.
struct Device {
  int multiprocessors = 0;
  int shared_bytes_per_block = 0;  // with the opt-in
  int shared_bytes_per_multiprocessor = 0;
};

}  // namespace rk::cuda
