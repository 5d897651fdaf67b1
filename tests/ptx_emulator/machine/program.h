// A decoded kernel: instructions with their handlers, and where registers lie in a warp's register file.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace emulation {

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

struct Context;
using Handler = void (*)(Context&);

// How the scheduler treats an instruction before its handler sees it.
enum class Control {
  plain,         // any set of lanes
  branch,        // changes the program counter
  exit,          // ends lanes
  barrier,       // waits for the block
  collective,    // the lanes named by the last source must meet
  whole_warp,    // all live lanes must meet, and none may have exited
  warp_barrier,  // a collective that orders the memory accesses of its lanes
};

// A register of 32 lanes, 4 or 8 bytes each. Narrower values and predicates lie in the low bits of 4 bytes.
struct Operand {
  int32_t offset = 0;  // in bytes from the start of the register file
  bool wide = false;
};

struct Instruction {
  std::string name;  // canonical, as in the registry
  Handler handler = nullptr;
  Control control = Control::plain;
  std::vector<Operand> destinations;
  std::vector<Operand> sources;
  std::vector<int64_t> immediates;
  int32_t predicate = -1;  // offset of the guard's register, or -1
  bool negated = false;
  int32_t target = -1;  // of a branch: index of an instruction
  int32_t line = 0;     // of the PTX text, from 1
};

// A value that some register always holds.
struct Constant {
  Operand at;
  uint64_t value;
};

// Registers with a meaning, in the order of kSpecialRegisters; offset -1 where the kernel does not read one.
inline const std::vector<std::string> kSpecialRegisters = {
    "tid.x",          "tid.y",       "tid.z",       "ntid.x",      "ntid.y",      "ntid.z",      "ctaid.x",
    "ctaid.y",        "ctaid.z",     "nctaid.x",    "nctaid.y",    "nctaid.z",    "laneid",      "warpid",
    "nwarpid",        "lanemask_eq", "lanemask_lt", "lanemask_le", "lanemask_gt", "lanemask_ge", "dynamic_smem_size",
    "total_smem_size"};

struct Program {
  std::vector<Instruction> instructions;
  std::vector<Constant> constants;  // lie in front of every other register
  std::vector<int32_t> special;
  int32_t constant_bytes = 0;
  int32_t register_bytes = 0;   // of a warp, constants included
  int32_t shared_granule = 16;  // the smallest access of shared memory, in bytes: the unit of its shadow
  int32_t global_granule = 16;
  int32_t static_shared_bytes = 0;
};

}  // namespace emulation
