// The moves of the vector clocks.
#include "clocks.h"

#include <algorithm>

namespace emulation {

Clocks::Clocks(int warps) : warps_(warps), own_(warps, 1), heard_(warps * warps, 0), barriers_(kBarriers * warps, 0) {}

void Clocks::start_block() {
  for (int warp = 0; warp < warps_; ++warp) {
    std::copy(own_.begin(), own_.end(), heard_.begin() + warp * warps_);
  }
  for (uint32_t& clock : own_) ++clock;
  std::fill(barriers_.begin(), barriers_.end(), 0);
}

void Clocks::arrive(int barrier, int warp) {
  uint32_t* gathered = &barriers_[barrier * warps_];
  for (int other = 0; other < warps_; ++other) gathered[other] = std::max(gathered[other], heard(warp, other));
  gathered[warp] = std::max(gathered[warp], own_[warp]);
  ++own_[warp];
}

void Clocks::leave(int barrier, int warp) {
  const uint32_t* gathered = &barriers_[barrier * warps_];
  uint32_t* known = &heard_[warp * warps_];
  for (int other = 0; other < warps_; ++other) known[other] = std::max(known[other], gathered[other]);
}

void Clocks::reset(int barrier) { std::fill_n(barriers_.begin() + barrier * warps_, warps_, 0); }

}  // namespace emulation
