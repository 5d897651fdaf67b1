// What the lanes of a warp do together: shuffles, votes, matches and reductions, under the names of CUDA C++.
#pragma once
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>

#include "block.h"

namespace rk::host {

// What the lanes of a mask have given.
template <class Operand>
class Lanes {
 public:
  Lanes(const Thread* warp, uint32_t mask) : warp_(warp), mask_(mask) {}

  bool has(int lane) const { return lane >= 0 && lane < kWarpLanes && (mask_ >> lane & 1); }
  const Operand& operator[](int lane) const { return *reinterpret_cast<const Operand*>(warp_[lane].operand); }

 private:
  const Thread* warp_;
  uint32_t mask_;
};

// Every lane of the mask gives an operand and gets its result; combine(lanes, results) computes those of all lanes.
template <class Result, class Operand, class Combine>
Result exchange(const Operation& operation, uint32_t mask, const Operand& operand, Combine combine) {
  static_assert(sizeof(Operand) <= sizeof(Thread::operand) && std::is_trivially_copyable_v<Operand>);
  static_assert(sizeof(Result) <= sizeof(Thread::result) && std::is_trivially_copyable_v<Result>);
  Untraced runtime;
  Thread& self = block().current();
  new (self.operand) Operand(operand);
  block().meet_warp(operation, mask, [&](Thread* warp) {
    const Lanes<Operand> lanes(warp, mask);
    Result results[kWarpLanes];
    combine(lanes, results);
    for (int lane = 0; lane < kWarpLanes; ++lane)
      if (lanes.has(lane)) new (warp[lane].result) Result(results[lane]);
  });
  return *reinterpret_cast<const Result*>(self.result);
}

// The same result for all lanes.
template <class Result, class Operand, class Combine>
Result exchange_for_one(const Operation& operation, uint32_t mask, const Operand& operand, Combine combine) {
  return exchange<Result>(operation, mask, operand, [&](const Lanes<Operand>& lanes, Result(&results)[kWarpLanes]) {
    const Result result = combine(lanes);
    for (Result& of_lane : results) of_lane = result;
  });
}

template <class T>
T shuffle(const char* name, uint32_t mask, T value, int source, int width) {
  struct Operand {
    T value;
    int source;
  };
  const auto combine = [](const Lanes<Operand>& lanes, T(&results)[kWarpLanes]) {
    std::memset(static_cast<void*>(results), 0xFF, sizeof results);  // what a lane outside the mask gives is undefined
    for (int lane = 0; lane < kWarpLanes; ++lane)
      if (lanes.has(lane) && lanes.has(lanes[lane].source)) results[lane] = lanes[lanes[lane].source].value;
  };
  return exchange<T>({name, width}, mask, Operand{value, source}, combine);
}

template <class T, class Join>
T reduce(const char* name, uint32_t mask, T value, Join join) {
  return exchange_for_one<T>({name}, mask, value, [&](const Lanes<T>& lanes) {
    int lane = 0;
    while (!lanes.has(lane)) ++lane;
    T result = lanes[lane];
    while (++lane < kWarpLanes)
      if (lanes.has(lane)) result = join(result, lanes[lane]);
    return result;
  });
}

inline int lane() { return block().current().number % kWarpLanes; }

}  // namespace rk::host

constexpr int warpSize = rk::host::kWarpLanes;

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
  const int first = rk::host::lane() & ~(width - 1);
  return rk::host::shuffle("__shfl_sync", mask, value, first | (source & (width - 1)), width);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  const int lane = rk::host::lane();
  const bool own = static_cast<unsigned>(lane & (width - 1)) < delta;
  return rk::host::shuffle("__shfl_up_sync", mask, value, own ? lane : lane - static_cast<int>(delta), width);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  const int lane = rk::host::lane();
  const bool own = (lane & (width - 1)) + delta >= static_cast<unsigned>(width);
  return rk::host::shuffle("__shfl_down_sync", mask, value, own ? lane : lane + static_cast<int>(delta), width);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize) {
  const int lane = rk::host::lane(), source = lane ^ lane_mask, end = (lane & ~(width - 1)) + width;
  return rk::host::shuffle("__shfl_xor_sync", mask, value, source >= end ? lane : source, width);
}

inline void __syncwarp(unsigned mask = ~0u) {
  constexpr rk::host::Operation kSyncWarp{"__syncwarp", 0, true};
  rk::host::Untraced runtime;
  rk::host::block().meet_warp(kSyncWarp, mask, [](rk::host::Thread*) {});
}

inline void __syncthreads() { rk::host::block().meet_block(); }

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const auto combine = [](const rk::host::Lanes<bool>& lanes) {
    unsigned ballot = 0;
    for (int lane = 0; lane < warpSize; ++lane)
      if (lanes.has(lane) && lanes[lane]) ballot |= 1u << lane;
    return ballot;
  };
  return rk::host::exchange_for_one<unsigned>({"__ballot_sync"}, mask, predicate != 0, combine);
}

inline int __any_sync(unsigned mask, int predicate) {
  return rk::host::reduce("__any_sync", mask, predicate != 0, [](bool a, bool b) { return a || b; });
}

inline int __all_sync(unsigned mask, int predicate) {
  return rk::host::reduce("__all_sync", mask, predicate != 0, [](bool a, bool b) { return a && b; });
}

template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  const auto combine = [](const rk::host::Lanes<T>& lanes, unsigned (&results)[warpSize]) {
    for (int lane = 0; lane < warpSize; ++lane) {
      results[lane] = 0;
      for (int other = 0; lanes.has(lane) && other < warpSize; ++other)
        if (lanes.has(other) && lanes[other] == lanes[lane]) results[lane] |= 1u << other;
    }
  };
  return rk::host::exchange<unsigned>({"__match_any_sync"}, mask, value, combine);
}

template <class T>
T __reduce_add_sync(unsigned mask, T value) {
  // As unsigned numbers, which may overflow.
  using Sum = std::make_unsigned_t<T>;
  return static_cast<T>(rk::host::reduce("__reduce_add_sync", mask, static_cast<Sum>(value),
                                         [](Sum a, Sum b) { return static_cast<Sum>(a + b); }));
}

template <class T>
T __reduce_min_sync(unsigned mask, T value) {
  return rk::host::reduce("__reduce_min_sync", mask, value, [](T a, T b) { return a < b ? a : b; });
}

template <class T>
T __reduce_max_sync(unsigned mask, T value) {
  return rk::host::reduce("__reduce_max_sync", mask, value, [](T a, T b) { return a < b ? b : a; });
}

inline unsigned __reduce_and_sync(unsigned mask, unsigned value) {
  return rk::host::reduce("__reduce_and_sync", mask, value, [](unsigned a, unsigned b) { return a & b; });
}

inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return rk::host::reduce("__reduce_or_sync", mask, value, [](unsigned a, unsigned b) { return a | b; });
}

inline unsigned __reduce_xor_sync(unsigned mask, unsigned value) {
  return rk::host::reduce("__reduce_xor_sync", mask, value, [](unsigned a, unsigned b) { return a ^ b; });
}

// On a device any lanes that happen to run together: here all that could.
inline unsigned __activemask() { return rk::host::block().unfinished_lanes(); }
