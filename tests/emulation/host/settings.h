// What tests choose about launches, and what launches tell them.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace rk::host {

enum class Mode { kRun, kRecord };

// Which of the threads that can go on is next. Blocks follow one another, in kReverse the last first, in kRandom
// shuffled.
enum class Order { kFifo, kLifo, kReverse, kRandom };

struct Settings {
  Mode mode = Mode::kRun;
  Order order = Order::kFifo;
  uint32_t seed = 1;              // of kRandom
  bool late_copies = true;        // asynchronous copies happen when they are waited for, or else at once
  int shared_limit = 227 * 1024;  // bytes of dynamic shared memory that a block may have
};

// Of the calling thread.
Settings& settings();

// A launch that was not executed.
struct Recorded {
  std::string name;  // the kernel's symbol, mangled: as in what nvcc makes of the same source
  uint32_t grid[3];
  uint32_t threads;
  int shared_bytes;
  std::vector<unsigned char> params;
};

// Those of the calling thread since the last call.
std::vector<Recorded> take_recorded();

// A kernel did what is not allowed on a device; the message names the kernel, the block and the thread.
class KernelError : public std::runtime_error {
 public:
  using runtime_error::runtime_error;
};

}  // namespace rk::host
