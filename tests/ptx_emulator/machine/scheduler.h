// Runs the blocks of a launch one after the other, and the warps of a block in turns.
#pragma once
#include <random>
#include <vector>

#include "context.h"

namespace emulation {

// In which order blocks and warps run. The first two run a warp until it has to wait.
enum class Order { forward, backward, random };

struct Launch {
  int grid[3] = {1, 1, 1};
  int threads[3] = {1, 1, 1};  // of a block
  int dynamic_shared_bytes = 0;
  Order order = Order::forward;
  int64_t instruction_limit = 0;  // of a block's warps together: beyond it the kernel hangs
  uint32_t seed = 0;
  std::vector<int> blocks;  // that run, by number; empty: all
};

class Scheduler {
 public:
  Scheduler(const Program& program, const Launch& launch, Machine& machine);

  // Throws Fault.
  void run();

 private:
  struct Barrier {
    int arrived = 0;   // threads
    int expected = 0;  // threads; 0: all that live
  };
  enum class Step {
    done,       // on to the next instruction
    must_wait,  // for lanes of the warp that are elsewhere
    handled,    // the group's state is already right
  };

  void run_block(int number);
  void start_block(int number);
  void set_special_registers(Warp& warp) const;

  // Until the warp has to wait or has executed `quantum` instructions.
  void run_warp(Warp& warp, int quantum);
  // Executes one instruction of a group. May add and remove groups.
  void step(Warp& warp, size_t group);
  uint32_t guarded(const Warp& warp, const Instruction& instruction, uint32_t lanes) const;
  void execute(Warp& warp, const Instruction& instruction, uint32_t lanes);

  void branch(Warp& warp, size_t group, uint32_t taken);
  void exit_lanes(Warp& warp, size_t group, uint32_t exiting);
  Step collective(Warp& warp, const Instruction& instruction, uint32_t present, uint32_t active);
  Step whole_warp(Warp& warp, const Instruction& instruction, uint32_t present, uint32_t active);
  Step barrier(Warp& warp, size_t group, uint32_t active);
  void release_if_complete(int id);

  [[noreturn]] void report_deadlock();

  const Program& program_;
  const Launch& launch_;
  Machine& machine_;
  int threads_, live_threads_ = 0;
  int block_[3] = {0, 0, 0};
  int64_t executed_ = 0;  // by the block
  std::vector<std::byte> registers_;
  std::vector<Warp> warps_;
  Barrier barriers_[kBarriers];
  std::minstd_rand random_;
};

}  // namespace emulation
