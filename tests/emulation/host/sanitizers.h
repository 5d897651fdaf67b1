// What AddressSanitizer and ThreadSanitizer need to know of fibers, and what they must not see; nothing without them.
#pragma once

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
// For a function that changes stacks: its own accesses would count as the other fiber's.
#define RK_UNTRACED __attribute__((no_sanitize("thread"), noinline))
#else
#define RK_UNTRACED
#endif

namespace rk::host {

#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;

// While it lives, the accesses of the calling fiber are the runtime's own and no part of the kernel.
class Untraced {
 public:
  Untraced() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Untraced() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
  Untraced(const Untraced&) = delete;
  Untraced& operator=(const Untraced&) = delete;
};

// What comes before a release comes before what follows an acquire.
class Clock {
 public:
  void release() { __tsan_release(this); }
  void acquire() { __tsan_acquire(this); }

 private:
  long address_ = 0;  // of its own, so that no two clocks are one
};
#else
constexpr bool kThreadSanitizer = false;

class Untraced {
 public:
  Untraced() {}
  ~Untraced() {}  // a variable of this type is not an unused one
};

class Clock {
 public:
  void release() {}
  void acquire() {}
};
#endif

}  // namespace rk::host
