// What a kernel did wrong, as an exception that gathers where on its way up.
#pragma once
#include <stdexcept>
#include <string>

namespace emulation {

struct Fault : std::runtime_error {
  // `thread_in_block` is -1 where no single thread is at fault.
  Fault(std::string kind_of_fault, const std::string& detail, int thread_in_block = -1)
      : std::runtime_error(detail), kind(std::move(kind_of_fault)), thread(thread_in_block) {}

  std::string kind;
  int thread;
  int line = -1;  // of the PTX text
  int block[3] = {-1, -1, -1};
};

}  // namespace emulation
