// Which warp has heard of what: vector clocks, one entry a warp, moved by barriers.
#pragma once
#include <cstdint>
#include <vector>

namespace emulation {

// An access at own(w) happened before a later one of warp v if v has heard of that clock of w. Barriers carry this
// knowledge. Clocks grow over a launch, so that all of an earlier block lies before the next one.
class Clocks {
 public:
  explicit Clocks(int warps);

  uint32_t own(int warp) const { return own_[warp]; }

  // Whether an access of `earlier` (a thread) at `clock` lies before one that `later` makes now.
  bool ordered(int earlier, uint32_t clock, int later) const {
    const int from = earlier / 32, to = later / 32;
    if (earlier == later) return true;
    if (from == to) return clock < own_[to];
    return clock <= heard(to, from);
  }
  uint32_t heard(int warp, int of) const { return heard_[warp * warps_ + of]; }

  void start_block();
  // Orders all that a warp did so far before all that it does from now on.
  void synchronize_warp(int warp) { ++own_[warp]; }
  // A barrier gathers what the warps that arrive know, and tells those that wait for it.
  void arrive(int barrier, int warp);
  void leave(int barrier, int warp);
  void reset(int barrier);

 private:
  int warps_;
  std::vector<uint32_t> own_;       // [warps]
  std::vector<uint32_t> heard_;     // [warps, warps]
  std::vector<uint32_t> barriers_;  // [kBarriers, warps]
};

constexpr int kBarriers = 16;

}  // namespace emulation
