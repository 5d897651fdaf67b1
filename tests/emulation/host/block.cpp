// How the threads of a block take turns, meet, and end.
#include "block.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <new>

constinit thread_local uint3 threadIdx{};
constinit thread_local uint3 blockIdx{};
constinit thread_local dim3 blockDim{};
constinit thread_local dim3 gridDim{};

namespace rk::host {

namespace {

thread_local Block* running = nullptr;

// Unwinds the stack of a thread after its block has failed.
struct Abandoned {};

constexpr Operation kBarrier{"__syncthreads", 0, true};

unsigned char* allocate_shared(int bytes) {
  constexpr size_t kAlignment = 128;
  void* memory = nullptr;
  // Not rounded up, so that AddressSanitizer sees what comes after it.
  if (bytes > 0 && posix_memalign(&memory, kAlignment, bytes) != 0) throw std::bad_alloc();
  return static_cast<unsigned char*>(memory);
}

}  // namespace

Block& block() { return *running; }

void Block::FreeDeleter::operator()(unsigned char* p) const { std::free(p); }

Block::Block(const cuda::Launch& shape, const Settings& settings, const std::function<void()>& kernel)
    : settings_(settings),
      kernel_(kernel),
      shared_bytes_(shape.shared_bytes),
      shared_(allocate_shared(shape.shared_bytes)),
      stacks_(static_cast<int>(shape.threads)),
      threads_(shape.threads),
      arrived_lanes_((shape.threads + kWarpLanes - 1) / kWarpLanes) {
  running = this;
  blockDim = dim3(shape.threads, 1, 1);
  gridDim = dim3(shape.grid[0], shape.grid[1], shape.grid[2]);
  scheduler_.adopt_current();
}

Block::~Block() { running = nullptr; }

std::optional<Failure> Block::run(uint3 index) {
  index_ = blockIdx = index;
  random_.seed(settings_.seed + 7919 * (1 + index.x + gridDim.x * (index.y + gridDim.y * index.z)));
  failure_.reset();
  if (shared_bytes_ > 0) std::memset(shared_.get(), 0xFF, shared_bytes_);  // NaN, whatever the type
  start_threads();
  {
    Untraced runtime;
    while (unfinished_ > 0) {
      if (ready_.empty()) resolve_deadlock();
      current_ = &next();
      threadIdx = uint3{static_cast<unsigned>(current_->number), 0, 0};
      scheduler_.switch_to(current_->context);
    }
  }
  for (Thread& thread : threads_) thread.arrived.acquire();  // what they did comes before what the caller does next
  return failure_;
}

void Block::start_threads() {
  std::fill(arrived_lanes_.begin(), arrived_lanes_.end(), 0);
  unfinished_ = static_cast<int>(threads_.size());
  at_barrier_ = 0;
  for (int i = 0; i < unfinished_; ++i) {
    threads_[i].number = i;
    threads_[i].copies.clear();
    threads_[i].context.start(stacks_.lowest(i), &Block::fiber_entry);
    make_ready(threads_[i]);
  }
}

// Its own accesses come after the thread's last release, so they must not be seen.
RK_UNTRACED void Block::fiber_entry() {
  running->current_->context.entered(running->scheduler_);
  running->run_current();
  running->current_->context.leave_for(running->scheduler_);
}

void Block::run_current() {
  Thread& thread = *current_;
  try {
    kernel_();
    if (thread.copies.in_flight()) fail("asynchronous copies are in flight at exit");
  } catch (const Abandoned&) {
  } catch (const std::exception& error) {
    note(error.what(), thread.number);
  }
  Untraced runtime;
  thread.arrived.release();
  thread.state = State::kFinished;
  --unfinished_;
  open_barrier_if_complete();
}

Thread& Block::next() {
  auto chosen = ready_.begin();
  switch (settings_.order) {
    case Order::kFifo:
      break;
    case Order::kLifo:
      chosen = ready_.end() - 1;
      break;
    case Order::kReverse:
      chosen = std::max_element(ready_.begin(), ready_.end());
      break;
    case Order::kRandom:
      chosen += random_() % ready_.size();
      break;
  }
  Thread& thread = threads_[*chosen];
  if (chosen == ready_.begin()) {
    ready_.pop_front();
  } else {
    *chosen = ready_.back();
    ready_.pop_back();
  }
  return thread;
}

void Block::resolve_deadlock() {
  std::map<std::string, int> waiting;
  int first = -1;
  for (const Thread& thread : threads_) {
    if (thread.state == State::kFinished) continue;
    if (first < 0) first = thread.number;
    ++waiting[thread.operation.name];
  }
  std::string message = "deadlock: ";
  for (const auto& [name, threads] : waiting) message += std::to_string(threads) + " threads at " + name + ", ";
  const int finished = static_cast<int>(threads_.size()) - unfinished_;
  note(message + std::to_string(finished) + " finished", first);
  for (Thread& thread : threads_)
    if (thread.state != State::kFinished) make_ready(thread);  // to be unwound
}

// The first failure is the one that tells most.
void Block::note(const std::string& message, int thread) {
  if (!failure_) failure_ = Failure{message, index_, thread};
}

void Block::fail(const std::string& message) {
  Untraced runtime;
  note(message, current_->number);
  throw Abandoned{};
}

void Block::make_ready(Thread& thread) {
  thread.state = State::kReady;
  ready_.push_back(thread.number);
}

// Until another thread has made this one ready.
void Block::wait() {
  current_->context.switch_to(scheduler_);
  if (failure_) throw Abandoned{};
}

void Block::check_shared(const void* address, int bytes, const char* what) {
  const auto* p = static_cast<const unsigned char*>(address);
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0)
    fail(std::string(what) + ": the shared address is no multiple of " + std::to_string(bytes));
  if (p < shared_.get() || p + bytes > shared_.get() + shared_bytes_)
    fail(std::string(what) + ": the address is outside the dynamic shared memory");
}

