// What the programs without Python share: checks on every schedule, and the exit status.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "settings.h"

namespace rk::host {

struct Check {
  std::string name;
  std::function<bool()> is_right;
  bool copies = true;  // asynchronous ones, which are late or early
  bool large = false;  // so only in a random order
};

// ThreadSanitizer takes seconds for a few blocks.
#ifdef __SANITIZE_THREAD__
constexpr bool kFew = true;
#else
constexpr bool kFew = false;
#endif

// Of exactly so many bytes, aligned to 16.
inline std::unique_ptr<char, void (*)(void*)> scratch_memory(int64_t bytes) {
  return {static_cast<char*>(std::aligned_alloc(16, (bytes + 15) / 16 * 16)), [](void* memory) { std::free(memory); }};
}

// Exit status: 0 right, 1 a wrong result, 2 a KernelError, which ends all.
inline int run_checks(const std::vector<Check>& checks) {
  bool right = true;
  try {
    for (const Order order : {Order::kFifo, Order::kLifo, Order::kReverse, Order::kRandom})
      for (const bool late : {true, false}) {
        settings().order = order;
        settings().late_copies = late;
        for (const Check& check : checks) {
          if ((check.large && order != Order::kRandom) || (!check.copies && !late) || check.is_right()) continue;
          std::printf("%s: a wrong result\n", check.name.c_str());
          right = false;
        }
      }
  } catch (const KernelError& error) {
    std::printf("KernelError: %s\n", error.what());
    return 2;
  }
  return right ? 0 : 1;
}

}  // namespace rk::host
