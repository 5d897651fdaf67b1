// Runs or records a launch.
#include "launch.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <driver_types.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <deque>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <thread>
#include <utility>

#include "block.h"

namespace rk::host {

namespace {

thread_local Settings current_settings;
thread_local std::vector<Recorded> recorded;

// The mangled name, or nothing where the dynamic symbol table of its library does not hold the kernel.
std::optional<std::string> symbol_of(const void* kernel) {
  Dl_info info;
  if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr || info.dli_saddr != kernel) return std::nullopt;
  return info.dli_sname;
}

std::string readable_name(const void* kernel) {
  const std::optional<std::string> symbol = symbol_of(kernel);
  if (!symbol) return "a kernel";
  int status = 0;
  const std::unique_ptr<char, decltype(&std::free)> name(
      abi::__cxa_demangle(symbol->c_str(), nullptr, nullptr, &status), &std::free);
  return status == 0 ? name.get() : *symbol;
}

bool valid(const cuda::Launch& shape) {
  constexpr uint32_t kMaxGrid[] = {0x7fffffff, 65535, 65535};
  for (int i = 0; i < 3; ++i)
    if (shape.grid[i] < 1 || shape.grid[i] > kMaxGrid[i]) return false;
  return shape.threads >= 1 && shape.threads <= kMaxThreads && shape.shared_bytes >= 0;
}

void record(const void* kernel, const cuda::Launch& shape, const void* params, size_t params_bytes) {
  const std::optional<std::string> symbol = symbol_of(kernel);
  if (!symbol) {
    throw std::runtime_error(
        "a launch cannot be recorded, for its kernel has no name: a __global__ function must be outside anonymous "
        "namespaces, and its library compiled with -fvisibility=default");
  }
  const auto* bytes = static_cast<const unsigned char*>(params);
  recorded.push_back({*symbol,
                      {shape.grid[0], shape.grid[1], shape.grid[2]},
                      shape.threads,
                      shape.shared_bytes,
                      {bytes, bytes + params_bytes}});
}

std::vector<uint64_t> block_order(const cuda::Launch& shape) {
  std::vector<uint64_t> blocks(uint64_t{shape.grid[0]} * shape.grid[1] * shape.grid[2]);
  std::iota(blocks.begin(), blocks.end(), 0);
  if (current_settings.order == Order::kReverse) std::reverse(blocks.begin(), blocks.end());
  if (current_settings.order == Order::kRandom)
    std::shuffle(blocks.begin(), blocks.end(), std::minstd_rand(current_settings.seed));
  return blocks;
}

uint3 index_of(uint64_t number, const cuda::Launch& shape) {
  const uint64_t plane = uint64_t{shape.grid[0]} * shape.grid[1];
  return {static_cast<unsigned>(number % shape.grid[0]), static_cast<unsigned>(number % plane / shape.grid[0]),
          static_cast<unsigned>(number / plane)};
}

std::optional<Failure> run_blocks(const cuda::Launch& shape, const std::function<void()>& body) {
  Block block(shape, current_settings, body);
  for (const uint64_t number : block_order(shape))
    if (std::optional<Failure> failure = block.run(index_of(number, shape))) return failure;
  return std::nullopt;
}

// For ThreadSanitizer: blocks still run one after another, but each on a thread of its own, and nothing synchronizes
// these before the last has ended. So a conflict between blocks is a race, and static shared memory is a block's own.
class UnorderedBlocks {
 public:
  UnorderedBlocks(const cuda::Launch& shape, const std::function<void()>& body) : shape_(shape), body_(body) {}
  ~UnorderedBlocks() {
    while (!blocks_.empty()) drop_oldest();
  }

  std::optional<Failure> run() {
    const size_t kept = std::max<size_t>(kMaxFibers / shape_.threads, 1);
    std::optional<Failure> failure;
    for (const uint64_t number : block_order(shape_)) {
      if (blocks_.size() == kept) drop_oldest();
      run_next(number);
      if (failed_.load(std::memory_order_relaxed)) break;
    }
    while (!blocks_.empty()) {
      if (std::optional<Failure> of_block = drop_oldest()) failure = std::move(of_block);
    }
    return failure;
  }

 private:
  static constexpr size_t kMaxFibers = 4096;  // that exist at a time: about 8000 are possible

  // A fiber that is destroyed gives its number to a new one, whose accesses would pass as its own: so blocks are kept.
  struct Kept {
    std::thread thread;
    std::unique_ptr<Block> block;
    std::optional<Failure> failure;
  };

  void run_next(uint64_t number) {
    Kept& kept = blocks_.emplace_back();
    kept.thread = std::thread([this, number, &kept, settings = current_settings] {
      kept.block = std::make_unique<Block>(shape_, settings, body_);
      kept.failure = kept.block->run(index_of(number, shape_));
      if (kept.failure) failed_.store(true, std::memory_order_relaxed);
      ended_.fetch_add(1, std::memory_order_relaxed);
    });
    ++started_;
    while (ended_.load(std::memory_order_relaxed) < started_) std::this_thread::yield();
  }

  std::optional<Failure> drop_oldest() {
    blocks_.front().thread.join();
    std::optional<Failure> failure = std::move(blocks_.front().failure);
    blocks_.pop_front();
    return failure;
  }

  const cuda::Launch& shape_;
  const std::function<void()>& body_;
  std::deque<Kept> blocks_;
  size_t started_ = 0;
  std::atomic<size_t> ended_ = 0;
  std::atomic<bool> failed_ = false;
};

}  // namespace

Settings& settings() { return current_settings; }

std::vector<Recorded> take_recorded() { return std::exchange(recorded, {}); }

int launch(const void* kernel, const cuda::Launch& shape, const void* params, size_t params_bytes,
           const std::function<void()>& body) {
  if (!valid(shape)) return cudaErrorInvalidConfiguration;
  if (shape.shared_bytes > current_settings.shared_limit)
    throw KernelError(readable_name(kernel) + ": " + std::to_string(shape.shared_bytes) +
                      " bytes of dynamic shared memory, where a block may have " +
                      std::to_string(current_settings.shared_limit));
  if (current_settings.mode == Mode::kRecord) {
    record(kernel, shape, params, params_bytes);
    return cudaSuccess;
  }
  const auto failure = kThreadSanitizer ? UnorderedBlocks(shape, body).run() : run_blocks(shape, body);
  if (!failure) return cudaSuccess;
  const uint3 b = failure->block;
  throw KernelError(readable_name(kernel) + ": " + failure->message + " (block " + std::to_string(b.x) + "," +
                    std::to_string(b.y) + "," + std::to_string(b.z) + " thread " + std::to_string(failure->thread) +
                    ")");
}

}  // namespace rk::host
