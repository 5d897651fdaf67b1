// A block of threads, each on a fiber, which take turns where they wait for one another.
//
// Between two places to wait a thread runs without interruption. Where no thread can go on, the block is in a deadlock.
#pragma once
#include <vector_types.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "copies.h"
#include "fibers.h"
#include "kernels/cuda/launch.h"
#include "sanitizers.h"
#include "settings.h"

namespace rk::host {

constexpr int kWarpLanes = 32, kMaxThreads = 1024;

// What the threads that meet must all do: of one name, and with the same value where there is one.
struct Operation {
  const char* name;
  int value = 0;
  bool orders_memory = false;  // what a thread wrote before it, the others may read after it

  bool operator==(const Operation&) const = default;
};

enum class State : uint8_t { kReady, kAtWarp, kAtBarrier, kFinished };

struct Thread {
  int number = 0;
  State state = State::kFinished;
  Context context;
  Operation operation{};  // where it waits, and with which lanes
  uint32_t mask = 0;
  alignas(16) unsigned char operand[64];  // what it gives to the lanes it meets, and what it gets
  alignas(16) unsigned char result[64];
  Clock arrived, woken;
  Copies copies;
};

struct Failure {
  std::string message;
  uint3 block;
  int thread;
};

class Block {
 public:
  Block(const cuda::Launch& shape, const Settings& settings, const std::function<void()>& kernel);
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  std::optional<Failure> run(uint3 index);

  // What follows is for the threads that run.

  Thread& current() { return *current_; }
  unsigned char* shared() { return shared_.get(); }
  bool late_copies() const { return settings_.late_copies; }

  // That an address is a multiple of `bytes`, a power of two, and that many follow in the dynamic shared memory.
  void check_shared(const void* address, int bytes, const char* what);

  // Ends the block: the other threads are unwound where they wait.
  [[noreturn]] void fail(const std::string& message);

  // For all threads that have not finished.
  void meet_block();

  // For the lanes of a mask: the last to come computes the results of all with combine(lane 0), then all go on.
  template <class Combine>
  void meet_warp(const Operation& operation, uint32_t mask, Combine combine) {
    if (!arrive(operation, mask)) return;
    combine(&threads_[current_->number / kWarpLanes * kWarpLanes]);
    wake_lanes(mask);
  }

  uint32_t unfinished_lanes() const;

 private:
  struct FreeDeleter {
    void operator()(unsigned char* p) const;
  };

  static void fiber_entry();
  void run_current();
  void start_threads();
  Thread& next();
  void resolve_deadlock();
  void note(const std::string& message, int thread);
  void make_ready(Thread& thread);
  void wait();
  void open_barrier_if_complete();
  bool arrive(const Operation& operation, uint32_t mask);
  void wake_lanes(uint32_t mask);
  int lanes_of_warp(int warp) const;

  const Settings settings_;
  const std::function<void()>& kernel_;
  const int shared_bytes_;
  const std::unique_ptr<unsigned char, FreeDeleter> shared_;
  const Stacks stacks_;
  std::vector<Thread> threads_;
  std::vector<uint32_t> arrived_lanes_;  // of each warp
  std::deque<int> ready_;
  std::minstd_rand random_;
  Context scheduler_;
  Thread* current_ = nullptr;
  uint3 index_{};
  int unfinished_ = 0, at_barrier_ = 0;
  std::optional<Failure> failure_;
};

// The block whose thread calls.
Block& block();

}  // namespace rk::host

// Where the running thread is, under the names of CUDA C++.
extern constinit thread_local uint3 threadIdx;
extern constinit thread_local uint3 blockIdx;
extern constinit thread_local dim3 blockDim;
extern constinit thread_local dim3 gridDim;
