// Stacks, and the switch from one to another.
#pragma once
#include <cstddef>

#include "sanitizers.h"

namespace rk::host {

// Stacks side by side; between them lie pages that must not be touched, so that an overflow ends the process.
class Stacks {
 public:
  static constexpr size_t kBytes = 256 * 1024;  // of a stack

  explicit Stacks(int count);
  ~Stacks();
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  unsigned char* lowest(int number) const;

 private:
  unsigned char* memory_;
  size_t bytes_;
};

// Code that can be left and entered again: a fiber, or what was there before the first one.
class Context {
 public:
  Context() = default;
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  // The calling code.
  void adopt_current();

  // A fiber that has not begun, in place of one that has ended. `entry` never returns; it calls `entered` first and
  // `leave_for` last.
  void start(unsigned char* lowest, void (*entry)());
  void entered(Context& from);

  void switch_to(Context& to);
  [[noreturn]] void leave_for(Context& to);

 private:
  void switch_stacks(Context& to, bool comes_back);
  void destroy_fiber();

  void* stack_pointer_ = nullptr;
  const void* lowest_ = nullptr;
  size_t bytes_ = 0;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack_ = nullptr;
#endif
#if defined(__SANITIZE_THREAD__)
  void* fiber_ = nullptr;
  bool owns_fiber_ = false;
#endif
};

}  // namespace rk::host
