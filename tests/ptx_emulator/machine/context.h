// What a handler sees: its instruction, the lanes that execute it, and the machine around them.
#pragma once
#include <cstddef>
#include <vector>

#include "counters.h"
#include "global_memory.h"
#include "shared_memory.h"
#include "warp.h"

namespace emulation {

// Windows of generic addresses. No array can lie there: user space ends below.
constexpr uint64_t kSharedWindow = 0x7ffd000000000000ull;
constexpr uint64_t kParameterWindow = 0x7ffe000000000000ull;
constexpr uint64_t kWindowBytes = 1 << 24;

struct Machine {
  GlobalMemory& global;
  SharedMemory& shared;
  Counters& counters;
  std::vector<std::byte> parameters;
  bool early_copies = false;
  int block = 0;  // its number
};

struct Context {
  const Instruction& instruction;
  Warp& warp;
  uint32_t lanes;
  Machine& machine;

  template <class T>
  Lanes<T> destination(int i) const {
    return Lanes<T>(warp.registers + instruction.destinations[i].offset);
  }
  template <class T>
  Lanes<T> source(int i) const {
    return Lanes<T>(warp.registers + instruction.sources[i].offset);
  }
  uint64_t source_bits(int i, int lane) const { return read_bits(warp, instruction.sources[i], lane); }
  void set_bits(int i, int lane, uint64_t value) const { write_bits(warp, instruction.destinations[i], lane, value); }
  int64_t immediate(int i) const { return instruction.immediates[i]; }
};

}  // namespace emulation