void Block::meet_block() {
  Untraced runtime;
  Thread& thread = *current_;
  thread.operation = kBarrier;
  thread.state = State::kAtBarrier;
  thread.arrived.release();
  ++at_barrier_;
  open_barrier_if_complete();
  wait();
  thread.woken.acquire();
}

void Block::open_barrier_if_complete() {
  if (at_barrier_ == 0 || at_barrier_ < unfinished_) return;
  at_barrier_ = 0;
  std::vector<Thread*> waiting;
  for (Thread& thread : threads_)
    if (thread.state == State::kAtBarrier) waiting.push_back(&thread);
  for (Thread* thread : waiting) thread->arrived.acquire();
  for (Thread* thread : waiting) {
    thread->woken.release();
    make_ready(*thread);
  }
}

int Block::lanes_of_warp(int warp) const {
  return std::min(kWarpLanes, static_cast<int>(threads_.size()) - warp * kWarpLanes);
}

// Whether the calling lane is the last of the mask; another one waits, and finds its result when it returns.
bool Block::arrive(const Operation& operation, uint32_t mask) {
  Thread& thread = *current_;
  const int warp = thread.number / kWarpLanes, lane = thread.number % kWarpLanes, lanes = lanes_of_warp(warp);
  const auto fail_here = [&](const char* why) { fail(std::string(operation.name) + why); };
  if (!(mask >> lane & 1)) fail_here(": the mask leaves the calling lane out");
  if (lanes < kWarpLanes && mask >> lanes) fail_here(": the mask names lanes that do not exist");
  thread.operation = operation;
  thread.mask = mask;
  thread.state = State::kAtWarp;
  if (operation.orders_memory) thread.arrived.release();
  arrived_lanes_[warp] |= 1u << lane;
  if ((arrived_lanes_[warp] & mask) != mask) {
    wait();
    if (operation.orders_memory) thread.woken.acquire();
    return false;
  }
  arrived_lanes_[warp] &= ~mask;
  thread.state = State::kReady;
  for (int i = 0; i < lanes; ++i) {
    const Thread& other = threads_[warp * kWarpLanes + i];
    if (!(mask >> i & 1) || (other.mask == mask && other.operation == operation)) continue;
    const std::string theirs = other.operation.name;
    if (theirs == operation.name) fail_here(": the lanes disagree about their mask or their arguments");
    fail_here((": other lanes of the mask are at " + theirs).c_str());
  }
  return true;
}

void Block::wake_lanes(uint32_t mask) {
  Thread* warp = &threads_[current_->number / kWarpLanes * kWarpLanes];
  const bool orders_memory = current_->operation.orders_memory;
  for (int i = 0; orders_memory && i < kWarpLanes; ++i)
    if (mask >> i & 1) warp[i].arrived.acquire();
  for (int i = 0; i < kWarpLanes; ++i) {
    if (!(mask >> i & 1) || &warp[i] == current_) continue;
    if (orders_memory) warp[i].woken.release();
    make_ready(warp[i]);
  }
}

uint32_t Block::unfinished_lanes() const {
  const int warp = current_->number / kWarpLanes;
  uint32_t lanes = 0;
  for (int i = 0; i < lanes_of_warp(warp); ++i)
    if (threads_[warp * kWarpLanes + i].state != State::kFinished) lanes |= 1u << i;
  return lanes;
}

}  // namespace rk::host
