// A warp's state, and typed views of its registers.
#pragma once
#include <bit>
#include <cstring>
#include <deque>
#include <type_traits>
#include <vector>

#include "numbers.h"
#include "program.h"

namespace emulation {

// Lanes of a warp that share a program counter.
struct Group {
  enum class State { ready, at_barrier, at_collective };
  int32_t pc = 0;
  uint32_t lanes = 0;
  State state = State::ready;
  int barrier = -1;
};

// One thread's cp.async.
struct Copy {
  uint32_t shared;
  uint64_t global;
  int bytes;         // written
  int source_bytes;  // read; the rest becomes zero
};

// The copies of one thread: groups[i] are those before the i-th commit that is not yet waited for.
struct CopyQueue {
  std::vector<Copy> uncommitted;
  std::deque<std::vector<Copy>> groups;
};

struct Warp {
  int id = 0;
  uint32_t live = 0;  // lanes that have not exited
  std::vector<Group> groups;
  std::byte* registers = nullptr;
  CopyQueue copies[kLanes];

  int thread(int lane) const { return id * kLanes + lane; }
};

// A register as 32 values of T; T of up to 4 bytes lies in a 4-byte lane.
template <class T>
class Lanes {
  using Word = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

 public:
  explicit Lanes(std::byte* at) : words_(reinterpret_cast<Word*>(at)) {}
  T operator[](int lane) const { return from_bits<T>(words_[lane]); }
  void set(int lane, T value) const { words_[lane] = static_cast<Word>(to_bits(value)); }

 private:
  Word* words_;
};

// Registers whose width the instruction does not tell: loads, stores, conversions, moves.
inline uint64_t read_bits(const Warp& warp, Operand operand, int lane) {
  const std::byte* at = warp.registers + operand.offset;
  if (operand.wide) return reinterpret_cast<const uint64_t*>(at)[lane];
  return reinterpret_cast<const uint32_t*>(at)[lane];
}

inline void write_bits(Warp& warp, Operand operand, int lane, uint64_t value) {
  std::byte* at = warp.registers + operand.offset;
  if (operand.wide) {
    reinterpret_cast<uint64_t*>(at)[lane] = value;
  } else {
    reinterpret_cast<uint32_t*>(at)[lane] = static_cast<uint32_t>(value);
  }
}

// f(lane) for each lane of a mask, in order. Lanes are independent of each other in f: a register is both source and
// destination only lane by lane.
template <class F>
inline void each_lane(uint32_t lanes, F f) {
  if (lanes == kAllLanes) {
#pragma GCC ivdep
    for (int lane = 0; lane < kLanes; ++lane) f(lane);
  } else {
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) f(std::countr_zero(rest));
  }
}

// The same in order, for work on more than registers.
template <class F>
inline void each_lane_in_order(uint32_t lanes, F f) {
  for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) f(std::countr_zero(rest));
}

}  // namespace emulation
