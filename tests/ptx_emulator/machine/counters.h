// What a launch costs in a simple model of the memory system.
#pragma once
#include <cstdint>
#include <vector>

namespace emulation {

struct Counters {
  int64_t warp_instructions = 0;
  int64_t mma = 0;
  int64_t global_requests = 0;  // warp instructions that access global memory
  int64_t global_sectors = 0;   // of 32 bytes, distinct within a request
  int64_t ideal_sectors = 0;    // that would hold the distinct bytes of a request
  int64_t global_bytes = 0;     // requested, by all lanes
  int64_t shared_wavefronts = 0;
  int64_t ideal_wavefronts = 0;   // with no bank conflict
  std::vector<int64_t> executed;  // of each instruction of the program, by warps

  // `addresses`: of the lanes in the mask; each lane accesses `bytes`.
  void count_global(const uint64_t* addresses, uint32_t lanes, int bytes);
  void count_shared(const uint64_t* addresses, uint32_t lanes, int bytes);
};

}  // namespace emulation
