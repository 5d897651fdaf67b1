// Stacks from the system, and the switch between them: for x86-64 under the System V calling convention.
#include "fibers.h"

#include <sys/mman.h>

#include <new>

#if !defined(__x86_64__)
#error "fibers are written for x86-64"
#endif

// void rk_switch_stacks(void** save, void* load): keeps the registers that belong to the caller on its stack.
asm(R"(
.text
.hidden rk_switch_stacks
.globl rk_switch_stacks
.type rk_switch_stacks, @function
rk_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size rk_switch_stacks, . - rk_switch_stacks
)");
extern "C" __attribute__((visibility("hidden"))) void rk_switch_stacks(void** save, void* load);

namespace rk::host {

namespace {

constexpr size_t kGuardBytes = 4096;
constexpr int kSavedRegisters = 6;

}  // namespace

Stacks::Stacks(int count) : bytes_(count * (kGuardBytes + kBytes)) {
  void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<unsigned char*>(memory);
  for (int i = 0; i < count; ++i) mprotect(lowest(i) - kGuardBytes, kGuardBytes, PROT_NONE);
}

Stacks::~Stacks() {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(memory_, bytes_);
#endif
  munmap(memory_, bytes_);
}

unsigned char* Stacks::lowest(int number) const { return memory_ + number * (kGuardBytes + kBytes) + kGuardBytes; }

Context::~Context() { destroy_fiber(); }

void Context::adopt_current() {
#if defined(__SANITIZE_THREAD__)
  fiber_ = __tsan_get_current_fiber();
#endif
}

void Context::start(unsigned char* lowest, void (*entry)()) {
  lowest_ = lowest;
  bytes_ = Stacks::kBytes;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(lowest, bytes_);  // frames that an earlier fiber never left
  fake_stack_ = nullptr;
#endif
#if defined(__SANITIZE_THREAD__)
  destroy_fiber();
  fiber_ = __tsan_create_fiber(0);
  owns_fiber_ = true;
#endif
  void** top = reinterpret_cast<void**>(lowest + bytes_ - 64);  // a multiple of 16, as before a call
  *--top = nullptr;                                             // the entry's return address
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  stack_pointer_ = top;
}

RK_UNTRACED void Context::entered([[maybe_unused]] Context& from) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack_, &from.lowest_, &from.bytes_);
#endif
}

RK_UNTRACED void Context::switch_stacks(Context& to, [[maybe_unused]] bool comes_back) {
  void* const target = to.stack_pointer_;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(comes_back ? &fake_stack_ : nullptr, to.lowest_, to.bytes_);
#endif
#if defined(__SANITIZE_THREAD__)
  constexpr unsigned kNoSynchronization = 1;
  __tsan_switch_to_fiber(to.fiber_, kNoSynchronization);
#endif
  rk_switch_stacks(&stack_pointer_, target);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
}

RK_UNTRACED void Context::switch_to(Context& to) { switch_stacks(to, true); }

RK_UNTRACED void Context::leave_for(Context& to) {
  switch_stacks(to, false);
  __builtin_trap();
}

void Context::destroy_fiber() {
#if defined(__SANITIZE_THREAD__)
  if (owns_fiber_) __tsan_destroy_fiber(fiber_);
  owns_fiber_ = false;
#endif
}

}  // namespace rk::host
